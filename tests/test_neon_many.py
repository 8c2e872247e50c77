"""A thousand timelines in one process, a hundred of which stream; some that are damaged harm none.

Every timeline has the same real WAL, by hard links, and a control file of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crowd import Client, Crowd, Wal
from tests.neon_trees import RealWal, Safekeeper, Tree, ids_of, wal_of
from tests.pageserver import ServerError, Standby
from tests.postgres import Workspace, installations, int_to_lsn, workspace
from tests.safekeeper import put_file
from tests.wal_decoder import SEGMENT
from walproto.neon.control_file import build_control

TIMELINES, STREAMING, TENANTS = 1000, 100, 10
EVERY = 5
"""Of so many that stream one is a pageserver."""


class Pageserver(Client):
    """It is always behind with its decoding, and so it is not ended when it has all."""

    def status(self, reply_requested: bool = False) -> bytes:
        pairs = b"ps_writelsn\0" + struct.pack(">IQ", 8, self.lsn - 1)
        feedback = struct.pack(">cQB", b"z", len(pairs) + 1, 1) + pairs
        return struct.pack(">cI", b"d", len(feedback) + 4) + feedback


class Known(Wal):
    """WAL that is in memory."""

    def __init__(self, wal: RealWal) -> None:
        self.wal = wal

    def read(self, lsn: int, size: int) -> bytes:
        return self.wal.read(lsn, lsn + size)


def some_wal(space: Workspace) -> RealWal:
    """Little, as most databases have: a whole segment, and the beginning of another."""
    primary = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1).start()
    primary.switch_wal()
    start = primary.lsn()
    primary.sql("SELECT pg_logical_emit_message(true, 'long', repeat('y', 1100000))")
    primary.sql("CREATE TABLE lines AS SELECT n FROM generate_series(1, 500) n")
    primary.lsn()
    wal = wal_of(primary, start)
    primary.stop()
    return wal


@dataclass
class Sizes:
    """What a process takes, in bytes and numbers."""

    rss: int
    pss: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Sizes:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kilobytes = {name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(kilobytes["Rss"] * 1024, kilobytes["Pss"] * 1024, files)

    def __str__(self) -> str:
        return f"RSS {self.rss / 1e6:.0f} MB, PSS {self.pss / 1e6:.0f} MB, {self.files} files open"


def make_all(wal: RealWal, data_dir: Path, source: Path, commit_lsn: int) -> list[Tree]:
    """The timelines; what they share is in `source`."""
    first = wal.start - wal.start % SEGMENT
    wal.put(source, first=first)
    names = os.listdir(source)
    trees = []
    for number in range(TIMELINES):
        tree = Tree(data_dir, ids_of(number, tenant=number % TENANTS), wal)
        tree.directory.mkdir(parents=True)
        for name in names:
            os.link(source / name, tree.directory / name)
        put_file(tree.directory, build_control(wal.control(tree.ids, commit_lsn)))
        trees.append(tree)
    return trees


def identify(sender: Safekeeper, tree: Tree) -> str:
    """The LSN that IDENTIFY_SYSTEM gives."""
    with Standby(sender.port, tree.options) as client:
        ((system, tli, lsn, _),) = client.query("IDENTIFY_SYSTEM")
    assert (system, tli) == (str(tree.wal.system_id), "1")
    return lsn


def refusal(sender: Safekeeper, tree: Tree) -> str:
    with pytest.raises(ServerError) as refused:
        identify(sender, tree)
    return str(refused.value)


def check_refused_meanwhile(standby: Standby) -> None:
    """It streams, and is then told that there is something wrong with what it streams from."""
    with pytest.raises(ServerError, match=r"safekeeper\.control|the directory of timeline"):
        standby.take_all()


def check_stops_at(standby: Standby, lsn: int) -> None:
    """It gets nothing from `lsn` on, and is told that something is wrong there."""
    standby.begin(standby.start)
    with pytest.raises(ServerError):
        standby.take_all()
    assert standby.lsn <= lsn


def damage(tree: Tree, wal: RealWal) -> int:
    """Have one byte of a timeline's WAL be another, somewhere in what is committed; its LSN."""
    lsn = wal.start + (SEGMENT - wal.start % SEGMENT) // 2
    path = tree.directory / wal.name(lsn)
    contents = bytearray(path.read_bytes())
    contents[lsn % SEGMENT] ^= 0xFF
    path.unlink()  # the others have it, too
    path.write_bytes(contents)
    return lsn


def test_a_thousand_timelines(capsys: pytest.CaptureFixture[str]) -> None:
    with workspace() as space:
        wal = some_wal(space)
        data_dir, source = space.directory("data"), space.directory("source")
        commit_lsn = wal.records[len(wal.records) // 2].end
        trees = make_all(wal, data_dir, source, commit_lsn)
        streaming, others = trees[:STREAMING], trees[STREAMING:]
        bad, victim, removed, flawed, *_ = others
        put_file(bad.directory, bad.control_file.read_bytes()[:-1] + b"?")
        flaw = damage(flawed, wal)

        began = time.monotonic()
        sender = space.add(Safekeeper(data_dir, "--max-wal-senders", str(2 * STREAMING)))
        identify(sender, trees[-1])
        started = time.monotonic()
        before = Sizes.of(sender.pid)
        for tree in trees:
            if tree is not bad:
                assert identify(sender, tree) == int_to_lsn(commit_lsn)
        opened, asked = Sizes.of(sender.pid), time.monotonic()

        known = Known(wal)
        clients = [
            (Client if number % EVERY else Pageserver)(
                sender.port, wal.start, known, f"{tree.options} -c pageserver_connstr=port=1"
            )
            for number, tree in enumerate(streaming)
        ]
        with (
            Crowd(clients) as crowd,
            Standby(sender.port, victim.options) as first,
            Standby(sender.port, removed.options) as second,
        ):
            for standby in (first, second):
                standby.begin(wal.start)
                standby.take_to(commit_lsn)
            crowd.wait(lambda: all(client.lsn == commit_lsn for client in clients))

            # What is wrong with one is told to its clients, and to nobody else.
            assert "safekeeper.control" in refusal(sender, bad)
            put_file(victim.directory, victim.control_file.read_bytes()[:-1] + b"?")
            check_refused_meanwhile(first)
            shutil.rmtree(removed.directory)
            check_refused_meanwhile(second)
            assert "does not exist" in refusal(sender, removed)
            with Standby(sender.port, flawed.options) as unlucky:
                unlucky.start = wal.start
                check_stops_at(unlucky, flaw)

            # One that was not there when the server started.
            new = Tree(data_dir, ids_of(TIMELINES), wal)
            assert "does not exist" in refusal(sender, new)
            new.make(wal.end)
            with Standby(sender.port, new.options) as third:
                third.begin(wal.start)
                third.take_to(wal.end)
                assert third.wal == wal.read(wal.start, wal.end)

            for tree in streaming:
                put_file(tree.directory, build_control(wal.control(tree.ids, wal.end)))
            crowd.wait(lambda: all(client.lsn == wal.end for client in clients))
            during = Sizes.of(sender.pid)
            assert all(client.streams and not client.gone for client in clients)
        assert (opened.pss - before.pss) / TIMELINES < 100_000
        assert (during.pss - opened.pss) / STREAMING < 500_000
        assert during.files < TIMELINES  # segments are not kept open for all of them
        assert identify(sender, trees[-1]) == int_to_lsn(commit_lsn)
        sender.check_log()
    with capsys.disabled():
        print(
            f"\n{TIMELINES} timelines: the first answer came {started - began:.1f} s after the "
            f"start, {before}; each asked for, one after the other, in {asked - started:.1f} s, "
            f"{opened}; {STREAMING} streaming, {(wal.end - wal.start) / 1e6:.1f} MB to each, "
            f"{during}"
        )
