"""TLS handshakes with our server, on real sockets, that come to nothing, or take their time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority, Files, write
from tests.fakes import (
    START,
    MemoryTimeline,
    query,
    startup,
    wal_of,
)
from tests.handshakes import a_client
from tests.test_session import PASSWORD, Password
from tests.tls_sessions import DIRECT, OURS, TIMEOUT, a_hello, asked, encrypted
from tests.wires import Server, logged
from walproto.access.tls import ServerTls
from walproto.lsn import format_lsn
from walproto.server.protocol import LINGER


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return OURS.server().write(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture
def timeline() -> MemoryTimeline:
    return MemoryTimeline()


@pytest.fixture
def server(files: Files, timeline: MemoryTimeline, tmp_path: Path) -> Iterator[Server]:
    """It listens on the loopback interface and on a Unix socket, and asks for a password."""
    endpoints = ("tcp:0:interface=127.0.0.1", f"unix:{tmp_path}/s")
    options: dict[str, Any] = {"authenticator": Password(), "authentication_timeout": TIMEOUT}
    with Server(timeline, *endpoints, tls=ServerTls(*files), **options) as made:
        yield made
    assert made.places_taken == 0
    assert made.factory.connections == {}
    assert made.clock.getDelayedCalls() == []


# --- Handshakes that come to nothing -------------------------------------------------------------

CLOSED = "the client has closed the connection"


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [(b"GET / HTTP/1.1\r\n\r\n", "http request"), (b"\0" * 50, "wrong version number")],
)
def test_garbage(server: Server, garbage: bytes, reason: str) -> None:
    with logged() as lines:
        wire = asked(server)
        wire.send_raw(garbage)
        wire.until(lambda: wire.has_ended)
        server.until(lambda: not server.places_taken, "its place is free")
    assert [line.partition(": ")[2] for line in lines] == [
        f"could not accept SSL connection: {reason}"
    ]


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("part", [0, 1, 3, 100])
def test_silence(server: Server, part: int, is_direct: bool) -> None:
    """In the middle of its first message, or before it."""
    with logged() as lines:
        wire = server.connect() if is_direct else asked(server)
        wire.send_raw(a_hello()[:part])
        server.until(lambda: server.places_taken, "it is there")
        server.clock.advance(TIMEOUT - 1)
        wire.take()
        assert not wire.has_ended
        server.clock.advance(1)
        wire.until(lambda: wire.has_ended)
        server.until(lambda: not server.places_taken, "its place is free")
    assert [line.partition(": ")[2] for line in lines] == [
        "canceling authentication due to timeout"
    ]
    assert wire.raw == b""


def test_silence_behind_it(server: Server) -> None:
    with logged() as lines:
        wire = encrypted(server)
        server.clock.advance(TIMEOUT)
        wire.until(lambda: wire.was_ended_well)
        wire.end_tls()
        wire.until(lambda: wire.has_ended)
        server.until(lambda: not server.places_taken, "its place is free")
    assert [line.partition(": ")[2] for line in lines] == [
        "canceling authentication due to timeout"
    ]


@pytest.mark.parametrize("part", [0, 1, 3, 100, 10_000])
def test_a_client_that_goes(server: Server, part: int) -> None:
    with logged() as lines:
        wire = asked(server)
        wire.send_raw(wire.hello(a_client())[:part])
        wire.close()
        server.until(lambda: not server.places_taken, "its place is free")
    assert [line.partition(": ")[2] for line in lines] == [
        f"could not accept SSL connection: {CLOSED}"
    ]


def test_a_client_that_does_not_trust_us(server: Server) -> None:
    with logged() as lines:
        wire = asked(server)
        wire.begin_tls(a_client(trusts=Authority("Their CA").pem))
        wire.push()
        wire.until(lambda: wire.alert)
        wire.push()
        wire.until(lambda: wire.has_ended)
        server.until(lambda: not server.places_taken, "its place is free")
    (line,) = lines
    assert line.endswith("could not accept SSL connection: tlsv1 alert unknown ca")


def test_a_client_whose_certificate_is_not_trusted(files: Files, tmp_path: Path) -> None:
    ca = write(tmp_path / "ca.crt", OURS.pem)
    stranger = Authority("Their CA").client("alice").write(tmp_path, "alice")
    with Server(MemoryTimeline(), tls=ServerTls(*files, ca)) as server:
        with logged() as lines:
            wire = asked(server)
            # With TLS 1.3 it learns only afterwards that it is refused.
            wire.encrypt(a_client(shows=stranger))
            wire.send(startup())
            wire.until(lambda: wire.has_ended)
            server.until(lambda: not server.places_taken, "its place is free")
        assert "alert" in wire.alert
    (line,) = lines
    assert ": could not accept SSL connection: certificate verify failed: " in line


def test_a_shutdown_meanwhile(server: Server) -> None:
    wire, begun, direct = server.connect(), asked(server), server.connect()
    begun.send_raw(begun.hello(a_client())[:100])
    direct.send_raw(direct.hello(a_client(protocols=DIRECT))[:100])
    finished = encrypted(server)
    server.until(lambda: server.places_taken == 4, "all are there")
    with logged() as lines:
        server.factory.shut_down(10)
        finished.until(lambda: finished.was_ended_well)
        finished.end_tls()
        for one in (wire, finished):
            one.hear("FATAL 57P03: the database system is shutting down", "EOF")
        server.clock.advance(LINGER)
        for one in (begun, direct):
            one.until(partial(getattr, one, "has_ended"))
    assert [line for line in lines if "disconnecting" in line] == []


# --- Bytes, one at a time ------------------------------------------------------------------------


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_however_the_clients_bytes_come(files: Files, version: str, is_direct: bool) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    timeline = MemoryTimeline()
    with Server(timeline, tls=tls, authenticator=Password()) as server:
        wire = server.connect() if is_direct else asked(server)
        context = a_client(version, trusts=OURS.pem, protocols=DIRECT if is_direct else None)
        wire.encrypt(context, size=1)
        wire.send(startup(), 1)
        wire.send(PASSWORD, 1)
        wire.hear("R 3", "GREETING")
        for part in (query("IDENTIFY_SYSTEM"), query(f"START_REPLICATION {format_lsn(START)}")):
            wire.send(part, 1)
        wire.until(lambda: sum(map(len, wal_of(wire.received).values())) == len(timeline.wal))
        assert b"".join(wal_of(wire.received).values()) == timeline.wal
