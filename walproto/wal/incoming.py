"""WAL as it comes in: every page's header is checked before anybody is told that we have it.

Which record follows which, and whether its CRC is right, is found out later, by whoever walks over
the WAL to serve it (:mod:`walproto.wal.scan`).  Here it is only made sure that each byte belongs
where it is about to be written: to this cluster, this timeline, this page.

A header that has come in half is held back until the rest of it is there.  Behind an XLOG_SWITCH a
segment's pages are zeros to its end, headers too; so once a page has no header, nothing but zeros
may follow in its segment.
"""

from __future__ import annotations

from walproto.lsn import PAGE_SIZE, format_lsn
from walproto.wal.headers import InvalidWal, Line, check_header, where
from walproto.wal.pages import (
    FORMATS,
    LONG_HEADER,
    SHORT_HEADER,
    Identity,
    known_majors,
    parse_identity,
)

_ZEROS = bytes(PAGE_SIZE)


class IncomingWal:
    """Checks the WAL along ``line`` from ``lsn`` on.

    ``identity`` is None if the format is not known yet; then ``lsn`` is the start of a segment,
    whose first page tells.
    """

    def __init__(
        self,
        system_identifier: int,
        segment_size: int,
        identity: Identity | None,
        line: Line,
        lsn: int,
    ) -> None:
        self._system_identifier = system_identifier
        self._segment_size = segment_size
        self.identity = identity
        """Whose WAL it is, as soon as that is known."""
        self._line = line
        self._lsn = lsn
        self._held = b""
        self._zeros_to = 0

    @property
    def lsn(self) -> int:
        """Where the next byte that comes belongs."""
        return self._lsn + len(self._held)

    def take(self, lsn: int, data: memoryview) -> memoryview:
        """Take what has come for ``lsn``; what can be written of it, behind what was before.

        Raises InvalidWal if it belongs elsewhere.
        """
        if lsn != self.lsn:
            raise InvalidWal(f"WAL came for {format_lsn(lsn)} instead of {format_lsn(self.lsn)}")
        if self._held:
            data = memoryview(self._held + data)
        start, end = self._lsn, self._lsn + len(data)
        for address in range(start - start % PAGE_SIZE, end, PAGE_SIZE):
            page = data[max(address - start, 0) : address - start + PAGE_SIZE]
            if address < start:
                self._check_zeros(page, address)
            elif len(page) < self._header_size(address):
                end = address  # the rest of this header is still to come
            else:
                self._check_page(page, address)
        self._held = bytes(data[end - start :])
        self._lsn = end
        return data[: end - start]

    def _header_size(self, address: int) -> int:
        return (SHORT_HEADER if address % self._segment_size else LONG_HEADER).size

    def _check_page(self, page: memoryview, address: int) -> None:
        if address % self._segment_size == 0:
            self.identity = self.identity or self._identify(page)
        elif bytes(page[:2]) == b"\0\0" and not self._zeros_to > address:
            self._zeros_to = address - address % self._segment_size + self._segment_size
        if address < self._zeros_to:
            self._check_zeros(page, address)
            return
        assert self.identity is not None  # it starts with a segment, or is given
        check_header(page, address, self.identity, self._line)

    def _check_zeros(self, page: memoryview, address: int) -> None:
        if address < self._zeros_to and bytes(page) != _ZEROS[: len(page)]:
            assert self.identity is not None
            place = where(address, self.identity, self._line)
            raise InvalidWal(f"WAL came behind a page without a header, {place}")

    def _identify(self, page: memoryview) -> Identity:
        """Learn the format from the first page of all."""
        found = parse_identity(bytes(page[: LONG_HEADER.size]))
        if found is None:
            magic, *_ = SHORT_HEADER.unpack_from(page)
            wrong = "its header is wrong"
            if magic not in FORMATS:
                wrong = f"its page magic is {magic:04X}"
            raise InvalidWal(
                f"what came is no first page of a segment of PostgreSQL {known_majors()}: {wrong}"
            )
        identity, _, _ = found
        expected = Identity(self._system_identifier, self._segment_size, identity.wal_format)
        if identity != expected:
            raise InvalidWal(
                f"WAL came of system {identity.system_identifier} with segments of "
                f"{identity.segment_size} bytes, instead of system {self._system_identifier} "
                f"with {self._segment_size}"
            )
        return identity
