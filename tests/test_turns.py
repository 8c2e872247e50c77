"""Turns: one burst in each turn of the reactor."""

from __future__ import annotations

from functools import partial

from tests.fakes import Rounds
from walproto.server.turns import Turns


def test_each_has_a_turn_of_its_own_in_order() -> None:
    clock, told = Rounds(), list[str]()
    turns = Turns(clock)
    for name in "abc":
        turns.ask(partial(told.append, name))
    assert not told
    for number in (1, 2, 3):
        clock.go_round()
        assert told == list("abc"[:number])
    assert not clock.getDelayedCalls()


def test_who_asks_again_from_within_its_burst_comes_behind_the_others() -> None:
    clock, told = Rounds(), list[str]()
    turns = Turns(clock)

    def burst(name: str) -> None:
        told.append(name)
        if len(told) < 6:  # and so one more, who had asked before
            turns.ask(partial(burst, name))

    turns.ask(partial(burst, "a"))
    turns.ask(partial(burst, "b"))
    for _ in range(10):
        clock.go_round()
    assert told == ["a", "b", "a", "b", "a", "b", "a"]


def test_who_has_left_is_not_called() -> None:
    clock, told = Rounds(), list[str]()
    turns = Turns(clock)
    a, b, c = (partial(told.append, name) for name in "abc")
    for burst in (a, b, c):
        turns.ask(burst)
    turns.leave(b)
    turns.leave(b)
    for _ in range(3):
        clock.go_round()
    assert told == ["a", "c"]
