"""The formats of WAL: declarations and what is packed beside them, checksums, identities."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from construct import Int16ul, Int32ul, Int64ul
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from tests.wal_builder import MAGIC, MB, SYSTEM, WalBuilder, make_record, page_header
from walproto.wal.pages import (
    FORMATS,
    LONG_HEADER,
    RECORD_HEADER,
    SHORT_HEADER,
    Identity,
    XLogLongPageHeaderData,
    XLogPageHeaderData,
    XLogRecord,
    parse_identity,
    record_crc,
)

u8 = st.integers(0, 0xFF)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, 2**64 - 1)

SHORT_NAMES = ("xlp_magic", "xlp_info", "xlp_tli", "xlp_pageaddr", "xlp_rem_len")
LONG_NAMES = ("xlp_sysid", "xlp_seg_size", "xlp_xlog_blcksz")
RECORD_NAMES = ("xl_tot_len", "xl_xid", "xl_prev", "xl_info", "xl_rmid", "xl_crc")

short_values = st.tuples(u16, u16, u32, u64, u32)
long_values = st.tuples(u64, u32, u32)


@given(short_values)
def test_short_page_headers_are_packed_as_declared(values: tuple[int, ...]) -> None:
    built = XLogPageHeaderData.build(dict(zip(SHORT_NAMES, values, strict=True)))
    assert built == SHORT_HEADER.pack(*values)
    assert len(built) == SHORT_HEADER.size == 24


@given(short_values, long_values)
def test_long_page_headers_are_packed_as_declared(
    short: tuple[int, ...], long: tuple[int, ...]
) -> None:
    built = XLogLongPageHeaderData.build(
        {"std": dict(zip(SHORT_NAMES, short, strict=True))}
        | dict(zip(LONG_NAMES, long, strict=True))
    )
    assert built == LONG_HEADER.pack(*short, *long)
    assert len(built) == LONG_HEADER.size == 40


@given(st.tuples(u32, u32, u64, u8, u8, u32))
def test_record_headers_are_packed_as_declared(values: tuple[int, ...]) -> None:
    fields: dict[str, Any] = dict(zip(RECORD_NAMES, values, strict=True))
    built = XLogRecord.build(fields | {"padding": bytes(2)})
    assert built == RECORD_HEADER.pack(*values)
    assert len(built) == RECORD_HEADER.size == 24


@given(st.binary(min_size=40, max_size=40))
def test_headers_are_unpacked_as_declared(data: bytes) -> None:
    short = XLogPageHeaderData.parse(data)
    assert tuple(short[name] for name in SHORT_NAMES) == SHORT_HEADER.unpack_from(data)
    long = XLogLongPageHeaderData.parse(data)
    assert (
        *(long.std[name] for name in SHORT_NAMES),
        *(long[name] for name in LONG_NAMES),
    ) == LONG_HEADER.unpack(data)
    record = XLogRecord.parse(data)
    assert tuple(record[name] for name in RECORD_NAMES) == RECORD_HEADER.unpack_from(data)


def test_a_page_of_postgres_is_read() -> None:
    """The first bytes of a segment that PostgreSQL 18 wrote."""
    page = bytes.fromhex(
        "18d10600010000000000800000000000000000000000000063e801685ead046b0000100000200000"
    )
    header = XLogLongPageHeaderData.parse(page)
    assert header.std.xlp_magic == 0xD118
    assert header.std.xlp_info == 0x0006
    assert header.std.xlp_pageaddr == 0x80_0000
    assert header.xlp_seg_size == MB
    identity = Identity(0x6B04_AD5E_6801_E863, MB, FORMATS[0xD118])
    assert parse_identity(page) == (identity, 1, 0x80_0000)


def test_the_formats_are_those_of_postgres() -> None:
    assert {magic: wal_format.major for magic, wal_format in FORMATS.items()} == {
        0xD106: 13,
        0xD10D: 14,
        0xD110: 15,
        0xD113: 16,
        0xD116: 17,
        0xD118: 18,
        0xD120: 19,
    }
    assert {wal_format.major: magic for magic, wal_format in FORMATS.items()} == MAGIC
    for magic, wal_format in FORMATS.items():
        assert wal_format.xlp_magic == magic
        old = wal_format.major < 19
        assert wal_format.first_is_overwrite_contrecord == (0x0008 if old else 0x0004)
        assert wal_format.all_flags == (0x000F if old else 0x0007)


@given(st.binary(max_size=300), u64, u32, u8, u8)
def test_the_checksum_is_of_the_data_then_of_the_header(
    data: bytes, prev: int, xid: int, info: int, rmid: int
) -> None:
    record = make_record(prev, data, rmid=rmid, info=info, xid=xid)
    (expected,) = struct.unpack_from("<I", record, 20)
    assert record_crc(memoryview(record)) == expected == crc32c(data + record[:20])


def test_the_checksum_is_crc32c() -> None:
    assert record_crc(memoryview(b"123456789" + bytes(15))) == crc32c(b"123456789" + bytes(11))
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("major", MAGIC)
@pytest.mark.parametrize("size", [MB << shift for shift in range(11)])
def test_a_first_page_says_whose_it_is(major: int, size: int) -> None:
    address = size * 5
    page = page_header(address, major=major, tli=3, size=size, system=SYSTEM)
    assert parse_identity(page) == (Identity(SYSTEM, size, FORMATS[MAGIC[major]]), 3, address)
    assert parse_identity(page + bytes(9000)) == parse_identity(page)


def _with(page: bytes, offset: int, field: Any, value: int) -> bytes:
    patch: bytes = field.build(value)
    return page[:offset] + patch + page[offset + len(patch) :]


def test_what_is_no_first_page_is_none() -> None:
    page = WalBuilder().header(MB)
    assert parse_identity(page) is not None
    assert parse_identity(page[:39]) is None
    assert parse_identity(b"") is None
    assert parse_identity(bytes(8192)) is None
    for offset, field, value in (
        (0, Int16ul, 0xD101),  # PostgreSQL 12
        (0, Int16ul, 0x18D1),  # the other byte order
        (2, Int16ul, 0x0005),  # no long header
        (8, Int64ul, MB + 8192),  # not where a segment begins
        (32, Int32ul, MB + 1),
        (32, Int32ul, MB // 2),
        (32, Int32ul, 0),
        (36, Int32ul, 32768),
    ):
        assert parse_identity(_with(page, offset, field, value)) is None, (offset, value)


@given(st.binary(max_size=80))
def test_garbage_is_no_first_page(data: bytes) -> None:
    found = parse_identity(data)
    if found is not None:
        identity, _, address = found
        assert address % identity.segment_size == 0
