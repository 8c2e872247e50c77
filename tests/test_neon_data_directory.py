"""Many timelines in one directory: opened when asked for, closed when nobody wants them, and none
of them of any consequence to the others.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import Clock, cooperate, deferLater
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.safekeeper import Stream, put_control, put_file, put_wal
from tests.test_directory import built
from tests.wal_builder import MB
from walproto.errors import (
    CannotConnectNow,
    DataCorrupted,
    IoError,
    ReportedError,
    UndefinedFile,
    UndefinedObject,
)
from walproto.neon.control_file import NAME
from walproto.neon.data_directory import IDLE, MAX_OPEN, DataDirectory
from walproto.neon.ids import TimelineIds
from walproto.neon.timeline import SafekeeperTimeline
from walproto.timeline import watch as watch_module
from walproto.timeline.watch import FAST_POLL


def ids_of(number: int) -> TimelineIds:
    """Those of the timeline of this number; three of a tenant each."""
    return TimelineIds(f"{number // 3:032x}", f"{number:032x}")


class InMemory(SynchronousTestCase):
    def setUp(self) -> None:
        self.top = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.top / "data"
        self.path.mkdir()
        self.logged = self.enterContext(capturedLogs())
        self.clock = Clock()
        self.directory = DataDirectory(self.path, self.clock)
        self.addCleanup(self.stop)
        self.wal = built(1.5)

    def stop(self) -> None:
        self.directory.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual([event for event in self.logged if "log_failure" in event], [])

    def put(self, ids: TimelineIds, commit_lsn: int = 0) -> Path:
        path = self.path / str(ids)
        path.mkdir(parents=True)
        put_wal(path, self.wal)
        put_control(path, ids, commit_lsn=commit_lsn)
        return path

    def get(self, ids: TimelineIds) -> SafekeeperTimeline:
        """The timeline, opened."""
        timeline = self.directory.get(ids)
        opened = timeline.opened()
        self.clock.pump([0] * 20)
        self.successResultOf(opened)
        return timeline

    def refused(self, kind: type[ReportedError], ids: TimelineIds) -> ReportedError:
        with self.assertRaises(kind) as caught:
            self.directory.get(ids)
        error: ReportedError = caught.exception
        self.assertIs(type(error), kind)
        self.assertTrue(error.fatal)
        self.assertNotIn(str(self.path), error.message)
        return error

    def lines(self, text: str) -> list[str]:
        return [line for event in self.logged if text in (line := formatEvent(event))]


class Finding(InMemory):
    def test_a_timeline_is_opened_when_it_is_asked_for(self) -> None:
        for number in range(5):
            self.put(ids_of(number), MB + 100 * number)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        timeline = self.directory.get(ids_of(3))
        with self.assertRaises(CannotConnectNow):
            timeline.require_ready()
        self.assertIs(self.get(ids_of(3)), timeline)
        timeline.require_ready()
        self.assertEqual(timeline.ids, ids_of(3))
        self.assertEqual(timeline.commit_lsn, MB + 300)
        other = self.get(ids_of(4))
        self.assertIsNot(other, timeline)
        self.assertEqual(other.commit_lsn, MB + 400)
        self.assertEqual(len(self.lines("ready to serve")), 2)

    def test_what_is_new_is_found(self) -> None:
        error = self.refused(UndefinedObject, ids_of(8))
        self.assertEqual(error.message, f'timeline "{ids_of(8)}" does not exist')
        self.assertEqual(error.log, f"there is no directory {self.path / str(ids_of(8))}")
        (self.path / ids_of(8).tenant_id).mkdir()
        self.refused(UndefinedObject, ids_of(8))
        self.put(ids_of(7))
        self.get(ids_of(7)).require_ready()
        self.refused(UndefinedObject, ids_of(8))
        self.put(ids_of(8))
        self.get(ids_of(8)).require_ready()
        self.assertEqual(list(self.directory), [ids_of(7), ids_of(8)])

    def test_what_is_gone_is_gone_until_it_is_back(self) -> None:
        path = self.put(ids_of(1), MB + 900)
        self.get(ids_of(1)).require_ready()
        away = path.rename(self.top / "away")
        self.refused(UndefinedObject, ids_of(1))
        away.rename(path)
        self.clock.advance(FAST_POLL)
        timeline = self.get(ids_of(1))
        timeline.require_ready()
        self.assertEqual(timeline.commit_lsn, MB + 900)

    def make_anew(self, commit_lsn: int) -> bytes:
        """Remove the timeline and make another of the same name; the WAL that that has."""
        shutil.rmtree(self.path / str(ids_of(1)))
        self.wal = built(1.5, seed=99)
        self.put(ids_of(1), commit_lsn)
        return bytes(self.wal.image[: commit_lsn - MB])

    def test_another_directory_is_another_timeline(self) -> None:
        """Whether it is in use at the time, or suspended."""
        self.put(ids_of(1), MB + 90_000)
        before = self.get(ids_of(1))
        before.advance(MB + 95_000)
        stream = Stream(before, self.clock, MB)
        self.clock.advance(0)
        self.assertEqual(stream.end, MB + 95_000)
        contents = self.make_anew(MB + 5000)
        timeline = self.get(ids_of(1))
        (error,) = stream.errors
        self.assertIsInstance(error, UndefinedFile)
        self.assertTrue(before.is_over)
        self.assertEqual(before.ids, timeline.ids)
        self.assertEqual(timeline.commit_lsn, MB + 5000)
        stream = Stream(timeline, self.clock, MB)
        self.clock.advance(0)
        self.assertEqual(stream.wal, contents)
        stream.stop()
        self.assertTrue(timeline.suspend())
        self.make_anew(MB + 1000)
        self.assertEqual(self.get(ids_of(1)).commit_lsn, MB + 1000)
        self.assertTrue(timeline.is_over)

    def test_nor_is_it_the_same_if_it_was_missing_meanwhile(self) -> None:
        path = self.put(ids_of(1), MB + 90_000)
        for is_suspended in (False, True):
            before = self.get(ids_of(1))
            if is_suspended:
                self.assertTrue(before.suspend())
            away = path.rename(self.top / "away")
            self.refused(UndefinedObject, ids_of(1))
            away.rename(path)
            self.assertTrue(before.is_over)
            self.assertFalse(before.is_active)
            self.get(ids_of(1)).require_ready()

    def test_what_was_wrong_is_looked_at_again_at_once(self) -> None:
        path = self.put(ids_of(1), MB + 900)
        put_file(path, b"damaged")
        with self.assertRaises(DataCorrupted):
            self.get(ids_of(1)).require_ready()
        put_control(path, ids_of(1), commit_lsn=MB + 900)
        timeline = self.directory.get(ids_of(1))
        self.assertNoResult(timeline.opened())
        self.get(ids_of(1)).require_ready()
        self.assertEqual(timeline.commit_lsn, MB + 900)

    def test_ids_in_upper_case_are_the_same(self) -> None:
        ids = TimelineIds("ab" * 16, "cd" * 16)
        self.put(ids)
        self.get(TimelineIds("ab" * 16, "cd" * 16)).require_ready()
        upper = self.directory.get(TimelineIds("AB" * 16, "CD" * 16))
        self.assertIs(upper, self.directory.get(ids))

    def test_what_is_no_timeline_is_left_alone(self) -> None:
        self.put(ids_of(1))
        good = ids_of(1)
        tenant = self.path / good.tenant_id
        outside = self.top / "outside"
        self.path, inside = outside, self.path
        self.put(ids_of(2))
        self.path = inside
        (tenant / ids_of(0).timeline_id).symlink_to(ids_of(1).timeline_id)
        for name in ("x", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "lost+found"):
            (self.path / name).mkdir()
            (tenant / name).mkdir()
        (self.path / ("b" * 32)).touch()
        (tenant / ("b" * 32)).touch()
        (tenant / ids_of(2).timeline_id).symlink_to(outside / str(ids_of(2)))
        (self.path / ("c" * 32)).symlink_to(outside)
        (self.path / ("d" * 32)).symlink_to("nowhere")
        (self.path / ("e" * 32)).symlink_to("e" * 32)
        self.assertEqual(list(self.directory), [good])
        for ids in (
            ids_of(0),
            ids_of(2),
            TimelineIds("b" * 32, "b" * 32),
            TimelineIds(good.tenant_id, "b" * 32),
            TimelineIds("c" * 32, ids_of(2).tenant_id),
            TimelineIds("d" * 32, "d" * 32),
            TimelineIds("e" * 32, "e" * 32),
            TimelineIds("x", good.timeline_id),
            TimelineIds("..", "outside"),
            TimelineIds(f"../outside/{ids_of(2).tenant_id}", ids_of(2).timeline_id),
            TimelineIds("", ""),
        ):
            self.refused(UndefinedObject, ids)
        self.get(good).require_ready()

    def test_it_cannot_be_told_whether_it_is_there(self) -> None:
        endless = self.path / "endless"
        endless.symlink_to(endless)
        self.directory = DataDirectory(endless, self.clock)
        error = self.refused(IoError, ids_of(1))
        self.assertIn("Too many levels of symbolic links", error.message)

    def test_the_directory_itself_may_be_a_link_or_not_be_there(self) -> None:
        link = self.top / "link"
        link.symlink_to(self.path)
        self.directory = DataDirectory(link, self.clock)
        self.put(ids_of(1))
        self.get(ids_of(1)).require_ready()
        self.directory.stop()
        link.unlink()
        with self.assertRaises(UndefinedObject):
            self.directory.get(ids_of(1))
        with self.assertRaises(FileNotFoundError):
            list(self.directory)

    def test_one_that_is_damaged_harms_no_other(self) -> None:
        good = [ids_of(number) for number in range(0, 10, 2)]
        bad = [ids_of(number) for number in range(1, 10, 2)]
        for ids in (*good, *bad):
            self.put(ids, self.wal.lsn)
        paths = [self.path / str(ids) for ids in bad]
        put_file(paths[0], b"damaged")
        (paths[1] / NAME).unlink()
        put_control(paths[2], ids_of(0))
        (paths[3] / NAME).unlink()
        os.mkfifo(paths[3] / NAME)
        segment = paths[4] / self.wal.segment_name(MB)
        segment.write_bytes(bytes(1000))
        refused = DataCorrupted, UndefinedFile, DataCorrupted, IoError
        for ids, kind in zip(bad, refused, strict=False):
            with self.assertRaises(kind):
                self.get(ids).require_ready()
        streams = [Stream(self.get(ids), self.clock, MB) for ids in (*good, bad[4])]
        self.clock.pump([0] * 200)
        for stream in streams[:-1]:
            self.assertEqual(stream.errors, [])
            self.assertEqual(stream.wal, self.wal.image[: self.wal.lsn - MB])
        (error,) = streams[-1].errors
        self.assertIsInstance(error, DataCorrupted)
        self.assertEqual(streams[-1].wal, b"")
        self.assertEqual(len(self.lines("refused")), 4)
        put_control(paths[0], bad[0], commit_lsn=MB + 99)
        self.clock.advance(FAST_POLL)
        self.assertEqual(self.get(bad[0]).commit_lsn, MB + 99)
        for stream in streams[:-1]:
            stream.stop()


class Idle(InMemory):
    """What nobody uses is suspended."""

    def wait(self, seconds: float) -> None:
        self.clock.pump([0.5] * int(seconds / 0.5))

    def test_only_what_nobody_uses(self) -> None:
        for number in range(3):
            self.put(ids_of(number), MB + 1000)
        timelines = [self.get(ids_of(number)) for number in range(3)]
        stream = Stream(timelines[0], self.clock, MB)
        self.wait(IDLE - 1)
        self.assertTrue(all(timeline.is_active for timeline in timelines))
        self.wait(IDLE)
        self.get(ids_of(1))
        self.wait(2)
        self.assertEqual([timeline.is_active for timeline in timelines], [True, True, False])
        self.wait(2 * IDLE)
        self.assertEqual([timeline.is_active for timeline in timelines], [True, False, False])
        timelines[0].advance(MB + 2000)
        put_control(self.path / str(ids_of(2)), ids_of(2), commit_lsn=MB + 3000)
        self.assertIs(self.get(ids_of(2)), timelines[2])
        self.assertEqual(timelines[2].commit_lsn, MB + 3000)
        self.assertEqual(stream.end, MB + 2000)
        stream.stop()
        self.wait(3 * IDLE)
        self.assertFalse(any(timeline.is_active for timeline in timelines))
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_what_begins_to_be_used_again_without_being_asked_for(self) -> None:
        self.put(ids_of(0), MB + 1000)
        timeline = self.get(ids_of(0))
        self.wait(3 * IDLE)
        self.assertFalse(timeline.is_active)
        stream = Stream(timeline, self.clock, MB)
        self.wait(3 * IDLE)
        self.assertEqual(stream.end, MB + 1000)
        stream.stop()
        self.wait(3 * IDLE)
        self.assertFalse(timeline.is_active)


def open_files() -> list[str]:
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:  # that by which we list them
            continue
    return links


class Watched(TestCase):
    """One inotify descriptor, and the real reactor."""

    timeout = 20

    @inlineCallbacks
    def test_the_directory_that_takes_its_place_is_watched(
        self,
    ) -> Generator[Deferred[Any], Any, None]:
        self.patch(watch_module, "FAST_POLL", 1000.0)
        self.patch(watch_module, "SLOW_POLL", 1000.0)
        path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        timelines = DataDirectory(path, reactor)
        self.addCleanup(timelines.stop)
        directory, wal = path / str(ids_of(0)), built(0.5)
        for commit_lsn in (MB + 300, MB + 200, MB + 100):
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
            put_wal(directory, wal)
            put_control(directory, ids_of(0), commit_lsn=commit_lsn)
            timeline = timelines.get(ids_of(0))
            yield timeline.opened()
            self.assertEqual(timeline.commit_lsn, commit_lsn)
            told = Deferred[None]()
            observer = partial(self.tell_when, timeline, commit_lsn + 1, told)
            timeline.add_observer(observer)
            put_control(directory, ids_of(0), commit_lsn=commit_lsn + 1)
            yield told
            timeline.remove_observer(observer)

    def tell_when(self, timeline: SafekeeperTimeline, lsn: int, told: Deferred[None]) -> None:
        if timeline.commit_lsn == lsn and not told.called:
            told.callback(None)

    @inlineCallbacks
    def test_a_directory_that_is_removed_leaves_the_others_watched(
        self,
    ) -> Generator[Deferred[Any], Any, None]:
        self.patch(watch_module, "FAST_POLL", 1000.0)
        self.patch(watch_module, "SLOW_POLL", 1000.0)
        path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        wal = built(0.5)
        for number in (0, 1):
            directory = path / str(ids_of(number))
            directory.mkdir(parents=True)
            put_wal(directory, wal)
            put_control(directory, ids_of(number), commit_lsn=MB + 100)
        timelines = DataDirectory(path, reactor)
        self.addCleanup(timelines.stop)
        gone, other = (timelines.get(ids_of(number)) for number in (0, 1))
        yield gatherResults([gone.opened(), other.opened()])
        for timeline, change in (
            (gone, lambda: shutil.rmtree(gone.directory)),
            (other, lambda: put_control(other.directory, other.ids, commit_lsn=MB + 200)),
        ):
            told = Deferred[None]()
            observer = partial(told.callback, None)
            timeline.add_observer(observer)
            change()
            yield told
            timeline.remove_observer(observer)
        with self.assertRaises(UndefinedFile):
            gone.require_ready()
        self.assertEqual(other.commit_lsn, MB + 200)
        timelines.stop()
        self.assertEqual(open_files().count("anon_inode:inotify"), 0)


class Thousand(TestCase):
    """A thousand timelines on the real reactor."""

    timeout = 120

    def setUp(self) -> None:
        self.patch(watch_module, "FAST_POLL", 1000.0)
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.wal = built(1.5)
        self.ids = [ids_of(number) for number in range(1000)]
        source = Path(self.enterContext(tempfile.TemporaryDirectory()))
        put_wal(source, self.wal)
        for ids in self.ids:
            directory = self.path / str(ids)
            directory.mkdir(parents=True)
            for segment in source.iterdir():
                os.link(segment, directory / segment.name)
            put_control(directory, ids, commit_lsn=MB + 1000)
        put_file(self.path / str(self.ids[555]), b"damaged")

    def ours(self) -> int:
        """How many of our files are open."""
        return sum(link.startswith(str(self.path)) for link in open_files())

    @inlineCallbacks
    def test_they_are_cheap(self) -> Generator[Deferred[Any], Any, None]:
        inotifies = open_files().count("anon_inode:inotify")
        directory = DataDirectory(self.path, reactor)
        began = time.perf_counter()
        found = sorted(directory, key=str)
        listed = time.perf_counter()
        timelines = [directory.get(ids) for ids in found]
        yield gatherResults([timeline.opened() for timeline in timelines])
        opened = time.perf_counter()
        self.assertEqual(len(found), 1000)
        for timeline in timelines:
            if timeline.ids == self.ids[555]:
                with self.assertRaises(DataCorrupted):
                    timeline.require_ready()
            else:
                timeline.require_ready()
        self.assertLessEqual(self.ours(), MAX_OPEN)
        self.assertEqual(open_files().count("anon_inode:inotify"), inotifies + 1)

        streams = [Stream(it, reactor, MB) for it in timelines[:100]]
        for step in range(2000, self.wal.lsn - MB, 100_000):
            for timeline in timelines[:100]:
                timeline.advance(MB + step)
        for ids in self.ids[:100]:
            put_control(self.path / str(ids), ids, commit_lsn=self.wal.lsn)

        def until_sent() -> Generator[Deferred[None], None, None]:
            while any(stream.end < self.wal.lsn for stream in streams):
                yield deferLater(reactor, 0.01)

        yield cooperate(until_sent()).whenDone()
        read = time.perf_counter()
        for stream in streams:
            self.assertEqual(stream.errors, [])
            self.assertEqual(stream.wal, self.wal.image[: self.wal.lsn - MB])
            stream.stop()
        self.assertLessEqual(self.ours(), MAX_OPEN)
        processor = time.process_time()
        yield deferLater(reactor, 3)
        processor = time.process_time() - processor
        closing = time.perf_counter()
        directory.stop()
        closed = time.perf_counter()
        self.assertEqual(self.ours(), 0)
        self.assertEqual(open_files().count("anon_inode:inotify"), inotifies)
        print(
            f"1000 timelines of 1.5 MB: listed in {listed - began:.3f} s, opened in "
            f"{opened - listed:.3f} s; 100 of them read in {read - opened:.3f} s; "
            f"idle {processor / 3:.1%} of a processor; closed in {closed - closing:.3f} s"
        )

    @inlineCallbacks
    def test_how_much_memory_they_take(self) -> Generator[Deferred[Any], Any, None]:
        directory = DataDirectory(self.path, reactor)
        self.addCleanup(directory.stop)
        yield directory.get(self.ids[0]).opened()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        timelines = [directory.get(ids) for ids in self.ids[1:501]]
        yield gatherResults([timeline.opened() for timeline in timelines])
        gc.collect()
        print(f"{tracemalloc.get_traced_memory()[0] / 1024 / 500:.1f} kB for each open timeline")
        self.assertTrue(all(timeline.is_active for timeline in timelines))
