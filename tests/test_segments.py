"""The files of a directory: what is read is that segment's, whatever happens to the files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder
from walproto.errors import DataCorrupted, IoError, UndefinedFile
from walproto.wal import segments as segments_module
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.segments import Segments

IDENTITY = Identity(SYSTEM, MB, FORMATS[MAGIC[18]])


def built(count: int = 4, tli: int = 1, seed: int = 0, system: int = SYSTEM) -> WalBuilder:
    wal = WalBuilder(tli=tli, seed=seed, system=system)
    wal.records_to(wal.start + count * MB - 300_000, 100_000)
    wal.fill_to(wal.start + count * MB - PAGE)
    return wal


@pytest.fixture
def wal() -> WalBuilder:
    return built()


@pytest.fixture
def segments(tmp_path: Path, wal: WalBuilder) -> Iterator[Segments]:
    wal.write_to(tmp_path)
    made = Segments(tmp_path, IDENTITY)
    yield made
    made.close()


def get(segments: Segments, lsn: int, size: int = 1000, tli: int = 1) -> bytes:
    buffer = bytearray(size)
    segments.read_into(tli, lsn, memoryview(buffer))
    return bytes(buffer)


def open_files() -> set[str]:
    """What this process has open."""
    result = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            result.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the one that lists them
    return result


def test_files_that_were_removed_can_be_closed(segments: Segments, wal: WalBuilder) -> None:
    for number in range(3):
        get(segments, wal.start + number * MB)
    paths = [segments.directory / segments.name(1, wal.start + n * MB) for n in range(3)]
    paths[0].unlink()
    paths[1].replace(f"{paths[1]}.elsewhere")
    segments.close_removed()
    mine = {file for file in open_files() if file.startswith(str(segments.directory))}
    assert mine == {str(paths[2])}
    assert get(segments, wal.start + 2 * MB) == paths[2].read_bytes()[:1000]


def test_names(segments: Segments) -> None:
    assert segments.name(1, 3 * MB + 5) == "000000010000000000000003"
    assert segments.name(0x1F, 0x12_3450_0000) == "0000001F0000001200000345"


def test_what_is_read_is_what_is_there(segments: Segments, wal: WalBuilder) -> None:
    for lsn in (MB, MB + 1, 2 * MB - 1000, 3 * MB + 12345):
        offset = lsn - wal.start
        assert get(segments, lsn) == wal.image[offset : offset + 1000]
        assert segments.read(1, lsn, 1000) == wal.image[offset : offset + 1000]


def test_a_look_ends_where_the_segment_or_the_file_ends(
    segments: Segments, wal: WalBuilder, tmp_path: Path
) -> None:
    assert segments.read(1, 2 * MB - 10, 1000) == wal.image[MB - 10 : MB]
    os.truncate(tmp_path / segments.name(1, 3 * MB), PAGE + 5)
    assert segments.read(1, 3 * MB + PAGE, 1000) == wal.image[2 * MB + PAGE :][:5]
    assert segments.read(1, 3 * MB + PAGE + 5, 1000) == b""
    assert segments.read(1, 9 * MB, 1000) == b""
    assert segments.read(2, MB, 1000) == b""


def test_a_missing_segment_is_told_as_postgres_does(segments: Segments, tmp_path: Path) -> None:
    with pytest.raises(UndefinedFile) as caught:
        get(segments, 9 * MB + 77)
    name = "000000010000000000000009"
    assert caught.value.message == f"requested WAL segment {name} has already been removed"
    assert caught.value.log is not None
    assert str(tmp_path / name) in caught.value.log
    assert "LSN 0/90004D" in caught.value.log


def test_a_partial_segment_is_read_where_there_is_no_complete_one(
    segments: Segments, wal: WalBuilder, tmp_path: Path
) -> None:
    path = tmp_path / segments.name(1, 2 * MB)
    path.rename(f"{path}.partial")
    assert get(segments, 2 * MB) == wal.image[MB : MB + 1000]


def test_a_complete_segment_goes_before_a_partial_one(
    segments: Segments, wal: WalBuilder, tmp_path: Path
) -> None:
    path = tmp_path / segments.name(1, 2 * MB)
    Path(f"{path}.partial").write_bytes(wal.segment(2 * MB)[:100] + bytes(MB - 100))
    assert get(segments, 2 * MB) == wal.image[MB : MB + 1000]


def test_a_complete_segment_is_read_as_soon_as_it_is_there(
    segments: Segments, wal: WalBuilder, tmp_path: Path
) -> None:
    """Be the partial one renamed or left beside it."""
    path = tmp_path / segments.name(1, 2 * MB)
    partial = Path(f"{path}.partial")
    path.rename(partial)
    whole = wal.segment(2 * MB)
    partial.write_bytes(whole[:500] + bytes(MB - 500))
    assert get(segments, 2 * MB) == whole[:500] + bytes(500)
    partial.write_bytes(whole)
    partial.rename(path)
    assert get(segments, 2 * MB) == whole[:1000]
    path.rename(partial)
    partial.write_bytes(whole[:500] + bytes(MB - 500))
    assert get(segments, 2 * MB) == whole[:500] + bytes(500)
    path.write_bytes(whole)
    assert get(segments, 2 * MB) == whole[:1000]


def test_a_recycled_segment_is_not_read_under_its_old_name(
    segments: Segments, wal: WalBuilder, tmp_path: Path
) -> None:
    old, future = (tmp_path / segments.name(1, lsn) for lsn in (2 * MB, 77 * MB))
    assert get(segments, 2 * MB) == wal.image[MB : MB + 1000]
    old.rename(future)
    assert segments.read(1, 2 * MB, 1000) == b""
    with pytest.raises(UndefinedFile):
        get(segments, 2 * MB)
    with open(future, "r+b") as file:
        file.write(b"other WAL" * 1000)
    with pytest.raises(UndefinedFile):
        get(segments, 2 * MB)


def test_a_segment_recycled_between_the_look_and_the_read_is_not_read(
    segments: Segments, wal: WalBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has it open reads what is written over it."""
    old, future = (tmp_path / segments.name(1, lsn) for lsn in (2 * MB, 77 * MB))
    get(segments, 2 * MB)
    real = os.preadv

    def late(*args: object) -> int:
        monkeypatch.setattr(os, "preadv", real)
        old.rename(future)
        with open(future, "r+b") as file:
            file.write(b"other WAL" * 1000)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", late)
    with pytest.raises(UndefinedFile):
        get(segments, 2 * MB)
    assert os.preadv is real


def test_a_segment_put_in_the_place_of_another_is_the_one_that_is_read(
    segments: Segments, tmp_path: Path
) -> None:
    get(segments, 2 * MB)
    other = built(seed=5)
    new = tmp_path / "new"
    new.write_bytes(other.segment(2 * MB))
    new.rename(tmp_path / segments.name(1, 2 * MB))
    assert get(segments, 2 * MB) == other.segment(2 * MB)[:1000]


def test_a_truncated_segment_is_told(segments: Segments, wal: WalBuilder, tmp_path: Path) -> None:
    path = tmp_path / segments.name(1, 2 * MB)
    assert get(segments, 2 * MB + 5000)
    os.truncate(path, 5100)
    assert get(segments, 2 * MB + 5000, 100) == wal.image[MB + 5000 : MB + 5100]
    with pytest.raises(DataCorrupted) as caught:
        get(segments, 2 * MB + 5000)
    assert caught.value.message == (
        f"could not read from WAL segment {path.name}, offset 5000: read 100 of 1000"
    )
    assert caught.value.log is not None
    assert str(path) in caught.value.log
    assert "LSN 0/201388" in caught.value.log
    path.write_bytes(wal.segment(2 * MB))
    assert get(segments, 2 * MB + 5000) == wal.image[MB + 5000 : MB + 6000]


def test_a_segment_of_another_cluster_is_refused(segments: Segments, tmp_path: Path) -> None:
    path = tmp_path / segments.name(1, 2 * MB)
    path.unlink()
    path.write_bytes(built(system=99).segment(2 * MB))
    before = open_files()
    with pytest.raises(DataCorrupted) as caught:
        get(segments, 2 * MB)
    assert caught.value.message == (
        "WAL file is from different database system: WAL file database system identifier is 99, "
        f"expected {SYSTEM}"
    )
    assert caught.value.log is not None
    assert str(path) in caught.value.log
    assert "LSN 0/200000" in caught.value.log
    assert segments.read(1, 2 * MB, 10) == b""
    assert open_files() == before


def test_what_is_no_wal_is_left_to_the_scan(segments: Segments, tmp_path: Path) -> None:
    path = tmp_path / segments.name(1, 2 * MB)
    path.write_bytes(bytes(MB))
    assert get(segments, 2 * MB) == bytes(1000)


def test_a_directory_under_a_segments_name_is_no_segment(
    segments: Segments, tmp_path: Path
) -> None:
    (tmp_path / segments.name(1, 9 * MB)).mkdir()
    assert segments.read(1, 9 * MB, 10) == b""
    with pytest.raises(IoError) as caught:
        get(segments, 9 * MB)
    assert caught.value.log is not None
    assert segments.name(1, 9 * MB) in caught.value.log


def test_a_segment_that_may_not_be_opened_is_told(
    segments: Segments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / segments.name(1, 2 * MB)
    with pytest.raises(IoError) as caught:
        get(segments, 2 * MB)
    assert caught.value.message == f'could not open file "pg_wal/{path.name}": Permission denied'
    assert caught.value.log is not None
    assert str(path) in caught.value.log
    assert "LSN 0/200000" in caught.value.log
    assert segments.read(1, 2 * MB, 10) == b""


@pytest.mark.parametrize("opened", [False, True])
def test_a_segment_that_cannot_be_read_is_told(
    segments: Segments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    if opened:
        get(segments, 2 * MB)
    before = open_files()
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pread", fail)
    path = tmp_path / segments.name(1, 2 * MB)
    with pytest.raises(IoError) as caught:
        get(segments, 2 * MB + 16)
    assert caught.value.message.startswith(f"could not read from WAL segment {path.name}, offset ")
    assert caught.value.message.endswith(": Input/output error")
    assert caught.value.log is not None
    assert str(path) in caught.value.log
    assert "LSN 0/2000" in caught.value.log
    assert segments.read(1, 2 * MB, 10) == b""
    assert open_files() == before


def test_only_some_files_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_MAX_OPEN", 3)
    wal = built(9)
    wal.write_to(tmp_path)
    segments = Segments(tmp_path, IDENTITY)

    def ours() -> set[str]:
        return {Path(path).name for path in open_files() if path.startswith(str(tmp_path))}

    for lsn in range(MB, 10 * MB, MB):
        assert get(segments, lsn) == wal.segment(lsn)[:1000]
        get(segments, MB)  # those last used are kept
        assert len(ours()) <= 3
    assert segments.name(1, MB) in ours()
    segments.close()
    assert not ours()
    # It may be used again.
    assert get(segments, MB) == wal.segment(MB)[:1000]
    segments.close()
    assert not ours()


def test_history_files(segments: Segments, tmp_path: Path) -> None:
    (tmp_path / "00000002.history").write_bytes(b"1\t0/3000000\tx\n")
    assert segments.read_history(2) == b"1\t0/3000000\tx\n"
    with pytest.raises(UndefinedFile) as caught:
        segments.read_history(3)
    assert caught.value.message == (
        'could not open file "pg_wal/00000003.history": No such file or directory'
    )
    assert caught.value.log is not None
    assert str(tmp_path / "00000003.history") in caught.value.log
