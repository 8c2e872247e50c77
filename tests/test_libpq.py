"""The connection that libpq makes: with a real server, and with one that ends in odd ways."""

from __future__ import annotations

import os
import random
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from psycopg.conninfo import conninfo_to_dict
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from tests.fakes import message
from tests.postgres import HOST, Cluster, free_port, installations, lsn_to_int, workspace
from tests.test_watch import open_files
from walproto.lsn import format_lsn, segment_name
from walproto.upstream import libpq
from walproto.upstream.connection import Answer, UpstreamError
from walproto.upstream.libpq import Connection, replication_conninfos

MB = 1 << 20
PASSWORD = "correct-horse"
WALSENDERS = "FROM pg_stat_activity WHERE backend_type = 'walsender'"
reactor: Any = global_reactor


def environment(test: TestCase | SynchronousTestCase, **variables: str) -> None:
    """Have these in the environment, and nothing else that libpq looks for."""
    patch = pytest.MonkeyPatch()
    test.addCleanup(patch.undo)
    for name in [name for name in os.environ if name.startswith("PG")]:
        patch.delenv(name)
    for name, value in variables.items():
        patch.setenv(name, value)


# -- What it is to connect to --------------------------------------------------------------------


class ConnectionStrings(SynchronousTestCase):
    def setUp(self) -> None:
        environment(self)

    def made(self, conninfo: str) -> dict[str, object]:
        (only,) = replication_conninfos(conninfo)
        return dict(conninfo_to_dict(only))

    def test_it_is_for_replication(self) -> None:
        common = {"replication": "true", "dbname": "replication", "connect_timeout": "10"}
        common["fallback_application_name"] = "walproto"
        self.assertEqual(self.made(""), common)
        expected = common | {"host": "db1", "port": "5433", "user": "repl"}
        self.assertEqual(self.made("host=db1 port=5433 user=repl dbname=other"), expected)
        self.assertEqual(self.made("postgresql://repl@db1:5433/other?replication=0"), expected)

    def test_what_is_given_is_kept(self) -> None:
        made = self.made("connect_timeout=3 application_name='my relay' sslmode=verify-full")
        self.assertEqual(made["connect_timeout"], "3")
        self.assertEqual(made["application_name"], "my relay")
        self.assertEqual(made["sslmode"], "verify-full")
        environment(self, PGCONNECT_TIMEOUT="4")
        self.assertNotIn("connect_timeout", self.made("host=db1"))

    def test_each_host_is_the_first_once(self) -> None:
        def hosts(conninfo: str) -> list[tuple[object, object]]:
            made = map(conninfo_to_dict, replication_conninfos(conninfo))
            return [(one.get("host"), one.get("port")) for one in made]

        self.assertEqual(
            hosts("host=a,b,c port=1,2,3"),
            [("a,b,c", "1,2,3"), ("b,c,a", "2,3,1"), ("c,a,b", "3,1,2")],
        )
        self.assertEqual(hosts("host=a,b port=1"), [("a,b", "1"), ("b,a", "1")])
        self.assertEqual(hosts("postgresql://a:1,b:2/"), [("a,b", "1,2"), ("b,a", "2,1")])
        environment(self, PGHOST="a,b", PGPORT="1,2")
        self.assertEqual(hosts("user=repl"), [(None, None), ("b,a", "2,1")])

    def test_a_service_file_is_looked_up_before_hosts_are_tried(self) -> None:
        """In a name of its own or in the environment's; what the connection string says counts."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = Path(directory.name) / "services"
        path.write_text("[two]\nhost=h1,h2\nport=1,2\nconnect_timeout=3\nuser=bob\n")
        for conninfo, service in (("service=two user=alice", {}), ("", {"PGSERVICE": "two"})):
            environment(self, PGSERVICEFILE=str(path), **service)
            made = [*map(conninfo_to_dict, replication_conninfos(conninfo))]
            hosts = [(one["host"], one["port"]) for one in made]
            self.assertEqual(hosts, [("h1,h2", "1,2"), ("h2,h1", "2,1")])
            self.assertEqual({one["connect_timeout"] for one in made}, {"3"})
            self.assertEqual("user" in made[0], "alice" in conninfo)
            self.assertEqual(os.environ.get("PGSERVICE"), service.get("PGSERVICE"))
        self.assertEqual(self.made("service=nope host=h3")["host"], "h3")

    def test_what_is_no_connection_string_is_said(self) -> None:
        for wrong, why in {
            "nonsense": 'missing "=" after "nonsense" in connection info string',
            "hots=db1": 'invalid connection option "hots"',
            "postgresql://[::1": "end of string reached",
        }.items():
            with self.assertRaises(ValueError) as caught:
                replication_conninfos(wrong)
            self.assertIn(why, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    def test_what_is_wrong_with_a_password_does_not_show_it(self) -> None:
        for wrong in (
            "host=db1 password=secret words",
            "host=db1 password='secret",
            'host=db1 password=x se"cret"secret',
            "postgresql://repl:secret%zz@db1/",
            "postgresql://repl:secret words@db1/",
            "postgresql://repl:secret@[::1/",
            "postgresql://db1/?password=secret=",
        ):
            with self.assertRaises(ValueError) as caught:
                replication_conninfos(wrong)
            self.assertNotIn("secret", str(caught.exception))
            self.assertNotIn("words", str(caught.exception))


# -- A real server -------------------------------------------------------------------------------


class WithServer(TestCase):
    timeout = 120
    primary: ClassVar[Cluster]
    directory: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        space = cls.enterClassContext(workspace())
        cls.directory = space.directory("ours")
        cls.primary = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1)
        hba = cls.primary.directory / "pg_hba.conf"
        line = "host replication guarded 127.0.0.1/32 scram-sha-256\n"
        hba.write_text(line + hba.read_text())
        cls.primary.start()
        cls.primary.sql(f"CREATE ROLE guarded LOGIN REPLICATION PASSWORD '{PASSWORD}'")

    def setUp(self) -> None:
        environment(self)
        self.primary.wait_until(f"NOT EXISTS (SELECT {WALSENDERS})")

    async def connect(self, conninfo: str) -> Connection:
        connection = await libpq.connect(reactor, replication_conninfos(conninfo)[0])
        self.addCleanup(connection.lose, "the test is over")
        return connection

    async def refused(self, conninfo: str) -> str:
        with self.assertRaises(UpstreamError) as caught:
            await self.connect(conninfo)
        text = str(caught.exception)
        self.assertNotIn("\n", text)
        self.assertNotIn(PASSWORD, text)
        return text

    async def failure(self, answer: Deferred[Answer]) -> UpstreamError:
        with self.assertRaises(UpstreamError) as caught:
            await answer
        error: UpstreamError = caught.exception
        self.assertNotIn("\n", str(error))
        return error


class Connecting(WithServer):
    def application_name(self, connection: Connection) -> str:
        names = self.primary.sql(f"SELECT application_name {WALSENDERS}")
        connection.lose("that is all")
        self.primary.wait_until(f"NOT EXISTS (SELECT {WALSENDERS})")
        return names

    async def test_by_keywords(self) -> None:
        connection = await self.connect(self.primary.conninfo)
        self.assertEqual(connection.peer, f"127.0.0.1:{self.primary.port}")
        self.assertEqual(connection.major, self.primary.installation.major)
        self.assertEqual((await connection.query("SHOW wal_segment_size")).rows, [[b"1MB"]])
        self.assertEqual(self.application_name(connection), "walproto")

    async def test_by_uri(self) -> None:
        port = self.primary.port
        connection = await self.connect(
            f"postgresql://postgres@127.0.0.1:{port}/any?application_name=relay%201"
        )
        self.assertEqual(self.application_name(connection), "relay 1")

    async def test_by_name(self) -> None:
        port = self.primary.port
        connection = await self.connect(f"host=localhost port={port} user=postgres")
        self.assertEqual(connection.peer, f"localhost:{port}")

    async def test_by_the_environment(self) -> None:
        port = str(self.primary.port)
        environment(self, PGHOST=HOST, PGPORT=port, PGUSER="postgres", PGAPPNAME="from-outside")
        connection = await self.connect("")
        self.assertEqual(self.application_name(connection), "from-outside")

    async def test_by_a_service_file(self) -> None:
        services = self.directory / "services"
        services.write_text(f"[wal]\nhost={HOST}\nport={self.primary.port}\nuser=postgres\n")
        environment(self, PGSERVICEFILE=str(services))
        connection = await self.connect("service=wal")
        self.assertEqual(self.application_name(connection), "walproto")

    async def test_the_first_of_several_hosts_that_answers_is_taken(self) -> None:
        refusing = free_port()
        connection = await self.connect(
            f"host={HOST},{HOST} port={refusing},{self.primary.port} user=postgres"
        )
        self.assertEqual(connection.peer, f"127.0.0.1:{self.primary.port}")

    async def test_no_host_answers(self) -> None:
        one, other = free_port(), free_port()
        text = await self.refused(f"host={HOST},{HOST} port={one},{other} user=postgres")
        for port in (one, other):
            self.assertIn(f"port {port} failed: Connection refused", text)

    async def test_a_server_says_why_not(self) -> None:
        text = await self.refused(f"host={HOST} port={self.primary.port} user=nobody")
        self.assertIn('FATAL:  role "nobody" does not exist', text)

    async def test_a_password(self) -> None:
        guarded = f"host={HOST} port={self.primary.port} user=guarded"
        self.assertIn("no password supplied", await self.refused(guarded))
        await self.connect(f"{guarded} password={PASSWORD}")
        wrong = await self.refused(f"{guarded} password={PASSWORD}1")
        self.assertIn('password authentication failed for user "guarded"', wrong)
        url = f"postgresql://guarded:{PASSWORD}1@{HOST}:{self.primary.port}/?sslmode=disable"
        self.assertIn("password authentication failed", await self.refused(url))
        passwords = self.directory / "passwords"
        passwords.write_text(f"{HOST}:*:replication:guarded:{PASSWORD}\n")
        passwords.chmod(0o600)
        await self.connect(f"{guarded} passfile={passwords}")
        environment(self, PGPASSWORD=PASSWORD)
        await self.connect(guarded)

    async def test_a_host_that_does_not_answer_is_passed_over(self) -> None:
        """In its time, and nobody else has to wait for that."""
        with socket.create_server((HOST, 0)) as silent:
            port = silent.getsockname()[1]
            alone = f"host={HOST} port={port} user=postgres connect_timeout=2"
            second = f"host={HOST},{HOST} port={port},{self.primary.port} user=postgres"
            refused = Deferred.fromCoroutine(self.refused(alone))
            one = Deferred.fromCoroutine(self.connect(f"{second} connect_timeout=2"))
            connection = await self.connect(self.primary.conninfo)
            await connection.query("IDENTIFY_SYSTEM")
            self.assertFalse(one.called or refused.called)
            self.assertEqual((await one).peer, f"{HOST}:{self.primary.port}")
            text = f'connection to server at "{HOST}", port {port} failed: timeout expired'
            self.assertEqual(await refused, text)

    async def test_a_port_at_which_nobody_speaks_is_given_up(self) -> None:
        """Cancelled, it leaves nothing behind, be it still waiting or there by then."""
        await turn()
        before = open_files()
        with socket.create_server((HOST, 0)) as silent:
            port = silent.getsockname()[1]
            connecting = libpq.connect(
                reactor, replication_conninfos(f"host={HOST} port={port} user=postgres")[0]
            )
            accepted, _ = await deferToThread(silent.accept)
            with accepted:
                await deferToThread(accepted.recv, 1)  # it waits for our answer
                connecting.cancel()
                with self.assertRaises(CancelledError):
                    await connecting
        await deferToThread(join_libpq)
        await turn()
        self.assertEqual(open_files(), before)

    async def test_a_connection_nobody_waits_for_is_closed(self) -> None:
        await turn()
        before = open_files()
        connecting = libpq.connect(reactor, replication_conninfos(self.primary.conninfo)[0])
        join_libpq()  # it is there, but we have not heard of it
        connecting.cancel()
        with self.assertRaises(CancelledError):
            await connecting
        await turn()
        self.assertEqual(open_files(), before)
        self.primary.wait_until(f"NOT EXISTS (SELECT {WALSENDERS})")


def join_libpq() -> None:
    """Wait until all is over that was begun to connect."""
    for thread in threading.enumerate():
        if thread.name == "libpq":
            thread.join()


async def turn() -> None:
    """Let the reactor do what it has to do."""
    for _ in range(3):
        await deferLater(reactor, 0)


class Asking(WithServer):
    async def test_answers_are_rows_of_text(self) -> None:
        connection = await self.connect(self.primary.conninfo)
        for _ in range(3):
            answer = await connection.query("IDENTIFY_SYSTEM")
            ((system, tli, lsn, database),) = answer.rows
            self.assertEqual((tli, database, answer.is_streaming), (b"1", None, False))
            expected = self.primary.sql("SELECT system_identifier FROM pg_control_system()")
            self.assertEqual(system, expected.encode())
            assert lsn is not None
            self.assertLessEqual(lsn_to_int(lsn.decode()), lsn_to_int(self.primary.lsn()))
        answer = await connection.query('READ_REPLICATION_SLOT "none"')
        self.assertEqual(answer.rows, [[None, None, None]])

    async def test_errors_tell_their_code_and_leave_the_connection_well(self) -> None:
        connection = await self.connect(self.primary.conninfo)
        for command, text, code in (
            ("SHOW nosuch", 'unrecognized configuration parameter "nosuch"', "42704"),
            ("TIMELINE_HISTORY 9", 'could not open file "pg_wal/00000009.history"', "58P01"),
            ("SELECT 1", "cannot execute SQL commands in WAL sender", "0A000"),
            ("START_REPLICATION 0/1000000 TIMELINE 9", "requested timeline 9 is not in", "XX000"),
            ("START_REPLICATION F/0 TIMELINE 1", "is ahead of the WAL flush position", "XX000"),
        ):
            streaming: list[Answer] = []
            try:
                streaming.append(await connection.query(command))
                error = await self.failure(connection.copy(lambda data: None))
            except UpstreamError as refused:
                error = refused
            self.assertEqual(bool(streaming), "F/0" in command)
            self.assertIn(text, str(error))
            self.assertEqual(error.sqlstate, code)
            self.assertEqual((await connection.query("SHOW wal_segment_size")).rows, [[b"1MB"]])

    async def test_a_slot_that_is_in_use(self) -> None:
        one = await self.connect(self.primary.conninfo)
        await one.query('CREATE_REPLICATION_SLOT "busy" PHYSICAL RESERVE_WAL')
        other = await self.connect(self.primary.conninfo)
        command = f'START_REPLICATION SLOT "busy" PHYSICAL {self.primary.lsn()} TIMELINE 1'
        self.assertTrue((await one.query(command)).is_streaming)
        error = await self.failure(other.query(command))
        self.assertEqual(error.sqlstate, "55006")
        self.assertIn('replication slot "busy" is active for PID', str(error))

    async def test_what_is_asked_of_a_connection_that_is_gone(self) -> None:
        connection = await self.connect(self.primary.conninfo)
        connection.lose("we have had enough")
        connection.lose("and again")
        for _ in range(2):
            error = await self.failure(connection.query("IDENTIFY_SYSTEM"))
            self.assertEqual(str(error), "we have had enough")
        connection.pause()
        connection.resume()
        connection.send(b"r")

    async def test_a_server_may_go_while_nothing_is_asked(self) -> None:
        connection = await self.connect(self.primary.conninfo)
        self.primary.sql(f"SELECT pg_terminate_backend(pid) {WALSENDERS}")
        self.primary.wait_until(f"NOT EXISTS (SELECT {WALSENDERS})")
        await turn()
        error = await self.failure(connection.query("IDENTIFY_SYSTEM"))
        self.assertEqual(str(error), "server closed the connection unexpectedly")


class Stream:
    """WAL as it comes over a connection, in one piece."""

    def __init__(self, connection: Connection, start: int) -> None:
        self.connection = connection
        self.start = start
        self.wal = bytearray()
        self.messages = 0
        self.confirms = False
        self.after: Callable[[], None] = lambda: None
        self.wanted = 0
        self.reached = Deferred[None]()

    @property
    def position(self) -> int:
        return self.start + len(self.wal)

    def take(self, data: memoryview) -> None:
        self.messages += 1
        if data[0] == ord("w"):
            (lsn,) = struct.unpack_from(">Q", data, 1)
            assert lsn == self.position
            self.wal += data[25:]
        if self.confirms:
            at = self.position
            self.connection.send(struct.pack(">cQQQq?", b"r", at, at, 0, 0, False))
        self.after()
        if self.wanted and self.position >= self.wanted and not self.reached.called:
            self.reached.callback(None)

    def until(self, lsn: str) -> Deferred[None]:
        self.wanted, self.reached = lsn_to_int(lsn), Deferred()
        if self.position >= self.wanted:
            self.reached.callback(None)
        return self.reached


class Streaming(WithServer):
    async def stream(self) -> tuple[Connection, Stream, Deferred[Answer]]:
        connection = await self.connect(self.primary.conninfo)
        lsn = lsn_to_int(self.primary.lsn()) // MB * MB
        answer = await connection.query(f"START_REPLICATION {format_lsn(lsn)} TIMELINE 1")
        self.assertEqual(answer, Answer([], is_streaming=True))
        stream = Stream(connection, lsn)
        return connection, stream, connection.copy(stream.take)

    def write(self, megabytes: int = 5) -> str:
        """Write so much WAL; where it ends."""
        self.primary.sql(
            f"SELECT pg_logical_emit_message(false, 'x', repeat(md5(i::text), 3000)) "
            f"FROM generate_series(1, {megabytes * 10}) i;"
        )
        return self.primary.lsn()

    def check(self, stream: Stream) -> None:
        """That it is the primary's WAL."""
        for lsn in range(stream.start, stream.position, MB):
            path = self.primary.wal_dir / segment_name(1, lsn // MB, MB)
            ours = stream.wal[lsn - stream.start :][:MB]
            self.assertTrue(path.read_bytes()[: len(ours)] == ours, path.name)

    async def test_pausing_loses_nothing(self) -> None:
        """While it pauses nothing is taken, however much there is; it goes on where it was."""
        seed = random.randrange(1 << 32)
        print(f"seed {seed}")
        chance = random.Random(seed)
        connection, stream, ended = await self.stream()
        pauses = 0

        def pause() -> None:
            nonlocal pauses
            assert not connection.is_paused
            if chance.random() < 0.5:
                pauses += 1
                connection.pause()
                reactor.callLater(chance.random() / 1000, connection.resume)

        stream.after = pause
        work = deferToThread(self.primary.pgbench, "-i", "-s", "1")
        for _ in range(3):
            end = await deferToThread(self.write)
            await stream.until(end)
        await work
        await stream.until(self.primary.lsn())
        self.check(stream)
        self.assertGreater(pauses, 10)

        paused = Deferred[None]()

        def stay_paused() -> None:
            connection.pause()
            paused.callback(None)

        stream.after = stay_paused
        self.primary.lsn()
        await paused
        stream.after = lambda: None
        before = stream.messages
        end = await deferToThread(self.write)
        await turn()
        self.assertEqual(stream.messages, before)
        connection.resume()
        await stream.until(end)
        self.check(stream)
        connection.lose("it was enough")
        self.assertEqual(str(await self.failure(ended)), "it was enough")

    async def test_a_backend_that_is_terminated_says_so(self) -> None:
        connection, _, ended = await self.stream()
        self.primary.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
        error = await self.failure(ended)
        self.assertEqual(str(error), "terminating connection due to administrator command")
        self.assertEqual(error.sqlstate, "57P01")
        await self.failure(connection.query("IDENTIFY_SYSTEM"))

    async def test_a_server_that_is_shut_down_sends_all_first(self) -> None:
        connection, stream, ended = await self.stream()
        stream.confirms = True
        end = self.write()
        shut_down = deferToThread(self.primary.stop, "fast")
        try:
            error = await self.failure(ended)
        finally:
            await shut_down
            self.primary.start()
        self.assertEqual(str(error), "server closed the connection unexpectedly")
        await self.failure(connection.query("IDENTIFY_SYSTEM"))
        self.assertGreater(stream.position, lsn_to_int(end))
        self.check(stream)

    async def test_a_server_that_crashes(self) -> None:
        connection, _, ended = await self.stream()
        self.primary.kill()
        try:
            error = await self.failure(ended)
            self.assertEqual(str(error), "server closed the connection unexpectedly")
            self.assertEqual(error.sqlstate, "")
            again = await self.failure(connection.query("IDENTIFY_SYSTEM"))
            self.assertEqual(str(again), str(error))
            self.assertIn("Connection refused", await self.refused(self.primary.conninfo))
        finally:
            self.primary.start()


# -- A server that ends in odd ways --------------------------------------------------------------


def row(*values: bytes | None) -> bytes:
    """A result of one row."""
    names = b"".join(b"column\0" + struct.pack(">IHIhiH", 0, 0, 25, -1, -1, 0) for _ in values)
    fields = b"".join(
        struct.pack(">i", -1) if value is None else struct.pack(">i", len(value)) + value
        for value in values
    )
    count = struct.pack(">H", len(values))
    return message(b"T", count + names) + message(b"D", count + fields)


def problem(severity: str, code: str, text: str, detail: str = "") -> bytes:
    fields = {"S": severity, "V": severity, "C": code, "M": text} | (
        {"D": detail} if detail else {}
    )
    return message(
        b"E", b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0"
    )


def complete(tag: bytes) -> bytes:
    return message(b"C", tag + b"\0")


READY = message(b"Z", b"I")
COPY_BOTH = message(b"W", b"\0\0\0")
COPY_DONE = message(b"c")
WAL = [message(b"d", b"w" + struct.pack(">I", number) * 50) for number in range(200)]


class Backend(Protocol):
    """Answers each query with what the test says: bytes to send, None for closing."""

    def __init__(self, answers: dict[str, list[bytes | None]]) -> None:
        self.answers = answers
        self.heard: list[tuple[bytes, bytes]] = []
        self.gone = Deferred[None]()
        self._unread = b""
        self._greeted = False

    def dataReceived(self, data: bytes) -> None:
        self._unread += data
        while self._unread:
            if self._greeted:
                size = int.from_bytes(self._unread[1:5], "big") + 1
                if len(self._unread) < max(size, 5):
                    return
                self._hear(self._unread[:1], self._unread[5:size])
            else:
                size, code = struct.unpack_from(">II", self._unread)
                self._greet(code)
            self._unread = self._unread[size:]

    def _greet(self, code: int) -> None:
        if code >> 16 == 1234:  # it asks for encryption
            self.write(b"N")
            return
        self._greeted = True
        version = message(b"S", b"server_version\0" + b"18.0\0")
        self.write(message(b"R", bytes(4)) + version + message(b"K", bytes(8)) + READY)

    def _hear(self, tag: bytes, contents: bytes) -> None:
        self.heard.append((tag, contents))
        key = contents[:-1].decode() if tag == b"Q" else tag.decode()
        for step in self.answers.get(key, []):
            if step is None:
                self.close()
            else:
                self.write(step)

    def write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def close(self) -> None:
        assert self.transport is not None
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.gone.callback(None)


@implementer(IPushProducer)
class Waiting:
    """Is told whether a transport can take more."""

    waits = False

    def pauseProducing(self) -> None:
        self.waits = True

    def resumeProducing(self) -> None:
        self.waits = False

    def stopProducing(self) -> None:
        pass


PausedStream = tuple[Connection, Backend, list[bytes], Deferred[Answer]]


class OddEnds(TestCase):
    timeout = 60

    async def connect(self, **answers: list[bytes | None]) -> tuple[Connection, Backend]:
        environment(self)
        backend = Backend(answers)
        factory = Factory.forProtocol(lambda: backend)
        port = reactor.listenTCP(0, factory, interface=HOST)
        self.addCleanup(lambda: backend.gone)
        self.addCleanup(port.stopListening)
        at = f"host={HOST} port={port.getHost().port} user=postgres gssencmode=disable"
        connection = await libpq.connect(reactor, replication_conninfos(at)[0])
        self.addCleanup(connection.lose, "the test is over")
        return connection, backend

    async def stream(
        self,
        *steps: bytes | None,
        take: Callable[[memoryview], None] | None = None,
        **more: list[bytes | None],
    ) -> tuple[Answer | UpstreamError, list[bytes], Connection, Backend]:
        """What comes of a stream that a server begins so; what has been taken of it."""
        connection, backend = await self.connect(START=[COPY_BOTH, *steps], **more)
        taken: list[bytes] = []
        self.assertTrue((await connection.query("START")).is_streaming)
        try:
            result: Answer | UpstreamError = await connection.copy(
                take or (lambda data: taken.append(bytes(data)))
            )
        except UpstreamError as error:
            result = error
            self.assertNotIn("\n", str(error))
        return result, taken, connection, backend

    WHOLE: ClassVar = [data[5:] for data in WAL]
    SHOW: ClassVar[list[bytes | None]] = [row(b"1MB") + complete(b"SHOW") + READY]

    async def test_at_the_end_of_a_timeline(self) -> None:
        behind = row(b"2", b"0/3000000") + complete(b"START_STREAMING") + complete(b"START")
        result, taken, connection, backend = await self.stream(
            *WAL, COPY_DONE, c=[behind + READY], SHOW=self.SHOW
        )
        self.assertEqual(result, Answer([[b"2", b"0/3000000"]]))
        self.assertEqual(taken, self.WHOLE)
        self.assertEqual(backend.heard, [(b"Q", b"START\0"), (b"c", b"")])
        self.assertEqual((await connection.query("SHOW")).rows, [[b"1MB"]])

    async def paused_stream(self, *steps: bytes | None) -> PausedStream:
        """A stream that begins so, paused at its first message."""
        connection, backend = await self.connect(START=[COPY_BOTH, *steps])
        taken: list[bytes] = []
        paused = Deferred[None]()

        def take(data: memoryview) -> None:
            taken.append(bytes(data))
            if len(taken) == 1:
                connection.pause()
                paused.callback(None)

        await connection.query("START")
        ended = connection.copy(take)
        await paused
        return connection, backend, taken, ended

    async def test_what_was_read_before_a_pause_comes_behind_it(self) -> None:
        """Though nothing more comes from the server."""
        few = WAL[:20]
        connection, _, taken, ended = await self.paused_stream(b"".join(few))
        await turn()
        self.assertEqual(len(taken), 1)
        connection.resume()
        for _ in few:
            await turn()
        self.assertEqual(taken, self.WHOLE[:20])
        connection.lose("that is all")
        with self.assertRaises(UpstreamError):
            await ended

    async def test_nothing_is_read_during_a_pause(self) -> None:
        """So it is the server that has to wait, and not our memory that fills."""
        much = message(b"d", b"w" * (1 << 20))
        connection, backend, taken, ended = await self.paused_stream(*[much] * 30)
        producer = Waiting()
        transport: Any = backend.transport
        transport.registerProducer(producer, True)
        backend.write(much)
        self.assertTrue(producer.waits)
        for _ in range(1000):
            await turn()
        self.assertTrue(producer.waits)
        self.assertEqual(len(taken), 1)
        connection.resume()
        backend.write(problem("ERROR", "58P01", "enough") + READY)
        with self.assertRaises(UpstreamError) as caught:
            await ended
        self.assertEqual(str(caught.exception), "enough")
        self.assertEqual(len(taken), 31)
        self.assertFalse(producer.waits)
        transport.unregisterProducer()

    async def test_last_words_are_heard_though_we_spoke_after_them(self) -> None:
        error = problem("FATAL", "57P01", "terminating connection")
        connection, backend, taken, ended = await self.paused_stream(b"".join(WAL) + error, None)
        await backend.gone
        for _ in range(10):
            connection.send(b"r" * 34)
            await turn()
        connection.resume()
        with self.assertRaises(UpstreamError) as caught:
            await ended
        self.assertEqual(str(caught.exception), "terminating connection")
        self.assertEqual(taken, self.WHOLE)

    async def test_with_an_error(self) -> None:
        """Which does not end the connection."""
        error = problem("ERROR", "58P01", "it has been removed", "By somebody.")
        result, taken, connection, _ = await self.stream(*WAL, error, READY, SHOW=self.SHOW)
        self.assertEqual(str(result), "it has been removed (By somebody.)")
        assert isinstance(result, UpstreamError)
        self.assertEqual(result.sqlstate, "58P01")
        self.assertEqual(taken, self.WHOLE)
        self.assertEqual((await connection.query("SHOW")).rows, [[b"1MB"]])

    async def test_with_last_words(self) -> None:
        """They come together with much WAL and the end of the connection."""
        error = problem("FATAL", "57P01", "terminating connection")
        result, taken, _, _ = await self.stream(b"".join(WAL) + error, None)
        self.assertEqual(str(result), "terminating connection")
        assert isinstance(result, UpstreamError)
        self.assertEqual(result.sqlstate, "57P01")
        self.assertEqual(taken, self.WHOLE)

    async def test_without_a_word(self) -> None:
        result, taken, connection, _ = await self.stream(b"".join(WAL), None)
        self.assertEqual(str(result), "server closed the connection unexpectedly")
        self.assertEqual(taken, self.WHOLE)
        with self.assertRaises(UpstreamError) as caught:
            await connection.query("SHOW")
        self.assertEqual(str(caught.exception), str(result))

    async def test_in_the_middle_of_a_message(self) -> None:
        result, taken, _, _ = await self.stream(*WAL, WAL[0][:20], None)
        self.assertEqual(str(result), "server closed the connection unexpectedly")
        self.assertEqual(taken, self.WHOLE)

    async def test_with_nonsense(self) -> None:
        for nonsense in (b"d\0\0\0\1", b"!\0\0\0\4", b"\0" * 30, b"d\xff\xff\xff\xff"):
            result, taken, _, _ = await self.stream(*WAL, nonsense, None)
            self.assertIsInstance(result, UpstreamError)
            self.assertEqual(taken, self.WHOLE)

    async def test_as_a_server_that_is_shut_down(self) -> None:
        result, taken, _, _ = await self.stream(*WAL, complete(b"COPY 0"), None)
        self.assertEqual(str(result), "server closed the connection unexpectedly")
        self.assertEqual(taken, self.WHOLE)

    async def test_between_the_stream_and_its_result(self) -> None:
        result, taken, _, backend = await self.stream(*WAL, COPY_DONE, c=[None])
        self.assertEqual(str(result), "server closed the connection unexpectedly")
        self.assertEqual(taken, self.WHOLE)
        self.assertEqual(backend.heard[-1], (b"c", b""))

    async def test_before_it_begins(self) -> None:
        connection, _ = await self.connect(START=[None])
        with self.assertRaises(UpstreamError) as caught:
            await connection.query("START")
        self.assertIn("server closed the connection unexpectedly", str(caught.exception))

    async def test_with_what_is_no_stream(self) -> None:
        connection, _ = await self.connect(START=[message(b"H", b"\0\0\0")])
        with self.assertRaises(UpstreamError) as caught:
            await connection.query("START")
        self.assertEqual(str(caught.exception), "unexpected result (COPY_OUT)")

    async def test_when_we_do_not_like_what_comes(self) -> None:
        def take(data: memoryview) -> None:
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            await self.stream(*WAL, take=take)

    async def test_notices_are_logged(self) -> None:
        text = problem("WARNING", "01000", "it is late").replace(b"E", b"N", 1)
        with capturedLogs() as logged:
            result, taken, connection, _ = await self.stream(text, *WAL, text, None)
        self.assertIsInstance(result, UpstreamError)
        self.assertEqual(taken, self.WHOLE)
        told = [formatEvent(event) for event in logged if "says" in formatEvent(event)]
        self.assertEqual(told, [f"{connection.peer} says: WARNING:  it is late"] * 2)

    async def test_a_server_that_does_not_read_is_sent_it_all_the_same(self) -> None:
        connection, backend = await self.connect(START=[COPY_BOTH])
        await connection.query("START")
        ended = connection.copy(lambda data: None)
        transport: Any = backend.transport
        transport.pauseProducing()
        sent = [struct.pack(">I", number) * 25_000 for number in range(100)]
        for data in sent:
            connection.send(data)
        await turn()
        self.assertLess(len(backend.heard), 50)
        all_there = Deferred[None]()
        backend.answers = {"d": []}
        hear = backend._hear

        def count(tag: bytes, contents: bytes) -> None:
            hear(tag, contents)
            if len(backend.heard) == 101:
                all_there.callback(None)

        backend._hear = count  # type: ignore[method-assign]
        transport.resumeProducing()
        await all_there
        self.assertEqual([contents for _, contents in backend.heard[1:]], sent)
        connection.lose("that is all")
        with self.assertRaises(UpstreamError):
            await ended
