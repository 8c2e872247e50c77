"""wal_sender_timeout by a clock of our own: silence is asked about once, and then given up on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from walproto.server.heartbeat import Heartbeat


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
