"""PostgreSQL's own clients on one timeline of a data directory, which they name by `options`.

All WAL is on disk, and the commit LSN moves over it to its end; nobody gets a byte beyond it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from tests.demo_report import contents
from tests.neon_trees import RealWal, Safekeeper, Tree, ids_of, wal_of, work_on
from tests.pageserver import Pageserver, ServerError, Standby
from tests.postgres import (
    Cluster,
    Failed,
    Installation,
    ReceiveWal,
    Workspace,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal_to,
    workspace,
)
from tests.relays import seeded
from tests.wal_decoder import SEGMENT

COMMAND = "START_REPLICATION {} TIMELINE 1"


@dataclass
class Setting:
    """A primary, the WAL that it has written behind `backup`, and a server of timelines of it."""

    space: Workspace
    primary: Cluster
    standby: Cluster
    """One that has not started yet."""
    wal: RealWal
    pg_wal: Path
    """The primary's WAL, in whole segments."""
    data_dir: Path
    sender: Safekeeper
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def installation(self) -> Installation:
        return self.primary.installation

    def tree(self) -> Tree:
        """A timeline that is yet to be made."""
        return Tree(self.data_dir, ids_of(next(self._numbers)), self.wal)

    def conninfo(self, tree: Tree) -> str:
        return f"{self.sender.conninfo} options='{tree.options}'"

    def ask(self, command: str, conninfo: str) -> list[str]:
        """What psql gets for an answer, a line for each row."""
        arguments = ("-XAtq", "-F", " ", "-c", command, f"{conninfo} replication=true")
        return self.installation.run("psql", *arguments).stdout.splitlines()


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    with workspace() as space:
        primary = space.cluster(request.param, "primary").init(wal_segsize_mb=1).start()
        standby = space.add(primary.backup_to(space.path / "standby"))
        start = primary.lsn()
        work_on(primary)
        wal = wal_of(primary, start)
        data_dir, pg_wal = space.directory("data"), space.directory("pg_wal")
        for lsn in range(wal.first, wal.end, SEGMENT):
            (pg_wal / wal.name(lsn)).write_bytes(wal.segment(lsn))
        sender = space.add(Safekeeper(data_dir))
        yield Setting(space, primary, standby, wal, pg_wal, data_dir, sender)
        sender.check_log()


def commit_lsns(wal: RealWal) -> list[int]:
    """Some steps to the end, at the ends of records and anywhere."""
    chance = seeded()
    records = [record.end for record in chance.sample(wal.records, 5)]
    anywhere = [chance.randrange(wal.start, wal.end) for _ in range(5)]
    return [*sorted(records + anywhere), wal.end]


def check_nothing_beyond(wal: RealWal, archive: Path, lsn: int) -> None:
    """There is no byte in the archive that is from behind `lsn`."""
    segment = lsn - lsn % SEGMENT
    for path in archive.iterdir():
        name, _, suffix = path.name.partition(".")
        assert name <= wal.name(lsn)
        if name == wal.name(segment):
            assert suffix == "partial"
            assert not any(path.read_bytes()[lsn - segment :])


def test_pg_receivewal(setting: Setting) -> None:
    wal, space = setting.wal, setting.space
    first, *others = commit_lsns(wal)
    tree = setting.tree().make(first)
    archive = space.directory("archive")
    space.file(archive / f"{wal.name(wal.first)}.partial")  # it begins there
    # It ends when it has more than that.
    end = ("--endpos", int_to_lsn(wal.end - 1), "--no-loop")
    options = ("-d", f"options='{tree.options}'", *end)
    receiver = space.add(ReceiveWal(setting.installation, archive, setting.sender.port, *options))
    finished = wal.first
    for lsn in (first, *others):
        tree.commit(lsn)
        for border in range(finished + SEGMENT, lsn + 1, SEGMENT):
            receiver.expect(f"finished segment at {int_to_lsn(border)} ")
            finished = border
        if lsn % SEGMENT:
            check_nothing_beyond(wal, archive, lsn)
    assert receiver.wait() == 0
    assert same_wal_to(int_to_lsn(wal.end), setting.pg_wal, archive) == [
        wal.name(lsn) for lsn in range(wal.first, finished, SEGMENT)
    ]


def test_a_standby(setting: Setting) -> None:
    """It replays what is committed, and in the end it has the same rows as the primary."""
    wal, standby = setting.wal, setting.standby
    tree = setting.tree().make(wal.start)
    standby.make_standby(setting.conninfo(tree)).start()
    standby.wait_replayed(int_to_lsn(wal.start))
    chance = seeded()
    most = [it for it in wal.records if it.size > 24]  # none of XLOG_SWITCH, which ends elsewhere
    records = [*sorted(chance.sample(most, 5), key=lambda it: it.lsn), wal.records[-1]]
    for record in records:
        tree.commit(record.end)
        standby.wait_replayed(int_to_lsn(record.end))
        received = standby.sql(
            "SELECT pg_last_wal_replay_lsn(), flushed_lsn FROM pg_stat_wal_receiver"
        )
        assert {lsn_to_int(lsn) for lsn in received.split("|")} == {record.end}
    assert contents(standby, "lines") == contents(setting.primary, "lines")
    assert standby.sql("SELECT count(*) FROM lines") == "12000"
    assert standby.sql("SELECT DISTINCT sender_port FROM pg_stat_wal_receiver") == str(
        setting.sender.port
    )
    assert "could not" not in standby.log_text().replace("could not open usermap", "")
    standby.stop()


def test_what_psql_is_told(setting: Setting) -> None:
    wal = setting.wal
    lsns = (wal.records[100].end, wal.records[-100].end)
    trees = [setting.tree().make(lsn) for lsn in lsns]
    for tree, lsn in zip(trees, lsns, strict=True):
        conninfo = setting.conninfo(tree)
        (told,) = setting.ask("IDENTIFY_SYSTEM", conninfo)
        assert told.split() == [str(wal.system_id), "1", int_to_lsn(lsn)]
        assert setting.ask("SHOW wal_segment_size", conninfo) == ["1MB"]
        (version,) = setting.ask("SHOW server_version", conninfo)
        assert version.split(".")[0] == str(wal.major)
        with_more = f"{setting.sender.conninfo} options='-c wal_sender_timeout=7s {tree.options}'"
        assert setting.ask("SHOW wal_sender_timeout", with_more) == ["7s"]


def test_what_psql_is_told_of_a_timeline_that_is_not_there(setting: Setting) -> None:
    for options, text in (
        ("", "no tenant ID specified"),
        (f" options='-c ztenantid={'a' * 32}'", "no timeline ID specified"),
        (f" options='-c ztenantid=x -c ztimelineid={'a' * 32}'", '"ztenantid": "x"'),
        (f" options='ztenantid={'a' * 32} ztimelineid={'b' * 32}'", "does not exist"),
    ):
        with pytest.raises(Failed, match=text):
            setting.ask("IDENTIFY_SYSTEM", setting.sender.conninfo + options)


def test_an_ordinary_client_stays_when_it_has_all(setting: Setting) -> None:
    """A standby that has all that is committed is no pageserver: it is not ended, nor is it asked
    for a reply each second."""
    wal = setting.wal
    lsn = wal.records[1000].end
    tree, other = setting.tree().make(lsn), setting.tree().make(lsn)
    ids = other.ids
    with (
        Standby(setting.sender.port, tree.options, application_name="standby") as standby,
        Pageserver(setting.sender.port, ids.tenant_id, ids.timeline_id) as pageserver,
    ):
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        standby.begin(wal.start, COMMAND)
        for one in (standby, pageserver):
            one.take_to(lsn)
        for _ in range(2):
            assert pageserver.take() == "question"
        tree.commit(wal.end)
        assert standby.take() == "wal"
        standby.take_to(wal.end)
        assert standby.wal == wal.read(wal.start, wal.end)


def test_pageserver_feedback_is_not_for_ordinary_clients(setting: Setting) -> None:
    """It ends the stream, and nobody else's."""
    wal = setting.wal
    lsn = wal.records[1000].end
    tree = setting.tree().make(lsn)
    with (
        Standby(setting.sender.port, tree.options, application_name="standby") as standby,
        Standby(setting.sender.port, tree.options, application_name="witness") as witness,
    ):
        for one in (standby, witness):
            one.begin(wal.start, COMMAND)
            one.take_to(lsn)
        pair = b"ps_writelsn\0" + struct.pack(">IQ", 8, lsn)
        standby.send(b"d", b"z" + struct.pack(">QB", len(pair) + 1, 1) + pair)
        with pytest.raises(ServerError, match='unexpected message type "z"'):
            standby.take()
        setting.sender.expect(rf'{tree.ids}: "standby".* has ended streaming')
        tree.commit(wal.end)
        witness.take_to(wal.end)
        assert witness.wal == wal.read(wal.start, wal.end)
