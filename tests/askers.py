"""Servers that ask for something secret, and tell what they get; in threads, with plain sockets."""

from __future__ import annotations

import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from tests.pageserver import TIMEOUT
from tests.postgres import HOST

CLEARTEXT = struct.pack(">I", 3)
MD5 = struct.pack(">I", 5) + b"salt"
GSS = struct.pack(">I", 7)
SASL = struct.pack(">I", 10) + b"SCRAM-SHA-256\0\0"


def message(tag: bytes, contents: bytes) -> bytes:
    return tag + struct.pack(">I", len(contents) + 4) + contents


def problem(tag: bytes, text: bytes) -> bytes:
    """An ErrorResponse (``E``) or a NoticeResponse (``N``)."""
    return message(tag, b"SFATAL\0VFATAL\0C28P01\0M" + text + b"\0\0")


class Asker:
    """Asks everybody who connects, in an authentication message with these contents.

    What is got in answer is put into `answers`: the contents of the message, with its tag, or
    nothing if the connection ends.  Before it, the StartupMessage is put into `startups`.  Then the
    answer is repeated in an error.  With `tls` all of this is encrypted, and the client's
    certificate, or None, is put into `certificates`.
    """

    def __init__(self, question: bytes, tls: ssl.SSLContext | None = None) -> None:
        self.answers: queue.Queue[bytes] = queue.Queue()
        self.startups: queue.Queue[bytes] = queue.Queue()
        self.certificates: queue.Queue[bytes | None] = queue.Queue()
        self._question = question
        self._tls = tls
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # it is shut down
            while True:
                self._start(self._serve, self._socket.accept()[0])

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        with ExitStack() as open_ones, suppress(OSError):  # the client is gone
            open_ones.enter_context(connection)
            while struct.unpack(">H", (packet := self._packet(connection))[:2]) == (1234,):
                if self._tls is None or packet != struct.pack(">HH", 1234, 5679):
                    connection.sendall(b"N")
                    continue
                connection.sendall(b"S")
                connection = self._tls.wrap_socket(connection, server_side=True)
                open_ones.enter_context(connection)
                self.certificates.put(connection.getpeercert(binary_form=True))
            self.startups.put(packet)
            connection.sendall(message(b"R", self._question))
            answer = b""
            with suppress(OSError):
                if tag := self._read(connection, 1):
                    answer = tag + self._packet(connection)
            self.answers.put(answer)
            connection.sendall(problem(b"E", b"you said " + answer[1:].rstrip(b"\0")))

    def _packet(self, connection: socket.socket) -> bytes:
        (size,) = struct.unpack(">I", self._read(connection, 4))
        return self._read(connection, size - 4)

    def _read(self, connection: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = connection.recv(size - len(data))
            if not more:
                raise ConnectionError
            data += more
        return data

    def answer(self) -> bytes:
        """What came next."""
        return self.answers.get(timeout=TIMEOUT)

    def startup(self) -> dict[str, str]:
        """The parameters in the next StartupMessage."""
        strings = self.startups.get(timeout=TIMEOUT)[4:].decode().split("\0")
        return dict(zip(strings[:-2:2], strings[1:-2:2], strict=True))

    def certificate(self) -> bytes | None:
        return self.certificates.get(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
