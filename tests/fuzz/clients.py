"""Clients of a server in memory: how they are connected, and what they know."""

from __future__ import annotations

import gc
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.task import Clock

from tests.fakes import MemoryTransport, message
from tests.fuzz.backend import parse_messages
from tests.fuzz.proofs import ScramClient
from walproto.server.factory import WalSenderFactory

CAPACITY = 65536
"""Bytes that may wait in a transport before it asks for a pause, as with Twisted's."""
READ = 65536
"""Bytes that Twisted reads at a time."""


class Transport(MemoryTransport):
    """One that remembers how it has ended, and is read from as Twisted does it."""

    was_cut = False

    def drop(self) -> None:
        self.was_cut = self.was_cut or self.is_connected
        super().drop()

    def abortConnection(self) -> None:
        self.was_cut = self.was_cut or self.is_connected
        self.clock.callLater(0, self._lost, ConnectionAborted())

    def deliver(self, data: bytes) -> None:
        for start in range(0, len(data), READ):
            super().deliver(data[start : start + READ])


class Peeked:
    """A client, and what it has been told."""

    def __init__(self, factory: WalSenderFactory, clock: Clock, *, takes_all: bool) -> None:
        self.transport = Transport(clock, None if takes_all else CAPACITY)
        self.protocol = factory.buildProtocol(self.transport.getPeer())
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)
        self.sent = 0
        self.has_proven = False
        """Whether it has told that it knows the password."""

    @property
    def told(self) -> bytes:
        return bytes(self.transport.arrived)

    def send(self, data: bytes) -> None:
        self.sent += len(data)
        self.transport.deliver(data)

    def answer(self, *, knows_password: bool) -> bytes:
        """The answer to the last authentication request."""
        kind, contents = 10, b""
        for tag, value in _said(self.told):
            if tag == b"R":
                kind, contents = value
        self.has_proven |= kind == 11 and knows_password
        scram = ScramClient(b"secret" if knows_password else b"wrong")
        return message(b"p", scram.answer(kind, contents))

    def key(self) -> bytes:
        """The key that a CancelRequest needs, with its process ID."""
        for tag, value in _said(self.told):
            if tag == b"K":
                pid, key = value
                return struct.pack(">I", pid) + bytes(key)
        return bytes(8)


def _said(told: bytes) -> Iterator[tuple[bytes, Any]]:
    return parse_messages(told.lstrip(b"N"), may_be_cut=True)


_OURS = ("walproto.server.", "walproto.wire.", "walproto.access.")


def held(protocol: object) -> int:
    """How many bytes are kept for a connection in what is its own."""
    size, seen, rest = 0, {id(protocol)}, deque([protocol])
    while rest:
        one = rest.popleft()
        if isinstance(one, bytes | bytearray | memoryview):
            size += len(one)
            continue
        for other in gc.get_referents(one):
            kind = type(other)
            is_ours = kind.__module__.startswith(_OURS) and kind is not WalSenderFactory
            is_plain = kind in (dict, list, tuple, deque, bytes, bytearray, memoryview)
            if (is_ours or is_plain) and id(other) not in seen and other is not kind.__dict__:
                seen.add(id(other))
                rest.append(other)
    return size
