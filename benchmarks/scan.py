"""The walk over records that finds the end of WAL, and proves older segments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import SEGMENT, Bench
from benchmarks.figures import Figure
from tests.postgres import installations, int_to_lsn, lsn_to_int
from walproto.timeline.history import History
from walproto.wal.pages import LONG_HEADER, parse_identity
from walproto.wal.scan import Scanner

SMALL = "SELECT pg_logical_emit_message(false, '', repeat('x', 20)) FROM generate_series(1, 300000)"
"""Records of some 80 bytes."""


def measure(bench: Bench) -> Iterator[Figure]:
    primary = bench.primary(installations()[0], fsync="off").start()
    start = lsn_to_int(primary.switch_wal())
    primary.sql(SMALL)
    primary.switch_wal()
    small = primary.wal_dir / _name(start)
    primary.pgbench("-i", "-s", "2", "-q")
    primary.pgbench("-n", "-c", "4", "-t", "3000")  # after it there are few full-page images
    start = lsn_to_int(primary.switch_wal())
    while lsn_to_int(primary.lsn()) < start + SEGMENT:
        primary.pgbench("-n", "-c", "4", "-t", "3000")
    mixed = primary.wal_dir / _name(start)
    primary.stop()
    for what, path in (("records of 80 bytes", small), ("pgbench", mixed)):
        speeds = [_speed(path) for _ in range(bench.rounds)]
        yield Figure(f"end-of-WAL scan of a 16 MB segment, {what}", "MB/s", speeds)


def _name(lsn: int) -> str:
    return f"00000001{lsn >> 32:08X}{(lsn & 0xFFFFFFFF) // SEGMENT:08X}"


def _speed(path: Path) -> float:
    """MB/s over the records of a segment."""
    data = path.read_bytes()
    found = parse_identity(data[: LONG_HEADER.size])
    assert found is not None
    identity, tli, start = found

    def read(lsn: int, size: int) -> bytes:
        return data[lsn - start : lsn - start + size]

    scanner = Scanner(identity, History(tli), start, read)
    begun = time.process_time()
    while scanner.advance(1 << 20):
        pass
    seconds = time.process_time() - begun
    size = scanner.position - start
    assert size > SEGMENT * 0.9, f"{int_to_lsn(scanner.position)}: {scanner.reason}"
    return size / 1e6 / seconds
