"""The end of a timeline: found from the newest segment, or from as far back as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder
from walproto.timeline.history import parse_history
from walproto.timeline.tail import Tail
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.segments import Segments

IDENTITY = Identity(SYSTEM, MB, FORMATS[MAGIC[18]])


@pytest.fixture
def segments(tmp_path: Path) -> Iterator[Segments]:
    made = Segments(tmp_path, IDENTITY)
    yield made
    made.close()


def tail_of(wal: WalBuilder, segments: Segments, start: int) -> Tail:
    history = parse_history(wal.tli, wal.history_contents)
    return Tail(segments, IDENTITY, history, start)


def run(tail: Tail) -> Tail:
    for _ in range(1000):
        if not tail.advance(64 * PAGE):
            return tail
    raise AssertionError("it goes on for ever")


def test_the_walk_begins_at_the_newest_segment(tmp_path: Path, segments: Segments) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + 3 * MB + 5 * PAGE, 3000)
    wal.write_to(tmp_path)
    tail = run(tail_of(wal, segments, 4 * MB))
    assert tail.is_found
    assert (tail.start, tail.end) == (4 * MB, wal.lsn)
    # Damage before it is not its concern.
    (tmp_path / wal.segment_name(2 * MB)).write_bytes(bytes(MB))
    assert run(tail_of(wal, segments, 4 * MB)).end == wal.lsn


@pytest.mark.parametrize("back", [1, 2, 3])
def test_it_steps_back_to_where_there_is_a_record(
    tmp_path: Path, segments: Segments, back: int
) -> None:
    """The newest segments hold nothing but a record that began before them."""
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    wal.record(back * MB)
    wal.write_to(tmp_path)
    newest = wal.start + len(wal.image) - MB
    assert newest == wal.start + back * MB
    tail = run(tail_of(wal, segments, newest))
    assert tail.is_found
    assert (tail.start, tail.end) == (wal.start, wal.lsn)


def test_it_steps_back_from_a_record_that_is_not_finished(
    tmp_path: Path, segments: Segments
) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    before = wal.lsn
    wal.record(2 * MB)
    image = wal.image
    for lsn, shown in ((MB, MB), (2 * MB, MB), (3 * MB, 3 * PAGE)):
        contents = wal.segment(lsn)[:shown] + bytes(MB - shown)
        (tmp_path / wal.segment_name(lsn)).write_bytes(contents)
    tail = run(tail_of(wal, segments, 3 * MB))
    assert (tail.start, tail.end, tail.is_found) == (MB, before, True)
    (tmp_path / wal.segment_name(3 * MB)).write_bytes(image[2 * MB :])
    assert run(tail).end == wal.lsn


def test_a_segment_that_was_only_just_begun(tmp_path: Path, segments: Segments) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    wal.switch()
    wal.write_to(tmp_path)
    path = tmp_path / wal.segment_name(2 * MB)
    path.write_bytes(wal.header(2 * MB) + bytes(MB - 40))
    tail = run(tail_of(wal, segments, 2 * MB))
    assert (tail.start, tail.end, tail.is_found) == (MB, 2 * MB, True)


def test_where_there_is_no_record_there_is_no_end(tmp_path: Path, segments: Segments) -> None:
    wal = WalBuilder()
    wal.record(5 * MB)
    for lsn in (3 * MB, 4 * MB):
        (tmp_path / wal.segment_name(lsn)).write_bytes(wal.segment(lsn))
    tail = run(tail_of(wal, segments, 4 * MB))
    assert not tail.is_found
    assert tail.start == 3 * MB
    assert "could not read from WAL segment 000000010000000000000005" in tail.reason
    # What came before comes now, and it goes on from there.
    for lsn in (MB, 2 * MB):
        (tmp_path / wal.segment_name(lsn)).write_bytes(wal.segment(lsn))
    run(tail)
    assert not tail.is_found
    assert tail.start == MB
    for lsn in (5 * MB, 6 * MB):
        (tmp_path / wal.segment_name(lsn)).write_bytes(wal.segment(lsn))
    run(tail)
    assert tail.is_found
    assert (tail.start, tail.end) == (MB, wal.lsn)


def test_it_follows_into_the_next_segments(tmp_path: Path, segments: Segments) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + 3 * MB, 3000)
    lsns = range(wal.start, wal.start + len(wal.image), MB)
    (tmp_path / wal.segment_name(MB)).write_bytes(wal.segment(MB))
    tail = run(tail_of(wal, segments, MB))
    for lsn in lsns:
        (tmp_path / wal.segment_name(lsn)).write_bytes(wal.segment(lsn))
        assert run(tail).end == wal.end_of(lsn + MB)
    assert tail.end == wal.lsn


def test_it_steps_back_into_the_files_of_an_earlier_timeline(
    tmp_path: Path, segments: Segments
) -> None:
    parent = WalBuilder()
    parent.records_to(parent.start + MB - 5 * PAGE, 3000)
    parent.fill_to(2 * MB)
    child = parent.fork(2)
    parent.write_to(tmp_path)
    child.record(PAGE)
    damaged = child.segment(2 * MB)[: PAGE // 2] + bytes(MB - PAGE // 2)
    (tmp_path / child.segment_name(2 * MB)).write_bytes(damaged)
    tail = run(tail_of(child, segments, 2 * MB))
    assert (tail.start, tail.end) == (MB, 2 * MB)
    (tmp_path / child.segment_name(2 * MB)).write_bytes(child.segment(2 * MB))
    assert run(tail).end == child.lsn


def test_it_does_not_step_back_before_the_first_segment(tmp_path: Path, segments: Segments) -> None:
    (tmp_path / "000000010000000000000000").write_bytes(bytes(MB))
    tail = run(tail_of(WalBuilder(), segments, 0))
    assert (tail.start, tail.is_found) == (0, False)
    assert "invalid magic number 0000" in tail.reason
