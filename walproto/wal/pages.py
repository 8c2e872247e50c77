"""The formats of WAL: pages and records, PostgreSQL 13 to 19.

The constructs are the declarations, with the field names of ``xlog_internal.h`` and
``xlogrecord.h``.  Scanning reads millions of them, so each has a precompiled
:class:`struct.Struct` beside it; a test holds the two against each other.

WAL has the byte order of the machine that wrote it; here that is little-endian (x86, ARM).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Padding
from construct import Struct as Declaration
from crc32c import crc32c

from walproto.lsn import PAGE_SIZE, is_segment_size

XLogPageHeaderData = Declaration(
    "xlp_magic" / Int16ul,
    "xlp_info" / Int16ul,
    "xlp_tli" / Int32ul,
    "xlp_pageaddr" / Int64ul,
    "xlp_rem_len" / Int32ul,
    Padding(4),
)
XLogLongPageHeaderData = Declaration(
    "std" / XLogPageHeaderData,
    "xlp_sysid" / Int64ul,
    "xlp_seg_size" / Int32ul,
    "xlp_xlog_blcksz" / Int32ul,
)
XLogRecord = Declaration(
    "xl_tot_len" / Int32ul,
    "xl_xid" / Int32ul,
    "xl_prev" / Int64ul,
    "xl_info" / Int8ul,
    "xl_rmid" / Int8ul,
    "padding" / Bytes(2),
    "xl_crc" / Int32ul,
)

SHORT_HEADER = struct.Struct("<HHIQI4x")
LONG_HEADER = struct.Struct("<HHIQI4xQII")
RECORD_HEADER = struct.Struct("<IIQBB2xI")

XLP_FIRST_IS_CONTRECORD = 0x0001
XLP_LONG_HEADER = 0x0002

XLOG_SWITCH = 0x40
"""``xl_info`` (high half) of the record, with rmid 0, behind which a segment is left empty."""


@dataclass(frozen=True, slots=True)
class WalFormat:
    """What differs between majors: the page magic, and the flags in ``xlp_info``."""

    major: int
    xlp_magic: int
    first_is_overwrite_contrecord: int
    all_flags: int


FORMATS = {
    wal_format.xlp_magic: wal_format
    for wal_format in (
        WalFormat(13, 0xD106, 0x0008, 0x000F),
        WalFormat(14, 0xD10D, 0x0008, 0x000F),
        WalFormat(15, 0xD110, 0x0008, 0x000F),
        WalFormat(16, 0xD113, 0x0008, 0x000F),
        WalFormat(17, 0xD116, 0x0008, 0x000F),
        WalFormat(18, 0xD118, 0x0008, 0x000F),
        WalFormat(19, 0xD120, 0x0004, 0x0007),
    )
}
"""The formats we know, by the magic number of their pages."""


def known_majors() -> str:
    """Of which versions of PostgreSQL the formats are known, in words."""
    majors = [known.major for known in FORMATS.values()]
    return f"{min(majors)} to {max(majors)}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose WAL it is: what every segment's first page says of its cluster."""

    system_identifier: int
    segment_size: int
    wal_format: WalFormat


def parse_identity(page: bytes) -> tuple[Identity, int, int] | None:
    """What a segment's first page says: its cluster, its timeline ID and its LSN.

    ``page`` is the first 40 bytes of the file or more.  None if that is no first page of a
    segment in a format we know.
    """
    if len(page) < LONG_HEADER.size:
        return None
    magic, info, tli, address, _, sysid, segment_size, block_size = LONG_HEADER.unpack_from(page)
    wal_format = FORMATS.get(magic)
    if (
        wal_format is None
        or not info & XLP_LONG_HEADER
        or block_size != PAGE_SIZE
        or not is_segment_size(segment_size)
        or address % segment_size
    ):
        return None
    return Identity(sysid, segment_size, wal_format), tli, address


def record_crc(record: memoryview) -> int:
    """The CRC-32C of a whole record: of its data first, then of its header up to ``xl_crc``."""
    crc: int = crc32c(record[:20], crc32c(record[24:]))
    return crc
