"""How WAL is sent: no faster than it is taken, no further than it may be, cut where it may be cut,
and in order, whichever way the bytes go."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor as twisted_reactor
from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import directlyProvides

from tests.fakes import (
    COPY_DONE,
    PAGE,
    SEGMENT,
    START,
    TERMINATE,
    MemoryTimeline,
    MemoryTransport,
    Rounds,
    messages_in,
    query,
    server,
    startup,
    status,
    told,
    wal_of,
)
from walproto.errors import ReportedError, UndefinedFile
from walproto.lsn import format_lsn
from walproto.server.channels import PIECE_SIZE, UNIX_PIECE_SIZE
from walproto.server.producer import BURST, Piece, WalProducer
from walproto.server.turns import Turns
from walproto.timeline.replicas import Replica

reactor: Any = twisted_reactor


class Told:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def timeline_ended(self) -> None:
        self.events.append("timeline ended")

    def failed(self, error: ReportedError) -> None:
        self.events.append(error.message)

    def caught_up(self) -> None:
        self.events.append("caught up")

    def broken(self) -> None:
        self.events.append("broken")


class Sending:
    """A producer and those around it."""

    def __init__(
        self,
        timeline: MemoryTimeline,
        clock: Clock,
        *,
        start: int = START,
        transport: Any = None,
        piece: Piece | None = None,
        turns: Turns | None = None,
        capacity: int | None = None,
    ) -> None:
        self.clock = clock
        self.transport = transport or MemoryTransport(clock, capacity)
        self.told = Told()
        self.start = start
        self.replica = Replica(1, "postgres", "", "", 1, start)
        piece = piece or Piece(timeline)
        self.producer = WalProducer(
            self.transport, timeline, self.replica, piece, turns or Turns(clock), clock, self.told
        )
        self.producer.start()
        self._heard = 0

    def hear(self) -> list[str]:
        """What has arrived since the last time."""
        self.clock.advance(0)
        data = bytes(self.transport.arrived)[self._heard :]
        self._heard += len(data)
        return told(data)

    @property
    def wal(self) -> bytes:
        """All WAL that has arrived; it has to be without holes."""
        sent = wal_of(bytes(self.transport.arrived))
        assert list(sent) == sorted(sent)
        ends = [lsn + len(data) for lsn, data in sent.items()]
        assert list(sent)[1:] == ends[:-1]
        return b"".join(sent.values())

    @property
    def cuts(self) -> list[int]:
        sent = wal_of(bytes(self.transport.arrived))
        return [lsn + len(data) for lsn, data in sent.items()]


class Sent(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()

    def sending(self, size: int, **options: Any) -> Sending:
        self.timeline = MemoryTimeline(size)
        return Sending(self.timeline, self.clock, **options)

    def test_first_a_client_hears_that_copying_begins(self) -> None:
        sending = self.sending(0)
        self.assertEqual(sending.hear(), ["W"])

    def test_then_it_gets_what_there_is_and_what_comes(self) -> None:
        sending = self.sending(3 * PAGE + 120)
        self.timeline.commit(START + 120)
        self.assertEqual(sending.hear(), ["W", f"w 0/{START:X}+120 of 0/{START + 120:X}"])
        self.assertEqual(sending.hear(), [])
        end = START + 3 * PAGE + 120
        self.timeline.commit(end)
        self.assertEqual(sending.hear(), [f"w 0/{START + 120:X}+{3 * PAGE} of 0/{end:X}"])
        self.assertEqual(sending.wal, self.timeline.wal)
        self.assertEqual(sending.replica.sent_lsn, end)

    def test_each_message_is_of_whole_pages_but_the_last(self) -> None:
        size = 3 * PIECE_SIZE + 5 * PAGE + 8
        sending = self.sending(size)
        sending.hear()
        pieces = [START + number * PIECE_SIZE for number in (1, 2, 3)]
        self.assertEqual(sending.cuts, [*pieces, START + size])

    def test_the_first_one_gets_to_a_page(self) -> None:
        sending = self.sending(3 * PIECE_SIZE, start=START + 0xF8)
        sending.hear()
        self.assertEqual(
            sending.cuts,
            [START + PIECE_SIZE, START + 2 * PIECE_SIZE, START + 3 * PIECE_SIZE],
        )

    def test_no_message_spans_segments(self) -> None:
        start = START + SEGMENT - PAGE
        sending = self.sending(2 * SEGMENT + 16, start=start)
        sending.hear()
        self.assertEqual(sending.cuts[0], START + SEGMENT)
        self.assertIn(START + 2 * SEGMENT, sending.cuts)
        self.assertEqual(sending.wal, self.timeline.bytes_of(start, START + 2 * SEGMENT + 16))

    def test_of_a_timeline_that_has_ended_all_up_to_the_switch(self) -> None:
        self.timeline = MemoryTimeline(2 * SEGMENT)
        switch = START + SEGMENT + 3 * PAGE + 8496
        self.timeline.switch(switch)
        sending = Sending(self.timeline, self.clock)
        sending.hear()
        self.assertEqual(sending.wal, self.timeline.bytes_of(START, switch))
        self.assertEqual(sending.cuts[-1], switch)
        self.assertEqual(sending.told.events, ["timeline ended"])

    def test_of_one_that_ends_meanwhile_nothing_behind_the_switch(self) -> None:
        sending = self.sending(4 * PAGE)
        sending.hear()
        self.timeline.switch(START + 2 * PAGE)
        self.assertEqual(sending.hear(), [])
        self.assertEqual(sending.told.events, ["timeline ended"])

    def test_what_is_not_proven_yet_is_waited_for(self) -> None:
        self.timeline = MemoryTimeline(4 * PAGE)
        self.timeline.proven_to = START
        sending = Sending(self.timeline, self.clock)
        self.assertEqual(sending.hear(), ["W"])
        self.timeline.prove(START + 2 * PAGE)
        end = START + 4 * PAGE
        self.assertEqual(sending.hear(), [f"w 0/{START:X}+{2 * PAGE} of 0/{end:X}"])
        self.assertEqual(sending.told.events, [])

    def test_what_cannot_be_read_is_told(self) -> None:
        sending = self.sending(2 * PAGE)
        sending.hear()
        self.timeline.error = UndefinedFile("gone")
        self.timeline.wal += bytes(PAGE)
        self.timeline.commit(START + 3 * PAGE)
        self.assertEqual(sending.hear(), [])
        self.assertEqual(sending.told.events, ["gone"])
        self.assertEqual(sending.replica.sent_lsn, START + 2 * PAGE)

    def test_what_was_read_in_part_is_not_sent_to_others(self) -> None:
        self.timeline = MemoryTimeline(PAGE)
        piece = Piece(self.timeline)
        self.timeline.error = UndefinedFile("gone")
        for _ in range(2):
            with self.assertRaises(UndefinedFile):
                piece.load(1, START, START + PAGE, START + PAGE, 0)
        self.timeline.error = None
        message = piece.load(1, START, START + PAGE, START + PAGE, 0)
        self.assertEqual(bytes(message[30:]), self.timeline.wal)

    def test_once_stopped_nothing_is_sent(self) -> None:
        sending = self.sending(4 * PAGE)
        self.timeline.commit(START + PAGE)
        sending.hear()
        sending.producer.stop()
        sending.producer.stop()
        self.timeline.commit(START + 2 * PAGE)
        self.assertEqual(sending.hear(), [])
        self.assertEqual(self.timeline.observers, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertIsNone(sending.transport.producer)

    def test_finishing_it_says_when_all_is_sent(self) -> None:
        sending = self.sending(4 * PAGE, capacity=100)
        sending.producer.finish()
        self.clock.advance(0)
        self.assertEqual(sending.told.events, [])
        while sending.transport.waiting:
            sending.transport.take()
            self.clock.advance(0)
        self.assertEqual(sending.told.events[:1], ["caught up"])
        self.assertEqual(sending.wal, self.timeline.wal)


class Flow(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()

    def test_while_the_client_takes_nothing_nothing_is_read(self) -> None:
        timeline = MemoryTimeline(8 * PIECE_SIZE)
        sending = Sending(timeline, self.clock, capacity=100)
        self.clock.advance(0)
        self.assertEqual(timeline.reads, [(START, START + PIECE_SIZE)])
        sending.transport.take(1000)
        timeline.changed()
        self.clock.advance(1)
        self.assertEqual(len(timeline.reads), 1)
        self.assertLess(len(sending.transport.waiting), PIECE_SIZE + 100)
        sending.transport.take()
        self.clock.advance(0)
        self.assertEqual(len(timeline.reads), 2)
        while sending.transport.waiting:
            sending.transport.take()
            self.clock.advance(0)
        self.assertEqual(sending.wal, timeline.wal)

    def test_of_the_keepalives_meanwhile_one_is_sent(self) -> None:
        timeline = MemoryTimeline(3 * PIECE_SIZE)
        sending = Sending(timeline, self.clock, capacity=100)
        self.clock.advance(0)
        for reply_requested in (False, True, False):
            sending.producer.send_keepalive(reply_requested)
        while sending.transport.waiting:
            sending.transport.take()
            self.clock.advance(0)
        end = timeline.commit_lsn
        pieces = [START + number * PIECE_SIZE for number in range(3)]
        self.assertEqual(
            sending.hear(),
            [
                "W",
                f"w {format_lsn(pieces[0])}+{PIECE_SIZE} of {format_lsn(end)}",
                f"k {format_lsn(pieces[1])} reply=1",
                f"w {format_lsn(pieces[1])}+{PIECE_SIZE} of {format_lsn(end)}",
                f"w {format_lsn(pieces[2])}+{PIECE_SIZE} of {format_lsn(end)}",
            ],
        )

    def test_after_a_burst_it_is_others_turn(self) -> None:
        timeline = MemoryTimeline(3 * BURST * PIECE_SIZE)
        sent = []
        sending = Sending(timeline, self.clock)

        def take_turn() -> None:
            sent.append(sending.replica.sent_lsn)
            if sent[-1] < timeline.commit_lsn:
                self.clock.callLater(0, take_turn)

        take_turn()
        self.clock.advance(0)
        self.assertEqual(max(b - a for a, b in pairwise(sent)), BURST * PIECE_SIZE)
        self.assertEqual(sent[-1], timeline.commit_lsn)
        self.assertEqual(sending.wal, timeline.wal)

    def test_those_that_catch_up_take_turns_and_who_follows_waits_for_none(self) -> None:
        clock = Rounds()
        timeline = MemoryTimeline(3 * BURST * PIECE_SIZE + PAGE)
        timeline.commit_lsn -= PAGE
        turns = Turns(clock)
        follower = Sending(timeline, clock, start=timeline.commit_lsn, turns=turns)
        behind = [Sending(timeline, clock, turns=turns) for _ in range(3)]
        clock.go_round()  # the follower's turn: it has been here first
        for number in range(9):
            before = [one.replica.sent_lsn for one in behind]
            if number == 4:
                timeline.commit(timeline.commit_lsn + PAGE)
                self.assertEqual(follower.replica.sent_lsn, timeline.commit_lsn)
            clock.go_round()
            after = [one.replica.sent_lsn for one in behind]
            before[number % 3] += BURST * PIECE_SIZE
            self.assertEqual(after, before)
        for _ in behind:
            clock.go_round()
        for one in behind:
            self.assertEqual(one.wal, timeline.wal)

    def test_clients_at_the_same_place_share_one_read(self) -> None:
        timeline = MemoryTimeline(3 * PAGE)
        timeline.commit_lsn = START
        piece = Piece(timeline)
        followers = [Sending(timeline, self.clock, piece=piece) for _ in range(5)]
        for number in (1, 2, 3):
            timeline.commit(START + number * PAGE)
            self.clock.advance(0)
            self.assertEqual(len(timeline.reads), number)
        for follower in followers:
            self.assertEqual(follower.wal, timeline.wal)

    def test_times_and_ends_are_each_clients_own(self) -> None:
        timeline = MemoryTimeline(2 * PAGE)
        piece = Piece(timeline)
        first = bytes(piece.load(1, START, START + PAGE, START + PAGE, 5))
        second = bytes(piece.load(1, START, START + PAGE, START + 2 * PAGE, 6))
        self.assertEqual(first[30:], second[30:])
        self.assertEqual(first[14:30].hex(), f"{START + PAGE:016x}{5:016x}")
        self.assertEqual(second[14:30].hex(), f"{START + 2 * PAGE:016x}{6:016x}")
        self.assertEqual(len(timeline.reads), 1)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.integers(1, 40_000)),
        st.tuples(st.just("prove"), st.integers(1, 40_000)),
        st.tuples(st.just("take"), st.integers(1, 150_000)),
        st.tuples(st.just("keepalive"), st.just(0)),
    ),
    max_size=30,
)


class Whatever(SynchronousTestCase):
    """However WAL is committed, proven and taken, each client gets all of it, cut where it may
    be: at pages, and where the WAL ended when that was sent."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 5 * PAGE // 8), st.sampled_from([None, 1, 10_000, 200_000])),
            min_size=1,
            max_size=4,
        ),
        st.lists(st.tuples(STEPS, st.integers(0, 3)), max_size=4),
    )
    def test_it_arrives(
        self, clients: list[tuple[int, int | None]], schedule: list[tuple[Any, int]]
    ) -> None:
        clock = Clock()
        size = SEGMENT + 5 * PAGE + 8 * 77
        timeline = MemoryTimeline(size)
        end = timeline.commit_lsn
        timeline.commit_lsn = timeline.proven_to = START + SEGMENT // 2
        legal = {timeline.commit_lsn}
        piece = Piece(timeline)
        sendings = []
        for offset, capacity in clients:
            start = START + SEGMENT // 2 - 8 * offset
            sendings.append(Sending(timeline, clock, start=start, capacity=capacity, piece=piece))
        for steps, number in schedule:
            sending = sendings[number % len(sendings)]
            for what, count in steps:
                if what == "commit":
                    timeline.commit(min(timeline.commit_lsn + 8 * count, end))
                elif what == "prove":
                    timeline.prove(min(timeline.proven_to + 8 * count, end))
                elif what == "take":
                    sending.transport.take(count)
                else:
                    sending.producer.send_keepalive(True)
                legal |= {timeline.commit_lsn, timeline.proven_to}
                clock.advance(0)
                for each in sendings:
                    limit = min(timeline.commit_lsn, timeline.proven_to)
                    self.assertLessEqual(each.replica.sent_lsn, limit)
        timeline.proven_to = end
        timeline.commit(end)
        clock.advance(0)
        for sending in sendings:
            while sending.transport.waiting:
                sending.transport.take()
                clock.advance(0)
            self.assertTrue(sending.wal == timeline.bytes_of(sending.start, end))
            for lsn in sending.cuts:
                self.assertTrue(lsn % PAGE == 0 or lsn in legal | {end}, f"{lsn:X}")
            self.assertEqual(sending.told.events, [])


# --- Past the transport, to the socket -----------------------------------------------------------


class FakeSocket:
    """Takes so many bytes with each send, over and over; with 0 it would block."""

    family = socket.AF_INET

    def __init__(self, takes: list[int], transport: BareTransport) -> None:
        self.takes = takes
        self.transport = transport
        self.sends = 0

    def send(self, data: memoryview) -> int:
        assert not self.transport.buffer, "sent past what waits in the transport"
        takes = self.takes[self.sends % len(self.takes)]
        self.sends += 1
        if takes == 0:
            raise BlockingIOError
        self.transport.arrived += data[:takes]
        return min(takes, len(data))


class BareTransport(tcp.Connection):
    """As much of a TCP transport as the producer sees."""

    def __init__(self, takes: list[int]) -> None:
        self.arrived = bytearray()
        self.buffer = bytearray()
        self.fake_socket = FakeSocket(takes, self)
        self.producer: Any = None
        self.producerPaused = False

    def getHandle(self) -> Any:
        return self.fake_socket

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.buffer += data

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def drain(self) -> None:
        """What FileDescriptor.doWrite does when its buffer is gone."""
        self.arrived += self.buffer
        self.buffer.clear()
        if self.producer is not None and self.producerPaused:
            self.producerPaused = False
            self.producer.resumeProducing()


class UntouchableTransport(BareTransport):
    """One whose socket must not be used."""

    def getHandle(self) -> Any:
        raise AssertionError("the socket was asked for")

    def write(self, data: bytes) -> None:
        self.arrived += data


class PastTheTransport(SynchronousTestCase):
    def test_the_socket_is_used(self) -> None:
        clock, transport = Clock(), BareTransport([1 << 20])
        timeline = MemoryTimeline(5 * PIECE_SIZE)
        sending = Sending(timeline, clock, transport=transport)
        transport.drain()
        clock.advance(0)
        self.assertEqual(transport.fake_socket.sends, 5)
        self.assertEqual(sending.wal, timeline.wal)

    def test_keepalives_without_end_do_not_keep_wal_back(self) -> None:
        clock, transport = Clock(), BareTransport([1 << 20])
        timeline = MemoryTimeline(40 * PIECE_SIZE)
        sending = Sending(timeline, clock, transport=transport)
        for _ in range(10):
            sending.producer.send_keepalive(False)
            transport.drain()
            sending.producer.send_keepalive(False)
            clock.advance(0)
        self.assertEqual(sending.replica.sent_lsn, timeline.commit_lsn)

    def test_through_a_unix_socket_less_is_sent_at_a_time(self) -> None:
        clock, timeline = Clock(), MemoryTimeline(2 * PIECE_SIZE)
        for family, most in ((socket.AF_INET, PIECE_SIZE), (socket.AF_UNIX, UNIX_PIECE_SIZE)):
            transport = BareTransport([PIECE_SIZE * 2])
            transport.fake_socket.family = family
            sending = Sending(timeline, clock, transport=transport)
            transport.drain()
            clock.advance(0)
            sizes = {len(wal) for wal in wal_of(bytes(transport.arrived)).values()}
            self.assertEqual(sizes, {most})
            self.assertEqual(sending.wal, timeline.wal)

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.sampled_from([0, 1, 29, 30, 1000, PAGE, 1 << 20]), min_size=1, max_size=6),
        st.lists(st.booleans(), max_size=30),
    )
    def test_whatever_it_takes_the_order_is_kept(
        self, takes: list[int], keepalives: list[bool]
    ) -> None:
        clock, transport = Clock(), BareTransport(takes)
        timeline = MemoryTimeline(6 * PIECE_SIZE + 88)
        sending = Sending(timeline, clock, transport=transport)
        asked = list(keepalives)
        clock.advance(0)
        while transport.buffer or asked:
            if asked and asked.pop():
                sending.producer.send_keepalive(False)
            transport.drain()
            clock.advance(0)
        self.assertTrue(sending.wal == timeline.wal)
        kept = [line for line in told(bytes(transport.arrived)) if line[0] == "k"]
        self.assertEqual(len(kept), sum(keepalives))

    def test_under_tls_it_is_never_touched(self) -> None:
        started_tls = UntouchableTransport([])
        started_tls.TLS = True
        encrypted = UntouchableTransport([])
        directlyProvides(encrypted, ISSLTransport)
        for transport in (started_tls, encrypted):
            clock = Clock()
            timeline = MemoryTimeline(5 * PIECE_SIZE)
            sending = Sending(timeline, clock, transport=transport)
            sending.producer.send_keepalive(True)
            clock.advance(0)
            self.assertEqual(sending.wal, timeline.wal)


class SlowReader(Protocol):
    """Takes a read, then lets the reactor go round before the next; asks for keepalives."""

    def __init__(self, end: bytes) -> None:
        self.end = end  # of the WAL
        self.received = bytearray()
        self.done: Deferred[None] = Deferred()
        self.asked = 0

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.write(startup() + query(f"START_REPLICATION 0/{START:X}"))

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        self.received += data
        if self.end not in self.received[-SEGMENT:]:
            if len(self.received) // SEGMENT > self.asked:
                self.asked += 1
                transport.write(status(START, reply=1))
        elif self.asked >= 0:
            self.asked = -1
            transport.write(COPY_DONE + TERMINATE)
        transport.pauseProducing()
        reactor.callLater(0, self.go_on)

    def go_on(self) -> None:
        transport: Any = self.transport
        if transport.connected:
            transport.resumeProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        reason.trap(ConnectionDone)
        self.done.callback(None)


class Once(ClientFactory):
    """Has one client."""

    noisy = False

    def __init__(self, client: Protocol) -> None:
        self.client = client

    def buildProtocol(self, address: object) -> Protocol:
        return self.client


class Loopback(TestCase):
    """The one conversation here over real sockets."""

    async def test_a_slow_reader_gets_it_all_in_order(self) -> None:
        # With less in the last message than there is besides WAL, the reader would stop before it.
        timeline = MemoryTimeline(4 * SEGMENT - 120)
        factory = server(timeline, reactor)
        build = factory.buildProtocol

        def build_with_small_buffers(address: object) -> Any:
            protocol = build(address)
            connect = protocol.makeConnection

            def make_connection(transport: Any) -> None:
                transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                connect(transport)

            protocol.makeConnection = make_connection
            return protocol

        factory.buildProtocol = build_with_small_buffers  # type: ignore[method-assign,assignment]
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        reader = SlowReader(timeline.wal[-120:])
        reactor.connectTCP("127.0.0.1", port.getHost().port, Once(reader))
        await reader.done
        await port.stopListening()
        await factory.shut_down(1.0)
        received = bytes(reader.received)
        self.assertTrue(b"".join(wal_of(received).values()) == timeline.wal)
        lines = told(received)
        self.assertEqual(lines[0], "GREETING")
        self.assertGreater(sum(line[0] == "k" for line in lines), 0)
        self.assertEqual(lines[-4:], ["c", "C START_STREAMING", "C START_REPLICATION", "Z I"])
        lsns = [
            int.from_bytes(contents[1:9], "big")
            for tag, contents in messages_in(received)
            if tag == b"d"
        ]
        self.assertEqual(lsns, sorted(lsns))
        self.assertEqual(self.flushLoggedErrors(), [])
