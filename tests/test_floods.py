"""Floods of clients that never authenticate, while another one streams."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.certificates import Authority, write
from tests.postgres import (
    HOST,
    ReceiveWal,
    WalSender,
    Workspace,
    free_port,
    identify_system,
    installations,
    same_wal,
    workspace,
)
from tests.secured import address_elsewhere
from tests.strangers import REFUSED, Caller, Flood, Guessing, HalfEncrypted, Slow, Stranger
from tests.test_many_clients import memory
from tests.test_receivewal import begin_at, finished, oldest

PLACES = 50
AT_ONCE = 95
"""Strangers: as many as have a place, and some fewer than may wait to be accepted."""
MANY = 2000
MEMORY = 48 << 20
"""Bytes that a flood may cost us: a megabyte for each place, and a lot of time."""
ELSEWHERE = address_elsewhere()

STARTING = "FATAL 57P03: the database system is starting up"
"""What is told by a walsender that has no WAL, but also no lack of places."""

RULES = """
host replication postgres 127.0.0.1/32 trust
host replication mallory all scram-sha-256
"""


@pytest.fixture
def space() -> Iterator[Workspace]:
    with workspace() as made:
        yield made


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def access_options(space: Workspace) -> tuple[str, ...]:
    """A certificate, and a user whose password nobody knows."""
    files = Authority().server().write(space.path, "server")
    users = write(space.path / "users", b'"mallory" "nobody knows it"\n', mode=0o600)
    tls = ("--ssl-cert-file", str(files.certificate), "--ssl-key-file", str(files.key))
    return (*tls, "--auth-file", str(users))


def test_a_flood_does_not_touch_who_streams(
    space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    installation = installations()[0]
    primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
    primary.pgbench("-i", "-s", "1")
    sender = space.add(
        WalSender(
            primary.wal_dir,
            *access_options(space),
            *("--hba-file", str(write(space.path / "hba", RULES.encode()))),
            *("--authentication-timeout", "1s", "--max-unauthenticated", str(PLACES)),
        )
    )
    sender.ready()
    archive = space.directory("archive")
    begin_at(space, archive, oldest(primary.wal_dir))
    receiver = space.add(ReceiveWal(installation, archive, sender.port, "-s", "1", "--no-loop"))
    receiver.expect(finished(primary.switch_wal()))
    before, before_files = memory(sender.pid, "VmRSS"), open_files(sender.pid)

    kinds = (Stranger, Slow, HalfEncrypted, Guessing)
    with Flood(sender.port, AT_ONCE, *kinds) as flood:
        flood.wait(lambda: flood.number_of("refused") > 0)
        primary.pgbench("-n", "-c", "2", "-t", "100")
        receiver.expect(finished(primary.switch_wal()))
        flood.wait(
            lambda: (
                flood.ends.total() >= MANY
                and all(flood.ends[kind, "closed"] for kind in (Stranger, Slow, HalfEncrypted))
                and flood.ends[Guessing, "known by a wrong password"] >= PLACES
            )
        )
        # It still goes on.
        receiver.expect(finished(primary.switch_wal()))
        assert open_files(sender.pid) < before_files + AT_ONCE + 10
    cost = memory(sender.pid, "VmHWM") - before

    # A fresh client comes in, and whoever is there no longer has left nothing.
    assert identify_system(installation, sender.port)[1] == 1
    end = primary.switch_wal()
    receiver.expect(finished(end))
    assert receiver.stop() == 0
    assert len(same_wal(primary.wal_dir, archive)) >= 4
    sender.check_log()
    with capsys.disabled():
        ends = {f"{kind.__name__} {end}": count for (kind, end), count in flood.ends.items()}
        print(f"\n{flood.ends.total()} strangers cost {cost / 1e6:.1f} MB: {ends}")
    assert flood.number_of("refused") > PLACES
    assert not any(
        flood.ends[kind, "known by a wrong password"] for kind in kinds if kind is not Guessing
    )
    assert cost < MEMORY


@pytest.mark.skipif(ELSEWHERE is None, reason="there is only the loopback here")
def test_one_address_does_not_keep_the_others_out(space: Workspace) -> None:
    """Nor those on this machine."""
    assert ELSEWHERE is not None
    wal = space.directory("wal")
    port = free_port()
    sender = space.add(
        WalSender(
            wal,
            *access_options(space),
            *("--listen", f"tcp:{port}:interface=0.0.0.0"),
            *("--max-unauthenticated-per-address", "3"),
        )
    )
    with ExitStack() as open_:
        silent = [open_.enter_context(Caller(port, ELSEWHERE)) for _ in range(3)]
        for _ in range(5):
            with Caller(port, ELSEWHERE) as refused:
                assert refused.hear_out() == [REFUSED]
        many = [open_.enter_context(Caller(port, HOST)) for _ in range(10)]
        for caller in many:
            assert caller.start_up().startswith(STARTING)
        assert silent[0].start_up().startswith(STARTING)
        assert silent[0].hear_out() == []
        again = open_.enter_context(Caller(port, ELSEWHERE))
        assert again.start_up().startswith(STARTING)
    sender.stop()
    sender.check_log()


def test_who_says_nothing_is_not_waited_for(space: Workspace) -> None:
    """It is told nothing, either."""
    options = ("--authentication-timeout", "1s")
    sender = space.add(WalSender(space.directory("wal"), *access_options(space), *options))
    with ExitStack() as open_:
        callers = [open_.enter_context(Caller(sender.port)) for _ in range(5)]
        for caller in callers:
            assert caller.hear_out() == []
            sender.expect(r"127\.0\.0\.1:\d+: canceling authentication due to timeout")
