"""WAL that is being received into a directory, as far as it may be read.

Whoever reads must not see what is written but not yet on disk: the machine may lose it, and a
replica would then have what its primary's synchronous copy has not.  :class:`Received` says how
far it may be seen, and keeps the newest of it in memory, so that what has just been synced is sent
without asking the disk for it.

While the disk syncs, the records are walked over already, as far as they are written: then all
that is left to do behind the sync is to show them.  So the walk may be ahead of the disk, by one
sync at most, and what it has found counts as soon as all that it has walked over is on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from walproto.lsn import PAGE_SIZE
from walproto.wal.cold import Elsewhere
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
        """The LSN up to which WAL of this timeline is on disk."""
        self.written_to = 0
        """The LSN up to which it is written."""
        self.proven_to = 0
        """The LSN up to which it is on disk and its records were found right, and what there is of
        the last one."""
        self.shown_to = 0
        """The LSN up to which it may be shown: where a record ends, though perhaps in what fills
        it up; 0 as long as the walk has not found any."""
        self.last_record = 0
        """Where the last record begins that may be shown, or one before it."""
        self.stopped_at: int | None = None
        """The LSN of a record that is wrong, though whole pages have come behind it."""
        self.reason = ""
        """Why it is wrong."""
        self.walked: Callable[[], None] = lambda: None
        """Called when the walk may have changed one of these."""
        self._walk_to = 0
        self._is_walked = False
        self._position = 0
        self._found = (0, 0)
        self._start = 0
        self._end = 0
        self._ring = bytearray(RECENT_SIZE)
        self._open_from = 0
        self._stamps: dict[tuple[int, int], Stamp] = {}

    def begin(self, tli: int, lsn: int, synced_to: int) -> None:
        """WAL of ``tli`` will come from ``lsn`` on; up to ``synced_to`` it is there already."""
        self.tli, self.synced_to, self.proven_to = tli, synced_to, synced_to
        self.written_to = self._walk_to = synced_to
        self.shown_to = self.last_record = self._position = 0
        self._found = (0, 0)
        self._is_walked = False
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

    def written(self, lsn: int) -> None:
        """WAL is written up to ``lsn``, and the next sync will bring all of that to disk."""
        self.written_to = max(self.written_to, lsn)
        self._walk_further()

    def synced(self, lsn: int) -> None:
        """WAL is on disk up to ``lsn``."""
        self.synced_to = max(self.synced_to, lsn)
        self.written_to = max(self.written_to, self.synced_to)
        if self._walk_to < self.synced_to:
            self._walk_to, self._is_walked = self.synced_to, False
        self._show()

    def walk(self, tli: int, position: int, end: int, last_record: int, reason: str) -> bool:
        """The walk over the records of ``tli`` has come to ``position``; the last one that is right
        begins at ``last_record`` and ends at ``end``.  ``reason`` is why it goes no further for
        now, empty if it does.  Whether it may go further than that at once."""
        if tli != self.tli:
            return False
        self._position, self._found = position, (end, last_record)
        self._is_walked = bool(reason)
        is_stuck = self._is_walked and position < self.synced_to - self.synced_to % PAGE_SIZE
        self.stopped_at, self.reason = (position, reason) if is_stuck else (None, "")
        self._show()
        more = self._walk_further()
        self.walked()
        return more

    @property
    def is_shown(self) -> bool:
        """Whether all that is written is on disk, and was walked over without a stop before."""
        is_walked = self._is_walked and self._walk_to == self.written_to == self.synced_to
        return is_walked and self._position >= self.synced_to - self.synced_to % PAGE_SIZE

    def _show(self) -> None:
        """Show what was found, if all that was walked over is on disk."""
        self.proven_to = max(self.proven_to, min(self._position, self.synced_to))
        if self._walk_to <= self.synced_to:
            end, self.last_record = self._found
            self.shown_to = min(end, self.synced_to)

    def _walk_further(self) -> bool:
        """Let the walk go over what is written, once it has been over what is on disk; whether
        there is more to walk over now."""
        more = self._is_walked and self._walk_to < self.written_to
        if more:
            self._walk_to, self._is_walked = self.written_to, False
        return more

    def walkable_to(self, tli: int) -> int:
        """Up to where the records of ``tli`` may be walked over."""
        return self._walk_to if tli == self.tli else 2**64

    def visible_to(self, tli: int) -> int:
        """Up to where WAL of ``tli`` may be shown."""
        return self.shown_to if tli == self.tli else 2**64

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

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        received: Received,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        super().__init__(directory, identity, elsewhere=elsewhere)
        self._received = received
        self._segment_size = identity.segment_size

    def read(self, tli: int, lsn: int, size: int) -> bytes:
        """As :meth:`Segments.read`; zeros take the place of what is not to be walked over of a
        page."""
        end = self._received.walkable_to(tli)
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
