"""WAL over TLS, on real sockets: how it comes, waits, and ends."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Files
from tests.fakes import (
    COPY_DONE,
    SEGMENT,
    START,
    TERMINATE,
    MemoryTimeline,
    cancel_request,
    message,
    messages_in,
    query,
    startup,
    wal_of,
)
from tests.test_session import Password
from tests.tls_sessions import OURS, TIMEOUT, encrypted, ended, greeted
from tests.wires import Server, Wire
from walproto.access.guard import Guard
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


# --- Streaming -----------------------------------------------------------------------------------

SIZE = 16 << 20
"""Bytes of WAL: more than the system holds for a client that does not read."""


def test_wal_is_sent_as_it_is_and_waits_for_a_client_that_does_not_read(files: Files) -> None:
    timeline = MemoryTimeline(SIZE)
    with Server(timeline, tls=ServerTls(*files), wal_sender_timeout=0) as server:
        wire = encrypted(server)
        wire.send(startup())
        wire.until(lambda: wire.told == ["GREETING"])
        gc.collect()
        tracemalloc.start()
        wire.send(query(f"START_REPLICATION {format_lsn(START)}"))
        idle = 0
        while idle < 20:  # until nothing happens any more
            reads = len(timeline.reads)
            server.turn(0.01)
            idle = 0 if len(timeline.reads) > reads else idle + 1
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 0 < timeline.reads[-1][1] - START < SIZE
        assert held < SEGMENT
        got = _all_wal(wire, SIZE)
        assert got == timeline.wal
        wire.send(COPY_DONE)
        wire.send(TERMINATE)
        wire.until(lambda: wire.was_ended_well)


def _all_wal(wire: Wire, size: int) -> bytes:
    """Reads until there are so many bytes of WAL, and some overhead."""
    wire.until(lambda: len(wire.received) >= size and _whole(wire.received, size))
    return b"".join(wal_of(wire.received).values())


def _whole(data: bytes, size: int) -> bool:
    # The assertion within is for what ends in the middle of a message.
    try:
        return sum(len(contents) - 25 for tag, contents in messages_in(data) if tag == b"d") >= size
    except AssertionError:
        return False


def test_a_client_that_does_not_read_gives_up_its_place_when_it_goes(files: Files) -> None:
    timeline = MemoryTimeline(SIZE)
    with Server(timeline, tls=ServerTls(*files)) as server:
        wire = encrypted(server)
        wire.send(startup() + query(f"START_REPLICATION {format_lsn(START)}"))
        server.until(lambda: len(timeline.replicas), "it streams")
        wire.close()
        server.until(lambda: not server.factory.connections, "it is gone")
        assert list(timeline.replicas) == []
        assert timeline.observers == set()


# --- How it ends ---------------------------------------------------------------------------------


def test_a_cancel_request_may_come_over_tls(server: Server) -> None:
    streaming = greeted(server)
    keys = [contents for tag, contents in messages_in(streaming.received) if tag == b"K"]
    ((pid, key),) = [(int.from_bytes(one[:4], "big"), one[4:]) for one in keys]
    streaming.send(query(f"START_REPLICATION {format_lsn(START)}"))
    streaming.until(lambda: "W" in streaming.told)
    wire = encrypted(server)
    wire.send(cancel_request(pid, key))
    wire.until(lambda: wire.was_ended_well)
    wire.end_tls()
    wire.hear("EOF")
    streaming.until(
        lambda: (
            streaming.told[-2:] == ["ERROR 57014: canceling statement due to user request", "Z I"]
        )
    )


@pytest.mark.parametrize("is_greeted", [False, True])
def test_behind_terminate_it_ends_at_once(server: Server, is_greeted: bool) -> None:
    if is_greeted:
        wire = greeted(server)
    else:
        wire = encrypted(server)
        wire.send(startup())
        wire.until(lambda: wire.told == ["R 3"])
    wire.send(TERMINATE)
    assert ended(server, wire)[-1] == "EOF"


def test_so_it_does_for_a_client_that_just_goes(server: Server) -> None:
    for last_word in (b"", TERMINATE):
        wire = greeted(server)
        if last_word:
            wire.send(last_word)
        wire.close()
        server.until(lambda: not server.factory.connections, "it is over")
        assert server.clock.seconds() == 0


def test_so_it_does_for_one_that_ends_tls_first(server: Server) -> None:
    wire = greeted(server)
    wire.end_tls()
    wire.until(lambda: wire.has_ended)
    server.until(lambda: not server.factory.connections, "it is over")


LONG = "x" * 5000


@pytest.mark.parametrize("more", [b"", b"something more", query("IDENTIFY_SYSTEM") * 1000])
def test_an_error_arrives_whole_before_the_end(server: Server, more: bytes) -> None:
    """Also if it is long, and if the client goes on talking."""
    wire = encrypted(server)
    wire.send(startup(replication=LONG) + more)
    told = ended(server, wire)
    assert told == [
        f'FATAL 22023: invalid value for parameter "replication": "{LONG}" | H: Valid values are: '
        '"false", 0, "true", 1, "database".',
        "EOF",
    ]


def test_a_refusal_does_too(files: Files) -> None:
    guard = Guard(offers_tls=True)
    with Server(
        MemoryTimeline(), "tcp:0:interface=0.0.0.0", tls=ServerTls(*files), authenticator=guard
    ) as server:
        wire = encrypted(server)
        wire.send(startup(replication="false"))
        # Let in, for it is near; but what it wants, there is not.
        told = ended(server, wire)
        assert told[0] == "R 0"
        assert told[1].startswith("FATAL 0A000: this server accepts only physical replication")


def test_a_password_that_is_wrong(server: Server) -> None:
    wire = encrypted(server)
    wire.send(startup() + message(b"p", b"wrong\0"))
    assert ended(server, wire) == ["R 3", "FATAL 28000: no", "EOF"]


def test_a_client_that_does_not_answer_the_end_is_cut_off(server: Server) -> None:
    """It has heard all of it; but that it says so is not waited for longer than a while."""
    wire = encrypted(server)
    wire.send(b"nonsense")
    wire.until(lambda: wire.was_ended_well)
    assert wire.told == ["FATAL 08P01: invalid length of startup packet"]
    assert server.places_taken == 1
    server.clock.advance(LINGER)
    wire.until(lambda: wire.has_ended)
    server.until(lambda: not server.places_taken, "its place is free")
