"""A timeline as a safekeeper keeps it: WAL that is on disk, and how far of it is committed.

WAL is committed once a quorum of safekeepers has it, and only then may clients have it.  How far it
is, ``safekeeper.control`` says, which is read again whenever the directory changes; and so may an
embedding program that knows it sooner.

Neon: ``timeline.rs`` in the safekeeper.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from walproto.errors import CannotConnectNow, InternalError, ObjectNotInPrerequisiteState
from walproto.lsn import format_lsn
from walproto.neon.contents import PG_TLI, Contents
from walproto.neon.control_file import Control
from walproto.neon.ids import TimelineIds
from walproto.timeline.directory import WalDirectory
from walproto.timeline.history import Ancestor, History
from walproto.timeline.interfaces import IFiledTimeline, ITimeline
from walproto.timeline.replicas import Replicas
from walproto.timeline.watch import DirectoryWatch, Inotify
from walproto.wal.pages import Identity
from walproto.wal.segments import OpenFiles, read_history


@implementer(IFiledTimeline)
class SafekeeperTimeline:
    """The timeline ``ids``, whose WAL and control file are in ``directory``.

    It is active from :meth:`start` to :meth:`stop` or :meth:`suspend`, as often as that may be, and
    :meth:`add_observer` starts it, too.  ``clock`` is the reactor; ``inotify`` and ``files`` are
    shared with other timelines.
    """

    def __init__(
        self,
        directory: Path,
        ids: TimelineIds,
        clock: IReactorTime,
        inotify: Inotify | None = None,
        files: OpenFiles | None = None,
    ) -> None:
        self.directory = directory
        self.ids = ids
        self.replicas = Replicas()
        self.identity: Identity
        self.history = History(PG_TLI)
        self.commit_lsn = 0
        """How far clients may get; it may be within a record.  It never goes back."""
        self.flush_lsn = 0
        """The end of valid WAL on disk, as far as it is known.  It goes back when a new proposer
        has WAL cut off."""
        self.is_proposer_connected = False
        """Whether somebody writes WAL here.  An embedding program says so; else nobody does."""
        self.is_active = False
        self._clock = clock
        self._watch = DirectoryWatch(directory, clock, self.look, inotify=inotify)
        self._contents = Contents(directory, ids, clock, files, self.replicas, self._wal_changed)
        self._advanced_to = self._committed = 0
        self._observers: set[Callable[[], None]] = set()
        self._awaiting_opened: list[Deferred[None]] = []
        self._next_look: IDelayedCall | None = None

    def start(self) -> None:
        """Watch the directory, and look for the end of its WAL; nothing if it is active or over."""
        if not self.is_active and not self.is_over:
            self.is_active = True
            self._watch.start()
            self.look()

    def stop(self) -> None:
        """Close all files and watch nothing, whoever uses it; nothing if it is not active."""
        if not self.is_active:
            return
        self.is_active = False
        self._watch.stop()
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._contents.close()
        self._tell_opened()

    def suspend(self) -> bool:
        """Stop unless somebody uses it; whether it is not active now."""
        if not self.is_in_use:
            self.stop()
        return not self.is_active

    @property
    def is_over(self) -> bool:
        """Whether its directory was removed, or replaced by another one: then it is refused for
        good, and what is there now is for a new object."""
        return self._contents.is_over

    @property
    def is_in_use(self) -> bool:
        """Whether anybody observes it, or waits for it to be opened."""
        return bool(self._observers or self._awaiting_opened)

    def opened(self) -> Deferred[None]:
        """Fires with None when it is known what there is: then it is ready, or it is refused, or it
        waits for a proposer; :meth:`require_ready` tells.  It may be cancelled."""
        if self._is_settled or not self.is_active:
            return succeed(None)
        opened = Deferred[None](self._awaiting_opened.remove)
        self._awaiting_opened.append(opened)
        return opened

    def look(self) -> None:
        """Have a look soon: something in the directory may have changed."""
        if self.is_active and self._next_look is None:
            self._next_look = self._clock.callLater(0, self._take_look)

    def revisit(self) -> None:
        """Look at once whether it is over, and if it is active, whether what was wrong with it is
        mended."""
        if self.is_active:
            self._look_now()
        else:
            self._contents.look_at_directory()

    def advance(self, lsn: int) -> None:
        """WAL up to ``lsn`` is committed, be it here already or not.

        The control file is looked at first: if a new proposer has had WAL cut off before ``lsn``,
        the new term history has to be in there by now.
        """
        self._advanced_to = max(self._advanced_to, lsn)
        if self.is_active:
            self._look_now()

    @property
    def control(self) -> Control | None:
        """What the control file said when it was last right; None if it never was yet."""
        return self._contents.control

    @property
    def committed_lsn(self) -> int:
        """How far WAL is committed, as the control file says or a program, be it here or not."""
        said = 0 if self.control is None else self.control.commit_lsn
        return max(self._committed, self._advanced_to, said)

    @property
    def is_waiting_for_proposer(self) -> bool:
        """Whether a proposer is to say how long segments are before anything can be served.
        Observers are told when it ends, though it may take until :meth:`opened` fires that the
        timeline is ready, or refused."""
        return bool(self._contents.waiting_for) and not self._contents.is_empty

    def uncommitted(self) -> Uncommitted:
        """All WAL that there is now.  Raises what :meth:`require_ready` does."""
        self.require_ready()
        return Uncommitted(self, self.flush_lsn)

    def readable_to(self, lsn: int) -> int:
        """As :meth:`sendable_to`, but committed or not."""
        self._require_not_refused()
        wal = self._contents.wal
        return lsn if wal is None else wal.sendable_to(PG_TLI, lsn)

    # --- ITimeline -------------------------------------------------------------------------

    def require_ready(self) -> None:
        """Raise CannotConnectNow (57P03) as long as it is not known what there is, or how long
        segments are.  It is ready without any WAL, too: then that ends at 0.

        Of a timeline that is refused: DataCorrupted (XX001) if the control file is damaged, or that
        of another timeline, or not that of the WAL; UndefinedFile (58P01) if it is missing, or the
        directory was removed or replaced, IoError (58030) if it cannot be read.  All are FATAL, and
        may be raised by all that is here.
        """
        if not self._contents.is_empty:
            self._ready_wal()

    def end_of(self, tli: int) -> int:
        self._require_not_refused()
        if tli != PG_TLI:
            raise InternalError(f"requested timeline {tli} is not in this server's history")
        return self.commit_lsn

    def sendable_to(self, tli: int, lsn: int) -> int:
        end = self.end_of(tli)
        if lsn >= end and self._committed <= self.flush_lsn:
            return end
        return min(end, self.readable_to(lsn))  # it raises if what is committed is damaged

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        self._ready_wal().read_into(tli, lsn, buffer)

    def read_history(self, tli: int) -> bytes:
        self._require_not_refused()
        return read_history(self.directory, tli)

    def add_observer(self, observer: Callable[[], None]) -> None:
        self._observers.add(observer)
        self.start()

    def remove_observer(self, observer: Callable[[], None]) -> None:
        self._observers.discard(observer)

    # --- within ----------------------------------------------------------------------------

    @property
    def _is_settled(self) -> bool:
        contents = self._contents
        return bool(contents.wal or contents.refusal or contents.waiting_for)

    def _require_not_refused(self) -> None:
        if self._contents.refusal is not None:
            raise self._contents.refusal.with_traceback(None)  # it is raised more than once

    def _ready_wal(self) -> WalDirectory:
        self._require_not_refused()
        if self._contents.wal is not None:
            return self._contents.wal
        raise CannotConnectNow(
            "the database system is starting up",
            detail="The WAL sender waits for a proposer to say how long segments are."
            if self.is_waiting_for_proposer
            else "The WAL sender has not found the end of its WAL yet.",
            fatal=True,
            log=self._contents.waiting_for or None,
        )

    def _take_look(self) -> None:
        self._next_look = None
        self._look_now()

    def _look_now(self) -> None:
        is_news = self._contents.look()
        if self.is_over:
            self.stop()
        is_news |= self._publish()
        if self._is_settled:
            self._tell_opened()
        if is_news:
            self._tell()

    def _wal_changed(self) -> None:
        self._publish()
        self._tell_opened()
        self._tell()

    def _publish(self) -> bool:
        """Make known how far the timeline goes; whether there is news of that.

        While the end of WAL is looked for anew, what is known of it may be wrong.
        """
        before = self._committed, self.commit_lsn
        self._committed = max(self._contents.committed, self._advanced_to)
        wal = self._contents.wal
        if wal is not None and self._contents.new_wal is None:
            self.identity = wal.identity
            self.flush_lsn = wal.commit_lsn
            self.commit_lsn = max(self.commit_lsn, min(self._committed, self.flush_lsn))
        elif self._contents.waiting_for and self.control is not None:
            self.identity = self.control.identity
            self.flush_lsn = 0
        return before != (self._committed, self.commit_lsn)

    def _tell_opened(self) -> None:
        while self._awaiting_opened:
            self._awaiting_opened.pop(0).callback(None)

    def _tell(self) -> None:
        for observer in list(self._observers):
            observer()


@implementer(ITimeline)
class Uncommitted:
    """All WAL of ``timeline`` up to ``end``, committed or not, and then no more.

    It is for a producer and nobody else.  The history says that the timeline was left at ``end``,
    and so a producer that has come there tells its listener that the timeline has ended.
    """

    def __init__(self, timeline: SafekeeperTimeline, end: int) -> None:
        self._timeline = timeline
        self.identity = timeline.identity
        self.history = History(PG_TLI + 1, (Ancestor(PG_TLI, end, PG_TLI + 1),))
        self.commit_lsn = end
        self.replicas = timeline.replicas
        self.require_ready = timeline.require_ready
        self.read_into = timeline.read_into
        self.read_history = timeline.read_history
        self.add_observer = timeline.add_observer
        self.remove_observer = timeline.remove_observer

    def end_of(self, tli: int) -> int:
        self._timeline.end_of(tli)  # it raises if the timeline is refused
        return self.commit_lsn

    def sendable_to(self, tli: int, lsn: int) -> int:
        """As in ITimeline.  Raises ObjectNotInPrerequisiteState (55000) if the WAL was cut off."""
        end, flush_lsn = self.end_of(tli), self._timeline.flush_lsn
        if flush_lsn < end:
            raise ObjectNotInPrerequisiteState(
                f"WAL from {format_lsn(flush_lsn)} to {format_lsn(end)} is no longer there",
                detail="A new proposer has had it cut off.",
            )
        return min(end, self._timeline.readable_to(lsn))
