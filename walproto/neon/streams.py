"""How a safekeeper streams: to a proposer that recovers, and to pageservers.

Standbys and the others are streamed to as PostgreSQL does.

Neon: ``ReplicationConn::run`` and ``background_thread`` in the safekeeper's ``send_wal.rs``,
``check_deactivate`` in ``timeline.rs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.logger import Logger

from walproto.errors import EndReason, QueryCanceled, StreamingEnded
from walproto.lsn import format_lsn
from walproto.neon.pageservers import Pageservers
from walproto.neon.timeline import SafekeeperTimeline
from walproto.server.producer import Piece
from walproto.server.service import Stream
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replica
from walproto.wire.messages import FRONTEND, CopyFail, Sync
from walproto.wire.replication import (
    Feedback,
    PageserverFeedback,
    StatusUpdate,
    parse_pageserver_message,
)

MAX_LSN = 2**64 - 1

PATIENCE = 1.0
"""Seconds without news after which a pageserver is asked how far it is."""


def _ahead_of_committed(start: int, end: int) -> str:
    """As :meth:`Stream.ahead`, of a timeline that is committed up to ``end``."""
    what = (
        f"is {start - end} bytes ahead of what is committed here, which ends at {format_lsn(end)}"
        if end
        else f"begins at {format_lsn(start)}, and nothing is committed here yet"
    )
    return f"{what}: it is sent none until more is"


class Committed(Stream):
    """What is committed, as PostgreSQL streams.

    How far that is, may not be known for a while: a control file lags behind.
    """

    def __init__(self, timeline: SafekeeperTimeline, piece: Piece) -> None:
        super().__init__(timeline, piece)
        self._safekeeper_timeline = timeline

    def furthest_start(self, tli: int) -> int:
        end = max(self.timeline.end_of(tli), self._safekeeper_timeline.flush_lsn)
        return end + self._safekeeper_timeline.identity.segment_size

    def ahead(self, start: int, end: int) -> str:
        return _ahead_of_committed(start, end)


class NeonStream(Stream):
    """A stream to a client of Neon's own, which knows ZenithFeedback, and may say what it likes.

    It may begin where WAL is that another safekeeper has, and this one has not yet.  ``log_prefix``
    and ``log_fields`` are those of the session.
    """

    _log = Logger()

    def __init__(
        self, timeline: ITimeline, piece: Piece, log_prefix: str, log_fields: Mapping[str, Any]
    ) -> None:
        super().__init__(timeline, piece)
        self.replica: Replica
        self._log_prefix = log_prefix
        self._log_fields = log_fields
        self._passed_over: set[bytes] = set()

    def furthest_start(self, tli: int) -> int:
        self.timeline.end_of(tli)
        return MAX_LSN

    def begin(self, replica: Replica) -> None:
        self.replica = replica

    def parse(self, data: bytes) -> StatusUpdate | Feedback | PageserverFeedback:
        return parse_pageserver_message(data)

    def heard(self) -> None:
        keys = self.replica.new_unknown_keys()
        if keys:
            self._warn("{replica} says {keys}, which nobody knows here", keys=", ".join(keys))
        pageservers = self.timeline.replicas.new_disagreement()
        if pageservers:
            self._warn(
                "pageservers disagree how far they are: {pageservers}",
                pageservers=", ".join(
                    f"{one} received {format_lsn(one.write_lsn)}, flushed "
                    f"{format_lsn(one.flush_lsn)}, stored {format_lsn(one.apply_lsn)}"
                    for one in pageservers
                ),
            )

    def hear_other(self, tag: bytes) -> None:
        if FRONTEND[tag] is CopyFail:
            raise QueryCanceled("Copy failed", fatal=True)
        if FRONTEND[tag] is not Sync and tag not in self._passed_over:
            self._passed_over.add(tag)
            self._warn("{replica}: passed over a {message} message", message=FRONTEND[tag].name)

    def _warn(self, text: str, **fields: Any) -> None:
        known = {"replica": self.replica, "peer": self.replica.peer}
        known["application_name"] = self.replica.application_name
        self._log.warn(self._log_prefix + text, **(dict(self._log_fields) | known | fields))


class Recovery(NeonStream):
    """All WAL that there is now, committed or not, and then its end.

    The proposer makes the WAL of all safekeepers that of the most advanced one.  It knows nothing
    of keepalives, and sends nothing.
    """

    is_kept_alive = False

    def ahead(self, start: int, end: int) -> str:
        return (
            f"is {start - end} bytes ahead of the WAL here, which ends at {format_lsn(end)}: "
            "it is sent none"
        )


class PageserverStream(NeonStream):
    """What is committed, until the pageserver has all, and nobody brings more.

    ``connstr`` is the pageserver's connection string, empty if it did not say.
    """

    patience = PATIENCE

    def __init__(
        self,
        timeline: SafekeeperTimeline,
        piece: Piece,
        log_prefix: str,
        log_fields: Mapping[str, Any],
        pageservers: Pageservers,
        connstr: str,
    ) -> None:
        super().__init__(timeline, piece, log_prefix, log_fields)
        self._safekeeper_timeline = timeline
        self._pageservers = pageservers
        self._connstr = connstr
        self._is_paused = False
        self._is_suspending = False

    def ahead(self, start: int, end: int) -> str:
        return _ahead_of_committed(start, end)

    def begin(self, replica: Replica) -> None:
        super().begin(replica)
        if self._connstr:
            ids = self._safekeeper_timeline.ids
            self._is_paused = self._pageservers.stream_begins(ids, self._connstr)

    def require_allowed(self) -> None:
        ids = self._safekeeper_timeline.ids
        if self._connstr and not self._pageservers.belongs_to(ids, self._connstr):
            raise StreamingEnded(
                EndReason.MOVED, f"timeline {ids} belongs to another pageserver now", fatal=True
            )

    def check(self) -> None:
        """What is committed may be more than what is here, or than what of it is sound."""
        timeline, name = self._safekeeper_timeline, self.replica.application_name
        if timeline.is_proposer_connected or not self.replica.has_confirmed(timeline.committed_lsn):
            return
        self._is_suspending = True
        if self._connstr:
            self._pageservers.unsubscribe(timeline.ids, self._connstr)
        end = format_lsn(self.replica.sent_lsn)
        raise StreamingEnded(EndReason.SUSPENDED, f'ending streaming to "{name}" at {end}')

    def end(self) -> None:
        timeline = self._safekeeper_timeline
        if self._is_paused:
            self._pageservers.stream_ends(timeline.ids, self._connstr)
        if self._is_suspending:
            timeline.suspend()
