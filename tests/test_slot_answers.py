"""What is said about slots, held against a real server: conversations with a primary and with its
relay at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.both import Both, comparable, say
from tests.fakes import SYNC, message, query, startup, status
from tests.postgres import installations, lsn_to_int
from tests.relays import Relayed, relayed

SLOTS = 4
"""How many slots the relay may have; the primary may have one more, for the relay."""
SENDERS = 6
"""How many clients either may have besides."""

CUT = "n" * 63


@pytest.fixture(
    scope="module",
    params=[known for known in installations() if known.major in (15, 18)],
    ids=lambda installation: f"pg{installation.major}",
)
def served(request: pytest.FixtureRequest) -> Iterator[Relayed]:
    options = ("--max-replication-slots", f"{SLOTS}", "--max-wal-senders", f"{SENDERS}")
    settings = {"max_replication_slots": f"{SLOTS + 1}", "max_wal_senders": f"{SENDERS + 1}"}
    with relayed(request.param, *options, settings=settings) as setting:
        yield setting
        setting.relay.check_log()


@pytest.fixture
def both(served: Relayed) -> Iterator[Both]:
    with contextlib.ExitStack() as running:
        both = Both(served, running)
        yield both
        both.end()


# --- one session ---------------------------------------------------------------------------------

CREATE, DROP, READ = "CREATE_REPLICATION_SLOT", "DROP_REPLICATION_SLOT", "READ_REPLICATION_SLOT"
START, ALTER = "START_REPLICATION SLOT", "ALTER_REPLICATION_SLOT"
LOGICAL = f"{CREATE} s LOGICAL test_decoding"


def with_options(*options: str) -> list[str]:
    """Slots created with each of these, read and dropped."""
    return [
        command
        for each in options
        for command in (f"{CREATE} s PHYSICAL {each}", f"{READ} s", f"{DROP} s")
    ]


ONE_SESSION = {
    "what there is not": [
        *(
            f"{READ} s",
            f"{DROP} s",
            f"{DROP} s WAIT",
            f"{START} s 0/0",
            f"{START} s 0/0 TIMELINE 7",
        ),
        *(f'{READ} ""', f'{DROP} ""', f'{START} "" 0/0', f'{DROP} "S"', f"{ALTER} s (FAILOVER)"),
    ],
    "its life": [
        *(f"{CREATE} s PHYSICAL", f"{READ} s", f"{CREATE} s PHYSICAL", f"{READ} s;"),
        *(f"{CREATE} t TEMPORARY PHYSICAL", f"{READ} t", f"{CREATE} s TEMPORARY PHYSICAL"),
        *(f"{READ} t", f"{DROP} s", f"{DROP} s", f"{READ} s"),
    ],
    "names": [
        *(f"{CREATE} Foo PHYSICAL", f"{READ} foo", f"{READ} FOO", f'{READ} "FOO"', f"{DROP} fOO"),
        *(f'{CREATE} "foo" PHYSICAL', f'{DROP} "foo" WAIT;', f'{CREATE} "Foo" PHYSICAL'),
        *(f'{CREATE} "" PHYSICAL', f'{CREATE} "a b" PHYSICAL', f"{CREATE} a$ PHYSICAL"),
        *(f'{CREATE} "ä" PHYSICAL', f"{CREATE} ä PHYSICAL", f'{CREATE} "a\nb" PHYSICAL'),
        *(f"{CREATE} 's' PHYSICAL", f"{CREATE} 1s PHYSICAL", f'{CREATE} "a""b" PHYSICAL'),
        *(f"{CREATE} physical PHYSICAL", f"{DROP} physical", f"{CREATE} PHYSICAL PHYSICAL"),
        *(f"{CREATE} {'N' * 64} PHYSICAL", f'{READ} "{CUT}"', f'{DROP} "{CUT}xyz"'),
        *(f'{CREATE} "{CUT}" PHYSICAL', f"{DROP} {CUT}", f"{CREATE} _0 PHYSICAL", f"{DROP} _0"),
    ],
    "grammar": [
        *(f"{CREATE} s", f"{CREATE} s TEMPORARY", f"{CREATE} s LOGICAL", f"{CREATE} PHYSICAL"),
        *(
            f"{CREATE} s PHYSICAL TEMPORARY",
            f"{CREATE} s PHYSICAL; SELECT 1",
            f"{CREATE.lower()} s",
        ),
        *(f"{DROP} s FORCE", f"{DROP}", f"{READ}", f"{READ} s t", f"{START} 0/0", f"{ALTER} s ()"),
        *(f"{CREATE}  s\tPHYSICAL\n;", f"{DROP}\ns\nWAIT", f"{CREATE} s PHYSICAL ()"),
    ],
    "options": with_options(
        *("RESERVE_WAL", "(RESERVE_WAL)", "(reserve_wal)", '("reserve_wal")', "(RESERVE_WAL true)"),
        *("(RESERVE_WAL TRUE)", "(RESERVE_WAL 'On')", "(RESERVE_WAL 1)", "( RESERVE_WAL  0 )"),
        *("(RESERVE_WAL off)", "(RESERVE_WAL 'False')", "(RESERVE_WAL 4294967297)"),
    ),
    "wrong options": [
        f"{CREATE} s PHYSICAL {options}"
        for options in (
            *("RESERVE_WAL RESERVE_WAL", "EXPORT_SNAPSHOT", "NOEXPORT_SNAPSHOT", "USE_SNAPSHOT"),
            *("TWO_PHASE", "RESERVE_WAL TWO_PHASE", "(RESERVE_WAL, RESERVE_WAL)", "(bogus)"),
            *("(RESERVE_WAL, bogus)", "(bogus, RESERVE_WAL, RESERVE_WAL)", '("RESERVE_WAL")'),
            *("(SNAPSHOT 'export')", "(TWO_PHASE)", "(FAILOVER)", "(RESERVE_WAL 2)", "(a b c)"),
            *("(RESERVE_WAL yes)", "(RESERVE_WAL '')", '(RESERVE_WAL "T")', "(RESERVE_WAL,)"),
            *("(RESERVE_WAL RESERVE_WAL)", "(RESERVE_WAL -1)", "(1)", "RESERVE_WAL (RESERVE_WAL)"),
        )
    ],
    "logical ones": [
        *(LOGICAL, f'{CREATE} "S" LOGICAL test_decoding', f"{LOGICAL} EXPORT_SNAPSHOT"),
        *(f"{LOGICAL} RESERVE_WAL", f"{LOGICAL} EXPORT_SNAPSHOT NOEXPORT_SNAPSHOT"),
        *(f"{LOGICAL} TWO_PHASE USE_SNAPSHOT", f"{LOGICAL} (SNAPSHOT 'use', TWO_PHASE off)"),
        *(f"{LOGICAL} (SNAPSHOT)", f"{LOGICAL} (SNAPSHOT bogus)", f"{LOGICAL} (SNAPSHOT 7)"),
        *(f"{LOGICAL} (TWO_PHASE 7)", f"{LOGICAL} (FAILOVER)", f"{LOGICAL} (FAILOVER bogus)"),
        *(f"{LOGICAL} (bogus)", f"{LOGICAL} (RESERVE_WAL)", f"{START} s LOGICAL 0/0"),
        *(f"{CREATE} s PHYSICAL", LOGICAL, f"{START} s LOGICAL 0/0 (a 'b')"),
    ],
    "altered": [
        *(f"{CREATE} s PHYSICAL", f"{ALTER} s (FAILOVER)", f"{ALTER} s (FAILOVER 3)"),
        *(f"{ALTER} s (bogus)", f"{ALTER} s (FAILOVER, FAILOVER)", f"{ALTER} s (TWO_PHASE)"),
        *(f"{ALTER} s (FAILOVER bogus)", f"{ALTER} t (FAILOVER false)", f"{DROP} s"),
    ],
    "a start that is not possible": [
        *(f"{CREATE} s PHYSICAL", "IDENTIFY_SYSTEM", f"{START} s 0/0", f"{START} s 0/0 TIMELINE 7"),
        *(f"{START} s F/0", f"{START} s PHYSICAL F/0 TIMELINE 1", f"{START} s 0/0 TIMELINE 0"),
        *(f"{READ} s", f"{DROP} s", "START_REPLICATION F/0", "START_REPLICATION 0/0"),
    ],
    "as many as there may be": [
        *(f"{CREATE} {name} PHYSICAL" for name in "abcde"),
        *(f"{CREATE} a PHYSICAL", f'{CREATE} "A" PHYSICAL', f"{CREATE} e TEMPORARY PHYSICAL"),
        *(f"{DROP} b", f"{CREATE} e TEMPORARY PHYSICAL", f"{CREATE} b PHYSICAL"),
        *(f"{READ} e", f"{CREATE} b PHYSICAL"),
    ],
}


@pytest.mark.parametrize("name", ONE_SESSION)
def test_with_one_session(both: Both, name: str) -> None:
    for command in ONE_SESSION[name]:
        both.ask("a", command)
    both.slots()


def test_commands_may_come_at_once(both: Both) -> None:
    commands = [*ONE_SESSION["its life"], *ONE_SESSION["options"], "SHOW block_size"]
    both.send("a", *map(query, commands), SYNC, query("SHOW server_encoding"))
    for _ in commands:
        both.hear("a")
    assert both.hear("a") == ["Z I"]
    assert both.hear("a")[2] == "C SHOW"


def test_settings(both: Both) -> None:
    both.ask("a", "SHOW max_slot_wal_keep_size")
    for name in (
        *("max_replication_slots", "max_wal_senders", "wal_keep_size", "max_slot_wal_keep_size"),
    ):
        for value in ("1", "bogus"):
            theirs, ours = (say(port, startup(**{name: value})) for port in both.ports)
            assert ours == theirs


def test_places(both: Both) -> None:
    names = [f"s{number}" for number in range(SENDERS)]
    for name in names:
        both.session(name)
    theirs, ours = (say(port, startup()) for port in both.ports)
    assert comparable(ours) == comparable(theirs)
    both.leave(names.pop())
    both.ask("another", "SHOW block_size")


# --- several -------------------------------------------------------------------------------------


def test_one_in_use(both: Both) -> None:
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.stream("a", "s")
    for command in (f"{START} s 0/0 TIMELINE 7", f"{DROP} s", f"{CREATE} s PHYSICAL", f"{READ} s"):
        both.ask("b", command)
    both.send("b", query(f"{DROP} s WAIT"))
    both.wait_waiting("b")
    both.end_stream("a")
    assert both.hear("b") == ["C DROP_REPLICATION_SLOT", "Z I"]
    both.ask("a", f"{DROP} s")


def test_who_waits_may_be_cancelled(both: Both) -> None:
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.stream("a", "s")
    both.ask("b", f"{CREATE} t TEMPORARY PHYSICAL")
    both.send("b", query(f"{DROP} s WAIT"), query(f"{READ} t"), query(f"{READ} s"))
    both.wait_waiting("b")
    assert both.cancel("b")[0].startswith("ERROR 57014")
    assert both.hear("b")[1] == "D NULL NULL NULL"
    assert both.hear("b")[1] == "D physical NULL NULL"
    both.end_stream("a")
    both.leave("b")
    assert both.slots() == ["s"]


def test_of_two_who_wait_one_drops_it(both: Both) -> None:
    both.ask("a", f"{CREATE} s TEMPORARY PHYSICAL")
    both.send("b", query(f"{DROP} s WAIT"))
    both.wait_waiting("b")
    both.leave("a")
    assert both.hear("b")[0].startswith("ERROR 42704")
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.stream("a", "s")
    for name in "bc":
        both.send(name, query(f"{DROP} s WAIT"))
    both.wait_waiting("b")
    both.leave("a")
    for theirs_and_ours in zip(both.session("b"), both.session("c"), strict=True):
        answers = sorted(session.hear("Z I")[0] for session in theirs_and_ours)
        assert answers == [
            "C DROP_REPLICATION_SLOT",
            'ERROR 42704: replication slot "s" does not exist',
        ]


def test_to_alter_one_in_use(both: Both) -> None:
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.stream("a", "s")
    both.send("b", query(f"{ALTER} s (FAILOVER)"))
    if both.major >= 17:  # before, it was SQL, and refused as such
        both.wait_waiting("b")
    both.end_stream("a")
    assert both.hear("b")[0].startswith("ERROR 0A000")


def test_temporary_ones(both: Both) -> None:
    both.ask("a", f"{CREATE} t TEMPORARY PHYSICAL RESERVE_WAL")
    both.ask("a", f"{CREATE} u TEMPORARY PHYSICAL")
    for command in (f"{READ} t", f"{DROP} t", f"{START} t 0/0", f"{CREATE} t PHYSICAL"):
        both.ask("b", command)
    both.stream("a", "t")
    both.end_stream("a")
    both.ask("b", f"{DROP} t")
    both.ask("a", f"{DROP} u")
    both.ask("b", f"{READ} u")
    both.ask("a", "SELECT 1")
    both.ask("b", f"{READ} t")
    both.ask("a", f"{CREATE} t TEMPORARY PHYSICAL")
    both.send("a", message(b"P", b"\0SELECT 1\0\0\0"), SYNC)
    both.hear("a")
    both.ask("b", f"{READ} t")
    both.ask("a", f"{CREATE} t TEMPORARY PHYSICAL")
    both.leave("a")
    both.ask("b", f"{READ} t")


def test_it_is_free_when_a_stream_ends(both: Both) -> None:
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.ask("a", f"{CREATE} t TEMPORARY PHYSICAL")
    both.stream("a", "s")
    both.send("a", message(b"d", b"r1234"))
    both.hear("a")
    both.ask("b", f"{READ} t")
    both.stream("b", "s")
    assert both.cancel("b")[0].startswith("ERROR 57014")
    both.ask("b", f"{READ} s")
    both.stream("a", "s")
    both.leave("a")
    both.stream("b", "s")
    both.end_stream("b")


def test_what_is_flushed_is_its_position(both: Both) -> None:
    both.ask("a", f"{CREATE} s PHYSICAL")
    both.stream("a", "s")
    _, end = (session.run("IDENTIFY_SYSTEM")[1].split()[3] for session in both.session("b"))
    lsn = lsn_to_int(end) - 24
    for write, flush, apply in (
        *((lsn, 0, 0), (lsn, lsn - 8, lsn - 16), (lsn, 0, lsn), (0, 0, 0), (lsn, lsn, 0)),
        *((lsn - 8, lsn - 8, 0), (lsn + 2**32, lsn + 2**32, lsn), (lsn, lsn, lsn)),
    ):
        both.send("a", status(write, flush, apply, reply=1))
        for session in both.session("a"):
            session.hear("k ")
        theirs, ours = (session.run(f"{READ} s") for session in both.session("b"))
        assert ours == theirs
    both.end_stream("a")
    both.leave("a")
    theirs, ours = (session.run(f"{READ} s") for session in both.session("b"))
    assert ours == theirs
    assert ours[1] == f"D physical 0/{lsn:X} 1"
