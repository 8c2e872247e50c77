"""Clients that have more WAL than the relay, which will get it.

That is so behind a switch from one server to another, for the two need not be equally fast.  A
standby asks for WAL from the start of a segment on: this shows as soon as it has begun another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes import query, status
from tests.middleman import Middleman
from tests.postgres import (
    Cluster,
    ReceiveWal,
    Relay,
    identify_system,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal,
    workspace,
)
from tests.relays import SEGMENT, Relayed
from tests.slotted import RawClient, create_slot, number, wait_position
from tests.test_standby import STREAMING, check_same, check_streams_only_from


@dataclass
class Behind(Relayed):
    """A relay, and somebody between it and its primary, who keeps WAL from it for a while."""

    between: Middleman

    def hold_up(self) -> int:
        """Have the relay get nothing more, from shortly before the end of a segment on; where its
        WAL ends."""
        while not 10_000 < (rest := SEGMENT - lsn_to_int(self.write(1000)) % SEGMENT) < 50_000:
            self.write(max(rest - 45_000, 1000))
        self.wait_flushed(self.primary.lsn())
        self.between.fall_silent()
        return self.end()

    def end(self) -> int:
        """Where the relay's WAL ends, by what it says itself."""
        return lsn_to_int(identify_system(self.primary.installation, self.relay.port)[2])

    def turn_to_relay(self, standby: Cluster) -> None:
        """Have a standby of the primary go on with the relay."""
        standby.configure(primary_conninfo=self.relay.conninfo)
        standby.reload()


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def behind(request: pytest.FixtureRequest) -> Iterator[Behind]:
    with workspace() as space:
        primary = space.cluster(request.param, "primary").init(wal_segsize_mb=1)
        primary.configure(bgwriter_delay="10s")  # it writes to an idle server's WAL
        primary.start().pgbench("-i", "-s", "1")
        with Middleman(primary) as between:
            relay = space.add(Relay(space.directory("relay"), between.conninfo))
            relay.receiving()
            primary.lsn()
            relay.ready()
            yield Behind(space, primary, relay, between)
        relay.check_log()


def standby_of_primary(behind: Behind) -> Cluster:
    standby = behind.space.add(behind.primary.backup_to(behind.space.path / "standby"))
    standby.make_standby(behind.primary.conninfo).start()
    standby.wait_until(STREAMING)
    return standby


def test_a_standby_in_the_next_segment(behind: Behind) -> None:
    """It waits and goes on when the relay does; nobody calls that an error.

    Newer ones look where the server is, and wait before they ask for WAL; others are streaming
    meanwhile.
    """
    standby = standby_of_primary(behind)
    create_slot(behind.relay, "ahead")
    standby.configure(primary_slot_name="ahead")
    there = behind.hold_up()
    here = behind.write(200_000, wait=False)
    standby.wait_replayed(here)
    assert number(here) == there // SEGMENT + 1
    behind.turn_to_relay(standby)
    port = f"sender_port = {behind.relay.port}"
    standby.wait_until(f"({STREAMING} WHERE {port})")
    behind.primary.pgbench("-n", "-t", "50")
    assert behind.end() == there

    behind.between.speak()
    end = behind.primary.lsn()
    standby.wait_replayed(end)
    check_same(behind.primary, standby)
    check_streams_only_from(standby, behind.relay)
    assert behind.relay.output.count("streams from") == 1
    assert "ahead of the WAL flush position" not in standby.log_text()
    wait_position(behind, "ahead", end)


def test_a_standby_that_is_further_ahead(behind: Behind) -> None:
    """It is refused as by a real server, tries again, and streams when the relay is far enough."""
    standby = standby_of_primary(behind)
    there = behind.hold_up()
    here = behind.write(2 * SEGMENT, wait=False)
    standby.wait_replayed(here)
    assert number(here) >= there // SEGMENT + 2
    behind.turn_to_relay(standby)
    start = int_to_lsn(number(here) * SEGMENT)
    standby.expect_log(
        f"requested starting point {start} is ahead of the WAL flush position of this server "
        f"{int_to_lsn(there)}"
    )
    behind.between.speak()
    standby.wait_until(STREAMING)
    standby.wait_replayed(behind.primary.lsn())
    check_same(behind.primary, standby)
    check_streams_only_from(standby, behind.relay)


def test_pg_receivewal_in_the_next_segment(behind: Behind) -> None:
    directory = behind.space.directory("archive")
    installation = behind.primary.installation
    first = behind.space.add(ReceiveWal(installation, directory, behind.primary.port))
    first.expect("starting log streaming")
    behind.hold_up()
    end = behind.primary.switch_wal()
    first.expect(rf"finished segment at {re.escape(end)} ")
    assert first.stop() == 0
    assert lsn_to_int(end) > behind.end()
    second = behind.space.add(ReceiveWal(installation, directory, behind.relay.port, "-n"))
    second.expect(rf"starting log streaming at {re.escape(end)} ")
    behind.relay.expect(rf'"pg_receivewal" .* streams from {re.escape(end)} on timeline 1')
    behind.between.speak()
    end = behind.primary.switch_wal()
    second.expect(rf"finished segment at {re.escape(end)} ")
    assert second.stop() == 0
    assert len(same_wal(behind.primary.wal_dir, directory)) >= 2


def test_a_raw_client(behind: Behind) -> None:
    """It gets keepalives, which ask whether it is there, and then its WAL from where it asked."""
    there = behind.hold_up()
    start = lsn_to_int(behind.write(100_000, wait=False))
    assert there < start <= there + SEGMENT
    with RawClient(behind.relay.port, options="-c wal_sender_timeout=2s") as client:
        beyond = int_to_lsn(there + SEGMENT + 8)
        client.send(query(f"START_REPLICATION {beyond}"))
        assert client.hear("Z I") == [
            "W",
            f"ERROR XX000: requested starting point {beyond} is ahead of the WAL flush position of "
            f"this server {int_to_lsn(there)}",
            "Z I",
        ]
        client.send(query(f"START_REPLICATION {int_to_lsn(start)}"))
        assert client.hear("W") == ["W"]
        for _ in range(3):
            client.send(status(start, start))
            assert client.hear("k") == [f"k {int_to_lsn(start)} reply=1"]
        client.send(status(start, start, reply=1))
        assert client.hear("k") == [f"k {int_to_lsn(start)} reply=0"]
        assert behind.end() == there
        end = lsn_to_int(behind.write(100_000, wait=False))
        behind.between.speak()
        received = start
        while received < end:
            client.hear("w")
            assert min(client.wal) == start
            received = max(client.wal) + len(client.wal[max(client.wal)])
        got = b"".join(data for _, data in sorted(client.wal.items()))
        assert got == wal(behind.primary, start, start + len(got))


def wal(primary: Cluster, start: int, end: int) -> bytes:
    """What a primary has of its WAL on disk."""
    names = sorted(path for path in primary.wal_dir.iterdir() if len(path.name) == 24)
    first = int(names[0].name[16:], 16) * SEGMENT
    data = b"".join(path.read_bytes() for path in names)
    return data[start - first : end - first]
