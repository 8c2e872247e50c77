"""The sending half of a connection whose other half is in another process.

What is read from the socket, and its end, is that process's affair; so nothing is read here, and
neither is the connection shut down or reset when the socket is closed: it stays open there.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.interfaces import IPushProducer, IReactorFDSet, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IWriteDescriptor)
class LentSocket:
    """What a :class:`~walproto.server.producer.WalProducer` needs of a transport, over ``socket``,
    which is not blocking.  Its producer is resumed when all is gone that the socket had not
    taken, if it is paused then."""

    def __init__(self, reactor: IReactorFDSet, socket: socket.socket) -> None:
        self.socket = socket
        self.producerPaused = False
        self._reactor = reactor
        self.producer: IPushProducer | None = None
        self._unsent = bytearray()
        self._is_broken = False

    def registerProducer(self, producer: IPushProducer, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        if not self._is_broken:
            self._unsent += data
            self._reactor.addWriter(self)

    def close(self) -> bytes:
        """Send nothing more, and close the socket here; what it has not taken yet."""
        self._reactor.removeWriter(self)
        self.socket.close()
        return bytes(self._unsent)

    # --- for the reactor to call -----------------------------------------------------------

    def fileno(self) -> int:
        return self.socket.fileno()

    def logPrefix(self) -> str:
        return "-"

    def doWrite(self) -> Any:
        try:
            sent = self.socket.send(self._unsent)
        except BlockingIOError:
            return None
        except OSError as error:
            return error
        del self._unsent[:sent]
        if not self._unsent:
            self._reactor.removeWriter(self)
            if self.producer is not None and self.producerPaused:
                self.producerPaused = False
                self.producer.resumeProducing()
        return None

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone; who reads notices that, too."""
        self._is_broken = True
        self._unsent.clear()
