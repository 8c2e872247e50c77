"""What is lent to workers, on the side of the main process: timelines are announced, connections
handed over and taken back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from zope.interface import implementer

from walproto.errors import ReportedError
from walproto.server.lending import Outlet
from walproto.server.producer import Listener
from walproto.server.transports import bare_socket
from walproto.timeline.replicas import Replica
from walproto.wire.messages import CopyBothResponse
from walproto.workers import control

RETRY = 0.01
"""Seconds after which a socket is handed over once more, if the worker has been handed so many
that it has not taken yet."""

_numbers = itertools.count(1)


@implementer(IPushProducer)
class Worker:
    """The process to which something is lent; the producer of what it is told."""

    def __init__(self) -> None:
        self._is_blocked = False
        self._owed: set[Announcements] = set()

    def say(self, message: NamedTuple) -> None:
        """Have it told something."""
        raise NotImplementedError

    def hand_over(self, number: int, handle: Any) -> None:
        """Send it the socket of a stream.  OSError if that cannot be now."""
        raise NotImplementedError

    def forget(self, number: int) -> None:
        """There will be no such stream."""
        raise NotImplementedError

    def announce(self, announcements: Announcements) -> None:
        """Have it told the news, or the next ones if it does not listen now."""
        if self._is_blocked:
            self._owed.add(announcements)
        else:
            announcements.tell(self)

    def pauseProducing(self) -> None:
        """Much is waiting that it has not heard yet."""
        self._is_blocked = True

    def resumeProducing(self) -> None:
        self._is_blocked = False
        owed, self._owed = self._owed, set()
        for announcements in owed:
            announcements.tell(self)

    def stopProducing(self) -> None:
        """It is gone."""


class Announcements:
    """Has workers told how far ``timeline`` goes, as long as there are loans of it; those are told
    when there may be news."""

    def __init__(self, timeline: Any, over: Callable[[], object]) -> None:
        self.timeline = timeline
        self.number = next(_numbers)
        self._over = over
        self._loans: dict[Loan, None] = {}
        self._workers: Counter[Worker] = Counter()
        self._told: control.News | None = None

    def add(self, loan: Loan) -> None:
        """Tell the loan when there may be news."""
        if not self._loans:
            self.timeline.add_observer(self._changed)
        self._loans[loan] = None

    def remove(self, loan: Loan) -> None:
        """Tell it no longer."""
        if self._loans.pop(loan, self) is None and not self._loans:
            self.timeline.remove_observer(self._changed)
            self._over()

    def tell(self, worker: Worker) -> None:
        """Tell the worker the newest news, if it has to do with the timeline still."""
        if worker in self._workers and self._told is not None:
            worker.say(self._told)

    def announce_to(self, worker: Worker) -> None:
        """A stream is about to be lent to this worker.  Raises a ReportedError if the timeline
        cannot be read."""
        if self._told is None:
            self._told = self._news()
        if not self._workers[worker]:
            timeline = self.timeline
            worker.say(control.Open(self.number, str(timeline.directory), timeline.identity))
            worker.say(self._told)
        self._workers[worker] += 1

    def gone(self, worker: Worker) -> None:
        """The worker no longer has it."""
        self._workers[worker] -= 1
        if not self._workers[worker]:
            del self._workers[worker]
            worker.say(control.Close(self.number))

    def _changed(self) -> None:
        loans = list(self._loans)
        try:
            news = self._news()
        except ReportedError as error:
            for loan in loans:
                loan.listener.failed(error)
        except Exception:
            for loan in loans:
                loan.listener.broken()
        else:
            if news != self._told:
                self._told = news
                for worker in self._workers:
                    worker.announce(self)
            for loan in loans:
                loan.look_again()

    def _news(self) -> control.News:
        timeline, told = self.timeline, self._told
        history = timeline.history
        end = timeline.end_of(history.tli)
        since = end
        if told is not None and told.history == history:
            # What has been told so far may go on, or else what comes behind it.
            for known in (told.since, told.commit_lsn):
                if known <= end <= self._sendable_to(known):
                    since = known
                    break
        has_trouble = self._sendable_to(end) < end
        return control.News(self.number, history, since, end, has_trouble)

    def _sendable_to(self, lsn: int) -> int:
        """How far the current timeline can be sent from there; 0 if there is anything wrong."""
        try:
            to: int = self.timeline.sendable_to(self.timeline.history.tli, lsn)
        except ReportedError:
            return 0
        return to


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
        self.number = next(_numbers)
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
                try:
                    raise RuntimeError(f"in a worker:\n{message.traceback}")
                except RuntimeError:
                    self.listener.broken()

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
        if self._asked is None:
            return
        asked = self._asked
        try:
            to = self._timeline.sendable_to(self._replica.tli, asked)
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
