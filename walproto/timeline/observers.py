"""Who is told that a timeline has more WAL, and how often.

With a hundred clients that follow, each commit is a hundred system calls, of which one that sends
ten commits costs hardly more than one that sends a single one.  So when many have been told, the
next news waits: for a tenth of a millisecond for each of them, some twenty times what telling them
took, and ten milliseconds at most.  Then the clients have but a small share of a processor, however
small and many the commits are.  What comes after a pause is told at once, and with a few clients so
is everything.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

REST = 0.0001
"""Seconds, for each that is told, before the next news is."""
LONGEST = 0.010
"""Seconds that news waits, at most."""
SHORTEST = 0.001
"""Seconds that are worth waiting; a reactor's timers are no more exact than this."""


class Observers:
    """Calls the observers, on the reactor ``clock``."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._observers: set[Callable[[], None]] = set()
        self._not_before = 0.0
        self._waiting: IDelayedCall | None = None

    def add(self, observer: Callable[[], None]) -> None:
        self._observers.add(observer)

    def remove(self, observer: Callable[[], None]) -> None:
        self._observers.discard(observer)

    @property
    def rest(self) -> float:
        """Seconds until news would be told."""
        rest = self._not_before - self._clock.seconds()
        return min(max(rest, 0.0), LONGEST)  # the clock may be set back

    def tell(self) -> None:
        """There is news: tell it now, or when it is time for that."""
        if self._waiting is None:
            rest = self.rest
            if rest:
                self._waiting = self._clock.callLater(rest, self._tell)
            else:
                self._tell()

    def stop(self) -> None:
        """Tell nothing more."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _tell(self) -> None:
        self._waiting = None
        rest = min(len(self._observers) * REST, LONGEST)
        for observer in list(self._observers):
            observer()
        if rest >= SHORTEST:
            self._not_before = self._clock.seconds() + rest
