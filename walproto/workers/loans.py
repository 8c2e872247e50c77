"""Connections that are lent to workers: handed over, and taken back.

While a connection is lent, its client is still heard here, and whatever becomes of it is decided
here.  A worker that is to stop completes nothing: it gives back what is left of the message that it
had begun, and that is sent from here before anything else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from zope.interface import implementer

from walproto.errors import ReportedError
from walproto.server.lending import Outlet
from walproto.server.producer import Listener
from walproto.server.transports import bare_socket
from walproto.timeline.replicas import Replica
from walproto.wal.cold import NotInMemory
from walproto.wire.messages import CopyBothResponse
from walproto.workers import control
from walproto.workers.announcements import Announcements, Worker, numbers

RETRY = 0.01
"""Seconds after which a socket is handed over once more, if the worker has been handed so many
that it has not taken yet."""


@implementer(IPushProducer)
class Loan:
    """WAL sent to a replica by a worker: a :class:`~walproto.server.lending.Sending`.

    First CopyBothResponse is sent from here, and all that was to be sent before.  When that is out,
    the socket is handed over.  What the worker says is :meth:`heard`.
    """

    def __init__(
        self,
        worker: Worker,
        transport: Any,
        outlet: Outlet,
        announcements: Announcements,
        replica: Replica,
        clock: IReactorTime,
        listener: Listener,
    ) -> None:
        self.worker = worker
        self.number = next(numbers)
        self._transport = transport
        self._outlet = outlet
        self._announcements = announcements
        self._replica = replica
        self._clock = clock
        self.listener = listener
        self._timeline = announcements.timeline
        self._is_lent = False
        self._is_over = False
        self._asked: int | None = None
        self._unsaid: list[NamedTuple] = []
        self._retry: IDelayedCall | None = None
        self._last_sent = clock.seconds()
        self.is_finishing = False

    # --- Sending, for the connection to call -----------------------------------------------

    @property
    def idle_since(self) -> float:
        if self._replica.sent_lsn < self._timeline.commit_lsn:
            return self._clock.seconds()
        return self._last_sent

    def start(self) -> None:
        self._announcements.add(self)
        self._transport.registerProducer(self, True)
        self._transport.write(CopyBothResponse.build())
        self._transport.producerPaused = True  # it is resumed when all is out

    def finish(self) -> None:
        self.is_finishing = True
        self._say(control.Finish(self.number))

    def stop(self) -> None:
        if not self._is_lent:
            self._transport.unregisterProducer()
        self.stopProducing()

    def send_keepalive(self, reply_requested: bool) -> None:
        self._say(control.SendKeepalive(self.number, reply_requested))

    # --- IPushProducer, for the transport to call ------------------------------------------

    def pauseProducing(self) -> None:
        """All waits until CopyBothResponse is out, anyway."""

    def resumeProducing(self) -> None:
        self._transport.unregisterProducer()
        self._hand_over()

    def stopProducing(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._announcements.remove(self)
        if self._is_lent:
            self._outlet.hold()
            self.worker.say(control.Recall(self.number))
        else:
            self.worker.forget(self.number)

    # --- for the worker to call ------------------------------------------------------------

    def heard(self, message: Any) -> None:
        """The worker has said something about this stream."""
        if isinstance(message, control.Back):
            self._is_lent = False
            self._replica.sent_lsn = message.lsn
            self._announcements.gone(self.worker)
            self._transport.write(message.unsent)
            self._outlet.let_go()
        if self._is_over:
            return  # it was said before the stream was recalled
        try:
            self._deal_with(message)
        except ReportedError as error:
            self.listener.failed(error)
        except Exception:
            self.listener.broken()

    def _deal_with(self, message: Any) -> None:
        match message:
            case control.Ask():
                self.sent(message.lsn)
                self._asked = message.lsn
                self.look_again()
            case control.Ended():
                self.sent(message.lsn)
                tli, end = self._replica.tli, self._timeline.end_of(self._replica.tli)
                if message.lsn >= end and tli != self._timeline.history.tli:
                    self.listener.timeline_ended()
            case control.CaughtUp():
                self.sent(message.lsn)
                if message.lsn >= self._timeline.end_of(self._replica.tli):
                    self.listener.caught_up()
            case control.Failed():
                self.listener.failed(message.error)
            case control.Broken():
                raise RuntimeError(f"in a worker:\n{message.traceback}")

    def sent(self, lsn: int) -> None:
        """WAL is sent up to there."""
        if not self._is_over and lsn != self._replica.sent_lsn:
            self._replica.sent_lsn = lsn
            self._last_sent = self._clock.seconds()

    def lost(self) -> None:
        """The worker has died, and nobody knows what it has sent of its last message."""
        if self._is_lent:
            self._is_lent = False
            self._announcements.gone(self.worker)
        self._transport.abortConnection()
        self._outlet.let_go()

    def look_again(self) -> None:
        """If the worker has asked how far it may send, answer, as soon as there is an answer."""
        if self._asked is None or self._is_over:
            return
        asked = self._asked
        try:
            to = self._timeline.sendable_to(self._replica.tli, asked)
        except NotInMemory:
            return  # the timeline tells when to look again
        except ReportedError as error:
            self.listener.failed(error)
        except Exception:
            self.listener.broken()
        else:
            if to > asked:
                self._asked = None
                self._say(control.Grant(self.number, to))

    # --- within ----------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """All is out: the worker may begin."""
        self._retry = None
        worker, replica, announcements = self.worker, self._replica, self._announcements
        try:
            announcements.announce_to(worker)
        except ReportedError as error:
            self.listener.failed(error)
            return
        try:
            worker.hand_over(self.number, bare_socket(self._transport))
        except OSError:
            announcements.gone(worker)
            self._retry = self._clock.callLater(RETRY, self._hand_over)
            return
        self._is_lent = True
        number = announcements.number
        worker.say(control.Lend(self.number, number, replica.tli, replica.sent_lsn))
        for message in self._unsaid:
            worker.say(message)

    def _say(self, message: NamedTuple) -> None:
        """Have the worker told something, when it has the socket."""
        if self._is_lent:
            self.worker.say(message)
        else:
            self._unsaid.append(message)
