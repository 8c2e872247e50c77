"""What is said on one connection to an upstream, from IDENTIFY_SYSTEM to its end.

It reads like what a standby's walreceiver says (``WalReceiverMain``): who are you, which timelines
do you know, stream from here.  At the end of a timeline it goes on with the next one, on the same
connection.  It ends with an exception in any case: an UpstreamError when the connection is gone or
the server does not do what it was asked for, a :class:`Refusal` when its WAL does not go on from
what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from walproto.errors import ProtocolViolation
from walproto.lsn import (
    PAGE_SIZE,
    format_lsn,
    history_name,
    segment_name,
)
from walproto.timeline.history import Ancestor
from walproto.timeline.holding import Holding, examine
from walproto.timeline.survey import load_history
from walproto.timeline.threads import Threads
from walproto.upstream.connection import UpstreamConnection, UpstreamError
from walproto.upstream.receiver import Receiver, Terms
from walproto.upstream.server import Commands, Server
from walproto.upstream.store import Store
from walproto.wal.headers import InvalidWal
from walproto.wal.incoming import IncomingWal
from walproto.wal.segments import Segments
from walproto.wal.writer import store_history

UNDEFINED_FILE = "58P01"
OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"
DUPLICATE_OBJECT = "42710"


class Refusal(Exception):
    """Why WAL is not received from a server that could be reached: for the operator, who has to
    do something about it.

    ``fence_lsn`` is where the server's history forked from ours, None if that is not the matter.
    """

    def __init__(self, message: str, fence_lsn: int | None = None) -> None:
        super().__init__(message)
        self.fence_lsn = fence_lsn


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """What the operator wants of the upstream; times are in seconds.

    ``slot`` is the replication slot's name, None for none, to be created if ``create_slot``;
    ``start_lsn`` is where to begin with an empty directory, 0 for what the slot or the server
    says; ``timeout`` is wal_receiver_timeout; ``feedback`` is hot_standby_feedback.
    """

    slot: str | None = None
    create_slot: bool = False
    start_lsn: int = 0
    timeout: float = 60.0
    feedback: bool = False


class Conversation:
    """One connection's conversation.

    ``xmins`` tells the oldest xmin and catalog_xmin that our replicas need; ``streaming`` is called
    when WAL has begun to come.
    """

    _log = Logger()

    def __init__(
        self,
        connection: UpstreamConnection,
        directory: Path,
        store: Store,
        xmins: Callable[[], tuple[int, int]],
        options: UpstreamOptions,
        clock: IReactorTime,
        threads: Threads,
        streaming: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._commands = Commands(connection, options.timeout, clock)
        self._directory = directory
        self._store = store
        self._xmins = xmins
        self._options = options
        self._clock = clock
        self._threads = threads
        self._streaming = streaming
        self._receiver: Receiver | None = None
        self._refusal: Refusal | None = None

    def progressed(self) -> None:
        """The store has got further, or what is proven of it."""
        if self._receiver is not None:
            self._receiver.progressed()

    def refuse(self, refusal: Refusal) -> None:
        """End it, for what has come is wrong."""
        self._refusal = refusal
        self._connection.lose(str(refusal))

    async def hold(self) -> None:
        """Receive WAL for as long as it comes.  Always raises, an UpstreamError or a Refusal."""
        try:
            await self._converse()
        except ValueError as error:
            raise UpstreamError(f"the server's answers make no sense: {error}") from None

    async def _converse(self) -> None:
        server = await self._know_server()
        slot_lsn = await self._prepare_slot()
        if self._store.identity is None:
            self._begin(server, slot_lsn)
        while True:
            if ended := self._finished(server):
                self._go_over(ended, server)
                continue
            if not await self._stream(server, slot_lsn):
                raise UpstreamError("replication terminated by the server, as at a shutdown")
            before, server = server, await self._know_server()
            if not server.is_same_cluster(before):
                raise UpstreamError("the server says that it is another one now")
            if server.history == before.history and not self._finished(server):
                raise UpstreamError("the server has ended the stream and does not say why")

    def _finished(self, server: Server) -> Ancestor | None:
        """How the store's timeline ended, if all of it is here."""
        ended = server.history.ancestor(self._store.tli)
        return ended if ended and self._store.flush_lsn >= ended.switch_lsn else None

    # --- who is it? ------------------------------------------------------------------------

    async def _know_server(self) -> Server:
        """Ask the server who it is; Refusal if its WAL does not go on from what is here.

        The history files that we lack are here when this returns.
        """
        server = await self._commands.identify()
        ours = self._store.identity
        if ours is not None:
            if server.system_identifier != ours.system_identifier:
                raise Refusal(
                    "the database system identifier differs: the server's is "
                    f"{server.system_identifier}, that of the WAL here is "
                    f"{ours.system_identifier}: connect to the right server, or receive into "
                    "another directory"
                )
            if server.segment_size != ours.segment_size:
                raise Refusal(
                    f"the server's WAL segments have {server.segment_size} bytes, those here "
                    f"{ours.segment_size}"
                )
            await self._check_branch(server)
        await self._store_histories(server)
        return server

    async def _check_branch(self, server: Server) -> None:
        """Refusal if the server's WAL does not go on from ours."""
        store = self._store
        try:
            ours = load_history(self._directory, store.tli)
        except ValueError as error:
            path = self._directory / history_name(store.tli)
            raise Refusal(f"{path}: {error}: put a good one in its place") from None
        if server.tli < ours.tli and ours.ancestor(server.tli):
            raise Refusal(
                f"the server's timeline {server.tli} is behind timeline {ours.tli}, which is "
                "here: it is not the primary any longer"
            )
        common = ours.common_end(server.history)
        if store.flush_lsn > common:
            # It may be but a part of a record, which the server never finished.
            holding: Holding | None = await self._threads.run(lambda: examine(self._directory))
            if holding and holding.valid_to > common:
                forked = ours.page_tli(common)
                name = segment_name(forked, common // server.segment_size, server.segment_size)
                raise Refusal(
                    f"the server's timeline {server.tli} forked from timeline {forked} at "
                    f"{format_lsn(common)}, and WAL up to {format_lsn(holding.valid_to)} of "
                    f"timeline {ours.tli} is here, which the server does not have: nothing is "
                    f"received any more, and clients get WAL up to {format_lsn(common)}; to go "
                    "over to the server's timeline, stop this walsender, move the segments "
                    f"from {name} on elsewhere, and start it again",
                    fence_lsn=common,
                )
        elif server.tli == ours.tli and server.lsn < store.flush_lsn:
            raise UpstreamError(
                f"the server's WAL ends before {format_lsn(store.flush_lsn)}, up to which it is "
                "here: it has lost WAL, or has yet to receive it"
            )

    async def _store_histories(self, server: Server) -> None:
        """Have all history files here up to the server's timeline."""
        for tli in range(2, server.tli + 1):
            path = self._directory / history_name(tli)
            known = path.read_bytes() if path.exists() else None
            if tli == server.tli:
                contents = server.history_contents
            elif known and (tli <= self._store.tli or not server.history.ancestor(tli)):
                continue
            else:
                try:
                    contents = await self._commands.history(tli)
                except UpstreamError as error:
                    if error.sqlstate != UNDEFINED_FILE:
                        raise
                    continue  # of a timeline that is none of its ancestors, it need not have one
            if contents != known:
                await self._threads.run(partial(store_history, self._directory, tli, contents))
                self._log.info("{name} is here", name=path.name)

    # --- from where? -----------------------------------------------------------------------

    async def _prepare_slot(self) -> int:
        """See to it that the slot is there; its restart_lsn, 0 if that is not known."""
        slot = self._options.slot
        if slot is None:
            return 0
        found = await self._commands.slot(slot)
        if found is None and self._options.create_slot:
            try:
                await self._commands.create_slot(slot)
            except UpstreamError as error:
                if error.sqlstate != DUPLICATE_OBJECT:
                    raise
            else:
                self._log.info('created replication slot "{slot}"', slot=slot)
            found = await self._commands.slot(slot)
        elif found is None and self._connection.major >= 15:
            raise Refusal(
                f'replication slot "{slot}" does not exist: create it, or have it created '
                "with --upstream-create-slot"
            )
        return found or 0

    def _begin(self, server: Server, slot_lsn: int) -> None:
        """Begin where nothing is here yet: with a whole segment."""
        lsn = self._options.start_lsn or slot_lsn or server.lsn
        lsn -= lsn % server.segment_size
        tli = server.history.file_tli(lsn, server.segment_size)
        self._store.begin(tli, lsn, server.segment_size, synced_to=lsn, flush_lsn=0)

    def _go_over(self, ended: Ancestor, server: Server) -> None:
        """Begin the timeline that goes on from the one that is received."""
        size = server.segment_size
        start = ended.switch_lsn - ended.switch_lsn % size
        flush_lsn = min(ended.switch_lsn, self._store.proven_lsn)
        self._store.begin(ended.next_tli, start, size, synced_to=start, flush_lsn=flush_lsn)

    # --- streaming -------------------------------------------------------------------------

    async def _stream(self, server: Server, slot_lsn: int) -> bool:
        """Receive the WAL of the store's timeline, up to the end of the stream; whether that is
        the end of the timeline, too."""
        store, tli = self._store, self._store.tli
        start = store.received_lsn - store.received_lsn % PAGE_SIZE
        incoming = IncomingWal(
            server.system_identifier,
            server.segment_size,
            store.identity,
            server.history.up_to(tli),
            start,
        )
        receiver = Receiver(
            self._connection,
            store,
            incoming,
            self._clock,
            Terms(
                timeout=self._options.timeout,
                flush_from=slot_lsn,
                known=self._known(tli, start),
                xmins=self._xmins if self._options.feedback else None,
            ),
            begun=partial(self._begun, tli, start),
        )
        try:
            answer = await self._commands.start(start, tli, self._options.slot)
            if not answer.is_streaming:
                return bool(answer.rows)
            self._receiver = receiver
            self._connection.heard = receiver.heard
            streaming = self._connection.copy(receiver.take)
            receiver.start()
            answer = await streaming
            await store.when_idle()
            return bool(answer.rows)
        except InvalidWal as error:
            raise Refusal(f"what came is not the WAL that should: {error}") from None
        except ProtocolViolation as error:
            raise UpstreamError(error.message) from None
        except UpstreamError as error:
            if self._refusal is not None:
                raise self._refusal from None
            if error.sqlstate == UNDEFINED_FILE:
                raise self._gap(tli, store.received_lsn, error) from None
            if error.sqlstate == OBJECT_NOT_IN_PREREQUISITE_STATE and not slot_lsn:
                raise Refusal(
                    f"{error}: drop the slot there and create it again; should WAL be missing "
                    "then, it has to come from elsewhere"
                ) from None
            raise
        finally:
            receiver.stop()
            self._receiver = None

    def _begun(self, tli: int, lsn: int) -> None:
        """WAL comes."""
        self._log.info(
            "receiving from {peer}: timeline {tli} from {lsn}",
            peer=self._connection.peer,
            tli=tli,
            lsn=format_lsn(lsn),
        )
        self._streaming()

    def _gap(self, tli: int, lsn: int, error: UpstreamError) -> Refusal:
        text = f"the server has no WAL from {format_lsn(lsn)} on any more ({error}): "
        if self._store.identity is None:
            return Refusal(text + "begin later, with another slot or --upstream-start")
        size = self._store.identity.segment_size
        name = segment_name(tli, lsn // size, size)
        return Refusal(
            text + f"copy the missing segments, from {name} on, into {self._directory} from an "
            "archive or another server; or begin anew with an empty directory"
        )

    def _known(self, tli: int, start: int) -> bytes:
        """The WAL from ``start`` on that is here already."""
        identity, end = self._store.identity, self._store.received_lsn
        if identity is None or start == end:
            return b""
        segments = Segments(self._directory, identity)
        try:
            known = segments.read(tli, start, end - start)
        finally:
            segments.close()
        if len(known) < end - start:
            raise Refusal(
                f"{self._directory / segments.name(tli, start)} is no longer there up to "
                f"{format_lsn(end)}: put it back, or start this walsender again to go on from "
                "what is there"
            )
        return known
