"""Replication slots on a relay, used by the programs that use a real server's.

Where it is possible the same is done with the primary's slots, and what is said is compared.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
from collections.abc import Iterator

import psycopg2  # type: ignore[import-untyped]
import psycopg2.errors  # type: ignore[import-untyped]
import pytest
from psycopg2.extras import (  # type: ignore[import-untyped]
    PhysicalReplicationConnection,
    ReplicationCursor,
    ReplicationMessage,
)

from tests.fakes import cancel_request, query, status
from tests.postgres import (
    HOST,
    Cluster,
    ReceiveWal,
    Relay,
    Workspace,
    installations,
    lsn_to_int,
    same_wal_to,
)
from tests.relays import Relayed, relayed
from tests.slotted import (
    PID,
    RawClient,
    create_slot,
    drop,
    pg_receivewal,
    position,
    segment_start,
    wait_gone,
    wait_position,
)
from tests.test_standby import STREAMING, check_same, check_streams_only_from

SLOTS = 4
"""How many slots the relay may have; the primary may have one more, for the relay."""
SENDERS = 5


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def served(request: pytest.FixtureRequest) -> Iterator[Relayed]:
    options = ("--max-replication-slots", f"{SLOTS}", "--max-wal-senders", f"{SENDERS}")
    settings = {"max_replication_slots": f"{SLOTS + 1}"}
    with relayed(request.param, *options, settings=settings) as setting:
        setting.primary.pgbench("-i", "-s", "1")
        setting.wait_flushed(setting.primary.lsn())
        yield setting


@pytest.fixture
def setting(served: Relayed) -> Iterator[Relayed]:
    """The same servers for each test; what runs besides ends with it, and leaves no slot."""
    with contextlib.ExitStack() as running:
        yield Relayed(Workspace(served.space.path, running), served.primary, served.relay)
    served.relay.check_log()


def receiver(setting: Relayed, name: str, port: int, *options: str) -> ReceiveWal:
    """pg_receivewal, archiving to a new directory."""
    directory = setting.space.directory(name)
    return setting.space.add(
        ReceiveWal(setting.primary.installation, directory, port, "--no-loop", *options)
    )


def standby(setting: Relayed, name: str, **settings: str) -> Cluster:
    """A standby of the relay, which is streaming."""
    standby = setting.space.add(setting.primary.backup_to(setting.space.path / name))
    standby.configure(**settings)
    standby.make_standby(setting.relay.conninfo).start()
    standby.wait_until(STREAMING)
    return standby


# -- pg_receivewal -------------------------------------------------------------------------------


def test_pg_receivewal_creates_and_drops(setting: Relayed) -> None:
    """With the same results as on a real server, until there are as many as there may be."""
    installation = setting.primary.installation
    create, existing, drop = "--create-slot", "--create-slot --if-not-exists", "--drop-slot"
    calls = [
        (create, "one", 0),
        (create, "one", 1),
        (existing, "one", 0),
        (existing, "two", 0),
        (create, "Three", 1),
        (create, "three", 0),
        (create, "x" * 63, 0),
        (create, "full", 1),
        (existing, "one", 0),
        (drop, "nowhere", 1),
        *((drop, name, 0) for name in ("one", "two", "three", "x" * 63)),
        (drop, "one", 1),
    ]
    for options, name, code in calls:
        call = (*options.split(), "--slot", name)
        ours = pg_receivewal(installation, setting.relay.port, *call)
        theirs = pg_receivewal(installation, setting.primary.port, *call)
        assert ours == theirs, call
        assert ours[0] == code, (call, ours)


def test_a_slot_in_use(setting: Relayed) -> None:
    """Nobody else can use or drop it, and all are told who does; whoever wants to drop it may
    wait."""
    installation = setting.primary.installation
    said: list[list[str]] = []
    for name, port in (("ours", setting.relay.port), ("theirs", setting.primary.port)):
        create, slot = "--create-slot", ("--slot", "used")
        assert pg_receivewal(installation, port, create, *slot) == (0, "")
        user = receiver(setting, f"{name}-user", port, *slot)
        user.expect("starting log streaming")
        setting.primary.switch_wal()
        user.expect("finished segment")
        refused = pg_receivewal(installation, port, "--drop-slot", *slot)
        other = receiver(setting, f"{name}-other", port, *slot)
        assert (refused[0], other.wait()) == (1, 1)
        with RawClient(port) as client:
            client.send(query("DROP_REPLICATION_SLOT used WAIT"))
            assert user.stop() == 0
            client.hear("C DROP_REPLICATION_SLOT")
        outputs = [refused[1], re.sub("starting log streaming.*", "", other.output)]
        if name == "ours":
            (pid,) = re.findall(PID.format("pg_receivewal"), setting.relay.output)[-1:]
            assert all(f'"used" is active for PID {pid}\n' in f"{text}\n" for text in outputs)
        said.append([re.sub(r"PID \d+", "PID", text) for text in outputs])
    assert said[0] == said[1]


def test_an_empty_archive_begins_where_the_slot_is(setting: Relayed) -> None:
    """Whatever has been written since; and nothing is missing."""
    relay, primary = setting.relay, setting.primary
    slot = ("--slot", "archive")
    installation = primary.installation
    assert pg_receivewal(installation, relay.port, "--create-slot", *slot) == (0, "")
    assert position(relay, "archive") is None
    first = receiver(setting, "first", relay.port, *slot, "--synchronous")
    first.expect("starting log streaming")
    end = primary.switch_wal()
    first.expect(rf"finished segment at {re.escape(end)} ")
    wait_position(setting, "archive", primary.lsn())
    assert first.stop() == 0
    here = position(relay, "archive")
    assert here is not None
    setting.write(3 * 2**20)
    second = receiver(setting, "second", relay.port, *slot)
    begun = second.expect(r"starting log streaming at (\S+) \(timeline 1\)")[1]
    assert begun == segment_start(here)
    end = primary.switch_wal()
    second.expect(rf"finished segment at {re.escape(end)} ")
    assert second.stop() == 0
    assert len(same_wal_to(end, primary.wal_dir, second.directory)) >= 4
    drop(relay, "archive")


def test_too_many(setting: Relayed) -> None:
    """Clients, and slots: they are told in PostgreSQL's words, and get their turn when others have
    gone."""
    relay, primary = setting.relay, setting.primary
    installation = primary.installation
    with contextlib.ExitStack() as connected:
        clients = [connected.enter_context(RawClient(relay.port)) for _ in range(SENDERS)]
        code, output = pg_receivewal(installation, relay.port, "--create-slot", "--slot", "late")
        assert code == 1
        # PostgreSQL 15 says it without quotes.
        quote = '"' if installation.major >= 17 else ""
        text = (
            f"FATAL:  number of requested standby connections exceeds {quote}max_wal_senders"
            f"{quote} (currently {SENDERS})"
        )
        assert text in output
        late = setting.space.add(primary.backup_to(setting.space.path / "late"))
        late.make_standby(relay.conninfo).start(wait=False)
        late.expect_log(re.escape(text))
        connected.pop_all().close()
        late.expect_log("started streaming WAL from primary")
    del clients

    for number in range(SLOTS):
        create_slot(relay, f"number_{number}")
    late.configure(wal_receiver_create_temp_slot="on")
    late.reload()
    late.expect_log("could not create replication slot .* all replication slots are in use")
    drop(relay, "number_0")
    late.expect_log("started streaming WAL from primary")
    late.stop()
    drop(relay, *(f"number_{number}" for number in range(1, SLOTS)))


# -- Standbys ------------------------------------------------------------------------------------


def test_a_standby_with_a_slot(setting: Relayed) -> None:
    """The slot goes where the standby is, and stays when that is away."""
    relay, primary = setting.relay, setting.primary
    begun = create_slot(relay, "of_standby")
    follower = standby(setting, "with-slot", primary_slot_name="of_standby")
    primary.pgbench("-n", "-t", "50")
    end = primary.lsn()
    assert lsn_to_int(end) > lsn_to_int(begun)
    wait_position(setting, "of_standby", end)
    follower.stop()
    here = position(relay, "of_standby")
    setting.write(3 * 2**20)
    primary.pgbench("-n", "-t", "50")
    assert position(relay, "of_standby") == here
    follower.start().wait_replayed(primary.lsn())
    check_same(primary, follower)
    check_streams_only_from(follower, relay)
    follower.stop()
    drop(relay, "of_standby")


def test_a_standby_with_a_temporary_slot(setting: Relayed) -> None:
    """It is there for as long as the standby streams, and nobody else can use it."""
    relay = setting.relay
    follower = standby(setting, "temporary", wal_receiver_create_temp_slot="on")
    pid = re.findall(PID.format("walreceiver"), relay.output)[-1]
    slot = f"pg_walreceiver_{pid}"
    end = setting.primary.lsn()
    wait_position(setting, slot, end)
    with RawClient(relay.port) as client:
        for command in (f"DROP_REPLICATION_SLOT {slot}", f"START_REPLICATION SLOT {slot} {end}"):
            (error,) = client.run(command)
            assert error == f'ERROR 55006: replication slot "{slot}" is active for PID {pid}'
    follower.stop()
    wait_gone(setting, slot)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_slots_outlive_the_relay(setting: Relayed, served: Relayed, end: str) -> None:
    """At positions up to which the replicas have confirmed all there was."""
    relay = setting.relay
    create_slot(relay, "outlives")
    reserved = create_slot(relay, "waits")
    assert pg_receivewal(
        setting.primary.installation, relay.port, "--create-slot", "--slot", "unused"
    ) == (0, "")
    follower = standby(setting, f"of-{end}", primary_slot_name="outlives")
    with setting.primary.client("pgbench", "-n", "-T", "600", "postgres") as work:
        for _ in range(2):
            before = setting.primary.lsn()
            wait_position(setting, "outlives", before)
            os.kill(follower.pid, signal.SIGSTOP)  # so that no new walreceiver is started
            if end == "stopped":
                relay.stop()
            else:
                relay.kill()
            served.relay = setting.relay = relay = served.space.add(relay.again())
            setting.started()
            here = position(relay, "outlives")
            os.kill(follower.pid, signal.SIGCONT)
            assert here is not None
            # It may have more by now, but not less.
            confirmed = follower.sql("SELECT pg_last_wal_receive_lsn()")
            assert lsn_to_int(here) <= lsn_to_int(confirmed)
            if end == "stopped":
                assert lsn_to_int(here) >= lsn_to_int(before)
            assert position(relay, "waits") == reserved
            assert position(relay, "unused") is None
            follower.wait_until(STREAMING)
        work.kill()
    follower.wait_replayed(setting.primary.lsn())
    check_same(setting.primary, follower)
    follower.stop()
    drop(relay, "outlives", "waits", "unused")


# -- Relays --------------------------------------------------------------------------------------


def test_a_relay_with_a_slot_on_a_relay(setting: Relayed) -> None:
    relay, primary = setting.relay, setting.primary
    options = ("--upstream-slot", "second", "--upstream-create-slot")
    second = setting.space.add(
        Relay(setting.space.directory("second-relay"), relay.conninfo, *options)
    )
    begun = second.receiving()[3]
    end = setting.write(2 * 2**20)
    wait_position(setting, "second", end)
    second.stop()
    here = position(relay, "second")
    setting.write(2 * 2**20)
    assert position(relay, "second") == here
    second = setting.space.add(second.again())
    end = setting.write(2**20)
    wait_position(setting, "second", end)
    names = same_wal_to(end, primary.wal_dir, second.directory)
    assert names[0].endswith(f"{lsn_to_int(begun) // 2**20:08X}")
    second.stop()
    second.check_log()
    drop(relay, "second")


# -- A stream that ends --------------------------------------------------------------------------


def connect(relay: Relay) -> PhysicalReplicationConnection:
    return psycopg2.connect(
        host=HOST,
        port=relay.port,
        user="postgres",
        connection_factory=PhysicalReplicationConnection,
    )


def read_message(cursor: ReplicationCursor) -> ReplicationMessage:
    while (message := cursor.read_message()) is None:
        assert select.select([cursor], [], [], 30)[0]
    return message


def test_a_stream_is_cancelled(setting: Relayed) -> None:
    """By libpq's PQcancel; the connection can be used as before, and so can the slot."""
    start = create_slot(setting.relay, "cancelled")
    end = lsn_to_int(setting.write(2**20))
    with contextlib.closing(connect(setting.relay)) as connection:
        cursor = connection.cursor()
        for _ in range(2):
            cursor.start_replication(
                slot_name="cancelled", start_lsn=start, timeline=1, decode=False
            )
            received = lsn_to_int(start)
            while received < end:
                received += len(read_message(cursor).payload)
            connection.cancel()
            with pytest.raises(
                psycopg2.errors.QueryCanceled, match="canceling statement due to user request"
            ):
                read_message(cursor)
            cursor.execute("IDENTIFY_SYSTEM")
            assert lsn_to_int(cursor.fetchone()[2]) >= end
        cursor.execute("DROP_REPLICATION_SLOT cancelled")


def test_a_cancel_request_with_a_wrong_key(setting: Relayed) -> None:
    """It does nothing, and nobody is told."""
    with RawClient(setting.relay.port) as client:
        pid, key = int.from_bytes(client.key[:4], "big"), client.key[4:]
        end = setting.write(2000)
        client.send(query(f"START_REPLICATION {end}"))
        client.hear("W")
        for wrong in (bytes(4), key[::-1], key[:3], key + b"\0"):
            with socket.create_connection((HOST, setting.relay.port), 30) as other:
                other.sendall(cancel_request(pid, wrong))
                assert other.recv(100) == b""
        client.send(status(lsn_to_int(end), reply=1))
        assert not [line for line in client.hear("k .* reply=0") if line.startswith("E")]
        with socket.create_connection((HOST, setting.relay.port), 30) as other:
            other.sendall(cancel_request(pid, key))
            assert other.recv(100) == b""
        assert client.hear("Z I")[-2:] == [
            "ERROR 57014: canceling statement due to user request",
            "Z I",
        ]


def test_a_client_that_stands_still_loses_its_slot(setting: Relayed) -> None:
    """Another one can use it when the walsender has waited for as long as the client wanted."""
    relay, primary = setting.relay, setting.primary
    create_slot(relay, "stands_still")
    slot = ("--slot", "stands_still")
    impatient = ("-d", "options='-c wal_sender_timeout=2s'")
    first = receiver(setting, "stands-still", relay.port, *slot, *impatient)
    relay.expect('"pg_receivewal" .* streams from')
    first.pause()
    relay.expect('"pg_receivewal" .*terminating walsender process due to replication timeout')
    second = receiver(setting, "goes-on", relay.port, *slot)
    second.expect("starting log streaming")
    end = primary.switch_wal()
    second.expect(rf"finished segment at {re.escape(end)} ")
    first.resume()
    assert first.wait() == 1
    assert second.stop() == 0
    assert same_wal_to(end, primary.wal_dir, second.directory)
    drop(relay, "stands_still")
