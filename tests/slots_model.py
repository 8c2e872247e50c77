"""Sessions that use slots, and what they must find, told without the slots: what each is told, who
holds what, which WAL is promised, and what a disk may hold after a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

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

Value = tuple[int, int, str] | None
"""What is on disk of a slot: restart_lsn, xmin, why it is invalidated; None if nothing is."""


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
    xmin: int = 0
    invalidated: str = ""
    holder: Session | None = None
    is_temporary: bool = False
    is_coming: bool = False
    is_going: bool = False

    @property
    def is_changing(self) -> bool:
        return self.is_coming or self.is_going

    @property
    def value(self) -> Value:
        """What is to be on disk of it."""
        is_there = not self.is_temporary and not self.is_going
        return (self.restart_lsn, self.xmin, self.invalidated) if is_there else None


class Clients:
    """Three sessions, the slots in ``directory``, and WAL."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wal_start, self.wal_end = 0, 8 * SEGMENT
        self.floor = 0
        """Up to where WAL may be removed as soon as that is on disk."""
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
        self.sessions = [self.new_session() for _ in range(3)]
        self.waiting: list[tuple[Session, str, Deferred[None]]] = []

    def new_session(self) -> Session:
        self.pids += 1
        return Session(self.pids, self.end)

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
        return max(lsn, self.floor)

    def check(self) -> None:
        """All is as it is known; so each slot is used by one session at most."""
        assert self.defects == []
        assert {slot.name for slot in self.slots} == set(self.known)
        for slot in self.slots:
            known = self.known[slot.name]
            assert slot.holder is known.holder
            assert slot.is_temporary == known.is_temporary
            assert (slot.is_changing, slot.is_going) == (known.is_changing, known.is_going)
            now = (known.restart_lsn, known.xmin, known.invalidated)
            assert (slot.restart_lsn, slot.xmin, slot.invalidated) == now
        for _, name, waiting in self.waiting:
            assert waiting.called or self.known[name].holder is not None

    def check_saved(self) -> None:
        """What counts as saved is on disk, and nothing else is."""
        if self.slots.is_saved(1) and not self.threads.is_busy:
            file = read_slots(self.directory)
            states, problems = file.slots, file.problems
            assert problems == []
            permanent = {name: one for name, one in self.known.items() if not one.is_temporary}
            assert {state.name: state.restart_lsn for state in states} == {
                name: one.restart_lsn for name, one in permanent.items()
            }

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

    def use(self, session: Session, name: str) -> None:
        if not session.using and self.acquire(session, name) is not None:
            session.using = name

    def release(self, session: Session) -> None:
        slot, known = self.slots.get(session.using), self.known[session.using]
        assert slot is not None
        if not known.is_temporary:
            known.holder = None
        session.using = ""
        self.slots.release(slot)

    def confirm(self, session: Session, lsn: int, xmin: int) -> None:
        slot, known = self.slots.get(session.using), self.known[session.using]
        assert slot is not None
        slot.xmin = known.xmin = xmin
        if not known.invalidated:
            known.restart_lsn = self.kept(lsn)
        self.note()
        self.slots.confirm(slot, lsn)

    # --- Slots come and go -----------------------------------------------------------------

    def create(self, session: Session, name: str, lsn: int, temporary: bool) -> None:
        assert self.slots.is_full == (len(self.known) == MOST)
        if name in self.known:
            with pytest.raises(DuplicateObject):
                self.slots.check_new(name)
            return
        self.slots.check_new(name)
        if self.slots.is_full:
            return
        known = Known(lsn and self.kept(lsn), holder=session, is_temporary=temporary)
        self.known[name] = known
        known.is_coming = session.is_busy = not temporary
        self.note()
        asked = self.slots.create(name, session, restart_lsn=lsn, temporary=temporary)
        if temporary:
            assert asked.called
            return

        def created(result: None) -> None:
            known.is_coming, known.holder = False, None

        def failed(failure: Failure) -> Failure:
            del self.known[name]
            self.note()
            return failure

        self.watch(asked.addCallbacks(created, failed), partial(self.go_on, session))

    def drop(self, session: Session, name: str, waits: bool) -> None:
        known = self.acquire(session, name, to_drop=True)
        if known is None:
            if waits and name in self.known:
                session.is_busy = True
                self.wait(session, name)
            return
        slot = self.slots.get(name)
        assert slot is not None
        session.using = "" if session.using == name else session.using
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

    def wait(self, session: Session, name: str) -> None:
        def released(result: None) -> None:
            slot = self.slots.get(name)
            assert slot is None or slot.holder is None

        def cancelled(failure: Failure) -> None:
            failure.trap(CancelledError)

        waiting = self.slots.when_released(name).addCallbacks(released, cancelled)
        waiting.addErrback(self.defects.append)
        self.waiting.append((session, name, waiting))

    def invalidate_before(self, lsn: int) -> None:
        obsolete = [one for one in self.known.values() if 0 < one.restart_lsn < lsn]
        held = [one.holder for one in obsolete if one.holder and not one.is_changing]
        for known in obsolete:
            known.restart_lsn, known.invalidated = 0, WAL_REMOVED
        self.note()
        if obsolete:
            self.invalidated_at = self.now
        assert self.slots.invalidate_before(lsn) == bool(obsolete)
        assert all(session.is_told for session in held)

    def remove_before(self, lsn: int) -> None:
        self.floor = max(self.floor, lsn)
        self.slots.keep_from(self.floor)

        def saved(result: None) -> None:
            self.wal_start = max(self.wal_start, lsn)

        self.watch(self.slots.save().addCallback(saved))

    # --- The disk --------------------------------------------------------------------------

    def save(self) -> None:
        asked_at = self.now

        def saved(result: None) -> None:
            if self.invalidated_at is not None and self.invalidated_at <= asked_at:
                self.invalidated_at = None

        self.watch(self.slots.save().addCallback(saved))

    def watch(self, asked: Deferred[None], then: Callable[[], None] = lambda: None) -> None:
        """A save may fail for the disk's sake, and for nothing else.  ``then`` follows at once."""
        asked_at = self.now

        def done(result: None) -> None:
            self.saved_at = max(self.saved_at, asked_at)

        def failed(failure: Failure) -> None:
            failure.trap(OSError, SyncError)

        asked.addCallbacks(done, failed).addCallback(lambda _: then())
        asked.addErrback(self.defects.append)

    def crash(self) -> None:
        """What a restart finds is what may be on disk: what was confirmed is there, and what was
        confirmed to be gone is not; an invalidation that was saved is still one."""
        self.start()
        file = read_slots(self.directory)
        assert self.wal_start <= file.removed_to <= self.floor
        self.floor = file.removed_to
        self.known.clear()
        self.invalidated_at = None
        for name in NAMES:
            value: Value = None
            if slot := self.slots.get(name):
                value = slot.restart_lsn, slot.xmin, slot.invalidated
                self.known[name] = Known(*value)
            assert value in self.possible(name)
            self.values[name] = [(self.now, value)]
        self.saved_at = self.now
