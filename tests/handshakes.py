"""TLS handshakes in memory: our server, as Twisted runs it, and a client of the ssl module."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

from OpenSSL import SSL
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.certificates import Files
from walproto.access.peer import Tls
from walproto.access.tls import ServerTls


@implementer(IHandshakeListener)
class Session(Protocol):
    """What our server's own protocol is told."""

    def __init__(self) -> None:
        self.is_encrypted = False
        self.received = b""
        self.lost: Failure | None = None

    def handshakeCompleted(self) -> None:
        self.is_encrypted = True

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = reason


class Server:
    """Our end of a connection; its bytes are handed over by hand."""

    def __init__(self, tls: ServerTls) -> None:
        self.tls = tls
        self.clock = Clock()
        self.session = Session()
        factory = Factory.forProtocol(lambda: self.session)
        layer: Any = TLSMemoryBIOFactory(tls.context_factory, False, factory, self.clock)
        self.protocol = layer.buildProtocol(None)
        self.transport = StringTransport()
        self.protocol.makeConnection(self.transport)
        self.connection: SSL.Connection = self.protocol.getHandle()

    def exchange(self, data: bytes) -> bytes:
        """What the server answers ``data`` with."""
        if data and self.session.lost is None:
            self.protocol.dataReceived(data)
        self.clock.advance(0)
        if self.transport.disconnecting:
            self.lose()
        answer: bytes = self.transport.value()
        self.transport.clear()
        return answer

    def lose(self) -> None:
        if self.session.lost is None:
            self.protocol.connectionLost(Failure(ConnectionDone()))

    @property
    def refusal(self) -> str | None:
        """Why the handshake has failed, as the operator is told; None if it has not."""
        return None if self.session.lost is None else self.tls.reason_of(self.session.lost)

    @property
    def described(self) -> Tls:
        assert self.session.is_encrypted, self.refusal
        return self.tls.describe(self.connection)


@dataclass
class Handshake:
    """Both ends, when the handshake is over; ``alert`` is what the client is refused with."""

    server: Server
    client: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    alert: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._exchange()

    def _exchange(self) -> bytes:
        """Hands bytes over until there are none; returns what the client was sent."""
        received = b""
        while True:
            try:
                if not self.alert:
                    self.client.do_handshake()
                    received += self.client.read()
            except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                pass
            except ssl.SSLError as error:
                self.alert = (error.reason or str(error)).lower().replace("_", " ")
            sent = self.outgoing.read()
            answer = self.server.exchange(sent)
            self.incoming.write(answer)
            if not sent and not answer:
                return received

    def ask(self, question: bytes, answer: bytes) -> tuple[bytes, bytes]:
        """What the server gets of the client's question, and the client of the answer."""
        self.server.session.received = b""
        self.client.write(question)
        self._exchange()
        transport = self.server.session.transport
        assert transport is not None
        transport.write(answer)
        return self.server.session.received, self._exchange()

    @property
    def served(self) -> bytes | None:
        """The server's certificate, as the client has got it (DER)."""
        return self.client.getpeercert(binary_form=True)


def shake(
    tls: ServerTls, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Handshake:
    """A client connects; ``session`` is one that it would resume."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost", session=session)
    return Handshake(Server(tls), client, incoming, outgoing)


def a_client(
    version: str = "TLSv1.3",
    *,
    trusts: bytes | None = None,
    shows: Files | None = None,
    protocols: list[str] | None = None,
    ciphers: str | None = None,
) -> ssl.SSLContext:
    """A client that speaks this version alone; one that ``trusts`` an authority verifies the
    server's certificate and its name (``verify-full``)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if trusts is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=trusts.decode())
    if shows is not None:
        context.load_cert_chain(*shows)
    if protocols is not None:
        context.set_alpn_protocols(protocols)
    if ciphers is not None:
        context.set_ciphers(ciphers)
    return context
