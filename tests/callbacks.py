"""Where a pageserver is called: a few lines of the protocol, written by hand, in threads."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.pageserver import TIMEOUT
from tests.postgres import HOST

PASSWORD = r"it\'s a \\ secret"
LET_IN = b"R" + struct.pack(">II", 8, 0)
READY = b"Z" + struct.pack(">I", 5) + b"I"
DONE = b"C" + struct.pack(">I", 13) + b"SELECT 1\0"


def status(name: str, value: str) -> bytes:
    contents = f"{name}\0{value}\0".encode()
    return b"S" + struct.pack(">I", len(contents) + 4) + contents


GREETING = LET_IN + status("server_version", "14.2") + status("client_encoding", "UTF8") + READY


class Listener:
    """Where a pageserver is called; a thread deals with one connection after the other.

    A call is put into `calls`.  One that comes while it `hangs` is kept open, and never answered;
    when the caller has abandoned it, something is put into `abandoned`.
    """

    def __init__(self, port: int = 0) -> None:
        self.calls: queue.Queue[str] = queue.Queue()
        self.abandoned: queue.Queue[None] = queue.Queue()
        self.hangs = False
        self._socket = socket.create_server((HOST, port))
        self.port: int = self._socket.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        # A caller that has given up, is gone, wherever that is in here.
        with connection, connection.makefile("rb") as file, suppress(OSError, struct.error):
            while True:
                (size,) = struct.unpack(">I", file.read(4))
                packet = file.read(size - 4)
                if packet[:2] != struct.pack(">H", 1234):
                    break
                connection.sendall(b"N")  # no encryption
            connection.sendall(GREETING)
            while True:
                tag, size = struct.unpack(">cI", file.read(5))
                contents = file.read(size - 4)
                if tag == b"Q":
                    hangs = self.hangs
                    self.calls.put(contents[:-1].decode())
                    if hangs:
                        file.read()
                        self.abandoned.put(None)
                    else:
                        connection.sendall(DONE + READY)

    @property
    def connstr(self) -> str:
        """A connection string for it, with what it takes care to pass on."""
        return rf"host={HOST} port={self.port} user=no_user password='{PASSWORD}'"

    def call(self) -> str:
        """The next call."""
        return self.calls.get(timeout=TIMEOUT)

    def calls_so_far(self) -> list[str]:
        """Those that have not been looked at."""
        calls = []
        while not self.calls.empty():
            calls.append(self.calls.get())
        return calls

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
