"""Proofs of older segments: nothing counts before its records were found right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder
from walproto.errors import DataCorrupted, UndefinedFile
from walproto.lsn import format_lsn
from walproto.timeline.history import parse_history
from walproto.timeline.proofs import Proofs
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.segments import Segments

IDENTITY = Identity(SYSTEM, MB, FORMATS[MAGIC[18]])
SLICE = 64 * PAGE


class Archive:
    """A directory with five segments, the last of them begun, and what is proven of them."""

    def __init__(self, directory: Path, wal: WalBuilder) -> None:
        self.directory = directory
        self.wal = wal
        wal.write_to(directory)
        self.segments = Segments(directory, IDENTITY)
        self.history = parse_history(wal.tli, wal.history_contents)
        self.proofs = Proofs(self.segments, IDENTITY, self.history)

    def path(self, lsn: int) -> Path:
        return self.directory / self.segments.name(self.history.file_tli(lsn, MB), lsn)

    def file(self, lsn: int) -> Path:
        """Where the segment is, complete or not."""
        path = self.path(lsn)
        return path if path.exists() else path.with_name(f"{path.name}.partial")

    def flip(self, lsn: int) -> None:
        with open(self.path(lsn), "r+b") as file:
            file.seek(lsn % MB)
            byte = file.read(1)[0]
            file.seek(lsn % MB)
            file.write(bytes([byte ^ 1]))

    def finish(self) -> None:
        for _ in range(1000):
            if not self.proofs.advance(SLICE):
                return
        raise AssertionError("it goes on for ever")

    def proven_to(self, lsn: int) -> int:
        """As :meth:`Proofs.proven_to` once all walks are done."""
        self.proofs.proven_to(lsn)
        self.finish()
        return self.proofs.proven_to(lsn)

    def damage(self, lsn: int) -> str:
        """What is told of the segment that begins at ``lsn``."""
        assert self.proofs.proven_to(lsn) == lsn
        self.finish()
        with pytest.raises(DataCorrupted) as caught:
            self.proofs.proven_to(lsn)
        return caught.value.message


@pytest.fixture
def wal() -> WalBuilder:
    wal = WalBuilder()
    wal.records_to(wal.start + 4 * MB + 3 * PAGE, 5000)
    return wal


@pytest.fixture
def archive(tmp_path: Path, wal: WalBuilder) -> Iterator[Archive]:
    made = Archive(tmp_path, wal)
    yield made
    made.segments.close()


def test_a_walk_is_begun_when_somebody_asks(archive: Archive) -> None:
    assert not archive.proofs.is_busy
    assert not archive.proofs.advance(SLICE)
    assert archive.proofs.proven_to(2 * MB + 77) <= 2 * MB + 77
    assert archive.proofs.is_busy
    archive.finish()
    assert not archive.proofs.is_busy
    assert archive.proofs.proven_to(2 * MB + 77) == 3 * MB
    assert archive.proofs.proven_to(2 * MB) == 3 * MB
    assert not archive.proofs.is_busy


def test_what_is_proven_may_be_sent_while_the_walk_goes_on(archive: Archive) -> None:
    ends = [archive.proofs.proven_to(2 * MB)]
    while archive.proofs.advance(PAGE):
        ends.append(archive.proofs.proven_to(2 * MB))
    assert ends == sorted(set(ends))
    assert len(ends) > 4
    assert all(end == archive.wal.end_of(end) for end in ends[1:])


def test_it_goes_on_with_one_segment_after_the_other(archive: Archive) -> None:
    for lsn in (MB, 2 * MB, 3 * MB):
        archive.proofs.proven_to(lsn)
    for _ in range(3):
        archive.proofs.advance(PAGE)
    begun = [archive.proofs.proven_to(lsn) for lsn in (MB, 2 * MB, 3 * MB)]
    assert all(end > lsn for end, lsn in zip(begun, (MB, 2 * MB, 3 * MB), strict=True))
    archive.finish()
    assert [archive.proofs.proven_to(lsn) for lsn in (MB, 2 * MB, 3 * MB)] == [
        *(2 * MB, 3 * MB, 4 * MB)
    ]


def test_a_proof_is_remembered(archive: Archive) -> None:
    assert archive.proven_to(2 * MB) == 3 * MB
    assert archive.proofs.proven_to(2 * MB + 5) == 3 * MB
    assert not archive.proofs.is_busy


def test_a_segment_that_goes_after_its_proof_is_missing(archive: Archive) -> None:
    assert archive.proven_to(2 * MB) == 3 * MB
    archive.path(2 * MB).unlink()
    with pytest.raises(UndefinedFile, match="000000010000000000000002 has already been removed"):
        archive.proofs.proven_to(2 * MB + 5)


@pytest.mark.parametrize("way", ["in place", "by another file", "by a complete one"])
def test_a_file_that_changes_is_proven_anew(archive: Archive, way: str) -> None:
    path, lsn = archive.path(2 * MB), 2 * MB + 64 * PAGE + 5000
    if way == "by a complete one":
        path.rename(f"{path}.partial")
    assert archive.proven_to(2 * MB) == 3 * MB
    changed = path.with_name(archive.file(2 * MB).name).stat().st_ctime_ns
    if way == "in place":
        archive.flip(lsn)
    else:
        path.with_name("new").write_bytes(archive.file(2 * MB).read_bytes())
        path.with_name("new").rename(path)
        archive.flip(lsn)
    path.chmod(0o600)  # the time of the last change is a tick of the kernel's clock: see it pass
    while path.stat().st_ctime_ns == changed:
        path.chmod(0o600)
    end = archive.wal.end_of(lsn)
    assert archive.proven_to(2 * MB) == end


def test_the_record_that_a_segment_begins_within_is_checked(archive: Archive) -> None:
    """Its end stands here, its start and its CRC in the segment before."""
    begins = next(one for one in archive.wal.records if one.start < 2 * MB < one.end)
    archive.flip(2 * MB + 100)
    with pytest.raises(DataCorrupted, match=f"in record at {format_lsn(begins.start)}"):
        archive.proven_to(2 * MB)
    # What comes behind it is as good as ever.
    assert archive.proven_to(begins.end) == 3 * MB


def test_unless_the_segment_before_is_not_here(archive: Archive) -> None:
    archive.flip(2 * MB + 100)
    archive.path(MB).unlink()
    assert archive.proven_to(2 * MB) == 3 * MB


def test_a_missing_segment_is_told(archive: Archive) -> None:
    archive.path(2 * MB).unlink()
    with pytest.raises(UndefinedFile, match="000000010000000000000002 has already been removed"):
        archive.proofs.proven_to(2 * MB + 1000)
    assert not archive.proofs.is_busy


def test_a_segment_that_goes_during_the_walk_is_missing_and_not_damaged(archive: Archive) -> None:
    archive.proofs.proven_to(2 * MB)
    archive.proofs.advance(PAGE)
    archive.path(2 * MB).unlink()
    archive.finish()
    with pytest.raises(UndefinedFile, match="has already been removed"):
        archive.proofs.proven_to(2 * MB)


@pytest.mark.parametrize("page", [0, 1, 64, MB // PAGE - 2])
def test_all_is_proven_up_to_the_damage(archive: Archive, page: int) -> None:
    lsn = 2 * MB + page * PAGE + 5000
    archive.flip(lsn)
    end = archive.wal.end_of(lsn)
    assert archive.proven_to(2 * MB) == end
    with pytest.raises(DataCorrupted) as caught:
        archive.proofs.proven_to(end)
    assert caught.value.message == (
        f"incorrect resource manager data checksum in record at {format_lsn(end)}"
    )
    log = caught.value.log
    assert log is not None
    assert str(archive.path(2 * MB)) in log
    assert f"LSN {format_lsn(end)}" in log


def test_damage_is_told_once_and_then_looked_for_anew(archive: Archive) -> None:
    lsn = 2 * MB + 64 * PAGE + 5000
    archive.flip(lsn)
    for _ in range(3):
        archive.proofs.proven_to(lsn)
        archive.finish()
        with pytest.raises(DataCorrupted):
            archive.proofs.proven_to(lsn)
    archive.flip(lsn)
    assert archive.proven_to(lsn) == 3 * MB


def test_damage_is_told_to_those_behind_it_and_no_others(archive: Archive) -> None:
    lsn = 2 * MB + 64 * PAGE + 5000
    archive.flip(lsn)
    end = archive.wal.end_of(lsn)
    assert archive.proven_to(2 * MB) == end
    assert archive.proofs.proven_to(2 * MB) == end
    with pytest.raises(DataCorrupted):
        archive.proofs.proven_to(3 * MB - 1)
    assert archive.proven_to(2 * MB) == end
    assert archive.proven_to(3 * MB) == 4 * MB


def test_a_truncated_segment_is_damaged_where_it_ends(archive: Archive) -> None:
    os.truncate(archive.path(2 * MB), 10 * PAGE + 100)
    end = archive.wal.end_of(2 * MB + 10 * PAGE)
    assert archive.proven_to(2 * MB) == end
    with pytest.raises(DataCorrupted, match=r"could not read .*02, LSN 0/214000, offset 81920"):
        archive.proofs.proven_to(end)


def test_wal_of_another_timeline_or_place_is_damage(archive: Archive) -> None:
    other = WalBuilder(tli=2)
    other.records_to(other.start + 3 * MB, 5000)
    archive.path(2 * MB).write_bytes(other.segment(2 * MB))
    assert archive.damage(2 * MB).startswith("unexpected timeline ID 2 (should be 1)")
    archive.path(2 * MB).write_bytes(archive.wal.segment(3 * MB))
    assert archive.damage(2 * MB).startswith("unexpected pageaddr 0/300000 in WAL segment")
    archive.path(2 * MB).write_bytes(bytes(MB))
    assert archive.damage(2 * MB).startswith("invalid magic number 0000 in WAL segment")


def test_a_record_that_goes_on_in_the_next_segment_counts_as_a_whole(archive: Archive) -> None:
    crossing = next(r for r in archive.wal.records if r.start < 3 * MB < r.last)
    archive.flip(crossing.last - 1)
    assert archive.proven_to(2 * MB) == crossing.start
    with pytest.raises(DataCorrupted):
        archive.proofs.proven_to(crossing.start)


def test_a_record_that_goes_on_where_nothing_is_counts_as_far_as_it_is(archive: Archive) -> None:
    archive.path(3 * MB).unlink()
    assert archive.proven_to(2 * MB) == 3 * MB


def test_a_segment_may_hold_the_middle_of_one_record_only(tmp_path: Path) -> None:
    wal = WalBuilder()
    wal.records_to(2 * MB - 5 * PAGE, 5000)
    wal.record(3 * MB)
    archive = Archive(tmp_path, wal)
    for lsn in (MB, 2 * MB, 3 * MB):
        assert archive.proven_to(lsn) == lsn + MB
    archive.segments.close()


def test_the_files_are_those_of_the_history(tmp_path: Path) -> None:
    parent = WalBuilder()
    parent.records_to(parent.start + 2 * MB + 90 * PAGE, 5000)
    child = parent.fork(2)
    child.records_to(child.lsn + 2 * MB, 5000)
    parent.write_to(tmp_path)
    # What the old timeline has of the segment in which it ended is of no concern.
    (tmp_path / parent.segment_name(3 * MB)).unlink()
    archive = Archive(tmp_path, child)
    for lsn in (MB, 2 * MB, 3 * MB):
        assert archive.proven_to(lsn) == lsn + MB
    archive.segments.close()
