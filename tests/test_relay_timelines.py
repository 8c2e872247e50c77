"""Relays whose upstream is promoted, or gives way to one that was.

The standby behind a relay never needs help and keeps its connection, and the relay's archive holds
what the servers wrote on each timeline, to the byte.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.failover import (
    SEGMENT,
    Servers,
    check_archive,
    check_went_along,
    fork_of,
    received_timelines,
    two_servers,
    wait_flushed,
    write,
)
from tests.postgres import HOST, Cluster, installations, int_to_lsn, lsn_to_int
from tests.test_standby import check_same, connections

WALSENDER = "SELECT pid FROM pg_stat_replication WHERE application_name = 'walproto'"


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    with two_servers(request.param) as servers:
        yield servers


def test_a_promoted_standby_takes_over(servers: Servers) -> None:
    """The relay finds it by a connection string of two hosts, and gets its slot there, too."""
    slot = ("--upstream-slot", "kept", "--upstream-create-slot")
    relay = servers.relay("relay", servers.either, *slot)
    follower = servers.follower("follower", relay.conninfo)
    end = servers.fail_over()
    assert relay.receiving()[1] == f"{HOST}:{servers.standby.port}"
    follower.wait_replayed(end)
    check_went_along(follower, servers.standby, relay, ["1", "2"])
    wait_flushed(servers.standby, end)
    confirmed = f"restart_lsn >= '{end}'"
    servers.standby.wait_until(f"(SELECT {confirmed} FROM pg_replication_slots)")
    check_archive(relay, end, servers.primary, servers.standby)

    # The old primary comes back, and is the first of the hosts.
    servers.primary.start()
    servers.primary.pgbench("-n", "-t", "50")
    servers.standby.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
    relay.expect(
        "#critical.*upstream: the server's timeline 1 is behind timeline 2, which is here: it is "
        "not the primary any longer"
    )
    end = write(servers.standby)
    wait_flushed(servers.standby, end)
    follower.wait_replayed(end)
    check_same(servers.standby, follower)
    check_archive(relay, end, servers.primary, servers.standby)
    assert len(connections(follower)) == 2


def test_the_upstream_is_promoted_and_then_another_one(servers: Servers) -> None:
    """First over the connection that there is, then by way of a connection string of two hosts:
    to timeline 3 by way of timeline 2; and so does another relay behind the first."""
    other = servers.backup("other", servers.standby.conninfo).start()
    ports = f"{servers.standby.port},{other.port}"
    relay = servers.relay("relay", f"host={HOST},{HOST} port={ports} user=postgres")
    second = servers.relay("second", relay.conninfo)
    follower = servers.follower("follower", second.conninfo)
    walsender = servers.standby.sql(WALSENDER)
    end = servers.fail_over()
    follower.wait_replayed(end)
    check_went_along(follower, servers.standby, second, ["1", "2"])
    wait_flushed(servers.standby, end)
    assert servers.standby.sql(WALSENDER) == walsender
    assert received_timelines(relay) == ["1", "2"]

    other.wait_replayed(servers.standby.lsn())
    servers.standby.kill()
    other.promote()
    end = write(other)
    follower.wait_replayed(end)
    check_went_along(follower, other, second, ["1", "2", "3"])
    wait_flushed(other, end)
    assert received_timelines(second) == ["1", "2", "3"]
    for one in (relay, second):
        check_archive(one, end, servers.primary, servers.standby, other)


def test_a_relay_that_was_away_meanwhile(servers: Servers) -> None:
    """It catches up over the end of a timeline."""
    relay = servers.relay("relay", servers.either)
    follower = servers.follower("follower", relay.conninfo)
    relay.stop()
    write(servers.primary)
    end = servers.fail_over()
    relay = servers.space.add(relay.again())
    follower.wait_replayed(end)
    check_same(servers.standby, follower)
    assert received_timelines(relay) == ["1", "2"]
    check_archive(relay, end, servers.primary, servers.standby)
    relay.check_log()


def die_within_a_record(primary: Cluster) -> str:
    """Have the primary die within a record of many segments, of which the relay has some; an LSN
    before that record."""
    before = primary.lsn()
    number = lsn_to_int(before) // SEGMENT
    # When it comes to this segment, it cannot write on.
    (primary.wal_dir / segment(number + 8)).mkdir()
    received = f"flush_lsn >= '{int_to_lsn((number + 3) * SEGMENT)}'"
    psql = ("psql", "-XAt", "-c", "SELECT 'connected'")
    wait = """DO $$ BEGIN WHILE ({}) LOOP PERFORM pg_sleep(0.01); COMMIT; END LOOP; END $$"""
    go = wait.format("SELECT pg_stat_file('go', true) IS NULL")
    end = wait.format(
        f"NOT EXISTS (SELECT FROM pg_stat_replication WHERE {received}"
        " AND application_name = 'walproto')"
    )
    write = "SELECT pg_logical_emit_message(false, '', repeat('x', 20000000))"
    with (
        primary.client(*psql, "-c", go, "-c", write, "postgres") as writer,
        primary.client(*psql, "-c", end, "postgres") as waiter,
    ):
        writer.expect("connected")
        waiter.expect("connected")
        # Nobody is to send the others home when the one who writes fails.
        os.kill(primary.pid, signal.SIGSTOP)
        (primary.directory / "go").touch()
        assert waiter.wait() == 0, primary.log_text()
        writer.wait()
        assert "server closed the connection" in writer.output
        primary.kill()
    return before


def segment(number: int) -> str:
    """The name of a segment of timeline 1."""
    return f"{1:08X}{0:08X}{number:08X}"


def test_a_record_that_was_never_finished(servers: Servers) -> None:
    """That is no WAL that the new primary lacks: the relay goes along."""
    primary, standby = servers.primary, servers.standby
    # It often looks whether there is more to send.
    relay = servers.relay("relay", f"{servers.either} options='-c wal_sender_timeout=2s'")
    follower = servers.follower("follower", relay.conninfo)
    before = die_within_a_record(primary)
    standby.promote()
    fork = fork_of(standby)
    assert lsn_to_int(before) <= lsn_to_int(fork) < lsn_to_int(before) + SEGMENT
    end = write(standby)
    follower.wait_replayed(end)
    check_went_along(follower, standby, relay, ["1", "2"])
    wait_flushed(standby, end)
    check_archive(relay, end, primary, standby)
    number = lsn_to_int(fork) // SEGMENT
    assert all((relay.directory / segment(number + more)).exists() for more in (1, 2))

    # What is left of the record misleads nobody.
    relay.stop()
    end = write(standby)
    relay = servers.space.add(relay.again())
    assert relay.receiving()[2] == "2"
    follower.wait_replayed(end)
    wait_flushed(standby, end)
    check_archive(relay, end, primary, standby)
    relay.check_log()
