"""`twist`, which notes how long each sync of a relay takes.

    python -m benchmarks.timed_relay FILE walsender --upstream CONNINFO ...

When it ends it writes to FILE, for each call of `SegmentWriter.sync`, which is one fdatasync:
up to which LSN the WAL is on disk by it, and when it began and ended by `time.perf_counter`, a
clock that all processes of a machine share.  The method is wrapped in the process itself: that
costs less than a microsecond, while a tracer would slow down what it measures.
"""

from __future__ import annotations

import runpy
import sys
import time
from array import array
from pathlib import Path

from twisted.internet import reactor

from walproto.wal.writer import SegmentWriter


def main() -> None:
    path = Path(sys.argv.pop(1))
    timings = array("d")
    sync = SegmentWriter.sync

    def timed(self: SegmentWriter) -> None:
        begun = time.perf_counter()
        sync(self)
        timings.extend((self.lsn, begun, time.perf_counter()))

    SegmentWriter.sync = timed  # type: ignore[method-assign]
    reactor.addSystemEventTrigger("after", "shutdown", lambda: path.write_bytes(timings.tobytes()))
    runpy.run_module("twisted", run_name="__main__", alter_sys=True)


def read_timings(path: Path) -> list[tuple[int, float, float]]:
    """What it has written: for each sync an LSN, its beginning and its end."""
    timings = array("d", path.read_bytes())
    columns = zip(timings[::3], timings[1::3], timings[2::3], strict=True)
    return [(int(lsn), begun, done) for lsn, begun, done in columns]


if __name__ == "__main__":
    main()
