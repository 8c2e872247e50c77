"""A directory of one's own: two that receive into the same one would spoil it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class DirectoryLock:
    """Holds ``directory`` for this process, as long as it lives and until :meth:`release`.

    The lock is on the directory itself; nothing is left behind in it.  Raises ValueError, saying
    why, if WAL must not be received into it.
    """

    def __init__(self, directory: Path) -> None:
        if (directory / "archive_status").exists():
            raise ValueError(
                f"{directory} is the pg_wal of a PostgreSQL server, which writes to it itself "
                "(there is archive_status in it)"
            )
        try:
            self._fd: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{directory}: {error.strerror}") from None
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            os.close(self._fd)
            raise ValueError(f"no permission to write to {directory}")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ValueError(f"another walsender receives into {directory} already") from None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
