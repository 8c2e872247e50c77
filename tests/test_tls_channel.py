"""WAL past Twisted's layer of TLS, on real sockets: every byte in order, whatever else there is to
say meanwhile, and no more than the client takes."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Files
from tests.fakes import (
    COPY_DONE,
    PAGE,
    SSL_REQUEST,
    START,
    TERMINATE,
    MemoryTimeline,
    query,
    startup,
    told,
    wal_of,
)
from tests.handshakes import a_client
from tests.looking import LOOPBACK
from tests.sealed import Sealed
from tests.test_proxies import version_1
from tests.tls_sessions import OURS, asked
from tests.wires import Server, Wire
from walproto.access.tls import ServerTls
from walproto.errors import UndefinedFile
from walproto.lsn import format_lsn
from walproto.server.channels import PIECE_SIZE, BareChannel, PlainChannel, TlsChannel, channel_to

SIZE = 12 * PIECE_SIZE + 88
"""Bytes of WAL: more than the small buffers hold for a client that does not read."""
CHUNKS = (1, 4, 5, 16406, 1000, 60000, 3, 16401, 22)
"""How many bytes are read at a time: parts of records' headers, records, and more."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return OURS.server().write(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture
def timeline() -> MemoryTimeline:
    return MemoryTimeline(SIZE)


@pytest.fixture
def server(files: Files, timeline: MemoryTimeline) -> Iterator[Server]:
    with Server(timeline, tls=ServerTls(*files), wal_sender_timeout=0) as made:
        yield made
    assert made.clock.getDelayedCalls() == []


class Client:
    """One with small buffers in between, which begins to stream."""

    def __init__(self, server: Server, timeline: MemoryTimeline, wire: Wire) -> None:
        self.server = server
        self.timeline = timeline
        self.wire = wire
        self.most_held = PIECE_SIZE * 101 // 100
        """A bound for what the server holds back: a piece, as TLS has it."""
        self.transport = _transport(server)
        self.transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        assert isinstance(channel_to(self.transport), TlsChannel)

    def read(self, is_over: Callable[[], Any], times: int = 300) -> None:
        """Read, so often in odd chunks."""
        for size in islice(cycle(CHUNKS), times):
            self.server.turn()
            assert self.held < self.most_held
            self.wire.take(size)
        self.wire.until(is_over)

    @property
    def held(self) -> int:
        """Bytes that the server holds back."""
        held: int = len(self.transport.dataBuffer) + self.transport._tempDataLen
        return held

    @property
    def told(self) -> list[str]:
        """All that it was told, but for the WAL."""
        return [line for line in told(self.messages) if line[0] != "w"]

    def has(self, size: int) -> bool:
        """Whether so much WAL has come, all of it in order."""
        return len(self.wal) >= size

    @property
    def messages(self) -> bytes:
        return _whole(self.wire.received)

    @property
    def wal(self) -> bytes:
        return _in_order(self.messages)

    def stall(self) -> int:
        """Let the server send what it can while nothing is read; how much WAL it has read."""
        idle = 0
        while idle < 20:
            reads = len(self.timeline.reads)
            self.server.turn(0.01)
            idle = 0 if len(self.timeline.reads) > reads else idle + 1
        return self.timeline.reads[-1][1] - START


def _whole(data: bytes) -> bytes:
    """The messages that have come to their end."""
    end = 0
    while len(data) >= end + 5:
        size = int.from_bytes(data[end + 1 : end + 5], "big") + 1
        if len(data) < end + size:
            break
        end += size
    return data[:end]


def _in_order(messages: bytes) -> bytes:
    """The WAL in there; it has to begin at the start, and to have no holes."""
    lsn, parts = START, []
    for start, part in wal_of(messages).items():
        assert start == lsn
        lsn += len(part)
        parts.append(part)
    return b"".join(parts)


def _transport(server: Server) -> Any:
    (protocol,) = server.factory.connections.values()
    return protocol.transport


STREAM = startup() + query(f"START_REPLICATION {format_lsn(START)}")


@pytest.fixture
def client(server: Server, timeline: MemoryTimeline) -> Client:
    return Client(server, timeline, asked(server).encrypt(a_client(trusts=OURS.pem)))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_client_that_reads_in_odd_chunks(
    files: Files, timeline: MemoryTimeline, version: str
) -> None:
    tls = ServerTls(*files, min_protocol_version=version)
    with Server(timeline, tls=tls, wal_sender_timeout=0) as server:
        client = Client(server, timeline, asked(server).encrypt(a_client(version)))
        client.wire.send(STREAM)
        stalled_at = client.stall()
        assert stalled_at < SIZE
        timeline.changed()
        assert client.stall() == stalled_at
        client.read(lambda: client.has(SIZE))
        assert client.wal == timeline.wal
        assert told(client.messages)[:3] == [
            "GREETING",
            "W",
            f"w {format_lsn(START)}+{PIECE_SIZE} of {format_lsn(START + SIZE)}",
        ]


def test_what_comes_bit_by_bit_is_sent_at_once(client: Client, timeline: MemoryTimeline) -> None:
    """Without another turn of the reactor; Twisted's layer waits for one."""
    timeline.commit_lsn = START
    client.wire.send(STREAM)
    client.wire.until(lambda: "W" in client.wire.told)
    client.server.until(lambda: not client.transport.producerPaused, "nothing is held up")
    for number in range(1, 40):
        timeline.commit(START + number * 1000)
        client.wire.socket.setblocking(True)
        client.wire.take()
        assert client.wal == timeline.bytes_of(START, START + number * 1000)


def test_a_follower_that_does_not_read(client: Client, timeline: MemoryTimeline) -> None:
    """It is waited for from the first byte on that the socket does not take."""
    timeline.commit_lsn = START
    client.wire.send(STREAM)
    client.wire.until(lambda: "W" in client.told)
    client.server.until(lambda: not client.transport.producerPaused, "nothing is held up")
    end = START
    while not client.held and end < START + SIZE - 4 * PAGE:
        end += PAGE
        timeline.commit(end)
    timeline.commit(end + 3 * PAGE)
    assert timeline.reads[-1][1] == end
    assert 0 < client.held < PAGE + 100
    client.wire.until(lambda: client.has(end + 3 * PAGE - START))
    assert client.wal == timeline.bytes_of(START, end + 3 * PAGE)


# --- What else is said ---------------------------------------------------------------------------


def test_another_command_in_the_middle(client: Client, timeline: MemoryTimeline) -> None:
    client.wire.send(STREAM)
    assert client.stall() < SIZE
    client.wire.send(COPY_DONE + query("IDENTIFY_SYSTEM"))
    client.read(lambda: client.told[-2:] == ["C IDENTIFY_SYSTEM", "Z I"])
    assert client.told[:5] == ["GREETING", "W", "c", "C START_STREAMING", "C START_REPLICATION"]
    got = len(client.wal)
    assert 0 < got < SIZE
    client.wire.send(query(f"START_REPLICATION {format_lsn(START + got)}"))
    client.read(lambda: client.has(SIZE))
    assert client.wal == timeline.wal
    client.wire.send(COPY_DONE + TERMINATE)
    client.wire.until(lambda: client.wire.was_ended_well)


def test_an_error_in_the_stream(client: Client, timeline: MemoryTimeline) -> None:
    client.wire.send(STREAM)
    sent = client.stall()
    assert sent < SIZE
    timeline.error = UndefinedFile("x" * 50000)
    client.read(lambda: client.told[-1:] == ["Z I"])
    assert client.told[-2:] == [f"ERROR 58P01: {'x' * 50000}", "Z I"]
    assert client.wal == timeline.bytes_of(START, START + sent)
    client.wire.send(TERMINATE)
    client.wire.until(lambda: client.wire.was_ended_well)


@pytest.fixture
def sealed(server: Server, timeline: MemoryTimeline, tmp_path: Path) -> tuple[Client, Sealed]:
    context = a_client(trusts=OURS.pem)
    sealed = Sealed(context, tmp_path)
    return Client(server, timeline, asked(server).encrypt(context)), sealed


def test_keys_are_renewed_in_the_middle(
    sealed: tuple[Client, Sealed], timeline: MemoryTimeline
) -> None:
    """Both when the client is waited for and when it is not."""
    client, says = sealed
    timeline.commit_lsn = START + SIZE // 2
    client.wire.send_raw(says.records(STREAM))
    client.stall()
    for _ in range(6):
        client.wire.send_raw(says.key_update())
        client.read(lambda: True, times=7)
    client.read(lambda: client.has(SIZE // 2))
    for size in (*range(SIZE // 2, SIZE, 20 * PAGE), SIZE):
        client.wire.send_raw(says.key_update())
        timeline.commit(START + size)
    client.read(lambda: client.has(SIZE))
    client.wire.send_raw(says.records(COPY_DONE) + says.key_update() + says.records(TERMINATE))
    client.read(lambda: client.wire.was_ended_well)
    assert client.wal == timeline.wal


def test_while_half_a_message_has_come_there_is_nothing_to_send(
    sealed: tuple[Client, Sealed], timeline: MemoryTimeline
) -> None:
    """OpenSSL has to hear the other half first."""
    client, says = sealed
    timeline.commit_lsn = START + PAGE
    client.wire.send_raw(says.records(STREAM))
    client.wire.until(lambda: client.has(PAGE))
    update = says.key_update(cut=4)
    half = 5 + 4 + 1 + 16
    client.wire.send_raw(update[:half])
    client.stall()
    timeline.commit(START + SIZE)
    assert client.stall() == PAGE + PIECE_SIZE
    client.wire.take()
    assert client.has(PAGE)
    assert not client.has(PAGE + 1)
    client.wire.send_raw(update[half:])
    client.most_held *= 2  # Twisted resumes its producer as soon as it has encrypted that
    client.read(lambda: client.has(SIZE))
    assert client.wal == timeline.wal


# --- How it ends ---------------------------------------------------------------------------------


def test_a_client_vanishes_that_took_all(client: Client, timeline: MemoryTimeline) -> None:
    """The socket finds out, in the middle of a burst."""
    timeline.commit_lsn = START + PAGE
    client.wire.send(STREAM)
    client.wire.until(lambda: client.has(PAGE))
    client.wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
    client.wire.close()
    timeline.commit(START + SIZE)
    client.server.until(lambda: not client.server.factory.connections, "it is gone")
    assert timeline.observers == set()


def test_a_slow_client_ends_tls_and_reads_on(client: Client, timeline: MemoryTimeline) -> None:
    """It gets what was encrypted before; for the rest, no WAL is read any more."""
    client.wire.send(STREAM)
    sent = client.stall()
    assert sent < SIZE
    assert client.wire.tls is not None
    with contextlib.suppress(ssl.SSLWantReadError):
        client.wire.tls.unwrap()
    client.wire.push()
    client.read(lambda: client.wire.has_ended)
    client.server.until(lambda: not client.server.factory.connections, "it is over")
    assert timeline.reads[-1][1] - START <= sent + PIECE_SIZE
    assert timeline.observers == set()


# --- Which way it is -----------------------------------------------------------------------------


def test_in_clear_it_is_the_socket(timeline: MemoryTimeline) -> None:
    with Server(timeline) as server:
        wire = server.connect()
        wire.send(startup())
        wire.hear("GREETING")
        assert isinstance(channel_to(_transport(server)), BareChannel)


def test_through_a_proxy_it_is_the_transport(files: Files, timeline: MemoryTimeline) -> None:
    with Server(timeline, f"haproxy:{LOOPBACK}", tls=ServerTls(*files)) as server:
        wire = server.connect()
        wire.send(version_1("198.51.100.7") + SSL_REQUEST)
        wire.until(lambda: wire.raw == b"S")
        wire.raw = b""
        wire.encrypt(a_client(trusts=OURS.pem)).send(STREAM)
        wire.until(lambda: len(_in_order(_whole(wire.received))) >= SIZE)
        assert _in_order(wire.received) == timeline.wal
        assert isinstance(channel_to(_transport(server)), PlainChannel)


def test_with_a_twisted_of_other_names_too(client: Client) -> None:
    layer: Any = client.transport.protocol
    held = layer.__dict__.pop("_appSendBuffer")
    assert isinstance(channel_to(client.transport), PlainChannel)
    layer._appSendBuffer = held
