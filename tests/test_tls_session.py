"""Sessions over TLS, on real sockets: how one begins, where it is not offered, and what may not
come before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Files
from tests.fakes import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    TERMINATE,
    MemoryTimeline,
    message,
    query,
    startup,
)
from tests.handshakes import a_client
from tests.test_session import PASSWORD, Password
from tests.tls_sessions import (
    ALERT,
    DIRECT,
    MAN_IN_THE_MIDDLE,
    OURS,
    TIMEOUT,
    a_hello,
    asked,
    encrypted,
    ended,
    greeted,
    records,
)
from tests.wires import Server, logged
from walproto.access.tls import ServerTls


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


# --- How it begins -------------------------------------------------------------------------------


def test_a_client_that_asks_is_encrypted(server: Server) -> None:
    with logged() as lines:
        wire = greeted(server)
        assert set(records(wire.raw)) == {22, 20, 23}
        wire.send(query("IDENTIFY_SYSTEM"))
        wire.until(lambda: wire.told[-1] == "Z I" or wire.told[-2:-1] == ["C IDENTIFY_SYSTEM"])
        wire.send(TERMINATE)
        wire.until(lambda: wire.was_ended_well)
        wire.end_tls()
        wire.until(lambda: wire.has_ended)
    (line,) = lines
    assert line.startswith("127.0.0.1:")
    assert line.endswith(
        ": replication connection authorized: user=postgres method=password SSL enabled "
        "(protocol=TLSv1.3, cipher=TLS_AES_256_GCM_SHA384, bits=256)"
    )


@pytest.mark.parametrize("before", [b"", GSSENC_REQUEST])
def test_gss_encryption_may_be_asked_for_before(server: Server, before: bytes) -> None:
    wire = server.connect()
    wire.send(before)
    wire.until(lambda: wire.raw == b"N" * bool(before))
    wire.send(SSL_REQUEST)
    wire.until(lambda: wire.raw[-1:] == b"S")
    wire.encrypt(a_client(trusts=OURS.pem))
    wire.send(startup())
    wire.hear("R 3")


def test_or_within(server: Server) -> None:
    wire = encrypted(server)
    wire.send(GSSENC_REQUEST)
    wire.until(lambda: wire.received == b"N")
    wire.send(startup())
    wire.until(lambda: len(wire.received) == 1 + 9)
    assert wire.told == ["N", "R 3"]


@pytest.mark.parametrize("again", ["SSLRequest", "ClientHello"])
def test_tls_within_tls_is_refused(server: Server, again: str) -> None:
    wire = encrypted(server)
    wire.send(SSL_REQUEST if again == "SSLRequest" else a_hello())
    assert ended(server, wire) == [
        "FATAL 0A000: unsupported frontend protocol 1234.5679: server supports 3.0 to 3.2"
        if again == "SSLRequest"
        else "FATAL 08P01: invalid length of startup packet",
        "EOF",
    ]


def test_a_client_may_begin_by_itself(server: Server) -> None:
    wire = server.connect().encrypt(a_client(trusts=OURS.pem, protocols=DIRECT))
    assert wire.tls
    assert wire.tls.selected_alpn_protocol() == "postgresql"
    wire.send(startup())
    wire.until(lambda: wire.told == ["R 3"])
    wire.send(PASSWORD)
    wire.hear("R 3", "GREETING")


def test_but_not_without_saying_for_which_protocol(server: Server) -> None:
    with logged() as lines:
        wire = server.connect().encrypt(a_client(trusts=OURS.pem))
        wire.send(startup() + PASSWORD)
        told = ended(server, wire)
    refusal = (
        "FATAL 08P01: received direct SSL connection request without ALPN protocol negotiation "
        "extension"
    )
    assert told == [refusal, "EOF"]
    assert [line.partition(": ")[2] for line in lines] == [refusal]


def test_nor_behind_a_request_that_was_refused(server: Server) -> None:
    wire = server.connect()
    wire.send(GSSENC_REQUEST)
    wire.until(lambda: wire.raw == b"N")
    wire.send_raw(wire.hello(a_client(protocols=DIRECT)))
    wire.until(lambda: wire.has_ended)
    assert wire.raw[:2] == b"NE"


@pytest.mark.parametrize("protocols", [["h2"], ["postgresql2", "http/1.1"]])
def test_nor_for_another(server: Server, protocols: list[str]) -> None:
    wire = server.connect()
    wire.send_raw(wire.hello(a_client(protocols=protocols)))
    wire.until(lambda: wire.alert and wire.has_ended)
    assert "no application protocol" in wire.alert


# --- Where it is not offered ---------------------------------------------------------------------


def test_on_a_unix_socket_it_is_not_offered(server: Server) -> None:
    wire = server.connect(number=1)
    wire.send(SSL_REQUEST)
    wire.until(lambda: wire.raw == b"N")
    wire.send(startup())
    wire.hear("N", "R 3")
    another = server.connect(number=1)
    another.send_raw(another.hello(a_client(protocols=DIRECT)))
    another.until(lambda: another.has_ended)
    assert b"invalid length of startup packet" in another.raw


def test_nor_by_a_server_without_a_certificate(timeline: MemoryTimeline) -> None:
    with Server(timeline) as server, logged() as lines:
        wire = server.connect()
        wire.send(SSL_REQUEST)
        wire.until(lambda: wire.raw == b"N")
        wire.send(startup())
        wire.until(lambda: wire.told == ["N", "GREETING"])
        another = server.connect()
        another.send_raw(another.hello(a_client(protocols=DIRECT)))
        another.until(lambda: another.has_ended)
        assert b"invalid length of startup packet" in another.raw
    assert lines[1].endswith(
        ": FATAL 08P01: invalid length of startup packet (it is the beginning of TLS, which is not "
        "offered)"
    )


# --- What comes in clear before it ---------------------------------------------------------------


@pytest.mark.parametrize(
    "behind", [b"x", b"\x16", startup(), startup()[:3], SSL_REQUEST, PASSWORD, a_hello()]
)
@pytest.mark.parametrize(
    ("request_", "name"), [(SSL_REQUEST, "SSL"), (GSSENC_REQUEST, "GSSAPI encryption")]
)
def test_what_comes_with_the_request_is_refused_in_clear(
    server: Server, behind: bytes, request_: bytes, name: str
) -> None:
    """That there is to be encryption, is not said first."""
    wire = server.connect()
    wire.send(request_ + behind)
    wire.hear(*["N"] * (request_ == GSSENC_REQUEST), MAN_IN_THE_MIDDLE.format(name), "EOF")


@pytest.mark.parametrize("piece", [1, 1 << 16])
@pytest.mark.parametrize(
    "injected",
    [startup(), startup() + PASSWORD, startup()[:10], SSL_REQUEST, message(b"p", b"secret\0")],
)
def test_what_comes_before_the_handshake_breaks_it(
    server: Server, injected: bytes, piece: int
) -> None:
    """A client has asked, somebody in the middle says something in clear before it begins: the
    handshake fails, and none of that is ever dealt with."""
    with logged() as lines:
        wire = asked(server)
        wire.send_raw(injected, piece)
        wire.send_raw(wire.hello(a_client(trusts=OURS.pem)))
        wire.until(lambda: wire.has_ended)
    assert wire.received == b""
    assert not wire.is_encrypted
    assert set(records(wire.raw)) <= {ALERT}
    (line,) = lines
    assert ": could not accept SSL connection: " in line


def test_of_what_comes_in_clear_nothing_is_left_for_the_session(
    server: Server, timeline: MemoryTimeline
) -> None:
    """Behind the handshake it begins anew, with a startup packet."""
    wire = server.connect()
    wire.send(GSSENC_REQUEST)
    wire.until(lambda: wire.raw == b"N")
    wire.raw = b""
    for byte in SSL_REQUEST:
        wire.send(bytes([byte]))
    wire.until(lambda: wire.raw == b"S")
    wire.raw = b""
    (protocol,) = server.factory.connections.values()
    assert len(protocol._session.framing) == 0
    wire.encrypt(a_client(trusts=OURS.pem))
    assert len(protocol._session.framing) == 0
    wire.send(PASSWORD)
    assert ended(server, wire) == ["FATAL 08P01: invalid length of startup packet", "EOF"]
