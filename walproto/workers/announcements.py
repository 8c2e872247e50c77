"""How far timelines go, as workers are told: once for each worker, whenever there is news.

What may be sent at once is found out as a client would find it out that is there: by asking the
timeline.  For the newest WAL that is done here, for all who follow; for what is further behind, by
each loan when its worker asks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from walproto.errors import ReportedError
from walproto.server.producer import Listener
from walproto.wal.cold import NotInMemory
from walproto.workers import control

numbers = itertools.count(1)
"""For streams and timelines."""


class Stream(Protocol):
    """A stream that is lent, or about to be."""

    listener: Listener

    def look_again(self) -> None:
        """There may be news."""


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

    def catch_up(self, announcements: Announcements) -> None:
        """Have it told the news that it is owed, whether it listens or not: what it is told next
        rests on it."""
        if announcements in self._owed:
            self._owed.remove(announcements)
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
    """Has workers told how far ``timeline`` goes, as long as there are streams of it; those
    are told when there may be news."""

    def __init__(self, timeline: Any, over: Callable[[], object]) -> None:
        self.timeline = timeline
        self.number = next(numbers)
        self._over = over
        self._streams: dict[Stream, None] = {}
        self._workers: Counter[Worker] = Counter()
        self._told: control.News | None = None

    def add(self, stream: Stream) -> None:
        """Tell the stream when there may be news."""
        if not self._streams:
            self.timeline.add_observer(self._changed)
        self._streams[stream] = None

    def remove(self, stream: Stream) -> None:
        """Tell it no longer."""
        if self._streams.pop(stream, self) is None and not self._streams:
            self.timeline.remove_observer(self._changed)
            self._over()

    def tell(self, worker: Worker) -> None:
        """Tell the worker the newest news, if it has to do with the timeline still."""
        if worker in self._workers and self._told is not None:
            worker.say(self._told)

    def announce_to(self, worker: Worker) -> None:
        """A stream is about to be lent to this worker.  Raises a ReportedError if the timeline
        cannot be read."""
        self._look()  # what was proven may have been changed since it was told
        if not self._workers[worker]:
            timeline = self.timeline
            worker.say(control.Open(self.number, str(timeline.directory), timeline.identity))
            self._workers[worker] += 1
            self.tell(worker)
        else:
            self._workers[worker] += 1
            worker.catch_up(self)

    def gone(self, worker: Worker) -> None:
        """The worker no longer has it."""
        self._workers[worker] -= 1
        if not self._workers[worker]:
            del self._workers[worker]
            worker.say(control.Close(self.number))

    def _changed(self) -> None:
        streams = list(self._streams)
        try:
            self._look()
        except ReportedError as error:
            for stream in streams:
                stream.listener.failed(error)
        except Exception:
            for stream in streams:
                stream.listener.broken()
        else:
            for stream in streams:
                stream.look_again()

    def _look(self) -> None:
        """Have the workers told if there is news."""
        news = self._news()
        if news != self._told:
            self._told = news
            for worker in list(self._workers):
                worker.announce(self)

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
        """How far the current timeline can be sent from there; 0 if there is anything wrong, or it
        is not known yet."""
        try:
            to: int = self.timeline.sendable_to(self.timeline.history.tli, lsn)
        except (ReportedError, NotInMemory):
            return 0
        return to
