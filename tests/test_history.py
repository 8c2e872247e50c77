"""Timelines: what history files say, and which timeline has which page and which file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.timeline.history import Ancestor, History, parse_history

SEGMENT = 16 * MB


def test_a_first_timeline_has_no_history() -> None:
    history = History(1)
    assert history.start_lsn == 0
    assert history.ancestor(1) is None
    assert history.page_tli(0) == history.page_tli(2**64 - 1) == 1
    assert history.file_tli(5 * SEGMENT, SEGMENT) == 1


def test_history_files_are_read_as_postgres_writes_them() -> None:
    contents = (
        b"1\t0/867B130\tno recovery target specified\n"
        b"\n"
        b"2\t1/A0000000\tbefore 2000-01-01 00:00:00+00\n"
    )
    history = parse_history(5, contents)
    assert history == History(5, (Ancestor(1, 0x867B130, 2), Ancestor(2, 0x1_A000_0000, 5)))
    assert history.start_lsn == 0x1_A000_0000
    assert history.ancestor(1) == Ancestor(1, 0x867B130, 2)
    assert history.ancestor(2) == Ancestor(2, 0x1_A000_0000, 5)
    assert history.ancestor(5) is history.ancestor(3) is None


def test_comments_blanks_and_reasons_do_not_matter() -> None:
    contents = (
        b"# a comment\n\n   \n  1  0/30000060\n\t# 7\n2 0/400000f8 at restore point \xe9\xff\r\n"
    )
    assert parse_history(3, contents) == History(
        3, (Ancestor(1, 0x3000_0060, 2), Ancestor(2, 0x4000_00F8, 3))
    )


def test_nothing_is_no_ancestors() -> None:
    assert parse_history(4, b"") == parse_history(4, b"#\n\n") == History(4)


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"one\t0/1000000\tx", "expected a timeline ID"),
        (b"-1\t0/1000000\tx", "expected a timeline ID"),
        (b"\xd9\xa1\t0/1000000\tx", "expected a timeline ID"),
        (b"\0\0\0\0\0\0", "expected a timeline ID"),
        (b"1\n", "expected a switchpoint"),
        (b"1\t0:1000000\tx", "invalid LSN"),
        (b"1\t0/123456789\tx", "invalid LSN"),
        (b"0\t0/1000000\tx", "IDs must increase"),
        (b"2\t0/1000000\tx\n2\t0/2000000\tx", "IDs must increase"),
        (b"2\t0/1000000\tx\n1\t0/2000000\tx", "IDs must increase"),
        (b"3\t0/1000000\tx", "IDs must be less than the child's, 3"),
        (b"4\t0/1000000\tx", "IDs must be less than the child's, 3"),
    ],
)
def test_what_is_no_history_is_told(contents: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_history(3, contents)


@given(st.integers(1, 9), st.binary(max_size=200))
def test_anything_else_is_a_value_error(tli: int, contents: bytes) -> None:
    try:
        history = parse_history(tli, contents)
    except ValueError:
        return
    assert history.tli == tli
    assert all(ancestor.tli < ancestor.next_tli <= tli for ancestor in history.ancestors)


switches = st.lists(st.integers(1, 2**60).map(lambda lsn: lsn * 8), max_size=5).map(sorted)


@given(switches, st.integers(0, 2**64 - 1))
def test_pages_belong_to_the_timeline_that_wrote_them(lsns: list[int], address: int) -> None:
    lines = [f"{tli}\t{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}\tx\n" for tli, lsn in enumerate(lsns, 1)]
    history = parse_history(len(lsns) + 1, "".join(lines).encode())
    address -= address % PAGE
    # The page in which a timeline begins had been begun by the one before.
    assert history.page_tli(address) == 1 + sum(lsn <= address for lsn in lsns)
    assert [history.ancestor(tli) for tli in range(1, len(lsns) + 1)] == [
        Ancestor(tli, lsn, tli + 1) for tli, lsn in enumerate(lsns, 1)
    ]


def test_files_are_those_of_the_last_timeline_that_has_them() -> None:
    history = History(
        3, (Ancestor(1, 5 * SEGMENT + 100, 2), Ancestor(2, 5 * SEGMENT + PAGE + 8, 3))
    )
    assert history.file_tli(4 * SEGMENT, SEGMENT) == 1
    assert history.file_tli(5 * SEGMENT - 1, SEGMENT) == 1
    assert history.file_tli(5 * SEGMENT, SEGMENT) == 3
    assert history.page_tli(5 * SEGMENT) == 1
    assert history.page_tli(5 * SEGMENT + PAGE) == 2
    assert history.page_tli(5 * SEGMENT + 2 * PAGE) == 3


def test_a_switch_where_a_segment_ends_leaves_that_segment_alone() -> None:
    history = History(2, (Ancestor(1, 5 * SEGMENT, 2),))
    assert history.file_tli(5 * SEGMENT - 1, SEGMENT) == 1
    assert history.file_tli(5 * SEGMENT, SEGMENT) == 2


def test_what_was_built_is_read() -> None:
    wal = WalBuilder()
    wal.record(1000)
    first = wal.lsn
    child = wal.fork(2)
    child.record(1000)
    second = child.lsn
    history = parse_history(4, child.fork(4).history_contents)
    assert history == History(4, (Ancestor(1, first, 2), Ancestor(2, second, 4)))


@given(switches)
def test_the_history_of_an_ancestor_is_what_came_before_it(lsns: list[int]) -> None:
    histories = [History(1)]
    for tli, lsn in enumerate(lsns, 1):
        ended = Ancestor(tli, lsn, tli + 1)
        histories.append(History(tli + 1, (*histories[-1].ancestors, ended)))
    for history in histories:
        for before in histories[: history.tli]:
            assert history.up_to(before.tli) == before


def test_the_history_of_an_ancestor_that_is_not_known_stands_alone() -> None:
    history = History(5, (Ancestor(3, 1000, 5),))
    assert history.up_to(3) == History(3)
    assert History(5).up_to(5) == History(5)


ONE = History(1)
TWO = History(2, (Ancestor(1, 1000, 2),))
OTHER_TWO = History(2, (Ancestor(1, 900, 2),))
THREE = History(3, (Ancestor(1, 1000, 2), Ancestor(2, 2000, 3)))
THREE_OF_ONE = History(3, (Ancestor(1, 1500, 3),))


@pytest.mark.parametrize(
    ("one", "other", "end"),
    [
        (ONE, ONE, 2**64),
        (THREE, THREE, 2**64),
        (ONE, TWO, 1000),
        (ONE, THREE, 1000),
        (TWO, THREE, 2000),
        (TWO, OTHER_TWO, 900),  # both were promoted, and did not know of each other
        (THREE, OTHER_TWO, 900),
        (TWO, THREE_OF_ONE, 1000),
        (THREE, THREE_OF_ONE, 1000),
        (OTHER_TWO, THREE_OF_ONE, 900),
        (THREE, History(3, (Ancestor(1, 1000, 3),)), 1000),  # from the same place, another one
    ],
)
def test_the_wal_of_two_histories_is_the_same_up_to_where_they_fork(
    one: History, other: History, end: int
) -> None:
    assert one.common_end(other) == other.common_end(one) == end


def test_what_came_before_our_oldest_timeline_does_not_matter() -> None:
    assert History(2).common_end(TWO) == 2**64
    assert History(2).common_end(THREE) == 2000
    assert History(3, (Ancestor(2, 2000, 3),)).common_end(THREE) == 2**64
    assert History(3, (Ancestor(2, 1900, 3),)).common_end(THREE) == 1900


def test_those_that_have_no_timeline_in_common_have_nothing_in_common() -> None:
    assert History(3).common_end(TWO) == 0
    assert History(2).common_end(THREE_OF_ONE) == 0
    assert TWO.common_end(History(3)) == 0


@st.composite
def families(draw: st.DrawFn) -> list[History]:
    """Timelines that branched off each other, each behind the start of the one before it."""
    family = [History(1)]
    for tli in range(2, draw(st.integers(2, 8))):
        parent = draw(st.sampled_from(family))
        switch = parent.start_lsn + draw(st.integers(1, 5))
        family.append(History(tli, (*parent.ancestors, Ancestor(parent.tli, switch, tli))))
    return family


@given(families())
def test_up_to_where_they_fork_each_byte_was_written_by_the_same(family: list[History]) -> None:
    for one in family:
        for other in family:
            end = one.common_end(other)
            assert all(one.page_tli(lsn) == other.page_tli(lsn) for lsn in range(min(end, 50)))
            assert end == 2**64 or one.page_tli(end) != other.page_tli(end)
            assert (end == 2**64) == (one is other)
