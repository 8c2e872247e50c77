"""Tells a directory from another one that is later given its name.

The number of a directory that was removed is often given to the next one that is made; so the time
at which it was made counts, too, wherever it is to be had.

Linux: ``statx(2)``.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

DirectoryId = tuple[int, int, int]
"""Device, inode, and time of birth in nanoseconds; 0 if that is not to be had."""

_AT_FDCWD = -100
_STATX_BTIME = 0x800
_STATX = struct.Struct("=I76xqI164x")  # stx_mask, and stx_btime in seconds and nanoseconds

_statx = getattr(ctypes.CDLL(None), "statx", None) if sys.platform == "linux" else None


def directory_id(path: Path) -> DirectoryId:
    """Which directory it is that is at ``path`` now.  Raises OSError if that cannot be told."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, _born(path)


def _born(path: Path) -> int:
    if _statx is None:
        return 0
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, buffer) != 0:
        return 0
    mask, seconds, nanoseconds = _STATX.unpack(buffer.raw)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else 0
