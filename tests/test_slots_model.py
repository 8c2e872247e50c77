"""Slots under anything: creations, removals and positions in any order, saves that fail at any
step, WAL that is removed, and crashes; held against what clients were told and a disk may hold."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from tests.disk import Disk
from tests.upstream_fakes import HeldThreads
from walproto.errors import (
    DuplicateObject,
    ObjectInUse,
    ObjectNotInPrerequisiteState,
    ReportedError,
    UndefinedObject,
)
from walproto.timeline.slot_file import read_slots
from walproto.timeline.slots import WAL_REMOVED, SlotOptions, Slots
from walproto.wal.writer import SyncError

NAMES, MOST = "abcd", 3
SEGMENT = 16
"""Bytes of WAL that go at once."""

MEMORY = Path("/dev/shm")
"""Where thousands of saves do not have to wait for a disk."""

Value = tuple[int, int, str] | None
"""What the disk may hold of a slot: restart_lsn, xmin, why it is invalidated; None if nothing."""


class Session:
    """A connection: it does one command after another, and uses one slot at a time.

    When it is told that it is over, it is at once, or ``is_slow`` and will be later.
    """

    def __init__(self, pid: int, end: Callable[[Session], None]) -> None:
        self.pid = pid
        self.is_slow = self.is_busy = self.is_told = False
        self.pending: list[Callable[[], None]] = []
        self.using = ""
        self._end = end

    def terminate(self) -> None:
        self.is_told = True
        if not self.is_slow:
            self._end(self)


@dataclass(eq=False)
class Known:
    """A slot as clients know it."""

    restart_lsn: int
    is_temporary: bool
    holder: Session | None
    is_coming: bool = False
    is_going: bool = False
    xmin: int = 0
    invalidated: str = ""

    @property
    def is_changing(self) -> bool:
        return self.is_coming or self.is_going

    @property
    def value(self) -> Value:
        """What is to be on disk of it."""
        is_there = not self.is_temporary and not self.is_going
        return (self.restart_lsn, self.xmin, self.invalidated) if is_there else None


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.patch = pytest.MonkeyPatch()
        self.directory = Path(self.temporary.name)
        self.disk = Disk(self.directory, self.patch)
        self.wal_start, self.wal_end = 4 * SEGMENT, 8 * SEGMENT
        self.known: dict[str, Known] = {}
        self.defects: list[Failure] = []
        self.now = 0
        self.values: dict[str, list[tuple[int, Value]]] = {name: [(0, None)] for name in NAMES}
        """What was to be on disk of each slot, and from when on."""
        self.saved_at = 0
        """When that save was asked for that is done, the latest of these."""
        self.invalidated_at: int | None = None
        """When slots were invalidated, if that is not on disk."""
        self.pids = 100
        self.start()

    def start(self) -> None:
        self.threads = HeldThreads()
        self.slots = Slots(self.directory, self.threads, SlotOptions(max_replication_slots=MOST))
        self.slots.recover(self.wal_start)
        self.sessions = [self.new_session() for _ in range(3)]
        self.waiting: list[tuple[Session, str, Deferred[None]]] = []

    def new_session(self) -> Session:
        self.pids += 1
        return Session(self.pids, self.end)

    def teardown(self) -> None:
        """In the end, all is on disk as clients know it."""
        try:
            if self.can_finish():
                self.threads.finish()
            self.threads.work_all()
            self.save()
            self.threads.work_all()
            assert self.slots.is_saved(1)
            self.clients_know_what_there_is()
            self.what_counts_as_saved_is_on_disk()
        finally:
            self.patch.undo()
            self.temporary.cleanup()

    # --- What is known ---------------------------------------------------------------------

    def note(self) -> None:
        """Something has been changed."""
        self.now += 1
        for name in NAMES:
            value = self.known[name].value if name in self.known else None
            if value != self.values[name][-1][1]:
                self.values[name].append((self.now, value))

    def possible(self, name: str) -> set[Value]:
        """What a restart may find: what the slot was when that save was asked for which is the
        last one done, or what it has been since; and none of it behind the WAL that there is."""
        last = max(at for at, _ in self.values[name] if at <= self.saved_at)
        found = [value for at, value in self.values[name] if at >= last]
        return {value and (value[0] and self.kept(value[0]), *value[1:]) for value in found}

    def kept(self, lsn: int) -> int:
        return max(lsn, self.wal_start)

    def watch(self, asked: Deferred[None], then: Callable[[], None] = lambda: None) -> None:
        """A save may fail for the disk's sake, and for nothing else.  ``then`` follows at once."""
        asked_at = self.now

        def done(result: None) -> None:
            self.saved_at = max(self.saved_at, asked_at)

        def failed(failure: Failure) -> None:
            failure.trap(OSError, SyncError)

        asked.addCallbacks(done, failed).addCallback(lambda _: then())
        asked.addErrback(self.defects.append)

    # --- Sessions --------------------------------------------------------------------------

    def do(self, number: int, command: Callable[[Session], None]) -> None:
        """Now, or when the session is done with what it is at."""
        session = self.sessions[number]
        if not session.is_busy:
            command(session)
        elif len(session.pending) < 2:
            session.pending.append(partial(command, session))

    def go_on(self, session: Session) -> None:
        session.is_busy = False
        while session.pending and not session.is_busy:
            session.pending.pop(0)()

    def end(self, session: Session) -> None:
        """The session is over, and another one comes."""
        session.pending.clear()
        self.waiting = [one for one in self.waiting if one[0] is not session]
        self.sessions[self.sessions.index(session)] = self.new_session()
        self.clean_up(session)

    def clean_up(self, session: Session) -> None:
        session.using = ""
        for name, known in list(self.known.items()):
            if known.holder is session and not known.is_changing:
                known.holder = None
                if known.is_temporary:
                    del self.known[name]
        self.note()
        self.slots.clean_up(session)

    def acquire(self, session: Session, name: str, *, to_drop: bool = False) -> Known | None:
        """Have the session acquire the slot, or be refused as it must be."""
        known = self.known.get(name)
        refusal: type[ReportedError]
        if known is None:
            refusal = UndefinedObject
        elif known.is_changing or known.holder not in (None, session):
            refusal = ObjectInUse
        elif known.invalidated and not to_drop:
            refusal = ObjectNotInPrerequisiteState
        else:
            self.slots.acquire(name, session, invalidated_too=to_drop)
            known.holder = session
            return known
        with pytest.raises(refusal):
            self.slots.acquire(name, session, invalidated_too=to_drop)
        return None

    def some(self, pick: int) -> str:
        """The name of a slot that there is, or now and then of none."""
        return [*self.known, "x"][pick % (len(self.known) + 1)]

    number, name, pick = st.integers(0, 2), st.sampled_from(NAMES), st.integers(0, 11)

    @initialize(backs=st.lists(st.integers(0, 60), max_size=MOST))
    def begin_with_some(self, backs: list[int]) -> None:
        for number, back in enumerate(backs):
            self.create(number, NAMES[number], back, False)
            self.threads.work_all()
            self.use(number, number)

    @rule(number=number, name=name, back=st.integers(-1, 99), temporary=st.booleans())
    def create(self, number: int, name: str, back: int, temporary: bool) -> None:
        def command(session: Session) -> None:
            assert self.slots.is_full == (len(self.known) == MOST)
            if name in self.known:
                with pytest.raises(DuplicateObject):
                    self.slots.check_new(name)
            elif not self.slots.is_full:
                self.slots.check_new(name)
                self.begin_to_create(
                    session, name, self.wal_end - back if back > 0 else 0, temporary
                )

        self.do(number, command)

    def begin_to_create(self, session: Session, name: str, lsn: int, temporary: bool) -> None:
        known = Known(lsn and self.kept(lsn), temporary, session, is_coming=not temporary)
        self.known[name] = known
        self.note()
        asked = self.slots.create(name, session, restart_lsn=lsn, temporary=temporary)
        if temporary:
            assert asked.called
            return
        session.is_busy = True

        def created(result: None) -> None:
            known.is_coming, known.holder = False, None
            self.note()

        def failed(failure: Failure) -> Failure:
            del self.known[name]
            self.note()
            return failure

        asked.addCallbacks(created, failed)
        self.watch(asked, partial(self.go_on, session))

    @precondition(lambda self: self.known)
    @rule(number=number, pick=pick, waits=st.booleans())
    def drop(self, number: int, pick: int, waits: bool) -> None:
        def command(session: Session) -> None:
            name = self.some(pick)
            known = self.acquire(session, name, to_drop=True)
            if known is not None:
                self.begin_to_drop(session, name, known)
            elif waits and name in self.known:
                session.is_busy = True
                self.wait(session, name)

        self.do(number, command)

    def wait(self, session: Session, name: str) -> None:
        def released(result: None) -> None:
            slot = self.slots.get(name)
            assert slot is None or slot.holder is None

        waiting = self.slots.when_released(name).addCallback(released)
        waiting.addErrback(lambda failure: failure.trap(CancelledError) and None)
        waiting.addErrback(self.defects.append)
        self.waiting.append((session, name, waiting))

    @precondition(lambda self: self.waiting)
    @rule(cancelled=st.booleans())
    def wait_on(self, cancelled: bool) -> None:
        """Whoever has waited tries again; if it is told to, or wants to no longer."""
        session, name, waiting = self.waiting.pop(0)
        if cancelled:
            waiting.cancel()
            self.go_on(session)
        elif not waiting.called:
            self.waiting.append((session, name, waiting))
        else:
            session.pending.insert(0, partial(self.drop_after_all, session, name))
            self.go_on(session)

    def drop_after_all(self, session: Session, name: str) -> None:
        known = self.acquire(session, name, to_drop=True)
        if known is not None:
            self.begin_to_drop(session, name, known)

    def begin_to_drop(self, session: Session, name: str, known: Known) -> None:
        slot = self.slots.get(name)
        assert slot is not None
        if session.using == name:
            session.using = ""
        if known.is_temporary:
            del self.known[name]
            assert self.slots.drop(slot).called
            return
        known.is_going = session.is_busy = True
        self.note()

        def dropped(result: None) -> None:
            del self.known[name]

        def failed(failure: Failure) -> Failure:
            known.is_going, known.holder = False, None
            self.note()
            return failure

        asked = self.slots.drop(slot).addCallbacks(dropped, failed)
        self.watch(asked, partial(self.go_on, session))

    @precondition(lambda self: self.known)
    @rule(number=number, pick=pick)
    def use(self, number: int, pick: int) -> None:
        def command(session: Session) -> None:
            name = self.some(pick)
            if not session.using and self.acquire(session, name) is not None:
                session.using = name

        self.do(number, command)

    def is_any_used(self) -> bool:
        return any(session.using for session in self.sessions)

    def some_user(self, number: int) -> Session:
        users = [session for session in self.sessions if session.using]
        return users[number % len(users)]

    @precondition(is_any_used)
    @rule(number=number, back=st.integers(-SEGMENT, 99), xmin=st.integers(0, 3))
    def confirm(self, number: int, back: int, xmin: int) -> None:
        self.confirm_to(self.some_user(number), self.wal_end - back, xmin)

    def confirm_to(self, session: Session, lsn: int, xmin: int) -> None:
        slot, known = self.slots.get(session.using), self.known[session.using]
        assert slot is not None
        slot.xmin = known.xmin = xmin
        if not known.invalidated:
            known.restart_lsn = self.kept(lsn)
        self.note()
        self.slots.confirm(slot, lsn)

    @precondition(is_any_used)
    @rule(more=st.integers(1, 40))
    def stream(self, more: int) -> None:
        self.wal_end += more
        for session in self.sessions:
            if session.using:
                self.confirm_to(session, self.wal_end, self.known[session.using].xmin)

    @precondition(is_any_used)
    @rule(number=number)
    def release(self, number: int) -> None:
        session = self.some_user(number)
        slot, known = self.slots.get(session.using), self.known[session.using]
        assert slot is not None
        if not known.is_temporary:
            known.holder = None
        session.using = ""
        self.slots.release(slot)

    @precondition(lambda self: self.known)
    @rule(number=number, is_over=st.booleans())
    def fail(self, number: int, is_over: bool) -> None:
        """A command fails, or the session ends in the middle of one."""
        if is_over:
            self.end(self.sessions[number])
        else:
            self.do(number, self.clean_up)

    # --- WAL -------------------------------------------------------------------------------

    @precondition(lambda self: self.known)
    @rule(keep=st.integers(0, 60))
    def remove(self, keep: int) -> None:
        """As a relay does: up to where it need not be kept, and no slot keeps it."""
        promised = [known.restart_lsn for known in self.known.values() if known.restart_lsn]
        assert self.slots.restart_lsn == min(promised, default=None)
        if self.invalidated_at is None:
            upto = min(self.wal_end - keep, self.slots.restart_lsn or self.wal_end)
            self.wal_start = self.kept(upto - upto % SEGMENT)
            self.slots.keep_from(self.wal_start)

    @precondition(lambda self: self.known)
    @rule(keep=st.integers(20, 120), is_slow=st.booleans())
    def invalidate(self, keep: int, is_slow: bool) -> None:
        lsn = self.wal_end - keep
        for session in self.sessions:
            session.is_slow = is_slow
        obsolete = [one for one in self.known.values() if 0 < one.restart_lsn < lsn]
        held = [one.holder for one in obsolete if one.holder and not one.is_changing]
        for known in obsolete:
            known.restart_lsn, known.invalidated = 0, WAL_REMOVED
        self.note()
        if obsolete:
            self.invalidated_at = self.now
        assert self.slots.invalidate_before(lsn) == bool(obsolete)
        assert all(session.is_told for session in held)
        self.save()

    # --- The disk --------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        asked_at = self.now
        asked = self.slots.save()

        def saved(result: None) -> None:
            if self.invalidated_at is not None and self.invalidated_at <= asked_at:
                self.invalidated_at = None

        self.watch(asked.addCallback(saved))

    def can_begin(self) -> bool:
        return self.threads.waiting > 0

    def can_finish(self) -> bool:
        return self.threads.is_busy and not self.can_begin()

    steps = st.sampled_from(["open walproto", "fsync walproto", "rename", "open .", "fsync ."])

    @precondition(can_begin)
    @rule(failing=st.one_of(st.none(), st.none(), steps))
    def begin(self, failing: str | None) -> None:
        if failing:
            self.disk.failing[failing] = errno.EIO
        self.threads.begin()
        self.disk.failing.clear()

    @precondition(can_finish)
    @rule()
    def finish(self) -> None:
        self.threads.finish()

    @precondition(lambda self: self.threads.is_busy)
    @rule(count=st.integers(1, 3))
    def work(self, count: int) -> None:
        """A save is done, and those that come of it."""
        for _ in range(count):
            if self.can_begin():
                self.threads.begin()
            if self.can_finish():
                self.threads.finish()

    @precondition(lambda self: self.known)
    @rule()
    def crash(self) -> None:
        """What was confirmed is there, and what was confirmed to be gone is not; an invalidation
        that was saved is still one."""
        self.start()
        found = {slot.name: slot for slot in self.slots}
        possible = {name: self.possible(name) for name in NAMES}
        self.known.clear()
        self.invalidated_at = None
        for name in NAMES:
            value: Value = None
            if slot := found.get(name):
                value = slot.restart_lsn, slot.xmin, slot.invalidated
                self.known[name] = Known(value[0], False, None, False, False, *value[1:])
            assert value in possible[name]
            self.values[name] = [(self.now, value)]
        self.saved_at = self.now

    # --- Always ----------------------------------------------------------------------------

    @invariant()
    def no_wal_is_gone_that_a_slot_reserves(self) -> None:
        for known in self.known.values():
            assert known.restart_lsn == 0 or known.restart_lsn >= self.wal_start

    @invariant()
    def clients_know_what_there_is(self) -> None:
        """And so each slot is used by one of them at most, for none is refused wrongly."""
        assert self.defects == []
        assert {slot.name for slot in self.slots} == set(self.known)
        for slot in self.slots:
            known = self.known[slot.name]
            assert slot.holder is known.holder
            assert slot.is_temporary == known.is_temporary
            assert (slot.is_changing, slot.is_going) == (known.is_changing, known.is_going)
            now = (known.restart_lsn, known.xmin, known.invalidated)
            assert (slot.restart_lsn, slot.xmin, slot.invalidated) == now

    @invariant()
    def whoever_waits_is_told(self) -> None:
        for _, name, waiting in self.waiting:
            assert waiting.called or self.known[name].holder is not None

    @invariant()
    def what_counts_as_saved_is_on_disk(self) -> None:
        if self.slots.is_saved(1) and not self.threads.is_busy:
            states, problems = read_slots(self.directory)
            assert problems == []
            on_disk = {state.name: state.restart_lsn for state in states}
            permanent = {name: one for name, one in self.known.items() if not one.is_temporary}
            assert on_disk == {name: one.restart_lsn for name, one in permanent.items()}


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, derandomize=True
)
