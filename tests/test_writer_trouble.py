"""Writing that fails: what can be tried again comes out right, and what cannot is said to be the
end."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from tests.disk import DATA, SECOND, THIRD, Disk, expected_files, files, pieces
from tests.test_segments import open_files
from tests.wal_builder import MB
from walproto.wal.writer import SegmentWriter, SyncError, store_history


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


# --- What can be tried again -----------------------------------------------------------------


@pytest.mark.parametrize("call", [f"open {THIRD}", "posix_fallocate"])
def test_a_segment_that_cannot_be_begun_leaves_nothing_and_can_be_begun_later(
    tmp_path: Path, disk: Disk, call: str
) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: 2 * MB + 5], MB // 8)
    writer.write(2 * MB, job[:8])
    for _ in range(2):
        disk.failing[call] = errno.ENOSPC
        with pytest.raises(OSError, match="No space left on device"):
            writer.write(2 * MB, job)
        assert writer.lsn == 3 * MB
        assert files(tmp_path) == expected_files(2 * MB, 3 * MB)
        writer.sync()
    disk.failing.clear()
    writer.write(2 * MB, job)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 4 * MB + 5)


def test_a_segment_that_cannot_be_named_is_named_later(tmp_path: Path, disk: Disk) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: 2 * MB + 5], MB // 8)
    disk.failing["rename"] = errno.EPERM
    for _ in range(2):
        with pytest.raises(OSError, match="Operation not permitted"):
            writer.write(2 * MB, job)
        assert writer.lsn == 3 * MB
        assert list(files(tmp_path)) == ["000000010000000000000002.partial"]
        writer.sync()
    disk.failing.clear()
    writer.write(2 * MB, job)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 4 * MB + 5)
    assert [end for end, _ in writer.completed] == [3 * MB, 4 * MB]


def test_a_segment_that_is_removed_meanwhile_is_not_on_disk(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, pieces(DATA[:5000], 1000))
    writer.sync()
    (path,) = tmp_path.iterdir()
    path.unlink()
    with pytest.raises(SyncError, match=f'file "{path}" was removed'):
        writer.sync()
    writer.close()


def test_a_directory_that_cannot_be_opened_is_tried_again(tmp_path: Path, disk: Disk) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    disk.failing["open ."] = errno.EMFILE
    for _ in range(2):
        with pytest.raises(OSError, match="Too many open files"):
            writer.write(2 * MB, [memoryview(DATA)[:100]])
        assert files(tmp_path) == {}
    disk.failing.clear()
    writer.write(2 * MB, [memoryview(DATA)[:100]])
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 2 * MB + 100)


def test_too_many_open_files_are_not_the_end(tmp_path: Path) -> None:
    """As when many clients come; the operating system itself says so."""
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: 2 * MB + 5], 100_000)
    writer.write(2 * MB, job[:1])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # There is room for no other than those that are open.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                writer.write(2 * MB, job)
            writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert files(tmp_path) == expected_files(2 * MB, 3 * MB)
    writer.write(2 * MB, job)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 4 * MB + 5)


def test_a_segment_that_was_begun_is_not_removed_for_want_of_room(
    tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / f"{SECOND}.partial"
    path.write_bytes(DATA[:5000])
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB + 5000)
    disk.failing["posix_fallocate"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(writer.lsn, [memoryview(DATA)[5000:6000]])
    assert path.read_bytes()[:5000] == DATA[:5000]
    disk.failing.clear()
    writer.write(writer.lsn, [memoryview(DATA)[5000:6000]])
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 2 * MB + 6000)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_was_not_written_is_written_later(tmp_path: Path, disk: Disk, number: int) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: MB // 2], 1000)
    writer.write(2 * MB, job[:100])
    disk.failing["pwritev"] = number
    with pytest.raises(OSError, match=os.strerror(number)):
        writer.write(2 * MB, job)
    assert writer.lsn == 2 * MB + 100_000
    disk.failing.clear()
    writer.write(2 * MB, job)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 2 * MB + MB // 2)


def test_a_file_that_may_not_become_longer(tmp_path: Path) -> None:
    """The operating system itself says so."""
    (tmp_path / f"{SECOND}.partial").write_bytes(bytes(MB))
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    job = pieces(DATA[: MB + 10], MB // 8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.write(2 * MB, job)
        assert writer.lsn == 2 * MB + MB // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB, limits[1]))
        writer.write(2 * MB, job[:-1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.write(2 * MB, job)
        assert files(tmp_path) == expected_files(2 * MB, 3 * MB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(2 * MB, job)
    writer.close()
    assert files(tmp_path) == expected_files(2 * MB, 3 * MB + 10)


# --- What cannot -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fdatasync", "rename", "fsync ."])
def test_a_full_segment_that_cannot_be_brought_to_disk_is_the_end(
    tmp_path: Path, disk: Disk, call: str
) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [memoryview(DATA)[:1000]])
    disk.failing[call] = errno.EIO
    with pytest.raises(SyncError) as caught:
        writer.write(2 * MB, [memoryview(DATA)[: MB + 1000]])
    if call == "fsync .":
        assert str(caught.value) == f'could not fsync file "{tmp_path}": Input/output error'
    else:
        assert str(tmp_path / f"{SECOND}.partial") in str(caught.value)
        assert str(caught.value).endswith('": Input/output error')
        assert [path.name for path in tmp_path.iterdir()] == [f"{SECOND}.partial"]
    # Nobody is told that there is one more segment, and nothing goes on behind it.
    assert writer.completed == []
    assert not [call for call in disk.calls if THIRD in call]
    writer.close()


@pytest.mark.parametrize("call", [f"fsync {SECOND}", "fsync ."])
def test_a_new_segment_that_cannot_be_brought_to_disk_is_the_end(
    tmp_path: Path, disk: Disk, call: str
) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    disk.failing[call] = errno.EIO
    with pytest.raises(SyncError, match="could not fsync file"):
        writer.write(2 * MB, [memoryview(DATA)[:1000]])
    assert files(tmp_path) == {}
    writer.close()


def test_a_sync_that_fails_is_told(tmp_path: Path, disk: Disk) -> None:
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [memoryview(DATA)[:1000]])
    disk.failing["fdatasync"] = errno.ENOSPC
    with pytest.raises(SyncError) as caught:
        writer.sync()
    assert not isinstance(caught.value, OSError)
    path = tmp_path / f"{SECOND}.partial"
    assert str(caught.value) == f'could not fsync file "{path}": No space left on device'
    writer.close()


def test_a_file_that_cannot_be_closed_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system over a network may find only then."""
    writer = SegmentWriter(tmp_path, 1, MB, 2 * MB)
    writer.write(2 * MB, [memoryview(DATA)[:1000]])
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        with pytest.raises(SyncError, match="Input/output error"):
            writer.write(2 * MB, [memoryview(DATA)[:MB]])
    assert [path.name for path in tmp_path.iterdir()] == [f"{SECOND}.partial"]
    assert writer.completed == []


# --- Histories -------------------------------------------------------------------------------

OLD = b"1\t0/2000000\tno recovery target specified\n"
NEW = b"1\t0/2500000\tno recovery target specified\n"


def test_a_history_is_on_disk_before_it_has_its_name(tmp_path: Path, disk: Disk) -> None:
    store_history(tmp_path, 0x1F, OLD)
    assert files(tmp_path) == {"0000001F.history": OLD}
    temporary = "0000001F.history.tmp"
    assert [call for call in disk.calls if call != "open ."] == [
        f"open {temporary}",
        f"fsync {temporary}",
        f"rename {temporary}",
        "fsync .",
    ]
    assert disk.unsynced == set()
    store_history(tmp_path, 0x1F, NEW)
    store_history(tmp_path, 2, b"")
    assert files(tmp_path) == {"0000001F.history": NEW, "00000002.history": b""}
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]


@pytest.mark.parametrize("call", ["open 0", "fsync 0", "rename"])
def test_until_a_history_is_whole_the_old_one_stays(tmp_path: Path, disk: Disk, call: str) -> None:
    store_history(tmp_path, 2, OLD)
    disk.failing[call] = errno.EIO
    with pytest.raises(SyncError if "fsync" in call else OSError, match="Input/output error"):
        store_history(tmp_path, 2, NEW)
    assert (tmp_path / "00000002.history").read_bytes() == OLD
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]
    # What a crash has left behind does not matter.
    (tmp_path / "00000002.history.tmp").write_bytes(OLD * 9)
    disk.failing.clear()
    store_history(tmp_path, 2, NEW)
    assert files(tmp_path) == {"00000002.history": NEW}


def test_a_history_for_which_there_is_no_room_can_be_written_later(tmp_path: Path) -> None:
    store_history(tmp_path, 2, OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            store_history(tmp_path, 2, NEW * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "00000002.history").read_bytes() == OLD
    store_history(tmp_path, 2, NEW * 1000)
    assert files(tmp_path) == {"00000002.history": NEW * 1000}
