"""The store: what it tells is true, many messages go into one sync, and what goes wrong."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from tests.test_watch import open_files
from tests.upstream_fakes import Logged, Stored
from tests.wal_builder import MB, WalBuilder
from walproto.lsn import segment_name
from walproto.timeline.holding import examine
from walproto.timeline.received import Received
from walproto.upstream import store as store_module
from walproto.upstream.store import LITTLE, RETRY, UNPROVEN, Store
from walproto.wal.writer import SyncError

SIZE = 64 * 1024
START = 16 * SIZE


class Begun(Stored):
    """A store that has begun timeline 1 at START, with segments of SIZE bytes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, Clock())
        self.given = b""
        self.random = random.Random(7)
        self.store.begin(1, START, SIZE, synced_to=START, flush_lsn=0)

    def append(self, size: int = 1000) -> None:
        data = self.random.randbytes(size)
        self.given += data
        self.store.append(memoryview(data))

    @property
    def end(self) -> int:
        return START + len(self.given)

    @property
    def acknowledged(self) -> tuple[int, int]:
        """What is told as flushed, and what those see who read."""
        return self.store.flush_lsn, self.received.synced_to

    def partial(self, lsn: int = START) -> Path:
        return self.directory / f"{segment_name(1, lsn // SIZE, SIZE)}.partial"

    def on_disk(self) -> bytes:
        """What the files hold, from START on, up to the end of the last one."""
        data, lsn = b"", START
        while True:
            partial = self.partial(lsn)
            path = partial if partial.exists() else partial.with_suffix("")
            if not path.is_file():
                return data
            assert path.stat().st_size == SIZE
            data += path.read_bytes()
            lsn += SIZE

    def check_all_on_disk(self) -> None:
        assert self.on_disk()[: len(self.given)] == self.given
        assert self.acknowledged == (self.end, self.end)

    def block(self) -> None:
        """Have nothing be written any more: where the first file should be is a directory."""
        self.partial().mkdir()

    def unblock(self) -> None:
        self.partial().rmdir()


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Begun]:
    made = Begun(tmp_path)
    yield made
    ensureDeferred(made.store.stop())
    assert made.clock.getDelayedCalls() == []


@pytest.fixture
def logged() -> Iterator[Logged]:
    with capturedLogs() as events:
        yield Logged(events)


def failing(number: int) -> Callable[..., int]:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


# -- What is told, and when ----------------------------------------------------------------------


def test_nothing_counts_before_it_is_synced(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it waits, nor while it is written, nor when it is, but when the sync is done."""
    synced = []

    def fdatasync(fd: int) -> None:
        synced.append((begun.acknowledged, begun.on_disk()[:1000], begun.threads.telling))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    begun.append()
    assert begun.store.received_lsn == begun.end
    assert begun.acknowledged == (0, START)
    begun.threads.begin()
    assert synced == [((0, START), begun.given, 1)]  # that it is written, is told before
    assert (begun.store.written_lsn, *begun.acknowledged) == (0, 0, START)
    begun.threads.hear()
    assert (begun.store.written_lsn, *begun.acknowledged) == (begun.end, 0, START)
    begun.threads.finish()
    assert (begun.store.written_lsn, *begun.acknowledged) == (begun.end, begun.end, begun.end)
    assert begun.progress == [(begun.end, 0), (begun.end, begun.end)]


class Threaded:
    """Threads of which there is one; that a job is done, nobody hears."""

    def __init__(self) -> None:
        self.told = 0
        self.jobs: list[threading.Thread] = []

    def run(self, work: Callable[[], object]) -> Deferred[object]:
        self.jobs.append(threading.Thread(target=work))
        self.jobs[-1].start()
        return Deferred()

    def tell(self, what: Callable[..., object], *arguments: object) -> None:
        self.told += 1


@pytest.mark.parametrize(("size", "is_little"), [(1000, True), (LITTLE, True), (LITTLE + 1, False)])
def test_that_a_little_is_written_is_known_while_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, is_little: bool
) -> None:
    """Without the thread having to tell it; of more it is told."""
    monkeypatch.setattr(store_module, "WAIT", 60.0)
    syncing, is_enough = threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        syncing.set()
        is_enough.wait()

    threads, progress = Threaded(), []
    received = Received()
    store = Store(
        tmp_path,
        received,
        Clock(),
        threads,
        lambda: progress.append((store.written_lsn, store.flush_lsn, received.written_to)),
        lambda error: None,
    )
    store.begin(1, 16 * MB, MB, synced_to=16 * MB, flush_lsn=0)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    store.append(memoryview(bytes(size)))
    end = 16 * MB + size
    assert progress == ([(end, 0, end)] if is_little else [])
    assert syncing.wait(60)
    assert threads.told == (not is_little)
    is_enough.set()
    threads.jobs[0].join()


def test_what_comes_while_the_disk_is_busy_goes_into_one_sync(
    begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    for job in range(1, 5):
        begun.append(100)
        assert (begun.threads.begun, begun.threads.waiting) == (job - 1, 1)
        begun.threads.begin()
        for _ in range(200):
            begun.append(10)
        assert begun.threads.waiting == 0
        begun.threads.finish()
        assert begun.store.flush_lsn == begun.end - 2000
        assert begun.threads.waiting == 1
        begun.threads.work()
        begun.check_all_on_disk()
        assert begun.threads.waiting == 0
        begun.threads.begun = job
    assert len(syncs) == 8


def test_a_long_row_of_small_messages_is_written_over_segments(begun: Begun) -> None:
    """More buffers than one system call takes, over the ends of several segments."""
    begun.append(1)
    begun.threads.begin()
    for _ in range(3000):
        begun.append(97)
    begun.threads.finish()
    begun.threads.work()
    begun.check_all_on_disk()
    last = begun.end - begun.end % SIZE
    names = [segment_name(1, lsn // SIZE, SIZE) for lsn in range(START, last, SIZE)]
    assert len(names) == 4
    assert sorted(path.name for path in begun.directory.iterdir()) == [
        *names,
        begun.partial(last).name,
    ]
    for lsn in range(START, last, SIZE):
        assert not begun.received.is_being_written(1, lsn + SIZE)
    assert begun.received.is_being_written(1, last + SIZE)


def test_a_segment_is_complete_when_its_last_byte_is_there(begun: Begun) -> None:
    begun.append(SIZE)
    begun.threads.work()
    (only,) = begun.directory.iterdir()
    assert only == begun.partial().with_suffix("")
    begun.check_all_on_disk()
    begun.append(1)
    begun.threads.work()
    assert sorted(begun.directory.iterdir()) == [only, begun.partial(START + SIZE)]


def test_nothing_is_made_of_nothing(begun: Begun) -> None:
    begun.store.append(memoryview(b""))
    assert not begun.threads.is_busy
    assert begun.store.received_lsn == START


def test_it_is_full_until_enough_is_proven(begun: Begun) -> None:
    begun.append(UNPROVEN)
    assert not begun.store.is_full
    begun.append(1)
    assert begun.store.is_full
    seen = []
    begun.observer = lambda: seen.append(begun.store.is_full)
    begun.threads.begin()
    assert begun.store.is_full
    begun.threads.hear()  # it is written, but nobody has looked at it yet
    assert seen == [True]
    assert begun.store.flush_lsn == 0
    begun.threads.finish()
    assert not begun.store.is_full
    begun.threads.work_all()
    begun.check_all_on_disk()


def test_what_is_already_there_is_written_over(tmp_path: Path) -> None:
    """The end of what a directory holds, torn in the middle of a page, is gone on from."""
    wal = WalBuilder()
    wal.records_to(wal.start + 40000)
    (path,) = wal.write_to(tmp_path, partial=True)
    torn = wal.start + 20001
    path.write_bytes(wal.image[:20001] + b"\xff" * 500 + bytes(wal.size - 20501))
    holding = examine(tmp_path)
    assert holding is not None
    assert holding.end == wal.end_of(torn)
    stored = Stored(tmp_path, Clock())
    stored.store.go_on_from(holding)
    assert stored.store.identity == holding.identity
    assert stored.store.tli == 1
    for lsn in (stored.store.received_lsn, stored.store.written_lsn, stored.store.flush_lsn):
        assert lsn == holding.end
    stored.store.append(memoryview(wal.image[holding.end - wal.start : wal.lsn - wal.start]))
    stored.threads.work()
    assert stored.store.flush_lsn == wal.lsn
    assert path.read_bytes() == wal.image
    ensureDeferred(stored.store.stop())


def test_another_timeline_goes_into_files_of_its_own(begun: Begun) -> None:
    begun.append(SIZE + 3000)
    begun.threads.work()
    old = begun.on_disk()
    switch = begun.end
    begun.store.begin(2, START + SIZE, SIZE, synced_to=START + SIZE, flush_lsn=switch)
    assert (begun.store.tli, begun.store.received_lsn) == (2, START + SIZE)
    begun.store.append(memoryview(old[SIZE : SIZE + 2000]))
    begun.threads.work()
    # What the old timeline had beyond counts as long as the new one has less.
    assert (begun.store.written_lsn, begun.store.flush_lsn) == (switch, switch)
    assert begun.received.synced_to == START + SIZE + 2000
    assert begun.received.visible_to(1) > switch
    begun.store.append(memoryview(old[SIZE + 2000 : SIZE + 3000] + b"new"))
    begun.threads.work()
    assert (begun.store.written_lsn, begun.store.flush_lsn) == (switch + 3, switch + 3)
    assert begun.on_disk() == old
    path = begun.directory / f"{segment_name(2, START // SIZE + 1, SIZE)}.partial"
    assert path.read_bytes()[:3004] == old[SIZE : SIZE + 3000] + b"new\0"


# -- When it cannot be written -------------------------------------------------------------------


def test_a_write_that_fails_is_tried_again_until_it_goes(begun: Begun, logged: Logged) -> None:
    begun.block()
    begun.append()
    begun.threads.work()
    assert logged.lines() == [
        f"critical: cannot write to {begun.directory}: Is a directory: receiving pauses until it "
        "can be written to again; what is here is served"
    ]
    for _ in range(5):
        assert begun.store.cannot_write
        assert begun.store.is_full
        assert begun.acknowledged == (0, START)
        begun.append(300)
        begun.clock.advance(RETRY / 2)
        assert not begun.threads.is_busy
        begun.clock.advance(RETRY / 2)
        assert begun.threads.work_all() == 1
    assert logged.lines() == []
    begun.unblock()
    begun.append(300)
    begun.clock.advance(RETRY)
    assert begun.threads.work_all() == 1
    assert not begun.store.is_full
    begun.check_all_on_disk()
    assert logged.lines() == [f"warn: writing to {begun.directory} again"]
    assert begun.failures == []
    begun.append()
    begun.threads.work()
    begun.check_all_on_disk()
    assert logged.lines() == []


def test_each_new_trouble_is_told_once(
    begun: Begun, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun.append()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        begun.threads.work()
        assert list(begun.directory.iterdir()) == []  # room that is not there is not held either
        begun.clock.advance(RETRY)
        begun.threads.work()
        patch.setattr(os, "posix_fallocate", failing(errno.EDQUOT))
        begun.clock.advance(RETRY)
        begun.threads.work()
    begun.clock.advance(RETRY)
    begun.threads.work()
    begun.append()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(errno.EDQUOT))
        begun.threads.work()
    begun.clock.advance(RETRY)
    begun.threads.work()
    begun.check_all_on_disk()
    assert [line.split(": ")[2] if "cannot" in line else "again" for line in logged.lines()] == [
        "No space left on device",
        "Disk quota exceeded",
        "again",
        "Disk quota exceeded",
        "again",
    ]


def test_what_went_before_the_trouble_counts(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes less at a time than it is given, and is full in the middle of it."""
    room = 5000
    pwritev = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = b"".join(buffers)[: min(1700, room)]
        room -= len(data)
        return pwritev(fd, [data], offset)

    monkeypatch.setattr(os, "pwritev", short)
    for _ in range(8):
        begun.append(1000)
    begun.threads.work_all()
    assert begun.acknowledged == (START + 5000, START + 5000)
    begun.append(1000)
    room = SIZE
    begun.clock.advance(RETRY)
    begun.threads.work()
    begun.check_all_on_disk()


# -- When it cannot be synced --------------------------------------------------------------------

STEPS = ["fdatasync", "fsync", "rename", "last fdatasync"]


@pytest.mark.parametrize("step", STEPS)
def test_a_sync_that_fails_is_the_end(
    begun: Begun, step: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the data, of the file and the directory when it is made, of the whole segment and its
    name: nothing is acknowledged any more, though the disk be well again."""
    begun.append()
    if step != "fsync":
        begun.threads.work()
    before = begun.acknowledged
    begun.append(SIZE if step in ("rename", "last fdatasync") else 1000)
    idle = begun.store.when_idle()
    with monkeypatch.context() as patch:
        patch.setattr(os, step.split()[-1], failing(errno.EIO))
        begun.threads.begin()
    begun.append()
    begun.threads.finish()
    (failure,) = begun.failures
    assert isinstance(failure, SyncError)
    assert str(failure).endswith(": Input/output error")
    assert idle.called
    assert begun.store.is_closed
    for _ in range(3):
        begun.append()
        begun.clock.advance(RETRY)
    assert not begun.threads.is_busy
    assert begun.store.when_idle().called
    assert begun.acknowledged == before
    assert len(begun.failures) == 1
    assert logged.lines() == []  # it is for whoever was told


def test_a_defect_ends_it_as_well(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.append()
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 1 // 0)
    begun.threads.work()
    (failure,) = begun.failures
    assert isinstance(failure, ZeroDivisionError)
    begun.append()
    assert not begun.threads.is_busy
    assert begun.acknowledged == (0, START)


# -- When it is to stop --------------------------------------------------------------------------


class Stopping:
    """A store told to stop, and somebody else who waits until it is idle."""

    def __init__(self, begun: Begun) -> None:
        self.idle = begun.store.when_idle()
        self.stopped: Deferred[None] = ensureDeferred(begun.store.stop())
        begun.append(123)
        begun.given = begun.given[:-123]  # it takes nothing more

    @property
    def is_over(self) -> bool:
        assert self.idle.called == self.stopped.called
        return bool(self.stopped.called)


def test_it_stops_when_it_is_idle(begun: Begun) -> None:
    before = open_files()
    assert Stopping(begun).is_over
    assert not begun.threads.is_busy
    assert open_files() == before


def test_it_stops_when_all_it_has_is_on_disk(begun: Begun) -> None:
    before = open_files()
    begun.append()
    begun.threads.begin()
    begun.append()
    stopping = Stopping(begun)
    begun.threads.finish()
    assert not stopping.is_over
    begun.threads.work()
    assert stopping.is_over
    begun.check_all_on_disk()
    assert not begun.threads.is_busy
    assert open_files() == before


def test_it_stops_when_what_it_has_cannot_be_written(begun: Begun) -> None:
    begun.block()
    begun.append()
    begun.threads.begin()
    stopping = Stopping(begun)
    assert not stopping.is_over
    begun.threads.finish()
    assert stopping.is_over
    assert begun.clock.getDelayedCalls() == []
    assert begun.acknowledged == (0, START)


def test_it_stops_while_it_waits_to_try_again(begun: Begun) -> None:
    before = open_files()
    begun.append()
    begun.threads.work()
    acknowledged = begun.acknowledged
    begun.append(SIZE)
    begun.partial(START + SIZE).mkdir()
    begun.threads.work()
    assert begun.store.cannot_write
    assert Stopping(begun).is_over
    assert begun.clock.getDelayedCalls() == []
    assert not begun.threads.is_busy
    assert begun.acknowledged == (START + SIZE, START + SIZE) > acknowledged
    assert open_files() == before


def test_it_stops_when_a_sync_fails(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.append()
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
    stopping = Stopping(begun)
    begun.threads.work()
    assert stopping.is_over
    assert len(begun.failures) == 1
    assert begun.acknowledged == (0, START)


# -- Whatever happens ----------------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    """Data comes, jobs are done, writes fail and go again, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.begun = Begun(Path(self.temporary.name))
        self.patch = pytest.MonkeyPatch()
        self.told = (0, 0)
        self.is_full_disk = False

    def teardown(self) -> None:
        self.patch.undo()
        while self.begun.threads.is_busy or self.begun.store.cannot_write:
            if self.can_finish():
                self.begun.threads.finish()
            self.begun.clock.advance(RETRY)
            self.begun.threads.work_all()
        if self.begun.given:
            self.begun.check_all_on_disk()
        assert self.begun.failures == []
        ensureDeferred(self.begun.store.stop())
        self.temporary.cleanup()

    def can_begin(self) -> bool:
        return self.begun.threads.waiting > 0

    def can_finish(self) -> bool:
        return self.begun.threads.is_busy and not self.can_begin()

    @rule(size=st.sampled_from([1, 8, 5000, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE]))
    def append(self, size: int) -> None:
        self.begun.append(size)

    @precondition(can_begin)
    @rule()
    def begin(self) -> None:
        self.begun.threads.begin()

    @precondition(can_finish)
    @rule()
    def hear(self) -> None:
        self.begun.threads.hear()

    @precondition(can_finish)
    @rule()
    def finish(self) -> None:
        self.begun.threads.finish()

    @rule(seconds=st.sampled_from([0.3, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.begun.clock.advance(seconds)

    @precondition(lambda self: not self.is_full_disk)
    @rule(room=st.integers(0, 2 * SIZE), call=st.sampled_from(["pwritev", "posix_fallocate"]))
    def disk_fills(self, room: int, call: str) -> None:
        self.is_full_disk = True
        left = room
        real: Callable[..., int | None] = getattr(os, call)

        def take(fd: int, what: object, *rest: int) -> int | None:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if call == "posix_fallocate":
                left = 0
                return real(fd, what, *rest)
            assert isinstance(what, list)
            data = b"".join(what)[:left]
            left -= len(data)
            return real(fd, [data], *rest)

        self.patch.setattr(os, call, take)

    @precondition(lambda self: self.is_full_disk)
    @rule()
    def disk_has_room(self) -> None:
        self.is_full_disk = False
        self.patch.undo()

    @invariant()
    def only_what_is_true_is_told(self) -> None:
        begun, store = self.begun, self.begun.store
        assert store.flush_lsn <= store.written_lsn <= store.received_lsn == begun.end
        assert begun.received.synced_to == max(store.flush_lsn, START)
        count = max(store.written_lsn - START, 0)
        assert begun.on_disk()[:count] == begun.given[:count]
        told = (store.written_lsn, store.flush_lsn)
        assert all(now >= before for now, before in zip(told, self.told, strict=True))
        self.told = told

    @invariant()
    def what_is_told_is_what_was_progressed_to(self) -> None:
        assert (self.begun.progress or [(0, 0)])[-1] == self.told


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
