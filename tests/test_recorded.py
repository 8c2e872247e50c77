"""Recorded conversations of real clients with real servers, held with our server instead.

No PostgreSQL takes part.  The recordings (recorded/README.rst) say what a client sent and what it
was answered; here our WAL sender serves the WAL that the real one served, gets the same bytes from
the client, in whatever pieces, and has to answer the same, message by message.  What may differ is
said in one place, :func:`comparable` and :class:`Stream`.
"""

from __future__ import annotations

import itertools
import lzma
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import PAGE, SEGMENT, SSL_REQUEST, Client, server
from walproto.timeline.directory import WalDirectory

RECORDED = Path(__file__).parent / "recorded"
MAJORS = (15, 18)
WHOLE = ("psql", "receivewal", "raw", "standby", "timeline")
SLOTS = ("slot-create", "slot-stream", "slot-drop")
"""Those in which a slot is made, read or dropped: compared up to there, for we have none."""

Message = tuple[bytes, bytes]


@dataclass(frozen=True)
class Recording:
    """A recorded conversation: its headers, and its turns, each a side, F or B, and bytes."""

    headers: dict[str, str]
    turns: list[tuple[str, bytes]]

    @property
    def version(self) -> str:
        return self.headers["server"].removeprefix("PostgreSQL ")

    @property
    def asks(self) -> list[bytes]:
        """The client's turns."""
        return [data for side, data in self.turns if side == "F"]

    def requests(self) -> list[bytes]:
        """The client's messages: the startup packet without its length, then the others whole."""
        data = b"".join(self.asks)
        if data.startswith(SSL_REQUEST):
            data = data[len(SSL_REQUEST) :]
        size = int.from_bytes(data[:4], "big")
        found, data = [data[4:size]], data[size:]
        while data:
            size = int.from_bytes(data[1:5], "big") + 1
            found.append(data[:size])
            data = data[size:]
        return found

    def answers(self) -> list[Message]:
        """The server's messages."""
        data = b"".join(data for side, data in self.turns if side == "B")
        return split(data, encryption_asked=self.asks[0].startswith(SSL_REQUEST))


@cache
def recording(major: int, name: str) -> Recording:
    headers, turns = {}, []
    for line in (RECORDED / str(major) / f"{name}.txt").read_text().splitlines():
        if line.startswith("# "):
            key, _, value = line[2:].partition(": ")
            headers[key] = value
            continue
        side, *tokens = line.split(" ")
        data = b""
        for token in tokens:
            run = re.fullmatch(r"([0-9a-f]{2})\*([0-9]+)", token)
            data += bytes.fromhex(run[1]) * int(run[2]) if run else bytes.fromhex(token)
        turns.append((side, data))
    return Recording(headers, turns)


def split(data: bytes, *, encryption_asked: bool) -> list[Message]:
    """A server's messages, each its type byte and contents.  They must be whole."""
    found: list[Message] = []
    if encryption_asked:
        found, data = [(data[:1], b"")], data[1:]
    while data:
        size = int.from_bytes(data[1:5], "big") + 1
        assert 5 <= size <= len(data), f"not a whole message: {data[:80].hex()}"
        found.append((data[:1], data[5:size]))
        data = data[size:]
    return found


# --- What may differ -----------------------------------------------------------------------------

NOT_COMPARED = {
    "E": "FLR",  # where in PostgreSQL's source the error was raised
}


@dataclass
class Stream:
    """What was sent between CopyBothResponse and what ended that.

    Times may differ; how the WAL was cut; and where among it, and so from which position, a
    keepalive came, for that depends on when the client's request arrived.
    """

    start: int = -1
    wal: bytes = b""
    ends: list[int] = field(default_factory=list)
    """Where WAL may be sent to, as the messages said."""
    cuts: list[int] = field(default_factory=list)
    keepalives: list[tuple[int, int]] = field(default_factory=list)
    """How far had been sent, and whether a reply was requested."""

    def may_be_cut_at(self) -> set[int]:
        """Where a record ends: there, at a page's end or at the end a message may end.

        (Ours end between records where they catch up with the proof of older segments.)
        """
        ends = {self.start + len(self.wal)}
        remaining = int.from_bytes(self.wal[16:20], "little")  # xlp_rem_len
        lsn = _end_of_record(self.start, remaining) if remaining else self.start + 40
        while lsn - self.start < len(self.wal):
            ends.add(lsn)
            length = int.from_bytes(self.wal[lsn - self.start :][:4], "little")  # xl_tot_len
            if length:
                lsn = _end_of_record(lsn, length)
            else:  # behind an XLOG_SWITCH: the next record is in the next segment
                lsn += -lsn % SEGMENT + 40
        return ends

    def add(self, contents: bytes) -> None:
        if contents[:1] == b"k":
            end, _, reply = struct.unpack(">QqB", contents[1:])
            self.keepalives.append((end, reply))
            return
        assert contents[:1] == b"w"
        start, end, _ = struct.unpack_from(">QQq", contents, 1)
        self.start = start if self.start < 0 else self.start
        assert start == self.start + len(self.wal), "WAL is missing or doubled"
        self.wal += contents[25:]
        self.ends.append(end)
        self.cuts.append(self.start + len(self.wal))


def _end_of_record(lsn: int, length: int) -> int:
    """Where the next record begins: pages have headers, and records are aligned."""
    while length:
        if lsn % PAGE == 0:
            lsn += 40 if lsn % SEGMENT == 0 else 24
        size = min(length, PAGE - lsn % PAGE)
        lsn, length = lsn + size, length - size
    lsn = (lsn + 7) & ~7
    return lsn if lsn % PAGE else lsn + (40 if lsn % SEGMENT == 0 else 24)


def comparable(messages: list[Message]) -> list[object]:
    """The messages, without what may differ: streams are one :class:`Stream`; BackendKeyData has
    only its length, for process ID and key are made up anew; the parameters that are reported
    have no order."""
    found: list[object] = []
    for tag, contents in messages:
        last = found[-1] if found else None
        if tag == b"W":
            found += [(tag, contents), Stream()]
        elif tag == b"d":
            assert isinstance(last, Stream)
            last.add(contents)
        elif tag == b"S":
            parameters = last if isinstance(last, dict) else {}
            if parameters is not last:
                found.append(parameters)
            name, value, _ = contents.split(b"\0")
            parameters[name] = value
        elif tag == b"K":
            found.append((tag, len(contents)))
        elif tag == b"E":
            fields = contents.rstrip(b"\0").split(b"\0")
            kept = [each for each in fields if chr(each[0]) not in NOT_COMPARED["E"]]
            found.append((tag, kept))
        else:
            found.append((tag, contents))
    return found


def up_to_slots(messages: list[object]) -> Iterator[object]:
    """What comes before a slot is told of, or refused."""
    for each in messages:
        if isinstance(each, tuple) and isinstance(each[1], bytes):
            tag, contents = each
            if tag == b"T" and (b"slot_type\0" in contents or b"slot_name\0" in contents):
                return
            if tag == b"C" and contents.startswith(b"DROP_REPLICATION_SLOT"):
                return
        yield each


# --- The replay ----------------------------------------------------------------------------------


class Served:
    """A directory with recorded WAL, served."""

    def __init__(self, major: int, wal: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="walproto-"))
        for file in (RECORDED / str(major) / wal).iterdir():
            if file.suffix == ".xz":
                (self.path / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
            else:
                shutil.copy(file, self.path)
        self.clock = Clock()
        self.timeline = WalDirectory(self.path, self.clock)
        self.timeline.look()
        self.clock.advance(0)
        self.timeline.require_ready()

    def stop(self) -> None:
        self.timeline.stop()
        shutil.rmtree(self.path)


class Replay(SynchronousTestCase):
    served: dict[tuple[int, str], Served]

    @classmethod
    def setUpClass(cls) -> None:
        cls.served = {
            (major, wal): Served(major, wal) for major in MAJORS for wal in ("wal", "wal-promoted")
        }

    @classmethod
    def tearDownClass(cls) -> None:
        for served in cls.served.values():
            served.stop()

    def replay(self, major: int, asked: Recording, pieces: list[list[bytes]]) -> list[Message]:
        """What our server answers to the client's turns when they come in pieces; when all is
        said, the connection must be closed if the client said goodbye."""
        served = self.served[major, asked.headers["wal"]]
        factory = server(served.timeline, served.clock, server_version=asked.version)
        client = Client(factory, served.clock)
        for turn in pieces:
            for piece in turn:
                client.transport.deliver(piece)
            served.clock.advance(0)
        self.assertFalse(client.transport.is_connected, "the client said goodbye, we did not")
        self.assertEqual(list(served.timeline.replicas), [])
        self.assertEqual(self.flushLoggedErrors(), [])
        received = b"".join(itertools.chain.from_iterable(pieces))
        return split(
            bytes(client.transport.arrived), encryption_asked=received.startswith(SSL_REQUEST)
        )

    def hold(self, major: int, name: str, pieces: list[list[bytes]] | None = None) -> None:
        """Hold the conversation, and compare."""
        asked = recording(major, name)
        pieces = pieces or [[turn] for turn in asked.asks]
        ours = comparable(self.replay(major, asked, pieces))
        theirs = comparable(asked.answers())
        if pieces[0][0].startswith(SSL_REQUEST) and not asked.asks[0].startswith(SSL_REQUEST):
            self.assertEqual(ours.pop(0), (b"N", b""))
        if name in SLOTS:
            theirs = list(up_to_slots(theirs))
            ours = ours[: len(theirs)]
            self.assertGreater(len(theirs), 10)
        self.assertEqual(len(ours), len(theirs))
        for our, their in zip(ours, theirs, strict=True):
            if isinstance(their, Stream):
                assert isinstance(our, Stream)
                self.same_stream(our, their)
            else:
                self.assertEqual(our, their)

    def same_stream(self, our: Stream, their: Stream) -> None:
        self.assertEqual(our.start, their.start)
        self.assertEqual(len(our.wal), len(their.wal))
        self.assertTrue(our.wal == their.wal, "other WAL than theirs")
        self.assertEqual(set(our.ends), set(their.ends))
        self.assertEqual(
            [reply for _, reply in our.keepalives], [reply for _, reply in their.keepalives]
        )
        end = our.start + len(our.wal)
        for lsn, _ in our.keepalives + their.keepalives:
            self.assertTrue(our.start <= lsn <= end)
        records = our.may_be_cut_at()
        for lsn in our.cuts:
            self.assertTrue(lsn % PAGE == 0 or lsn in records, f"a record is cut, at {lsn:X}")


class AsRecorded(Replay):
    """Every turn as it was recorded, in one piece."""

    def test_conversations_are_held_alike(self) -> None:
        for major, name in itertools.product(MAJORS, WHOLE):
            self.hold(major, name)

    def test_so_are_those_with_slots_until_a_slot_is_asked_for(self) -> None:
        for major, name in itertools.product(MAJORS, SLOTS):
            self.hold(major, name)

    def test_encryption_may_be_asked_for_first(self) -> None:
        for major, name in itertools.product(MAJORS, WHOLE):
            turns = [turn for turn in recording(major, name).asks if turn != SSL_REQUEST]
            self.hold(major, name, [[SSL_REQUEST], *([turn] for turn in turns)])

    def test_nothing_is_missing_in_what_was_recorded(self) -> None:
        """Each stream above had something in it, and together they hold all sorts of messages."""
        seen: set[bytes] = set()
        wal = 0
        for major, name in itertools.product(MAJORS, WHOLE):
            answers = recording(major, name).answers()
            seen |= {tag for tag, _ in answers}
            wal += sum(
                len(stream.wal) for stream in comparable(answers) if isinstance(stream, Stream)
            )
        self.assertEqual(seen, {bytes([letter]) for letter in b"NRSKZTDCEWdc"})
        self.assertGreater(wal, 20 * SEGMENT)


class InPieces(Replay):
    """The same, but the network cuts what the client sends otherwise."""

    def test_byte_by_byte(self) -> None:
        for major, name in itertools.product(MAJORS, (*WHOLE, "slot-stream")):
            turns = recording(major, name).asks
            self.hold(major, name, [[bytes([byte]) for byte in turn] for turn in turns])

    @settings(max_examples=25)
    @given(st.data())
    def test_cut_anywhere(self, data: st.DataObject) -> None:
        major = data.draw(st.sampled_from(MAJORS))
        name = data.draw(st.sampled_from(WHOLE))
        pieces = []
        for turn in recording(major, name).asks:
            places = data.draw(st.lists(st.integers(0, len(turn)), max_size=5))
            edges = [0, *sorted(places), len(turn)]
            pieces.append([turn[a:b] for a, b in itertools.pairwise(edges) if a < b])
        self.hold(major, name, pieces)

    @settings(max_examples=25)
    @given(st.data())
    def test_with_the_beginning_of_the_next_message_behind(self, data: st.DataObject) -> None:
        major = data.draw(st.sampled_from(MAJORS))
        name = data.draw(st.sampled_from(WHOLE))
        turns = list(recording(major, name).asks)
        pieces = []
        for number, turn in enumerate(turns):
            following = turns[number + 1] if number + 1 < len(turns) else b""
            # Behind a request for encryption nothing may come; of a message, all but its last byte.
            size = 0 if turn == SSL_REQUEST else min(len(following), 5) - 1
            ahead = data.draw(st.integers(0, max(size, 0)))
            pieces.append([turn + following[:ahead]])
            if following:
                turns[number + 1] = following[ahead:]
        self.hold(major, name, pieces)

    @settings(max_examples=10)
    @given(
        st.sampled_from(MAJORS), st.sampled_from(("psql", "slot-create")), st.binary(max_size=40)
    )
    def test_with_anything_behind_the_goodbye(self, major: int, name: str, junk: bytes) -> None:
        *turns, goodbye = recording(major, name).asks
        self.hold(major, name, [*([turn] for turn in turns), [goodbye + junk]])
