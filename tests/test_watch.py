"""The watch: told at once where there is inotify, and now and then in any case."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorFDSet, IReactorTime
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from walproto.timeline.watch import FAST_POLL, SLOW_POLL, DirectoryWatch


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class WithoutInotify(SynchronousTestCase):
    """Where nothing tells of changes, it is the clock alone."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.changes = 0
        self.logged = self.enterContext(capturedLogs())

    def _changed(self) -> None:
        self.changes += 1

    def test_it_looks_often(self) -> None:
        before = open_files()
        watch = DirectoryWatch(Path("nowhere"), self.clock, self._changed)
        watch.start()
        self.assertEqual(open_files(), before)
        self.assertEqual(self.changes, 0)
        for looks in range(1, 6):
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)
            self.clock.advance(FAST_POLL)
            self.assertEqual(self.changes, looks)
        watch.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.clock.advance(FAST_POLL)
        self.assertEqual(self.changes, 5)
        (event,) = self.logged
        self.assertIn("no inotify here", formatEvent(event))

    def test_it_stops_while_it_tells(self) -> None:
        watch = DirectoryWatch(Path("nowhere"), self.clock, lambda: watch.stop())
        watch.start()
        self.clock.advance(FAST_POLL)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        watch.stop()


class WithInotify(TestCase):
    """The real reactor, which waits for the real inotify."""

    timeout = 20

    def setUp(self) -> None:
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "wal"
        self.directory.mkdir()
        self.file = self.directory / "000000010000000000000001"
        self.file.write_bytes(bytes(100))

    def watch(self, change: Callable[[], object]) -> Deferred[None]:
        """Make a change; fires when we are told of it and it was not the clock that did."""
        told = Deferred[None]()
        clock = _Reactor()

        def changed() -> None:
            if not told.called:
                told.callback(None)

        watch = DirectoryWatch(self.directory, clock, changed)
        watch.start()
        self.addCleanup(watch.stop)
        (poll,) = clock.time.getDelayedCalls()
        self.assertEqual(poll.getTime(), SLOW_POLL)
        change()
        return told

    def test_a_file_that_grows_is_noticed(self) -> Deferred[None]:
        def grow() -> None:
            with open(self.file, "ab") as file:
                file.write(b"more")

        return self.watch(grow)

    def test_a_file_that_is_written_over_is_noticed(self) -> Deferred[None]:
        def write() -> None:
            with open(self.file, "r+b") as file:
                file.write(b"other")

        return self.watch(write)

    def test_a_new_file_is_noticed(self) -> Deferred[None]:
        return self.watch(lambda: (self.directory / "00000002.history").touch())

    def test_a_file_that_is_renamed_is_noticed(self) -> Deferred[None]:
        return self.watch(lambda: self.file.rename(f"{self.file}.partial"))

    def test_a_file_that_goes_is_noticed(self) -> Deferred[None]:
        return self.watch(self.file.unlink)

    def test_it_looks_now_and_then_all_the_same(self) -> None:
        clock = _Reactor()
        changes: list[None] = []
        watch = DirectoryWatch(
            self.directory,
            clock,
            lambda: changes.append(None),
        )
        watch.start()
        for looks in range(1, 4):
            clock.time.advance(SLOW_POLL)
            self.assertEqual(len(changes), looks)
        watch.stop()
        self.assertEqual(clock.time.getDelayedCalls(), [])

    async def test_what_comes_during_a_pause_is_noticed_behind_it(self) -> None:
        told, other = Deferred[None](), Deferred[None]()

        def watch(deferred: Deferred[None]) -> DirectoryWatch:
            def changed() -> None:
                if not deferred.called:
                    deferred.callback(None)

            watch = DirectoryWatch(self.directory, _Reactor(), changed)
            watch.start()
            self.addCleanup(watch.stop)
            return watch

        paused = watch(told)
        paused.pause()
        paused.pause()
        (self.directory / "new").touch()
        watch(other)  # which is told of the next change, when the paused one would be of both
        self.file.write_bytes(b"other")
        await other
        self.assertFalse(told.called)
        paused.resume()
        paused.resume()
        await told

    def test_nothing_stays_open(self) -> None:
        before = open_files()
        watch = DirectoryWatch(
            self.directory,
            reactor,
            lambda: None,
        )
        watch.start()
        self.assertGreater(open_files(), before)
        watch.stop()
        self.assertEqual(open_files(), before)

    def test_a_directory_that_is_not_there_is_looked_for(self) -> None:
        before = open_files()
        self.file.unlink()
        self.directory.rmdir()
        clock = _Reactor()
        changes: list[None] = []
        watch = DirectoryWatch(
            self.directory,
            clock,
            lambda: changes.append(None),
        )
        watch.start()
        self.assertEqual(open_files(), before)
        clock.time.advance(FAST_POLL)
        self.assertEqual(len(changes), 1)
        watch.stop()


@implementer(IReactorTime, IReactorFDSet)
class _Reactor:
    """The real reactor for files, but a clock for time: so a poll is never what told."""

    def __init__(self) -> None:
        self.time = Clock()

    def callLater(
        self, delay: float, callable: Callable[..., Any], *args: object, **kwargs: object
    ) -> IDelayedCall:
        return self.time.callLater(delay, callable, *args, **kwargs)

    def seconds(self) -> float:
        return self.time.seconds()

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)
