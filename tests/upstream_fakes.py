"""What the tests of receiving have in common: a thread, a server and WAL, all in memory.

Nothing happens but what the test says, and in the order in which it says so: a job runs when it is
told to, a server answers from a script, time is a :class:`twisted.internet.task.Clock`.  What is
sent to a server is taken apart here by hand (:func:`told`), and what a server sends is built by
hand, without the declarations of walproto.wire: they are what is being tested.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent
from twisted.python.failure import Failure

from tests.wal_builder import WalBuilder
from walproto.lsn import format_lsn
from walproto.timeline.received import Received
from walproto.upstream.connection import Answer, Row, UpstreamError
from walproto.upstream.store import Store

#: Seconds from the Unix epoch to that of PostgreSQL, 2000-01-01.
EPOCH = 946_684_800


# --- A thread ------------------------------------------------------------------------------------


class HeldThreads:
    """A :class:`~walproto.upstream.store.Threads` whose jobs run when the test says so.

    A job is run by :meth:`begin`; what it tells on its way arrives with :meth:`hear`, and that it
    is done with :meth:`finish`.  :meth:`work` is all three.
    """

    def __init__(self) -> None:
        self.begun = 0
        self._jobs: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self._told: list[Callable[[], Any]] = []
        self._result: tuple[Deferred[Any], Any] | None = None

    # --- Threads ---------------------------------------------------------------------------

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        job = Deferred[Any]()
        self._jobs.append((work, job))
        return job

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        self._told.append(partial(what, *arguments))

    # --- for tests to call -----------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many jobs have not been begun."""
        return len(self._jobs)

    @property
    def telling(self) -> int:
        """How much has been told that has not arrived."""
        return len(self._told)

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs or self._result)

    def begin(self) -> None:
        """Run the oldest job; nobody hears of it yet."""
        assert self._result is None
        work, job = self._jobs.pop(0)
        self.begun += 1
        try:
            self._result = job, work()
        except Exception:
            self._result = job, Failure()

    def hear(self) -> None:
        """What the job has told on its way arrives."""
        while self._told:
            self._told.pop(0)()

    def finish(self) -> None:
        """The job is done."""
        self.hear()
        assert self._result is not None
        (job, result), self._result = self._result, None
        job.callback(result)

    def work(self) -> None:
        """Run the oldest job from its beginning to its end."""
        self.begin()
        self.finish()

    def work_all(self) -> int:
        """Run all there are, and those that come of them; how many these were."""
        before = self.begun
        while self._jobs:
            self.work()
        return self.begun - before


# --- A connection, and the server at its other end -----------------------------------------------


class ScriptedConnection:
    """An :class:`~walproto.upstream.connection.UpstreamConnection` that the test has in hand.

    ``answer`` gives what a command is answered: an Answer, an UpstreamError, or None for nothing
    at all.  :attr:`asked` are the commands, :attr:`sent` is what was sent while it streams.
    """

    peer = "192.0.2.1:5432"

    def __init__(
        self, clock: Clock, answer: Callable[[str], Answer | UpstreamError | None], major: int = 18
    ) -> None:
        self.major = major
        self.heard: Callable[[], None] = lambda: None
        self.asked: list[str] = []
        self.sent: list[bytes] = []
        self.lost = ""
        self.streaming = 0
        """How many streams it has had."""
        self._clock = clock
        self._answer = answer
        self._awaiting: Deferred[Answer] | None = None
        self._take: Callable[[memoryview], None] | None = None
        self._unread: list[bytes] = []
        self._is_paused = False

    # --- UpstreamConnection ----------------------------------------------------------------

    def query(self, command: str) -> Deferred[Answer]:
        assert self._awaiting is None, "one thing is asked at a time"
        assert self._take is None, "it streams"
        self.asked.append(command)
        if self.lost:
            return fail(UpstreamError(self.lost))
        answer = self._answer(command)
        if answer is None:
            self._awaiting = awaiting = Deferred[Answer]()
            return awaiting
        self.heard()
        return fail(answer) if isinstance(answer, UpstreamError) else succeed(answer)

    def copy(self, take: Callable[[memoryview], None]) -> Deferred[Answer]:
        assert self._awaiting is None
        self.streaming += 1
        self._take = take
        self._awaiting = awaiting = Deferred[Answer]()
        return awaiting

    def send(self, data: bytes) -> None:
        if self._take is not None:  # behind the end of a stream nobody would read it
            self.sent.append(data)

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._clock.callLater(0, self._read_on)

    def lose(self, why: str) -> None:
        if not self.lost:
            self.lost = why
            self._end(Failure(UpstreamError(why)))

    # --- for tests to call -----------------------------------------------------------------

    def deliver(self, data: bytes) -> None:
        """A CopyData from the server."""
        self._unread.append(data)
        self._read_on()

    def end(self, rows: list[Row] | None = None) -> None:
        """The server ends the stream."""
        self._end(Answer(rows or []))

    def fail(self, error: UpstreamError) -> None:
        """The server ends the stream with an error, or is gone."""
        self._end(Failure(error))

    @property
    def is_streaming(self) -> bool:
        return self._take is not None

    # --- within ----------------------------------------------------------------------------

    def _read_on(self) -> None:
        while self._unread and not self._is_paused and self._take is not None:
            data = self._unread.pop(0)
            self.heard()
            try:
                self._take(memoryview(data))
            except Exception:
                self._end(Failure())

    def _end(self, result: Any) -> None:
        awaiting, self._awaiting = self._awaiting, None
        self._take = None
        self._unread = []
        if awaiting is not None:
            awaiting.callback(result)


START_REPLICATION = re.compile(
    r'START_REPLICATION (?:SLOT "(\w+)" )?PHYSICAL ([0-9A-F]+)/([0-9A-F]+) TIMELINE (\d+)\Z'
)


class Upstream:
    """A server with the WAL of ``wal``, a timeline and its ancestors, up to ``lsn``.

    :attr:`connection` is one to it.  What it answers can be told otherwise, by the whole command
    or its first word: always in :attr:`instead`, the first time in :attr:`at_first`.
    """

    def __init__(self, clock: Clock, wal: WalBuilder, lsn: int | None = None) -> None:
        self.wal = wal
        self.lsn = wal.lsn if lsn is None else lsn
        self.slots: dict[str, int | None] = {}
        self.instead: dict[str, Answer | UpstreamError | None] = {}
        self.at_first: dict[str, Answer | UpstreamError | None] = {}
        self.histories = {wal.tli: wal.history_contents} if wal.tli > 1 else {}
        self.connection = ScriptedConnection(clock, self.answer)
        self._position = self._tli = 0

    def promote(self, wal: WalBuilder) -> None:
        """Go over to the timeline of ``wal``."""
        self.wal, self.lsn = wal, wal.lsn
        self.histories[wal.tli] = wal.history_contents

    def stream(self, lsn: int | None = None, size: int = 4 * 8192) -> None:
        """Send WAL up to ``lsn``, or all there is, in messages of at most ``size`` bytes; and if
        that is where the timeline ends, end the stream."""
        end = self.end_of(self._tli)
        upto = end if lsn is None else lsn
        while self._position < upto and self.connection.is_streaming:
            until = min(upto, self._position - self._position % size + size)
            data = self.wal.image[self._position - self.wal.start : until - self.wal.start]
            self.connection.deliver(wal_message(self._position, data, end))
            self._position = until
        if self._tli != self.wal.tli and self._position >= end and self.connection.is_streaming:
            self.connection.end([self._next_timeline()])

    def end_of(self, tli: int) -> int:
        return dict(self.wal.history).get(tli, self.lsn)

    def _next_timeline(self) -> Row:
        tlis = [*dict(self.wal.history), self.wal.tli]
        following = tlis[tlis.index(self._tli) + 1]
        return [str(following).encode(), format_lsn(self.end_of(self._tli)).encode()]

    def answer(self, command: str) -> Answer | UpstreamError | None:
        first = command.split()[0]
        for key in (command, first):
            if key in self.at_first:
                return self.at_first.pop(key)
            if key in self.instead:
                return self.instead[key]
        match first:
            case "IDENTIFY_SYSTEM":
                row = [str(self.wal.system), str(self.wal.tli), format_lsn(self.lsn)]
                return Answer([[*(value.encode() for value in row), None]])
            case "SHOW":
                return Answer([[b"%dMB" % (self.wal.size >> 20)]])
            case "TIMELINE_HISTORY":
                tli = int(command.split()[1])
                if tli not in self.histories:
                    return UpstreamError(f'could not open file "pg_wal/{tli:08X}.history"', "58P01")
                return Answer([[b"%08X.history" % tli, self.histories[tli]]])
            case "READ_REPLICATION_SLOT":
                return Answer([self._slot(command.split('"')[1])])
            case "CREATE_REPLICATION_SLOT":
                name = command.split('"')[1]
                if name in self.slots:
                    return UpstreamError(f'replication slot "{name}" already exists', "42710")
                self.slots[name] = self.wal.start if command.endswith(" RESERVE_WAL") else None
                return Answer([[name.encode(), b"0/0", None, None]])
            case "START_REPLICATION":
                return self._start(command)
        raise AssertionError(f"no server knows {command!r}")

    def _slot(self, name: str) -> Row:
        if name not in self.slots:
            return [None, None, None]
        lsn = self.slots[name]
        return (
            [b"physical", None, None]
            if lsn is None
            else [b"physical", format_lsn(lsn).encode(), b"1"]
        )

    def _start(self, command: str) -> Answer | UpstreamError:
        match = START_REPLICATION.match(command)
        assert match is not None, command
        slot, high, low, tli = match.groups()
        if slot is not None and slot not in self.slots:
            return UpstreamError(f'replication slot "{slot}" does not exist', "42704")
        self._position, self._tli = int(high, 16) << 32 | int(low, 16), int(tli)
        end = self.end_of(self._tli)
        if self._tli != self.wal.tli and self._tli not in dict(self.wal.history):
            return UpstreamError(f"requested timeline {tli} is not in this server's history")
        if self._position > end:
            return UpstreamError(
                f"requested starting point {high}/{low} is ahead of {format_lsn(end)}"
            )
        if self._tli != self.wal.tli and self._position == end:
            return Answer([self._next_timeline()])
        return Answer([], is_streaming=True)


# --- What servers send, and what they are sent ---------------------------------------------------


def wal_message(lsn: int, data: bytes, end: int = 0) -> bytes:
    """XLogData."""
    return struct.pack(">cQQq", b"w", lsn, end or lsn + len(data), 0) + data


def keepalive(lsn: int = 0, reply: int = 0) -> bytes:
    return struct.pack(">cQqB", b"k", lsn, 0, reply)


def told(clock: Clock, sent: list[bytes]) -> list[str]:
    """A transcript of what was sent to a server, which is forgotten by that."""
    lines = list(_lines(clock, sent))
    sent.clear()
    return lines


def _lines(clock: Clock, sent: list[bytes]) -> Iterator[str]:
    for data in sent:
        match data[:1], len(data):
            case b"r", 34:
                write, flush, apply, time, reply = struct.unpack(">QQQqB", data[1:])
                line = f"r {format_lsn(write)} {format_lsn(flush)} {format_lsn(apply)}"
                yield line + (" reply" if reply else "")
            case b"h", 25:
                time, xmin, epoch, catalog, catalog_epoch = struct.unpack(">qIIII", data[1:])
                yield f"h {epoch}:{xmin} {catalog_epoch}:{catalog}"
            case _:
                raise AssertionError(f"no server takes {data!r}")
        # Servers are told the time of day; nothing is sent later than it is made.
        assert time <= (clock.seconds() - EPOCH) * 1_000_000


# --- Putting them together -----------------------------------------------------------------------


class Walked(Received):
    """What is received, each byte of it proven as soon as it is on disk: nobody walks over it."""

    @property
    def proven_to(self) -> int:
        return self.synced_to

    @proven_to.setter
    def proven_to(self, lsn: int) -> None:
        pass


class Stored:
    """A store, and all that it tells."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        self.clock = clock
        self.threads = HeldThreads()
        self.received = Walked()
        self.failures: list[Exception] = []
        self.progress: list[tuple[int, int]] = []
        self.observer: Callable[[], None] = lambda: None
        self.store = Store(
            directory, self.received, clock, self.threads, self._progressed, self.failures.append
        )

    def _progressed(self) -> None:
        now = (self.store.written_lsn, self.store.flush_lsn)
        if self.progress[-1:] != [now]:
            self.progress.append(now)
        self.observer()


class Logged:
    """What has been logged."""

    def __init__(self, events: Sequence[LogEvent]) -> None:
        self._events = events
        self._seen = 0

    def lines(self) -> list[str]:
        """What was logged since the last time, each line with its level."""
        new = self._events[self._seen :]
        self._seen += len(new)
        return [f"{event['log_level'].name}: {formatEvent(event)}" for event in new]
