"""Who may connect: the place for authentication methods, and the simplest of them, trust.

A method is a generator function.  It yields each message that the client is to be sent, is sent
the contents of the client's answer back, and returns a :class:`Grant` when the client is who it
says it is::

    def authenticate(self, startup, peer):
        answer = yield AuthenticationCleartextPassword.build()
        if not self.is_password(startup.user, answer):
            raise InvalidPassword(...)
        return Grant("password")
"""

from __future__ import annotations

from collections.abc import Generator

from zope.interface import Interface, implementer

from walproto.access.grant import Grant
from walproto.access.peer import Peer
from walproto.wire.startup import Startup

Exchange = Generator[bytes, bytes, Grant]


class IAuthenticator(Interface):
    """Decides whether a client may connect."""

    def authenticate(startup: Startup, peer: Peer) -> Exchange:
        """The exchange with a client that asks for ``startup`` from ``peer``.

        The generator yields messages, gets the contents of PasswordMessages, and returns when all
        is well; AuthenticationOk follows by itself.  It raises a FATAL ReportedError to refuse.
        """


@implementer(IAuthenticator)
class Trust:
    """Everybody is who they say they are (``trust`` in ``pg_hba.conf``)."""

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        return Grant("trust")
        yield b""
