"""A fence: WAL of ours that the upstream's history does not know is served to nobody.

It outlives the process, as a file in the directory, for after a restart the upstream may be out of
reach, and the WAL behind the fence is still wrong.
"""

from __future__ import annotations

from pathlib import Path

from walproto.lsn import format_lsn, parse_lsn
from walproto.wal.writer import store_file, sync_directory

NAME = "walproto.fence"


class Fence:
    """The fence in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME

    def read(self) -> int | None:
        """The LSN up to which WAL is served; None if there is no fence.

        Raises OSError, and ValueError if the file does not say where.
        """
        try:
            return parse_lsn(self._path.read_text().split("\n")[0])
        except FileNotFoundError:
            return None

    def put_up(self, lsn: int, why: str) -> None:
        """Have it at ``lsn``; it is on disk when this returns.  Raises OSError or SyncError."""
        store_file(self._path, f"{format_lsn(lsn)}\n{why}\n".encode())

    def take_down(self) -> None:
        """Have none.  Raises OSError or SyncError."""
        self._path.unlink(missing_ok=True)
        sync_directory(self._path.parent)
