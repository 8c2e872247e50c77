"""A timeline in a directory into which WAL is received: only what is synced is ever to be had of
it, be it in memory or in the files; and it can be fenced.

Time is a Clock; the writing is done here, step by step.
"""

from __future__ import annotations

import random

from tests.test_directory import InMemory, built
from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.errors import CannotConnectNow, DataCorrupted, InternalError
from walproto.lsn import format_lsn
from walproto.timeline import received as received_module
from walproto.timeline.directory import PATIENCE, WalDirectory
from walproto.timeline.holding import examine
from walproto.timeline.received import Received
from walproto.timeline.watch import SLOW_POLL
from walproto.wal.writer import SegmentWriter


class Receiving(InMemory):
    """What all tests here need: what a relay does with the WAL that comes."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(received_module, "RECENT_SIZE", 1 << 16)
        self.restart()

    def restart(self) -> None:
        """Serve the directory anew, as a program that was started again does."""
        if self.is_started:
            self.stop()
        self.received = Received()
        self.directory = WalDirectory(self.path, self.clock, self.received)

    def begin(self, wal: WalBuilder, lsn: int | None = None) -> None:
        """From now on this is what comes."""
        self.wal = wal
        lsn = wal.start if lsn is None else lsn
        self.writer = SegmentWriter(self.path, wal.tli, MB, lsn)
        self.addCleanup(self.writer.close)
        self.received.begin(wal.tli, lsn, lsn)

    def write(self, end: int) -> None:
        """What comes up to the LSN ``end`` is in memory and in the file, but not yet synced."""
        start = self.writer.lsn
        data = memoryview(self.wal.image)[start - self.wal.start : end - self.wal.start]
        self.received.append(data)
        self.writer.write(start, [data])
        self.received.written(self.writer.lsn)

    def sync(self) -> int:
        """What is written is on disk; how often observers were told."""
        self.writer.sync()
        for lsn, stamp in self.writer.completed:
            self.received.complete(self.writer.tli, lsn, stamp)
        self.writer.completed.clear()
        self.received.synced(self.writer.lsn)
        before = self.told
        self.directory.show()
        self.settle()
        return self.told - before

    def come(self, end: int) -> int:
        """Write and sync."""
        self.write(end)
        return self.sync()

    def assert_not_ready(self) -> None:
        with self.assertRaises(CannotConnectNow):
            self.directory.require_ready()

    def assert_same(self, start: int, end: int, tli: int = 1) -> None:
        """That what is read there is what was written, wherever it is read from."""
        for lsn in range(start, end, 50_000):
            upper = min(lsn + 50_000, end, lsn - lsn % MB + MB)
            expected = self.wal.image[lsn - self.wal.start : upper - self.wal.start]
            self.assertEqual(self.read(lsn, upper, tli), expected, format_lsn(lsn))


class Synced(Receiving):
    """What there is to be had."""

    def test_before_anything_is_synced_it_is_not_ready(self) -> None:
        self.start()
        self.begin(built(1))
        self.look()
        self.write(self.wal.start + 5000)
        self.look()
        self.assert_not_ready()
        self.write(self.wal.start + 9000)
        self.look()
        self.assert_not_ready()
        self.assertEqual(self.told, 0)
        self.assertEqual(self.sync(), 1)
        self.directory.require_ready()
        self.assertEqual(self.directory.commit_lsn, self.wal.end_of(self.wal.start + 9000))

    def test_what_is_written_is_not_to_be_had_until_it_is_synced(self) -> None:
        self.begin(built(3.5))
        self.start()
        self.come(self.wal.start + 50_000)
        seen = self.directory.commit_lsn
        for end in (MB + 100_000, 2 * MB, 2 * MB + 5 * PAGE, 4 * MB):
            self.write(end)
            self.assertEqual(self.look(), 0)
            self.assertEqual(self.directory.commit_lsn, seen)
            self.assertEqual(self.directory.sendable_to(1, seen), seen)
            self.assertGreater(self.sync(), 0)
            seen = self.directory.commit_lsn
            self.assertEqual(seen, self.wal.end_of(end))
            self.assertEqual(self.directory.sendable_to(1, seen), seen)
            self.assert_same(self.wal.start, seen)

    def test_in_steps_of_any_size(self) -> None:
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        some = random.Random(seed)
        wal = WalBuilder(seed=seed)
        while wal.lsn < wal.start + 2 * MB:
            wal.record(some.choice([30, 1000, 9000, 70_000]))
        wal.switch()
        wal.records_to(wal.lsn + MB // 2, 3000)
        self.begin(wal)
        self.start()
        while self.writer.lsn < wal.lsn:
            size = some.choice([1, 100, PAGE, 50_000, 200_000])
            self.write(min(self.writer.lsn + some.randint(1, size), wal.lsn))
            if some.random() < 0.5:
                self.sync()
            else:
                self.look()
            synced = self.received.synced_to
            if wal.end_of(synced) == wal.start:
                self.assert_not_ready()
                continue
            # All that is whole is there; what fills up its last eight bytes may not be synced.
            end = self.directory.commit_lsn
            self.assertLessEqual(end, synced)
            self.assertGreaterEqual(end, min(wal.end_of(synced), synced))
            self.assert_same(max(wal.start, end - some.randint(1, 300_000)), end)
        self.sync()
        self.assert_served(wal)
        self.assert_same(wal.start, wal.lsn)

    def test_what_only_fills_up_is_not_to_be_had_either(self) -> None:
        """Behind a record up to eight bytes, and behind an XLOG_SWITCH to the segment's end."""
        wal = WalBuilder()
        wal.records_to(wal.start + MB // 2, 999)
        wal.switch()
        wal.record(1000)
        self.begin(wal)
        self.start()
        uneven = next(record for record in wal.records if record.last < record.end)
        for end in (uneven.last, uneven.last + 1, 2 * MB - 100, 2 * MB - 1):
            self.come(end)
            self.assertLessEqual(self.directory.commit_lsn, end)
            self.assertGreaterEqual(self.directory.commit_lsn, min(wal.end_of(end), end))
        self.come(2 * MB)
        self.assertEqual(self.directory.commit_lsn, 2 * MB)
        self.come(wal.lsn)
        self.assert_served(wal)

    def test_what_is_behind_the_end_after_a_crash_is_not_to_be_had(self) -> None:
        """Be it WAL that was written and is not known to be on disk; and then it comes again."""
        wal = built(2.5)
        wal.write_to(self.path, partial=True)
        lsn = 3 * MB + 9 * PAGE + 1000
        self.begin(wal, lsn)
        self.start()
        self.assertEqual(self.directory.commit_lsn, wal.end_of(lsn))
        self.assertEqual(self.look(), 0)
        self.come(lsn + 5000)
        self.assertEqual(self.directory.commit_lsn, wal.end_of(lsn + 5000))
        self.come(wal.lsn)
        self.assert_served(wal)

    def test_it_goes_on_where_a_crash_has_left_it(self) -> None:
        wal = built(3.5)
        self.begin(wal)
        self.start()
        self.come(2 * MB + 300_000)
        self.write(2 * MB + 400_000)
        self.restart()
        holding = examine(self.path)
        assert holding is not None
        self.begin(wal, holding.end)
        self.start()
        self.assertEqual(self.directory.commit_lsn, holding.end)
        self.come(wal.lsn)
        self.assert_served(wal)
        self.assert_same(3 * MB, wal.lsn)

    def test_observers_are_told_of_each_sync_once(self) -> None:
        self.begin(built(1))
        self.start()
        self.assertEqual(self.come(self.wal.records[20].end), 1)
        for record in self.wal.records[21:30]:
            self.write(record.end)
            self.assertEqual(self.sync(), 1)
            self.assertEqual(self.look(), 0)
        # Half a record is nothing to be told of.
        self.assertEqual(self.come(self.wal.records[30].last - 1), 0)

    def test_what_was_walked_over_while_it_was_synced_is_shown_at_once(self) -> None:
        self.begin(built(3.5))
        self.start()
        self.come(self.wal.start + 50_000)
        for size in (60_000, 70_000, 70_100, 300_000):
            end = self.wal.end_of(self.wal.start + size)
            seen, told = self.directory.commit_lsn, self.told
            self.write(end)
            self.directory.show()
            self.settle()
            self.assertEqual((self.directory.commit_lsn, self.told), (seen, told))
            self.received.synced(end)
            self.assertEqual((self.directory.commit_lsn, self.told), (seen, told))
            self.directory.show()
            self.assertEqual((self.directory.commit_lsn, self.told), (end, told + (end > seen)))
            self.assertEqual(len(self.clock.getDelayedCalls()), 1)  # there is no more to do
            self.assert_same(seen, self.directory.commit_lsn)

    def test_what_was_not_walked_over_yet_is_not_shown_though_it_is_synced(self) -> None:
        self.begin(built(1))
        self.start()
        self.come(self.wal.start + 50_000)
        seen = self.directory.commit_lsn
        self.write(self.wal.start + 90_000)
        self.received.synced(self.writer.lsn)
        self.directory.show()
        self.assertEqual(self.directory.commit_lsn, seen)
        self.settle()
        self.assertEqual(self.directory.commit_lsn, self.wal.end_of(self.wal.start + 90_000))

    def test_a_fence_is_not_passed_by_what_is_shown_at_once(self) -> None:
        self.begin(built(1))
        self.start()
        self.come(self.wal.start + 50_000)
        fence = self.wal.end_of(self.wal.start + 60_000)
        self.directory.fence(fence)
        self.settle()
        self.write(self.wal.start + 90_000)
        self.look()
        self.received.synced(self.writer.lsn)
        self.directory.show()
        self.assertEqual(self.directory.commit_lsn, fence)
        self.settle()
        self.assertEqual(self.directory.commit_lsn, fence)

    def test_the_last_record_is_one_that_is_on_disk(self) -> None:
        """Though the walk is further: from its segment the end must be found after a crash."""
        wal = WalBuilder()
        wal.records_to(2 * MB - 5000)
        last = wal.fill_to(2 * MB)
        wal.records_to(2 * MB + 50_000)
        self.begin(wal)
        self.start()
        self.come(2 * MB)
        self.assertEqual(self.directory.commit_lsn, 2 * MB)
        self.write(2 * MB + 40_000)
        self.assertEqual(self.look(), 0)
        self.assertEqual(self.directory.commit_lsn, 2 * MB)
        self.assertEqual(self.directory.last_record_lsn, last.start)
        self.sync()
        self.assertGreater(self.directory.last_record_lsn, 2 * MB)

    def test_wrong_wal_is_found_wrong_when_it_is_on_disk(self) -> None:
        wal = built(1)
        self.begin(wal)
        self.start()
        self.come(wal.start + 50_000)
        wrong = next(one for one in wal.records if one.start > wal.start + 100_000)
        data = bytearray(wal.image[:200_000])
        data[wrong.start - wal.start + 40] ^= 1
        start = self.writer.lsn
        piece = memoryview(data)[start - wal.start :]
        self.received.append(piece)
        self.writer.write(start, [piece])
        self.received.written(self.writer.lsn)
        self.assertEqual(self.look(), 0)
        self.assertIsNone(self.received.stopped_at)
        self.sync()
        self.assertEqual(self.received.stopped_at, wrong.start)
        self.assertEqual(self.directory.commit_lsn, wrong.start)
        self.assertLessEqual(self.received.proven_to, wrong.start)

    def test_nothing_happens_but_a_slow_look_around(self) -> None:
        self.begin(built(1))
        self.start()
        self.come(self.wal.lsn)
        for _ in range(3):
            (poll,) = self.clock.getDelayedCalls()
            self.assertAlmostEqual(poll.getTime() - self.clock.seconds(), SLOW_POLL)
            self.clock.advance(SLOW_POLL)
        self.assertEqual(self.told, 1)

    def test_a_sync_that_takes_very_long_is_no_gap(self) -> None:
        self.begin(built(3.5))
        self.start()
        self.come(self.wal.start + 100_000)
        seen = self.directory.commit_lsn
        self.write(3 * MB + 500_000)
        for _ in range(3):
            self.clock.advance(PATIENCE)
            self.look()
            self.assertEqual(self.directory.commit_lsn, seen)
        self.sync()
        self.assertEqual(self.directory.commit_lsn, self.wal.end_of(3 * MB + 500_000))
        self.assertEqual(self.directory.sendable_to(1, MB), 2 * MB)
        self.assertEqual(self.lines("going on from there"), [])
        self.assertEqual(self.lines("is missing"), [])


class Proven(Receiving):
    """What was walked over when it came need not be proven again."""

    def setUp(self) -> None:
        super().setUp()
        self.begin(built(3.5))
        self.start()
        for end in range(self.wal.start + 300_000, self.wal.lsn, 300_000):
            self.come(end)
        self.come(self.wal.lsn)
        self.assert_served(self.wal)

    def test_all_of_it_is_to_be_had_at_once(self) -> None:
        for lsn in (MB, 2 * MB, 3 * MB):
            self.assertEqual(self.directory.sendable_to(1, lsn), lsn + MB)
        self.assertEqual(self.directory.sendable_to(1, 4 * MB), self.wal.lsn)
        self.assertEqual(self.look(), 0)

    def test_what_others_write_to_it_is_looked_at(self) -> None:
        path = self.path / self.wal.segment_name(2 * MB)
        before = path.stat().st_ctime_ns
        while path.stat().st_ctime_ns == before:
            with open(path, "r+b") as file:
                file.seek(50 * PAGE + 4000)
                file.write(bytes(100))
        self.assertLessEqual(self.directory.sendable_to(1, 2 * MB), 2 * MB)
        self.settle()
        end = self.wal.end_of(2 * MB + 50 * PAGE + 4000)
        self.assertEqual(self.directory.sendable_to(1, 2 * MB), end)
        with self.assertRaises(DataCorrupted):
            self.directory.sendable_to(1, end)
        # The others are as they were.
        self.assertEqual(self.directory.sendable_to(1, MB), 2 * MB)
        self.assertEqual(self.directory.sendable_to(1, 3 * MB), 4 * MB)


class Fenced(Receiving):
    """Nobody gets what is behind the fence."""

    def setUp(self) -> None:
        super().setUp()
        self.begin(built(2.5))
        self.fence_lsn = self.wal.records[-20].end

    def assert_fenced(self) -> None:
        self.directory.require_ready()
        self.assertEqual(self.directory.commit_lsn, self.fence_lsn)
        self.assertEqual(self.directory.end_of(1), self.fence_lsn)
        self.assertEqual(self.directory.sendable_to(1, self.fence_lsn), self.fence_lsn)
        for lsn in (self.fence_lsn + 1, self.fence_lsn + 5000, self.wal.lsn):
            with self.assertRaisesRegex(InternalError, "is ahead of the WAL flush position"):
                self.directory.sendable_to(1, lsn)
        start = self.fence_lsn - 5000
        self.assertEqual(self.directory.sendable_to(1, start), self.fence_lsn)
        self.assert_same(start, self.fence_lsn)

    def test_what_was_to_be_had_before_is_not_any_more(self) -> None:
        self.start()
        self.come(self.wal.lsn)
        self.assert_served(self.wal)
        self.directory.fence(self.fence_lsn)
        self.assert_fenced()
        self.settle()
        for _ in range(3):
            self.look()
            self.assert_fenced()
        self.assertEqual(self.lines("damaged"), [])

    def test_more_does_not_come_through(self) -> None:
        self.start()
        self.come(self.fence_lsn - 5000)
        self.directory.fence(self.fence_lsn)
        self.settle()
        self.assertEqual(self.directory.commit_lsn, self.wal.end_of(self.fence_lsn - 5000))
        self.come(self.fence_lsn + 100)
        self.assert_fenced()
        self.assertEqual(self.come(self.wal.lsn), 0)
        self.assert_fenced()

    def test_it_may_be_there_before_anything_is(self) -> None:
        self.directory.fence(self.fence_lsn)
        self.start()
        self.assert_not_ready()
        self.come(self.wal.lsn)
        self.assert_fenced()

    def test_when_it_ends_all_is_to_be_had_again(self) -> None:
        self.start()
        self.come(self.wal.lsn)
        self.directory.fence(self.fence_lsn)
        self.settle()
        before = self.told
        self.directory.fence(None)
        self.settle()
        self.assertEqual(self.told, before + 1)
        self.assert_served(self.wal)
        self.directory.fence(None)
        self.settle()
        self.assertEqual(self.told, before + 1)

    def test_a_fence_behind_the_end_is_no_matter(self) -> None:
        self.start()
        self.come(self.wal.lsn)
        self.directory.fence(self.wal.lsn + 5 * MB)
        self.settle()
        self.assert_served(self.wal)

    def test_it_may_be_in_a_segment_before(self) -> None:
        self.start()
        self.come(self.wal.start + 9000)
        self.come(self.wal.lsn)
        self.fence_lsn = self.wal.end_of(2 * MB + 300_000)
        self.directory.fence(self.fence_lsn)
        self.settle()
        self.assert_fenced()
        self.assertEqual(self.directory.sendable_to(1, MB), 2 * MB)
        self.directory.fence(None)
        self.settle()
        self.assert_served(self.wal)
        self.assertEqual(self.directory.sendable_to(1, 2 * MB), 3 * MB)
