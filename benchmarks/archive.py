"""How soon a server with a large archive sends its first byte, and how much memory it has by then.

The archive is made up: its first segments and its last one hold records, the others that are new
have a right first page, and all the rest are as long as segments are, but sparse, and empty: they
count by their names, and nobody reads them.  A client asks for the very first segment, and the
clock runs from the start of the process until the first XLogData has come: Python and its modules
are loaded, the directory is listed, the last segment walked over to the end of WAL, and the first
one proven as far as it is sent.  (Most of the names are links to a few files: that is made faster.)
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import Bench, tell
from benchmarks.client import connect, execute
from benchmarks.figures import AT_MOST, Figure, Goal
from tests.postgres import HOST, PROJECT, Process, free_port
from tests.wal_builder import PAGE, SYSTEM, WalBuilder, page_header
from walproto.lsn import format_lsn

COUNT = 100_000
SEGMENT_SIZE = 16 << 20
"""Bytes of a segment."""
RECORD_SIZE = 500
FIRST, NEWEST = 2, 64
"""How many segments have records at the beginning, and right first pages at the end."""
LINKS = 10_000
"""Names of a file: filesystems have a limit, some 65,000."""
TOO_LONG = 60.0
"""Seconds after which no byte is expected any longer."""


@dataclass(frozen=True)
class Start:
    """What a start took."""

    seconds: float  # from the start of the process to the first XLogData at the client
    rss: int  # bytes, then
    pss: int  # bytes, then: shared pages count in part


def measure(bench: Bench) -> Iterator[Figure]:
    """For the table."""
    directory = bench.space.directory("archive")
    tell(f"an archive of {COUNT:,} segments")
    first_lsn, _ = make_archive(directory, COUNT)
    starts = [start_once(directory, first_lsn) for _ in range(bench.rounds)]
    what = f"start on an archive of {COUNT:,} segments: to the first byte"
    yield Figure(what, "s", [one.seconds for one in starts], (), Goal(AT_MOST, 2.0, False))
    sizes = [one.rss / 1e6 for one in starts]
    yield Figure("  memory then (RSS)", "MB", sizes, (), Goal(AT_MOST, 100, False))


def make_archive(directory: Path, count: int) -> tuple[int, int]:
    """Make an archive of `count` segments in a directory that is there, and empty; the LSNs at
    which its WAL begins and ends."""
    first = SEGMENT_SIZE
    last = first + (count - 1) * SEGMENT_SIZE
    for number in range(FIRST, count - 1):
        lsn = first + number * SEGMENT_SIZE
        path = os.path.join(directory, _name(lsn))
        is_new = number >= count - NEWEST
        if is_new or number % LINKS == FIRST:
            page = page_header(lsn, major=18, tli=1, size=SEGMENT_SIZE, system=SYSTEM)
            linked = _make_sparse(path, page if is_new else b"")
        else:
            os.link(linked, path)
    oldest = WalBuilder(size=SEGMENT_SIZE, start=first)
    oldest.records_to(first + FIRST * SEGMENT_SIZE - PAGE, RECORD_SIZE)
    oldest.write_to(directory)
    newest = WalBuilder(size=SEGMENT_SIZE, start=last)
    newest.records_to(last + SEGMENT_SIZE * 3 // 4, RECORD_SIZE)
    newest.write_to(directory)
    return first, newest.lsn


def _make_sparse(path: str, contents: bytes) -> str:
    with open(path, "wb") as file:
        file.write(contents)
        file.truncate(SEGMENT_SIZE)
    return path


def start_once(
    directory: Path,
    first_lsn: int,
    server: Sequence[str] = (sys.executable, "-m", "twisted", "--log-format=text", "walsender"),
) -> Start:
    """Start a server on the archive, and ask it for its first segment."""
    port = free_port()
    begun = time.perf_counter()
    process = Process(
        [*server, "--wal-dir", directory, "--listen", f"tcp:{port}:interface={HOST}"], cwd=PROJECT
    )
    try:
        while True:
            try:
                pgconn = connect(f"host={HOST} port={port} user=bench replication=true")
                break
            except RuntimeError:  # it does not listen yet, or does not know yet what there is
                if time.perf_counter() > begun + TOO_LONG:
                    raise
                time.sleep(0.002)
        execute(pgconn, f"START_REPLICATION PHYSICAL {format_lsn(first_lsn)}")
        while bytes(pgconn.get_copy_data(0)[1])[:1] != b"w":
            pass
        seconds = time.perf_counter() - begun
        memory = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        pgconn.finish()
    finally:
        process.kill()
    return Start(seconds, _bytes(memory, "Rss"), _bytes(memory, "Pss"))


def _bytes(memory: str, what: str) -> int:
    found = re.search(rf"^{what}: *(\d+) kB", memory, re.MULTILINE)
    assert found, memory
    return int(found[1]) * 1024


def _name(lsn: int) -> str:
    segno, per_id = lsn // SEGMENT_SIZE, 0x1_0000_0000 // SEGMENT_SIZE
    return f"{1:08X}{segno // per_id:08X}{segno % per_id:08X}"
