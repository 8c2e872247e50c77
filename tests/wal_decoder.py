"""Makes records of WAL as it arrives, as waldecoder.rs in Neon does, and with no walproto."""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import NamedTuple

from crc32c import crc32c

from tests.postgres import int_to_lsn

PAGE, SEGMENT = 8192, 2**20


class Record(NamedTuple):
    lsn: int
    size: int
    end: int
    """Behind it, and behind what fills it up to eight bytes."""


class InvalidWal(AssertionError):
    """What arrived is no WAL."""


class Decoder:
    """Makes records of WAL that arrives piece by piece, from the end of a record on."""

    def __init__(self, lsn: int, zeros_to: int = 0) -> None:
        self.lsn = lsn + -lsn % 8
        """Up to where it has looked at WAL."""
        self.records: list[Record] = []
        self.end = self.lsn
        """Behind the last whole record."""
        self._unread = bytearray()
        self._record = bytearray()
        self._size = 0
        self._first = 0
        self.zeros_to = zeros_to
        """Up to where there are zeros, behind a record that has ended the segment early."""
        self._work = self._decode()
        self._wanted = next(self._work)

    def feed(self, data: bytes) -> None:
        """Here is more.  Raises InvalidWal."""
        self._unread += data
        position = 0
        while len(self._unread) - position >= self._wanted:
            taken = bytes(self._unread[position : position + self._wanted])
            position += self._wanted
            self.lsn += self._wanted
            self._wanted = self._work.send(taken)
        del self._unread[:position]

    def _decode(self) -> Generator[int, bytes, None]:
        """Yields how many bytes it wants, and is sent them."""
        while True:
            skips = self.lsn < self.zeros_to
            if self.lsn % PAGE == 0 and not skips:
                self._check_header((yield 40 if self.lsn % SEGMENT == 0 else 24))
            left = PAGE - self.lsn % PAGE
            if skips:
                if any((yield left)):
                    raise InvalidWal(f"no zeros before {int_to_lsn(self.lsn)}")
                if self.lsn == self.zeros_to:
                    self.end = self.lsn
            elif self._size:
                self._record += yield min(left, self._size - len(self._record))
                if len(self._record) == self._size:
                    if self.lsn % 8:
                        yield -self.lsn % 8
                    self._take_record()
                    self.end = self.lsn
            else:
                self._first = self.lsn
                self._record = bytearray((yield 4))
                self._size = int.from_bytes(self._record, "little")
                if self._size < 24:
                    raise InvalidWal(f"no record at {int_to_lsn(self._first)}")

    def _check_header(self, header: bytes) -> None:
        address, size = self.lsn - len(header), self._size - len(self._record)
        _, flags, tli, found, rest = struct.unpack_from("<HHIQI", header)
        if (tli, found, rest) != (1, address, size) or bool(flags & 1) != bool(size):
            raise InvalidWal(f"no page header at {int_to_lsn(address)}: {header.hex()}")

    def _take_record(self) -> None:
        _, _, prev, info, rmid, crc = struct.unpack_from("<IIQBB2xI", self._record)
        name = f"the record at {int_to_lsn(self._first)}"
        if crc != crc32c(bytes(self._record[:20]), crc32c(bytes(self._record[24:]))):
            raise InvalidWal(f"{name} has a wrong CRC")
        if self.records and prev != self.records[-1].lsn:
            raise InvalidWal(f"{name} is linked to {int_to_lsn(prev)}")
        self.records.append(Record(self._first, self._size, self.lsn))
        if (rmid, info & 0xF0) == (0, 0x40):  # XLOG_SWITCH
            self.zeros_to = self.lsn + -self.lsn % SEGMENT
        self._size = 0
        self._record.clear()
