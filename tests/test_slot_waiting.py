"""Sessions that wait: for the disk that a slot is to be on, or for a session to let go of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.logger import LogLevel, capturedLogs, formatEvent

from tests.fakes import SYNC, Client, message, query, startup
from tests.slots_in_memory import (
    CANCELED,
    DROPPED,
    TERMINATED,
    Served,
    active,
    created,
    missing,
)
from walproto.server.reader import TURN, UNHEARD
from walproto.timeline import slots
from walproto.wal.writer import SyncError

SHOWN = ["T block_size:25(-1)", "D 8192", "C SHOW", "Z I"]
SHOW = query("SHOW block_size")


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture(autouse=True)
def no_defects() -> Iterator[None]:
    with capturedLogs() as events:
        yield
    assert [formatEvent(event) for event in events if event["log_level"] >= LogLevel.error] == []


# --- for another session, or the disk ------------------------------------------------------------


def waiting_to_drop(served: Served) -> tuple[Client, Client]:
    """A client that uses slot s, and one that waits to drop it."""
    user, client = served.client(), served.client()
    served.create(user, "s PHYSICAL")
    assert served.stream(user, "s")[0] == "W"
    assert client.send(query("DROP_REPLICATION_SLOT s")) == active("s", user)
    assert client.send(query("DROP_REPLICATION_SLOT s WAIT")) == []
    return user, client


def test_one_in_use_can_be_waited_for(served: Served) -> None:
    user, client = waiting_to_drop(served)
    assert client.wait(3600) == []
    user.send(message(b"c"))
    assert client.hear() == []
    served.threads.work()
    assert client.hear() == DROPPED
    assert served.names() == served.names_on_disk() == []


def test_of_those_who_wait_one_drops_it(served: Served) -> None:
    user, client = waiting_to_drop(served)
    others = [served.client() for _ in range(3)]
    for other in others:
        assert other.send(query("DROP_REPLICATION_SLOT s WAIT")) == []
    user.transport.drop()
    assert [other.hear() for other in others] == [[]] * 3
    served.threads.work()
    assert client.hear() == DROPPED
    assert [other.hear() for other in others] == [missing("s")] * 3
    assert not served.threads.is_busy


def test_one_that_is_about_to_be_made_can_be_waited_for(served: Served) -> None:
    maker, client = served.client(), served.client()
    maker.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    assert client.send(query("DROP_REPLICATION_SLOT s WAIT")) == []
    served.threads.work()
    assert maker.hear() == created()
    served.threads.work()
    assert client.hear() == DROPPED


def test_to_alter_one_in_use_is_to_wait_as_well(served: Served) -> None:
    user = served.client()
    served.create(user, "s PHYSICAL")
    served.stream(user, "s")
    client = served.client()
    assert client.send(query("ALTER_REPLICATION_SLOT s (FAILOVER)")) == []
    user.transport.drop()
    assert client.hear()[0].startswith("ERROR 0A000")


def test_who_does_not_wait_any_longer_is_forgotten(served: Served) -> None:
    user, client = waiting_to_drop(served)
    for _ in range(3):
        assert served.cancel(client) == CANCELED
        assert served.slots._awaiting_release == {"s": []}
        assert client.send(SHOW) == SHOWN
        assert client.send(query("DROP_REPLICATION_SLOT s WAIT")) == []
    client.transport.drop()
    user.send(message(b"c"))
    assert not served.threads.is_busy
    assert served.names() == ["s"]
    assert served.is_free("s")


def test_a_session_that_waits_may_be_ended(served: Served) -> None:
    user, client = waiting_to_drop(served)
    client.protocol.terminate()
    assert client.hear() == TERMINATED
    other = served.client()
    assert other.send(query("DROP_REPLICATION_SLOT s WAIT")) == []
    other.protocol.shut_down()
    assert other.hear() == TERMINATED
    user.send(message(b"c"))
    assert not served.threads.is_busy
    assert served.names() == ["s"]


def test_what_a_client_says_meanwhile_is_answered_in_order(served: Served) -> None:
    client = served.client()
    first, second = (query(f"CREATE_REPLICATION_SLOT {name} PHYSICAL") for name in "ab")
    assert client.send(SHOW, first, SHOW, second, SYNC, SHOW) == SHOWN
    served.threads.work()
    assert client.hear() == [*created("a"), *SHOWN]
    served.threads.work()
    assert client.hear() == [*created("b"), "Z I", *SHOWN]


def test_a_client_that_says_much_meanwhile_is_held_back(served: Served) -> None:
    client = served.client()
    client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    client.transport.deliver(SHOW * 10)
    assert client.transport.is_reading  # it would be noticed that it is gone
    for _ in range(99):
        client.transport.deliver(SHOW * 10)
        served.clock.advance(0)
    assert not client.transport.is_reading
    assert served.clock.getDelayedCalls() == []
    assert len(client.transport.unread) == 100 - UNHEARD
    served.threads.work()
    assert client.hear() == [*created(), *SHOWN * 1000]
    assert client.transport.is_reading
    assert served.clock.getDelayedCalls() == []


def test_what_need_not_be_waited_for_is_dealt_with_in_turns_too(served: Served) -> None:
    client = served.client()
    both = [
        query("CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL"),
        query("DROP_REPLICATION_SLOT t"),
    ]
    assert client.send(*both * TURN) == [*created("t"), *DROPPED] * TURN
    assert served.clock.getDelayedCalls() == []
    client.transport.deliver(b"".join(both * TURN))
    assert len(served.clock.getDelayedCalls()) == 1
    client.transport.drop()
    client.hear()
    assert served.clock.getDelayedCalls() == []
    assert served.names() == []


def test_who_does_not_take_answers_waits_for_both(tmp_path: Path) -> None:
    served = Served(tmp_path)
    client = Client(served.factory, served.clock, capacity=1000)
    client.send(startup())
    client.take()
    client.transport.deliver(SHOW * 40 + query("CREATE_REPLICATION_SLOT s PHYSICAL") + SHOW)
    lines: list[str] = []
    while client.transport.waiting:
        lines += client.take()
    assert lines == SHOWN * 40
    served.threads.work()
    lines = client.take()
    assert lines == [*created(), *SHOWN]
    assert client.transport.is_reading


def test_a_session_that_is_over_does_not_undo_what_it_has_begun(served: Served) -> None:
    """As PostgreSQL, we finish what has been begun."""
    for end in (
        served.cancel,
        lambda client: client.transport.drop(),
        lambda client: client.protocol.terminate(),
        lambda client: client.protocol.shut_down(),
    ):
        client = served.client()
        client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
        end(client)
        other = served.client()
        assert other.send(query("DROP_REPLICATION_SLOT s")) == active("s", client)
        served.threads.work()
        assert served.names_on_disk() == ["s"]
        assert served.is_free("s")
        client = served.client()
        client.send(query("DROP_REPLICATION_SLOT s"))
        end(client)
        served.threads.work()
        assert served.names() == served.names_on_disk() == []


def test_one_that_was_cancelled_goes_on_with_what_comes_next(served: Served) -> None:
    client = served.client()
    client.send(query("CREATE_REPLICATION_SLOT a PHYSICAL"))
    assert client.send(query("CREATE_REPLICATION_SLOT b PHYSICAL"), SHOW) == []
    assert served.cancel(client) == CANCELED
    served.threads.work()
    assert client.hear() == []
    served.threads.work()
    assert client.hear() == [*created("b"), *SHOWN]
    assert served.names_on_disk() == ["a", "b"]


# --- a disk that fails ---------------------------------------------------------------------------


def break_disk(served: Served, error: Exception) -> None:
    """Let what is to be written fail."""

    def write_slots(directory: Path, states: object, removed_to: int) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "write_slots", write_slots)
        served.threads.work()


def sync_error() -> SyncError:
    try:
        try:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as cause:
            raise SyncError('could not fsync file "/wal/x": Input/output error') from cause
    except SyncError as error:
        return error


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            'ERROR 53100: could not write to file "walproto.slots": No space left on device',
            "make room",
        ),
        (
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/wal/walproto.slots.tmp"),
            'ERROR 53100: could not write to file "walproto.slots": Disk quota exceeded',
            "/wal/walproto.slots.tmp: make room",
        ),
        (
            OSError(errno.EIO, os.strerror(errno.EIO)),
            'ERROR 58030: could not write to file "walproto.slots": Input/output error',
            "see to the directory",
        ),
        (
            sync_error(),
            'ERROR 58030: could not fsync file "walproto.slots": Input/output error',
            'could not fsync file "/wal/x": Input/output error: see to the disk',
        ),
    ],
)
def test_a_disk_that_fails_is_an_error_of_the_command(
    served: Served, error: Exception, told: str, logged: str
) -> None:
    client = served.client()
    served.create(client, "s PHYSICAL")
    for command, left in (
        ("CREATE_REPLICATION_SLOT t PHYSICAL", ["s"]),
        ("DROP_REPLICATION_SLOT s", ["s"]),
    ):
        client.send(query(command))
        with capturedLogs() as events:
            break_disk(served, error)
            assert client.hear() == [told, "Z I"]
        (line,) = [formatEvent(event) for event in events if event["log_level"] == LogLevel.warn]
        assert logged in line
        assert served.names() == left
        assert served.is_free("s")
    served.create(client, "t PHYSICAL")
    assert served.names_on_disk() == ["s", "t"]


def test_so_it_is_when_nobody_waits_for_it_but_only_the_operator_hears(served: Served) -> None:
    client = served.client()
    client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    assert served.cancel(client) == CANCELED
    with capturedLogs() as events:
        break_disk(served, OSError(errno.EIO, os.strerror(errno.EIO)))
    (line,) = [formatEvent(event) for event in events]
    assert line is not None
    assert "what it has stopped waiting for has failed" in line
    assert "Input/output error" in line
    assert client.send(SHOW) == SHOWN
    assert served.names() == []


def test_at_shutdown_it_is_too_late(served: Served) -> None:
    client = served.client()
    served.slots.stop()
    assert client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL")) == TERMINATED
    assert served.names() == []
