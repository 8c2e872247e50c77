"""Whatever clients do with slots at the same time, and whenever it is killed or the power fails: no
segment at or after the restart_lsn of any valid slot is ever gone.

Hypothesis thinks of the course of events: a :class:`Model` is the whole server but for sockets,
threads and time.  Clients say real messages over transports in memory; segments and the file with
the slots are real files, though what is not synced is lost when the power fails.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from tests.fakes import COPY_DONE, MemoryTransport, message, query, startup, status, told
from tests.upstream_fakes import HeldThreads
from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.access.authentication import Trust
from walproto.lsn import format_lsn, parse_segment_name
from walproto.server.factory import WalSenderFactory
from walproto.timeline import retention
from walproto.timeline.directory import WalDirectory
from walproto.timeline.received import Received
from walproto.timeline.retention import INTERVAL, Retention
from walproto.timeline.slot_file import NAME, SlotState, read_slots
from walproto.timeline.slots import SlotOptions, Slots

FIRST, LAST = 20, 120
"""Numbers of segments: the first one, and the last one that may come."""


def built() -> dict[int, tuple[str, bytes]]:
    """Segments in each of which there is no more than a record, by their numbers; only the first
    page of each, for what follows are zeros."""
    wal = WalBuilder(start=FIRST * MB)
    while wal.lsn < LAST * MB:
        wal.record(1000)
        wal.switch()
    named = enumerate(wal.segments().items(), FIRST)
    return {number: (name, contents[:PAGE]) for number, (name, contents) in named}


SEGMENTS = built()

ALLOWED = {
    *("08P01", "0A000", "42601", "42704", "42710", "53100", "53300", "53400", "55000", "55006"),
    *("57P01", "58030", "58P01"),
}
"""SQLSTATEs of the errors that clients may cause or suffer here."""


REAL: dict[str, Callable[..., Any]] = {
    "open": os.open,
    "fsync": lambda fd: None,  # it is noted, which is all that matters
    "rename": os.rename,
    "unlink": os.unlink,
}


Thing = TypeVar("Thing")


class Killed(BaseException):
    """The process ends here."""


class Disk:
    """What the jobs of a thread ask of the disk, as far as it can be lost or go wrong."""

    def __init__(self, directory: Path, aside: Path) -> None:
        self.directory = directory
        self.complaints: list[str] = []
        self._aside = aside
        self._versions: list[bytes | None] = []
        self._synced: set[str] = set()
        self._left = 0
        self._error = 0

    @contextmanager
    def troubled(self, calls: int, error: int) -> Iterator[None]:
        """After so many calls the next one fails with this errno; if that is 0, it is the end."""
        self._left, self._error = calls, error
        with ExitStack() as patches:
            for name, real in REAL.items():
                guarded = self._guarded(getattr(self, f"_{name}"), real)
                patches.enter_context(mock.patch(f"os.{name}", guarded))
            yield

    def lose_power(self, choose: Callable[[int], int]) -> None:
        """Of what was not synced, some is lost; ``choose`` tells what, a number below another."""
        for path in sorted(self._aside.iterdir()):
            if choose(2):
                path.rename(self.directory / path.name)
            else:
                path.unlink()
        slots = self.directory / NAME
        versions = [*self._versions, slots.read_bytes() if slots.exists() else None]
        kept = versions[choose(len(versions))]
        slots.unlink(missing_ok=True)
        if kept is not None:
            slots.write_bytes(kept)
        self._versions = []

    def _guarded(self, noting: Callable[..., None], real: Callable[..., Any]) -> Any:
        def call(what: Any, *arguments: Any, **options: Any) -> Any:
            if self._left == 0:
                if self._error == 0:
                    raise Killed
                raise OSError(self._error, os.strerror(self._error), str(what))
            self._left -= 1
            noting(what, *arguments)
            return real(what, *arguments, **options)

        return call

    def _open(self, path: Path, flags: int, *_: Any) -> None:
        if flags & os.O_CREAT:
            self._synced.discard(str(path))

    def _fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._synced.add(path)
        if path == str(self.directory):
            self._versions = []
            for removed in self._aside.iterdir():
                REAL["unlink"](removed)

    def _rename(self, source: Path, target: Path) -> None:
        if str(source) not in self._synced:
            self.complaints.append(f"{source} is renamed and may be empty")
        self._versions.append(target.read_bytes() if target.exists() else None)

    def _unlink(self, path: Path) -> None:
        if parse_segment_name(path.name):
            os.link(path, self._aside / path.name)


class Peer:
    """A client, and what it does."""

    def __init__(self, factory: WalSenderFactory, clock: Clock) -> None:
        self.clock = clock
        self.transport = MemoryTransport(clock, capacity=700_000)
        self.protocol = factory.buildProtocol(None)
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)
        self.doing = ""
        """What it waits for, "streaming", or nothing."""
        self.slot = ""
        """The slot that this is about."""
        self.may_begin = True
        """Whether the WAL was there that it has asked for."""
        self.send(startup())
        assert self.hear() == ["GREETING"]

    @property
    def is_gone(self) -> bool:
        return not self.transport.is_connected or self.transport.disconnecting

    def send(self, *data: bytes) -> None:
        self.transport.deliver(b"".join(data))
        self.clock.advance(0)

    def command(self, text: str, doing: str, slot: str = "") -> None:
        self.doing, self.slot = doing, slot
        self.send(query(text))

    def hear(self) -> list[str]:
        """What it was told."""
        self.transport.take()
        self.clock.advance(0)
        data = bytes(self.transport.arrived)
        self.transport.arrived.clear()
        return told(data)


def pick(things: Sequence[Thing], number: int) -> Thing:
    return things[number % len(things)]


names = st.sampled_from(["a", "b", "c", "d"])
numbers = st.integers(0, 11)
KINDS = (
    "PHYSICAL",
    "PHYSICAL RESERVE_WAL",
    "PHYSICAL (RESERVE_WAL)",
    "TEMPORARY PHYSICAL RESERVE_WAL",
)


class Model(RuleBasedStateMachine):
    """The server, its clients, and what is known of the slots."""

    @initialize(
        keep=st.sampled_from([0, MB, 3 * MB]),
        bound=st.sampled_from([2 * MB, 5 * MB, 0, None]),
        segments=st.integers(1, 12),
        initial=st.sampled_from(["a", "ab", ""]),
    )
    def begin(self, keep: int, bound: int | None, segments: int, initial: str) -> None:
        self.cleanup = ExitStack()
        root = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.cleanup.enter_context(mock.patch.object(retention, "BATCH", 3))
        self.logged = self.cleanup.enter_context(capturedLogs())
        self.path, aside = root / "wal", root / "aside"
        self.path.mkdir()
        aside.mkdir()
        self.disk = Disk(self.path, aside)
        self.keep, self.bound = keep, bound
        self.options = SlotOptions(3, keep, bound)
        self.end = FIRST
        self.confirmed: set[str] = set()
        """Names of slots of which a client was told that they are there."""
        self.unsure: set[str] = set()
        """Those of which nobody was told what is on disk of them."""
        self.reached: dict[str, int] = {}
        """How far slots of this name have been."""
        self.had_no_power = False
        """Whether the power has failed, and nothing was removed since."""
        self.write(segments)
        self.start()
        self.hear()
        for name in initial:
            self.create(0, name, "PHYSICAL RESERVE_WAL", False)
            self.hear()

    def start(self) -> None:
        self.clock = Clock()
        self.threads = HeldThreads()
        self.timeline = WalDirectory(self.path, self.clock, Received())
        with self.disk.troubled(-1, 0):
            self.slots = Slots(self.path, self.threads, self.options)
        self.retention = Retention(self.timeline, self.slots, self.clock, self.threads)
        self.factory = WalSenderFactory(
            self.timeline, self.clock, slots=self.slots, authenticator=Trust()
        )
        self.peers: list[Peer] = []
        self.steps = 0
        """How many it has run for."""
        self.retention.start()
        self.timeline.start()
        self.clock.advance(0)
        self.timeline.require_ready()
        assert self.timeline.commit_lsn == self.end * MB

    def leave(self) -> None:
        """Leave nothing in memory of what was started; what it still wants of the disk, does not
        get there."""
        self.retention.stop()
        for peer in self.peers:
            peer.transport.drop()
        self.timeline.stop()

    def write(self, segments: int) -> None:
        """WAL comes, and is synced."""
        for segno in range(self.end, min(self.end + segments, LAST)):
            name, page = SEGMENTS[segno]
            path = self.path / name
            path.write_bytes(page)
            os.truncate(path, MB)
            self.end = segno + 1

    def first(self) -> int:
        """The number of the first segment.  There is no hole behind it; only of what was being
        removed when the power failed, something may have come back."""
        there = {int(path.name[16:], 16) for path in self.path.glob("0000*")}
        first = self.end - 1
        while first - 1 in there:
            first -= 1
        assert there == set(range(first, self.end)) or self.had_no_power
        return first

    # --- clients ---------------------------------------------------------------------------

    def peers_at(self, *doing: str) -> list[Peer]:
        """The clients that do this now."""
        return [peer for peer in self.peers if peer.doing in doing]

    def hear(self) -> None:
        """All clients hear what they were told; in the place of one that is gone comes another."""
        for peer in self.peers:
            for line in peer.hear():
                self.heard(peer, line)
        gone = [peer for peer in self.peers if peer.is_gone]
        self.unsure |= {peer.slot for peer in gone}
        self.peers = [peer for peer in self.peers if not peer.is_gone]
        while len(self.peers) < 4:
            self.peers.append(Peer(self.factory, self.clock))

    def heard(self, peer: Peer, line: str) -> None:
        match line.split()[0], peer.doing:
            case "ERROR" | "FATAL", doing:
                sqlstate = line.split()[1].rstrip(":")
                assert sqlstate in ALLOWED, line
                if doing == "streaming":
                    assert sqlstate != "58P01" or not peer.may_begin, line
                if sqlstate in ("53100", "58030", "57P01"):  # of others nothing comes to the disk
                    self.unsure.add(peer.slot)
                peer.slot = ""
            case "W", "starting to stream":
                peer.doing = "streaming"
            case "C", "creating":
                self.confirmed.add(peer.slot)
            case "C", "dropping":
                self.confirmed.discard(peer.slot)
            case "Z", _:
                peer.doing = peer.slot = ""

    @precondition(lambda self: self.peers_at("") != [])
    @rule(number=numbers, name=names, kind=st.sampled_from(KINDS), wait=st.booleans())
    def create(self, number: int, name: str, kind: str, wait: bool) -> None:
        peer = pick(self.peers_at(""), number)
        doing = "creating one for itself" if "TEMP" in kind else "creating"
        peer.command(f"CREATE_REPLICATION_SLOT {name} {kind}", doing, name)
        if not wait:
            self.work()

    @precondition(lambda self: self.peers_at("") != [] and len(self.slots) > 0)
    @rule(number=numbers, which=numbers, how=st.sampled_from(["", " WAIT"]))
    def drop(self, number: int, which: int, how: str) -> None:
        peer = pick(self.peers_at(""), number)
        name = pick([slot.name for slot in self.slots], which)
        peer.command(f"DROP_REPLICATION_SLOT {name}{how}", "dropping", name)

    @precondition(lambda self: self.peers_at("") != [] and len(self.slots) > 0)
    @rule(number=numbers, which=numbers, where=st.integers(-1, 6))
    def stream_with_a_slot(self, number: int, which: int, where: int) -> None:
        """From where it reserves WAL, or from elsewhere."""
        peer, slot = pick(self.peers_at(""), number), pick(list(self.slots), which)
        is_held = slot.holder not in (None, peer.protocol)
        lsn = self.first() * MB + where * MB
        if slot.restart_lsn and where > 1:
            lsn = slot.restart_lsn - slot.restart_lsn % MB
        self.stream(peer, lsn, f"SLOT {slot.name} ")
        assert not (is_held and peer.doing == "streaming")

    @precondition(lambda self: self.peers_at("") != [])
    @rule(number=numbers, where=st.integers(-1, 4))
    def stream_without(self, number: int, where: int) -> None:
        self.stream(pick(self.peers_at(""), number), self.first() * MB + where * MB)

    def stream(self, peer: Peer, lsn: int, slot: str = "") -> None:
        lsn = min(lsn, self.end * MB)
        peer.may_begin = lsn >= max(self.slots.kept_from, self.first() * MB)
        text = f"START_REPLICATION {slot}{format_lsn(lsn)} TIMELINE 1"
        peer.command(text, "starting to stream")
        self.hear()

    @precondition(lambda self: self.peers_at("streaming") != [])
    @rule(number=numbers, behind=st.sampled_from([0, 0, MB, 3 * MB, 2**60, None, 1, -MB, -(2**60)]))
    def confirm(self, number: int, behind: int | None) -> None:
        """A replica tells where it is: further on, or back, or not at all, or what cannot be."""
        peer = pick(self.peers_at("streaming"), number)
        (sent,) = (it.sent_lsn for it in self.timeline.replicas if it.pid == peer.protocol.pid)
        peer.send(status(sent, 0 if behind is None else max(sent - behind, 1)))

    @rule(number=numbers, how=st.sampled_from(["gone", "well", "badly", "nonsense"]))
    def end_session(self, number: int, how: str) -> None:
        """A stream ends well, or with an error; a session has an error, perhaps its last; or its
        client is gone."""
        peer = pick(self.peers, number)
        if how == "gone":
            peer.transport.drop()
        elif peer.doing in ("", "streaming"):
            peer.send({"well": COPY_DONE, "badly": message(b"d", b"r")}.get(how, query(how)))

    # --- the server ------------------------------------------------------------------------

    @rule(segments=st.integers(4, 8))
    def much_wal_comes(self, segments: int) -> None:
        self.wal_comes(segments)

    @rule(segments=st.integers(1, 3))
    def wal_comes(self, segments: int) -> None:
        self.write(segments)
        self.timeline.look()
        self.clock.advance(0)
        assert self.timeline.commit_lsn == self.end * MB

    @rule()
    def time_goes_by(self) -> None:
        beyond = self.beyond_the_bound()
        valid = [slot for slot in self.slots if not slot.invalidated]
        self.clock.advance(INTERVAL)
        assert {slot.name for slot in valid if slot.invalidated} <= beyond

    def beyond_the_bound(self) -> set[str]:
        """The slots that keep more WAL than they may."""
        if self.bound is None:
            return set()
        kept = max(self.keep, MB) // MB
        limit = min(self.end - kept, self.end - self.bound // MB) * MB
        return {slot.name for slot in self.slots if 0 < slot.restart_lsn < limit}

    @precondition(lambda self: self.threads.waiting > 0)
    @rule()
    def work(self) -> None:
        """A job is done, if there is one."""
        if self.threads.waiting:
            with self.disk.troubled(-1, 0):
                self.threads.work()

    @precondition(lambda self: self.threads.waiting > 0)
    @rule(calls=st.integers(0, 6), error=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EMFILE]))
    def fail(self, calls: int, error: int) -> None:
        """A job, in which something goes wrong."""
        with self.disk.troubled(calls, error):
            self.threads.work()

    @precondition(lambda self: not self.threads.is_busy)
    @rule(
        number=st.integers(0, 3),
        calls=st.integers(0, 5),
        error=st.sampled_from([errno.ENOSPC, errno.EIO]),
    )
    def all_but_one_goes_well(self, number: int, calls: int, error: int) -> None:
        """There is a look, and one of the things that it wants done fails."""
        self.time_goes_by()
        for _ in range(number):
            self.work()
        if self.threads.waiting:
            self.fail(calls, error)
        with self.disk.troubled(-1, 0):
            self.threads.work_all()

    @precondition(lambda self: not self.threads.is_busy)
    @rule()
    def all_goes_well(self) -> None:
        """There is a look from its beginning to its end: all is on disk, no more than has to be."""
        before = self.first()
        beyond = self.beyond_the_bound()
        valid = [slot for slot in self.slots if not slot.invalidated]
        self.clock.advance(INTERVAL)
        with self.disk.troubled(-1, 0):
            self.threads.work_all()
            file = read_slots(self.path)
        self.had_no_power = False
        assert {slot.name for slot in valid if slot.invalidated} == beyond
        needed = [slot.restart_lsn // MB for slot in self.slots if slot.restart_lsn]
        needed += [replica.sent_lsn // MB for replica in self.timeline.replicas]
        needed.append(self.end - max(self.keep, MB) // MB)
        assert self.first() == max(min(needed), before)
        assert self.slots.is_saved(MB)
        assert file.problems == []
        permanent = [slot.state() for slot in self.slots if not slot.is_temporary]
        assert [_coarse(state) for state in file.slots] == [_coarse(state) for state in permanent]
        self.confirmed = {state.name for state in file.slots}
        self.unsure = set()

    @precondition(lambda self: self.steps > 12)
    @rule(
        calls=st.integers(0, 8),
        power=st.booleans(),
        choices=st.lists(st.integers(0, 1), min_size=8, max_size=8),
    )
    def die(self, calls: int, power: bool, choices: list[int]) -> None:
        """It is killed, perhaps within a job, perhaps because the power fails, and starts again."""
        if self.threads.waiting:
            try:
                with self.disk.troubled(calls, 0):
                    self.threads.begin()
            except Killed:
                pass
        left = iter(choices * 100)
        if power:
            self.had_no_power = True
            self.disk.lose_power(lambda below: next(left) % below)
        self.as_a_restart_would_find_it()
        self.unsure |= {peer.slot for peer in self.peers}
        self.leave()
        self.start()
        self.confirmed = {slot.name for slot in self.slots}

    # --- what is always so -----------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.steps += 1
        self.hear()
        first = self.first()
        for slot in self.slots:
            assert self.is_there(slot.restart_lsn), slot
            self.reached[slot.name] = max(self.reached.get(slot.name, 0), slot.restart_lsn)
            if slot.holder is not None and not slot.is_changing:
                assert slot.holder.pid in self.factory.connections
            assert slot.holder is not None or not slot.is_temporary
        for replica in self.timeline.replicas:
            assert replica.sent_lsn >= first * MB, replica
        permanent = {slot.name for slot in self.slots if not slot.is_temporary}
        assert self.confirmed - self.unsure <= permanent
        self.as_a_restart_would_find_it()
        assert [event for event in self.logged if "log_failure" in event] == []
        assert self.disk.complaints == []

    def is_there(self, restart_lsn: int) -> bool:
        """Whether all that a slot reserves is there, of what ever was."""
        return restart_lsn == 0 or self.first() <= max(restart_lsn // MB, FIRST)

    def as_a_restart_would_find_it(self) -> None:
        """Slots may have been saved further back than they are now, but not further on."""
        with mock.patch("os.fsync", REAL["fsync"]):
            slots = Slots(self.path, HeldThreads(), self.options)
        unsure = self.unsure | {peer.slot for peer in self.peers}
        found = {slot.name for slot in slots}
        assert self.confirmed - unsure <= found <= self.confirmed | unsure
        for slot in slots:
            assert slot.restart_lsn <= self.reached.get(slot.name, 0), slot
            assert self.is_there(slot.restart_lsn), slot

    def teardown(self) -> None:
        if not hasattr(self, "timeline"):
            return
        with self.cleanup:
            self.leave()


def _coarse(state: SlotState) -> tuple[str, int, str]:
    return state.name, state.restart_lsn // MB, state.invalidated


TestModel = Model.TestCase
TestModel.settings = settings(
    deadline=None, derandomize=True, max_examples=100, stateful_step_count=80
)
