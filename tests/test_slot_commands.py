"""Commands for replication slots, by the major that the server says it is, and what comes of them.

What real servers answer to the same is in test_slot_answers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent

from tests.fakes import (
    SEGMENT,
    START,
    SYNC,
    TERMINATE,
    Client,
    MemoryTimeline,
    message,
    query,
    server,
)
from tests.slots_in_memory import DROPPED, Served, active, created, missing
from walproto.lsn import format_lsn

MAJORS = range(13, 19)
SYNTAX = ["ERROR 42601: syntax error", "Z I"]
CONFLICTING = ["ERROR 42601: conflicting or redundant options", "Z I"]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture(autouse=True)
def no_defects() -> Iterator[None]:
    with capturedLogs() as events:
        yield
    assert [formatEvent(event) for event in events if event["log_level"] >= LogLevel.error] == []


def told(events: Sequence[LogEvent]) -> str:
    """What the operator is told of one error, behind the client's address."""
    (line,) = [formatEvent(event) for event in events if event["log_level"] == LogLevel.warn]
    return line.partition(": ")[2]


# --- created, read, dropped ---------------------------------------------------------------------


@pytest.mark.parametrize("major", MAJORS)
def test_it_is_created_when_it_is_on_disk_and_dropped_when_it_is_not(
    tmp_path: Path, major: int
) -> None:
    served = Served(tmp_path, major)
    client = served.client()
    assert client.send(query("CREATE_REPLICATION_SLOT S PHYSICAL")) == []
    served.threads.begin()
    assert served.names_on_disk() == ["s"]
    assert client.hear() == []
    served.threads.finish()
    assert client.hear() == created()
    assert served.is_free("s")
    assert client.send(query('DROP_REPLICATION_SLOT "s"')) == []
    served.threads.begin()
    assert served.names_on_disk() == []
    assert client.hear() == []
    served.threads.finish()
    assert client.hear() == DROPPED
    assert served.ask(client, "DROP_REPLICATION_SLOT s WAIT") == missing("s")


@pytest.mark.parametrize(
    ("options", "reserves"),
    [
        ("", False),
        ("RESERVE_WAL", True),
        ("(RESERVE_WAL)", True),
        ("(reserve_wal)", True),
        ('("reserve_wal" on)', True),
        ("(RESERVE_WAL TRUE)", True),
        ("(RESERVE_WAL 'On')", True),
        ("(RESERVE_WAL 1)", True),
        ("(RESERVE_WAL 0)", False),
        ("(RESERVE_WAL false)", False),
        ("(RESERVE_WAL 'off')", False),
    ],
)
def test_it_reserves_wal_from_the_current_segment_on_if_it_is_to(
    served: Served, options: str, reserves: bool
) -> None:
    served.create(served.client(), f"s PHYSICAL {options}", f"t TEMPORARY PHYSICAL {options}")
    position = ["physical", *((format_lsn(START), "1") if reserves else ("NULL", "NULL"))]
    assert served.position("s") == position
    assert served.slot("t").restart_lsn == served.slot("s").restart_lsn


def test_it_does_not_reserve_wal_that_is_gone(served: Served) -> None:
    served.slots.keep_from(START + SEGMENT)
    served.create(served.client(), "s PHYSICAL RESERVE_WAL")
    assert served.position("s") == ["physical", format_lsn(START + SEGMENT), "1"]


def test_which_timeline_its_position_is_of(served: Served) -> None:
    client = served.client()
    served.timeline.switch(START + SEGMENT)
    served.create(client, "s PHYSICAL RESERVE_WAL")
    assert served.position("s") == ["physical", format_lsn(START), "1"]
    served.slots.confirm(served.slot("s"), START + SEGMENT - 1)
    assert served.position("s") == ["physical", format_lsn(START + SEGMENT - 1), "1"]
    served.slots.confirm(served.slot("s"), START + SEGMENT)
    assert served.position("s") == ["physical", format_lsn(START + SEGMENT), "2"]


def test_one_that_there_is_not_reads_as_nothing(served: Served) -> None:
    assert served.position("s") == served.position('"S"') == ["NULL"] * 3


@pytest.mark.parametrize(
    ("name", "sqlstate", "text"),
    [
        ('""', "42602", "is too short"),
        ('"S"', "42602", "contains invalid character"),
        ('"a b"', "42602", "contains invalid character"),
        ("a$", "42602", "contains invalid character"),
        ("ä", "42602", "contains invalid character"),
    ],
)
def test_it_has_a_name_as_slots_have(served: Served, name: str, sqlstate: str, text: str) -> None:
    hint = (
        " | H: Replication slot names may only contain lower case letters, numbers, and the "
        "underscore character."
    )
    said = name.strip('"')
    assert served.ask(served.client(), f"CREATE_REPLICATION_SLOT {name} PHYSICAL") == [
        f'ERROR {sqlstate}: replication slot name "{said}" {text}'
        + (hint if "invalid" in text else ""),
        "Z I",
    ]
    assert served.names() == []


def test_a_longer_name_is_cut_wherever_it_is_said(served: Served) -> None:
    client = served.client()
    answer = served.ask(client, f"CREATE_REPLICATION_SLOT {'n' * 64} PHYSICAL")
    assert answer == created("n" * 63)
    assert served.ask(client, f'DROP_REPLICATION_SLOT "{"n" * 70}"') == DROPPED


def test_no_two_have_one_name(served: Served) -> None:
    client, other = served.client(), served.client()
    client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    exists = ['ERROR 42710: replication slot "s" already exists', "Z I"]
    assert other.send(query("CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL")) == exists
    assert other.send(query("DROP_REPLICATION_SLOT s")) == active("s", client)
    served.threads.work()
    assert client.hear() == created()
    assert other.send(query("CREATE_REPLICATION_SLOT s PHYSICAL")) == exists


@pytest.mark.parametrize("major", MAJORS)
def test_there_are_no_more_than_there_may_be(tmp_path: Path, major: int) -> None:
    served = Served(tmp_path, major, max_replication_slots=2)
    client, other = served.client(), served.client()
    served.create(client, "a PHYSICAL", "b TEMPORARY PHYSICAL")
    setting = '"max_replication_slots"' if major >= 17 else "max_replication_slots"
    full = [
        f"ERROR 53400: all replication slots are in use | H: Free one or increase {setting}.",
        "Z I",
    ]
    with capturedLogs() as events:
        assert other.send(query("CREATE_REPLICATION_SLOT c PHYSICAL")) == full
    assert told(events) == (
        "ERROR 53400: all replication slots are in use (drop one, or increase "
        "--max-replication-slots)"
    )
    # What is wrong with the command comes first.
    assert "already exists" in other.send(query("CREATE_REPLICATION_SLOT a PHYSICAL"))[0]
    assert "invalid character" in other.send(query('CREATE_REPLICATION_SLOT "C" PHYSICAL'))[0]
    client.send(TERMINATE)
    served.create(other, "c PHYSICAL")


@pytest.mark.parametrize("major", MAJORS)
def test_where_there_may_be_none(tmp_path: Path, major: int) -> None:
    served = Served(tmp_path, major, max_replication_slots=0)
    client = served.client()
    assert client.send(query("SHOW max_replication_slots"))[1] == "D 0"
    answer = client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    assert answer[0].startswith("ERROR 53400: all replication slots are in use")
    answer = client.send(query("CREATE_REPLICATION_SLOT s LOGICAL p"))
    assert answer[0].startswith("ERROR 55000: replication slots can only be used if")


@pytest.mark.parametrize("major", MAJORS)
def test_where_there_can_be_none(major: int) -> None:
    """The operator has nothing to increase then."""
    clock = Clock()
    client = Client(server(MemoryTimeline(major=major), clock), clock)
    client.start_up()
    with capturedLogs() as events:
        answer = client.send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
    assert answer[0].startswith("ERROR 53400: all replication slots are in use")
    assert told(events) == (
        "ERROR 53400: all replication slots are in use (there are slots only on WAL that is "
        "received (--upstream): let the client do without one)"
    )


@pytest.mark.parametrize(
    ("options", "since", "error"),
    [
        ("RESERVE_WAL RESERVE_WAL", 13, CONFLICTING),
        ("EXPORT_SNAPSHOT", 13, CONFLICTING),
        ("USE_SNAPSHOT RESERVE_WAL", 13, CONFLICTING),
        ("(RESERVE_WAL, RESERVE_WAL off)", 15, CONFLICTING),
        ("(SNAPSHOT 'export')", 15, CONFLICTING),
        ("(TWO_PHASE 7)", 15, CONFLICTING),
        ("(FAILOVER)", 17, CONFLICTING),
        ("(bogus, RESERVE_WAL 7)", 15, ["ERROR XX000: unrecognized option: bogus", "Z I"]),
        ('("RESERVE_WAL")', 15, ["ERROR XX000: unrecognized option: RESERVE_WAL", "Z I"]),
        *(
            (
                f"(RESERVE_WAL {value})",
                15,
                ["ERROR 42601: reserve_wal requires a Boolean value", "Z I"],
            )
            for value in ("2", "yes", "''", '"T"')
        ),
    ],
)
def test_options_that_are_not_right(
    tmp_path: Path, options: str, since: int, error: list[str]
) -> None:
    for major in MAJORS:
        served = Served(tmp_path, major)
        answer = served.ask(served.client(), f'CREATE_REPLICATION_SLOT "S" PHYSICAL {options}')
        if major >= since:
            assert answer == error
        elif major < 15:
            assert answer == SYNTAX
        else:
            assert answer == ["ERROR XX000: unrecognized option: failover", "Z I"]


@pytest.mark.parametrize("major", MAJORS)
def test_logical_decoding_is_for_databases(tmp_path: Path, major: int) -> None:
    served = Served(tmp_path, major)
    client = served.client()
    names = '"wal_level" >= "logical"' if major >= 17 else "wal_level >= logical"
    refusal = [f"ERROR 55000: logical decoding requires {names}", "Z I"]
    for command in (
        "CREATE_REPLICATION_SLOT s LOGICAL p",
        "CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL p USE_SNAPSHOT",
        "START_REPLICATION SLOT s LOGICAL 0/0",
    ):
        assert client.send(query(command)) == refusal
    answer = client.send(query("CREATE_REPLICATION_SLOT s LOGICAL p RESERVE_WAL"))
    assert answer == CONFLICTING
    answer = client.send(query("CREATE_REPLICATION_SLOT s LOGICAL p EXPORT_SNAPSHOT USE_SNAPSHOT"))
    assert answer == CONFLICTING
    if major < 15:
        return
    for options, error in (
        ("(SNAPSHOT 'use', TWO_PHASE off)", refusal[0]),
        ("(FAILOVER)", refusal[0] if major >= 17 else "ERROR XX000: unrecognized option: failover"),
        ("(SNAPSHOT)", "ERROR 42601: snapshot requires a parameter"),
        (
            "(SNAPSHOT bogus)",
            "ERROR 22023: unrecognized value for CREATE_REPLICATION_SLOT option "
            '"snapshot": "bogus"',
        ),
        ("(TWO_PHASE 7)", "ERROR 42601: two_phase requires a Boolean value"),
    ):
        answer = client.send(query(f"CREATE_REPLICATION_SLOT s LOGICAL p {options}"))
        assert answer == [error, "Z I"]


@pytest.mark.parametrize("major", [17, 18])
def test_none_can_be_altered(tmp_path: Path, major: int) -> None:
    served = Served(tmp_path, major)
    client = served.client()
    assert client.send(query("ALTER_REPLICATION_SLOT s (FAILOVER)")) == missing("s")
    served.create(client, "s PHYSICAL")
    refusal = "ERROR 0A000: cannot use ALTER_REPLICATION_SLOT with a physical replication slot"
    for options, error in (
        ("FAILOVER", refusal),
        ("FAILOVER 3", "ERROR 42601: failover requires a Boolean value"),
        ("FAILOVER, FAILOVER", CONFLICTING[0]),
        ("TWO_PHASE", refusal if major >= 18 else "ERROR XX000: unrecognized option: two_phase"),
        ("bogus", "ERROR XX000: unrecognized option: bogus"),
    ):
        answer = client.send(query(f"ALTER_REPLICATION_SLOT s ({options})"))
        assert answer == [error, "Z I"]
        assert served.is_free("s")


# --- temporary ones ------------------------------------------------------------------------------


def test_a_temporary_one_is_its_sessions_and_nowhere_else(served: Served) -> None:
    client, other = served.client(), served.client()
    served.create(client, "t TEMPORARY PHYSICAL RESERVE_WAL", "s PHYSICAL")
    assert served.names_on_disk() == ["s"]
    assert served.position("t") == ["physical", format_lsn(START), "1"]
    assert other.send(query("DROP_REPLICATION_SLOT t")) == active("t", client)
    assert served.stream(other, "t") == active("t", client)
    assert served.stream(client, "t")[0] == "W"
    assert client.send(message(b"c"))[-1] == "Z I"
    assert other.send(query("DROP_REPLICATION_SLOT t")) == active("t", client)
    assert client.send(query("DROP_REPLICATION_SLOT t")) == DROPPED
    assert served.names() == ["s"]


@pytest.mark.parametrize(
    "what", [query("SHOW nosuch"), query("BEGIN"), query("SHOW"), message(b"P", b"\0x\0\0\0")]
)
def test_a_temporary_one_is_gone_when_its_session_has_an_error(served: Served, what: bytes) -> None:
    client, other = served.client(), served.client()
    served.create(client, "t TEMPORARY PHYSICAL", "u TEMPORARY PHYSICAL", "s PHYSICAL")
    served.create(other, "v TEMPORARY PHYSICAL")
    assert client.send(what)[0].startswith("ERROR")
    assert served.names() == ["s", "v"]
    assert client.send(SYNC) == ["Z I"]


def test_or_when_its_session_is_over(served: Served) -> None:
    ways = {
        "goodbye": lambda client: client.send(TERMINATE),
        "connection lost": lambda client: client.transport.drop(),
        "FATAL": lambda client: client.send(message(b"y")),
        "shutdown": lambda client: client.protocol.shut_down(),
        "termination": lambda client: client.protocol.terminate(),
    }
    for name, leave in ways.items():
        client = served.client()
        served.create(client, "t TEMPORARY PHYSICAL")
        leave(client)
        assert served.names() == [], name


# --- settings -----------------------------------------------------------------------------------


def test_slots_are_settings_too(tmp_path: Path) -> None:
    served = Served(
        tmp_path,
        max_replication_slots=3,
        wal_keep_size=64 << 20,
        max_slot_wal_keep_size=3 << 40,
    )
    client = served.client()
    for name, value in (
        *(("max_replication_slots", "3"), ("wal_keep_size", "64MB")),
        *(("max_slot_wal_keep_size", "3TB"), ("max_wal_senders", "10")),
    ):
        assert client.send(query(f"SHOW {name}")) == [
            *(f"T {name}:25(-1)", f"D {value}", "C SHOW", "Z I")
        ]
    client = Served(tmp_path).client()
    for name, value in (("wal_keep_size", "-1"), ("max_slot_wal_keep_size", "-1")):
        assert client.send(query(f"SHOW {name}"))[1] == f"D {value}"
