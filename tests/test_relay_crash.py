"""A relay that is killed at any moment, and its upstream too: what was acknowledged is there.

The servers run with fsync off, and what is killed are processes: what the kernel has been given
survives that.  What does not, when the power fails, is in `tests/test_relay_power.py`.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest

from tests.demo_report import contents
from tests.faulty import Disk, a_kill
from tests.postgres import (
    Cluster,
    Installation,
    identify_system,
    installations,
    int_to_lsn,
    lsn_to_int,
)
from tests.relays import SEGMENT, Relayed, relayed, seeded

TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers")


VERSIONS = pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: f"pg{installation.major}"
)


@pytest.fixture
def setting(installation: Installation) -> Iterator[Relayed]:
    with relayed(installation) as setting:
        yield setting


# -- Synchronous replication ---------------------------------------------------------------------

WAITS = "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')"


class Clients:
    """Clients that insert rows, each in a transaction of its own, and know which are confirmed."""

    def __init__(self, primary: Cluster) -> None:
        self.confirmed: set[int] = set()
        self._primary = primary
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        """Let so many work until the primary is gone."""
        self._threads = [threading.Thread(target=self._work) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def wait_more(self, number: int, timeout: float = 30) -> None:
        """Wait until so many more rows are confirmed."""
        with self._changed:
            until = len(self.confirmed) + number
            assert self._changed.wait_for(lambda: len(self.confirmed) >= until, timeout)

    def wait_gone(self) -> None:
        """The primary has been killed: wait until the clients know it."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        with (
            suppress(psycopg.OperationalError),
            psycopg.connect(self._primary.conninfo, autocommit=True) as connection,
        ):
            while True:
                row = next(self._ids)
                connection.execute("INSERT INTO rows VALUES (%s, repeat('x', 1500))", [row])
                with self._changed:
                    self.confirmed.add(row)
                    self._changed.notify_all()


@VERSIONS
def test_commits_wait_for_the_relay(setting: Relayed) -> None:
    primary = setting.primary
    primary.sql("CREATE TABLE rows (id int PRIMARY KEY, filler text)")
    primary.configure(synchronous_standby_names="walproto")
    primary.reload()
    primary.wait_until("EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')")
    primary.sql("INSERT INTO rows VALUES (1)")

    setting.relay.stop()
    insert = ("psql", "-Xqc", "INSERT INTO rows VALUES (2)", "postgres")
    with primary.client(*insert) as client:
        primary.wait_until(WAITS)
        primary.sql("SET synchronous_commit = local; INSERT INTO rows VALUES (3)")
        assert primary.sql(f"SELECT id FROM rows WHERE {WAITS}") == "1\n3"
        assert client.running
        setting.restart_relay()
        assert client.wait() == 0, client.output
    assert primary.sql("SELECT id FROM rows ORDER BY id") == "1\n2\n3"
    primary.sql("INSERT INTO rows VALUES (4)")
    setting.check_archive()


def check_recovers(standby: Cluster, setting: Relayed, clients: Clients) -> None:
    """That a standby has every confirmed row, with the primary gone, and has it from WAL that the
    relay has now: the standby has no other."""
    _, _, end = identify_system(standby.installation, setting.relay.port)
    standby.wait_replayed(end)
    assert lsn_to_int(standby.sql("SELECT pg_last_wal_receive_lsn()")) <= lsn_to_int(end)
    assert clients.confirmed <= set(map(int, standby.sql("SELECT id FROM rows").split()))


@VERSIONS
def test_every_confirmed_commit_survives_the_kill_of_primary_and_relay(setting: Relayed) -> None:
    """Each time, the relay has every row that any client was told is committed; and in the end a
    cold copy of the first base backup gets them all from it."""
    rng = seeded()
    primary, space = setting.primary, setting.space
    cold = space.add(primary.backup_to(space.path / "cold"))
    warm = space.add(primary.backup_to(space.path / "warm"))
    warm.make_standby(setting.relay.conninfo).start()
    primary.sql("CREATE TABLE rows (id int PRIMARY KEY, filler text)")
    primary.configure(synchronous_standby_names="walproto")
    primary.reload()
    clients = Clients(primary)
    for number in range(8):
        if number:
            primary.start()
        clients.start(4)
        clients.wait_more(rng.randint(1, 700))
        kills = [primary.kill, setting.relay.kill]
        rng.shuffle(kills)
        for kill in kills:
            kill()
        clients.wait_gone()
        setting.relay.check_log()
        setting.restart_relay()
        setting.relay.ready()
        check_recovers(warm, setting, clients)
    warm.stop()
    cold.make_standby(setting.relay.conninfo).start()
    check_recovers(cold, setting, clients)
    print(f"{len(clients.confirmed)} rows confirmed")


# -- Fifty times ---------------------------------------------------------------------------------

#: What a standby may say that loses its connection again and again.
HARMLESS = (
    "server closed the connection unexpectedly|Connection refused|Connection reset|"
    "could not send data to WAL stream|the database system is starting up"
)


@pytest.mark.parametrize("installation", installations()[:1], ids=["newest"])
def test_it_is_killed_fifty_times(setting: Relayed) -> None:
    """Now at a random position of the WAL, now at a random one of its own system calls."""
    rng = seeded()
    primary, space = setting.primary, setting.space
    primary.pgbench("-i", "-s", "1")
    standby = space.add(primary.backup_to(space.path / "standby"))
    standby.make_standby(setting.relay.conninfo).start()
    with setting.load() as load:
        for number in range(50):
            if number % 2:
                disk = Disk()
                disk.plan = a_kill(rng)
                setting.restart_faulty(disk)
                assert setting.relay.wait() == -9, setting.relay.output
            else:
                if number:
                    setting.restart_relay()
                ahead = rng.randint(0, SEGMENT)
                goal = lsn_to_int(primary.sql("SELECT pg_current_wal_lsn()")) + ahead
                setting.wait_flushed(int_to_lsn(goal))
                setting.relay.kill()
            setting.relay.check_log()
        setting.restart_relay()
        setting.relay.receiving()
        load.kill()
    end = primary.lsn()
    standby.wait_replayed(end)
    for table in TABLES:
        assert contents(primary, table) == contents(standby, table), table
    assert standby.sql("SELECT status FROM pg_stat_wal_receiver") == "streaming"
    fatal = re.findall(r"(?:FATAL|PANIC|ERROR):  .*", standby.log_text())
    assert fatal
    assert [line for line in fatal if not re.search(HARMLESS, line)] == []
    assert len(setting.check_archive()) > 20
