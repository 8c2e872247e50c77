"""WAL that is being received into a directory, as far as it may be read.

Whoever reads must not see what is written but not yet on disk: the machine may lose it, and a
replica would then have what its primary's synchronous copy has not.  :class:`Received` says how
far it may be seen, and keeps the newest of it in memory, so that what has just been synced is sent
without asking the disk for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from walproto.lsn import PAGE_SIZE
from walproto.wal.pages import Identity
from walproto.wal.segments import Segments, Stamp

RECENT_SIZE = 4 * 1024 * 1024
"""Bytes of the newest WAL that are kept in memory; a power of two."""

_OURS = (0, 0, 0, 0)
"""The stamp of a segment that nobody but us has written to."""


class Received:
    """What is being received: which timeline, from where, and how far it is on disk."""

    def __init__(self) -> None:
        self.tli = 0
        """The timeline that is received; 0 if nothing is, and then all there is may be read."""
        self.synced_to = 0
        """The LSN up to which WAL of this timeline may be read."""
        self.proven_to = 0
        """The LSN up to which its records were found right, and what there is of the last one."""
        self.stopped_at: int | None = None
        """The LSN of a record that is wrong, though whole pages have come behind it."""
        self.reason = ""
        """Why it is wrong."""
        self.walked: Callable[[], None] = lambda: None
        """Called when one of these three may have changed."""
        self._start = 0
        self._end = 0
        self._ring = bytearray(RECENT_SIZE)
        self._open_from = 0
        self._stamps: dict[tuple[int, int], Stamp] = {}

    def begin(self, tli: int, lsn: int, synced_to: int) -> None:
        """WAL of ``tli`` will come from ``lsn`` on; up to ``synced_to`` it is there already."""
        self.tli, self.synced_to, self.proven_to = tli, synced_to, synced_to
        self.stopped_at = None
        self._start = self._end = self._open_from = lsn

    def append(self, data: memoryview) -> None:
        """Remember the WAL that has come behind what came before."""
        self._end += len(data)
        data = data[-RECENT_SIZE:]
        at = (self._end - len(data)) % RECENT_SIZE
        first = data[: RECENT_SIZE - at]
        self._ring[at : at + len(first)] = first
        self._ring[: len(data) - len(first)] = data[len(first) :]

    def copy_into(self, tli: int, lsn: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with the WAL from ``lsn``; whether it is still in memory."""
        first = max(self._start, self._end - RECENT_SIZE)
        if tli != self.tli or lsn < first or lsn + len(buffer) > self._end:
            return False
        at = lsn % RECENT_SIZE
        size = min(len(buffer), RECENT_SIZE - at)
        with memoryview(self._ring) as ring:
            buffer[:size] = ring[at : at + size]
            buffer[size:] = ring[: len(buffer) - size]
        return True

    def walk(self, tli: int, position: int, reason: str) -> None:
        """The walk over the records of ``tli`` has come to ``position``; ``reason`` is why it goes
        no further for now, empty if it does."""
        if tli != self.tli:
            return
        self.proven_to = max(self.proven_to, min(position, self.synced_to))
        is_stuck = bool(reason) and position < self.synced_to - self.synced_to % PAGE_SIZE
        self.stopped_at, self.reason = (position, reason) if is_stuck else (None, "")
        self.walked()

    def visible_to(self, tli: int) -> int:
        """Up to where WAL of ``tli`` may be read."""
        return self.synced_to if tli == self.tli else 2**64

    def complete(self, tli: int, lsn: int, stamp: Stamp) -> None:
        """The segment that ends at ``lsn`` has its name; ``stamp`` is its file's."""
        self._open_from = lsn
        self._stamps[tli, lsn] = stamp

    def forget_before(self, lsn: int) -> None:
        """The segments that end at or before ``lsn`` have been removed."""
        self._stamps = {key: stamp for key, stamp in self._stamps.items() if key[1] > lsn}

    def is_being_written(self, tli: int, segment_end: int) -> bool:
        return tli == self.tli and segment_end > self._open_from

    def is_as_written(self, tli: int, segment_end: int, stamp: Stamp | None) -> bool:
        return stamp is not None and self._stamps.get((tli, segment_end)) == stamp


class ReceivedSegments(Segments):
    """The files of a directory into which ``received`` is written."""

    def __init__(self, directory: Path, identity: Identity, received: Received) -> None:
        super().__init__(directory, identity)
        self._received = received
        self._segment_size = identity.segment_size

    def read(self, tli: int, lsn: int, size: int) -> bytes:
        """As :meth:`Segments.read`; zeros take the place of what may not be seen of a page."""
        end = self._received.visible_to(tli)
        size = min(size, self._segment_size - lsn % self._segment_size)
        size = min(size, end - lsn + -end % PAGE_SIZE)
        seen = min(size, end - lsn)
        if seen <= 0:
            return b""
        data = bytearray(size)
        with memoryview(data)[:seen] as view:
            if self._received.copy_into(tli, lsn, view):
                return bytes(data)
        found = super().read(tli, lsn, size)
        return found[:seen] + bytes(len(found[seen:]))

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        if not self._received.copy_into(tli, lsn, buffer):
            super().read_into(tli, lsn, buffer)

    def stamp(self, tli: int, lsn: int) -> Stamp | None:
        """As :meth:`Segments.stamp`; what we have written ourselves does not count as changed."""
        segment_end = lsn - lsn % self._segment_size + self._segment_size
        if self._received.is_being_written(tli, segment_end):
            return _OURS
        stamp = super().stamp(tli, lsn)
        return _OURS if self._received.is_as_written(tli, segment_end, stamp) else stamp

    def forget_before(self, lsn: int) -> None:
        super().forget_before(lsn)
        self._received.forget_before(lsn)
