"""What travels inside CopyData while WAL is streamed.

The constructs are the declarations, in the order and with the names of the PostgreSQL
documentation, chapter "Streaming Replication Protocol".  Building one takes microseconds, so what
is sent or read for every piece of WAL also has a precompiled :class:`struct.Struct` beside it;
a test holds the two against each other.

Times are microseconds since 2000-01-01 00:00 UTC and signed, LSNs unsigned, all big-endian.

One message is not PostgreSQL's: what a Neon pageserver says of itself, ``ZenithFeedback`` in
Neon's ``pq_proto.rs``.  Only :func:`parse_pageserver_message` takes it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import (
    Const,
    Flag,
    FocusedSeq,
    GreedyBytes,
    Int8ub,
    Int32ub,
    Int64sb,
    Int64ub,
    Prefixed,
    PrefixedArray,
    Terminated,
)
from construct import Struct as Declaration

from walproto.errors import ProtocolViolation
from walproto.wire.messages import String

POSTGRES_EPOCH = 946_684_800
"""2000-01-01 00:00 UTC in seconds of the Unix epoch."""

XLogData = Declaration(
    "type" / Const(b"w"),
    "data_start" / Int64ub,
    "wal_end" / Int64ub,
    "send_time" / Int64sb,
    "data" / GreedyBytes,
)
PrimaryKeepalive = Declaration(
    "type" / Const(b"k"), "wal_end" / Int64ub, "send_time" / Int64sb, "reply_requested" / Flag
)
StandbyStatusUpdate = Declaration(
    "type" / Const(b"r"),
    "write_lsn" / Int64ub,
    "flush_lsn" / Int64ub,
    "apply_lsn" / Int64ub,
    "reply_time" / Int64sb,
    "reply_requested" / Flag,
)
HotStandbyFeedback = Declaration(
    "type" / Const(b"h"),
    "reply_time" / Int64sb,
    "xmin" / Int32ub,
    "xmin_epoch" / Int32ub,
    "catalog_xmin" / Int32ub,
    "catalog_xmin_epoch" / Int32ub,
)
ZenithFeedback = Declaration(
    "type" / Const(b"z"),
    "pairs"
    / Prefixed(
        Int64ub,
        FocusedSeq(
            "pairs",
            "pairs"
            / PrefixedArray(
                Int8ub, Declaration("key" / String, "value" / Prefixed(Int32ub, GreedyBytes))
            ),
            Terminated,
        ),
    ),
    Terminated,
)

XLOG_DATA_HEADER = struct.Struct(">cIcQQq")
"""CopyData's type byte and length, then XLogData up to its data: one header, 30 bytes."""

_KEEPALIVE = struct.Struct(">cIcQq?")
_XLOG_DATA = struct.Struct(">QQq")
_PRIMARY_KEEPALIVE = struct.Struct(">QqB")
_STATUS_UPDATE = struct.Struct(">QQQqB")
_FEEDBACK = struct.Struct(">qIIII")
_ZENITH_HEADER = struct.Struct(">QB")
_ZENITH_VALUES = {
    b"current_timeline_size": struct.Struct(">Q"),
    b"ps_writelsn": struct.Struct(">Q"),
    b"ps_flushlsn": struct.Struct(">Q"),
    b"ps_applylsn": struct.Struct(">Q"),
    b"ps_replytime": struct.Struct(">q"),
}
"""The keys of ZenithFeedback, and what their values are packed in."""


def postgres_time(unix_time: float) -> int:
    """Seconds of the Unix epoch as microseconds since 2000-01-01 UTC (``GetCurrentTimestamp``)."""
    return int((unix_time - POSTGRES_EPOCH) * 1_000_000)


def pack_xlog_data_header(
    buffer: bytearray, data_start: int, wal_end: int, send_time: int, size: int
) -> None:
    """Write the header of a CopyData with an XLogData of ``size`` bytes to ``buffer``'s start."""
    XLOG_DATA_HEADER.pack_into(buffer, 0, b"d", size + 29, b"w", data_start, wal_end, send_time)


def keepalive(wal_end: int, send_time: int, reply_requested: bool) -> bytes:
    """A CopyData with a primary keepalive message."""
    return _KEEPALIVE.pack(b"d", 22, b"k", wal_end, send_time, reply_requested)


@dataclass(frozen=True, slots=True)
class StatusUpdate:
    """A standby status update: how far the client is, each the last byte + 1, 0 if unknown."""

    write_lsn: int
    flush_lsn: int
    apply_lsn: int
    reply_time: int
    reply_requested: bool


@dataclass(frozen=True, slots=True)
class Feedback:
    """Hot standby feedback: the oldest transaction IDs a standby still needs, 0 if none."""

    reply_time: int
    xmin: int
    xmin_epoch: int
    catalog_xmin: int
    catalog_xmin_epoch: int


@dataclass(frozen=True, slots=True)
class PageserverFeedback:
    """ZenithFeedback: how far a pageserver is, each the last byte + 1.  What was not said is 0."""

    current_timeline_size: int = 0
    """The logical size of the database in bytes."""
    ps_writelsn: int = 0
    """Up to where it has received WAL."""
    ps_flushlsn: int = 0
    """Up to where it has what became of the WAL on its own disk."""
    ps_applylsn: int = 0
    """Up to where it has that in remote storage: it needs no WAL before it, whatever happens."""
    ps_replytime: int = 0
    """When this was, by the pageserver's clock."""
    unknown_keys: tuple[str, ...] = ()
    """What else it said, and was passed over; cut to 63 bytes, and printable."""


def status_update(update: StatusUpdate) -> bytes:
    """A standby status update, for inside a CopyData."""
    return b"r" + _STATUS_UPDATE.pack(
        update.write_lsn,
        update.flush_lsn,
        update.apply_lsn,
        update.reply_time,
        update.reply_requested,
    )


def hot_standby_feedback(feedback: Feedback) -> bytes:
    """Hot standby feedback, for inside a CopyData."""
    return b"h" + _FEEDBACK.pack(
        feedback.reply_time,
        feedback.xmin,
        feedback.xmin_epoch,
        feedback.catalog_xmin,
        feedback.catalog_xmin_epoch,
    )


def pageserver_feedback(feedback: PageserverFeedback) -> bytes:
    """A pageserver's feedback, for inside a CopyData; without its unknown keys."""
    pairs = b"".join(
        key + b"\0" + value.size.to_bytes(4, "big") + value.pack(getattr(feedback, key.decode()))
        for key, value in _ZENITH_VALUES.items()
    )
    return b"z" + _ZENITH_HEADER.pack(len(pairs) + 1, len(_ZENITH_VALUES)) + pairs


@dataclass(frozen=True, slots=True)
class WalMessage:
    """XLogData: ``data`` is the WAL from ``data_start`` on, of what is there up to ``wal_end``."""

    data_start: int
    wal_end: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A primary keepalive message."""

    wal_end: int
    reply_requested: bool


def parse_primary_message(data: memoryview) -> WalMessage | Keepalive:
    """What a server sent inside CopyData while it streams.

    Raises ProtocolViolation (``XLogWalRcvProcessMsg`` in ``walreceiver.c``).
    """
    kind = bytes(data[:1])
    if kind == b"w" and len(data) >= 25:
        start, end, _ = _XLOG_DATA.unpack_from(data, 1)
        return WalMessage(start, end, data[25:])
    if kind == b"k" and len(data) == 18:
        end, _, requested = _PRIMARY_KEEPALIVE.unpack_from(data, 1)
        return Keepalive(end, bool(requested))
    what = {b"w": "WAL", b"k": "keepalive"}.get(kind)
    raise ProtocolViolation(
        f"invalid {what} message received from primary"
        if what
        else f"invalid replication message type {data[0] if data else 'of none'}"
    )


def parse_standby_message(data: bytes | memoryview) -> StatusUpdate | Feedback:
    """What a client sent inside CopyData while it is streaming.

    Bytes behind the declared ones are ignored, as PostgreSQL does.  Raises ProtocolViolation:
    an ERROR for a message that is too short, FATAL for one of an unknown type
    (``ProcessStandbyMessage`` in ``walsender.c``).
    """
    if not data:
        raise ProtocolViolation("no data left in message")
    try:
        match data[0]:
            case 0x72:
                write, flush, apply, time, requested = _STATUS_UPDATE.unpack_from(data, 1)
                return StatusUpdate(write, flush, apply, time, bool(requested))
            case 0x68:
                return Feedback(*_FEEDBACK.unpack_from(data, 1))
            case unknown:
                raise ProtocolViolation(f'unexpected message type "{chr(unknown)}"', fatal=True)
    except struct.error:
        # PostgreSQL reads field by field, and a byte in other words than an integer.
        lacks_a_byte = data[0] == 0x72 and len(data) == _STATUS_UPDATE.size
        what = "no data" if lacks_a_byte else "insufficient data"
        raise ProtocolViolation(f"{what} left in message") from None


def parse_pageserver_message(
    data: bytes | memoryview,
) -> StatusUpdate | Feedback | PageserverFeedback:
    """What a client sent that may be a pageserver: ZenithFeedback, or as any other client.

    Raises ProtocolViolation as :func:`parse_standby_message` does.  ZenithFeedback must have the
    length that it says, each key that is known once at most, and its value in eight bytes.
    """
    if data[:1] == b"z":
        return _parse_zenith_feedback(bytes(data))
    return parse_standby_message(data)


def _parse_zenith_feedback(data: bytes) -> PageserverFeedback:
    known: dict[str, int] = {}
    unknown: list[str] = []
    try:
        length, count = _ZENITH_HEADER.unpack_from(data, 1)
        position = 1 + _ZENITH_HEADER.size
        end = 9 + length
        if end > len(data):
            raise ProtocolViolation("insufficient data left in message")
        for _ in range(count):
            key_end = data.find(b"\0", position)
            if key_end < 0:
                raise ProtocolViolation("invalid string in message")
            key = data[position:key_end]
            size = int.from_bytes(data[key_end + 1 : key_end + 5], "big")
            position = key_end + 5 + size
            if position > end:
                raise ProtocolViolation("insufficient data left in message")
            value = _ZENITH_VALUES.get(key)
            if value is None:
                unknown.append(repr(key[:63])[2:-1])
                continue
            if size != value.size or key.decode() in known:
                raise ProtocolViolation(f'invalid "{key.decode()}" in pageserver feedback')
            (known[key.decode()],) = value.unpack_from(data, position - size)
    except struct.error:
        raise ProtocolViolation("insufficient data left in message") from None
    if not position == end == len(data):
        raise ProtocolViolation("invalid message format")
    return PageserverFeedback(**known, unknown_keys=tuple(unknown))
