"""What the tests of conversations have in common: WAL, a transport and a client, all in memory.

A test reads as a transcript.  What a client sends is built here by hand, and what it receives is
taken apart here by hand (:func:`told`), without the declarations of walproto.wire: they are what is
being tested.  Time is a :class:`twisted.internet.task.Clock`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IConsumer, ITransport
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from walproto.access.authentication import Trust
from walproto.access.grant import Grant
from walproto.errors import CannotConnectNow, InternalError, UndefinedFile
from walproto.lsn import format_lsn, segment_name
from walproto.server.configuration import Configuration
from walproto.server.factory import WalSenderFactory
from walproto.server.protocol import WalSenderProtocol
from walproto.server.results import Wait
from walproto.server.service import OneTimeline, Service
from walproto.timeline.history import Ancestor, History
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replicas
from walproto.wal.pages import FORMATS, Identity
from walproto.wire.startup import Startup

SEGMENT = 1 << 20
PAGE = 8192
START = 3 * SEGMENT
SYSTEM = 7711479082946818339


def wal_bytes(size: int) -> bytes:
    """WAL that differs everywhere; what it says nobody looks at here."""
    return random.Random(size).randbytes(size)


class Rounds(Clock):
    """A reactor that goes round when it is told to; what is called in a round and calls for more,
    has it in the next one."""

    def go_round(self) -> None:
        due, self.calls = self.calls, []
        for call in due:
            call.called = 1
            call.func(*call.args, **call.kw)


@implementer(ITimeline)
class MemoryTimeline:
    """A timeline over bytes, which may be sent up to ``commit_lsn``."""

    def __init__(self, size: int = 4 * PAGE + 120, *, start: int = START, major: int = 18) -> None:
        wal_format = next(known for known in FORMATS.values() if known.major == major)
        self.identity = Identity(SYSTEM, SEGMENT, wal_format)
        self.history = History(1)
        self.histories: dict[int, bytes] = {}
        self.replicas = Replicas()
        self.start = start
        self.wal = wal_bytes(size)
        self.commit_lsn = start + size
        self.is_ready = True
        self.proven_to: int | None = None
        self.error: Exception | None = None
        self.observers: set[Callable[[], None]] = set()
        self.reads: list[tuple[int, int]] = []

    # --- for tests to call -----------------------------------------------------------------

    def commit(self, lsn: int) -> None:
        """WAL up to ``lsn`` may be sent now."""
        self.commit_lsn = lsn
        self.changed()

    def prove(self, lsn: int) -> None:
        self.proven_to = lsn
        self.changed()

    def switch(self, lsn: int) -> None:
        """A new timeline goes on at ``lsn``."""
        old = self.history
        self.history = History(old.tli + 1, (*old.ancestors, Ancestor(old.tli, lsn, old.tli + 1)))
        lines = [f"{one.tli}\t{format_lsn(one.switch_lsn)}\tno" for one in self.history.ancestors]
        self.histories[self.history.tli] = "\n".join(lines).encode()
        self.changed()

    def changed(self) -> None:
        for observer in list(self.observers):
            observer()

    def bytes_of(self, start: int, end: int) -> bytes:
        return self.wal[start - self.start : end - self.start]

    # --- ITimeline -------------------------------------------------------------------------

    def require_ready(self) -> None:
        if not self.is_ready:
            raise CannotConnectNow("the database system is starting up", fatal=True)

    def end_of(self, tli: int) -> int:
        if tli == self.history.tli:
            return self.commit_lsn
        ancestor = self.history.ancestor(tli)
        if ancestor is None:
            raise InternalError(f"requested timeline {tli} is not in this server's history")
        return ancestor.switch_lsn

    def sendable_to(self, tli: int, lsn: int) -> int:
        if lsn < self.start:
            name = segment_name(tli, lsn // SEGMENT, SEGMENT)
            raise UndefinedFile(f"requested WAL segment {name} has already been removed")
        end = self.end_of(tli)
        return end if self.proven_to is None else min(end, self.proven_to)

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        if self.error is not None:
            raise self.error
        end = lsn + len(buffer)
        assert lsn < end <= self.sendable_to(tli, lsn)
        assert lsn // SEGMENT == (end - 1) // SEGMENT
        self.reads.append((lsn, end))
        buffer[:] = self.bytes_of(lsn, end)

    def read_history(self, tli: int) -> bytes:
        try:
            return self.histories[tli]
        except KeyError:
            raise UndefinedFile(f'could not open file "pg_wal/{tli:08X}.history": gone') from None

    def add_observer(self, observer: Callable[[], None]) -> None:
        self.observers.add(observer)

    def remove_observer(self, observer: Callable[[], None]) -> None:
        self.observers.discard(observer)


class SlowService(Service):
    """It is open when a test says so."""

    opened: Deferred[None]

    def open(self) -> Wait:
        try:
            yield self.opened
        finally:
            self.opened.cancel()


class SlowTimeline(OneTimeline):
    """Serves everybody a timeline that takes a while to open; ``opened`` is fired for the one that
    came last."""

    opened: Deferred[None]

    def require_ready(self) -> None:
        """That is known only when it is open."""

    def serve(self, startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        service = SlowService(self._timeline, self._piece, startup, configuration)
        service.opened = self.opened = Deferred()
        return service


@implementer(ITransport, IConsumer)
class MemoryTransport:
    """Between a protocol and a peer in the same process.

    What is written arrives at once; with ``capacity`` it waits until the peer takes it, and, as
    in :class:`twisted.internet.abstract.FileDescriptor`, the producer is paused when more than
    that many bytes wait and resumed when none does.
    """

    def __init__(self, clock: Clock, capacity: int | None = None) -> None:
        self.clock = clock
        self.capacity = capacity
        self.protocol: Any = None
        self.producer: Any = None
        self.producer_paused = False
        self.waiting = bytearray()
        self.arrived = bytearray()
        self.unread: list[bytes] = []
        self.is_reading = True
        self.is_connected = True
        self.disconnecting = False
        self.written_too_late = b""

    # --- the peer's side -------------------------------------------------------------------

    def deliver(self, data: bytes) -> None:
        """Bytes from the peer."""
        if not self.is_connected:
            return
        if self.is_reading:
            self.protocol.dataReceived(data)
        else:
            self.unread.append(data)

    def take(self, size: int | None = None) -> None:
        """The peer takes so many of the bytes that wait for it, or all."""
        size = len(self.waiting) if size is None else size
        self.arrived += self.waiting[:size]
        del self.waiting[:size]
        self._empty()

    def drop(self) -> None:
        """The peer is gone."""
        self._lost(ConnectionDone())

    # --- ITransport, IConsumer -------------------------------------------------------------

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", 40000)

    getHost = getPeer

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        if not self.is_connected or self.disconnecting:
            self.written_too_late += data
        elif self.capacity is None:
            self.arrived += data
        else:
            self.waiting += data
            if self.producer is not None and len(self.waiting) > self.capacity:
                self.producer_paused = True
                self.producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert self.producer is None
        assert streaming
        self.producer = producer
        if not self.is_connected:
            producer.stopProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        self._close_if_empty()

    def loseConnection(self) -> None:
        self.disconnecting = True
        self._close_if_empty()

    def abortConnection(self) -> None:
        self.clock.callLater(0, self._lost, ConnectionAborted())

    def pauseProducing(self) -> None:
        self.is_reading = False

    def resumeProducing(self) -> None:
        self.is_reading = True
        self.clock.callLater(0, self._read_on)

    # --- within ----------------------------------------------------------------------------

    def _read_on(self) -> None:
        while self.unread and self.is_reading and self.is_connected:
            self.protocol.dataReceived(self.unread.pop(0))

    def _empty(self) -> None:
        if not self.waiting and self.producer is not None and self.producer_paused:
            self.producer_paused = False
            self.producer.resumeProducing()
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if self.disconnecting and not self.waiting and self.producer is None:
            self.clock.callLater(0, self._lost, ConnectionDone())

    def _lost(self, reason: Exception) -> None:
        if self.is_connected:
            self.is_connected = False
            if self.producer is not None:
                self.producer.stopProducing()
                self.producer = None
            self.protocol.connectionLost(Failure(reason))


class Client:
    """A client of a :class:`WalSenderFactory`, which sends what the test says and hears all."""

    def __init__(
        self, factory: WalSenderFactory, clock: Clock, capacity: int | None = None
    ) -> None:
        self.clock = clock
        self.transport = MemoryTransport(clock, capacity)
        self.protocol: WalSenderProtocol = factory.buildProtocol(None)
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)
        self._told = 0
        self.wal: dict[int, bytes] = {}

    def send(self, *data: bytes) -> list[str]:
        """Send it at once, let everything that follows happen, and say what came of it."""
        self.transport.deliver(b"".join(data))
        return self.hear()

    def hear(self) -> list[str]:
        """What has arrived since the last time, as a transcript; ``EOF`` if that is the end."""
        self.clock.advance(0)
        data = bytes(self.transport.arrived)[self._told :]
        self._told += len(data)
        self.wal.update(wal_of(data))
        return told(data) + ([] if self.transport.is_connected else ["EOF"])

    def take(self, size: int | None = None) -> list[str]:
        """Take what waits on a transport with a capacity, and what follows from taking it."""
        self.clock.advance(0)
        self.transport.take(size)
        return self.hear() if size is None else []

    def wait(self, seconds: float) -> list[str]:
        self.clock.advance(seconds)
        return self.hear()

    def start_up(self, **parameters: str) -> list[str]:
        return self.send(startup(**parameters))

    def stream(self, lsn: int = START, tli: int = 1, **parameters: str) -> list[str]:
        """Start up, identify the system, start replication."""
        self.start_up(**parameters)
        self.send(query("IDENTIFY_SYSTEM"))
        return self.send(query(f"START_REPLICATION {format_lsn(lsn)} TIMELINE {tli}"))

    @property
    def key(self) -> tuple[int, bytes]:
        """The process ID and the secret key that the client was told."""
        contents = next(
            contents for tag, contents in messages_in(bytes(self.transport.arrived)) if tag == b"K"
        )
        return int.from_bytes(contents[:4], "big"), contents[4:]


# --- What clients send ---------------------------------------------------------------------------

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSSENC_REQUEST = bytes.fromhex("0000000804d21630")


def message(tag: bytes, contents: bytes = b"") -> bytes:
    return tag + struct.pack(">I", len(contents) + 4) + contents


def startup_packet(version: int, contents: bytes) -> bytes:
    return struct.pack(">II", len(contents) + 8, version) + contents


def startup(version: int = 3 << 16, /, **parameters: str) -> bytes:
    """A StartupMessage; of user postgres and for replication, unless the parameters differ."""
    pairs = {"user": "postgres", "replication": "true"} | parameters
    strings = [string.encode() for pair in pairs.items() for string in pair]
    return startup_packet(version, b"".join(string + b"\0" for string in strings) + b"\0")


def cancel_request(pid: int, key: bytes) -> bytes:
    return startup_packet(1234 << 16 | 5678, struct.pack(">I", pid) + key)


def query(text: str) -> bytes:
    return message(b"Q", text.encode("utf-8", "surrogateescape") + b"\0")


def status(write: int, flush: int = 0, apply: int = 0, *, reply: int = 0, time: int = 0) -> bytes:
    return message(b"d", struct.pack(">cQQQqB", b"r", write, flush, apply, time, reply))


def feedback(xmin: int, epoch: int, catalog_xmin: int = 0, catalog_epoch: int = 0) -> bytes:
    return message(b"d", struct.pack(">cqIIII", b"h", 0, xmin, epoch, catalog_xmin, catalog_epoch))


COPY_DONE = message(b"c")
SYNC = message(b"S")
TERMINATE = message(b"X")

# --- What clients are told -----------------------------------------------------------------------


def messages_in(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The messages of a server, each its type byte and its contents; the answers to requests for
    encryption, which are only a byte, may come first."""
    while data[:1] == b"N" and data[1:4] != b"\0\0\0":
        yield b"N", b""
        data = data[1:]
    while data:
        size = int.from_bytes(data[1:5], "big") + 1
        assert 5 <= size <= len(data), data[:100]
        yield data[:1], data[5:size]
        data = data[size:]


def told(data: bytes) -> list[str]:
    """A transcript of what a server said; greetings are shortened to one line."""
    lines = [_line(tag, contents) for tag, contents in messages_in(data)]
    if "R 0" in lines and "Z I" in lines:
        begin, end = lines.index("R 0"), lines.index("Z I")
        greeting = lines[begin + 1 : end]
        if all(line[0] in "SK" for line in greeting):
            lines[begin : end + 1] = ["GREETING"]
    return lines


def errors(data: bytes) -> list[dict[str, str]]:
    """The fields of each error."""
    return [_fields(contents) for tag, contents in messages_in(data) if tag == b"E"]


def parameter_statuses(data: bytes) -> dict[str, str]:
    pairs = [contents.split(b"\0") for tag, contents in messages_in(data) if tag == b"S"]
    return {name.decode(): value.decode() for name, value, _ in pairs}


def wal_of(data: bytes) -> dict[int, bytes]:
    """The WAL that a server sent, by the LSN it was said to begin at."""
    return {
        int.from_bytes(contents[1:9], "big"): contents[25:]
        for tag, contents in messages_in(data)
        if tag == b"d" and contents[:1] == b"w"
    }


def _fields(contents: bytes) -> dict[str, str]:
    assert contents.endswith(b"\0\0")
    return {
        field[:1].decode(): field[1:].decode("utf-8", "surrogateescape")
        for field in contents[:-2].split(b"\0")
    }


def _line(tag: bytes, contents: bytes) -> str:
    letter = tag.decode()
    text = contents.decode("utf-8", "surrogateescape")
    match letter:
        case "R":
            return f"R {int.from_bytes(contents[:4], 'big')}"
        case "S":
            name, value, empty = text.split("\0")
            assert not empty
            return f"S {name}={value}"
        case "K":
            return f"K {len(contents) - 4}"
        case "E":
            fields = _fields(contents)
            assert fields["S"] == fields["V"]
            return " | ".join(
                [f"{fields['S']} {fields['C']}: {fields['M']}"]
                + [f"{key}: {fields[key]}" for key in "DH" if key in fields]
            )
        case "T":
            return "T " + " ".join(_columns(contents))
        case "D":
            return "D " + " ".join(_values(contents))
        case "C":
            assert text.endswith("\0")
            return "C " + text[:-1]
        case "d" if text[0] == "w":
            start, end, _ = struct.unpack_from(">QQq", contents, 1)
            return f"w {format_lsn(start)}+{len(contents) - 25} of {format_lsn(end)}"
        case "d" if text[0] == "k":
            end, _, reply = struct.unpack(">QqB", contents[1:])
            return f"k {format_lsn(end)} reply={reply}"
        case "v":
            version, count = struct.unpack_from(">II", contents)
            options = text[8:].split("\0")
            assert len(options) == count + 1
            return " ".join([f"v {version >> 16}.{version & 0xFFFF}", *options[:-1]])
        case "W":
            return "W" if contents == b"\0\0\0" else f"W {contents.hex()}"
        case _:
            return letter + (" " + text if text else "")


def _columns(contents: bytes) -> Iterator[str]:
    count, position = int.from_bytes(contents[:2], "big"), 2
    for _ in range(count):
        end = contents.index(b"\0", position)
        table, attribute, oid, size, modifier, code = struct.unpack_from(
            ">IHIhiH", contents, end + 1
        )
        assert (table, attribute, code) == (0, 0, 0)
        suffix = "" if modifier == -1 else f"!{modifier}"
        yield f"{contents[position:end].decode()}:{oid}({size}){suffix}"
        position = end + 19
    assert position == len(contents)


def _values(contents: bytes) -> Iterator[str]:
    count, position = int.from_bytes(contents[:2], "big"), 2
    for _ in range(count):
        (size,) = struct.unpack_from(">i", contents, position)
        position += 4
        if size < 0:
            yield "NULL"
            continue
        yield contents[position : position + size].decode("utf-8", "surrogateescape")
        position += size
    assert position == len(contents)


# --- Putting them together -----------------------------------------------------------------------


def server(timeline: Any, clock: Clock, **options: Any) -> WalSenderFactory:
    """A WAL sender; of the major that the timeline's WAL is, unless the options say another.  It
    trusts everybody, unless they say whom."""
    options.setdefault("authenticator", Trust())
    factory = WalSenderFactory(timeline, clock, **options)
    factory.doStart()
    return factory
