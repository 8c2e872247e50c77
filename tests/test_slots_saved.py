"""Slots: what of them is on disk, and what a restart finds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.logger import capturedLogs

from tests.disk import Disk
from tests.slots_fakes import Breaking, Session, Setting, breaking, failure
from tests.threads_fakes import AtOnce
from tests.upstream_fakes import HeldThreads, Logged
from walproto.errors import AdminShutdown, ObjectNotInPrerequisiteState
from walproto.timeline.slot_file import DAMAGED, NAME, SlotFile, SlotState, read_slots, write_slots
from walproto.timeline.slots import SlotOptions, Slots, SlotsError
from walproto.wal.writer import SyncError


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    directory = tmp_path / "wal"
    directory.mkdir()
    return Setting(directory)


@pytest.fixture
def logged() -> Iterator[Logged]:
    with capturedLogs() as events:
        yield Logged(events)


# --- Saved -----------------------------------------------------------------------------------


def test_positions_are_saved_when_they_are_far_enough_from_those_on_disk(setting: Setting) -> None:
    slots, threads = setting.slots, setting.threads
    assert slots.is_saved(1000)
    setting.create("a", "b", restart_lsn=5000)
    slots.create("t", setting.one, restart_lsn=5000, temporary=True)
    assert slots.is_saved(1)
    slot = slots.acquire("a", setting.one)
    slots.confirm(slots.acquire("t", setting.one), 9000)
    assert slots.is_saved(1)
    for lsn, is_saved in [(5999, True), (6000, False), (5001, True), (4999, False), (7777, False)]:
        slots.confirm(slot, lsn)
        assert slots.is_saved(1000) == is_saved
        assert not slots.is_saved(1)
    saved = slots.save()
    slots.confirm(slot, 7900)
    threads.begin()
    slots.confirm(slot, 8000)
    assert not saved.called
    threads.finish()
    assert saved.called
    assert setting.on_disk() == {"a": 7777, "b": 5000}
    assert not slots.is_saved(1000)
    slots.confirm(slot, 7000)
    assert slots.is_saved(1000)


def test_a_slot_that_nobody_uses_is_saved_as_it_is(setting: Setting) -> None:
    """Nothing more comes of it that would have it saved."""
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=5000)
    slot = slots.acquire("s", setting.one)

    def is_saved_in_use_and_later() -> list[bool]:
        slot.holder = setting.one
        now = slots.is_saved(1000)
        slots.release(slot)
        later = slots.is_saved(1000)
        slots.save()
        threads.work_all()
        assert slots.is_saved(1000)
        return [now, later]

    assert is_saved_in_use_and_later() == [True, True]
    slots.confirm(slot, 5001)
    assert is_saved_in_use_and_later() == [True, False]
    # That there is an xmin matters at once, and which one it is, when nobody tells another.
    for xmin, catalog_xmin, now in [
        *((700, 0, False), (701, 0, True), (701, 650, False), (701, 651, True)),
        *((0, 651, False), (0, 0, False)),
    ]:
        slot.xmin, slot.catalog_xmin = xmin, catalog_xmin
        assert is_saved_in_use_and_later() == [now, False]
        (state,) = read_slots(setting.directory).slots
        assert state == SlotState("s", 5001, xmin, catalog_xmin)
    assert is_saved_in_use_and_later() == [True, True]
    slots.invalidate_before(6000)
    slot.holder = setting.one
    assert not slots.is_saved(1_000_000)  # however little of its position matters
    assert is_saved_in_use_and_later() == [False, False]


def test_a_slot_is_not_missed_before_it_is_there_nor_when_it_is_gone(setting: Setting) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=500)
    slots.create("new", setting.two, restart_lsn=500)
    for _ in range(2):
        assert slots.is_saved(1)
        threads.begin()
        assert slots.is_saved(1)
        threads.finish()
        assert slots.is_saved(1)
        if slots.get("s"):
            slots.drop(slots.acquire("s", setting.one))
    assert setting.on_disk() == {"new": 500}


@pytest.mark.parametrize("what", ["create", "drop"])
def test_what_nobody_waits_for_any_longer_is_not_left_on_disk(setting: Setting, what: str) -> None:
    """A creation or a removal that was cancelled, and is on disk nevertheless."""
    slots, threads = setting.slots, setting.threads
    setting.create("s")
    if what == "create":
        done = slots.create("new", setting.two)
    else:
        done = slots.drop(slots.acquire("s", setting.one))
    threads.begin()
    done.cancel()
    failure(done)
    threads.finish()
    assert [slot.name for slot in slots] == ["s"]
    assert setting.on_disk() != {"s": 0}
    assert not slots.is_saved(1)
    slots.save()
    threads.work_all()
    assert slots.is_saved(1)
    assert setting.on_disk() == {"s": 0}


@breaking
def test_what_was_not_saved_can_be_saved_later(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, breaks: Breaking
) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=500)
    slots.confirm(slots.acquire("s", setting.one), 900)
    saves = [slots.save() for _ in range(3)]
    mend = breaks(setting, monkeypatch)
    threads.begin()
    mend()
    threads.finish()
    assert isinstance(failure(saves[0]), (OSError, SyncError))
    assert threads.work_all() == 1
    assert all(save.result is None for save in saves[1:])
    assert setting.on_disk() == {"s": 900}


def test_when_it_stops_it_saves_for_the_last_time(setting: Setting) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=500)
    slot = slots.acquire("s", setting.one)
    slots.save()
    threads.begin()
    slots.confirm(slot, 700)
    last = slots.create("last", setting.two)
    stopped = slots.stop()
    threads.finish()
    assert not stopped.called
    assert threads.work_all() == 1
    assert stopped.called
    assert last.called
    slots.confirm(slot, 900)
    late = [slots.save(), slots.drop(slot), slots.create("late", setting.two)]
    for one in late:
        error = failure(one)
        assert isinstance(error, AdminShutdown)
        assert error.fatal
    assert not threads.is_busy
    assert setting.on_disk() == {"s": 700, "last": 0}
    assert [slot.name for slot in slots] == ["s", "last"]


def test_an_invalidation_that_was_saved_stays(setting: Setting) -> None:
    slots = setting.slots
    setting.create("s", "u", restart_lsn=500)
    slots.save()
    setting.threads.begin()  # as they were before
    slots.confirm(slots.acquire("u", setting.one), 1000)
    slots.invalidate_before(501)
    saved = slots.save()
    setting.threads.finish()
    assert not saved.called
    assert not slots.is_saved(1)
    setting.threads.work_all()
    assert saved.called
    assert slots.is_saved(1)
    restored = setting.restart()
    assert [(slot.restart_lsn, slot.invalidated) for slot in restored] == [
        (0, "wal_removed"),
        (1000, ""),
    ]
    with pytest.raises(ObjectNotInPrerequisiteState):
        restored.acquire("s", setting.one)


# --- Restored --------------------------------------------------------------------------------

STATES = [
    SlotState("a", 5000, 745, 700),
    SlotState("b", 0, invalidated="wal_removed"),
    SlotState("c", 0),
    SlotState("d", 2000),
]


def test_they_are_restored_as_they_were_saved(tmp_path: Path, logged: Logged) -> None:
    write_slots(tmp_path, STATES)
    slots = Slots(tmp_path, HeldThreads())
    assert [slot.state() for slot in slots] == STATES
    assert all(slot.holder is None for slot in slots)
    assert slots.oldest_xmins() == (745, 700)
    assert slots.restart_lsn == 2000
    assert slots.is_saved(1)
    assert logged.lines() == []


def test_what_is_restored_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote it may have been killed before the file, or its name, was synced."""
    write_slots(tmp_path, STATES)
    disk = Disk(tmp_path, monkeypatch)
    Slots(tmp_path, AtOnce())
    assert [call for call in disk.calls if "sync" in call] == [f"fsync {NAME}", "fsync ."]


def test_none_reserves_what_is_gone_or_was_about_to_be(tmp_path: Path) -> None:
    write_slots(tmp_path, STATES, 3000)
    slots = Slots(tmp_path, AtOnce())
    assert {slot.name: slot.restart_lsn for slot in slots} == {"a": 5000, "b": 0, "c": 0, "d": 3000}
    assert not slots.is_saved(100)
    # What is gone cannot be reserved from now on, either.
    session = Session(slots, 1)
    slots.create("e", session, restart_lsn=1000)
    slots.confirm(slots.acquire("a", session), 1000)
    assert {slot.name: slot.restart_lsn for slot in slots if slot.restart_lsn} == {
        "a": 3000,
        "d": 3000,
        "e": 3000,
    }
    assert read_slots(tmp_path).removed_to == 3000


def test_how_far_wal_is_removed_is_saved_with_them(setting: Setting) -> None:
    """And is never less than it was."""
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=5000)
    assert read_slots(setting.directory).removed_to == 0
    slots.keep_from(3000)
    assert read_slots(setting.directory).removed_to == 0
    saved = slots.save()
    slots.keep_from(4000)  # too late for that
    threads.work()
    assert saved.called
    assert read_slots(setting.directory).removed_to == 3000
    slots.keep_from(2000)
    slots.save()
    threads.work_all()
    restored = setting.restart()
    restored.save()
    threads.work_all()
    assert read_slots(setting.directory).removed_to == 4000
    (slot,) = restored
    restored.confirm(slot, 1000)
    assert slot.restart_lsn == 4000


def test_what_was_removed_of_other_wal_means_nothing(tmp_path: Path, logged: Logged) -> None:
    write_slots(tmp_path, STATES, removed_to=9000)
    slots = Slots(tmp_path, AtOnce())
    slots.look_at_end(9000)
    assert logged.lines() == []
    slots.look_at_end(8999)
    (told,) = logged.lines()
    assert "WAL had been removed up to 0/2328, but what is here ends at 0/2327: see" in told
    session = Session(slots, 1)
    slots.create("new", session, restart_lsn=100)
    new = slots.get("new")
    assert new is not None
    assert new.restart_lsn == 100


def test_more_than_there_may_be_is_an_error(tmp_path: Path) -> None:
    """None of them can be done without; it is for the operator to say which."""
    write_slots(tmp_path, STATES)
    before = (tmp_path / NAME).read_bytes()
    assert len(Slots(tmp_path, AtOnce(), SlotOptions(max_replication_slots=4))) == 4
    for at_most in (3, 0):
        with pytest.raises(SlotsError) as caught:
            Slots(tmp_path, AtOnce(), SlotOptions(max_replication_slots=at_most))
        assert str(caught.value) == (
            f"there are 4 replication slots in {tmp_path / NAME}, more than max_replication_slots, "
            f"which is {at_most}: increase that"
        )
    assert (tmp_path / NAME).read_bytes() == before


def test_a_damaged_file_is_told_of_and_mended(tmp_path: Path, logged: Logged) -> None:
    write_slots(tmp_path, STATES)
    damaged = (tmp_path / NAME).read_bytes().replace(b"0/7D0", b"0/8D0")
    (tmp_path / NAME).write_bytes(damaged)
    slots = Slots(tmp_path, AtOnce())
    assert [slot.state() for slot in slots] == STATES[:-1]
    assert logged.lines() == [
        f'critical: {tmp_path / NAME}: line 5 is damaged (slot "d", it seems); it holds 3 slots, '
        "where there should be 4: it is kept as walproto.slots.damaged, and no WAL is removed as "
        "long as that is there: see which slots are missing, and create them again"
    ]
    assert slots.is_damaged
    assert not slots.is_saved(1)
    assert slots.save().called
    assert slots.is_saved(1)
    assert read_slots(tmp_path) == SlotFile(STATES[:-1])
    assert (tmp_path / DAMAGED).read_bytes() == damaged
    # It is told once, but as long as nobody has taken it away, slots may be missing.
    slots = Slots(tmp_path, AtOnce())
    assert logged.lines() == []
    assert slots.is_damaged
    assert slots.is_saved(1)
    (tmp_path / DAMAGED).unlink()
    assert not slots.is_damaged


def test_a_file_that_cannot_be_read_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAME
    path.mkdir()
    (tmp_path / "file").touch()
    for directory, problem in (
        (tmp_path, f"{path}: Is a directory"),
        (tmp_path / "file", f"{tmp_path / 'file' / NAME}: Not a directory"),
    ):
        with pytest.raises(SlotsError) as caught:
            Slots(directory, AtOnce())
        assert str(caught.value) == problem
    path.rmdir()
    path.write_bytes(b"damaged")
    disk = Disk(tmp_path, monkeypatch)
    for call, number, problem in (
        (f"open {NAME}", errno.EIO, f"{path}: Input/output error"),
        (f"fsync {NAME}", errno.EIO, f'could not fsync file "{path}": Input/output error'),
        (f"fsync {DAMAGED}", errno.EIO, f'could not fsync file "{path}.damaged.tmp": Input/output'),
    ):
        disk.failing = {call: number}
        with pytest.raises(SlotsError) as caught:
            Slots(tmp_path, AtOnce())
        assert str(caught.value).startswith(problem)
        assert path.read_bytes() == b"damaged"
