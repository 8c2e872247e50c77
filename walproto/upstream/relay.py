"""A relay: a timeline that is received from a live server and served at the same time.

:class:`WalRelay` connects to the server, holds a
:class:`~walproto.upstream.conversation.Conversation` with it, and when that ends, whyever, does
so again, for as long as it runs.  What it receives its :class:`~walproto.upstream.store.Store`
makes durable, in a directory that a :class:`~walproto.timeline.directory.WalDirectory` serves; the
two share a :class:`~walproto.timeline.received.Received`, which says how far that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from twisted.application.internet import backoffPolicy
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.lsn import format_lsn, segment_name
from walproto.timeline.directory import WalDirectory
from walproto.timeline.holding import examine
from walproto.timeline.received import Received
from walproto.timeline.retention import Retention
from walproto.timeline.slots import SlotOptions, Slots, SlotsError
from walproto.timeline.threads import OneThread
from walproto.upstream.connection import UpstreamError
from walproto.upstream.conversation import Conversation, Refusal, UpstreamOptions
from walproto.upstream.fence import Fence
from walproto.upstream.lock import DirectoryLock
from walproto.upstream.store import Store
from walproto.wal.segments import Stamp, stamp_of
from walproto.wal.writer import SyncError

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds between two tries to connect: at first, and after many in vain."""


class WalRelay:
    """Receives WAL from the server at ``conninfo``, a libpq connection string, into ``directory``.

    What is there is in :attr:`timeline`, to be served; that goes on when the receiving is stopped.
    What is kept of it, and which slots there may be on it, ``slot_options`` say; the slots are in
    :attr:`slots`.  ``options`` are those of
    :class:`~walproto.upstream.conversation.UpstreamOptions`.  ``failed``
    is called once if the receiving can never go on, with the error: a SyncError, when the disk
    does not keep what it is given.  Nothing is acknowledged from then on, and the program should
    end.

    Needs psycopg: ``walproto[upstream]``.  Raises ValueError if ``conninfo`` is no connection
    string, or if ``directory`` is not to be received into, as when another relay does already;
    SlotsError, which is one, if the slots in it cannot be used.
    """

    _log = Logger()

    def __init__(
        self,
        directory: Path | str,
        conninfo: str,
        reactor: Any,
        *,
        failed: Callable[[Exception], None] = lambda error: None,
        slot_options: SlotOptions | None = None,
        **options: Any,
    ) -> None:
        from walproto.upstream import libpq

        self._connect = partial(libpq.connect, reactor)
        self._conninfos = libpq.replication_conninfos(conninfo)
        self._options = UpstreamOptions(**options)
        self._directory = Path(directory)
        self._lock = DirectoryLock(self._directory)
        self._slot_threads = OneThread(reactor, "slots")
        self.slots = self._read_slots(slot_options or SlotOptions())
        self._reactor = reactor
        self._failed = failed
        self._threads = OneThread(reactor, "disk")
        self._fence = Fence(self._directory)
        self._fence_lsn: int | None = None
        self._received = received = Received()
        received.walked = self._walked
        self.timeline = WalDirectory(directory, reactor, received=received)
        self._retention = Retention(self.timeline, self.slots, reactor, self._slot_threads)
        self._store = Store(
            self._directory, received, reactor, self._threads, self._progressed, self._broken
        )
        self._conversation: Conversation | None = None
        self._running: Deferred[None] | None = None
        self._wait_for = backoffPolicy(FIRST_WAIT, LONGEST_WAIT, factor=2)
        self._tries = 0
        self._turn = 0
        self._said: set[str] = set()
        self._passing: set[str] = set()
        self._shown = (0, 0, 0)
        self._streams_since: float | None = None
        self._newest = self._directory
        self._seen: list[Stamp] = []

    def _read_slots(self, options: SlotOptions) -> Slots:
        try:
            return Slots(self._directory, self._slot_threads, options)
        except SlotsError:
            self._lock.release()
            raise

    def start(self) -> None:
        """Find out what the directory holds, serve it, and begin to receive."""
        self._retention.start()
        self._running = ensureDeferred(self._run())
        self._running.addErrback(self._ended)

    def stop(self) -> Deferred[None]:
        """Receive no more, remove no more.  Fires when all that was received is on disk, and the
        slots are; what clients still confirm does not get there."""
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
        await self._store.stop()
        await self._retention.stop()
        try:
            await self.slots.stop()
        except (OSError, SyncError) as error:
            self._log.critical(
                "cannot save replication slots in {directory}: {what}: after the next start they "
                "are where they were when they were last saved",
                directory=str(self._directory),
                what=getattr(error, "strerror", None) or error,
            )
        self._threads.stop()
        self._slot_threads.stop()
        self._lock.release()

    async def _run(self) -> None:
        await self._look()
        self._fence_lsn = self._fence.read()
        self.timeline.fence(self._fence_lsn)
        self.timeline.start()
        while True:
            self._streams_since = None
            try:
                await self._receive()
            except UpstreamError as error:
                self._tell(self._log.warn, f"{error}: trying again")
                self._passing.add(f"{error}: trying again")
            except OSError as error:
                self._tell(self._log.critical, f"{self._directory}: {error.strerror}")
            except Refusal as refusal:
                self._tell(self._log.critical, f"{refusal}")
                self._turn += 1
                await self._store.when_idle()
                await self._refuse(refusal)
            except (CancelledError, SyncError):
                raise
            except Exception:
                self._log.failure("a defect in walproto: connecting to the upstream again")
            since = self._streams_since
            if since is not None and self._reactor.seconds() - since > LONGEST_WAIT:
                self._tries = 0
                self._said.clear()
            await self._store.when_idle()
            await deferLater(self._reactor, self._wait_for(self._tries))
            self._tries += 1

    async def _refuse(self, refusal: Refusal) -> None:
        """We do not want that server's WAL."""
        lsn = refusal.fence_lsn
        try:
            if lsn is not None and lsn != self._fence_lsn:
                self.timeline.fence(lsn)
                await self._threads.run(lambda: self._fence.put_up(lsn, str(refusal)))
                self._fence_lsn = lsn
            self._rewind()
            await self._look()
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            self._tell(self._log.critical, f"{self._directory}: {what}")

    async def _look(self) -> None:
        """Find out what is in the directory.  If it was known, somebody may have put missing
        segments there since, or be about to: what is there behind a gap does not count."""
        paths = (self._directory, self._newest)
        seen = [stamp_of(os.stat(path)) for path in paths if path.exists()]
        if seen == self._seen:
            return
        self._seen = seen
        holding = await self._threads.run(lambda: examine(self._directory))
        await self._store.when_idle()
        if holding is None:
            return
        self._newest = holding.path
        here = self._store.received_lsn
        if holding.end > here and (
            self._store.identity is None or await self._threads.run(lambda: holding.joins(here))
        ):
            self._store.go_on_from(holding)

    async def _receive(self) -> None:
        """Connect and receive for as long as it goes well."""
        connection = await self._connect(self._conninfos[self._turn % len(self._conninfos)])
        self._conversation = Conversation(
            connection,
            self._directory,
            self._store,
            self._oldest_xmins,
            self._options,
            self._reactor,
            self._threads,
            self._streaming,
        )
        try:
            await self._conversation.hold()
        finally:
            self._conversation = None
            connection.lose("we are done with it")

    def _oldest_xmins(self) -> tuple[int, int]:
        """What the replicas need that are connected, and those that are away and have a slot."""
        xmins, catalog = zip(
            self.timeline.replicas.oldest_xmins(), self.slots.oldest_xmins(), strict=True
        )
        return min(filter(None, xmins), default=0), min(filter(None, catalog), default=0)

    def _streaming(self) -> None:
        """WAL is about to come."""
        self._streams_since = self._reactor.seconds()
        self._said -= self._passing
        self._passing.clear()
        if self._fence_lsn is not None:
            self._fence.take_down()
            self._log.warn(
                "the fence at {lsn} is taken down: this upstream's WAL goes on from ours",
                lsn=format_lsn(self._fence_lsn),
            )
            self._fence_lsn = None
        self.timeline.fence(None)

    def _progressed(self) -> None:
        received = self._received
        shown = received.tli, received.written_to, received.synced_to
        if self._store.flush_lsn and self._shown != shown:
            self._shown = shown
            self.timeline.show()
        if self._conversation is not None:
            self._conversation.progressed()

    def _walked(self) -> None:
        """The records of what came have been looked at."""
        if self._conversation is None:
            return
        self._conversation.progressed()
        stopped_at, identity = self._received.stopped_at, self._store.identity
        if stopped_at is not None and identity is not None and not self._store.cannot_write:
            size = identity.segment_size
            name = segment_name(self._store.tli, stopped_at // size, size)
            self._conversation.refuse(
                Refusal(
                    f"the WAL that came for {format_lsn(stopped_at)} does not go on from what is "
                    f"here, or was damaged on its way: {self._received.reason}: nothing from there "
                    "on is acknowledged or served; if this does not end by itself, the server was "
                    "put back to an earlier state (to follow it takes an empty directory), or the "
                    f"segments from {name} on have to be moved elsewhere, with this walsender "
                    "stopped, to be fetched again"
                )
            )

    def _rewind(self) -> None:
        """Go back to before the WAL that was wrong, if that is in the segment that is written to:
        those before have their names, and nothing in the directory is undone by us."""
        lsn, identity = self._received.stopped_at, self._store.identity
        if lsn is None or identity is None:
            return
        size, end = identity.segment_size, self._store.received_lsn
        if end % size and lsn // size == end // size:
            proven = min(self._store.proven_lsn, lsn)
            self._store.begin(self._store.tli, lsn, size, synced_to=lsn, flush_lsn=proven)

    def _tell(self, log: Callable[..., None], text: str) -> None:
        """Tell the operator, once, what is wrong."""
        if text not in self._said:
            self._said.add(text)
            log("upstream: {text}", text=text)

    def _ended(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            assert isinstance(failure.value, Exception)
            self._broken(failure.value)

    def _broken(self, error: Exception) -> None:
        """It can never go on."""
        what = str(error)
        if isinstance(error, SyncError):
            what += (
                ": what is on disk is not known any more, so nothing more is acknowledged: see to "
                "the disk, then start again"
            )
        elif not isinstance(error, (OSError, ValueError)):
            self._log.failure("a defect in walproto", Failure(error))
        self._log.critical("nothing more is received: {what}", what=what)
        if self._running is not None:
            self._running.cancel()
        self._failed(error)
