"""How a WAL sender serves, the same for all its connections."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from walproto.access.authentication import IAuthenticator
from walproto.access.guard import Guard
from walproto.server.settings import DEFAULT_WAL_SENDER_TIMEOUT
from walproto.server.transports import ServerTls
from walproto.wal.pages import Identity
from walproto.wire.messages import PROTOCOL_3_0, PROTOCOL_3_2

_VERSION = re.compile(r"([1-9][0-9])(?:\.([0-9]{1,2}))?(?![0-9.])")


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor of a ``server_version``, ``18.6`` or ``15.18 (Debian …)``; ValueError if it
    is not of a major from 13 on."""
    match = _VERSION.match(text)
    if match is None or int(match[1]) < 13:
        raise ValueError(f'"{text}" is not the version of a PostgreSQL from 13 on, such as 18.0')
    return int(match[1]), int(match[2] or 0)


@dataclass(frozen=True, slots=True)
class Configuration:
    """A WAL sender's configuration; times are in seconds.

    ``server_version`` is what clients are told; None for what the WAL says.
    ``wal_sender_timeout`` is how long a client may be silent while it streams, 0 for ever;
    ``authentication_timeout`` how long until it has started up; both have PostgreSQL's defaults.
    ``max_wal_senders`` is how many clients there may be at once; ``max_unauthenticated`` how many
    of whom it is not known yet who they are, and ``max_unauthenticated_per_address`` how many of
    them from one address.  ``authenticator`` decides who may connect; by default that is who is on
    this machine.  ``tls`` is the server's side of TLS, None if that is not offered.
    """

    authenticator: IAuthenticator = field(default_factory=Guard)
    tls: ServerTls | None = None
    server_version: str | None = None
    wal_sender_timeout: float = DEFAULT_WAL_SENDER_TIMEOUT
    authentication_timeout: float = 60.0
    max_wal_senders: int = 10
    max_unauthenticated: int = 200
    max_unauthenticated_per_address: int = 50

    def advertised_version(self, identity: Identity) -> str:
        """The ``server_version`` for this cluster's WAL."""
        return self.server_version or f"{identity.wal_format.major}.0 (walproto)"

    def newest_protocol_version(self, identity: Identity) -> int:
        """The newest protocol version that a server of the advertised major speaks."""
        major, _ = parse_version(self.advertised_version(identity))
        return PROTOCOL_3_2 if major >= 18 else PROTOCOL_3_0
