"""Reads what a server sends, message by message and each to its last byte.

Written from the PostgreSQL documentation, chapter "Message Formats", and not from
:mod:`walproto.wire`: that is what is being tested.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any


class Malformed(AssertionError):
    """No server sends this."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Malformed(what)


class Contents:
    """A message's contents, taken from their beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, size: int) -> bytes:
        require(0 <= size <= len(self._data), "a message is too short")
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "big", signed=signed)

    def string(self) -> str:
        value, nul, self._data = self._data.partition(b"\0")
        require(nul, "a string does not end")
        return value.decode("utf-8", "surrogateescape")

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def end(self) -> None:
        require(not self._data, "there is more in a message than it holds")


def _authentication(contents: Contents) -> object:
    kind = contents.number(4)
    if kind == 10:
        methods = []
        while method := contents.string():
            methods.append(method)
        require(methods, "no mechanism is offered")
        return kind, methods
    if kind in (11, 12):
        return kind, contents.rest()
    require(kind in (0, 3), f"authentication request {kind}")
    return kind, b""


def _error(contents: Contents) -> dict[str, str]:
    fields: dict[str, str] = {}
    while (code := contents.take(1)) != b"\0":
        require(code.isalpha() and code.decode() not in fields, f"error field {code!r}")
        fields[code.decode()] = contents.string()
    require({"S", "V", "C", "M"} <= set(fields), "an error lacks a field")
    require(fields["S"] == fields["V"] in ("ERROR", "FATAL"), "an error's severity")
    return fields


def _columns(contents: Contents) -> list[str]:
    names = []
    for _ in range(contents.number(2)):
        names.append(contents.string())
        table, attribute, kind, size, _, code = struct.unpack(">IHIhiH", contents.take(18))
        require(table == attribute == code == 0 and kind and size, "a column")
    return names


def _row(contents: Contents) -> list[bytes | None]:
    values: list[bytes | None] = []
    for _ in range(contents.number(2)):
        size = contents.number(4, signed=True)
        values.append(None if size == -1 else contents.take(size))
    return values


def _copy_data(contents: Contents) -> tuple[bytes, int, int, bytes]:
    kind = contents.take(1)
    if kind == b"w":
        start, end, _ = struct.unpack(">QQq", contents.take(24))
        data = contents.rest()
        require(data, "WAL of no bytes")
        return kind, start, end, data
    require(kind == b"k", "what is streamed is neither WAL nor a keepalive")
    end, _, reply = struct.unpack(">QqB", contents.take(17))
    require(reply in (0, 1), "a keepalive's flag")
    return kind, end, reply, b""


def _key(contents: Contents) -> tuple[int, bytes]:
    pid, key = contents.number(4), contents.rest()
    require(pid and len(key) in (4, 32), "a cancellation key")
    return pid, key


def _negotiation(contents: Contents) -> tuple[int, list[str]]:
    version, count = contents.number(4), contents.number(4)
    require(version >> 16 == 3, "a protocol version")
    return version, [contents.string() for _ in range(count)]


def _copy_both(contents: Contents) -> None:
    require(contents.rest() == b"\0\0\0", "CopyBothResponse")


def _ready(contents: Contents) -> None:
    require(contents.rest() == b"I", "ReadyForQuery")


_PARSERS: dict[bytes, Callable[[Contents], Any]] = {
    b"R": _authentication,
    b"E": _error,
    b"T": _columns,
    b"D": _row,
    b"C": Contents.string,
    b"d": _copy_data,
    b"c": lambda contents: None,
    b"K": _key,
    b"S": lambda contents: (contents.string(), contents.string()),
    b"v": _negotiation,
    b"W": _copy_both,
    b"Z": _ready,
}


def parse_messages(data: bytes, *, may_be_cut: bool = False) -> Iterator[tuple[bytes, Any]]:
    """The messages of a server: each its type byte, and what is in it.  Raises Malformed.

    With ``may_be_cut`` the last one need not be whole.
    """
    position = 0
    while position < len(data):
        tag = data[position : position + 1]
        require(tag in _PARSERS, f"a message of type {tag!r}")
        header = data[position + 1 : position + 5]
        size = int.from_bytes(header, "big")
        end = position + 1 + size
        if len(header) < 4 or end > len(data):
            require(may_be_cut, "the last message is not whole")
            return
        require(size >= 4, "a message's length")
        contents = Contents(data[position + 5 : end])
        value = _PARSERS[tag](contents)
        contents.end()
        yield tag, value
        position = end


def check_conversation(data: bytes, *, may_be_cut: bool = False) -> bool:
    """That a server may say this on one connection, from its beginning to its end; whether the
    client is let in by it."""
    refusals = 0
    while data[:1] == b"N" and refusals < 2:  # encryption, of either kind
        data, refusals = data[1:], refusals + 1
    streams = greeted = ended = authenticated = False
    kinds: list[int] = []
    next_lsn: int | None = None
    columns = 0
    for tag, value in parse_messages(data, may_be_cut=may_be_cut):
        require(not ended, f"{tag!r} comes behind the end")
        require(authenticated or tag in b"REv", f"{tag!r} is for one who is authenticated")
        if tag == b"d":
            require(streams, "CopyData comes outside of a stream")
            kind, start, end, wal = value
            if kind == b"w":
                require(next_lsn in (None, start), "WAL is missing or doubled")
                next_lsn = start + len(wal)
                require(next_lsn <= end, "WAL goes on behind its end")
        elif tag == b"W":
            require(greeted and not streams, "a stream begins within one")
            streams, next_lsn = True, None
        elif tag == b"R":
            require(not authenticated, "authentication goes on behind its end")
            kinds.append(value[0])
            authenticated = value[0] == 0
            require(not authenticated or kinds[0] != 10 or kinds[-2] == 12, "no last SCRAM message")
        elif tag == b"Z":
            require(not streams, "ReadyForQuery comes within a stream")
            greeted = True
        elif tag == b"T":
            columns = len(value)
        elif tag == b"D":
            require(len(value) == columns, "a row has not as many values as there are columns")
        if tag in (b"c", b"E", b"C"):
            streams = False
        ended = tag == b"E" and value["S"] == "FATAL"
    return authenticated
