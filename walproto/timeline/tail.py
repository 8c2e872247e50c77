"""The end of a timeline's WAL, found and followed.

The walk begins at the newest segment and not before: what came earlier is proven when somebody
wants it (:mod:`walproto.timeline.proofs`).  Only if there is no whole record in that segment yet
does it step back, a segment at a time, to where there is one.
"""

from __future__ import annotations

from walproto.lsn import PAGE_SIZE
from walproto.timeline.history import History
from walproto.wal.pages import LONG_HEADER, Identity, parse_identity
from walproto.wal.scan import Scanner
from walproto.wal.segments import Segments, Stamp

_BUDGET = 1 << 20


class Tail:
    """The end of the timeline that ``history`` tells of, looked for from the segment at ``start``.

    ``start`` moves back if need be.  Up to :attr:`end` all WAL from there on is proven.
    """

    def __init__(
        self, segments: Segments, identity: Identity, history: History, start: int
    ) -> None:
        self._segments = segments
        self._identity = identity
        self.history = history
        self.start = start
        self._scanner = self._scanner_from(start)

    @property
    def end(self) -> int:
        """The end of valid WAL, as far as the walk has come."""
        return self._scanner.end

    @property
    def position(self) -> int:
        """How far the walk has come, be it in the middle of a record."""
        return self._scanner.position

    @property
    def is_found(self) -> bool:
        """Whether there is a record at all, so that :attr:`end` means something."""
        return self._scanner.last_record is not None

    @property
    def last_record(self) -> int:
        """Where the last record begins; :attr:`start` if there is none."""
        last = self._scanner.last_record
        return self.start if last is None else last

    @property
    def reason(self) -> str:
        """Why the walk stopped where it is."""
        return self._scanner.reason

    def advance(self, budget: int) -> bool:
        """Walk on over some ``budget`` bytes; whether there may be more to walk over at once."""
        if self._scanner.advance(budget):
            return True
        before = self.start - self._identity.segment_size
        if not self.is_found and before >= 0 and self._read(before, 1):
            self.start = before
            self._scanner = self._scanner_from(before)
            return True
        return False

    def begins_whole(self) -> bool:
        """Whether the record that the walk began within is right, as far as that can be told: not
        if the segment in which it begins is not here."""
        if self._scanner.head is None:
            return True
        record, end = self._scanner.head
        if not self._read(record, 1):
            return True
        scanner = self._scanner_from(record)
        while scanner.end < end and scanner.advance(_BUDGET):
            pass
        return scanner.end >= end

    def goes_on_behind(self) -> bool:
        """Whether the next segment has been begun although the walk stopped before it.  A record
        that goes on in there may have been what began it."""
        size = self._identity.segment_size
        beyond = (max(self.position, self._scanner.last_page) // size + 1) * size
        found = parse_identity(self._read(beyond, LONG_HEADER.size))
        return found is not None and found[0] == self._identity and found[2] == beyond

    def stamp(self) -> Stamp | None:
        """What changes when the segment in which the walk stopped is written to."""
        tli = self.history.file_tli(self.end, self._identity.segment_size)
        return self._segments.stamp(tli, self.end)

    def page_is_there(self) -> bool:
        """Whether there is a whole page where the walk stopped, be it right or wrong."""
        page = self.position - self.position % PAGE_SIZE
        return len(self._read(page, PAGE_SIZE)) == PAGE_SIZE

    def file_name(self) -> str:
        """The name of the segment in which the walk stopped."""
        size = self._identity.segment_size
        return self._segments.name(self.history.file_tli(self.position, size), self.position)

    def _scanner_from(self, start: int) -> Scanner:
        return Scanner(self._identity, self.history, start, self._read)

    def _read(self, lsn: int, size: int) -> bytes:
        tli = self.history.file_tli(lsn, self._identity.segment_size)
        return self._segments.read(tli, lsn, size)
