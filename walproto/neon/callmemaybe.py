"""Call-backs: which pageservers are called, and when.

A pageserver that a timeline is subscribed for is called until it streams that timeline, and again
when its stream has ended.  What a call is, :mod:`walproto.neon.callback` knows.

Neon: ``callmemaybe.rs`` of the safekeeper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredList,
    DeferredSemaphore,
    TimeoutError,
    maybeDeferred,
)
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.neon.callback import CallError, Subscription, pageserver_name

RECALL_PERIOD = 10.0
"""Seconds from one call to the next, unless the operator says otherwise."""

SHORTEST_WAIT = 1.0
"""Seconds from one call to the next at least, for a pageserver whose streams end as they begin."""

CALLS_AT_ONCE = 8
"""Calls to one pageserver that may be under way at the same time.  Each takes a thread while it
connects, and a file descriptor; with a thousand timelines at a silent host, it adds up."""

Call = Callable[[Subscription], Deferred[None]]
"""Makes one call.  Its Deferred fires when that is done, or fails with a CallError; cancelled, it
must fail at once, with a CancelledError."""


class Subscriptions:
    """Calls pageservers until they stream.

    A subscription is called at the next turn of the reactor, and then every ``recall_period``
    (seconds, more than 0) until a stream pauses it.  A call that is not done by the time of the
    next one is abandoned.  The next one comes later only if it has to wait for other calls to the
    same pageserver, of which CALLS_AT_ONCE are under way; they take turns.

    What goes wrong is logged once for each kind of error, and once more after a stream.
    """

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, call: Call, recall_period: float = RECALL_PERIOD
    ) -> None:
        if not 0 < recall_period < math.inf:
            raise ValueError(f"{recall_period:g} s is no recall period: it must be more than 0")
        self._clock = clock
        self._call = call
        self._recall_period = recall_period
        self._known: dict[Subscription, _State] = {}
        self._queues: WeakValueDictionary[str, DeferredSemaphore] = WeakValueDictionary()
        self._is_stopped = False

    def subscribe(self, subscription: Subscription) -> None:
        """Call that pageserver for that timeline whenever it does not stream it."""
        if self._is_stopped:
            return
        state = self._state(subscription)
        if not state.is_subscribed:
            state.is_subscribed = True
            self._tell(self._log.info, state, "to be called when it does not stream")
            self._start(state)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Call it no more; a call that is under way is abandoned.

        Streams that are up still count, should it be subscribed again before they end.
        """
        state = self._known.get(subscription)
        if state is not None and state.is_subscribed:
            state.is_subscribed = False
            self._tell(self._log.info, state, "not to be called any more")
            state.cancel()
            self._forget(state)

    def pause(self, subscription: Subscription) -> None:
        """A stream to that pageserver has begun.  If it was not subscribed, it is now.

        Streams are counted, so each pause takes one :meth:`resume`.  A pageserver whose connection
        broke may be back before we notice that the old one is dead; if the last event counted, it
        would be called when that one ends, though it streams.

        A call that is under way may come to its end: a pageserver may connect before it answers.
        """
        if self._is_stopped:
            return
        state = self._state(subscription)
        state.streams += 1
        state.is_subscribed = True
        if state.said:
            self._tell(self._log.info, state, "streams now")
            state.said.clear()
        if not state.is_calling:
            state.cancel()

    def resume(self, subscription: Subscription) -> None:
        """A stream to that pageserver has ended; if there was none, nothing happens."""
        state = self._known.get(subscription)
        if state is None or not state.streams:
            return
        state.streams -= 1
        if not state.streams:
            state.cancel()  # a call from before the stream, which hangs
            self._start(state)
            self._forget(state)

    def stop(self) -> Deferred[None]:
        """Abandon every call, make no more, and ignore everything from then on.  Fires when
        nothing is left."""
        self._is_stopped = True
        states = list(self._known.values())
        self._known.clear()
        running = [state.running for state in states if state.running is not None]
        for state in states:
            state.cancel()
        stopped: Deferred[Any] = DeferredList(running)
        return stopped.addCallback(lambda _: None)

    # --- within ----------------------------------------------------------------------------

    def _state(self, subscription: Subscription) -> _State:
        state = self._known.get(subscription)
        if state is None:
            connstr = subscription.pageserver_connstr
            queue = self._queues.get(connstr) or DeferredSemaphore(CALLS_AT_ONCE)
            self._queues[connstr] = queue
            state = _State(subscription, pageserver_name(connstr), queue)
            self._known[subscription] = state
        return state

    def _forget(self, state: _State) -> None:
        """Forget it, if there is nothing to remember."""
        if not state.is_subscribed and not state.streams:
            del self._known[state.subscription]

    def _start(self, state: _State) -> None:
        if state.is_wanted:
            state.running = Deferred.fromCoroutine(self._run(state))
            state.running.addErrback(self._ended)

    def _ended(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._log.failure("a defect in walproto", failure)

    async def _run(self, state: _State) -> None:
        """Call it again and again, as long as that is wanted."""
        turn = state.turn
        wait = min(SHORTEST_WAIT, self._recall_period)
        while state.is_wanted and state.turn == turn:
            since = self._clock.seconds() - state.called_at
            await deferLater(self._clock, max(0.0, wait - since))
            async with state.queue:
                await deferLater(self._clock, 0)  # or a long queue would be a deep recursion
                await self._call_once(state)
            wait = self._recall_period

    async def _call_once(self, state: _State) -> None:
        state.called_at = self._clock.seconds()
        state.is_calling = True
        try:
            call = maybeDeferred(self._call, state.subscription)
            await call.addTimeout(self._recall_period, self._clock)
            self._tell(self._log.debug, state, "has been called")
        except CancelledError:
            raise
        except CallError as error:
            self._complain(state, error.kind, str(error))
        except TimeoutError:
            text = f"no answer within {self._recall_period:g} s: see what holds it up"
            self._complain(state, "silence", text)
        except Exception as error:
            kind = type(error).__name__
            if kind not in state.said:
                state.said.add(kind)
                self._log.failure("a defect in walproto: calling again")
        finally:
            state.is_calling = False

    def _complain(self, state: _State, kind: str, text: str) -> None:
        """Tell the operator, once, what is wrong."""
        if kind not in state.said:
            state.said.add(kind)
            again = f"calling again every {self._recall_period:g} s"
            self._tell(self._log.warn, state, f"{text}; {again}")

    def _tell(self, log: Callable[..., None], state: _State, text: str) -> None:
        log(
            "pageserver {pageserver} for timeline {tenant}/{timeline}: {text}",
            pageserver=state.pageserver,
            tenant=state.subscription.ids.tenant_id,
            timeline=state.subscription.ids.timeline_id,
            text=text,
        )


@dataclass(eq=False, slots=True)
class _State:
    """How it stands with a subscription.

    ``running`` calls and waits, again and again, while that ``is_wanted`` and ``turn`` is the same:
    to cancel it is in vain while a call tells of its end.  ``queue`` is that of its pageserver,
    ``called_at`` the time of the last call; ``said`` are the kinds of errors that have been logged.
    """

    subscription: Subscription
    pageserver: str
    queue: DeferredSemaphore
    is_subscribed: bool = False
    streams: int = 0
    running: Deferred[None] | None = None
    turn: int = 0
    is_calling: bool = False
    called_at: float = -math.inf
    said: set[str] = field(default_factory=set)

    @property
    def is_wanted(self) -> bool:
        return self.is_subscribed and not self.streams

    def cancel(self) -> None:
        self.turn += 1
        running, self.running = self.running, None
        if running is not None:
            running.cancel()
