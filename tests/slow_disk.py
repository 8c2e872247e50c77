"""A disk that takes its time: a page cache that holds what a test says, threads that a test runs.

:class:`PageCache` takes the place of ``os.preadv`` and ``os.posix_fadvise``.  A read that does not
wait (RWF_NOWAIT) gets what is in the cache, as the kernel has it; one that waits brings it there,
and is remembered if it was not done in one of the threads, for then all would have waited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""0 where the system has no such reads."""
PAGE = 4096
"""Bytes of a page of memory."""

_preadv = os.preadv

Page = tuple[int, int]
"""Which file, in the order in which they were first read, and the number of a page in it."""


class Later:
    """A :class:`~walproto.timeline.threads.Threads` whose work is done when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.is_running = False

    def run(self, work: Callable[[], Any]) -> Deferred[Any]:
        self.waiting.append((work, Deferred()))
        return self.waiting[-1][1]

    def tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        what(*arguments)

    def work(self, index: int = 0) -> None:
        """Do one of the things that wait."""
        work, result = self.waiting.pop(index)
        self.is_running = True
        try:
            done = work()
        except Exception:
            result.errback(Failure())
        else:
            result.callback(done)
        finally:
            self.is_running = False


class PageCache:
    """What of files is in memory: at first, nothing."""

    def __init__(self, threads: Later) -> None:
        self.pages: set[Page] = set()
        self.unreadable: set[Page] = set()
        self.cannot_tell = False
        self.waited: list[tuple[int, int]] = []
        """(offset, size) of the reads that waited elsewhere than in a thread."""
        self._threads = threads
        self._files: dict[int, int] = {}

    def preadv(self, fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        (buffer,) = buffers
        view = memoryview(buffer)
        size = max(0, min(len(view), os.fstat(fd).st_size - offset))
        pages = self.pages_of(fd, offset, size)
        if flags & NOWAIT:
            if self.cannot_tell:
                raise OSError(95, "Operation not supported")
            there = next((n for n, page in enumerate(pages) if page not in self.pages), len(pages))
            if size and not there:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            size = max(0, min(size, (offset // PAGE + there) * PAGE - offset))
        else:
            if self.unreadable.intersection(pages):
                raise OSError(5, "Input/output error")
            if not self._threads.is_running and not self.pages.issuperset(pages):
                self.waited.append((offset, len(view)))
            self.pages.update(pages)
        return _preadv(fd, [view[:size]], offset)

    def posix_fadvise(self, fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        self.pages.difference_update(self.pages_of(fd, offset, size))

    def pages_of(self, fd: int, offset: int, size: int) -> list[Page]:
        """The pages that hold this piece of a file."""
        if size <= 0:
            return []
        file = self._files.setdefault(os.fstat(fd).st_ino, len(self._files))
        return [(file, page) for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1)]
