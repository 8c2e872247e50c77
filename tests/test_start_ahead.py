"""Streaming from a position that is ahead of our WAL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.logger import LogLevel, capturedLogs, formatEvent

from tests.fakes import COPY_DONE, PAGE, SEGMENT, Client, MemoryTimeline, query, server, status
from tests.slots_in_memory import AT_END, CANCELED, COPIED, END, Served
from walproto.lsn import format_lsn

NEXT = "T next_tli:20(8) next_tli_startpos:25(-1)"


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture(params=["slot", "no slot"])
def start(request: pytest.FixtureRequest, served: Served) -> Callable[[int], Client]:
    """Have a client begin to stream from a position, and hear nothing but that it does."""

    def begin(lsn: int) -> Client:
        client = served.client(application_name="standby1")
        if request.param == "slot":
            served.create(client, "s PHYSICAL")
            assert served.stream(client, "s", lsn) == ["W"]
        else:
            assert client.send(query(f"START_REPLICATION {format_lsn(lsn)}")) == ["W"]
        return client

    return begin


def test_who_is_ahead_waits_with_keepalives_for_wal_to_come(
    served: Served, start: Callable[[int], Client]
) -> None:
    ahead = END + SEGMENT - 8
    with capturedLogs() as events:
        client = start(ahead)
    said = [formatEvent(event) or "" for event in events if event["log_level"] == LogLevel.info]
    (line,) = [line for line in said if "ahead" in line]
    assert line.startswith('"standby1" (pid ')
    assert f"is {SEGMENT - 8} bytes ahead of the WAL here, which ends at {AT_END}" in line
    assert client.send(status(ahead, ahead, reply=1)) == [f"k {format_lsn(ahead)} reply=0"]
    assert client.wait(30) == [f"k {format_lsn(ahead)} reply=1"]
    client.send(status(ahead, ahead))
    served.timeline.commit(ahead - 8)
    assert client.hear() == []
    served.timeline.commit(ahead)
    assert client.hear() == []
    served.timeline.commit(ahead + 24)
    assert client.hear() == [f"w {format_lsn(ahead)}+24 of {format_lsn(ahead + 24)}"]
    assert client.wal[ahead] == served.timeline.bytes_of(ahead, ahead + 24)
    assert client.wait(30) == [f"k {format_lsn(ahead + 24)} reply=1"]
    assert client.wait(30) == ["EOF"]


def test_how_far_ahead_it_may_be(served: Served) -> None:
    client = served.client()
    assert client.send(query(f"START_REPLICATION {format_lsn(END + SEGMENT)}")) == ["W"]
    client.send(COPY_DONE)
    further = format_lsn(END + SEGMENT + 1)
    assert client.send(query(f"START_REPLICATION {further}")) == [
        "W",
        f"ERROR XX000: requested starting point {further} is ahead of the WAL flush position of "
        f"this server {AT_END}",
        "Z I",
    ]


def test_it_may_not_be_ahead_of_where_its_timeline_ended(served: Served) -> None:
    served.timeline.switch(END)
    served.timeline.commit(END + PAGE)
    client = served.client()
    answer = client.send(query(f"START_REPLICATION {format_lsn(END + 8)} TIMELINE 1"))
    assert answer[0].endswith("is not in this server's history | D: This server's history forked "
                              f"from timeline 1 at {AT_END}.")  # fmt: skip
    assert client.send(query(f"START_REPLICATION {format_lsn(END + 2 * PAGE)}")) == ["W"]


@pytest.mark.parametrize("where", [END, END + 8, END + PAGE])
def test_its_timeline_may_end_meanwhile(
    served: Served, start: Callable[[int], Client], where: int
) -> None:
    client = start(END + PAGE)
    served.timeline.switch(where)
    served.timeline.commit(END + 2 * PAGE)
    assert client.hear() == ["c"]
    client.send(status(END + PAGE, END + PAGE))
    assert client.send(COPY_DONE) == [NEXT, f"D 2 {format_lsn(where)}", *COPIED]
    assert client.send(query(f"START_REPLICATION {AT_END} TIMELINE 2"))[0] == "W"


def test_or_further_on(served: Served, start: Callable[[int], Client]) -> None:
    client = start(END + PAGE)
    served.timeline.switch(END + PAGE + 8)
    served.timeline.commit(END + 2 * PAGE)
    ahead = format_lsn(END + PAGE)
    assert client.hear() == [f"w {ahead}+8 of {format_lsn(END + PAGE + 8)}", "c"]


def test_shutdown_meanwhile_is_in_order(served: Served, start: Callable[[int], Client]) -> None:
    ahead = END + PAGE
    client = start(ahead)
    done: list[None] = []
    served.factory.shut_down(10.0).addCallback(done.append)
    assert client.hear() == [f"k {format_lsn(ahead)} reply=1"]
    assert client.send(status(ahead, ahead)) == ["C COPY 0", "EOF"]
    assert len(done) == 1
    assert len(served.timeline.replicas) == 0


def test_copying_may_end_and_be_cancelled(served: Served, start: Callable[[int], Client]) -> None:
    client = start(END + PAGE)
    assert client.send(COPY_DONE) == ["c", *COPIED]
    client.send(query(f"START_REPLICATION {format_lsn(END + PAGE)}"))
    assert served.cancel(client) == CANCELED


def test_so_it_is_where_there_are_no_slots(served: Served) -> None:
    timeline = MemoryTimeline(2 * PAGE)
    client = Client(server(timeline, served.clock), served.clock)
    ahead = timeline.commit_lsn + 8
    assert client.stream(ahead) == ["W"]
    timeline.wal += bytes(16)
    timeline.commit(ahead + 8)
    assert client.hear() == [f"w {format_lsn(ahead)}+8 of {format_lsn(ahead + 8)}"]
