"""Timers of a stream.  Whether the client is still there: ``wal_sender_timeout``.

A replica says something at least every few seconds.  One that has been silent for half of the
timeout is asked, with a keepalive that requests a reply; when the whole of it has gone by, it is
given up.  PostgreSQL: ``WalSndKeepaliveIfNecessary``, ``WalSndCheckTimeOut``.

One timer for each client, which looks when it rings whether it rang too early: hearing from the
client costs no more than taking the time.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Heartbeat:
    """Calls ``ask`` after ``timeout`` / 2 seconds of silence, ``give_up`` after all of them; never
    if ``timeout`` is 0."""

    def __init__(
        self,
        clock: IReactorTime,
        timeout: float,
        ask: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._timeout = timeout
        self._ask = ask
        self._give_up = give_up
        self._heard = 0.0
        self._asked = False
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        self.heard()
        if self._timeout > 0:
            self._timer = self._clock.callLater(self._timeout / 2, self._ring)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def heard(self) -> None:
        """The client has said something."""
        self._heard = self._clock.seconds()
        self._asked = False

    def ask(self) -> None:
        """Ask now, unless the client has been asked and has not answered yet."""
        if not self._asked:
            self._asked = True
            self._ask()

    def _ring(self, is_last: bool = False) -> None:
        self._timer = None
        silence = self._clock.seconds() - self._heard
        if silence >= self._timeout:
            if is_last:
                self._give_up()
            else:  # it may be we who were busy: what has come in meanwhile is read first
                self._timer = self._clock.callLater(0, self._ring, True)
            return
        if silence >= self._timeout / 2:
            self.ask()
        wait = self._timeout if self._asked else self._timeout / 2
        self._timer = self._clock.callLater(max(wait - silence, 0), self._ring)


class Lull:
    """Calls ``ring`` whenever there has been nothing to send for ``patience`` seconds, and
    ``check`` before that and at least every ``patience`` seconds in any case.

    ``idle_since`` says since when (``clock.seconds()``).  It may ring up to ``patience`` later than
    that if there was something to send when it looked.
    """

    def __init__(
        self,
        clock: IReactorTime,
        patience: float,
        idle_since: Callable[[], float],
        check: Callable[[], None],
        ring: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._patience = patience
        self._idle_since = idle_since
        self._check = check
        self._ring = ring
        self._timer: IDelayedCall | None = clock.callLater(patience, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        wait = self._idle_since() + self._patience - self._clock.seconds()
        self._timer = self._clock.callLater(wait if wait > 0 else self._patience, self._look)
        self._check()
        if wait <= 0 and self._timer is not None:
            self._ring()
