# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: bytes into messages, and messages into values."""

from __future__ import annotations

import struct

from tests.fakes import message
from tests.fuzz import seeds
from tests.fuzz.target import Input, Target, check_told, raw, text
from walproto.errors import CommandSyntaxError, ProtocolViolation, ReportedError
from walproto.wire.commands import (
    AlterReplicationSlot,
    CreateReplicationSlot,
    DropReplicationSlot,
    ReadReplicationSlot,
    Sql,
    StartLogicalReplication,
    StartReplication,
    TimelineHistory,
    parse_command,
)
from walproto.wire.framing import Framing
from walproto.wire.messages import FRONTEND, LARGE_LIMIT, PROTOCOL_3_0, PROTOCOL_3_2
from walproto.wire.replication import (
    Feedback,
    PageserverFeedback,
    StatusUpdate,
    WalMessage,
    hot_standby_feedback,
    pageserver_feedback,
    parse_pageserver_message,
    parse_primary_message,
    parse_standby_message,
    status_update,
)
from walproto.wire.startup import Startup, parse_startup_packet

# --- Startup packets -----------------------------------------------------------------------------


def check_startup(data: bytes) -> None:
    """A startup packet asks for something that can be asked for once more in our own words."""
    if len(data) < 4:
        return  # it has not come through the framing
    for newest in (PROTOCOL_3_0, PROTOCOL_3_2):
        try:
            startup = parse_startup_packet(data, newest)
        except ReportedError as error:
            assert error.fatal
            check_told(error)
            continue
        if isinstance(startup, Startup):
            again = parse_startup_packet(_startup_packet(data[:4], startup), newest)
            assert isinstance(again, Startup)
            fields = ("user", "database", "replication", "options", "parameters", "long_keys")
            for field in fields:
                assert getattr(again, field) == getattr(startup, field), field


def _startup_packet(version: bytes, startup: Startup) -> bytes:
    pairs = [
        ("user", startup.user),
        ("database", startup.database),
        ("options", startup.options),
        ("replication", str(startup.replication).lower()),
        *startup.parameters,
    ]
    strings = b"".join(raw(string) + b"\0" for pair in pairs for string in pair)
    return version + strings + b"\0"


def _other_startups() -> list[bytes]:
    return [
        *seeds.startup_packets(),
        struct.pack(">I", 80877103),
        struct.pack(">I", 80877104),
        struct.pack(">II4s", 80877102, 7, b"abcd"),
        b"\0\3\0\2user\0a\0replication\0on\0_pq_.x\0y\0options\0-c a.b=c\0\0",
    ]


# --- Framing -------------------------------------------------------------------------------------


def check_framing(data: bytes) -> None:
    """However it is cut, the same comes out, and little is held."""
    source = Input(data)
    has_startup = bool(source.number() & 1)
    sizes = [source.number() + 1 for _ in range(4)]
    stream = source.rest()
    whole = _frames([stream], has_startup)
    pieces: list[bytes] = []
    position = 0
    while position < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[position : position + size])
        position += size
    assert _frames(pieces, has_startup) == whole
    frames, end, left = whole
    sent = [contents if tag is None else message(tag, contents) for tag, contents in frames]
    if has_startup and sent:
        sent[0] = (len(sent[0]) + 4).to_bytes(4, "big") + sent[0]
    assert stream.startswith(b"".join(sent))
    if not end:
        assert left == len(stream) - sum(map(len, sent))


Frames = tuple[list[tuple[bytes | None, bytes]], str, int]


def _frames(pieces: list[bytes], has_startup: bool) -> Frames:
    """What comes out, the error that ended it, and how many bytes are left if none did."""
    framing = Framing()
    frames: list[tuple[bytes | None, bytes]] = []
    for piece in pieces:
        framing.receive(piece)
        try:
            while True:
                if has_startup and not frames:
                    packet = framing.next_startup_packet()
                    if packet is None:
                        break
                    assert 4 <= len(packet) <= 10_000
                    frames.append((None, packet))
                    continue
                found = framing.next_message()
                if found is None:
                    break
                tag, contents = found
                assert len(contents) + 4 <= FRONTEND[tag].limit
                frames.append(found)
        except ProtocolViolation as error:
            assert error.fatal
            check_told(error)
            return frames, error.message, 0
        assert len(framing) <= LARGE_LIMIT
    return frames, "", len(framing)


def _framing_seeds() -> list[bytes]:
    found = []
    for one in seeds.recordings():
        data = b"".join(one.asks)
        if data.startswith(struct.pack(">II", 8, 80877103)):
            data = data[8:]
        found += [b"\1\7\0\377\20" + data[:2000], b"\1\377\377\377\377" + data]
    return found


# --- Messages ------------------------------------------------------------------------------------


def check_messages(data: bytes) -> None:
    """Any message of a frontend, and what it holds, built again."""
    declared = FRONTEND.get(data[:1])
    if declared is None:
        return
    try:
        parsed = declared.parse(data[1:])
    except ProtocolViolation as error:
        check_told(error)
        return
    values = {name: value for name, value in parsed.items() if name != "_io"}
    assert declared.build(**values) == message(data[:1], data[1:])


# --- Commands ------------------------------------------------------------------------------------

_NAMED = (
    CreateReplicationSlot,
    ReadReplicationSlot,
    AlterReplicationSlot,
    DropReplicationSlot,
    StartReplication,
    StartLogicalReplication,
)


def check_commands(data: bytes) -> None:
    """A command has what its grammar allows, or is refused."""
    major = 13 + data[0] % 7 if data else 18
    command_text = text(data[1:])
    try:
        command = parse_command(command_text, major)
    except CommandSyntaxError as error:
        assert not error.fatal
        check_told(error)
        return
    if isinstance(command, Sql):
        assert command.text == command_text
    if isinstance(command, StartReplication | StartLogicalReplication):
        assert 0 <= command.start_lsn < 1 << 64
    if isinstance(command, StartReplication | TimelineHistory):
        assert command.tli is None or 0 < command.tli < 1 << 32
    if isinstance(command, _NAMED) and command.slot is not None:
        assert len(raw(command.slot)) < 64
    if isinstance(command, StartReplication):
        quoted = (command.slot or "").replace('"', '""')
        slot = "" if command.slot is None else f'SLOT "{quoted}" '
        tli = "" if command.tli is None else f" TIMELINE {command.tli}"
        lsn = f"{command.start_lsn >> 32:X}/{command.start_lsn & 0xFFFFFFFF:X}"
        if command.slot != "":
            assert parse_command(f"START_REPLICATION {slot}{lsn}{tli};", 18) == command


_WORDS = """
    IDENTIFY_SYSTEM BASE_BACKUP START_REPLICATION CREATE_REPLICATION_SLOT READ_REPLICATION_SLOT
    DROP_REPLICATION_SLOT ALTER_REPLICATION_SLOT TIMELINE_HISTORY SHOW UPLOAD_MANIFEST
    EXPORT_SNAPSHOT NOEXPORT_SNAPSHOT USE_SNAPSHOT RESERVE_WAL TWO_PHASE SLOT LOGICAL PHYSICAL
    TIMELINE TEMPORARY WAIT (a'b',c ,1) "a""b" 0/3000000
"""
COMMAND_WORDS = tuple(b" %b " % word.encode() for word in _WORDS.split())


def _command_seeds() -> list[bytes]:
    more = [
        b"CREATE_REPLICATION_SLOT \"a\" TEMPORARY LOGICAL p (SNAPSHOT 'use', RESERVE_WAL)",
        b"START_REPLICATION SLOT s LOGICAL 0/0 (\"a\" 'b', c)",
        b"BASE_BACKUP (LABEL 'x', PROGRESS, MAX_RATE 32)",
        b"BASE_BACKUP LABEL 'x' PROGRESS",
        b"ALTER_REPLICATION_SLOT s (failover true)",
        b"DROP_REPLICATION_SLOT s WAIT;",
        b"UPLOAD_MANIFEST",
        b"SELECT 1",
    ]
    return [bytes([major]) + query for query in [*seeds.queries(), *more] for major in (1, 5)]


# --- Within CopyData -----------------------------------------------------------------------------


def check_standby(data: bytes) -> None:
    """What a standby or a pageserver says, told once more."""
    try:
        said = parse_pageserver_message(data)
    except ProtocolViolation as error:
        check_told(error)
        return
    if isinstance(said, PageserverFeedback):
        known = pageserver_feedback(said)
        again = parse_pageserver_message(known)
        assert isinstance(again, PageserverFeedback)
        assert pageserver_feedback(again) == known
        assert all(key.isprintable() for key in said.unknown_keys)
        assert len(said.unknown_keys) < 256
        return
    assert parse_standby_message(data) == said
    if isinstance(said, StatusUpdate):
        built = status_update(said)
        assert built[:-1] == data[: len(built) - 1]
    else:
        assert isinstance(said, Feedback)
        built = hot_standby_feedback(said)
        assert data.startswith(built)
    assert parse_standby_message(built) == said


def _standby_seeds() -> list[bytes]:
    said = [request[5:] for request in seeds.requests() if request[:1] == b"d"]
    whole = pageserver_feedback(PageserverFeedback(1 << 30, 1 << 33, 2, 3, 4))
    (length, count), pairs = struct.unpack_from(">QB", whole, 1), whole[10:]
    more = b"wal_lag\0\0\0\0\4abcd"
    unknown = b"z" + struct.pack(">QB", length + len(more), count + 1) + pairs + more
    return [*said, hot_standby_feedback(Feedback(1, 2, 3, 4, 5)), whole, unknown]


def check_primary(data: bytes) -> None:
    """What a server sends while it streams."""
    try:
        said = parse_primary_message(memoryview(data))
    except ProtocolViolation as error:
        check_told(error)
        return
    if isinstance(said, WalMessage):
        header = struct.pack(">cQQ", b"w", said.data_start, said.wal_end)
        assert data.startswith(header)
        assert said.data == data[25:]
    else:
        assert data.startswith(struct.pack(">cQ", b"k", said.wal_end))


TARGETS = (
    Target(
        "startup",
        check_startup,
        _other_startups,
        (
            b"user\0",
            b"database\0",
            b"options\0",
            b"replication\0",
            b"_pq_.",
            b"true\0",
            b"\0\3\0\2",
        ),
    ),
    Target("framing", check_framing, _framing_seeds, size=70_000),
    Target("messages", check_messages, lambda: [each[:1] + each[5:] for each in seeds.requests()]),
    Target("commands", check_commands, _command_seeds, COMMAND_WORDS),
    Target(
        "standby",
        check_standby,
        _standby_seeds,
        (b"current_timeline_size\0", b"ps_writelsn\0", b"ps_flushlsn\0", b"ps_applylsn\0"),
        size=1024,
    ),
    Target(
        "primary", check_primary, lambda: [each[:200] for each in seeds.copied()[:40]], size=256
    ),
)
