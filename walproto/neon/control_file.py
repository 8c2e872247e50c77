"""``safekeeper.control``: what a safekeeper keeps of a timeline beside its WAL.

The construct is the declaration, of format version 5 and no other; everything in it is
little-endian.  The file is replaced as a whole, so there is always one that is complete; its
checksum tells whether it still is as it was written.

Neon: ``SafeKeeperState`` in ``safekeeper.rs`` and ``control_file.rs``, with their field names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from construct import (
    Adapter,
    Bytes,
    Checksum,
    ChecksumError,
    Const,
    ConstructError,
    FocusedSeq,
    Int32ul,
    Int64ul,
    PrefixedArray,
    RawCopy,
    StreamError,
    Struct,
    Terminated,
    TerminatedError,
    ValidationError,
    this,
)
from crc32c import crc32c

from walproto.lsn import is_segment_size
from walproto.neon.ids import TimelineIds, parse_id
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.writer import store_file

NAME = "safekeeper.control"
"""The file's name, in the timeline's directory."""

MAGIC = 0xCAFECEEF
VERSION = 5

MAX_SIZE = 1 << 20
"""Bytes: the largest file that is read.  There is room in it for 65,000 changes of term, one each
time that a database was started; more would take seconds to parse, while nothing else is done."""


class ControlFileError(ValueError):
    """That is no control file that can be used, and why."""


class _Digits(Adapter):  # type: ignore[misc]
    """32 bytes that are hexadecimal digits, as str."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> str:
        return self._checked(obj.decode("latin-1"), path)

    def _encode(self, obj: str, context: Any, path: Any) -> bytes:
        return self._checked(obj, path).encode()

    def _checked(self, text: str, path: Any) -> str:
        try:
            return parse_id(text)
        except ValueError as error:
            raise ValidationError(str(error), path=path) from None


class _SegmentSize(Adapter):  # type: ignore[misc]
    """The size of a segment in bytes, or 0."""

    def _decode(self, obj: int, context: Any, path: Any) -> int:
        if obj != 0 and not is_segment_size(obj):
            raise ControlFileError(
                f'its "wal_seg_size" is {obj}, which is no power of 2 between 1 MB and 1 GB'
            )
        return obj

    def _encode(self, obj: int, context: Any, path: Any) -> int:
        if obj != 0 and not is_segment_size(obj):
            raise ValidationError(f"{obj} is not the size of a segment", path=path)
        return obj


Id = FocusedSeq("digits", "length" / Const(32, Int64ul), "digits" / _Digits(Bytes(32)))
SegmentSize = _SegmentSize(Int32ul)
TermEntry = Struct("term" / Int64ul, "lsn" / Int64ul)
PeerEntry = Struct(
    "node_id" / Int64ul,
    "s3_wal_lsn" / Int64ul,
    "term" / Int64ul,
    "flush_lsn" / Int64ul,
    "commit_lsn" / Int64ul,
)
Prelude = Struct("magic" / Int32ul, "version" / Int32ul)
Contents = Struct(
    "magic" / Const(MAGIC, Int32ul),
    "version" / Const(VERSION, Int32ul),
    "tenant_id" / Id,
    "timeline_id" / Id,
    "term" / Int64ul,
    "term_history" / PrefixedArray(Int64ul, TermEntry),
    "pg_version" / Int32ul,
    "system_id" / Int64ul,
    "wal_seg_size" / SegmentSize,
    "proposer_uuid" / Id,
    "timeline_start_lsn" / Int64ul,
    "local_start_lsn" / Int64ul,
    "commit_lsn" / Int64ul,
    "s3_wal_lsn" / Int64ul,
    "peer_horizon_lsn" / Int64ul,
    "remote_consistent_lsn" / Int64ul,
    "peers" / PrefixedArray(Int64ul, PeerEntry),
)
ControlFile = Struct(
    "contents" / RawCopy(Contents),
    "checksum" / Checksum(Int32ul, crc32c, this.contents.data),
    Terminated,
)


@dataclass(frozen=True, slots=True)
class TermSwitch:
    """From which LSN on the WAL was written in a term."""

    term: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Another safekeeper of the same timeline, as it last said of itself."""

    node_id: int
    """Its number among the safekeepers."""
    s3_wal_lsn: int
    """Up to where it has copied WAL to S3; 0 if nowhere."""
    term: int
    """The term of its last WAL."""
    flush_lsn: int
    """Up to where it has WAL on disk."""
    commit_lsn: int
    """Up to where it knows WAL to be committed."""


@dataclass(frozen=True, slots=True)
class Control:
    """The contents of a control file.

    LSNs, terms and the other numbers are unsigned, of 64 bits unless said otherwise.  An LSN that
    says how far something has come is the last byte + 1; any is 0 as long as it is unknown.
    """

    tenant_id: str
    """32 lower-case hexadecimal digits, as all three IDs."""
    timeline_id: str
    term: int
    """The highest term voted in: none before it is listened to any more."""
    term_history: tuple[TermSwitch, ...]
    """In which term which part of the WAL was written, the oldest first."""
    pg_version: int
    """The major version of PostgreSQL times 10000 and the minor, 32 bits; 0 before a first proposer
    has connected."""
    system_id: int
    """The system identifier of the cluster; 0 before a first proposer has connected."""
    wal_seg_size: int
    """The size of a segment in bytes, as initdb accepts it; 0 before a first proposer has
    connected."""
    proposer_uuid: str
    """The last proposer that was elected, for people to look at."""
    timeline_start_lsn: int
    """Where the timeline begins, on whatever safekeeper."""
    local_start_lsn: int
    """Where the WAL begins that this safekeeper has, or had."""
    commit_lsn: int
    """Up to where a quorum of safekeepers has the WAL, this one included; always the end of a
    record.  The file may lag behind what is known in memory."""
    s3_wal_lsn: int
    """Up to where WAL has been copied to S3, the end of a segment."""
    peer_horizon_lsn: int
    """The LSN from which on some safekeeper may need WAL from this one."""
    remote_consistent_lsn: int
    """Up to where a pageserver has made everything durable in remote storage, and never needs WAL
    again."""
    peers: tuple[Peer, ...]

    @property
    def identity(self) -> Identity:
        """What it says of the cluster: a system identifier and a segment size of 0 as long as they
        are unknown, and then PostgreSQL 14, with which version 5 of the file came up."""
        major = self.pg_version // 10000
        of_major = {known.major: known for known in FORMATS.values()}
        wal_format = of_major.get(major, of_major[14])
        return Identity(self.system_id, self.wal_seg_size, wal_format)

    @property
    def ids(self) -> TimelineIds:
        return TimelineIds(self.tenant_id, self.timeline_id)

    def require_ids(self, ids: TimelineIds) -> None:
        """Raise ControlFileError unless this is the control file of that timeline."""
        if self.ids != ids:
            raise ControlFileError(f'it is that of timeline "{self.ids}", not "{ids}"')


def read_control_file(path: Path) -> Control:
    """The contents of a control file.  Raises ControlFileError, which names the file, or OSError
    if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MAX_SIZE + 1)
    try:
        return parse_control(data)
    except ControlFileError as error:
        raise ControlFileError(f'invalid control file "{path}": {error}') from None


def write_control_file(path: Path, control: Control) -> None:
    """Write a control file, or a new one in its place; all of it is on disk when this returns.

    Raises ControlFileError if the format cannot hold ``control``, OSError or SyncError if the disk
    does not take it; what was there before is still there then, or all of this.
    """
    store_file(path, build_control(control))


def parse_control(data: bytes) -> Control:
    """What the bytes of a control file say.  Raises ControlFileError."""
    if len(data) > MAX_SIZE:
        raise ControlFileError(f"it is larger than {MAX_SIZE} bytes")
    if len(data) >= Prelude.sizeof():
        prelude = Prelude.parse(data)
        if prelude.magic != MAGIC:
            raise ControlFileError(
                f"its magic number is 0x{prelude.magic:08X}, and not 0x{MAGIC:08X}"
            )
        if prelude.version != VERSION:
            raise ControlFileError(
                f"its format version is {prelude.version}, and only {VERSION} is known"
            )
    try:
        parsed = ControlFile.parse(data).contents.value
    except ChecksumError:
        raise ControlFileError("its checksum is wrong: it is damaged") from None
    except TerminatedError:
        raise ControlFileError("there are bytes behind its end: it is damaged") from None
    except StreamError as error:
        raise ControlFileError(
            f'it ends after {len(data)} bytes, in "{_field(error)}": it is cut short or damaged'
        ) from None
    except ConstructError as error:
        raise ControlFileError(f'its "{_field(error)}" is malformed') from None
    values = {field.name: parsed[field.name] for field in fields(Control)}
    values["term_history"] = tuple(TermSwitch(it.term, it.lsn) for it in parsed.term_history)
    values["peers"] = tuple(
        Peer(**{field.name: it[field.name] for field in fields(Peer)}) for it in parsed.peers
    )
    return Control(**values)


def build_control(control: Control) -> bytes:
    """The bytes of a control file.  Raises ControlFileError if the format cannot hold it."""
    try:
        data: bytes = ControlFile.build({"contents": {"value": asdict(control)}})
    except ConstructError as error:
        raise ControlFileError(f'a control file cannot have this "{_field(error)}"') from error
    if len(data) > MAX_SIZE:
        raise ControlFileError(f"a control file must not be larger than {MAX_SIZE} bytes")
    return data


def _field(error: ConstructError) -> str:
    """The field that a construct complains about."""
    path = (error.path or "").removeprefix("(parsing)").removeprefix("(building)")
    names = [name for name in path.split(" -> ") if name not in ("", "contents")]
    return names[0] if names else "contents"
