"""A timeline of a safekeeper: what may be had of it, whatever becomes of its files.

Time is a Clock, so nothing happens but what a test lets happen; at the end the real reactor, and
the WAL of a real PostgreSQL.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from tests import postgres
from tests.safekeeper import CONTROL, IDS, Stream, put_control, put_file, put_wal
from tests.test_directory import built
from tests.wal_builder import MB, PAGE, SYSTEM, WalBuilder
from walproto.errors import (
    CannotConnectNow,
    DataCorrupted,
    InternalError,
    IoError,
    ObjectNotInPrerequisiteState,
    ReportedError,
    UndefinedFile,
)
from walproto.lsn import format_lsn
from walproto.neon.control_file import NAME, TermSwitch, build_control
from walproto.neon.ids import TimelineIds
from walproto.neon.timeline import SafekeeperTimeline
from walproto.timeline import watch as watch_module
from walproto.timeline.directory import PATIENCE
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.watch import FAST_POLL


class InMemory(SynchronousTestCase):
    """What all tests here need: a directory, a clock, and what is logged."""

    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.logged = self.enterContext(capturedLogs())
        self.clock = Clock()
        self.timeline = SafekeeperTimeline(self.path, IDS, self.clock)
        self.addCleanup(self.stop)

    def stop(self) -> None:
        self.timeline.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.files(), [])
        self.assertEqual([event for event in self.logged if "log_failure" in event], [])

    def files(self) -> list[str]:
        """Our files that are open."""
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        return [link for link in links if link.startswith(str(self.path))]

    def start(self) -> None:
        self.timeline.start()
        self.settle()

    def settle(self) -> None:
        """Let it do all that it has to do now; only the poll may be left."""
        self.clock.pump([0] * 50)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def look(self) -> None:
        self.timeline.look()
        self.settle()

    def commit(self, lsn: int, **changes: Any) -> None:
        """A safekeeper says that WAL is committed up to ``lsn``."""
        put_control(self.path, commit_lsn=lsn, **changes)
        self.look()

    def serve(self, wal: WalBuilder, commit_lsn: int) -> None:
        put_wal(self.path, wal)
        put_control(self.path, commit_lsn=commit_lsn)
        self.start()
        self.timeline.require_ready()

    def stream(self, start: int, timeline: ITimeline | None = None) -> Stream:
        stream = Stream(timeline or self.timeline, self.clock, start)
        self.addCleanup(stream.stop)
        self.settle()
        return stream

    def lines(self, text: str = "") -> list[str]:
        """The lines of the log that contain ``text``."""
        lines = [
            formatEvent(event)
            for event in self.logged
            if event["log_namespace"].startswith("walproto")
        ]
        return [line for line in lines if text in line and "inotify" not in line]

    def error(self) -> ReportedError:
        """Why it is not ready."""
        with self.assertRaises(ReportedError) as caught:
            self.timeline.require_ready()
        error: ReportedError = caught.exception
        self.assertTrue(error.fatal)
        return error

    def assert_sent(self, stream: Stream, wal: WalBuilder, start: int, end: int) -> None:
        """That this much was sent, and nothing else."""
        self.assertEqual(stream.errors, [])
        self.assertEqual(format_lsn(stream.end), format_lsn(end))
        self.assertEqual(stream.wal, wal.image[start - wal.start : end - wal.start])


class Committed(InMemory):
    """Clients get WAL up to the commit LSN."""

    def test_it_is_a_timeline(self) -> None:
        self.serve(built(), MB + 9000)
        verifyObject(ITimeline, self.timeline)
        verifyObject(ITimeline, self.timeline.uncommitted())
        self.assertEqual(self.timeline.identity.system_identifier, SYSTEM)
        self.assertEqual(self.timeline.history.tli, 1)
        self.assertEqual(self.timeline.control, replace(CONTROL, commit_lsn=MB + 9000))
        self.assertFalse(self.timeline.is_proposer_connected)
        with self.assertRaises(UndefinedFile):
            self.timeline.read_history(1)
        with self.assertRaises(InternalError):
            self.timeline.end_of(2)

    def test_it_follows_the_control_file_to_the_byte(self) -> None:
        wal = built(3.5)
        record = wal.records[40]
        self.serve(wal, 0)
        stream = self.stream(MB)
        for lsn in (
            *(MB + 1, MB + PAGE - 3, MB + PAGE, MB + PAGE + 7, record.start + 9, record.end),
            *(2 * MB, 2 * MB + 1, 4 * MB - 1, 4 * MB + 5 * PAGE, wal.lsn),
        ):
            self.commit(lsn)
            self.assertEqual(self.timeline.commit_lsn, lsn)
            self.assertEqual(self.timeline.end_of(1), lsn)
            self.assertEqual(self.timeline.flush_lsn, wal.lsn)
            self.assert_sent(stream, wal, MB, lsn)
            for start in (MB, lsn - 1, lsn, lsn + 1, wal.lsn):
                self.assertLessEqual(self.timeline.sendable_to(1, start), lsn)
        self.assertEqual(self.lines("goes back"), [])

    def test_wal_and_commits_of_any_size(self) -> None:
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        some = random.Random(seed)
        wal = WalBuilder(seed=seed)
        while wal.lsn < wal.start + 2 * MB:
            wal.record(some.choice([30, 1000, 9000, 70_000]))
        wal.switch()
        wal.records_to(wal.lsn + MB // 2, 3000)
        shown = committed = wal.start
        put_control(self.path)
        self.start()
        streams = [self.stream(wal.start), self.stream(wal.start + MB)]
        while committed < wal.lsn:
            size = some.choice([1, 100, PAGE, 50_000, 200_000])
            if some.random() < 0.5:
                shown = min(shown + some.randint(1, size), wal.lsn)
                put_wal(self.path, wal, shown)
            else:
                # It may be known to be committed before it is here.
                committed = min(committed + some.randint(1, size), shown + 100_000, wal.lsn)
                if some.random() < 0.5:
                    put_control(self.path, commit_lsn=committed)
                else:
                    self.timeline.advance(committed)
            self.look()
            end = self.timeline.commit_lsn
            if end:
                # Zeros that are still to be written are there already.
                rest = wal.image[shown - wal.start : shown - wal.start + MB - shown % MB]
                there = shown + len(rest) - len(rest.lstrip(b"\0"))
                self.assertLessEqual(self.timeline.flush_lsn, wal.end_of(there))
                self.assertGreaterEqual(self.timeline.flush_lsn, min(wal.end_of(shown), shown))
                self.assertEqual(end, min(committed, self.timeline.flush_lsn))
                self.assert_sent(streams[0], wal, MB, end)
                self.assert_sent(streams[1], wal, 2 * MB, max(end, 2 * MB))
        put_wal(self.path, wal)
        self.look()
        self.assert_sent(streams[0], wal, MB, wal.lsn)
        self.assert_sent(streams[1], wal, 2 * MB, wal.lsn)

    def test_while_nothing_is_committed_a_client_waits(self) -> None:
        wal = built()
        self.serve(wal, 0)
        stream = self.stream(2 * MB + 100 * 8)
        self.clock.pump([FAST_POLL] * 20)
        self.assert_sent(stream, wal, 2 * MB + 800, 2 * MB + 800)
        self.commit(2 * MB + 800)
        self.assertEqual(stream.wal, b"")
        self.commit(2 * MB + 801)
        self.assert_sent(stream, wal, 2 * MB + 800, 2 * MB + 801)

    def test_it_is_never_beyond_the_end_of_wal(self) -> None:
        wal = built(2.5)
        put_wal(self.path, wal, 2 * MB + 500_000)
        put_control(self.path, commit_lsn=wal.lsn)
        self.start()
        stream = self.stream(MB)
        for shown in (2 * MB + 500_000, 2 * MB + 500_123, 3 * MB - 1, wal.lsn):
            put_wal(self.path, wal, shown)
            self.look()
            self.assertEqual(self.timeline.commit_lsn, wal.end_of(shown))
            self.assertEqual(self.timeline.flush_lsn, wal.end_of(shown))
            self.assert_sent(stream, wal, MB, wal.end_of(shown))
        (line,) = self.lines("restore it")
        self.assertIn(
            f"WAL ends at {format_lsn(wal.end_of(2 * MB + 500_000))}, and the control file says "
            f"that it is committed up to {format_lsn(wal.lsn)}",
            line,
        )

    def test_if_wal_ends_before_what_is_committed_that_is_said_once(self) -> None:
        wal = built(2.5)
        end = wal.end_of(2 * MB + 300_000)
        put_wal(self.path, wal, 2 * MB + 300_000)
        put_control(self.path, commit_lsn=MB + 1000)
        self.start()
        self.assertEqual(self.timeline.committed_lsn, MB + 1000)
        self.commit(end + 50)  # the WAL may be on its way
        self.assertEqual((self.timeline.commit_lsn, self.timeline.committed_lsn), (end, end + 50))
        self.assertEqual(self.lines("restore it"), [])
        for lsn in (end + 50, end + 60, end + 70):
            self.commit(lsn)
            self.clock.pump([FAST_POLL] * 20)
            (line,) = self.lines("restore it")
        self.assertTrue(line.startswith(f"timeline {IDS}: WAL ends at {format_lsn(end)}, "), line)
        self.assertIn(f"that it is committed up to {format_lsn(end + 50)}: restore it", line)
        self.timeline.advance(end + 100)
        self.assertEqual(self.timeline.committed_lsn, end + 100)
        put_wal(self.path, wal)
        self.look()
        self.clock.pump([FAST_POLL] * 20)
        self.assertEqual(self.timeline.commit_lsn, end + 100)
        self.assertEqual(len(self.lines("restore it")), 1)
        self.commit(2**63)
        self.clock.pump([FAST_POLL] * 20)
        self.assertIn(f"WAL ends at {format_lsn(wal.lsn)}, ", self.lines("restore it")[1])

    def test_a_program_may_advance_it(self) -> None:
        wal = built()
        self.serve(wal, MB + 1000)
        stream = self.stream(MB)
        self.timeline.advance(MB + 30_001)
        self.assert_sent(stream, wal, MB, MB + 30_001)
        self.timeline.advance(MB + 20_000)
        self.commit(MB + 25_000)
        self.assertEqual(self.timeline.commit_lsn, MB + 30_001)
        self.commit(MB + 40_000)
        self.assert_sent(stream, wal, MB, MB + 40_000)
        self.timeline.advance(2**64 - 1)
        self.settle()
        self.assert_sent(stream, wal, MB, wal.lsn)
        self.assertEqual(self.timeline.commit_lsn, wal.lsn)
        self.assertEqual(self.lines("goes back"), [])

    def test_a_control_file_that_goes_back_is_told_of_once(self) -> None:
        wal = built()
        self.serve(wal, MB + 100_000)
        stream = self.stream(MB)
        self.commit(MB + 50_000)
        for _ in range(5):
            self.look()
        self.assertEqual(self.timeline.commit_lsn, MB + 100_000)
        (line,) = self.lines("goes back")
        self.assertIn(f"timeline {IDS}: the commit LSN in the control file goes back from", line)
        self.assertIn(f"{format_lsn(MB + 100_000)} to {format_lsn(MB + 50_000)}", line)
        self.commit(MB + 100_001)
        self.assert_sent(stream, wal, MB, MB + 100_001)

    def test_nor_does_it_go_back_before_the_wal_has_come(self) -> None:
        wal = built(2.5)
        put_wal(self.path, wal, 2 * MB)
        put_control(self.path, commit_lsn=2 * MB + 200_000)
        self.start()
        self.commit(2 * MB + 100_000)
        put_wal(self.path, wal)
        self.look()
        self.assertEqual(self.timeline.commit_lsn, 2 * MB + 200_000)

    def test_it_does_not_go_back_if_wal_is_lost(self) -> None:
        wal = built(1.5)
        self.serve(wal, wal.lsn)
        self.timeline.stop()
        end = wal.end_of(2 * MB + 100_000)
        path = self.path / f"{wal.segment_name(2 * MB)}.partial"
        path.write_bytes(wal.segment(2 * MB)[: end - 2 * MB].ljust(MB, b"\0"))
        self.start()
        self.assertEqual(self.timeline.flush_lsn, end)
        self.assertEqual(self.timeline.commit_lsn, wal.lsn)
        stream, other = self.stream(MB), self.stream(wal.lsn)
        self.assert_sent(stream, wal, MB, end)
        self.assert_sent(other, wal, wal.lsn, wal.lsn)
        (line,) = self.lines("restore it")
        self.assertIn(f"WAL ends at {format_lsn(end)}, and the control file says", line)
        put_wal(self.path, wal)
        self.look()
        self.assert_sent(stream, wal, MB, wal.lsn)

    def test_damage_behind_the_end_that_is_committed(self) -> None:
        wal = built(3.5)
        put_wal(self.path, wal, 2 * MB + 500_000)
        put_control(self.path)
        self.start()
        flush_lsn = self.timeline.flush_lsn
        path = Path(f"{self.path / wal.segment_name(2 * MB)}.partial")
        with open(path, "r+b") as file:
            file.seek(500_000)
            file.write(bytes(range(200)) * 2000)
        put_wal(self.path, wal, 3 * MB + 200_000)
        contents = bytearray(wal.segment(2 * MB))
        contents[flush_lsn - 2 * MB + 30] ^= 1
        (self.path / wal.segment_name(2 * MB)).write_bytes(contents)
        stream = self.stream(MB)
        for lsn in (flush_lsn - 5, flush_lsn):
            self.commit(lsn)
            for _ in range(3):
                self.look()
            self.assert_sent(stream, wal, MB, lsn)
        self.commit(flush_lsn + 8)
        (error,) = stream.errors
        self.assertIsInstance(error, DataCorrupted)
        self.assertEqual(stream.wal, wal.image[: flush_lsn - MB])

    def test_damage_matters_only_where_wal_is_committed(self) -> None:
        wal = built(3.5)
        self.serve(wal, 2 * MB)
        self.stop()
        record = next(record for record in wal.records if record.start > 2 * MB + 300_000)
        path = self.path / wal.segment_name(2 * MB)
        contents = bytearray(path.read_bytes())
        contents[record.last - 5 - 2 * MB] ^= 1
        path.write_bytes(contents)
        (self.path / f"{wal.segment_name(4 * MB)}.partial").write_bytes(bytes(MB))
        self.start()
        stream = self.stream(MB)
        for lsn in (2 * MB + 100_000, 2 * MB + 200_000):
            self.commit(lsn)
            self.assert_sent(stream, wal, MB, lsn)
        self.commit(record.end)
        (error,) = stream.errors
        self.assertIsInstance(error, DataCorrupted)
        assert error.log is not None
        self.assertIn(str(path), error.log)
        self.assertLessEqual(stream.end, record.start + PAGE)
        self.assertEqual(stream.wal, wal.image[: stream.end - MB])


class Waiting(InMemory):
    """Before there is anything to serve."""

    def assert_waiting(self, log: str) -> None:
        error = self.error()
        self.assertIsInstance(error, CannotConnectNow)
        self.assertEqual(
            error.detail, "The WAL sender waits for a proposer to say how long segments are."
        )
        self.assertEqual(error.log, log)
        self.assertTrue(self.timeline.is_waiting_for_proposer)

    def assert_empty(self) -> None:
        """It is ready, and there is nothing in it."""
        self.timeline.require_ready()
        self.assertFalse(self.timeline.is_waiting_for_proposer)
        self.assertEqual((self.timeline.commit_lsn, self.timeline.flush_lsn), (0, 0))
        self.assertEqual(self.timeline.identity.segment_size, MB)
        self.assertEqual(self.timeline.end_of(1), 0)

    def test_streams_may_begin_before_there_is_wal(self) -> None:
        wal = built()
        put_control(self.path)
        self.start()
        self.assert_empty()
        stream = self.stream(MB)
        recovery = self.stream(MB, self.timeline.uncommitted())
        self.assertEqual((recovery.ends, recovery.errors), (1, []))
        self.clock.pump([FAST_POLL] * 20)
        put_wal(self.path, wal)
        self.timeline.look()
        opened = self.timeline.opened()
        self.settle()
        self.successResultOf(opened)
        self.assert_sent(stream, wal, MB, MB)
        self.commit(MB + 5000)
        self.assert_sent(stream, wal, MB, MB + 5000)

    def test_wal_that_is_committed_and_not_there(self) -> None:
        """It is no reason to keep anybody waiting either, but the operator is told."""
        wal = built()
        put_control(self.path, commit_lsn=wal.lsn)
        self.start()
        self.assert_empty()
        self.assertEqual(self.timeline.committed_lsn, wal.lsn)
        self.clock.pump([FAST_POLL] * 50)
        (line,) = self.lines("restore it")
        self.assertIn(
            "there is no WAL, and the control file says that it is committed up to "
            + format_lsn(wal.lsn),
            line,
        )

    def test_from_nothing_to_the_first_commit(self) -> None:
        wal = built(0.5)
        put_control(self.path, wal_seg_size=0, system_id=0, term_history=())
        self.timeline.start()
        opened = self.timeline.opened()
        self.assertNoResult(opened)
        self.assertEqual(
            self.error().detail, "The WAL sender has not found the end of its WAL yet."
        )
        self.settle()
        self.successResultOf(opened)
        self.successResultOf(self.timeline.opened())
        told = 0

        def observe() -> None:
            nonlocal told
            told += 1

        self.timeline.add_observer(observe)
        self.clock.pump([FAST_POLL] * 20)
        size = "the segment size is not known yet: waiting for a proposer"
        self.assert_waiting(size)
        self.assertEqual(self.lines(), [f"timeline {IDS}: {size}"])
        put_control(self.path)
        self.look()
        self.clock.pump([FAST_POLL] * 20)
        wait = "there is no WAL yet: a proposer has to bring it"
        self.assert_empty()
        self.assertEqual(self.lines(), [f"timeline {IDS}: {it}" for it in (size, wait)])
        self.assertGreater(told, 0)
        put_wal(self.path, wal, wal.start + 1000)
        self.look()
        self.assert_empty()
        self.assertEqual(len(self.lines(f"timeline {IDS}: there is no whole WAL record")), 1)
        stream = self.stream(wal.start)
        told = 0
        put_wal(self.path, wal)
        self.look()
        self.assertFalse(self.timeline.is_waiting_for_proposer)
        self.assertGreater(told, 0)
        self.timeline.require_ready()
        self.assertEqual((self.timeline.commit_lsn, self.timeline.flush_lsn), (0, wal.lsn))
        self.commit(wal.lsn)
        self.assert_sent(stream, wal, wal.start, wal.lsn)

    def test_the_segment_size_is_unknown_once_more(self) -> None:
        wal = built()
        self.serve(wal, MB + 5000)
        stream = self.stream(MB)
        put_control(self.path, wal_seg_size=0)
        self.look()
        error = self.error()
        self.assertIsInstance(error, DataCorrupted)
        self.assertIn(f"their segment sizes are 0 and {MB}", error.message)
        (told,) = stream.errors
        self.assertIs(told, error)
        self.assertEqual(self.files(), [])
        self.clock.pump([FAST_POLL] * 20)
        self.timeline.stop()
        self.start()
        self.assertIsInstance(self.error(), DataCorrupted)
        self.commit(MB + 6000)
        self.timeline.require_ready()
        self.assertEqual(self.timeline.commit_lsn, MB + 6000)

    def test_a_control_file_cannot_commit_the_wal_of_another_cluster(self) -> None:
        """Not even one that was there before the WAL was."""
        wal = built()
        put_control(self.path, system_id=1, commit_lsn=wal.lsn)
        self.start()
        put_wal(self.path, wal)
        self.look()
        self.assertIsInstance(self.error(), DataCorrupted)
        self.commit(MB + 5000)
        self.assertEqual(self.timeline.commit_lsn, MB + 5000)

    def test_who_waits_for_it_to_be_opened(self) -> None:
        put_wal(self.path, built())
        put_control(self.path)
        self.timeline.start()
        first, second, third = (self.timeline.opened() for _ in range(3))
        first.addCallback(lambda _: third.cancel())
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertFalse(self.timeline.suspend())
        self.settle()
        self.successResultOf(first)
        self.failureResultOf(third, CancelledError)
        self.timeline.require_ready()
        self.successResultOf(self.timeline.opened())
        self.timeline.stop()
        self.timeline.start()
        fourth = self.timeline.opened()
        self.assertNoResult(fourth)
        self.timeline.stop()
        self.successResultOf(fourth)
        self.assertIsInstance(self.error(), CannotConnectNow)
        self.successResultOf(self.timeline.opened())


def changed(control: bytes, at: int) -> bytes:
    return control[:at] + bytes([control[at] ^ 1]) + control[at + 1 :]


GOOD = build_control(replace(CONTROL, commit_lsn=MB + 60_000))
OTHER_IDS = build_control(replace(CONTROL, tenant_id="1" * 32, commit_lsn=2**63))
OTHER_SYSTEM = build_control(replace(CONTROL, system_id=SYSTEM + 1, commit_lsn=2**63))
OTHER_SIZE = build_control(replace(CONTROL, wal_seg_size=16 * MB, commit_lsn=2**63))

BAD = {
    "magic": (changed(GOOD, 0), "magic"),
    "version": (changed(GOOD, 4), "version"),
    "length": (GOOD[:100], "cut short"),
    "too long": (GOOD + b"\0", "behind its end"),
    "empty": (b"", "cut short"),
    "checksum": (changed(GOOD, len(GOOD) - 1), "checksum"),
    "contents": (changed(GOOD, len(GOOD) - 30), "checksum"),
    "ids": (OTHER_IDS, "it is that of another timeline"),
    "system": (OTHER_SYSTEM, f"their system identifiers are {SYSTEM + 1} and {SYSTEM}"),
    "segment size": (OTHER_SIZE, f"their segment sizes are {16 * MB} and {MB}"),
}


class Refused(InMemory):
    """A control file that is bad, and mended."""

    def assert_refused(self, kind: type[ReportedError], text: str) -> None:
        for _ in range(3):
            error = self.error()
            self.assertIs(type(error), kind)
            self.assertIn(text, error.message)
            self.assertNotIn(str(self.path), error.message)
            self.assertIn(str(self.path), error.log or "")
            for ask in (
                lambda: self.timeline.end_of(1),
                lambda: self.timeline.sendable_to(1, MB),
                lambda: self.timeline.read_into(1, MB, memoryview(bytearray(1))),
                self.timeline.uncommitted,
            ):
                with self.assertRaises(kind):
                    ask()
            self.successResultOf(self.timeline.opened())
            self.assertFalse(self.timeline.is_waiting_for_proposer)
            self.look()
        (line,) = self.lines("refused")
        self.assertIn(f"timeline {IDS}: refused: {error.message} ({error.log})", line)
        self.logged.clear()  # type: ignore[attr-defined]

    def mend_and_break(
        self, spoil: Callable[[], None], kind: type[ReportedError], text: str
    ) -> None:
        """Spoil it from the start and later on; and each time mend it again."""
        wal = built()
        put_wal(self.path, wal)
        put_file(self.path, GOOD)
        spoil()
        self.start()
        for _ in range(2):
            self.assert_refused(kind, text)
            self.mend()
            put_file(self.path, GOOD)
            self.look()
            self.timeline.require_ready()
            self.assertEqual(self.timeline.commit_lsn, MB + 60_000)
            stream = self.stream(MB)
            self.assert_sent(stream, wal, MB, MB + 60_000)
            spoil()
            self.look()
            (error,) = stream.errors
            self.assertIs(type(error), kind)
        self.assert_refused(kind, text)
        self.assertEqual(self.lines("goes back"), [])

    def mend(self) -> None:
        path = self.path / NAME
        if path.is_dir():
            path.rmdir()

    def test_bad_contents(self) -> None:
        for name, (contents, text) in BAD.items():
            with self.subTest(name):
                spoil = partial(put_file, self.path, contents)
                self.mend_and_break(spoil, DataCorrupted, text)
                self.timeline.stop()
                self.timeline = SafekeeperTimeline(self.path, IDS, self.clock)

    def test_it_is_not_there(self) -> None:
        self.mend_and_break(
            lambda: (self.path / NAME).unlink(),
            UndefinedFile,
            f'could not open file "{NAME}": No such file or directory',
        )

    def test_it_is_no_file(self) -> None:
        def spoil() -> None:
            (self.path / NAME).unlink()
            (self.path / NAME).mkdir()

        self.mend_and_break(spoil, IoError, f'could not open file "{NAME}"')

    def test_a_pipe_does_not_keep_us_waiting(self) -> None:
        os.mkfifo(self.path / NAME)
        self.start()
        self.assert_refused(IoError, f'could not open file "{NAME}"')

    def test_the_directory_is_gone(self) -> None:
        self.path.rmdir()
        self.start()
        self.assert_refused(UndefinedFile, "No such file or directory")
        self.path.mkdir()
        put_wal(self.path, built())
        self.commit(MB + 5)
        self.timeline.require_ready()
        self.assertEqual(self.timeline.commit_lsn, MB + 5)

    def test_other_wal_is_put_in_place_of_wrong_wal(self) -> None:
        """It need not be the control file that is wrong."""
        wrong = built(system=SYSTEM + 5)
        put_wal(self.path, wrong)
        put_file(self.path, GOOD)
        self.start()
        self.assert_refused(DataCorrupted, "do not belong together")
        for name in wrong.segments():
            (self.path / name).unlink(missing_ok=True)
        wal = built()
        put_wal(self.path, wal)
        self.look()
        self.assert_sent(self.stream(MB), wal, MB, MB + 60_000)

    def test_wal_of_another_timeline(self) -> None:
        wal = built()
        child = wal.fork(2)
        child.records_to(child.lsn + 20_000)
        self.serve(wal, wal.lsn)
        stream = self.stream(MB)
        child.write_to(self.path)
        self.look()
        self.clock.pump([FAST_POLL] * 30)
        self.assert_refused(DataCorrupted, "the WAL is of PostgreSQL timeline 2, and not 1")
        (error,) = stream.errors
        self.assertIsInstance(error, DataCorrupted)
        (self.path / child.name).unlink()
        for name in child.segments():
            (self.path / name).unlink()
        self.look()
        self.assert_sent(self.stream(MB), wal, MB, wal.lsn)

    def test_wal_of_an_unknown_version(self) -> None:
        wal = built(0.5)
        contents = bytearray(wal.segment(MB))
        contents[0:2] = b"\xff\xd1"
        (self.path / wal.segment_name(MB)).write_bytes(contents)
        put_file(self.path, GOOD)
        self.start()
        self.assert_refused(DataCorrupted, "in a format that is not known")


class CutOff(InMemory):
    """A new proposer has WAL cut off that is not committed, and writes other WAL there."""

    def setUp(self) -> None:
        super().setUp()
        self.wal = built(2.9)
        """What the old proposer wrote."""
        self.other = self.wal.copy(seed=7)
        self.cut = next(record.end for record in self.wal.records if record.end > 2 * MB + 77_000)
        self.other.lsn = self.cut
        self.other.records = [it for it in self.wal.records if it.end <= self.cut]
        self.other.prev = self.other.records[-1].start
        del self.other._data[self.cut - self.other.start :]
        self.other._points = [it for it in self.wal._points if it[1] <= self.cut]

    def cut_off(self) -> None:
        """What a safekeeper does when it votes for the new proposer."""
        path = self.path / f"{self.wal.segment_name(3 * MB)}.partial"
        path.unlink()
        path = self.path / self.wal.segment_name(2 * MB)
        with open(path, "r+b") as file:
            file.seek(self.cut - 2 * MB)
            file.write(bytes(3 * MB - self.cut))
        path.rename(f"{path}.partial")

    def test_what_is_written_there_is_served(self) -> None:
        self.serve(self.wal, self.cut - 1000)
        self.assertEqual(self.timeline.flush_lsn, self.wal.lsn)
        stream = self.stream(MB)
        self.cut_off()
        self.look()
        history = (*CONTROL.term_history, TermSwitch(2, self.cut))
        self.commit(self.cut - 1000, term=2, term_history=history)
        self.assertEqual(self.timeline.flush_lsn, self.cut)
        self.assertEqual(self.timeline.commit_lsn, self.cut - 1000)
        self.other.records_to(self.cut + 50_000, 777)
        put_wal(self.path, self.other)
        self.commit(self.cut + 30_001, term=2, term_history=history)
        self.assert_sent(stream, self.other, MB, self.cut + 30_001)
        self.other.records_to(4 * MB, 999)
        put_wal(self.path, self.other)
        self.commit(self.other.lsn, term=2, term_history=history)
        self.assert_sent(stream, self.other, MB, self.other.lsn)
        self.assertEqual(self.timeline.flush_lsn, self.other.lsn)

    def test_it_may_all_have_happened_before_we_look(self) -> None:
        self.serve(self.wal, self.cut - 1000)
        stream = self.stream(MB)
        self.cut_off()
        self.other.records_to(3 * MB + 200_000, 777)
        put_wal(self.path, self.other)
        history = (*CONTROL.term_history, TermSwitch(2, self.cut))
        self.commit(self.other.lsn, term=2, term_history=history)
        self.assert_sent(stream, self.other, MB, self.other.lsn)

    def test_what_is_committed_elsewhere_is_not_what_was_here(self) -> None:
        self.serve(self.wal, self.cut - 1000)
        stream = self.stream(MB)
        self.cut_off()
        put_control(
            self.path,
            commit_lsn=self.cut - 1000,
            term=2,
            term_history=(*CONTROL.term_history, TermSwitch(2, self.cut)),
        )
        self.timeline.advance(self.wal.lsn)  # at once, before we were told to look
        self.settle()
        self.assert_sent(stream, self.wal, MB, self.cut)
        self.other.records_to(self.cut + 50_000, 777)
        put_wal(self.path, self.other)
        self.look()
        self.assert_sent(stream, self.other, MB, self.other.lsn)

    def test_whoever_was_sent_all_of_it_is_told(self) -> None:
        self.serve(self.wal, self.cut - 1000)
        view = self.timeline.uncommitted()
        self.cut_off()
        history = (*CONTROL.term_history, TermSwitch(2, self.cut))
        self.commit(self.cut - 1000, term=2, term_history=history)
        stream = self.stream(MB, view)
        (error,) = stream.errors
        self.assertIsInstance(error, ObjectNotInPrerequisiteState)
        self.assertIn(format_lsn(self.cut), error.message)


class AllOfIt(InMemory):
    """What a proposer that recovers is sent: all WAL, and then the end."""

    def test_byte_for_byte_from_anywhere(self) -> None:
        wal = built(3.5)
        self.serve(wal, MB + 10_001)
        record = wal.records[-3]
        for start in (MB, MB + 10_001, MB + 12_345, 3 * MB - 1, record.start + 5, wal.lsn):
            stream = self.stream(start, self.timeline.uncommitted())
            self.assertEqual(stream.ends, 1)
            self.assert_sent(stream, wal, start, wal.lsn)
        self.assertEqual(self.timeline.commit_lsn, MB + 10_001)

    def test_it_ends_where_wal_ended_when_it_was_asked_for(self) -> None:
        wal = built(2.5)
        first = next(record.end for record in wal.records if record.end > 2 * MB + 55_555)
        put_wal(self.path, wal, first)
        put_control(self.path)
        self.start()
        view = self.timeline.uncommitted()
        put_wal(self.path, wal)
        self.look()
        self.assertEqual(self.timeline.flush_lsn, wal.lsn)
        stream = self.stream(MB, view)
        self.assertEqual(stream.ends, 1)
        self.assert_sent(stream, wal, MB, first)
        self.assertEqual(view.end_of(1), first)
        self.assertLessEqual(view.sendable_to(1, 2 * MB), first)
        self.assertEqual(self.timeline.history.tli, 1)

    def test_whoever_begins_behind_the_end_is_told_that_it_has_ended(self) -> None:
        wal = built()
        self.serve(wal, wal.lsn)
        stream = self.stream(wal.lsn + 8, self.timeline.uncommitted())
        self.assertEqual((stream.wal, stream.ends, stream.errors), (b"", 1, []))


class Replaced(InMemory):
    """The directory is removed, and made anew."""

    def assert_over(self, stream: Stream) -> None:
        for _ in range(2):
            error = self.error()
            self.assertIs(type(error), UndefinedFile)
            self.assertEqual(
                error.message, f'the directory of timeline "{IDS}" was removed or replaced'
            )
            self.assertEqual(stream.errors, [error])
            self.assertTrue(self.timeline.is_over)
            self.assertFalse(self.timeline.is_active)
            self.assertEqual(self.clock.getDelayedCalls(), [])
            self.assertEqual(self.files(), [])
            self.timeline.stop()
            self.timeline.start()
            self.timeline.revisit()
        self.assertEqual(len(self.lines("was removed or replaced")), 1)

    def test_nothing_of_it_is_taken_for_what_was_there(self) -> None:
        wal = built()
        self.serve(wal, MB + 60_000)
        stream = self.stream(MB)
        shutil.rmtree(self.path)
        self.path.mkdir()
        put_wal(self.path, built(seed=5))
        put_control(self.path, commit_lsn=MB + 70_000)
        self.timeline.look()
        self.clock.pump([0] * 50)
        self.assert_sent_before(stream, wal)
        self.assert_over(stream)

    def assert_sent_before(self, stream: Stream, wal: WalBuilder) -> None:
        self.assertEqual(stream.wal, wal.image[:60_000])

    def test_it_is_over_as_soon_as_it_is_seen_missing(self) -> None:
        wal = built()
        self.serve(wal, MB + 60_000)
        stream = self.stream(MB)
        away = self.path.rename(f"{self.path}.away")
        self.clock.advance(FAST_POLL)
        away.rename(self.path)
        self.assert_sent_before(stream, wal)
        self.assert_over(stream)

    def test_it_is_removed_while_we_are_looking(self) -> None:
        wal = built()
        self.serve(wal, MB + 60_000)
        stream = self.stream(MB)

        def remove() -> None:
            self.timeline.remove_observer(remove)
            shutil.rmtree(self.path)

        self.timeline.add_observer(remove)
        put_control(self.path, commit_lsn=MB + 60_000, term=2)
        put_wal(self.path, built(2.7))
        self.timeline.advance(MB + 60_001)
        self.clock.pump([0] * 3 + [FAST_POLL] * 3)
        self.assertTrue(stream.errors)
        self.assertTrue(self.timeline.is_over)
        self.assertEqual(self.lines("newer timelines"), [])
        self.assertEqual(len(self.lines(f"timeline {IDS}: {self.path} is missing")), 1)
        for line in self.lines():
            self.assertTrue(line.startswith(f"timeline {IDS}: "), line)
        self.path.mkdir()


class Suspended(InMemory):
    """It is closed, and opened again."""

    def test_there_is_its_history_all_the_same(self) -> None:
        self.serve(built(), MB + 1000)
        self.assertTrue(self.timeline.suspend())
        with self.assertRaises(UndefinedFile):
            self.timeline.read_history(1)
        (self.path / "00000001.history").write_bytes(b"of its own")
        self.assertEqual(self.timeline.read_history(1), b"of its own")

    def test_nothing_is_open_or_watched_meanwhile(self) -> None:
        wal = built()
        self.serve(wal, MB + 1000)
        stream = self.stream(MB)
        self.assertTrue(self.files())
        self.assertFalse(self.timeline.suspend())
        self.assertTrue(self.timeline.is_active)
        self.commit(MB + 2000)
        self.assert_sent(stream, wal, MB, MB + 2000)
        stream.stop()
        self.assertTrue(self.timeline.suspend())
        self.assertTrue(self.timeline.suspend())
        self.assertFalse(self.timeline.is_active)
        self.assertEqual(self.files(), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertIsInstance(self.error(), CannotConnectNow)

    def test_what_has_come_meanwhile_is_there(self) -> None:
        wal = built(2.5)
        put_wal(self.path, wal, 2 * MB)
        put_control(self.path, commit_lsn=MB + 1000)
        self.start()
        self.assertTrue(self.timeline.suspend())
        put_wal(self.path, wal)
        put_control(self.path, commit_lsn=3 * MB)
        self.timeline.advance(3 * MB + 11)
        self.timeline.look()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.timeline.commit_lsn, MB + 1000)
        stream = self.stream(MB)  # it begins to observe
        self.assertTrue(self.timeline.is_active)
        self.assertEqual(self.timeline.flush_lsn, wal.lsn)
        self.assert_sent(stream, wal, MB, 3 * MB + 11)

    def test_it_may_be_suspended_by_whom_it_tells(self) -> None:
        wal = built()
        self.serve(wal, MB + 1000)

        def observer() -> None:
            self.timeline.remove_observer(observer)
            self.assertTrue(self.timeline.suspend())

        self.timeline.add_observer(observer)
        put_control(self.path, commit_lsn=MB + 2000)
        self.timeline.look()
        self.clock.advance(0)
        self.assertFalse(self.timeline.is_active)
        self.start()
        self.timeline.add_observer(observer)
        put_wal(self.path, built(2.7))
        self.timeline.look()
        self.clock.pump([0, 0])
        self.assertFalse(self.timeline.is_active)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_gap_is_gone_over_once_nothing_has_come_for_long(self) -> None:
        """As in any other directory of WAL: it is looked at as often."""
        wal = built(4.5)
        put_wal(self.path, wal, 2 * MB)
        put_control(self.path, commit_lsn=wal.lsn)
        self.start()
        put_wal(self.path, wal)
        (self.path / wal.segment_name(2 * MB)).unlink()
        self.clock.pump([FAST_POLL] * int(1.1 * PATIENCE / FAST_POLL))
        self.assertEqual(self.timeline.commit_lsn, wal.lsn)


class WithReactor(TestCase):
    """The real reactor, and inotify."""

    timeout = 20

    def test_a_control_file_that_is_replaced_is_noticed_at_once(self) -> Deferred[None]:
        self.patch(watch_module, "SLOW_POLL", 1000.0)
        self.patch(watch_module, "FAST_POLL", 1000.0)
        path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        put_wal(path, built())
        put_control(path, commit_lsn=MB + 100)
        timeline = SafekeeperTimeline(path, IDS, reactor)
        self.addCleanup(timeline.stop)
        timeline.start()
        committed = Deferred[None]()

        def observer() -> None:
            if timeline.commit_lsn == MB + 300 and not committed.called:
                committed.callback(None)

        def opened(_: None) -> Deferred[None]:
            timeline.require_ready()
            timeline.add_observer(observer)
            put_control(path, commit_lsn=MB + 200)
            put_control(path, commit_lsn=MB + 300)
            return committed

        return timeline.opened().addCallback(opened)


@pytest.mark.parametrize(
    "installation", postgres.installations(), ids=lambda it: f"postgres{it.major}"
)
def test_the_wal_of_a_real_server(installation: postgres.Installation, tmp_path: Path) -> None:
    ids = TimelineIds("a" * 32, "b" * 32)
    with postgres.workspace() as workspace:
        cluster = workspace.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        cluster.sql("CREATE TABLE t AS SELECT g, repeat('x', 200) FROM generate_series(1, 9000) g")
        cluster.sql("CHECKPOINT")
        end = postgres.lsn_to_int(cluster.sql("SELECT pg_current_wal_flush_lsn()"))
        system, _, _ = postgres.identify_system(installation, cluster.port)
        cluster.stop()
        segments = sorted(
            path
            for path in (cluster.directory / "pg_wal").iterdir()
            if len(path.name) == 24 and int(path.name, 16) - (1 << 64) <= end // MB
        )
        image = b""
        for segment in segments:
            contents = segment.read_bytes()
            image += contents
            suffix = ".partial" if segment == segments[-1] else ""
            (tmp_path / f"{segment.name}{suffix}").write_bytes(contents)
    start = (int(segments[0].name, 16) - (1 << 64)) * MB
    clock = Clock()
    put_control(tmp_path, ids, system_id=int(system), commit_lsn=0)
    timeline = SafekeeperTimeline(tmp_path, ids, clock)
    timeline.start()
    clock.pump([0] * 200)
    timeline.require_ready()
    assert timeline.flush_lsn >= end
    stream = Stream(timeline, clock, start)
    assert stream.end == start
    for commit_lsn in (start + 1, end - 2 * MB, end - 12_345, end - 1, end):
        put_control(tmp_path, ids, system_id=int(system), commit_lsn=commit_lsn)
        timeline.look()
        clock.pump([0] * 500)
        assert stream.errors == []
        assert stream.end == commit_lsn
    assert stream.wal == image[: end - start]
    recovery = Stream(timeline.uncommitted(), clock, end - MB)
    clock.pump([0] * 500)
    assert recovery.ends == 1
    assert recovery.wal == image[end - MB - start : timeline.flush_lsn - start]
    stream.stop()
    timeline.stop()
    assert clock.getDelayedCalls() == []
