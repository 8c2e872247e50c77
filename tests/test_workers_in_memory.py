"""Lending without processes: both sides in one, and what they say to each other under way for as
long as a test likes."""

from __future__ import annotations

import contextlib
import pickle
import random
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import tcp
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from tests.fakes import PAGE, SEGMENT, START, MemoryTimeline, messages_in, told, wal_of
from tests.test_producer import Told
from walproto.errors import DataCorrupted, ReportedError, UndefinedFile
from walproto.lsn import segment_name
from walproto.server.lending import Outlet
from walproto.server.lent_socket import LentSocket
from walproto.timeline.interfaces import IFiledTimeline
from walproto.timeline.replicas import Replica
from walproto.workers import announcements, control
from walproto.workers.announcements import Announcements
from walproto.workers.loans import RETRY, Loan
from walproto.workers.process import NUMBER_SIZE, Worker


@implementer(IFiledTimeline)
class FiledTimeline(MemoryTimeline):
    """Its WAL is in files, too."""

    def __init__(self, directory: Path, size: int) -> None:
        super().__init__(size)
        self.directory = directory
        self.trouble: ReportedError | None = None
        for number in range(-(-size // SEGMENT)):
            name = segment_name(1, START // SEGMENT + number, SEGMENT)
            wal = self.wal[number * SEGMENT :][:SEGMENT]
            (directory / name).write_bytes(wal + bytes(SEGMENT - len(wal)))

    def sendable_to(self, tli: int, lsn: int) -> int:
        if self.trouble is not None and lsn >= self.commit_lsn:
            raise self.trouble
        return super().sendable_to(tli, lsn)


class TurnedByHand(Clock):
    """A reactor for writing: whoever wants to write, may when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[Any] = set()

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def write(self) -> None:
        for writer in list(self.writers):
            error = writer.doWrite()
            if error is not None:
                self.removeWriter(writer)
                writer.connectionLost(Failure(error))


class Transport(tcp.Connection):
    """As much of a transport as is needed, over a real socket; what is written to it is sent by
    :meth:`drain`."""

    def __init__(self, handle: socket.socket) -> None:
        self.handle = handle
        self.buffer = bytearray()
        self.producer: Any = None
        self.producerPaused = False
        self.is_aborted = False

    def getHandle(self) -> Any:
        return self.handle

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.buffer += data

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert self.producer is None
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def abortConnection(self) -> None:
        self.is_aborted = True

    def drain(self) -> None:
        """Send what the client takes, and resume the producer when that is all."""
        try:
            while self.buffer:
                del self.buffer[: self.handle.send(self.buffer)]
        except BlockingIOError:
            return
        if self.producer is not None and self.producerPaused:
            self.producerPaused = False
            self.producer.resumeProducing()


class Lent(announcements.Worker):
    """One client, lent to a worker.

    ``to_worker`` and ``to_main`` are what was said and is not heard yet.
    """

    def __init__(self, timeline: FiledTimeline) -> None:
        super().__init__()
        self.timeline = timeline
        self.reactor = TurnedByHand()
        ours, self.client = socket.socketpair()
        self._handles, their_handles = socket.socketpair()
        self._sockets = [ours, self.client, self._handles, their_handles]
        for each in (ours, self.client):
            each.setblocking(False)
        self.to_worker: deque[Any] = deque()
        self.to_main: deque[Any] = deque()
        self.is_crammed = False
        self.worker = Worker(self.reactor, their_handles)
        self.worker.say = lambda message: self.to_main.append(over_the_wire(message))
        self.told = Told()
        self.held: list[str] = []
        self.outlet = Outlet(lambda: self.held.append("held"), lambda: self.held.append("free"))
        self.transport = Transport(ours)
        self.replica = Replica(1, "postgres", "", "", 1, START)
        self.is_over = False
        announcements = Announcements(timeline, self.over)
        self.loan = Loan(
            self, self.transport, self.outlet, announcements, self.replica, self.reactor, self.told
        )
        self.loan.start()
        self.arrived = bytearray()

    def over(self) -> None:
        self.is_over = True

    def close(self) -> None:
        for stream in self.worker._streams.values():
            stream.give_back()
        for view in self.worker._views.values():
            view.close()
        for each in self._sockets:
            each.close()

    # --- what the loan sees of its worker --------------------------------------------------

    def say(self, message: NamedTuple) -> None:
        self.to_worker.append(over_the_wire(message))

    def hand_over(self, number: int, handle: Any) -> None:
        if self.is_crammed:
            raise BlockingIOError
        data = number.to_bytes(NUMBER_SIZE, "big")
        socket.send_fds(self._handles, [data], [handle.fileno()])

    def forget(self, number: int) -> None:
        assert number == self.loan.number

    # --- what may happen -------------------------------------------------------------------

    def worker_hears(self) -> None:
        if self.to_worker:
            self.worker._heard(self.to_worker.popleft())

    def main_hears(self) -> None:
        if not self.to_main:
            return
        message = self.to_main.popleft()
        if isinstance(message, control.Sent):
            for lsn in message.positions.values():
                self.loan.sent(lsn)
        else:
            self.loan.heard(message)

    def take(self, size: int = 1 << 20) -> None:
        """The client takes so much."""
        with contextlib.suppress(BlockingIOError):
            self.arrived += self.client.recv(size)

    def turn(self) -> None:
        """Whoever may do something, does."""
        self.transport.drain()
        self.reactor.write()
        self.reactor.advance(0)

    def settle(self) -> None:
        """Let all happen that will."""
        while True:
            before = len(self.arrived), len(self.to_main), len(self.to_worker)
            self.turn()
            self.worker_hears()
            self.main_hears()
            self.take()
            if before == (len(self.arrived), 0, 0) and not self.to_main and not self.to_worker:
                return

    @property
    def wal(self) -> bytes:
        """All WAL that has arrived; there is no hole in it, and every message is whole."""
        sent = wal_of(bytes(self.arrived))
        ends = [lsn + len(data) for lsn, data in sent.items()]
        assert list(sent)[1:] == ends[:-1]
        return b"".join(sent.values())

    @property
    def others(self) -> list[str]:
        """What else has arrived."""
        return [line for line in told(bytes(self.arrived)) if line[0] != "w"]


def over_the_wire(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))


@contextmanager
def lent(size: int, **attributes: Any) -> Iterator[Lent]:
    with tempfile.TemporaryDirectory() as directory:
        timeline = FiledTimeline(Path(directory), size)
        vars(timeline).update(attributes)
        one = Lent(timeline)
        try:
            yield one
        finally:
            one.close()


WRITTEN = b"C" + (4 + 5).to_bytes(4, "big") + b"DONE\0"


class Lending(SynchronousTestCase):
    def test_all_is_sent_and_the_end_is_known(self) -> None:
        with lent(2 * SEGMENT + 88) as one:
            one.settle()
            one.reactor.advance(1)
            one.settle()
            self.assertEqual(one.others, ["W"])
            self.assertTrue(one.wal == one.timeline.wal)
            self.assertEqual(one.replica.sent_lsn, one.timeline.commit_lsn)
            self.assertEqual(one.loan.idle_since, 1)

    def test_what_is_not_proven_is_asked_for_and_awaited(self) -> None:
        with lent(8 * PAGE, proven_to=START) as one:
            one.settle()
            self.assertEqual(one.wal, b"")
            one.timeline.prove(START + 3 * PAGE)
            one.settle()
            self.assertEqual(len(one.wal), 3 * PAGE)
            one.timeline.prove(START + 8 * PAGE)
            one.settle()
            self.assertTrue(one.wal == one.timeline.wal)

    def test_what_is_new_is_not_asked_for(self) -> None:
        with lent(8 * PAGE, commit_lsn=START + PAGE) as one:
            one.settle()
            for number in range(2, 9):
                one.timeline.commit(START + number * PAGE)
                while one.to_worker:
                    one.worker_hears()
                self.assertFalse(any(isinstance(each, control.Ask) for each in one.to_main))
            one.settle()
            self.assertTrue(one.wal == one.timeline.wal)

    def test_for_a_worker_that_stands_still_nothing_piles_up(self) -> None:
        with lent(8 * PAGE, commit_lsn=START) as one:
            one.settle()
            one.pauseProducing()  # as its channel does when much has not been taken yet
            for number in range(1, 8):
                one.timeline.commit(START + number * PAGE)
            self.assertFalse(one.to_worker)
            one.resumeProducing()
            self.assertEqual(len(one.to_worker), 1)
            one.settle()
            self.assertTrue(one.wal == one.timeline.wal[: 7 * PAGE])

    def test_what_one_is_owed_of_a_timeline_it_no_longer_has_is_not_told(self) -> None:
        with lent(8 * PAGE, commit_lsn=START) as one:
            one.settle()
            one.pauseProducing()
            one.timeline.commit(START + PAGE)
            one.loan.stop()
            one.settle()
            one.resumeProducing()
            self.assertFalse(one.to_worker)

    def test_errors_are_those_of_the_timeline(self) -> None:
        with lent(PAGE) as one:
            one.settle()
            one.timeline.trouble = DataCorrupted("damaged", log="mend it")
            one.timeline.changed()
            one.settle()
            self.assertEqual(one.told.events, ["damaged"])

    def test_so_are_those_of_reading(self) -> None:
        with lent(PAGE) as one:
            for path in one.timeline.directory.iterdir():
                path.unlink()
            one.settle()
            (said,) = one.told.events
            with self.assertRaises(UndefinedFile) as caught:
                one.worker._views[next(iter(one.worker._views))].read_into(
                    1, START, memoryview(bytearray(1))
                )
            self.assertEqual(said, caught.exception.message)

    def test_a_timeline_that_has_ended(self) -> None:
        with lent(8 * PAGE) as one:
            one.timeline.switch(START + 5 * PAGE + 8)
            names = [segment_name(tli, START // SEGMENT, SEGMENT) for tli in (1, 2)]
            old, new = (one.timeline.directory / name for name in names)
            old.rename(new)  # the new timeline's file is read: it has a copy
            one.settle()
            self.assertEqual(one.told.events[:1], ["timeline ended"])
            self.assertEqual(len(one.wal), 5 * PAGE + 8)

    def test_finishing(self) -> None:
        with lent(8 * PAGE) as one:
            one.loan.finish()
            self.assertTrue(one.loan.is_finishing)
            one.settle()
            self.assertEqual(one.told.events[:1], ["caught up"])
            self.assertTrue(one.wal == one.timeline.wal)

    def test_a_socket_that_cannot_be_handed_over_yet_is_later(self) -> None:
        with lent(PAGE) as one:
            one.is_crammed = True
            one.settle()
            self.assertEqual(one.others, ["W"])
            one.is_crammed = False
            one.reactor.advance(RETRY)
            one.settle()
            self.assertTrue(one.wal == one.timeline.wal)

    def test_one_that_is_stopped_before_is_not_lent(self) -> None:
        for crammed in (False, True):
            with lent(PAGE) as one:
                one.is_crammed = crammed
                if crammed:
                    one.transport.drain()
                one.loan.stop()
                one.transport.write(WRITTEN)
                one.settle()
                self.assertEqual(one.others, ["W", "C DONE"])
                self.assertEqual(one.wal, b"")
                self.assertEqual(one.held, [])
                self.assertTrue(one.is_over)
                self.assertEqual(one.timeline.observers, set())
                self.assertEqual(one.reactor.getDelayedCalls(), [])

    def test_the_worker_dies(self) -> None:
        with lent(PAGE) as one:
            one.settle()
            one.loan.stop()
            self.assertEqual(one.held, ["held"])
            one.loan.lost()
            self.assertEqual(one.held, ["held", "free"])
            self.assertTrue(one.transport.is_aborted)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32))
    def test_whenever_it_is_recalled_what_comes_then_is_in_order(self, seed: int) -> None:
        """Whatever was under way: what the client is told later, comes behind whole messages."""
        chances = random.Random(seed)
        size = chances.choice([0, 8, 3 * PAGE, SEGMENT, 2 * SEGMENT + 16])
        with lent(size, commit_lsn=START, proven_to=START + chances.randint(0, size)) as one:
            timeline, wanted = one.timeline, START + size
            steps = [one.turn, one.worker_hears, one.main_hears]
            keepalives = 0
            for _ in range(chances.randint(0, 60)):
                match chances.randrange(8):
                    case 0:
                        timeline.commit(chances.randint(timeline.commit_lsn, wanted))
                    case 1:
                        timeline.prove(chances.randint(timeline.proven_to or 0, wanted))
                    case 2:
                        one.take(chances.choice([1, 100, 1 << 20]))
                    case 3 if len(one.transport.buffer) == 0:
                        one.loan.send_keepalive(False)
                        keepalives += 1
                    case _:
                        chances.choice(steps)()
            one.loan.stop()
            one.outlet.do(lambda: one.transport.write(WRITTEN))
            one.outlet.do(lambda: one.transport.write(WRITTEN))
            one.settle()
            others = one.others
            assert others[0] == "W"
            assert others[-2:] == ["C DONE", "C DONE"]
            assert len(others) - 3 <= keepalives
            sent = one.wal
            assert one.replica.sent_lsn == START + len(sent)
            assert sent == timeline.wal[: len(sent)]
            assert len(sent) <= min(timeline.commit_lsn, timeline.proven_to or 0) - START
            assert [tag for tag, _ in messages_in(bytes(one.arrived))][-2:] == [b"C", b"C"]
            assert one.held in ([], ["held", "free"])
            assert not one.worker._views
            assert not one.worker._streams
            assert not timeline.observers


class TheSocket(SynchronousTestCase):
    def test_when_the_client_is_gone_nothing_more_is_sent(self) -> None:
        reactor = TurnedByHand()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        lent_socket = LentSocket(reactor, ours)  # type: ignore[arg-type]
        lent_socket.write(b"one")
        theirs.close()
        reactor.write()
        lent_socket.write(b"two")
        self.assertEqual(reactor.writers, set())
        self.assertEqual(lent_socket.close(), b"")
        self.assertEqual(ours.fileno(), -1)
