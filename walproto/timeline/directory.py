"""A timeline that lives in a directory to which somebody writes.

The directory may be a primary's ``pg_wal``, an archive that is being filled, or one that is
finished; or one into which we receive (:mod:`walproto.upstream`), which then shows here what may be
seen of it, and says when there is more.  Nothing in it is written, renamed or removed from here.

Whenever something there may have changed, :class:`WalDirectory` does its work in small steps, each
a turn of the reactor, until there is no more to do: follow the tail of the current timeline; look
for newer timelines, and go over to one as soon as its WAL is here up to where it branched off;
prove the older segments that clients have asked for.  Behind each step the observers are told, if
there was progress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorThreads, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from walproto.errors import CannotConnectNow, DataCorrupted, InternalError, UndefinedFile
from walproto.lsn import format_lsn, segment_name
from walproto.timeline.history import History
from walproto.timeline.interfaces import IFiledTimeline
from walproto.timeline.observers import Observers
from walproto.timeline.proofs import Proofs
from walproto.timeline.received import Received, ReceivedSegments
from walproto.timeline.replicas import Replicas
from walproto.timeline.succession import RELIST, Succession
from walproto.timeline.survey import survey
from walproto.timeline.tail import Tail
from walproto.timeline.threads import ReactorThreads, Threads
from walproto.timeline.watch import DirectoryWatch
from walproto.wal.cold import CHUNK, NotInMemory
from walproto.wal.pages import Identity
from walproto.wal.segments import OpenFiles, Segments, Stamp

STEP = 256 * 1024
"""Bytes of WAL walked over in one turn of the reactor: a few milliseconds of it."""

NEAR = 64 << 20
"""Bytes behind old WAL within which a client will soon want that, too."""

PATIENCE = 30.0
"""Seconds without news after which it is looked whether WAL goes on behind a gap."""
LONG_PATIENCE = 10 * PATIENCE
"""The same when nothing was removed, renamed or created in the directory."""


@implementer(IFiledTimeline)
class WalDirectory:
    """The WAL in ``directory``, from :meth:`start` to :meth:`stop`.

    ``clock`` is the reactor.  ``received`` is what is being received into the directory, if that
    is so: whoever does it calls :meth:`show` when there is more of it.  ``files`` bounds how many
    are kept open, together with others that share it.  ``threads`` wait for the disk, by default
    those of the reactor, if it is one that has some.  ``replicas`` are those of somebody who serves
    what is here, if it is not served itself.  ``log_prefix`` is what a line in the log begins with,
    in terms of ``log_fields``.

    Whoever watches the directory himself does not start it, but calls :meth:`look` all the time.
    """

    _log = Logger()

    def __init__(
        self,
        directory: Path | str,
        clock: IReactorTime,
        received: Received | None = None,
        files: OpenFiles | None = None,
        log_prefix: str = "",
        log_fields: Mapping[str, Any] | None = None,
        threads: Threads | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.replicas = Replicas() if replicas is None else replicas
        self.commit_lsn = 0
        self.identity: Identity
        self.history: History
        self._clock = clock
        self._received = received
        self._files = files
        if threads is None and IReactorThreads.providedBy(clock):
            threads = ReactorThreads(clock)
        self._threads = threads
        self._is_stopped = False
        self._log_prefix = log_prefix
        self._log_fields = log_fields or {}
        self._watch = DirectoryWatch(self.directory, clock, self._changed, by_inotify=not received)
        self._observers = Observers(clock)
        self._next_step: IDelayedCall | None = None
        self._is_resting = False
        self._ready = False
        self._waiting_for = ""
        self._said: set[str] = set()
        self._tail: Tail | None = None
        self._newer: Tail | None = None
        self._walked_from = 0
        self._last_progress = 0.0
        self._gap_stamp: float | None = None
        self._gap_looked = 0.0
        self._end_stamp: Stamp | None = None
        self._end_changed = False
        self._stopped_at = 0
        self._fence: int | None = None
        self._fence_is_news = False
        self._damage: DataCorrupted | None = None

    def start(self) -> None:
        """Begin to watch the directory, and to look for the end of its WAL."""
        self._watch.start()
        self.look()

    def stop(self) -> None:
        self._is_stopped = True
        self._watch.stop()
        self._observers.stop()
        if self._next_step is not None:
            self._next_step.cancel()
            self._next_step = None
        if self._tail is not None:
            self._segments.close()

    def look(self) -> None:
        """Have a look soon: something in the directory may have changed."""
        if self._next_step is None:
            self._next_step = self._clock.callLater(0, self._step)
        elif self._is_resting:
            self._is_resting = False
            self._next_step.reset(0)

    def _changed(self) -> None:
        """The watch has noticed something: have a look when what is found will be told."""
        rest = self._observers.rest
        if not rest:
            self.look()
        elif self._next_step is None:
            self._is_resting = True
            self._watch.pause()
            self._next_step = self._clock.callLater(rest, self._step)

    def show(self) -> None:
        """More of what is received is written or on disk: show at once what was walked over before
        that, and look soon at what was not."""
        tail, received = self._tail, self._received
        assert received is not None
        if self._ready and tail is not None and self._is_received(tail) and self._newer is None:
            end = self._fenced(self._end_of(tail))
            # Whatever else there is to do at the end of a segment, is done in a step.
            if self.commit_lsn < end < self._walked_from + self.identity.segment_size:
                self.commit_lsn = end
                self._end_stamp = None
                self._progressed()
                self._observers.tell()
            if received.is_shown and self.commit_lsn >= end:
                return
        self.look()

    def fence(self, lsn: int | None) -> None:
        """Let nobody have WAL behind ``lsn``, whatever there is; None ends it."""
        self._fence_is_news |= self._fence != lsn
        self._fence = lsn
        if self._ready and self._tail is not None:
            self.history = self._fenced_history(self._tail.history)
            if lsn is not None:
                self.commit_lsn = min(self.commit_lsn, lsn)
        self.look()

    @property
    def last_record_lsn(self) -> int:
        """Where the last record begins, or one before it; once ready.  From the segment that this
        is in, the end of WAL can be found."""
        tail = self._tail
        if tail is None:
            return self.commit_lsn
        if self._received is not None and self._is_received(tail):
            return min(self.commit_lsn, self._received.last_record)
        return min(self.commit_lsn, tail.last_record)

    def forget_before(self, lsn: int) -> None:
        """The segments before the one that begins at ``lsn`` have been removed."""
        self._segments.forget_before(lsn)
        self._proofs.forget_before(lsn)

    # --- ITimeline -------------------------------------------------------------------------

    def require_ready(self) -> None:
        if not self._ready:
            raise CannotConnectNow(
                "the database system is starting up",
                detail="The WAL sender has not found the end of its WAL yet.",
                fatal=True,
                log=self._waiting_for or None,
            )

    def end_of(self, tli: int) -> int:
        if tli == self.history.tli:
            return self.commit_lsn
        ancestor = self.history.ancestor(tli)
        if ancestor is None:
            raise InternalError(f"requested timeline {tli} is not in this server's history")
        return ancestor.switch_lsn

    def sendable_to(self, tli: int, lsn: int) -> int:
        end = self.end_of(tli)
        if lsn >= end:
            if self._damage is not None and tli == self.history.tli:
                raise self._damage.with_traceback(None)  # it is raised more than once
            if tli == self.history.tli and self._fence is not None and lsn > self._fence:
                raise InternalError(
                    f"requested starting point {format_lsn(lsn)} is ahead of the WAL flush "
                    f"position of this server {format_lsn(end)}",
                    log="it has WAL that is not in the upstream's history, so it will never get "
                    "more: pg_rewind it, or clone it anew",
                )
            return end
        size = self.identity.segment_size
        if self.history.file_tli(lsn, size) < tli:
            name = segment_name(tli, lsn // size, size)
            raise UndefinedFile(
                f"requested WAL segment {name} has already been removed",
                log=f"{self.directory / name}, LSN {format_lsn(lsn)}: the timeline begins later",
            )
        if lsn >= self._walked_from and not self._end_changed:
            return end
        proven = self._proofs.proven_to(lsn)
        if self._proofs.is_busy:
            self.look()
        return min(end, proven)

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        self._segments.read_into(self._file_tli(lsn), lsn, buffer)
        if (over := lsn % CHUNK) < len(buffer) and lsn - over <= self._walked_from:
            self._give_back(lsn - over)

    def _give_back(self, lsn: int) -> None:
        """Leave memory to what is wanted more than old WAL before ``lsn`` that is sent, unless
        another client is about to come there."""
        if not any(lsn - NEAR <= replica.sent_lsn < lsn for replica in self.replicas):
            self._segments.give_back(self._file_tli(lsn - 1), lsn - 1)

    def read_history(self, tli: int) -> bytes:
        return self._segments.read_history(tli)

    def add_observer(self, observer: Callable[[], None]) -> None:
        self._observers.add(observer)

    def remove_observer(self, observer: Callable[[], None]) -> None:
        self._observers.remove(observer)

    # --- one step after another ------------------------------------------------------------

    def _step(self) -> None:
        self._next_step = None
        self._is_resting = False
        self._watch.resume()
        tail = self._tail or self._find_tail()
        if tail is not None:
            with suppress(NotInMemory):  # it is gone on with when it is
                self._take_step(tail)

    def _take_step(self, tail: Tail) -> None:
        before = self._tail, self.commit_lsn
        stamp = tail.stamp()
        more = self._advance(tail)
        if self._ready:
            more |= self._follow_newer_timelines(tail)
        elif not more:
            self._begin_to_serve(tail)
        if self._ready and self._tail is tail:
            self._publish(tail, stamp)
        progress = self._ready and before != (self._tail, self.commit_lsn)
        if progress:
            self._end_stamp = stamp if self._tail is tail else None
            self._progressed()
        elif self._ready and not more:
            # That the last segment changes although WAL does not grow may be damage.
            self._end_changed |= self._end_stamp not in (None, stamp)
            self._end_stamp = stamp
            progress = self._look_behind(self._tail or tail)
            self._look_beyond_a_gap(self._tail or tail)
        if self._ready and self._proofs.is_busy:
            with suppress(NotInMemory):
                more |= self._proofs.advance(STEP)
                progress = True
        if more:
            self.look()
        if progress or self._fence_is_news:
            self._fence_is_news = False
            self._observers.tell()

    def _progressed(self) -> None:
        """There is more WAL to be had."""
        self._last_progress = self._clock.seconds()
        self._end_changed, self._damage = False, None

    def _load(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Have WAL loaded into memory, and whoever waits for it told."""
        assert self._threads is not None

        def loaded(result: None) -> None:
            done()
            if not self._is_stopped:
                self.look()
                if self._ready:
                    self._observers.tell()

        self._threads.run(work).addCallback(loaded).addErrback(
            lambda failure: self._log.failure("a defect in walproto", failure)
        )

    def _advance(self, tail: Tail) -> bool:
        """Walk on; whether there may be more to walk over at once.  Who receives is told, too."""
        more = tail.advance(STEP)
        if self._received is not None:
            reason = "" if more else tail.reason
            more |= self._received.walk(
                tail.history.tli, tail.position, tail.end, tail.last_record, reason
            )
        return more

    def _end_of(self, tail: Tail) -> int:
        """Up to where the tail's WAL may be shown."""
        if self._received is None:
            return tail.end
        return min(tail.end, self._received.visible_to(tail.history.tli))

    def _is_received(self, tail: Tail) -> bool:
        return self._received is not None and tail.history.tli == self._received.tli

    def _find_tail(self) -> Tail | None:
        """Look for WAL where there was none before."""
        try:
            found = survey(self.directory)
        except OSError as error:
            self._wait_for(f"cannot read {self.directory} ({error.strerror}): waiting until I can")
            return None
        except ValueError as error:
            self._wait_for(str(error))
            return None
        if found is None:
            self._wait_for(f"there is no WAL in {self.directory} yet: waiting for a first segment")
            return None
        for note in found.notes:
            self._warn("{directory}: {note}", directory=str(self.directory), note=note)
        self.identity = found.identity
        self._first_lsn = found.first_lsn
        load = None if self._threads is None else self._load
        self._segments = (
            Segments(self.directory, found.identity, self._files, load)
            if self._received is None
            else ReceivedSegments(self.directory, found.identity, self._received, load)
        )
        self._succession = Succession(self.directory, self._segments, found.identity, self._clock)
        self._tail = Tail(self._segments, found.identity, found.history, found.last_lsn)
        return self._tail

    def _begin_to_serve(self, tail: Tail) -> None:
        """The walk has come to the end of WAL, if there is any WAL."""
        branched_at = tail.history.start_lsn
        is_found = tail.is_found and self._end_of(tail) > tail.start
        if branched_at and not (is_found and self._end_of(tail) >= branched_at):
            # Of the newest timeline there is too little yet: it will follow the one before.
            history = tail.history.up_to(tail.history.ancestors[-1].tli)
            start = branched_at - branched_at % self.identity.segment_size
            self._tail = Tail(self._segments, self.identity, history, start)
            self.look()
            return
        if tail.is_found and not is_found:
            return  # until it is on disk
        if not tail.is_found:
            self._wait_for(f"there is no whole WAL record in {self.directory} yet: {tail.reason}")
            self._segments.close()
            self._tail = None  # what comes next may be elsewhere: look at all of it again
            return
        self._ready = True
        self._adopt(tail)
        self._info(
            "ready to serve timeline {tli} of system {system} from {start} to {end} in {directory}",
            directory=str(self.directory),
            tli=tail.history.tli,
            system=self.identity.system_identifier,
            start=format_lsn(min(self._first_lsn, tail.start)),
            end=format_lsn(self.commit_lsn),
        )

    def _wait_for(self, what: str) -> None:
        self._waiting_for = what
        if what not in self._said:
            self._said.add(what)
            self._warn("{what}", what=what)

    def _adopt(self, tail: Tail) -> None:
        """Make the tail's timeline the current one."""
        self._tail = tail
        self._newer = None
        self.history = self._fenced_history(tail.history)
        self.commit_lsn = self._fenced(self._end_of(tail))
        self._walked_from = tail.start
        self._proofs = Proofs(self._segments, self.identity, tail.history)

    def _publish(self, tail: Tail, stamp: Stamp | None) -> None:
        """Make known how far the current timeline goes."""
        end = self._end_of(tail)
        if self._newer is not None:
            # It is known where this timeline ends, though not yet what comes after.
            ancestor = self._newer.history.ancestor(tail.history.tli)
            end = min(end, ancestor.switch_lsn) if ancestor else end
        self.commit_lsn = max(self.commit_lsn, self._fenced(end))
        size = self.identity.segment_size
        while self._walked_from + size <= self.commit_lsn:
            self._proofs.add(self._walked_from // size, stamp)
            self._walked_from += size

    def _fenced(self, lsn: int) -> int:
        return lsn if self._fence is None else min(lsn, self._fence)

    def _fenced_history(self, history: History) -> History:
        """The history without the timelines that begin behind the fence."""
        while self._fence is not None and history.start_lsn > self._fence:
            history = history.up_to(history.ancestors[-1].tli)
        return history

    def _look_behind(self, tail: Tail) -> bool:
        """The walk has stopped.  If WAL goes on behind all the same, it is damaged where the walk
        stopped, or missing; whether that is news.

        It takes two looks: when the next segment was begun, this one had been finished before, but
        perhaps only after we had looked at it.
        """
        if self._is_received(tail):
            return False  # whoever receives it, is told where it stops, and fetches it again
        if not tail.goes_on_behind():
            self._stopped_at, self._damage = 0, None
        elif tail.position != self._stopped_at:
            self._stopped_at, self._damage = tail.position, None
            self.look()
        elif self._damage is None:
            path = self.directory / tail.file_name()
            if not tail.page_is_there():
                self._wait_for(f"{path} is missing or not complete, though later ones are there")
                return False
            where = f"{path}, LSN {format_lsn(tail.end)}: damaged"
            self._wait_for(f"{where}: {tail.reason}: restore it")
            self._damage = DataCorrupted(tail.reason, log=f"{where}: restore it")
            return True
        return False

    def _look_beyond_a_gap(self, tail: Tail) -> None:
        """When nothing has come for long, look whether WAL goes on further away.

        It does where segments were removed before we had seen them, or will never come.  What is
        there is then served from there on, as after a restart, and what is not is told to whoever
        wants it.
        """
        now = self._clock.seconds()
        if self._newer is not None or now - self._last_progress < PATIENCE:
            return
        if self._is_received(tail):
            return
        self._last_progress = now
        try:
            stamp = self.directory.stat().st_mtime
            if stamp == self._gap_stamp and now - self._gap_looked < LONG_PATIENCE:
                return
            self._gap_stamp, self._gap_looked = stamp if now - stamp > RELIST else None, now
            found = survey(self.directory)
        except (OSError, ValueError):
            return
        if not found or found.history != tail.history or found.last_lsn <= tail.position:
            return
        try:
            is_there = self._segments.read(tail.history.tli, found.last_lsn, 1)
        except NotInMemory:  # it is looked at again when it is
            self._gap_stamp, self._last_progress = None, now - PATIENCE
            raise
        if is_there:  # it may not be seen yet
            self._newer = Tail(self._segments, self.identity, tail.history, found.last_lsn)
            self._warn(
                "{path}, LSN {lsn}: WAL ends here, and goes on at {further}: going on from there",
                path=str(self.directory / tail.file_name()),
                lsn=format_lsn(tail.end),
                further=format_lsn(found.last_lsn),
            )
            self.look()

    def _follow_newer_timelines(self, tail: Tail) -> bool:
        """Look for a newer timeline and go over to it once it is here; whether there is more to
        walk over at once."""
        try:
            self._newer = newer = self._succession.look(tail.history, self._newer)
        except FileNotFoundError:
            self._wait_for(f"{self.directory} is missing: put it back if it was not to be removed")
            newer = self._newer
        except (OSError, ValueError) as error:
            self._wait_for(f"cannot follow newer timelines in {self.directory}: {error}")
            newer = self._newer
        if newer is None:
            return False
        more = self._advance(newer)
        if newer.is_found and self._end_of(newer) >= newer.history.start_lsn:
            if newer.history != tail.history:
                self._info(
                    "now serving timeline {new}, which branched off timeline {old} at {switch}",
                    old=newer.history.ancestors[-1].tli,
                    switch=format_lsn(newer.history.start_lsn),
                    new=newer.history.tli,
                )
            self._adopt(newer)
        return more

    def _info(self, text: str, **fields: Any) -> None:
        self._log.info(self._log_prefix + text, **self._log_fields, **fields)

    def _warn(self, text: str, **fields: Any) -> None:
        self._log.warn(self._log_prefix + text, **self._log_fields, **fields)

    def _file_tli(self, lsn: int) -> int:
        return self.history.file_tli(lsn, self.identity.segment_size)
