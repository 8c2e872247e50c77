"""A connection for which there is no place: it is told so, and closed; nothing of it is read."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import Protocol
from twisted.logger import Logger

from walproto.errors import ReportedError
from walproto.server.results import error_response
from walproto.server.transports import peer_of


class Refusal(Protocol):
    """Tells a client ``error``."""

    _log = Logger()
    transport: Any

    def __init__(self, error: ReportedError) -> None:
        self._error = error

    def connectionMade(self) -> None:
        error = self._error
        self._log.warn(
            "{peer}: {severity} {sqlstate}: {text} ({log})",
            peer=peer_of(self.transport),
            severity=error.severity,
            sqlstate=error.sqlstate,
            text=error.message,
            log=error.log,
        )
        self.transport.write(error_response(error))
        if ISSLTransport.providedBy(self.transport):
            self.transport.abortConnection()  # it would wait for a handshake first
        else:
            self.transport.loseConnection()
