"""A relay whose disk is full, or broken, or slow."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faulty import MADE, Call, Disk, FaultyRelay, fails, short
from tests.postgres import (
    Cluster,
    ReceiveWal,
    Relay,
    identify_system,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal_to,
    workspace,
)
from tests.relays import SEGMENT, SLOT, Relayed, relayed

QUICK = {"wal_sender_timeout": "3s"}
"""The primary's settings, so that it soon misses a relay that says nothing."""

LONGER = "SELECT pg_sleep(5)"
"""What the primary executes to wait longer than that."""

WAITING = "(SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep')"


def archive_of(setting: Relayed, end: int) -> Path:
    """What a new pg_receivewal gets from the relay, up to `end`."""
    oldest = min(path.name for path in setting.directory.iterdir())
    archive = setting.space.directory("archive")
    setting.space.file(archive / f"{oldest[:24]}.partial")
    until = f"--endpos={int_to_lsn(end - 1)}"  # it ends when it has more
    receiver = setting.space.add(
        ReceiveWal(setting.primary.installation, archive, setting.relay.port, until)
    )
    assert receiver.wait() == 0, receiver.output
    return archive


def connection(primary: Cluster) -> str:
    """Which connection the relay has to the primary."""
    return primary.sql("SELECT pid FROM pg_stat_replication WHERE application_name = 'walproto'")


def check_pauses(setting: Relayed, complaint: str) -> None:
    """The disk is full, or about to be: receiving pauses, serving goes on."""
    primary, relay = setting.primary, setting.relay
    setting.write(4 * SEGMENT, wait=False)
    relay.expect(
        rf"#critical\] cannot write to .*: {complaint}: receiving pauses until it can be written "
        "to again; what is here is served"
    )
    held = setting.told("flush_lsn")
    assert held < lsn_to_int(primary.sql("SELECT pg_current_wal_flush_lsn()"))
    served = lsn_to_int(identify_system(primary.installation, relay.port)[2])
    assert held - 2000 < served <= held  # it ends within a record
    same_wal_to(int_to_lsn(served), primary.wal_dir, archive_of(setting, served))
    assert relay.running
    assert "writing to" not in relay.output


def check_goes_on(setting: Relayed, complaint: str) -> None:
    """There is room again: it goes on by itself, over the same connection, and has lost nothing."""
    setting.relay.expect(r"#warn\] writing to .* again")
    names = setting.check_archive(rf"cannot write to .*: {complaint}")
    assert len(names) >= 3
    assert len(re.findall("receiving from", setting.relay.output)) == 1


# -- Full ----------------------------------------------------------------------------------------


def test_files_may_not_grow() -> None:
    """A limit on the size of files; the segment that is being written lacks its last byte."""
    with relayed(installations()[0], settings=QUICK) as setting:
        soft, hard = resource.prlimit(setting.relay.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(setting.relay.pid, resource.RLIMIT_FSIZE, (SEGMENT - 1, hard))
        check_pauses(setting, os.strerror(errno.EFBIG))
        setting.primary.sql(LONGER)
        resource.prlimit(setting.relay.pid, resource.RLIMIT_FSIZE, (soft, hard))
        check_goes_on(setting, os.strerror(errno.EFBIG))


@pytest.mark.parametrize("when", ["at once", "behind some bytes", "for a new segment"])
def test_the_disk_is_full(when: str) -> None:
    disk = Disk()
    with relayed(installations()[0], disk=disk) as setting:
        left = 1 if when == "behind some bytes" else 0

        def full(call: Call) -> str:
            nonlocal left
            if call.name == "pwritev" and when != "for a new segment":
                left -= 1
                return fails(errno.ENOSPC) if left < 0 else short(call.size // 2)
            return fails(errno.ENOSPC) if call.name == "posix_fallocate" else MADE

        disk.plan = full
        check_pauses(setting, os.strerror(errno.ENOSPC))
        disk.plan = lambda call: MADE
        check_goes_on(setting, os.strerror(errno.ENOSPC))


SMALL_DISK = (
    *("unshare", "-rm", "sh", "-c"),
    'mount -t tmpfs -o size=16m none "$0" && mkdir "$0/relay" && exec "$@"',
)
"""A command that runs another one, for which the directory named first is a small disk."""


@contextmanager
def on_a_small_disk() -> Iterator[tuple[Relayed, Path]]:
    """A relay that writes to a disk of 16 MB; and where we see that disk."""
    with workspace() as space:
        place = space.directory("small")
        attempt = [*SMALL_DISK, str(place), sys.executable, "-c", ""]
        if problem := subprocess.run(attempt, capture_output=True, text=True).stderr:
            pytest.skip(f"no file system can be mounted here: {problem.strip()}")
        primary = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1)
        primary.start()
        relay = space.add(
            FaultyRelay(
                Disk(), place / "relay", primary.conninfo, *SLOT, within=[*SMALL_DISK, place]
            )
        )
        relay.ready()
        seen = Path(f"/proc/{relay.pid}/root{place}")
        relay.directory = seen / "relay"
        setting = Relayed(space, primary, relay)
        setting.wait_flushed(primary.lsn())
        yield setting, seen


def test_a_small_disk_is_full() -> None:
    with on_a_small_disk() as (setting, place):
        status = os.statvfs(place)
        ballast = place / "ballast"
        ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - SEGMENT * 3 // 2))
        check_pauses(setting, os.strerror(errno.ENOSPC))
        ballast.unlink()
        check_goes_on(setting, os.strerror(errno.ENOSPC))


# -- Broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fdatasync", "fsync", "rename"])
def test_the_disk_is_broken(name: str) -> None:
    """What could not be synced is not acknowledged, neither then nor later; it ends by itself, and
    started again it goes on."""
    disk = Disk()
    with relayed(installations()[0], disk=disk) as setting:
        primary, space = setting.primary, setting.space
        primary.sql("CREATE TABLE rows (id int)")
        setting.write(2 * SEGMENT)
        receiver = space.add(
            ReceiveWal(primary.installation, space.directory("archive"), setting.relay.port)
        )
        receiver.expect("starting log streaming")
        primary.configure(synchronous_standby_names="walproto")
        primary.reload()
        primary.wait_until("EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')")
        primary.sql("INSERT INTO rows VALUES (1)")

        disk.hold(name)
        disk.plan = lambda call: fails(errno.EIO) if call.name == name else MADE
        # It goes on in the next segment, for which there is something of everything to be done.
        script = f"""
            INSERT INTO rows VALUES (2);
            SELECT pg_logical_emit_message(false, 'relay', repeat('x', {2 * SEGMENT}));
            INSERT INTO rows VALUES (3)"""
        with primary.client("psql", "-Xqc", script, "postgres") as client:
            disk.wait_held()
            primary.wait_until(f"{WAITING} = 1")
            synced = disk.synced_to(SEGMENT)
            assert setting.told("flush_lsn") <= synced
            disk.release()
            assert setting.relay.wait() == os.EX_IOERR, setting.relay.output
            setting.check_complaints(r"#critical\] nothing more is received: .*Input/output error")
            slot = primary.sql("SELECT restart_lsn FROM pg_replication_slots")
            assert lsn_to_int(slot) <= synced
            assert synced == disk.synced_to(SEGMENT)
            assert primary.sql(f"SELECT {WAITING}") == "1"
            receiver.expect("replication stream was terminated before stop point")
            receiver.expect("disconnected")
            assert "unexpectedly" not in receiver.output
            (shown,) = receiver.directory.glob("*.partial")
            begin = int(shown.name[16:24], 16) * SEGMENT
            assert shown.read_bytes()[synced - begin :].strip(b"\0") == b""

            setting.relay = space.add(
                Relay(
                    setting.directory,
                    setting.relay.upstream,
                    *setting.relay.options,
                    port=setting.relay.port,
                )
            )
            assert client.wait() == 0, client.output
        assert primary.sql("SELECT id FROM rows ORDER BY id") == "1\n2\n3"
        setting.check_archive()


# -- Slow ----------------------------------------------------------------------------------------


def test_the_disk_is_slow() -> None:
    """Nothing counts before it is synced; and then one sync does for many commits."""
    disk = Disk()
    options = ("--wal-receiver-timeout", "3s")
    with relayed(installations()[0], *options, disk=disk, settings=QUICK) as setting:
        primary, relay = setting.primary, setting.relay
        primary.sql("CREATE TABLE rows (id int)")
        setting.write(1000)
        primary.configure(synchronous_standby_names="walproto")
        primary.reload()
        primary.wait_until("EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')")
        script = setting.space.file(
            setting.space.path / "script", b"INSERT INTO rows VALUES (:client_id);"
        )
        disk.hold("fdatasync")
        before = connection(primary)
        with primary.client(
            "pgbench", "-n", "-c", "20", "-t", "1", "-f", script, "postgres"
        ) as load:
            disk.wait_held()
            primary.wait_until(f"{WAITING} = 20")
            synced = disk.synced_to(SEGMENT)
            assert setting.told("flush_lsn") <= synced < setting.told("write_lsn")
            primary.sql(LONGER)
            assert primary.sql(f"SELECT {WAITING}") == "20"
            assert setting.told("flush_lsn") <= synced
            assert lsn_to_int(identify_system(primary.installation, relay.port)[2]) <= synced
            assert connection(primary) == before
            syncs = disk.counts()["fdatasync"]
            disk.release()
            assert load.wait() == 0, load.output
        assert primary.sql("SELECT count(*) FROM rows") == "20"
        assert disk.counts()["fdatasync"] - syncs <= 5
        setting.check_archive()
        assert len(re.findall("receiving from", relay.output)) == 1
