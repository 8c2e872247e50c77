"""Which WAL is kept, in a directory that is our own, and the removal of the rest.

Once a second it is looked how far back WAL has to go: so much behind its end as is to be kept in
any case (``wal_keep_size``), and all that a slot reserves or a connected replica still has to
read.  What is older, goes: whole segments, the oldest first, whichever timeline they are of; so
there is never a hole.  Slots may keep no more than ``max_slot_wal_keep_size``; one that would is
invalidated, and that is on disk before the WAL is gone.  History files stay for ever: they are
small, and no timeline can be understood without them.

Without a ``wal_keep_size`` nothing is ever removed.

PostgreSQL: ``KeepLogSeg``, ``RemoveOldXlogFiles`` in ``xlog.c``, done there at every checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.errors import CannotConnectNow
from walproto.lsn import format_lsn, parse_segment_name, segment_name
from walproto.timeline.directory import WalDirectory
from walproto.timeline.history import History
from walproto.timeline.slots import Slots
from walproto.timeline.threads import Threads
from walproto.wal.pages import LONG_HEADER, parse_identity
from walproto.wal.segments import open_file
from walproto.wal.writer import SyncError, sync_directory

INTERVAL = 1.0
"""Seconds between two looks."""


@dataclass(slots=True)
class Removal:
    """What was removed, and what was not that should have been."""

    names: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    """Files of those names that are another cluster's."""
    problem: str = ""
    """Why it went no further."""


def remove_segments(
    directory: Path, system_identifier: int, segment_size: int, segno: int
) -> Removal:
    """Remove the segments before number ``segno`` of all timelines, the oldest first.

    When this returns they are gone for good.  What cannot be removed ends it, for it may not be
    followed by a hole.
    """
    removal = Removal()
    path = directory
    try:
        found = (parse_segment_name(entry) for entry in os.listdir(directory))
        names = [name for name in found if name and name.is_possible(segment_size)]
        old = [name for name in names if name.segno(segment_size) < segno]
        for name in sorted(old, key=lambda name: (name.segno(segment_size), name)):
            path = directory / str(name)
            try:
                if _belongs_to(path, system_identifier):
                    path.unlink()
                    removal.names.append(path.name)
                else:
                    removal.left_alone.append(path.name)
            except FileNotFoundError:
                pass
        path = directory
        if removal.names:
            sync_directory(directory)
    except OSError as error:
        removal.problem = f"{path}: {error.strerror}"
    except SyncError as error:
        removal.problem = str(error)
    return removal


def _belongs_to(path: Path, system_identifier: int) -> bool:
    """Whether a segment is not another cluster's, for all that can be seen."""
    with open(open_file(path), "rb") as file:
        found = parse_identity(file.read(LONG_HEADER.size))
    return found is None or found[0].system_identifier == system_identifier


def first_lsn(directory: Path, history: History, segment_size: int, lsn: int) -> int:
    """Where the WAL begins that is in ``directory`` without a hole up to the segment of ``lsn``.

    There may be older segments: of those that were being removed when the power failed, any may
    have come back.
    """
    names = set(os.listdir(directory))
    start = lsn - lsn % segment_size
    while start:
        before = start - segment_size
        tli = history.file_tli(before, segment_size)
        name = segment_name(tli, before // segment_size, segment_size)
        if names.isdisjoint((name, f"{name}.partial")):
            break
        start = before
    return start


class Retention:
    """Keeps and removes the WAL of ``timeline`` as the options of ``slots`` say, from
    :meth:`start` to :meth:`stop`, and saves the positions of the slots."""

    _log = Logger()

    def __init__(
        self, timeline: WalDirectory, slots: Slots, clock: IReactorTime, threads: Threads
    ) -> None:
        self._timeline = timeline
        self._slots = slots
        self._clock = clock
        self._threads = threads
        self._timer: IDelayedCall | None = None
        self._work: Deferred[None] | None = None
        self._is_running = False
        self._removed_to = 0
        self._must_save = False
        self._told: dict[str, str] = {}

    def start(self) -> None:
        self._is_running = True
        self._timeline.add_observer(self._ready)
        self._schedule()

    def stop(self) -> Deferred[None]:
        """Remove nothing more.  Fires when nothing is under way any longer."""
        self._is_running = False
        self._timeline.remove_observer(self._ready)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._work or succeed(None)

    def _ready(self) -> None:
        """It is known what there is."""
        timeline = self._timeline
        timeline.remove_observer(self._ready)
        segment_size = timeline.identity.segment_size
        self._slots.recover(
            first_lsn(timeline.directory, timeline.history, segment_size, timeline.commit_lsn)
        )

    def _schedule(self) -> None:
        self._timer = self._clock.callLater(INTERVAL, self._look)

    def _look(self) -> None:
        self._timer = None
        self._work = ensureDeferred(self._keep_and_remove())
        self._work.addErrback(self._defect).addCallback(self._done)

    def _done(self, result: None) -> None:
        self._work = None
        if self._is_running:
            self._schedule()

    async def _keep_and_remove(self) -> None:
        try:
            self._timeline.require_ready()
        except CannotConnectNow:
            return
        segment_size = self._timeline.identity.segment_size
        options = self._slots.options
        if options.wal_keep_size is not None:
            self._invalidate(segment_size, options.wal_keep_size, options.max_slot_wal_keep_size)
        if self._must_save or not self._slots.is_saved(segment_size):
            await self._save()
        if options.wal_keep_size is not None and not self._must_save and self._is_running:
            await self._remove(segment_size, options.wal_keep_size)

    def _invalidate(self, segment_size: int, keep_size: int, slot_keep_size: int | None) -> None:
        """Take back the promises of the slots that keep too much."""
        if slot_keep_size is not None:
            kept = self._segments_behind(keep_size, segment_size)
            current = self._timeline.commit_lsn // segment_size
            limit = min(kept, current - slot_keep_size // segment_size)
            self._must_save |= self._slots.invalidate_before(limit * segment_size)

    def _segments_behind(self, keep_size: int, segment_size: int) -> int:
        """The first segment that is kept in any case: there is one complete one, at least, so
        that all of the records in the current one can be checked after a restart; and the one in
        which the last record begins, or the end of WAL would not be found again."""
        current = self._timeline.commit_lsn // segment_size
        kept = current - max(-(-keep_size // segment_size), 1)
        return max(min(kept, self._timeline.last_record_lsn // segment_size), 0)

    async def _save(self) -> None:
        try:
            await self._slots.save()
        except (OSError, SyncError) as error:
            what = getattr(error, "strerror", None) or error
            self._tell("save", f"cannot save replication slots: {what}: trying again")
        else:
            self._must_save = False
            self._told.pop("save", None)

    async def _remove(self, segment_size: int, keep_size: int) -> None:
        timeline = self._timeline
        wanted = {self._segments_behind(keep_size, segment_size) * segment_size: "wal_keep_size"}
        for slot in self._slots:
            if slot.restart_lsn:
                wanted[slot.restart_lsn] = f'replication slot "{slot.name}"'
        for replica in timeline.replicas:
            wanted[replica.sent_lsn] = str(replica)
        oldest = min(wanted)
        segno = oldest // segment_size
        if segno * segment_size <= self._removed_to:
            return
        self._removed_to = segno * segment_size
        self._slots.keep_from(self._removed_to)
        system_identifier = timeline.identity.system_identifier
        removal: Removal = await self._threads.run(
            lambda: remove_segments(timeline.directory, system_identifier, segment_size, segno)
        )
        timeline.forget_before(self._removed_to)
        if removal.names:
            self._log.info(
                "removed {count} segments, {first} to {last}: the oldest WAL that is kept is at "
                "{lsn}, for {why}",
                count=len(removal.names),
                first=removal.names[0],
                last=removal.names[-1],
                lsn=format_lsn(oldest),
                why=wanted[oldest],
            )
        for name in removal.left_alone:
            path = timeline.directory / name
            self._tell(name, f"{path} belongs to another cluster: it is left alone")
        if removal.problem:
            self._removed_to = 0  # try again
            self._tell("remove", f"cannot remove old WAL: {removal.problem}: trying again")
        else:
            self._told.pop("remove", None)

    def _tell(self, what: str, text: str) -> None:
        """Tell the operator what is wrong with ``what``, once."""
        if self._told.get(what) != text:
            self._told[what] = text
            self._log.critical("{text}", text=text)

    def _defect(self, failure: Failure) -> None:
        self._log.failure("a defect in walproto: no WAL is removed for now", failure)
