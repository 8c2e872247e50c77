"""A safekeeper's directory as the tests write it, and a client that streams from a timeline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock

from tests.fakes import MemoryTransport, wal_of
from tests.wal_builder import MB, SYSTEM, WalBuilder
from walproto.errors import ReportedError
from walproto.neon.control_file import NAME, Control, TermSwitch, build_control
from walproto.neon.ids import TimelineIds
from walproto.server.producer import Piece, WalProducer
from walproto.server.turns import Turns
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import Replica

IDS = TimelineIds("0123456789abcdef" * 2, "fedcba9876543210" * 2)

CONTROL = Control(
    tenant_id=IDS.tenant_id,
    timeline_id=IDS.timeline_id,
    term=1,
    term_history=(TermSwitch(1, MB),),
    pg_version=180000,
    system_id=SYSTEM,
    wal_seg_size=MB,
    proposer_uuid="ab" * 16,
    timeline_start_lsn=MB,
    local_start_lsn=MB,
    commit_lsn=0,
    s3_wal_lsn=0,
    peer_horizon_lsn=0,
    remote_consistent_lsn=0,
    peers=(),
)


def put_control(directory: Path, ids: TimelineIds = IDS, /, **changes: Any) -> Control:
    """Put a control file in place as a safekeeper does, or its contents into a new directory."""
    named = {"tenant_id": ids.tenant_id, "timeline_id": ids.timeline_id}
    control = replace(CONTROL, **(named | changes))
    put_file(directory, build_control(control))
    return control


def put_file(directory: Path, contents: bytes) -> None:
    """Have a control file of these contents."""
    temporary = directory / f"{NAME}.partial"
    temporary.write_bytes(contents)
    os.rename(temporary, directory / NAME)


def put_wal(directory: Path, wal: WalBuilder, shown: int | None = None) -> None:
    """Write the segments as they are when only the bytes below the LSN ``shown`` were written: the
    last one zeros behind it, and ``.partial``."""
    shown = wal.lsn if shown is None else shown
    for lsn in range(wal.start, shown, MB):
        contents = wal.segment(lsn)[: shown - lsn].ljust(MB, b"\0")
        complete = directory / wal.segment_name(lsn)
        partial = Path(f"{complete}.partial")
        if lsn + MB > shown:
            _write(partial, contents)
        elif not complete.exists():
            _write(partial, contents)
            partial.rename(complete)


def _write(path: Path, contents: bytes) -> None:
    """Write over the file, or make it, without a moment at which it is empty."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(contents)


class Stream:
    """A producer that sends what a timeline has, to a client that takes everything."""

    def __init__(self, timeline: ITimeline, clock: IReactorTime, start: int) -> None:
        self._transport = MemoryTransport(Clock())
        self.errors: list[ReportedError] = []
        self.ends = 0
        """How often it was told that the timeline has ended."""
        self._start = start
        self._received = bytearray()
        replica = Replica(1, "postgres", "test", "", 1, start)
        self._producer = WalProducer(
            self._transport, timeline, replica, Piece(timeline), Turns(clock), clock, self
        )
        self._producer.start()

    @property
    def wal(self) -> bytes:
        """What was sent so far, without a gap from the start on."""
        news = wal_of(bytes(self._transport.arrived))
        self._transport.arrived.clear()
        for lsn, data in sorted(news.items()):
            assert lsn == self._start + len(self._received)
            self._received += data
        return bytes(self._received)

    @property
    def end(self) -> int:
        return self._start + len(self.wal)

    def stop(self) -> None:
        self._producer.stop()

    # --- Listener --------------------------------------------------------------------------

    def timeline_ended(self) -> None:
        self.ends += 1
        self.stop()

    def failed(self, error: ReportedError) -> None:
        self.errors.append(error)
        self.stop()

    def broken(self) -> None:
        raise AssertionError("an exception that is none of ours")

    def caught_up(self) -> None:
        raise AssertionError("nobody finishes")
