"""Where a relay begins and goes on: what it may find on the server, in its slot, in its directory.

Whatever it finds that it cannot receive from, it says so once, serves what it has, and goes on by
itself as soon as it can.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.postgres import (
    Cluster,
    Installation,
    ReceiveWal,
    Relay,
    Workspace,
    installations,
    is_segment,
    lsn_to_int,
    same_wal_to,
    workspace,
)

SEGMENT = 2**20
CONFIRMED = "(SELECT restart_lsn >= '{}' FROM pg_replication_slots WHERE slot_name = '{}')"


@dataclass(frozen=True)
class Source:
    """A primary with segments of 1 MB, which archives them, and keeps none that are done with."""

    space: Workspace
    primary: Cluster
    archive: Path

    def relay(self, directory: Path, *options: str) -> Relay:
        return self.space.add(Relay(directory, self.primary.conninfo, *options))

    def restart(self, relay: Relay) -> Relay:
        return self.space.add(relay.again())

    def write(self, segments: int = 3) -> str:
        """Write so many segments; where they end."""
        for _ in range(segments):
            end = self.primary.switch_wal()
        return end

    def remove_wal(self) -> None:
        """Have the primary remove all WAL that it needs no longer."""
        self.write()
        self.primary.sql("CHECKPOINT")
        self.write(1)
        self.primary.sql("CHECKPOINT")

    def wait_received(self, end: str, name: str = "walproto") -> None:
        self.primary.wait_until(
            "EXISTS (SELECT FROM pg_stat_replication"
            f" WHERE application_name = '{name}' AND flush_lsn >= '{end}')"
        )

    def archive_all(self) -> None:
        """Have the primary archive all that it has written."""
        last = self.primary.sql("SELECT pg_walfile_name(pg_current_wal_lsn())")
        self.primary.switch_wal()
        self.primary.wait_until(f"(SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver)")

    def check(self, relay: Relay, end: str, *, warnings: int | None = 0) -> None:
        """The relay has all WAL up to `end`, as it was archived, and pg_receivewal gets all of
        it; and there were so many warnings, if that is known."""
        self.archive_all()
        held = same_wal_to(end, self.archive, relay.directory)
        directory = self.space.directory(f"{relay.directory.name}-{end.replace('/', '-')}")
        self.space.file(directory / f"{held[0]}.partial")
        options = ("--no-loop", f"--endpos={end}")
        installation = self.primary.installation
        receiver = self.space.add(ReceiveWal(installation, directory, relay.port, *options))
        assert receiver.wait() == 0, receiver.output
        assert same_wal_to(end, self.archive, directory)[0] == held[0]
        found = re.findall(r"(?m)^.*#(?:warn|error|critical)\] .*$", relay.output)
        # An empty directory tells that it is.
        found = [one for one in found if "waiting for a first segment" not in one]
        assert warnings is None or len(found) == warnings, found


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def module_source(request: pytest.FixtureRequest) -> Iterator[Source]:
    installation: Installation = request.param
    with workspace() as space:
        archive = space.directory("archive")
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1)
        primary.configure(
            archive_mode="on",
            archive_command=f'cp "%p" "{archive}/%f"',
            log_replication_commands="on",
            min_wal_size="2MB",
            wal_keep_size=0,
        )
        primary.start()
        primary.pgbench("-i", "-s", "1")
        yield Source(space, primary, archive)


@pytest.fixture
def source(module_source: Source) -> Iterator[Source]:
    """The same primary for each test; what it runs besides, and its slots, end with it."""
    with contextlib.ExitStack() as running:
        space = Workspace(module_source.space.path, running)
        yield Source(space, module_source.primary, module_source.archive)
    gone = "NOT EXISTS (SELECT FROM pg_stat_replication)"
    module_source.primary.wait_until(gone)
    module_source.primary.sql(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
    )


def segment_start(lsn: str) -> str:
    return f"0/{lsn_to_int(lsn) // SEGMENT * SEGMENT:X}"


def segment_start_of(name: str) -> str:
    return f"0/{int(name[16:24], 16) * SEGMENT:X}"


def tries(server: Cluster, command: str) -> None:
    """Wait until somebody, from now on, has tried something in vain and then again."""
    server.sql("DO $$ BEGIN RAISE LOG 'from now on'; END $$")
    server.expect_log("LOG:  from now on")
    for _ in range(2):
        server.expect_log(f"received replication command: {command}")


# -- Slots ---------------------------------------------------------------------------------------


def test_it_creates_its_slot_which_then_holds_wal_for_it(source: Source) -> None:
    """While it is away, too; and nothing is created a second time."""
    primary = source.primary
    primary.sql("CHECKPOINT")
    reserved = primary.sql("SELECT redo_lsn FROM pg_control_checkpoint()")
    source.write()
    options = ("--upstream-slot", "made", "--upstream-create-slot")
    relay = source.relay(source.space.directory("makes-slot"), *options)
    relay.expect('created replication slot "made"')
    assert relay.receiving()[3] == segment_start(reserved)
    relay.ready()
    end = source.write()
    primary.wait_until(CONFIRMED.format(end, "made"))
    relay.stop()
    source.remove_wal()
    relay = source.restart(relay)
    relay.receiving()
    end = primary.lsn()
    primary.wait_until(CONFIRMED.format(end, "made"))
    source.check(relay, end)
    assert "created" not in relay.output


def test_without_its_slot_it_serves_what_it_has(source: Source) -> None:
    primary = source.primary
    relay = source.relay(source.space.directory("lacks-slot"))
    relay.receiving()
    source.write()
    end = primary.lsn()
    source.wait_received(end)
    relay.stop()
    relay = source.relay(relay.directory, "--upstream-slot", "lacking")
    relay.expect(
        '#critical.*upstream: replication slot "lacking" does not exist: create it, or have it '
        "created with --upstream-create-slot"
    )
    tries(primary, "READ_REPLICATION_SLOT")
    source.check(relay, end, warnings=1)
    primary.sql("SELECT pg_create_physical_replication_slot('lacking')")
    relay.receiving()
    end = primary.lsn()
    primary.wait_until(CONFIRMED.format(end, "lacking"))
    source.check(relay, end, warnings=1)


# -- The first segment ---------------------------------------------------------------------------


def test_it_begins_where_it_is_told_to(source: Source) -> None:
    """If its directory is empty; else it goes on."""
    primary = source.primary
    source.write()
    oldest = min(path.name for path in primary.wal_dir.iterdir() if is_segment(path.name))
    start = f"{segment_start_of(oldest)[:-5]}01234"
    relay = source.relay(source.space.directory("told"), "--upstream-start", start)
    assert relay.receiving()[3] == segment_start_of(oldest)
    end = primary.lsn()
    source.wait_received(end)
    source.check(relay, end)
    relay.stop()
    relay = source.restart(relay)
    assert lsn_to_int(relay.receiving()[3]) > lsn_to_int(start) + 3 * SEGMENT


def test_it_waits_for_a_server_that_is_not_there_yet(source: Source) -> None:
    """And begins with the segment that the server then writes to."""
    late = source.space.cluster(source.primary.installation, "late").init(wal_segsize_mb=1)
    relay = source.space.add(Relay(source.space.directory("early"), late.conninfo))
    relay.expect("#warn.*upstream: .*Connection refused: trying again")
    late.start()
    began = relay.receiving()[3]
    relay.ready()
    late.switch_wal()
    end = late.lsn()
    late.wait_until(f"EXISTS (SELECT FROM pg_stat_replication WHERE flush_lsn >= '{end}')")
    assert len(same_wal_to(end, late.wal_dir, relay.directory)) == 1
    assert lsn_to_int(segment_start(end)) == lsn_to_int(began) + SEGMENT
    relay.check_log()


# -- What is there already -----------------------------------------------------------------------


def test_it_takes_over_from_pg_receivewal(source: Source) -> None:
    """Which was killed while WAL came, and leaves an unfinished segment and a slot."""
    primary = source.primary
    directory = source.space.directory("taken-over")
    primary.sql("SELECT pg_create_physical_replication_slot('handed_on', true)")
    with primary.client("pgbench", "-n", "-c", "2", "-T", "600", "postgres"):
        receiver = source.space.add(
            ReceiveWal(primary.installation, directory, primary.port, "--slot=handed_on")
        )
        receiver.expect("finished segment at")
        receiver.kill()
        before = sorted(path.name for path in directory.iterdir())
        relay = source.relay(directory, "--upstream-slot", "handed_on")
        began = relay.receiving()[3]
        end = primary.lsn()
        source.wait_received(end)
    assert lsn_to_int(segment_start_of(before[-1])) <= lsn_to_int(began)
    end = primary.lsn()
    source.wait_received(end)
    source.archive_all()
    assert same_wal_to(end, source.archive, directory)[0] == before[0]
    relay.check_log()


def with_a_gap(source: Source, name: str) -> tuple[Relay, str, list[str]]:
    """A relay, where its WAL ends, and the segments behind that which the server has removed."""
    primary = source.primary
    relay = source.relay(source.space.directory(name))
    relay.receiving()
    source.write()
    end = primary.lsn()
    source.wait_received(end)
    relay.stop()
    source.remove_wal()
    source.archive_all()
    names = (path.name for path in source.archive.iterdir())
    first = primary.sql(f"SELECT pg_walfile_name('{end}')")
    behind = sorted(name for name in names if is_segment(name) and name >= first)
    missing = [name for name in behind if not (primary.wal_dir / name).exists()]
    assert missing[0] == first
    assert len(missing) >= 3
    relay = source.restart(relay)
    where = re.escape(f"from {first} on, into {relay.directory} ")
    relay.expect(rf"#critical.*upstream: the server has no WAL from \S+ on any more .* {where}")
    return relay, end, missing


def test_a_gap_that_cannot_be_closed_and_then_is(source: Source) -> None:
    """The server has removed what comes next; from elsewhere somebody brings it."""
    primary = source.primary
    relay, end, missing = with_a_gap(source, "gap")
    # With the last of it alone there would be a gap for good.
    shutil.copy(source.archive / missing[-1], relay.directory)
    tries(primary, "START_REPLICATION")
    assert primary.sql("SELECT count(*) FROM pg_stat_replication") == "0"
    (relay.directory / missing[-1]).unlink()
    source.check(relay, end, warnings=1)
    for name in missing:
        shutil.copy(source.archive / name, relay.directory)
    end = primary.lsn()
    source.wait_received(end)
    source.check(relay, end, warnings=1)


def test_a_gap_that_is_closed_slowly(source: Source) -> None:
    """The last segment is still being copied when the relay comes to it."""
    relay, _, missing = with_a_gap(source, "slow")
    for name in missing[:-1]:
        shutil.copy(source.archive / name, relay.directory)
    whole = (source.archive / missing[-1]).read_bytes()
    with open(relay.directory / missing[-1], "wb") as copy:
        copy.write(whole[: SEGMENT // 2])
        copy.flush()
        relay.expect(f"#critical.*the server has no WAL from .* from {missing[-1]} on, into")
        tries(source.primary, "START_REPLICATION")
        copy.write(whole[SEGMENT // 2 :])
    end = source.primary.lsn()
    source.wait_received(end)
    source.check(relay, end, warnings=None)


def test_another_cluster_is_refused(source: Source) -> None:
    primary = source.primary
    relay = source.relay(source.space.directory("faithful"))
    relay.receiving()
    source.write()
    end = primary.lsn()
    source.wait_received(end)
    relay.stop()
    stranger = source.space.cluster(primary.installation, "stranger").init(wal_segsize_mb=1)
    stranger.configure(log_replication_commands="on")
    stranger.start()
    system = stranger.sql("SELECT system_identifier FROM pg_control_system()")
    relay = source.space.add(Relay(relay.directory, stranger.conninfo))
    relay.expect(
        "#critical.*upstream: the database system identifier differs: the server's is "
        rf"{system}, that of the WAL here is \d+: connect to the right server"
    )
    tries(stranger, "IDENTIFY_SYSTEM")
    source.check(relay, end, warnings=1)
    assert "receiving from" not in relay.output
