"""psycopg2's physical replication connection, as Barman and others use it."""

from __future__ import annotations

import select
from collections.abc import Iterator

import psycopg2  # type: ignore[import-untyped]
import psycopg2.errors  # type: ignore[import-untyped]
import pytest
from psycopg2.extras import (  # type: ignore[import-untyped]
    PhysicalReplicationConnection,
)

from tests.postgres import (
    HOST,
    Cluster,
    WalSender,
    installations,
    is_segment,
    lsn_to_int,
    workspace,
)

SEGMENT = 2**20


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, WalSender]]:
    with workspace() as space:
        primary = space.cluster(request.param, "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        sender = space.add(WalSender(primary.wal_dir))
        sender.ready()
        yield primary, sender
        sender.check_log()


@pytest.fixture
def connection(served: tuple[Cluster, WalSender]) -> Iterator[PhysicalReplicationConnection]:
    connection = psycopg2.connect(
        host=HOST,
        port=served[1].port,
        user="postgres",
        options="-cdatestyle=iso",
        application_name="barman",
        connection_factory=PhysicalReplicationConnection,
    )
    yield connection
    connection.close()


def test_commands(
    served: tuple[Cluster, WalSender], connection: PhysicalReplicationConnection
) -> None:
    primary, _ = served
    cursor = connection.cursor()
    cursor.execute("IDENTIFY_SYSTEM")
    system, timeline, position, database = cursor.fetchone()
    assert system == primary.sql("SELECT system_identifier FROM pg_control_system()")
    assert (timeline, database) == (1, None)
    assert lsn_to_int(position) > 0
    cursor.execute("SHOW wal_segment_size")
    assert cursor.fetchone() == ("1MB",)
    assert connection.server_version // 10000 == primary.installation.major
    with pytest.raises(psycopg2.errors.ConfigurationLimitExceeded):
        cursor.execute("CREATE_REPLICATION_SLOT barman PHYSICAL")
    with pytest.raises(psycopg2.errors.UndefinedObject, match='"barman" does not exist'):
        cursor.execute("DROP_REPLICATION_SLOT barman")
    with pytest.raises(psycopg2.errors.UndefinedFile):
        cursor.execute("TIMELINE_HISTORY 7")
    cursor.execute("IDENTIFY_SYSTEM")  # it is none the worse for that


@pytest.mark.parametrize("asks", [False, True], ids=["waiting", "asking all the time"])
def test_streaming(
    served: tuple[Cluster, WalSender], connection: PhysicalReplicationConnection, asks: bool
) -> None:
    primary, _ = served
    name = min(path.name for path in primary.wal_dir.iterdir() if is_segment(path.name))
    start = int(name[8:], 16) * SEGMENT
    cursor = connection.cursor()
    cursor.start_replication(start_lsn=start, timeline=1, decode=False)
    received = b""
    for _ in range(100_000):
        message = cursor.read_message()
        if message is not None:
            assert message.data_start == start + len(received)
            received += message.payload
            cursor.send_feedback(flush_lsn=start + len(received))
        elif len(received) >= SEGMENT:
            break
        elif asks:
            cursor.send_feedback(reply=True)
        else:
            assert select.select([cursor], [], [], 30)[0]
    assert len(received) >= SEGMENT
    assert received[:SEGMENT] == (primary.wal_dir / name).read_bytes()
