"""The messages as declared, held against the layouts in the PostgreSQL documentation, spelled out
here byte by byte, and against what real servers and clients sent."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from construct import ConstructError
from hypothesis import given
from hypothesis import strategies as st

from tests.test_recorded import MAJORS, recording
from walproto.errors import ProtocolViolation
from walproto.wire import messages
from walproto.wire.messages import FRONTEND, LARGE_LIMIT, SMALL_LIMIT, Message

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("message", "values", "expected"),
    [
        (messages.AuthenticationCleartextPassword, {}, "52 00000008 00000003"),
        (messages.AuthenticationOk, {}, "52 00000008 00000000"),
        (
            messages.AuthenticationSASL,
            {"mechanisms": ["A-1", "B", ""]},
            "52 0000000f 0000000a 412d3100 4200 00",
        ),
        (messages.AuthenticationSASLContinue, {"data": b""}, "52 00000008 0000000b"),
        (messages.AuthenticationSASLContinue, {"data": b"r=1"}, "52 0000000b 0000000b 723d31"),
        (messages.AuthenticationSASLFinal, {"data": b"v=2"}, "52 0000000b 0000000c 763d32"),
        (
            messages.BackendKeyData,
            {"process_id": 258, "secret_key": b"\xaa\xbb\xcc\xdd"},
            "4b 0000000c 00000102 aabbccdd",
        ),
        (
            messages.BackendKeyData,
            {"process_id": 1, "secret_key": b"\xee" * 32},
            "4b 00000028 00000001" + "ee" * 32,
        ),
        (messages.CommandComplete, {"command_tag": "SHOW"}, "43 00000009 53484f5700"),
        (messages.CopyDone, {}, "63 00000004"),
        (messages.CopyBothResponse, {}, "57 00000007 00 0000"),
        (messages.CopyData, {"data": b"\x01\x02"}, "64 00000006 0102"),
        (messages.DataRow, {"columns": []}, "44 00000006 0000"),
        (
            messages.DataRow,
            {"columns": [b"", None, b"ab"]},
            "44 00000014 0003 00000000 ffffffff 00000002 6162",
        ),
        (
            messages.ErrorResponse,
            {
                "fields": [
                    {"type": b"S", "value": "ERROR"},
                    {"type": b"M", "value": "é"},
                    {"type": b"\0", "value": None},
                ]
            },
            "45 00000010 53 4552524f5200 4d c3a900 00",
        ),
        (
            messages.NegotiateProtocolVersion,
            {"newest_version": 0x00030002, "unrecognized_options": ["_pq_.a", "b"]},
            "76 00000015 00030002 00000002 5f70715f2e6100 6200",
        ),
        (messages.ParameterStatus, {"name": "a", "value": ""}, "53 00000007 6100 00"),
        (messages.ReadyForQuery, {}, "5a 00000005 49"),
        (
            messages.RowDescription,
            {"fields": [{"name": "ab", "type_oid": 25, "type_size": -1}]},
            "54 0000001b 0001 616200 00000000 0000 00000019 ffff ffffffff 0000",
        ),
        (messages.CopyFail, {"reason": "no"}, "66 00000007 6e6f00"),
        (messages.Query, {"query": "SHOW x"}, "51 0000000b 53484f57207800"),
        (messages.Sync, {}, "53 00000004"),
        (messages.Flush, {}, "48 00000004"),
        (messages.Terminate, {}, "58 00000004"),
        (messages.PasswordMessage, {"data": b"pw\0"}, "70 00000007 707700"),
        (messages.CleartextPassword, {"password": "é"}, "70 00000007 c3a900"),
        (
            messages.SASLInitialResponse,
            {"mechanism": "A", "length": 2, "data": b"n,"},
            "70 0000000c 4100 00000002 6e2c",
        ),
        (
            messages.SASLInitialResponse,
            {"mechanism": "A", "length": -1, "data": None},
            "70 0000000a 4100 ffffffff",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Message) else "",
)
def test_a_message_is_laid_out_as_documented(
    message: Message, values: dict[str, Any], expected: str
) -> None:
    assert message.build(**values).hex() == expected.replace(" ", "")


def test_a_frontend_sends_these() -> None:
    assert sorted((tag.decode(), message.name) for tag, message in FRONTEND.items()) == [
        ("B", "Bind"),
        ("C", "Close"),
        ("D", "Describe"),
        ("E", "Execute"),
        ("F", "FunctionCall"),
        ("H", "Flush"),
        ("P", "Parse"),
        ("Q", "Query"),
        ("S", "Sync"),
        ("X", "Terminate"),
        ("c", "CopyDone"),
        ("d", "CopyData"),
        ("f", "CopyFail"),
        ("p", "PasswordMessage"),
    ]


def test_each_of_them_has_a_limit() -> None:
    assert {message.limit for message in FRONTEND.values()} == {SMALL_LIMIT, LARGE_LIMIT, 65_535}


@given(TEXT)
def test_text_goes_there_and_back(text: str) -> None:
    built = messages.Query.build(query=text)
    assert messages.Query.parse(built[5:]).query == text


@given(st.binary().filter(lambda data: b"\0" not in data))
def test_so_do_bytes_that_are_no_text(data: bytes) -> None:
    parsed = messages.Query.parse(data + b"\0").query
    assert messages.Query.build(query=parsed)[5:] == data + b"\0"


@given(st.lists(st.none() | st.binary(max_size=20), max_size=5))
def test_columns_go_there_and_back(columns: list[bytes | None]) -> None:
    built = messages.DataRow.build(columns=columns)
    assert list(messages.DataRow.parse(built[5:]).columns) == columns


@pytest.mark.parametrize("size", [1023, 1024, 1025, 5000, 1 << 20])
def test_a_string_may_be_long(size: int) -> None:
    assert messages.Query.parse(b"x" * size + b"\0").query == "x" * size


@pytest.mark.parametrize(
    ("message", "values"),
    [
        (messages.ParameterStatus, {"name": "a\0b", "value": ""}),
        (messages.BackendKeyData, {"process_id": 2**32, "secret_key": b""}),
        (messages.ReadyForQuery, {"transaction_status": b"T"}),
        (messages.DataRow, {"columns": [b""] * 65_536}),
    ],
)
def test_what_the_format_cannot_hold_is_not_built(message: Message, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message.name):
        message.build(**values)


@pytest.mark.parametrize(
    ("message", "contents"),
    [
        (messages.Query, b""),
        (messages.Query, b"SHOW x"),
        (messages.Query, b"SHOW x\0\0"),
        (messages.Query, b"SHOW x\0y"),
        (messages.Sync, b"x"),
        (messages.Flush, b"x"),
        (messages.Terminate, b"x"),
        (messages.CopyDone, b"x"),
        (messages.CopyFail, b"no"),
    ],
)
def test_what_is_not_as_declared_is_not_parsed(message: Message, contents: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="invalid message format") as caught:
        message.parse(contents)
    assert not caught.value.fatal


@pytest.mark.parametrize("contents", [b"", b"pw", b"pw\0\0", b"pw\0x", b"\0\0"])
def test_a_password_fills_its_message(contents: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="invalid password packet size") as caught:
        messages.CleartextPassword.parse(contents)
    assert caught.value.fatal
    assert messages.CleartextPassword.parse(b"a\xff \0").password == "a\udcff "


def test_startup_packets_are_laid_out_as_documented() -> None:
    ssl, gss, cancel = 80877103, 80877104, 80877102
    assert messages.SSLRequest.build({}) == struct.pack(">I", ssl)
    assert messages.GSSENCRequest.build({}) == struct.pack(">I", gss)
    request = messages.CancelRequest.parse(struct.pack(">II", cancel, 7) + b"abcd")
    assert (request.process_id, request.secret_key) == (7, b"abcd")
    startup = messages.StartupMessage.parse(struct.pack(">I", 196608) + b"user\0me\0a\0\0\0")
    assert startup.protocol_version == messages.PROTOCOL_3_0 == 196608
    assert [(each.name, each.value) for each in startup.parameters] == [
        ("user", "me"),
        ("a", ""),
    ]


@pytest.mark.parametrize(
    "parameters", [b"", b"user", b"user\0", b"user\0me", b"user\0me\0", b"\0\0", b"user\0me\0\0x"]
)
def test_a_startup_message_ends_with_its_terminator(parameters: bytes) -> None:
    with pytest.raises(ConstructError):
        messages.StartupMessage.parse(struct.pack(">I", 196608) + parameters)


BACKEND = {
    message.tag: message
    for message in vars(messages).values()
    if isinstance(message, Message) and (message.tag not in FRONTEND or message.tag in b"cdCDS")
} | {
    message.tag: message
    for message in (
        messages.AuthenticationOk,
        messages.CommandComplete,
        messages.DataRow,
        messages.ParameterStatus,
        messages.ErrorResponse,
    )
}


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize(
    "name", ["psql", "receivewal", "raw", "timeline", "standby", "slot-create"]
)
def test_what_a_real_server_sent_is_built_the_same(major: int, name: str) -> None:
    conversation = recording(major, name)
    seen = 0
    for tag, contents in conversation.answers():
        if tag == b"N":
            continue
        message = BACKEND[tag]
        values = {key: value for key, value in message.parse(contents).items() if key[0] != "_"}
        rebuilt = message.build(**values)
        assert rebuilt == tag + struct.pack(">I", len(contents) + 4) + contents
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize(
    "name", ["psql", "receivewal", "raw", "timeline", "standby", "slot-create"]
)
def test_what_real_clients_sent_is_built_the_same(major: int, name: str) -> None:
    startup, *sent = recording(major, name).requests()
    parsed = messages.StartupMessage.parse(startup)
    assert messages.StartupMessage.build(parsed) == startup
    assert sent
    for request in sent:
        message, contents = FRONTEND[request[:1]], request[5:]
        values = {key: value for key, value in message.parse(contents).items() if key[0] != "_"}
        assert message.build(**values) == request
