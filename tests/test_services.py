"""The startup packet decides what a connection is served, and the service by which rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.fakes import (
    COPY_DONE,
    PAGE,
    SSL_REQUEST,
    START,
    SYNC,
    Client,
    MemoryTimeline,
    SlowTimeline,
    message,
    parameter_statuses,
    query,
    server,
    startup,
    status,
)
from walproto.access.grant import Grant
from walproto.errors import (
    EndReason,
    ObjectNotInPrerequisiteState,
    ReportedError,
    StreamingEnded,
    UndefinedObject,
)
from walproto.lsn import format_lsn
from walproto.server.configuration import Configuration
from walproto.server.producer import Piece
from walproto.server.reader import UNHEARD
from walproto.server.results import Wait
from walproto.server.service import IServices, OneTimeline, Service, Stream
from walproto.server.settings import Settings
from walproto.timeline.replicas import Replica
from walproto.wire.messages import PROTOCOL_3_2
from walproto.wire.startup import Startup

END = START + 4 * PAGE
AT_END = format_lsn(END)
STARTED = ["W", f"w {format_lsn(START)}+{4 * PAGE} of {AT_END}"]
COPIED = ["C START_STREAMING", "C START_REPLICATION", "Z I"]


class Watched(Stream):
    """It looks after its replica each second, and notes what it is told."""

    patience = 1.0

    def __init__(self, timeline: MemoryTimeline, piece: Piece, services: Several) -> None:
        super().__init__(timeline, piece)
        self.services = services
        self.noted = services.noted
        self.error: Exception | None = None

    def begin(self, replica: Replica) -> None:
        assert replica in list(self.timeline.replicas)
        self.noted.append("begin")

    def heard(self) -> None:
        self.noted.append("heard")

    def hear_other(self, tag: bytes) -> None:
        self.noted.append(tag.decode())

    def require_allowed(self) -> None:
        if self.services.ban is not None:
            raise self.services.ban

    def check(self) -> None:
        self.noted.append("check")
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        assert list(self.timeline.replicas) == []
        self.noted.append("end")


class One(Service):
    log_prefix = "[{name}] "

    def __init__(self, services: Several, name: str, startup: Startup, *more: Any) -> None:
        timeline = services.timelines[name]
        super().__init__(timeline, Piece(timeline), startup, *more)
        self.memory_timeline = timeline
        self.services = services
        self.log_fields = {"name": name}

    def greeted(self, settings: Settings) -> None:
        self.services.noted.append(f"greeted {settings['application_name']}")

    def ready_to_stream(self) -> Wait:
        if self.services.ready is not None:
            yield self.services.ready

    def stream(self, settings: Settings) -> Stream:
        if self.services.refusal is not None:
            raise self.services.refusal
        self.services.stream = Watched(self.memory_timeline, self._piece, self.services)
        return self.services.stream


@implementer(IServices)
class Several:
    """A timeline for each name, which a client says by ``which``."""

    def __init__(self, **timelines: MemoryTimeline) -> None:
        self.timelines = timelines
        self.ready: Deferred[None] | None = None
        self.refusal: ReportedError | None = None
        self.ban: Exception | None = None
        self.noted: list[str] = []
        self.stream: Watched

    def newest_protocol_version(self, configuration: Configuration) -> int:
        return PROTOCOL_3_2

    def require_ready(self) -> None:
        pass

    def serve(self, startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        parameters = dict(startup.parameters)
        name = parameters.pop("which", "")
        if name not in self.timelines:
            raise UndefinedObject(f'there is no "{name}"', fatal=True, log="make one")
        startup = replace(startup, parameters=tuple(parameters.items()))
        return One(self, name, startup, configuration)


class Conversations(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.logged = self.enterContext(capturedLogs())
        self.timeline = MemoryTimeline(4 * PAGE)
        self.other = MemoryTimeline(2 * PAGE, start=2 * START, major=13)
        self.services = Several(one=self.timeline, other=self.other)
        self.factory = server(self.services, self.clock)

    def tearDown(self) -> None:
        self.assertEqual(self.flushLoggedErrors(), [])

    def client(self) -> Client:
        return Client(self.factory, self.clock)

    def streaming(self) -> Client:
        client = self.client()
        self.assertEqual(client.stream(which="one"), STARTED)
        return client

    def lines(self) -> list[str]:
        return [
            formatEvent(event)
            for event in self.logged
            if event["log_namespace"] == "walproto.server.protocol.WalSenderProtocol"
        ]


class Choosing(Conversations):
    def test_the_startup_packet_decides(self) -> None:
        one, other = self.client(), self.client()
        self.assertEqual(one.start_up(which="one"), ["GREETING"])
        self.assertEqual(other.start_up(which="other"), ["GREETING"])
        self.assertEqual(
            parameter_statuses(bytes(other.transport.arrived))["server_version"], "13.0 (walproto)"
        )
        for client, timeline in ((one, self.timeline), (other, self.other)):
            ((lsn,),) = [
                line.split()[3:4]
                for line in client.send(query("IDENTIFY_SYSTEM"))
                if line.startswith("D ")
            ]
            self.assertEqual(lsn, format_lsn(timeline.commit_lsn))
            start = format_lsn(timeline.start)
            client.send(query(f"START_REPLICATION {start}"))
            self.assertEqual(b"".join(client.wal.values()), timeline.wal)
            self.assertEqual(len(timeline.replicas), 1)

    def test_what_there_is_not_is_told_and_logged_in_one_line(self) -> None:
        client = self.client()
        self.assertEqual(client.start_up(which="two"), ['FATAL 42704: there is no "two"', "EOF"])
        self.assertEqual(
            self.lines(),
            [
                "192.0.2.1:40000: replication connection authorized: user=postgres method=trust",
                '192.0.2.1:40000: FATAL 42704: there is no "two" (make one)',
            ],
        )

    def test_so_it_is_behind_a_request_for_encryption(self) -> None:
        client = self.client()
        self.assertEqual(client.send(SSL_REQUEST), ["N"])
        self.assertEqual(client.start_up(which="one"), ["GREETING"])

    def test_places_are_shared(self) -> None:
        self.factory = server(self.services, self.clock, max_wal_senders=1)
        self.client().start_up(which="one")
        (told, end) = self.client().start_up(which="other")
        self.assertTrue(told.startswith("FATAL 53300: "), told)
        self.assertEqual(end, "EOF")

    def test_what_is_said_of_a_client_says_of_what_it_was_served(self) -> None:
        client = self.client()
        client.stream(which="one", application_name="a")
        client.transport.drop()
        _, *lines = self.lines()
        self.assertEqual(len(lines), 2)
        for event, line in zip(self.logged[1:], lines, strict=True):
            self.assertTrue(line.startswith('[one] "a" (pid 1, '), line)
            self.assertEqual(
                (event["name"], event["application_name"], event["peer"]),
                ("one", "a", "192.0.2.1:40000"),
            )

    def test_the_interfaces(self) -> None:
        verifyObject(IServices, self.services)
        verifyObject(IServices, OneTimeline(self.timeline))


class Opening(SynchronousTestCase):
    """A timeline that takes a while to open."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.timeline = MemoryTimeline()
        self.slow = SlowTimeline(self.timeline)
        self.client = Client(server(self.slow, self.clock), self.clock)
        self.addCleanup(self.client.transport.drop)

    def test_what_is_said_meanwhile_is_dealt_with_then(self) -> None:
        self.assertEqual(self.client.send(startup(), query("SHOW block_size")), [])
        self.assertEqual(self.client.send(SYNC), [])
        self.slow.opened.callback(None)
        heard = self.client.hear()
        self.assertEqual((heard[0], heard[2], heard[-1]), ("GREETING", "D 8192", "Z I"))

    def test_it_is_read_no_further_than_it_takes_to_see_that_it_is_gone(self) -> None:
        self.client.start_up()
        for _ in range(UNHEARD):
            self.assertTrue(self.client.transport.is_reading)
            self.client.send(SYNC)
        self.assertFalse(self.client.transport.is_reading)

    def test_a_timeline_that_is_not_ready_even_then(self) -> None:
        self.timeline.is_ready = False
        self.client.start_up()
        self.slow.opened.callback(None)
        self.assertEqual(
            self.client.hear(), ["FATAL 57P03: the database system is starting up", "EOF"]
        )

    def test_an_error(self) -> None:
        self.client.start_up()
        self.slow.opened.errback(UndefinedObject("gone", fatal=True))
        self.assertEqual(self.client.hear(), ["FATAL 42704: gone", "EOF"])

    def test_a_defect(self) -> None:
        self.client.start_up()
        self.slow.opened.errback(ZeroDivisionError())
        self.assertEqual(
            self.client.hear(), ["FATAL XX000: internal error in the WAL sender", "EOF"]
        )
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class Waiting(Conversations):
    """Before a stream."""

    def setUp(self) -> None:
        super().setUp()
        self.services.ready = Deferred()

    def wait(self) -> Client:
        client = self.client()
        client.start_up(which="one")
        command = f"START_REPLICATION {format_lsn(START)}"
        self.assertEqual(client.send(query(command)), [])
        self.assertEqual(list(self.timeline.replicas), [])
        return client

    def test_it_begins_when_the_wait_is_over(self) -> None:
        client = self.wait()
        assert self.services.ready is not None
        self.services.ready.callback(None)
        self.assertEqual(client.hear(), STARTED)

    def test_it_may_fail(self) -> None:
        client = self.wait()
        assert self.services.ready is not None
        self.services.ready.errback(ObjectNotInPrerequisiteState("no"))
        self.assertEqual(client.hear(), ["ERROR 55000: no", "Z I"])
        self.services.ready = fail(UndefinedObject("gone", fatal=True))
        self.assertEqual(client.send(query("START_REPLICATION 0/0")), ["FATAL 42704: gone", "EOF"])

    def test_whoever_stops_waiting_leaves_a_line(self) -> None:
        ends: list[Callable[[Client], Any]] = [
            lambda client: client.transport.drop(),
            lambda client: client.protocol.shut_down(),
            lambda client: client.protocol.terminate(),
        ]
        for end in ends:
            client = self.client()
            client.start_up(which="one")
            self.services.ready = Deferred()
            client.send(query("START_REPLICATION 0/0"))
            before = self.lines()
            end(client)
            line = "[one] 192.0.2.1:40000: does not wait any longer for its stream to begin"
            self.assertEqual(self.lines()[len(before) :].count(line), 1)
            client.hear()

    def test_a_stream_that_cannot_be(self) -> None:
        self.services.ready = None
        self.services.refusal = ObjectNotInPrerequisiteState("no")
        client = self.client()
        client.start_up(which="one")
        command = query(f"START_REPLICATION {format_lsn(START)}")
        self.assertEqual(client.send(command), ["ERROR 55000: no", "Z I"])
        self.services.refusal = None
        self.assertEqual(client.send(command), STARTED)


class Rules(Conversations):
    """Those of a stream."""

    def checks(self) -> int:
        return self.services.noted.count("check")

    def test_it_is_told_what_happens(self) -> None:
        client = self.streaming()
        client.send(status(END), SYNC, message(b"f", b"\0"), query("SELECT 1"))
        self.assertEqual(client.send(COPY_DONE), ["c", *COPIED])
        self.assertEqual(self.services.noted, ["greeted ", "begin", "heard", "S", "f", "Q", "end"])

    def test_it_is_told_of_the_end_whatever_ends_it(self) -> None:
        for end in (
            lambda client: client.transport.drop(),
            lambda client: client.protocol.terminate(),
            lambda client: client.send(message(b"d", b"r")),
            lambda client: client.send(message(b"X")),
            lambda client: self.clock.pump([0.5] * 121),
        ):
            client = self.streaming()
            end(client)
            self.assertEqual(self.services.noted[-1], "end")
            self.assertEqual(self.services.noted.count("end"), 1)
            self.services.noted.clear()
            self.assertEqual(self.timeline.observers, set())
            client.transport.drop()
            self.clock.advance(0)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_it_is_checked_and_asked_when_there_was_nothing_for_a_second(self) -> None:
        client = self.streaming()
        self.assertEqual(client.wait(0.75), [])
        self.assertEqual(client.wait(0.25), [f"k {AT_END} reply=1"])
        self.assertEqual(client.wait(1), [f"k {AT_END} reply=1"])
        self.assertEqual(self.checks(), 2)

    def test_news_put_that_off(self) -> None:
        self.timeline.commit_lsn = START + 8
        client = self.client()
        client.stream(which="one")
        for number in range(2, 10):
            self.clock.advance(0.75)
            self.timeline.commit(START + 8 * number)
            self.assertEqual([line[0] for line in client.hear()], ["w"])
        self.assertEqual(client.wait(0.75), [])
        self.assertEqual(client.wait(0.25), [f"k {format_lsn(START + 72)} reply=1"])

    def test_so_does_wal_that_is_not_taken(self) -> None:
        client = Client(self.factory, self.clock, capacity=PAGE)
        client.send(startup(which="one"))
        client.take()
        client.send(query(f"START_REPLICATION {format_lsn(START)}"))
        for _ in range(5):
            self.clock.advance(1)
        self.assertEqual(self.checks(), 0)
        self.assertEqual(client.take(), STARTED)
        client.wait(1)
        self.assertEqual(self.checks(), 1)

    def test_what_a_check_finds_ends_the_stream(self) -> None:
        client = self.streaming()
        self.services.stream.error = StreamingEnded(EndReason.SUSPENDED, "that is all")
        self.assertEqual(client.wait(1), ["ERROR XX000: that is all", "Z I"])
        self.assertEqual(self.services.noted[-2:], ["check", "end"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertIn("nobody brings WAL", self.lines()[-1])

    def test_or_the_connection(self) -> None:
        client = self.streaming()
        self.services.stream.error = StreamingEnded(EndReason.MOVED, "go", fatal=True)
        self.assertEqual(client.wait(1), ["FATAL XX000: go", "EOF"])
        self.assertEqual(self.services.noted[-2:], ["check", "end"])

    def test_a_defect_in_it(self) -> None:
        client = self.streaming()
        self.services.stream.error = ZeroDivisionError()
        self.assertEqual(client.wait(1), ["FATAL XX000: internal error in the WAL sender", "EOF"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_one_that_is_not_allowed_does_not_begin(self) -> None:
        self.services.ban = StreamingEnded(EndReason.MOVED, "go", fatal=True)
        client = self.client()
        self.assertEqual(client.stream(which="one"), ["W", "FATAL XX000: go", "EOF"])
        self.assertEqual(client.wal, {})
        self.assertEqual(self.services.noted, ["greeted ", "begin", "end"])

    def test_one_that_is_not_any_longer_is_told_though_wal_flows(self) -> None:
        self.timeline.commit_lsn = START + 8
        client = self.client()
        client.stream(which="one")
        for number in range(2, 10):
            self.clock.advance(0.75)
            self.timeline.commit(START + 8 * number)
            self.assertEqual([line[0] for line in client.hear()], ["w"])
        self.services.ban = StreamingEnded(EndReason.MOVED, "go", fatal=True)
        self.clock.advance(0.5)
        self.timeline.commit(START + 80)
        self.assertEqual(client.wait(0.5)[-2:], ["FATAL XX000: go", "EOF"])
        self.assertEqual(self.checks(), 0)

    def test_and_though_it_takes_nothing(self) -> None:
        client = Client(self.factory, self.clock, capacity=PAGE)
        client.send(startup(which="one"))
        client.take()
        client.send(query(f"START_REPLICATION {format_lsn(START)}"))
        self.clock.advance(1)
        self.services.ban = StreamingEnded(EndReason.MOVED, "go", fatal=True)
        self.clock.advance(1)
        self.assertEqual(len(self.timeline.replicas), 0)
        self.assertEqual(client.take()[-2:], ["FATAL XX000: go", "EOF"])

    def test_a_defect_in_that(self) -> None:
        self.services.ban = ZeroDivisionError()
        client = self.client()
        told = ["FATAL XX000: internal error in the WAL sender", "EOF"]
        self.assertEqual(client.stream(which="one"), ["W", *told])
        self.services.ban = None
        client = self.streaming()
        self.services.ban = ZeroDivisionError()
        self.assertEqual(client.wait(1), told)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_there_is_none_when_the_server_shuts_down(self) -> None:
        client = self.streaming()
        client.protocol.shut_down()
        self.clock.advance(3)
        self.assertEqual(self.checks(), 0)

    def test_nor_when_the_timeline_has_ended(self) -> None:
        client = self.streaming()
        self.timeline.switch(END)
        self.assertEqual(client.hear(), ["c"])
        self.assertEqual(client.wait(3), [])
        self.assertEqual(self.checks(), 0)

    def test_without_keepalives_it_may_be_silent(self) -> None:
        self.patch(Watched, "is_kept_alive", False)
        self.patch(Watched, "patience", None)
        client = self.streaming()
        self.assertEqual(client.wait(1_000_000), [])
