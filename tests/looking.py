"""A server that only looks who comes, on the real reactor."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol

from tests.secured import address_elsewhere
from tests.wires import Listening, Wire
from walproto.access.peer import Peer
from walproto.server.encryption import Encryption
from walproto.server.transports import bare_socket, peer_of

LOOPBACK = "tcp:0:interface=127.0.0.1"
LOOPBACK_6 = r"tcp:0:interface=\:\:1"
EVERYWHERE = "tcp:0:interface=0.0.0.0"
EVERYWHERE_6 = r"tcp:0:interface=\:\:"
ELSEWHERE = address_elsewhere()
needs_elsewhere = pytest.mark.skipif(ELSEWHERE is None, reason="there is only the loopback here")


def is_offered(transport: Any) -> bool:
    """Whether a connection can be encrypted, where there is something to do it with."""
    tls: Any = object()
    return Encryption(transport, tls).is_offered


class Seen(Protocol):
    """Looks who is there, when the connection is made and when something has come."""

    transport: Any

    def __init__(self, seen: list[Seen]) -> None:
        self.seen = seen
        self.at_once: Peer
        self.then: Peer | None = None
        self.can_be_encrypted = False
        self.has_bare_socket = False

    def connectionMade(self) -> None:
        self.at_once = peer_of(self.transport)
        self.seen.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.then = peer_of(self.transport)
        self.can_be_encrypted = is_offered(self.transport)
        self.has_bare_socket = bare_socket(self.transport) is not None


class Looking(Listening):
    """Listens, and looks who comes."""

    def __init__(self, *endpoints: str) -> None:
        self.seen: list[Seen] = []
        factory = Factory.forProtocol(lambda: Seen(self.seen))
        factory.noisy = False
        super().__init__(factory, *endpoints)

    def come(self, data: bytes = b"x", host: str = "127.0.0.1", source: str = "") -> Seen:
        """What is seen of a client that sends something."""
        wire = self.connect(host, source=source)
        wire.send(data)
        wire.until(lambda: self.seen and self.seen[-1].then)
        return self.seen[-1]


def port_of(wire: Wire) -> int:
    port: int = wire.socket.getsockname()[1]
    return port
