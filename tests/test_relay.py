"""Relays between real servers and real clients, while nothing is broken.

What a standby behind a relay knows that its base backup did not, came through the relay: it has no
other server's address.  And what a relay has written is what the primary has written, to the byte.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.postgres import (
    Cluster,
    Installation,
    Process,
    ReceiveWal,
    Relay,
    Workspace,
    installations,
    lsn_to_int,
    same_wal,
    same_wal_to,
    workspace,
)
from tests.test_standby import STREAMING, check_same, check_streams_only_from, connections

CONFIRMED = "EXISTS (SELECT FROM pg_stat_replication WHERE flush_lsn >= '{}')"


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def installation(request: pytest.FixtureRequest) -> Installation:
    found: Installation = request.param
    return found


@dataclass(frozen=True)
class Source:
    """A primary with segments of 1 MB, on which there is work to do."""

    space: Workspace
    primary: Cluster

    def relay(self, name: str, upstream: str, *options: str) -> Relay:
        """A relay that is ready."""
        relay = self.space.add(Relay(self.space.directory(name), upstream, *options))
        relay.receiving()
        self.primary.lsn()  # an idle server's segment may be empty
        return relay

    def backup(self, name: str) -> Cluster:
        """A copy of the primary, without the WAL that belongs to it."""
        return self.space.add(self.primary.backup_to(self.space.path / name))

    def standby(self, name: str, conninfo: str) -> Cluster:
        standby = self.backup(name).make_standby(conninfo).start()
        standby.wait_until(STREAMING)
        return standby

    def attentive_standby(self, name: str, conninfo: str) -> Cluster:
        """A standby that often tells what its queries need to see."""
        standby = self.backup(name).make_standby(conninfo)
        standby.configure(hot_standby_feedback="on", wal_receiver_status_interval="1s")
        standby.start().wait_until(STREAMING)
        return standby

    def receiver(self, name: str, relay: Relay) -> ReceiveWal:
        """pg_receivewal, which archives all that the relay has."""
        directory = self.space.directory(name)
        oldest = min(path.name[:24] for path in relay.directory.iterdir())
        self.space.file(directory / f"{oldest}.partial")
        return self.space.add(ReceiveWal(self.primary.installation, directory, relay.port))

    def work(self) -> Process:
        """pgbench, at work on the primary until it is killed."""
        return self.primary.client("pgbench", "-n", "-c", "2", "-T", "600", "postgres")


@pytest.fixture(scope="module")
def primary(installation: Installation) -> Iterator[Source]:
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        yield Source(space, primary)


@pytest.fixture
def source(primary: Source) -> Iterator[Source]:
    """The same primary for each test; what it runs besides ends with it."""
    with contextlib.ExitStack() as running:
        yield Source(Workspace(primary.space.path, running), primary.primary)
    primary.primary.wait_until("NOT EXISTS (SELECT FROM pg_stat_replication)")


def application_names(upstream: Cluster) -> list[str]:
    """Who streams from a server."""
    return upstream.sql("SELECT application_name FROM pg_stat_replication").split()


def check_archive(relay: Relay, upstream: Cluster, end: str) -> None:
    """The relay has what the server has, up to `end`, and nothing went wrong."""
    assert len(same_wal_to(end, upstream.wal_dir, relay.directory)) >= 2
    relay.check_log()


# -- From a server to a standby ------------------------------------------------------------------


def test_a_standby_behind_relays_under_load(source: Source) -> None:
    """Primary, relay, relay, standby; and a standby and pg_receivewal behind the first relay."""
    primary = source.primary
    with source.work():
        relay = source.relay("first", primary.conninfo)
        second = source.relay("second", relay.conninfo)
        near = source.standby("near", relay.conninfo)
        far = source.standby("far", second.conninfo)
        receiver = source.receiver("copy", relay)
        before = primary.lsn()
        near.wait_replayed(before)
        far.wait_replayed(before)
    end = primary.switch_wal()
    receiver.expect(rf"finished segment at {re.escape(end)} ")
    assert receiver.stop() == 0
    end = primary.lsn()
    primary.wait_until(CONFIRMED.format(end))
    assert application_names(primary) == ["walproto"]
    for standby, sender in ((near, relay), (far, second)):
        standby.wait_replayed(end)
        check_same(primary, standby)
        check_streams_only_from(standby, sender)
        assert len(connections(standby)) == 1
        check_archive(sender, primary, end)
    assert len(same_wal(primary.wal_dir, receiver.directory)) >= 2
    assert len(re.findall("receiving from", relay.output + second.output)) == 2


def test_a_standby_as_the_upstream(source: Source) -> None:
    """Which itself has its WAL from a relay; and the base backup is older than both relays."""
    primary = source.primary
    primary.sql("SELECT pg_create_physical_replication_slot('reserved', true)")
    copy = source.backup("copy-of-old")
    start = primary.sql("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name='reserved'")
    primary.pgbench("-n", "-t", "500")
    relay = source.relay("of-primary", primary.conninfo, "--upstream-slot", "reserved")
    # Where the slot says, not where the primary is by now.
    assert f"timeline 1 from {segment_start(start)}\n" in f"{relay.output}\n"
    middle = copy.make_standby(relay.conninfo).start()
    middle.wait_until(STREAMING)
    of_standby = source.relay("of-standby", middle.conninfo)
    last = source.standby("last", of_standby.conninfo)
    primary.pgbench("-n", "-c", "2", "-t", "300")
    end = primary.lsn()
    last.wait_replayed(end)
    check_same(primary, last)
    check_streams_only_from(last, of_standby)
    assert application_names(middle) == ["walproto"]
    check_archive(relay, primary, end)
    check_archive(of_standby, primary, end)


def segment_start(lsn: str) -> str:
    return f"0/{lsn_to_int(lsn) // 2**20 * 2**20:X}"


@pytest.mark.parametrize("megabytes", [16, 64])
def test_larger_segments(installation: Installation, megabytes: int) -> None:
    if megabytes > 16 and installation != installations()[0]:
        pytest.skip("once is enough")
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=megabytes).start()
        source = Source(space, primary)
        relay = source.relay("relay", primary.conninfo)
        standby = source.standby("standby", relay.conninfo)
        primary.switch_wal()
        primary.pgbench("-i", "-s", "1")
        primary.switch_wal()
        primary.pgbench("-n", "-t", "100")
        end = primary.lsn()
        standby.wait_replayed(end)
        check_same(primary, standby)
        check_archive(relay, primary, end)


# -- Feedback ------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(standby: Cluster) -> Iterator[str]:
    """A transaction on the standby, for as long as it runs; the oldest transaction of the
    primary's that its snapshot must tell apart."""
    begin = "BEGIN ISOLATION LEVEL REPEATABLE READ"
    snapshot = "SELECT 'needs ' || pg_snapshot_xmin(pg_current_snapshot())"
    wait = "SELECT pg_sleep(600)"
    with standby.client(
        "psql", "-XAt", "-c", begin, "-c", snapshot, "-c", wait, "postgres"
    ) as psql:
        yield psql.expect(r"needs (\d+)")[1]
        standby.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = '{wait}'"
        )
        psql.wait()


@pytest.mark.parametrize("feedback", [True, False], ids=["passed-on", "kept"])
def test_the_replicas_xmins(source: Source, feedback: bool) -> None:
    """With --hot-standby-feedback the primary knows what a query on a standby behind two relays
    needs to see, until that standby leaves; without it nothing is told."""
    primary = source.primary
    options = ["--hot-standby-feedback"] if feedback else []
    name = "feedback" if feedback else "silent"
    relay = source.relay(name, primary.conninfo, *options)
    walsender = primary.sql("SELECT pid FROM pg_stat_replication")
    second = source.relay(f"{name}-second", relay.conninfo, "--hot-standby-feedback")
    standby = source.attentive_standby(f"{name}-standby", second.conninfo)
    xmin = f"(SELECT backend_xmin FROM pg_stat_replication WHERE pid = {walsender})"
    with reading(standby) as needed:
        primary.pgbench("-n", "-t", "10")
        if feedback:
            primary.wait_until(f"{xmin}::text = '{needed}'")
        else:
            standby.sql("SELECT pg_sleep(3)")  # it has told the relay meanwhile
            assert primary.sql(f"SELECT {xmin}") == ""
    if feedback:
        primary.wait_until(f"{xmin}::text::bigint > {needed}")
    standby.stop()
    primary.wait_until(f"{xmin} IS NULL")
    assert primary.sql("SELECT pid FROM pg_stat_replication") == walsender
    relay.check_log()
    second.check_log()


def test_an_xmin_that_was_left_in_the_slot(source: Source) -> None:
    """When the option is given no more, what the slot has kept for it is let go."""
    primary = source.primary
    slot = ("--upstream-slot", "keeps", "--upstream-create-slot")
    relay = source.relay("keeps", primary.conninfo, *slot, "--hot-standby-feedback")
    standby = source.attentive_standby("keeps-standby", relay.conninfo)
    xmin = "(SELECT xmin FROM pg_replication_slots WHERE slot_name = 'keeps')"
    with reading(standby) as needed:
        primary.wait_until(f"{xmin}::text = '{needed}'")
        relay.kill()
        assert primary.sql(f"SELECT {xmin}") == needed
        relay = source.space.add(Relay(relay.directory, relay.upstream, *slot, port=relay.port))
        primary.wait_until(f"{xmin} IS NULL")
    standby.wait_replayed(primary.lsn())
    relay.check_log()


# -- Nothing to do -------------------------------------------------------------------------------


def test_an_idle_cluster_stays_quiet(source: Source) -> None:
    """For longer than every timeout, over the connections that there are."""
    primary = source.primary
    impatient = primary.conninfo + " options='-c wal_sender_timeout=2s'"
    receiver, sender = ("--wal-receiver-timeout", "2s"), ("--wal-sender-timeout", "2s")
    relay = source.relay("idle", impatient, *receiver, *sender)
    second = source.relay("idle-second", relay.conninfo, *receiver, *sender)
    # Where one side alone is impatient, that side must ask.
    asks = source.relay("idle-asks", primary.conninfo, *receiver)
    asked = source.relay("idle-asked", impatient)
    relays = (relay, second, asks, asked)
    standby = source.backup("idle-standby").make_standby(second.conninfo)
    standby.configure(wal_receiver_timeout="2s", wal_receiver_status_interval=0)
    standby.start().wait_replayed(primary.lsn())

    def state() -> list[str]:
        """All that does not change as long as nothing happens."""
        return [
            primary.sql("SELECT pid FROM pg_stat_replication ORDER BY pid"),
            standby.sql("SELECT pid FROM pg_stat_wal_receiver"),
            *(one.output for one in relays),
        ]

    before, logs = state(), [primary.log_text(), standby.log_text()]
    used = sum(map(cpu_seconds, relays))
    primary.sql("SELECT pg_sleep(6)")
    used = sum(map(cpu_seconds, relays)) - used
    print(f"CPU seconds of {len(relays)} relays in 6 idle seconds: {used:.2f}")
    assert state() == before
    for cluster, log in zip((primary, standby), logs, strict=True):
        assert not re.search("FATAL|ERROR|terminating", cluster.log_text()[len(log) :])
    assert used < 4
    standby.wait_replayed(primary.lsn())


def cpu_seconds(process: Process) -> float:
    """How much CPU time a process has used, by itself and in the kernel."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
