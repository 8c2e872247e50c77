"""Proof that finished segments are sound, given once, when somebody first wants them.

A primary's walsender sends what it finds; a flipped bit travels to every standby.  Here no byte is
sent before the record it belongs to has been walked over and its CRC found right.  The tail is
walked anyway; of older segments each is walked when a client first comes to it, and then
remembered, for all clients.  It is done in slices, so that nobody waits for a whole segment.
"""

from __future__ import annotations

from walproto.errors import DataCorrupted
from walproto.lsn import format_lsn
from walproto.timeline.history import History
from walproto.wal.pages import Identity
from walproto.wal.scan import Scanner
from walproto.wal.segments import Segments


class Proofs:
    """Which finished segments along ``history`` are proven, by segment number."""

    def __init__(self, segments: Segments, identity: Identity, history: History) -> None:
        self._segments = segments
        self._segment_size = identity.segment_size
        self._identity = identity
        self._history = history
        self._sound: set[int] = set()
        self._walking: dict[int, Scanner] = {}
        self._damaged: dict[int, Scanner] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a walk is under way."""
        return bool(self._walking)

    def proven_to(self, lsn: int) -> int:
        """How far WAL is proven from ``lsn`` on, within its segment; ``lsn`` itself or less if it
        is not yet, and then the walk is begun.

        Raises UndefinedFile if the segment is missing, DataCorrupted if it is damaged at ``lsn``.
        """
        segno = lsn // self._segment_size
        if segno in self._sound:
            return (segno + 1) * self._segment_size
        scanner = self._walking.get(segno) or self._damaged.get(segno)
        if scanner is None:
            start = segno * self._segment_size
            self._segments.read_into(self._file_tli(lsn), start, memoryview(bytearray(1)))
            scanner = Scanner(self._identity, self._history, start, self._read)
            self._walking[segno] = scanner
        elif segno in self._damaged and scanner.end <= lsn:
            # Told once, forgotten: by the next time somebody asks, the file may be mended.
            del self._damaged[segno]
            tli = self._file_tli(lsn)
            self._segments.read_into(tli, lsn, memoryview(bytearray(1)))  # or is it gone by now?
            raise DataCorrupted(
                scanner.reason,
                log=f"{self._segments.directory / self._segments.name(tli, lsn)}, "
                f"LSN {format_lsn(scanner.end)}: damaged: restore it from a good copy, "
                "and the next one too if the record goes on there",
            )
        return scanner.end

    def advance(self, budget: int) -> bool:
        """Go on with one of the walks under way over some ``budget`` bytes, the next one the next
        time; whether any is left."""
        if self._walking:
            segno = next(iter(self._walking))
            scanner = self._walking.pop(segno)
            more = scanner.advance(budget)
            segment_end = (segno + 1) * self._segment_size
            if scanner.end >= segment_end:
                self._sound.add(segno)
            elif more:
                self._walking[segno] = scanner
            elif scanner.position >= segment_end and not self._read(segment_end, 1):
                # The last record goes on in a segment that is not here: as proven as can be.
                self._sound.add(segno)
            else:
                self._damaged[segno] = scanner
        return self.is_busy

    def _read(self, lsn: int, size: int) -> bytes:
        return self._segments.read(self._file_tli(lsn), lsn, size)

    def _file_tli(self, lsn: int) -> int:
        return self._history.file_tli(lsn, self._segment_size)
