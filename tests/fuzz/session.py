"""Target: a whole server in memory, and what happens to it.

An input is a sequence of things that happen: bytes from some clients, in any order and cut
anywhere; time that goes by; WAL that grows; and all that a server can meet with besides.  It is
read from its beginning, each thing behind its number, so that what clients once said can be written
down that way (:func:`spoken`).  Whatever it is:

- no exception escapes, and nothing is logged as a defect;
- what a client is sent is what a server may say, to the byte (:mod:`tests.fuzz.backend`);
- who has not proven to know the password, where one is asked for, is told nothing;
- behind its last word a connection writes nothing;
- what is kept for a connection is bounded, whatever the client sends and does not take;
- when all clients are gone, nothing is left of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from zope.interface import implementer

from tests.fakes import PAGE, SEGMENT, START, MemoryTimeline, message, server
from tests.fuzz import seeds
from tests.fuzz.access import some_verifier, written
from tests.fuzz.backend import check_conversation
from tests.fuzz.clients import CAPACITY, READ, Peeked, held
from tests.fuzz.target import Input, Target, string
from tests.fuzz.wire import COMMAND_WORDS
from tests.slots_fakes import quick_directory
from tests.upstream_fakes import HeldThreads
from walproto.access.authentication import IAuthenticator, Trust
from walproto.access.guard import Guard
from walproto.errors import UndefinedFile
from walproto.server.channels import PIECE_SIZE
from walproto.timeline.slots import Slots

CLIENTS = 3
"""How many there are at a time, at most."""
MOST_WAITING = CAPACITY + 4 * PAGE + PIECE_SIZE
"""Bytes that may wait there all the same: one more piece of WAL, or of an answer."""
MOST_HELD = 6 * 65536 + 2 * PIECE_SIZE + 65536
"""Bytes that may be kept for a connection: some reads of the transport, and a piece of WAL with a
view of it."""
SECONDS = (0.0, 0.0, 0.01, 1.0, 6.0, 29.0, 31.0, 61.0, 3600.0)
VERSIONS = ("18.0", "13.1", "15.4", "17.2")

ACTIONS = (
    *("raw", "message", "startup", "answer", "take", "time", "grow", "switch", "shutdown", "drop"),
    *("client", "cancel", "work", "trouble", "half", "terminate", "prove", "repeat"),
)
"""What can happen, by its number."""


@cache
def _guard() -> Guard:
    """One that lets in who knows the password, from everywhere."""
    with quick_directory() as name:
        rules, users = Path(name, "hba.conf"), Path(name, "users.txt")
        rules.write_text("host all,replication all all scram-sha-256\n")
        users.write_text(f'"postgres" "{written(some_verifier())}"\n')
        return Guard(hba_file=rules, auth_file=users)


class Server:
    """A server, its clients, and an input that says what happens."""

    def __init__(self, source: Input, directory: Path, authenticator: IAuthenticator) -> None:
        self.source = source
        self.clock = Clock()
        flags = source.number()
        self.version = VERSIONS[flags & 3]
        self.timeline = MemoryTimeline(8, major=int(self.version.split(".")[0]))
        self.timeline.wal = _wal()
        self.timeline.commit_lsn = START + 4 * PAGE + 120
        self.threads = HeldThreads()
        self.takes_all = bool(flags & 4)
        self.is_open = isinstance(authenticator, Trust)
        self.factory = server(
            self.timeline,
            self.clock,
            slots=Slots(directory, self.threads) if flags & 8 else None,
            server_version=self.version,
            authenticator=authenticator,
            max_wal_senders=1 if flags & 16 else 10,
            max_unauthenticated=CLIENTS - 1 if flags & 32 else 200,
        )
        self.clients: list[Peeked] = []
        self.gone: list[Peeked] = []
        self.connect()

    @property
    def client(self) -> Peeked:
        """The one that things happen to."""
        return self.clients[-1]

    def connect(self) -> None:
        self.clients.append(Peeked(self.factory, self.clock, takes_all=self.takes_all))

    def go_on(self) -> None:
        """Let the next thing happen."""
        name = ACTIONS[self.source.number() % len(ACTIONS)]
        action: Callable[[], None] = getattr(self, f"do_{name}")
        action()
        self.clock.advance(0)

    # --- what can happen -------------------------------------------------------------------

    def do_raw(self) -> None:
        self.client.send(self.source.string())

    def do_message(self) -> None:
        tag = self.source.take(1) or b"S"
        self.client.send(message(tag, self.source.string()))

    def do_startup(self) -> None:
        contents = self.source.string()
        self.client.send(struct.pack(">I", len(contents) + 4) + contents)

    def do_answer(self) -> None:
        """It answers an authentication request, mostly as who knows the password."""
        self.client.transport.take()
        self.client.send(self.client.answer(knows_password=self.source.number() % 8 != 7))

    def do_take(self) -> None:
        self.client.transport.take(self.source.number(2) or None)

    def do_time(self) -> None:
        self.clock.advance(SECONDS[self.source.number() % len(SECONDS)])

    def do_grow(self) -> None:
        end = START + len(self.timeline.wal)
        self.timeline.commit(min(self.timeline.commit_lsn + self.source.number(2) * 8, end))

    def do_switch(self) -> None:
        if self.timeline.history.tli < 5:
            self.timeline.switch(self.timeline.commit_lsn)

    def do_shutdown(self) -> None:
        self.factory.shut_down(SECONDS[self.source.number() % len(SECONDS)])

    def do_drop(self) -> None:
        self.client.transport.drop()

    def do_client(self) -> None:
        """Another client speaks: one that was there, or a new one."""
        number = self.source.number() % CLIENTS
        if number < len(self.clients):
            self.clients.append(self.clients.pop(number))
        else:
            self.connect()

    def do_cancel(self) -> None:
        """The client's command is cancelled, as a client does it, over another connection."""
        other = Peeked(self.factory, self.clock, takes_all=True)
        request = struct.pack(">I", 80877102) + self.client.key()
        other.send(struct.pack(">I", len(request) + 4) + request)
        self.clock.advance(0)
        other.transport.drop()
        self.gone.append(other)

    def do_work(self) -> None:
        if self.threads.is_busy:
            self.threads.work()

    def do_trouble(self) -> None:
        """WAL cannot be read for a while, or the timeline is not ready."""
        match self.source.number() % 4:
            case 0:
                self.timeline.error = UndefinedFile("requested WAL segment has been removed")
            case 1:
                self.timeline.is_ready = False
            case 2:
                self.timeline.start = START + 2 * PAGE
            case _:
                self.timeline.error, self.timeline.is_ready = None, True
        self.timeline.changed()

    def do_half(self) -> None:
        """The client says nothing more, and still listens."""
        if self.client.transport.is_connected:
            half_closed = getattr(self.client.protocol, "readConnectionLost", lambda: None)
            half_closed()

    def do_terminate(self) -> None:
        """The operator ends the session."""
        if self.client.transport.is_connected:
            end = getattr(self.client.protocol, "terminate", lambda: None)
            end()

    def do_prove(self) -> None:
        """WAL is proven up to there; what was sendable before is so still."""
        before = self.timeline.proven_to
        proven = self.timeline.commit_lsn if before is None else before
        self.timeline.prove(max(proven, START + self.source.number(2) * 8))

    def do_repeat(self) -> None:
        """A message many times over, and what is in it, too."""
        tag, times, length = self.source.take(1), self.source.number(), self.source.number()
        contents = self.source.string() * (1 + length % 64)
        self.client.send(message(tag or b"S", contents) * times)

    # --- what must be so -------------------------------------------------------------------

    def check(self) -> None:
        for client in self.clients:
            transport = client.transport
            assert not transport.written_too_late, f"too late: {transport.written_too_late!r}"
            assert len(transport.waiting) <= MOST_WAITING, len(transport.waiting)
            if client.sent > READ:
                size = held(client.protocol)
                assert size <= MOST_HELD, f"{size} bytes are held for a connection"

    def end(self) -> None:
        """All clients are gone in the end, one way or another."""
        for client in self.clients:
            client.transport.take()
            self.clock.advance(0)
            client.transport.drop()
        self.threads.work_all()
        self.clock.advance(0)
        self.check()
        for client in (*self.clients, *self.gone):
            is_let_in = check_conversation(client.told, may_be_cut=client.transport.was_cut)
            assert not is_let_in or self.is_open or client.has_proven, "it is let in"
        left = self.clock.getDelayedCalls()
        assert not left, [str(call) for call in left]
        assert not self.factory.connections
        assert not self.factory.senders
        assert not self.timeline.observers
        assert list(self.timeline.replicas) == [], "a replica is left"


@cache
def _wal() -> bytes:
    return MemoryTimeline(2 * SEGMENT).wal


@contextmanager
def no_defect_logged() -> Iterator[None]:
    """That nothing is logged which is a defect, or as bad."""
    found: list[str] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        line = formatEvent(event)
        assert "\n" not in line
        if event["log_level"] >= LogLevel.error or "log_failure" in event:
            failure = event.get("log_failure")
            found.append(line + ("" if failure is None else f"\n{failure.getTraceback()}"))

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    assert not found, found[0]


def check_session(data: bytes, authenticator: IAuthenticator) -> None:
    with quick_directory() as name, no_defect_logged():
        served = Server(Input(data), Path(name), authenticator)
        while served.source:
            served.go_on()
            served.check()
        served.end()


# --- What clients once said ----------------------------------------------------------------------


def action(name: str, *rest: bytes) -> bytes:
    return bytes([ACTIONS.index(name)]) + b"".join(rest)


def spoken(requests: list[bytes], *, password: bool) -> bytes:
    """A client's startup packet and messages, as what happens."""
    first, *others = requests
    parts = [action("startup", string(first))]
    parts += [action("answer", b"\0")] * (2 if password else 0)
    for other in others:
        parts.append(action("message", other[:1], string(other[5:])))
        parts.append(action("take", b"\0\0"))
    return b"".join(parts)


def _others() -> list[bytes]:
    """What no client has recorded, each behind a startup."""
    lsn = b"%X/%X" % (START >> 32, START & 0xFFFFFFFF)
    start = action("message", b"Q", string(b"START_REPLICATION " + lsn + b" TIMELINE 1\0"))
    identify = action("message", b"Q", string(b"IDENTIFY_SYSTEM\0"))
    slot = action("message", b"Q", string(b"CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL\0"))
    use = action("message", b"Q", string(b"START_REPLICATION SLOT s " + lsn + b"\0"))
    drop = action("message", b"Q", string(b"DROP_REPLICATION_SLOT s WAIT\0"))
    done = action("message", b"c", b"\0\0")
    status = b"r" + struct.pack(">QQQqB", START + 8, START + 8, 0, 0, 1)
    other, grow = action("client", b"\2"), action("grow", b"\x10\0")
    time, take = action("time", b"\6"), action("take", b"\0\0")
    return [
        identify + start + take + action("message", b"d", string(status)) + time + time + done,
        identify + start + grow + take + action("switch") + done + take,
        identify + start + action("shutdown", b"\4") + action("message", b"d", string(status)),
        identify + start + action("repeat", b"d\x80\0", string(status)) + action("cancel"),
        slot + action("work") + use + take + grow + action("drop") + other,
        slot + action("work") + action("cancel") + drop + action("work") + action("terminate"),
        identify + start + action("trouble", b"\0") + grow + take + action("trouble", b"\3"),
        action("repeat", b"Q\xff\0", string(b"SHOW block_size\0")) + take + action("half"),
        identify + start + other + action("prove", b"\1\0") + action("raw", string(b"\0\0\0\x08")),
        identify + start + action("repeat", b"d\xff\x3f", string(status * 2)) + take + done,
        action("repeat", b"P\xff\x3f", string(b"x" * 60)) + action("message", b"S", b"\0\0"),
        action("message", b"P", string(b"\0SELECT 1\0\0\0")) + action("message", b"S", b"\0\0"),
    ]


def _seeds(*, password: bool) -> list[bytes]:
    found = [
        bytes([flags]) + spoken(requests, password=password)
        for requests in seeds.conversations()
        for flags in (0, 4 + 2)
    ]
    begun = spoken(seeds.conversations()[1][:1], password=password)
    found += [bytes([flags]) + begun + other for other in _others() for flags in (0, 8, 12)]
    encryption = action("startup", string(struct.pack(">I", 80877103)))
    found.append(b"\x34" + encryption + begun + action("client", b"\2") * 3 + begun)
    wrong = begun.removesuffix(action("answer", b"\0")) + action("answer", b"\7")
    found.append(b"\0" + wrong + _others()[0])
    return [each for each in found if len(each) <= SIZE]


SIZE = 2048


def _check_trusted(data: bytes) -> None:
    check_session(data, Trust())


def _check_password(data: bytes) -> None:
    check_session(data, _guard())


TARGETS = tuple(
    Target(
        name,
        check,
        seeds_of,
        (*COMMAND_WORDS, b"user\0postgres\0", b"replication\0true\0", b"SCRAM-SHA-256\0"),
        size=SIZE,
    )
    for name, check, seeds_of in (
        ("session", _check_trusted, lambda: _seeds(password=False)),
        ("session-password", _check_password, lambda: _seeds(password=True)),
    )
)
