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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.errors import AdminShutdown, CannotConnectNow
from walproto.lsn import format_lsn, parse_segment_name, segment_name
from walproto.timeline.directory import WalDirectory
from walproto.timeline.slot_file import DAMAGED
from walproto.timeline.slots import Slots
from walproto.timeline.threads import Threads
from walproto.wal.pages import LONG_HEADER, parse_identity
from walproto.wal.segments import open_file
from walproto.wal.writer import SyncError, sync_directory

INTERVAL = 1.0
"""Seconds between two looks."""


BATCH = 100
"""Segments that are removed in one go: others may want something of the disk, too."""


@dataclass(slots=True)
class Removal:
    """What was removed, and what was not that should have been."""

    names: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    """Files of those names that are another cluster's."""
    problem: str = ""
    """Why it went no further."""


def old_segments(directory: Path, segment_size: int, segno: int) -> list[str]:
    """The segments before number ``segno`` of all timelines, the oldest first.  Raises OSError."""
    end = segment_name(1, segno, segment_size)[8:]
    # Names in a timeline are in order as they are: few of many have to be parsed.
    entries = [entry for entry in os.listdir(directory) if entry[8:24] < end]
    found = map(parse_segment_name, entries)
    names = [name for name in found if name and name.is_possible(segment_size)]
    old = [name for name in names if name.segno(segment_size) < segno]
    return list(map(str, sorted(old, key=lambda name: (name.segno(segment_size), name))))


def remove_segments(directory: Path, system_identifier: int, names: Sequence[str]) -> Removal:
    """Remove these segments one after the other.

    When this returns they are gone for good.  What cannot be removed ends it, for it may not be
    followed by a hole.
    """
    removal = Removal()
    path = directory
    try:
        for name in names:
            path = directory / name
            try:
                if _belongs_to(path, system_identifier):
                    path.unlink()
                    removal.names.append(name)
                else:
                    removal.left_alone.append(name)
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
        """It is known what there is; nobody could connect before."""
        self._timeline.remove_observer(self._ready)
        self._slots.look_at_end(self._timeline.commit_lsn)

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
        if options.wal_keep_size is not None and not self._slots.is_damaged:
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

    async def _save(self) -> bool:
        """Save the slots; whether that was possible."""
        try:
            await self._slots.save()
        except AdminShutdown:
            return False  # they have been saved for the last time
        except (OSError, SyncError) as error:
            what = getattr(error, "strerror", None) or error
            self._tell(
                "save",
                f"cannot save replication slots in {self._timeline.directory}: {what}: trying "
                "again; until then they are not created or dropped, and no WAL is removed",
            )
            return False
        self._must_save = False
        self._told.pop("save", None)
        return True

    async def _remove(self, segment_size: int, keep_size: int) -> None:
        timeline, slots = self._timeline, self._slots
        wanted = {self._segments_behind(keep_size, segment_size) * segment_size: "wal_keep_size"}
        for slot in slots:
            if slot.restart_lsn:
                wanted[slot.restart_lsn] = f'replication slot "{slot.name}"'
        for replica in timeline.replicas:
            wanted[replica.sent_lsn] = str(replica)
        oldest = min(wanted)
        segno = oldest // segment_size
        end = segno * segment_size
        if end <= self._removed_to:
            return
        if slots.is_damaged:
            path = timeline.directory / DAMAGED
            self._tell("damaged", f"no WAL is removed as long as {path} is there: slots were lost")
            return
        kept_from = slots.kept_from
        slots.keep_from(end)
        if not await self._save():
            slots.kept_from = kept_from
            return
        try:
            names: list[str] = await self._threads.run(
                lambda: old_segments(timeline.directory, segment_size, segno)
            )
        except OSError as error:
            what = f"{error.filename}: {error.strerror}"
            self._tell("remove", f"cannot remove old WAL: {what}: trying again")
            return
        for first in range(0, len(names), BATCH):
            batch = names[first : first + BATCH]
            why = f"the oldest WAL that is kept is at {format_lsn(oldest)}, for {wanted[oldest]}"
            if not self._is_running or not await self._remove_batch(batch, why):
                return
        self._removed_to = end

    async def _remove_batch(self, names: list[str], why: str) -> bool:
        """Remove some segments, and tell what came of it; whether it may go on."""
        timeline = self._timeline
        system_identifier = timeline.identity.system_identifier
        removal: Removal = await self._threads.run(
            lambda: remove_segments(timeline.directory, system_identifier, names)
        )
        if removal.names:
            timeline.forget_before(self._slots.kept_from)
            several = len(removal.names) > 1
            self._log.info(
                "removed {count}, {which}: {why}",
                count=f"{len(removal.names)} segments" if several else "1 segment",
                which=f"{removal.names[0]} to {removal.names[-1]}" if several else removal.names[0],
                why=why,
            )
        for name in removal.left_alone:
            path = timeline.directory / name
            self._tell(name, f"{path} belongs to another cluster: it is left alone")
        if removal.problem:
            self._tell("remove", f"cannot remove old WAL: {removal.problem}: trying again")
            return False
        self._told.pop("remove", None)
        return True

    def _tell(self, what: str, text: str) -> None:
        """Tell the operator what is wrong with ``what``, once."""
        if self._told.get(what) != text:
            self._told[what] = text
            self._log.critical("{text}", text=text)

    def _defect(self, failure: Failure) -> None:
        self._log.failure("a defect in walproto: no WAL is removed for now", failure)
