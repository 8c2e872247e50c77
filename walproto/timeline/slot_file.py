"""The file in which replication slots outlive the process: ``walproto.slots``.

A line for each slot, as JSON behind the CRC-32C of it, and a first line that says how many there
are and how far WAL was removed.  All of it is written anew whenever something has to be kept,
however many slots there are: one sync for all.  A line that is damaged costs one slot, not the
others.

When the disk is full, WAL can be removed only after that has been written here.  So some room is
set aside for it, in another file.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import crc32c

from walproto.lsn import format_lsn, parse_lsn
from walproto.wal.writer import store_file, sync_directory, sync_file

NAME = "walproto.slots"
DAMAGED = NAME + ".damaged"
"""What a file that is not whole is kept as, the first one."""
SPARE = NAME + ".spare"
"""What takes the room that is set aside."""
SPARE_SIZE = 256 * 1024
"""Bytes: more than a thousand slots take."""

_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_CHECKED = re.compile(rb"([0-9a-f]{8}) (\{[^{}]*\})")
_SEEMS_NAMED = re.compile(rb'"name": "([a-z0-9_]{1,63})"')
_SLOT_NAME = re.compile("[a-z0-9_]{1,63}")
_REASON = re.compile("[a-z_]*")


@dataclass(frozen=True, slots=True)
class SlotState:
    """What is kept of a slot."""

    name: str
    restart_lsn: int
    """The LSN from which on the replica may need WAL; 0 if none is reserved."""
    xmin: int = 0
    """The oldest transaction that the replica still needs to see, a full transaction ID; 0 if
    there is none."""
    catalog_xmin: int = 0
    invalidated: str = ""
    """Why it can be used no more, PostgreSQL's ``invalidation_reason``; empty if it can."""


@dataclass(slots=True)
class SlotFile:
    """What the file holds, and what is wrong with it."""

    slots: list[SlotState] = field(default_factory=list)
    removed_to: int = 0
    """The LSN before which WAL has been removed, or was about to be; 0 if none ever was."""
    problems: list[str] = field(default_factory=list)


def write_slots(directory: Path, slots: Iterable[SlotState], removed_to: int = 0) -> None:
    """Have just these in the directory's file; they are on disk when this returns.  Raises OSError
    or SyncError, and then what was there before is still there, or all of this."""
    states = list(slots)
    lines: list[dict[str, Any]] = [{"slots": len(states), "removed_to": format_lsn(removed_to)}]
    for state in states:
        lines.append(asdict(state) | {"restart_lsn": format_lsn(state.restart_lsn)})
    contents = b"".join(_line(json.dumps(values).encode()) for values in lines)
    try:
        store_file(directory / NAME, contents)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        try:
            (directory / SPARE).unlink()
        except OSError:
            raise error from None
        store_file(directory / NAME, contents)
    _set_room_aside(directory / SPARE)


def _set_room_aside(spare: Path) -> None:
    """Have the spare file, if there is room for it."""
    with suppress(OSError):
        fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != SPARE_SIZE:  # it is new, or a crash has left it empty
                os.posix_fallocate(fd, 0, SPARE_SIZE)
        except OSError:
            spare.unlink()
        finally:
            os.close(fd)


def read_slots(directory: Path) -> SlotFile:
    """What the directory's file holds; nothing if there is no file.

    It is on disk when this returns: it may have been left to that by a crash.  If something is
    wrong, the file is kept under another name, :data:`DAMAGED`, for it will be written over.
    Raises OSError if it cannot be read, OSError or SyncError if it cannot be synced or kept.
    """
    path = directory / NAME
    try:
        path.stat()
    except FileNotFoundError:
        return SlotFile()
    sync_file(path)
    contents = path.read_bytes()
    sync_directory(directory)
    slots: dict[str, SlotState] = {}
    problems: list[str] = []
    header: _Header | None = None
    for number, line in enumerate(_LINE.findall(contents), 1):
        # There are two of them if what is damaged is the end of a line.
        texts = [text for crc, text in _CHECKED.findall(line) if crc == _crc(text)]
        is_whole = b"".join(map(_line, texts)) == line
        for text in texts:
            match _parse(text):
                case SlotState(name) as state if name not in slots:
                    slots[name] = state
                case _Header() as found if header is None:
                    header = found
                case _:
                    is_whole = False
        if not is_whole:
            names = [name.decode() for name in _SEEMS_NAMED.findall(line)]
            what = "".join(f' (slot "{name}", it seems)' for name in names if name not in slots)
            problems.append(f"line {number} is damaged{what}")
    if header is None:
        problems.append("its beginning is damaged")
    elif len(slots) != header.count:
        problems.append(f"it holds {len(slots)} slots, where there should be {header.count}")
    if problems and not (directory / DAMAGED).exists():
        store_file(directory / DAMAGED, contents)
    return SlotFile(list(slots.values()), header.removed_to if header else 0, problems)


@dataclass(frozen=True, slots=True)
class _Header:
    count: int
    removed_to: int


def _line(text: bytes) -> bytes:
    return b"%b %b\n" % (_crc(text), text)


def _crc(text: bytes) -> bytes:
    return b"%08x" % crc32c.crc32c(text)


def _parse(text: bytes) -> SlotState | _Header | None:
    """The slot that a line describes, or what the first line says; None if it is neither.  What is
    not known here, a later version has added: it is passed over, rather than the slot."""
    try:
        values = json.loads(text)
        if "slots" in values:
            return _Header(_number(values["slots"]), parse_lsn(values.get("removed_to", "0/0")))
        name, reason = values["name"], values.get("invalidated", "")
        if not (_SLOT_NAME.fullmatch(name) and _REASON.fullmatch(reason)):
            return None
        restart_lsn = parse_lsn(values["restart_lsn"])
        xmin = _number(values.get("xmin", 0))
        catalog_xmin = _number(values.get("catalog_xmin", 0))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return SlotState(name, 0 if reason else restart_lsn, xmin, catalog_xmin, reason)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(value)
    return value
