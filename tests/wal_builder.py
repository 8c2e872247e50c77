"""Builds WAL for the tests: made up, but valid to the last bit, and known to the last byte.

A :class:`WalBuilder` writes one timeline of one cluster, record by record, as PostgreSQL lays them
out: into pages with their headers, over pages and segments where they do not fit, and with all
that looks odd and is right (a segment left empty behind XLOG_SWITCH, a record given up and
overwritten, a timeline that goes on in the copy of another's segment).  It remembers where each
record ends, so :meth:`WalBuilder.end_of` tells where valid WAL ends if only so many of its bytes
are there: what a scanner must find, worked out without scanning.

Nothing here is taken from :mod:`walproto.wal`, so a mistake there is not made here once more.
"""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

PAGE = 8192
MB = 1 << 20
SYSTEM = 0x6A1B2C3D4E5F6071

MAGIC = {
    13: 0xD106,
    14: 0xD10D,
    15: 0xD110,
    16: 0xD113,
    17: 0xD116,
    18: 0xD118,
    19: 0xD120,
}
CONTRECORD = 0x0001
LONG = 0x0002
SHORT_SIZE = 24
LONG_SIZE = 40
RECORD_SIZE = 24

RM_XLOG = 0
RM_HEAP = 10
SWITCH = 0x40
OVERWRITE_CONTRECORD = 0xD0


class Record(NamedTuple):
    """A whole record: where it starts, behind its last byte, and where the next may start."""

    start: int
    last: int
    end: int


def page_header(
    address: int, *, major: int, tli: int, size: int, system: int, flags: int = 0, rem_len: int = 0
) -> bytes:
    """The header of the page at ``address``, long where a segment of ``size`` starts."""
    long = address % size == 0
    flags |= LONG if long else 0
    header = struct.pack("<HHIQI4x", MAGIC[major], flags, tli, address, rem_len)
    return header + struct.pack("<QII", system, size, PAGE) if long else header


def make_record(prev: int, data: bytes, *, rmid: int, info: int, xid: int) -> bytes:
    """A record's bytes: header, then ``data``."""
    head = struct.pack("<IIQBB2x", RECORD_SIZE + len(data), xid, prev, info, rmid)
    crc: int = crc32c(head, crc32c(data))
    return head + struct.pack("<I", crc) + data


class WalBuilder:
    """One timeline's WAL from the segment at ``start`` on."""

    def __init__(
        self,
        *,
        major: int = 18,
        size: int = MB,
        system: int = SYSTEM,
        tli: int = 1,
        start: int = 0,
        prev: int | None = None,
        seed: int = 0,
    ) -> None:
        assert start % size == 0
        self.major = major
        self.size = size
        self.system = system
        self.tli = tli
        self.start = start or size
        self.lsn = self.start
        """Where the next record goes; its start is behind a page header if there is one due."""
        self.prev = self.start - 128 if prev is None else prev
        self.records: list[Record] = []
        self.history: list[tuple[int, int]] = []
        """The timelines before this one, each with the LSN where it ended."""
        self._random = random.Random(seed)
        self._data = bytearray()
        self._first_file = self.start
        self._points: list[tuple[int, int]] = [(0, self.start)]
        self._overwrite = False
        # Flags that mean nothing and are there all the same: XLP_BKP_REMOVABLE.
        self._always = 0x0004 if major < 19 else 0
        self._overwrite_flag = 0x0008 if major < 19 else 0x0004

    # --- writing ---------------------------------------------------------------------------

    def record(
        self, size: int = 100, *, rmid: int = RM_HEAP, info: int = 0, data: bytes | None = None
    ) -> Record:
        """Write a record of ``size`` bytes in all, header included."""
        if data is None:
            data = self._random.randbytes(size - RECORD_SIZE)
        start = self._record_start()
        raw = make_record(self.prev, data, rmid=rmid, info=info, xid=len(self.records) + 700)
        self._write(raw)
        last = self.lsn
        self.lsn = (last + 7) & ~7
        self.prev = start
        self._grow(self.lsn)
        record = Record(start, last, self.lsn)
        self.records.append(record)
        self._points.append((last, self.lsn))
        return record

    def records_to(self, lsn: int, size: int = 500) -> None:
        """Write records of ``size`` bytes until one ends at ``lsn`` or behind it."""
        while self.lsn < lsn:
            self.record(size)

    def fill_to(self, lsn: int) -> Record:
        """Write one record that ends exactly at ``lsn`` (8-aligned, not inside a header)."""
        assert lsn % 8 == 0
        room, at = 0, self._record_start()
        while at < lsn:
            if at % PAGE == 0:
                at += self._header_size(at)
            room += min(lsn, at - at % PAGE + PAGE) - at
            at = at - at % PAGE + PAGE
        record = self.record(room)
        assert record.end == lsn, (record, lsn)
        return record

    def switch(self) -> Record:
        """Write an XLOG_SWITCH: what is left of the segment stays zeros."""
        record = self.record(RECORD_SIZE, rmid=RM_XLOG, info=SWITCH)
        if self.lsn % self.size:
            self.lsn += self.size - self.lsn % self.size
            self._points.append((self.lsn, self.lsn))
        return record

    def abandon(self, size: int, pages: int = 1) -> Record:
        """Begin a record, lose what should have stood behind ``pages`` page ends, and overwrite
        that with what PostgreSQL writes when it starts again; the record that says so."""
        start = self._record_start()
        lost = start - start % PAGE + PAGE * pages
        raw = make_record(
            self.prev, self._random.randbytes(size - RECORD_SIZE), rmid=RM_HEAP, info=0, xid=1
        )
        self._write(raw)
        assert self.lsn > lost, "the record is too short to be lost there"
        del self._data[lost - self.start :]
        self.lsn = lost
        self._overwrite = True
        return self.record(
            RECORD_SIZE + 18,
            rmid=RM_XLOG,
            info=OVERWRITE_CONTRECORD,
            data=b"\xff\x10" + struct.pack("<QQ", start, 0),
        )

    def fork(self, tli: int, at: Record | None = None) -> WalBuilder:
        """The timeline that branches off here, or at the end of the record ``at``."""
        switch = self.lsn if at is None else at.end
        child = WalBuilder(
            major=self.major,
            size=self.size,
            system=self.system,
            tli=tli,
            start=self.start,
            seed=tli * 1000 + len(self.records),
        )
        child.lsn = switch
        child.records = [record for record in self.records if record.end <= switch]
        child.prev = child.records[-1].start if child.records else self.prev
        child.history = [*self.history, (self.tli, switch)]
        child._data = self._data[: switch - self.start]
        child._first_file = switch - switch % self.size
        child._points = [point for point in self._points if point[1] <= switch]
        child._grow(switch)
        return child

    def copy(self, seed: int) -> WalBuilder:
        """The same once more, to go on otherwise."""
        other = copy.deepcopy(self)
        other._random.seed(seed)
        return other

    def _record_start(self) -> int:
        """Where a record written now starts."""
        return self.lsn + (0 if self.lsn % PAGE else self._header_size(self.lsn))

    def _header_size(self, address: int) -> int:
        return SHORT_SIZE if address % self.size else LONG_SIZE

    def _write(self, raw: bytes) -> None:
        done = 0
        while done < len(raw):
            if self.lsn % PAGE == 0:
                self._write_header(len(raw) - done if done else 0)
            room = min(PAGE - self.lsn % PAGE, len(raw) - done)
            self._put(raw[done : done + room])
            done += room

    def _write_header(self, rem_len: int) -> None:
        flags = self._always | (CONTRECORD if rem_len else 0)
        if self._overwrite:
            flags |= self._overwrite_flag
            self._overwrite = False
        self._put(self.header(self.lsn, flags, rem_len))

    def header(self, address: int, flags: int = 0, rem_len: int = 0) -> bytes:
        """A page header as this timeline would have it."""
        return page_header(
            address,
            major=self.major,
            tli=self.tli,
            size=self.size,
            system=self.system,
            flags=flags,
            rem_len=rem_len,
        )

    def _put(self, data: bytes) -> None:
        self._grow(self.lsn + len(data))
        offset = self.lsn - self.start
        self._data[offset : offset + len(data)] = data
        self.lsn += len(data)

    def _grow(self, lsn: int) -> None:
        """Have whole segments up to ``lsn``."""
        wanted = -(-(lsn - self.start) // self.size) * self.size
        self._data += bytes(max(0, wanted - len(self._data)))

    # --- what was written ------------------------------------------------------------------

    @property
    def image(self) -> bytes:
        """All of it from ``start`` on: whole segments, zeros behind the end."""
        self._grow(self.lsn)
        return bytes(self._data)

    @property
    def name(self) -> str:
        """The name of the history file."""
        return f"{self.tli:08X}.history"

    @property
    def history_contents(self) -> bytes:
        lines = [
            f"{tli}\t{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}\tno recovery target specified\n"
            for tli, lsn in self.history
        ]
        return "\n".join(lines).encode()

    def end_of(self, there: int) -> int:
        """Where valid WAL ends if only the bytes below the LSN ``there`` are those of the image:
        behind the last whole record, or behind the zeros that follow an XLOG_SWITCH."""
        return max(end for last, end in self._points if last <= there)

    def segment_name(self, lsn: int) -> str:
        segno = lsn // self.size
        per_id = 0x1_0000_0000 // self.size
        return f"{self.tli:08X}{segno // per_id:08X}{segno % per_id:08X}"

    def segment(self, lsn: int) -> bytes:
        """The contents of the segment that ``lsn`` is in."""
        offset = lsn - lsn % self.size - self.start
        return self.image[offset : offset + self.size]

    def segments(self) -> dict[str, bytes]:
        """This timeline's files: names and contents, the oldest first."""
        image = self.image
        return {
            self.segment_name(lsn): image[lsn - self.start : lsn - self.start + self.size]
            for lsn in range(self._first_file, self.start + len(image), self.size)
        }

    def write_to(self, directory: Path, *, partial: bool = False) -> list[Path]:
        """Write this timeline's files, with ``partial`` the last one as pg_receivewal names it."""
        paths = []
        if self.history:
            (directory / self.name).write_bytes(self.history_contents)
        names = list(self.segments())
        for name, contents in self.segments().items():
            suffix = ".partial" if partial and name == names[-1] else ""
            path = directory / f"{name}{suffix}"
            path.write_bytes(contents)
            paths.append(path)
        return paths


def reader(image: bytes | bytearray, start: int, size: int) -> Callable[[int, int], bytes]:
    """What a Scanner reads with, over ``image`` in memory, which begins at the LSN ``start``."""

    def read(lsn: int, count: int) -> bytes:
        count = min(count, size - lsn % size)
        return bytes(image[lsn - start : lsn - start + count]) if lsn >= start else b""

    return read


def first_difference(one: bytes | bytearray, other: bytes | bytearray) -> int:
    """The offset of the first byte in which the two differ; where the shorter ends if none."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
