"""Makes durable what comes in: written and synced by a thread, many messages with one sync.

At any time at most one job is in the thread's hands: write all that has come since the last one
was begun, then sync.  The slower the disk, the more goes into one sync (group commit), and nothing
waits for a timer.  What is synced becomes visible in
:class:`~walproto.timeline.received.Received`, and only that.

There are three ways for it to go wrong.  When more comes than the disk takes, :attr:`Store.is_full`
asks for a pause.  When a write fails, for want of room or whatever else, it is tried again each
second, for nothing is lost by it.  When a sync fails, nobody knows what is on disk, and no second
try can tell (the kernel may have dropped what it could not write); that is the end: nothing more
is written or acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.timeline.holding import Holding
from walproto.timeline.received import Received
from walproto.timeline.threads import Threads
from walproto.wal.pages import Identity
from walproto.wal.writer import SegmentWriter

UNPROVEN = 4 * 1024 * 1024
"""Bytes that may wait to be written and proven before there is to be a pause."""

WAIT = 0.001
"""Seconds for which the reactor's thread waits until a little is written, at most."""

LITTLE = 64 * 1024
"""Bytes that are a little: they are written in a few microseconds."""

RETRY = 1.0
"""Seconds between two tries to write."""


class Store:
    """Writes WAL into ``directory``, and tells ``received`` how far it is on disk.

    ``progressed`` is called whenever :attr:`written_lsn` or :attr:`flush_lsn` has grown, or
    :attr:`is_full` may have changed; ``failed`` once, with the SyncError that ended it.
    """

    _log = Logger()

    def __init__(
        self,
        directory: Path,
        received: Received,
        clock: IReactorTime,
        threads: Threads,
        progressed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._directory = directory
        self._received = received
        self._clock = clock
        self._threads = threads
        self._progressed = progressed
        self._failed = failed
        self._writer: SegmentWriter | None = None
        self._writer_lsn = 0
        self._pending: list[memoryview] = []
        self._job: list[memoryview] = []
        self._job_lsn = 0
        self._is_working = False
        self._is_written = Lock()
        self._is_to_tell = False
        self._retry: IDelayedCall | None = None
        self._complaint = ""
        self._awaiting_idle: list[Deferred[None]] = []
        self._proven_at_first = 0
        self.identity: Identity | None = None
        """Whose WAL is received; None as long as there is none."""
        self.is_closed = False
        """Whether nothing more is taken: it was stopped, or a sync has failed."""
        self.received_lsn = 0
        """Where the WAL that comes next belongs."""
        self.written_lsn = 0
        """How far WAL is written; 0 as long as none is."""
        self.flush_lsn = 0
        """How far WAL is on disk; 0 as long as none is."""

    @property
    def tli(self) -> int:
        """The timeline that is received; 0 before :meth:`begin`."""
        return self._received.tli

    @property
    def proven_lsn(self) -> int:
        """How far WAL is on disk and was found right, record by record; 0 as long as none is.

        This is what is acknowledged: a copy that cannot be recovered from is none.
        """
        return max(self._proven_at_first, min(self.flush_lsn, self._received.proven_to))

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written and proven that no more should come."""
        unproven = self.received_lsn - self._received.proven_to
        return self.cannot_write or unproven > UNPROVEN

    @property
    def cannot_write(self) -> bool:
        """Whether the last write failed, and is to be tried again."""
        return self._retry is not None

    def go_on_from(self, holding: Holding) -> None:
        """From now on what is missing behind ``holding`` comes.  Nothing may be pending."""
        self.identity = holding.identity
        self.begin(
            holding.history.tli,
            holding.end,
            holding.identity.segment_size,
            synced_to=holding.end,
            flush_lsn=holding.end,
        )

    def begin(self, tli: int, lsn: int, segment_size: int, synced_to: int, flush_lsn: int) -> None:
        """From now on WAL of ``tli`` comes, from ``lsn`` on.  Nothing may be pending.

        Of this timeline's files all up to ``synced_to`` is on disk already; of its WAL, be it in
        those or in an earlier timeline's, all up to ``flush_lsn``.
        """
        assert not self._is_working
        assert not self._pending
        if self._writer is not None:
            self._writer.close()
        self._writer = SegmentWriter(self._directory, tli, segment_size, lsn)
        self._received.begin(tli, lsn, synced_to)
        self.received_lsn = self._writer_lsn = lsn
        self.written_lsn = self.flush_lsn = self._proven_at_first = flush_lsn

    def append(self, data: memoryview) -> None:
        """Take the WAL that comes next."""
        if data and not self.is_closed:
            self._received.append(data)
            self._pending.append(data)
            self.received_lsn += len(data)
            self._work()

    def when_idle(self) -> Deferred[None]:
        """Fires when all that was taken is on disk, or never will be."""
        if not self._is_working and not self._pending and self._retry is None:
            return succeed(None)
        idle = Deferred[None]()
        self._awaiting_idle.append(idle)
        return idle

    async def stop(self) -> None:
        """Bring to disk what can be, give up what cannot be written, and take nothing more."""
        self.is_closed = True
        if self._retry is not None:
            self._retry.cancel()
            self._give_up()
        await self.when_idle()
        if self._writer is not None:
            self._writer.close()

    # --- within ----------------------------------------------------------------------------

    def _work(self) -> None:
        """Give the thread all that there is, unless it is at work."""
        if self._hand_over():
            self._await_writing()

    def _hand_over(self) -> bool:
        """As :meth:`_work`; whether there is a job for it."""
        if self._is_working or self._retry is not None:
            return False
        if not self._job and not self._pending:
            self._tell_idle()
            return False
        writer = self._writer
        assert writer is not None
        if not self._job:
            self._job_lsn = writer.lsn
        self._job += self._pending
        self._pending = []
        self._is_working = True
        self._is_to_tell = sum(map(len, self._job)) > LITTLE
        self._is_written = is_written = Lock()
        is_written.acquire()
        result = self._threads.run(lambda: self._write(writer, is_written))
        result.addCallbacks(self._done, self._broken)
        return True

    def _await_writing(self) -> None:
        """Wait until the job is written, if that is a matter of microseconds.

        Were the thread to tell us by a call, it would be held up just when it is about to sync,
        for only one of us can run.
        """
        if self._is_to_tell:
            return
        if not self._is_written.acquire(timeout=WAIT):
            self._is_to_tell = True
            if not self._is_written.acquire(blocking=False):  # it may just not have known that
                return
        assert self._writer is not None
        self._written(self._writer.lsn)

    def _write(self, writer: SegmentWriter, is_written: Lock) -> OSError | None:
        """In the thread: write and sync; what went wrong with the writing."""
        problem = None
        try:
            writer.write(self._job_lsn, self._job)
        except OSError as error:
            problem = error
        is_written.release()
        if self._is_to_tell:
            self._threads.tell(self._written, writer.lsn)
        writer.sync()
        return problem

    def _written(self, lsn: int) -> None:
        if lsn > self._writer_lsn:
            self._writer_lsn = lsn
            self.written_lsn = max(self.written_lsn, lsn)
            self._received.written(lsn)
            self._progressed()

    def _done(self, problem: OSError | None) -> None:
        writer = self._writer
        assert writer is not None
        self._written(writer.lsn)
        self._is_working = False
        for segment_end, stamp in writer.completed:
            self._received.complete(writer.tli, segment_end, stamp)
        writer.completed.clear()
        if self.written_lsn:
            self.flush_lsn = max(self.flush_lsn, writer.lsn)
        self._received.synced(writer.lsn)
        is_next = False
        if problem is None:
            self._job = []
            if self._complaint:
                self._complaint = ""
                self._log.warn("writing to {directory} again", directory=str(self._directory))
            is_next = self._hand_over()
        elif self.is_closed:
            self._give_up()
        else:
            self._complain(problem)
            self._retry = self._clock.callLater(RETRY, self._try_again)
        self._progressed()
        if is_next:
            self._await_writing()

    def _complain(self, problem: OSError) -> None:
        complaint = problem.strerror or str(problem)
        if complaint != self._complaint:
            self._complaint = complaint
            self._log.critical(
                "cannot write to {directory}: {complaint}: receiving pauses until it can be "
                "written to again; what is here is served",
                directory=str(self._directory),
                complaint=complaint,
            )

    def _try_again(self) -> None:
        self._retry = None
        self._work()

    def _broken(self, failure: Failure) -> None:
        """The sync failed, or something worse."""
        self._is_working = False
        self.is_closed = True
        self._give_up()
        error = failure.value
        self._failed(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def _give_up(self) -> None:
        self._retry = None
        self._job, self._pending = [], []
        self._tell_idle()

    def _tell_idle(self) -> None:
        awaiting, self._awaiting_idle = self._awaiting_idle, []
        for idle in awaiting:
            idle.callback(None)
