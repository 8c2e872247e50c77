"""Old WAL is removed when it is on disk how far, and some of it at a time."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk import Disk
from tests.retained import FIRST, LAST, Make, cannot_save, making, name_of, removed
from tests.wal_builder import MB
from walproto.timeline import retention
from walproto.timeline.retention import INTERVAL
from walproto.timeline.slot_file import DAMAGED, NAME, read_slots


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Make]:
    directory = tmp_path / "wal"
    directory.mkdir()
    with making(directory) as make:
        yield make


# --- Removed when it is saved how far ------------------------------------------------------------


def test_how_far_it_goes_is_on_disk_before_anything_is_removed(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    away = one.slot("away", 103 * MB)
    seen: list[int] = []
    one.clock.advance(INTERVAL)
    while one.threads.waiting:
        before = read_slots(one.path).removed_to
        first = one.there()[0]
        one.threads.work()
        if one.there()[0] > first:
            seen.append(before)
        one.slots.confirm(away, 107 * MB)
    assert seen == [103 * MB]
    assert one.look()[0] == 107
    one.restart(wal_keep_size=0)
    assert [slot.restart_lsn for slot in one.slots] == [107 * MB]


@pytest.mark.parametrize("name", ["open walproto.slots.tmp", "rename walproto.slots", "fsync ."])
def test_if_that_cannot_be_saved_nothing_is_removed(
    kept: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And what is there may be read from."""
    one = kept(wal_keep_size=0)
    away = one.slot("away", 103 * MB)
    assert one.look()[0] == 103
    one.log.lines()
    disk = Disk(one.path, monkeypatch)
    one.slots.confirm(away, 108 * MB)
    one.clock.advance(INTERVAL)
    one.threads.work()  # the position is saved
    assert one.slots.kept_from == 108 * MB
    disk.failing = {name: errno.EIO}
    one.threads.work_all()
    for _ in range(2):
        assert one.slots.kept_from == 103 * MB
        assert one.look()[0] == 103
    if name == "fsync .":
        problem = f'could not fsync file "{one.path}": Input/output error'
    else:
        problem = "Input/output error"
    assert one.log.lines() == [cannot_save(one, problem)]
    disk.failing = {}
    assert one.look()[0] == 108
    # If it comes again, it is told again.
    one.log.lines()
    one.slots.confirm(away, 109 * MB)
    disk.failing = {name: errno.EIO}
    assert one.look()[0] == 108
    assert one.log.lines() == [cannot_save(one, problem)]


def test_what_was_saved_for_the_last_time_is_not_told_of(kept: Make) -> None:
    """At the end nothing is removed, for it cannot be said any more how far."""
    one = kept(wal_keep_size=0)
    one.slots.stop()
    one.threads.work_all()
    for _ in range(2):
        assert one.look()[0] == FIRST
    assert one.log.lines() == []


@pytest.mark.parametrize("is_wrong", [False, True])
def test_as_long_as_slots_may_be_missing_nothing_is_removed(kept: Make, is_wrong: bool) -> None:
    """Those that were in a file that was damaged; until somebody takes away what is left of it."""
    one = kept(wal_keep_size=0, max_slot_wal_keep_size=4 * MB)
    away = one.slot("away", 103 * MB)
    damaged = one.path / DAMAGED
    if is_wrong:
        one.slots.save()
        one.threads.work_all()
        (one.path / NAME).write_bytes((one.path / NAME).read_bytes()[:-9])
        one.restart(wal_keep_size=0)
        (told,) = [line for line in one.log.lines() if line.startswith("critical")]
        assert 'slot "away", it seems' in told
        assert len(one.slots) == 0
    else:
        damaged.touch()
    for _ in range(3):
        assert one.look()[0] == FIRST
    assert one.slots.kept_from == 0
    assert one.slots.is_saved(MB)
    assert read_slots(one.path).removed_to == 0
    assert one.log.lines() == [
        f"critical: no WAL is removed as long as {damaged} is there: slots were lost"
    ]
    if is_wrong:
        one.slot("away", 103 * MB)
    assert not away.invalidated
    damaged.unlink()
    assert one.look()[0] == (103 if is_wrong else 109)
    assert is_wrong or away.invalidated


# --- In batches ----------------------------------------------------------------------------------


def test_much_is_removed_in_batches(kept: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone for good before the next; in between others may want the disk."""
    monkeypatch.setattr(retention, "BATCH", 4)
    one = kept(wal_keep_size=0)
    disk = Disk(one.path, monkeypatch)
    one.clock.advance(INTERVAL)
    firsts = []
    while one.threads.waiting:
        assert one.threads.waiting == 1
        one.threads.work()
        firsts.append(one.there()[0])
    assert firsts == [100, 100, 104, 108, 109]  # first it is saved, and seen what there is
    oldest = f"0/{109 * MB:X}"
    assert one.log.lines() == [
        removed(first, last, oldest, "wal_keep_size")
        for first, last in ((100, 103), (104, 107), (108, 108))
    ]
    done = [call for call in disk.calls if call.startswith(("unlink 0", "fsync ."))]
    batches = ((100, 101, 102, 103), (104, 105, 106, 107), (108,))
    removals = [[*(f"unlink {name_of(segno)}" for segno in batch), "fsync ."] for batch in batches]
    assert done == ["fsync .", *itertools.chain(*removals)]


def test_a_batch_that_fails_is_the_last(kept: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 4)
    one = kept(wal_keep_size=0)
    disk = Disk(one.path, monkeypatch)
    disk.failing = {f"unlink {name_of(105)}": errno.EPERM}
    assert one.look()[0] == 105
    oldest = f"0/{109 * MB:X}"
    assert one.log.lines() == [
        removed(100, 103, oldest, "wal_keep_size"),
        removed(104, 104, oldest, "wal_keep_size"),
        f"critical: cannot remove old WAL: {one.path / name_of(105)}: Operation not permitted: "
        "trying again",
    ]
    assert disk.calls.count(f"unlink {name_of(106)}") == 0
    disk.failing = {}
    assert one.look()[0] == 109


def test_a_directory_that_cannot_be_listed(kept: Make) -> None:
    """That is told once, and if it comes again, again."""
    one = kept(wal_keep_size=0)
    elsewhere = one.path.with_name("elsewhere")
    for first, last in ((100, 108), (109, 112)):
        told = []
        for _ in range(2):
            one.clock.advance(INTERVAL)
            one.threads.work()
            one.path.rename(elsewhere)
            one.threads.work()
            assert not one.threads.is_busy
            elsewhere.rename(one.path)
            told += one.log.lines()
        assert told == [
            f"critical: cannot remove old WAL: {one.path}: No such file or directory: trying again"
        ]
        assert one.look()[0] == last + 1
        oldest = f"0/{(last + 1) * MB:X}"
        assert one.log.lines() == [removed(first, last, oldest, "wal_keep_size")]
        one.come(LAST)
