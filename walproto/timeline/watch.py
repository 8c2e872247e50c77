"""Tells when something in a directory changes: at once by inotify, and now and then anyway.

Notice is only ever a hint to look; whoever gets it looks for himself.  So a lost one costs the
polling interval, and on a system or a file system without inotify, nothing but that interval is
left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorFDSet, IReactorTime
from twisted.logger import Logger
from twisted.python.filepath import FilePath

SLOW_POLL = 1.0
"""Seconds between looks where inotify tells of changes."""
FAST_POLL = 0.1
"""Seconds between looks where nothing does."""


class Inotify:
    """One inotify descriptor for any number of directories: a user may have only so many, by
    default 128.  It is open as long as a directory is watched.  ``clock`` is the reactor."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._notifier: Any = None
        self._watched: set[Path] = set()

    def watch(self, directory: Path, changed: Callable[[], None]) -> None:
        """Have ``changed`` called when there are changes; once for each directory.  Raises OSError
        where that is not to be had."""
        try:
            if not IReactorFDSet.providedBy(self._clock):
                raise OSError("the reactor cannot wait for it")
            from twisted.internet import inotify

            if self._notifier is None:
                self._notifier = inotify.INotify(self._clock)
                # It would end itself, for all, when one of the directories is removed.
                self._notifier.loseConnection = lambda: None
                self._notifier.startReading()
            self._notifier.watch(
                FilePath(bytes(directory)),
                mask=inotify.IN_MODIFY
                | inotify.IN_CREATE
                | inotify.IN_MOVED_TO
                | inotify.IN_DELETE,
                callbacks=[lambda *_: changed()],
            )
            self._watched.add(directory)
        except Exception as error:  # INotifyError is no OSError, and cannot be imported everywhere
            raise OSError(str(error)) from error
        finally:
            self._close_if_unused()

    def ignore(self, directory: Path) -> None:
        """Take back ``watch``."""
        self._watched.remove(directory)
        with suppress(KeyError):  # it was removed
            self._notifier.ignore(FilePath(bytes(directory)))
        self._close_if_unused()

    def pause(self) -> None:
        """Hear of nothing for a while."""
        if self._notifier is not None:
            self._notifier.stopReading()

    def resume(self) -> None:
        """Hear of it all, the same changes only once."""
        if self._notifier is not None:
            self._notifier.startReading()

    def _close_if_unused(self) -> None:
        if self._notifier is not None and not self._watched:
            self._notifier.stopReading()
            self._notifier.connectionLost(None)
            self._notifier = None


class DirectoryWatch:
    """Calls ``changed`` whenever the directory, or a file in it, may have changed; without
    ``by_inotify``, because somebody else tells of what is urgent, only each second.  ``inotify`` is
    shared with other watches, if it is given."""

    _log = Logger()

    def __init__(
        self,
        directory: Path,
        clock: IReactorTime,
        changed: Callable[[], None],
        by_inotify: bool = True,
        inotify: Inotify | None = None,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._changed = changed
        self._by_inotify = by_inotify
        self._inotify = inotify or Inotify(clock)
        self._is_shared = inotify is not None
        self._is_notified = False
        self._is_paused = False
        self._poll: IDelayedCall | None = None

    def start(self) -> None:
        if self._by_inotify:
            self._is_notified = self._start_inotify()
        self._schedule()

    def stop(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if self._is_notified:
            self._is_notified = False
            self._inotify.ignore(self._directory)

    def pause(self) -> None:
        """Be told of nothing at once, if nobody else wants to be."""
        if self._is_notified and not self._is_shared:
            self._is_paused = True
            self._inotify.pause()

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._inotify.resume()

    def _start_inotify(self) -> bool:
        """Watch by inotify; whether that is to be had."""
        try:
            self._inotify.watch(self._directory, self._changed)
        except OSError as error:
            self._log.info(
                "no inotify here ({error}): looking for new WAL every {seconds} s",
                error=error,
                seconds=FAST_POLL,
            )
            return False
        return True

    def _schedule(self) -> None:
        is_alone = self._by_inotify and not self._is_notified
        interval = FAST_POLL if is_alone else SLOW_POLL
        self._poll = self._clock.callLater(interval, self._look)

    def _look(self) -> None:
        self._schedule()
        self._changed()
