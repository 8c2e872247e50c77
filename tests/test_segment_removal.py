"""Old segments are removed: in which order, and which files are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.disk import Disk, files
from tests.retained import OTHER, name_of, names_in, put
from tests.wal_builder import MB, SYSTEM
from walproto.timeline.retention import old_segments, remove_segments


def test_the_oldest_goes_first_whichever_timeline_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = put(tmp_path, *range(9, 16))
    ended = put(tmp_path, 16, suffix=".partial")
    two = put(tmp_path, *range(14, 20), tli=2)
    newest = put(tmp_path, 20, tli=2, suffix=".partial")
    disk = Disk(tmp_path, monkeypatch)
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 18))
    old = [*one[:5], one[5], two[0], one[6], two[1], ended[0], two[2], two[3]]
    assert removal.names == old
    assert (removal.left_alone, removal.problem) == ([], "")
    done = [call for call in disk.calls if not call.startswith("open")]
    assert done == [*(f"unlink {name}" for name in old), "fsync ."]
    assert names_in(tmp_path) == {*two[4:], *newest}


def test_what_is_no_old_segment_stays(tmp_path: Path) -> None:
    others = {
        *("00000002.history", "00000003.history", "walproto.slots", "walproto.slots.tmp"),
        *("walproto.slots.damaged", "walproto.slots.spare"),
        "000000010000000000000004.00000028.backup",
        "000000010000000000000005.partial.old",
        "000000010000000000000003.gz",
        "00000001000000000000000a",
        "00000001000000000000003",
        "000000000000000000000003",  # there is no timeline 0
        "000000010000000000001000",  # behind the last one below 4 GB
        "archive_status",
    }
    for name in others:
        (tmp_path / name).write_bytes(b"1\t0/5000000\tno recovery target specified\n")
    kept = put(tmp_path, 10, 11) + put(tmp_path, 12, suffix=".partial")
    put(tmp_path, 3, 9)
    before = files(tmp_path)
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 10))
    assert removal.names == [name_of(3), name_of(9)]
    assert names_in(tmp_path) == others | set(kept)
    assert files(tmp_path).items() <= before.items()


@pytest.mark.parametrize("contents", [b"", b"x" * 8192, bytes(8192)])
def test_what_is_in_an_old_segment_does_not_matter(tmp_path: Path, contents: bytes) -> None:
    put(tmp_path, 3, 4)
    (tmp_path / name_of(3)).write_bytes(contents)
    assert remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 4)).names == [name_of(3)]


def test_another_clusters_segments_are_left_alone(tmp_path: Path) -> None:
    strange = put(tmp_path, 3, 5, system=OTHER) + put(tmp_path, 4, tli=7, system=OTHER)
    put(tmp_path, 4, 6, 7)
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 7))
    assert removal.names == [name_of(4), name_of(6)]
    assert set(removal.left_alone) == set(strange)
    assert removal.problem == ""
    assert names_in(tmp_path) == {*strange, name_of(7)}


def test_what_cannot_be_removed_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *range(3, 9))
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {f"unlink {name_of(5)}": errno.EACCES}
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 8))
    assert removal.names == [name_of(3), name_of(4)]
    assert removal.problem == f"{tmp_path / name_of(5)}: Permission denied"
    assert names_in(tmp_path) == set(map(name_of, range(5, 9)))
    disk.failing = {}
    assert remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 8)).names == list(
        map(name_of, (5, 6, 7))
    )
    assert names_in(tmp_path) == {name_of(8)}


def test_what_cannot_be_looked_into_ends_it(tmp_path: Path) -> None:
    """Were it another cluster's?  A directory, a pipe."""
    put(tmp_path, *range(3, 9))
    strange = tmp_path / name_of(5)
    for make in (Path.mkdir, os.mkfifo):
        strange.unlink()
        make(strange)
        removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 8))
        assert removal.problem == f"{strange}: it is not a regular file"
        assert names_in(tmp_path) == set(map(name_of, range(5, 9)))
        if strange.is_dir():
            strange.rmdir()
            strange.touch()


def test_what_is_gone_already_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *range(3, 7))
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {f"unlink {name_of(4)}": errno.ENOENT, f"open {name_of(5)}": errno.ENOENT}
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 6))
    assert removal.names == [name_of(3)]
    assert removal.problem == ""


def test_it_is_over_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *range(3, 9))
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {"fsync .": errno.EIO}
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 6))
    assert removal.names == [name_of(3), name_of(4), name_of(5)]
    assert removal.problem == f'could not fsync file "{tmp_path}": Input/output error'


def test_a_directory_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        old_segments(tmp_path / "nowhere", MB, 6)
    put(tmp_path, 3, 4)
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {"open .": errno.ENFILE}
    removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 4))
    assert removal.problem == f"{tmp_path}: Too many open files in system"


def test_no_more_is_removed_than_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything asked of the disk if it is nothing."""
    names = put(tmp_path, *range(3, 9))
    assert old_segments(tmp_path, MB, 3) == []
    old = old_segments(tmp_path, MB, 7)
    assert old == names[:4]
    disk = Disk(tmp_path, monkeypatch)
    assert remove_segments(tmp_path, SYSTEM, []).names == []
    assert disk.calls == []
    assert remove_segments(tmp_path, SYSTEM, old[:2]).names == names[:2]
    assert names_in(tmp_path) == set(names[2:])
    assert old_segments(tmp_path, MB, 7) == names[2:4]


@pytest.mark.parametrize("size", [MB, 16 * MB, 1024 * MB])
def test_over_every_four_gigabytes(tmp_path: Path, size: int) -> None:
    """Where names do not simply count up."""
    in_four = 2**32 // size
    near = sorted({number * in_four + more for number in (1, 2, 16) for more in (-2, -1, 0, 1)})
    for segno in near:
        for path in tmp_path.iterdir():
            path.unlink()
        put(tmp_path, *near, size=size)
        put(tmp_path, *near, tli=3, size=size)
        removal = remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, size, segno))
        old = [number for number in near if number < segno]
        assert removal.names == [name_of(one, tli, size) for one in old for tli in (1, 3)]
        kept = [number for number in near if number >= segno]
        assert names_in(tmp_path) == {name_of(one, tli, size) for one in kept for tli in (1, 3)}
