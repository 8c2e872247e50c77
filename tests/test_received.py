"""What is being received: it is read from memory as from the files, and never beyond what is
synced; and what is written by us does not count as changed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder
from walproto.timeline import received as received_module
from walproto.timeline.received import Received, ReceivedSegments
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.segments import Segments, Stamp
from walproto.wal.writer import SegmentWriter

IDENTITY = Identity(SYSTEM, MB, FORMATS[MAGIC[18]])

examples = settings(deadline=None, derandomize=True, max_examples=100)


def copied(received: Received, lsn: int, size: int, tli: int = 1) -> bytes | None:
    """What is in memory there; None if not all of it is."""
    buffer = bytearray(b"\xee" * size)
    if received.copy_into(tli, lsn, memoryview(buffer)):
        return bytes(buffer)
    assert buffer == b"\xee" * size
    return None


# --- Memory ----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    recent=st.sampled_from([1, 8, 64]),
    start=st.integers(0, 300),
    appends=st.lists(st.integers(0, 200), max_size=12),
    reads=st.lists(st.tuples(st.integers(-90, 90), st.integers(0, 90)), min_size=10, max_size=30),
    seed=st.integers(0, 2**32),
)
def test_the_newest_bytes_are_in_memory(
    recent: int, start: int, appends: list[int], reads: list[tuple[int, int]], seed: int
) -> None:
    """Held against all the bytes there ever were."""
    some = random.Random(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(received_module, "RECENT_SIZE", recent)
        received = Received()
        received.begin(1, start, start)
        wal = b""
        for size in appends:
            data = some.randbytes(size)
            received.append(memoryview(data))
            wal += data
            end = start + len(wal)
            for offset, count in reads:
                lsn = max(0, end + offset)
                found = copied(received, lsn, count)
                if max(start, end - recent) <= lsn <= lsn + count <= end:
                    assert found == wal[lsn - start :][:count], (lsn, count)
                else:
                    assert found is None, (lsn, count)
                assert copied(received, lsn, count, tli=2) is None


def test_all_of_what_is_kept_can_be_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_module, "RECENT_SIZE", 64)
    received = Received()
    received.begin(1, 1000, 1000)
    wal = random.Random(1).randbytes(1000)
    for offset in range(0, len(wal), 7):
        received.append(memoryview(wal)[offset : offset + 7])
        shown = min(offset + 7, len(wal))
        size = min(shown, 64)
        assert copied(received, 1000 + shown - size, size) == wal[shown - size : shown]


def test_what_came_before_it_began_anew_is_forgotten() -> None:
    received = Received()
    received.begin(1, 1000, 1000)
    received.append(memoryview(b"x" * 100))
    assert copied(received, 1050, 10) == b"x" * 10
    for tli, lsn in ((2, 1040), (2, 1100), (1, 1040)):
        received.begin(tli, lsn, lsn)
        assert [copied(received, 1050, 10, tli=any_tli) for any_tli in (1, 2)] == [None, None]
        received.append(memoryview(b"y" * 5))
        assert copied(received, lsn, 5, tli) == b"y" * 5
        assert copied(received, lsn, 6, tli) is None
        assert copied(received, lsn - 1, 5, tli) is None


# --- What may be seen ------------------------------------------------------------------------


class Receiving:
    """WAL of which a part is in the files, a part in memory, and a part may be seen."""

    def __init__(self, directory: Path, tli: int = 1) -> None:
        wal = WalBuilder(tli=tli)
        wal.records_to(wal.start + 3 * MB, 5000)
        self.wal = wal
        self.received = Received()
        self.segments = ReceivedSegments(directory, IDENTITY, self.received)
        self.writer = SegmentWriter(directory, tli, MB, wal.start)
        self.received.begin(tli, wal.start, wal.start)

    def image(self, start: int, end: int) -> bytes:
        return self.wal.image[start - self.wal.start : end - self.wal.start]

    def come(self, end: int) -> None:
        """More has come."""
        start = self.received._end
        self.received.append(memoryview(self.image(start, max(start, end))))

    def write(self, end: int) -> None:
        """More is written."""
        start = self.writer.lsn
        self.writer.write(start, [memoryview(self.image(start, max(start, end)))])
        self.complete()

    def complete(self) -> None:
        for lsn, stamp in self.writer.completed:
            self.received.complete(self.writer.tli, lsn, stamp)
        self.writer.completed.clear()

    def close(self) -> None:
        self.writer.close()
        self.segments.close()


@pytest.fixture
def receiving(tmp_path: Path) -> Iterator[Receiving]:
    made = Receiving(tmp_path)
    yield made
    made.close()


@examples
@given(
    recent=st.sampled_from([1 << 12, 1 << 16, 1 << 22]),
    ends=st.lists(st.integers(0, 3 * MB), min_size=3, max_size=3),
    reads=st.lists(st.tuples(st.integers(-9, 3 * PAGE), st.integers(0, 99999)), min_size=9),
    some=st.integers(0, 2**32).map(random.Random),
)
def test_nothing_is_walked_over_beyond_what_may_be(
    recent: int, ends: list[int], reads: list[tuple[int, int]], some: random.Random
) -> None:
    """Beyond what is synced, whether it has come, or is written, or both, unless the walk is as far
    as that; and before that all is there to be walked over."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(received_module, "RECENT_SIZE", recent)
        receiving = Receiving(Path(name))
        wal, received = receiving.wal, receiving.received
        synced, written, came = (wal.start + end for end in sorted(ends))
        receiving.come(came)
        receiving.write(written)
        if some.random() < 0.5:
            received.synced(synced)
        else:
            before = some.randint(wal.start, synced)
            received.synced(before)
            received.walk(1, before, before, before, "no more")
            received.written(synced)
        for offset, size in reads:
            places = [synced, written, came, synced - recent, synced - synced % MB, wal.start]
            lsn = max(some.choice(places) - offset, wal.start)
            found = receiving.segments.read(1, lsn, size)
            expected = b""
            if lsn < synced:
                # Zeros to the end of the page, as far as it was asked for; not into another file.
                end = min(lsn + size, -(-synced // PAGE) * PAGE, lsn - lsn % MB + MB)
                expected = receiving.image(lsn, min(end, synced)).ljust(end - lsn, b"\0")
            assert found == expected, (lsn, size)
        receiving.close()


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("came", [True, False])
def test_a_page_that_is_synced_in_part_is_zeros_behind_that(
    receiving: Receiving, came: bool, is_written: bool
) -> None:
    start = receiving.wal.start
    if came:
        receiving.come(start + 4 * PAGE)
    if is_written:
        receiving.write(start + 4 * PAGE)
    read = receiving.segments.read
    assert read(1, start, 9 * PAGE) == b""
    receiving.received.synced(start + 2 * PAGE)
    before = b"" if not came and not is_written else receiving.image(start, start + 2 * PAGE)
    assert read(1, start, 9 * PAGE) == before
    receiving.received.synced(start + 2 * PAGE + 100)
    expected = receiving.image(start, start + 2 * PAGE + 100) + bytes(PAGE - 100)
    if not came and not is_written:
        expected = b""
    for size in (9 * PAGE, 3 * PAGE, 2 * PAGE + 101, 2 * PAGE + 100, 2 * PAGE, 1):
        assert read(1, start, size) == expected[:size]
    assert read(1, start + 2 * PAGE + 100, 10) == b""


@pytest.mark.parametrize("came", [True, False])
def test_a_look_ends_where_the_segment_does(receiving: Receiving, came: bool) -> None:
    start, end = receiving.wal.start, receiving.wal.start + MB
    if came:
        receiving.come(end + 5000)
    receiving.write(end + 5000)
    receiving.received.synced(end + 5000)
    for lsn in (end - 100, end - PAGE, start):
        assert receiving.segments.read(1, lsn, 2 * MB) == receiving.image(lsn, end)
    assert receiving.segments.read(1, end, 5000) == receiving.image(end, end + 5000)


def test_what_is_sent_is_read_from_memory_or_from_the_file(receiving: Receiving) -> None:
    start = receiving.wal.start
    buffer = bytearray(5000)
    receiving.come(start + 5000)
    receiving.segments.read_into(1, start, memoryview(buffer))
    assert buffer == receiving.image(start, start + 5000)
    # It is not in memory any more.
    receiving.write(start + MB)
    receiving.received.begin(1, start + MB, start + MB)
    buffer = bytearray(5000)
    receiving.segments.read_into(1, start, memoryview(buffer))
    assert buffer == receiving.image(start, start + 5000)


def test_other_timelines_are_there_as_far_as_their_files_go(
    receiving: Receiving, tmp_path: Path
) -> None:
    """They are on disk since before this one began."""
    other = WalBuilder(tli=2)
    other.records_to(other.start + MB, 3000)
    other.write_to(tmp_path)
    receiving.come(receiving.wal.start + 100)
    receiving.write(receiving.wal.start + 100)
    for lsn in (other.start, other.start + MB):
        assert receiving.segments.read(2, lsn, 2 * MB) == other.segment(lsn)
    assert receiving.segments.read(1, other.start, 100) == b""
    assert receiving.segments.read(3, other.start, 100) == b""


def test_before_anything_is_received_all_is_there(tmp_path: Path) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB, 3000)
    wal.write_to(tmp_path)
    segments = ReceivedSegments(tmp_path, IDENTITY, Received())
    assert segments.read(1, wal.start, 2 * MB) == wal.segment(wal.start)
    segments.close()


# --- What has changed ------------------------------------------------------------------------


def plain_stamp(directory: Path, tli: int, lsn: int) -> Stamp | None:
    segments = Segments(directory, IDENTITY)
    try:
        return segments.stamp(tli, lsn)
    finally:
        segments.close()


def change(path: Path) -> None:
    """Have somebody else write to it, until the file system's clock shows that it was later."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        with open(path, "r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(first)


def test_what_we_write_does_not_count_as_a_change(receiving: Receiving, tmp_path: Path) -> None:
    start = receiving.wal.start
    stamps: dict[int, set[Stamp | None]] = {start: set(), start + MB: set()}
    plain = set()
    for end in range(start + MB // 4, start + 2 * MB + MB // 2, MB // 4):
        receiving.come(end)
        receiving.write(end)
        receiving.received.synced(end)
        for lsn, seen in stamps.items():
            if end > lsn:
                seen.add(receiving.segments.stamp(1, lsn))
        plain.add(plain_stamp(tmp_path, 1, start))
        for path in tmp_path.glob("*.partial"):
            change(path)
    assert len(stamps[start]) == 1
    assert len(stamps[start + MB]) == 1
    # The files themselves tell otherwise.
    assert len(plain) > 1


def test_what_others_write_to_a_finished_segment_does(receiving: Receiving, tmp_path: Path) -> None:
    start = receiving.wal.start
    receiving.write(start + MB + 100)
    before = [receiving.segments.stamp(1, lsn) for lsn in (start, start + MB)]
    path = tmp_path / receiving.wal.segment_name(start)
    change(path)
    changed = receiving.segments.stamp(1, start)
    assert changed == plain_stamp(tmp_path, 1, start)
    assert changed not in before
    # The one that we write to is ours, whatever comes to it.
    assert receiving.segments.stamp(1, start + MB) == before[1]
    # Another file in its place is a change as well.
    path.rename(tmp_path / "away")
    path.write_bytes(receiving.wal.segment(start))
    replaced = receiving.segments.stamp(1, start)
    assert replaced == plain_stamp(tmp_path, 1, start)
    assert replaced not in (*before, changed)
    path.unlink()
    assert receiving.segments.stamp(1, start) is None


def test_what_was_there_before_we_began_has_the_stamps_of_its_files(tmp_path: Path) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + 2 * MB, 3000)
    wal.write_to(tmp_path)
    received = Received()
    received.begin(1, wal.start + 2 * MB, wal.start + 2 * MB)
    segments = ReceivedSegments(tmp_path, IDENTITY, received)
    for lsn in (wal.start, wal.start + MB):
        assert segments.stamp(1, lsn) == plain_stamp(tmp_path, 1, lsn) is not None
    segments.close()


def test_the_segment_of_another_timeline_is_not_ours(receiving: Receiving, tmp_path: Path) -> None:
    start = receiving.wal.start
    receiving.write(start + MB + 100)
    other = WalBuilder(tli=2)
    other.records_to(other.start + MB + 100, 3000)
    other.write_to(tmp_path)
    for lsn in (start, start + MB):
        assert receiving.segments.stamp(2, lsn) == plain_stamp(tmp_path, 2, lsn) is not None
        assert receiving.segments.stamp(1, lsn) != receiving.segments.stamp(2, lsn)


def test_finished_segments_stay_ours_when_another_timeline_is_begun(receiving: Receiving) -> None:
    start = receiving.wal.start
    receiving.write(start + MB + 100)
    before = receiving.segments.stamp(1, start)
    receiving.received.begin(2, start + MB, start + MB)
    assert receiving.segments.stamp(1, start) == before


# --- What is found right ---------------------------------------------------------------------


def walk(
    received: Received, position: int, reason: str = "", end: int | None = None, last: int = 0
) -> bool:
    """The walk has come to there; whether it may go on."""
    return received.walk(1, position, position if end is None else end, last, reason)


def test_what_was_walked_over_is_proven_as_far_as_it_may_be_seen() -> None:
    received = Received()
    told: list[int] = []
    received.walked = lambda: told.append(received.proven_to)
    received.begin(1, 3 * MB, 3 * MB + 100)
    assert received.proven_to == 3 * MB + 100
    walk(received, 3 * MB, "no more")  # it was proven before
    received.synced(3 * MB + 5 * PAGE + 200)
    received.walk(2, 4 * MB, 4 * MB, 4 * MB, "of another timeline")
    walk(received, 3 * MB + 2 * PAGE)
    walk(received, 3 * MB + 5 * PAGE + 208, "no more")  # with what fills the last record up
    assert told == [3 * MB + 100, 3 * MB + 2 * PAGE, 3 * MB + 5 * PAGE + 200]
    assert received.shown_to == 3 * MB + 5 * PAGE + 200
    assert received.stopped_at is None


def test_the_walk_is_one_sync_ahead_and_what_it_finds_is_shown_behind_that() -> None:
    received = Received()
    received.begin(1, 3 * MB, 3 * MB)
    seen: list[tuple[int, int, int, int]] = []

    def look() -> None:
        at = received.walkable_to(1), received.visible_to(1), received.proven_to
        a, b, c, last = (lsn and lsn - 3 * MB for lsn in (*at, received.last_record))
        seen.append((a, b, c, last))

    assert not walk(received, 3 * MB, "nothing yet")
    received.written(3 * MB + 1000)
    look()  # there is more to walk over, but nothing to show
    assert not walk(received, 3 * MB + 1000, "no more", end=3 * MB + 900, last=3 * MB + 800)
    look()
    assert not received.is_shown
    received.synced(3 * MB + 1000)
    look()  # now it is shown
    assert received.is_shown
    received.written(3 * MB + 2000)
    assert not received.is_shown
    assert not walk(received, 3 * MB + 1500, end=3 * MB + 1400, last=3 * MB + 1300)
    look()  # it has got to where nothing is on disk
    received.synced(3 * MB + 2000)
    look()  # the sync was faster: what there is, is shown
    assert not received.is_shown
    received.written(3 * MB + 3000)
    look()  # and only when all that is on disk was walked over it may go further
    assert walk(received, 3 * MB + 2000, "no more", end=3 * MB + 2000, last=3 * MB + 1900)
    look()
    assert seen == [
        (1000, 0, 0, 0),
        (1000, 0, 0, 0),
        (1000, 900, 1000, 800),
        (2000, 900, 1000, 800),
        (2000, 1400, 1500, 1300),
        (2000, 1400, 1500, 1300),
        (3000, 2000, 2000, 1900),
    ]


def test_a_walk_that_stops_before_the_last_page_has_found_something_wrong() -> None:
    received = Received()
    received.begin(1, 3 * MB, 3 * MB)
    received.synced(3 * MB + 5 * PAGE + 200)
    walk(received, 3 * MB + 5 * PAGE, "the record is not whole yet")
    assert received.stopped_at is None
    assert received.is_shown
    received.written(3 * MB + 6 * PAGE + 200)
    walk(received, 3 * MB + 5 * PAGE, "invalid record length")
    assert received.stopped_at is None  # what will be on disk, is not yet
    received.synced(3 * MB + 6 * PAGE + 200)
    assert not received.is_shown
    walk(received, 3 * MB + 5 * PAGE)
    assert received.stopped_at is None
    walk(received, 3 * MB + 5 * PAGE, "invalid record length")
    assert received.reason == "invalid record length"
    stopped_at: int | None = received.stopped_at
    assert stopped_at == 3 * MB + 5 * PAGE
    received.begin(1, 3 * MB + 5 * PAGE, 3 * MB + 5 * PAGE)
    assert received.stopped_at is None
