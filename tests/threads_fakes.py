"""A thread that is none: for tests in which nothing depends on when its work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.python.failure import Failure


class AtOnce:
    """A :class:`~walproto.timeline.threads.Threads` that does everything at once."""

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        try:
            return succeed(work())
        except Exception:
            return fail(Failure())

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        what(*arguments)
