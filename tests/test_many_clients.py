"""Two hundred clients at once on one walsender, not all of them well-behaved.

A primary writes WAL that most of them want at once.  Those that read slowly, not at all, or only
ask, hold up nobody and cost little; those that are not there are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crowd import Client, Crowd, Flooding, Silent, Slow, Wal
from tests.demo_report import contents
from tests.postgres import (
    Cluster,
    ReceiveWal,
    WalSender,
    Workspace,
    installations,
    is_segment,
    lsn_to_int,
    same_wal,
    workspace,
)

SEGMENT = 2**20
GOOD, SLOW, SILENT, FLOODING = 168, 10, 10, 10
TIMEOUT = 4
"""Seconds of silence, behind which the walsender gives a client up."""


@pytest.fixture
def space() -> Iterator[Workspace]:
    with workspace() as made:
        yield made


def memory(pid: int, what: str) -> int:
    """Bytes of memory that a process has in use (VmRSS), or had at the most (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"{what}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    files = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(file.startswith("socket:") for file in files)


def streaming_standby(space: Workspace, primary: Cluster, sender: WalSender) -> Cluster:
    standby = space.add(primary.backup_to(space.path / "standby"))
    standby.make_standby(sender.conninfo).start()
    standby.wait_until("SELECT status = 'streaming' FROM pg_stat_wal_receiver")
    return standby


@pytest.mark.parametrize("workers", [0, 2])
def test_nobody_is_held_up_by_anybody(
    space: Workspace, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    installation = installations()[0]
    primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
    primary.pgbench("-i", "-s", "1")
    options = ["--wal-sender-timeout", f"{TIMEOUT}s", "--max-wal-senders", "300"]
    options += ["--workers", str(workers)]
    sender = space.add(WalSender(primary.wal_dir, *options))
    sender.ready()
    standby = streaming_standby(space, primary, sender)
    archive = space.directory("archive")
    start = min(path.name for path in primary.wal_dir.iterdir() if is_segment(path.name))
    space.file(archive / f"{start}.partial")
    before, without_crowd = memory(sender.pid, "VmRSS"), sockets(sender.pid)

    first = int(start[8:], 16) * SEGMENT
    wal = Wal(primary.wal_dir, SEGMENT)
    numbers = {Client: GOOD, Slow: SLOW, Silent: SILENT, Flooding: FLOODING}
    clients = [
        kind(sender.port, first, wal) for kind, number in numbers.items() for _ in range(number)
    ]
    good = [client for client in clients if type(client) is Client]
    slow = [client for client in clients if isinstance(client, Slow)]
    silent = [client for client in clients if isinstance(client, Silent)]
    flooding = [client for client in clients if isinstance(client, Flooding)]
    with Crowd(clients) as crowd:
        receiver = space.add(ReceiveWal(installation, archive, sender.port, "-s", "1"))
        primary.pgbench("-n", "-c", "2", "-t", "200")
        end = primary.switch_wal()
        crowd.wait(lambda: all(client.lsn >= lsn_to_int(end) for client in good))
        receiver.expect(f"finished segment at {end} ")
        standby.wait_replayed(primary.lsn())
        assert not any(client.lsn >= lsn_to_int(end) for client in slow)
        streamed = lsn_to_int(end) - first

        # Those that have never answered are gone, and only those.
        for _ in silent:
            sender.expect('"silent" .*terminating walsender process due to replication timeout')
        crowd.wait(lambda: all(client.gone for client in silent))
        crowd.wait(lambda: all(client.asked >= 1000 for client in flooding))
        assert {type(client) for client in clients if client.gone} == {Silent}
        assert sockets(sender.pid) == without_crowd + GOOD + SLOW + FLOODING + 1

        # The others are still there, and those that begin to read get the same as everybody.
        primary.pgbench("-n", "-t", "50")
        end = primary.switch_wal()
        for client in slow:
            client.hurries = True
        receiver.expect(f"finished segment at {end} ")
        crowd.wait(lambda: all(client.lsn >= lsn_to_int(end) for client in [*good, *slow]))
        standby.wait_replayed(primary.lsn())
        most = memory(sender.pid, "VmHWM")
    assert receiver.stop() == 0
    assert len(same_wal(primary.wal_dir, archive)) >= 10
    assert contents(standby, "pgbench_accounts") == contents(primary, "pgbench_accounts")
    assert len(re.findall("started streaming WAL", standby.log_text())) == 1
    sender.check_log()

    each = (most - before) // (len(clients) + 1)
    with capsys.disabled():
        print(
            f"\n{len(clients) + 2} clients, {streamed / 1e6:.0f} MB to each: the walsender"
            f"{' with workers' if workers else ''} took"
            f" {before / 1e6:.0f} MB before and {most / 1e6:.0f} MB at the most,"
            f" {each / 1000:.0f} kB for each of them"
        )
    # To hold back the stream for those who do not read it would take all of it for each of them.
    assert most - before < streamed * (SLOW + SILENT + FLOODING) / 4
    assert each < 2**18
