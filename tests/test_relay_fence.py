"""Relays that have WAL which their upstream, since it was promoted, does not have.

Their clients get the WAL that both have, and none that only the old primary had; and the relay says
what its operator can do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.failover import (
    Servers,
    check_archive,
    fork_of,
    received_timelines,
    two_servers,
    wait_flushed,
    write,
)
from tests.postgres import (
    HOST,
    Cluster,
    ReceiveWal,
    Relay,
    identify_system,
    installations,
    is_segment,
    lsn_to_int,
    same_wal_to,
)
from tests.test_standby import STREAMING, check_same


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    with two_servers(request.param) as servers:
        yield servers


def start_and_promote(standby: Cluster) -> tuple[str, str]:
    """Make a primary of a standby that was stopped, and have it go on; where its timeline 2 begins
    and where it ends."""
    standby.configure(primary_conninfo="")
    standby.start()
    standby.promote()
    end = write(standby)
    return fork_of(standby), end


def refused(tli: int, forked: int, fork: str) -> str:
    """What a relay says of a server; groups: where its own WAL ends, from which segment on it is
    to be moved."""
    return (
        rf"#critical.*upstream: the server's timeline {tli} forked from timeline {forked} at "
        rf"{fork}, and WAL up to (\S+) of timeline \d is here, which the server does not have: .* "
        "stop this walsender, move the segments from ([0-9A-F]{24}) on elsewhere, and start it"
    )


def check_fenced(servers: Servers, relay: Relay, fork: str, *standbys: Cluster) -> None:
    """That pg_receivewal, and these standbys, who have less and are started for it, get WAL of
    timeline 1 up to there.  The relay has ended then."""
    installation = servers.primary.installation
    assert identify_system(installation, relay.port)[1:] == (1, fork)
    directory = servers.space.directory("copy")
    oldest = min(path.name[:24] for path in relay.directory.iterdir())
    servers.space.file(directory / f"{oldest}.partial")
    receiver = servers.space.add(ReceiveWal(installation, directory, relay.port, "--synchronous"))
    relay.expect('"pg_receivewal" .* streams from')
    for standby in standbys:
        standby.start()
        standby.wait_until(f"(SELECT written_lsn = '{fork}' FROM pg_stat_wal_receiver)")
        standby.wait_until(f"pg_last_wal_replay_lsn() = '{fork}'")
    assert len(re.findall("#critical", relay.output)) == 1
    relay.stop()
    flushed = re.findall(r"has ended streaming, sent up to (\S+), flushed .* (\S+)", relay.output)
    assert flushed[-1 - len(standbys) :] == [(fork, fork)] * (1 + len(standbys))
    receiver.stop()
    same_wal_to(fork, servers.primary.wal_dir, directory)


def move_away(servers: Servers, relay: Relay, name: str) -> None:
    """Do what the relay said."""
    elsewhere = servers.space.directory("elsewhere")
    for path in relay.directory.iterdir():
        if is_segment(path.name[:24]) and path.name >= name:
            path.rename(elsewhere / path.name)


def test_wal_that_the_new_primary_does_not_have(servers: Servers) -> None:
    """The relay had commits from the old primary that the standby never got: it stays before
    them, until its operator has done what it says."""
    primary, standby = servers.primary, servers.standby
    relay = servers.relay("relay", servers.either)
    early = servers.backup("early", relay.conninfo)
    follower = servers.follower("follower", relay.conninfo)
    standby.wait_replayed(primary.lsn())
    standby.stop()
    follower.stop()
    lost = write(primary)
    wait_flushed(primary, lost)
    primary.kill()
    fork, end = start_and_promote(standby)
    refusal = relay.expect(refused(2, 1, fork))
    assert lsn_to_int(refusal[1]) >= lsn_to_int(lost)
    check_fenced(servers, relay, fork, early, follower)

    # After a restart, too, wherever its upstream is.
    relay = servers.space.add(Relay(relay.directory, primary.conninfo, port=relay.port))
    assert relay.ready()[4] == fork
    assert identify_system(primary.installation, relay.port)[1:] == (1, fork)
    relay.stop()

    move_away(servers, relay, refusal[2])
    again = servers.space.add(Relay(relay.directory, servers.either, port=relay.port))
    for one in (early, follower):
        one.wait_replayed(end)
        check_same(standby, one)
    assert received_timelines(again) == ["1", "2"]
    check_archive(again, end, primary, standby)
    again.check_log()


def test_another_standby_is_promoted_after_all(servers: Servers) -> None:
    """The relay has followed to timeline 2; then a standby that had less of timeline 1 begins
    another timeline 2.  Of timeline 1, too, there is too much then."""
    primary, standby = servers.primary, servers.standby
    lagging = servers.backup("lagging", primary.conninfo).start()
    lagging.wait_until(STREAMING)
    ports = f"{primary.port},{standby.port},{lagging.port}"
    relay = servers.relay("relay", f"host={HOST},{HOST},{HOST} port={ports} user=postgres")
    primary.switch_wal()
    early = servers.backup("early", relay.conninfo)
    lagging.wait_replayed(primary.lsn())
    lagging.stop()
    write(primary)
    wait_flushed(standby, servers.fail_over())
    standby.kill()
    fork, end = start_and_promote(lagging)

    refusal = relay.expect(refused(2, 1, fork))
    check_fenced(servers, relay, fork, early)
    move_away(servers, relay, refusal[2])
    again = servers.space.add(relay.again())
    early.wait_replayed(end)
    check_same(lagging, early)
    wait_flushed(lagging, end)
    check_archive(again, end, primary, lagging)
    again.check_log()
