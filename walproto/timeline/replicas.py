"""The clients that stream, and what each of them last told us.

What ``pg_stat_replication`` is to a primary.  A replica is in the registry exactly as long as its
connection is in streaming state.

What they say comes to something for whoever feeds the timeline, and that follows from those that
are there, in whatever order they came and spoke.  Neon: ``get_replicas_state`` in the safekeeper's
``timeline.rs``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from walproto.errors import printable
from walproto.wire.replication import Feedback, PageserverFeedback, StatusUpdate


@dataclass(slots=True)
class Replica:
    """One client that streams.

    LSNs are the last byte + 1, and 0 as long as they are unknown.  They may go backwards: a
    walreceiver that comes back first reports what it has replayed.  A pageserver's are what it has
    received, has on its own disk, and has in remote storage.  Of one whose WAL another process
    sends, ``sent_lsn`` is told when it has come to the end, or to a next segment.
    """

    pid: int
    user: str
    application_name: str
    peer: str
    tli: int
    sent_lsn: int
    write_lsn: int = 0
    flush_lsn: int = 0
    apply_lsn: int = 0
    reply_time: int = 0
    """When the client sent its last message by its own clock, microseconds since 2000-01-01."""
    feedback: Feedback | None = None
    pageserver_feedback: PageserverFeedback | None = None
    """What it last said as a pageserver; None for what is none, or has not said anything yet."""
    _unknown_keys_told: bool = field(default=False, init=False, repr=False, compare=False)

    def update(self, message: StatusUpdate | Feedback | PageserverFeedback) -> None:
        """Keep what the client says of itself."""
        match message:
            case Feedback():
                self.reply_time = message.reply_time
                self.feedback = message
            case StatusUpdate():
                self.reply_time = message.reply_time
                self.write_lsn = message.write_lsn
                self.flush_lsn = message.flush_lsn
                self.apply_lsn = message.apply_lsn
            case PageserverFeedback():
                self.reply_time = message.ps_replytime
                self.write_lsn = message.ps_writelsn
                self.flush_lsn = message.ps_flushlsn
                self.apply_lsn = message.ps_applylsn
                self.pageserver_feedback = message

    @property
    def confirmed_lsn(self) -> int:
        """Up to where the client has all WAL, by the best that it reports: flushed, or written by
        one that reports no flushes (``WalSndDone``); received by a pageserver, which asks again for
        what it loses."""
        if self.pageserver_feedback is not None:
            return self.write_lsn
        return self.flush_lsn or self.write_lsn

    def has_confirmed(self, lsn: int) -> bool:
        """Whether the client has all WAL up to ``lsn``."""
        return self.confirmed_lsn >= lsn

    def new_unknown_keys(self) -> tuple[str, ...]:
        """The keys in its pageserver feedback that were passed over, the first time that there are
        any: for one line in the log, not one for each message."""
        said = self.pageserver_feedback
        if said is None or not said.unknown_keys or self._unknown_keys_told:
            return ()
        self._unknown_keys_told = True
        return said.unknown_keys

    def __str__(self) -> str:
        """For a line in the log."""
        return printable(f'"{self.application_name}" (pid {self.pid}, {self.user}@{self.peer})')


def full_xmins(feedback: Feedback) -> tuple[int, int]:
    """The xmin and catalog_xmin that a replica asks to be kept, 0 if it does not.

    They are full transaction IDs: the epoch in the upper 32 bits, so that they compare.
    """
    return (
        feedback.xmin_epoch << 32 | feedback.xmin if feedback.xmin else 0,
        feedback.catalog_xmin_epoch << 32 | feedback.catalog_xmin if feedback.catalog_xmin else 0,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """What the replicas of a timeline have said, taken together; as it is here if there is none."""

    xmin: int = 0
    """The oldest that any asks to be kept, a full transaction ID; 0 if none does."""
    catalog_xmin: int = 0
    feedback_time: int = 0
    """When the newest hot standby feedback was sent, by its sender's clock, microseconds since
    2000-01-01; 0 if there is none."""
    pageserver_feedback: PageserverFeedback | None = None
    """That of the pageserver which has received most WAL; among equals the newest one."""
    remote_consistent_lsn: int = 0
    """The most that any pageserver has in remote storage: what one of them has there is needed from
    the WAL by none.  It falls when that pageserver leaves, so who keeps it must keep the
    maximum."""
    laggard: Replica | None = None
    """The replica that confirms least; among equals the one with the lowest pid.  One that has
    confirmed nothing yet does not count."""


class Replicas:
    """The replicas of one timeline."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}
        self._disagreement_told = False

    def add(self, replica: Replica) -> None:
        self._replicas[replica.pid] = replica

    def remove(self, replica: Replica) -> None:
        self._replicas.pop(replica.pid, None)
        if len(self._pageservers()) < 2:
            self._disagreement_told = False

    def oldest_xmins(self) -> tuple[int, int]:
        """The oldest xmin and catalog_xmin that any replica asks to be kept, full transaction IDs;
        0 if none does."""
        fed = [replica.feedback for replica in self._replicas.values() if replica.feedback]
        xmins, catalog = zip(*map(full_xmins, fed), strict=True) if fed else ((), ())
        return min(filter(None, xmins), default=0), min(filter(None, catalog), default=0)

    def summary(self) -> Summary:
        """What they have said, taken together."""
        xmin, catalog_xmin = self.oldest_xmins()
        times = [one.feedback.reply_time for one in self._replicas.values() if one.feedback]
        said = self._pageservers()
        confirming = [replica for replica in self._replicas.values() if replica.confirmed_lsn]
        return Summary(
            xmin=xmin,
            catalog_xmin=catalog_xmin,
            feedback_time=max(times, default=0),
            pageserver_feedback=max(
                (feedback for _, feedback in said),
                key=lambda it: (it.ps_writelsn, it.ps_replytime),
                default=None,
            ),
            remote_consistent_lsn=max((it.ps_applylsn for _, it in said), default=0),
            laggard=min(confirming, key=lambda it: (it.confirmed_lsn, it.pid), default=None),
        )

    def new_disagreement(self) -> tuple[Replica, ...]:
        """The pageservers, if there are several and they are not equally far; else none.

        They are told once, for one warning in the log, and again only when there has been a time
        with one pageserver at most: those that stream side by side differ with every message.
        """
        said = self._pageservers()
        if self._disagreement_told or len({_positions(feedback) for _, feedback in said}) < 2:
            return ()
        self._disagreement_told = True
        return tuple(replica for replica, _ in said)

    def _pageservers(self) -> list[tuple[Replica, PageserverFeedback]]:
        """The pageservers and what they last said, by pid."""
        return [
            (replica, replica.pageserver_feedback)
            for _, replica in sorted(self._replicas.items())
            if replica.pageserver_feedback is not None
        ]

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas.values()))

    def __len__(self) -> int:
        return len(self._replicas)


def _positions(feedback: PageserverFeedback) -> tuple[int, int, int]:
    return feedback.ps_writelsn, feedback.ps_flushlsn, feedback.ps_applylsn
