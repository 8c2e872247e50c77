"""The messages of the frontend/backend protocol that a WAL sender speaks.

Each is declared as a construct, in the order and with the names of the PostgreSQL documentation,
chapter "Message Formats"; everything is big-endian.  The declaration is of the message's
contents; the type byte and the length before it are alike for all of them, so
:meth:`Message.build` adds them and :mod:`walproto.wire.framing` takes them off.

What a peer may send also has a limit: the largest message, in bytes and counting the length word,
that is read at all (cf. ``PQ_SMALL_MESSAGE_LIMIT`` and ``PQ_LARGE_MESSAGE_LIMIT`` in
``libpq.h``).  Building raises ValueError for what the format cannot hold, parsing a peer's bytes
raises :class:`~walproto.errors.ProtocolViolation`.

These declarations are never compiled: compiled constructs skip checks on a peer's bytes.  None of
them is on the hot path, see :mod:`walproto.wire.replication` for what is.
"""

from __future__ import annotations

from io import SEEK_CUR
from typing import Any, NamedTuple

from construct import (
    Adapter,
    Bytes,
    Const,
    Construct,
    ConstructError,
    Default,
    GreedyBytes,
    If,
    Int8ub,
    Int16sb,
    Int16ub,
    Int32sb,
    Int32ub,
    PrefixedArray,
    RepeatUntil,
    StreamError,
    Struct,
    Terminated,
    this,
)

from walproto.errors import ProtocolViolation

SMALL_LIMIT = 10_000
"""Bytes: the limit of messages that have no business being large, as in PostgreSQL."""

LARGE_LIMIT = 65_536
"""Bytes: the limit of the others, where PostgreSQL takes 1 GB: no replication command or reply is
nearly as long, and one of this length is read in a moment."""

MAX_STARTUP_PACKET_LENGTH = 10_000
"""Bytes, without the length word (``MAX_STARTUP_PACKET_LENGTH`` in ``pqcomm.h``)."""


class _UntilNul(Construct):  # type: ignore[misc]
    """The bytes before a NUL.  construct's own NullTerminated takes them one by one, in a time that
    grows with the square of their number."""

    def _parse(self, stream: Any, context: Any, path: Any) -> bytes:
        found = bytearray()
        while chunk := stream.read(1024):
            end = chunk.find(b"\0")
            if end >= 0:
                stream.seek(end + 1 - len(chunk), SEEK_CUR)
                return bytes(found + chunk[:end])
            found += chunk
        raise StreamError("a String does not end", path=path)

    def _build(self, obj: bytes, stream: Any, context: Any, path: Any) -> bytes:
        stream.write(obj + b"\0")
        return obj


class _Text(Adapter):  # type: ignore[misc]
    """Bytes as str.  What is not UTF-8 survives a round trip; NUL cannot be in it."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> str:
        return obj.decode("utf-8", "surrogateescape")

    def _encode(self, obj: str, context: Any, path: Any) -> bytes:
        if "\0" in obj:
            raise ConstructError("a String cannot hold a NUL")
        return obj.encode("utf-8", "surrogateescape")


class Parameter(NamedTuple):
    """One of a StartupMessage."""

    name: str
    value: str


class _Parameters(Construct):  # type: ignore[misc]
    """Pairs of Strings up to an empty one.  construct's own means take fifty times as long, and
    anybody may send thousands of them, before it is known who that is."""

    def _parse(self, stream: Any, context: Any, path: Any) -> list[Parameter]:
        start = stream.tell()
        *strings, _ = stream.read().decode("utf-8", "surrogateescape").split("\0")
        pairs = list(zip(strings[::2], strings[1::2], strict=False))
        names = strings[::2]
        if "" not in names:
            raise StreamError("the parameters do not end", path=path)
        found = [Parameter(*pair) for pair in pairs[: names.index("")]]
        stream.seek(start + len(self._encoded(found)))
        return found

    def _build(self, obj: Any, stream: Any, context: Any, path: Any) -> Any:
        stream.write(self._encoded(obj))
        return obj

    @staticmethod
    def _encoded(parameters: Any) -> bytes:
        text = "".join(f"{name}\0{value}\0" for name, value in parameters) + "\0"
        return text.encode("utf-8", "surrogateescape")


class _Nullable(Adapter):  # type: ignore[misc]
    """A DataRow's column: bytes with their length before them, or None with -1."""

    def _decode(self, obj: Any, context: Any, path: Any) -> bytes | None:
        value: bytes | None = obj.value
        return value

    def _encode(self, obj: bytes | None, context: Any, path: Any) -> dict[str, Any]:
        return {"length": -1 if obj is None else len(obj), "value": obj}


String = _Text(_UntilNul())
Column = _Nullable(Struct("length" / Int32sb, "value" / If(this.length >= 0, Bytes(this.length))))
Frame = Struct("type" / Bytes(1), "length" / Int32ub, "contents" / GreedyBytes)


class Message:
    """One message: its name in the documentation, its type byte, its contents, its limit."""

    def __init__(self, name: str, tag: bytes, *fields: Construct, limit: int = 0) -> None:
        self.name = name
        self.tag = tag
        self.limit = limit
        self.contents = Struct(*fields, Terminated)

    def build(self, **values: Any) -> bytes:
        """The whole message; ValueError if the values do not fit the format."""
        try:
            contents = self.contents.build(values)
        except ConstructError as error:
            raise ValueError(f"{self.name}: {error}") from error
        message: bytes = Frame.build(
            {"type": self.tag, "length": len(contents) + 4, "contents": contents}
        )
        return message

    def parse(self, contents: bytes) -> Any:
        """The values in a message's contents; ProtocolViolation if they are not as declared."""
        try:
            return self.contents.parse(contents)
        except ConstructError as error:
            raise ProtocolViolation("invalid message format") from error


class _Password(Message):
    """A password, which has errors of its own (``recv_password_packet`` in ``auth.c``)."""

    def parse(self, contents: bytes) -> Any:
        try:
            return super().parse(contents)
        except ProtocolViolation:
            raise ProtocolViolation("invalid password packet size", fatal=True) from None


# --- From the backend: what we send -------------------------------------------------------------

AuthenticationCleartextPassword = Message(
    "AuthenticationCleartextPassword", b"R", "status" / Const(3, Int32ub)
)
AuthenticationOk = Message("AuthenticationOk", b"R", "status" / Const(0, Int32ub))
AuthenticationSASL = Message(
    "AuthenticationSASL",
    b"R",
    "status" / Const(10, Int32ub),
    "mechanisms" / RepeatUntil(lambda name, *_: name == "", String),
)
AuthenticationSASLContinue = Message(
    "AuthenticationSASLContinue", b"R", "status" / Const(11, Int32ub), "data" / GreedyBytes
)
AuthenticationSASLFinal = Message(
    "AuthenticationSASLFinal", b"R", "status" / Const(12, Int32ub), "data" / GreedyBytes
)
BackendKeyData = Message("BackendKeyData", b"K", "process_id" / Int32ub, "secret_key" / GreedyBytes)
CommandComplete = Message("CommandComplete", b"C", "command_tag" / String)
CopyDone = Message("CopyDone", b"c", limit=SMALL_LIMIT)  # from the frontend, too
CopyBothResponse = Message(
    "CopyBothResponse",
    b"W",
    "format" / Default(Int8ub, 0),
    "column_formats" / Default(PrefixedArray(Int16ub, Int16ub), []),
)
DataRow = Message("DataRow", b"D", "columns" / PrefixedArray(Int16ub, Column))
ErrorField = Struct("type" / Bytes(1), "value" / If(this.type != b"\0", String))
ErrorResponse = Message(
    "ErrorResponse",
    b"E",
    "fields" / RepeatUntil(lambda field, *_: field["type"] == b"\0", ErrorField),
)
NegotiateProtocolVersion = Message(
    "NegotiateProtocolVersion",
    b"v",
    "newest_version" / Int32ub,
    "unrecognized_options" / PrefixedArray(Int32ub, String),
)
ParameterStatus = Message("ParameterStatus", b"S", "name" / String, "value" / String)
ReadyForQuery = Message("ReadyForQuery", b"Z", "transaction_status" / Const(b"I"))
Field = Struct(
    "name" / String,
    "table_oid" / Default(Int32ub, 0),
    "attribute_number" / Default(Int16ub, 0),
    "type_oid" / Int32ub,
    "type_size" / Int16sb,
    "type_modifier" / Default(Int32sb, -1),
    "format_code" / Default(Int16ub, 0),
)
RowDescription = Message("RowDescription", b"T", "fields" / PrefixedArray(Int16ub, Field))


def asks_for_sasl(message: bytes) -> bool:
    """Whether a whole message asks the frontend for a SASLInitialResponse or SASLResponse."""
    return message[:1] == b"R" and message[5:9] in (b"\0\0\0\x0a", b"\0\0\0\x0b")


# --- From the frontend: what we are sent, behind the startup packet ------------------------------
# The extended query protocol and function calls are refused whatever they hold.

Bind = Message("Bind", b"B", "contents" / GreedyBytes, limit=LARGE_LIMIT)
Close = Message("Close", b"C", "contents" / GreedyBytes, limit=SMALL_LIMIT)
CopyData = Message("CopyData", b"d", "data" / GreedyBytes, limit=LARGE_LIMIT)
CopyFail = Message("CopyFail", b"f", "reason" / String, limit=SMALL_LIMIT)
Describe = Message("Describe", b"D", "contents" / GreedyBytes, limit=SMALL_LIMIT)
Execute = Message("Execute", b"E", "contents" / GreedyBytes, limit=SMALL_LIMIT)
Flush = Message("Flush", b"H", limit=SMALL_LIMIT)
FunctionCall = Message("FunctionCall", b"F", "contents" / GreedyBytes, limit=LARGE_LIMIT)
Parse = Message("Parse", b"P", "contents" / GreedyBytes, limit=LARGE_LIMIT)
PasswordMessage = Message(
    "PasswordMessage", b"p", "data" / GreedyBytes, limit=65_535
)  # also SASLInitialResponse, SASLResponse and GSSResponse: the method decides
Query = Message("Query", b"Q", "query" / String, limit=LARGE_LIMIT)
Sync = Message("Sync", b"S", limit=SMALL_LIMIT)
Terminate = Message("Terminate", b"X", limit=SMALL_LIMIT)

# What PasswordMessage holds, by method; of SASLResponse, all of it is data.
CleartextPassword = _Password("PasswordMessage", b"p", "password" / String)
SASLInitialResponse = Message(
    "SASLInitialResponse",
    b"p",
    "mechanism" / String,
    "length" / Int32sb,
    "data" / If(this.length != -1, Bytes(this.length)),
)

FRONTEND: dict[bytes, Message] = {
    message.tag: message
    for message in (
        Bind,
        Close,
        CopyData,
        CopyDone,
        CopyFail,
        Describe,
        Execute,
        Flush,
        FunctionCall,
        Parse,
        PasswordMessage,
        Query,
        Sync,
        Terminate,
    )
}
"""Every message that a frontend may send once it has started up, by its type byte."""

# --- From the frontend: the startup packet, which has no type byte -------------------------------

PROTOCOL_3_0 = 3 << 16
PROTOCOL_3_2 = 3 << 16 | 2
"""The newest protocol version we speak (PostgreSQL 18)."""
CANCEL_REQUEST_CODE = 1234 << 16 | 5678
SSL_REQUEST_CODE = 1234 << 16 | 5679
GSSENC_REQUEST_CODE = 1234 << 16 | 5680

StartupCode = Struct("code" / Int32ub)
CancelRequest = Struct(
    "code" / Const(CANCEL_REQUEST_CODE, Int32ub),
    "process_id" / Int32ub,
    "secret_key" / GreedyBytes,
)
SSLRequest = Struct("code" / Const(SSL_REQUEST_CODE, Int32ub), Terminated)
GSSENCRequest = Struct("code" / Const(GSSENC_REQUEST_CODE, Int32ub), Terminated)
StartupMessage = Struct(
    "protocol_version" / Int32ub,
    "parameters" / _Parameters(),
    Terminated,
)
