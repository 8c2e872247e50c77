"""Whom Subscriptions call, and when: a clock and calls of our own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure

from walproto.neon.callback import CallError, Subscription
from walproto.neon.callmemaybe import CALLS_AT_ONCE, Subscriptions
from walproto.neon.ids import TimelineIds

TENANT = "0123456789abcdef" * 2
PERIOD = 10.0
PASSWORD = "correct-horse"


def subscription(number: int = 1, pageserver: int = 1) -> Subscription:
    connstr = f"host=ps{pageserver} port=6400 password={PASSWORD}"
    return Subscription(TimelineIds(TENANT, f"{number:032x}"), connstr)


ONE, OTHER = subscription(1), subscription(2)


@dataclass(eq=False)
class Made:
    """A call that was made."""

    subscription: Subscription
    time: float
    answer: Deferred[None]
    was_abandoned: bool = False

    @property
    def is_open(self) -> bool:
        return not self.answer.called


class Calls:
    """Subscriptions whose calls hang until the test says what comes of them."""

    def __init__(self, recall_period: float = PERIOD) -> None:
        self.clock = Clock()
        self.made: list[Made] = []
        self.at_the_end: Callable[[], None] = lambda: None
        self.subscriptions = Subscriptions(self.clock, self._call, recall_period)

    def _call(self, subscription: Subscription) -> Deferred[None]:
        assert not self.open(subscription), "the one before is under way"
        made = Made(subscription, self.clock.seconds(), Deferred(lambda _: self._abandon(made)))
        self.made.append(made)
        return made.answer.addBoth(self._ended)

    def _ended(self, result: Any) -> Any:
        self.at_the_end()
        return result

    def _abandon(self, made: Made) -> None:
        made.was_abandoned = True

    def open(self, subscription: Subscription | None = None) -> list[Made]:
        """Those that are under way, of one subscription or all."""
        of_one = (one for one in self.made if subscription in (None, one.subscription))
        return [one for one in of_one if one.is_open]

    def run(self, seconds: float = 0) -> None:
        until = self.clock.seconds() + seconds
        self.clock.advance(0)
        while self.clock.seconds() < until:
            self.clock.advance(0.25)

    def times(self, subscription: Subscription = ONE) -> list[float]:
        return [one.time for one in self.made if one.subscription == subscription]

    def stop(self) -> None:
        """Nothing may be left."""
        stopped = self.subscriptions.stop()
        assert stopped.called
        assert not self.open()
        assert self.clock.getDelayedCalls() == []


# -- When ----------------------------------------------------------------------------------------


def test_it_is_called_at_the_next_turn_and_then_each_period() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    assert calls.made == []
    calls.run()
    assert calls.times() == [0]
    calls.open()[0].answer.callback(None)
    calls.subscriptions.subscribe(ONE)  # it is already
    calls.run(9.75)
    assert calls.times() == [0]
    calls.run(0.25)
    calls.open()[0].answer.errback(CallError("refused", "not today"))
    calls.run(10)
    assert calls.times() == [0, 10, 20]
    calls.stop()


def test_a_period_of_ones_own() -> None:
    calls = Calls(0.5)
    calls.subscriptions.subscribe(ONE)
    calls.run(2)
    assert calls.times() == [0, 0.5, 1, 1.5, 2]
    calls.subscriptions.pause(ONE)
    calls.subscriptions.resume(ONE)
    calls.run(0.5)
    assert calls.times() == [0, 0.5, 1, 1.5, 2, 2.5]
    calls.stop()
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="is no recall period"):
            Calls(wrong)


def test_a_call_that_hangs_is_abandoned_for_the_next_one() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.run(9.75)
    (first,) = calls.made
    assert first.is_open
    calls.run(0.25)
    assert first.was_abandoned
    assert calls.times() == [0, 10]
    assert len(calls.open()) == 1
    calls.stop()
    assert calls.made[1].was_abandoned


def test_nobody_is_called_while_it_streams() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.run(3)
    calls.open()[0].answer.callback(None)
    calls.subscriptions.pause(ONE)
    assert calls.clock.getDelayedCalls() == []
    calls.run(50)
    calls.subscriptions.subscribe(ONE)
    calls.run(50)
    assert calls.times() == [0]
    calls.subscriptions.resume(ONE)
    calls.run(10)
    assert calls.times() == [0, 103, 113]
    calls.stop()


def test_who_streams_before_the_next_turn_is_not_called() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.subscriptions.pause(ONE)
    calls.run(20)
    assert calls.made == []
    calls.stop()


def test_what_is_paused_but_unknown_is_subscribed() -> None:
    """A pageserver that comes by itself is called when it has gone."""
    calls = Calls()
    calls.subscriptions.pause(ONE)
    calls.run(20)
    assert calls.made == []
    calls.subscriptions.resume(ONE)
    calls.run(10)
    assert calls.times() == [20, 30]
    calls.stop()


def test_it_is_called_when_the_last_of_several_streams_has_ended() -> None:
    calls = Calls()
    for _ in range(3):
        calls.subscriptions.pause(ONE)
    for _ in range(2):
        calls.subscriptions.resume(ONE)
        calls.run(20)
    assert calls.made == []
    calls.subscriptions.resume(ONE)
    calls.subscriptions.resume(ONE)  # of none
    calls.run()
    assert calls.times() == [40]
    calls.subscriptions.pause(ONE)  # this one counts, whatever there was too much before
    calls.run(20)
    assert calls.times() == [40]
    calls.stop()


def test_a_stream_that_ended_in_vain_is_no_news() -> None:
    calls = Calls()
    calls.subscriptions.resume(ONE)
    calls.run(20)
    calls.subscriptions.subscribe(ONE)
    calls.run(5)
    calls.subscriptions.resume(ONE)
    calls.run(4.75)
    assert calls.times() == [20]
    calls.stop()


def test_streams_that_end_as_they_begin_do_not_make_calls_more_frequent_than_each_second() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    for _ in range(16):
        calls.run()
        if calls.open():
            calls.open()[0].answer.callback(None)
        calls.subscriptions.pause(ONE)
        calls.subscriptions.resume(ONE)
        calls.run(0.25)
    assert calls.times() == [0, 1, 2, 3, 4]
    calls.stop()


def test_a_call_may_come_to_its_end_when_the_stream_has_begun() -> None:
    """A pageserver that connects before it answers does not see its connection break."""
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.subscriptions.subscribe(OTHER)
    calls.run(1)
    for each in (ONE, OTHER):
        calls.subscriptions.pause(each)
    calls.run(5)
    assert len(calls.open()) == 2
    calls.open(ONE)[0].answer.callback(None)
    calls.run(20)  # the other one hangs, and is abandoned in time
    assert not calls.open()
    assert [one.was_abandoned for one in calls.made] == [False, True]
    assert calls.clock.getDelayedCalls() == []
    calls.stop()


def test_a_call_from_before_the_stream_does_not_keep_the_next_one_waiting() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.run(1)
    calls.subscriptions.pause(ONE)
    calls.run(1)
    calls.subscriptions.resume(ONE)
    calls.run()
    assert [one.was_abandoned for one in calls.made] == [True, False]
    assert calls.times() == [0, 2]
    calls.run(10)
    assert calls.times() == [0, 2, 12]
    calls.stop()


@pytest.mark.parametrize("when", ["before it is called", "while it is called", "between calls"])
def test_who_is_unsubscribed_is_called_no_more(when: str) -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.subscriptions.subscribe(OTHER)
    if when != "before it is called":
        calls.run()
    if when == "between calls":
        calls.open(ONE)[0].answer.callback(None)
    calls.subscriptions.unsubscribe(ONE)
    assert calls.open(ONE) == []
    calls.subscriptions.unsubscribe(ONE)
    calls.run(10)
    assert calls.times() == ([] if when == "before it is called" else [0])
    assert [one.was_abandoned for one in calls.made if one.subscription == ONE] == {
        "before it is called": [],
        "while it is called": [True],
        "between calls": [False],
    }[when]
    assert calls.times(OTHER) == [0, 10]
    calls.stop()


def test_who_is_unsubscribed_while_it_streams_is_not_called_when_that_ends() -> None:
    """As when a timeline is suspended: it is unsubscribed, and then its streams end."""
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.subscriptions.pause(ONE)
    calls.subscriptions.unsubscribe(ONE)
    calls.subscriptions.resume(ONE)
    calls.run(20)
    assert calls.made == []
    calls.subscriptions.pause(ONE)
    calls.subscriptions.unsubscribe(ONE)
    calls.subscriptions.subscribe(ONE)  # and the stream is up still
    calls.run(20)
    assert calls.made == []
    calls.subscriptions.resume(ONE)
    calls.run()
    assert calls.times() == [40]
    calls.stop()


def test_tenant_timeline_and_connection_string_make_a_subscription() -> None:
    calls = Calls()
    tenant, timeline = ONE.ids.tenant_id, ONE.ids.timeline_id
    others = [
        Subscription(TimelineIds("f" * 32, timeline), ONE.pageserver_connstr),
        Subscription(TimelineIds(tenant, "f" * 32), ONE.pageserver_connstr),
        Subscription(TimelineIds(tenant, timeline), "port=6400 host=ps1"),
    ]
    for each in (ONE, *others):
        calls.subscriptions.subscribe(each)
    calls.subscriptions.pause(ONE)
    calls.run()
    assert [one.subscription for one in calls.made] == others
    calls.stop()


@pytest.mark.parametrize("succeeds", [True, False])
def test_all_may_be_done_from_within_the_end_of_a_call(succeeds: bool) -> None:
    """Where it is too late to cancel it."""
    streamed = [Subscriptions.subscribe, Subscriptions.pause, Subscriptions.resume]
    for actions, expected in (
        ([Subscriptions.unsubscribe], [0]),
        ([Subscriptions.unsubscribe, Subscriptions.subscribe], [0, 3, 13, 23]),
        ([Subscriptions.pause], [0]),
        ([Subscriptions.pause, Subscriptions.resume], [0, 3, 13, 23]),
        (streamed, [0, 3, 13, 23]),
        ([lambda those, _: those.stop()], [0]),
    ):
        calls = Calls()
        calls.subscriptions.subscribe(ONE)
        calls.run(3)

        def act(calls: Calls = calls, actions: Any = actions) -> None:
            calls.at_the_end = lambda: None
            for action in actions:
                action(calls.subscriptions, ONE)

        calls.at_the_end = act
        if succeeds:
            calls.open()[0].answer.callback(None)
        else:
            calls.open()[0].answer.errback(CallError("some", "it did not work"))
        calls.run(25)
        assert calls.times() == expected
        calls.stop()


# -- Many ----------------------------------------------------------------------------------------


def test_calls_to_a_pageserver_that_is_silent_take_turns_and_hold_up_no_other() -> None:
    calls = Calls()
    many = [subscription(number) for number in range(5 * CALLS_AT_ONCE // 2)]
    elsewhere = subscription(99, pageserver=2)
    for each in (*many, elsewhere):
        calls.subscriptions.subscribe(each)
    calls.run()
    assert calls.times(elsewhere) == [0]
    for _ in range(25):
        of_many = [one.subscription for one in calls.open() if one.subscription != elsewhere]
        assert len(of_many) == CALLS_AT_ONCE
        calls.run(2)
    counts = [len(calls.times(each)) for each in many]
    assert sum(counts) == 6 * CALLS_AT_ONCE
    assert max(counts) - min(counts) <= 1
    assert calls.times(elsewhere) == [0, 10, 20, 30, 40, 50]
    calls.stop()
    assert sum(one.was_abandoned for one in calls.made) == len(calls.made)


def test_who_waits_for_others_is_called_as_soon_as_one_is_done_or_not_at_all() -> None:
    calls = Calls()
    first = [subscription(number) for number in range(CALLS_AT_ONCE)]
    waiting = [subscription(100 + number) for number in range(3)]
    for each in (*first, *waiting):
        calls.subscriptions.subscribe(each)
    calls.run(1)
    calls.subscriptions.unsubscribe(waiting[0])
    calls.subscriptions.pause(waiting[1])
    calls.open(first[3])[0].answer.callback(None)
    calls.run()
    assert [calls.times(each) for each in waiting] == [[], [], [1]]
    calls.run(1)
    calls.subscriptions.unsubscribe(first[4])  # abandoned, it makes room, too
    calls.subscriptions.resume(waiting[1])
    calls.run()
    assert calls.times(waiting[1]) == [2]
    calls.stop()


def test_a_thousand_that_answer_are_all_called_at_once() -> None:
    clock = Clock()
    called: list[Subscription] = []

    def call(subscription: Subscription) -> Deferred[None]:
        called.append(subscription)
        answer = Deferred[None]()
        clock.callLater(0, answer.callback, None)
        return answer

    many = [subscription(number) for number in range(1000)]
    subscriptions = Subscriptions(clock, call)
    for each in many:
        subscriptions.subscribe(each)
    clock.advance(0)
    assert called == many
    clock.advance(PERIOD)
    assert called == many * 2
    assert subscriptions.stop().called
    assert clock.getDelayedCalls() == []


def test_a_long_queue_of_calls_that_fail_at_once() -> None:
    """First they hang, so that there is a queue; then there is nothing that could be waited for."""
    clock = Clock()
    count = 0

    def call(subscription: Subscription) -> Deferred[None]:
        nonlocal count
        count += 1
        if count > CALLS_AT_ONCE:
            raise CallError("threads", "there are too many")
        return Deferred()

    subscriptions = Subscriptions(clock, call)
    for number in range(2000):
        subscriptions.subscribe(subscription(number))
    with capturedLogs() as events:
        clock.advance(0)
        assert count == CALLS_AT_ONCE
        clock.advance(PERIOD)
    assert count >= 2000
    assert {event["text"] for event in events if event["log_level"] == LogLevel.warn} == {
        "there are too many; calling again every 10 s",
        "no answer within 10 s: see what holds it up; calling again every 10 s",
    }
    assert subscriptions.stop().called
    assert clock.getDelayedCalls() == []


# -- The end -------------------------------------------------------------------------------------


def test_stopped_it_does_nothing_any_more() -> None:
    calls = Calls()
    calls.subscriptions.subscribe(ONE)
    calls.subscriptions.subscribe(OTHER)
    calls.subscriptions.pause(OTHER)
    calls.run(1)
    calls.stop()
    for method in ("resume", "pause", "resume", "subscribe", "unsubscribe"):
        for each in (ONE, OTHER):
            getattr(calls.subscriptions, method)(each)
        calls.run(20)
    assert calls.times() == [0]
    assert calls.times(OTHER) == []
    calls.stop()


def test_no_call_is_begun_when_all_are_abandoned() -> None:
    calls = Calls()
    for number in range(2 * CALLS_AT_ONCE):
        calls.subscriptions.subscribe(subscription(number))
    calls.run(15)
    before = len(calls.made)
    calls.stop()
    assert len(calls.made) == before


def test_it_has_stopped_when_the_last_call_has_ended() -> None:
    clock = Clock()
    closed = Deferred[None]()

    async def close_slowly() -> None:
        try:
            await Deferred[None]()
        except CancelledError:
            await closed
            raise

    subscriptions = Subscriptions(clock, lambda _: Deferred.fromCoroutine(close_slowly()))
    subscriptions.subscribe(ONE)
    clock.advance(0)
    stopped = subscriptions.stop()
    assert not stopped.called
    closed.callback(None)
    assert stopped.called


# -- What is logged ------------------------------------------------------------------------------


def outcome(calls: Calls, what: Exception | None) -> None:
    """What comes of the call that is under way; one more is made then, unless it is paused."""
    (made,) = calls.open()
    if what is not None:
        made.answer.errback(what)
    calls.run(made.time + PERIOD - calls.clock.seconds())


def events_of(test: Callable[[Calls], None]) -> list[dict[str, Any]]:
    with capturedLogs() as events:
        calls = Calls()
        calls.subscriptions.subscribe(ONE)
        calls.run()
        test(calls)
        calls.stop()
    assert PASSWORD not in repr(events) + "".join(str(formatEvent(event)) for event in events)
    for event in events:
        assert (event["tenant"], event["timeline"]) == (TENANT, ONE.ids.timeline_id)
        assert event["pageserver"] == "ps1:6400"
    return list(events)


def warnings(events: list[dict[str, Any]]) -> list[Any]:
    return [event["text"] for event in events if event["log_level"] == LogLevel.warn]


REFUSED = "cannot connect: Connection refused: see that it runs"
AGAIN = "; calling again every 10 s"


def test_each_kind_of_error_is_logged_once() -> None:
    def test(calls: Calls) -> None:
        for number in range(3):
            outcome(calls, CallError("connecting", REFUSED + " 123"[:number]))
            outcome(calls, None)
            outcome(calls, CallError("answer 42601", "it does not know callmemaybe"))
        outcome(calls, CallError("connecting", REFUSED))

    events = events_of(test)
    assert warnings(events) == [
        REFUSED + AGAIN,
        "no answer within 10 s: see what holds it up" + AGAIN,
        "it does not know callmemaybe" + AGAIN,
    ]
    first = next(event for event in events if event["log_level"] == LogLevel.warn)
    assert formatEvent(first) == (
        f"pageserver ps1:6400 for timeline {TENANT}/{ONE.ids.timeline_id}: {REFUSED}{AGAIN}"
    )


def test_errors_are_logged_again_after_a_stream() -> None:
    def test(calls: Calls) -> None:
        for _ in range(2):
            outcome(calls, CallError("connecting", REFUSED))
        calls.open()[0].answer.callback(None)
        for _ in range(2):
            calls.subscriptions.pause(ONE)
            calls.run(5)
            calls.subscriptions.resume(ONE)
            calls.run()
        for _ in range(2):
            outcome(calls, CallError("connecting", REFUSED))

    events = events_of(test)
    assert warnings(events) == [REFUSED + AGAIN] * 2
    told = [event["text"] for event in events if event["log_level"] == LogLevel.info]
    assert told == ["to be called when it does not stream", "streams now"]


def test_each_subscription_has_errors_of_its_own() -> None:
    with capturedLogs() as events:
        calls = Calls()
        for each in (ONE, OTHER):
            calls.subscriptions.subscribe(each)
        for _ in range(3):
            calls.run()
            for each in (ONE, OTHER):
                calls.open(each)[0].answer.errback(CallError("connecting", REFUSED))
            calls.run(PERIOD)
        calls.stop()
    timelines = [event["timeline"] for event in events if event["log_level"] == LogLevel.warn]
    assert timelines == [ONE.ids.timeline_id, OTHER.ids.timeline_id]


def test_an_answer_is_nothing_to_be_told_each_time() -> None:
    def test(calls: Calls) -> None:
        for _ in range(3):
            calls.open()[0].answer.callback(None)
            calls.run(PERIOD)
        calls.subscriptions.unsubscribe(ONE)

    told = [event["text"] for event in events_of(test) if event["log_level"] >= LogLevel.info]
    assert told == ["to be called when it does not stream", "not to be called any more"]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_defect_of_ours_is_told_once_and_calls_go_on(at_once: bool) -> None:
    clock = Clock()
    count = 0

    def call(subscription: Subscription) -> Deferred[None]:
        nonlocal count
        count += 1
        if at_once:
            raise ZeroDivisionError("of ours")
        answer = Deferred[None]()
        answer.errback(Failure(ZeroDivisionError("of ours")))
        return answer

    with capturedLogs() as events:
        subscriptions = Subscriptions(clock, call)
        subscriptions.subscribe(ONE)
        clock.advance(0)
        for _ in range(4):
            clock.advance(PERIOD)
        assert subscriptions.stop().called
    assert count == 5
    failures = [event for event in events if "log_failure" in event]
    assert [formatEvent(event) for event in failures] == ["a defect in walproto: calling again"]
    assert failures[0]["log_failure"].check(ZeroDivisionError)


def test_a_password_is_not_in_what_a_subscription_looks_like() -> None:
    assert PASSWORD not in repr(ONE)
    assert ONE.ids.timeline_id in repr(ONE)


# -- Any order -----------------------------------------------------------------------------------


@dataclass
class Expected:
    """When a subscription is called, worked out by looking at every quarter of a second."""

    is_subscribed: bool = False
    streams: int = 0
    due: float = math.inf
    last: float = -math.inf
    is_open: bool = False

    def do(self, what: str, now: float) -> None:
        match what:
            case "subscribe" if not self.is_subscribed:
                self.is_subscribed = True
                self._call_soon(now)
            case "unsubscribe" if self.is_subscribed:
                self.is_subscribed = self.is_open = False
                self.due = math.inf
            case "pause":
                self.is_subscribed = True
                self.streams += 1
                self.due = math.inf
            case "resume" if self.streams:
                self.streams -= 1
                if not self.streams:
                    self.is_open = False
                    self._call_soon(now)
            case "answer" | "fail":
                self.is_open = False
        if not self.is_subscribed and not self.streams:
            self.last = -math.inf

    def _call_soon(self, now: float) -> None:
        if self.is_subscribed and not self.streams:
            self.due = max(now, self.last + 1)

    def look(self, now: float) -> bool:
        """Whether it is called now."""
        if now >= self.last + PERIOD:
            self.is_open = False
        if now < self.due:
            return False
        self.last, self.due, self.is_open = now, now + PERIOD, True
        return True


ALL = [subscription(1), subscription(2), subscription(1, pageserver=2)]
ACTIONS = ["subscribe", "unsubscribe", "pause", "resume", "answer", "fail"]
STEPS = st.one_of(
    st.tuples(st.sampled_from(ACTIONS), st.sampled_from(ALL)),
    st.tuples(st.just("wait"), st.sampled_from([0, 0.25, 0.5, 1, 2, 5, 9.75, 10, 25])),
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(steps=st.lists(STEPS, max_size=40))
def test_in_any_order(steps: list[tuple[str, Any]]) -> None:
    """Called are those, and at those times, that should be; and nothing is left in the end."""
    calls = Calls()
    expected = {each: Expected() for each in ALL}
    times: dict[Subscription, list[float]] = {each: [] for each in ALL}

    def look() -> None:
        now = calls.clock.seconds()
        for each, one in expected.items():
            if one.look(now):
                times[each].append(now)
            assert calls.times(each) == times[each]
            assert len(calls.open(each)) == one.is_open

    for what, which in steps:
        if what == "wait":
            calls.run()
            look()
            for _ in range(int(which * 4)):
                calls.run(0.25)
                look()
            continue
        if what in ("answer", "fail"):
            for made in calls.open(which):
                if what == "answer":
                    made.answer.callback(None)
                else:
                    made.answer.errback(CallError("some", "it did not work"))
        else:
            getattr(calls.subscriptions, what)(which)
        expected[which].do(what, calls.clock.seconds())
        assert len(calls.open(which)) == expected[which].is_open
    needed = {each for each, one in expected.items() if one.is_subscribed or one.streams}
    assert set(calls.subscriptions._known) == needed
    under_way = calls.open()
    calls.stop()
    assert all(made.was_abandoned for made in under_way)
