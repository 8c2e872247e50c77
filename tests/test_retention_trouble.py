"""What goes wrong when old WAL is removed, what happens at the same time, and what is left of it by
a crash."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.python.failure import Failure

from tests.disk import Disk
from tests.retained import (
    CURRENT,
    FIRST,
    LAST,
    OTHER,
    Make,
    Session,
    making,
    name_of,
    put,
    removed,
)
from tests.wal_builder import MAGIC, MB, SYSTEM, WalBuilder
from walproto.errors import UndefinedFile
from walproto.timeline import retention
from walproto.timeline.history import History
from walproto.timeline.proofs import Proofs
from walproto.timeline.retention import INTERVAL, old_segments, remove_segments
from walproto.timeline.slot_file import SlotState, read_slots, write_slots
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.segments import Segments, Stamp, stamp_of

IDENTITY = Identity(SYSTEM, MB, FORMATS[MAGIC[18]])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Make]:
    with making(tmp_path) as make:
        yield make


# --- What goes wrong, and what happens at the same time ------------------------------------------


def test_what_cannot_be_removed_is_told_once_and_tried_again(
    kept: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often slots are saved in the meantime."""
    one = kept(wal_keep_size=0)
    near = one.slot("near", 109 * MB)
    (strange,) = one.strange = set(put(one.path, 98, system=OTHER))
    disk = Disk(one.path, monkeypatch)
    disk.failing = {f"unlink {name_of(102)}": errno.EPERM}
    assert one.look()[0] == 102
    assert one.log.lines() == [
        removed(100, 101, f"0/{109 * MB:X}", 'replication slot "near"'),
        f"critical: {one.path / strange} belongs to another cluster: it is left alone",
        f"critical: cannot remove old WAL: {one.path / name_of(102)}: Operation not permitted: "
        "trying again",
    ]
    for segno in range(CURRENT, LAST + 1):
        one.come(segno)
        one.slots.confirm(near, segno * MB)
        assert one.look()[0] == 102
    assert disk.calls.count(f"unlink {name_of(102)}") == 6
    assert one.log.lines() == []
    disk.failing = {}
    assert one.look()[0] == LAST - 1
    assert one.log.lines() == [removed(102, 112, f"0/{(LAST - 1) * MB:X}", "wal_keep_size")]
    assert (one.path / strange).exists()


def test_the_files_of_removed_segments_are_closed(kept: Make) -> None:
    """Which somebody has read from; else they would take their room on disk."""
    one = kept(wal_keep_size=0)

    def deleted() -> list[str]:
        names = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return [name for name in names if name.startswith(str(one.path)) and "(deleted)" in name]

    for segno in range(FIRST, CURRENT):
        one.timeline.read_into(1, segno * MB, memoryview(bytearray(100)))
    one.clock.advance(INTERVAL)
    one.threads.work()  # it is saved
    one.threads.work()  # it is seen what there is
    one.threads.begin()
    assert len(deleted()) > 5  # the newest are read from memory
    one.threads.finish()
    assert deleted() == []


def test_what_was_known_of_removed_segments_is_forgotten(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    one.slot("away", 104 * MB)
    stamps = {segno: stamp_of((one.path / name_of(segno)).stat()) for segno in (103, 104)}
    for segno, stamp in stamps.items():
        one.timeline.sendable_to(1, segno * MB)
        one.clock.advance(0)
        assert one.timeline.sendable_to(1, segno * MB) == (segno + 1) * MB
        assert one.received.is_as_written(1, (segno + 1) * MB, stamp)
    assert one.look()[0] == 104
    assert not one.received.is_as_written(1, 104 * MB, stamps[103])
    assert one.received.is_as_written(1, 105 * MB, stamps[104])
    with pytest.raises(UndefinedFile):
        one.timeline.sendable_to(1, 103 * MB)
    assert one.timeline.sendable_to(1, 104 * MB) == 105 * MB


def test_proofs_of_removed_segments_are_forgotten(tmp_path: Path) -> None:
    proofs = Proofs(Segments(tmp_path, IDENTITY), IDENTITY, History(1))
    stamp: Stamp = (1, 2, 3, os.getpid())
    count = sys.getrefcount(stamp)
    proofs.add(103, stamp)
    proofs.forget_before(103 * MB)
    assert sys.getrefcount(stamp) == count + 1
    proofs.forget_before(104 * MB)
    assert sys.getrefcount(stamp) == count


def test_a_replica_that_begins_while_its_wal_is_being_removed(kept: Make) -> None:
    """Who waits for the proof of that WAL is called when there will be none, and told why."""
    one = kept(wal_keep_size=0)
    one.restart(wal_keep_size=0)
    told: list[int | str] = []

    def observer() -> None:
        try:
            told.append(one.timeline.sendable_to(1, 104 * MB))
        except UndefinedFile as error:
            told.append(error.message)

    one.clock.advance(INTERVAL)
    one.timeline.add_observer(observer)
    assert one.timeline.sendable_to(1, 104 * MB) == 104 * MB  # not yet proven
    one.threads.work_all()
    one.clock.advance(0)
    assert told[-1] == f"requested WAL segment {name_of(104)} has already been removed"


def test_a_record_whose_beginning_is_removed_while_it_is_proven(tmp_path: Path) -> None:
    """It cannot be checked any more: that is no damage."""
    wal = WalBuilder(start=FIRST * MB)
    wal.records_to(103 * MB - 3000, 60_000)
    wal.record(200_000)
    wal.records_to(105 * MB, 60_000)
    wal.write_to(tmp_path)

    class Removing(Segments):
        """Its segments go while they are read."""

        reads = 0

        def read(self, tli: int, lsn: int, size: int) -> bytes:
            data = super().read(tli, lsn, size)
            self.reads += lsn < 103 * MB
            if self.reads == 1:
                remove_segments(tmp_path, SYSTEM, old_segments(tmp_path, MB, 103))
            return data

    proofs = Proofs(Removing(tmp_path, IDENTITY), IDENTITY, History(1))
    assert proofs.proven_to(103 * MB) == 103 * MB
    while proofs.advance(MB):
        pass
    assert proofs.proven_to(103 * MB) == 104 * MB


def test_what_slots_do_while_they_are_saved_counts(kept: Make) -> None:
    """What is removed is what nobody needs then, and not a moment before."""
    one = kept(wal_keep_size=0, max_slot_wal_keep_size=8 * MB)
    one.slot("bad", 101 * MB)
    back = one.slot("back", 108 * MB)
    one.clock.advance(INTERVAL)
    one.threads.begin()
    one.slots.confirm(back, 103 * MB)
    one.slots.create("new", Session(), restart_lsn=CURRENT * MB)
    replica = one.replica(102 * MB)
    one.threads.finish()
    one.threads.work_all()
    assert one.there()[0] == 102
    one.timeline.replicas.remove(replica)
    assert one.look()[0] == 103
    # What is being removed cannot be reserved any more.
    one.slots.confirm(back, 108 * MB)
    one.clock.advance(INTERVAL)
    one.threads.work()
    assert one.threads.waiting == 1
    one.slots.confirm(back, 105 * MB)
    late = one.slots.create("late", Session(), restart_lsn=106 * MB)
    one.threads.work_all()
    assert late.called
    reserved = {slot.name: slot.restart_lsn for slot in one.slots}
    assert reserved == {"bad": 0, "back": 108 * MB, "new": CURRENT * MB, "late": 108 * MB}
    assert one.there()[0] == 108


@pytest.mark.parametrize("call", ["open .", "fsync ."])
def test_what_nobody_was_told_of_does_not_stay_on_disk(
    kept: Make, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A slot that was made in vain, for all that is known, or dropped in vain: the next look puts
    right what the file says."""
    one = kept()
    one.slot("there", 103 * MB)
    one.look()
    disk = Disk(one.path, monkeypatch)
    disk.failing = {call: errno.EMFILE}

    def on_disk() -> list[str]:
        return re.findall('"name": "([a-z]+)"', (one.path / "walproto.slots").read_text())

    session, failures = Session(), list[Failure]()
    one.slots.create("new", session, restart_lsn=104 * MB).addErrback(failures.append)
    one.threads.work_all()
    assert on_disk() == ["there", "new"]
    one.slots.drop(one.slots.acquire("there", session)).addErrback(failures.append)
    one.threads.work_all()
    assert on_disk() == []
    assert len(failures) == 2
    disk.failing = {}
    one.look()
    assert on_disk() == ["there"]


# --- The end, and another beginning --------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "first"),
    [(0, FIRST), (1, FIRST), (2, FIRST), (3, FIRST + 4), (4, FIRST + 8), (5, CURRENT - 1)],
)
def test_it_is_stopped_in_the_middle(
    kept: Make, monkeypatch: pytest.MonkeyPatch, jobs: int, first: int
) -> None:
    """What is under way comes to its end, and then nothing else is removed."""
    monkeypatch.setattr(retention, "BATCH", 4)
    one = kept(wal_keep_size=0)
    near = one.slot("near", (CURRENT - 1) * MB)
    one.slots.confirm(near, CURRENT * MB)
    one.clock.advance(INTERVAL)
    for _ in range(jobs):  # positions are saved, and how far it will go; what there is; batches
        one.threads.work()
    assert one.threads.waiting == 1
    one.threads.begin()
    stopped: list[None] = []
    one.retention.stop().addCallback(stopped.append)
    assert stopped == []
    one.threads.finish()
    one.threads.work_all()
    assert stopped == [None]
    assert len(one.clock.getDelayedCalls()) == 1  # the directory's poll
    assert one.there()[0] == first
    one.come(LAST)
    one.clock.advance(10 * INTERVAL)
    assert one.threads.waiting == 0
    assert one.there()[0] == first


def test_it_is_stopped_when_nothing_is_under_way(kept: Make) -> None:
    one = kept(wal_keep_size=0)
    assert one.retention.stop().called
    one.clock.advance(10 * INTERVAL)
    assert one.threads.waiting == 0
    assert one.retention.stop().called


def test_what_was_removed_of_other_wal_means_nothing(kept: Make, tmp_path: Path) -> None:
    """The segments are gone, but not the slots that were on them; and now there are others."""
    write_slots(tmp_path, [], removed_to=50 << 30)
    one = kept(wal_keep_size=0)
    slot = one.slot("new", 103 * MB)
    assert slot.restart_lsn == 103 * MB
    assert one.look()[0] == 103


def test_after_a_crash_slots_reserve_what_there_is(kept: Make) -> None:
    """A slot was further on than it had been saved, or its WAL would still be there."""
    one = kept(wal_keep_size=0)
    away = one.slot("away", 103 * MB)
    assert one.look()[0] == 103
    one.slots.confirm(away, 106 * MB)
    one.clock.advance(INTERVAL)
    one.threads.work()  # it is saved
    one.slots.confirm(away, 108 * MB)  # and this is not, when its WAL goes
    one.threads.work_all()
    one.slots.confirm(away, 109 * MB)
    one.threads.work_all()
    assert one.there()[0] == 106
    one.restart(wal_keep_size=0)
    assert [slot.restart_lsn for slot in one.slots] == [106 * MB]
    # It cannot move back to where there is nothing.
    (away,) = one.slots
    one.slots.confirm(away, 104 * MB)
    assert away.restart_lsn == 106 * MB


def test_what_a_loss_of_power_brings_back_is_removed_again(kept: Make) -> None:
    """Of segments that were being removed, any; no slot can reserve them."""
    one = kept(wal_keep_size=0)
    away = one.slot("away", 103 * MB)
    assert one.look()[0] == 103
    for segnos in ([100, 102], [99, 100]):
        put(one.path, *segnos)
        one.restart(wal_keep_size=0)
        (away,) = one.slots
        assert away.restart_lsn == 103 * MB
        one.slots.confirm(away, 101 * MB)
        assert away.restart_lsn == 103 * MB
        assert one.look()[0] == 103


def test_what_is_removed_once_no_slot_reserves_any_more(kept: Make) -> None:
    """Whatever has become of the WAL since: what its position was, is not known."""
    one = kept(wal_keep_size=0)
    one.stop()
    states = [SlotState("away", 101 * MB), SlotState("near", 108 * MB), SlotState("unused", 0)]
    write_slots(one.path, states, 105 * MB)
    one.restart(wal_keep_size=0)
    assert [slot.restart_lsn for slot in one.slots] == [105 * MB, 108 * MB, 0]
    assert one.look()[0] == 105
    assert read_slots(one.path).removed_to == 105 * MB
