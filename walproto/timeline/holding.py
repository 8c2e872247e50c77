"""What a directory that we receive into already holds, and so from where on WAL is to come.

After a crash the newest segment may end in anything.  Its valid end is found by walking over it;
whatever lies behind is written over by what comes.  A segment that has its name was on disk before
it got it; of one that has not, only what is proven counts: not the beginning of a record that goes
on in the next segment, and nothing of it if the record that it begins within has lost a piece.

Only if the newest segment begins within a record that is not whole, its end would be in a segment
before; yet what came before the newest segment was on disk when that was begun, and was
acknowledged, and a server with a slot may have removed it since.  So WAL is never fetched from
before the start of the newest segment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from walproto.lsn import segment_name
from walproto.timeline.history import History
from walproto.timeline.survey import survey
from walproto.timeline.tail import Tail
from walproto.wal.pages import Identity
from walproto.wal.segments import Segments
from walproto.wal.writer import sync_directory, sync_file

_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Holding:
    """The WAL in a directory, all of which is on disk."""

    identity: Identity
    history: History
    """The newest timeline of which there is WAL, and its ancestors."""
    valid_to: int
    """The end of its last whole record."""
    end: int
    """Where WAL is to go on: :attr:`valid_to`, or the start of the newest segment if that is behind
    it or all that can be relied on, or its end if it is whole."""
    path: Path
    """The newest segment's file."""

    def joins(self, lsn: int) -> bool:
        """Whether there is all WAL from ``lsn`` to :attr:`end`, which is on disk then.  Raises
        OSError or SyncError."""
        size = self.identity.segment_size
        newest = self.end - self.end % size
        for start in range(lsn - lsn % size, newest, size):
            tli = self.history.file_tli(start, size)
            try:
                sync_file(self.path.with_name(segment_name(tli, start // size, size)))
            except FileNotFoundError:
                return False
        return True


def examine(directory: Path) -> Holding | None:
    """What ``directory`` holds, brought to disk; None if there is no WAL in it.

    A segment that is whole and was not yet given its name, gets it.  It takes as long as walking
    over the two newest segments does, for the last one must go on from the one before.  Raises
    OSError if the directory cannot be read, ValueError if what is there is in a format we do not
    know, SyncError if it cannot be brought to disk.
    """
    found = survey(directory)
    if found is None:
        return None
    identity, history = found.identity, found.history
    start, end = found.last_lsn, found.last_lsn + identity.segment_size
    segments = Segments(directory, identity)
    try:
        size = identity.segment_size
        tail = _walk(segments, identity, history, start - size)
        if tail is None or tail.position < start:  # what is wrong before it, is another matter
            tail = _walk(segments, identity, history, start)
        assert tail is not None
        begins_whole = tail.start < start or tail.begins_whole()
    finally:
        segments.close()
    path = directory / segments.name(history.tli, start)
    partial = path.with_suffix(".partial")
    valid_to = tail.end if tail.is_found else start
    proven_to = max(valid_to, start) if begins_whole else start
    is_named = path.exists()
    is_whole = tail.position >= end if is_named else proven_to >= end
    sync_file(path if is_named else partial)
    if is_whole and not is_named:
        os.rename(partial, path)
    sync_directory(directory)
    there = path if is_named or is_whole else partial
    return Holding(identity, history, valid_to, end if is_whole else proven_to, there)


def _walk(segments: Segments, identity: Identity, history: History, start: int) -> Tail | None:
    """The end of the WAL from the segment at ``start`` on, if there is that segment."""
    if start < 0 or not segments.read(history.file_tli(start, identity.segment_size), start, 1):
        return None
    tail = Tail(segments, identity, history, start)
    while tail.advance(_STEP):
        pass
    return tail
