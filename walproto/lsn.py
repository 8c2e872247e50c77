"""Positions in the WAL, and the names of the files that hold them.

An LSN is a plain ``int``: a byte position in the WAL, 0 to 2**64 - 1, where 0 stands for "none"
(``InvalidXLogRecPtr``).  A timeline ID (tli) is an ``int`` from 1 up.  A segment number is an LSN
divided by the segment size.  Only their text has rules, and those are here.

PostgreSQL: ``xlog_internal.h`` (file names), documentation "WAL Internals".
"""

from __future__ import annotations

import re
from typing import NamedTuple

PAGE_SIZE = 8192
"""XLOG_BLCKSZ, in bytes: the only one that anybody builds PostgreSQL with."""

MIN_SEGMENT_SIZE = 1 << 20
MAX_SEGMENT_SIZE = 1 << 30

_SEGMENT_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(\.partial)?\Z")
_HISTORY_NAME = re.compile(r"([0-9A-F]{8})\.history\Z")
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")


def format_lsn(lsn: int) -> str:
    """``16/B374D848``, as PostgreSQL up to 18 prints an LSN."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """The LSN that ``text`` spells, with or without leading zeros; ValueError if it is none."""
    match = _LSN.match(text)
    if match is None:
        raise ValueError(f'invalid LSN: "{text}"')
    high, low = match.groups()
    return int(high, 16) << 32 | int(low, 16)


def is_segment_size(size: int) -> bool:
    """Whether ``size`` (bytes) is one that initdb accepts: a power of two, 1 MB to 1 GB."""
    return MIN_SEGMENT_SIZE <= size <= MAX_SEGMENT_SIZE and size & (size - 1) == 0


class SegmentName(NamedTuple):
    """What the name of a segment file says; its LSN also needs the segment size."""

    tli: int
    high: int
    low: int
    partial: bool

    def __str__(self) -> str:
        suffix = ".partial" if self.partial else ""
        return f"{self.tli:08X}{self.high:08X}{self.low:08X}{suffix}"

    def segno(self, segment_size: int) -> int:
        """The segment number: its first LSN divided by the segment size."""
        return self.high * (0x1_0000_0000 // segment_size) + self.low

    def is_possible(self, segment_size: int) -> bool:
        """Whether clusters with this segment size have such a name at all."""
        return self.tli > 0 and self.low < 0x1_0000_0000 // segment_size


def parse_segment_name(name: str) -> SegmentName | None:
    """What ``name`` says if it is that of a segment, ``.partial`` or complete; else None."""
    match = _SEGMENT_NAME.match(name)
    if match is None:
        return None
    tli, high, low, partial = match.groups()
    return SegmentName(int(tli, 16), int(high, 16), int(low, 16), partial is not None)


def is_segment_name(name: str) -> bool:
    """Whether ``name`` is that of a segment, ``.partial`` or complete."""
    return _SEGMENT_NAME.match(name) is not None


def segment_name(tli: int, segno: int, segment_size: int) -> str:
    """The name of a segment's file (``XLogFileName``)."""
    high, low = divmod(segno, 0x1_0000_0000 // segment_size)
    return f"{tli:08X}{high:08X}{low:08X}"


def history_name(tli: int) -> str:
    """The name of a timeline's history file (``TLHistoryFileName``)."""
    return f"{tli:08X}.history"


def parse_history_name(name: str) -> int | None:
    """The tli whose history a file of this name holds; None if it is no such name."""
    match = _HISTORY_NAME.match(name)
    return int(match[1], 16) if match else None
