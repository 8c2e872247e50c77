"""The files in a directory of WAL: which there are, and what they hold.

A segment is looked for under its name and under ``<name>.partial``, which is what pg_receivewal
calls a file it is still writing.  Files are opened when first read and kept open, a few of them,
for all who read.

A primary recycles: it renames a segment it no longer needs to a future name and writes over it.
Whoever has it open then reads other WAL than it asked for.  So behind every read the name is
looked up once more, and what was read counts only if the name still stands for that very file
(cf. ``CheckXLogRemoved``).  It costs a microsecond.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from walproto.errors import DataCorrupted, IoError, ReportedError, UndefinedFile
from walproto.lsn import format_lsn, history_name, segment_name
from walproto.wal.cold import CHUNK, ColdFile, Elsewhere
from walproto.wal.pages import LONG_HEADER, Identity, parse_identity

Stamp = tuple[int, int, int, int]
"""Device, inode, size in bytes, and time of the last change (ctime, which nobody can set back) in
nanoseconds."""


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


_MAX_OPEN = 64
"""How many segments are kept open, unless it is said otherwise."""


def open_file(path: Path | str) -> int:
    """A file descriptor to read a regular file by; OSError for anything else of that name, which
    might keep us waiting."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return fd


class _OpenSegment:
    """An open file and the name under which it was found."""

    __slots__ = ("_identity", "file", "is_checked", "path")

    def __init__(self, path: str, elsewhere: Elsewhere | None) -> None:
        self.path = path
        self.is_checked = False
        self.file = ColdFile(open_file(path), elsewhere)
        status = os.fstat(self.file.fd)
        self._identity = (status.st_dev, status.st_ino)

    def status(self) -> os.stat_result | None:
        """The file's status; None if the name no longer stands for it, or a complete one has come
        to stand beside a ``.partial``."""
        complete = self.path.removesuffix(".partial")
        if complete != self.path and os.path.exists(complete):
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status if (status.st_dev, status.st_ino) == self._identity else None

    def close(self) -> None:
        os.close(self.file.fd)


class OpenFiles:
    """Bounds how many segments are kept open, by all :class:`Segments` that share it: to ``limit``,
    for which those that were not used for longest are closed."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = _MAX_OPEN if limit is None else limit
        self._used: OrderedDict[_OpenSegment, Callable[[], None]] = OrderedDict()

    def use(self, segment: _OpenSegment, close: Callable[[], None]) -> None:
        """The segment is being used; ``close()`` closes it when it no longer is."""
        self._used[segment] = close
        self._used.move_to_end(segment)
        if len(self._used) > self._limit:
            self._used.popitem(last=False)[1]()

    def forget(self, segment: _OpenSegment) -> None:
        """The segment is closed."""
        self._used.pop(segment, None)


def read_history(directory: Path, tli: int) -> bytes:
    """The contents of the timeline's history file; UndefinedFile if there is none."""
    name = history_name(tli)
    path = directory / name
    try:
        with open(open_file(path), "rb") as file:
            return file.read()
    except OSError as error:
        log = f"{path}: {error.strerror}"
        if error.errno == errno.ENOENT and tli > 1:
            log += ": copy it there from the server's pg_wal"
        raise UndefinedFile(
            f'could not open file "pg_wal/{name}": {error.strerror}', log=log
        ) from None


class Segments:
    """Reads the segments of one cluster, whose ``identity`` their first pages must show.

    ``files`` is shared with others, if it is given.  ``elsewhere`` has done what waits for a disk,
    if it is given; whoever gives it has those try again that were raised NotInMemory.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        files: OpenFiles | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.directory = directory
        self._identity = identity
        self._files = files or OpenFiles()
        self._elsewhere = elsewhere
        self._open: dict[tuple[int, int], _OpenSegment] = {}

    def name(self, tli: int, lsn: int) -> str:
        """The name of the segment of ``tli`` that holds ``lsn``."""
        size = self._identity.segment_size
        return segment_name(tli, lsn // size, size)

    def read(self, tli: int, lsn: int, size: int) -> bytes:
        """At most ``size`` bytes from ``lsn``, as far as its segment goes; b"" if there is none.

        For looking, not for sending: what is there is not checked, and no error is raised, except
        for NotInMemory if it is not there yet.
        """
        size = min(size, self._identity.segment_size - lsn % self._identity.segment_size)
        buffer = bytearray(size)
        try:
            count = self._read(tli, lsn, buffer)
        except ReportedError:
            return b""
        return bytes(memoryview(buffer)[:count])

    def read_into(self, tli: int, lsn: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the WAL from ``lsn``, which must lie in one segment.

        Raises UndefinedFile if the segment is not there, or no longer; DataCorrupted if the file
        is too short or another cluster's; IoError if it cannot be read (``WALReadRaiseError``);
        NotInMemory if it is not there yet.
        """
        count = self._read(tli, lsn, buffer)
        if count < len(buffer):
            offset = lsn % self._identity.segment_size
            raise DataCorrupted(
                f"could not read from WAL segment {self.name(tli, lsn)}, offset {offset}: "
                f"read {count} of {len(buffer)}",
                log=f"{self._place(tli, lsn)}: truncated: put back a whole copy",
            )

    def give_back(self, tli: int, lsn: int) -> None:
        """Nobody needs the chunk of a segment that ``lsn`` is in: if it was not in memory before we
        had it read, it need not be."""
        segno, offset = divmod(lsn, self._identity.segment_size)
        segment = self._open.get((tli, segno))
        if segment is not None:
            segment.file.give_back(offset // CHUNK)

    def stamp(self, tli: int, lsn: int) -> Stamp | None:
        """What changes when the segment's file is written to or another takes its place; None if
        there is no such file.  Raises NotInMemory if its first page is not there yet."""
        for _ in range(2):
            try:
                status = self._segment(tli, lsn).status()
            except ReportedError:
                return None
            if status is not None:
                return stamp_of(status)
            self._forget(tli, lsn // self._identity.segment_size)
        return None

    def read_history(self, tli: int) -> bytes:
        """The contents of the timeline's history file; UndefinedFile if there is none."""
        return read_history(self.directory, tli)

    def forget_before(self, lsn: int) -> None:
        """Close the files of segments that end at or before ``lsn``, for they were removed: as
        long as they are open, they take their room."""
        for key in [key for key in self._open if (key[1] + 1) * self._identity.segment_size <= lsn]:
            self._forget(*key)

    def close_removed(self) -> None:
        """Close the files that were removed, or replaced, since they were opened."""
        for key in [key for key, segment in self._open.items() if segment.status() is None]:
            self._forget(*key)

    def close(self) -> None:
        for key in list(self._open):
            self._forget(*key)

    def _read(self, tli: int, lsn: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` as far as the segment's file goes; how many bytes that are."""
        segno, offset = divmod(lsn, self._identity.segment_size)
        while True:
            segment = self._segment(tli, lsn)
            try:
                count = segment.file.read_into(buffer, offset)
            except OSError as error:
                raise IoError(
                    f"could not read from WAL segment {self.name(tli, lsn)}, offset {offset}: "
                    f"{error.strerror}",
                    log=f"{self._place(tli, lsn)}: {error.strerror}",
                ) from None
            if segment.status() is not None:
                return count
            self._forget(tli, segno)

    def _segment(self, tli: int, lsn: int) -> _OpenSegment:
        key = (tli, lsn // self._identity.segment_size)
        segment = self._open.get(key)
        if segment is None:
            segment = self._open[key] = self._open_segment(tli, lsn)
        self._files.use(segment, partial(self._forget, *key))
        if not segment.is_checked:
            try:
                self._check(segment, tli, lsn)
            except ReportedError:
                self._forget(*key)
                raise
            segment.is_checked = True
        return segment

    def _forget(self, tli: int, segno: int) -> None:
        segment = self._open.pop((tli, segno))
        self._files.forget(segment)
        segment.close()

    def _open_segment(self, tli: int, lsn: int) -> _OpenSegment:
        name = self.name(tli, lsn)
        complete, partial = self.directory / name, self.directory / f"{name}.partial"
        # The last one for a segment that has got its name just between the first two.
        for path in (complete, partial, complete):
            try:
                return _OpenSegment(str(path), self._elsewhere)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise IoError(
                    f'could not open file "pg_wal/{path.name}": {error.strerror}',
                    log=f"{self._place(tli, lsn)}: {error.strerror}",
                ) from None
        raise UndefinedFile(
            f"requested WAL segment {name} has already been removed",
            log=f"{self._place(tli, lsn)}: not there: restore it, or clone the client anew",
        )

    def _check(self, segment: _OpenSegment, tli: int, lsn: int) -> None:
        """That the file is the cluster's; what is not WAL at all, the scan finds out."""
        header = bytearray(LONG_HEADER.size)
        try:
            count = segment.file.read_into(header, 0)
        except OSError as error:
            raise IoError(
                f"could not read from WAL segment {self.name(tli, lsn)}, offset 0: "
                f"{error.strerror}",
                log=f"{self._place(tli, lsn)}: {error.strerror}",
            ) from None
        found = parse_identity(bytes(header[:count]))
        if found is None:
            return
        identity, _, _ = found
        if identity.system_identifier != self._identity.system_identifier:
            raise DataCorrupted(
                "WAL file is from different database system: WAL file database system identifier "
                f"is {identity.system_identifier}, expected {self._identity.system_identifier}",
                log=f"{self._place(tli, lsn)}: it belongs to another cluster: take it away",
            )

    def _place(self, tli: int, lsn: int) -> str:
        """Which file, and where in the WAL, for the log."""
        return f"{self.directory / self.name(tli, lsn)}, LSN {format_lsn(lsn)}"
