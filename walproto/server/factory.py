"""A WAL sender's connections: each gets a protocol, or is turned away, and all end together."""

from __future__ import annotations

import itertools
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from walproto.access.limits import Unauthenticated
from walproto.errors import TooManyConnections
from walproto.server.configuration import Configuration
from walproto.server.lending import Lender
from walproto.server.protocol import WalSenderProtocol
from walproto.server.refusal import Refusal
from walproto.server.service import IServices, OneTimeline
from walproto.server.transports import parse_address
from walproto.server.turns import Turns
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.slots import Slots

TOO_MANY = TooManyConnections(
    "sorry, too many clients already",
    fatal=True,
    log="too many have not authenticated yet: see --max-unauthenticated, and "
    "--max-unauthenticated-per-address",
)


class WalSenderFactory(Factory):
    """Makes a :class:`WalSenderProtocol` for every client that connects.

    Everybody is served the ``timeline``; or, if that is an :class:`IServices`, what it decides.
    ``slots`` are the replication slots on the timeline, None if there can be none.  ``workers``
    are other processes that send WAL (:mod:`walproto.workers.pool`), None if all is sent by this
    one.  ``clock`` is the reactor.  ``options`` are those of
    :class:`~walproto.server.configuration.Configuration`.
    """

    noisy = False
    _log = Logger()

    def __init__(
        self,
        timeline: ITimeline | IServices,
        clock: IReactorTime,
        *,
        slots: Slots | None = None,
        workers: Lender | None = None,
        **options: Any,
    ) -> None:
        self.services: IServices
        if IServices.providedBy(timeline):
            self.services = timeline
        else:
            self.services = OneTimeline(timeline, slots)
        self.configuration = Configuration(**options)
        self.clock = clock
        self.turns = Turns(clock)
        self.workers = workers
        self.connections: dict[int, WalSenderProtocol] = {}
        self.senders: set[int] = set()
        """The process IDs of those that count as WAL senders."""
        self.unauthenticated = Unauthenticated(
            self.configuration.max_unauthenticated,
            self.configuration.max_unauthenticated_per_address,
        )
        self._pids = itertools.count(1)
        self._awaiting_none: list[Deferred[None]] = []

    def buildProtocol(self, addr: object) -> Any:
        address = parse_address(getattr(addr, "host", ""))
        if not self.unauthenticated.enter(address):
            return Refusal(TOO_MANY)
        return WalSenderProtocol(self, next(self._pids), address)

    def connection_gone(self, connection: WalSenderProtocol) -> None:
        self.connections.pop(connection.pid, None)
        if not self.connections:
            awaiting, self._awaiting_none = self._awaiting_none, []
            for deferred in awaiting:
                deferred.callback(None)

    def shut_down(self, timeout: float) -> Deferred[None]:
        """Send clients what may be sent, tell them, and wait until they are gone.

        After ``timeout`` seconds those that have not confirmed are disconnected all the same.
        The Deferred fires with None when no connection is left.
        """
        for connection in list(self.connections.values()):
            connection.shut_down()
        if not self.connections:
            return succeed(None)
        none_left = Deferred[None]()
        self._awaiting_none.append(none_left)
        last_call = self.clock.callLater(timeout, self.abort_all)

        def done(result: None) -> None:
            if last_call.active():
                last_call.cancel()

        return none_left.addCallback(done)

    def abort_all(self) -> None:
        """Disconnect everybody now."""
        if self.connections:
            self._log.warn(
                "disconnecting {count} clients that have not confirmed what they were sent",
                count=len(self.connections),
            )
        for connection in list(self.connections.values()):
            connection.abort()
