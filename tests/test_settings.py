"""Configuration parameters: what SHOW says of them, which are reported, what a client may set."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from walproto.errors import (
    CantChangeRuntimeParam,
    InvalidParameterValue,
    ReportedError,
    UndefinedObject,
)
from walproto.server.settings import (
    Settings,
    format_milliseconds,
    format_size,
    parse_milliseconds,
)

MAJORS = range(13, 19)


def settings(major: int = 18, **more: str) -> Settings:
    server = {
        "server_version": f"{major}.6",
        "server_version_num": f"{major}0006",
        "session_authorization": "postgres",
        "wal_segment_size": "16MB",
    }
    return Settings(major, server | more, 60.0)


def refusal(name: str, value: str, major: int = 18) -> tuple[str, str, str | None, str | None]:
    with pytest.raises(ReportedError) as caught:
        settings(major).set(name, value)
    error = caught.value
    assert error.fatal
    return error.sqlstate, error.message, error.detail, error.hint


def options_refusal(options: str) -> tuple[str, str, str | None]:
    with pytest.raises(ReportedError) as caught:
        settings().set_options(options)
    assert caught.value.fatal
    return caught.value.sqlstate, caught.value.message, caught.value.hint


def with_options(options: str) -> Settings:
    made = settings()
    made.set_options(options)
    return made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wal_segment_size", ("wal_segment_size", "16MB")),
        ("WAL_SEGMENT_SIZE", ("wal_segment_size", "16MB")),
        ("server_version", ("server_version", "18.6")),
        ("server_version_Num", ("server_version_num", "180006")),
        ("data_directory_mode", ("data_directory_mode", "0700")),
        ("wal_sender_timeout", ("wal_sender_timeout", "1min")),
        ("max_replication_slots", ("max_replication_slots", "0")),
        ("max_wal_senders", ("max_wal_senders", "10")),
        ("wal_keep_size", ("wal_keep_size", "0")),
        ("max_slot_wal_keep_size", ("max_slot_wal_keep_size", "-1")),
        ("wal_level", ("wal_level", "replica")),
        ("block_size", ("block_size", "8192")),
        ("wal_block_size", ("wal_block_size", "8192")),
        ("in_hot_standby", ("in_hot_standby", "off")),
        ("transaction_read_only", ("transaction_read_only", "off")),
        ("default_transaction_read_only", ("default_transaction_read_only", "off")),
        ("application_name", ("application_name", "")),
        ("client_encoding", ("client_encoding", "SQL_ASCII")),
        ("server_encoding", ("server_encoding", "SQL_ASCII")),
        ("datestyle", ("DateStyle", "ISO, MDY")),
        ("timezone", ("TimeZone", "Etc/UTC")),
        ("intervalstyle", ("IntervalStyle", "postgres")),
        ("integer_datetimes", ("integer_datetimes", "on")),
        ("standard_conforming_strings", ("standard_conforming_strings", "on")),
        ("is_superuser", ("is_superuser", "on")),
        ("session_authorization", ("session_authorization", "postgres")),
        ("search_path", ("search_path", '"$user", public')),
        ("hot_standby", ("hot_standby", "on")),
        ("log_replication_commands", ("log_replication_commands", "off")),
        ("synchronous_commit", ("synchronous_commit", "on")),
        ("scram_iterations", ("scram_iterations", "4096")),
        ("work_mem", ("work_mem", "4MB")),
        ("extra_float_digits", ("extra_float_digits", "1")),
        ("idle_session_timeout", ("idle_session_timeout", "0")),
    ],
)
def test_show_says_what_a_server_says(name: str, expected: tuple[str, str]) -> None:
    assert settings().show(name) == expected


def test_a_server_has_its_own_of_what_a_client_may_not_set() -> None:
    made = settings(max_wal_senders="3", wal_keep_size="64MB")
    assert made.show("max_wal_senders")[1] == "3"
    assert made.show("wal_keep_size")[1] == "64MB"
    for name, when in (
        ("max_wal_senders", "without restarting the server"),
        ("wal_keep_size", "now"),
    ):
        with pytest.raises(CantChangeRuntimeParam) as caught:
            made.set(name, "5")
        assert caught.value.message == f'parameter "{name}" cannot be changed {when}'


@pytest.mark.parametrize("name", ["nosuch", "", "a.b", "a.b.c", "work_mem.x", "system_identifier"])
def test_there_are_no_others(name: str) -> None:
    with pytest.raises(UndefinedObject) as caught:
        settings().show(name)
    assert caught.value.message == f'unrecognized configuration parameter "{name}"'
    assert not caught.value.fatal


def test_some_came_later() -> None:
    for name, since in [("scram_iterations", 16), ("transaction_timeout", 17)]:
        for major in MAJORS:
            if major >= since:
                settings(major).show(name)
            else:
                with pytest.raises(UndefinedObject):
                    settings(major).show(name)


def test_what_is_reported_has_become_more() -> None:
    reported = {major: {name for name, _ in settings(major).reported()} for major in MAJORS}
    assert reported[13] == {
        *("application_name", "client_encoding", "DateStyle", "integer_datetimes"),
        *("IntervalStyle", "is_superuser", "server_encoding", "server_version"),
        *("session_authorization", "standard_conforming_strings", "TimeZone"),
    }
    assert reported[14] - reported[13] == {"default_transaction_read_only", "in_hot_standby"}
    assert reported[15] == reported[14]
    assert reported[16] - reported[15] == {"scram_iterations"}
    assert reported[17] == reported[16]
    assert reported[18] - reported[17] == {"search_path"}
    assert all(reported[major] <= reported[major + 1] for major in range(13, 18))


def test_what_is_reported_is_what_was_set() -> None:
    made = settings()
    made.set("application_name", "me")
    made.set("timezone", "Europe/Berlin")
    reported = dict(made.reported())
    assert reported["application_name"] == made["application_name"] == "me"
    assert reported["TimeZone"] == "Europe/Berlin"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("client_encoding", "LATIN1", "LATIN1"),
        ("client_encoding", "utf8", "UTF8"),
        ("client_encoding", "'utf-8'", "UTF8"),
        ("client_encoding", "UNICODE", "UNICODE"),
        ("client_encoding", "latin-1", "LATIN1"),
        ("client_encoding", "sql_ascii", "SQL_ASCII"),
        ("CLIENT_ENCODING", "WIN1252", "WIN1252"),
        ("DateStyle", "German", "German, DMY"),
        ("DateStyle", "ISO", "ISO, MDY"),
        ("datestyle", "iso, dmy", "ISO, DMY"),
        ("DateStyle", "", "ISO, MDY"),
        ("TimeZone", "UTC", "UTC"),
        ("IntervalStyle", "iso_8601", "iso_8601"),
        ("application_name", "x" * 100, "x" * 63),
        ("application_name", "", ""),
        ("standard_conforming_strings", "off", "off"),
        ("extra_float_digits", "3", "3"),
        ("wal_sender_timeout", "6000", "6s"),
    ],
)
def test_a_client_may_set(name: str, value: str, expected: str) -> None:
    made = settings()
    made.set(name, value)
    assert made.show(name)[1] == expected


def test_an_application_name_does_not_spoil_the_log() -> None:
    name = b"caf\xc3\xa9 \x01\xff\x7f~".decode("utf-8", "surrogateescape")
    for major in MAJORS:
        made = settings(major)
        made.set("application_name", name)
        expected = r"caf\xc3\xa9 \x01\xff\x7f~" if major >= 16 else "caf?? ???~"
        assert made["application_name"] == expected


def test_a_parameter_of_an_extension_is_taken_and_forgotten() -> None:
    made = settings()
    made.set("a.b", "1")
    with pytest.raises(UndefinedObject):
        made.show("a.b")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "nosuchguc",
            "1",
            ("42704", 'unrecognized configuration parameter "nosuchguc"', None, None),
        ),
        ("_pq_", "1", ("42704", 'unrecognized configuration parameter "_pq_"', None, None)),
        (
            "client_encoding",
            "bogus",
            ("22023", 'invalid value for parameter "client_encoding": "bogus"', None, None),
        ),
        (
            "client_encoding",
            "",
            ("22023", 'invalid value for parameter "client_encoding": ""', None, None),
        ),
        (
            "DateStyle",
            "bogus",
            (
                "22023",
                'invalid value for parameter "DateStyle": "bogus"',
                'Unrecognized key word: "bogus".',
                None,
            ),
        ),
        *(
            (name, "1", ("55P02", f'parameter "{name}" cannot be changed', None, None))
            for name in (
                *("server_version", "wal_segment_size", "integer_datetimes", "in_hot_standby"),
                *("is_superuser", "server_encoding", "block_size"),
            )
        ),
        *(
            (
                name,
                "1",
                (
                    "55P02",
                    f'parameter "{name}" cannot be changed without restarting the server',
                    None,
                    None,
                ),
            )
            for name in ("wal_level", "max_replication_slots", "max_wal_senders", "hot_standby")
        ),
        *(
            (name, value, ("55P02", f'parameter "{name}" cannot be changed now', None, None))
            for name in ("wal_keep_size", "max_slot_wal_keep_size")
            for value in ("1GB", "bogus")
        ),
    ],
)
def test_a_client_may_not_set(
    name: str, value: str, expected: tuple[str, str, str | None, str | None]
) -> None:
    assert refusal(name, value) == expected


def test_session_authorization_is_refused_one_way_or_the_other() -> None:
    assert refusal("session_authorization", "x")[0] in ("22023", "55P02")


UNITS = 'Valid units for this parameter are "us", "ms", "s", "min", "h", and "d".'


@pytest.mark.parametrize(
    ("text", "milliseconds", "shown"),
    [
        ("6s", 6000, "6s"),
        ("6000", 6000, "6s"),
        ("1.5min", 90_000, "90s"),
        ("0x10", 16, "16ms"),
        ("0X1f", 31, "31ms"),
        ("010", 8, "8ms"),
        ("0.4ms", 0, "0"),
        ("1500us", 2, "2ms"),
        ("1e3", 1000, "1s"),
        (" 6 s ", 6000, "6s"),
        ("+5s", 5000, "5s"),
        ("0", 0, "0"),
        ("-0", 0, "0"),
        ("60000", 60_000, "1min"),
        ("2h", 7_200_000, "2h"),
        ("2d", 172_800_000, "2d"),
        (".5s", 500, "500ms"),
        ("2147483647", 2_147_483_647, "2147483647ms"),
    ],
)
def test_a_time_is_read_and_shown(text: str, milliseconds: int, shown: str) -> None:
    assert parse_milliseconds("wal_sender_timeout", text) == milliseconds
    assert format_milliseconds(milliseconds) == shown


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("bogus", None),
        ("", None),
        (" ", None),
        ("s", None),
        (".", None),
        ("e1", None),
        (".e1", None),
        ("1 2", UNITS),
        ("6S", UNITS),
        ("6m", UNITS),
        ("0x", UNITS),
        ("9999999999", "Value exceeds integer range."),
        ("2147483648", "Value exceeds integer range."),
        ("1e999", "Value exceeds integer range."),
        ("-1e999", "Value exceeds integer range."),
        ("0x" + "f" * 2000, "Value exceeds integer range."),
        ("-0x" + "f" * 2000, "Value exceeds integer range."),
        ("0" + "7" * 2000, "Value exceeds integer range."),
        ("1" * 9000 + "!", None),
        (" " * 9000 + "!", None),
        ("1" + "a" * 9000 + "!", None),
    ],
)
def test_what_is_no_time_is_refused(text: str, hint: str | None) -> None:
    with pytest.raises(InvalidParameterValue) as caught:
        parse_milliseconds("x", text)
    assert caught.value.message == f'invalid value for parameter "x": "{text}"'
    assert caught.value.hint == hint


def test_a_time_is_not_negative() -> None:
    assert refusal("wal_sender_timeout", "-5")[:2] == (
        "22023",
        '-5 ms is outside the valid range for parameter "wal_sender_timeout" '
        "(0 ms .. 2147483647 ms)",
    )


@given(st.text(max_size=10) | st.text("0123456789.eExabmsundh+- ", max_size=20))
@example("1" * 5000 + "e" + "1" * 5000)
def test_any_text_is_a_time_or_refused(text: str) -> None:
    try:
        milliseconds = parse_milliseconds("x", text)
    except InvalidParameterValue:
        return
    assert 0 <= milliseconds < 2**31
    shown = format_milliseconds(milliseconds)
    assert parse_milliseconds("x", shown) == milliseconds


def test_sizes_are_shown_in_units_from_mb_on() -> None:
    sizes = [format_size(1 << power) for power in range(20, 31)]
    assert sizes == [*(f"{1 << power}MB" for power in range(10)), "1GB"]
    megabytes = {0: "0", 1023: "1023MB", 1536: "1536MB", 3 << 10: "3GB", 1 << 20: "1TB"}
    assert {size: format_size(size << 20) for size in megabytes} == megabytes
    assert format_size(None) == "-1"


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ("-c wal_sender_timeout=6s", 6),
        ("-cwal_sender_timeout=6000", 6),
        ("--wal-sender-timeout=5s", 5),
        ("--wal_sender_timeout=5s", 5),
        ("-c wal-sender-timeout=7s", 7),
        ("-c WAL_SENDER_TIMEOUT=8s", 8),
        ("-c wal_sender_timeout=1s -c wal_sender_timeout=2s", 2),
        ("  -c   wal_sender_timeout=3s  ", 3),
        (r"-c wal_sender_timeout=6\ s", 6),
        ("-c wal_sender_timeout=0", 0),
        ("-c wal_sender_timeout=250ms", 0.25),
        ("", 60),
        (" ", 60),
        ("--", 60),
        ("-- -c wal_sender_timeout=6s", 60),
        ("-c a.b=1 -c a-b.c=1", 60),
    ],
)
def test_options_set_the_timeout(options: str, seconds: float) -> None:
    assert with_options(options).wal_sender_timeout == seconds


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("-c client_encoding=utf8", "client_encoding", "UTF8"),
        ("-cdatestyle=iso", "DateStyle", "ISO, MDY"),
        ("-c datestyle=german", "DateStyle", "German, DMY"),
        ("-c search_path=", "search_path", ""),
        ("-c geqo=off", "geqo", "off"),
        ("-c tcp_keepalives_idle=60", "tcp_keepalives_idle", "60"),
        ("-c default_transaction_read_only=on", "default_transaction_read_only", "on"),
        ("-c idle_session_timeout=500", "idle_session_timeout", "500"),
        (r"-c application_name=a\ b\\c", "application_name", r"a b\c"),
        ("-c application_name=a=b", "application_name", "a=b"),
    ],
)
def test_options_set_parameters(options: str, name: str, value: str) -> None:
    assert with_options(options)[name] == value


BAD_ARGUMENT = "invalid command-line argument for server process: "
HELP = 'Try "postgres --help" for more information.'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("-c wal_sender_timeout", ("42601", "-c wal_sender_timeout requires a value", None)),
        ("--foo", ("42601", "--foo requires a value", None)),
        ("--foo=1", ("42704", 'unrecognized configuration parameter "foo"', None)),
        ("-c nosuch=1", ("42704", 'unrecognized configuration parameter "nosuch"', None)),
        ("-c", ("42601", BAD_ARGUMENT + "-c", HELP)),
        ("-x", ("42601", BAD_ARGUMENT + "-x", HELP)),
        ("-x 1", ("42601", BAD_ARGUMENT + "-x", HELP)),
        ("foo", ("42601", BAD_ARGUMENT + "foo", HELP)),
        ("-c wal_sender_timeout=1s foo", ("42601", BAD_ARGUMENT + "foo", HELP)),
        (
            "-c 'wal_sender_timeout=6s'",
            ("42704", 'unrecognized configuration parameter "\'wal_sender_timeout"', None),
        ),
        (
            "-c wal_sender_timeout=",
            ("22023", 'invalid value for parameter "wal_sender_timeout": ""', None),
        ),
        ("-c server_version=1", ("55P02", 'parameter "server_version" cannot be changed', None)),
    ],
)
def test_options_may_be_wrong(options: str, expected: tuple[str, str, str | None]) -> None:
    assert options_refusal(options) == expected


@given(st.text())
@example("\\" * 9000)
@example("-c " + "a" * 9000)
def test_any_options_are_taken_or_refused(options: str) -> None:
    try:
        with_options(options)
    except ReportedError as error:
        refused = error.fatal
    else:
        refused = True
    assert refused
