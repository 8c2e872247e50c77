"""The streaming half of a connection to an upstream: WAL in, feedback out.

PostgreSQL's walreceiver is the model (``WalReceiverMain``, ``XLogWalRcvSendReply``,
``XLogWalRcvSendHSFeedback``): positions are told as soon as they are true, and at once when the
server asks; when it has been silent for half of the timeout, it is asked to say something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from walproto.lsn import format_lsn
from walproto.upstream.connection import UpstreamConnection
from walproto.upstream.store import Store
from walproto.wal.headers import InvalidWal
from walproto.wal.incoming import IncomingWal
from walproto.wire.replication import (
    Feedback,
    Keepalive,
    StatusUpdate,
    hot_standby_feedback,
    parse_primary_message,
    postgres_time,
    status_update,
)

STATUS_INTERVAL = 10.0
"""Seconds between status updates while there is nothing new to tell, as PostgreSQL's
wal_receiver_status_interval has it."""

TICK = 1.0
"""Seconds between two looks at the clock, at most."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How WAL is received; times are in seconds.

    ``timeout`` is how long a server may be silent (wal_receiver_timeout), 0 for ever.
    ``flush_from`` is the LSN below which no flush position is told: a slot must not be moved back.
    ``known`` is the WAL that is here already of what will come, from where it begins.
    ``xmins`` tells the oldest xmin and catalog_xmin that are needed, to be passed on; None if none
    are.
    """

    timeout: float
    flush_from: int = 0
    known: bytes = b""
    xmins: Callable[[], tuple[int, int]] | None = None


class Receiver:
    """Receives WAL over ``connection`` into ``store``, as long as it streams.

    ``begun`` is called when the first WAL has come, or the server has been there for a moment
    though there is none: when it has said that it will stream, it may still find that it cannot.
    """

    def __init__(
        self,
        connection: UpstreamConnection,
        store: Store,
        incoming: IncomingWal,
        clock: IReactorTime,
        terms: Terms,
        begun: Callable[[], None],
    ) -> None:
        self._begun: Callable[[], None] | None = begun
        self._is_alive = False
        self._connection = connection
        self._store = store
        self._incoming = incoming
        self._clock = clock
        self._terms = terms
        self._known = terms.known
        self._told = (0, 0)
        self._told_at = 0.0
        self._heard_at = 0.0
        self._asked = False
        self._xmins: tuple[int, int] | None = None
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        """The server has said that it streams from now on: see whether it does."""
        self.heard()
        self._tell_status(reply_requested=True)
        self._tell_xmins()
        self._schedule()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def heard(self) -> None:
        """The server has said something."""
        self._heard_at = self._clock.seconds()
        self._asked = False

    def take(self, data: memoryview) -> None:
        """Deal with the contents of a CopyData.

        Raises ProtocolViolation or InvalidWal for what should not have come.
        """
        message = parse_primary_message(data)
        if isinstance(message, Keepalive):
            self._is_alive = True
            if message.reply_requested:
                self._tell_status()
            return
        wal = self._incoming.take(message.data_start, message.data)
        self._begin()
        self._store.identity = self._incoming.identity
        self._store.append(self._compare(wal) if self._known else wal)
        if self._store.is_full:
            self._connection.pause()

    def progressed(self) -> None:
        """The store has got further."""
        if self._told != self._positions():
            self._tell_status()
        if self._connection.is_paused and not self._store.is_full:
            self.heard()
            self._connection.resume()

    # --- within ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun is not None:
            begun, self._begun = self._begun, None
            begun()

    def _compare(self, wal: memoryview) -> memoryview:
        """Compare what comes with what is here; what is new of it."""
        size = min(len(wal), len(self._known))
        if wal[:size] != self._known[:size]:
            at = format_lsn(self._incoming.lsn - len(wal))
            raise InvalidWal(
                f"WAL that came for {at} is not the same as what is here: the server was put back "
                "to an earlier state, and to follow it takes an empty directory"
            )
        self._known = self._known[size:]
        return wal[size:]

    def _positions(self) -> tuple[int, int]:
        """What is told: how far WAL is written, and how far it is on disk and proven; 0 if that is
        unknown."""
        flush = self._store.proven_lsn
        return self._store.written_lsn, flush if flush >= self._terms.flush_from else 0

    def _tell_status(self, reply_requested: bool = False) -> None:
        self._told = write, flush = self._positions()
        self._told_at = self._clock.seconds()
        now = postgres_time(self._told_at)
        self._connection.send(status_update(StatusUpdate(write, flush, 0, now, reply_requested)))

    def _tell_xmins(self) -> None:
        """Pass on which transaction IDs the replicas still need: when that has changed, and at
        first, for the server may still keep some for us."""
        xmins = self._terms.xmins() if self._terms.xmins is not None else (0, 0)
        if xmins != self._xmins:
            self._xmins = xmins
            xmin, catalog_xmin = xmins
            self._connection.send(
                hot_standby_feedback(
                    Feedback(
                        reply_time=postgres_time(self._clock.seconds()),
                        xmin=xmin & 0xFFFFFFFF,
                        xmin_epoch=xmin >> 32,
                        catalog_xmin=catalog_xmin & 0xFFFFFFFF,
                        catalog_xmin_epoch=catalog_xmin >> 32,
                    )
                )
            )

    def _schedule(self) -> None:
        timeout = self._terms.timeout
        self._timer = self._clock.callLater(min(TICK, timeout / 4 or TICK), self._tick)

    def _tick(self) -> None:
        self._schedule()
        if self._is_alive:
            self._begin()
        now = self._clock.seconds()
        timeout = self._terms.timeout
        silence = now - self._heard_at
        if self._connection.is_paused:
            if self._store.cannot_write and timeout and silence >= timeout:
                # It may have been told to shut down, and waits for us.
                self._connection.lose("nothing can be written: receiving again when it can")
                return
            self._tell_status()  # whatever it asks, we do not hear it
        elif timeout and silence >= timeout:
            self._connection.lose("terminating walreceiver due to timeout")
            return
        elif timeout and silence >= timeout / 2 and not self._asked:
            self._asked = True
            self._tell_status(reply_requested=True)
        elif now - self._told_at >= STATUS_INTERVAL:
            self._tell_status()
        self._tell_xmins()
