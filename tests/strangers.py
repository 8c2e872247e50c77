"""Clients that nobody knows: one that a test leads by the hand, and floods of those that want in,
or only in the way.

How it thinks:

* A `Caller` waits for what it is told, and gives up when that does not come for long.
* A `Flood` is a thread in which there are always so many `Stranger`s; as one ends, the next one
  comes.  What each kind of them does, its class says, and what became of them, `Flood.ends`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import selectors
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.fakes import SSL_REQUEST, message, messages_in, startup, told
from tests.handshakes import a_client
from tests.postgres import HOST, Failed

PATIENCE = 30
"""Seconds after which what is waited for will not come any more."""

REFUSED = "FATAL 53300: sorry, too many clients already"


class Caller:
    """A client that connects, and says and hears what a test wants."""

    def __init__(self, port: int, host: str = HOST) -> None:
        self.socket = socket.create_connection((host, port), PATIENCE)

    def encrypt(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        """Ask for TLS, and have it; the socket that it is then."""
        self.socket.sendall(SSL_REQUEST)
        assert self.socket.recv(1) == b"S"
        self.socket = encrypted = context.wrap_socket(self.socket)
        return encrypted

    def start_up(self, **parameters: str) -> str:
        """The first that it is told, in one line."""
        self.socket.sendall(startup(**parameters))
        header = self._receive(5)
        return told(header + self._receive(int.from_bytes(header[1:], "big") - 4))[0]

    def hear_out(self) -> list[str]:
        """All that it is told up to the end."""
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 16):
                heard += data
        return told(heard)

    def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            data = self.socket.recv(size - len(received))
            assert data, received
            received += data
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()


class Stranger:
    """One that says nothing."""

    def __init__(self, port: int) -> None:
        self.heard = b""
        self.has_ended = False
        self._unsaid = b""
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex((HOST, port))

    @property
    def end(self) -> str:
        """What became of it."""
        if b"C53300\0" in self.heard:
            return "refused"
        return "known by a wrong password" if b"C28P01\0" in self.heard else "closed"

    def turn(self) -> None:
        """Hear, and say something, as far as that can be done."""
        try:
            self._hear()
            self.act()
            if self._unsaid:
                self._unsaid = self._unsaid[self.socket.send(self._unsaid) :]
        except BlockingIOError:
            pass
        except OSError:
            self.has_ended = True

    def act(self) -> None:
        """What it does is not for long: there are others."""

    def say_no_more(self) -> None:
        """It waits for the end.

        Should its connection never have been made, for at the other end there were too many that
        had not been accepted yet, it learns so only when it sends something: Linux, which answers
        with SYN cookies then, forgets it.
        """
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = self.socket.recv(1 << 16)
            self.heard += data
            self.has_ended = not data


class Slow(Stranger):
    """Sends a startup packet that does not end, a byte at a time."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._bytes = iter(startup(user="x" * 9000))

    def act(self) -> None:
        self._unsaid = self._unsaid or bytes([next(self._bytes)])


class HalfEncrypted(Stranger):
    """Asks for TLS, and sends a half of what begins it."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._unsaid = SSL_REQUEST
        outgoing = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            a_client().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
        hello = outgoing.read()
        self._hello = hello[: len(hello) // 2]

    def act(self) -> None:
        if self.heard == b"S":
            self._unsaid, self._hello = self._unsaid + self._hello, b""


class Guessing(Stranger):
    """Proves that it does not know the password."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._unsaid = startup(user="mallory")
        self._answered = 0

    def act(self) -> None:
        if self.heard[:1] != b"R" or len(self.heard) < 9:
            return
        try:
            answers = [contents for tag, contents in messages_in(self.heard) if tag == b"R"]
        except AssertionError:
            return  # the rest of it is under way
        if len(answers) > self._answered:
            self._answered += 1
            self._unsaid += self._answer(answers[self._answered - 1])

    def _answer(self, challenge: bytes) -> bytes:
        if self._answered == 1:
            first = b"n,,n=,r=guess"
            return message(b"p", b"SCRAM-SHA-256\0" + struct.pack(">i", len(first)) + first)
        nonce = re.search(b"r=([^,]*)", challenge)
        assert nonce
        proof = base64.b64encode(bytes(32))
        return message(b"p", b"c=biws,r=" + nonce[1] + b",p=" + proof)


class Flood:
    """So many strangers at the same time, until the `with` block ends."""

    def __init__(self, port: int, at_once: int, *kinds: type[Stranger]) -> None:
        self._port = port
        self._at_once = at_once
        self._kinds = itertools.cycle(kinds)
        self.ends: Counter[tuple[type[Stranger], str]] = Counter()
        self._changed = threading.Condition()
        self._stop = False
        self._gives_up = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def number_of(self, end: str) -> int:
        """How many strangers have ended so."""
        return sum(number for (_, one), number in self.ends.items() if one == end)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of what became of them."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._failure or condition(), 2 * PATIENCE):
                raise Failed(f"Waited {2 * PATIENCE} s. The strangers: {self.ends}")
        self._check()

    def _check(self) -> None:
        if self._failure:
            raise Failed("the flood has ended") from self._failure

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                here: set[Stranger] = set()
                is_last = False
                while (here and not self._gives_up) or not self._stop:
                    if self._stop and not is_last:
                        is_last = True
                        for stranger in here:
                            stranger.say_no_more()
                    while len(here) < self._at_once and not self._stop:
                        stranger = next(self._kinds)(self._port)
                        here.add(stranger)
                        selector.register(stranger.socket, selectors.EVENT_READ, stranger)
                    selector.select(0.01)
                    gone = set()
                    for stranger in here:
                        stranger.turn()
                        if stranger.has_ended:
                            gone.add(stranger)
                            selector.unregister(stranger.socket)
                            stranger.socket.close()
                    here -= gone
                    if self._gives_up:
                        for stranger in here:
                            stranger.socket.close()
                    with self._changed:
                        self.ends.update((type(one), one.end) for one in gone)
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
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._gives_up = True
            self._thread.join()
            raise Failed(f"strangers were not left in {PATIENCE} s: {self.ends}")
        self._check()
