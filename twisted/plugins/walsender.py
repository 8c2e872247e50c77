"""``twist walsender``: tells Twisted's plugin system where the service is made."""

from twisted.application.service import ServiceMaker

walsender = ServiceMaker(
    "walproto WAL sender",
    "walproto.tap",
    "Serve PostgreSQL WAL from a directory to standbys, pg_receivewal and other clients.",
    "walsender",
)
