"""The receiver: what comes is checked and stored, and the server is told when it should be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.upstream_fakes import ScriptedConnection, Stored, keepalive, told, wal_message
from tests.wal_builder import PAGE, WalBuilder
from walproto.errors import ProtocolViolation
from walproto.lsn import format_lsn
from walproto.timeline.history import History
from walproto.timeline.replicas import Replica, Replicas
from walproto.upstream.connection import Answer
from walproto.upstream.receiver import Receiver, Terms
from walproto.upstream.store import RETRY, UNPROVEN
from walproto.wal.headers import InvalidWal
from walproto.wal.incoming import IncomingWal
from walproto.wire.replication import Feedback

WAL = WalBuilder(start=16 << 20)
WAL.records_to(WAL.start + (6 << 20), 3000)
START = WAL.start


class Streaming:
    """A receiver that receives WAL into an empty store, or one that has ``held`` bytes of it."""

    def __init__(self, directory: Path, terms: Terms, held: int = 0) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000)
        self.stored = Stored(directory, self.clock)
        self.threads = self.stored.threads
        self.store = self.stored.store
        self.connection = ScriptedConnection(self.clock, lambda command: None)
        begin = START + held
        self.store.begin(1, begin, WAL.size, synced_to=begin, flush_lsn=begin if held else 0)
        self.position = begin - begin % PAGE
        if begin > self.position:
            terms = replace(terms, known=self.wal(self.position, begin))
        incoming = IncomingWal(WAL.system, WAL.size, None, History(1), START)
        if held:
            incoming.take(START, memoryview(self.wal(START, START + 40)))
            identity = incoming.identity
            incoming = IncomingWal(WAL.system, WAL.size, identity, History(1), self.position)
        self.begun: list[str] = []
        self.receiver = Receiver(
            self.connection,
            self.store,
            incoming,
            self.clock,
            terms,
            lambda: self.begun.append("begun"),
        )
        self.connection.heard = self.receiver.heard
        self.stored.observer = self.receiver.progressed
        self.ended: list[Answer | Failure] = []
        self.connection.copy(self.receiver.take).addBoth(self.ended.append)
        self.receiver.start()

    @staticmethod
    def wal(start: int, end: int) -> bytes:
        return WAL.image[start - START : end - START]

    def come(self, size: int = PAGE) -> None:
        """So many bytes of WAL come."""
        data = self.wal(self.position, self.position + size)
        self.connection.deliver(wal_message(self.position, data))
        self.position += size

    def told(self) -> list[str]:
        return told(self.clock, self.connection.sent)

    def wait(self, seconds: int) -> list[tuple[int, str]]:
        """What is told in so many seconds, and in which of them."""
        found = []
        for second in range(1, seconds + 1):
            self.clock.advance(1)
            found += [(second, line) for line in self.told()]
        return found

    def on_disk(self) -> bytes:
        (path,) = self.stored.directory.glob("*10*")
        return path.read_bytes()


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[_Streams]:
    made = _Streams(tmp_path)
    yield made
    for one in made.made:
        one.receiver.stop()
        while one.threads.is_busy:
            one.threads.work()
        ensureDeferred(one.store.stop())
        one.clock.advance(0)
        assert one.clock.getDelayedCalls() == []


class _Streams:
    """Makes them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[Streaming] = []

    def __call__(
        self,
        *,
        timeout: float = 60,
        flush_from: int = 0,
        replicas: Replicas | None = None,
        held: int = 0,
    ) -> Streaming:
        terms = Terms(
            timeout, flush_from, xmins=None if replicas is None else replicas.oldest_xmins
        )
        self.made.append(Streaming(self.directory, terms, held))
        return self.made[-1]


def at(size: int) -> str:
    return format_lsn(START + size)


# -- How far we are ------------------------------------------------------------------------------


def test_progress_is_told_as_it_is_made(streams: _Streams) -> None:
    """That WAL is written as soon as it is, that it is on disk as soon as it is, and never more."""
    stream = streams()
    assert stream.told() == ["r 0/0 0/0 0/0 reply", "h 0:0 0:0"]
    stream.come(PAGE)
    stream.come(3 * PAGE)
    assert stream.told() == []
    stream.threads.begin()
    assert stream.told() == []
    stream.threads.hear()
    assert stream.told() == [f"r {at(PAGE)} 0/0 0/0"]
    stream.threads.finish()
    assert stream.told() == [f"r {at(PAGE)} {at(PAGE)} 0/0"]
    stream.threads.work()
    assert stream.told() == [
        f"r {at(4 * PAGE)} {at(PAGE)} 0/0",
        f"r {at(4 * PAGE)} {at(4 * PAGE)} 0/0",
    ]
    stream.receiver.progressed()
    assert stream.told() == []
    assert stream.on_disk()[: 4 * PAGE] == stream.wal(START, START + 4 * PAGE)


def test_what_is_here_is_told_at_the_start(streams: _Streams) -> None:
    stream = streams(held=2 * PAGE + 500)
    assert stream.told() == [f"r {at(2 * PAGE + 500)} {at(2 * PAGE + 500)} 0/0 reply", "h 0:0 0:0"]


def test_the_first_wal_is_told_of(streams: _Streams) -> None:
    stream = streams()
    stream.connection.deliver(keepalive(START))
    assert stream.begun == []
    for _ in range(2):
        stream.come()
        assert stream.begun == ["begun"]
    stream = streams()
    stream.clock.advance(1)
    assert stream.begun == []
    stream.connection.deliver(keepalive(START))
    stream.clock.advance(1)
    assert stream.begun == ["begun"]


def test_it_is_told_at_once_when_it_is_asked(streams: _Streams) -> None:
    stream = streams()
    stream.told()
    stream.connection.deliver(keepalive(START))
    assert stream.told() == []
    stream.connection.deliver(keepalive(START, reply=1))
    assert stream.told() == ["r 0/0 0/0 0/0"]
    stream.come()
    stream.threads.begin()
    stream.connection.deliver(keepalive(START, reply=1))
    assert stream.told() == ["r 0/0 0/0 0/0"]
    stream.threads.finish()


def test_it_is_told_now_and_then_when_there_is_nothing_new(streams: _Streams) -> None:
    stream = streams(timeout=0)
    stream.told()
    status = "r 0/0 0/0 0/0"
    assert stream.wait(35) == [(10, status), (20, status), (30, status)]
    stream.connection.deliver(keepalive(reply=1))  # 5 s after the last one
    assert stream.told() == [status]
    assert stream.wait(15) == [(10, status)]


def test_no_flush_is_told_below_what_the_slot_holds(streams: _Streams) -> None:
    """It would move the slot back, and the server may refuse to go on from there."""
    stream = streams(flush_from=START + 5000)
    stream.told()
    stream.come(4000)
    stream.threads.work()
    assert stream.told() == [f"r {at(4000)} 0/0 0/0"]
    stream.come(999)
    stream.threads.work()
    assert stream.told() == [f"r {at(4999)} 0/0 0/0"]
    stream.come(1)
    stream.threads.work()
    assert stream.told() == [f"r {at(5000)} 0/0 0/0", f"r {at(5000)} {at(5000)} 0/0"]


# -- Silence -------------------------------------------------------------------------------------


def test_a_silent_server_is_asked_once_and_then_given_up(streams: _Streams) -> None:
    stream = streams(timeout=60)
    stream.told()
    told = stream.wait(59)
    asked = [second for second, line in told if line.endswith(" reply")]
    assert asked == [30]
    assert not stream.ended
    assert stream.wait(1) == []
    (failure,) = stream.ended
    assert isinstance(failure, Failure)
    assert failure.getErrorMessage() == stream.connection.lost
    assert stream.connection.lost == "terminating walreceiver due to timeout"


@pytest.mark.parametrize("sign", ["keepalive", "WAL"])
def test_any_sign_of_life_is_enough(streams: _Streams, sign: str) -> None:
    stream = streams(timeout=60)
    for _ in range(5):
        stream.told()
        asked = [second for second, line in stream.wait(59) if line.endswith(" reply")]
        assert asked == [30]
        if sign == "WAL":
            stream.come(100)
        else:
            stream.connection.deliver(keepalive())
    assert not stream.ended


@pytest.mark.parametrize("seconds", [1, 2, 5])
def test_a_short_timeout_is_kept_too(streams: _Streams, seconds: int) -> None:
    stream = streams(timeout=seconds)
    stream.told()
    for _ in range(seconds * 4 - 1):
        stream.clock.advance(0.25)
    assert [line for line in stream.told() if line.endswith(" reply")] == ["r 0/0 0/0 0/0 reply"]
    assert not stream.ended
    stream.clock.advance(0.25)
    assert stream.ended


def test_without_a_timeout_it_waits_for_ever(streams: _Streams) -> None:
    stream = streams(timeout=0)
    stream.told()
    assert {line for _, line in stream.wait(3 * 3600)} == {"r 0/0 0/0 0/0"}
    assert not stream.ended


# -- When there is no room -----------------------------------------------------------------------


def test_it_pauses_while_too_much_waits_to_be_written(streams: _Streams) -> None:
    """It then hears nothing, and so tells how far it is each second; silence is its own doing."""
    stream = streams(timeout=8)
    while stream.store.received_lsn - START <= UNPROVEN:
        assert not stream.connection.is_paused
        stream.come(16 * PAGE)
    assert stream.connection.is_paused
    stream.told()
    status = "r 0/0 0/0 0/0"
    assert stream.wait(30) == [(second, status) for second in range(1, 31)]
    received = stream.store.received_lsn
    stream.connection.deliver(keepalive(reply=1))
    stream.come()
    assert stream.store.received_lsn == received
    assert stream.told() == []
    stream.threads.begin()
    stream.threads.hear()
    assert stream.connection.is_paused  # what is written is not proven yet
    stream.threads.finish()
    assert not stream.connection.is_paused
    stream.told()
    stream.clock.advance(0)
    assert stream.store.received_lsn == received + PAGE
    assert stream.told() == [f"r {at(16 * PAGE)} {at(16 * PAGE)} 0/0"]  # it was asked for
    assert stream.connection.is_paused  # that was too much again
    stream.threads.work_all()
    stream.told()
    asked = [second for second, line in stream.wait(7) if line.endswith(" reply")]
    assert asked == [4]
    assert not stream.ended


def test_it_pauses_while_the_disk_is_full(streams: _Streams) -> None:
    stream = streams(timeout=8)
    directory = stream.stored.directory / "000000010000000000000010.partial"
    directory.mkdir()
    stream.come(PAGE)
    stream.come(PAGE)
    stream.threads.work()
    stream.come(PAGE)
    assert stream.connection.is_paused
    stream.told()
    for _ in range(6):
        assert stream.wait(1) == [(1, "r 0/0 0/0 0/0")]
        stream.threads.work_all()
    directory.rmdir()
    stream.clock.advance(RETRY)
    stream.told()
    stream.threads.work_all()
    assert not stream.connection.is_paused
    assert stream.told()[-1] == f"r {at(3 * PAGE)} {at(3 * PAGE)} 0/0"
    assert stream.on_disk()[: 3 * PAGE] == stream.wal(START, START + 3 * PAGE)
    asked = [second for second, line in stream.wait(7) if line.endswith(" reply")]
    assert asked == [4]  # as if it had spoken just when we began to hear again
    assert not stream.ended


def test_it_does_not_hold_a_server_up_while_the_disk_stays_full(streams: _Streams) -> None:
    """One that shuts down waits until all that it has sent is flushed."""
    stream = streams(timeout=8)
    (stream.stored.directory / "000000010000000000000010.partial").mkdir()
    stream.come(PAGE)
    stream.threads.work()
    stream.come(PAGE)
    for _ in range(7):
        stream.clock.advance(1)
        stream.threads.work_all()
        assert not stream.ended
    stream.clock.advance(1)
    (ended,) = stream.ended
    assert isinstance(ended, Failure)
    assert str(ended.value) == "nothing can be written: receiving again when it can"


# -- What the replicas need ----------------------------------------------------------------------


def replica(pid: int, feedback: Feedback | None = None) -> Replica:
    return Replica(pid, "repl", "standby", "192.0.2.1", 1, START, feedback=feedback)


def xmins(told: list[str]) -> list[str]:
    return [line for line in told if line[0] == "h"]


def test_the_oldest_xmins_are_passed_on(streams: _Streams) -> None:
    replicas = Replicas()
    stream = streams(replicas=replicas)
    assert xmins(stream.told()) == ["h 0:0 0:0"]  # a server may still hold some for us

    def wait() -> list[str]:
        return xmins([line for _, line in stream.wait(2)])

    assert wait() == []
    one, two = replica(1), replica(2)
    replicas.add(one)
    assert wait() == []
    one.feedback = Feedback(0, 900, 1, 0, 0)
    assert wait() == ["h 1:900 0:0"]
    assert wait() == []
    two.feedback = Feedback(0, 0xFFFF_FFFE, 0, 50, 1)
    replicas.add(two)
    assert wait() == ["h 0:4294967294 1:50"]  # it is of the epoch before, and so the older
    two.feedback = Feedback(1, 950, 1, 60, 1)
    assert wait() == ["h 1:900 1:60"]
    replicas.remove(one)
    assert wait() == ["h 1:950 1:60"]
    replicas.remove(two)
    assert wait() == ["h 0:0 0:0"]
    assert wait() == []


def test_xmins_that_are_there_before_are_passed_on_at_the_start(streams: _Streams) -> None:
    replicas = Replicas()
    replicas.add(replica(1, Feedback(0, 900, 0, 0, 0)))
    assert xmins(streams(replicas=replicas).told()) == ["h 0:900 0:0"]


def test_nothing_is_passed_on_that_should_not_be(streams: _Streams) -> None:
    """But that nothing is: the server may hold what we once asked for."""
    stream = streams()
    assert xmins(stream.told()) == ["h 0:0 0:0"]
    assert xmins([line for _, line in stream.wait(100)]) == []


# -- What comes ----------------------------------------------------------------------------------


def test_what_is_here_already_is_not_stored_again(streams: _Streams) -> None:
    """A stream begins with a page; what of that is here, is compared, however it is cut."""
    held = PAGE + 5000
    stream = streams(held=held)
    for size in (10, 90, 4000, 899):
        stream.come(size)
        assert stream.store.received_lsn == START + held
    assert not stream.threads.is_busy
    stream.come(7)
    assert stream.store.received_lsn == START + held + 6
    stream.come(2 * PAGE - held - 6)
    stream.threads.work_all()
    assert stream.on_disk()[held : 2 * PAGE] == stream.wal(START + held, START + 2 * PAGE)


@pytest.mark.parametrize("size", [40, 4999, 5000, 5001, PAGE])
def test_what_differs_from_what_is_here_is_refused(streams: _Streams, size: int) -> None:
    stream = streams(held=PAGE + 5000)
    data = bytearray(stream.wal(stream.position, stream.position + size))
    data[min(size, 5000) - 1] ^= 1
    with pytest.raises(InvalidWal, match=f"for {at(PAGE)} is not the same as what is here"):
        stream.receiver.take(memoryview(wal_message(stream.position, bytes(data))))
    assert not stream.threads.is_busy
    assert stream.store.received_lsn == START + PAGE + 5000


def changed(offset: int, data: bytes, size: int = 2 * PAGE) -> bytes:
    """WAL in which that has been written over at an offset."""
    wal = bytearray(Streaming.wal(START, START + size))
    wal[offset : offset + len(data)] = data
    return wal_message(START, bytes(wal))


GARBAGE = {
    b"": "invalid replication message type of none",
    b"q": "invalid replication message type 113",
    b"k": "invalid keepalive message received from primary",
    keepalive()[:-1]: "invalid keepalive message received from primary",
    keepalive() + b"\0": "invalid keepalive message received from primary",
    wal_message(START, b"")[:-1]: "invalid WAL message received from primary",
    wal_message(START + 8, Streaming.wal(START, START + PAGE)): "WAL came for 0/1000008 instead of",
    wal_message(0, Streaming.wal(START, START + PAGE)): "WAL came for 0/0 instead of 0/1000000",
    wal_message(START, bytes(PAGE)): "what came is no first page of a segment",
    changed(0, struct.pack("<H", 0xD093)): "its page magic is D093",
    changed(24, struct.pack("<Q", 1)): "WAL came of system 1 ",
    changed(32, struct.pack("<I", 2 << 20)): "with segments of 2097152 bytes",
    changed(8, struct.pack("<Q", 2 * START)): "unexpected pageaddr 0/2000000 in WAL segment",
    changed(4, struct.pack("<I", 2)): r"unexpected timeline ID 2 \(should be 1\) in WAL segment",
    changed(PAGE, struct.pack("<H", 0xD110)): "invalid magic number D110 in WAL segment",
    changed(PAGE + 2, struct.pack("<H", 0x8000)): "invalid info bits 8000",
    changed(PAGE + 8, struct.pack("<Q", START)): "unexpected pageaddr 0/1000000 in WAL segment",
    changed(PAGE, bytes(24)): "WAL came behind a page without a header",
}


@pytest.mark.parametrize("data", GARBAGE, ids=GARBAGE.values())
def test_what_makes_no_sense_reaches_no_disk(streams: _Streams, data: bytes) -> None:
    stream = streams()
    stream.connection.deliver(data)
    (failure,) = stream.ended
    assert isinstance(failure, Failure)
    assert failure.check(ProtocolViolation, InvalidWal)
    with pytest.raises((ProtocolViolation, InvalidWal), match=GARBAGE[data]):
        failure.raiseException()
    assert not stream.threads.is_busy
    assert stream.store.received_lsn == START
    assert stream.store.identity is None
    assert list(stream.stored.directory.iterdir()) == []


@given(st.data())
def test_whatever_comes_it_is_wal_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Messages cut anywhere, with a few bytes changed in some: what is stored is a prefix of what
    was sent, and nothing else happens than that a message is refused."""
    stream = Streaming(tmp_path_factory.getbasetemp(), Terms(60))
    sent = b""
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            size = data.draw(st.one_of(st.integers(0, 60), st.integers(0, 3 * PAGE)))
            start = START + len(sent)
            message = bytearray(wal_message(start, stream.wal(start, start + size)))
            if data.draw(st.booleans()):
                place = data.draw(st.integers(0, len(message) - 1))
                message[place] ^= data.draw(st.integers(1, 255))
            elif data.draw(st.integers(0, 9)) == 0:
                message = bytearray(data.draw(st.binary(max_size=60)))
            before = stream.store.received_lsn
            try:
                stream.receiver.take(memoryview(bytes(message)))
            except (ProtocolViolation, InvalidWal):
                assert stream.store.received_lsn == before
                break
            if message[:1] == b"w":
                sent += message[25:]
            stored = bytearray(stream.store.received_lsn - START)
            assert stream.stored.received.copy_into(1, START, memoryview(stored))
            assert stored == sent[: len(stored)]
            assert len(sent) - len(stored) < 40  # no more is held back than a header
    finally:
        stream.receiver.stop()
