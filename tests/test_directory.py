"""A timeline in a directory that somebody else writes to: what it makes of everything that comes.

Time is a Clock, so nothing happens but what a test lets happen; at the end the real reactor.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from tests.wal_builder import MB, PAGE, SYSTEM, WalBuilder
from walproto.errors import CannotConnectNow, DataCorrupted, InternalError, UndefinedFile
from walproto.lsn import format_lsn
from walproto.timeline.directory import LONG_PATIENCE, PATIENCE, WalDirectory
from walproto.timeline.history import Ancestor, History
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.observers import LONGEST, REST
from walproto.timeline.succession import RELIST
from walproto.timeline.watch import FAST_POLL


def built(segments: float = 2.5, tli: int = 1, system: int = SYSTEM, seed: int = 0) -> WalBuilder:
    wal = WalBuilder(tli=tli, system=system, seed=seed)
    wal.records_to(wal.start + int(segments * MB) - 10_000, 5000)
    return wal


class InMemory(SynchronousTestCase):
    """What all tests here need: a directory, a clock, and what is logged."""

    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.logged = self.enterContext(capturedLogs())
        self.clock = Clock()
        self.directory = WalDirectory(self.path, self.clock)
        self.addCleanup(self.stop)
        self.told = 0
        self.is_started = False

    def stop(self) -> None:
        if self.is_started:
            self.directory.stop()
            self.is_started = False
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual([event for event in self.logged if "log_failure" in event], [])

    def start(self) -> None:
        """Start it and let it do all there is to do."""
        self.directory.add_observer(self.be_told)
        self.directory.start()
        self.is_started = True
        self.settle()

    def be_told(self) -> None:
        self.told += 1

    def settle(self) -> None:
        """Let it do all that it has to do now; only the poll may be left."""
        self.clock.advance(0)
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def look(self) -> int:
        """Let it have a look and do all there is to do; how often observers were told."""
        before = self.told
        self.directory.look()
        self.settle()
        return self.told - before

    def lines(self, text: str = "") -> list[str]:
        """The lines of the log that contain ``text``."""
        lines = [
            formatEvent(event)
            for event in self.logged
            if event["log_namespace"].startswith("walproto")
        ]
        return [line for line in lines if text in line and "inotify" not in line]

    def put(self, wal: WalBuilder, lsn: int, shown: int = MB, suffix: str = "") -> Path:
        """Write the segment that ``lsn`` is in, zeros behind ``shown`` bytes."""
        path = self.path / (wal.segment_name(lsn) + suffix)
        path.write_bytes(wal.segment(lsn)[:shown].ljust(MB, b"\0"))
        return path

    def put_history(self, wal: WalBuilder, contents: bytes | None = None) -> None:
        (self.path / wal.name).write_bytes(wal.history_contents if contents is None else contents)

    def note_listings(self, others: Iterable[str] = ()) -> list[str]:
        """Which directories are listed from now on; ``others`` are in there, too."""
        listed: list[str] = []
        real = os.listdir

        def note(path: str) -> list[str]:
            listed.append(path)
            return [*real(path), *others]

        self.patch(os, "listdir", note)
        return listed

    def read(self, start: int, end: int, tli: int = 1) -> bytes:
        buffer = bytearray(end - start)
        self.directory.read_into(tli, start, memoryview(buffer))
        return bytes(buffer)

    def assert_served(self, wal: WalBuilder) -> None:
        """That this is the timeline that is served, and all of it."""
        self.directory.require_ready()
        self.assertEqual(self.directory.history.tli, wal.tli)
        self.assertEqual(self.directory.commit_lsn, wal.lsn)
        self.assertEqual(self.directory.end_of(wal.tli), wal.lsn)


class Beginning(InMemory):
    """From nothing to the first client."""

    def assert_not_ready(self) -> str | None:
        with self.assertRaises(CannotConnectNow) as caught:
            self.directory.require_ready()
        self.assertEqual(caught.exception.sqlstate, "57P03")
        self.assertEqual(caught.exception.message, "the database system is starting up")
        self.assertTrue(caught.exception.fatal)
        log: str | None = caught.exception.log
        return log

    def test_it_is_a_timeline(self) -> None:
        built().write_to(self.path)
        self.start()
        verifyObject(ITimeline, self.directory)

    def test_before_the_first_look_it_is_not_ready(self) -> None:
        self.assertIsNone(self.assert_not_ready())

    def test_an_empty_directory_is_waited_at_in_silence(self) -> None:
        self.start()
        for _ in range(10):
            self.clock.advance(FAST_POLL)
            self.settle()
        waiting = f"there is no WAL in {self.path} yet: waiting for a first segment"
        self.assertEqual(self.lines(), [waiting])
        self.assertEqual(self.assert_not_ready(), waiting)
        self.assertEqual(self.told, 0)

    def test_a_directory_that_is_not_there_is_waited_for(self) -> None:
        self.path.rmdir()
        self.start()
        self.look()
        self.assertEqual(
            self.lines(),
            [f"cannot read {self.path} (No such file or directory): waiting until I can"],
        )
        self.path.mkdir()
        wal = built()
        wal.write_to(self.path)
        self.look()
        self.assert_served(wal)

    def test_the_first_segment_comes_and_grows(self) -> None:
        wal = built(1)
        self.start()
        self.put(wal, MB, shown=0)
        self.look()
        self.assert_not_ready()
        self.put(wal, MB, shown=100)
        self.look()
        self.assertIn("there is no whole WAL record in", self.assert_not_ready() or "")
        self.assertEqual(self.told, 0)
        self.put(wal, MB, shown=6000)
        self.assertEqual(self.look(), 1)
        self.directory.require_ready()
        self.assertEqual(self.directory.commit_lsn, wal.records[0].end)
        self.put(wal, MB)
        self.look()
        self.assert_served(wal)
        self.assertEqual(len(self.lines("ready to serve")), 1)

    def test_a_poll_notices_too(self) -> None:
        wal = built()
        self.start()
        wal.write_to(self.path)
        self.clock.advance(FAST_POLL)
        self.settle()
        self.assert_served(wal)

    def test_what_is_served_is_told(self) -> None:
        wal = built()
        wal.write_to(self.path)
        self.start()
        high, low = divmod(wal.lsn, 1 << 32)
        self.assertEqual(
            self.lines(),
            [
                f"ready to serve timeline 1 of system {SYSTEM} from 0/100000 to {high:X}/{low:X} "
                f"in {self.path}",
            ],
        )
        self.assertEqual(self.directory.identity.system_identifier, SYSTEM)
        self.assertEqual(self.directory.history, History(1))

    def test_it_steps_back_to_a_record(self) -> None:
        wal = WalBuilder()
        wal.records_to(wal.start + MB - PAGE, 5000)
        wal.record(2 * MB)
        wal.write_to(self.path)
        self.start()
        self.assert_served(wal)
        self.assertEqual(self.directory.sendable_to(1, MB), 2 * MB)
        self.assertEqual(self.directory.sendable_to(1, 4 * MB), wal.lsn)

    def test_wal_that_means_nothing_does_not_hide_what_comes_elsewhere(self) -> None:
        """All there is is the middle of a record; then comes WAL of a newer timeline."""
        parent = WalBuilder()
        parent.record(3 * MB)
        child = parent.fork(2)
        child.records_to(child.lsn + MB, 5000)
        self.put(parent, 2 * MB)
        self.start()
        self.assert_not_ready()
        child.write_to(self.path)
        self.look()
        self.assert_served(child)

    def test_a_pipe_under_a_segments_name_does_not_hold_it_up(self) -> None:
        wal = built()
        wal.write_to(self.path)
        os.mkfifo(self.path / wal.segment_name(wal.lsn + MB))
        os.mkfifo(self.path / wal.segment_name(wal.lsn + 9 * MB))
        os.mkfifo(self.path / "00000002.history")
        self.start()
        self.assert_served(wal)

    def test_wal_of_a_version_that_is_not_known_is_told(self) -> None:
        wal = built()
        wal.write_to(self.path)
        for path in self.path.iterdir():
            path.write_bytes(b"\x01\xd1" + path.read_bytes()[2:])
        self.start()
        (line,) = self.lines()
        self.assertIn("page magic D101, which is none of PostgreSQL 13 to 19", line)
        self.assertEqual(self.assert_not_ready(), line)

    def test_notes_of_the_survey_are_logged(self) -> None:
        built().write_to(self.path)
        stray = WalBuilder(system=99, start=9 * MB)
        stray.record(100)
        stray.write_to(self.path)
        self.start()
        (line,) = self.lines("another cluster")
        self.assertIn(str(self.path), line)
        self.assertEqual(self.directory.identity.system_identifier, SYSTEM)

    def test_foreign_files_do_no_harm(self) -> None:
        wal = built()
        wal.write_to(self.path)
        following = wal.segment_name(wal.lsn + MB)
        for name in (f"{following}.gz", f"{following}.tmp", f"{following.lower()}x", "x.backup"):
            (self.path / name).write_bytes(b"\x18\xd1" * 5000)
        (self.path / "archive_status").mkdir()
        (self.path / following).mkdir()
        self.start()
        self.assert_served(wal)
        self.look()
        wal.records_to(wal.lsn + MB // 3, 5000)
        self.put(wal, wal.lsn - MB // 3)
        self.look()
        self.assertEqual(self.lines("Traceback"), [])
        self.assertEqual(self.directory.commit_lsn, wal.end_of(wal.start + 3 * MB))


class Following(InMemory):
    """WAL that becomes more."""

    def test_it_grows_and_observers_are_told_when_there_is_more(self) -> None:
        wal = built(1)
        at = wal.records[100]
        self.put(wal, MB, shown=at.end - MB)
        self.start()
        self.assertEqual(self.directory.commit_lsn, at.end)
        # Half a record is not more to send.
        self.put(wal, MB, shown=at.end - MB + 100)
        self.assertEqual(self.look(), 0)
        self.assertEqual(self.look(), 0)
        self.put(wal, MB, shown=wal.records[101].end - MB)
        self.assertEqual(self.look(), 1)
        self.assertEqual(self.directory.commit_lsn, wal.records[101].end)
        self.assertEqual(self.directory.sendable_to(1, at.end), wal.records[101].end)
        self.assertEqual(self.look(), 0)

    def test_those_who_have_gone_are_not_told(self) -> None:
        wal = built(1)
        self.put(wal, MB, shown=9000)
        self.start()
        self.directory.remove_observer(self.be_told)
        self.directory.remove_observer(self.be_told)
        self.put(wal, MB)
        self.assertEqual(self.look(), 0)
        self.assert_served(wal)

    def test_observers_may_come_and_go_while_they_are_told(self) -> None:
        wal = built(1)
        self.put(wal, MB, shown=9000)
        self.start()
        told = []

        def come_and_go() -> None:
            told.append(self.directory.commit_lsn)
            self.directory.remove_observer(come_and_go)
            self.directory.add_observer(lambda: None)

        self.directory.add_observer(come_and_go)
        self.put(wal, MB)
        self.look()
        self.assertEqual(len(told), 1)

    def test_with_many_observers_changes_are_looked_at_when_they_will_be_told(self) -> None:
        wal = built(1)
        self.put(wal, MB, shown=9000)
        self.start()
        others: list[int] = []
        for _ in range(round(LONGEST / REST)):
            self.directory.add_observer(partial(others.append, 1))
        self.put(wal, MB, shown=20_000)
        self.directory._changed()
        self.clock.advance(0)
        self.assertEqual(self.told, 2)
        for shown in (30_000, 40_000):
            self.put(wal, MB, shown=shown)
            self.directory._changed()
            self.clock.advance(LONGEST / 3)
            self.assertEqual(self.told, 2)
        self.clock.advance(LONGEST / 3 + 0.0001)
        self.assertEqual(self.told, 3)
        self.put(wal, MB, shown=50_000)
        self.directory._changed()
        self.directory.look()  # somebody else asks, and waits for it
        before = self.directory.commit_lsn
        self.clock.advance(0)
        self.assertGreater(self.directory.commit_lsn, before)
        self.assertEqual(self.told, 3)
        self.clock.advance(LONGEST)
        self.assertEqual(self.told, 4)

    def test_large_amounts_are_walked_over_in_steps(self) -> None:
        wal = built(1)
        self.put(wal, MB, shown=9000)
        self.start()
        wal.records_to(wal.start + 6 * MB, 50_000)
        wal.write_to(self.path)
        ends: list[int] = []
        self.directory.add_observer(lambda: ends.append(self.directory.commit_lsn))
        self.look()
        self.assertGreater(len(ends), 10)
        self.assertEqual(ends, sorted(set(ends)))
        self.assert_served(wal)

    def test_when_all_is_done_nothing_is_left_but_the_poll(self) -> None:
        wal = built()
        wal.write_to(self.path)
        self.start()
        for _ in range(3):
            (poll,) = self.clock.getDelayedCalls()
            self.assertAlmostEqual(poll.getTime() - self.clock.seconds(), FAST_POLL)
            self.clock.advance(FAST_POLL)
        self.assertEqual(self.told, 1)

    def test_a_partial_segment_grows_and_is_renamed(self) -> None:
        wal = built(2)
        at = wal.records[100]
        self.put(wal, MB, shown=at.end - MB, suffix=".partial")
        self.start()
        self.assertEqual(self.directory.commit_lsn, at.end)
        with open(self.path / f"{wal.segment_name(MB)}.partial", "r+b") as file:
            file.write(wal.segment(MB))
        self.assertEqual(self.look() > 0, True)
        end = wal.end_of(2 * MB)
        self.assertEqual(self.directory.commit_lsn, end)
        (self.path / f"{wal.segment_name(MB)}.partial").rename(self.path / wal.segment_name(MB))
        self.assertEqual(self.look(), 0)
        self.assertEqual(self.read(MB, end), wal.image[: end - MB])
        self.put(wal, 2 * MB, suffix=".partial")
        self.look()
        self.assert_served(wal)

    def test_a_segment_recycled_for_the_future_is_not_yet_wal(self) -> None:
        wal = built(1)
        wal.records_to(2 * MB - PAGE // 2, 1000)
        old = wal.segment(MB)
        wal.write_to(self.path)
        following = self.path / wal.segment_name(2 * MB)
        following.write_bytes(old)
        self.start()
        self.assert_served(wal)
        wal.records_to(2 * MB + 5 * PAGE, 3000)
        self.put(wal, MB)
        with open(following, "r+b") as file:
            file.write(wal.segment(2 * MB)[: 6 * PAGE])
        self.look()
        self.assert_served(wal)

    def test_an_archive_is_filled_in_any_order(self) -> None:
        wal = built(5.5)
        for lsn in (MB, 2 * MB):
            self.put(wal, lsn)
        self.start()
        self.assertEqual(self.directory.commit_lsn, wal.end_of(3 * MB))
        self.put(wal, 4 * MB)
        self.look()
        self.assertEqual(self.directory.commit_lsn, wal.end_of(3 * MB))
        self.put(wal, 3 * MB)
        self.look()
        self.assertEqual(self.directory.commit_lsn, wal.end_of(5 * MB))
        for lsn in (6 * MB, 5 * MB):
            self.put(wal, lsn)
        self.look()
        self.assert_served(wal)

    def test_segments_may_go_once_they_are_not_needed(self) -> None:
        wal = built(3.5)
        paths = wal.write_to(self.path)
        self.start()
        for path in paths[:-1]:
            path.unlink()
        self.assertEqual(self.look(), 0)
        wal.record(3000)
        self.put(wal, wal.lsn)
        self.look()
        self.assert_served(wal)
        with self.assertRaises(UndefinedFile):
            self.directory.sendable_to(1, 2 * MB)


class Holes(InMemory):
    """Older WAL, some of which is missing or not right."""

    def test_older_segments_are_proven_when_they_are_wanted(self) -> None:
        wal = built(4.5)
        wal.write_to(self.path)
        self.start()
        self.assertEqual(self.directory.sendable_to(1, 5 * MB), wal.lsn)
        before = self.told
        self.assertLessEqual(self.directory.sendable_to(1, 2 * MB), 2 * MB)
        self.settle()
        self.assertGreater(self.told, before)
        self.assertEqual(self.directory.sendable_to(1, 2 * MB), 3 * MB)
        self.assertEqual(self.read(2 * MB, 3 * MB), wal.segment(2 * MB))
        self.assertEqual(self.look(), 0)

    def test_a_hole_is_a_missing_segment(self) -> None:
        wal = built(4.5)
        wal.write_to(self.path)
        path = self.path / wal.segment_name(2 * MB)
        path.unlink()
        self.start()
        self.assert_served(wal)
        for lsn in (2 * MB, 3 * MB - 1):
            with self.assertRaises(UndefinedFile) as caught:
                self.directory.sendable_to(1, lsn)
            self.assertIn(path.name, caught.exception.message)
        self.directory.sendable_to(1, MB)
        self.settle()
        self.assertEqual(self.directory.sendable_to(1, MB), 2 * MB)
        self.put(wal, 2 * MB)
        self.directory.sendable_to(1, 2 * MB)
        self.settle()
        self.assertEqual(self.directory.sendable_to(1, 2 * MB), 3 * MB)

    def test_damage_is_told_to_who_comes_to_it(self) -> None:
        wal = built(4.5)
        wal.write_to(self.path)
        path = self.path / wal.segment_name(2 * MB)
        with open(path, "r+b") as file:
            file.seek(50 * PAGE + 4000)
            file.write(bytes(100))
        self.start()
        self.assert_served(wal)
        self.directory.sendable_to(1, 2 * MB)
        self.settle()
        end = self.directory.sendable_to(1, 2 * MB)
        self.assertEqual(end, wal.end_of(2 * MB + 50 * PAGE + 4000))
        with self.assertRaises(DataCorrupted):
            self.directory.sendable_to(1, end)
        self.settle()

    def test_damage_at_the_end_with_more_behind_it_is_told(self) -> None:
        wal = built(1)
        self.put(wal, MB)
        self.start()
        wal.records_to(3 * MB + 9 * PAGE, 5000)
        lsn = 2 * MB + 50 * PAGE
        self.put(wal, MB)
        path = self.put(wal, 2 * MB)
        with open(path, "r+b") as file:
            file.seek(50 * PAGE + 4000)
            file.write(bytes(100))
        self.put(wal, 3 * MB)
        self.look()
        self.look()
        end = wal.end_of(lsn + 4000)
        self.assertEqual(self.directory.commit_lsn, end)
        with self.assertRaises(DataCorrupted) as caught:
            self.directory.sendable_to(1, end)
        self.assertIn(str(path), caught.exception.log or "")
        self.assertEqual(len(self.lines(f"{path}, LSN {format_lsn(end)}: damaged: ")), 1)
        self.put(wal, 2 * MB)
        self.look()
        self.assert_served(wal)
        self.assertEqual(self.directory.sendable_to(1, end), 3 * MB)

    def test_a_record_over_two_segments_that_is_not_all_there_is_no_damage(self) -> None:
        """Not even if what is there of its last page looks like a whole page."""
        wal = built(1)
        wal.records_to(2 * MB - 30_000, 5000)
        record = wal.record(70_000)
        self.put(wal, MB)
        self.put(wal, 2 * MB, record.last - 2 * MB - 100)
        self.start()
        for _ in range(5):
            self.look()
        self.assertEqual(self.directory.commit_lsn, record.start)
        self.assertEqual(self.directory.sendable_to(1, record.start), record.start)
        self.assertEqual(self.lines("damaged"), [])
        self.put(wal, 2 * MB)
        self.look()
        self.assert_served(wal)

    def test_two_things_that_are_wrong_are_told_once_each(self) -> None:
        wal = built(3.5)
        self.put(wal, MB)
        self.start()
        self.put(wal, 3 * MB)
        (self.path / "00000002.history").write_bytes(b"nonsense")
        for _ in range(10):
            self.look()
        self.assertEqual(len(self.lines("cannot follow newer timelines")), 1)
        self.assertEqual(len(self.lines("is missing or not complete")), 1)
        self.assertEqual(len(self.lines()), 3)


class Later(InMemory):
    """What happens to WAL that was all right when it was looked at."""

    def setUp(self) -> None:
        super().setUp()
        self.wal = built(3.5)
        self.wal.write_to(self.path)
        self.start()
        self.assert_served(self.wal)

    def test_damage_to_the_last_segment(self) -> None:
        start = self.wal.lsn - self.wal.lsn % MB
        lsn = start + 20 * PAGE + 5000
        self.assertEqual(self.directory.sendable_to(1, start), self.wal.lsn)
        with open(self.path / self.wal.segment_name(start), "r+b") as file:
            file.seek(lsn - start)
            file.write(bytes(100))
        self.look()
        self.assertEqual(self.directory.sendable_to(1, start), start)
        self.settle()
        end = self.wal.end_of(lsn)
        self.assertEqual(self.directory.sendable_to(1, start), end)
        with self.assertRaises(DataCorrupted):
            self.directory.sendable_to(1, end)
        self.wal.write_to(self.path)
        self.look()
        self.directory.sendable_to(1, end)
        self.settle()
        self.assertEqual(self.directory.sendable_to(1, end), self.wal.lsn)

    def test_a_gap_is_left_behind_when_nothing_comes_to_fill_it(self) -> None:
        last = self.wal.lsn
        self.wal.records_to(self.wal.lsn + 4 * MB, 5000)
        self.put(self.wal, self.wal.lsn)
        self.look()
        self.assertEqual(self.directory.commit_lsn, last)
        self.clock.advance(PATIENCE)
        self.look()
        self.assert_served(self.wal)
        (line,) = self.lines("going on from there")
        self.assertIn(self.wal.segment_name(last), line)
        self.assertIn(format_lsn(last), line)
        with self.assertRaises(UndefinedFile):
            self.directory.sendable_to(1, last + 2 * MB)

    def test_when_there_is_no_gap_nothing_is_left_behind(self) -> None:
        for _ in range(3):
            self.clock.advance(PATIENCE)
            self.look()
        self.assert_served(self.wal)
        self.assertEqual(self.lines("going on from there"), [])

    def test_a_directory_that_does_not_change_is_seldom_looked_through(self) -> None:
        listed = self.note_listings()
        self.clock.advance(self.path.stat().st_mtime + PATIENCE)
        self.look()
        del listed[:]
        self.clock.advance(PATIENCE)
        self.look()
        self.assertEqual(listed, [])
        (self.path / "x").touch()
        self.look()
        del listed[:]  # it was looked for timelines
        self.clock.advance(PATIENCE)
        self.look()
        self.assertEqual(len(listed), 1)
        self.clock.advance(LONG_PATIENCE - PATIENCE)
        self.look()
        self.assertEqual(len(listed), 1)
        self.clock.advance(PATIENCE)
        self.look()
        self.assertEqual(len(listed), 2)


class Timelines(InMemory):
    """A promotion, seen from here."""

    def setUp(self) -> None:
        super().setUp()
        self.parent = built(2.5)
        self.child = self.parent.fork(2)
        self.child.records_to(self.child.lsn + MB, 5000)
        self.parent.write_to(self.path)
        self.start()
        self.assert_served(self.parent)
        self.switch = self.parent.lsn

    def assert_switched(self) -> None:
        self.assert_served(self.child)
        self.assertEqual(self.directory.history, History(2, (Ancestor(1, self.switch, 2),)))
        self.assertEqual(self.directory.end_of(1), self.switch)
        # The end of the old one is in the file of the new one.
        start = self.switch - self.switch % MB
        (self.path / self.parent.segment_name(start)).unlink()
        self.assertEqual(self.directory.sendable_to(1, start), self.switch)
        self.assertEqual(
            self.read(start, self.switch), self.parent.image[start - MB :][: self.switch - start]
        )
        self.assertEqual(len(self.lines("now serving timeline 2")), 1)
        self.assertEqual(len(self.lines("ready to serve")), 1)

    def test_history_comes_first(self) -> None:
        self.put_history(self.child)
        self.assertEqual(self.look(), 0)
        self.assert_served(self.parent)
        for lsn in (self.switch, self.switch + MB):
            self.put(self.child, lsn)
        self.assertGreater(self.look(), 0)
        self.assert_switched()

    def test_segments_come_first(self) -> None:
        for lsn in (self.switch, self.switch + MB):
            self.put(self.child, lsn)
        self.assertEqual(self.look(), 0)
        self.assert_served(self.parent)
        self.put_history(self.child)
        self.assertGreater(self.look(), 0)
        self.assert_switched()

    def test_all_within_one_tick_of_the_file_systems_clock(self) -> None:
        """The directory's time stamp does not show that there was a second change."""
        stamp = 1_000_000 * 10**9
        self.clock.advance(1_000_000 + RELIST / 2)
        self.put(self.child, self.switch)
        self.put(self.child, self.switch + MB)
        os.utime(self.path, ns=(stamp, stamp))
        self.look()
        self.put_history(self.child)
        os.utime(self.path, ns=(stamp, stamp))
        self.clock.advance(RELIST)
        self.look()
        self.assert_switched()

    def test_a_directory_that_has_not_changed_for_long_is_not_listed(self) -> None:
        self.clock.advance(self.path.stat().st_mtime + 2 * RELIST)
        self.look()
        listed = self.note_listings()
        self.look()
        self.assertEqual(listed, [])
        (self.path / "x").touch()
        self.look()
        self.assertEqual(len(listed), 1)

    def test_a_large_directory_that_keeps_changing_is_listed_now_and_then(self) -> None:
        listed = self.note_listings(["x"] * 100_000)
        for lsn in range(self.switch + MB, self.switch + 10 * MB, MB):
            self.put(self.parent, lsn, 0)
            self.look()
        self.assertEqual(len(listed), 1)
        self.clock.advance(9.5)
        self.look()
        self.assertEqual(len(listed), 1)
        self.clock.advance(0.5)
        self.look()
        self.assertEqual(len(listed), 2)
        # The timeline that comes next is not waited for.
        for lsn in (self.switch, self.switch + MB):
            self.put(self.child, lsn)
        self.put_history(self.child)
        self.look()
        self.assert_switched()

    def test_a_history_is_still_being_written(self) -> None:
        contents = self.child.history_contents
        self.put(self.child, self.switch)
        self.put(self.child, self.switch + MB)
        stamp = 1_000_000 * 10**9
        self.clock.advance(2_000_000)
        for size in (0, 1, 3, 6, len(contents)):
            # Written in place, it leaves the directory's time stamp as it is.
            self.put_history(self.child, contents[:size])
            os.utime(self.path, ns=(stamp, stamp))
            self.clock.advance(RELIST)
            self.look()
            expected = self.child if size == len(contents) else self.parent
            self.assertEqual(self.directory.history.tli, expected.tli, contents[:size])
        self.assert_switched()
        self.assertEqual(len(self.lines("cannot follow newer timelines")), 3)

    def test_a_damaged_history_is_told_once_and_waited_for(self) -> None:
        self.put(self.child, self.switch)
        self.put(self.child, self.switch + MB)
        self.put_history(self.child, b"\xff\xfe\x00")
        for _ in range(5):
            self.look()
        self.assert_served(self.parent)
        (line,) = self.lines("cannot follow newer timelines")
        self.assertIn("syntax error in history file", line)
        self.put_history(self.child)
        self.clock.advance(RELIST)
        self.look()
        self.assert_switched()

    def test_one_served_without_its_history_gets_it_later(self) -> None:
        for lsn in (self.switch, self.switch + MB):
            self.put(self.child, lsn)
        late = WalDirectory(self.path, self.clock)
        self.addCleanup(late.stop)
        late.look()
        self.settle()
        self.assertEqual(late.history, History(2))
        with self.assertRaises(InternalError):
            late.end_of(1)
        self.put_history(self.child)
        self.clock.advance(RELIST)
        late.look()
        self.settle()
        self.assertEqual(late.end_of(1), self.switch)
        self.assertEqual(late.commit_lsn, self.child.lsn)

    def test_a_history_that_is_empty_names_no_parent(self) -> None:
        self.put(self.child, self.switch)
        self.put_history(self.child, b"")
        self.look()
        self.assert_served(self.parent)
        self.assertEqual(len(self.lines("00000002.history names no timeline before 2")), 1)

    def test_segments_without_a_history_are_left_alone(self) -> None:
        self.put(self.child, self.switch)
        self.put(self.child, self.switch + MB)
        self.look()
        self.assert_served(self.parent)
        # Nor is it an error that the old timeline goes on.
        self.parent.record(3000)
        self.put(self.parent, self.parent.lsn)
        self.look()
        self.assert_served(self.parent)

    def test_its_wal_grows_up_to_where_it_branched_off(self) -> None:
        self.put_history(self.child)
        before = self.switch % MB // 2
        self.put(self.child, self.switch, shown=before)
        self.look()
        self.assert_served(self.parent)
        # It is known by now where the old timeline ends.
        self.parent.record(3000)
        self.put(self.parent, self.switch)
        self.look()
        self.assertEqual(self.directory.commit_lsn, self.switch)
        self.put(self.child, self.switch)
        self.look()
        self.assertEqual(self.directory.history.tli, 2)
        self.put(self.child, self.switch + MB)
        self.look()
        self.assert_switched()

    def test_more_was_sent_of_the_old_timeline_than_belongs_to_the_new_one(self) -> None:
        at = self.parent.records[-20]
        child = self.parent.fork(2, at)
        child.records_to(child.lsn + 30_000, 5000)
        child.write_to(self.path)
        self.look()
        self.assert_served(child)
        self.assertLess(at.end, self.parent.lsn)
        self.assertEqual(self.directory.end_of(1), at.end)

    def test_a_partial_segment_of_the_new_timeline_will_do(self) -> None:
        self.put_history(self.child)
        self.put(self.child, self.switch, suffix=".partial")
        self.look()
        self.assertEqual(self.directory.history.tli, 2)

    def test_several_at_once_lead_to_the_newest(self) -> None:
        third = self.child.fork(3)
        third.records_to(third.lsn + 30_000, 3000)
        self.child.write_to(self.path)
        third.write_to(self.path)
        self.look()
        self.assert_served(third)
        self.assertEqual(
            self.directory.history.ancestors,
            (Ancestor(1, self.switch, 2), Ancestor(2, self.child.lsn, 3)),
        )
        self.assertEqual(self.directory.end_of(1), self.switch)
        self.assertEqual(self.directory.end_of(2), self.child.lsn)
        self.assertEqual(self.directory.read_history(3), third.history_contents)

    def test_one_after_the_other(self) -> None:
        self.child.write_to(self.path)
        self.look()
        self.assert_served(self.child)
        third = self.child.fork(3)
        third.records_to(third.lsn + 30_000, 3000)
        third.write_to(self.path)
        self.look()
        self.assert_served(third)

    def test_a_newer_one_without_wal_does_not_hide_the_one_before(self) -> None:
        third = self.child.fork(3)
        self.put_history(third)
        self.child.write_to(self.path)
        self.look()
        self.assert_served(self.child)
        third.records_to(third.lsn + 30_000, 3000)
        third.write_to(self.path)
        self.look()
        self.assert_served(third)

    def test_one_that_does_not_descend_from_ours_is_the_newest_all_the_same(self) -> None:
        """As after a recovery to an earlier point: what comes after it counts."""
        self.child.write_to(self.path)
        self.look()
        self.assert_served(self.child)
        other = self.parent.fork(3, self.parent.records[-10])
        other.records_to(other.lsn + 30_000, 3000)
        other.write_to(self.path)
        self.look()
        self.assert_served(other)
        with self.assertRaises(InternalError) as caught:
            self.directory.end_of(2)
        self.assertEqual(
            caught.exception.message, "requested timeline 2 is not in this server's history"
        )

    def test_a_segment_of_a_timeline_before_it_began_is_missing(self) -> None:
        self.child.write_to(self.path)
        self.look()
        with self.assertRaises(UndefinedFile) as caught:
            self.directory.sendable_to(2, MB)
        self.assertEqual(
            caught.exception.message,
            "requested WAL segment 000000020000000000000001 has already been removed",
        )
        self.assertIn("000000020000000000000001, LSN 0/100000", caught.exception.log or "")

    def test_the_commit_lsn_never_goes_back_on_a_timeline(self) -> None:
        ends: dict[int, list[int]] = {1: [], 2: []}

        def note() -> None:
            ends[self.directory.history.tli].append(self.directory.commit_lsn)

        self.directory.add_observer(note)
        at = self.parent.lsn
        self.parent.records_to(at + 60_000, 3000)
        with open(self.path / self.parent.segment_name(at), "r+b") as file:
            file.write(self.parent.segment(at))
        self.look()
        with open(self.path / self.parent.segment_name(at), "r+b") as file:
            file.truncate(PAGE)
        self.look()
        self.child.write_to(self.path)
        self.look()
        self.assertEqual(ends[1], sorted(ends[1]))
        self.assertEqual(ends[2], sorted(ends[2]))
        self.assertEqual(ends[1][-1], self.parent.lsn)
        self.assertEqual(ends[2][-1], self.child.lsn)


class Stopping(InMemory):
    """What is begun is ended."""

    def test_before_the_first_look(self) -> None:
        built(5).write_to(self.path)
        self.directory.start()
        self.is_started = True
        self.stop()

    def test_in_the_middle_of_the_walk(self) -> None:
        wal = built(1)
        wal.write_to(self.path)
        self.start()
        wal.records_to(wal.start + 6 * MB, 50_000)
        wal.write_to(self.path)
        self.directory.add_observer(self.stop)
        self.directory.look()
        self.clock.advance(0)
        self.assertLess(self.directory.commit_lsn, wal.lsn)

    def test_before_there_is_any_wal(self) -> None:
        self.start()
        self.stop()

    def test_no_file_stays_open(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        built(5).write_to(self.path)
        self.start()
        self.directory.sendable_to(1, MB)
        self.settle()
        self.assertGreater(len(os.listdir("/proc/self/fd")), before)
        self.stop()
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)


class OnTheReactor(TestCase):
    """The real reactor: that it is told, and does not have to wait for the poll."""

    timeout = 20

    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.directory = WalDirectory(self.path, reactor)
        self.directory.start()
        self.addCleanup(self.directory.stop)

    def until(self, condition: Callable[[], bool]) -> Deferred[None]:
        """Fires when observers are told and the condition is true."""
        reached = Deferred[None]()

        def look() -> None:
            if condition() and not reached.called:
                reached.callback(None)

        self.directory.add_observer(look)
        return reached

    async def test_a_segment_comes_and_grows_and_a_timeline_follows(self) -> None:
        wal = built(1)
        found = self.until(lambda: self.directory.commit_lsn == wal.lsn)
        wal.write_to(self.path)
        await found
        size = wal.lsn
        wal.record(3000)
        grown = self.until(lambda: self.directory.commit_lsn == wal.lsn > size)
        for lsn in range(wal.start, wal.start + len(wal.image), MB):
            (self.path / wal.segment_name(lsn)).write_bytes(wal.segment(lsn))
        await grown
        child = wal.fork(2)
        child.record(3000)
        switched = self.until(lambda: self.directory.commit_lsn == child.lsn)
        child.write_to(self.path)
        await switched
        self.assertEqual(self.directory.history.tli, 2)
