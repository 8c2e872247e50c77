"""The safekeeper's walsender: each client is served the timeline that it names.

Which rules are for which client:

- ``application_name=wal_proposer_recovery``: all WAL that there is, committed or not, and its end;
- ``application_name=pageserver``, and whoever names a ``pageserver_connstr``: what is committed; it
  is asked how far it is after each second without news, and let go when it has all and no proposer
  is connected;
- all others: what is committed, as PostgreSQL streams.

An embedding program serves a directory so, and says what it knows sooner than the control files::

    directory = DataDirectory("/srv/safekeeper", reactor)
    safekeeper = Safekeeper(directory, reactor)
    reactor.listenTCP(5433, WalSenderFactory(safekeeper, reactor, max_wal_senders=100))

    timeline = directory.get(TimelineIds(tenant_id, timeline_id))
    timeline.is_proposer_connected = True
    timeline.advance(commit_lsn)

Neon: ``handler.rs`` in the safekeeper.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakValueDictionary

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from zope.interface import implementer

from walproto.access.grant import Grant
from walproto.neon.data_directory import DataDirectory, no_such_timeline
from walproto.neon.ids import Request, requested_ids
from walproto.neon.pageservers import Pageservers
from walproto.neon.streams import Committed, PageserverStream, Recovery
from walproto.neon.timeline import SafekeeperTimeline
from walproto.server.configuration import Configuration, parse_version
from walproto.server.producer import Piece
from walproto.server.results import Wait
from walproto.server.service import IServices, Service, Stream
from walproto.server.settings import Settings
from walproto.wire.messages import PROTOCOL_3_0, PROTOCOL_3_2
from walproto.wire.startup import Startup

PAGESERVER = "pageserver"
RECOVERY = "wal_proposer_recovery"

COMPLAINT = 1.0
"""Seconds between two lines that say that a client waits for a proposer."""


@implementer(IServices)
class Safekeeper:
    """Serves the timelines in ``directory``, until :meth:`stop`.  ``clock`` is the reactor."""

    _log = Logger()

    def __init__(
        self,
        directory: DataDirectory,
        clock: IReactorTime,
        pageservers: Pageservers | None = None,
    ) -> None:
        self.directory = directory
        self.clock = clock
        self.pageservers = Pageservers() if pageservers is None else pageservers
        self._pieces: WeakValueDictionary[SafekeeperTimeline, Piece] = WeakValueDictionary()

    def start(self) -> None:
        """Nothing needs to be done; the operator is told."""
        self._log.info("serving the timelines in {path}", path=str(self.directory.path))

    def stop(self) -> Deferred[None]:
        """Call no pageserver any more; fires when no call is under way."""
        return self.pageservers.stop()

    def piece(self, timeline: SafekeeperTimeline) -> Piece:
        """The one that all streams of what is committed share."""
        piece = self._pieces.get(timeline)
        if piece is None:
            piece = self._pieces[timeline] = Piece(timeline)
        return piece

    # --- IServices -------------------------------------------------------------------------

    def newest_protocol_version(self, configuration: Configuration) -> int:
        """Which timeline a client asks for, and so which major it is to see, is not known yet."""
        version = configuration.server_version
        is_old = version is not None and parse_version(version)[0] < 18
        return PROTOCOL_3_0 if is_old else PROTOCOL_3_2

    def require_ready(self) -> None:
        """Each timeline is ready, or not, by itself."""

    def serve(self, startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        request = requested_ids(startup.parameters, startup.options)
        if not grant.may_see(request.ids.tenant_id, request.ids.timeline_id):
            raise no_such_timeline(request.ids, log="this client may not see it")
        startup = replace(startup, parameters=request.parameters, options=request.options)
        timeline = self.directory.get(request.ids)
        return SafekeeperService(self, timeline, request, startup, configuration)


class SafekeeperService(Service):
    """What one connection is served that has made a ``request``.

    As long as a timeline waits for a proposer, the client is answered what the control file says,
    with a segment size of 0 if it is not known; WAL it has to wait for.
    """

    _log = Logger()
    log_prefix = "timeline {tenant}/{timeline}: "
    why_no_slots = "there are no slots on a safekeeper's WAL"

    def __init__(
        self,
        safekeeper: Safekeeper,
        timeline: SafekeeperTimeline,
        request: Request,
        startup: Startup,
        configuration: Configuration,
    ) -> None:
        super().__init__(timeline, safekeeper.piece(timeline), startup, configuration)
        self.log_fields = {"tenant": request.ids.tenant_id, "timeline": request.ids.timeline_id}
        self._safekeeper = safekeeper
        self._safekeeper_timeline = timeline
        self._ids = request.ids
        self._connstr = request.pageserver_connstr

    def open(self) -> Wait:
        opened = self._safekeeper_timeline.opened()
        try:
            if not opened.called:
                yield opened
        finally:
            opened.cancel()

    def require_ready(self) -> None:
        if not self._safekeeper_timeline.is_waiting_for_proposer:
            self.timeline.require_ready()

    def greeted(self, settings: Settings) -> None:
        if self._connstr and settings["application_name"] not in (PAGESERVER, RECOVERY):
            self._safekeeper.pageservers.subscribe(self._ids, self._connstr)

    def ready_to_stream(self) -> Wait:
        self._safekeeper.directory.get(self._ids)  # it may have been suspended meanwhile
        yield from self.open()
        if self._safekeeper_timeline.is_waiting_for_proposer:
            yield from self._wait_for_proposer()
            yield from self.open()
        self.timeline.require_ready()

    def _wait_for_proposer(self) -> Wait:
        timeline = self._safekeeper_timeline
        over = Deferred[None]()

        def look() -> None:
            if not timeline.is_waiting_for_proposer and not over.called:
                over.callback(None)

        complaints = LoopingCall(
            self._log.warn,
            self.log_prefix + "cannot start replication before a proposer has connected: waiting",
            **self.log_fields,
        )
        complaints.clock = self._safekeeper.clock
        timeline.add_observer(look)
        complaints.start(COMPLAINT)
        try:
            yield over
        finally:
            complaints.stop()
            timeline.remove_observer(look)

    def stream(self, settings: Settings) -> Stream:
        timeline, about = self._safekeeper_timeline, (self.log_prefix, self.log_fields)
        name = settings["application_name"]
        if name == RECOVERY:
            uncommitted = timeline.uncommitted()
            return Recovery(uncommitted, Piece(uncommitted), *about)
        if name == PAGESERVER or self._connstr:
            pageservers = self._safekeeper.pageservers
            return PageserverStream(timeline, self._piece, *about, pageservers, self._connstr)
        return Committed(timeline, self._piece)
