"""Sends WAL: an IPushProducer over the segments.

How the flow is controlled
==========================

A :class:`WalProducer` pushes pieces of WAL, each an XLogData in a CopyData, until one of four
things holds it up:

- *There is no more WAL.*  It observes the timeline, which calls it when there is.
- *The client does not take it.*  Then the transport pauses it, and resumes it when all that was
  held back is gone.  Meanwhile nothing is read or framed for this client: what it costs is the rest
  of one piece.
- *It has had its turn.*  What is more than a piece is sent in bursts, of which there is one in each
  turn of the reactor, whoever has it (:mod:`walproto.server.turns`).  So however many clients catch
  up at full speed, they hold up the others for a millisecond at most.
- *Somebody asked for a keepalive*, which goes out between two pieces; while the transport is
  blocked it is only remembered, and however many are asked for, one is sent.

The piece is read into a buffer that all producers share, its header packed in front of it, and
handed to a :class:`~walproto.server.channels.Channel`, which sends it past the transport if it can.

Clients that follow the tail all want the same piece at the same time.  The buffer remembers which
one it holds, so that it is read once, and sent to all of them.
"""

from __future__ import annotations

from typing import Protocol

from twisted.internet.interfaces import (
    IPushProducer,
    IReactorTime,
    ITransport,
)
from zope.interface import implementer

from walproto.errors import ReportedError
from walproto.lsn import PAGE_SIZE
from walproto.server.channels import PIECE_SIZE, channel_to
from walproto.server.turns import Turns
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replica
from walproto.wal.cold import NotInMemory
from walproto.wire.messages import CopyBothResponse
from walproto.wire.replication import (
    XLOG_DATA_HEADER,
    keepalive,
    pack_xlog_data_header,
    postgres_time,
)

BURST = 4
"""Pieces that a client is sent before it is others' turn."""

_HEADER_SIZE = XLOG_DATA_HEADER.size


class Piece:
    """The buffer for one message with WAL, shared by all producers of a timeline."""

    def __init__(self, timeline: ITimeline) -> None:
        self._timeline = timeline
        self._buffer = bytearray(_HEADER_SIZE + PIECE_SIZE)
        self._view = memoryview(self._buffer)
        self._holds = (0, 0, 0)

    def load(self, tli: int, start: int, end: int, wal_end: int, now: int) -> memoryview:
        """The message with the WAL of ``tli`` from ``start`` to ``end``; valid until the next
        call.  Raises a ReportedError if it cannot be read."""
        size = end - start
        if self._holds != (tli, start, end):
            self._holds = (0, 0, 0)
            self._timeline.read_into(tli, start, self._view[_HEADER_SIZE : _HEADER_SIZE + size])
            self._holds = (tli, start, end)
        pack_xlog_data_header(self._buffer, start, wal_end, now, size)
        return self._view[: _HEADER_SIZE + size]


class Listener(Protocol):
    """Who is told what comes of sending."""

    def timeline_ended(self) -> None:
        """All WAL of a timeline that is not the current one (any longer) is sent."""

    def failed(self, error: ReportedError) -> None:
        """WAL cannot be sent on from here."""

    def broken(self) -> None:
        """An exception was raised that is none of ours; it is the one being handled."""

    def caught_up(self) -> None:
        """While finishing: all there is has been sent."""


@implementer(IPushProducer)
class WalProducer:
    """Sends a replica WAL, from its ``sent_lsn`` on, over a transport.

    ``clock`` is the reactor, on which ``turns`` are taken; ``piece`` is one of ``timeline``'s.
    """

    def __init__(
        self,
        transport: ITransport,
        timeline: ITimeline,
        replica: Replica,
        piece: Piece,
        turns: Turns,
        clock: IReactorTime,
        listener: Listener,
    ) -> None:
        self._transport = transport
        self._timeline = timeline
        self._replica = replica
        self._piece = piece
        self._turns = turns
        self._clock = clock
        self._listener = listener
        self._channel = channel_to(transport)
        self._sendable_to = 0
        self._paused = False
        self._stopped = False
        self.is_finishing = False
        """Whether the server shuts down, and only what there is will be sent."""
        self._awaits_turn = False
        self._keepalive_owed: bool | None = None
        self._last_sent = clock.seconds()

    @property
    def idle_since(self) -> float:
        """Since when there has been nothing to send (``clock.seconds()``); now, if there is."""
        if self._paused or self._replica.sent_lsn < self._timeline.commit_lsn:
            return self._clock.seconds()
        return self._last_sent

    def start(self, *, in_copy_mode: bool = False) -> None:
        """Become the transport's producer, say CopyBothResponse, unless the client has been told
        that copying begins, and begin."""
        self._transport.registerProducer(self, True)  # type: ignore[attr-defined]
        if not in_copy_mode:
            self._channel.write(CopyBothResponse.build())
        self._timeline.add_observer(self._go_on)
        self._ask_for_turn()

    def finish(self) -> None:
        """Have ``caught_up`` called, now or when it is so, and whenever there was more to send."""
        self.is_finishing = True
        self._ask_for_turn()

    def stop(self) -> None:
        """Send nothing more, and leave the transport to others."""
        if not self._stopped:
            self._transport.unregisterProducer()  # type: ignore[attr-defined]
        self.stopProducing()

    def send_keepalive(self, reply_requested: bool) -> None:
        """Send a primary keepalive message, now or when the client takes something again."""
        if self._paused:
            self._keepalive_owed = bool(self._keepalive_owed) or reply_requested
            return
        self._keepalive_owed = None
        now = postgres_time(self._clock.seconds())
        self._channel.send(keepalive(self._replica.sent_lsn, now, reply_requested))

    # --- IPushProducer, for the transport to call ------------------------------------------

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        if self._keepalive_owed is not None:
            self.send_keepalive(self._keepalive_owed)
        self._go_on()

    def stopProducing(self) -> None:
        self._stopped = True
        self._timeline.remove_observer(self._go_on)
        self._turns.leave(self._take_turn)

    # --- sending ---------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Send what there is, if it is little; else when it is our turn."""
        if self._timeline.commit_lsn - self._replica.sent_lsn > PIECE_SIZE:
            self._ask_for_turn()
        else:
            self._send_burst()

    def _ask_for_turn(self) -> None:
        if not self._awaits_turn and not self._paused and not self._stopped:
            self._awaits_turn = True
            self._turns.ask(self._take_turn)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        self._send_burst()

    def _send_burst(self) -> None:
        """Send a burst of pieces, as far as there are any and they are taken."""
        if self._awaits_turn:
            return
        for _ in range(BURST):
            if self._paused or self._stopped or not self._send_piece():
                return
        self._ask_for_turn()

    def _send_piece(self) -> bool:
        """Send the next piece; whether there was one."""
        timeline, replica = self._timeline, self._replica
        tli, start = replica.tli, replica.sent_lsn
        try:
            wal_end = timeline.end_of(tli)
            if start >= self._sendable_to:
                self._sendable_to = timeline.sendable_to(tli, start)
            if start >= wal_end:
                if tli != timeline.history.tli:
                    self._listener.timeline_ended()
                elif self.is_finishing:
                    self._listener.caught_up()
                return False
            end = self._cut(start, min(self._sendable_to, wal_end))
            if end <= start:
                return False
            now = self._clock.seconds()
            message = self._piece.load(tli, start, end, wal_end, postgres_time(now))
        except NotInMemory:
            return False
        except ReportedError as error:
            self._listener.failed(error)
            return False
        except Exception:
            self._listener.broken()
            return False
        replica.sent_lsn = end
        self._last_sent = now
        self._channel.send(message)
        return True

    def _cut(self, start: int, end: int) -> int:
        """Where a message that starts at ``start`` ends: at ``end``, or else at a page boundary,
        for only there may a record be split."""
        segment_size = self._timeline.identity.segment_size
        end = min(end, start - start % segment_size + segment_size)
        furthest = start + self._channel.piece_size
        return end if end <= furthest else furthest - furthest % PAGE_SIZE
