"""What a connection is served: which timeline, and by which rules.

It is decided when the startup packet is known.  Mostly it is the one timeline that there is, and
the rules are PostgreSQL's; whoever has many, or rules of their own, brings an :class:`IServices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zope.interface import Interface, implementer

from walproto.access.grant import Grant
from walproto.errors import CannotConnectNow, ProtocolViolation, TooManyConnections
from walproto.lsn import format_lsn
from walproto.server.configuration import Configuration, parse_version
from walproto.server.producer import Piece
from walproto.server.results import Wait
from walproto.server.settings import Settings, format_size
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replica
from walproto.timeline.slots import Slots
from walproto.wire.messages import PROTOCOL_3_2
from walproto.wire.replication import (
    Feedback,
    PageserverFeedback,
    StatusUpdate,
    parse_standby_message,
)
from walproto.wire.startup import Startup


class Stream:
    """How ``timeline`` is streamed to one replica.  These are PostgreSQL's rules."""

    patience: float | None = None
    """After so many seconds in which there was nothing to send, it is checked whether to go on, and
    the replica is asked how far it is; at least so often it is checked whether it is still allowed.
    None for never."""
    is_kept_alive = True
    """Whether the replica understands keepalives, and ``wal_sender_timeout`` is for it."""

    def __init__(self, timeline: ITimeline, piece: Piece) -> None:
        self.timeline = timeline
        self.piece = piece

    def furthest_start(self, tli: int) -> int:
        """The LSN up to which a stream may begin, though there may be no WAL there yet.  Raises a
        ReportedError if there is no such timeline."""
        return self.timeline.end_of(tli) + int(self.timeline.identity.segment_size)

    def ahead(self, start: int, end: int) -> str:
        """What is said to the operator of a replica that begins at ``start``, where there will be
        WAL to send only later: it ends at ``end``."""
        return (
            f"is {start - end} bytes ahead of the WAL here, which ends at {format_lsn(end)}: "
            "it is sent none until there is more"
        )

    def begin(self, replica: Replica) -> None:
        """The replica is in the registry, and is sent WAL from now on."""

    def parse(self, data: bytes) -> StatusUpdate | Feedback | PageserverFeedback:
        """What the replica sent inside CopyData.  Raises a ReportedError."""
        return parse_standby_message(data)

    def heard(self) -> None:
        """The replica has said something, and it is kept there."""

    def hear_other(self, tag: bytes) -> None:
        """The client has sent a message that is neither CopyData, CopyDone nor Terminate.  Raises a
        ReportedError unless it is to be passed over."""
        raise ProtocolViolation(
            f'invalid standby message type "{tag.decode("latin-1")}"', fatal=True
        )

    def require_allowed(self) -> None:
        """Raise a ReportedError if the replica is not to have WAL (any longer): asked when it
        begins, and then whether there is something to send or not."""

    def check(self) -> None:
        """There was nothing to send: raise a ReportedError if the stream is not to go on."""

    def end(self) -> None:
        """The replica is no longer in the registry, however that came about."""


class Service:
    """What one connection is served.

    ``startup`` is what the client asks for, without what is not meant for the settings of a server.
    ``slots`` are the replication slots on the timeline, None if there can be none.
    """

    log_prefix = ""
    """What a line in the log about this connection begins with, in terms of ``log_fields``."""
    why_no_slots = "there are slots only on WAL that is received (--upstream)"
    """What the operator is told if ``slots`` is None."""

    def __init__(
        self,
        timeline: ITimeline,
        piece: Piece,
        startup: Startup,
        configuration: Configuration,
        slots: Slots | None = None,
    ) -> None:
        self.timeline = timeline
        self.startup = startup
        self.slots = slots
        self.log_fields: Mapping[str, Any] = {}
        self._piece = piece
        self._configuration = configuration

    # --- what there is to do, in this order ------------------------------------------------

    def open(self) -> Wait:
        """Wait until it is known what there is."""
        yield from ()

    def require_ready(self) -> None:
        """Raise a FATAL ReportedError if the client cannot be served."""
        self.timeline.require_ready()

    def greeted(self, settings: Settings) -> None:
        """The client is served from now on, and these are its settings."""

    def ready_to_stream(self) -> Wait:
        """Wait until WAL can be sent, before START_REPLICATION is looked at."""
        yield from ()

    def stream(self, settings: Settings) -> Stream:
        """The rules for this client's stream.  Raises a ReportedError if there cannot be one."""
        return Stream(self.timeline, self._piece)

    # --- what depends on the timeline ------------------------------------------------------

    @property
    def advertised_version(self) -> str:
        """The ``server_version``."""
        return self._configuration.advertised_version(self.timeline.identity)

    def settings(self) -> Settings:
        """The parameters of the connection, before it has set any of its own."""
        configuration, version = self._configuration, self.advertised_version
        major, minor = parse_version(version)
        values = {
            "max_wal_senders": str(configuration.max_wal_senders),
            "server_version": version,
            "server_version_num": f"{major}{minor:04}",
            "session_authorization": self.startup.user,
            "wal_segment_size": format_size(self.timeline.identity.segment_size),
        }
        if self.slots is not None:
            options = self.slots.options
            values |= {
                "max_replication_slots": str(options.max_replication_slots),
                "max_slot_wal_keep_size": format_size(options.max_slot_wal_keep_size),
                "wal_keep_size": format_size(options.wal_keep_size),
            }
        return Settings(major, values, configuration.wal_sender_timeout)

    def too_many_connections(self) -> TooManyConnections:
        """The error for a client for whom there is no place left (``InitProcess``)."""
        major, _ = parse_version(self.advertised_version)
        name = '"max_wal_senders"' if major >= 17 else "max_wal_senders"
        return TooManyConnections(
            f"number of requested standby connections exceeds {name} "
            f"(currently {self._configuration.max_wal_senders})",
            fatal=True,
        )


class IServices(Interface):
    """Decides what a connection is served."""

    def require_ready() -> None:
        """Raise a FATAL ReportedError if nobody can be served now; all who connect hear of it,
        before they are asked who they are."""

    def newest_protocol_version(configuration: Configuration) -> int:
        """The newest version of the protocol that is spoken with a client, whichever timeline it is
        going to ask for."""

    def serve(startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        """What a client is served that asks for ``startup`` and may see what ``grant`` says.
        Raises a FATAL ReportedError if it is nothing: the same one for what there is not, and for
        what this client may not see."""


@implementer(IServices)
class OneTimeline:
    """Serves everybody the same timeline.  ``slots`` are as in :class:`Service`."""

    def __init__(self, timeline: ITimeline, slots: Slots | None = None) -> None:
        self._timeline = timeline
        self._slots = slots
        self._piece = Piece(timeline)

    def require_ready(self) -> None:
        self._timeline.require_ready()

    def newest_protocol_version(self, configuration: Configuration) -> int:
        try:
            self._timeline.require_ready()
        except CannotConnectNow:
            return PROTOCOL_3_2
        return configuration.newest_protocol_version(self._timeline.identity)

    def serve(self, startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        return Service(self._timeline, self._piece, startup, configuration, self._slots)
