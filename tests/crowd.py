"""Many streaming clients in one thread, well-behaved and not, over real sockets.

A `Client` speaks just enough of the protocol to stream, and compares every byte it gets with the
server's own files.  How it behaves otherwise its class says.  The thread of a `Crowd` lets all of
them do what they can; whoever wants to know how far they are waits for it with `Crowd.wait`.
"""

from __future__ import annotations

import mmap
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.postgres import HOST, Failed, int_to_lsn

_XLOG_DATA = struct.Struct(">QQq")
_STATUS = struct.Struct(">cIcQQQqB")
TICK = 0.02
"""Seconds after which everybody gets a turn, also who hears nothing."""


class Wal:
    """The WAL in the pg_wal of a primary which keeps all of it."""

    def __init__(self, directory: Path, segment_size: int) -> None:
        self._directory = directory
        self._segment_size = segment_size
        self._segments: dict[int, mmap.mmap] = {}

    def read(self, lsn: int, size: int) -> bytes:
        """Some WAL; it must not go beyond the segment in which it begins."""
        segno, offset = divmod(lsn, self._segment_size)
        if segno not in self._segments:
            high, low = divmod(segno, 2**32 // self._segment_size)
            with open(self._directory / f"{1:08X}{high:08X}{low:08X}", "rb") as file:
                self._segments[segno] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._segments[segno][offset : offset + size]


class Client:
    """A good client: it takes all it gets, and says how far it is."""

    mask = select.POLLIN
    receive_buffer = 0
    """SO_RCVBUF, 0 for what is usual."""

    def __init__(self, port: int, start: int, wal: Wal, options: str = "") -> None:
        self.lsn = start
        self.problem = ""
        self.streams = False
        self.gone = False
        self._reported = start
        self._wal = wal
        self._rest = b""
        self.socket = socket.socket()
        if self.receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self.socket.connect((HOST, port))
        name = type(self).__name__.lower()
        parameters = {
            "user": "postgres",
            "replication": "true",
            "application_name": name,
            "options": options,
        }
        startup = (
            b"".join(f"{key}\0{value}\0".encode() for key, value in parameters.items()) + b"\0"
        )
        command = f"START_REPLICATION {int_to_lsn(start)} TIMELINE 1\0".encode()
        self.socket.sendall(
            struct.pack(">II", len(startup) + 8, 0x00030000)
            + startup
            + struct.pack(">cI", b"Q", len(command) + 4)
            + command
        )
        self.socket.setblocking(False)

    def turn(self) -> None:
        """Something may have come in, or it is time."""
        self.take(2**17)

    def take(self, size: int) -> None:
        """Read up to so much of what there is, and deal with it."""
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.gone = True
            return
        if self._rest:
            data = self._rest + data
        position = 0
        while len(data) - position >= 5:
            tag, length = struct.unpack_from(">cI", data, position)
            end = position + 1 + length
            if len(data) < end:
                break
            self._understand(tag, data[position + 5 : end])
            position = end
        self._rest = data[position:]
        if self.lsn - self._reported >= 2**18:
            self.report()

    def _understand(self, tag: bytes, contents: bytes) -> None:
        if tag == b"W":
            self.streams = True
        elif tag == b"E":
            self.problem = self.problem or contents.decode()
        elif tag == b"d" and contents[0] == ord("w"):
            start = _XLOG_DATA.unpack_from(contents, 1)[0]
            if start != self.lsn:
                self.problem = f"got {start:X} where {self.lsn:X} was due"
            elif contents[25:] != self._wal.read(start, len(contents) - 25):
                self.problem = f"what came at {start:X} differs"
            self.lsn = start + len(contents) - 25
        elif tag == b"d" and contents[-1]:
            self.report()

    def status(self, reply_requested: bool = False) -> bytes:
        """A message that tells how far it is."""
        return _STATUS.pack(b"d", 38, b"r", self.lsn, self.lsn, 0, 0, reply_requested)

    def report(self) -> None:
        self._reported = self.lsn
        try:
            self.socket.send(self.status())
        except OSError as error:
            self.problem = self.problem or f"could not report: {error}"


class Slow(Client):
    """Reads a little at a time, and says every now and then that it is still there."""

    mask = 0
    receive_buffer = 4096
    hurries = False
    _next_report = 0.0

    def turn(self) -> None:
        if self.hurries:
            self.mask = select.POLLIN
            super().turn()
            return
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + 0.5
            self.report()
        self.take(1000)


class Silent(Client):
    """Asks for WAL and is never seen again."""

    mask = 0
    receive_buffer = 4096

    def turn(self) -> None:
        pass


class Flooding(Client):
    """Asks without an end whether the server is there, and never listens to what it says."""

    mask = 0
    receive_buffer = 4096
    asked = 0
    _at_once = 200

    def turn(self) -> None:
        data = self._rest or self.status(reply_requested=True) * self._at_once
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.gone = True
            return
        self._rest = data[sent:]
        if sent and not self._rest:
            self.asked += self._at_once


class Crowd:
    """Clients, and the thread in which they live until the `with` block ends."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self.clients = list(clients)
        self._by_fd = {client.socket.fileno(): client for client in self.clients}
        self._changed = threading.Condition()
        self._stop = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def wait(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Wait until something is true of the clients; none of them may have a problem."""

        def settled() -> bool:
            return bool(self._problems()) or condition()

        with self._changed:
            in_time = self._changed.wait_for(settled, timeout)
        if problems := self._problems():
            raise Failed(f"{len(problems)} clients have problems, such as: {problems[0]}")
        if not in_time:
            where = sorted(f"{type(c).__name__}:{c.lsn:X}{'!' * c.gone}" for c in self.clients)
            raise Failed(f"Waited {timeout:g} s. The clients: {' '.join(where)}")

    def _problems(self) -> list[str]:
        problems = [f"{type(c).__name__}: {c.problem}" for c in self.clients if c.problem]
        return [repr(self._failure), *problems] if self._failure else problems

    def _run(self) -> None:
        try:
            poll = select.poll()
            for fd, client in self._by_fd.items():
                poll.register(fd, client.mask)
            next_tick = time.monotonic()
            while not self._stop:
                events = poll.poll(TICK * 1000)
                for fd, event in events:
                    client = self._by_fd[fd]
                    if event & (select.POLLHUP | select.POLLERR) and not event & select.POLLIN:
                        client.gone = True
                    else:
                        client.turn()
                    if client.gone:
                        poll.unregister(fd)
                        client.socket.close()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK
                    for fd, client in self._by_fd.items():
                        if not client.gone and type(client) is not Client:
                            client.turn()
                            poll.modify(fd, client.mask)
                with self._changed:
                    self._changed.notify_all()
        except Exception as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join()
        for client in self.clients:
            client.socket.close()
