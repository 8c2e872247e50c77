"""The files that an operator names, read without trusting what stands in their place.

They are read while clients are served: something that keeps its reader waiting (a pipe to which
nobody writes), or that never ends (a device), would stop the server, or eat up the memory.
"""

from __future__ import annotations

import errno
import os
import stat

PathLike = str | os.PathLike[str]


class NotRegularError(OSError):
    """It is a directory, a pipe, a socket or a device."""


def read_file(path: PathLike, limit: int) -> tuple[bytes, os.stat_result]:
    """What a regular file contains, and its status; no other is read.

    ``limit`` is in bytes, a longer file is an error.  Raises OSError with a ``strerror`` for the
    operator; NotRegularError if there is something else of that name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise _not_regular() from None
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular()
        contents = bytearray()
        while chunk := os.read(descriptor, limit + 1 - len(contents)):
            contents += chunk
    finally:
        os.close(descriptor)
    if len(contents) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return bytes(contents), status


def _not_regular() -> NotRegularError:
    return NotRegularError(errno.EINVAL, "it is not a regular file")
