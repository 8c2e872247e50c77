"""Tells when something in a directory changes: at once by inotify, and now and then anyway.

Notice is only ever a hint to look; whoever gets it looks for himself.  So a lost one costs the
polling interval, and on a system or a file system without inotify, nothing but that interval is
left.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorFDSet, IReactorTime
from twisted.logger import Logger
from twisted.python.filepath import FilePath

SLOW_POLL = 1.0
"""Seconds between looks where inotify tells of changes."""
FAST_POLL = 0.1
"""Seconds between looks where nothing does."""


class DirectoryWatch:
    """Calls ``changed`` whenever the directory, or a file in it, may have changed; without
    ``by_inotify``, because somebody else tells of what is urgent, only each second."""

    _log = Logger()

    def __init__(
        self,
        directory: Path,
        clock: IReactorTime,
        changed: Callable[[], None],
        by_inotify: bool = True,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._changed = changed
        self._by_inotify = by_inotify
        self._notifier: Any = None
        self._poll: IDelayedCall | None = None

    def start(self) -> None:
        if self._by_inotify:
            self._notifier = self._start_inotify()
        self._schedule()

    def stop(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if self._notifier is not None:
            self._notifier.stopReading()
            self._notifier.connectionLost(None)
            self._notifier = None

    def _start_inotify(self) -> Any:
        """The inotify descriptor, being read; None where there is none to be had."""
        notifier: Any = None
        try:
            if not IReactorFDSet.providedBy(self._clock):
                raise OSError("the reactor cannot wait for it")
            from twisted.internet import inotify

            notifier = inotify.INotify(self._clock)
            notifier.watch(
                FilePath(bytes(self._directory)),
                mask=inotify.IN_MODIFY
                | inotify.IN_CREATE
                | inotify.IN_MOVED_TO
                | inotify.IN_DELETE,
                callbacks=[lambda *_: self._changed()],
            )
        except Exception as error:  # INotifyError is no OSError, and cannot be imported everywhere
            if notifier is not None:
                notifier.connectionLost(None)
            self._log.info(
                "no inotify here ({error}): looking for new WAL every {seconds} s",
                error=error,
                seconds=FAST_POLL,
            )
            return None
        notifier.startReading()
        return notifier

    def _schedule(self) -> None:
        is_alone = self._by_inotify and self._notifier is None
        interval = FAST_POLL if is_alone else SLOW_POLL
        self._poll = self._clock.callLater(interval, self._look)

    def _look(self) -> None:
        self._schedule()
        self._changed()
