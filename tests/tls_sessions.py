"""Clients that talk to our server over TLS, as far as its tests need."""

from __future__ import annotations

import ssl

import pytest

from tests.certificates import Authority
from tests.fakes import (
    SSL_REQUEST,
    startup,
)
from tests.handshakes import a_client
from tests.test_session import PASSWORD
from tests.wires import Server, Wire

OURS = Authority("Our CA")
DIRECT = ["postgresql"]
TIMEOUT = 60
MAN_IN_THE_MIDDLE = (
    "FATAL 08P01: received unencrypted data after {} request | D: This could be either a "
    "client-software bug or evidence of an attempted man-in-the-middle attack."
)
ALERT = 21
"""What a TLS record is that tells of the end."""


def asked(server: Server) -> Wire:
    """A client that has asked for TLS, and is to have it."""
    wire = server.connect()
    wire.send(SSL_REQUEST)
    wire.until(lambda: wire.raw)
    assert wire.raw == b"S"
    wire.raw = b""
    return wire


def encrypted(server: Server) -> Wire:
    return asked(server).encrypt(a_client(trusts=OURS.pem))


def greeted(server: Server) -> Wire:
    wire = encrypted(server)
    wire.send(startup())
    wire.until(lambda: wire.told == ["R 3"])
    wire.send(PASSWORD)
    wire.hear("R 3", "GREETING")
    return wire


def ended(server: Server, wire: Wire) -> list[str]:
    """What a client is told that hears the end, and then answers with its own: the connection is
    over then, and no time has gone by."""
    wire.until(lambda: wire.was_ended_well)
    wire.end_tls()
    wire.until(lambda: wire.has_ended)
    server.until(lambda: not server.factory.connections, "the server knows that it is over")
    assert server.clock.seconds() == 0
    return wire.told


def a_hello() -> bytes:
    """What a client says that begins with TLS."""
    outgoing = ssl.MemoryBIO()
    client = a_client(protocols=DIRECT).wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def records(data: bytes) -> list[int]:
    """The types of the TLS records that this is; that it is nothing else, too."""
    types = []
    while data:
        assert data[1] == 3, data
        types.append(data[0])
        data = data[5 + int.from_bytes(data[3:5], "big") :]
    return types
