"""What a page's header must say: every field of it, for every version, and what is told if not."""

from __future__ import annotations

import struct

import pytest

from tests.wal_builder import (
    CONTRECORD,
    LONG,
    LONG_SIZE,
    MAGIC,
    MB,
    PAGE,
    SHORT_SIZE,
    SYSTEM,
    page_header,
)
from walproto.timeline.history import Ancestor, History
from walproto.wal.headers import InvalidWal, check_header, where
from walproto.wal.pages import FORMATS, Identity

FIRST = 5 * MB
"""Where a segment begins."""
SECOND = FIRST + PAGE
"""The page behind its first."""
ALONE = History(1)


def identity_of(major: int = 18, size: int = MB) -> Identity:
    return Identity(SYSTEM, size, FORMATS[MAGIC[major]])


def header(
    address: int,
    *,
    major: int = 18,
    tli: int = 1,
    size: int = MB,
    system: int = SYSTEM,
    flags: int = 0,
) -> bytes:
    return page_header(address, major=major, tli=tli, size=size, system=system, flags=flags)


def with_field(page: bytes, offset: int, kind: str, value: int) -> bytes:
    changed = bytearray(page)
    struct.pack_into(f"<{kind}", changed, offset, value)
    return bytes(changed)


def refused(
    page: bytes, address: int, line: History = ALONE, identity: Identity | None = None
) -> str:
    """Why the page is refused."""
    with pytest.raises(InvalidWal) as caught:
        check_header(page, address, identity or identity_of(), line)
    return str(caught.value)


@pytest.mark.parametrize("major", MAGIC)
@pytest.mark.parametrize("size", [MB << shift for shift in range(11)])
def test_the_headers_of_every_version_are_right(major: int, size: int) -> None:
    identity = identity_of(major, size)
    for address, length in ((7 * size, LONG_SIZE), (7 * size + 3 * PAGE, SHORT_SIZE)):
        page = header(address, major=major, size=size)
        assert check_header(page, address, identity, ALONE) == len(page) == length


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_page_may_be_in_any_buffer_and_longer_than_its_header(
    kind: type[bytes] | type[bytearray] | type[memoryview],
) -> None:
    for address in (FIRST, SECOND):
        page = kind(header(address).ljust(PAGE, b"\xff"))
        check_header(page, address, identity_of(), ALONE)


@pytest.mark.parametrize("major", MAGIC)
@pytest.mark.parametrize("address", [FIRST, SECOND])
def test_every_flag_that_the_version_has_is_right_and_no_other(major: int, address: int) -> None:
    known = 0x000F if major < 19 else 0x0007
    long = LONG if address == FIRST else 0
    for info in (*range(64), *(long | 1 << bit for bit in range(16)), 0xFFFF):
        page = with_field(header(address, major=major), 2, "H", info)
        if info & ~known or info & LONG != long:
            message = refused(page, address, identity=identity_of(major))
            assert message.startswith(f"invalid info bits {info:04X} in WAL segment ")
        else:
            check_header(page, address, identity_of(major), ALONE)


@pytest.mark.parametrize("address", [FIRST, SECOND])
def test_the_magic_must_be_that_of_the_cluster(address: int) -> None:
    for magic in (*MAGIC.values(), 0xD101, 0x18D1, 0, 0xFFFF):
        page = with_field(header(address), 0, "H", magic)
        if magic == MAGIC[18]:
            check_header(page, address, identity_of(), ALONE)
        else:
            assert refused(page, address).startswith(f"invalid magic number {magic:04X} in WAL")


def test_the_address_must_be_that_of_the_page() -> None:
    for address in (FIRST, SECOND):
        for wrong in (0, address - MB, address + PAGE, address ^ 1 << 63, 2**64 - 1):
            page = with_field(header(address), 8, "Q", wrong)
            assert refused(page, address) == (
                f"unexpected pageaddr {wrong >> 32:X}/{wrong & 0xFFFFFFFF:X} "
                f"in WAL segment 000000010000000000000005, LSN 0/{address:X}"
            )


def test_a_first_page_must_be_of_the_cluster() -> None:
    assert refused(header(FIRST, system=7), FIRST) == (
        "WAL file is from different database system: WAL file database system identifier is 7, "
        f"expected {SYSTEM}, in WAL segment 000000010000000000000005, LSN 0/500000"
    )
    for offset, value in ((32, 2 * MB), (32, 0), (36, 4096), (36, 0)):
        page = with_field(header(FIRST), offset, "I", value)
        assert refused(page, FIRST) == (
            "incorrect segment size or page size "
            "in WAL segment 000000010000000000000005, LSN 0/500000"
        )


def test_a_first_page_needs_its_long_header_and_no_other_has_one() -> None:
    assert refused(header(SECOND) + bytes(16), FIRST).startswith("invalid info bits 0000")
    assert refused(header(FIRST), SECOND).startswith("invalid info bits 0002")


def test_what_is_not_checked_does_not_matter() -> None:
    """How much is missing of a record, and what fills the header up."""
    page = header(SECOND, flags=CONTRECORD)
    page = with_field(with_field(page, 16, "I", 0xFFFFFFFF), 20, "I", 0xFFFFFFFF)
    assert check_header(page, SECOND, identity_of(), ALONE) == SHORT_SIZE


LINE = History(4, (Ancestor(1, FIRST + 100, 3), Ancestor(3, FIRST + 2 * PAGE, 4)))
"""Timeline 1 ends within the first page, timeline 3 where the third begins."""


@pytest.mark.parametrize(
    ("address", "expected"), [(FIRST, 1), (SECOND, 3), (SECOND + PAGE, 4), (FIRST + 9 * MB, 4)]
)
def test_a_page_must_be_of_the_timeline_that_wrote_it(address: int, expected: int) -> None:
    for tli in (0, 1, 2, 3, 4, 5, 2**32 - 1):
        page = header(address, tli=tli)
        if tli == expected:
            check_header(page, address, identity_of(), LINE)
        else:
            message = f"unexpected timeline ID {tli} (should be {expected}) in WAL segment "
            assert refused(page, address, LINE).startswith(message)


def test_without_ancestors_a_page_may_be_of_any_earlier_timeline() -> None:
    for address in (FIRST, SECOND):
        for tli in (1, 2, 3):
            check_header(header(address, tli=tli), address, identity_of(), History(3))
        for tli in (0, 4):
            message = f"unexpected timeline ID {tli} (should be 3)"
            assert refused(header(address, tli=tli), address, History(3)).startswith(message)


def test_there_is_no_timeline_0() -> None:
    for address in (FIRST, SECOND):
        message = "unexpected timeline ID 0 (should be 1)"
        assert refused(header(address, tli=0), address).startswith(message)


def test_the_place_is_told_by_the_file_that_has_the_page() -> None:
    assert where(FIRST, identity_of(), LINE) == (
        "in WAL segment 000000040000000000000005, LSN 0/500000"
    )
    assert where(FIRST - PAGE, identity_of(), LINE) == (
        "in WAL segment 000000010000000000000004, LSN 0/4FE000"
    )
    assert where(0x12_FFF0_2000, identity_of(size=16 * MB), History(0x1F)) == (
        "in WAL segment 0000001F00000012000000FF, LSN 12/FFF02000"
    )
