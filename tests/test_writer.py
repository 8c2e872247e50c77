"""Segments, written: the files are what was given, in whatever pieces and however the disk balks;
and nothing counts before that which it rests on is on disk."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disk import DATA, SECOND, THIRD, Disk, expected_files, files, pieces
from tests.test_segments import open_files
from tests.wal_builder import MB, PAGE
from walproto.wal.segments import stamp_of
from walproto.wal.writer import SegmentWriter


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


# --- What is written -------------------------------------------------------------------------

sizes = st.lists(
    st.one_of(st.integers(1, 3000), st.integers(1, 2 * MB), st.sampled_from([PAGE, 16 * PAGE, MB])),
    max_size=5,
).map(lambda sizes: [*sizes, 200_000])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    start=st.sampled_from([2 * MB, 2 * MB + 8, 3 * MB - 1, 2 * MB + 64 * PAGE]),
    end=st.one_of(st.integers(3 * MB, 6 * MB - 70 * PAGE), st.sampled_from([3 * MB, 5 * MB])),
    jobs=sizes,
    buffers=sizes,
    longest=sizes,
    rooms=st.lists(st.one_of(st.none(), st.just(0), st.integers(1, MB)), max_size=6),
)
def test_the_files_are_what_was_given_however_the_disk_balks(
    start: int,
    end: int,
    jobs: list[int],
    buffers: list[int],
    longest: list[int],
    rooms: list[int | None],
) -> None:
    """In pieces of any size; writes that take only a part; and when the disk is full, the same is
    written again, with what has come since."""
    rooms_left = itertools.cycle([*rooms, None])
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        directory = Path(name)
        disk = Disk(directory, monkeypatch)
        disk.longest = itertools.cycle(longest)
        writer = SegmentWriter(directory, 1, MB, start)
        job: list[memoryview] = []
        job_lsn = start
        for piece in [*pieces(DATA[: end - start], *jobs), memoryview(b"")]:
            job += pieces(bytes(piece), *buffers)
            disk.room = next(rooms_left) if piece else None
            try:
                writer.write(job_lsn, job)
            except OSError:
                assert disk.room == 0
            else:
                job, job_lsn = [], writer.lsn
            assert writer.lsn == start + disk.written
            writer.sync()
            assert disk.unsynced == set()
        writer.close()
        assert writer.lsn == end
        assert files(directory) == expected_files(start, end)
        complete = [lsn for lsn in range(MB, end + 1, MB) if lsn > start]
        assert [lsn for lsn, _ in writer.completed] == complete


def test_a_segment_has_its_size_at_once_and_its_name_when_it_is_full(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    assert files(tmp_path) == {}
    for end in (2 * MB + 1, 2 * MB + 5000, 3 * MB - 1, 3 * MB, 3 * MB + 1):
        writer.write(writer.lsn, [memoryview(DATA)[writer.lsn - 2 * MB : end - 2 * MB]])
        assert writer.lsn == end
        assert files(tmp_path) == expected_files(2 * MB, end)
        status = os.stat(next(tmp_path.glob("*.partial"), tmp_path / SECOND))
        assert status.st_blocks * 512 >= MB
        assert status.st_mode & 0o777 == 0o600
    writer.close()


def test_each_thing_is_on_disk_before_the_next_is_begun(tmp_path: Path, disk: Disk) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [memoryview(DATA)[: MB + 100]])
    writer.sync()
    begun = ["open", "posix_fallocate", "fsync"]
    assert disk.calls == [
        "open .",
        *(f"{what} {SECOND}.partial" for what in begun),
        "fsync .",
        f"pwritev {SECOND}.partial",
        f"fdatasync {SECOND}.partial",
        f"rename {SECOND}.partial",
        "fsync .",
        *(f"{what} {THIRD}.partial" for what in begun),
        "fsync .",
        f"pwritev {THIRD}.partial",
        f"fdatasync {THIRD}.partial",
    ]
    disk.calls.clear()
    writer.write(3 * MB + 100, [memoryview(DATA)[:5000]])
    writer.sync()
    writer.close()
    assert disk.calls == [f"pwritev {THIRD}.partial", f"fdatasync {THIRD}.partial"]


def test_more_pieces_than_a_system_call_takes(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    parts = pieces(DATA[: MB + 99], 300, 1, 77)
    assert len(parts) > 2 * os.sysconf("SC_IOV_MAX")
    writer.write(2 * MB, parts)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 3 * MB + 99)


def test_what_was_written_before_is_passed_over(tmp_path: Path, disk: Disk) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: MB + 5000], 700)
    writer.write(2 * MB, job[:1000])
    writer.write(2 * MB, job)
    writer.write(2 * MB, job)
    writer.write(2 * MB + 700 * 1200, job[1200:])
    assert disk.written == MB + 5000
    writer.write(writer.lsn, [])
    writer.write(writer.lsn, [memoryview(b"")])
    assert disk.written == MB + 5000
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 3 * MB + 5000)


def test_nothing_makes_no_file(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [])
    writer.write(2 * MB, [memoryview(b"")])
    writer.sync()
    writer.close()
    assert files(tmp_path) == {}


def test_files_are_named_by_their_timeline(tmp_path: Path) -> None:
    for tli in (1, 0x1F):
        writer = SegmentWriter(tmp_path, tli, MB, 2 * MB)
        writer.write(2 * MB, [memoryview(DATA)[: MB + tli]])
        writer.close()
    assert files(tmp_path) == {
        **expected_files(2 * MB, 3 * MB + 1),
        **expected_files(2 * MB, 3 * MB + 0x1F, tli=0x1F),
    }


def test_the_stamps_are_those_of_the_files(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB + 100)
    writer.write(2 * MB + 100, [memoryview(DATA)[: 2 * MB]])
    writer.close()
    assert writer.completed == [
        (3 * MB, stamp_of(os.stat(tmp_path / SECOND))),
        (4 * MB, stamp_of(os.stat(tmp_path / THIRD))),
    ]


def test_it_keeps_no_more_open_than_what_it_writes_to(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [memoryview(DATA)[: MB + 1]])
    here = {path for path in open_files() if path.startswith(str(tmp_path))}
    assert here == {str(tmp_path), str(tmp_path / f"{THIRD}.partial")}
    writer.close()
    writer.close()
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]


# --- What is there already -------------------------------------------------------------------


@pytest.mark.parametrize("there", [MB, 70_000, 0])
def test_it_goes_on_in_a_segment_that_was_begun(tmp_path: Path, disk: Disk, there: int) -> None:
    """However much of it there is: what is before its position stays, and its size is right."""
    (tmp_path / f"{SECOND}.partial").write_bytes(b"\xff" * there)
    start = 2 * MB + 70_000
    writer = SegmentWriter(tmp_path, 1, MB, start)
    writer.write(start, [memoryview(DATA)[:100]])
    writer.sync()
    writer.close()
    before = (b"\xff" * there).ljust(MB, b"\0")
    assert files(tmp_path) == {
        f"{SECOND}.partial": before[:70_000] + DATA[:100] + before[70_100:],
    }
    assert ("posix_fallocate" in str(disk.calls)) == (there < MB)
    assert "fsync ." in disk.calls


def test_a_segment_that_got_its_name_too_early_loses_it_until_it_is_full(tmp_path: Path) -> None:
    before = DATA[:70_000].ljust(MB, b"\xff")
    (tmp_path / SECOND).write_bytes(before)
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB + 70_000)
    writer.write(writer.lsn, [memoryview(DATA)[70_000:70_100]])
    assert files(tmp_path) == {f"{SECOND}.partial": DATA[:70_100] + before[70_100:]}
    writer.write(writer.lsn, [memoryview(DATA)[70_100:MB]])
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 3 * MB)


def test_of_two_files_for_a_segment_the_one_with_the_name_counts(tmp_path: Path) -> None:
    """As it does for whoever reads (:class:`walproto.wal.segments.Segments`)."""
    (tmp_path / SECOND).write_bytes(DATA[:MB])
    (tmp_path / f"{SECOND}.partial").write_bytes(bytes(MB))
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB + 70_000)
    writer.write(writer.lsn, [memoryview(DATA)[70_000:70_001]])
    writer.close()
    assert files(tmp_path) == {f"{SECOND}.partial": DATA[:MB]}
