"""A thousand clients that have nothing to do, for a minute.

They tell that they are there, each every ten seconds, as standbys do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.bench import Bench, tell
from benchmarks.figures import AT_MOST, Figure, Goal
from benchmarks.processes import CpuTime, memory, with_children
from tests.postgres import HOST, WalSender, installations

CLIENTS = 1000
WINDOWS = 7
WINDOW = 60 / WINDOWS
"""Seconds: the minute in as many parts as there are rounds elsewhere."""


def measure(bench: Bench) -> Iterator[Figure]:
    primary = bench.primary(installations()[0]).start()
    with WalSender(primary.wal_dir, "--max-wal-senders", "1200") as ours:
        ours.ready()
        bench.sink.connect((HOST, ours.port), CLIENTS)
        bench.sink.start(primary.lsn())
        bench.sink.live()
        pids = with_children(ours.pid)
        shares, sizes = [], []
        for number in range(WINDOWS):
            tell(f"{CLIENTS} idle clients: {number * WINDOW:.0f} of 60 s")
            cpu, begun = CpuTime(pids), time.monotonic()
            time.sleep(WINDOW)
            shares.append(100 * cpu.spent() / (time.monotonic() - begun))
            sizes.append(memory(pids) / 1e6)
        bench.sink.unfollow()
        bench.sink.close()
    primary.stop()
    yield Figure(f"{CLIENTS:,} idle clients: of a core", "%", shares, (), Goal(AT_MOST, 1, False))
    yield Figure("  memory, all of it (PSS)", "MB", sizes, (), Goal(AT_MOST, 64, False))
