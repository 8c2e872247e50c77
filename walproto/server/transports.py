"""What a transport tells of the connection it carries."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Protocol

from twisted.internet import tcp, unix
from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import ISSLTransport, ITCPTransport
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure

from walproto.access.peer import Peer, Tls
from walproto.server.lent_socket import LentSocket

UNIX_SEND_BUFFER = 1 << 20
"""Bytes that may be under way to a client on a Unix socket; the system may allow less."""


class ServerTls(Protocol):
    """The server's side of TLS: :class:`walproto.access.tls.ServerTls`, which needs an OpenSSL."""

    @property
    def context_factory(self) -> Any:
        """What a transport's ``startTLS`` takes."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know of the files that are in force, a line each."""

    def prepare(self) -> Callable[[], None]:
        """Read the files anew; what is returned puts them in force, for the connections to come.
        Raises ValueError that says what is wrong."""

    def describe(self, connection: Any) -> Tls:
        """What the handshake on this OpenSSL connection has come to."""

    def alpn(self, connection: Any) -> bytes:
        """The application protocol that was agreed upon, empty if none was."""

    def reason_of(self, failure: Failure) -> str:
        """Why a handshake has failed, in a few words; empty if the connection was just lost."""


def tune(transport: Any) -> None:
    """Have the kernel send small messages at once and notice that a client is gone (TCP), or take
    as much of a large one (a Unix socket, which by default takes not even one)."""
    if ITCPTransport.providedBy(transport):
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)
    elif isinstance(transport, unix.Server):
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)


def peer_of(transport: Any) -> Peer:
    """Who is at the other end; without TLS, for that comes later.

    Behind a proxy that tells whose connection it carries (an ``haproxy:`` endpoint), this is known
    when its first bytes have come.  Who it says is on this machine is so only if the proxy is: one
    elsewhere means its own machine, or is a stranger who lies.  Such a client has no address, nor
    has one of whom a proxy does not say who it is.
    """
    address, is_near = transport.getPeer(), _is_near(transport)
    if isinstance(address, UNIXAddress):
        return Peer("[local]", is_local=is_near, is_near=is_near)
    ip = parse_address(getattr(address, "host", ""))
    if ip is None:
        return Peer(f"{address.host}:{address.port}" if hasattr(address, "host") else str(address))
    name = f"{ip}:{address.port}" if ip.version == 4 else f"[{ip}]:{address.port}"
    if (ip.is_loopback and not is_near) or _is_unnamed(transport):
        return Peer(name)
    return Peer(name, ip, is_near=ip.is_loopback)


def parse_address(host: str) -> IPv4Address | IPv6Address | None:
    """An IP address, None if it is none; an IPv4 address, if it is one within an IPv6 one."""
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def bare_socket(transport: Any) -> socket.socket | None:
    """The transport's socket, if bytes sent on it go to the peer as they are."""
    if isinstance(transport, LentSocket):
        return transport.socket
    if (
        not isinstance(transport, tcp.Connection)
        or ISSLTransport.providedBy(transport)
        or transport.TLS
    ):
        return None
    handle: socket.socket = transport.getHandle()
    return handle


def _is_unnamed(transport: Any) -> bool:
    """Whether a proxy brings a client, and does not say whom: the address is its own."""
    is_proxied = isinstance(transport, HAProxyProtocolWrapper)
    return is_proxied and transport.getPeer() == transport.transport.getPeer()


def _is_near(transport: Any) -> bool:
    """Whether the socket itself ends on this machine, whatever a proxy in between says."""
    while isinstance(transport, ProtocolWrapper):
        wrapped: Any = transport.transport
        if transport.getPeer() == wrapped.getPeer():
            return False  # it is for others, and does not say for whom
        transport = wrapped
    with suppress(AttributeError, OSError):
        # Once TLS has begun, the handle is something else.
        bare = getattr(transport, "socket", None) or transport.getHandle()
        if bare.family == socket.AF_UNIX:
            return True
        ip = parse_address(bare.getpeername()[0])
        return ip is not None and ip.is_loopback
    return False
