"""Many clients that are caught up, while WAL is made at a steady rate.

In each round they follow the primary itself, each with a walsender of its own there; then ours that
reads the primary's pg_wal, as those do; and then our relay, a single client of the primary, which
also makes durable what it receives.  What is counted as the cost of PostgreSQL are its walsenders;
as ours, its process, and with the relay also the one walsender that feeds it.

Two kinds of load, by pgbench at a fixed rate: rows of 7.5 kB, each a commit; and pgbench's own
transactions, a few hundred bytes of WAL each, with what the clients cost their users: the latency,
and then the rate if there is no limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import Bench, tell
from benchmarks.figures import AT_MOST, Figure, Goal, alternate
from benchmarks.processes import CpuTime, memory, walsenders, with_children
from tests.postgres import HOST, Cluster, Relay, WalSender, installations

SECONDS = 3
"""How long a load goes on."""
ROWS = 500
"""Rows of 7.5 kB that are inserted in a second: 4 MB of WAL."""
TRANSACTIONS = 1000
"""Transactions of pgbench that are asked for in a second."""

INSERT = b"INSERT INTO load SELECT convert_to(repeat(md5(random()::text), 240), 'UTF8');\n"


@dataclass(frozen=True)
class Follow:
    """What came of a load while so many clients followed."""

    sent: float  # GB to all clients together
    cpu: float  # seconds
    wal_rate: float  # MB/s, as the slowest client received it
    memory: float  # bytes a client, of theirs
    latency: float  # milliseconds
    rate: float  # transactions per second

    @property
    def cost(self) -> float:
        """CPU seconds per GB sent."""
        return self.cpu / self.sent


class Side:
    """What clients can follow: the primary itself, or one of ours."""

    def __init__(self, bench: Bench, primary: Cluster, ours: WalSender | None = None) -> None:
        self._bench, self._primary, self._ours = bench, primary, ours

    def follow(self, clients: int, *load: str | Path) -> Follow:
        """Have clients follow while pgbench makes this load."""
        primary, ours, sink = self._primary, self._ours, self._bench.sink
        tell(f"{clients} clients follow {'ours' if ours else 'the primary'}")
        fed = set(walsenders(primary.pid))
        sink.connect((HOST, primary.port if ours is None else ours.port), clients)
        sink.start(primary.lsn())
        if ours is None:
            pids = [pid for pid in walsenders(primary.pid) if pid not in fed]
        else:
            pids = [*with_children(ours.pid), *(fed if isinstance(ours, Relay) else [])]
        sink.follow()
        cpu, begun = CpuTime(pids), time.perf_counter()
        told = primary.pgbench("-n", *map(str, load))
        spent, seconds = cpu.spent(), time.perf_counter() - begun
        used = memory(pids)
        received, least = sink.unfollow()
        sink.close()
        primary.wait_until("(SELECT count(*) FROM pg_stat_replication) <= 1")
        assert least > 0, "a client did not follow"
        latency = re.search(r"latency average = ([\d.]+) ms", told)
        rate = re.search(r"tps = ([\d.]+)", told)
        assert latency, told
        assert rate, told
        return Follow(
            sent=received / 1e9,
            cpu=spent,
            wal_rate=least / 1e6 / seconds,
            memory=used / clients,
            latency=float(latency[1]),
            rate=float(rate[1]),
        )


def measure(bench: Bench) -> Iterator[Figure]:
    primary = bench.primary(installations()[0]).start()
    primary.pgbench("-i", "-s", "10", "-q")
    primary.sql("CREATE TABLE load (x bytea); ALTER TABLE load ALTER x SET STORAGE external")
    script = bench.file("insert.sql", INSERT)
    many = ("--max-wal-senders", "1200", "--wal-sender-timeout", "0")
    reader = bench.space.add(WalSender(primary.wal_dir, *many))
    reader.ready()
    theirs, ours = Side(bench, primary), Side(bench, primary, reader)
    steady = ("-c", "2", "-R", str(ROWS), "-T", str(SECONDS), "-f", script)
    hundred, their_hundred, thousand = alternate(
        bench.rounds,
        lambda: ours.follow(100, *steady),
        lambda: theirs.follow(100, *steady),
        lambda: ours.follow(1000, *steady),
    )
    yield Figure(
        "100 caught-up clients, 4 MB/s of WAL: CPU",
        "s/GB",
        *_each(hundred, their_hundred, "cost"),
        goal=Goal(AT_MOST, 0.2),
    )
    sizes = [_memory_per_client(bench, primary, script) / 1e3 for _ in range(bench.rounds)]
    their_sizes = [one.memory / 1e3 for one in their_hundred]
    yield Figure("  memory per client (PSS)", "kB", sizes, their_sizes, Goal(AT_MOST, 0.05))
    yield Figure("  WAL received by each", "MB/s", *_each(hundred, their_hundred, "wal_rate"))
    yield Figure(
        "1,000 of them, against our 100: CPU",
        "s/GB",
        *_each(thousand, hundred, "cost"),
        goal=Goal(AT_MOST, 1.0),
    )
    yield Figure("  WAL received by each", "MB/s", *_each(thousand, hundred, "wal_rate"))
    yield Figure(
        "  the same, against PostgreSQL's 1,000 (once)",
        "MB/s",
        *_each(thousand[:1], [theirs.follow(1000, *steady)], "wal_rate"),
    )
    reader.stop()
    yield from _measure_relay(bench, primary, theirs)
    primary.stop()


def _memory_per_client(bench: Bench, primary: Cluster, script: Path) -> float:
    """What a hundred clients add to a process that has had none before, in bytes for each."""
    tell("memory of 100 clients")
    with WalSender(primary.wal_dir, "--max-wal-senders", "1200") as fresh:
        fresh.ready()
        alone = memory(with_children(fresh.pid))
        bench.sink.connect((HOST, fresh.port), 100)
        bench.sink.start(primary.lsn())
        bench.sink.follow()
        primary.pgbench("-n", "-c", "2", "-R", str(ROWS), "-T", "1", "-f", str(script))
        used = memory(with_children(fresh.pid)) - alone
        bench.sink.unfollow()
        bench.sink.close()
    return used / 100


def _measure_relay(bench: Bench, primary: Cluster, theirs: Side) -> Iterator[Figure]:
    """What is left to the primary when its clients are behind a relay."""
    relay = bench.relay(primary)
    ours = Side(bench, primary, relay)
    limited = ("-c", "4", "-R", str(TRANSACTIONS), "-T", str(SECONDS))
    free = ("-c", "4", "-T", str(SECONDS))
    small, their_small, most, their_most = alternate(
        bench.rounds,
        lambda: ours.follow(100, *limited),
        lambda: theirs.follow(100, *limited),
        lambda: ours.follow(100, *free),
        lambda: theirs.follow(100, *free),
    )
    what = f"100 clients behind a relay, pgbench at {TRANSACTIONS:,} tps"
    yield Figure(f"{what}: CPU", "s/GB", *_each(small, their_small, "cost"))
    yield Figure("  latency of a transaction", "ms", *_each(small, their_small, "latency"))
    yield Figure("  transactions without a limit", "tps", *_each(most, their_most, "rate"))
    relay.stop()


def _each(
    ours: Sequence[Follow], theirs: Sequence[Follow], name: str, unit: float = 1
) -> tuple[list[float], list[float]]:
    """A figure of ours, and of theirs."""
    return (
        [getattr(one, name) / unit for one in ours],
        [getattr(one, name) / unit for one in theirs],
    )
