"""How a message gets to a client: past the transport, as far as that is in order.

A transport copies what it is given, and sends it when the reactor comes round to it; that costs
more than the sending itself.  So what is sent goes to the socket at once, and only what the socket
does not take goes to the transport's buffer.  Whatever that holds, has to be gone before the socket
is used again.  Therefore the transport is made to pause its producer then, and resumes it when the
buffer is empty: a producer is paused as by any transport, but earlier, by the first byte that is
held back.

Under TLS it is the same, with what OpenSSL makes of the message.  But there more is sent than we
send: answers to what the client says of the encryption itself.  OpenSSL puts them in order, and
Twisted hands them to the transport.  So each time we look whether Twisted's layer or the transport
holds anything.  Twisted has no other way to ask for that than by names of its own.

Through any other protocol that wraps ours (such as a proxy's header), or a Twisted that has these
names no longer, a message just goes to the transport.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet import tcp

from walproto.lsn import PAGE_SIZE
from walproto.server.transports import bare_socket

PIECE_SIZE = 32 * PAGE_SIZE
"""Bytes of WAL in a message, at most: twice as many as PostgreSQL has (MAX_SEND_SIZE), so that what
a system call costs does not tell."""
UNIX_PIECE_SIZE = 16 * PAGE_SIZE
"""The same on a Unix socket, where the client is given what was read when it is still in the
processor's cache, if it is no more than this."""

_MARGIN = 4096
"""With a quarter it is more than TLS adds to a message: some 30 bytes for each record, which may
have no more than 512, if a client asks for that."""


class Channel(Protocol):
    """The way to a client, for its transport's producer alone, as long as that is registered."""

    @property
    def piece_size(self) -> int:
        """How much WAL is best sent at a time: bytes, a multiple of the page size."""

    def write(self, data: bytes) -> None:
        """Send what comes behind all that the transport was given so far."""

    def send(self, message: memoryview | bytes) -> None:
        """Send what comes behind the last that went through this channel.  If it cannot all be
        sent now, the producer is paused until it is."""


def channel_to(transport: Any) -> Channel:
    """The fastest way there is through this transport."""
    bare = bare_socket(transport)
    if bare is not None:
        return BareChannel(transport, bare)
    if isinstance(transport, tcp.Connection) and _shows_what_it_holds(transport):
        return TlsChannel(transport)
    return PlainChannel(transport)


class PlainChannel:
    """The transport's own way."""

    piece_size = PIECE_SIZE

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def send(self, message: memoryview | bytes) -> None:
        self._transport.write(bytes(message))


class BareChannel:
    """To the socket, for the transport sends all as it is."""

    def __init__(self, transport: tcp.Connection, bare: socket.socket) -> None:
        self._transport = transport
        self._socket = bare
        self.piece_size = UNIX_PIECE_SIZE if bare.family == socket.AF_UNIX else PIECE_SIZE

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        _pause(self._transport)

    def send(self, message: memoryview | bytes) -> None:
        sent = _send(self._socket, message)
        if sent < len(message):
            self.write(bytes(message[sent:]))


class TlsChannel:
    """To OpenSSL, and what that makes of it, to the socket."""

    piece_size = PIECE_SIZE

    def __init__(self, transport: tcp.Connection) -> None:
        self._transport = transport
        layer: Any = transport.protocol
        self._layer = layer
        self._connection = layer.getHandle()
        self._socket: socket.socket = transport.socket

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def send(self, message: memoryview | bytes) -> None:
        if self._transport.disconnecting:
            self._end()
            return
        if _is_held_up(self._transport, self._layer):
            self.write(bytes(message))
            return
        try:
            # If it raises, then with the first byte: nothing comes in meanwhile.
            self._connection.sendall(message)
        except Exception:
            # OpenSSL has to hear the client first, or it is over.  Twisted finds out.
            self.write(bytes(message))
            return
        encrypted = self._connection.bio_read(len(message) * 5 // 4 + _MARGIN)
        sent = _send(self._socket, encrypted)
        if sent < len(encrypted):
            self._layer.transport.write(encrypted[sent:])
            _pause(self._transport)

    def _end(self) -> None:
        """The client has ended TLS, but took its time to take what was there to send.  The
        transport waits for its producer."""
        _pause(self._transport)
        self._transport.unregisterProducer()


def _send(to: socket.socket, data: memoryview | bytes) -> int:
    """How much of it the socket has taken; the transport finds out if there is no client."""
    with suppress(OSError):
        return to.send(data)
    return 0


def _pause(transport: Any) -> None:
    """Have the transport resume its producer once its buffer is empty."""
    if transport.producer is not None:
        transport.producerPaused = True
        transport.producer.pauseProducing()


def _is_held_up(transport: Any, layer: Any) -> bool:
    """Whether a transport or its layer of TLS holds anything that is not sent."""
    held = (
        transport.dataBuffer,
        transport._tempDataBuffer,
        layer._appSendBuffer,
        layer._aggregator._buffer,
    )
    return any(held)


def _shows_what_it_holds(transport: Any) -> bool:
    """Whether it is one with TLS, and of the kind that we know."""
    try:
        _is_held_up(transport, transport.protocol)
    except AttributeError:
        return False
    return bool(transport.TLS)
