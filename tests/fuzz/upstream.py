"""Target: what a server says to a relay, from who it is to the WAL that it streams.

The server is :class:`tests.upstream_fakes.Upstream`, which knows how to answer; an input says where
it does so, and where it says something else.  The directory is real, though in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from tests.fuzz.target import Input, Target, string
from tests.slots_fakes import quick_directory
from tests.test_conversation import Talk
from tests.upstream_fakes import Upstream, keepalive, wal_message
from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.timeline import received
from walproto.upstream.connection import Answer, Row, UpstreamError
from walproto.upstream.conversation import Refusal

START = 16 * MB
STATES = ("", "58P01", "55000", "42710", "XX000")
WAITS = (0.0, 0.5, 1.0, 31.0, 61.0)


class Written(WalBuilder):
    """WAL that is written, and does not change any more."""

    def __init__(self, wal: WalBuilder) -> None:
        self.__dict__ |= wal.__dict__
        self._image = wal.image

    @property
    def image(self) -> bytes:
        return self._image


def _wal() -> WalBuilder:
    wal = WalBuilder(start=START)
    wal.records_to(START + MB + 5 * PAGE, 3000)
    return wal


def _promoted() -> WalBuilder:
    wal = WAL.fork(2, WAL.records[-4])
    wal.records_to(wal.lsn + 3 * PAGE, 900)
    return wal


WAL = Written(_wal())
PROMOTED = Written(_promoted())


class Scripted:
    """A conversation whose server does what an input says."""

    def __init__(self, directory: Path, source: Input) -> None:
        self.source = source
        self.talk = Talk(directory, WAL)
        flags = source.number()
        self.talk.options["timeout"] = 60.0 if flags & 1 else 0.0
        self.talk.options["start_lsn"] = START + MB if flags & 2 else 0
        self.talk.options["feedback"] = bool(flags & 4)
        if flags & 8:
            self.talk.options |= {"slot": "s", "create_slot": bool(flags & 16)}
        self._begin()

    def _begin(self) -> None:
        upstream = self.talk.upstream
        self._honest = upstream.answer
        upstream.connection._answer = self._answer
        self.talk.start()

    def _answer(self, command: str) -> Answer | UpstreamError | None:
        if not self.source:
            return None
        match self.source.number() % 8:
            case 1:
                return Answer(self._rows(), is_streaming=bool(self.source.number() & 1))
            case 2:
                return UpstreamError("no", STATES[self.source.number() % len(STATES)])
            case 3:
                return None
            case _:
                return self._honest(command)

    def _rows(self) -> list[Row]:
        return [
            [self.source.string() if self.source.number() & 1 else None for _ in range(columns)]
            for columns in self.source.take(self.source.number() % 4)
        ]

    def go_on(self) -> None:
        """The next thing that happens."""
        source, upstream, clock = self.source, self.talk.upstream, self.talk.clock
        connection = upstream.connection
        match source.number() % 9:
            case 0:
                upstream.stream(START + source.number(3), PAGE << source.number() % 5)
            case 1:
                at = min(upstream._position, WAL.lsn - 1)
                data = bytearray(WAL.image[at - START :][: 3 * PAGE])
                where, put = source.number(2) % len(data), source.take(source.number() % 32)
                data[where : where + len(put)] = put
                connection.deliver(wal_message(at, bytes(data)))
            case 2:
                connection.deliver(source.string())
            case 3:
                connection.end(self._rows())
            case 4:
                connection.fail(UpstreamError("no", STATES[source.number() % len(STATES)]))
            case 5:
                clock.advance(WAITS[source.number() % len(WAITS)])
            case 6:
                connection.deliver(keepalive(source.number(4), source.number() & 1))
            case 7:
                upstream.promote(PROMOTED)
            case _:
                if self.talk.outcome:
                    self.talk.upstream = Upstream(clock, PROMOTED if source.number() & 1 else WAL)
                    self._begin()
        self.talk.asked()

    def check(self) -> None:
        """What must always be so."""
        talk = self.talk
        if talk.outcome:
            assert isinstance(talk.ended, UpstreamError | Refusal), repr(talk.ended)
            assert str(talk.ended)
        assert not talk.stored.failures
        store = talk.store
        # What is received may begin anew further back, at the start of a timeline's segment.
        assert store.proven_lsn <= store.flush_lsn <= store.written_lsn
        talk.told()  # asserts that a server takes it


def _sparse(fd: int, offset: int, size: int) -> None:
    """Have a file of this size that takes no room: of 1 GB, if a server says so."""
    os.truncate(fd, offset + size)


def check_upstream(data: bytes) -> None:
    """A conversation goes on or ends with an error of ours, whatever the server says."""
    with (
        quick_directory() as name,
        mock.patch.object(os, "posix_fallocate", _sparse),
        mock.patch.object(received, "RECENT_SIZE", 8 * PAGE),  # 4 MB take a while
    ):
        scripted = Scripted(Path(name), Input(data))
        try:
            while scripted.source:
                scripted.go_on()
                scripted.check()
        finally:
            scripted.talk.close()
        scripted.check()


def _seeds() -> list[bytes]:
    def rows(*found: list[bytes | None]) -> bytes:
        cells = b"".join(
            b"\0" if cell is None else b"\1" + string(cell) for row in found for cell in row
        )
        return bytes([len(found), *map(len, found)]) + cells

    identity: list[bytes | None] = [b"%d" % WAL.system, b"1", b"0/1100000", None]
    stream = b"\0\xff\xff\xff\3"
    return [
        b"\0\0\0\0" + stream + b"\6\0\0\0\0\1" + b"\5\2",
        b"\2\0\0\0" + b"\0\x0f\0\0\2" + b"\7" + stream + b"\3" + rows() + b"\0\0\0\0\0",
        b"\x1d\0\0\0\0\0\0" + stream + b"\5\3\5\3\5\4",
        b"\0\1" + rows(identity) + b"\0\1" + rows([b"1MB"]) + b"\0\0" + stream + b"\4\1",
        b"\0\1" + rows([b"7", b"2", b"0/3000000", None]) + b"\0\1" + rows([b"16MB"]) + b"\0"
        b"\1" + rows([b"00000002.history", b"1\t0/2000000\tx"]) + b"\0\0\0",
        b"\0\0\0\0" + b"\1\0\0\4abcd" + b"\2" + string(wal_message(START, WAL.image[:100])),
        b"\0\0\0\0" + b"\2" + string(keepalive(START, 1)) + b"\4\1" + b"\x08\0\0\0\0" + stream,
    ]


TARGETS = (
    Target(
        "upstream",
        check_upstream,
        _seeds,
        (b"0/1100000", b"1MB", b"16MB", b"1GB", b"%d" % WAL.system, b"2\0", b"1\t0/1100000"),
        size=1024,
    ),
)
