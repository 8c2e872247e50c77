"""Lets a client have its say, a turn at a time.

A client may say much at once: a flood of status updates, commands without end.  What one read of
the transport brought is dealt with some messages at a time, and between two turns the reactor goes
on with the others; meanwhile nothing more is read from this client.  Nor is it while the client
does not take the answers it has been given, so that neither they nor its questions pile up here.

While an answer waits for something, nothing is dealt with, but a few times more the client is read:
that it is gone is noticed, be it with a last word, and what it says does not pile up.

While WAL is streamed, what the client says is read all the same, whether it takes WAL or not.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from zope.interface import implementer

TURN = 64
"""Messages of a client that are dealt with before it is others' turn: less than a millisecond."""


UNHEARD = 4
"""Reads of the transport, of at most 64 kB each, that may wait to be dealt with."""


@implementer(IPushProducer)
class Reader:
    """Reads from ``transport``, an IPushProducer itself, as long as that is to be.

    ``deal`` deals with at most so many of the messages that have come in, and tells whether there
    may be more.  Between streams the reader is the transport's producer, for the answers.
    """

    def __init__(
        self, transport: IPushProducer, clock: IReactorTime, deal: Callable[[int], bool]
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._deal = deal
        self._is_reading = True
        self._is_blocked = False
        self._is_held = False
        self._is_stopped = False
        self._unheard = 0
        self._next_turn: IDelayedCall | None = None

    def go_on(self) -> None:
        """Something has come in."""
        if self._is_held:
            self._unheard += 1
            self._read_or_not()
        else:
            self._take_turn()

    def hold(self) -> None:
        """Deal with nothing for now."""
        self._is_held = True

    def let_go(self) -> None:
        """Deal with what has come in meanwhile, soon."""
        self._is_held = False
        self._unheard = 0
        self._schedule_turn()

    def release(self) -> None:
        """The transport has another producer from now on: read, whatever is not taken."""
        self._is_blocked = False
        self._read_or_not()

    def stop(self) -> None:
        """Deal with nothing more; what comes is read all the same, and thrown away: only so is the
        end of the connection noticed, and TLS needs to hear the client to end it."""
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        self._is_blocked = False
        self._unheard = 0
        self._read_or_not()
        self._is_stopped = True

    # --- IPushProducer, for the transport to call ------------------------------------------

    def pauseProducing(self) -> None:
        self._is_blocked = True
        self._read_or_not()

    def resumeProducing(self) -> None:
        self._is_blocked = False
        self._take_turn()

    def stopProducing(self) -> None:
        self.stop()

    def _take_next_turn(self) -> None:
        self._next_turn = None
        self._take_turn()

    def _take_turn(self) -> None:
        may_deal = not (self._is_stopped or self._is_blocked or self._is_held or self._next_turn)
        if may_deal and self._deal(TURN):
            self._schedule_turn()
        self._read_or_not()

    def _schedule_turn(self) -> None:
        if self._next_turn is None and not self._is_stopped:
            self._next_turn = self._clock.callLater(0, self._take_next_turn)

    def _read_or_not(self) -> None:
        if self._is_stopped:
            return
        is_reading = not (self._is_blocked or self._unheard >= UNHEARD or self._next_turn)
        if is_reading != self._is_reading:
            self._is_reading = is_reading
            if is_reading:
                self._transport.resumeProducing()
            else:
                self._transport.pauseProducing()
