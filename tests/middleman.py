"""Somebody between a relay and its upstream, who may lose what is said, or change it.

How it thinks: it listens on a port of its own and passes on what each side says to the other,
message by message.  What the server says goes through `meddle`, which returns the bytes that take
the message's place.  What the relay acknowledges is noted on the way.  While it is silent, nothing
gets through in either direction, though every connection is there.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from tests.postgres import HOST, Cluster, free_port

Meddle = Callable[[bytes, bytes], bytes | None]
"""Called with a message's type and contents; the bytes that are to take its place, or None for the
end of the connection."""


def message(kind: bytes, contents: bytes) -> bytes:
    """A message as it is sent."""
    return kind + struct.pack(">I", len(contents) + 4) + contents


class Middleman:
    """A proxy to `primary`."""

    def __init__(self, primary: Cluster) -> None:
        self.port = free_port()
        self.meddle: Meddle = message
        self.acknowledged = 0
        """The highest flush position that was acknowledged."""
        self._primary = primary
        self._speaks = threading.Event()
        self._speaks.set()
        self._server = socket.create_server((HOST, self.port))
        self._open: list[socket.socket] = []
        self._start(self._accept)

    @property
    def conninfo(self) -> str:
        # Both are for encryption, which would leave us nothing to understand.
        return (
            f"host={HOST} port={self.port} user=postgres connect_timeout=2"
            " sslmode=disable gssencmode=disable"
        )

    def fall_silent(self) -> None:
        """Pass nothing on any more."""
        self._speaks.clear()

    def speak(self) -> None:
        """Pass everything on again."""
        self._speaks.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._speaks.set()
        for one in [self._server, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        def until_closed() -> None:
            with suppress(OSError, EOFError):
                work(*arguments)
            for one in arguments:
                assert isinstance(one, socket.socket)
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=until_closed, daemon=True).start()

    def _accept(self) -> None:
        while True:
            relay, _ = self._server.accept()
            try:
                server = socket.create_connection((HOST, self._primary.port))
            except OSError:
                relay.close()
                continue
            self._open += [relay, server]
            self._start(self._pass_requests, relay, server)
            self._start(self._pass_answers, server, relay)

    def _pass_requests(self, relay: socket.socket, server: socket.socket) -> None:
        kind = b""  # as the first message has it
        while True:
            contents = self._read_contents(relay)
            if kind == b"d" and contents[:1] == b"r":
                _, flush = struct.unpack_from(">QQ", contents, 1)
                self.acknowledged = max(self.acknowledged, flush)
            self._speaks.wait()
            server.sendall(message(kind, contents))
            kind = self._read(relay, 1)

    def _pass_answers(self, server: socket.socket, relay: socket.socket) -> None:
        while True:
            kind = self._read(server, 1)
            contents = self._read_contents(server)
            self._speaks.wait()
            data = self.meddle(kind, contents)
            if data is None:
                return
            relay.sendall(data)

    def _read_contents(self, peer: socket.socket) -> bytes:
        (size,) = struct.unpack(">I", self._read(peer, 4))
        return self._read(peer, size - 4)

    def _read(self, peer: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = peer.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)
