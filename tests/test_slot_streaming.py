"""Streaming with a slot: who uses it, what it keeps, and WAL that is not kept any longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import LogLevel, capturedLogs, formatEvent

from tests.fakes import (
    COPY_DONE,
    PAGE,
    SEGMENT,
    START,
    SYNC,
    TERMINATE,
    Client,
    feedback,
    message,
    query,
    status,
)
from tests.slots_in_memory import (
    AT_END,
    CANCELED,
    COPIED,
    END,
    TERMINATED,
    Served,
    active,
    missing,
)
from walproto.errors import UndefinedFile
from walproto.lsn import format_lsn

WAL = f"w {format_lsn(START)}+{END - START} of {AT_END}"
NEXT = "T next_tli:20(8) next_tli_startpos:25(-1)"
GONE = "requested WAL segment 0000000100000000000000{} has already been removed"


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture(autouse=True)
def no_defects() -> Iterator[None]:
    with capturedLogs() as events:
        yield
    assert [formatEvent(event) for event in events if event["log_level"] >= LogLevel.error] == []


@pytest.fixture
def streaming(served: Served) -> Client:
    """One that streams with slot s."""
    client = served.client()
    served.create(client, "s PHYSICAL")
    assert served.stream(client, "s") == ["W", WAL]
    return client


# --- in use --------------------------------------------------------------------------------------


def test_a_slot_is_one_sessions_at_a_time(served: Served, streaming: Client) -> None:
    other = served.client()
    assert served.stream(other, "s") == active("s", streaming)
    assert served.stream(other, '"s"', START, "TIMELINE 7") == active("s", streaming)
    assert other.send(query("DROP_REPLICATION_SLOT s")) == active("s", streaming)
    assert streaming.send(COPY_DONE) == ["c", *COPIED]
    assert served.stream(other, "s") == ["W", WAL]
    assert served.stream(streaming, "s") == active("s", other)


def test_what_is_wrong_is_said_before_copying_begins(served: Served) -> None:
    client = served.client()
    served.create(client, "s PHYSICAL")
    assert served.stream(client, "nope", START, "TIMELINE 7") == missing("nope")
    assert served.stream(client, '"S"') == missing("S")
    assert served.stream(client, "s", START, "TIMELINE 7") == [
        "ERROR XX000: requested timeline 7 is not in this server's history",
        "Z I",
    ]
    assert served.is_free("s")


def _switch(served: Served, client: Client) -> None:
    served.timeline.switch(END)
    client.send(COPY_DONE)


def _vanish(served: Served, client: Client) -> None:
    served.timeline.error = UndefinedFile("gone")
    served.timeline.commit(END + PAGE)
    client.hear()


def _shut_down(served: Served, client: Client) -> None:
    served.factory.shut_down(1.0)
    client.send(status(END))


WAYS_OUT: dict[str, Callable[[Served, Client], Any]] = {
    "CopyDone": lambda served, client: client.send(COPY_DONE),
    "Terminate": lambda served, client: client.send(TERMINATE),
    "connection lost": lambda served, client: client.transport.drop(),
    "ERROR": lambda served, client: client.send(message(b"d")),
    "FATAL": lambda served, client: client.send(SYNC),
    "unknown type": lambda served, client: client.send(b"\xff"),
    "timeout": lambda served, client: client.wait(60),
    "timeline switch": _switch,
    "WAL that is gone": _vanish,
    "cancellation": lambda served, client: served.cancel(client),
    "shutdown": _shut_down,
    "termination": lambda served, client: client.protocol.terminate(),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_it_is_free_behind_every_way_out(served: Served, streaming: Client, way: str) -> None:
    streaming.send(status(END, END - 8))
    assert not served.is_free("s")
    WAYS_OUT[way](served, streaming)
    assert served.is_free("s")
    assert served.slot("s").restart_lsn == END - 8


def test_it_is_free_behind_a_stream_that_was_none(served: Served) -> None:
    client = served.client()
    served.create(client, "s PHYSICAL")
    served.timeline.switch(START)
    assert served.stream(client, "s", START, "TIMELINE 1") == [NEXT, f"D 2 0/{START:X}", *COPIED]
    assert served.is_free("s")
    assert served.stream(client, "s", START + 1, "TIMELINE 1")[0].startswith("ERROR XX000")
    assert served.is_free("s")
    answer = served.stream(client, "s", START + 1000 * SEGMENT)
    assert answer[0] == "W"
    assert "is ahead of the WAL flush position" in answer[1]
    assert served.is_free("s")


def test_a_stream_may_be_cancelled_and_begun_again(served: Served, streaming: Client) -> None:
    assert served.cancel(streaming) == CANCELED
    assert streaming.send(status(END, END), COPY_DONE) == []
    assert served.slot("s").restart_lsn == 0
    assert served.stream(streaming, "s") == ["W", WAL]


def test_temporary_ones_survive_a_stream_but_no_error(served: Served, streaming: Client) -> None:
    streaming.send(COPY_DONE)
    served.create(streaming, "t TEMPORARY PHYSICAL")
    served.stream(streaming, "t")
    streaming.send(COPY_DONE)
    served.stream(streaming, "s")
    assert served.names() == ["s", "t"]
    assert served.cancel(streaming) == CANCELED
    assert served.names() == ["s"]


# --- what the replica says of itself -------------------------------------------------------------


def test_its_position_is_what_the_replica_has_flushed(served: Served, streaming: Client) -> None:
    assert served.position("s") == ["physical", "NULL", "NULL"]
    streaming.send(status(END, 0, END))
    assert served.position("s") == ["physical", "NULL", "NULL"]
    streaming.send(status(END, END - 16, END))
    assert served.position("s") == ["physical", format_lsn(END - 16), "1"]
    streaming.send(status(END, 0))
    streaming.send(status(0, 0, 0))
    streaming.send(feedback(7, 0))
    assert served.position("s") == ["physical", format_lsn(END - 16), "1"]
    streaming.send(status(START, START))  # it may go back
    assert served.position("s") == ["physical", format_lsn(START), "1"]
    served.slots.keep_from(START + 8)  # but not to what is gone
    streaming.send(status(START, START))
    assert served.position("s") == ["physical", format_lsn(START + 8), "1"]


def test_only_the_slot_in_use_follows(served: Served, streaming: Client) -> None:
    streaming.send(COPY_DONE)
    served.create(streaming, "t TEMPORARY PHYSICAL")
    served.stream(streaming, "s")
    streaming.send(status(END, END), feedback(7, 0))
    streaming.send(COPY_DONE)
    streaming.send(query(f"START_REPLICATION {format_lsn(START)}"))
    streaming.send(status(START, START), feedback(0, 0))
    assert (served.slot("s").restart_lsn, served.slot("s").xmin) == (END, 7)
    assert (served.slot("t").restart_lsn, served.slot("t").xmin) == (0, 0)


def test_what_its_queries_need_to_see_is_kept_while_it_is_away(
    served: Served, streaming: Client
) -> None:
    slot = served.slot("s")

    def after(*said: bytes) -> tuple[int, int]:
        assert streaming.send(*said) == []
        return slot.xmin, slot.catalog_xmin

    assert after(feedback(800, 0, 700, 0)) == (800, 700)
    assert after(status(END, END)) == (800, 700)
    assert after(feedback(900, 1, 0, 0)) == (1 << 32 | 900, 0)
    assert after(feedback(5, 2, 2**32 - 5, 1)) == (2 << 32 | 5, 1 << 32 | 2**32 - 5)
    assert after(feedback(7, 1, 6, 2)) == (2 << 32 | 5, 2 << 32 | 6)  # it does not go back
    streaming.transport.drop()
    assert served.slots.oldest_xmins() == (2 << 32 | 5, 2 << 32 | 6)
    streaming = served.client()
    served.stream(streaming, "s")
    assert after(feedback(0, 0)) == (0, 0)


# --- WAL that is gone ----------------------------------------------------------------------------


def test_wal_that_is_not_kept_is_refused_though_it_is_there(served: Served) -> None:
    client = served.client()
    served.create(client, "s PHYSICAL")
    assert served.stream(client, "s", START) == ["W", WAL]
    client.send(COPY_DONE)
    served.slots.keep_from(START + PAGE)
    for lsn in (START, START + PAGE - 1):
        answer = ["W", f"ERROR 58P01: {GONE.format('03')}", "Z I"]
        assert served.stream(client, "s", lsn) == answer
        assert client.send(query(f"START_REPLICATION {format_lsn(lsn)}")) == answer
    assert served.stream(client, "s", START + PAGE)[0] == "W"


def test_it_is_refused_by_the_name_of_the_file_it_would_be_in(served: Served) -> None:
    """A switch copies the segment it happens in: that is read on the next timeline."""
    client = served.client()
    served.timeline.switch(END)
    served.timeline.commit(START + 2 * SEGMENT)
    served.slots.keep_from(START + SEGMENT)
    for lsn, tli, name in (
        (START, 1, "000000020000000000000003"),
        (START, 2, "000000020000000000000003"),
        (START - 1, 1, "000000010000000000000002"),
        (START - 1, 2, "000000020000000000000002"),
    ):
        answer = client.send(query(f"START_REPLICATION {format_lsn(lsn)} TIMELINE {tli}"))
        assert answer == [
            "W",
            f"ERROR 58P01: requested WAL segment {name} has already been removed",
            "Z I",
        ]


def test_an_invalidated_slot_ends_its_session_and_is_good_for_nothing(
    served: Served, streaming: Client
) -> None:
    streaming.send(status(END, START + 8))
    temporary = served.client()
    served.create(temporary, "t TEMPORARY PHYSICAL RESERVE_WAL")
    served.create(temporary, "u PHYSICAL RESERVE_WAL")
    assert served.slots.invalidate_before(START + 16)
    assert streaming.hear() == TERMINATED
    assert temporary.hear() == TERMINATED
    assert served.names() == ["s", "u"]
    client = served.client()
    assert served.stream(client, "s", END) == [
        'ERROR 55000: can no longer access replication slot "s" | '
        'D: This replication slot has been invalidated due to "wal_removed".',
        "Z I",
    ]
    assert served.is_free("s")
    assert served.position("s") == ["physical", "NULL", "NULL"]
    answer = client.send(query("ALTER_REPLICATION_SLOT s (FAILOVER)"))
    assert answer[0].startswith("ERROR 55000: can no longer access")
    assert served.ask(client, "DROP_REPLICATION_SLOT s") == ["C DROP_REPLICATION_SLOT", "Z I"]
