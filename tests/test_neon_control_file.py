"""``safekeeper.control``: as it is laid out, as it is written, and whatever is wrong with one."""

from __future__ import annotations

import errno
import struct
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disk import Disk, files
from walproto.neon import control_file
from walproto.neon.control_file import (
    MAX_SIZE,
    NAME,
    Control,
    ControlFileError,
    Peer,
    TermSwitch,
    build_control,
    parse_control,
    read_control_file,
    write_control_file,
)
from walproto.neon.ids import TimelineIds
from walproto.wal.writer import SyncError

TENANT, TIMELINE, PROPOSER = "0123456789abcdef" * 2, "fedcba9876543210" * 2, "00ff" * 8

CONTROL = Control(
    tenant_id=TENANT,
    timeline_id=TIMELINE,
    term=7,
    term_history=(TermSwitch(3, 0x1696628), TermSwitch(7, 0x2000000)),
    pg_version=140004,
    system_id=0xFEDCBA9876543210,
    wal_seg_size=16 << 20,
    proposer_uuid=PROPOSER,
    timeline_start_lsn=0x1696628,
    local_start_lsn=0x1696629,
    commit_lsn=0x3000060,
    s3_wal_lsn=0x2000000,
    peer_horizon_lsn=0x2FFFFFF,
    remote_consistent_lsn=0x2A00000,
    peers=(Peer(1, 0x2000000, 7, 0x3000100, 0x3000060), Peer(2, 3, 4, 5, 6)),
)


def golden(
    *,
    magic: int = 0xCAFECEEF,
    version: int = 5,
    id_length: int = 32,
    tenant: bytes = TENANT.encode(),
    terms: int = 2,
    segment_size: int = 16 << 20,
    peers: int = 2,
    end: bytes = b"",
) -> bytes:
    """The bytes of CONTROL, put together by hand and with a checksum that is right."""
    data = struct.pack("<II", magic, version)
    data += struct.pack("<Q32s", id_length, tenant)
    data += struct.pack("<Q32s", 32, TIMELINE.encode())
    data += struct.pack("<Q", 7)
    data += struct.pack("<Q", terms) + struct.pack("<QQQQ", 3, 0x1696628, 7, 0x2000000)
    data += struct.pack("<IQI", 140004, 0xFEDCBA9876543210, segment_size)
    data += struct.pack("<Q32s", 32, PROPOSER.encode())
    data += struct.pack("<QQQQQQ", 0x1696628, 0x1696629, 0x3000060, 0x2000000, 0x2FFFFFF, 0x2A00000)
    data += struct.pack("<Q", peers)
    data += struct.pack("<QQQQQ", 1, 0x2000000, 7, 0x3000100, 0x3000060)
    data += struct.pack("<QQQQQ", 2, 3, 4, 5, 6)
    data += end
    return data + struct.pack("<I", crc32c(data))


GOLDEN = golden()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


def refusal(data: bytes) -> str:
    with pytest.raises(ControlFileError) as caught:
        parse_control(data)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- What is right -------------------------------------------------------------------------------


def test_a_file_put_together_by_hand_is_read() -> None:
    assert parse_control(GOLDEN) == CONTROL
    assert CONTROL.ids == TimelineIds(TENANT, TIMELINE)


def test_a_file_is_written_as_it_would_be_put_together_by_hand() -> None:
    assert build_control(CONTROL) == GOLDEN


def test_digits_in_upper_case_are_read_and_not_written() -> None:
    data = golden(tenant=TENANT.upper().encode())
    assert data != GOLDEN
    assert parse_control(data) == CONTROL


U64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1]))
IDS = st.text("0123456789abcdef", min_size=32, max_size=32)
CONTROLS = st.builds(
    Control,
    tenant_id=IDS,
    timeline_id=IDS,
    term=U64,
    term_history=st.lists(st.builds(TermSwitch, U64, U64), max_size=5).map(tuple),
    pg_version=st.integers(0, 2**32 - 1),
    system_id=U64,
    wal_seg_size=st.sampled_from([0, *(1 << power for power in range(20, 31))]),
    proposer_uuid=IDS,
    timeline_start_lsn=U64,
    local_start_lsn=U64,
    commit_lsn=U64,
    s3_wal_lsn=U64,
    peer_horizon_lsn=U64,
    remote_consistent_lsn=U64,
    peers=st.lists(st.builds(Peer, U64, U64, U64, U64, U64), max_size=5).map(tuple),
)
examples = settings(deadline=None, derandomize=True, max_examples=200)


@examples
@given(CONTROLS)
def test_what_is_written_is_read_again(control: Control) -> None:
    data = build_control(control)
    assert parse_control(data) == control
    assert len(data) == 220 + 16 * len(control.term_history) + 40 * len(control.peers)


@examples
@given(CONTROLS, st.data())
def test_no_part_of_a_file_is_one_and_no_more_than_a_file(
    control: Control, data: st.DataObject
) -> None:
    built = build_control(control)
    refusal(built[: data.draw(st.integers(0, len(built) - 1))])
    refusal(built + data.draw(st.binary(min_size=1, max_size=50)))


@examples
@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_refused(garbage: bytes, with_prelude: bool) -> None:
    data = GOLDEN[:8] * with_prelude + garbage
    refusal(data + struct.pack("<I", crc32c(data)))


# --- What is wrong -------------------------------------------------------------------------------


def test_every_truncation_is_refused_and_told() -> None:
    told = set()
    for size in range(len(GOLDEN)):
        text = refusal(GOLDEN[:size])
        start, field, end = text.split('"')
        assert start == f"it ends after {size} bytes, in "
        assert end == ": it is cut short or damaged"
        told.add(field)
    assert told == {"magic", "version", "checksum"} | {field.name for field in fields(Control)}


def test_every_single_bit_that_is_flipped_is_noticed() -> None:
    for bit in range(len(GOLDEN) * 8):
        damaged = bytearray(GOLDEN)
        damaged[bit // 8] ^= 1 << bit % 8
        refusal(bytes(damaged))


NO_SIZE = "which is no power of 2 between 1 MB and 1 GB"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (golden(magic=0xCAFEBABE), "its magic number is 0xCAFEBABE, and not 0xCAFECEEF"),
        (GOLDEN[:4][::-1] + GOLDEN[4:], "its magic number is 0xEFCEFECA, and not 0xCAFECEEF"),
        (golden(version=4), "its format version is 4, and only 5 is known"),
        (golden(version=6), "its format version is 6, and only 5 is known"),
        (GOLDEN[:4] + b"\x06\0\0\0", "its format version is 6, and only 5 is known"),
        (GOLDEN[:-4] + bytes(4), "its checksum is wrong: it is damaged"),
        (golden(end=b"\0"), "its checksum is wrong: it is damaged"),
        (GOLDEN + b"\0", "there are bytes behind its end: it is damaged"),
        (GOLDEN * 2, "there are bytes behind its end: it is damaged"),
        (golden(id_length=16), 'its "tenant_id" is malformed'),
        (golden(id_length=2**64 - 1), 'its "tenant_id" is malformed'),
        (golden(tenant=b"g" * 32), 'its "tenant_id" is malformed'),
        (golden(tenant=b"\xff" * 32), 'its "tenant_id" is malformed'),
        (golden(tenant=b"\0" * 32), 'its "tenant_id" is malformed'),
        (golden(segment_size=1), f'its "wal_seg_size" is 1, {NO_SIZE}'),
        (golden(segment_size=3 << 20), f'its "wal_seg_size" is {3 << 20}, {NO_SIZE}'),
        (golden(segment_size=2 << 30), f'its "wal_seg_size" is {2 << 30}, {NO_SIZE}'),
        (b"", 'it ends after 0 bytes, in "magic": it is cut short or damaged'),
    ],
)
def test_what_is_wrong_is_told(data: bytes, text: str) -> None:
    assert refusal(data) == text


@pytest.mark.parametrize("count", [1000, 2**31, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["terms", "peers"])
def test_a_count_that_the_file_cannot_hold_takes_no_room(what: str, count: int) -> None:
    data = golden(**{what: count})  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        text = refusal(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text.endswith("cut short or damaged")
    assert peak < 1_000_000


def test_a_count_that_is_too_small_is_noticed() -> None:
    for data in (golden(peers=0), golden(peers=1), golden(terms=0), golden(terms=1)):
        refusal(data)


@pytest.mark.parametrize(
    "values",
    [
        {"tenant_id": "x"},
        {"timeline_id": "0" * 33},
        {"proposer_uuid": "é" * 32},
        {"term": -1},
        {"system_id": 2**64},
        {"pg_version": 2**32},
        {"wal_seg_size": 5},
        {"peers": (Peer(1, 2, 3, -4, 5),)},
        {"term_history": (TermSwitch(2**64, 1),)},
    ],
)
def test_what_the_format_cannot_hold_is_not_written(
    tmp_path: Path, values: dict[str, object]
) -> None:
    write_control_file(tmp_path / NAME, CONTROL)
    (name,) = values
    impossible = replace(CONTROL, **values)  # type: ignore[arg-type]
    with pytest.raises(ControlFileError, match=f'^a control file cannot have this "{name}"$'):
        write_control_file(tmp_path / NAME, impossible)
    assert files(tmp_path) == {NAME: GOLDEN}


def test_a_file_that_is_too_large_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAME
    with open(path, "wb") as file:
        file.write(GOLDEN)
        file.truncate(1 << 40)
    with pytest.raises(ControlFileError, match=f"it is larger than {MAX_SIZE} bytes"):
        read_control_file(path)
    monkeypatch.setattr(control_file, "MAX_SIZE", len(GOLDEN))
    assert parse_control(build_control(CONTROL)) == CONTROL
    longer = replace(CONTROL, term_history=(*CONTROL.term_history, TermSwitch(8, 9)))
    with pytest.raises(ControlFileError, match="must not be larger"):
        build_control(longer)


def test_whose_file_it_is_can_be_checked() -> None:
    CONTROL.require_ids(TimelineIds(TENANT, TIMELINE))
    for ids in (TimelineIds(TIMELINE, TENANT), TimelineIds(TENANT, "0" * 32)):
        with pytest.raises(ControlFileError) as caught:
            CONTROL.require_ids(ids)
        assert str(caught.value) == f'it is that of timeline "{TENANT}/{TIMELINE}", not "{ids}"'


# --- Files ---------------------------------------------------------------------------------------


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / NAME
    write_control_file(path, CONTROL)
    assert files(tmp_path) == {NAME: GOLDEN}
    assert [call for call in disk.calls if call != "open ."] == [
        f"open {NAME}.tmp",
        f"fsync {NAME}.tmp",
        f"rename {NAME}.tmp",
        "fsync .",
    ]
    assert disk.unsynced == set()
    assert read_control_file(path) == CONTROL


@pytest.mark.parametrize("call", ["open safe", "fsync safe", "rename"])
def test_until_a_file_is_whole_the_old_one_stays(tmp_path: Path, disk: Disk, call: str) -> None:
    path = tmp_path / NAME
    write_control_file(path, CONTROL)
    newer = replace(CONTROL, commit_lsn=0x3000068)
    disk.failing[call] = errno.EIO
    with pytest.raises(SyncError if "fsync" in call else OSError, match="Input/output error"):
        write_control_file(path, newer)
    disk.failing.clear()
    assert read_control_file(path) == CONTROL
    write_control_file(path, newer)
    assert read_control_file(path) == newer
    assert list(files(tmp_path)) == [NAME]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(FileNotFoundError):
        read_control_file(path)
    path.write_bytes(GOLDEN[:100])
    with pytest.raises(ControlFileError) as caught:
        read_control_file(path)
    assert str(caught.value) == (
        f'invalid control file "{path}": '
        'it ends after 100 bytes, in "term_history": it is cut short or damaged'
    )
