"""Bytes become messages however they are cut, and never more than one message of them is kept."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import message, startup_packet
from walproto.errors import ProtocolViolation
from walproto.wire.framing import Framing
from walproto.wire.messages import FRONTEND, MAX_STARTUP_PACKET_LENGTH

MESSAGES = st.lists(
    st.tuples(st.sampled_from(sorted(FRONTEND)), st.binary(max_size=50)), min_size=1, max_size=10
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(MESSAGES, st.lists(st.integers(0, 10_000), max_size=20), st.binary(max_size=3))
def test_messages_come_out_as_they_went_in(
    sent: list[tuple[bytes, bytes]], places: list[int], trailing: bytes
) -> None:
    framing = Framing()
    received = []
    data = b"".join(message(*one) for one in sent) + b"Q" + trailing
    for piece in cut(data, places):
        framing.receive(piece)
        while (one := framing.next_message()) is not None:
            received.append(one)
    assert received == sent
    assert len(framing) == 1 + len(trailing)


def test_a_byte_at_a_time() -> None:
    framing = Framing()
    data = message(b"Q", b"SHOW x\0")
    for byte in data[:-1]:
        framing.receive(bytes([byte]))
        assert framing.next_message() is None
    framing.receive(data[-1:])
    assert framing.next_message() == (b"Q", b"SHOW x\0")
    assert framing.next_message() is None


def test_startup_packets_have_no_type() -> None:
    framing = Framing()
    framing.receive(startup_packet(80877103, b"") + startup_packet(196608, b"\0") + b"Q")
    assert framing.next_startup_packet() == struct.pack(">I", 80877103)
    assert framing.next_startup_packet() == struct.pack(">I", 196608) + b"\0"
    assert framing.next_startup_packet() is None
    assert len(framing) == 1


@pytest.mark.parametrize("length", [8, 10_000, MAX_STARTUP_PACKET_LENGTH + 4])
def test_a_startup_packet_may_be_so_long(length: int) -> None:
    framing = Framing()
    framing.receive(struct.pack(">I", length))
    assert framing.next_startup_packet() is None
    framing.receive(bytes(length - 4))
    assert framing.next_startup_packet() == bytes(length - 4)


@pytest.mark.parametrize("length", [0, 3, 4, 7, MAX_STARTUP_PACKET_LENGTH + 5, 2**32 - 1])
def test_but_not_so_long(length: int) -> None:
    framing = Framing()
    framing.receive(struct.pack(">I", length))
    with pytest.raises(ProtocolViolation) as caught:
        framing.next_startup_packet()
    assert caught.value.fatal


@pytest.mark.parametrize("tag", sorted(FRONTEND))
def test_a_message_may_be_as_long_as_its_limit(tag: bytes) -> None:
    limit = FRONTEND[tag].limit
    framing = Framing()
    framing.receive(tag + struct.pack(">I", limit))
    assert framing.next_message() is None
    framing.receive(bytes(limit - 4))
    assert framing.next_message() == (tag, bytes(limit - 4))


@pytest.mark.parametrize("tag", sorted(FRONTEND))
def test_a_message_of_an_impossible_length_is_refused_by_its_header(tag: bytes) -> None:
    for length in (0, 3, FRONTEND[tag].limit + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        framing = Framing()
        framing.receive(tag + struct.pack(">I", length))
        with pytest.raises(ProtocolViolation, match="invalid message length") as caught:
            framing.next_message()
        assert caught.value.fatal


@pytest.mark.parametrize("byte", sorted(set(range(256)) - {tag[0] for tag in FRONTEND}))
def test_a_message_of_an_unknown_type_is_refused_by_its_type(byte: int) -> None:
    framing = Framing()
    framing.receive(bytes([byte]))
    with pytest.raises(ProtocolViolation, match=f"invalid frontend message type {byte}$") as caught:
        framing.next_message()
    assert caught.value.fatal


@given(st.lists(st.binary(min_size=1, max_size=65_536), max_size=10))
def test_never_more_is_kept_than_the_largest_message_and_a_read(reads: list[bytes]) -> None:
    framing = Framing()
    for read in reads:
        framing.receive(read)
        try:
            while framing.next_message() is not None:
                pass
        except ProtocolViolation:
            framing.clear()
        tag = framing._buffer[:1]
        assert len(framing) <= (FRONTEND[bytes(tag)].limit + 1 if tag else 0)
