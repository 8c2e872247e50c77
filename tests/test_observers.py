"""Observers of a timeline: told at once, but not all the time when they are many."""

from __future__ import annotations

from functools import partial

import pytest
from twisted.internet.task import Clock

from walproto.timeline.observers import LONGEST, REST, SHORTEST, Observers

FEW = round(SHORTEST / REST) - 1
MANY = 2 * FEW


class Crowd:
    """So many observers."""

    def __init__(self, count: int) -> None:
        self.clock = Clock()
        self.observers = Observers(self.clock)
        self.told: list[int] = []
        for number in range(count):
            self.observers.add(partial(self.told.append, number))

    def tell(self, times: int = 1) -> int:
        """Have news, so often; how many times all were told of it."""
        before = len(self.told)
        for _ in range(times):
            self.observers.tell()
        return self._rounds(before)

    def wait(self, seconds: float) -> int:
        """How many times all are told meanwhile."""
        before = len(self.told)
        self.clock.advance(seconds)
        return self._rounds(before)

    def _rounds(self, before: int) -> int:
        times, rest = divmod(len(self.told) - before, len(self.observers._observers))
        assert not rest
        return times


def test_a_few_are_told_all_at_once() -> None:
    crowd = Crowd(FEW)
    assert crowd.tell(5) == 5
    assert not crowd.clock.getDelayedCalls()


def test_many_are_told_the_first_and_then_when_they_have_rested() -> None:
    crowd = Crowd(MANY)
    assert crowd.tell(5) == 1
    assert crowd.wait(MANY * REST * 0.99) == 0
    assert crowd.wait(MANY * REST * 0.02) == 1  # once, whatever there was of news
    assert crowd.tell(2) == 0
    assert crowd.wait(MANY * REST * 1.01) == 1
    assert not crowd.clock.getDelayedCalls()


def test_what_comes_after_a_rest_is_told_at_once() -> None:
    crowd = Crowd(MANY)
    assert crowd.tell() == 1
    assert crowd.wait(MANY * REST * 1.01) == 0
    assert crowd.tell() == 1


def test_no_rest_is_longer_than_the_bound() -> None:
    crowd = Crowd(round(3 * LONGEST / REST))
    assert crowd.tell(2) == 1
    assert crowd.wait(LONGEST * 1.01) == 1


def test_nor_if_the_clock_is_set_back() -> None:
    crowd = Crowd(MANY)
    assert crowd.tell() == 1
    crowd.clock.rightNow -= 3600
    assert crowd.observers.rest == LONGEST
    assert crowd.tell() == 0
    assert crowd.wait(LONGEST * 1.01) == 1


@pytest.mark.parametrize("count", [1, MANY])
def test_who_has_left_is_told_nothing(count: int) -> None:
    crowd = Crowd(count)
    for observer in list(crowd.observers._observers):
        crowd.observers.remove(observer)
        crowd.observers.remove(observer)
    crowd.observers.tell()
    assert not crowd.told


def test_who_comes_and_goes_while_it_is_told_does_no_harm() -> None:
    crowd = Crowd(FEW)

    def go() -> None:
        crowd.observers.remove(go)
        crowd.observers.add(lambda: None)

    crowd.observers.add(go)
    crowd.observers.tell()
    assert len(crowd.told) == FEW


def test_who_stops_tells_nothing() -> None:
    crowd = Crowd(MANY)
    assert crowd.tell(2) == 1
    crowd.observers.stop()
    crowd.observers.stop()
    assert not crowd.clock.getDelayedCalls()
