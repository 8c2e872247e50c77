"""What a connection needs so that another process may send its WAL.

Whoever sends has the stream to itself: while the socket is lent, nothing is written to it here.
Taking it back takes a moment, for what is left of a message that was begun there has to be sent
first; until then what is to be done with the transport waits in an :class:`Outlet`, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from walproto.server.producer import Listener
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replica


class Outlet:
    """The way to a transport, which may be held."""

    def __init__(self, held: Callable[[], None], free: Callable[[], None]) -> None:
        self._held = held
        self._free = free
        self._waiting: list[Callable[[], None]] = []
        self.is_held = False

    def do(self, action: Callable[[], None]) -> None:
        """Do this with the transport, now or when all that waits is done."""
        if self.is_held:
            self._waiting.append(action)
        else:
            action()

    def hold(self) -> None:
        """Have everything wait; ``held`` is called."""
        self.is_held = True
        self._held()

    def let_go(self) -> None:
        """Do what has waited, if it was held; ``free`` is called behind that."""
        if self.is_held:
            self.is_held = False
            waiting, self._waiting = self._waiting, []
            for action in waiting:
                action()
            self._free()


class Sending(Protocol):
    """WAL being sent to a replica, here (:class:`~walproto.server.producer.WalProducer`) or
    elsewhere."""

    @property
    def idle_since(self) -> float:
        """Since when there has been nothing to send (``clock.seconds()``); now, if there is."""

    @property
    def is_finishing(self) -> bool:
        """Whether the server shuts down, and only what there is will be sent."""

    def start(self) -> None:
        """Say CopyBothResponse and begin."""

    def finish(self) -> None:
        """Have ``caught_up`` called, now or when it is so, and whenever there was more to send."""

    def stop(self) -> None:
        """Send nothing more, and leave the transport to others."""

    def stopProducing(self) -> None:
        """The connection is lost."""

    def send_keepalive(self, reply_requested: bool) -> None:
        """Send a primary keepalive message, now or when the client takes something again."""


class Lender(Protocol):
    """Has WAL sent elsewhere: :class:`walproto.workers.pool.Workers`."""

    def lend(
        self,
        transport: Any,
        outlet: Outlet,
        timeline: ITimeline,
        replica: Replica,
        listener: Listener,
    ) -> Sending | None:
        """What sends ``replica`` the WAL of ``timeline`` from its ``sent_lsn`` on; None if nobody
        does that now, on such a transport, or of such a timeline."""
