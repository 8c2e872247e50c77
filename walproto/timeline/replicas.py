"""The clients that stream, and what each of them last told us.

What ``pg_stat_replication`` is to a primary.  A replica is in the registry exactly as long as its
connection is in streaming state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from walproto.wire.replication import Feedback, StatusUpdate


@dataclass(slots=True)
class Replica:
    """One client that streams.

    LSNs are the last byte + 1, and 0 as long as they are unknown.  They may go backwards: a
    walreceiver that comes back first reports what it has replayed.
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

    def update(self, message: StatusUpdate | Feedback) -> None:
        """Keep what the client says of itself."""
        self.reply_time = message.reply_time
        if isinstance(message, Feedback):
            self.feedback = message
        else:
            self.write_lsn = message.write_lsn
            self.flush_lsn = message.flush_lsn
            self.apply_lsn = message.apply_lsn

    def has_confirmed(self, lsn: int) -> bool:
        """Whether the client has all WAL up to ``lsn``, by the best that it reports: flushed, or
        written by one that reports no flushes (``WalSndDone``)."""
        return (self.flush_lsn or self.write_lsn) >= lsn

    def __str__(self) -> str:
        return f'"{self.application_name}" (pid {self.pid}, {self.user}@{self.peer})'


def full_xmins(feedback: Feedback) -> tuple[int, int]:
    """The xmin and catalog_xmin that a replica asks to be kept, 0 if it does not.

    They are full transaction IDs: the epoch in the upper 32 bits, so that they compare.
    """
    return (
        feedback.xmin_epoch << 32 | feedback.xmin if feedback.xmin else 0,
        feedback.catalog_xmin_epoch << 32 | feedback.catalog_xmin if feedback.catalog_xmin else 0,
    )


class Replicas:
    """The replicas of one timeline."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}

    def add(self, replica: Replica) -> None:
        self._replicas[replica.pid] = replica

    def remove(self, replica: Replica) -> None:
        self._replicas.pop(replica.pid, None)

    def oldest_xmins(self) -> tuple[int, int]:
        """The oldest xmin and catalog_xmin that any replica asks to be kept, full transaction IDs;
        0 if none does."""
        fed = [replica.feedback for replica in self._replicas.values() if replica.feedback]
        xmins, catalog = zip(*map(full_xmins, fed), strict=True) if fed else ((), ())
        return min(filter(None, xmins), default=0), min(filter(None, catalog), default=0)

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas.values()))

    def __len__(self) -> int:
        return len(self._replicas)
