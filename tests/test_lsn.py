"""Positions in the WAL as text, and the names of segments and history files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walproto.lsn import (
    SegmentName,
    format_lsn,
    history_name,
    is_segment_size,
    parse_history_name,
    parse_lsn,
    parse_segment_name,
    segment_name,
)

MB = 1 << 20
LSNS = st.integers(0, 2**64 - 1)
SEGMENT_SIZES = st.sampled_from([1 << power for power in range(20, 31)])


@pytest.mark.parametrize(
    ("lsn", "text"),
    [
        (0, "0/0"),
        (0x16B374D848, "16/B374D848"),
        (0x1_0000_0001, "1/1"),
        (2**64 - 1, "FFFFFFFF/FFFFFFFF"),
    ],
)
def test_an_lsn_is_written_like_postgresql_up_to_18_does(lsn: int, text: str) -> None:
    assert format_lsn(lsn) == text
    assert parse_lsn(text) == lsn


def test_an_lsn_is_read_in_the_style_of_postgresql_19_too() -> None:
    assert parse_lsn("16/0000D848") == parse_lsn("16/d848") == 0x16_0000_D848


@pytest.mark.parametrize(
    "text",
    ["", "0", "/", "0/", "/0", "0/0 ", " 0/0", "0/G", "0/123456789", "0x1/0", "0/0\n", "-1/0"],
)
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid LSN"):
        parse_lsn(text)


@given(LSNS)
def test_every_lsn_survives_its_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


def test_segment_sizes_are_those_of_initdb() -> None:
    assert is_segment_size(1 * MB)
    assert is_segment_size(16 * MB)
    assert is_segment_size(1024 * MB)
    for size in (0, -1, MB // 2, 3 * MB, 2048 * MB, MB + 1):
        assert not is_segment_size(size)


@pytest.mark.parametrize(
    ("segment_size", "segno", "name"),
    [
        (16 * MB, 1, "000000010000000000000001"),
        (16 * MB, 255, "0000000100000000000000FF"),
        (16 * MB, 256, "000000010000000100000000"),
        (1 * MB, 4095, "000000010000000000000FFF"),
        (1 * MB, 4096, "000000010000000100000000"),
        (1024 * MB, 4, "000000010000000100000000"),
        (16 * MB, 2**40 - 1, "00000001FFFFFFFF000000FF"),
    ],
)
def test_a_segment_is_called_by_its_number_in_two_halves(
    segment_size: int, segno: int, name: str
) -> None:
    assert segment_name(1, segno, segment_size) == name
    parsed = parse_segment_name(name)
    assert parsed is not None
    assert parsed.segno(segment_size) == segno


@given(st.integers(1, 2**32 - 1), LSNS, SEGMENT_SIZES, st.booleans())
def test_every_segment_survives_its_name(tli: int, lsn: int, size: int, partial: bool) -> None:
    name = segment_name(tli, lsn // size, size) + (".partial" if partial else "")
    parsed = parse_segment_name(name)
    assert parsed is not None
    assert str(parsed) == name
    assert (parsed.tli, parsed.segno(size), parsed.partial) == (tli, lsn // size, partial)
    assert parsed.is_possible(size)


def test_some_names_are_impossible_for_a_segment_size() -> None:
    assert SegmentName(1, 0, 255, False).is_possible(16 * MB)
    assert not SegmentName(1, 0, 256, False).is_possible(16 * MB)
    assert SegmentName(1, 0, 256, False).is_possible(1 * MB)
    assert not SegmentName(0, 0, 1, False).is_possible(16 * MB)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "00000001000000000000001",
        "0000000100000000000000001",
        "00000001000000000000000g",
        "00000001000000000000000a",
        "000000010000000000000001.part",
        "000000010000000000000001.00000028.backup",
        "000000010000000000000001\n",
        "00000002.history",
        "archive_status",
    ],
)
def test_other_files_are_no_segments(name: str) -> None:
    assert parse_segment_name(name) is None


@given(st.integers(1, 2**32 - 1))
def test_every_history_file_survives_its_name(tli: int) -> None:
    assert len(history_name(tli)) == len("00000002.history")
    assert parse_history_name(history_name(tli)) == tli


@pytest.mark.parametrize("name", ["2.history", "0000000a.history", "00000002.history.tmp", ""])
def test_other_files_are_no_histories(name: str) -> None:
    assert parse_history_name(name) is None
