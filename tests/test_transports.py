"""Who is at the other end of a connection, by its socket; which connections can be encrypted."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, UNIXAddress

from tests.certificates import Authority, Files
from tests.fakes import SSL_REQUEST, MemoryTimeline, MemoryTransport
from tests.handshakes import a_client
from tests.looking import (
    ELSEWHERE,
    EVERYWHERE,
    EVERYWHERE_6,
    LOOPBACK,
    LOOPBACK_6,
    Looking,
    is_offered,
    needs_elsewhere,
)
from tests.wires import Server
from walproto.access.peer import Peer
from walproto.access.tls import ServerTls
from walproto.server.transports import bare_socket, parse_address, peer_of


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6 here")


# --- Sockets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["127.0.0.1", "127.3.2.1"])
def test_the_loopback_interface_is_near(source: str) -> None:
    with Looking(LOOPBACK) as looking:
        seen = looking.come(source=source)
        port = seen.transport.getPeer().port
    assert seen.at_once == seen.then == Peer(f"{source}:{port}", ip_address(source), is_near=True)
    assert (seen.can_be_encrypted, seen.has_bare_socket) == (True, True)


@needs_ipv6
def test_so_is_that_of_ipv6() -> None:
    with Looking(LOOPBACK_6) as looking:
        seen = looking.come(host="::1")
    assert seen.then
    assert (seen.then.address, seen.then.is_near) == (ip_address("::1"), True)
    assert seen.then.host == "::1"


@needs_ipv6
def test_an_ipv4_address_through_a_socket_of_ipv6_is_an_ipv4_address() -> None:
    with Looking(EVERYWHERE_6) as looking:
        seen = looking.come()
        if ELSEWHERE is not None:
            far = looking.come(host=ELSEWHERE)
    assert seen.then
    assert (seen.then.address, seen.then.is_near) == (ip_address("127.0.0.1"), True)
    assert seen.then.host == "127.0.0.1"
    if ELSEWHERE is not None:
        assert far.then
        assert (far.then.address, far.then.is_near) == (ip_address(ELSEWHERE), False)


def test_a_unix_socket_is_local_and_has_no_address(tmp_path: Path) -> None:
    with Looking(f"unix:{tmp_path}/s") as looking:
        seen = looking.come()
    assert seen.at_once == seen.then == Peer("[local]", is_local=True, is_near=True)
    assert (seen.can_be_encrypted, seen.has_bare_socket) == (False, True)


@needs_elsewhere
def test_another_address_of_this_machine_is_not_near() -> None:
    """What it connects through may be anybody's, such as a container's."""
    assert ELSEWHERE is not None
    with Looking(EVERYWHERE) as looking:
        seen = looking.come(host=ELSEWHERE)
        port = seen.transport.getPeer().port
        assert looking.come().at_once.is_near
    assert seen.then == Peer(f"{ELSEWHERE}:{port}", ip_address(ELSEWHERE))


def test_addresses() -> None:
    assert parse_address("192.0.2.1") == ip_address("192.0.2.1")
    assert parse_address("::ffff:192.0.2.1") == ip_address("192.0.2.1")
    assert parse_address("2001:db8::1") == ip_address("2001:db8::1")
    assert parse_address("fe80::1%eth0") == ip_address("fe80::1%eth0")
    for text in ("", "localhost", "192.0.2", "192.0.2.1:5", "/run/socket"):
        assert parse_address(text) is None


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Authority().server().write(tmp_path, "server")


def test_a_connection_is_encrypted_but_once(files: Files) -> None:
    tls = ServerTls(*files)
    with Server(MemoryTimeline(), tls=tls) as server:
        wire = server.connect()
        wire.send(SSL_REQUEST)
        wire.until(lambda: wire.raw == b"S")
        (protocol,) = server.factory.connections.values()
        transport = protocol.transport
        assert not is_offered(transport)
        assert bare_socket(transport) is None
        wire.encrypt(a_client())
        assert not is_offered(transport)
        assert bare_socket(transport) is None
        assert peer_of(transport).is_near


class Nothing:
    """A transport that knows nothing of a socket."""

    def __init__(self, address: Any) -> None:
        self.address = address

    def getPeer(self) -> Any:
        return self.address


def test_what_has_no_socket_is_not_near() -> None:
    here = IPv4Address("TCP", "127.0.0.1", 5)
    assert peer_of(Nothing(here)) == Peer("127.0.0.1:5")
    assert peer_of(Nothing(UNIXAddress("/s"))) == Peer("[local]")
    there = IPv4Address("TCP", "192.0.2.1", 5)
    assert peer_of(Nothing(there)) == Peer("192.0.2.1:5", ip_address("192.0.2.1"))
    assert peer_of(Nothing("a pipe")) == Peer("a pipe")
    transport: Any = MemoryTransport(None)  # type: ignore[arg-type]
    assert bare_socket(transport) is None
    assert not is_offered(transport)
