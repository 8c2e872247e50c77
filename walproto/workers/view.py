"""A timeline as a worker sees it: what the main process says, and files.

The main process alone knows which WAL is proven.  The newest WAL it announces, for all streams;
those that are further behind ask, once for each segment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zope.interface import implementer

from walproto.errors import InternalError
from walproto.server.producer import Piece
from walproto.timeline.history import History
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.observers import Observers
from walproto.timeline.replicas import Replicas
from walproto.timeline.threads import ReactorThreads
from walproto.wal.pages import Identity
from walproto.wal.segments import OpenFiles, Segments
from walproto.workers.control import News


@implementer(ITimeline)
class View:
    """The timeline whose WAL is in ``directory``, as far as there are :meth:`news` of it.
    ``reactor`` has threads that wait for the disk."""

    def __init__(self, directory: str, identity: Identity, files: OpenFiles, reactor: Any) -> None:
        self.identity = identity
        self.history = History(0)
        self.commit_lsn = 0
        self.replicas = Replicas()
        self.piece = Piece(self)
        self._since = 0
        self._has_trouble = False
        self._threads = ReactorThreads(reactor)
        self._segments = Segments(Path(directory), identity, files, self._load)
        self._observers = Observers(reactor)

    def tell(self, news: News) -> None:
        """There is news."""
        self.history, self.commit_lsn = news.history, news.commit_lsn
        self._since, self._has_trouble = news.since, news.has_trouble
        self._observers.tell()

    def _load(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Have WAL loaded into memory, and the streams told."""

        def loaded(result: None) -> None:
            done()
            self._observers.tell()

        self._threads.run(work).addCallback(loaded)

    def is_known(self, tli: int, lsn: int) -> bool:
        """Whether it is known how far WAL of ``tli`` may be sent from ``lsn``."""
        if tli != self.history.tli:
            return lsn == self.end_of(tli)
        is_at_end = lsn == self.commit_lsn
        return self._since <= lsn <= self.commit_lsn and not (is_at_end and self._has_trouble)

    def close_removed(self) -> None:
        """Close the files that were removed: as long as they are open, they take their room."""
        self._segments.close_removed()

    def close(self) -> None:
        self._observers.stop()
        self._segments.close()

    # --- ITimeline -------------------------------------------------------------------------

    def require_ready(self) -> None:
        """It is ready, or there would be no stream."""

    def end_of(self, tli: int) -> int:
        if tli == self.history.tli:
            return self.commit_lsn
        ancestor = self.history.ancestor(tli)
        if ancestor is None:
            raise InternalError(f"requested timeline {tli} is not in this server's history")
        return ancestor.switch_lsn

    def sendable_to(self, tli: int, lsn: int) -> int:
        return self.end_of(tli) if self.is_known(tli, lsn) else lsn

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        file_tli = self.history.file_tli(lsn, self.identity.segment_size)
        self._segments.read_into(file_tli, lsn, buffer)

    def read_history(self, tli: int) -> bytes:
        return self._segments.read_history(tli)

    def add_observer(self, observer: Callable[[], None]) -> None:
        self._observers.add(observer)

    def remove_observer(self, observer: Callable[[], None]) -> None:
        self._observers.remove(observer)


@implementer(ITimeline)
class StreamView:
    """The same for one stream: it knows in addition what was granted to that.

    ``ask`` is called with the LSN from which it is to be known how far WAL may be sent, once for
    each; ``waits`` with the LSN up to which all is sent that may be.
    """

    def __init__(
        self, view: View, ask: Callable[[int], None], waits: Callable[[int], None]
    ) -> None:
        self.identity = view.identity
        self.replicas = view.replicas
        self.require_ready = view.require_ready
        self.end_of = view.end_of
        self.read_into = view.read_into
        self.read_history = view.read_history
        self._view = view
        self._ask = ask
        self._waits = waits
        self._asked = self._granted = -1
        self._observer: Callable[[], None] = lambda: None

    @property
    def history(self) -> History:
        return self._view.history

    @property
    def commit_lsn(self) -> int:
        return self._view.commit_lsn

    def grant(self, lsn: int) -> None:
        """WAL up to ``lsn`` may be sent."""
        self._granted, self._asked = lsn, -1
        self._observer()

    def sendable_to(self, tli: int, lsn: int) -> int:
        if lsn < self._granted:
            return self._granted
        if self._view.is_known(tli, lsn):
            end = self._view.end_of(tli)
            if end <= lsn:
                self._waits(lsn)
            return end
        if lsn != self._asked:
            self._asked = lsn
            self._ask(lsn)
        return lsn

    def add_observer(self, observer: Callable[[], None]) -> None:
        self._observer = observer
        self._view.add_observer(observer)

    def remove_observer(self, observer: Callable[[], None]) -> None:
        self._view.remove_observer(observer)
        self._observer = lambda: None
