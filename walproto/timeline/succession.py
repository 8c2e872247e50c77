"""Looks for the timeline that goes on from the current one.

A newer timeline counts once there is its history file, and the segment in which it branched off.
Both may still be being written, so what does not make sense yet is looked at again.
"""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet.interfaces import IReactorTime

from walproto.lsn import history_name
from walproto.timeline.history import History
from walproto.timeline.survey import load_history, newer_timelines
from walproto.timeline.tail import Tail
from walproto.wal.pages import Identity
from walproto.wal.segments import Segments

RELIST = 1.0
"""Seconds between two listings of a directory whose time stamp tells nothing: it does not when
there was a change just now, for one in the same tick leaves no other, or when a file grows."""

_RESTED = 10_000
"""Names listed in a second, at most, of a directory that keeps changing: 100,000 files take 40 ms.
The timeline that most probably comes next is looked for by its name meanwhile."""


class Succession:
    """Looks into ``directory`` for timelines that go on from others.  ``clock`` is the reactor."""

    def __init__(
        self, directory: Path, segments: Segments, identity: Identity, clock: IReactorTime
    ) -> None:
        self._directory = directory
        self._segments = segments
        self._identity = identity
        self._clock = clock
        self._stamp = 0.0
        self._listed = 0.0
        self._list_from = 0.0
        self._settled = False

    def look(self, current: History, known: Tail | None) -> Tail | None:
        """The end of the newest timeline that goes on from ``current``, so far as it is to be
        seen; ``known`` is what was found before.  None if there is none.

        Raises OSError if the directory cannot be read, ValueError if a history file makes no
        sense.
        """
        stamp = self._directory.stat().st_mtime
        now = self._clock.seconds()
        if stamp == self._stamp and (self._settled or now - self._listed < RELIST):
            return known
        # One that is served without its ancestors is looked for itself: its history may come.
        tli = current.tli - (current.tli > 1 and not current.ancestors)
        if now < self._list_from and not (self._directory / history_name(tli + 1)).exists():
            return known
        entries = os.listdir(self._directory)
        newer = newer_timelines(entries, tli)
        self._stamp, self._listed, self._settled = stamp, now, False
        self._list_from = now + len(entries) // _RESTED
        self._settled = not newer and now - stamp > RELIST
        for tli in newer:
            if known is not None and known.history.tli == tli:
                return known
            history = load_history(self._directory, tli)
            if not history.ancestors:
                raise ValueError(f"{history_name(tli)} names no timeline before {tli}")
            size = self._identity.segment_size
            start = history.start_lsn // size * size
            if self._segments.read(tli, start, 1):
                return Tail(self._segments, self._identity, history, start)
        return known
