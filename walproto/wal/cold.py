"""WAL that is not in memory, and who waits for it: not the reactor's thread.

A read gets what the kernel's page cache holds, and nothing else (``RWF_NOWAIT``).  If that is not
all, :class:`NotInMemory` is raised, and a thread reads the megabyte in question.  Whoever gave the
thread then tells those who wait, and they try again.  Meanwhile the kernel reads ahead, as it sees
that the file is read on and on; if it is asked to (``POSIX_FADV_WILLNEED``), it does so in small
pages, and all that follows takes twice the time.

What had to be loaded for a client is given back behind it, so that it takes no room in memory from
what others want: above all, the newest WAL.

Where kernel or filesystem cannot tell what is in memory, reads wait for the disk as they always do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

CHUNK = 1 << 20
"""Bytes that a thread waits for at a time."""

Elsewhere = Callable[[Callable[[], None], Callable[[], None]], None]
"""(work, done): has ``work()`` done in another thread, and then ``done()`` in this one."""

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_sink = bytearray(CHUNK)
"""Where threads read to, all of them: what comes there does not matter."""


class NotInMemory(Exception):
    """It is being read from disk: try again when told."""


class ColdFile:
    """Reads the open file ``fd``, what is not in memory ``elsewhere``; without that, it waits."""

    __slots__ = ("_elsewhere", "_loaded", "_loading", "_ours", "fd")

    def __init__(self, fd: int, elsewhere: Elsewhere | None) -> None:
        self.fd = fd
        self._elsewhere = elsewhere if _NOWAIT else None
        self._loading: set[int] = set()
        # What was loaded, and has not been read yet.  If it is not in memory now, it may be that
        # it cannot be read, or that memory is short: a read that waits makes sure of progress.
        self._loaded: set[int] = set()
        # What was loaded, and has not been given back.
        self._ours: set[int] = set()

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset`` on as far as the file goes; how many bytes that are.

        Raises OSError if it cannot be read, NotInMemory if it is not there yet.
        """
        if self._elsewhere is None:
            return os.preadv(self.fd, [buffer], offset)
        if offset // CHUNK in self._loading:
            raise NotInMemory
        count = 0
        try:
            count = os.preadv(self.fd, [buffer], offset, _NOWAIT)
        except BlockingIOError:
            pass
        except OSError:  # it cannot tell; or it cannot be read at all, and then that is raised
            self._elsewhere = None
            return os.preadv(self.fd, [buffer], offset)
        missing = offset + count
        if count == len(buffer) or missing >= os.fstat(self.fd).st_size:
            if self._loaded:
                self._loaded.difference_update(range(offset // CHUNK, missing // CHUNK + 1))
            return count
        chunk = missing // CHUNK
        if chunk in self._loaded:
            self._loaded.discard(chunk)
            return os.preadv(self.fd, [buffer], offset)
        if chunk not in self._loading:
            self._load(chunk, self._elsewhere)
        raise NotInMemory

    def give_back(self, chunk: int) -> None:
        """Nobody needs this chunk: have it in memory no longer, if we had to load it."""
        if chunk in self._ours:
            self._ours.discard(chunk)
            os.posix_fadvise(self.fd, chunk * CHUNK, CHUNK, os.POSIX_FADV_DONTNEED)

    def _load(self, chunk: int, elsewhere: Elsewhere) -> None:
        fd = os.dup(self.fd)  # ours may be closed meanwhile

        def work() -> None:
            with suppress(OSError):  # whoever reads it finds out
                os.preadv(fd, [_sink], chunk * CHUNK)
            os.close(fd)

        def done() -> None:
            self._loading.discard(chunk)
            self._loaded.add(chunk)
            self._ours.add(chunk)

        self._loading.add(chunk)
        elsewhere(work, done)
