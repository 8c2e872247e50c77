"""Walks over WAL that is as nearly all WAL is: many records for the price of one CRC.

To call for the CRC of one record after the other takes longer than the CRCs themselves.  So what
there is to check in all the records of some pages is put into one message, whose CRC-32C must be
that of the empty message.  For behind any message and its own CRC the register of the CRC is in
one and the same state, and :data:`GLUE` brings it from there to where it began.  A record's CRC is
that of its data and then of its header: so its data, its header (of which the CRC is the end) and
GLUE leave the register as it was if the record is right, and as it was not if it is wrong.  And
what comes behind maps different states to different states.

So a single wrong record is found as surely as if it were checked alone.  Two can cancel each
other, but no more easily than two errors in one record can.  The message is as one record of its
length, and of those CRC-32C finds any three wrong bits and any odd number of them, and the same
error made twice: its polynomial is x + 1 times a primitive one of degree 31, so the two cancel
only 2**31 - 1 bits apart, which no message here is long, or if the primitive one divides the
error, one error in 2**31.  Of anything else one in 2**32 is missed, as by every CRC of 32 bits;
and first each wrong record must have the very link to the one before that it should have, for that
is looked at in each.

What is wrong is not told here, nor is anything done with what is special: the first record of all,
XLOG_SWITCH (which is but a header), a record that goes on behind the pages at hand, or over two
page ends with the first of them in its header, a page that begins a segment or has other flags than
the one before.  :mod:`walproto.wal.scan` does that.
"""

from __future__ import annotations

import struct

from crc32c import crc32c

from walproto.lsn import PAGE_SIZE
from walproto.wal.pages import RECORD_HEADER, SHORT_HEADER, XLP_FIRST_IS_CONTRECORD

GLUE = bytes.fromhex("6cd087d3")
"""A message, its CRC-32C (little-endian) and this have the CRC-32C of the empty message."""

_LENGTH_AND_LINK = struct.Struct("<I4xQ8x")
"""Of a record's header."""
_LEAD_AND_ADDRESS = struct.Struct("<QQ")
"""Of a page's header; its lead is its magic, flags and timeline ID, as one number."""
_LEAD_ADDRESS_AND_REST = struct.Struct("<QQI")
"""The same, and how many bytes of a record are still to come."""
_CONTINUES = XLP_FIRST_IS_CONTRECORD << 16

_RECORD_HEADER_SIZE = RECORD_HEADER.size
_PAGE_HEADER_SIZE = SHORT_HEADER.size
_ROOM = PAGE_SIZE - _PAGE_HEADER_SIZE


def walk_plain(
    window: bytes, offset: int, address: int, last: int, lead: int
) -> tuple[int, int] | None:
    """Walk over the records from ``offset`` on, for as long as they are plain; the offset behind
    the last of them, and its LSN.  None if one of them is wrong.

    ``window`` is whole pages from the LSN ``address`` on, and at ``offset`` a record or a page
    begins.  ``last`` is the LSN of the record before.  ``lead`` is what each page has to begin
    with, if no record goes on in it.
    """
    view = memoryview(window)
    parts: list[bytes] = []
    # What is global is slow to get at.
    add, unpack, glue, header_size = (
        parts.append,
        _LENGTH_AND_LINK.unpack,
        GLUE,
        _RECORD_HEADER_SIZE,
    )
    done = offset
    page_end = -(-offset // PAGE_SIZE) * PAGE_SIZE
    last_whole = page_end - header_size
    while True:
        if offset <= last_whole:
            body = offset + header_size
            head = window[offset:body]
            length, prev = unpack(head)
            if prev != last or length <= header_size:
                break
            end = offset + length
            if end <= page_end:
                add(window[body:end])
                add(head)
                add(glue)
                last = address + offset
                done = offset = (end + 7) & ~7
                continue
        elif offset == page_end:
            if offset == len(window):
                break
            if _LEAD_AND_ADDRESS.unpack_from(window, offset) != (lead, address + offset):
                break
            offset += _PAGE_HEADER_SIZE
            page_end += PAGE_SIZE
            last_whole += PAGE_SIZE
            continue
        end = _cross_pages(view, offset, address, last, lead)
        if not end:
            break
        last = address + offset
        done = offset = (end + 7) & ~7
        page_end = -(-offset // PAGE_SIZE) * PAGE_SIZE
        last_whole = page_end - header_size
    return (done, last) if crc32c(b"".join(parts)) == 0 else None


def pass_pages(
    view: memoryview, offset: int, address: int, lead: int, missing: int, crc: int
) -> tuple[int, int, int]:
    """Pass over whole pages in the middle of a record: ``missing`` bytes of it are to come from
    ``offset`` on, and ``crc`` is that of those before.  The three as they are then."""
    while missing > _ROOM and _goes_on(view, offset, address, lead, missing):
        crc = crc32c(view[offset + _PAGE_HEADER_SIZE : offset + PAGE_SIZE], crc)
        offset += PAGE_SIZE
        missing -= _ROOM
    return offset, missing, crc


def _cross_pages(view: memoryview, offset: int, address: int, last: int, lead: int) -> int:
    """The offset behind a record that goes on in the next page; 0 if it is not plain, or wrong."""
    missing = int.from_bytes(view[offset : offset + 4], "little")
    if not _RECORD_HEADER_SIZE < missing <= len(view) - offset:
        return 0
    page = offset - offset % PAGE_SIZE + PAGE_SIZE
    missing -= page - offset
    head = bytes(view[offset : min(offset + _RECORD_HEADER_SIZE, page)])
    rest = _RECORD_HEADER_SIZE - len(head)
    crc = 0
    if not rest:
        crc = crc32c(view[offset + _RECORD_HEADER_SIZE : page])
        if missing > _ROOM:
            page, missing, crc = pass_pages(view, page, address, lead, missing, crc)
    if missing > _ROOM or not _goes_on(view, page, address, lead, missing):
        return 0
    body = page + _PAGE_HEADER_SIZE
    end = body + missing
    if rest:
        head += view[body : body + rest]
        body += rest
    crc = crc32c(view[body:end], crc)
    _, _, prev, _, _, expected = RECORD_HEADER.unpack(head)
    return end if prev == last and crc32c(head[:20], crc) == expected else 0


def _goes_on(view: memoryview, offset: int, address: int, lead: int, missing: int) -> bool:
    """Whether there is a page at ``offset`` that goes on with a record of which so much is
    missing."""
    if offset == len(view):
        return False
    expected = lead | _CONTINUES, address + offset, missing
    return _LEAD_ADDRESS_AND_REST.unpack_from(view, offset) == expected
