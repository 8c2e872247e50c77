"""Writes WAL into segments, so that what is synced survives whatever happens.

A segment is written as ``<name>.partial``, as pg_receivewal does, and gets its name when all of it
is on disk.  Its space is allocated beforehand: a disk that is full says so then, and a sync has
little else than the data to write.  File, name and directory are each synced before anything
counts that rests on them.

It all runs in whatever thread calls it, one call at a time.  A write that failed, for want of room
or whatever else, can be repeated with the same data: what was written before is passed over.  A
sync that failed cannot.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from walproto.lsn import history_name, segment_name
from walproto.wal.segments import Stamp, stamp_of

_MAX_BUFFERS = 512
"""Buffers in one system call; IOV_MAX is 1024."""


class SegmentWriter:
    """Writes the WAL of timeline ``tli`` into ``directory``, from ``lsn`` on.

    ``segment_size`` is in bytes.
    """

    def __init__(self, directory: Path, tli: int, segment_size: int, lsn: int) -> None:
        self._directory = directory
        self.tli = tli
        self._segment_size = segment_size
        self._lsn = lsn
        self._fd: int | None = None
        self._partial = directory
        self._directory_fd: int | None = None
        self._is_unnamed = False
        self.completed: list[tuple[int, Stamp]] = []
        """The segments that have got their name: where each ends, and its file's stamp."""

    @property
    def lsn(self) -> int:
        """How far WAL has been written."""
        return self._lsn

    def write(self, lsn: int, buffers: Sequence[memoryview]) -> None:
        """Write what belongs at ``lsn``, which is our position or before it.

        A segment that becomes full is synced and gets its name.  Raises OSError, and can then be
        called again with the same; or SyncError, and can not.
        """
        assert lsn <= self._lsn
        pending = _behind(buffers, self._lsn - lsn)
        if self._is_unnamed:
            self._name()
        while pending:
            room = self._segment_size - self._lsn % self._segment_size
            now, pending = _split(pending, room)
            self._write_into_segment(now)
            if self._lsn % self._segment_size == 0:
                self._complete()

    def sync(self) -> None:
        """Have all that is written on disk when this returns.  Raises SyncError."""
        if self._fd is not None:
            _sync(os.fdatasync, self._fd, self._partial)
            if os.fstat(self._fd).st_nlink == 0:
                raise SyncError(f'file "{self._partial}" was removed')

    def close(self) -> None:
        self._close_segment()
        if self._directory_fd is not None:
            os.close(self._directory_fd)
            self._directory_fd = None

    def _close_segment(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _path(self, suffix: str = "", lsn: int | None = None) -> Path:
        segno = (self._lsn if lsn is None else lsn) // self._segment_size
        return self._directory / (segment_name(self.tli, segno, self._segment_size) + suffix)

    def _write_into_segment(self, buffers: list[memoryview]) -> None:
        if self._fd is None:
            self._fd = self._open()
        while buffers:
            offset = self._lsn % self._segment_size
            written = os.pwritev(self._fd, buffers[:_MAX_BUFFERS], offset)
            self._lsn += written
            buffers = _behind(buffers, written)

    def _open(self) -> int:
        """The segment that our position is in, to be written to; all its space is there."""
        if self._directory_fd is None:
            # Kept, lest there are too many open files just when a name is to be synced.
            self._directory_fd = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        partial, complete = self._path(".partial"), self._path()
        if complete.exists():  # it was not: somebody gave it that name too early
            os.replace(complete, partial)
        is_new = not partial.exists()
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != self._segment_size:
                os.posix_fallocate(fd, 0, self._segment_size)
                _sync(os.fsync, fd, partial)
            _sync(os.fsync, self._directory_fd, self._directory)
        except BaseException:
            os.close(fd)
            if is_new:
                with suppress(OSError):
                    partial.unlink()
            raise
        self._partial = partial
        return fd

    def _complete(self) -> None:
        """The segment before our position is full."""
        assert self._fd is not None
        partial = self._path(".partial", self._lsn - 1)
        _sync(os.fdatasync, self._fd, partial)
        try:
            self._close_segment()
        except OSError as error:
            raise SyncError(f'could not close file "{partial}": {error.strerror}') from error
        self._is_unnamed = True
        self._name()

    def _name(self) -> None:
        """Give the segment before our position its name."""
        assert self._directory_fd is not None
        partial, complete = self._path(".partial", self._lsn - 1), self._path("", self._lsn - 1)
        try:
            os.rename(partial, complete)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise SyncError(f'could not rename file "{partial}": {error.strerror}') from error
        self._is_unnamed = False
        _sync(os.fsync, self._directory_fd, self._directory)
        self.completed.append((self._lsn, stamp_of(os.stat(complete))))


class SyncError(Exception):
    """The disk did not take what it was given, and nobody knows what of it is lost."""


def store_history(directory: Path, tli: int, contents: bytes) -> None:
    """Write a timeline's history file, as :func:`store_file` does."""
    store_file(directory / history_name(tli), contents)


def store_file(path: Path, contents: bytes) -> None:
    """Write a file, or a new one in its place; all of it is on disk when this returns, and never
    a part.  Raises OSError or SyncError."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(contents)
        _sync(os.fsync, fd, temporary)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Have what is in a file on disk when this returns.  Raises OSError or SyncError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync(os.fsync, fd, path)
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk when this returns.  Raises OSError or SyncError."""
    sync_file(directory)


def _sync(how: Callable[[int], None], fd: int, path: Path) -> None:
    try:
        how(fd)
    except OSError as error:
        raise SyncError(f'could not fsync file "{path}": {error.strerror}') from error


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left behind the first ``count`` bytes."""
    left = []
    for buffer in buffers:
        if count < len(buffer):
            left.append(buffer[count:] if count > 0 else buffer)
        count -= len(buffer)
    return left


def _split(buffers: Sequence[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes, and what is left behind them."""
    first: list[memoryview] = []
    for position, buffer in enumerate(buffers):
        if len(buffer) > count:
            head = [buffer[:count]] if count else []
            return first + head, [buffer[count:], *buffers[position + 1 :]]
        first.append(buffer)
        count -= len(buffer)
    return first, []
