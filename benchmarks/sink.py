"""The load side: a process with any number of replication clients that throw away what they get.

    python -m benchmarks.sink        (started and driven by `Sink`, in the process that measures)

What comes is discarded in the kernel (`MSG_TRUNC`), so that a client costs a system call for what
may be a megabyte of WAL, and copies none of it.  It is counted, not looked at: that each byte is
right, the tests show.  Under TLS the ciphertext is counted; after START_REPLICATION nothing is
decrypted.  On a Unix socket there is no discarding in the kernel; it is copied and thrown away.

Clients whose lag is measured read what they get, and note when each message has come.

How it thinks: `Sink` writes a line of JSON to the process for each thing to do, and reads a line of
JSON when it is done.  Meanwhile the process does nothing but wait in epoll and discard.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import subprocess
import sys
import time
from itertools import cycle
from types import TracebackType
from typing import Any, Self

ROOM = bytearray(1 << 20)
"""Where discarded bytes would go if the kernel copied them."""

GREETING = {"user": "postgres", "replication": "true", "application_name": "sink"}
STATUS_INTERVAL = 10.0
"""Seconds, PostgreSQL's wal_receiver_status_interval."""
STATUS_UPDATE = b"d" + struct.pack("!IcQQQQB", 38, b"r", 1, 1, 0, 0, 0)
SSL_REQUEST = struct.pack("!II", 8, 80877103)


class Connection:
    """A client; `address` is (host, port), or the path of a Unix socket."""

    def __init__(self, address: Any, tls: bool, bare: bool) -> None:
        is_path = isinstance(address, str)
        self.socket = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET)
        self.socket.connect(address if is_path else tuple(address))
        self.flags = 0 if is_path else socket.MSG_TRUNC
        self.received = 0
        """Bytes since START_REPLICATION was answered."""
        self.wanted = 0
        self.arrivals: list[tuple[int, float]] = []
        """Up to which LSN WAL had come, and when (`time.monotonic`)."""
        self._tls: ssl.SSLObject | None = None
        self._pending = b""
        if bare:
            self.socket.setblocking(False)
            return
        if tls:
            self._start_tls()
        pairs = b"".join(f"{name}\0{value}\0".encode() for name, value in GREETING.items())
        self._send(struct.pack("!II", len(pairs) + 9, 3 << 16) + pairs + b"\0")
        self._read_until(b"Z")

    def start(self, command: str) -> None:
        """Send START_REPLICATION, and discard from then on."""
        query = command.encode() + b"\0"
        self._send(b"Q" + struct.pack("!I", len(query) + 4) + query)
        self._read_until(b"W")
        self.received = len(self._pending)
        self.socket.setblocking(False)

    def discard(self) -> None:
        """Throw away what is there."""
        try:
            size = self.socket.recv_into(ROOM, len(ROOM), self.flags)
        except BlockingIOError:
            return
        if not size:
            raise ConnectionError("the server has closed the connection")
        self.received += size

    def report(self) -> None:
        """Send a status update that confirms nothing."""
        self._send(STATUS_UPDATE)

    def read(self) -> None:
        """Take what is there, message by message, and note when which WAL has come."""
        try:
            data = self._pending + self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        now, at = time.monotonic(), 0
        while len(data) - at >= 30:
            size = int.from_bytes(data[at + 1 : at + 5], "big") + 1
            if len(data) - at < size:
                break
            if data[at : at + 1] == b"d" and data[at + 5 : at + 6] == b"w":
                start = int.from_bytes(data[at + 6 : at + 14], "big")
                self.arrivals.append((start + size - 30, now))
            at += size
        self._pending = data[at:]

    def _read_until(self, kind: bytes) -> None:
        """Read messages up to one of a kind."""
        while True:
            while len(self._pending) < 5:
                self._receive()
            tag, size = self._pending[:1], struct.unpack_from("!I", self._pending, 1)[0] + 1
            while len(self._pending) < size:
                self._receive()
            message, self._pending = self._pending[:size], self._pending[size:]
            if tag == b"E":
                raise ConnectionError(message[5:].replace(b"\0", b" ").decode(errors="replace"))
            if tag == kind:
                return

    def _receive(self) -> None:
        if self._tls is None:
            data = self.socket.recv(65536)
        else:
            try:
                data = self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._incoming.write(self.socket.recv(65536))
                return
        if not data:
            raise ConnectionError("the server has closed the connection")
        self._pending += data

    def _send(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)
            data = self._outgoing.read()
        self.socket.sendall(data)

    def _start_tls(self) -> None:
        self.socket.sendall(SSL_REQUEST)
        if self.socket.recv(1) != b"S":
            raise ConnectionError("the server does not offer TLS")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(self._incoming, self._outgoing)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.socket.sendall(self._outgoing.read())
                self._incoming.write(self.socket.recv(65536))
        self.socket.sendall(self._outgoing.read())
        self._tls = tls


class Clients:
    """What the process does."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._epoll = select.epoll()
        self._epoll.register(0, select.EPOLLIN)
        self._by_fd: dict[int, Connection] = {}

    def connect(self, address: Any, count: int, tls: bool, bare: bool) -> None:
        self._connections = [Connection(address, tls, bare) for _ in range(count)]
        if bare:
            self._register()

    def start(self, commands: list[str]) -> None:
        """Have them all stream, each from where its command says, the last one for all the rest."""
        for number, connection in enumerate(self._connections):
            connection.start(commands[min(number, len(commands) - 1)])
        self._register()

    def _register(self) -> None:
        for connection in self._connections:
            self._by_fd[connection.socket.fileno()] = connection
            self._epoll.register(connection.socket, select.EPOLLIN)

    def discard(self, size: int) -> dict[str, float]:
        """Discard until each has received so many bytes since this was called the last time."""
        begun = time.perf_counter()
        waiting = set()
        for connection in self._connections:
            connection.wanted += size
            if connection.received < connection.wanted:
                waiting.add(connection)
        while waiting:
            for fd, _ in self._epoll.poll():
                connection = self._by_fd[fd]
                connection.discard()
                if connection.received >= connection.wanted:
                    waiting.discard(connection)
        return {"seconds": time.perf_counter() - begun, **self.count()}

    def follow(self) -> dict[str, float]:
        """Discard until there is something else to do."""
        while True:
            for fd, _ in self._epoll.poll():
                if not fd:
                    return self.count()
                self._by_fd[fd].discard()

    def live(self) -> dict[str, float]:
        """As `follow`, and tell the server so, each client every ten seconds, as standbys do."""
        in_turn = cycle(self._connections)
        next_report, pause = time.monotonic(), STATUS_INTERVAL / len(self._connections)
        while True:
            for fd, _ in self._epoll.poll(max(next_report - time.monotonic(), 0)):
                if not fd:
                    return self.count()
                self._by_fd[fd].discard()
            if time.monotonic() >= next_report:
                next_report += pause
                next(in_turn).report()

    def listen(self) -> dict[str, Any]:
        """Read until there is something else to do."""
        while True:
            for fd, _ in self._epoll.poll():
                if not fd:
                    return {}
                self._by_fd[fd].read()

    def arrivals(self) -> dict[str, Any]:
        return {"arrivals": [connection.arrivals for connection in self._connections]}

    def count(self) -> dict[str, float]:
        received = [connection.received for connection in self._connections]
        return {"received": sum(received), "least": min(received, default=0)}

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()
        self.__init__()  # type: ignore[misc]


class Sink:
    """Such a process, to be told what to do."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sink"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def connect(self, address: tuple[str, int] | str, count: int = 1, tls: bool = False) -> None:
        """Connect so many clients."""
        self._do("connect", address=address, count=count, tls=tls, bare=False)

    def connect_bare(self, address: tuple[str, int]) -> None:
        """Connect to something that sends bytes without being asked."""
        self._do("connect", address=address, count=1, tls=False, bare=True)

    def start(self, *lsns: str, tli: int = 1) -> None:
        """Have them stream: each from its own LSN, or the last one."""
        self._do("start", commands=[f"START_REPLICATION {lsn} TIMELINE {tli}" for lsn in lsns])

    def discard(self, size: int) -> float:
        """Discard until each client has received so many bytes more; the seconds it took."""
        self.begin_discarding(size)
        return self.end_discarding()

    def begin_discarding(self, size: int) -> None:
        """Have it discard while this process does something else."""
        self._tell("discard", size=size)

    def end_discarding(self) -> float:
        """Wait until it is done."""
        return float(self._hear()["seconds"])

    def follow(self) -> None:
        """Go on discarding while this process does something else."""
        self._tell("follow")

    def live(self) -> None:
        """As `follow`, with a status update of each client every ten seconds."""
        self._tell("live")

    def unfollow(self) -> tuple[int, int]:
        """Take back `follow`; the bytes received since `start`, by all, and by who has least."""
        self._do("count")  # which ends it, and has its answer first
        found = self._hear()
        return int(found["received"]), int(found["least"])

    def listen(self) -> None:
        """Read, and note when what comes, while this process does something else."""
        self._tell("listen")

    def arrivals(self) -> list[list[tuple[int, float]]]:
        """Take back `listen`; of each client, up to which LSN it had WAL and since when."""
        self._do("arrivals")
        return list(self._hear()["arrivals"])

    def close(self) -> None:
        """Disconnect all clients."""
        self._do("close")

    def _do(self, what: str, **how: Any) -> dict[str, Any]:
        self._tell(what, **how)
        return self._hear()

    def _tell(self, what: str, **how: Any) -> None:
        assert self._popen.stdin is not None
        print(json.dumps({"what": what, **how}), file=self._popen.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError("the load side has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the load side: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._popen.kill()
        self._popen.communicate()


def main() -> None:
    clients = Clients()
    # Unbuffered, for epoll knows nothing of what a buffer holds.
    with open(0, "rb", buffering=0, closefd=False) as orders:
        while order := orders.readline():
            how = json.loads(order)
            try:
                answer = getattr(clients, how.pop("what"))(**how)
            except OSError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer or {}), flush=True)


if __name__ == "__main__":
    main()
