"""What a pageserver says of itself, and what all that the replicas say comes to."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.test_replicas import feeding, replica
from walproto.errors import ProtocolViolation
from walproto.timeline.replicas import Replica, Replicas, Summary, full_xmins
from walproto.wire.replication import (
    Feedback,
    PageserverFeedback,
    StatusUpdate,
    ZenithFeedback,
    hot_standby_feedback,
    pageserver_feedback,
    parse_pageserver_message,
    parse_standby_message,
    status_update,
)

examples = settings(deadline=None, derandomize=True, max_examples=200)

KEYS = ("current_timeline_size", "ps_writelsn", "ps_flushlsn", "ps_applylsn", "ps_replytime")
SAID = PageserverFeedback(0x1234, 0x3000060, 0x2000000, 0x1000000, -5)
SAID_BYTES = bytes.fromhex(
    "7a 0000000000000084 05"
    "63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000001234"
    "70735f77726974656c736e00 00000008 0000000003000060"
    "70735f666c7573686c736e00 00000008 0000000002000000"
    "70735f6170706c796c736e00 00000008 0000000001000000"
    "70735f7265706c7974696d6500 00000008 fffffffffffffffb"
)


def zenith(*pairs: tuple[bytes, bytes], count: int | None = None, longer: int = 0) -> bytes:
    """The message with any pairs, put together by hand."""
    body = bytes([len(pairs) if count is None else count])
    for key, value in pairs:
        body += key + b"\0" + struct.pack(">I", len(value)) + value
    return b"z" + struct.pack(">Q", len(body) + longer) + body


def refusal(data: bytes) -> str:
    with pytest.raises(ProtocolViolation) as caught:
        parse_pageserver_message(data)
    assert not caught.value.fatal
    return caught.value.message


# --- The message ---------------------------------------------------------------------------------


def test_what_a_pageserver_says_byte_by_byte() -> None:
    assert parse_pageserver_message(SAID_BYTES) == SAID
    assert parse_pageserver_message(memoryview(SAID_BYTES)) == SAID
    assert pageserver_feedback(SAID) == SAID_BYTES


U64 = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)
SAYINGS = st.builds(PageserverFeedback, U64, U64, U64, U64, TIMES)


@examples
@given(SAYINGS)
def test_it_is_read_and_told_as_declared(said: PageserverFeedback) -> None:
    pairs = [
        {"key": key, "value": getattr(said, key).to_bytes(8, "big", signed=key == "ps_replytime")}
        for key in KEYS
    ]
    declared = ZenithFeedback.build({"pairs": pairs})
    assert pageserver_feedback(said) == declared
    assert parse_pageserver_message(declared) == said


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::17])
def test_keys_come_in_any_order_and_what_is_not_said_is_0(order: tuple[int, ...]) -> None:
    for some in range(6):
        names = [KEYS[number] for number in order[:some]]
        message = zenith(*((name.encode(), struct.pack(">Q", 77)) for name in names))
        said = parse_pageserver_message(message)
        assert {key: getattr(said, key) for key in KEYS} == dict.fromkeys(KEYS, 0) | dict.fromkeys(
            names, 77
        )


def test_unknown_keys_are_passed_over_and_told() -> None:
    unknown = [
        (b"shard_number", b"\0\0\0\1"),
        (b"", b""),
        (b"ps_writelsn ", bytes(8)),
        (b"shard_number", b"\0" * 300),
        (b"\n\xff'\"" + b"x" * 100, b"z"),
    ]
    known = (b"ps_writelsn", struct.pack(">Q", 5))
    told = ("shard_number", "", "ps_writelsn ", "shard_number", "\\n\\xff\\'\"" + "x" * 59)
    for position in range(6):
        pairs = [*unknown[:position], known, *unknown[position:]]
        assert parse_pageserver_message(zenith(*pairs)) == PageserverFeedback(
            ps_writelsn=5, unknown_keys=told
        )


def test_there_may_be_255_keys() -> None:
    said = parse_pageserver_message(zenith(*((b"k%d" % number, b"") for number in range(255))))
    assert isinstance(said, PageserverFeedback)
    assert said.unknown_keys == tuple(f"k{number}" for number in range(255))


def test_every_truncation_is_refused() -> None:
    for size in range(1, len(SAID_BYTES)):
        assert refusal(SAID_BYTES[:size]) == "insufficient data left in message"
    # With a length that is right for what is there, too.
    for size in range(len(SAID_BYTES) - 9):
        message = b"z" + struct.pack(">Q", size) + SAID_BYTES[9 : 9 + size]
        assert refusal(message) in (
            "insufficient data left in message",
            "invalid string in message",
        )


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (SAID_BYTES + b"\0", "invalid message format"),
        (zenith(longer=1), "insufficient data left in message"),
        (zenith(longer=2**64 - 2), "insufficient data left in message"),
        (zenith(longer=-1), "invalid message format"),
        (zenith((b"a", b"b"), longer=-1), "insufficient data left in message"),
        (zenith((b"a", b"b"), count=0), "invalid message format"),
        (zenith((b"a", b"b"), count=2), "invalid string in message"),
        (zenith((b"a", b"b"), (b"c", b"d"), count=1), "invalid message format"),
        (zenith((b"ps_writelsn", bytes(4))), 'invalid "ps_writelsn" in pageserver feedback'),
        (zenith((b"ps_replytime", bytes(9))), 'invalid "ps_replytime" in pageserver feedback'),
        (zenith((b"ps_applylsn", b"")), 'invalid "ps_applylsn" in pageserver feedback'),
        (
            zenith((b"ps_flushlsn", bytes(8)), (b"ps_flushlsn", bytes(8))),
            'invalid "ps_flushlsn" in pageserver feedback',
        ),
        (b"z" + struct.pack(">QB", 8, 1) + b"a\0\xff\xff\xff\xff\0", "insufficient data"),
        (b"z" + struct.pack(">QB", 4, 1) + b"abc", "invalid string in message"),
        (b"z", "insufficient data left in message"),
    ],
)
def test_nonsense_is_refused(message: bytes, text: str) -> None:
    assert refusal(message).startswith(text)


PAIRS = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(KEYS), st.text("pks_\n", max_size=5)),
        st.one_of(st.binary(min_size=8, max_size=8), st.binary(max_size=20)),
    ),
    max_size=6,
)


@examples
@given(PAIRS, st.integers(-1, 2), st.binary(max_size=2))
def test_it_is_as_declared_or_refused(
    pairs: list[tuple[str, bytes]], longer: int, more: bytes
) -> None:
    known = [key for key, _ in pairs if key in KEYS]
    is_right = (
        len(set(known)) == len(known)
        and all(len(value) == 8 for key, value in pairs if key in KEYS)
        and longer == len(more) == 0
    )
    message = zenith(*((key.encode(), value) for key, value in pairs), longer=longer) + more
    if not is_right:
        refusal(message)
        return
    said = parse_pageserver_message(message)
    assert isinstance(said, PageserverFeedback)
    declared = {pair.key: pair.value for pair in ZenithFeedback.parse(message).pairs}
    for key in KEYS:
        value = int.from_bytes(declared.get(key, b""), "big", signed=key == "ps_replytime")
        assert getattr(said, key) == value
    assert len(said.unknown_keys) == len(pairs) - len(known)


@examples
@given(st.binary(max_size=80), st.booleans())
def test_garbage_is_refused_if_it_is_not_as_declared(garbage: bytes, with_length: bool) -> None:
    message = b"z" + (struct.pack(">Q", len(garbage)) if with_length else b"") + garbage
    try:
        parse_pageserver_message(message)
    except ProtocolViolation:
        return
    ZenithFeedback.parse(message)


def test_a_pageserver_may_say_what_any_other_client_says() -> None:
    update, feedback = StatusUpdate(5, 4, 3, 2, True), Feedback(1, 2, 3, 4, 5)
    assert parse_pageserver_message(status_update(update)) == update
    assert parse_pageserver_message(hot_standby_feedback(feedback)) == feedback
    for message in (b"", b"r", b"h" + bytes(10)):
        refusal(message)
    with pytest.raises(ProtocolViolation, match='unexpected message type "Z"') as caught:
        parse_pageserver_message(b"Z" + SAID_BYTES[1:])
    assert caught.value.fatal


def test_to_an_ordinary_server_it_is_an_unexpected_message() -> None:
    with pytest.raises(ProtocolViolation, match='unexpected message type "z"') as caught:
        parse_standby_message(SAID_BYTES)
    assert caught.value.fatal


# --- One replica ---------------------------------------------------------------------------------


def pageserver(pid: int, write: int, flush: int = 0, apply: int = 0, time: int = 1) -> Replica:
    one = replica(pid)
    one.update(PageserverFeedback(0, write, flush, apply, time))
    return one


def standby(pid: int, write: int, flush: int) -> Replica:
    one = replica(pid)
    one.update(StatusUpdate(write, flush, 0, 1, False))
    return one


def test_a_pageservers_positions_are_a_replicas() -> None:
    one = replica()
    assert one.pageserver_feedback is None
    one.update(SAID)
    assert one.pageserver_feedback is SAID
    assert (one.write_lsn, one.flush_lsn, one.apply_lsn) == (0x3000060, 0x2000000, 0x1000000)
    assert one.reply_time == -5
    one.update(Feedback(13, 750, 0, 740, 0))
    assert one.pageserver_feedback is SAID


def test_what_a_pageserver_has_received_is_confirmed_and_what_a_standby_has_flushed() -> None:
    assert replica().confirmed_lsn == 0
    assert pageserver(1, 900, 500, 100).confirmed_lsn == 900
    assert pageserver(1, 900, 500, 100).has_confirmed(900)
    assert not pageserver(1, 900, 500, 100).has_confirmed(901)
    assert standby(1, 900, 500).confirmed_lsn == 500
    assert standby(1, 900, 0).confirmed_lsn == 900


def test_unknown_keys_are_told_once() -> None:
    one, other = replica(1), replica(2)
    assert one.new_unknown_keys() == ()
    one.update(PageserverFeedback())
    assert one.new_unknown_keys() == ()
    for _ in range(2):
        one.update(PageserverFeedback(unknown_keys=("a", "b")))
        other.update(PageserverFeedback(unknown_keys=("c",)))
    assert one.new_unknown_keys() == ("a", "b")
    assert one.new_unknown_keys() == ()
    one.update(PageserverFeedback(unknown_keys=("d",)))
    assert one.new_unknown_keys() == ()
    assert other.new_unknown_keys() == ("c",)


# --- All of them ---------------------------------------------------------------------------------


def registry(*those: Replica) -> Replicas:
    replicas = Replicas()
    for one in those:
        replicas.add(one)
    return replicas


def test_where_nobody_is_or_nobody_says_anything_it_comes_to_nothing() -> None:
    assert registry().summary() == Summary()
    assert registry(replica(1), replica(2)).summary() == Summary()
    assert Summary() == Summary(0, 0, 0, None, 0, None)


def test_the_oldest_xmins_that_are_valid_with_the_newest_time() -> None:
    one, two, three = feeding(1, 800, 0), feeding(2, 0, 600, epoch=1), replica(3)
    two.update(Feedback(50, 0, 0, 600, 1))
    three.update(Feedback(70, 0, 0, 0, 0))
    summary = registry(one, two, three, replica(4)).summary()
    assert (summary.xmin, summary.catalog_xmin) == (800, 1 << 32 | 600)
    assert summary.feedback_time == 70
    assert registry(feeding(1, 0)).summary().feedback_time == 1


def test_times_before_the_year_2000_are_times() -> None:
    one, two = replica(1), replica(2)
    one.update(Feedback(-50, 7, 0, 0, 0))
    two.update(Feedback(-60, 0, 0, 0, 0))
    assert registry(one, two).summary().feedback_time == -50


def test_the_pageserver_that_has_received_most_is_the_one_to_hand_on() -> None:
    behind, ahead = pageserver(1, 500, 500, 500, time=9), pageserver(2, 600, 1, 1, time=3)
    for those in itertools.permutations([behind, ahead, standby(3, 900, 900)]):
        summary = registry(*those).summary()
        assert summary.pageserver_feedback is ahead.pageserver_feedback
        # What is in remote storage is there, whichever pageserver put it there.
        assert summary.remote_consistent_lsn == 500


def test_among_equals_the_newest_and_then_the_lowest_pid_is_the_one_to_hand_on() -> None:
    old, new, also_new = (
        pageserver(pid, 500, pid, time=time) for pid, time in ((2, 8), (3, 9), (4, 9))
    )
    for order in itertools.permutations([old, new, also_new]):
        assert registry(*order).summary().pageserver_feedback is new.pageserver_feedback


def test_the_laggard_is_the_one_that_confirms_least() -> None:
    slow, fast, mute = standby(1, 900, 300), pageserver(2, 400, 100, 50), replica(3)
    for those in itertools.permutations([slow, fast, mute]):
        assert registry(*those).summary().laggard is slow
    twin = standby(0, 300, 0)
    for those in itertools.permutations([slow, fast, twin]):
        assert registry(*those).summary().laggard is twin
    assert registry(mute).summary().laggard is None


def test_two_pageservers_that_disagree_are_told_once() -> None:
    one, two, other = pageserver(1, 500), pageserver(2, 500), standby(3, 100, 100)
    replicas = registry(one, two, other)
    assert replicas.new_disagreement() == ()  # they are equally far
    two.update(PageserverFeedback(ps_writelsn=500, ps_replytime=99, current_timeline_size=7))
    assert replicas.new_disagreement() == ()
    two.update(PageserverFeedback(ps_writelsn=600))
    assert replicas.new_disagreement() == (one, two)
    for lsn in (600, 700):
        one.update(PageserverFeedback(ps_writelsn=lsn))
        assert replicas.new_disagreement() == ()
    three = pageserver(4, 5)
    replicas.add(three)
    replicas.remove(one)
    assert replicas.new_disagreement() == ()  # there still are two


def test_when_one_pageserver_was_alone_a_disagreement_is_a_new_one() -> None:
    one, two = pageserver(1, 500), pageserver(2, 600)
    replicas = registry(one, two, standby(3, 100, 100))
    assert replicas.new_disagreement() == (one, two)
    replicas.remove(one)
    assert replicas.new_disagreement() == ()
    replicas.add(one)
    assert replicas.new_disagreement() == (one, two)


@pytest.mark.parametrize("differing", [(501, 400, 300), (500, 401, 300), (500, 400, 301)])
def test_they_disagree_by_any_position(differing: tuple[int, int, int]) -> None:
    replicas = registry(pageserver(1, 500, 400, 300), pageserver(2, *differing))
    assert len(replicas.new_disagreement()) == 2


# --- In any order --------------------------------------------------------------------------------

FEW = st.integers(0, 5)
MESSAGES = st.one_of(
    st.builds(StatusUpdate, FEW, FEW, FEW, FEW, st.booleans()),
    st.builds(Feedback, st.integers(-3, 5), FEW, st.integers(0, 2), FEW, st.integers(0, 2)),
    st.builds(PageserverFeedback, FEW, FEW, FEW, FEW, st.integers(-3, 5)),
)


def afresh(
    there: dict[int, list[StatusUpdate | Feedback | PageserverFeedback]],
) -> dict[str, object]:
    """What is to come of it, from the last message of each kind that each of those there sent."""
    xmins, catalog_xmins, times, pageservers, confirmed = [], [], [], [], []
    for pid, messages in there.items():
        hot = [message for message in messages if isinstance(message, Feedback)][-1:]
        times += [message.reply_time for message in hot]
        for message in hot:
            xmin, catalog_xmin = full_xmins(message)
            xmins += [xmin] if message.xmin else []
            catalog_xmins += [catalog_xmin] if message.catalog_xmin else []
        said = [message for message in messages if isinstance(message, PageserverFeedback)][-1:]
        pageservers += [(it.ps_writelsn, it.ps_replytime, -pid, it) for it in said]
        last = [message for message in messages if not isinstance(message, Feedback)][-1:]
        for where in last:
            if isinstance(where, PageserverFeedback):
                lsn = where.ps_writelsn
            else:
                lsn = where.write_lsn if said else where.flush_lsn or where.write_lsn
            confirmed += [(lsn, pid)] if lsn else []
    return {
        "xmin": min(xmins, default=0),
        "catalog_xmin": min(catalog_xmins, default=0),
        "feedback_time": max(times, default=0),
        "pageserver_feedback": max(pageservers, default=(None,))[-1],
        "remote_consistent_lsn": max((it[3].ps_applylsn for it in pageservers), default=0),
        "laggard": min(confirmed, default=(0, None))[1],
    }


class Coming(RuleBasedStateMachine):
    """Replicas that join, speak and leave; twice, for the registry and for the list."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = Replicas()
        self.here: dict[int, Replica] = {}
        self.said: dict[int, list[StatusUpdate | Feedback | PageserverFeedback]] = {}

    @rule(pid=st.integers(1, 4))
    def join(self, pid: int) -> None:
        if pid not in self.here:
            self.here[pid], self.said[pid] = replica(pid), []
            self.replicas.add(self.here[pid])

    @precondition(lambda self: self.here)
    @rule(data=st.data(), message=MESSAGES)
    def speak(
        self, data: st.DataObject, message: StatusUpdate | Feedback | PageserverFeedback
    ) -> None:
        pid = data.draw(st.sampled_from(sorted(self.here)))
        self.here[pid].update(message)
        self.said[pid].append(message)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        pid = data.draw(st.sampled_from(sorted(self.here)))
        self.replicas.remove(self.here.pop(pid))
        del self.said[pid]

    @invariant()
    def it_comes_to_the_same_as_afresh(self) -> None:
        summary = self.replicas.summary()
        expected = afresh(self.said)
        for name, value in expected.items():
            found = getattr(summary, name)
            if name == "laggard":
                found = found and found.pid
            assert found == value, name
        assert self.replicas.oldest_xmins() == (summary.xmin, summary.catalog_xmin)
        others = Replicas()
        for pid in sorted(self.here, reverse=True):
            others.add(self.here[pid])
        assert others.summary() == summary


TestInAnyOrder = Coming.TestCase
TestInAnyOrder.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
