"""What the header of a WAL page must say, given where it is and whose WAL it is.

PostgreSQL: ``XLogReaderValidatePageHeader`` in ``xlogreader.c``, whose messages these are.
"""

from __future__ import annotations

from typing import Protocol

from walproto.lsn import PAGE_SIZE, format_lsn, segment_name
from walproto.wal.pages import LONG_HEADER, SHORT_HEADER, XLP_LONG_HEADER, Identity


class InvalidWal(Exception):
    """This is not the WAL that should be here; the text says why."""


class Line(Protocol):
    """The timelines that follow each other (:class:`walproto.timeline.history.History`)."""

    @property
    def start_lsn(self) -> int:
        """Where the last of them branched off; 0 if those before it are not known."""

    def page_tli(self, address: int) -> int:
        """The timeline whose ID the page at ``address`` must carry."""

    def file_tli(self, lsn: int, segment_size: int) -> int:
        """The timeline in whose file the segment with ``lsn`` is."""


def check_header(
    page: memoryview | bytes | bytearray, address: int, identity: Identity, line: Line
) -> int:
    """Check the header of the page at ``address``; its size in bytes, 24 or 40.

    ``page`` is the whole header at least.  Raises InvalidWal.
    """
    magic, info, tli, page_address, _ = SHORT_HEADER.unpack_from(page)
    if magic != identity.wal_format.xlp_magic:
        raise InvalidWal(f"invalid magic number {magic:04X} {where(address, identity, line)}")
    long = address % identity.segment_size == 0
    if info & ~identity.wal_format.all_flags or bool(info & XLP_LONG_HEADER) != long:
        raise InvalidWal(f"invalid info bits {info:04X} {where(address, identity, line)}")
    if long:
        *_, sysid, segment_size, block_size = LONG_HEADER.unpack_from(page)
        if sysid != identity.system_identifier:
            raise InvalidWal(
                "WAL file is from different database system: WAL file database system "
                f"identifier is {sysid}, expected {identity.system_identifier}, "
                + where(address, identity, line)
            )
        if segment_size != identity.segment_size or block_size != PAGE_SIZE:
            raise InvalidWal(
                f"incorrect segment size or page size {where(address, identity, line)}"
            )
    if page_address != address:
        raise InvalidWal(
            f"unexpected pageaddr {format_lsn(page_address)} {where(address, identity, line)}"
        )
    expected = line.page_tli(address)
    if not 0 < tli <= expected or (tli < expected and line.start_lsn):
        raise InvalidWal(
            f"unexpected timeline ID {tli} (should be {expected}) {where(address, identity, line)}"
        )
    return LONG_HEADER.size if long else SHORT_HEADER.size


def where(address: int, identity: Identity, line: Line) -> str:
    """In which segment that is, in words."""
    size = identity.segment_size
    name = segment_name(line.file_tli(address, size), address // size, size)
    return f"in WAL segment {name}, LSN {format_lsn(address)}"
