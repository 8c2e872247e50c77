"""Which pageserver a timeline belongs to, and that it is called when it does not stream.

It is the one that was subscribed last: a client named it that is none itself, an embedding program
did, or it came by itself and had not been there before.  One that has been replaced does not become
it again by coming back.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from walproto.neon.callback import Subscription
from walproto.neon.callmemaybe import Subscriptions
from walproto.neon.ids import TimelineIds

REMEMBERED = 8
"""Pageservers of one timeline that are told from new ones."""


class Pageservers:
    """The pageservers of many timelines, each known by its connection string, to the letter.

    Without ``subscriptions`` none is called.
    """

    _log = Logger()

    def __init__(self, subscriptions: Subscriptions | None = None) -> None:
        self._subscriptions = subscriptions
        self._named: dict[TimelineIds, list[str]] = {}
        self._said = False

    def subscribe(self, ids: TimelineIds, connstr: str) -> None:
        """The timeline belongs to that pageserver from now on; call it when it does not stream."""
        named = self._named.setdefault(ids, [])
        if connstr in named:
            named.remove(connstr)
        self._append(ids, named, connstr)
        if self._subscriptions is not None:
            self._subscriptions.subscribe(Subscription(ids, connstr))
        elif not self._said:
            self._said = True
            self._log.warn(
                "timeline {tenant}/{timeline}: its pageserver is not called, and none is: it takes "
                "an address that it can connect to (--advertise HOST:PORT)",
                tenant=ids.tenant_id,
                timeline=ids.timeline_id,
            )

    def unsubscribe(self, ids: TimelineIds, connstr: str) -> None:
        """Do not call that pageserver any more; the timeline is still its own."""
        if self._subscriptions is not None:
            self._subscriptions.unsubscribe(Subscription(ids, connstr))

    def belongs_to(self, ids: TimelineIds, connstr: str) -> bool:
        """Whether it is that pageserver's, and no other's."""
        return self._named.get(ids, [connstr])[-1] == connstr

    def stream_begins(self, ids: TimelineIds, connstr: str) -> bool:
        """That pageserver streams, and need not be called; whether :meth:`stream_ends` is to be
        called when that is over: not if the timeline belongs to another one already."""
        named = self._named.setdefault(ids, [])
        if connstr not in named:
            self._append(ids, named, connstr)
        if self._subscriptions is None or not self.belongs_to(ids, connstr):
            return False
        self._subscriptions.pause(Subscription(ids, connstr))
        return True

    def stream_ends(self, ids: TimelineIds, connstr: str) -> None:
        if self._subscriptions is not None:
            self._subscriptions.resume(Subscription(ids, connstr))

    def stop(self) -> Deferred[None]:
        """Call nobody any more; fires when no call is under way."""
        return succeed(None) if self._subscriptions is None else self._subscriptions.stop()

    def _append(self, ids: TimelineIds, named: list[str], connstr: str) -> None:
        """Make it the newest; who was that before, is not called any more."""
        for before in named[-1:]:
            self.unsubscribe(ids, before)
        named.append(connstr)
        del named[:-REMEMBERED]
