"""Walks WAL record by record, and so finds where valid WAL ends.

A :class:`Scanner` starts at the beginning of a segment and goes on for as long as pages and
records are right: page headers as they must be, each record's CRC-32C good and its ``xl_prev`` the
record before.  Where something is not, it stops, remembers why, and can be asked again later: it
then goes on from where it was, which may be in the middle of a record.

:attr:`Scanner.end` is the end of the last good record; nothing behind it has been proven to be
WAL.  A live segment's tail is zeros, or what a recycled file held before, or a record of which
only some pages have been written: all the same, a stop.  Whatever was read of an unfinished record
is not trusted later on: if the record then turns out wrong, it is read once more from its start;
and so it is, unless it is long, as long as nothing follows what was read of it.

Most of it is done page after page by :mod:`walproto.wal.plain`; where something is special, or
wrong, it goes on step by step here.

Two things look like the end of WAL and are not.  Behind an XLOG_SWITCH record the rest of the
segment is zeros, without page headers, and the next record begins the next segment.  And a record
whose end was lost in a crash is given up by the server, which marks the page where the lost part
should have stood with XLP_FIRST_IS_OVERWRITE_CONTRECORD and goes on there.

PostgreSQL: ``xlogreader.c`` (XLogReadRecord, XLogReaderValidatePageHeader, ValidXLogRecord),
whose messages these are.
"""

from __future__ import annotations

from collections.abc import Callable

from crc32c import crc32c

from walproto.lsn import PAGE_SIZE, format_lsn, segment_name
from walproto.wal.headers import InvalidWal, Line, check_header, where
from walproto.wal.pages import (
    RECORD_HEADER,
    SHORT_HEADER,
    XLOG_SWITCH,
    XLP_FIRST_IS_CONTRECORD,
    XLP_LONG_HEADER,
    Identity,
    record_crc,
)
from walproto.wal.plain import pass_pages, walk_plain

Read = Callable[[int, int], bytes]
"""(LSN, size in bytes) -> at most so much WAL from there, never beyond its segment; may be short
or empty where there is no file or no more of it."""


WINDOW = 16 * PAGE_SIZE
"""Bytes read at a time."""

REREAD = 64 * PAGE_SIZE
"""Bytes of an unfinished record that are read anew whenever nothing has come behind them."""

_RECORD_HEADER_SIZE = RECORD_HEADER.size
_ZEROS = bytes(PAGE_SIZE)


class _Stop(InvalidWal):
    """Valid WAL ends here; the text says why."""


class _Again(Exception):
    """The record is to be read once more, from its start."""


class Scanner:
    """Walks the records along ``history`` from ``start``, which is the start of a segment.

    A record that began before ``start`` is passed over unchecked: nobody can check it from here.
    """

    def __init__(self, identity: Identity, history: Line, start: int, read: Read) -> None:
        self._identity = identity
        self._history = history
        self._read = read
        # The timeline in the header of the last page, and what else that began with, but for the
        # flags that only some pages have.
        self._page_tli = 0
        self._lead = 0
        self._position = start
        # The record that goes on in the next page: where it starts, whether that is before our
        # start, what was read of its header, its CRC so far, and the bytes still missing.  With
        # _missing, _position is the start of a page.
        self._record = start
        self._headless = False
        self._passed_over = False
        self._header = bytearray()
        self._crc = 0
        self._missing = 0
        self._begun_now = True
        # Behind an XLOG_SWITCH: where the zeros end.
        self._zeros_to = 0
        self.end = start
        """The LSN behind the last good record; ``start`` if there is none yet."""
        self.last_record: int | None = None
        """The LSN of the last good record; None if there is none yet."""
        self.head: tuple[int, int] | None = None
        """Where the record that was passed over begins and ends, by the link in the first one
        behind it, be that one good or not; None if there was none."""
        self.reason = ""
        """Why the walk stopped, in PostgreSQL's words."""
        self.last_page = start
        """The page that was looked at last; behind :attr:`position` if it showed that a record is
        wrong which begins in an earlier one."""

    @property
    def position(self) -> int:
        """How far pages have been looked at, be it in the middle of a record."""
        return self._position

    def advance(self, budget: int) -> bool:
        """Walk on over some ``budget`` bytes; whether there may be more to walk over at once."""
        self._begun_now = not self._missing
        budget_end = self._position + budget
        while self._position < budget_end:
            base = self._position - self._position % PAGE_SIZE
            window = self._read(base, WINDOW)
            try:
                if len(window) < PAGE_SIZE:
                    offset = base % self._identity.segment_size
                    raise _Stop(
                        f"could not read from WAL segment {self._segment(base)}, "
                        f"LSN {format_lsn(base)}, offset {offset}: "
                        f"read {len(window)} of {PAGE_SIZE}"
                    )
                self._walk_window(window, base)
            except _Again:
                continue
            except InvalidWal as stop:
                if self._missing and not self._begun_now and base - self._record <= REREAD:
                    self._go_back()
                    continue
                self.reason = str(stop)
                return False
        return True

    def _walk_window(self, window: bytes, base: int) -> None:
        """Walk on to the end of these pages, in the first of which our position is."""
        if len(window) % PAGE_SIZE:
            window = window[: -(len(window) % PAGE_SIZE)]
        view = memoryview(window)
        end = base + len(window)
        all_right = True
        while self._position < end:
            # If something is wrong, what it is will be found step by step.
            all_right = all_right and self._walk_plain(window, base)
            if self._position < end:
                address = self._position - self._position % PAGE_SIZE
                page = view[address - base : address - base + PAGE_SIZE]
                self._position = address + self._take_step(page, address)

    def _walk_plain(self, window: bytes, base: int) -> bool:
        """Walk on over what is plain here; False if something is wrong, without a step then."""
        lead = self._lead_in(base, base + len(window) - PAGE_SIZE)
        if not lead or self._zeros_to:
            return True
        begin = offset = self._position - base
        if self._missing:
            if len(self._header) == _RECORD_HEADER_SIZE:  # of a headless one it is empty
                offset, self._missing, self._crc = pass_pages(
                    memoryview(window), offset, base, lead, self._missing, self._crc
                )
        elif self.last_record is not None:
            walked = walk_plain(window, offset, base, self.last_record, lead)
            if walked is None:
                return False
            offset, self.last_record = walked
            if offset > begin:
                self.end = base + offset
        if offset > begin:
            self._position = base + offset
            self.last_page = base + (offset - 1) // PAGE_SIZE * PAGE_SIZE
        return True

    def _lead_in(self, first: int, last: int) -> int:
        """What the pages between these two are to begin with, if they are as the one before; 0 if
        there was none yet, or they must not be."""
        line = self._history
        if line.start_lsn and {line.page_tli(first), line.page_tli(last)} != {self._page_tli}:
            return 0
        return self._lead

    def _take_step(self, page: memoryview, address: int) -> int:
        """Walk into this page or, if our position is in it, over one record in it; the offset of
        what comes next."""
        self.last_page = address
        offset = self._position - address
        if not self._zeros_to:
            if offset:
                offset = self._walk_record(page, offset, address)
            else:
                offset = self._enter_page(page, address)
                if self._missing:
                    offset = self._continue_record(page, offset, address)
        if self._zeros_to and offset < PAGE_SIZE:
            self._walk_zeros(page, offset, address)
            return PAGE_SIZE
        return offset

    def _enter_page(self, page: memoryview, address: int) -> int:
        """Check a page's header, and that it goes on with our record; the offset behind it."""
        size = self._check_page(page, address)
        _, info, self._page_tli, _, rem_len = SHORT_HEADER.unpack_from(page)
        continues = info & XLP_FIRST_IS_CONTRECORD
        overwrite = self._identity.wal_format.first_is_overwrite_contrecord
        flags = info & ~(XLP_FIRST_IS_CONTRECORD | XLP_LONG_HEADER | overwrite)
        self._lead = self._identity.wal_format.xlp_magic | flags << 16 | self._page_tli << 32
        if self._missing:
            if info & overwrite:
                self._missing, self._headless = 0, False
            elif not continues:
                raise self._doubt(f"there is no contrecord flag at {format_lsn(address)}")
            elif rem_len != self._missing:
                raise self._doubt(
                    f"invalid contrecord length {rem_len} (expected {self._missing}) "
                    f"at {format_lsn(address)}"
                )
        elif continues and rem_len:
            if address != self._record or self.last_record is not None:
                raise _Stop(f"unexpected contrecord flag at {format_lsn(address)}")
            self._headless, self._missing = True, rem_len
        return size

    def _check_page(self, page: memoryview, address: int) -> int:
        """Check everything in a page's header but its records; the header's size."""
        size = check_header(page, address, self._identity, self._history)
        tli = SHORT_HEADER.unpack_from(page)[2]
        if tli < self._page_tli:
            raise _Stop(
                f"out-of-sequence timeline ID {tli} (after {self._page_tli}) {self._where(address)}"
            )
        return size

    def _walk_record(self, page: memoryview, offset: int, address: int) -> int:
        """Walk over the record at ``offset``; the offset of the next, PAGE_SIZE if there is none
        in this page."""
        start = self._position = address + offset
        length = int.from_bytes(page[offset : offset + 4], "little")
        if length < _RECORD_HEADER_SIZE:
            raise _Stop(
                f"invalid record length at {format_lsn(start)}: "
                f"expected at least {_RECORD_HEADER_SIZE}, got {length}"
            )
        end = offset + length
        if end > PAGE_SIZE:
            self._record, self._missing, self._crc = start, length, 0
            self._begun_now = True
            self._header.clear()
            self._consume(page[offset:])
            return PAGE_SIZE
        record = page[offset:end]
        _, _, prev, info, rmid, crc = RECORD_HEADER.unpack_from(record)
        if prev != self.last_record and not self._may_follow(prev, start):
            raise _Stop(_bad_link(prev, start))
        if record_crc(record) != crc:
            raise _Stop(_bad_checksum(start))
        end = (end + 7) & ~7
        self._accept(start, address + end, info, rmid)
        return end

    def _continue_record(self, page: memoryview, offset: int, address: int) -> int:
        """Walk over what this page holds of the unfinished record; the offset behind it."""
        end = offset + min(self._missing, PAGE_SIZE - offset)
        self._consume(page[offset:end])
        if self._missing:
            return PAGE_SIZE
        end = (end + 7) & ~7
        if self._headless:
            self._headless, self._passed_over = False, True
            self.end = address + end
            return end
        _, _, _, info, rmid, crc = RECORD_HEADER.unpack(self._header)
        if crc32c(self._header[:20], self._crc) != crc:
            raise self._doubt(_bad_checksum(self._record))
        self._accept(self._record, address + end, info, rmid)
        return end

    def _consume(self, data: memoryview) -> None:
        """Take the next bytes of the unfinished record."""
        self._missing -= len(data)
        if self._headless:
            return
        wanted = _RECORD_HEADER_SIZE - len(self._header)
        if wanted > 0:
            self._header += data[:wanted]
            data = data[wanted:]
            if len(self._header) < _RECORD_HEADER_SIZE:
                return
            prev = RECORD_HEADER.unpack(self._header)[2]
            if prev != self.last_record and not self._may_follow(prev, self._record):
                raise self._doubt(_bad_link(prev, self._record))
        self._crc = crc32c(data, self._crc)

    def _accept(self, start: int, end: int, info: int, rmid: int) -> None:
        self.last_record, self.end = start, end
        if rmid == 0 and info & 0xF0 == XLOG_SWITCH:
            size = self._identity.segment_size
            self._zeros_to = -(-end // size) * size if end % size else 0

    def _walk_zeros(self, page: memoryview, offset: int, address: int) -> None:
        """Behind an XLOG_SWITCH the segment counts once all the rest of it is zeros: before,
        it may still hold what it held when it was recycled."""
        if bytes(page[offset:]) != _ZEROS[offset:]:
            self._position = address + offset
            raise _Stop(f"no zeros behind the XLOG_SWITCH record {self._where(address)}, yet")
        if address + PAGE_SIZE == self._zeros_to:
            self.end, self._zeros_to = self._zeros_to, 0

    def _may_follow(self, prev: int, start: int) -> bool:
        """Whether the link can be right although we have not seen the record before."""
        if self.last_record is not None or prev >= start:
            return False
        self.head = (prev, start) if self._passed_over else None
        return True

    def _doubt(self, reason: str) -> _Again | _Stop:
        """What to raise when the unfinished record turns out wrong: to go back to its start and
        try again if some of it was read earlier, and so may have changed since; else to stop."""
        again = not self._begun_now
        self._go_back()
        return _Again() if again else _Stop(reason)

    def _go_back(self) -> None:
        """Forget what was read of the unfinished record."""
        self._position, self._missing, self._headless = self._record, 0, False
        self._begun_now = True

    def _where(self, address: int) -> str:
        return where(address, self._identity, self._history)

    def _segment(self, address: int) -> str:
        size = self._identity.segment_size
        return segment_name(self._history.file_tli(address, size), address // size, size)


def _bad_checksum(start: int) -> str:
    return f"incorrect resource manager data checksum in record at {format_lsn(start)}"


def _bad_link(prev: int, start: int) -> str:
    return f"record with incorrect prev-link {format_lsn(prev)} at {format_lsn(start)}"
