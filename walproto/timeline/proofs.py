"""Proof that finished segments are sound, given once, when somebody first wants them.

A primary's walsender sends what it finds; a flipped bit travels to every standby.  Here no byte is
sent before the record it belongs to has been walked over and its CRC found right.  The tail is
walked anyway; of older segments each is walked when a client first comes to it, and then
remembered for all clients, for as long as the file stays as it is.  It is done in slices, so that
nobody waits for a whole segment.

A segment may begin in the middle of a record.  That record is checked, too, if the segment it
begins in is there: the first record behind it has a link to it.
"""

from __future__ import annotations

from walproto.errors import DataCorrupted
from walproto.lsn import format_lsn
from walproto.timeline.history import History
from walproto.wal.cold import NotInMemory
from walproto.wal.pages import Identity
from walproto.wal.scan import Read, Scanner
from walproto.wal.segments import Segments, Stamp

_HEAD_BUDGET = 1 << 20


class _Walk:
    """The walk over the segment that begins at ``start``, to and over its last record.

    WAL is proven from :attr:`begin`, once that is known, to :attr:`end`.
    """

    def __init__(
        self, identity: Identity, history: History, start: int, read: Read, stamp: Stamp | None
    ) -> None:
        self._new_scanner = lambda lsn: Scanner(identity, history, lsn, read)
        self._scanner = self._new_scanner(start)
        self._head_scanner: Scanner | None = None
        self._read = read
        self._start = start
        self._segment_end = start + identity.segment_size
        self._head_reason = ""
        self.stamp = stamp
        """The file's, before the walk began."""
        self.begin: int | None = None

    @property
    def end(self) -> int:
        return min(self._scanner.end, self._segment_end)

    @property
    def is_sound(self) -> bool:
        """Whether all of the segment is proven."""
        return self.begin == self._start and self.end >= self._segment_end

    def reason_at(self, lsn: int) -> str:
        """Why WAL at ``lsn`` is not proven, when the walk is over."""
        return self._head_reason if lsn < (self.begin or 0) else self._scanner.reason

    def advance(self, budget: int) -> bool:
        """Walk on over some ``budget`` bytes; whether there is more to walk over."""
        more = self._scanner.advance(budget)
        if self.begin is None and (self._scanner.head or self._scanner.last_record is not None):
            self._check_head()
        if self.begin is not None and self.end >= self._segment_end:
            return False
        return more

    def goes_on_elsewhere(self) -> bool:
        """Whether the walk went over all of the segment and stopped only because the last record
        goes on in the next one, which is not here: then it is as proven as it can be."""
        at_end = self._scanner.position >= self._segment_end
        return at_end and not self._head_reason and not self._read(self._segment_end, 1)

    def _check_head(self) -> None:
        """Check the record that the segment begins within; it is gone on with if it is not in
        memory."""
        begin = self._start
        if self._scanner.head is not None:
            record, end = self._scanner.head
            if self._read(record, 1):  # else it begins in a segment that is not here
                scanner = self._head_scanner = self._head_scanner or self._new_scanner(record)
                while scanner.end < end and scanner.advance(_HEAD_BUDGET):
                    pass
                if scanner.end < end and self._read(record, 1):  # may have been removed meanwhile
                    begin, self._head_reason = end, scanner.reason
        self.begin = begin


class Proofs:
    """Which finished segments along ``history`` are proven, by segment number."""

    def __init__(self, segments: Segments, identity: Identity, history: History) -> None:
        self._segments = segments
        self._segment_size = identity.segment_size
        self._identity = identity
        self._history = history
        self._sound: dict[int, Stamp | None] = {}
        self._walking: dict[int, _Walk] = {}
        self._damaged: dict[int, _Walk] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a walk is under way."""
        return bool(self._walking)

    def add(self, segno: int, stamp: Stamp | None) -> None:
        """Take the segment for proven: its records have just been walked over elsewhere.

        ``stamp`` is the file's from before that.
        """
        self._sound[segno] = stamp

    def proven_to(self, lsn: int) -> int:
        """How far WAL is proven from ``lsn`` on, within its segment; ``lsn`` itself or less if it
        is not yet, and then the walk is begun.

        Raises UndefinedFile if the segment is missing, DataCorrupted if it is damaged at ``lsn``.
        """
        segno = lsn // self._segment_size
        if segno in self._sound:
            if self._sound[segno] == self._stamp(lsn):
                return (segno + 1) * self._segment_size
            del self._sound[segno]  # the file was changed or replaced
        damaged = self._damaged.get(segno)
        if damaged is not None and damaged.stamp != self._stamp(lsn):
            del self._damaged[segno]
        walk = self._walking.get(segno) or self._damaged.get(segno)
        if walk is None:
            self._begin_walk(segno)
            return lsn
        if walk.begin is not None and walk.begin <= lsn < walk.end:
            return walk.end
        if segno in self._damaged:
            self._tell_damage(self._damaged.pop(segno), lsn)
        return lsn

    def forget_before(self, lsn: int) -> None:
        """The segments that end at or before ``lsn`` have been removed.  Who waits for the proof of
        one learns of that when the walk stops."""
        first = lsn // self._segment_size
        for known in (self._sound, self._damaged):
            for segno in [segno for segno in known if segno < first]:
                del known[segno]

    def advance(self, budget: int) -> bool:
        """Go on with one of the walks under way over some ``budget`` bytes, the next one the next
        time; whether any is left.  Raises NotInMemory if they all wait for the disk."""
        for segno, walk in list(self._walking.items()):
            del self._walking[segno]
            try:
                more = walk.advance(budget)
                is_proven = not more and (walk.is_sound or walk.goes_on_elsewhere())
            except NotInMemory:
                self._walking[segno] = walk
                continue
            if more:
                self._walking[segno] = walk
            elif is_proven:
                self._sound[segno] = walk.stamp
            else:
                self._damaged[segno] = walk
            return self.is_busy
        if self.is_busy:
            raise NotInMemory
        return False

    def _begin_walk(self, segno: int) -> None:
        start = segno * self._segment_size
        self._segments.read_into(self._file_tli(start), start, memoryview(bytearray(1)))
        stamp = self._stamp(start)
        walk = _Walk(self._identity, self._history, start, self._read, stamp)
        if segno - 1 in self._sound:
            walk.begin = start  # with the segment before, the record that goes on here was proven
        self._walking[segno] = walk

    def _tell_damage(self, walk: _Walk, lsn: int) -> None:
        """Tell it once, and forget it: by the next time somebody asks, the file may be mended."""
        tli = self._file_tli(lsn)
        self._segments.read_into(tli, lsn, memoryview(bytearray(1)))  # or is it gone by now?
        name = self._segments.name(tli, lsn)
        raise DataCorrupted(
            walk.reason_at(lsn),
            log=f"{self._segments.directory / name}, LSN {format_lsn(lsn)}: damaged: restore it "
            "from a good copy, and the one before or behind it if the record goes on there",
        )

    def _read(self, lsn: int, size: int) -> bytes:
        return self._segments.read(self._file_tli(lsn), lsn, size)

    def _stamp(self, lsn: int) -> Stamp | None:
        return self._segments.stamp(self._file_tli(lsn), lsn)

    def _file_tli(self, lsn: int) -> int:
        return self._history.file_tli(lsn, self._segment_size)
