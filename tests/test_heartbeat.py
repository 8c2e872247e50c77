"""wal_sender_timeout by a clock of our own: silence is asked about once, and then given up on."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from walproto.server.heartbeat import Heartbeat, Lull


class Beats(SynchronousTestCase):
    def heartbeat(self, timeout: float) -> Heartbeat:
        self.clock = Clock()
        self.events: list[tuple[str, float]] = []
        beat = Heartbeat(
            self.clock,
            timeout,
            ask=lambda: self.events.append(("ask", self.clock.seconds())),
            give_up=lambda: self.events.append(("give up", self.clock.seconds())),
        )
        beat.start()
        return beat

    def run_until(self, seconds: float) -> None:
        while self.clock.seconds() < seconds:
            self.clock.advance(0.25)

    def test_silence_is_asked_about_at_half_of_the_timeout_and_ends_with_it(self) -> None:
        self.heartbeat(6)
        self.run_until(20)
        self.assertEqual(self.events, [("ask", 3), ("give up", 6)])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_whoever_is_heard_is_not_asked(self) -> None:
        beat = self.heartbeat(6)
        for second in range(1, 20):
            self.run_until(second)
            beat.heard()
        self.assertEqual(self.events, [])
        self.run_until(30)
        self.assertEqual(self.events, [("ask", 22), ("give up", 25)])

    def test_an_answer_begins_it_anew(self) -> None:
        beat = self.heartbeat(6)
        self.run_until(5)
        beat.heard()
        self.run_until(20)
        self.assertEqual(self.events, [("ask", 3), ("ask", 8), ("give up", 11)])

    def test_whoever_was_asked_early_is_not_asked_again(self) -> None:
        beat = self.heartbeat(6)
        self.run_until(1)
        beat.ask()
        beat.ask()
        self.run_until(20)
        self.assertEqual(self.events, [("ask", 1), ("give up", 6)])

    def test_with_0_there_is_no_end_to_patience(self) -> None:
        beat = self.heartbeat(0)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        beat.heard()
        self.run_until(10)
        self.assertEqual(self.events, [])
        beat.stop()

    def test_once_stopped_it_is_silent(self) -> None:
        beat = self.heartbeat(6)
        self.run_until(4)
        beat.stop()
        beat.stop()
        self.run_until(20)
        self.assertEqual(self.events, [("ask", 3)])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    @given(st.lists(st.integers(1, 60), max_size=20))
    def test_however_it_answers(self, pauses: list[int]) -> None:
        """Timeout 10 s; the client says something behind each pause, in quarters of a second."""
        beat = self.heartbeat(10)
        now, expected, given_up = 0.0, [], False
        for pause in [quarters / 4 for quarters in pauses] + [100.0]:
            if pause >= 5:
                expected.append(("ask", now + 5))
            if pause >= 10:
                expected.append(("give up", now + 10))
                given_up = True
                break
            now += pause
            self.run_until(now)
            beat.heard()
        self.run_until(now + 20)
        self.assertTrue(given_up)
        self.assertEqual(self.events, expected)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class Lulls(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.idle_since = 0.0
        self.rings: list[float] = []
        self.checks: list[float] = []
        self.lull = Lull(
            self.clock,
            1.0,
            lambda: self.idle_since,
            check=lambda: self.checks.append(self.clock.seconds()),
            ring=lambda: self.rings.append(self.clock.seconds()),
        )

    def run_until(self, seconds: float) -> None:
        while self.clock.seconds() < seconds:
            self.clock.advance(0.25)

    def test_it_rings_each_second_as_long_as_it_lasts(self) -> None:
        self.run_until(3.5)
        self.assertEqual(self.rings, [1, 2, 3])

    def test_it_ends_and_begins_anew(self) -> None:
        self.run_until(1.5)
        self.idle_since = 1.5
        self.run_until(4)
        self.assertEqual(self.rings, [1, 2.5, 3.5])

    def test_without_one_there_is_silence(self) -> None:
        while self.clock.seconds() < 10:
            self.idle_since = self.clock.seconds()
            self.clock.advance(0.25)
        self.assertEqual(self.rings, [])

    def test_it_is_checked_each_second_at_least_whatever_is_sent(self) -> None:
        while self.clock.seconds() < 10:
            self.clock.advance(0.25)
            if self.clock.seconds() % 3:
                self.idle_since = self.clock.seconds()
        times = [0, *self.checks]
        for before, after in itertools.pairwise(times):
            self.assertLessEqual(after - before, 1)
        self.assertGreaterEqual(times[-1], 9)

    def test_a_check_that_stops_it_keeps_it_from_ringing(self) -> None:
        self.lull._check = self.lull.stop
        self.run_until(3)
        self.assertEqual(self.rings, [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_it_may_be_stopped_from_within_and_again(self) -> None:
        self.lull._ring = self.lull.stop
        self.run_until(1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.lull.stop()

    @given(st.lists(st.floats(0.001, 5), min_size=1, max_size=20))
    def test_it_never_rings_within_a_second_of_news(self, gaps: list[float]) -> None:
        self.setUp()
        for gap in gaps:
            self.clock.advance(gap)
            for rang in self.rings:
                self.assertGreaterEqual(rang, self.idle_since + 1)
            self.rings.clear()
            self.idle_since = self.clock.seconds()
        self.clock.pump([0.5] * 5)
        self.assertTrue(self.rings)
