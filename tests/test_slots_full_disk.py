"""Slots are saved on a disk that is full, so that WAL can be removed there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk import Disk, files
from tests.retained import cannot_save, making, removed
from tests.small_disk import SmallDisk, small_disk
from tests.wal_builder import MB
from walproto.timeline.slot_file import (
    NAME,
    SPARE,
    SPARE_SIZE,
    SlotFile,
    SlotState,
    read_slots,
    write_slots,
)

NO_ROOM = os.strerror(errno.ENOSPC)
MANY = [SlotState(f"{number:063}", 2**64 - 1, 2**64 - 1, 2**64 - 1) for number in range(1000)]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, "1m") as disk:
        yield disk


def test_the_room_that_is_set_aside_is_given_up(small: SmallDisk) -> None:
    """It is enough for any file there may be; and set aside again when there is room again."""
    directory = small.directory
    write_slots(directory, [])
    spare = directory / SPARE
    assert spare.stat().st_size == SPARE_SIZE
    assert spare.stat().st_blocks * 512 >= SPARE_SIZE  # it takes them
    small.fill()
    write_slots(directory, MANY, 1)
    assert read_slots(directory) == SlotFile(MANY, 1)
    assert not spare.exists()
    small.make_room()
    write_slots(directory, MANY[1:], 2)
    assert spare.stat().st_blocks * 512 >= SPARE_SIZE
    small.fill()
    write_slots(directory, MANY[2:], 3)
    assert read_slots(directory) == SlotFile(MANY[2:], 3)


def test_when_that_is_taken_too_it_cannot_be_saved(small: SmallDisk) -> None:
    """What was there before, still is."""
    directory = small.directory
    write_slots(directory, MANY[:1], 1)
    small.fill()
    write_slots(directory, MANY, 2)
    assert not (directory / SPARE).exists()
    small.fill()
    with pytest.raises(OSError, match=NO_ROOM):
        write_slots(directory, MANY, 3)
    assert read_slots(directory) == SlotFile(MANY, 2)
    small.make_room()
    write_slots(directory, MANY, 4)
    assert read_slots(directory) == SlotFile(MANY, 4)
    assert (directory / SPARE).exists()


def test_wal_is_removed_from_a_full_disk(tmp_path: Path) -> None:
    """As soon as a replica no longer needs it; which makes room for the rest."""
    with small_disk(tmp_path, "12m") as disk, making(disk.directory) as make:
        one = make(wal_keep_size=0)
        away = one.slot("away", 103 * MB)
        assert one.look()[0] == 103
        one.slots.confirm(away, 105 * MB)
        disk.fill()
        assert one.look()[0] == 105
        one.look()
        assert one.log.lines() == [
            removed(100, 102, f"0/{103 * MB:X}", 'replication slot "away"'),
            removed(103, 104, f"0/{105 * MB:X}", 'replication slot "away"'),
        ]
        # For the next time there is room again.
        one.slots.confirm(away, 106 * MB)
        one.look()
        assert (disk.directory / SPARE).stat().st_size == SPARE_SIZE
        # Without that it would not do.
        one.log.lines()
        (disk.directory / SPARE).unlink()
        disk.fill()
        one.slots.confirm(away, 108 * MB)
        for _ in range(2):
            assert one.look()[0] == 106
        assert one.log.lines() == [cannot_save(one, NO_ROOM)]
        disk.make_room()
        assert one.look()[0] == 108


# --- Where no disk is full -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_spare_file_is_given_up_for_want_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_slots(tmp_path, MANY[:1])
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {f"open {NAME}.tmp": number}
    unlink = os.unlink

    def making_room(path: Path) -> None:
        unlink(path)
        disk.failing.clear()
        disk.room = 0

    monkeypatch.setattr(os, "unlink", making_room)
    write_slots(tmp_path, MANY[:2], 5)
    # There is no room to be set aside then; and no file that would seem to.
    assert read_slots(tmp_path) == SlotFile(MANY[:2], 5)
    assert list(files(tmp_path)) == [NAME]
    assert disk.calls[:3] == [f"open {NAME}.tmp", f"unlink {SPARE}", f"open {NAME}.tmp"]


@pytest.mark.parametrize(
    ("number", "is_given_up"),
    [
        *((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EACCES, False)),
        (errno.EROFS, False),
    ],
)
def test_if_it_is_no_matter_of_room_or_not_enough_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_given_up: bool
) -> None:
    write_slots(tmp_path, MANY[:1])
    before = files(tmp_path)
    disk = Disk(tmp_path, monkeypatch)
    disk.failing = {f"open {NAME}.tmp": number}
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(number)):
            write_slots(tmp_path, MANY[:2])
        if is_given_up:
            before.pop(SPARE, None)
        assert files(tmp_path) == before
    disk.failing.clear()
    write_slots(tmp_path, MANY[:2])
    assert set(files(tmp_path)) == {NAME, SPARE}


def test_a_spare_file_that_a_crash_has_left_empty_is_filled(tmp_path: Path) -> None:
    (tmp_path / SPARE).touch()
    write_slots(tmp_path, [])
    assert (tmp_path / SPARE).stat().st_blocks * 512 >= SPARE_SIZE


def test_a_spare_file_that_cannot_be_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    for failing in (f"open {SPARE}", f"posix_fallocate {SPARE}"):
        disk.failing = {failing: errno.EOPNOTSUPP}
        write_slots(tmp_path, MANY[:3])
        assert read_slots(tmp_path) == SlotFile(MANY[:3])
        assert list(files(tmp_path)) == [NAME]
