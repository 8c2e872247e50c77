"""Proxies that say whose connection they carry, truly or not, and TLS through them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.certificates import Authority, Files
from tests.fakes import SSL_REQUEST, MemoryTimeline, startup
from tests.handshakes import a_client
from tests.looking import ELSEWHERE, EVERYWHERE, LOOPBACK, Looking, needs_elsewhere
from tests.wires import Server, logged
from walproto.access.guard import Guard
from walproto.access.peer import Peer
from walproto.access.tls import ServerTls

# --- Proxies -------------------------------------------------------------------------------------

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version_1(source: str, family: str = "TCP4") -> bytes:
    return f"PROXY {family} {source} 192.0.2.80 4711 5432\r\n".encode()


def version_2(family: int, addresses: bytes, command: int = 1) -> bytes:
    return SIGNATURE + struct.pack(">BBH", 0x20 | command, family, len(addresses)) + addresses


def from_unix(path: bytes = b"/run/a") -> bytes:
    return version_2(0x31, path.ljust(108, b"\0") + b"/run/b".ljust(108, b"\0"))


def from_ipv4(source: str) -> bytes:
    packed = ip_address(source).packed + ip_address("192.0.2.80").packed
    return version_2(0x11, packed + struct.pack(">HH", 4711, 5432))


def from_ipv6(source: str) -> bytes:
    packed = ip_address(source).packed + ip_address("2001:db8::80").packed
    return version_2(0x21, packed + struct.pack(">HH", 4711, 5432))


@pytest.fixture
def proxied() -> Iterator[Looking]:
    with Looking(f"haproxy:{LOOPBACK}") as looking:
        yield looking


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (version_1("198.51.100.7"), "198.51.100.7"),
        (version_1("2001:db8::7", "TCP6"), "2001:db8::7"),
        (from_ipv4("198.51.100.7"), "198.51.100.7"),
        (from_ipv6("2001:db8::7"), "2001:db8::7"),
        (from_ipv6("::ffff:198.51.100.7"), "198.51.100.7"),
    ],
)
def test_whom_a_proxy_on_this_machine_brings_is_not_near(
    proxied: Looking, header: bytes, address: str
) -> None:
    seen = proxied.come(header + b"x")
    assert not seen.at_once.is_near
    assert seen.then
    assert seen.then.address == ip_address(address)
    assert (seen.then.is_near, seen.then.is_local) == (False, False)
    assert seen.then.name.endswith(":4711")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (version_1("127.0.0.1"), Peer("127.0.0.1:4711", ip_address("127.0.0.1"), is_near=True)),
        (from_ipv6("::1"), Peer("[::1]:4711", ip_address("::1"), is_near=True)),
        (from_unix(), Peer("[local]", is_local=True, is_near=True)),
    ],
)
def test_unless_it_is_on_this_machine_itself(
    proxied: Looking, header: bytes, expected: Peer
) -> None:
    assert proxied.come(header + b"x").then == expected


@needs_elsewhere
@pytest.mark.parametrize(
    "header",
    [
        version_1("127.0.0.1"),
        version_1("::1", "TCP6"),
        from_ipv4("127.0.0.1"),
        from_ipv6("::ffff:127.0.0.1"),
        from_ipv6("::1"),
        from_unix(),
        from_unix(b""),
    ],
)
def test_nobody_elsewhere_can_say_that_it_is_here(header: bytes) -> None:
    """It is none of those that a rule for the loopback interface or a Unix socket is for, either:
    a proxy on another machine may well say so of that machine."""
    assert ELSEWHERE is not None
    with Looking(f"haproxy:{EVERYWHERE}") as looking:
        peer = looking.come(header + b"x", host=ELSEWHERE).then
    assert peer
    assert (peer.is_near, peer.is_local, peer.address) == (False, False, None)


@needs_elsewhere
@pytest.mark.parametrize("header", [version_1("127.0.0.1"), from_unix()])
@pytest.mark.parametrize("rules", ["", "local all,replication all trust\nhost replication all "])
def test_and_is_not_let_in_by_such_a_rule(header: bytes, rules: str, tmp_path: Path) -> None:
    assert ELSEWHERE is not None
    hba = None
    if rules:
        hba = tmp_path / "hba"
        hba.write_text(f"{rules}127.0.0.1/8 trust\n")
    endpoint = f"haproxy:{EVERYWHERE}"
    with Server(MemoryTimeline(), endpoint, authenticator=Guard(hba_file=hba)) as server:
        far, near = server.connect(ELSEWHERE), server.connect()
        far.send(header + startup())
        far.until(lambda: far.has_ended)
        assert far.told[0].startswith("FATAL 28000: no pg_hba.conf entry for replication")
        near.send(header + startup())
        near.hear("GREETING")


@pytest.mark.parametrize(
    "header",
    [b"PROXY UNKNOWN 1 2 3 4\r\n", version_2(0, b""), version_2(0, b"", command=0)],
    ids=["version 1", "version 2", "of the proxy itself"],
)
def test_whom_a_proxy_does_not_name_is_nobody(proxied: Looking, header: bytes) -> None:
    """It may well be a stranger, who comes through the proxy."""
    peer = proxied.come(header + b"x").then
    assert peer
    assert (peer.is_near, peer.is_local, peer.address) == (False, False, None)
    assert peer.name.startswith("127.0.0.1:")


def test_who_brings_no_header_is_not_heard() -> None:
    with Server(MemoryTimeline(), f"haproxy:{LOOPBACK}") as server:
        for data in (startup(), b"PROXY TCP4 nobody\r\n", b"\0" * 200, SIGNATURE + b"\x00" * 20):
            wire = server.connect()
            wire.send(data)
            wire.hear("EOF")
        server.until(lambda: not server.places_taken, "no place is taken")


def test_a_header_that_does_not_come_is_waited_for_no_longer_than_a_startup_packet() -> None:
    with Server(MemoryTimeline(), f"haproxy:{LOOPBACK}") as server, logged() as lines:
        wires = [server.connect() for _ in range(3)]
        wires[1].send(b"PROXY TC")
        wires[2].send(version_2(0x11, b"\0" * 12)[:20])
        server.until(lambda: server.places_taken == 3, "three clients are there")
        server.clock.advance(60)
        for wire in wires:
            wire.hear("EOF")
        server.until(lambda: not server.places_taken, "no place is taken")
    assert len(lines) == 3
    assert all(line.endswith(": canceling authentication due to timeout") for line in lines)


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Authority().server().write(tmp_path, "server")


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("in_one", [False, True])
def test_tls_goes_through_a_proxy(files: Files, is_direct: bool, in_one: bool) -> None:
    """Who it is tells the proxy; what the encryption is, the handshake."""
    header = from_ipv4("198.51.100.7")
    users = files.key.with_name("users")
    users.write_text('"postgres" "secret"\n')
    users.chmod(0o600)
    hba = files.key.with_name("hba")
    hba.write_text("hostnossl all,replication all all reject\nhostssl replication all all trust\n")
    guard = Guard(hba_file=hba, auth_file=users, offers_tls=True)
    with Server(
        MemoryTimeline(), f"haproxy:{LOOPBACK}", authenticator=guard, tls=ServerTls(*files)
    ) as server:
        with logged() as lines:
            wire = server.connect()
            if not in_one:
                wire.send(header)
                header = b""
            if is_direct:
                wire.send_raw(header + wire.hello(a_client(protocols=["postgresql"])))
                wire.until(lambda: wire.is_encrypted)
                wire.push()
            else:
                wire.send(header + SSL_REQUEST)
                wire.until(lambda: wire.raw == b"S")
                wire.encrypt(a_client())
            wire.send(startup())
            wire.hear("GREETING")
        (line,) = lines
        assert line.startswith(
            "198.51.100.7:4711: replication connection authorized: user=postgres method=trust"
        )
        assert line.endswith(
            "SSL enabled (protocol=TLSv1.3, cipher=TLS_AES_256_GCM_SHA384, bits=256)"
        )
        wire.close()


def test_it_needs_alpn_if_it_is_direct_there_too(files: Files) -> None:
    guard = Guard(offers_tls=True)
    with Server(
        MemoryTimeline(), f"haproxy:{LOOPBACK}", authenticator=guard, tls=ServerTls(*files)
    ) as server:
        wire = server.connect()
        wire.send_raw(version_1("127.0.0.1") + wire.hello(a_client()))
        wire.until(lambda: wire.is_encrypted)
        wire.push()
        wire.send(startup())
        wire.until(lambda: wire.was_ended_well)
        assert wire.told == [
            "FATAL 08P01: received direct SSL connection request without ALPN protocol "
            "negotiation extension"
        ]
