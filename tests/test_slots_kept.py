"""Slots: from where they keep WAL, and what happens when they keep too much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.logger import capturedLogs

from tests.slots_fakes import Setting
from tests.upstream_fakes import Logged
from walproto.errors import ObjectInUse, ObjectNotInPrerequisiteState


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    directory = tmp_path / "wal"
    directory.mkdir()
    return Setting(directory)


@pytest.fixture
def logged() -> Iterator[Logged]:
    with capturedLogs() as events:
        yield Logged(events)


# --- How far replicas are --------------------------------------------------------------------


def test_wal_is_kept_from_where_the_replica_has_it_on_disk(setting: Setting) -> None:
    """Also when that is further back than it was; but none can be kept that is gone."""
    slots = setting.slots
    setting.create("s")
    slot = slots.acquire("s", setting.one)
    assert slots.restart_lsn is None
    for flush_lsn, restart_lsn in [(1000, 1000), (3000, 3000), (2000, 2000), (4000, 4000)]:
        slots.confirm(slot, flush_lsn)
        assert slots.restart_lsn == slot.restart_lsn == restart_lsn
    slots.keep_from(2500)
    slots.keep_from(2400)  # what is gone does not come back
    assert slots.restart_lsn == 4000
    slots.confirm(slot, 2600)
    assert slots.restart_lsn == 2600
    slots.confirm(slot, 2450)
    assert slots.restart_lsn == 2500


def test_a_new_slot_reserves_nothing_that_is_gone(setting: Setting) -> None:
    setting.slots.keep_from(2500)
    setting.create("below", restart_lsn=2499)
    setting.create("above", restart_lsn=2501)
    setting.create("none")
    assert setting.on_disk() == {"below": 2500, "above": 2501, "none": 0}


def test_the_slot_that_is_behind_all_others_counts(setting: Setting) -> None:
    slots = setting.slots
    setting.create("none")
    setting.create("a", restart_lsn=3000)
    slots.create("t", setting.one, restart_lsn=2000, temporary=True)
    assert slots.restart_lsn == 2000
    slots.clean_up(setting.one)
    assert slots.restart_lsn == 3000
    # One that is being made counts, and one that is being dropped still does.
    slots.create("b", setting.one, restart_lsn=1000)
    assert slots.restart_lsn == 1000
    setting.threads.work_all()
    slots.drop(slots.acquire("b", setting.one))
    setting.threads.begin()
    assert slots.restart_lsn == 1000
    setting.threads.finish()
    assert slots.restart_lsn == 3000


def test_the_oldest_transactions_that_any_slot_needs(setting: Setting) -> None:
    slots = setting.slots
    assert slots.oldest_xmins() == (0, 0)
    for name, xmin, catalog_xmin in [("a", 0, 0), ("b", 900, 0), ("c", 800, 70), ("d", 850, 60)]:
        setting.create(name, restart_lsn=1000 if name == "c" else 2000)
        slot = slots.acquire(name, setting.one)
        slot.xmin, slot.catalog_xmin = xmin, catalog_xmin
    assert slots.oldest_xmins() == (800, 60)
    # A replica that can never come back holds no server's vacuum up.
    slots.invalidate_before(2000)
    assert slots.oldest_xmins() == (850, 60)


# --- WAL goes --------------------------------------------------------------------------------


def test_slots_that_keep_too_much_are_invalidated(setting: Setting, logged: Logged) -> None:
    slots, one, two = setting.slots, setting.one, setting.two
    for name, restart_lsn in [("none", 0), ("idle", 0x1_00000010), ("used", 1999), ("at", 2000)]:
        setting.create(name, restart_lsn=restart_lsn)
    slots.create("t", two, restart_lsn=1500, temporary=True)
    used = slots.acquire("used", one)
    slots.acquire("at", two)
    assert not slots.invalidate_before(1500)
    assert logged.lines() == []
    assert slots.invalidate_before(2000)
    advice = (
        "its replica has to be made anew; increase max_slot_wal_keep_size for replicas that are "
        "away longer"
    )
    assert logged.lines() == [
        'warn: invalidating obsolete replication slot "used": its restart_lsn 0/7CF exceeds the '
        f"limit by 1 bytes: {advice}",
        'warn: invalidating obsolete replication slot "t": its restart_lsn 0/5DC exceeds the '
        f"limit by 500 bytes: {advice}",
        'warn: terminating process 101 to release replication slot "used"',
        'warn: terminating process 102 to release replication slot "t"',
    ]
    assert (one.terminated, two.terminated) == (1, 1)
    assert slots.get("t") is None
    assert used.holder is None
    assert slots.restart_lsn == 2000
    slots.confirm(used, 5000)  # what was still on its way
    assert used.restart_lsn == 0
    assert not slots.invalidate_before(2000)
    assert slots.invalidate_before(0x1_00000011)
    assert [slot.name for slot in slots if slot.invalidated] == ["idle", "used", "at"]


def test_a_slot_that_is_invalidated_can_only_be_dropped(setting: Setting) -> None:
    slots = setting.slots
    setting.create("s", restart_lsn=500)
    assert slots.invalidate_before(501)
    with pytest.raises(ObjectNotInPrerequisiteState) as caught:
        slots.acquire("s", setting.one)
    assert caught.value.message == 'can no longer access replication slot "s"'
    assert caught.value.detail == (
        'This replication slot has been invalidated due to "wal_removed".'
    )
    slot = slots.acquire("s", setting.one, invalidated_too=True)
    # That it is in use comes first, as PostgreSQL has it.
    with pytest.raises(ObjectInUse):
        slots.acquire("s", setting.two)
    done = slots.drop(slot)
    setting.threads.work_all()
    assert done.called
    assert setting.on_disk() == {}


def test_a_session_that_creates_or_drops_a_slot_is_not_ended(setting: Setting) -> None:
    """It is done with it soon; that it was in vain, is told to whoever uses it next."""
    slots = setting.slots
    setting.create("going", restart_lsn=500)
    dropped = slots.drop(slots.acquire("going", setting.one))
    created = slots.create("coming", setting.two, restart_lsn=500)
    setting.threads.begin()
    assert slots.invalidate_before(501)
    assert (setting.one.terminated, setting.two.terminated) == (0, 0)
    setting.threads.finish()
    setting.threads.work_all()
    assert dropped.called
    assert created.called
    with pytest.raises(ObjectNotInPrerequisiteState):
        slots.acquire("coming", setting.one)
    setting.is_gone("going")


def test_whoever_waits_for_a_slot_that_is_taken_away_finds_all_taken_away(
    setting: Setting,
) -> None:
    slots = setting.slots
    setting.create("a", "b", restart_lsn=500)
    slots.acquire("a", setting.one)
    refused: list[str] = []

    def use(result: None) -> None:
        for name in ("a", "b"):
            with pytest.raises(ObjectNotInPrerequisiteState):
                slots.acquire(name, setting.two)
            refused.append(name)

    slots.when_released("a").addCallback(use)
    slots.invalidate_before(1000)
    assert refused == ["a", "b"]
    assert setting.two.terminated == 0
