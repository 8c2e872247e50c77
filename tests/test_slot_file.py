"""The file of slots: what was written is read again; what was damaged is reported and kept, and
costs no slot whose own line is whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disk import Disk, files
from tests.slots_fakes import quick_directory
from walproto.timeline.slot_file import (
    DAMAGED,
    NAME,
    SPARE,
    SPARE_SIZE,
    SlotFile,
    SlotState,
    read_slots,
    write_slots,
)
from walproto.wal.writer import SyncError

A = SlotState("a", 0x16_B374D848, 745, 700)
B = SlotState("standby_2", 0, invalidated="wal_removed")
C = SlotState("c" * 63, 0, 1 << 40)
GONE = 0x16_B3000000
WRITTEN = b"""\
6f4be4bf {"slots": 3, "removed_to": "16/B3000000"}
c49fdab4 {"name": "a", "restart_lsn": "16/B374D848", "xmin": 745, "catalog_xmin": 700, \
"invalidated": ""}
ae8a245d {"name": "standby_2", "restart_lsn": "0/0", "xmin": 0, "catalog_xmin": 0, \
"invalidated": "wal_removed"}
c63a22ef {"name": "ccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc", \
"restart_lsn": "0/0", "xmin": 1099511627776, "catalog_xmin": 0, "invalidated": ""}
"""
LINES = WRITTEN.splitlines(keepends=True)
OF_LINE = dict(zip(LINES[1:], (A, B, C), strict=True))
HEADLESS = "its beginning is damaged"


def checked(text: str) -> bytes:
    """A line with the right checksum, which is computed bit by bit here."""
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return f"{crc ^ 0xFFFFFFFF:08x} {text}\n".encode()


def read(directory: Path, contents: bytes) -> tuple[list[SlotState], list[str]]:
    """What is read from a file of these contents, which are kept if anything is wrong with it."""
    for path in directory.iterdir():
        path.unlink()
    (directory / NAME).write_bytes(contents)
    file = read_slots(directory)
    kept = {DAMAGED: contents} if file.problems else {}
    assert files(directory) == {NAME: contents} | kept
    return file.slots, file.problems


@pytest.fixture
def quick() -> Iterator[Path]:
    with quick_directory() as name:
        yield Path(name)


# --- What was written ------------------------------------------------------------------------

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=63)
numbers = st.integers(0, (1 << 64) - 1)
states = st.one_of(
    st.builds(SlotState, words, numbers, numbers, numbers),
    st.builds(SlotState, words, st.just(0), numbers, numbers, st.just("wal_removed")),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(
        st.tuples(st.lists(states, max_size=20, unique_by=lambda state: state.name), numbers),
        max_size=3,
    )
)
def test_what_was_written_last_is_read(written: list[tuple[list[SlotState], int]]) -> None:
    with quick_directory() as name:
        write_slots(Path(name), [])
        assert read_slots(Path(name)) == SlotFile([], 0)
        for slots, removed_to in written:
            write_slots(Path(name), iter(slots), removed_to)
            assert read_slots(Path(name)) == SlotFile(slots, removed_to)
        assert {path.name for path in Path(name).iterdir()} == {NAME, SPARE}


def test_it_is_written_as_it_always_was(tmp_path: Path) -> None:
    write_slots(tmp_path, [A, B, C], GONE)
    assert files(tmp_path) == {NAME: WRITTEN, SPARE: bytes(SPARE_SIZE)}
    assert [checked(line[9:-1].decode()) for line in LINES] == LINES


def test_where_there_is_no_file_there_are_no_slots(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.tmp").write_bytes(WRITTEN)  # nobody was told of these
    assert read_slots(tmp_path) == SlotFile([])
    assert files(tmp_path) == {f"{NAME}.tmp": WRITTEN}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    """The operating system itself says so."""
    write_slots(tmp_path, [A, B, C])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_slots(tmp_path, [A, B])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_slots(tmp_path) == SlotFile([A, B, C])
    assert (tmp_path / SPARE).exists()  # this is no matter of room


# --- What was damaged ------------------------------------------------------------------------


def test_a_byte_that_is_damaged_costs_one_slot_at_most(quick: Path) -> None:
    """Whichever it is, and whatever becomes of it; none if it ends a line or begins the file."""
    some = random.Random(9)
    numbered = [(at, number) for number, line in enumerate(LINES, 1) for at in range(len(line))]
    for offset, (at, number) in enumerate(numbered):
        old = WRITTEN[offset]
        others = {old ^ 1 << some.randrange(8), some.randrange(256), some.choice(b'\n\r a0{}"\0')}
        for new in others - {old}:
            slots, problems = read(quick, WRITTEN[:offset] + bytes([new]) + WRITTEN[offset + 1 :])
            line = LINES[number - 1]
            is_end = at == len(line) - 1
            assert read_slots(quick).removed_to == (GONE if number > 1 or is_end else 0)
            is_lost = number > 1 and not is_end
            assert slots == [slot for its, slot in OF_LINE.items() if not is_lost or its != line]
            assert problems[0].startswith(f"line {number} is damaged"), (offset, new)
            # The checksum is at fault, or what comes behind the name.
            if is_lost and (at < 9 or at > line.index(b"restart_lsn")) and new != ord("\n"):
                named = f'line {number} is damaged (slot "{OF_LINE[line].name}", it seems)'
                assert problems == [named, "it holds 2 slots, where there should be 3"]


def test_a_file_that_is_cut_short_holds_what_is_before_that(quick: Path) -> None:
    for length in range(len(WRITTEN)):
        slots, problems = read(quick, WRITTEN[:length])
        assert slots == [slot for line, slot in OF_LINE.items() if line[:-1] in WRITTEN[:length]]
        assert problems, length
        assert (HEADLESS in problems) == (length < len(LINES[0]) - 1)
    assert read(quick, WRITTEN) == ([A, B, C], [])


@pytest.mark.parametrize("count", range(4))
def test_lines_that_are_gone_are_missed(tmp_path: Path, count: int) -> None:
    for left in itertools.combinations(LINES, count):
        slots, problems = read(tmp_path, b"".join(left))
        assert slots == [OF_LINE[line] for line in left if line != LINES[0]]
        missing = f"it holds {len(slots)} slots, where there should be 3"
        assert problems == [missing if LINES[0] in left else HEADLESS]


def test_lines_may_be_in_any_order(tmp_path: Path) -> None:
    for lines in itertools.permutations(LINES):
        slots, problems = read(tmp_path, b"".join(lines))
        assert {slot.name: slot for slot in slots} == {slot.name: slot for slot in (A, B, C)}
        assert problems == []


@pytest.mark.parametrize("number", range(1, 5))
def test_lines_that_are_there_twice_count_once(tmp_path: Path, number: int) -> None:
    assert read(tmp_path, WRITTEN + LINES[number - 1]) == ([A, B, C], ["line 5 is damaged"])
    other = checked(json.dumps(asdict(A) | {"restart_lsn": "FF/0"}))
    assert read(tmp_path, WRITTEN + other) == ([A, B, C], ["line 5 is damaged"])
    replaced = b"".join(LINES[:3]) + LINES[1]
    assert read(tmp_path, replaced)[0] == [A, B]


@pytest.mark.parametrize(
    "contents",
    [b"", b"\n", bytes(8192), random.Random(3).randbytes(8192), b"a b\n", b"{}", LINES[1][9:]],
)
def test_what_is_no_file_of_slots_holds_none(tmp_path: Path, contents: bytes) -> None:
    slots, problems = read(tmp_path, contents)
    assert slots == []
    assert problems[-1] == HEADLESS


def test_the_first_damaged_file_is_kept_until_somebody_takes_it_away(tmp_path: Path) -> None:
    """It is the one in which most is left."""
    first, later = WRITTEN[:-9], WRITTEN[:-99]
    for contents, kept in ((first, first), (later, first), (later, later)):
        (tmp_path / NAME).write_bytes(contents)
        file = read_slots(tmp_path)
        assert (len(file.slots), len(file.problems)) == (2, 2)
        write_slots(tmp_path, file.slots, file.removed_to)
        assert read_slots(tmp_path) == SlotFile([A, B], GONE)
        assert (tmp_path / DAMAGED).read_bytes() == kept
        if contents == later:
            (tmp_path / DAMAGED).unlink()


# --- What cannot be read, or not be kept -----------------------------------------------------


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """It is not taken for a file that holds nothing."""
    path = tmp_path / NAME
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        read_slots(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        read_slots(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        read_slots(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(WRITTEN)
    (tmp_path / NAME).chmod(0)
    with pytest.raises(PermissionError):
        read_slots(tmp_path)


def test_what_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = WRITTEN[:-2]
    (tmp_path / NAME).write_bytes(damaged)
    (tmp_path / f"{DAMAGED}.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        read_slots(tmp_path)
    (tmp_path / f"{DAMAGED}.tmp").rmdir()
    disk = Disk(tmp_path, monkeypatch)
    for which in (NAME, f"{DAMAGED}.tmp"):
        disk.failing = {f"fsync {which}": errno.EIO}
        with pytest.raises(SyncError, match="Input/output error"):
            read_slots(tmp_path)
        assert (tmp_path / NAME).read_bytes() == damaged
        assert not (tmp_path / DAMAGED).exists()


# --- What nobody has damaged, and is wrong all the same --------------------------------------

GOOD = {"name": "d", "restart_lsn": "1/2", "xmin": 3, "catalog_xmin": 4, "invalidated": ""}
D = SlotState("d", 0x1_00000002, 3, 4)


def behind(directory: Path, values: dict[str, Any] | str) -> tuple[list[SlotState], list[str]]:
    """What is read from a line with the right checksum, with another slot before and behind."""
    text = values if isinstance(values, str) else json.dumps(values)
    return read(directory, LINES[0] + LINES[1] + checked(text) + LINES[3])


def test_values_that_a_later_version_has_added_are_passed_over(tmp_path: Path) -> None:
    """A slot is a promise; it would not be kept by forgetting of it."""
    values = GOOD | {"two_phase": True, "spill": [1, "x"], "": None}
    assert behind(tmp_path, values) == ([A, D, C], [])
    header = checked('{"slots": 1, "removed_to": "1/0", "version": 2}')
    assert read(tmp_path, header + LINES[1]) == ([A], [])
    assert read_slots(tmp_path).removed_to == 1 << 32


def test_values_that_an_earlier_version_did_not_have_are_none(tmp_path: Path) -> None:
    values = {"name": "d", "restart_lsn": "1/2"}
    assert behind(tmp_path, values) == ([A, SlotState("d", D.restart_lsn), C], [])
    assert read(tmp_path, checked('{"slots": 1}') + LINES[1]) == ([A], [])
    assert read_slots(tmp_path) == SlotFile([A], 0)


def test_a_slot_that_is_invalidated_reserves_nothing(tmp_path: Path) -> None:
    values = GOOD | {"invalidated": "idle_timeout"}
    assert behind(tmp_path, values) == ([A, SlotState("d", 0, 3, 4, "idle_timeout"), C], [])


WRONG: dict[str, list[Any]] = {
    "name": ["", "D", "d ", "d\n", "x" * 64, "\u0664", None, 1, ["d"], True],
    "restart_lsn": ["", "1", "1/", "1/2 ", "1/123456789", "-1/2", 5, None, [], True],
    "xmin": [-1, 1 << 64, 1.0, "3", None, True, [3], float("nan"), float("inf")],
    "catalog_xmin": [-1, 1 << 64, 1.0, "3", None, True, [3]],
    "invalidated": ["\0", "Wal removed", None, False, 0, ["wal_removed"]],
    "slots": [-1, 1.0, "3", None, False, [], float("inf"), 3],
}


@pytest.mark.parametrize("key", WRONG)
def test_values_that_cannot_be_cost_one_slot(tmp_path: Path, key: str) -> None:
    for value in WRONG[key]:
        slots, problems = behind(tmp_path, GOOD | {key: value})
        assert slots == [A, C], value
        assert problems[0].startswith("line 3 is damaged")
        assert problems[1:] == ["it holds 2 slots, where there should be 3"]


def test_how_far_wal_was_removed_is_a_position(tmp_path: Path) -> None:
    for value in WRONG["restart_lsn"]:
        header = checked(json.dumps({"slots": 1, "removed_to": value}))
        assert read(tmp_path, header + LINES[1]) == ([A], ["line 1 is damaged", HEADLESS])
        assert read_slots(tmp_path).removed_to == 0


@pytest.mark.parametrize("key", ["name", "restart_lsn"])
def test_values_without_which_there_is_no_slot(tmp_path: Path, key: str) -> None:
    slots, problems = behind(tmp_path, {name: GOOD[name] for name in GOOD if name != key})
    assert slots == [A, C]
    assert problems[0] == "line 3 is damaged" + (' (slot "d", it seems)' if key != "name" else "")


@pytest.mark.parametrize(
    "text",
    ["{}", "{,}", '{"slots"}', '{"a": %s}' % ("[" * 100_000), '{"xmin": %s}' % ("9" * 5000)],
    ids=range(5),
)
def test_what_says_nothing_costs_one_slot(tmp_path: Path, text: str) -> None:
    slots, problems = behind(tmp_path, text)
    assert slots == [A, C]
    assert problems == ["line 3 is damaged", "it holds 2 slots, where there should be 3"]


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), words),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
keys = st.sampled_from([*GOOD, "slots", "more"])
lines = st.one_of(
    st.dictionaries(keys, anything).map(lambda values: checked(json.dumps(values))),
    st.dictionaries(keys, anything).map(lambda more: checked(json.dumps(GOOD | more))),
    st.binary(max_size=40),
    st.sampled_from(LINES),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(lines, max_size=6).map(b"".join))
def test_whatever_it_holds_what_is_read_can_be_written(contents: bytes) -> None:
    with quick_directory() as name:
        slots, problems = read(Path(name), contents)
        for line, slot in OF_LINE.items():
            assert slot in slots or line not in contents
        assert all(line.isprintable() for line in problems)
        write_slots(Path(name), slots)
        assert read_slots(Path(name)) == SlotFile(slots)
