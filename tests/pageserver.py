"""What a pageserver does when it receives WAL, written by hand: sockets, struct, and no walproto.

A `Connection` speaks as much of the protocol as replication takes, and a `Pageserver` does on it
what Neon's walreceiver.rs does.
Every read gives up after `TIMEOUT` seconds or `PATIENCE` keepalives, so that whatever does not come
fails a test.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from typing import Self

from tests.postgres import HOST, int_to_lsn, lsn_to_int
from tests.wal_decoder import Decoder

TIMEOUT = 30.0
PATIENCE = 20
"""Keepalives without anything in between, such as come once a second, that are put up with."""
_ENDED = re.compile("ending streaming to .*pageserver")
EPOCH = 946_684_800
"""2000-01-01 UTC, in seconds of the Unix epoch."""


class ServerError(Exception):
    """An ErrorResponse; `text` is the message alone, `str` is all of it."""

    def __init__(self, contents: bytes) -> None:
        strings = contents.decode("utf-8", "replace").split("\0")
        fields = {field[0]: field[1:] for field in strings if field}
        super().__init__(
            " | ".join([f"{fields['S']} {fields['C']}: {fields['M']}"])
            + "".join(f" | {key}: {fields[key]}" for key in "DH" if key in fields)
        )
        self.code = fields["C"]
        self.severity = fields["S"]
        self.text = fields["M"]


class StreamEnded(ServerError):
    """All that is committed was received, and there will be no more for now."""


class Gone(Exception):
    """The server has closed the connection without another word."""


class Connection:
    """A replication connection, which is greeted when this returns."""

    def __init__(self, port: int, options: str = "", host: str = HOST, **parameters: str) -> None:
        self.socket = self.connect(host, port)
        self._unread = b""
        named = {"user": "no_user", "replication": "true", "options": options} | parameters
        strings = [text for pair in named.items() if pair[1] for text in pair]
        packet = b"".join(text.encode() + b"\0" for text in strings) + b"\0"
        self.socket.sendall(struct.pack(">II", len(packet) + 8, 3 << 16) + packet)
        try:
            while self.message()[0] != b"Z":
                pass
        except BaseException:
            self.close()
            raise

    def connect(self, host: str, port: int) -> socket.socket:
        return socket.create_connection((host, port), TIMEOUT)

    def send(self, tag: bytes, contents: bytes = b"") -> None:
        self.socket.sendall(tag + struct.pack(">I", len(contents) + 4) + contents)

    def message(self) -> tuple[bytes, bytes]:
        """The next message, its tag and its contents.  Raises ServerError if it is an error, Gone
        if there is none."""
        tag, size = struct.unpack(">cI", self._read(5))
        contents = self._read(size - 4)
        if tag == b"E":
            error = ServerError(contents)
            raise StreamEnded(contents) if _ENDED.match(error.text) else error
        return tag, contents

    def _read(self, size: int) -> bytes:
        while len(self._unread) < size:
            try:
                data = self.socket.recv(2**17)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Gone
            self._unread += data
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def query(self, text: str) -> list[list[str]]:
        """The rows that a command gives."""
        self.send(b"Q", text.encode() + b"\0")
        return self.rows()

    def rows(self) -> list[list[str]]:
        """The rows of the answer that comes next, up to ReadyForQuery."""
        rows = []
        while (message := self.message())[0] != b"Z":
            if message[0] == b"D":
                rows.append(_values(message[1]))
        return rows

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def _values(contents: bytes) -> list[str]:
    values, position = [], 2
    for _ in range(int.from_bytes(contents[:2], "big")):
        (size,) = struct.unpack_from(">i", contents, position)
        position += 4
        values.append(contents[position : position + max(size, 0)].decode())
        position += max(size, 0)
    return values


class Receiver(Connection):
    """A connection on which WAL arrives; `wal` is all of it, from `start` on without a gap."""

    def begin(self, start: int, command: str = "START_REPLICATION PHYSICAL {}") -> None:
        self.ask(start, command)
        self.await_stream()

    def ask(self, start: int, command: str = "START_REPLICATION PHYSICAL {}") -> None:
        self.start = start
        self.wal = bytearray()
        self.furthest_end = 0
        """The largest LSN that the server has mentioned."""
        self._keepalives = 0
        self.send(b"Q", command.format(int_to_lsn(start)).encode() + b"\0")

    def await_stream(self) -> None:
        """Wait until the server has answered that it streams."""
        assert self.message() == (b"W", b"\0\0\0")

    @property
    def lsn(self) -> int:
        return self.start + len(self.wal)

    def take(self) -> str:
        """Take one message: "wal", "keepalive", "question" (which is a keepalive, and asks for a
        reply), or "done" (CopyDone)."""
        tag, contents = self.message()
        if tag == b"c":
            return "done"
        assert tag == b"d", (tag, contents[:100])
        if contents[:1] == b"w":
            start, end = struct.unpack_from(">QQ", contents, 1)
            data = contents[25:]
            assert start == self.lsn
            assert data
            self.furthest_end = max(self.furthest_end, end, start + len(data))
            self.wal += data
            self._keepalives = 0
            self.took(data)
            return "wal"
        kind, end, _, reply = struct.unpack(">cQqB", contents)
        assert kind == b"k"
        self.furthest_end = max(self.furthest_end, end)
        self._keepalives += 1
        assert self._keepalives <= PATIENCE, "nothing comes"
        if reply:
            self.asked()
        return "question" if reply else "keepalive"

    def take_to(self, lsn: int) -> None:
        while self.lsn < lsn:
            assert self.take() != "done"

    def take_all(self) -> None:
        """Take what comes until the server ends it: with CopyDone, or with an error that is
        raised."""
        while self.take() != "done":
            pass

    def took(self, data: bytes) -> None:
        """What it does when WAL has arrived."""

    def asked(self) -> None:
        """What it does when it is asked for a reply."""


class Standby(Receiver):
    """It confirms what it has as PostgreSQL's walreceiver does."""

    def asked(self) -> None:
        now = int((time.time() - EPOCH) * 1e6)
        self.send(b"d", struct.pack(">cQQQqB", b"r", self.lsn, self.lsn, 0, now, 0))

    def took(self, data: bytes) -> None:
        self.asked()


class Pageserver(Receiver):
    """A pageserver: it decodes WAL as that arrives, and tells how far it is after each message.

    With `is_slow` it says nothing: it has received something, and is not done with it.
    """

    def __init__(
        self,
        port: int,
        tenant_id: str,
        timeline_id: str,
        connstr: str = "postgresql://no_user:@localhost:64000",
        /,
        **more: str,
    ) -> None:
        options = f"-c ztimelineid={timeline_id} ztenantid={tenant_id} pageserver_connstr={connstr}"
        defaults = {"options": options, "application_name": "pageserver", "client_encoding": "UTF8"}
        self.is_slow = False
        self.decoder = Decoder(0)
        super().__init__(port, **(defaults | more))

    def follow(self, last_record_end: int, zeros_to: int = 0) -> tuple[str, int, int]:
        """Begin as a pageserver does that has decoded WAL up to there; what IDENTIFY_SYSTEM gave:
        system identifier, PostgreSQL timeline, LSN."""
        ((system, timeline, lsn, _),) = self.query("IDENTIFY_SYSTEM")
        self.decoder = Decoder(last_record_end, zeros_to)
        self.begin(self.decoder.lsn)
        return system, int(timeline), lsn_to_int(lsn)

    def took(self, data: bytes) -> None:
        self.decoder.feed(data)
        self.asked()

    def asked(self) -> None:
        if not self.is_slow:
            self.tell(self.lsn)

    def tell(self, lsn: int) -> None:
        """Send what zenith_status_update sends: "I am there"."""
        values = {
            "current_timeline_size": 8_000_000,
            "ps_writelsn": lsn,
            "ps_flushlsn": self.start,
            "ps_applylsn": 0,
            "ps_replytime": int((time.time() - EPOCH) * 1e6),
        }
        pairs = b"".join(
            key.encode() + b"\0" + struct.pack(">IQ", 8, value) for key, value in values.items()
        )
        feedback = struct.pack(">B", len(values)) + pairs
        self.send(b"d", b"z" + struct.pack(">Q", len(feedback)) + feedback)

    def expect_end(self) -> None:
        """Go on until the server says that it ends the stream."""
        try:
            self.take_all()
        except StreamEnded:
            return
        raise AssertionError("CopyDone")
