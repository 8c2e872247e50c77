"""Which WAL is kept, and which slots are invalidated; time is a Clock, files are real."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from tests.disk import Disk
from tests.retained import (
    CURRENT,
    FIRST,
    LAST,
    WAL,
    Make,
    Session,
    cannot_save,
    making,
    name_of,
    names_in,
    put,
    removed,
)
from tests.upstream_fakes import HeldThreads
from tests.wal_builder import MB, WalBuilder
from walproto.timeline.directory import WalDirectory
from walproto.timeline.holding import examine
from walproto.timeline.received import Received
from walproto.timeline.retention import INTERVAL, Retention
from walproto.timeline.slots import SlotOptions, Slots
from walproto.wal.writer import SegmentWriter


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Make]:
    with making(tmp_path) as make:
        yield make


def test_without_a_size_nothing_is_ever_removed(kept: Make) -> None:
    one = kept(max_slot_wal_keep_size=0)
    slot = one.slot("away", FIRST * MB + 1)
    for segno in range(CURRENT, LAST + 1):
        one.come(segno)
        assert one.look() == list(range(FIRST, segno + 1))
    assert not slot.invalidated
    assert one.log.lines() == []


@pytest.mark.parametrize(
    ("size", "behind"),
    [(0, 1), (1, 1), (MB, 1), (MB + 1, 2), (3 * MB, 3), (9 * MB, 9), (10 * MB, 10), (2**50, 10)],
)
def test_so_much_is_kept(kept: Make, size: int, behind: int) -> None:
    """At least one whole segment; no more than there is."""
    one = kept(wal_keep_size=size)
    first = CURRENT - behind
    assert one.there() == list(range(FIRST, CURRENT + 1))
    assert one.look() == list(range(first, CURRENT + 1))
    told = [removed(FIRST, first - 1, f"0/{first * MB:X}", "wal_keep_size")] if behind < 10 else []
    assert one.log.lines() == told
    assert one.look() == list(range(first, CURRENT + 1))
    assert one.log.lines() == []
    one.come(CURRENT + 2)
    if size < 2**50:
        assert one.look() == list(range(first + 2, CURRENT + 3))
        oldest = f"0/{(first + 2) * MB:X}"
        assert one.log.lines() == [removed(first, first + 1, oldest, "wal_keep_size")]


def test_a_look_a_second(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    one.clock.advance(INTERVAL / 2)
    assert one.threads.waiting == 0
    one.clock.advance(INTERVAL / 2)
    assert one.threads.waiting == 1
    one.come(LAST)
    one.clock.advance(10 * INTERVAL)
    assert one.threads.waiting == 1  # one after the other
    one.threads.work_all()
    assert one.there()[0] == CURRENT - 1
    assert one.look()[0] == LAST - 1
    one.clock.advance(INTERVAL)
    assert one.threads.waiting == 0  # there is nothing to be done


def test_until_it_is_known_what_there_is_nothing_is_done(tmp_path: Path) -> None:
    put(tmp_path, *range(3, 9))
    clock, threads = Clock(), HeldThreads()
    timeline = WalDirectory(tmp_path, clock, Received())
    retention = Retention(timeline, Slots(tmp_path, threads, SlotOptions(10, 0)), clock, threads)
    retention.start()
    for _ in range(3):
        clock.advance(INTERVAL)
        assert threads.waiting == 0
    retention.stop()
    assert clock.getDelayedCalls() == []


def test_what_a_slot_reserves_is_kept(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    away = one.slot("away", 103 * MB + 5000)
    one.slot("near", 107 * MB)
    one.slot("unused")
    assert one.look()[0] == 103
    assert one.log.lines() == [
        removed(100, 102, f"0/{103 * MB + 5000:X}", 'replication slot "away"')
    ]
    one.slots.confirm(away, 104 * MB - 1)
    assert one.look()[0] == 103
    one.slots.confirm(away, 112 * MB)
    assert one.look()[0] == 107
    assert one.log.lines() == [removed(103, 106, f"0/{107 * MB:X}", 'replication slot "near"')]
    session = Session()
    one.slots.drop(one.slots.acquire("near", session))
    one.clock.advance(INTERVAL)
    assert one.there()[0] == 107  # it may still be there after a crash
    one.threads.work_all()
    assert one.look()[0] == CURRENT - 1


def test_a_temporary_slot_does_as_much(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    session = Session()
    one.slots.create("mine", session, restart_lsn=102 * MB, temporary=True)
    assert one.look()[0] == 102
    one.slots.clean_up(session)
    assert one.look()[0] == CURRENT - 1


def test_what_a_connected_replica_still_reads_is_kept(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    replica = one.replica(101 * MB)
    assert one.look()[0] == 101
    assert one.log.lines() == [removed(100, 100, f"0/{101 * MB:X}", str(replica))]
    replica.sent_lsn = 106 * MB - 1
    assert one.look()[0] == 105
    one.timeline.replicas.remove(replica)
    assert one.look()[0] == CURRENT - 1


def test_the_end_of_wal_at_the_end_of_a_segment(kept: Make) -> None:
    """The next one is not there yet; after a restart the end is known all the same."""
    wal = WalBuilder(start=FIRST * MB)
    wal.records_to(104 * MB + MB // 2, 60_000)
    wal.switch()
    one = kept(wal=wal, end=wal.lsn, wal_keep_size=0)
    one.slot("near", 104 * MB)
    assert one.look() == [104]
    one.restart(wal_keep_size=0)
    assert one.timeline.commit_lsn == 105 * MB
    assert [slot.restart_lsn for slot in one.slots] == [104 * MB]
    assert one.look() == [104]


# --- The bound -----------------------------------------------------------------------------------


def test_a_slot_that_keeps_too_much_is_invalidated(
    kept: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And just that one; which is on disk before any of its WAL goes."""
    one = kept(wal_keep_size=MB, max_slot_wal_keep_size=5 * MB)
    user = Session(41)
    used = one.slot("used", 103 * MB)
    idle = one.slot("idle", 105 * MB - 1)
    good = one.slot("good", 105 * MB)
    one.slots.acquire("used", user)
    disk = Disk(one.path, monkeypatch)
    assert one.look()[0] == 105
    assert [slot.invalidated for slot in (used, idle, good)] == ["wal_removed", "wal_removed", ""]
    assert [slot.restart_lsn for slot in (used, idle, good)] == [0, 0, 105 * MB]
    assert user.is_terminated
    lines = one.log.lines()
    assert [line.split(":")[0] for line in lines] == ["warn", "warn", "warn", "info"]
    assert 'obsolete replication slot "used": its restart_lsn 0/6700000' in lines[0]
    assert 'obsolete replication slot "idle": its restart_lsn 0/68FFFFF' in lines[1]
    assert 'terminating process 41 to release replication slot "used"' in lines[2]
    assert lines[3] == removed(100, 104, f"0/{105 * MB:X}", 'replication slot "good"')
    done = [call for call in disk.calls if not call.startswith("open 0")]
    stored = ["open walproto.slots.tmp", "fsync walproto.slots.tmp", "rename walproto.slots.tmp"]
    synced = ["open .", "fsync ."]
    saved = [*stored, *synced, "open walproto.slots.spare"]
    removal = [f"unlink {name_of(segno)}" for segno in range(100, 105)]
    assert done == [*saved, *saved, *removal, *synced]  # the second time, how far it will go
    one.restart()
    assert [slot.invalidated for slot in one.slots] == ["wal_removed", "wal_removed", ""]


def test_the_bound_does_not_matter_within_what_is_kept_anyway(kept: Make) -> None:
    one = kept(wal_keep_size=7 * MB, max_slot_wal_keep_size=2 * MB)
    one.slot("good", 103 * MB)
    bad = one.slot("bad", 103 * MB - 1)
    assert one.look()[0] == 103
    assert [slot.name for slot in one.slots if slot.invalidated] == ["bad"]
    one.slots.confirm(bad, 108 * MB)
    assert bad.restart_lsn == 0


def test_an_invalidation_that_cannot_be_saved(kept: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed until it can be, and it is told once."""
    one = kept(wal_keep_size=0, max_slot_wal_keep_size=5 * MB)
    one.slot("away", 101 * MB)
    disk = Disk(one.path, monkeypatch)
    disk.failing = {"open walproto.slots.tmp": errno.ENOSPC}
    for _ in range(4):
        assert one.look()[0] == FIRST
        assert one.threads.waiting == 0
    # Each time, and once more because there was a spare file to give up.
    assert disk.calls.count("open walproto.slots.tmp") == 5
    lines = one.log.lines()
    assert [line.split(":")[0] for line in lines] == ["warn", "critical"]
    assert lines[1] == cannot_save(one, "No space left on device")
    disk.failing = {}
    assert one.look()[0] == CURRENT - 1
    assert [line.split(":")[0] for line in one.log.lines()] == ["info"]
    # If it comes again, it is told again.
    again = one.slot("again", 109 * MB)
    one.slots.confirm(again, 110 * MB)
    disk.failing = {"fsync walproto.slots.tmp": errno.EIO}
    one.come(LAST)
    one.look()
    one.look()
    assert [line for line in one.log.lines() if "critical" in line] == [
        cannot_save(
            one, f'could not fsync file "{one.path}/walproto.slots.tmp": Input/output error'
        )
    ]


# --- Timelines, and the end of WAL ---------------------------------------------------------------


@pytest.mark.parametrize("size", [100_000, 2 * MB + 300_000])
def test_with_as_little_as_can_be_the_end_is_found_again(kept: Make, size: int) -> None:
    """Also if a record ends there that is longer than a segment."""
    wal = WalBuilder(start=FIRST * MB)
    wal.records_to(104 * MB + MB // 2, 60_000)
    wal.record(size)
    wal.records_to(wal.lsn - wal.lsn % MB + MB - 50_000, 9000)
    wal.record(size)
    one = kept(wal=wal, end=wal.lsn, wal_keep_size=0)
    one.look()
    one.restart(wal_keep_size=0)
    one.timeline.require_ready()
    assert one.timeline.commit_lsn == wal.lsn
    holding = examine(one.path)
    assert holding is not None
    assert holding.valid_to == wal.lsn


def test_over_the_end_of_a_timeline(kept: Make) -> None:
    """Old segments go, whichever timeline they are of; histories stay."""
    one = kept(wal_keep_size=2 * MB)
    slot = one.slot("away", 108 * MB)
    assert one.look()[0] == 108
    ended = next(record for record in WAL.records if record.end > CURRENT * MB + 200_000)
    child = WAL.fork(2, ended)
    child.records_to(LAST * MB + MB // 2, 60_000)
    (one.path / child.name).write_bytes(child.history_contents)
    one.writer.close()
    one.wal = child
    one.writer = SegmentWriter(one.path, 2, MB, CURRENT * MB)
    one.received.begin(2, CURRENT * MB, CURRENT * MB)
    one.come(112)
    assert one.timeline.history.tli == 2
    assert one.look()[0] == 108
    one.slots.confirm(slot, 112 * MB)
    one.log.lines()
    assert one.look()[0] == CURRENT
    assert "removed 2 segments" in one.log.lines()[0]
    assert {name_of(CURRENT) + ".partial", name_of(CURRENT, 2), child.name} <= names_in(one.path)
    one.come(113)
    assert one.look()[0] == 111
    assert one.log.lines() == [
        f"info: removed 2 segments, {name_of(CURRENT)}.partial to {name_of(CURRENT, 2)}: the "
        f"oldest WAL that is kept is at 0/{111 * MB:X}, for wal_keep_size"
    ]
    assert child.name in names_in(one.path)
    one.restart(wal_keep_size=0)
    assert one.timeline.history.tli == 2
    assert one.timeline.commit_lsn == child.end_of(one.writer.lsn)
