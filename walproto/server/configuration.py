"""What a WAL sender serves and how, the same for all its connections."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from walproto.errors import CannotConnectNow, TooManyConnections
from walproto.server.authentication import IAuthenticator, Trust
from walproto.server.settings import (
    DEFAULT_WAL_SENDER_TIMEOUT,
    Settings,
    format_size,
)
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.slots import Slots
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
    ``slots`` are the replication slots on the timeline, None if there can be none;
    ``max_wal_senders`` is how many clients there may be at once.
    """

    timeline: ITimeline
    authenticator: IAuthenticator = field(default_factory=Trust)
    server_version: str | None = None
    wal_sender_timeout: float = DEFAULT_WAL_SENDER_TIMEOUT
    authentication_timeout: float = 60.0
    slots: Slots | None = None
    max_wal_senders: int = 10

    @property
    def advertised_version(self) -> str:
        """The ``server_version``; the timeline has to be ready."""
        return self.server_version or f"{self.timeline.identity.wal_format.major}.0 (walproto)"

    @property
    def newest_protocol_version(self) -> int:
        """The newest protocol version that a server of the advertised major speaks."""
        try:
            self.timeline.require_ready()
        except CannotConnectNow:
            return PROTOCOL_3_2
        return PROTOCOL_3_2 if parse_version(self.advertised_version)[0] >= 18 else PROTOCOL_3_0

    def settings(self, user: str) -> Settings:
        """The parameters of a connection of this user, before it has set any of its own."""
        major, minor = parse_version(self.advertised_version)
        values = {
            "max_wal_senders": str(self.max_wal_senders),
            "server_version": self.advertised_version,
            "server_version_num": f"{major}{minor:04}",
            "session_authorization": user,
            "wal_segment_size": format_size(self.timeline.identity.segment_size),
        }
        if self.slots is not None:
            options = self.slots.options
            values |= {
                "max_replication_slots": str(options.max_replication_slots),
                "max_slot_wal_keep_size": format_size(options.max_slot_wal_keep_size),
                "wal_keep_size": format_size(options.wal_keep_size),
            }
        return Settings(major, values, self.wal_sender_timeout)

    def too_many_connections(self) -> TooManyConnections:
        """The error for a client for whom there is no place left (``InitProcess``)."""
        major, _ = parse_version(self.advertised_version)
        name = '"max_wal_senders"' if major >= 17 else "max_wal_senders"
        return TooManyConnections(
            f"number of requested standby connections exceeds {name} "
            f"(currently {self.max_wal_senders})",
            fatal=True,
        )
