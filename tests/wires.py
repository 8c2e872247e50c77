"""Our server on the real reactor, which a test turns by hand, and clients on real sockets.

How it thinks:

* A `Server` is a factory that listens at some endpoints; its connections are those that Twisted
  makes.  `Server.turn` lets the reactor do what there is to do.  Time, for the factory, is a Clock.
* A `Wire` is a client's end.  Whatever a test waits for, it waits for with `Wire.until`, which
  turns the reactor, reads what has come, and fails if nothing comes of it for long.
* `Wire.encrypt` is for what comes then, TLS: a client of the ssl module in memory, so that a test
  has its bytes in hand: `Wire.push` sends them, all at once or as many at a time as it says.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from twisted.internet import reactor as global_reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from tests.fakes import server, told
from tests.postgres import Failed

reactor: Any = global_reactor
PATIENCE = 30
"""Seconds after which what a test waits for will not come any more."""


def turn(delay: float = 0) -> None:
    """Let the reactor do what there is to do; wait up to so many seconds for something."""
    reactor.iterate(delay)


class Listening:
    """A factory that listens; where an endpoint leads to, tells `connect`."""

    def __init__(self, factory: Any, *endpoints: str) -> None:
        self._factory = factory
        self._ports: list[Any] = []
        self._wires: list[Wire] = []
        for endpoint in endpoints:
            serverFromString(reactor, endpoint).listen(factory).addCallback(self._ports.append)
        assert len(self._ports) == len(endpoints)

    def turn(self, delay: float = 0) -> None:
        turn(delay)

    def connect(self, host: str = "127.0.0.1", number: int = 0, source: str = "") -> Wire:
        """A client of the endpoint with this number, from the address ``source``."""
        address = self._ports[number].getHost()
        if hasattr(address, "port"):
            origin = (source, 0) if source else None
            client = socket.create_connection((host, address.port), source_address=origin)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            client = socket.socket(socket.AF_UNIX)
            client.connect(address.name)
        wire = Wire(client, self.turn)
        self._wires.append(wire)
        return wire

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for wire in self._wires:
            wire.close()
        stopped: list[None] = []
        for port in self._ports:
            result = port.stopListening()
            if result is None:
                stopped.append(None)
            else:
                result.addCallback(stopped.append)
        while len(stopped) < len(self._ports) or self.is_busy:
            self.turn(0.01)

    @property
    def is_busy(self) -> bool:
        """Whether there are connections yet."""
        return False


class Server(Listening):
    """A WAL sender."""

    factory: Any

    def __init__(self, timeline: Any, *endpoints: str, **options: Any) -> None:
        self.clock = Clock()
        self.factory = server(timeline, self.clock, **options)
        super().__init__(self.factory, *(endpoints or ("tcp:0:interface=127.0.0.1",)))

    def turn(self, delay: float = 0) -> None:
        turn(delay)
        self.clock.advance(0)

    @property
    def is_busy(self) -> bool:
        return bool(self.factory.connections)

    @property
    def places_taken(self) -> int:
        return len(self.factory.unauthenticated)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until something is true of the server."""
        _until(self.turn, condition, lambda: what)


class Wire:
    """A client's end of a connection.

    ``received`` is all that came, decrypted if it is encrypted; ``raw`` all that came in clear,
    or as it was.  ``has_ended`` tells whether the server has closed the connection, or has broken
    it off; ``was_ended_well`` whether it has also said so in TLS.
    """

    def __init__(self, client: socket.socket, turn: Callable[[float], None]) -> None:
        self.socket = client
        self.socket.setblocking(False)
        self._turn = turn
        self.raw = b""
        self.has_ended = False
        self.was_ended_well = False
        self.alert = ""
        self.tls: ssl.SSLObject | None = None
        self.is_encrypted = False
        self._decrypted = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    @property
    def received(self) -> bytes:
        return self._decrypted if self.tls else self.raw

    @property
    def told(self) -> list[str]:
        """All that was received, as a transcript."""
        return told(self.received) + ["EOF"] * self.has_ended

    def send(self, data: bytes, size: int = 1 << 16) -> None:
        """Send it, encrypted if there is TLS, ``size`` bytes at a time."""
        if self.tls is not None:
            self.tls.write(data)
            self.push(size)
        else:
            self.send_raw(data, size)

    def send_raw(self, data: bytes, size: int = 1 << 16) -> None:
        """Send it as it is; the server takes each piece, or has closed the connection."""
        while data:
            with contextlib.suppress(BlockingIOError):
                try:
                    data = data[self.socket.send(data[:size]) :]
                except (BrokenPipeError, ConnectionResetError):
                    return
            self._turn(0)

    def push(self, size: int = 1 << 16) -> None:
        """Send what TLS has to say."""
        self.send_raw(self._outgoing.read(), size)

    def take(self, size: int = 1 << 16) -> None:
        """Read some of what there is."""
        if self.has_ended:
            return
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        self.has_ended = not data
        self.raw += data
        if self.tls is not None:
            self._incoming.write(data)
            self._decrypt()

    def until(self, condition: Callable[[], Any], *, size: int = 1 << 16) -> None:
        """Turn the reactor and read until something is true."""

        def turn(delay: float) -> None:
            self._turn(delay)
            self.take(size)

        _until(turn, condition, lambda: f"received {self.received!r}, {self.alert or 'no alert'}")

    def hear(self, *lines: str) -> None:
        """Wait until it was told just that."""
        self.until(lambda: self.told[-1:] == [lines[-1]])
        assert self.told == list(lines)

    def encrypt(
        self, context: ssl.SSLContext, *, size: int = 1 << 16, name: str = "localhost"
    ) -> Self:
        """Begin TLS, and wait until the handshake is over."""
        self.begin_tls(context, name)
        while not self.is_encrypted:
            self.push(size)
            self.until(
                lambda: self.is_encrypted or self.alert or self._outgoing.pending or self.has_ended
            )
            assert not self.alert
            assert not self.has_ended
        self.push(size)
        return self

    def begin_tls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._decrypt()

    def hello(self, context: ssl.SSLContext) -> bytes:
        """A ClientHello, to be sent as the test likes."""
        self.begin_tls(context)
        return self._outgoing.read()

    def end_tls(self) -> None:
        """Answer the server's close_notify."""
        assert self.tls is not None
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.push()

    def close(self) -> None:
        self.socket.close()

    def _decrypt(self) -> None:
        assert self.tls is not None
        try:
            if not self.is_encrypted:
                self.tls.do_handshake()
                self.is_encrypted = True
            while data := self.tls.read(1 << 16):
                self._decrypted += data
            self.was_ended_well = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.was_ended_well = True
        except ssl.SSLError as error:
            self.alert = (error.reason or str(error)).lower().replace("_", " ")


def _until(
    turn: Callable[[float], None], condition: Callable[[], Any], what: Callable[[], str]
) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"waited {PATIENCE} s in vain: {what()}")
        turn(0.01)


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that are logged meanwhile; a traceback is none of them, but an error."""
    lines: list[str] = []
    with capturedLogs() as events:
        yield lines
    assert [event["log_failure"] for event in events if "log_failure" in event] == []
    lines += [formatEvent(event) for event in events]
