"""Bytes as they come in, cut into messages.

A connection begins with startup packets, which have a length and no type; then every message has
a type byte and a length.  Which of the two comes next is for the caller to know, so each has its
own method; bytes wait here until one is complete.  A message too long to be taken is refused by
its header, before its contents are read.
"""

from __future__ import annotations

import struct

from walproto.errors import ProtocolViolation
from walproto.wire.messages import FRONTEND, MAX_STARTUP_PACKET_LENGTH

_LENGTH = struct.Struct(">I")


class Framing:
    """A buffer of received bytes; never holds more than one message of the limit declared for it
    and one read of the transport's."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        """How many bytes wait here."""
        return len(self._buffer)

    def receive(self, data: bytes) -> None:
        self._buffer += data

    def clear(self) -> None:
        self._buffer.clear()

    @property
    def begins_with_tls(self) -> bool:
        """Whether what waits here is the beginning of a TLS handshake: the type of such a record
        cannot be the first byte of a startup packet's length."""
        return self._buffer[:1] == b"\x16"

    def take_all(self) -> bytes:
        """All that waits here, and does so no longer."""
        taken = bytes(self._buffer)
        self._buffer.clear()
        return taken

    def next_startup_packet(self) -> bytes | None:
        """The next startup packet without its length word, or None until it is complete.

        Raises ProtocolViolation (FATAL) for an impossible length (``ProcessStartupPacket``).
        """
        if len(self._buffer) < 4:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 8 <= length <= MAX_STARTUP_PACKET_LENGTH + 4:
            raise ProtocolViolation("invalid length of startup packet", fatal=True)
        return self._take(4, length)

    def next_message(self) -> tuple[bytes, bytes] | None:
        """The next message as its type byte and its contents, or None until it is complete.

        Raises ProtocolViolation (FATAL) for a type that no frontend sends and for a length that
        is impossible or over the type's limit (``SocketBackend``, ``pq_getmessage``).
        """
        if not self._buffer:
            return None
        tag = bytes(self._buffer[:1])
        message = FRONTEND.get(tag)
        if message is None:
            raise ProtocolViolation(f"invalid frontend message type {tag[0]}", fatal=True)
        if len(self._buffer) < 5:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, 1)
        if not 4 <= length <= message.limit:
            raise ProtocolViolation("invalid message length", fatal=True)
        contents = self._take(5, length + 1)
        return None if contents is None else (tag, contents)

    def _take(self, start: int, end: int) -> bytes | None:
        if len(self._buffer) < end:
            return None
        contents = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return contents
