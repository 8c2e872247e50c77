"""Turns: who has much to send shares the reactor with all others.

A client that catches up takes as much as it is given, a socket buffer at a time; fifty of them
would take that long that a client which follows the tail waited for a tenth of a second.  So in
each turn of the reactor one burst is sent to one of them, and the others wait in a queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

Burst = Callable[[], None]


class Turns:
    """Calls one burst in each turn of the reactor, which is ``clock``."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._waiting: deque[Burst] = deque()
        self._next: IDelayedCall | None = None

    def ask(self, burst: Burst) -> None:
        """Have ``burst`` called, when those have been that asked before."""
        self._waiting.append(burst)
        self._schedule()

    def leave(self, burst: Burst) -> None:
        """Take back ``ask``, if it has not been called yet."""
        if burst in self._waiting:
            self._waiting.remove(burst)

    def _schedule(self) -> None:
        if self._next is None and self._waiting:
            self._next = self._clock.callLater(0, self._take)

    def _take(self) -> None:
        self._next = None
        if self._waiting:  # who asked may have left
            burst = self._waiting.popleft()
            self._schedule()
            burst()
