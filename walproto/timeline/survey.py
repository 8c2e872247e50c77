"""One look at a directory of WAL: whose it is, and where its end is to be looked for.

Names prove nothing: a primary keeps recycled segments under future names, and an archive may hold
anything.  A file counts as a segment here if its first page says what its name says.  Whose
cluster it is, the newest segments decide by majority, so that one that strayed in does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from walproto.lsn import (
    SegmentName,
    history_name,
    is_segment_name,
    parse_history_name,
    parse_segment_name,
)
from walproto.timeline.history import History, parse_history
from walproto.wal.pages import (
    FORMATS,
    LONG_HEADER,
    XLP_LONG_HEADER,
    Identity,
    known_majors,
    parse_identity,
)
from walproto.wal.segments import open_file

_VOTERS = 31
"""How many of the newest segments decide whose WAL it is."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a directory holds."""

    identity: Identity
    history: History
    """The newest timeline of which there is WAL, and its ancestors."""
    first_lsn: int
    """Where the oldest segment along that history begins; there may be holes behind it."""
    last_lsn: int
    """Where the newest segment of that timeline begins."""
    notes: tuple[str, ...]
    """What the operator should know: files that are not what they should be."""


def survey(directory: Path) -> Survey | None:
    """Look at ``directory``; None if there is no WAL in it yet.

    Raises OSError if it cannot be read, ValueError if what is there is in a format we do not know.
    """
    # Names are in order as they are, the newest timeline's newest first; to parse all of them would
    # take a second and much memory, if there are 100,000.
    names = sorted(filter(is_segment_name, os.listdir(directory)), reverse=True)
    voters = list(islice(_segments(directory, names), _VOTERS))
    if not voters:
        if names:
            _check_format(directory / names[0])
        return None
    identity = Counter(voter for voter, _, _ in voters).most_common(1)[0][0]
    notes: list[str] = []
    refused: set[int] = set()
    for found, name, lsn in _segments(directory, names):
        if name.tli in refused:
            continue
        if found != identity:
            notes.append(
                f"a segment of another cluster is left alone: timeline {name.tli}, "
                f"segment {name.segno(found.segment_size)}, system {found.system_identifier}"
            )
            continue
        try:
            history = load_history(directory, name.tli)
        except ValueError as error:
            notes.append(f"timeline {name.tli} is left alone: {error}")
            refused.add(name.tli)
            continue
        if name.tli > 1 and not history.ancestors:
            notes.append(
                f"{history_name(name.tli)} is missing, so timeline {name.tli} is served without "
                "those before it: copy it there from the server's pg_wal"
            )
        tlis = {name.tli} | {ancestor.tli for ancestor in history.ancestors}
        first_lsn = _first_lsn(names, tlis, identity.segment_size)
        return Survey(identity, history, first_lsn, lsn, tuple(notes))
    return None


def load_history(directory: Path, tli: int) -> History:
    """The history of ``tli``; one without ancestors if there is no file, as PostgreSQL has it.

    Raises ValueError if the file's contents are no history.
    """
    try:
        with open(open_file(directory / history_name(tli)), "rb") as file:
            contents = file.read()
    except FileNotFoundError:
        return History(tli)
    return parse_history(tli, contents)


def newer_timelines(entries: Iterable[str], tli: int) -> list[int]:
    """The timelines above ``tli`` that have a history file among the ``entries`` of a directory,
    the newest first."""
    found = (parse_history_name(entry) for entry in entries if entry.endswith(".history"))
    return sorted((newer for newer in found if newer is not None and newer > tli), reverse=True)


def _check_format(path: Path) -> None:
    """Raise ValueError if the file begins like WAL, but of a version we do not know."""
    try:
        with open(open_file(path), "rb") as file:
            page = file.read(LONG_HEADER.size)
    except OSError:
        return
    if len(page) < LONG_HEADER.size:
        return
    magic, info, *_ = LONG_HEADER.unpack(page)
    if magic >> 8 == 0xD1 and info & XLP_LONG_HEADER and magic not in FORMATS:
        raise ValueError(
            f"{path} is WAL with page magic {magic:04X}, which is none of PostgreSQL "
            f"{known_majors()}: it cannot be served"
        )


def _first_lsn(names: Iterable[str], tlis: set[int], segment_size: int) -> int:
    """Where the oldest of the named segments begins that are of one of these timelines."""
    wanted = {f"{tli:08X}" for tli in tlis}
    end = f"{0x1_0000_0000 // segment_size:08X}"
    oldest = min(name[8:24] for name in names if name[:8] in wanted and name[16:24] < end)
    return int(oldest[:8], 16) << 32 | int(oldest[8:], 16) * segment_size


def _segments(directory: Path, names: list[str]) -> Iterator[tuple[Identity, SegmentName, int]]:
    """Those of the named files that are the segment that their name says, with their LSN."""
    for entry in names:
        try:
            with open(open_file(directory / entry), "rb") as file:
                found = parse_identity(file.read(LONG_HEADER.size))
        except OSError:
            continue
        name = parse_segment_name(entry)
        if found is None or name is None:
            continue
        identity, tli, lsn = found
        size = identity.segment_size
        if name.is_possible(size) and name.segno(size) * size == lsn and tli <= name.tli:
            yield identity, name, lsn
