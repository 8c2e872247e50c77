"""Calls over real sockets, to a small pageserver that is written by hand, and to PostgreSQL."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import psycopg2  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn  # type: ignore[import-untyped]
from psycopg2.extras import PhysicalReplicationConnection  # type: ignore[import-untyped]
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import CancelledError, Deferred, DeferredQueue
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.postgres import HOST, free_port, installations, workspace
from tests.test_libpq import environment, join_libpq, turn
from tests.test_watch import open_files
from walproto.neon.callback import (
    Caller,
    CallError,
    Subscription,
    masked,
    pageserver_name,
    parse_address,
    query_for,
)
from walproto.neon.callmemaybe import Subscriptions
from walproto.neon.ids import TimelineIds, requested_ids

TENANT = "0123456789abcdef" * 2
TIMELINE = "fedcba9876543210" * 2
IDS = TimelineIds(TENANT, TIMELINE)
OTHER_IDS = TimelineIds(TENANT, "00112233445566778899aabbccddeeff")
PASSWORD = "correct horse's\\battery"
PERIOD = 0.2
reactor: Any = global_reactor


# -- A pageserver, and who it connects to --------------------------------------------------------


def message(tag: bytes, contents: bytes = b"") -> bytes:
    return tag + struct.pack(">I", len(contents) + 4) + contents


def problem(severity: str, code: str, text: str, tag: bytes = b"E") -> bytes:
    fields = {"S": severity, "V": severity, "C": code, "M": text}
    return message(
        tag, b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0"
    )


def parameter(name: str, value: str) -> bytes:
    return message(b"S", f"{name}\0{value}\0".encode())


LET_IN = message(b"R", struct.pack(">I", 0))
READY = message(b"Z", b"I")
GREETING = (
    LET_IN
    + parameter("server_version", "14.2")
    + parameter("client_encoding", "UTF8")
    + parameter("DateStyle", "ISO, MDY")
    + parameter("standard_conforming_strings", "on")
    + message(b"K", struct.pack(">II", 7, 7))
    + READY
)
ASK_FOR_PASSWORD = message(b"R", struct.pack(">I", 3))
ANSWER = message(b"C", b"SELECT 1\0") + READY


class Peer(Protocol):
    """A server's side of a connection.  What comes is put into its listener's ``events``: a
    StartupMessage's parameters as a dict, messages as (tag, contents), and None for the end."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.parameters: dict[str, str] | None = None
        self.gone = Deferred[None]()
        self._unread = b""

    def dataReceived(self, data: bytes) -> None:
        self._unread += data
        while len(self._unread) >= 5:
            tagged = self.parameters is not None
            size = struct.unpack_from(">I", self._unread, tagged)[0] + tagged
            if len(self._unread) < size:
                return
            packet, self._unread = self._unread[:size], self._unread[size:]
            if tagged:
                self.listener.heard(self, (packet[:1], packet[5:]))
            elif struct.unpack_from(">H", packet, 4)[0] == 1234:  # it asks for encryption
                self.write(b"N")
            else:
                strings = packet[8:].decode().split("\0")
                self.parameters = dict(zip(strings[:-2:2], strings[1:-2:2], strict=True))
                self.listener.heard(self, self.parameters)

    def write(self, *data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(b"".join(data))

    def close(self) -> None:
        assert self.transport is not None
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.listener.peers.remove(self)
        self.listener.heard(self, None)
        self.gone.callback(None)


class Listener(Factory):
    """Listens, and answers as the test says: ``answers`` to the StartupMessage (the key is "")
    and to queries by their first word; None closes the connection."""

    def __init__(
        self, test: TestCase, answers: dict[str, list[bytes | None]], port: int = 0
    ) -> None:
        self.answers = answers
        self.peers: set[Peer] = set()
        self.events: DeferredQueue[tuple[Peer, Any]] = DeferredQueue()
        self.watch: Callable[[Peer, Any], None] = lambda peer, event: None
        listening = reactor.listenTCP(port, self, interface=HOST)
        self.port: int = listening.getHost().port
        test.addCleanup(self.all_gone)
        test.addCleanup(listening.stopListening)

    async def all_gone(self) -> None:
        for peer in list(self.peers):
            peer.close()
            await peer.gone

    def buildProtocol(self, address: object) -> Peer:
        peer = Peer(self)
        self.peers.add(peer)
        return peer

    def heard(self, peer: Peer, event: Any) -> None:
        self.events.put((peer, event))
        self.watch(peer, event)
        steps: list[bytes | None] = []
        if isinstance(event, dict):
            steps = self.answers[""]
        elif event is not None and event[0] == b"Q":
            steps = self.answers.get(event[1].split()[0].decode(), [])
        for step in steps:
            if step is None:
                peer.close()
            else:
                peer.write(step)

    @property
    def connstr(self) -> str:
        return f"host={HOST} port={self.port} user=sk dbname=ps sslmode=disable"

    async def query(self) -> tuple[Peer, str]:
        """The next query that comes."""
        while True:
            peer, event = await self.events.get()
            if isinstance(event, tuple) and event[0] == b"Q":
                return peer, event[1].removesuffix(b"\0").decode()


CALL = "callmemaybe"
OBLIGING: dict[str, list[bytes | None]] = {"": [GREETING], CALL: [ANSWER]}


class Calling(TestCase):
    timeout = 60

    def setUp(self) -> None:
        environment(self)

    def pageserver(self, **answers: list[bytes | None]) -> Listener:
        """One that does as it should, but for what is said here."""
        named = {"" if key == "startup" else key: steps for key, steps in answers.items()}
        return Listener(self, OBLIGING | named)

    def caller(self, host: str = "sk1.example.org", port: int = 5433) -> Caller:
        return Caller(reactor, host, port)

    async def failure(self, connstr: str) -> CallError:
        """How a call ends that comes to nothing."""
        with self.assertRaises(CallError) as caught:
            await self.caller()(Subscription(IDS, connstr))
        error: CallError = caught.exception
        self.assertNotIn("\n", str(error))
        return error


# -- One call ------------------------------------------------------------------------------------


class OneCall(Calling):
    async def test_what_a_pageserver_hears(self) -> None:
        """A connection that is none for replication, one simple query, and a farewell."""
        pageserver = self.pageserver()
        await self.caller()(Subscription(IDS, pageserver.connstr))
        events = [(await pageserver.events.get())[1] for _ in range(4)]
        options = (
            f"-c ztimelineid={TIMELINE} ztenantid={TENANT} pageserver_connstr="
            rf"host=127.0.0.1\\ port={pageserver.port}\\ user=sk\\ dbname=ps\\ sslmode=disable"
        )
        query = (
            f"callmemaybe {TENANT} {TIMELINE} host=sk1.example.org port=5433 options='{options}'"
        )
        startup = {"user": "sk", "database": "ps", "application_name": "walproto"}
        self.assertEqual(events, [startup, (b"Q", query.encode() + b"\0"), (b"X", b""), None])

    async def test_by_uri(self) -> None:
        pageserver = self.pageserver()
        uri = f"postgresql://no_user:@{HOST}:{pageserver.port}/no_db?application_name=sk%201"
        await self.caller()(Subscription(IDS, uri))
        _, startup = await pageserver.events.get()
        expected = {"user": "no_user", "database": "no_db", "application_name": "sk 1"}
        self.assertEqual(startup, expected)
        _, query = await pageserver.query()
        self.assertIn(f" pageserver_connstr={uri}'", query)

    async def test_it_is_never_for_replication(self) -> None:
        pageserver = self.pageserver()
        for value in ("true", "database"):
            connstr = f"{pageserver.connstr} replication={value}"
            await self.caller()(Subscription(IDS, connstr))
            _, startup = await pageserver.events.get()
            self.assertNotIn("replication", startup)
            for _ in range(3):
                await pageserver.events.get()

    async def test_an_answer_with_rows_will_do(self) -> None:
        names = struct.pack(">H", 1) + b"x\0" + struct.pack(">IHIhiH", 0, 0, 25, -1, -1, 0)
        row = message(b"T", names) + message(b"D", struct.pack(">HI", 1, 2) + b"ok")
        pageserver = self.pageserver(callmemaybe=[row, ANSWER])
        await self.caller()(Subscription(IDS, pageserver.connstr))

    async def test_an_error(self) -> None:
        pageserver = self.pageserver(
            callmemaybe=[problem("ERROR", "XX000", "no such\ntenant \x1b[2J"), READY]
        )
        error = await self.failure(pageserver.connstr)
        self.assertEqual(error.kind, "answer XX000")
        expected = "no such tenant ?[2J (SQLSTATE XX000): its log may say more"
        self.assertEqual(str(error), expected)

    async def test_it_refuses(self) -> None:
        pageserver = self.pageserver(startup=[problem("FATAL", "28000", "not you"), None])
        error = await self.failure(pageserver.connstr)
        self.assertEqual(error.kind, "connecting")
        self.assertIn(
            ": FATAL: not you: see that it runs, can be reached from here, and lets us in",
            str(error),
        )

    async def test_nobody_is_there(self) -> None:
        port = free_port()
        error = await self.failure(f"host={HOST} port={port} user=sk")
        self.assertEqual(
            (error.kind, str(error)),
            (
                "connecting",
                f'cannot connect: connection to server at "{HOST}", port {port} failed: Connection '
                "refused: see that it runs, can be reached from here, and lets us in",
            ),
        )

    async def test_a_name_that_nobody_has(self) -> None:
        error = await self.failure("host=pageserver.invalid user=sk")
        self.assertEqual(error.kind, "connecting")
        self.assertIn("pageserver.invalid", str(error))

    async def test_it_closes_in_the_middle(self) -> None:
        for part in (b"", ANSWER[:7], ANSWER[:14]):
            pageserver = self.pageserver(callmemaybe=[part, None])
            error = await self.failure(pageserver.connstr)
            self.assertEqual(error.kind, "no answer")
            expected = "no answer: server closed the connection unexpectedly: its log may say why"
            self.assertEqual(str(error), expected)
        for part in (b"", GREETING[:20]):
            pageserver = self.pageserver(startup=[part, None])
            self.assertEqual((await self.failure(pageserver.connstr)).kind, "connecting")

    async def test_what_answers_is_no_postgres(self) -> None:
        for steps in ([b"HTTP/1.1 400 Bad Request\r\n\r\n", None], [bytes(30), None]):
            pageserver = self.pageserver(startup=steps)
            self.assertEqual((await self.failure(pageserver.connstr)).kind, "connecting")
            pageserver = self.pageserver(callmemaybe=steps)
            self.assertEqual((await self.failure(pageserver.connstr)).kind, "no answer")

    async def test_it_wants_to_copy(self) -> None:
        for tag in (b"H", b"W"):
            pageserver = self.pageserver(callmemaybe=[message(tag, b"\0\0\0")])
            call = self.caller()(Subscription(IDS, pageserver.connstr))
            if tag == b"H":
                with self.assertRaises(CallError) as caught:
                    await call
                self.assertIn("no answer: unexpected result (COPY_OUT)", str(caught.exception))
            else:
                await call
            peer, _ = await pageserver.query()
            await peer.gone

    async def test_what_is_no_connection_string(self) -> None:
        for wrong in ("nonsense", "hots=ps1", "host=ps1 port='6400", "host=\udcff"):
            error = await self.failure(wrong)
            self.assertEqual(error.kind, "string")
            self.assertRegex(
                str(error), "^no connection string: .*: correct the pageserver_connstr"
            )

    async def test_cancelled_it_leaves_nothing(self) -> None:
        """While it connects, before it is let in, and while it waits for an answer."""
        await turn()
        before = open_files()
        for steps in ("startup", CALL):
            pageserver = self.pageserver(**{steps: []})
            call = self.caller()(Subscription(IDS, pageserver.connstr))
            peer, _ = await pageserver.events.get()
            if steps == CALL:
                await pageserver.query()
            call.cancel()
            with self.assertRaises(CancelledError):
                await call
            await peer.gone
        early = self.caller()(Subscription(IDS, pageserver.connstr))
        early.cancel()
        with self.assertRaises(CancelledError):
            await early
        await deferToThread(join_libpq)
        await turn()
        for peer in list(pageserver.peers):
            await peer.gone
        self.assertEqual(open_files() - before, 2)  # those that listen


# -- The text ------------------------------------------------------------------------------------

PRINTABLE = st.text(
    st.characters(codec="utf-8").filter(str.isprintable) | st.sampled_from(" '\\\"=&"), max_size=40
)


def split_as_postgres_does(options: str) -> list[str]:
    """pg_split_opts."""
    words, word, escaped = [], "", False
    for character in options + " ":
        if not escaped and character in " \t\n\v\f\r":
            words += [word] if word else []
            word = ""
        elif not escaped and character == "\\":
            escaped = True
        else:
            word += character
            escaped = False
    return words


class TheText(SynchronousTestCase):
    def setUp(self) -> None:
        environment(self)

    def test_it_is_this(self) -> None:
        for connstr, host, tail in (
            ("host=ps1", "127.0.0.1", "host=127.0.0.1 port=5433 options='-c {} host=ps1'"),
            ("a b", "::1", r"host=::1 port=5433 options='-c {} a\\ b'"),
            ("password='x'", "sk", r"host=sk port=5433 options='-c {} password=\'x\''"),
            (r"a\b", "my host", r"host='my host' port=5433 options='-c {} a\\\\b'"),
            (r"a='\'b'", r"i\t's", r"host='i\\t\'s' port=5433 options='-c {} a=\'\\\\\'b\''"),
        ):
            words = f"ztimelineid={TIMELINE} ztenantid={TENANT} pageserver_connstr="
            expected = f"callmemaybe {TENANT} {TIMELINE} " + tail.replace("{} ", words)
            self.assertEqual(query_for(Subscription(IDS, connstr), host, 5433), expected)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(connstr=PRINTABLE, host=PRINTABLE.filter(bool), port=st.integers(1, 65535))
    def test_what_libpq_and_postgres_make_of_it(self, connstr: str, host: str, port: int) -> None:
        """And what we make of it ourselves, when a client comes with it."""
        query = query_for(Subscription(IDS, connstr), host, port)
        head, tenant, timeline, conninfo = query.split(" ", 3)
        self.assertEqual((head, tenant, timeline), (CALL, TENANT, TIMELINE))
        made = parse_dsn(conninfo)
        self.assertEqual((made.pop("host"), made.pop("port")), (host, str(port)))
        options = made.pop("options")
        self.assertEqual(made, {})
        self.assertEqual(
            split_as_postgres_does(options),
            [
                "-c",
                f"ztimelineid={TIMELINE}",
                f"ztenantid={TENANT}",
                f"pageserver_connstr={connstr}",
            ],
        )
        request = requested_ids([], options)
        self.assertEqual((request.ids, request.pageserver_connstr), (IDS, connstr))

    def test_an_address_to_announce(self) -> None:
        for text, expected in {
            "sk1:5433": ("sk1", 5433),
            "192.0.2.1:1": ("192.0.2.1", 1),
            "[2001:db8::1]:65535": ("2001:db8::1", 65535),
            "[fe80::1%eth0]:5433": ("fe80::1%eth0", 5433),
        }.items():
            self.assertEqual(parse_address(text), expected)
        for wrong in (
            "",
            "sk1",
            "sk1:",
            ":5433",
            "sk1:0",
            "sk1:65536",
            "sk1:x",
            "::1:5433",
            "a b:1",
        ):
            with self.assertRaisesRegex(ValueError, "is not HOST:PORT, such as"):
                parse_address(wrong)


# -- Passwords -----------------------------------------------------------------------------------

WITH_PASSWORDS = [
    r"host=ps1 port=6400 password='correct horse\'s\\battery'",
    r"host=ps1 port=6400 password=correct\ horse\'s\\battery",
    r"port=6400 password =  correct\ horse\'s\\battery host=ps1",
    "postgresql://sk:correct%20horse's%5Cbattery@ps1:6400/",
    "postgres://sk@ps1:6400/db?sslmode=disable&password=correct%20horse%27s%5cbattery&user=x",
    "postgresql://ps1:6400?sslpassword=correct%20horse's%5Cbattery",
]


class Passwords(Calling):
    def test_they_are_masked_however_they_are_repeated(self) -> None:
        for connstr in WITH_PASSWORDS:
            query = query_for(Subscription(IDS, connstr), "sk1", 5433)
            options = parse_dsn(query.split(" ", 3)[3])["options"]
            for repeated in (query, options, connstr, PASSWORD, repr(PASSWORD)):
                text = masked(f"syntax error in <{repeated}>", connstr)
                for word in ("correct", "horse", "battery"):
                    self.assertNotIn(word, text)
                self.assertTrue(text.startswith("syntax error in <"), text)
                self.assertIn("***", text)
            self.assertEqual(masked("nothing of it", connstr), "nothing of it")
            self.assertEqual(pageserver_name(connstr), "ps1:6400")

    def test_they_are_masked_though_the_rest_is_wrong(self) -> None:
        for connstr in (
            "password='correct horse",
            "postgresql://sk:correct%zz@ps1/",
            "x password=correct",
        ):
            self.assertNotIn("correct", masked(f"<{connstr}>", connstr))
            self.assertEqual(pageserver_name(connstr), "(unknown)")

    def test_one_may_be_a_part_of_another(self) -> None:
        for connstr in ("password=abc sslpassword=abcdef", "sslpassword=cdef password=abcdef"):
            self.assertEqual(masked("<abcdef>", connstr), "<***>")

    def test_without_one_a_text_stays_what_it_is(self) -> None:
        for connstr in ("", "host=ps1 password=", "postgresql://sk:@ps1/", "nonsense"):
            self.assertEqual(masked("syntax  error\nat ''", connstr), "syntax error at ''")

    def test_a_pageserver_has_a_name(self) -> None:
        for connstr, name in {
            "host=ps1 port=1": "ps1:1",
            "hostaddr=192.0.2.1 user=secret": "192.0.2.1:(default)",
            "host='ps\n1' port=1": "ps 1:1",
            "": "(default):(default)",
            "postgresql://sk:secret@password@ps1:1": "ps1:1",
        }.items():
            self.assertEqual(pageserver_name(connstr), name)

    async def test_none_is_logged_though_the_pageserver_repeats_it(self) -> None:
        """In an error and in a notice; and it is there that it gets the right one."""
        said = f"you said pageserver_connstr=host=ps password='{PASSWORD}'"
        pageserver = self.pageserver(startup=[ASK_FOR_PASSWORD])
        quoted = PASSWORD.replace("\\", r"\\").replace("'", r"\'")
        connstr = f"{pageserver.connstr} password='{quoted}'"
        given: list[bytes] = []

        def answer(peer: Peer, event: Any) -> None:
            if isinstance(event, tuple) and event[0] == b"p":
                given.append(event[1])
                peer.write(GREETING)
            elif isinstance(event, tuple) and event[0] == b"Q":
                query = event[1][:-1].decode()
                for text in (said, query):
                    peer.write(problem("WARNING", "01000", text, tag=b"N"))
                peer.write(problem("ERROR", "XX000", f"{said} in {query}"), READY)

        pageserver.watch = answer
        del pageserver.answers[CALL]
        with capturedLogs() as events:
            subscriptions = Subscriptions(reactor, self.caller(), 60)
            subscriptions.subscribe(Subscription(IDS, connstr))
            peer, _ = await pageserver.query()
            await peer.gone
            await turn()
            await subscriptions.stop()
        self.assertEqual(given, [PASSWORD.encode() + b"\0"])
        texts = [str(formatEvent(event)) for event in events if "pageserver" in event]
        self.assertEqual(len([text for text in texts if "says: WARNING" in text]), 2)
        self.assertEqual(len([text for text in texts if "(SQLSTATE XX000)" in text]), 1)
        logged = repr([event for event in events if "pageserver" in event]) + "".join(texts)
        for word in ("correct", "horse", "battery"):
            self.assertNotIn(word, logged)
        self.assertIn("password='***'", logged)


# -- Again and again -----------------------------------------------------------------------------


class Recalling(Calling):
    def subscriptions(self, host: str = HOST, port: int = 5433) -> Subscriptions:
        """Subscriptions, with every call they make in ``made``, and how those end that come to
        nothing in ``failures``."""
        caller = self.caller(host, port)
        self.made: list[Subscription] = []
        self.failures: DeferredQueue[Any] = DeferredQueue()

        def call(subscription: Subscription) -> Deferred[None]:
            self.made.append(subscription)
            return caller(subscription).addErrback(failed)

        def failed(failure: Failure) -> Failure:
            self.failures.put(failure.value)
            return failure

        made = Subscriptions(reactor, call, PERIOD)
        self.addCleanup(made.stop)
        return made

    async def call_for(self, ids: TimelineIds, pageserver: Listener) -> str:
        """The next query for a timeline."""
        while True:
            _, query = await pageserver.query()
            if query.split()[2] == ids.timeline_id:
                return query

    async def test_it_is_asked_until_it_connects_and_again_when_it_has_gone(self) -> None:
        """From the first call to the last, with a pageserver that connects back by libpq."""
        ours, pageserver = Listener(self, {"": [GREETING]}), self.pageserver()
        connstr = f"{pageserver.connstr} application_name='my pageserver'"
        subscription, other = Subscription(IDS, connstr), Subscription(OTHER_IDS, connstr)
        subscriptions = self.subscriptions(HOST, ours.port)

        def session(peer: Peer, event: Any) -> None:
            """What our side does when a stream begins and when it ends."""
            assert peer.parameters is not None
            request = requested_ids([], peer.parameters["options"])
            self.assertEqual((request.ids, request.pageserver_connstr), (IDS, connstr))
            if event is peer.parameters:
                self.assertEqual(event["application_name"], "pageserver")
                subscriptions.pause(Subscription(request.ids, request.pageserver_connstr))
            elif event is None:
                subscriptions.resume(Subscription(request.ids, request.pageserver_connstr))

        async def stream(query: str) -> PhysicalReplicationConnection:
            """Connect back as we were told, to the letter."""
            conninfo = query.split(" ", 3)[3]
            connection = await deferToThread(
                psycopg2.connect,
                f"{conninfo} user=ps sslmode=disable gssencmode=disable",
                application_name="pageserver",
                connection_factory=PhysicalReplicationConnection,
            )
            await ours.events.get()
            return connection

        async def end(connection: PhysicalReplicationConnection) -> None:
            connection.close()
            while (await ours.events.get())[1] is not None:
                pass

        async def only_the_other_is_called() -> None:
            before = len(self.made)
            while len(self.made) < before + 3:
                await pageserver.query()
            self.assertEqual({*self.made[before:]}, {other})

        ours.watch = session
        subscriptions.subscribe(other)
        subscriptions.subscribe(subscription)
        for _ in range(2):
            await self.call_for(IDS, pageserver)
        for _ in range(2):
            query = await self.call_for(IDS, pageserver)
            one = await stream(query)
            await only_the_other_is_called()
            two = await stream(query)
            await end(one)
            await only_the_other_is_called()
            before = self.made.count(subscription)
            await end(two)
            while self.made.count(subscription) == before:
                await pageserver.query()
        subscriptions.unsubscribe(subscription)
        await only_the_other_is_called()
        await subscriptions.stop()

    async def test_one_that_hangs_is_abandoned_and_called_again(self) -> None:
        """Before it lets us in, or behind that; another one is called meanwhile."""
        for hanging in ("startup", CALL):
            silent, obliging = self.pageserver(**{hanging: []}), self.pageserver()
            subscriptions = self.subscriptions()
            with capturedLogs() as events:
                subscriptions.subscribe(Subscription(IDS, silent.connstr))
                subscriptions.subscribe(Subscription(OTHER_IDS, obliging.connstr))
                for _ in range(3):
                    event: Any = None
                    while not isinstance(event, dict):
                        peer, event = await silent.events.get()
                    await self.call_for(OTHER_IDS, obliging)
                    await peer.gone
                await subscriptions.stop()
            told = [event for event in events if event["log_level"] == LogLevel.warn]
            text = "no answer within 0.2 s: see what holds it up; calling again every 0.2 s"
            of_it = [event["text"] for event in told if event["timeline"] == TIMELINE]
            self.assertEqual(of_it, [text])

    async def test_one_that_is_up_later(self) -> None:
        """It is called all the time; what is wrong is said once."""
        port = free_port()
        connstr = f"host={HOST} port={port} user=sk sslmode=disable"
        subscriptions = self.subscriptions()
        with capturedLogs() as events:
            subscriptions.subscribe(Subscription(IDS, connstr))
            for _ in range(3):
                await self.failures.get()
            await Listener(self, OBLIGING, port).query()
            await subscriptions.stop()
        told = [event for event in events if event["log_level"] == LogLevel.warn]
        (refused,) = [event for event in told if "Connection refused" in event["text"]]
        self.assertEqual(refused["pageserver"], f"{HOST}:{port}")
        self.assertEqual((refused["tenant"], refused["timeline"]), (TENANT, TIMELINE))
        self.assertIn("see that it runs", refused["text"])

    async def test_a_real_postgres_does_not_know_what_we_want(self) -> None:
        with workspace() as space:
            primary = space.cluster(installations()[0], "primary").init()
            primary.configure(log_line_prefix="<%a|%b> ")
            primary.start()
            connstr = f"{primary.conninfo} dbname=postgres password=correct-horse"
            subscription = Subscription(IDS, connstr)
            subscriptions = self.subscriptions()
            with capturedLogs() as events:
                subscriptions.subscribe(subscription)
                for _ in range(3):
                    while not isinstance(await self.failures.get(), CallError):
                        pass  # it was abandoned, as all of this is slow
                await subscriptions.stop()
            prefix = re.escape("<walproto|client backend> ")
            said = 'syntax error at or near "callmemaybe"'
            query = re.escape(query_for(subscription, HOST, 5433))
            statement = rf"{prefix}STATEMENT:  {query}"
            await deferToThread(primary.expect_log, statement)
            await deferToThread(primary.stop)
            log = primary.log_text()
            error = rf"{prefix}ERROR:  {said} at character 1\n"
            self.assertGreaterEqual(len(re.findall(error + statement, log)), 3, log)
        told = [event for event in events if event["log_level"] == LogLevel.warn]
        (wrong,) = [event for event in told if "SQLSTATE" in event["text"]]
        self.assertEqual(
            formatEvent(wrong),
            f"pageserver {HOST}:{primary.port} for timeline {TENANT}/{TIMELINE}: it does not know "
            f"callmemaybe: {said} (SQLSTATE 42601): see that its connection string names a "
            "pageserver; calling again every 0.2 s",
        )
        self.assertNotIn("correct-horse", repr([*events]))
