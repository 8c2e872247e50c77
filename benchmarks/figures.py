"""Figures: what was measured, round by round, of walproto and of PostgreSQL.

A ratio is that of one round, in which both were measured one after the other; what is shown is the
rounds' median, and the least and the greatest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

AT_LEAST, AT_MOST = "≥", "≤"


@dataclass(frozen=True)
class Goal:
    """What a figure is to be: `sign` is AT_LEAST or AT_MOST, and the limit is that of the ratio, or
    of walproto's own value if `of_ratio` is false."""

    sign: str
    limit: float
    of_ratio: bool = True

    def is_met(self, figure: Figure) -> bool:
        value = statistics.median(figure.ratios if self.of_ratio else figure.ours)
        return value >= self.limit if self.sign == AT_LEAST else value <= self.limit

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}{' x' if self.of_ratio else ''}"


@dataclass(frozen=True)
class Figure:
    """One line of the table; without `theirs` where PostgreSQL has nothing to compare."""

    what: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    goal: Goal | None = None

    @property
    def ratios(self) -> list[float]:
        """Walproto's value divided by PostgreSQL's, of each round."""
        if not self.theirs:
            return []
        return [one / other for one, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "yes" if self.goal.is_met(self) else "NO"


def alternate(rounds: int, *ways: Callable[[], T]) -> list[list[T]]:
    """Measure each way in each round, in the other order every other time; the results of each."""
    found: list[list[T]] = [[] for _ in ways]
    for number in range(rounds):
        turns = list(zip(ways, found, strict=True))
        for way, results in turns if number % 2 else reversed(turns):
            results.append(way())
    return found


def quantile(values: Sequence[float], q: float) -> float:
    """By nearest rank."""
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1]


def spread(values: Sequence[float]) -> str:
    """The median, and from where to where they go."""
    if not values:
        return ""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return _short(middle)
    return f"{_short(middle)} ({_short(low)}-{_short(high)})"


def table(figures: Sequence[Figure]) -> list[str]:
    """The lines of a plain-text table."""
    head = ("", "unit", "walproto", "PostgreSQL", "ratio", "goal", "met")
    rows = [
        (
            figure.what,
            figure.unit,
            spread(figure.ours),
            spread(figure.theirs),
            spread(figure.ratios),
            str(figure.goal or ""),
            figure.verdict,
        )
        for figure in figures
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, tuple("-" * width for width in widths), *rows)
    ]


def _short(value: float) -> str:
    """With three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"
