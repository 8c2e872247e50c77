"""A relay that is killed, or whose power fails, while slots come and go and WAL is removed.

Whoever was told that a slot is there finds it again, and all of the WAL that it reserves; whoever
was told that it is gone does not.  Its clients work until it is gone, and all of its own system
calls are seen.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.fakes import COPY_DONE, query, status
from tests.faulty import KILLED_BEFORE, KILLED_BEHIND, MADE, Call, Disk, Plan, fails
from tests.postgres import Failed, Relay, installations, int_to_lsn, lsn_to_int, same_wal_to
from tests.relays import SEGMENT, Relayed, relayed, seeded
from tests.slotted import RawClient, create_slot, drop, number, number_of, numbers, position
from tests.test_relay_power import SECTOR
from walproto.lsn import parse_segment_name

OPTIONS = ("--wal-keep-size", "0", "--max-slot-wal-keep-size", "64MB")
KEPT = {"wal_keep_size": "1GB", "max_wal_size": "2GB"}
"""Settings of a primary that keeps all, for comparison."""


class Kill:
    """The process is killed before or behind one of the calls that save slots, or that remove WAL,
    once it is armed."""

    def __init__(self, rng: random.Random) -> None:
        self.is_armed = False
        self._is_removing = False
        self._concerned, most = rng.choice([(self._saves_slots, 25), (self._removes_wal, 10)])
        self._left = rng.randint(1, most)
        self._answer = rng.choice([KILLED_BEFORE, KILLED_BEHIND])

    def __call__(self, call: Call) -> str:
        self._left -= self.is_armed and self._concerned(call)
        return self._answer if self._left == 0 else MADE

    def _saves_slots(self, call: Call) -> bool:
        return call.file.startswith("walproto.slots")

    def _removes_wal(self, call: Call) -> bool:
        """That it is an unlink, or the next sync of the directory."""
        is_sync = self._is_removing and (call.name, call.file) == ("fsync", ".")
        self._is_removing = call.name == "unlink" or (self._is_removing and not is_sync)
        return call.name == "unlink" or is_sync


class Customers:
    """Clients that make slots, drop them, and stream with them, until the relay is gone; and what
    they were told."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.slots: dict[str, int] = {}
        """The slots that are there, and how far each of them was moved at most."""
        self.unsure: str = ""
        """The slot that was being made or dropped when there was no answer any more."""
        self.done = 0

    def work(self, relay: Relay) -> None:
        """Work until the relay is gone."""
        try:
            while True:
                self._step(relay)
                self.done += 1
        except (Failed, OSError) as error:
            print(f"behind {self.done} commands: {error}")
        assert relay.wait() == -9, relay.output
        relay.check_log()

    def check(self, relay: Relay) -> None:
        """That what they were told is so."""
        found = (path.name for path in relay.directory.iterdir())
        there = {number_of(name) for name in found if parse_segment_name(name)}
        with RawClient(relay.port) as client:
            for name in "abcdefgh":
                _, row, _ = client.run(f"READ_REPLICATION_SLOT {name}")
                _, kind, lsn, _ = row.split()
                if name == self.unsure:
                    self.slots.pop(name, None)
                    if kind != "NULL":
                        self.slots[name] = lsn_to_int(lsn) if lsn != "NULL" else 0
                assert (kind == "physical") == (name in self.slots), (name, self.slots)
                if lsn != "NULL":
                    assert lsn_to_int(lsn) <= self.slots[name]
                    assert set(range(number(lsn), max(there))) <= there
        self.unsure = ""

    def _step(self, relay: Relay) -> None:
        with RawClient(relay.port) as client:
            match self._rng.choice(["create", "drop", "stream", "stream"]):
                case "create":
                    self._create(client)
                case "drop" if len(self.slots) > 2:
                    self._drop(client)
                case "stream" if self.slots:
                    self._stream(client)

    def _some_slot(self) -> str:
        """One that is there; some of them hardly ever."""
        weights = [1.0 if name in "abcd" else 0.02 for name in sorted(self.slots)]
        return self._rng.choices(sorted(self.slots), weights)[0]

    def _create(self, client: RawClient) -> None:
        name = self._rng.choice("abcdefgh")
        if name in self.slots:
            return
        self.unsure = name
        answer = client.run(f"CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL")
        assert answer[-1] == "C CREATE_REPLICATION_SLOT", answer
        self.unsure = ""
        self.slots[name] = 2**63  # until it is known where
        lsn = client.position(name)
        self.slots[name] = lsn_to_int(lsn) if lsn else 0

    def _drop(self, client: RawClient) -> None:
        name = self.unsure = self._some_slot()
        answer = client.run(f"DROP_REPLICATION_SLOT {name}")
        assert answer == ["C DROP_REPLICATION_SLOT"], answer
        self.unsure = ""
        del self.slots[name]

    def _stream(self, client: RawClient) -> None:
        """Get some WAL, all of which is there, and confirm some of it."""
        name = self._some_slot()
        lsn = client.position(name)
        if lsn is None:
            return  # it has kept too much
        assert lsn_to_int(lsn) <= self.slots[name]
        start = number(lsn) * SEGMENT
        client.send(query(f"START_REPLICATION SLOT {name} {int_to_lsn(start)} TIMELINE 1"))
        (answer,) = client.hear("W|ERROR|FATAL")
        if answer != "W":
            return
        end = start
        while end < start + SEGMENT * self._rng.randint(0, 3) + 1:
            heard = client.hear("w |ERROR|FATAL")[-1]
            assert "58P01" not in heard
            if heard[0] != "w":
                return
            end = max(lsn + len(data) for lsn, data in client.wal.items())
        flush = self._rng.randint(start, end)
        self.slots[name] = max(self.slots[name], flush)
        client.send(status(end, flush, reply=1))
        if client.hear("k |ERROR|FATAL")[-1][0] == "k":
            client.send(COPY_DONE)
            client.hear("Z I")


@contextmanager
def setting() -> Iterator[Relayed]:
    """A relay that has ended, and a primary that has tables for pgbench."""
    with relayed(installations()[0], *OPTIONS, settings=KEPT) as setting:
        setting.primary.pgbench("-i", "-s", "1")
        setting.wait_flushed(setting.primary.lsn())
        setting.relay.stop()
        yield setting


class Platter:
    """What is on disk of a relay's directory: contents as of the last sync of the file, names as of
    the last sync of the directory; of what came behind, some.

    A file may be renamed or not, and one that was removed may come back, each of them by itself.
    """

    def __init__(self, relays: Relayed, rng: random.Random) -> None:
        self._directory = relays.directory
        self._aside = relays.space.directory(f"aside-{rng.random()}")
        self._rng = rng
        self._count = itertools.count()
        self._names = self._found()
        self._contents = {inode: self._read(inode) for inode in self._names.values()}
        self._removed: set[int] = set()
        self._end_last: Callable[[], None] = lambda: None

    def watched(self, plan: Plan) -> Plan:
        """The same plan, while we watch."""

        def watch(call: Call) -> str:
            self._note(call)
            return plan(call)

        return watch

    def lose_power(self) -> None:
        """Make of the directory what is on disk."""
        names = self._rng.choice([self._names, self._found()])
        names = {name: inode for name, inode in names.items() if inode not in self._removed}
        for name, inode in self._names.items():
            if inode in self._removed and self._rng.random() < 0.5:
                names[name] = inode
        kept = {name: self._survived(inode) for name, inode in names.items()}
        for path in self._directory.iterdir():
            path.unlink()
        for name, contents in kept.items():
            (self._directory / name).write_bytes(contents)

    def _note(self, call: Call) -> None:
        """The call before this one has come to its end, this one has not yet begun."""
        self._end_last()
        path = self._directory / call.file
        if call.name == "unlink" and path.exists():
            self._removed.add(self._hold(path))
        replaced = path.with_suffix("")
        if call.name == "rename" and replaced.exists():
            self._hold(replaced)
        self._end_last = partial(self._synced, *self._to_be_synced(call))

    def _hold(self, path: Path) -> int:
        """Have the file elsewhere, too, before it goes, lest another one gets its number."""
        os.link(path, self._aside / str(next(self._count)))
        return path.stat().st_ino

    def _to_be_synced(self, call: Call) -> tuple[dict[str, int], dict[int, bytes]]:
        """Names and contents that are on disk when this call has come to its end."""
        if call.name not in ("fsync", "fdatasync"):
            return self._names, {}
        if call.file == ".":
            return self._found(), {}
        path = self._directory / call.file
        return self._names, {path.stat().st_ino: path.read_bytes()}

    def _synced(self, names: dict[str, int], contents: dict[int, bytes]) -> None:
        self._names = names
        self._contents |= contents

    def _survived(self, inode: int) -> bytes:
        """What is left of a file."""
        synced, written = self._contents.get(inode, b""), self._read(inode)
        if len(synced) != len(written):
            return self._rng.choice(
                [synced, written, written[: self._rng.randint(0, len(written))]]
            )
        kept = bytearray(synced)
        for at in range(0, len(synced), SECTOR):
            sector = slice(at, at + SECTOR)
            if synced[sector] != written[sector] and self._rng.random() < 0.5:
                kept[sector] = written[sector]
        return bytes(kept)

    def _found(self) -> dict[str, int]:
        """The inode numbers of the files by their names; another thread may be at work there."""
        found = {}
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):
                found[path.name] = path.stat().st_ino
        return found

    def _read(self, inode: int) -> bytes:
        paths = (*self._directory.iterdir(), *self._aside.iterdir())
        return next(path for path in paths if path.stat().st_ino == inode).read_bytes()


def go_through(relays: Relayed, rng: random.Random, rounds: int, power: bool) -> None:
    """Have the relay end so many times while its clients are at work."""
    customers = Customers(rng)
    with relays.load() as load:
        for _ in range(rounds):
            disk, kill = Disk(), Kill(rng)
            platter = Platter(relays, rng) if power else None
            disk.plan = platter.watched(kill) if platter else kill
            relays.restart_faulty(disk)
            relays.relay.ready()
            customers.check(relays.relay)
            kill.is_armed = True
            customers.work(relays.relay)
            if platter:
                platter.lose_power()
        load.kill()
    assert customers.done > 3 * rounds
    relays.restart_relay()
    relays.relay.ready()
    customers.check(relays.relay)
    drop(relays.relay, *customers.slots)
    relays.wait_flushed(relays.primary.lsn())
    create_slot(relays.relay, "last")
    relays.write(3 * SEGMENT)
    relays.relay.expect(r"removed .*segments?, ")  # and with it what had come back
    assert position(relays.relay, "last") is not None
    check_wal(relays)


def check_wal(relays: Relayed) -> None:
    """That the relay has all WAL as the primary wrote it, from its first segment on; and that it is
    enough for it to know where it ends."""
    end = relays.primary.lsn()
    relays.wait_flushed(end)
    relays.relay.stop()  # it removes segments
    assert same_wal_to(end, relays.primary.wal_dir, relays.directory)
    relays.relay.check_log()
    relays.primary.kill()
    relays.restart_relay()
    assert lsn_to_int(relays.relay.ready()[4]) >= lsn_to_int(end)


def test_it_is_killed_at_any_of_its_calls() -> None:
    rng = seeded()
    with setting() as relays:
        go_through(relays, rng, rounds=12, power=False)


def test_the_power_fails() -> None:
    """What was not synced is lost; old segments come back, each or not."""
    rng = seeded()
    with setting() as relays:
        go_through(relays, rng, rounds=9, power=True)


def test_there_is_no_room_to_save_slots() -> None:
    """Who makes or drops one is told so, and all is as it was; when there is room, it goes on."""
    disk = Disk()
    with relayed(installations()[0], *OPTIONS, disk=disk, settings=KEPT) as relays:
        relay = relays.relay
        reserved = create_slot(relay, "early")
        full = 'ERROR 53100: could not write to file "walproto.slots": No space left on device'

        def no_room(call: Call) -> str:
            concerned = call.name == "rename" and call.file.startswith("walproto.slots")
            return fails(errno.ENOSPC) if concerned else MADE

        disk.plan = no_room
        with RawClient(relay.port) as client:
            for command in (
                "CREATE_REPLICATION_SLOT late PHYSICAL",
                "CREATE_REPLICATION_SLOT later PHYSICAL RESERVE_WAL",
                "DROP_REPLICATION_SLOT early",
                "DROP_REPLICATION_SLOT early WAIT",
            ):
                assert client.run(command) == [full]
            assert client.position("early") == reserved
            relay.expect(
                r"#critical\] cannot save replication slots in .*: No space left on device"
            )
            relays.write(70 * SEGMENT)
            relay.expect('invalidating obsolete replication slot "early"')
            first = numbers(relay.directory)[0]
            assert first <= number(reserved)
            disk.plan = lambda call: MADE
            removed = relay.expect(r"removed \d+ segments, (\w+) to .*, for wal_keep_size")
            assert number_of(removed[1]) == first
            created = "CREATE_REPLICATION_SLOT late PHYSICAL RESERVE_WAL"
            assert client.run(created)[-1] == "C CREATE_REPLICATION_SLOT"
            late = client.position("late")
        relay.kill()
        relays.restart_relay()
        relays.relay.ready()
        with RawClient(relays.relay.port) as client:
            read = "READ_REPLICATION_SLOT {}"
            assert client.run(read.format("early"))[1] == "D physical NULL NULL"
            assert client.run(read.format("later"))[1] == "D NULL NULL NULL"
            assert client.position("late") == late
        check_wal(relays)
