"""Observers of a timeline: told at once, but not all the time when they are many."""

from __future__ import annotations

from twisted.internet.task import Clock

from walproto.timeline.observers import LONGEST, REST, SHORTEST, Observers


class Crowd:
    """Observers that take some time, on a clock of their own."""

    def __init__(self, seconds: float) -> None:
        self.clock = Clock()
        self.observers = Observers(self.clock)
        self.seconds = seconds
        self.told: list[float] = []
        self.observers.add(self.hear)

    def hear(self) -> None:
        self.told.append(self.clock.seconds())
        self.clock.rightNow += self.seconds


def test_where_telling_takes_no_time_all_is_told_at_once() -> None:
    crowd = Crowd(0)
    for _ in range(5):
        crowd.observers.tell()
    assert crowd.told == [0] * 5
    assert not crowd.clock.getDelayedCalls()


def test_what_is_not_worth_waiting_for_is_told_at_once() -> None:
    crowd = Crowd(SHORTEST / REST / 2)
    for _ in range(5):
        crowd.observers.tell()
    assert len(crowd.told) == 5


def test_when_telling_took_long_the_next_news_waits_in_proportion() -> None:
    took = LONGEST / REST / 2
    crowd = Crowd(took)
    for _ in range(4):
        crowd.observers.tell()
    assert crowd.told == [0]
    crowd.clock.advance(took * REST * 0.99)
    assert len(crowd.told) == 1
    crowd.clock.advance(took * REST * 0.02)
    assert len(crowd.told) == 2  # once, whatever there was of news


def test_it_waits_no_longer_than_the_bound() -> None:
    crowd = Crowd(1.0)
    crowd.observers.tell()
    crowd.observers.tell()
    crowd.clock.advance(LONGEST)
    assert len(crowd.told) == 2


def test_what_comes_after_a_rest_is_told_at_once() -> None:
    crowd = Crowd(1.0)
    crowd.observers.tell()
    crowd.clock.advance(LONGEST)
    crowd.observers.tell()
    assert len(crowd.told) == 2


def test_who_has_left_is_told_nothing_and_who_stops_tells_nothing() -> None:
    crowd = Crowd(1.0)
    crowd.observers.remove(crowd.hear)
    crowd.observers.remove(crowd.hear)
    crowd.observers.tell()
    assert not crowd.told
    crowd.observers.add(crowd.hear)
    crowd.observers.tell()
    crowd.observers.tell()
    crowd.observers.stop()
    crowd.observers.stop()
    assert not crowd.clock.getDelayedCalls()
