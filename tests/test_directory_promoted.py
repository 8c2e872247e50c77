"""A timeline in a directory into which WAL is received, whose server goes on on another: it goes
over when all that they have in common is on disk, and not before, crashes or not."""

from __future__ import annotations

from tests.test_directory import built
from tests.test_directory_received import Receiving
from tests.wal_builder import MB, PAGE
from walproto.timeline.directory import WalDirectory
from walproto.timeline.history import History
from walproto.timeline.holding import examine
from walproto.wal.writer import store_history


class Promoted(Receiving):
    """The server goes on on another timeline."""

    def setUp(self) -> None:
        super().setUp()
        self.parent = built(2.5)
        self.child = self.parent.fork(2)
        self.child.records_to(self.child.lsn + MB, 5000)
        self.switch = self.parent.lsn
        self.segment = self.switch - self.switch % MB
        """Where the segment begins in which the timeline ends."""

    def receive_parent(self) -> None:
        self.begin(self.parent)
        self.start()
        self.come(self.parent.lsn)
        self.assert_served(self.parent)

    def go_over(self) -> None:
        """As a relay does it: the new timeline's file begins where its segment does."""
        store_history(self.path, 2, self.child.history_contents)
        self.begin(self.child, self.segment)

    def assert_on_the_old_one(self) -> None:
        """That it is served, up to where it ended, from its own files."""
        self.assert_served(self.parent)
        self.directory.sendable_to(1, self.switch - 1000)
        self.settle()
        self.assertEqual(self.directory.sendable_to(1, self.switch - 1000), self.switch)
        self.assert_same(self.segment, self.switch)

    def assert_gone_over(self) -> None:
        self.assertEqual(self.directory.history.tli, 2)
        self.assertEqual(self.directory.commit_lsn, self.child.end_of(self.received.synced_to))
        self.assertEqual(self.directory.end_of(1), self.switch)
        self.assert_same(self.segment, self.switch)
        self.assert_same(self.switch, self.directory.commit_lsn, tli=2)
        self.assertEqual(len(self.lines("now serving timeline 2")), 1)

    def test_it_goes_over_when_all_that_they_have_in_common_is_synced(self) -> None:
        self.receive_parent()
        self.go_over()
        self.look()
        self.assert_on_the_old_one()
        for end in (self.segment + 100, self.segment + 9 * PAGE, self.switch - 8):
            self.come(end)
            self.assert_on_the_old_one()
        self.write(self.switch + 20_000)
        self.assertEqual(self.look(), 0)
        self.assert_on_the_old_one()
        self.assertGreater(self.sync(), 0)
        self.assert_gone_over()
        self.come(self.child.lsn)
        self.assert_served(self.child)
        self.assert_gone_over()

    def test_it_goes_over_where_a_segment_ends(self) -> None:
        self.parent.fill_to(self.segment + MB)
        self.child = self.parent.fork(2)
        self.child.records_to(self.child.lsn + MB, 5000)
        self.switch = self.segment = self.parent.lsn
        self.receive_parent()
        self.go_over()
        self.look()
        self.assertEqual(self.directory.history.tli, 1)
        self.come(self.segment + 20_000)
        self.assertEqual(self.directory.history.tli, 2)
        self.assertEqual(self.directory.commit_lsn, self.child.end_of(self.segment + 20_000))
        self.come(self.child.lsn)
        self.assert_served(self.child)

    def test_clients_of_the_old_one_get_all_of_it_meanwhile(self) -> None:
        self.receive_parent()
        self.go_over()
        self.come(self.segment + 9 * PAGE)
        for lsn in (MB, 2 * MB, self.segment, self.switch - 1000):
            self.directory.sendable_to(1, lsn)
            self.settle()
            end = self.directory.sendable_to(1, lsn)
            self.assertEqual(end, min(lsn - lsn % MB + MB, self.switch))
            self.assert_same(lsn, end)

    def crash_while_it_goes_over(self, there: int, filling: bytes = bytes(MB)) -> None:
        """The new timeline's file is there up to the LSN ``there``."""
        self.parent.write_to(self.path, partial=True)
        self.put_history(self.child)
        path = self.put(self.child, self.segment, suffix=".partial")
        shown = there - self.segment
        path.write_bytes(self.child.segment(self.segment)[:shown] + filling[shown:])

    def test_after_a_crash_meanwhile_what_has_not_come_again_is_not_to_be_had(self) -> None:
        """The new timeline's file will be read instead of the old one's, but is not yet whole."""
        there = self.segment + 9 * PAGE + 1000
        self.crash_while_it_goes_over(there)
        holding = examine(self.path)
        assert holding is not None
        self.assertEqual(holding.end, self.child.end_of(there))
        self.begin(self.child, holding.end)
        self.wal = self.parent
        self.start()
        self.assert_on_the_old_one()
        self.wal = self.child
        self.come(self.switch - 3000)
        self.assert_on_the_old_one()
        self.come(self.switch + 20_000)
        self.assert_gone_over()

    def test_after_a_crash_meanwhile_it_is_so_without_a_relay(self) -> None:
        self.directory = WalDirectory(self.path, self.clock)
        self.wal = self.parent
        for there in (self.segment + 9 * PAGE + 1000, self.segment + 50, self.switch - 8):
            self.crash_while_it_goes_over(there)
            self.start()
            self.assert_on_the_old_one()
            self.stop()
            self.directory = WalDirectory(self.path, self.clock)
        self.start()
        self.child.write_to(self.path, partial=True)
        self.look()
        self.assert_served(self.child)

    def test_after_a_crash_meanwhile_the_old_file_may_be_gone(self) -> None:
        self.crash_while_it_goes_over(self.segment + 9 * PAGE)
        (self.path / f"{self.parent.segment_name(self.segment)}.partial").unlink()
        self.begin(self.child, self.segment)
        self.start()
        self.assertEqual(self.directory.history.tli, 1)
        self.assertEqual(self.directory.commit_lsn, self.parent.end_of(self.segment))
        self.come(self.switch + 20_000)
        self.assertEqual(self.directory.history.tli, 2)
        self.assert_same(self.segment, self.switch)

    def test_two_timelines_of_which_there_is_too_little(self) -> None:
        third = self.child.fork(3)
        third.records_to(third.lsn + 5000, 1000)
        self.crash_while_it_goes_over(self.segment + 9 * PAGE)
        self.put_history(third)
        self.put(third, third.lsn, shown=PAGE, suffix=".partial")
        self.directory = WalDirectory(self.path, self.clock)
        self.wal = self.parent
        self.start()
        self.assert_on_the_old_one()

    def test_a_fence_before_the_new_one_hides_it(self) -> None:
        """Nobody can have anything of it, so it is not told of either, until the fence ends."""
        self.receive_parent()
        self.go_over()
        self.come(self.child.lsn)
        self.assert_gone_over()
        fence = self.parent.records[-20].end
        for _ in range(2):
            self.directory.fence(fence)
            for _ in range(2):
                self.assertEqual(self.directory.history, History(1))
                self.assertEqual(self.directory.commit_lsn, fence)
                self.assertEqual(self.directory.end_of(1), fence)
                self.settle()
                self.look()
            self.assert_same(self.segment, fence)
            self.directory.fence(None)
            self.settle()
            self.assert_gone_over()
        # One within the new one leaves it.
        fence = self.child.records[-20].end
        self.directory.fence(fence)
        self.settle()
        self.assertEqual(self.directory.history.tli, 2)
        self.assertEqual(self.directory.commit_lsn, fence)
        self.assertEqual(self.directory.end_of(1), self.switch)

    def test_a_fence_is_news(self) -> None:
        """For whoever looks only when there is news; once each."""
        self.receive_parent()
        told: list[int] = []
        self.directory.add_observer(lambda: told.append(self.directory.commit_lsn))
        end, fence = self.directory.commit_lsn, self.parent.records[-20].end
        for lsn in (fence, fence, None):
            self.directory.fence(lsn)
            self.settle()
        self.assertEqual(told[0], fence)
        self.assertEqual(told[-1], end)
        self.assertNotIn(fence, told[1:])

    def test_a_fence_hides_one_that_comes_later(self) -> None:
        self.receive_parent()
        fence = self.parent.records[-20].end
        self.directory.fence(fence)
        self.go_over()
        self.come(self.child.lsn)
        self.assertEqual(self.directory.history, History(1))
        self.assertEqual(self.directory.commit_lsn, fence)
        self.directory.fence(None)
        self.settle()
        self.assert_gone_over()
