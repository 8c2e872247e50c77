"""The connection: timeouts, shutdown, the registry of replicas, peers that do not read, defects,
and any bytes at all."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import (
    COPY_DONE,
    PAGE,
    SSL_REQUEST,
    START,
    SYNC,
    TERMINATE,
    Client,
    MemoryTimeline,
    cancel_request,
    feedback,
    message,
    query,
    server,
    startup,
    status,
    told,
)
from tests.upstream_fakes import HeldThreads
from walproto.errors import UndefinedFile
from walproto.lsn import format_lsn
from walproto.server.protocol import LINGER
from walproto.timeline import slots as slots_module
from walproto.timeline.replicas import Replica
from walproto.timeline.slots import Slots
from walproto.wire.messages import FRONTEND
from walproto.wire.replication import Feedback

END = START + 4 * PAGE
AT_END = format_lsn(END)
SHUTTING_DOWN = ["FATAL 57P01: terminating connection due to administrator command", "EOF"]


class Connections(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.timeline = MemoryTimeline(8 * PAGE)
        self.timeline.commit_lsn = END
        self.factory = server(self.timeline, self.clock)

    def tearDown(self) -> None:
        self.assertEqual(self.flushLoggedErrors(), [])

    def client(self, capacity: int | None = None) -> Client:
        return Client(self.factory, self.clock, capacity)

    def streaming(self, **parameters: str) -> Client:
        client = self.client()
        self.assertEqual(client.stream(START, 1, **parameters)[0], "W")
        return client

    def only_replica(self) -> Replica:
        (replica,) = self.timeline.replicas
        return replica

    def assert_all_gone(self) -> None:
        self.assertEqual(self.factory.connections, {})
        self.assertEqual(list(self.timeline.replicas), [])
        self.assertEqual(self.timeline.observers, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])


class Timeouts(Connections):
    def events(self, client: Client, seconds: int) -> list[tuple[float, str]]:
        """What comes within that time, and how many seconds from now, looked at four times in
        each of them."""
        begin, found = self.clock.seconds(), []
        for _ in range(4 * seconds):
            for line in client.wait(0.25):
                found.append((self.clock.seconds() - begin, line))
            if not client.transport.is_connected:
                break
        return found

    def test_a_silent_client_is_asked_once_and_then_left(self) -> None:
        client = self.streaming()
        self.assertEqual(self.events(client, 120), [(30, f"k {AT_END} reply=1"), (60, "EOF")])
        self.assert_all_gone()

    def test_each_may_choose_its_own(self) -> None:
        client = self.streaming(options="-c wal_sender_timeout=6s")
        other = self.streaming(wal_sender_timeout="3s")
        self.assertEqual(self.events(client, 120), [(3, f"k {AT_END} reply=1"), (6, "EOF")])
        self.assertEqual(other.hear(), [f"k {AT_END} reply=1", "EOF"])

    def test_so_may_the_server(self) -> None:
        self.factory = server(self.timeline, self.clock, wal_sender_timeout=2.0)
        client = self.streaming()
        self.assertEqual(self.events(client, 120), [(1, f"k {AT_END} reply=1"), (2, "EOF")])

    def test_with_0_it_may_be_silent_for_ever(self) -> None:
        client = self.streaming(options="-c wal_sender_timeout=0")
        self.assertEqual(client.wait(1_000_000), [])
        self.assertEqual(client.send(status(END, reply=1)), [f"k {AT_END} reply=0"])

    def test_whatever_it_says_is_a_sign_of_life(self) -> None:
        for said in (status(END), feedback(0, 0)):
            client = self.streaming(options="-c wal_sender_timeout=6s")
            client.wait(2)
            client.send(said)
            self.assertEqual(self.events(client, 20), [(3, f"k {AT_END} reply=1"), (6, "EOF")])

    def test_sending_to_it_is_none(self) -> None:
        client = self.streaming(options="-c wal_sender_timeout=4s")
        for number in range(1, 4):
            self.timeline.commit(END + number * 8)
            self.assertEqual(client.wait(1)[0][:1], "w")
        self.assertEqual(self.events(client, 20), [(1, "EOF")])

    def test_one_that_takes_nothing_is_left_too(self) -> None:
        client = self.client(capacity=100)
        client.send(startup(), query(f"START_REPLICATION 0/{START:X}"))
        client.take()
        self.assertTrue(client.transport.waiting)
        client.wait(30)
        client.wait(30)
        self.assertTrue(client.transport.disconnecting)

    def test_between_streams_there_is_no_timeout(self) -> None:
        client = self.streaming()
        client.send(COPY_DONE)
        self.assertEqual(client.wait(1_000_000), [])
        self.assertEqual(client.send(SYNC), ["Z I"])

    def test_one_that_does_not_start_up_is_left(self) -> None:
        for begun in (b"", SSL_REQUEST, startup()[:20]):
            client = self.client()
            client.send(begun)
            self.events(client, 59)
            client.send(startup()[20:21] if len(begun) == 20 else b"")
            self.assertTrue(client.transport.is_connected)
            self.assertEqual(client.wait(1), ["EOF"])
        self.assert_all_gone()

    def test_within_another_time_if_so_configured(self) -> None:
        self.factory = server(self.timeline, self.clock, authentication_timeout=3.0)
        client = self.client()
        self.assertEqual(self.events(client, 10), [(3, "EOF")])

    def test_one_that_has_started_up_may_be_idle(self) -> None:
        client = self.client()
        client.wait(59)
        client.start_up()
        self.assertEqual(client.wait(1_000_000), [])
        self.assertEqual(client.send(SYNC), ["Z I"])

    def test_one_that_does_not_take_its_last_answer_is_left(self) -> None:
        client = self.client(capacity=10_000)
        client.send(startup(), TERMINATE)
        client.wait(LINGER - 0.1)
        self.assertTrue(client.transport.is_connected)
        client.wait(0.2)
        self.assertFalse(client.transport.is_connected)
        self.assert_all_gone()


class Shutdown(Connections):
    def shut_down(self, timeout: float = 10.0) -> list[None]:
        """A list in which there is something once it is done."""
        done: list[None] = []
        self.factory.shut_down(timeout).addCallback(done.append)
        return done

    def test_with_nobody_there_it_is_done(self) -> None:
        self.assertEqual(len(self.shut_down()), 1)
        self.assert_all_gone()

    def test_whoever_is_idle_is_told(self) -> None:
        client = self.client()
        client.start_up()
        done = self.shut_down()
        self.assertEqual(client.hear(), SHUTTING_DOWN)
        self.assertEqual(len(done), 1)
        self.assert_all_gone()

    def test_whoever_is_starting_is_told_otherwise(self) -> None:
        client = self.client()
        done = self.shut_down()
        self.assertEqual(
            client.hear(), ["FATAL 57P03: the database system is shutting down", "EOF"]
        )
        self.assertEqual(len(done), 1)

    def test_a_replica_is_waited_for(self) -> None:
        client = self.streaming()
        done = self.shut_down()
        self.assertEqual(client.hear(), [f"k {AT_END} reply=1"])
        self.assertEqual(client.send(status(END - 8, END - 8)), [f"k {AT_END} reply=1"])
        self.assertEqual(client.send(status(END, END - 8)), [f"k {AT_END} reply=1"])
        self.assertEqual(done, [])
        self.assertEqual(client.send(status(END, END)), ["C COPY 0", "EOF"])
        self.assertEqual(len(done), 1)
        self.assert_all_gone()

    def test_one_that_never_says_what_it_flushed_confirms_by_writing(self) -> None:
        client = self.streaming()
        self.shut_down()
        client.hear()
        self.assertEqual(client.send(status(END, 0)), ["C COPY 0", "EOF"])

    def test_one_that_has_confirmed_need_not_do_so_again(self) -> None:
        client = self.streaming()
        client.send(status(END, END))
        self.shut_down()
        self.assertEqual(client.hear(), ["C COPY 0", "EOF"])

    def test_it_gets_what_there_is_first(self) -> None:
        client = self.client(capacity=100)
        client.send(startup(), query(f"START_REPLICATION 0/{START:X}"))
        done = self.shut_down()
        lines = []
        for _ in range(5):
            lines += client.take()
        self.assertEqual(
            lines[-2:], [f"w 0/{START:X}+{END - START} of {AT_END}", f"k {AT_END} reply=1"]
        )
        self.timeline.commit(END + 8)
        self.assertEqual(client.take(), [f"w {AT_END}+8 of {format_lsn(END + 8)}"])
        client.send(status(END + 8))
        self.assertEqual(client.take(), ["C COPY 0", "EOF"])
        self.assertEqual(len(done), 1)

    def test_but_not_for_ever(self) -> None:
        client = self.streaming()
        done = self.shut_down(10.0)
        client.hear()
        for _ in range(9):
            client.wait(1)
            client.send(status(START))
        self.assertEqual(done, [])
        client.wait(1)
        self.assertEqual(len(done), 1)
        self.assert_all_gone()

    def test_nor_for_one_that_takes_nothing(self) -> None:
        client = self.client(capacity=100)
        client.send(startup(), query(f"START_REPLICATION 0/{START:X}"))
        idle = self.client(capacity=100)
        idle.send(startup())
        done = self.shut_down(1.0)
        self.clock.advance(0.5)
        self.assertEqual(done, [])
        self.clock.advance(1)
        self.assertEqual(len(done), 1)
        self.assert_all_gone()

    def test_it_ends_with_the_last_of_many(self) -> None:
        clients = [self.streaming() for _ in range(3)]
        done = self.shut_down()
        for client in clients:
            self.assertEqual(done, [])
            client.hear()
            client.send(status(END))
        self.assertEqual(len(done), 1)

    def test_a_client_may_end_copying_itself(self) -> None:
        client = self.streaming()
        done = self.shut_down()
        client.hear()
        self.assertEqual(client.send(COPY_DONE, query("IDENTIFY_SYSTEM")), ["c", "EOF"])
        self.assertEqual(len(done), 1)


class Registry(Connections):
    def test_a_replica_is_who_it_said_it_is(self) -> None:
        client = self.streaming(user="me", application_name="standby1")
        replica = self.only_replica()
        self.assertEqual(
            (replica.pid, replica.user, replica.application_name, replica.peer),
            (client.key[0], "me", "standby1", "192.0.2.1:40000"),
        )
        self.assertEqual((replica.tli, replica.sent_lsn), (1, END))

    def test_what_each_says_is_kept(self) -> None:
        first = self.streaming(application_name="first")
        second = self.streaming(application_name="second")
        first.send(status(END, END - 8, END - 16, time=5))
        second.send(status(START + 8, time=6), feedback(7, 1, 8, 2))
        kept = {
            replica.application_name: (
                *(replica.write_lsn, replica.flush_lsn, replica.apply_lsn),
                replica.feedback,
            )
            for replica in self.timeline.replicas
        }
        self.assertEqual(
            kept,
            {
                "first": (END, END - 8, END - 16, None),
                "second": (START + 8, 0, 0, Feedback(0, 7, 1, 8, 2)),
            },
        )

    def test_positions_may_go_backwards(self) -> None:
        client = self.streaming()
        client.send(status(END, END, END))
        client.send(status(START, START, START))
        self.assertEqual(self.only_replica().flush_lsn, START)

    def test_it_leaves_on_every_way_out(self) -> None:
        def switch(client: Client) -> None:
            self.timeline.switch(END)
            client.send(COPY_DONE)

        def vanish(client: Client) -> None:
            self.timeline.error = UndefinedFile("gone")
            self.timeline.commit(END + PAGE)
            client.hear()

        def cancel(client: Client) -> None:
            self.client().send(cancel_request(*client.key))

        def shut_down(client: Client) -> None:
            self.factory.shut_down(1.0)
            client.send(status(END))

        ways: dict[str, Any] = {
            "CopyDone": lambda client: client.send(COPY_DONE),
            "Terminate": lambda client: client.send(TERMINATE),
            "connection lost": lambda client: client.transport.drop(),
            "ERROR": lambda client: client.send(message(b"d")),
            "FATAL": lambda client: client.send(SYNC),
            "unknown type": lambda client: client.send(b"\xff"),
            "timeout": lambda client: client.wait(60),
            "timeline switch": switch,
            "WAL that is gone": vanish,
            "cancellation": cancel,
            "shutdown": shut_down,
        }
        for name, leave in ways.items():
            self.setUp()
            client = self.streaming()
            self.assertEqual(len(self.timeline.replicas), 1)
            leave(client)
            self.assertEqual(list(self.timeline.replicas), [], name)
            self.assertEqual(self.timeline.observers, set(), name)
            client.transport.drop()
            client.hear()
            self.assert_all_gone()

    def test_it_is_back_with_the_next_stream(self) -> None:
        client = self.streaming()
        client.send(status(END), COPY_DONE)
        client.send(query(f"START_REPLICATION {AT_END}"))
        self.assertEqual(self.only_replica().write_lsn, 0)


class Unread(Connections):
    """Peers that ask, and do not read."""

    def test_answers_are_not_piled_up(self) -> None:
        client = self.client(capacity=20_000)
        client.start_up()
        asked = 0
        for _ in range(50):
            client.transport.deliver(query("SHOW block_size") * 100)
            asked += 100
            self.clock.advance(0)
            self.assertLess(len(client.transport.waiting), 20_000 + 100 * 100)
        self.assertFalse(client.transport.is_reading)
        lines: list[str] = []
        while client.transport.waiting:
            lines += client.take()
        lines.remove("GREETING")
        self.assertEqual(lines, ["T block_size:25(-1)", "D 8192", "C SHOW", "Z I"] * asked)

    def test_one_whose_answers_wait_may_start_to_stream(self) -> None:
        client = self.client(capacity=1000)
        client.start_up()
        client.transport.deliver(
            query("SHOW block_size") * 20 + query(f"START_REPLICATION 0/{START:X}")
        )
        lines: list[str] = []
        while client.transport.waiting:
            lines += client.take()
        self.assertEqual(lines[-2:], ["W", f"w 0/{START:X}+{END - START} of {AT_END}"])
        self.assertTrue(client.transport.is_reading)
        client.send(status(END, reply=1))
        self.assertEqual(client.take(), [f"k {AT_END} reply=0"])

    def test_while_it_streams_it_is_heard_in_any_case(self) -> None:
        client = self.client(capacity=100)
        client.send(startup(), query(f"START_REPLICATION 0/{START:X}"))
        client.take()
        self.assertTrue(client.transport.waiting)
        for _ in range(1000):
            client.transport.deliver(status(START + 8, reply=1))
        self.assertEqual(self.only_replica().write_lsn, START + 8)
        self.assertLess(len(client.transport.waiting), END - START + 200)

    def test_behind_the_stream_too(self) -> None:
        client = self.client(capacity=20_000)
        client.send(startup(), query(f"START_REPLICATION 0/{START:X}"))
        client.transport.deliver(COPY_DONE)
        for _ in range(100):
            client.transport.deliver(query("SHOW block_size") * 100)
            self.clock.advance(0)
        self.assertLess(len(client.transport.waiting), END - START + 40_000)


class Defects(SynchronousTestCase):
    def test_a_defect_is_logged_and_ends_the_connection(self) -> None:
        clock, timeline = Clock(), MemoryTimeline()
        client = Client(server(timeline, clock), clock)
        client.start_up()
        timeline.history = None  # type: ignore[assignment]
        self.assertEqual(
            client.send(query("IDENTIFY_SYSTEM"))[-2:],
            ["FATAL XX000: internal error in the WAL sender", "EOF"],
        )
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)

    def test_so_it_does_while_streaming(self) -> None:
        clock, timeline = Clock(), MemoryTimeline()
        client = Client(server(timeline, clock), clock)
        client.stream()
        timeline.history = None  # type: ignore[assignment]
        self.assertEqual(
            client.send(COPY_DONE),
            ["c", "FATAL XX000: internal error in the WAL sender", "EOF"],
        )
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)
        self.assertEqual(list(timeline.replicas), [])

    def test_so_does_one_that_is_waited_for(self) -> None:
        def write_slots(directory: Path, states: object, removed_to: int) -> None:
            raise RuntimeError("a defect")

        clock, threads = Clock(), HeldThreads()
        self.patch(slots_module, "write_slots", write_slots)
        with tempfile.TemporaryDirectory(prefix="walproto-") as directory:
            slots = Slots(Path(directory), threads)
            client = Client(server(MemoryTimeline(), clock, slots=slots), clock)
            client.start_up()
            client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
            threads.work()
        self.assertEqual(client.hear(), ["FATAL XX000: internal error in the WAL sender", "EOF"])
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.assertEqual(len(slots), 0)

    def test_so_does_one_while_wal_is_read_and_the_others_go_on(self) -> None:
        clock, timeline = Clock(), MemoryTimeline(2 * PAGE)
        factory = server(timeline, clock)
        clients = [Client(factory, clock), Client(factory, clock)]
        for client in clients:
            client.stream()
        timeline.error = RuntimeError("a defect")
        timeline.wal += bytes(PAGE)
        timeline.commit(timeline.commit_lsn + PAGE)
        for client in clients:
            self.assertEqual(
                client.hear()[-2:], ["FATAL XX000: internal error in the WAL sender", "EOF"]
            )
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 2)
        self.assertEqual(list(timeline.replicas), [])

    def test_an_error_that_the_client_is_told_of_is_logged_in_one_line(self) -> None:
        clock = Clock()
        client = Client(server(MemoryTimeline(), clock), clock)
        client.start_up()
        with capturedLogs() as logged:
            client.send(query("SHOW nosuch"))
        self.assertEqual(
            [formatEvent(event) for event in logged if event["log_level"] >= LogLevel.warn],
            ['192.0.2.1:40000: ERROR 42704: unrecognized configuration parameter "nosuch"'],
        )


# --- Any bytes at all ----------------------------------------------------------------------------

FRAGMENTS = st.one_of(
    st.binary(max_size=50),
    st.builds(
        message,
        st.sampled_from(sorted(FRONTEND)),
        st.one_of(
            st.binary(max_size=50),
            st.sampled_from(
                [
                    *(b"\0", b"SHOW all\0", b"IDENTIFY_SYSTEM\0", b"START_REPLICATION 0/300000\0"),
                    *(b"START_REPLICATION 0/0\0", b"TIMELINE_HISTORY 1\0", b"r" + bytes(33)),
                    *(b"r" + b"\xff" * 33, b"h" + bytes(24), b"r", b"z", b"BASE_BACKUP\0"),
                    *(b"CREATE_REPLICATION_SLOT s PHYSICAL\0", b"DROP_REPLICATION_SLOT s WAIT\0"),
                    *(b"CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL\0",),
                    *(b"START_REPLICATION SLOT s 0/300000\0", b"ALTER_REPLICATION_SLOT s (a)\0"),
                ]
            ),
        ),
    ),
    st.builds(
        lambda tag, length: tag + struct.pack(">I", length),
        st.sampled_from(sorted(FRONTEND)),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(
        lambda code, contents: struct.pack(">II", len(contents) + 8, code) + contents,
        st.sampled_from([3 << 16, 3 << 16 | 2, 80877102, 80877103, 80877104, 2 << 16]),
        st.one_of(
            st.binary(max_size=50),
            st.sampled_from([b"user\0a\0replication\0true\0\0", b"user\0\xff\0replication\0" * 2]),
        ),
    ),
)
READS = st.lists(st.lists(FRAGMENTS, max_size=5).map(b"".join), max_size=8)


class AnyBytes(SynchronousTestCase):
    def go_through(self, before: list[bytes], reads: list[bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="walproto-") as directory:
            self.go_through_with(Path(directory), before, reads)

    def go_through_with(self, directory: Path, before: list[bytes], reads: list[bytes]) -> None:
        clock, timeline, threads = Clock(), MemoryTimeline(), HeldThreads()
        slots = Slots(directory, threads)
        factory = server(timeline, clock, slots=slots)
        client = Client(factory, clock)
        with capturedLogs() as logged:
            for data in before:
                client.send(data)
                threads.work_all()
            largest = max(map(len, reads), default=0)
            for number, data in enumerate(reads):
                client.transport.deliver(data)
                clock.advance(0)
                if number % 2:
                    threads.work_all()
                    clock.advance(0)
                framing = client.protocol._session.framing
                limit = max(message.limit for message in FRONTEND.values())
                self.assertLessEqual(len(framing), limit + 1 + 2 * largest)
                if client.transport.disconnecting:
                    self.assertEqual(len(framing), 0)
            clock.advance(0)
            was_connected = client.transport.is_connected
            client.transport.drop()
            clock.advance(0)
            threads.work_all()
        self.assertEqual([e for e in logged if e["log_level"] >= LogLevel.error], [])
        self.assertEqual(self.flushLoggedErrors(), [])
        lines = told(bytes(client.transport.arrived))
        fatal = [line for line in lines if line.startswith("FATAL")]
        if fatal:
            self.assertFalse(was_connected)
            self.assertEqual(fatal, lines[-1:])
            self.assertNotIn("XX000", fatal[0])
        self.assertEqual(client.transport.written_too_late, b"")
        self.assertEqual(factory.connections, {})
        self.assertEqual(list(timeline.replicas), [])
        self.assertEqual(timeline.observers, set())
        self.assertEqual(clock.getDelayedCalls(), [])
        self.assertEqual([slot for slot in slots if slot.holder or slot.is_temporary], [])

    @settings(max_examples=150, deadline=None)
    @given(READS)
    def test_before_startup(self, reads: list[bytes]) -> None:
        self.go_through([], reads)

    @settings(max_examples=150, deadline=None)
    @given(READS)
    def test_behind_it(self, reads: list[bytes]) -> None:
        self.go_through([startup()], reads)

    @settings(max_examples=150, deadline=None)
    @given(READS)
    def test_while_streaming(self, reads: list[bytes]) -> None:
        self.go_through([startup(), query(f"START_REPLICATION 0/{START:X}")], reads)

    @settings(max_examples=100, deadline=None)
    @given(READS)
    def test_while_streaming_with_a_slot(self, reads: list[bytes]) -> None:
        create = query("CREATE_REPLICATION_SLOT s PHYSICAL")
        start = query(f"START_REPLICATION SLOT s 0/{START:X}")
        self.go_through([startup(), create, start], reads)

    def test_a_large_message_in_small_reads_is_kept_within_its_limit(self) -> None:
        clock = Clock()
        client = Client(server(MemoryTimeline(), clock), clock)
        client.start_up()
        limit = FRONTEND[b"Q"].limit
        client.send(b"Q" + struct.pack(">I", limit))
        left = limit - 4
        while left > 1:
            size = min(65_536, left - 1)
            self.assertEqual(client.send(b" " * size), [])
            left -= size
            self.assertLessEqual(len(client.protocol._session.framing), limit + 1)
        self.assertEqual(
            client.send(b"\0")[0],
            "ERROR 0A000: cannot execute SQL commands in WAL sender for physical replication",
        )
        self.assertEqual(len(client.protocol._session.framing), 0)
