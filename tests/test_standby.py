"""Standbys that have nothing but walproto to stream from.

They have no restore_command and no other server's address; what they know that their base backup
did not, came through the walsender.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.demo_report import contents
from tests.postgres import (
    Cluster,
    Installation,
    WalSender,
    Workspace,
    installations,
    lsn_to_int,
    workspace,
)

TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers")
STREAMING = "SELECT status = 'streaming' FROM pg_stat_wal_receiver"


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
    """A primary, and a walsender on its pg_wal."""

    space: Workspace
    primary: Cluster
    sender: WalSender

    def standby(self, name: str, conninfo: str) -> Cluster:
        """A standby that starts with a copy of the primary, without the WAL that belongs to it."""
        standby = self.space.add(self.primary.backup_to(self.space.path / name))
        standby.configure(archive_mode="off")
        return standby.make_standby(conninfo).start()

    def work(self) -> str:
        """Write something; the end of the WAL of that."""
        self.primary.pgbench("-n", "-t", "100")
        return self.primary.lsn()


@pytest.fixture(scope="module")
def source(installation: Installation) -> Iterator[Source]:
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        sender = space.add(WalSender(primary.wal_dir))
        sender.ready()
        yield Source(space, primary, sender)
        sender.check_log()


def check_same(one: Cluster, other: Cluster) -> None:
    for table in TABLES:
        assert contents(one, table) == contents(other, table), table


def check_streams_only_from(standby: Cluster, *senders: WalSender) -> None:
    """That nothing else is in its configuration, and that it never lost what it streamed from."""
    ports = standby.sql("SELECT DISTINCT sender_port FROM pg_stat_wal_receiver")
    assert ports in {str(sender.port) for sender in senders}
    assert standby.sql("SHOW restore_command") == ""
    assert standby.sql("SELECT pg_is_in_recovery()") == "t"


def connections(standby: Cluster) -> list[tuple[str, str]]:
    """Where a standby began to stream each time, by its log: LSN and timeline."""
    return re.findall(
        r"(?:re)?started (?:streaming WAL from primary|WAL streaming) at (\S+) on timeline (\d+)",
        standby.log_text(),
    )


# -- A primary's pg_wal --------------------------------------------------------------------------


def test_it_catches_up_and_follows(source: Source) -> None:
    source.work()
    standby = source.standby("follows", source.sender.conninfo)
    source.work()
    standby.wait_replayed(source.work())
    check_same(source.primary, standby)
    for row in range(3):
        source.primary.sql(f"INSERT INTO pgbench_tellers VALUES ({1000 + row}, 1, 0)")
        standby.wait_until(f"EXISTS (SELECT FROM pgbench_tellers WHERE tid = {1000 + row})")
    check_streams_only_from(standby, source.sender)
    assert len(connections(standby)) == 1
    assert source.primary.sql("SELECT count(*) FROM pg_stat_replication") == "0"


def test_it_goes_on_when_the_walsender_is_back(source: Source) -> None:
    """Behind an orderly end and behind a crash, without anybody's help."""
    sender = source.space.add(WalSender(source.primary.wal_dir))
    standby = source.standby("goes-on", sender.conninfo)
    standby.wait_replayed(source.work())

    sender.terminate()
    sender.wait()
    standby.expect_log("replication terminated by primary server")
    end = source.work()
    sender.check_log()
    sender = source.space.add(WalSender(source.primary.wal_dir, port=sender.port))
    standby.wait_replayed(end)
    check_same(source.primary, standby)

    with source.primary.client("pgbench", "-n", "-T", "600", "postgres") as work:
        standby.wait_replayed(source.primary.lsn())
        sender.kill()
        standby.expect_log("could not receive data from WAL stream")
        work.kill()
    end = source.work()
    sender = source.space.add(WalSender(source.primary.wal_dir, port=sender.port))
    standby.wait_replayed(end)
    check_same(source.primary, standby)
    check_streams_only_from(standby, sender)
    assert len(connections(standby)) == 3
    sender.check_log()


def test_all_that_was_written_is_sent_before_an_orderly_end(source: Source) -> None:
    sender = source.space.add(WalSender(source.primary.wal_dir))
    standby = source.standby("orderly", sender.conninfo)
    standby.wait_until(STREAMING)
    end = source.work()
    sender.terminate()
    sent, flushed = sender.expect(
        r'"walreceiver" .* has ended streaming, sent up to (\S+), flushed there up to (\S+)'
    ).groups()
    assert sent == flushed
    sender.wait()
    assert lsn_to_int(sent) >= lsn_to_int(end)
    standby.wait_replayed(end)
    sender.check_log()


def test_an_idle_one_stays_connected(source: Source) -> None:
    """Both sides have short timeouts, and nothing to say but that they are still there."""
    sender = source.space.add(WalSender(source.primary.wal_dir, "--wal-sender-timeout", "2s"))
    standby = source.space.add(source.primary.backup_to(source.space.path / "idle"))
    standby.configure(wal_receiver_timeout="2s", wal_receiver_status_interval=0)
    standby.make_standby(sender.conninfo).start()
    other = source.space.add(source.primary.backup_to(source.space.path / "idle-too"))
    other.make_standby(f"{source.sender.conninfo} options='-c wal_sender_timeout=2s'").start()
    for idle in (standby, other):
        idle.wait_replayed(source.primary.lsn())
    source.primary.sql("SELECT pg_sleep(5)")
    end = source.work()
    for idle in (standby, other):
        idle.wait_replayed(end)
        check_same(source.primary, idle)
        assert len(connections(idle)) == 1
        assert "timeout" not in idle.log_text()
        assert "could not" not in idle.log_text().replace("could not open usermap", "")
        idle.stop()
    sender.check_log()


# -- Timelines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Successor:
    """A primary, and a standby of it that is to take its place."""

    space: Workspace
    primary: Cluster
    standby: Cluster
    archive: Path
    """To where the standby copies all its WAL, before and behind its promotion."""

    def promote(self) -> str:
        """Have the standby take the primary's place and go on; the end of the WAL it wrote."""
        self.primary.pgbench("-n", "-t", "100")
        self.standby.wait_replayed(self.primary.lsn())
        self.primary.kill()
        self.standby.promote()
        self.standby.pgbench("-n", "-c", "2", "-t", "200")
        return self.standby.lsn()

    def another(self, name: str, conninfo: str) -> Cluster:
        standby = self.space.add(self.primary.backup_to(self.space.path / name))
        standby.make_standby(conninfo).start()
        standby.wait_until(STREAMING)
        return standby


@pytest.fixture
def successor(installation: Installation) -> Iterator[Successor]:
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        archive = space.directory("archive")
        standby = space.add(primary.backup_to(space.path / "successor"))
        standby.configure(
            archive_mode="always",
            archive_command=f'test ! -f "{archive}/%f" && cp "%p" "{archive}/%f"',
        )
        standby.make_standby(primary.conninfo).start()
        yield Successor(space, primary, standby, archive)


def check_followed(standby: Cluster, new: Cluster, sender: WalSender) -> None:
    """The standby has gone over to the new timeline by streaming, over one connection."""
    check_same(new, standby)
    check_streams_only_from(standby, sender)
    assert [tli for _, tli in connections(standby)] == ["1", "2"]
    assert standby.sql("SELECT received_tli FROM pg_stat_wal_receiver") == "2"
    name = re.escape(sender_name(standby))
    began = re.findall(
        rf'"{name}" \(pid (\d+), .* streams from \S+ on timeline (\d)', sender.output
    )
    assert [tli for _, tli in began] == ["1", "2"]
    assert len({pid for pid, _ in began}) == 1
    assert "now serving timeline 2" in sender.output
    sender.check_log()


def sender_name(standby: Cluster) -> str:
    return standby.sql("SHOW cluster_name") or "walreceiver"


def test_the_server_whose_wal_is_served_is_promoted(successor: Successor) -> None:
    sender = successor.space.add(WalSender(successor.standby.wal_dir))
    sender.ready()
    follower = successor.another("follower", sender.conninfo)
    end = successor.promote()
    follower.wait_replayed(end)
    check_followed(follower, successor.standby, sender)

    # One that knows the new timeline only is no other case than any standby.
    successor.standby.sql("INSERT INTO pgbench_tellers VALUES (1000, 1, 0)")
    follower.wait_until("EXISTS (SELECT FROM pgbench_tellers WHERE tid = 1000)")
    late = successor.space.add(successor.standby.backup_to(successor.space.path / "late"))
    late.configure(archive_mode="off")
    late.make_standby(sender.conninfo).start()
    late.wait_replayed(successor.standby.lsn())
    check_same(successor.standby, late)


def test_a_new_timeline_comes_into_the_archive(successor: Successor) -> None:
    """The new primary archives its history file, then its segments, beside the old one's."""
    sender = successor.space.add(WalSender(successor.archive))
    last = successor.primary.switch_wal()
    sender.ready()
    follower = successor.another("follower", sender.conninfo)
    follower.wait_replayed(last)
    end = successor.promote()
    successor.standby.switch_wal()
    follower.wait_replayed(end)
    check_followed(follower, successor.standby, sender)
