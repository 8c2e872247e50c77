"""A disk that can be watched, and that balks when a test wants it to.

What is written to it in these tests is DATA, from some LSN on.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wal_builder import MB

DATA = random.Random(5).randbytes(4 * MB)
SECOND, THIRD = "000000010000000000000002", "000000010000000000000003"
"""The segments that begin at 2 and 3 MB."""


class Disk:
    """Notes what is asked of the operating system within ``directory``, and lets it fail.

    It is an error to write to a file whose name may be lost, or to rename one whose contents
    may be.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = str(directory)
        self.calls: list[str] = []
        """What is done to which file, in order; "." is the directory."""
        self.failing: dict[str, int] = {}
        """How calls that fail begin, and with which error number they do."""
        self.room: int | None = None
        """How many bytes can still be written; None for as many as there are."""
        self.longest: Iterator[int] = itertools.repeat(1 << 30)
        """How many bytes each write takes at most."""
        self.written = 0
        self.unsynced: set[str] = set()
        """What a crash might take back: contents of files by their path, and names as ./path."""
        for name in (
            "open",
            "posix_fallocate",
            "pwritev",
            "fsync",
            "fdatasync",
            "rename",
            "replace",
            "unlink",
        ):
            monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: int | str | Path, *arguments: Any) -> Any:
            path = self._path(what)
            if path is None:
                return real(what, *arguments)
            done = f"{name} {path}"
            self.calls.append(done)
            for failing, number in self.failing.items():
                if done.startswith(failing):
                    raise OSError(number, os.strerror(number))
            if self.room == 0 and name == "posix_fallocate":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._note(name, path, *arguments)
            if name == "pwritev":
                return self._write(real, what, *arguments)
            return real(what, *arguments)

        return call

    def _path(self, what: int | str | Path) -> str | None:
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        inside = path == self._directory or path.startswith(f"{self._directory}/")
        return os.path.relpath(path, self._directory) if inside else None

    def _note(self, name: str, path: str, *arguments: Any) -> None:
        match name:
            case "open" if path != "." and not os.path.exists(f"{self._directory}/{path}"):
                self.unsynced |= {path, f"./{path}"}
            case "rename" | "replace":
                assert path not in self.unsynced, f"{path} is renamed and may be empty"
                self.unsynced.add(f"./{self._path(arguments[0])}")
            case "unlink":
                self.unsynced -= {path, f"./{path}"}
            case "pwritev":
                assert f"./{path}" not in self.unsynced, f"{path} is written to and may be lost"
                self.unsynced.add(path)
            case "fsync" if path == ".":
                self.unsynced = {one for one in self.unsynced if not one.startswith("./")}
            case "fsync" | "fdatasync":
                self.unsynced.discard(path)

    def _write(
        self, real: Callable[..., int], fd: Any, buffers: list[memoryview], offset: int
    ) -> int:
        size = min(sum(map(len, buffers)), next(self.longest))
        if self.room is not None:
            size = min(size, self.room)
            self.room -= size
            if size == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if size < sum(map(len, buffers)):
            buffers = [memoryview(b"".join(buffers))[:size]]
        written = real(fd, buffers, offset)
        assert written == size
        self.written += written
        return written


def pieces(data: bytes, *sizes: int) -> list[memoryview]:
    """``data`` in pieces of these sizes, over and over."""
    left = memoryview(data)
    result: list[memoryview] = []
    for size in itertools.cycle(sizes):
        if not left:
            return result
        result.append(left[:size])
        left = left[size:]
    raise AssertionError("there are no sizes")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected_files(start: int, end: int, tli: int = 1) -> dict[str, bytes]:
    """The files when DATA from ``start`` on was written up to ``end``, and nothing before."""
    result = {}
    data = bytes(start % MB) + DATA[: end - start]
    for offset in range(0, len(data), MB):
        segment = data[offset : offset + MB]
        name = f"{tli:08X}{0:08X}{(start - start % MB + offset) // MB:08X}"
        result[name if len(segment) == MB else f"{name}.partial"] = segment.ljust(MB, b"\0")
    return result
