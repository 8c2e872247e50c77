"""Many timelines: ``DIR/<tenant ID>/<timeline ID>/``, each opened when somebody asks for it.

Whatever is in ``DIR`` and has another name is left alone.  A timeline that nobody wants any longer
is suspended after a while: so what is open, watched and looked at now and then are only those that
are in use, however many there are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from walproto.errors import IoError, UndefinedObject
from walproto.neon.ids import TimelineIds, parse_id
from walproto.neon.timeline import SafekeeperTimeline
from walproto.timeline.watch import Inotify
from walproto.wal.segments import OpenFiles

MAX_OPEN = 256
"""How many segments are kept open, of all timelines together."""

IDLE = 60.0
"""Seconds that nobody needs a timeline until it is suspended; at most twice that."""


class DataDirectory:
    """The timelines in the directory ``path``, until :meth:`stop`.  ``clock`` is the reactor."""

    def __init__(self, path: Path | str, clock: IReactorTime) -> None:
        self.path = Path(path)
        self._clock = clock
        self._inotify = Inotify(clock)
        self._files = OpenFiles(MAX_OPEN)
        self._timelines: dict[TimelineIds, SafekeeperTimeline] = {}
        self._idle: set[TimelineIds] = set()
        self._next_sweep: IDelayedCall | None = None

    def get(self, ids: TimelineIds) -> SafekeeperTimeline:
        """The timeline, active; it is the same object each time, as long as its directory is the
        same.

        What there is of it, is known when its :meth:`~SafekeeperTimeline.opened` fires.  Raises
        UndefinedObject (42704) if there is no such directory, IoError (58030) if that cannot be
        told; both FATAL.
        """
        try:
            ids = TimelineIds(parse_id(ids.tenant_id), parse_id(ids.timeline_id))
        except ValueError as error:
            raise UndefinedObject(f'timeline "{ids}" does not exist: {error}', fatal=True) from None
        timeline = self._timelines.get(ids)
        if timeline is not None:
            timeline.revisit()
        try:
            directory = self._directory_of(ids)
        except UndefinedObject:
            if timeline is not None:
                timeline.stop()
                del self._timelines[ids]
            raise
        if timeline is None or timeline.is_over:
            timeline = self._timelines[ids] = SafekeeperTimeline(
                directory, ids, self._clock, self._inotify, self._files
            )
        timeline.start()
        self._idle.discard(ids)
        if self._next_sweep is None:
            self._next_sweep = self._clock.callLater(IDLE, self._sweep)
        return timeline

    def stop(self) -> None:
        """Close all timelines, whoever uses them."""
        if self._next_sweep is not None:
            self._next_sweep.cancel()
            self._next_sweep = None
        for timeline in self._timelines.values():
            timeline.stop()

    def __iter__(self) -> Iterator[TimelineIds]:
        """The timelines that there are directories of, opened or not.  Raises OSError if
        :attr:`path` cannot be read; what cannot be read below it is left out."""
        for tenant_id in _ids_in(self.path):
            try:
                for timeline_id in _ids_in(self.path / tenant_id):
                    ids = TimelineIds(tenant_id, timeline_id)
                    if self._is_there(ids):
                        yield ids
            except OSError:
                continue

    def _directory_of(self, ids: TimelineIds) -> Path:
        directory = self.path / str(ids)
        try:
            if self._is_there(ids):
                return directory
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise IoError(
                f'could not open directory of timeline "{ids}": {error.strerror}',
                fatal=True,
                log=f"{directory}: make it readable",
            ) from None
        raise no_such_timeline(ids, log=f"there is no directory {directory}")

    def _is_there(self, ids: TimelineIds) -> bool:
        """Whether there is its directory; a symbolic link is none, for who may see the one
        timeline need not be one who may see the other.  Raises OSError."""
        tenant = self.path / ids.tenant_id
        directories = (tenant, tenant / ids.timeline_id)
        return all(stat.S_ISDIR(os.lstat(directory).st_mode) for directory in directories)

    def _sweep(self) -> None:
        """Suspend what was not in use the last time either."""
        unused = {ids for ids, it in self._timelines.items() if it.is_active and not it.is_in_use}
        for ids in unused & self._idle:
            self._timelines[ids].suspend()
        self._idle = unused - self._idle
        self._next_sweep = self._clock.callLater(IDLE, self._sweep)


def no_such_timeline(ids: TimelineIds, *, log: str) -> UndefinedObject:
    """The error for a timeline that there is not, as far as the client may know; ``log`` is what
    the operator may."""
    return UndefinedObject(f'timeline "{ids}" does not exist', fatal=True, log=log)


def _ids_in(directory: Path) -> list[str]:
    """The names in ``directory`` that are IDs as a safekeeper writes them, in order."""
    found = []
    for name in sorted(os.listdir(directory)):
        try:
            if parse_id(name) == name:
                found.append(name)
        except ValueError:
            continue
    return found
