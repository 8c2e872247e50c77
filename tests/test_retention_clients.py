"""WAL is kept for the replicas that need it, and removed when none does.

The primary keeps none that its own slot for the relay does not need: what a standby gets that was
away, only the relay still had.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping

import pytest

from tests.failover import fork_of, two_servers, wait_flushed, write
from tests.fakes import COPY_DONE, query, status
from tests.postgres import (
    Cluster,
    Failed,
    Installation,
    WalSender,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal,
    workspace,
)
from tests.relays import SEGMENT, SLOT, Relayed, relayed, seeded
from tests.slotted import (
    FORGETFUL,
    KEEP,
    MUCH,
    REMOVED,
    RawClient,
    archived,
    check_archive,
    check_little_is_left,
    create_slot,
    drop,
    finished,
    forget,
    number,
    numbers,
    pg_receivewal,
    position,
    receiver,
    standby_with_slot,
    wait_position,
    wait_removed,
)
from tests.test_many_clients import memory
from tests.test_standby import STREAMING, check_same, check_streams_only_from, connections


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def setting(request: pytest.FixtureRequest) -> Iterator[Relayed]:
    """A relay and a primary that keep little; the relay waits for clients that stand still."""
    options = ("--wal-keep-size", f"{KEEP}MB", "--wal-sender-timeout", "0")
    with relayed(request.param, *options, settings=FORGETFUL) as setting:
        setting.primary.pgbench("-i", "-s", "1")
        setting.wait_flushed(setting.primary.lsn())
        yield setting


newest_only = pytest.mark.parametrize("setting", installations()[:1], indirect=True, ids=["newest"])
"""For what is about us more than about the client."""


# -- Away ----------------------------------------------------------------------------------------


def test_a_standby_that_was_away(setting: Relayed) -> None:
    """Its WAL is kept, and no more; then it catches up by streaming alone."""
    relay, primary = setting.relay, setting.primary
    before = create_slot(relay, "before")
    setting.write(3 * SEGMENT)
    standby = standby_with_slot(setting, "standby")
    primary.pgbench("-n", "-t", "100")
    wait_position(setting, "standby", primary.lsn())
    standby.stop()
    here = position(relay, "standby")
    assert here is not None
    setting.write(20 * SEGMENT)
    primary.pgbench("-n", "-t", "100")
    end = setting.write(5 * SEGMENT)
    forget(primary)
    assert numbers(primary.wal_dir)[0] > number(here) + 20
    assert numbers(relay.directory)[0] <= number(before)
    drop(relay, "before")
    assert wait_removed(relay, number(here)).endswith('replication slot "standby"')
    standby.start().wait_replayed(end)
    check_same(primary, standby)
    check_streams_only_from(standby, relay)
    assert "already been removed" not in standby.log_text()
    wait_position(setting, "standby", end)
    check_little_is_left(setting)
    check_archive(setting)


@newest_only
def test_and_the_relay_was_killed_meanwhile(setting: Relayed) -> None:
    """At any time; whenever it is back there is all that slots reserve, without a hole."""
    rng = seeded()
    primary = setting.primary
    standby = standby_with_slot(setting, "standby")

    def kill() -> int:
        """Where the slot is when the relay is back."""
        setting.relay.kill()
        oldest = numbers(setting.directory)[0]
        setting.restart_relay()
        setting.started()
        there = position(setting.relay, "standby")
        assert there is not None
        assert oldest <= number(there)
        return lsn_to_int(there)

    with setting.load() as load:
        for _ in range(3):
            setting.relay.expect(REMOVED.pattern)
            there = kill()
            assert there <= lsn_to_int(standby.sql("SELECT pg_last_wal_receive_lsn()"))
        standby.stop()
        here = position(setting.relay, "standby")
        assert here is not None
        for _ in range(3):
            primary.sql(f"SELECT pg_sleep({rng.uniform(0, 1.5)})")
            assert kill() <= lsn_to_int(here)
        load.kill()
    assert number(setting.write(20 * SEGMENT)) > number(here) + 20
    forget(primary)
    standby.start().wait_replayed(primary.lsn())
    check_same(primary, standby)
    check_streams_only_from(standby, setting.relay)
    assert "already been removed" not in standby.log_text()
    wait_position(setting, "standby", primary.lsn())
    check_little_is_left(setting)
    check_archive(setting)


# -- Slow ----------------------------------------------------------------------------------------


def walreceiver(standby: Cluster) -> int:
    return int(standby.sql("SELECT pid FROM pg_stat_wal_receiver"))


@newest_only
def test_slow_replicas_without_slots(setting: Relayed) -> None:
    """What they still have to read stays for as long as they are connected."""
    relay, primary = setting.relay, setting.primary
    create_slot(relay, "before")
    standby = setting.space.add(primary.backup_to(setting.space.path / "slow"))
    standby.make_standby(relay.conninfo).start()
    standby.wait_until(STREAMING)
    slow = receiver(setting, "archive")
    slow.expect("starting log streaming")
    setting.write(2 * SEGMENT)
    end = primary.switch_wal()
    slow.expect(finished(end))
    standby.wait_replayed(end)

    slow.pause()
    pid = walreceiver(standby)
    os.kill(pid, signal.SIGSTOP)
    end = setting.write(MUCH)
    forget(primary)
    drop(relay, "before")
    relay.expect(REMOVED.pattern + r'"(walreceiver|pg_receivewal)" \(pid \d+')
    assert numbers(setting.directory)[0] < number(end) - KEEP
    os.kill(pid, signal.SIGCONT)
    slow.resume()
    standby.wait_replayed(end)
    end = primary.switch_wal()
    slow.expect(finished(end))
    assert len(same_wal(archived(setting, end), slow.directory)) > MUCH // SEGMENT
    check_little_is_left(setting)

    slow.pause()
    end = setting.write(MUCH)
    assert numbers(setting.directory)[0] < number(end) - KEEP
    slow.kill()
    check_little_is_left(setting)
    check_archive(setting)


# -- Many ----------------------------------------------------------------------------------------


def test_five_hundred_slots() -> None:
    many = 500
    options = ("--wal-keep-size", "1MB", "--max-replication-slots", f"{many}")
    with relayed(installations()[0], *options, settings=FORGETFUL) as setting:
        setting.write(2 * SEGMENT)
        begun = lsn_to_int(create_slot(setting.relay, "slot_0"))
        end = lsn_to_int(setting.write(20 * SEGMENT))
        positions = {f"slot_{n}": begun + (end - begun) * n // many // 8 * 8 for n in range(many)}
        clock = time.monotonic()
        with RawClient(setting.relay.port) as client:
            for slot, lsn in positions.items():
                if slot != "slot_0":
                    answer = client.run(f"CREATE_REPLICATION_SLOT {slot} PHYSICAL")
                    assert answer[-1] == "C CREATE_REPLICATION_SLOT"
                client.send(query(f"START_REPLICATION SLOT {slot} {int_to_lsn(end)}"))
                client.send(status(end, lsn), COPY_DONE)
                client.hear("Z I")
        assert wait_removed(setting.relay, begun // SEGMENT).endswith('"slot_0"')
        setting.relay.stop()
        setting.restart_relay()
        setting.started()
        check_positions(setting, positions)
        print(f"{time.monotonic() - clock:.1f} s, {memory(setting.relay.pid, 'VmRSS') >> 20} MB")

        slow = [f"slot_{n}" for n in range(many // 2)]
        drop(setting.relay, *slow)
        for slot in slow:
            del positions[slot]
        wait_removed(setting.relay, min(positions.values()) // SEGMENT)
        setting.relay.kill()
        setting.restart_relay()
        setting.started()
        check_positions(setting, positions)
        setting.relay.check_log()


def check_positions(setting: Relayed, positions: Mapping[str, int]) -> None:
    """There are just these slots, where they are said to be."""
    with RawClient(setting.relay.port) as client:
        for slot, lsn in positions.items():
            assert client.position(slot) == int_to_lsn(lsn), slot
        gone = {f"slot_{n}" for n in range(500)} - set(positions)
        assert not any(client.position(slot) for slot in gone)


# -- Nothing is removed --------------------------------------------------------------------------


def test_without_wal_keep_size_all_is_kept() -> None:
    """And a slot may keep as much as it likes."""
    with relayed(installations()[0], settings=FORGETFUL) as setting:
        create_slot(setting.relay, "slot")
        begun = numbers(setting.directory)[0]
        end = setting.write(MUCH)
        forget(setting.primary)
        # Time for several looks.
        setting.primary.sql("SELECT pg_sleep(3)")
        assert len(numbers(setting.directory)) == number(end) - begun + 1
        assert "removed" not in setting.relay.output
        check_archive(setting)


def test_a_directory_that_is_not_ours() -> None:
    """There are no slots on it, and nothing is to be kept or removed there."""
    installation = installations()[0]
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        sender = space.add(WalSender(primary.wal_dir))
        sender.ready()
        code, output = pg_receivewal(installation, sender.port, "--create-slot", "--slot", "slot")
        assert code == 1
        assert "all replication slots are in use" in output
        for option in ("--wal-keep-size", "--max-slot-wal-keep-size", "--max-replication-slots"):
            with pytest.raises(Failed, match=f"{option} means nothing without --upstream"):
                WalSender(primary.wal_dir, option, "5")
        sender.check_log()


EIGHT_SEGMENTS = (
    "SELECT max(pg_logical_emit_message(true, 'relay', repeat('x', 950)))"
    f" FROM generate_series(1, {8 * SEGMENT // 1000})"
)


# -- Timelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("installation", installations()[:1], ids=["newest"])
def test_the_upstream_is_promoted(installation: Installation) -> None:
    """A standby that was away since before catches up over the switch; then the old timeline's
    segments go, its end remains known."""
    with two_servers(installation) as servers:
        primary, successor = servers.primary, servers.standby
        relay = servers.relay("relay", servers.either, *SLOT, "--wal-keep-size", f"{KEEP}MB")
        create_slot(relay, "follower")
        follower = servers.backup("follower", relay.conninfo)
        follower.configure(primary_slot_name="follower")
        follower.start().wait_until(STREAMING)
        follower.stop()
        here = position(relay, "follower")
        assert here is not None
        primary.sql(EIGHT_SEGMENTS)
        servers.fail_over()
        fork = number(fork_of(successor))
        successor.sql(EIGHT_SEGMENTS)
        end = write(successor)
        wait_flushed(successor, end)
        assert numbers(relay.directory)[0] <= number(here) < fork - 8
        follower.start().wait_replayed(end)
        check_same(successor, follower)
        check_streams_only_from(follower, relay)
        assert [tli for _, tli in connections(follower)] == ["1", "1", "2"]
        wait_removed(relay, number(end) - KEEP)
        assert number(end) - KEEP > fork
        names = sorted(path.name for path in relay.directory.iterdir())
        assert "00000002.history" in names
        assert not any(name.startswith(f"{1:08X}") for name in names)
        relay.check_log()
