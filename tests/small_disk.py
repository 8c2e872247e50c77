"""A disk that is really full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size="$1" none "$0" && echo mounted && exec cat'


class SmallDisk:
    """A file system of its own at ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    @property
    def room(self) -> int:
        """How many bytes can still be written."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def fill(self) -> None:
        with open(self._ballast, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, self._ballast.stat().st_size + self.room)
        assert self.room == 0

    def make_room(self) -> None:
        self._ballast.unlink()


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[SmallDisk]:
    """A disk of that size, such as ``1m``, at ``place``; nobody else sees it there."""
    with subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", MOUNT, str(place), size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            if process.stdout.readline() != "mounted\n":
                pytest.skip(f"no file system can be mounted here: {process.stderr.read().strip()}")
            yield SmallDisk(Path(f"/proc/{process.pid}/root{place}"))
        finally:
            process.stdin.close()
