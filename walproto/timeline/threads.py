"""Where the waiting for a disk is done: not in the reactor's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure


class Threads(Protocol):
    """Somewhere else than in the reactor's thread."""

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        """Run ``work`` in a thread; its result."""

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        """For ``work`` to have something called in the reactor's thread."""


class ReactorThreads:
    """The threads of the reactor's pool, a few of them, :class:`Threads` for what many wait for."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        self._reactor.callFromThread(what, *arguments)


class OneThread:
    """A thread for all that waits for the disk, :class:`Threads` of one.

    It does one thing after another, and takes less time to begin than one of a pool.
    """

    def __init__(self, reactor: Any, name: str) -> None:
        self._reactor = reactor
        self._work: SimpleQueue[tuple[Callable[[], Any], Deferred[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        if self._thread.ident is None:
            self._thread.start()
        result = Deferred[Any]()
        self._work.put((work, result))
        return result

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        self._reactor.callFromThread(what, *arguments)

    def stop(self) -> None:
        """Do nothing more."""
        self._work.put(None)

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            work, result = task
            try:
                self.tell(result.callback, work())
            except BaseException:
                self.tell(result.errback, Failure())
