"""Tests of the harness itself: real servers replicate among each other, without walproto.

If these fail, look here first: no other test that runs PostgreSQL can be trusted then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import (
    Cluster,
    Failed,
    Installation,
    Process,
    ReceiveWal,
    Workspace,
    free_port,
    identify_system,
    installations,
    lsn_to_int,
    same_wal,
    workspace,
)


@pytest.fixture
def space() -> Iterator[Workspace]:
    with workspace() as made:
        yield made


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def installation(request: pytest.FixtureRequest) -> Installation:
    found: Installation = request.param
    return found


#: For what does not depend on the version.
newest = pytest.mark.parametrize("installation", installations()[:1], ids=["newest"])


@pytest.fixture
def primary(space: Workspace, installation: Installation) -> Cluster:
    return space.cluster(installation, "primary").init(wal_segsize_mb=1).start()


def test_a_standby_follows_its_primary_and_takes_its_place(
    space: Workspace, primary: Cluster
) -> None:
    standby = space.add(primary.backup_to(space.path / "standby"))
    standby.make_standby(primary.conninfo).start()
    primary.sql("CREATE TABLE t (i int); INSERT INTO t SELECT generate_series(1, 1000)")
    primary.wait_until("SELECT count(*) = 1 FROM pg_stat_replication")
    standby.wait_replayed(primary.lsn())
    assert standby.sql("SELECT count(*), sum(i) FROM t") == "1000|500500"
    primary.kill()
    standby.promote()
    standby.sql("INSERT INTO t VALUES (1001)")
    assert standby.sql("SELECT count(*) FROM t") == "1001"
    assert identify_system(standby.installation, standby.port)[1] == 2


def test_pg_receivewal_copies_the_wal(space: Workspace, primary: Cluster) -> None:
    archive = space.directory("archive")
    receiver = space.add(ReceiveWal(primary.installation, archive, primary.port))
    receiver.expect("starting log streaming at .* \\(timeline 1\\)")
    primary.pgbench("-i", "-s", "1")
    end = primary.sql("SELECT pg_switch_wal()")
    receiver.expect(f"finished segment at 0/{(lsn_to_int(end) // 2**20 + 1) * 2**20:X} ")
    assert receiver.stop() == 0
    assert len(same_wal(primary.wal_dir, archive)) > 5


@newest
def test_a_crashed_cluster_recovers(primary: Cluster) -> None:
    primary.sql("CREATE TABLE t AS SELECT 42 AS i")
    primary.kill()
    primary.start()
    assert "automatic recovery in progress" in primary.log_text()
    assert primary.sql("SELECT i FROM t") == "42"


@newest
def test_what_goes_wrong_is_told(primary: Cluster) -> None:
    with pytest.raises(Failed, match=r"(?s)0\.1 s for 1 = 2.*statement timeout"):
        primary.wait_until("1 = 2", timeout=0.1)
    with pytest.raises(Failed, match='relation "nothing" does not exist'):
        primary.sql("SELECT * FROM nothing")


def test_the_lines_of_a_process_are_found_one_after_the_other() -> None:
    with Process([sys.executable, "-c", "print('one 1'); print('two'); print('one 2')"]) as process:
        assert process.expect(r"one (\d)")[1] == "1"
        assert process.expect(r"one (\d)")[1] == "2"
        with pytest.raises(Failed, match="did not print a line matching 'two': it ended"):
            process.expect("two")
        assert process.wait() == 0
        assert process.output == "one 1\ntwo\none 2"


def test_a_silent_process_is_waited_for_only_so_long() -> None:
    with Process([sys.executable, "-c", "input()"], cwd="/") as process:
        process.expect("EOFError")
    with Process(["sleep", "60"]) as process:
        with pytest.raises(Failed, match=r"waited 0\.05 s"):
            process.expect("anything", timeout=0.05)
        with pytest.raises(Failed, match=r"did not end within 0\.05 s"):
            process.wait(timeout=0.05)
        process.terminate()
        assert process.wait() == -15


def test_a_difference_between_segments_is_told(tmp_path: Path) -> None:
    name = "000000010000000000000001"
    for directory, content in (("source", b"12345678"), ("archive", b"1234-678")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / name).write_bytes(content)
    (tmp_path / "archive" / f"{name}.partial").write_bytes(b"anything")
    with pytest.raises(AssertionError, match=f"{name} at byte 4"):
        same_wal(tmp_path / "source", tmp_path / "archive")
    (tmp_path / "archive" / name).write_bytes(b"12345678")
    assert same_wal(tmp_path / "source", tmp_path / "archive") == [name]


def test_ports_are_not_given_twice() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports)
