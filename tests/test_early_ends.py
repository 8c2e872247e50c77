"""Connections that end before it is known who the client is: each is one line in the log."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import capturedLogs, formatEvent

from tests.certificates import Files
from tests.fakes import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    MemoryTimeline,
    cancel_request,
    message,
    messages_in,
    query,
    startup,
)
from tests.postgres import HOST, installations, workspace
from tests.test_session import PASSWORD, Password
from tests.tls_sessions import OURS, TIMEOUT, encrypted, ended
from tests.wires import Server, Wire
from walproto.access.tls import ServerTls

GONE = "info {}: has gone before it was authenticated"
SHUTTING_DOWN = "FATAL 57P03: the database system is shutting down"
ENCRYPTED = " SSL enabled (protocol=TLSv1.3, cipher=TLS_AES_256_GCM_SHA384, bits=256)"
OTHERS_KEY = b"none"


@contextmanager
def listening(*endpoints: str, timeline: Any = None, **options: Any) -> Iterator[Server]:
    """A server that asks for a password; nothing may be left of its clients in the end."""
    options = {"authenticator": Password(), "authentication_timeout": TIMEOUT} | options
    with Server(timeline or MemoryTimeline(), *endpoints, **options) as made:
        yield made
    assert made.places_taken == 0
    assert made.factory.connections == {}
    assert made.clock.getDelayedCalls() == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """It listens on the loopback interface and on a Unix socket, without TLS."""
    with listening("tcp:0:interface=127.0.0.1", f"unix:{tmp_path}/s") as made:
        yield made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return OURS.server().write(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture
def tls_server(files: Files) -> Iterator[Server]:
    with listening(tls=ServerTls(*files)) as made:
        yield made


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile: the level and the line."""
    lines: list[str] = []
    with capturedLogs() as events:
        yield lines
    lines += [f"{event['log_level'].name} {formatEvent(event)}" for event in events]


def name_of(wire: Wire) -> str:
    """The client, as the log has it."""
    address = wire.socket.getsockname()
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "[local]"


def wait_for_the_end(server: Server) -> None:
    server.until(lambda: not server.factory.connections, "the server knows that it is over")


# --- A client that goes --------------------------------------------------------------------------

ASKED = message(b"R", b"\0\0\0\3")
BEGINNINGS: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "two bytes": (b"\0\0", b""),
    "SSLRequest": (SSL_REQUEST, b"N"),
    "GSSENCRequest": (GSSENC_REQUEST, b"N"),
    "a part of StartupMessage": (startup()[:-1], b""),
    "StartupMessage": (startup(), ASKED),
    "a part of the password": (startup() + PASSWORD[:-1], ASKED),
}
"""What it has said, and how it was answered."""


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


ENDS: dict[str, Callable[[socket.socket], None]] = {
    "closed": socket.socket.close,
    "shut down": lambda client: client.shutdown(socket.SHUT_WR),
    "reset": reset,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("endpoint", [0, 1], ids=["TCP", "Unix"])
def test_a_client_that_goes(server: Server, endpoint: int, beginning: str, end: str) -> None:
    said, answer = BEGINNINGS[beginning]
    with logged() as lines:
        wire = server.connect(number=endpoint)
        name = name_of(wire)
        wire.send(said)
        wire.until(lambda: wire.raw == answer and server.places_taken)
        ENDS[end](wire.socket)
        wait_for_the_end(server)
    assert lines == [GONE.format(name)]


def test_one_that_goes_when_it_is_encrypted(tls_server: Server) -> None:
    """Without an end of TLS, too."""
    with logged() as lines:
        wire = encrypted(tls_server)
        name = name_of(wire)
        wire.send(GSSENC_REQUEST)
        wire.until(lambda: wire.received == b"N")
        wire.close()
        wait_for_the_end(tls_server)
    assert lines == [GONE.format(name)]


def test_one_that_goes_when_it_is_known(server: Server) -> None:
    with logged() as lines:
        wire = server.connect()
        name = name_of(wire)
        wire.send(startup() + PASSWORD)
        wire.hear("R 3", "GREETING")
        wire.close()
        wait_for_the_end(server)
    assert lines == [
        f"info {name}: replication connection authorized: user=postgres method=password"
    ]


# --- A server that sends it away -----------------------------------------------------------------


def test_while_there_is_no_wal() -> None:
    """Clients come again and again then; what they are told is no cause for alarm."""
    timeline = MemoryTimeline()
    timeline.is_ready = False
    with listening(timeline=timeline) as server, logged() as lines:
        wire = server.connect()
        name = name_of(wire)
        wire.send(startup())
        wire.hear("FATAL 57P03: the database system is starting up", "EOF")
        wire.close()
        wait_for_the_end(server)
    assert lines == [f"info {name}: FATAL 57P03: the database system is starting up"]


@pytest.mark.parametrize("endpoint", [0, 1], ids=["TCP", "Unix"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_when_it_shuts_down(server: Server, endpoint: int, beginning: str) -> None:
    said, answer = BEGINNINGS[beginning]
    with logged() as lines:
        wire = server.connect(number=endpoint)
        name = name_of(wire)
        wire.send(said)
        wire.until(lambda: wire.raw == answer and server.places_taken)
        server.factory.shut_down(10)
        wire.until(lambda: wire.has_ended)
        wire.close()
        wait_for_the_end(server)
    assert wire.told[-2:] == [SHUTTING_DOWN, "EOF"]
    assert lines == [f"info {name}: {SHUTTING_DOWN}"]


# --- CancelRequest -------------------------------------------------------------------------------


def greeted(server: Server) -> tuple[int, bytes]:
    """The process ID and the key of a client that has been let in."""
    wire = server.connect()
    wire.send(startup() + PASSWORD)
    wire.hear("R 3", "GREETING")
    contents = next(contents for tag, contents in messages_in(wire.received) if tag == b"K")
    return int.from_bytes(contents[:4], "big"), contents[4:]


def cancelled(server: Server, pid: int, key: bytes) -> list[str]:
    """What is logged of a CancelRequest, whose client is told nothing."""
    before = len(server.factory.connections)
    with logged() as lines:
        wire = server.connect()
        name = name_of(wire)
        wire.send(cancel_request(pid, key))
        wire.until(lambda: wire.has_ended)
        wire.close()
        server.until(lambda: len(server.factory.connections) == before, "it is gone")
    assert wire.raw == b""
    return [line.replace(name, "CLIENT") for line in lines]


def test_requests_to_cancel(server: Server) -> None:
    pid, key = greeted(server)
    wrong = bytes(byte ^ 1 for byte in key)
    assert cancelled(server, pid, key) == []
    assert cancelled(server, pid, wrong) == [
        f"info CLIENT: wrong key in cancel request for process {pid}"
    ]
    assert cancelled(server, pid, key[:-1]) == cancelled(server, pid, wrong)
    assert cancelled(server, 12345, key) == [
        "info CLIENT: PID 12345 in cancel request did not match any process"
    ]


def test_there_is_no_key_before_authentication(server: Server) -> None:
    wire = server.connect()
    wire.send(startup())
    wire.hear("R 3")
    (pid,) = server.factory.connections
    for key in (b"", bytes(4)):
        assert cancelled(server, pid, key) == [
            f"info CLIENT: wrong key in cancel request for process {pid}"
        ]
    assert wire.told == ["R 3"]


def test_postgresql_says_the_same_of_them() -> None:
    with workspace() as space:
        cluster = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1).start()
        for pid in (0x7FFFFFFF, cluster.pid):
            with socket.create_connection((HOST, cluster.port)) as client:
                client.sendall(cancel_request(pid, OTHERS_KEY))
                assert client.recv(1) == b""
            cluster.expect_log(f"PID {pid} in cancel request did not match any process")
        with socket.create_connection((HOST, cluster.port)) as client:
            client.sendall(startup())
            received = b""
            while not (key := re.search(rb"K\0\0\0[\x0c-\xff](....)", received, re.DOTALL)):
                data = client.recv(1 << 16)
                assert data
                received += data
            pid = int.from_bytes(key[1], "big")
            with socket.create_connection((HOST, cluster.port)) as another:
                another.sendall(cancel_request(pid, OTHERS_KEY))
                assert another.recv(1) == b""
            cluster.expect_log(f"wrong key in cancel request for process {pid}")


# --- Refusals, in clear or not -------------------------------------------------------------------

REFUSALS = {
    "a wrong password": (startup() + message(b"p", b"wrong\0"), "FATAL 28000: no"),
    "no password": (
        startup() + query("SELECT 1"),
        "FATAL 08P01: expected password response, got message type 81",
    ),
    "another version": (
        startup(2 << 16),
        "FATAL 0A000: unsupported frontend protocol 2.0: server supports 3.0 to 3.2",
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_the_log_tells_whether_it_came_over_tls(tls_server: Server, why: str) -> None:
    said, told = REFUSALS[why]
    with logged() as lines:
        wire = tls_server.connect()
        name = name_of(wire)
        wire.send(said)
        wire.until(lambda: wire.told[-2:] == [told, "EOF"])
        wait_for_the_end(tls_server)
    assert lines == [f"warn {name}: {told}"]
    with logged() as lines:
        wire = encrypted(tls_server)
        name = name_of(wire)
        wire.send(said)
        assert ended(tls_server, wire)[-2:] == [told, "EOF"]
    assert lines == [f"warn {name}: {told}{ENCRYPTED}"]


def test_of_one_that_was_let_in_it_was_told_before(tls_server: Server) -> None:
    with logged() as lines:
        wire = encrypted(tls_server)
        name = name_of(wire)
        wire.send(startup() + PASSWORD + query("FETCH"))
        wire.until(lambda: wire.told[-1:] == ["Z I"])
        wire.close()
        wait_for_the_end(tls_server)
    authorized, refused = lines
    assert authorized == (
        f"info {name}: replication connection authorized: user=postgres method=password{ENCRYPTED}"
    )
    assert refused == f"warn {name}: {wire.told[2]}"
