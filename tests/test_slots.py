"""Slots: who may use which, and what is on disk when a creation or a removal is confirmed."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred

from tests.slots_fakes import Breaking, Session, Setting, breaking, failure, without_directory
from tests.threads_fakes import AtOnce
from walproto.errors import (
    DuplicateObject,
    InvalidName,
    NameTooLong,
    ObjectInUse,
    ReportedError,
)
from walproto.timeline.slots import SlotOptions, Slots
from walproto.wal.writer import SyncError


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    directory = tmp_path / "wal"
    directory.mkdir()
    return Setting(directory)


# --- Names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "_", "pg_receivewal_4711", "x" * 63])
def test_a_name_that_may_be(setting: Setting, name: str) -> None:
    setting.slots.check_new(name)
    setting.create(name)
    assert list(setting.on_disk()) == [name]


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("", InvalidName, "is too short"),
        ("x" * 64, NameTooLong, "is too long"),
        ("X" * 64, NameTooLong, "is too long"),
        ("\u00e4" * 32, NameTooLong, "is too long"),
        ("\udce4" * 64, NameTooLong, "is too long"),
        *((name, InvalidName, "contains invalid character") for name in ("Foo Bar", "a-b", "a\n")),
        *((name, InvalidName, "contains invalid character") for name in ("\u00e4", "\u0664", "\0")),
    ],
)
def test_a_name_that_may_not_be(
    setting: Setting, name: str, kind: type[ReportedError], what: str
) -> None:
    with pytest.raises(kind) as caught:
        setting.slots.check_new(name)
    assert caught.value.message == f'replication slot name "{name}" {what}'
    hint = "Replication slot names may only contain lower case letters, numbers, and the "
    assert caught.value.hint == (hint + "underscore character." if "invalid" in what else None)


def test_a_name_that_there_is(setting: Setting) -> None:
    setting.slots.create("t", setting.one, temporary=True)
    setting.slots.create("p", setting.one)  # not on disk as yet
    for name in ("t", "p"):
        with pytest.raises(DuplicateObject) as caught:
            setting.slots.check_new(name)
        assert caught.value.message == f'replication slot "{name}" already exists'


# --- Created ---------------------------------------------------------------------------------


def test_a_slot_is_on_disk_when_its_creation_is_confirmed(setting: Setting) -> None:
    slots, threads = setting.slots, setting.threads
    done = slots.create("s", setting.one, restart_lsn=500)
    setting.is_active("s", 101)
    slots.clean_up(setting.one)  # the session that wants it is gone; it is made all the same
    setting.is_active("s", 101)
    threads.begin()
    assert not done.called
    assert setting.on_disk() == {"s": 500}
    threads.finish()
    assert done.called
    assert slots.acquire("s", setting.two).restart_lsn == 500
    (restored,) = setting.restart()
    assert (restored.name, restored.restart_lsn, restored.holder) == ("s", 500, None)
    assert not restored.is_temporary
    assert not restored.is_changing


def test_those_that_come_while_it_is_saved_are_saved_together(setting: Setting) -> None:
    first = setting.slots.create("a", setting.one)
    setting.threads.begin()
    others = [setting.slots.create(name, setting.two) for name in "bc"]
    setting.threads.finish()
    assert first.called
    assert not any(other.called for other in others)
    assert setting.on_disk() == {"a": 0}
    assert setting.threads.work_all() == 1
    assert all(other.called for other in others)
    assert setting.on_disk() == {"a": 0, "b": 0, "c": 0}
    # So are those that follow upon a save.
    for name in "abc":
        setting.slots.save().addCallback(
            lambda _, name: setting.slots.create(name, setting.one), name * 2
        )
    setting.threads.work()
    assert setting.threads.work_all() == 2
    assert len(setting.on_disk()) == 6


@breaking
def test_a_creation_that_fails_leaves_none(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, breaks: Breaking
) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("a")
    done = slots.create("s", setting.one)
    waiting = slots.when_released("s")
    mend = breaks(setting, monkeypatch)
    threads.begin()
    mend()
    assert not waiting.called
    threads.finish()
    assert isinstance(failure(done), (OSError, SyncError))
    assert waiting.called
    setting.is_gone("s")
    # Nobody knows whether it is on disk; so it is saved that it is not.
    assert not slots.is_saved(1)
    slots.save()
    threads.work_all()
    assert slots.is_saved(1)
    assert setting.on_disk() == {"a": 0}
    setting.create("s")
    assert setting.on_disk() == {"a": 0, "s": 0}


def test_some_fail_and_those_behind_them_do_not(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes while that is done which fails, is saved for itself."""
    bad = setting.slots.create("bad", setting.one)
    mend = without_directory(setting, monkeypatch)
    setting.threads.begin()
    good = setting.slots.create("good", setting.two)
    mend()
    setting.threads.finish()
    assert isinstance(failure(bad), FileNotFoundError)
    setting.threads.work_all()
    assert good.called
    assert setting.on_disk() == {"good": 0}


def test_as_many_as_there_may_be(tmp_path: Path) -> None:
    slots = Slots(tmp_path, AtOnce(), SlotOptions(max_replication_slots=3))
    session = Session(slots, 1)
    for name in "abc":
        assert not slots.is_full
        assert slots.create(name, session, temporary=name == "b").called
    assert slots.is_full
    assert len(slots) == 3
    slots.clean_up(session)
    assert [slot.name for slot in slots] == ["a", "c"]
    assert not slots.is_full


def test_a_temporary_slot_is_its_sessions_and_never_on_disk(setting: Setting) -> None:
    slots = setting.slots
    assert slots.create("t", setting.one, restart_lsn=700, temporary=True).called
    setting.create("p")
    assert setting.on_disk() == {"p": 0}
    slot = slots.acquire("t", setting.one)
    waiting = slots.when_released("t")
    slots.release(slot)
    assert not waiting.called
    with pytest.raises(ObjectInUse, match='"t" is active for PID 101'):
        slots.acquire("t", setting.two)
    assert slots.restart_lsn == 700
    slots.clean_up(setting.one)
    assert waiting.called
    setting.is_gone("t")
    assert slots.restart_lsn is None


# --- Used ------------------------------------------------------------------------------------


def test_a_slot_is_used_by_one_session_at_a_time(setting: Setting) -> None:
    slots = setting.slots
    setting.create("s")
    slot = slots.acquire("s", setting.one)
    assert slots.acquire("s", setting.one) is slot
    with pytest.raises(ObjectInUse, match='replication slot "s" is active for PID 101'):
        slots.acquire("s", setting.two)
    slots.release(slot)
    assert slots.acquire("s", setting.two) is slot
    slots.clean_up(setting.one)
    assert slot.holder is setting.two
    slots.clean_up(setting.two)
    assert slot.holder is None


def test_those_who_wait_are_told_and_the_first_has_it(setting: Setting) -> None:
    """Whoever then finds that it is held again, waits again; a third does not wait any more."""
    slots, one = setting.slots, setting.one
    setting.create("s")
    slot = slots.acquire("s", one)
    others = [Session(slots, pid) for pid in (7, 8, 9)]
    had: list[int] = []

    def acquire(result: None, session: Session) -> Deferred[None] | None:
        try:
            slots.acquire("s", session)
        except ObjectInUse:
            return slots.when_released("s").addCallback(acquire, session)
        had.append(session.pid)
        return None

    waiting = [slots.when_released("s").addCallback(acquire, session) for session in others]
    waiting[1].cancel()
    assert isinstance(failure(waiting[1]), CancelledError)
    slots.release(slot)
    assert had == [7]
    slots.release(slot)
    assert had == [7, 9]
    slots.release(slot)
    assert had == [7, 9]
    assert slots.when_released("s").called
    assert slots.when_released("nope").called


def test_what_a_session_holds_goes_with_it(setting: Setting) -> None:
    slots, one, two = setting.slots, setting.one, setting.two
    setting.create("p", "q", "going")
    for name in ("t", "u"):
        slots.create(name, one, temporary=True)
    slots.create("v", two, temporary=True)
    held = [slots.acquire("p", one), slots.acquire("q", two)]
    dropped = slots.drop(slots.acquire("going", one))
    waiting = slots.when_released("t")
    # Before that is done, somebody who has waited goes on, and it is asked for once more.
    waiting.addCallback(lambda _: slots.create("u2", two, temporary=True))
    waiting.addCallback(lambda _: slots.clean_up(one))
    slots.clean_up(one)
    assert waiting.result is None
    slots.clean_up(one)
    assert [slot.name for slot in slots] == ["p", "q", "going", "v", "u2"]
    assert [slot.holder for slot in held] == [None, two]
    setting.is_active("going", 101)
    setting.threads.work_all()
    assert dropped.called
    assert list(setting.on_disk()) == ["p", "q"]


# --- Dropped ---------------------------------------------------------------------------------


def test_a_slot_is_no_longer_on_disk_when_its_removal_is_confirmed(setting: Setting) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("a", "s", restart_lsn=500)
    slot = slots.acquire("s", setting.two)
    done = slots.drop(slot)
    slots.release(slot)  # whoever drops it, needs it until it is gone
    waiting = slots.when_released("s")
    setting.is_active("s", 102)
    with pytest.raises(DuplicateObject):
        slots.check_new("s")
    threads.begin()
    assert setting.on_disk() == {"a": 500}
    assert not done.called
    assert not waiting.called
    threads.finish()
    assert done.called
    assert waiting.called
    setting.is_gone("s")
    assert [slot.name for slot in setting.restart()] == ["a"]


def test_one_goes_while_another_comes(setting: Setting) -> None:
    """In one save; and one that goes and comes again under its name does in two."""
    slots, threads = setting.slots, setting.threads
    setting.create("a", "b")
    slots.save()
    threads.begin()
    going = slots.drop(slots.acquire("a", setting.one))
    coming = slots.create("c", setting.two)
    again = slots.when_released("a").addCallback(
        lambda _: slots.create("a", setting.two, restart_lsn=900)
    )
    threads.finish()
    assert setting.on_disk() == {"a": 0, "b": 0}
    threads.begin()
    assert setting.on_disk() == {"b": 0, "c": 0}
    assert not going.called
    threads.finish()
    assert going.called
    assert coming.called
    setting.is_active("a", 102)
    assert threads.work_all() == 1
    assert again.result is None
    assert setting.on_disk() == {"b": 0, "c": 0, "a": 900}


@breaking
def test_a_removal_that_fails_leaves_the_slot(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, breaks: Breaking
) -> None:
    slots, threads = setting.slots, setting.threads
    setting.create("s", restart_lsn=500)
    setting.create("unreserved")
    done = [slots.drop(slots.acquire(name, setting.one)) for name in ("s", "unreserved")]
    waiting = slots.when_released("s")
    mend = breaks(setting, monkeypatch)
    threads.work_all()
    mend()
    assert all(isinstance(failure(one), (OSError, SyncError)) for one in done)
    assert waiting.called
    assert slots.restart_lsn == 500
    slot = slots.acquire("s", setting.two)
    # Perhaps it is on disk no longer; so it is saved that it is.
    assert not slots.is_saved(1)
    slots.save()
    threads.work_all()
    assert slots.is_saved(1)
    assert setting.on_disk() == {"s": 500, "unreserved": 0}
    done = [slots.drop(slot)]
    threads.work_all()
    assert done[0].called
    assert setting.on_disk() == {"unreserved": 0}


def test_a_temporary_slot_is_dropped_at_once(setting: Setting) -> None:
    slots = setting.slots
    slots.create("t", setting.one, temporary=True)
    waiting = slots.when_released("t")
    assert slots.drop(slots.acquire("t", setting.one)).called
    assert waiting.called
    setting.is_gone("t")
    assert not setting.threads.is_busy


def test_what_is_done_the_moment_a_command_is_confirmed(tmp_path: Path) -> None:
    """A client sends its next command without waiting; everything happens within everything."""
    slots = Slots(tmp_path, AtOnce())
    one, two = Session(slots, 1), Session(slots, 2)
    done: list[str] = []

    def create(name: str, session: Session) -> Deferred[None]:
        slots.check_new(name)
        return slots.create(name, session).addCallback(lambda _: done.append(f"create {name}"))

    def drop(name: str, session: Session) -> Deferred[None]:
        slot = slots.acquire(name, session)
        return slots.drop(slot).addCallback(lambda _: done.append(f"drop {name}"))

    begun = create("a", one)
    begun.addCallback(lambda _: drop("a", one)).addCallback(lambda _: create("a", one))
    begun.addCallback(lambda _: create("b", two)).addCallback(lambda _: drop("a", two))
    assert done == ["create a", "drop a", "create a", "create b", "drop a"]
    assert begun.result is None
    assert [slot.name for slot in Slots(tmp_path, AtOnce())] == ["b"]
