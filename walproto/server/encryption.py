"""TLS on one connection: begun when a client asks for it, or by the client itself.

PostgreSQL documentation: "SSL Session Encryption" in chapter "Message Flow";
``be_tls_open_server`` and ``ProcessSSLStartup``.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import ISSLTransport
from twisted.python.failure import Failure

from walproto.access.peer import Tls
from walproto.server.transports import ServerTls
from walproto.wire.startup import ALPN


class Encryption:
    """It is offered on ``transport`` if there is a ``tls`` to offer."""

    def __init__(self, transport: Any, tls: ServerTls | None) -> None:
        self._transport = transport
        self._tls = tls
        self._is_direct = False
        self.is_under_way = False
        """Whether there is a handshake that is not over."""

    @property
    def is_offered(self) -> bool:
        """Only over TCP, as in PostgreSQL, and only once."""
        transport = self._transport
        is_able = hasattr(transport, "startTLS") and not isinstance(
            transport.getPeer(), UNIXAddress
        )
        return self._tls is not None and is_able and not ISSLTransport.providedBy(transport)

    def begin(self, received: bytes) -> None:
        """Be the server of a handshake.  A client that began it by itself has sent ``received``."""
        assert self._tls is not None
        self._is_direct = bool(received)
        self.is_under_way = True
        self._transport.startTLS(self._tls.context_factory)
        if received:
            self._transport.protocol.dataReceived(received)

    def finish(self) -> Tls | None:
        """The handshake is over: what it has come to, None if that will not do."""
        assert self._tls is not None
        self.is_under_way = False
        connection = self._transport.getHandle()
        if self._is_direct and self._tls.alpn(connection) != ALPN:
            return None
        return self._tls.describe(connection)

    def why_not(self, failure: Failure) -> str:
        """Why the handshake has failed that was under way when the connection was lost."""
        assert self._tls is not None
        return self._tls.reason_of(failure) or "the client has closed the connection"
