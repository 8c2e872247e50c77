"""A primary and a standby that takes its place, for relays to go along with, or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.postgres import (
    HOST,
    Cluster,
    Installation,
    Relay,
    Workspace,
    is_segment,
    lsn_to_int,
    workspace,
)
from tests.test_standby import STREAMING, check_same, check_streams_only_from, connections

SEGMENT = 2**20


@dataclass(frozen=True)
class Servers:
    """A primary, a standby that is to take its place, and what is needed to have a relay."""

    space: Workspace
    primary: Cluster
    standby: Cluster

    @property
    def either(self) -> str:
        """A connection string for whichever of the two is there."""
        ports = f"{self.primary.port},{self.standby.port}"
        return f"host={HOST},{HOST} port={ports} user=postgres"

    def relay(self, name: str, upstream: str, *options: str) -> Relay:
        """A relay that is ready."""
        relay = self.space.add(Relay(self.space.directory(name), upstream, *options))
        relay.receiving()
        self.primary.lsn()  # an idle server's segment may be empty
        relay.ready()
        return relay

    def backup(self, name: str, conninfo: str) -> Cluster:
        """A standby, yet to be started."""
        return self.space.add(self.primary.backup_to(self.space.path / name)).make_standby(conninfo)

    def follower(self, name: str, conninfo: str) -> Cluster:
        follower = self.backup(name, conninfo).start()
        follower.wait_until(STREAMING)
        return follower

    def fail_over(self) -> str:
        """Have the standby take the primary's place, which is gone, and go on; the end of the
        WAL it wrote."""
        self.primary.pgbench("-n", "-t", "100")
        self.standby.wait_replayed(self.primary.lsn())
        self.primary.kill()
        self.standby.promote()
        return write(self.standby)


@contextmanager
def two_servers(installation: Installation) -> Iterator[Servers]:
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        standby = space.add(primary.backup_to(space.path / "successor"))
        standby.make_standby(primary.conninfo).start()
        standby.wait_until(STREAMING)
        yield Servers(space, primary, standby)


def write(server: Cluster) -> str:
    """Have more than a segment written; the end of that."""
    server.pgbench("-n", "-c", "2", "-t", "200")
    server.switch_wal()
    server.pgbench("-n", "-t", "50")
    return server.lsn()


def fork_of(server: Cluster) -> str:
    """Where its timeline 2 began."""
    history = (server.wal_dir / "00000002.history").read_text()
    return history.split()[1]


def wait_flushed(server: Cluster, end: str) -> None:
    """Wait until the relay has confirmed all to `end`."""
    server.wait_until(
        "EXISTS (SELECT FROM pg_stat_replication"
        f" WHERE application_name = 'walproto' AND flush_lsn >= '{end}')"
    )


def check_archive(relay: Relay, end: str, *servers: Cluster) -> None:
    """Of timelines 1, 2 and so on, which these servers wrote, one each, the relay has what they
    have, and all up to `end` of the last one."""
    *_, last = servers
    tli = len(servers)
    ends = {}
    for successor in range(2, tli + 1):
        name = f"{successor:08X}.history"
        history = (last.wal_dir / name).read_bytes()
        assert (relay.directory / name).read_bytes() == history
        ends[successor - 1] = lsn_to_int(history.decode().splitlines()[-1].split()[1])
    segments = [path for path in relay.directory.iterdir() if is_segment(path.name)]
    assert {int(path.name[:8], 16) for path in segments} == set(range(1, tli + 1))
    for path in segments:
        wrote = int(path.name[:8], 16)
        holders = [servers[wrote - 1].wal_dir]
        if (int(path.name[16:], 16) + 1) * SEGMENT <= ends.get(wrote, 0):
            # What came before the switch its successors have from it, unless they are younger.
            holders += [
                one.wal_dir for one in servers[wrote:] if (one.wal_dir / path.name).exists()
            ]
        for holder in holders:
            assert path.read_bytes() == (holder / path.name).read_bytes(), (path, holder)
    name = last.sql(f"SELECT pg_walfile_name('{end}')")
    assert int(name[:8], 16) == tli
    offset = lsn_to_int(end) % SEGMENT
    (newest,) = relay.directory.glob(f"{name}*")
    assert newest.read_bytes()[:offset] == (last.wal_dir / name).read_bytes()[:offset]


def check_went_along(
    follower: Cluster, primary: Cluster, relay: Relay, timelines: list[str]
) -> None:
    """The follower has what the primary has, and has gone over from each timeline to the next by
    streaming from the relay, over one connection."""
    check_same(primary, follower)
    check_streams_only_from(follower, relay)
    assert [tli for _, tli in connections(follower)] == timelines
    began = re.findall(r'"walreceiver" \(pid (\d+), .* on timeline (\d)', relay.output)
    assert [tli for _, tli in began] == timelines
    assert len({pid for pid, _ in began}) == 1
    relay.check_log()


def received_timelines(relay: Relay) -> list[str]:
    """Which timelines it has received, one after the other."""
    return re.findall(r"receiving from \S+: timeline (\d+)", relay.output)
