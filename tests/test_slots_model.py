"""Slots under anything: creations, removals and positions in any order, saves that fail at any
step, WAL that is removed, and crashes."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.disk import Disk
from tests.slots_fakes import quick_directory
from tests.slots_model import MOST, NAMES, SEGMENT, Clients, Session


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.temporary = quick_directory()
        self.patch = pytest.MonkeyPatch()
        self.disk = Disk(Path(self.temporary.name), self.patch)
        self.clients = Clients(Path(self.temporary.name))

    def teardown(self) -> None:
        """In the end, all is on disk as clients know it."""
        clients = self.clients
        try:
            self.work(1)
            clients.threads.work_all()
            clients.save()
            clients.threads.work_all()
            assert clients.slots.is_saved(1)
            clients.check()
            clients.check_saved()
        finally:
            self.patch.undo()
            self.temporary.cleanup()

    # --- Sessions --------------------------------------------------------------------------

    number, pick = st.integers(0, 2), st.integers(0, 11)

    def is_any_known(self) -> bool:
        return bool(self.clients.known)

    def some(self, pick: int) -> str:
        """The name of a slot that there is, or now and then of none."""
        return [*self.clients.known, "x"][pick % (len(self.clients.known) + 1)]

    def is_any_used(self) -> bool:
        return bool(self.users())

    def users(self) -> list[Session]:
        return [session for session in self.clients.sessions if session.using]

    @initialize(backs=st.lists(st.integers(0, 60), max_size=MOST))
    def begin_with_some(self, backs: list[int]) -> None:
        for number, back in enumerate(backs):
            self.create(number, NAMES[number], back, False)
            self.clients.threads.work_all()
            self.use(number, number)

    @rule(
        number=number,
        name=st.sampled_from(NAMES),
        back=st.integers(-1, 99),
        temporary=st.booleans(),
    )
    def create(self, number: int, name: str, back: int, temporary: bool) -> None:
        lsn = self.clients.wal_end - back if back > 0 else 0
        self.clients.do(
            number, partial(self.clients.create, name=name, lsn=lsn, temporary=temporary)
        )

    @precondition(is_any_known)
    @rule(number=number, pick=pick, waits=st.booleans())
    def drop(self, number: int, pick: int, waits: bool) -> None:
        self.clients.do(number, partial(self.clients.drop, name=self.some(pick), waits=waits))

    @precondition(lambda self: self.clients.waiting)
    @rule(is_cancelled=st.booleans())
    def wait_on(self, is_cancelled: bool) -> None:
        """Whoever waits wants to no longer; or tries again, if it has been told to."""
        clients = self.clients
        session, name, waiting = clients.waiting.pop(0)
        if is_cancelled:
            waiting.cancel()
            clients.go_on(session)
        elif waiting.called:
            session.pending.insert(0, partial(clients.drop, session, name, True))
            clients.go_on(session)
        else:
            clients.waiting.append((session, name, waiting))

    @precondition(is_any_known)
    @rule(number=number, pick=pick)
    def use(self, number: int, pick: int) -> None:
        self.clients.do(number, partial(self.clients.use, name=self.some(pick)))

    @precondition(is_any_used)
    @rule(number=number)
    def release(self, number: int) -> None:
        users = self.users()
        self.clients.release(users[number % len(users)])

    @precondition(is_any_used)
    @rule(number=number, back=st.integers(-SEGMENT, 99), xmin=st.integers(0, 3))
    def confirm(self, number: int, back: int, xmin: int) -> None:
        users = self.users()
        self.clients.confirm(users[number % len(users)], self.clients.wal_end - back, xmin)

    @precondition(is_any_used)
    @rule(more=st.integers(1, 40))
    def stream(self, more: int) -> None:
        """WAL comes, and whoever listens has it."""
        clients = self.clients
        clients.wal_end += more
        for session in self.users():
            clients.confirm(session, clients.wal_end, clients.known[session.using].xmin)

    @precondition(is_any_known)
    @rule(number=number, is_over=st.booleans())
    def fail(self, number: int, is_over: bool) -> None:
        """A command fails, or the session ends in the middle of one."""
        if is_over:
            self.clients.end(self.clients.sessions[number])
        else:
            self.clients.do(number, self.clients.clean_up)

    # --- WAL -------------------------------------------------------------------------------

    @precondition(is_any_known)
    @rule(keep=st.integers(0, 60))
    def remove(self, keep: int) -> None:
        """As a relay does: up to where it need not be kept, and no slot keeps it."""
        clients = self.clients
        if clients.invalidated_at is None:
            upto = min(clients.wal_end - keep, clients.slots.restart_lsn or clients.wal_end)
            clients.remove_before(upto - upto % SEGMENT)

    @precondition(is_any_known)
    @rule(keep=st.integers(20, 120), is_slow=st.booleans())
    def invalidate(self, keep: int, is_slow: bool) -> None:
        for session in self.clients.sessions:
            session.is_slow = is_slow
        self.clients.invalidate_before(self.clients.wal_end - keep)
        self.clients.save()

    # --- The disk --------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        self.clients.save()

    def can_begin(self) -> bool:
        return self.clients.threads.waiting > 0

    def can_finish(self) -> bool:
        return self.clients.threads.is_busy and not self.can_begin()

    steps = st.sampled_from(["open walproto", "fsync walproto", "rename", "open .", "fsync ."])

    @precondition(can_begin)
    @rule(failing=st.one_of(st.none(), st.none(), steps))
    def begin(self, failing: str | None) -> None:
        if failing:
            self.disk.failing[failing] = errno.EIO
        self.clients.threads.begin()
        self.disk.failing.clear()

    @precondition(can_finish)
    @rule()
    def finish(self) -> None:
        self.clients.threads.finish()

    @precondition(lambda self: self.clients.threads.is_busy)
    @rule(count=st.integers(1, 3))
    def work(self, count: int) -> None:
        """A save is done, and those that come of it."""
        for _ in range(count):
            if self.can_begin():
                self.begin(None)
            if self.can_finish():
                self.finish()

    @precondition(is_any_known)
    @rule()
    def crash(self) -> None:
        self.clients.crash()

    # --- Always ----------------------------------------------------------------------------

    @invariant()
    def no_wal_is_gone_that_a_slot_reserves(self) -> None:
        promised = [one.restart_lsn for one in self.clients.known.values() if one.restart_lsn]
        assert self.clients.slots.restart_lsn == min(promised, default=None)
        assert all(lsn >= self.clients.wal_start for lsn in promised)

    @invariant()
    def sessions_know_what_there_is(self) -> None:
        self.clients.check()

    @invariant()
    def what_counts_as_saved_is_on_disk(self) -> None:
        self.clients.check_saved()


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, derandomize=True
)
