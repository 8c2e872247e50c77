"""The grammar of replication commands, by major version: what real servers answered to each text,
and what follows from ``repl_gram.y`` and ``repl_scanner.l`` where no server was asked."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from walproto.errors import CommandSyntaxError
from walproto.wire.commands import (
    MAX_TOKENS,
    AlterReplicationSlot,
    BaseBackup,
    Command,
    CreateReplicationSlot,
    DropReplicationSlot,
    IdentifySystem,
    Option,
    Options,
    ReadReplicationSlot,
    Show,
    Sql,
    StartLogicalReplication,
    StartReplication,
    TimelineHistory,
    UploadManifest,
    parse_command,
)

MAJORS = range(13, 19)


def in_all(text: str) -> Command:
    """The command that this is to every major."""
    (command,) = {repr(parse_command(text, major)): 0 for major in MAJORS}
    parsed = parse_command(text, 18)
    assert repr(parsed) == command
    return parsed


def error_in(text: str, major: int) -> str:
    with pytest.raises(CommandSyntaxError) as caught:
        parse_command(text, major)
    assert not caught.value.fatal
    return caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "IDENTIFY_SYSTEM",
        "IDENTIFY_SYSTEM;",
        "IDENTIFY_SYSTEM ;",
        "\n\n IDENTIFY_SYSTEM\n\n",
        "\t IDENTIFY_SYSTEM \t;\n",
    ],
)
def test_identify_system(text: str) -> None:
    assert in_all(text) == IdentifySystem()


@pytest.mark.parametrize(
    ("text", "since"),
    [("\tIDENTIFY_SYSTEM\r\f", 15), ("IDENTIFY_SYSTEM\v", 17), (" \v IDENTIFY_SYSTEM", 17)],
)
def test_white_space_has_become_more(text: str, since: int) -> None:
    for major in MAJORS:
        if major >= since:
            assert parse_command(text, major) == IdentifySystem()


def test_what_is_no_white_space_is_a_character() -> None:
    assert parse_command("\vIDENTIFY_SYSTEM", 15) == Sql("\vIDENTIFY_SYSTEM")
    assert error_in("IDENTIFY_SYSTEM\v", 15) == "syntax error"
    assert error_in("IDENTIFY_SYSTEM\r", 14) == "syntax error"
    assert error_in("IDENTIFY_SYSTEM \N{NO-BREAK SPACE}", 18) == "syntax error"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "identify_system",
        "Identify_System",
        "BEGIN",
        "COMMIT",
        "SET x=1",
        "SET application_name = 'x'",
        '"IDENTIFY_SYSTEM"',
        "é",
        "IDENTIFY_SYSTEMX",
        "IDENTIFY_SYSTEM1",
        "IDENTIFY_SYSTEM$",
        "VACUUM",
        "COPY x TO STDOUT",
        "start_replication 0/0",
    ],
)
def test_another_word_at_the_beginning_is_sql(text: str) -> None:
    assert in_all(text) == Sql(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ";", "-- comment", "/* c */ IDENTIFY_SYSTEM", "'x'", "1", "0/0", "PHYSICAL"),
        *("TIMELINE", "(", "!", "@", "\x01", "-", "#", "SLOT", "0x1", "."),
    ],
)
def test_anything_else_at_the_beginning_is_sql_from_15_on(text: str) -> None:
    for major in MAJORS:
        if major >= 15:
            assert parse_command(text, major) == Sql(text)
        else:
            assert error_in(text, major) == "syntax error"


@pytest.mark.parametrize("text", ['"abc', "'abc", "'", '"', "'it''s", '"a""b', '\n "'])
def test_a_quote_that_does_not_end_is_an_error_even_at_the_beginning(text: str) -> None:
    for major in MAJORS:
        assert error_in(text, major) == "unterminated quoted string"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SHOW wal_segment_size", "wal_segment_size"),
        ("SHOW WAL_Segment_Size;", "wal_segment_size"),
        ('SHOW "wal_segment_size"', "wal_segment_size"),
        ('SHOW "WAL_SEGMENT_SIZE"', "WAL_SEGMENT_SIZE"),
        ('SHOW"DateStyle"', "DateStyle"),
        ("SHOW a.b", "a.b"),
        ("SHOW a . b", "a.b"),
        ('SHOW "a"."B"', "a.B"),
        ("SHOW a.b.c", "a.b.c"),
        ('SHOW ""', ""),
        ('SHOW "slot"', "slot"),
        ('SHOW "SLOT"', "SLOT"),
        ("SHOW slot", "slot"),
        ("SHOW all", "all"),
        ("SHOW É", "É"),
        ('SHOW "é"', "é"),
        ("SHOW \udcff", "\udcff"),
        ("SHOW a$1_", "a$1_"),
    ],
)
def test_show(text: str, name: str) -> None:
    assert in_all(text) == Show(name)


@pytest.mark.parametrize(
    ("text", "tli"),
    [
        ("TIMELINE_HISTORY 1", 1),
        ("TIMELINE_HISTORY 0099;", 99),
        ("TIMELINE_HISTORY\n2147483648", 2**31),
        ("TIMELINE_HISTORY 4294967295", 2**32 - 1),
        ("TIMELINE_HISTORY 4294967297", 1),
        ("TIMELINE_HISTORY 18446744073709551615", 2**32 - 1),
        ("TIMELINE_HISTORY 18446744073709551616", 2**32 - 1),
        ("TIMELINE_HISTORY 99999999999999999999", 2**32 - 1),
        ("TIMELINE_HISTORY " + "9" * 10_000, 2**32 - 1),
        ("TIMELINE_HISTORY " + "0" * 10_000 + "7", 7),
    ],
)
def test_timeline_history(text: str, tli: int) -> None:
    assert in_all(text) == TimelineHistory(tli)


@pytest.mark.parametrize(
    "text",
    [
        *("TIMELINE_HISTORY 0", "TIMELINE_HISTORY 00", "TIMELINE_HISTORY 4294967296"),
        *("TIMELINE_HISTORY 0x2", "TIMELINE_HISTORY 0 foo", "START_REPLICATION 0/0 TIMELINE 0"),
    ],
)
def test_there_is_no_timeline_0(text: str) -> None:
    for major in MAJORS:
        assert error_in(text, major) == "invalid timeline 0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("START_REPLICATION 0/0", StartReplication(0)),
        ("START_REPLICATION 0/3000000 TIMELINE 1", StartReplication(0x3000000, 1)),
        ("START_REPLICATION PHYSICAL 0/1000000 TIMELINE 7;", StartReplication(0x1000000, 7)),
        ("START_REPLICATION 0/1000000TIMELINE 7", StartReplication(0x1000000, 7)),
        ("START_REPLICATION\n0/1000000\nTIMELINE\n7;", StartReplication(0x1000000, 7)),
        ("START_REPLICATION abc/DEF", StartReplication(0xABC_00000DEF)),
        ("START_REPLICATION 1/02345678", StartReplication(0x1_02345678)),
        ("START_REPLICATION 1/123456789", StartReplication(0x1_23456789)),
        ("START_REPLICATION 123456789/1", StartReplication(0x23456789_00000001)),
        ("START_REPLICATION 0/" + "F" * 5000, StartReplication(0xFFFFFFFF)),
        ("START_REPLICATION FFFFFFFF/FFFFFFFF", StartReplication(2**64 - 1)),
        ('START_REPLICATION SLOT "ps1" 0/A000000 TIMELINE 1', StartReplication(10 << 24, 1, "ps1")),
        ("START_REPLICATION SLOT Nope 0/1000000", StartReplication(1 << 24, None, "nope")),
        ('START_REPLICATION SLOT "Bad Name" PHYSICAL 0/1', StartReplication(1, None, "Bad Name")),
        ('START_REPLICATION SLOT "" 0/0', StartReplication(0, None, "")),
        ("START_REPLICATION SLOT s PHYSICAL 0/0 TIMELINE 2;", StartReplication(0, 2, "s")),
    ],
)
def test_start_replication(text: str, expected: StartReplication) -> None:
    assert in_all(text) == expected


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("START_REPLICATION SLOT s LOGICAL 0/1", {}),
        (
            "START_REPLICATION SLOT s LOGICAL 0/1 (proto_version '1', \"Names\" 'a''b', x)",
            {"proto_version": "1", "Names": "a'b", "x": None},
        ),
    ],
)
def test_start_logical_replication(text: str, options: dict[str, Option]) -> None:
    assert in_all(text) == StartLogicalReplication(1, "s", options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CREATE_REPLICATION_SLOT S_up PHYSICAL", CreateReplicationSlot("s_up")),
        ('CREATE_REPLICATION_SLOT "S x" PHYSICAL', CreateReplicationSlot("S x")),
        ("CREATE_REPLICATION_SLOT s  PHYSICAL  ", CreateReplicationSlot("s")),
        (
            "CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL",
            CreateReplicationSlot("s", None, True, (("reserve_wal", None),)),
        ),
        (
            "CREATE_REPLICATION_SLOT s LOGICAL test_decoding",
            CreateReplicationSlot("s", "test_decoding"),
        ),
        (
            "CREATE_REPLICATION_SLOT s LOGICAL p NOEXPORT_SNAPSHOT",
            CreateReplicationSlot("s", "p", False, (("snapshot", "nothing"),)),
        ),
        (  # what does not go together, the grammar does not know
            "CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL EXPORT_SNAPSHOT RESERVE_WAL",
            CreateReplicationSlot(
                "s",
                None,
                False,
                (("reserve_wal", None), ("snapshot", "export"), ("reserve_wal", None)),
            ),
        ),
    ],
)
def test_create_replication_slot(text: str, expected: CreateReplicationSlot) -> None:
    assert in_all(text) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("(RESERVE_WAL)", (("reserve_wal", None),)),
        ("( RESERVE_WAL false )", (("reserve_wal", "false"),)),
        ("(RESERVE_WAL 'on')", (("reserve_wal", "on"),)),
        ("(RESERVE_WAL 2, Bogus)", (("reserve_wal", 2), ("bogus", None))),
        (
            "(RESERVE_WAL, x 1, reserve_wal)",
            (("reserve_wal", None), ("x", 1), ("reserve_wal", None)),
        ),
        ("(\"Quoted\" 'it''s')", (("Quoted", "it's"),)),
    ],
)
def test_generic_options_came_with_15(options: str, expected: Options) -> None:
    text = f"CREATE_REPLICATION_SLOT s PHYSICAL {options}"
    for major in MAJORS:
        if major >= 15:
            parsed = parse_command(text, major)
            assert parsed == CreateReplicationSlot("s", None, False, expected)
        else:
            assert error_in(text, major) == "syntax error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DROP_REPLICATION_SLOT s", DropReplicationSlot("s")),
        ("DROP_REPLICATION_SLOT s WAIT;", DropReplicationSlot("s", True)),
        ('DROP_REPLICATION_SLOT "S x"', DropReplicationSlot("S x")),
        ("DROP_REPLICATION_SLOT ABC", DropReplicationSlot("abc")),
        ('DROP_REPLICATION_SLOT "ABC"', DropReplicationSlot("ABC")),
        ("DROP_REPLICATION_SLOT a$b", DropReplicationSlot("a$b")),
        ("DROP_REPLICATION_SLOT _a", DropReplicationSlot("_a")),
        ("DROP_REPLICATION_SLOT É", DropReplicationSlot("É")),
        ("DROP_REPLICATION_SLOT identify_system", DropReplicationSlot("identify_system")),
        ("DROP_REPLICATION_SLOT wait", DropReplicationSlot("wait")),
    ],
)
def test_drop_replication_slot(text: str, expected: DropReplicationSlot) -> None:
    assert in_all(text) == expected


@pytest.mark.parametrize("command", ["READ_REPLICATION_SLOT", "ALTER_REPLICATION_SLOT"])
def test_a_name_is_cut_to_63_bytes(command: str) -> None:
    options = " (x)" if command.startswith("ALTER") else ""
    for name, kept in [
        ("n" * 70, "n" * 63),
        ('"' + "N" * 70 + '"', "N" * 63),
        ("N" * 64, "n" * 63),
        ("n" * 63, "n" * 63),
        ("é" * 32, "é" * 31),
    ]:
        parsed = parse_command(f"{command} {name}{options}", 18)
        assert isinstance(parsed, ReadReplicationSlot | AlterReplicationSlot)
        assert parsed.slot == kept


def test_two_quotes_are_one_in_a_name_of_18() -> None:
    assert parse_command('DROP_REPLICATION_SLOT "a""b"', 18) == DropReplicationSlot('a"b')
    for major in range(13, 18):
        assert error_in('DROP_REPLICATION_SLOT "a""b"', major) == "syntax error"


@pytest.mark.parametrize(
    ("text", "since", "expected"),
    [
        ("READ_REPLICATION_SLOT s15", 15, ReadReplicationSlot("s15")),
        ('READ_REPLICATION_SLOT "rwslot"', 15, ReadReplicationSlot("rwslot")),
        (
            "ALTER_REPLICATION_SLOT s (FAILOVER true)",
            17,
            AlterReplicationSlot("s", (("failover", "true"),)),
        ),
        ("UPLOAD_MANIFEST", 17, UploadManifest()),
    ],
)
def test_what_came_later_is_sql_before(text: str, since: int, expected: Command) -> None:
    for major in MAJORS:
        assert parse_command(text, major) == (expected if major >= since else Sql(text))


PG_BASEBACKUP = (
    "BASE_BACKUP ( LABEL 'pg_basebackup base backup',  PROGRESS,  CHECKPOINT 'fast',  WAIT 0,  "
    "MANIFEST 'yes',  TARGET 'client')"
)


def test_base_backup() -> None:
    assert in_all("BASE_BACKUP") == BaseBackup()
    assert parse_command(PG_BASEBACKUP, 18) == BaseBackup(
        {
            "label": "pg_basebackup base backup",
            "progress": None,
            "checkpoint": "fast",
            "wait": 0,
            "manifest": "yes",
            "target": "client",
        }
    )
    legacy = "BASE_BACKUP LABEL 'x' PROGRESS FAST MAX_RATE 32"
    assert parse_command(legacy, 14) == BaseBackup(
        {"label": "x", "progress": None, "fast": None, "max_rate": "32"}
    )
    assert error_in(legacy, 15) == "syntax error"
    assert error_in(PG_BASEBACKUP, 14) == "syntax error"


@pytest.mark.parametrize(
    "text",
    [
        *("IDENTIFY_SYSTEM;;", "IDENTIFY_SYSTEM; SHOW x", "IDENTIFY_SYSTEM foo"),
        *("IDENTIFY_SYSTEM -- c", "SHOW", "SHOW 1", "SHOW 'x'", "SHOW TIMELINE", "SHOW SLOT"),
        *("SHOW wal_segment_size x", "SHOW a.", "SHOW .a", "TIMELINE_HISTORY"),
        *("TIMELINE_HISTORY -1", "TIMELINE_HISTORY 1x", "TIMELINE_HISTORY '2'"),
        *("TIMELINE_HISTORY foo", "TIMELINE_HISTORY 2 foo", "START_REPLICATION"),
        *("START_REPLICATION 0/0 TIMELINE", "START_REPLICATION 0/0 TIMELINE 2 foo"),
        *("START_REPLICATION xx", "START_REPLICATION 0", "START_REPLICATION 0/"),
        *("START_REPLICATION /0", "START_REPLICATION 0/ 0", "START_REPLICATION 0/G"),
        *("START_REPLICATION 0/1G", "START_REPLICATION LOGICAL 0/0"),
        *("START_REPLICATION SLOT 'x' 0/0", "START_REPLICATION TIMELINE 1 0/0"),
        *("START_REPLICATION PHYSICAL SLOT x 0/0", "START_REPLICATION SLOT s LOGICAL 0/0 ()"),
        *("START_REPLICATION SLOT s LOGICAL 0/0 (a 1)", "START_REPLICATION SLOT s LOGICAL 0/0 (a"),
        *("CREATE_REPLICATION_SLOT s", "CREATE_REPLICATION_SLOT s PHYSICAL ()"),
        *("CREATE_REPLICATION_SLOT s LOGICAL", "CREATE_REPLICATION_SLOT s PHYSICAL (a,)"),
        *("CREATE_REPLICATION_SLOT s PHYSICAL (1)", "CREATE_REPLICATION_SLOT s PHYSICAL (a b c)"),
        *("DROP_REPLICATION_SLOT s FORCE", "DROP_REPLICATION_SLOT", "DROP_REPLICATION_SLOT 1a"),
        *("DROP_REPLICATION_SLOT WAIT", "DROP_REPLICATION_SLOT IDENTIFY_SYSTEM"),
        *("BASE_BACKUP ()", "READ_REPLICATION_SLOT", "ALTER_REPLICATION_SLOT s"),
        *("ALTER_REPLICATION_SLOT s ()", "UPLOAD_MANIFEST x"),
    ],
)
def test_anything_else_is_a_syntax_error(text: str) -> None:
    for major in (17, 18):
        assert error_in(text, major) == "syntax error"
    if text.split("_")[0] not in ("READ", "ALTER", "UPLOAD"):
        for major in range(13, 17):
            assert error_in(text, major) == "syntax error"


@pytest.mark.parametrize(
    "text",
    ['SHOW "abc', "BASE_BACKUP (LABEL 'x", 'IDENTIFY_SYSTEM "abc', "DROP_REPLICATION_SLOT '"],
)
def test_a_quote_that_does_not_end_is_an_error_of_its_own(text: str) -> None:
    assert error_in(text, 15) == error_in(text, 18) == "unterminated quoted string"


WORDS = st.sampled_from(
    [
        *("IDENTIFY_SYSTEM", "BASE_BACKUP", "START_REPLICATION", "CREATE_REPLICATION_SLOT"),
        *("READ_REPLICATION_SLOT", "DROP_REPLICATION_SLOT", "ALTER_REPLICATION_SLOT", "SHOW"),
        *("TIMELINE_HISTORY", "UPLOAD_MANIFEST", "SLOT", "LOGICAL", "PHYSICAL", "TIMELINE"),
        *("TEMPORARY", "WAIT", "RESERVE_WAL", "(", ")", ",", ";", ".", "'", '"', "'a'", '"a"'),
        *("a", "1", "0", "0/0", "F/F"),
    ]
)


def test_a_command_is_not_longer_than_any_that_is_of_use() -> None:
    """Nobody else waits until a list of some ten thousand options has been read."""
    for begin, each, tokens, end in (
        ("START_REPLICATION SLOT s LOGICAL 0/0 (", "a,", 2, "a)"),
        ("SHOW a", ".a", 2, ""),
        ("BASE_BACKUP (", "a 1,", 3, "a)"),
    ):
        assert not isinstance(
            parse_command(begin + each * (MAX_TOKENS // tokens - 10) + end, 18), Sql
        )
        text = begin + each * (MAX_TOKENS // tokens) + end
        assert error_in(text, 18) == f"replication command has more than {MAX_TOKENS} tokens"


@given(
    st.one_of(
        st.lists(WORDS, max_size=8).map(" ".join),
        st.lists(WORDS | st.text(max_size=3), max_size=8).map("".join),
        st.text(),
    ),
    st.sampled_from(MAJORS),
)
@example('SHOW "' + '""' * 100_000, 18)
@example("DROP_REPLICATION_SLOT '" + "''" * 100_000, 18)
@example("TIMELINE_HISTORY " + "1" * 100_000, 18)
@example("SHOW " + "A" * 100_000, 18)
@example(" " * 1_000_000 + "IDENTIFY_SYSTEM", 18)
def test_any_text_is_a_command_or_a_syntax_error(text: str, major: int) -> None:
    try:
        command: object = parse_command(text, major)
    except CommandSyntaxError as error:
        command = error.message
    known = ("syntax error", "unterminated quoted string", "invalid timeline 0")
    assert isinstance(command, Command) or command in known
