"""How fast WAL is received and made durable: by a relay, and by pg_receivewal.

A primary with some hundred megabytes of pgbench's WAL; each of the receivers fetches all of it,
one after the other, into an empty directory on the same filesystem, and does so in each round.
The primary keeps the WAL in the page cache: what is measured is the receiver, and the disk.

How it thinks: a receiver's time begins when it says that it receives, so that starting a Python
program does not count.  It ends when the primary has been told that all of it is on disk
(`pg_stat_replication.flush_lsn`), looked for every 10 ms.  pg_receivewal without --synchronous
tells that only now and then; its time ends when it does, at the end that it is given, which is
that of a segment: the last file is then synced.  A receiver's processor time, all of its threads',
is counted from and to the same moments.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import Bench, tell
from benchmarks.figures import AT_LEAST, Figure, Goal
from tests.postgres import (
    Cluster,
    ReceiveWal,
    Relay,
    Workspace,
    installations,
    int_to_lsn,
    lsn_to_int,
)

RELAY, SYNCHRONOUS, PLAIN = "relay", "pg_receivewal --synchronous", "pg_receivewal"
RECEIVERS = (RELAY, SYNCHRONOUS, PLAIN)
TOO_LONG = 600.0
"""Seconds for one receiver, or to make the WAL, at most."""
SEGMENT_MB = 16
MEGABYTES = 128
"""Of WAL."""


@dataclass(frozen=True)
class Wal:
    """WAL that a primary keeps: the LSNs where it begins and ends, both with a segment."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Result:
    """How long a receiver took, and how long its processor did: seconds."""

    seconds: float
    cpu: float


def measure(bench: Bench) -> Iterator[Figure]:
    """For the table: WAL as pgbench makes it."""
    primary = bench.primary(installations()[0], synchronous_commit="off").start()
    wal = make_wal(primary, MEGABYTES)
    results = run(bench.space, primary, wal, bench.rounds)
    speeds = {name: [wal.size / 1e6 / one.seconds for one in of] for name, of in results.items()}
    costs = {name: [one.cpu / wal.size * 1e9 for one in of] for name, of in results.items()}
    for other in (SYNCHRONOUS, PLAIN):
        what = f"relay ingest, durable, against {other}"
        yield Figure(what, "MB/s", speeds[RELAY], speeds[other], Goal(AT_LEAST, 1.0))
    yield Figure("  its CPU", "s/GB", costs[RELAY], costs[PLAIN])
    primary.stop()


def make_wal(primary: Cluster, megabytes: int) -> Wal:
    """Have pgbench make so much WAL, or a little more; whole segments."""
    if not primary.sql("SELECT to_regclass('pgbench_accounts')"):
        primary.pgbench("-i", "-s", "10", "-q")
    start = lsn_to_int(primary.switch_wal())
    with primary.client("pgbench", "-n", "-M", "prepared", "-c", "4", "-T", "3600", "postgres"):
        wanted = int_to_lsn(start + megabytes * 1_000_000)
        primary.wait_until(f"pg_current_wal_flush_lsn() >= '{wanted}'", TOO_LONG)
    end = lsn_to_int(primary.switch_wal())
    primary.lsn()  # pg_receivewal wants to see a little more, lest it waits
    return Wal(start, end)


def run(
    space: Workspace,
    primary: Cluster,
    wal: Wal,
    rounds: int,
    receivers: Sequence[str] = RECEIVERS,
) -> dict[str, list[Result]]:
    """Have each of the receivers receive the WAL, in each round in turn; its results, one for each
    round.

    The primary must keep the WAL and have a little more behind it, and nobody else should receive
    from it.  What is received is removed again.
    """
    results: dict[str, list[Result]] = {receiver: [] for receiver in receivers}
    for number in range(rounds):
        for receiver in receivers:
            tell(f"ingest, round {number + 1} of {rounds}: {receiver}")
            directory = space.directory(f"ingest-{number}-{receiver.replace(' ', '')}")
            how = _by_relay if receiver == RELAY else _by_pg_receivewal
            results[receiver].append(how(space, primary, wal, directory, receiver))
            for path in directory.iterdir():
                path.unlink()
    return results


def _by_relay(
    space: Workspace, primary: Cluster, wal: Wal, directory: Path, receiver: str
) -> Result:
    start = int_to_lsn(wal.start)
    with Relay(directory, primary.conninfo, "--upstream-start", start) as relay:
        relay.receiving()
        with _timed(relay.pid) as results:
            _wait_flushed(primary, wal)
        relay.stop()
    return results[0]


def _by_pg_receivewal(
    space: Workspace, primary: Cluster, wal: Wal, directory: Path, receiver: str
) -> Result:
    # It goes on behind the last segment that it finds.  This one takes no room.
    before = space.file(directory / _segment_name(wal.start // (SEGMENT_MB << 20) - 1))
    with before.open("r+b") as file:
        file.truncate(SEGMENT_MB << 20)
    options = ["--no-loop"]
    options += ["--synchronous"] if receiver == SYNCHRONOUS else ["-E", int_to_lsn(wal.end)]
    with ReceiveWal(primary.installation, directory, primary.port, *options) as process:
        process.expect("starting log streaming")
        if receiver == SYNCHRONOUS:
            with _timed(process.pid) as results:
                _wait_flushed(primary, wal)
            process.stop()
            return results[0]
        cpu, others = _cpu(process.pid), _cpu_of_ended()
        begun = time.perf_counter()
        process.wait(TOO_LONG)
        return Result(time.perf_counter() - begun, _cpu_of_ended() - others - cpu)


@contextmanager
def _timed(pid: int) -> Iterator[list[Result]]:
    """What is in the list at the end, is how long it took."""
    results: list[Result] = []
    begun, cpu = time.perf_counter(), _cpu(pid)
    yield results
    results.append(Result(time.perf_counter() - begun, _cpu(pid) - cpu))


def _wait_flushed(primary: Cluster, wal: Wal) -> None:
    flushed = f"FROM pg_stat_replication WHERE flush_lsn >= '{int_to_lsn(wal.end)}'"
    primary.wait_until(f"EXISTS (SELECT {flushed})", TOO_LONG)


def _cpu(pid: int) -> float:
    """Seconds of processor time that a running process has taken."""
    schedstats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in schedstats) / 1e9


def _cpu_of_ended() -> float:
    """Seconds of processor time that all processes took that we have waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _segment_name(number: int) -> str:
    per_file = (1 << 32) // (SEGMENT_MB << 20)
    return f"{1:08X}{number // per_file:08X}{number % per_file:08X}"
