"""Who follows the tail, while others catch up: how late WAL is.

Fifty clients follow a relay, each noting when WAL comes.  Somebody commits on the primary, a row of
7.5 kB at a time, with a few milliseconds between.  The lag of a commit at a client is the time from
when COMMIT was sent to when the client had all the WAL up to the commit's end.  In each round it is
measured with nobody else, and while fifty more clients catch up from fifty places of the relay's
history as fast as they can.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Iterator
from operator import itemgetter

from benchmarks.bench import Bench, lsn_of, make_wal, tell
from benchmarks.client import connect, execute, value
from benchmarks.figures import AT_MOST, Figure, Goal, alternate, quantile
from benchmarks.sink import Sink
from tests.postgres import HOST, Cluster, Relay, installations, lsn_to_int

CLIENTS = 50
COMMITS = 300
"""In each round, each way."""
PAUSES = 0.002, 0.006
"""Seconds between two commits: at least, at most."""
SIZE = 512 << 20
"""Bytes of WAL to catch up with."""

ROW = "INSERT INTO load SELECT convert_to(repeat(md5(random()::text), 240), 'UTF8')"


def measure(bench: Bench) -> Iterator[Figure]:
    primary = bench.primary(installations()[0]).start()
    primary.sql("CREATE TABLE load (x bytea); ALTER TABLE load ALTER x SET STORAGE external")
    start, end = make_wal(primary, SIZE)
    relay = bench.relay(primary, "--upstream-start", lsn_of(start))
    primary.wait_until(f"(SELECT flush_lsn >= '{lsn_of(end)}' FROM pg_stat_replication)", 120)
    places = [lsn_of(start + number * (SIZE // CLIENTS)) for number in range(CLIENTS)]
    pauses = random.Random(6)
    with Sink() as others:

        def alone() -> list[float]:
            return _lags(bench, primary, relay, pauses)

        def crowded() -> list[float]:
            others.connect((HOST, relay.port), CLIENTS)
            others.start(*places)
            others.follow()
            try:
                return _lags(bench, primary, relay, pauses)
            finally:
                others.unfollow()
                others.close()

        busy, quiet = alternate(bench.rounds, crowded, alone)
    for name, q, goal in (("p99", 0.99, Goal(AT_MOST, 2.0)), ("p50", 0.50, None)):
        yield Figure(
            f"{CLIENTS} following while {CLIENTS} catch up: lag {name}, against none",
            "ms",
            [1000 * quantile(lags, q) for lags in busy],
            [1000 * quantile(lags, q) for lags in quiet],
            goal,
        )
    primary.stop()


def _lags(bench: Bench, primary: Cluster, relay: Relay, pauses: random.Random) -> list[float]:
    """The lags of all commits at all clients, in seconds."""
    tell("lag of the tail")
    sink = bench.sink
    sink.connect((HOST, relay.port), CLIENTS)
    sink.start(primary.lsn())
    sink.listen()
    pgconn = connect(f"{primary.conninfo} dbname=postgres")
    commits = []
    for _ in range(COMMITS):
        time.sleep(pauses.uniform(*PAUSES))
        sent = time.monotonic()
        execute(pgconn, ROW)
        commits.append((lsn_to_int(value(execute(pgconn, "SELECT pg_current_wal_lsn()"))), sent))
    pgconn.finish()
    last = primary.lsn()
    primary.wait_until(f"(SELECT flush_lsn >= '{last}' FROM pg_stat_replication)")
    time.sleep(0.5)  # for what is under way to the clients
    lags = []
    for arrivals in sink.arrivals():
        for lsn, sent in commits:
            _, came = arrivals[bisect_left(arrivals, lsn, key=itemgetter(0))]
            lags.append(came - sent)
    sink.close()
    return lags
