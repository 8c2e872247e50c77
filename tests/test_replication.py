"""What travels inside CopyData: each declaration and the packed struct beside it agree, and they
are what real servers and clients sent."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walproto.errors import ProtocolViolation
from walproto.wire.replication import (
    XLOG_DATA_HEADER,
    Feedback,
    HotStandbyFeedback,
    Keepalive,
    PrimaryKeepalive,
    StandbyStatusUpdate,
    StatusUpdate,
    WalMessage,
    XLogData,
    hot_standby_feedback,
    keepalive,
    pack_xlog_data_header,
    parse_primary_message,
    parse_standby_message,
    postgres_time,
    status_update,
)

LSNS = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)
XIDS = st.integers(0, 2**32 - 1)


def copy_data(contents: bytes) -> bytes:
    return b"d" + (len(contents) + 4).to_bytes(4, "big") + contents


@given(LSNS, LSNS, TIMES, st.binary(max_size=100))
def test_the_header_of_wal_is_as_declared(start: int, end: int, time: int, data: bytes) -> None:
    declared = XLogData.build(
        {"data_start": start, "wal_end": end, "send_time": time, "data": data}
    )
    buffer = bytearray(XLOG_DATA_HEADER.size) + data
    pack_xlog_data_header(buffer, start, end, time, len(data))
    assert bytes(buffer) == copy_data(declared)


@given(LSNS, TIMES, st.booleans())
def test_a_keepalive_is_as_declared(end: int, time: int, reply: bool) -> None:
    declared = PrimaryKeepalive.build({"wal_end": end, "send_time": time, "reply_requested": reply})
    assert keepalive(end, time, reply) == copy_data(declared)
    assert len(declared) == 18


@given(LSNS, LSNS, LSNS, TIMES, st.booleans(), st.binary(max_size=5))
def test_a_status_update_is_read_as_declared(
    write: int, flush: int, apply: int, time: int, reply: bool, more: bytes
) -> None:
    declared = StandbyStatusUpdate.build(
        {
            "write_lsn": write,
            "flush_lsn": flush,
            "apply_lsn": apply,
            "reply_time": time,
            "reply_requested": reply,
        }
    )
    assert len(declared) == 34
    expected = StatusUpdate(write, flush, apply, time, reply)
    assert parse_standby_message(declared) == expected
    assert parse_standby_message(memoryview(declared + more)) == expected


@given(TIMES, XIDS, XIDS, XIDS, XIDS, st.binary(max_size=5))
def test_feedback_is_read_as_declared(
    time: int, xmin: int, epoch: int, catalog_xmin: int, catalog_epoch: int, more: bytes
) -> None:
    declared = HotStandbyFeedback.build(
        {
            "reply_time": time,
            "xmin": xmin,
            "xmin_epoch": epoch,
            "catalog_xmin": catalog_xmin,
            "catalog_xmin_epoch": catalog_epoch,
        }
    )
    assert len(declared) == 25
    expected = Feedback(time, xmin, epoch, catalog_xmin, catalog_epoch)
    assert parse_standby_message(declared + more) == expected


def test_what_a_standby_sent() -> None:
    assert parse_standby_message(
        bytes.fromhex("720000000000a000000000000000a000000000000000900000000303f6e60b1a2900")
    ) == StatusUpdate(0xA00000, 0xA00000, 0x900000, 0x000303F6E60B1A29, False)
    assert parse_standby_message(
        bytes.fromhex("68000303f6e60b1a3d00000000000000000000000000000000")
    ) == Feedback(0x000303F6E60B1A3D, 0, 0, 0, 0)


def test_a_reply_is_requested_by_any_byte_but_zero() -> None:
    for byte in (1, 7, 255):
        update = parse_standby_message(b"r" + bytes(32) + bytes([byte]))
        assert update == StatusUpdate(0, 0, 0, 0, True)


@pytest.mark.parametrize("size", [1, 9, 10, 32])
def test_a_short_status_update_is_an_error(size: int) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        parse_standby_message(b"r" + bytes(size - 1))
    assert not caught.value.fatal
    assert caught.value.message == "insufficient data left in message"


def test_a_status_update_that_lacks_its_last_byte_is_told_so() -> None:
    with pytest.raises(ProtocolViolation, match=r"^no data left in message$"):
        parse_standby_message(b"r" + bytes(32))


@pytest.mark.parametrize("size", [1, 10, 24])
def test_short_feedback_is_an_error(size: int) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        parse_standby_message(b"h" + bytes(size - 1))
    assert not caught.value.fatal


def test_an_empty_message_is_an_error() -> None:
    with pytest.raises(ProtocolViolation, match="no data left in message"):
        parse_standby_message(b"")


@pytest.mark.parametrize("letter", sorted(set(range(256)) - set(b"rh")))
def test_any_other_message_ends_the_connection(letter: int) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        parse_standby_message(bytes([letter]) + bytes(40))
    assert caught.value.fatal


def test_time_is_counted_in_microseconds_from_the_year_2000() -> None:
    assert postgres_time(946_684_800) == 0
    assert postgres_time(946_684_800 + 1.5) == 1_500_000
    assert postgres_time(0) == -946_684_800_000_000


# --- The other way round: what a receiver says and hears -------------------------------------


@given(LSNS, LSNS, LSNS, TIMES, st.booleans())
def test_a_status_update_is_told_as_declared(
    write: int, flush: int, apply: int, time: int, reply: bool
) -> None:
    update = StatusUpdate(write, flush, apply, time, reply)
    told = status_update(update)
    assert told == StandbyStatusUpdate.build(asdict(update))
    assert parse_standby_message(told) == update


@given(TIMES, XIDS, XIDS, XIDS, XIDS)
def test_feedback_is_told_as_declared(
    time: int, xmin: int, epoch: int, catalog_xmin: int, catalog_epoch: int
) -> None:
    feedback = Feedback(time, xmin, epoch, catalog_xmin, catalog_epoch)
    told = hot_standby_feedback(feedback)
    assert told == HotStandbyFeedback.build(asdict(feedback))
    assert parse_standby_message(told) == feedback


@given(LSNS, LSNS, TIMES, st.binary(max_size=100))
def test_wal_is_heard_as_declared(start: int, end: int, time: int, data: bytes) -> None:
    declared = XLogData.build(
        {"data_start": start, "wal_end": end, "send_time": time, "data": data}
    )
    heard = parse_primary_message(memoryview(declared))
    assert isinstance(heard, WalMessage)
    assert (heard.data_start, heard.wal_end, bytes(heard.data)) == (start, end, data)
    # It is as we send it, too.
    buffer = bytearray(XLOG_DATA_HEADER.size) + data
    pack_xlog_data_header(buffer, start, end, time, len(data))
    assert parse_primary_message(memoryview(buffer)[5:]) == heard


@given(LSNS, TIMES, st.booleans())
def test_a_keepalive_is_heard_as_declared(end: int, time: int, reply: bool) -> None:
    declared = PrimaryKeepalive.build({"wal_end": end, "send_time": time, "reply_requested": reply})
    assert parse_primary_message(memoryview(declared)) == Keepalive(end, reply)
    assert parse_primary_message(memoryview(keepalive(end, time, reply))[5:]) == Keepalive(
        end, reply
    )


def test_a_keepalive_requests_a_reply_by_any_byte_but_zero() -> None:
    for byte in (1, 7, 255):
        heard = parse_primary_message(memoryview(b"k" + bytes(16) + bytes([byte])))
        assert heard == Keepalive(0, True)


@pytest.mark.parametrize("size", range(1, 25))
def test_wal_without_a_whole_header_is_refused(size: int) -> None:
    with pytest.raises(ProtocolViolation, match="invalid WAL message received from primary"):
        parse_primary_message(memoryview(b"w" + bytes(24))[:size])


@pytest.mark.parametrize("size", [1, 9, 17, 19, 25, 100])
def test_a_keepalive_has_its_size_and_no_other(size: int) -> None:
    with pytest.raises(ProtocolViolation, match="invalid keepalive message received from primary"):
        parse_primary_message(memoryview(b"k" + bytes(size - 1)))


@pytest.mark.parametrize("letter", sorted(set(range(256)) - set(b"wk")))
def test_no_other_message_comes_from_a_primary(letter: int) -> None:
    for size in (1, 18, 25, 40):
        message = f"^invalid replication message type {letter}$"
        with pytest.raises(ProtocolViolation, match=message):
            parse_primary_message(memoryview(bytes([letter]) + bytes(size - 1)))


def test_nothing_is_no_message() -> None:
    with pytest.raises(ProtocolViolation, match="invalid replication message type of none"):
        parse_primary_message(memoryview(b""))


@given(st.sampled_from([b"", b"w", b"k"]), st.binary(max_size=60))
def test_garbage_is_a_message_or_a_violation(kind: bytes, data: bytes) -> None:
    data = kind + data
    is_wal = data[:1] == b"w" and len(data) >= 25
    is_keepalive = data[:1] == b"k" and len(data) == 18
    try:
        heard = parse_primary_message(memoryview(data))
    except ProtocolViolation:
        assert not is_wal
        assert not is_keepalive
    else:
        assert isinstance(heard, WalMessage) == is_wal
        assert isinstance(heard, Keepalive) == is_keepalive
