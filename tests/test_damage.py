"""Damaged WAL: whatever happens to the files, clients are told, and no wrong byte is sent.

Through the whole server, in memory: a directory on disk, clients on transports of ours.  Each test
damages something and then asks the same of it: the client that comes to it is told so and may go on
with another command; the log says which file and where; another client, at the tail, does not
notice; what was sent is what was there before the damage; and once the file is mended, the same
client's next attempt succeeds.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import COPY_DONE, Client, query, server
from tests.wal_builder import MB, PAGE, SHORT_SIZE, SYSTEM, WalBuilder
from walproto.lsn import format_lsn
from walproto.timeline.directory import WalDirectory

SEGMENTS = 5
BAD = 3 * MB
"""The segment that is damaged: the third of five."""


def built(tli: int = 1, system: int = SYSTEM) -> WalBuilder:
    wal = WalBuilder(tli=tli, system=system)
    wal.records_to(wal.start + SEGMENTS * MB - 100_000, 5000)
    return wal


class Served(SynchronousTestCase):
    """A server on a directory, and a client that follows its tail."""

    def setUp(self) -> None:
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.logged = self.enterContext(capturedLogs())
        self.wal = built()
        self.wal.write_to(self.path)
        self.clock = Clock()
        self.directory: WalDirectory | None = None
        self.addCleanup(self.stop)
        self.serve()

    def serve(self) -> None:
        """Have a server that has not proven anything yet, and a client that follows its tail."""
        self.stop()
        self.directory = WalDirectory(self.path, self.clock)
        self.directory.start()
        self.factory = server(self.directory, self.clock)
        self.clock.advance(0)
        self.bystander = self.client()
        self.tell(self.bystander, self.directory.commit_lsn)

    def stop(self) -> None:
        if self.directory is not None:
            for connection in list(self.factory.connections.values()):
                connection.transport.drop()
            self.directory.stop()
            self.directory = None
        self.clock.advance(0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def look(self) -> None:
        assert self.directory is not None
        self.directory.look()

    # --- what may be done ------------------------------------------------------------------

    def client(self, capacity: int | None = None) -> Client:
        client = Client(self.factory, self.clock, capacity)
        client.start_up()
        return client

    def tell(self, client: Client, lsn: int) -> list[str]:
        """Have the client stream from there; what it is told but WAL."""
        lines = client.send(query(f"START_REPLICATION {format_lsn(lsn)}"))
        return [line for line in lines if not line.startswith("w ")]

    def file(self, lsn: int = BAD) -> Path:
        return self.path / self.wal.segment_name(lsn)

    def patch_file(self, lsn: int, change: Callable[[bytes], bytes], size: int = 1) -> None:
        with open(self.file(lsn), "r+b") as file:
            file.seek(lsn % MB)
            data = change(file.read(size))
            file.seek(lsn % MB)
            file.write(data)

    def flip(self, lsn: int, bit: int = 0x10) -> None:
        self.patch_file(lsn, lambda byte: bytes([byte[0] ^ bit]))

    def mend(self, lsn: int = BAD) -> None:
        """Put back a good copy, as one does: beside it, and then renamed."""
        if self.file(lsn).is_dir():
            shutil.rmtree(self.file(lsn))
        new = self.path / "mended"
        new.write_bytes(self.wal.segment(lsn))
        new.rename(self.file(lsn))

    def record_at(self, page: int) -> int:
        """Where the first record of a page of the bad segment begins."""
        return next(r.start for r in self.wal.records if r.start >= BAD + page * PAGE)

    # --- what is to be seen ----------------------------------------------------------------

    def received(self, client: Client, start: int) -> int:
        """How far the client has WAL without a hole from ``start``; all of it is right."""
        image, base = self.wal.image, self.wal.start
        for lsn, data in client.wal.items():
            self.assertEqual(data, image[lsn - base : lsn - base + len(data)], format_lsn(lsn))
        while data := client.wal.get(start, b""):
            start += len(data)
        return start

    def assert_logged(self, sqlstate: str, name: str) -> None:
        """That the last such error was logged with the file's name and an LSN."""
        lines = [formatEvent(event) for event in self.logged]
        line = [line for line in lines if f"ERROR {sqlstate}:" in line][-1]
        self.assertIn(name, line)
        self.assertRegex(line, r"LSN [0-9A-F]+/[0-9A-F]+")
        self.assertIn(str(self.path), line)
        self.assertEqual([event for event in self.logged if "log_failure" in event], [])

    def assert_others_go_on(self) -> None:
        """That the client at the tail is sent what comes."""
        start = self.wal.lsn
        self.wal.record(3000)
        with open(self.file(start), "r+b") as file:
            file.write(self.wal.segment(start))
        self.look()
        self.bystander.hear()
        self.assertEqual(self.received(self.bystander, start), self.wal.lsn)

    def assert_refused(
        self,
        start: int,
        end: int,
        sqlstate: str,
        message: str,
        *,
        name: str = "",
    ) -> None:
        """That a client that streams from ``start`` gets as far as ``end`` and is told then; and
        that it may try again: with no other result as it is, and with success once it is mended."""
        client = self.client()
        for attempt in (start, end, start):
            client.wal.clear()
            lines = self.tell(client, attempt)
            self.assertEqual(lines[0], "W")
            self.assertRegex(lines[1], f"^ERROR {sqlstate}: {message}")
            self.assertEqual(lines[2:], ["Z I"])
            self.assertEqual(format_lsn(self.received(client, attempt)), format_lsn(end))
            self.assert_logged(sqlstate, name or self.file().name)
        self.assert_others_go_on()
        self.assertEqual(client.send(query("SHOW wal_segment_size"))[-2:], ["C SHOW", "Z I"])
        self.mend()
        client.wal.clear()
        self.assertEqual(self.tell(client, end), ["W"])
        self.assertEqual(self.received(client, end), self.wal.lsn)
        self.assertEqual(client.send(COPY_DONE)[-1], "Z I")
        self.serve()  # what is proven, this one remembers


CHECKSUM = "incorrect resource manager data checksum in record at 0/3"


class FlippedBits(Served):
    """One bit of an old segment, wherever it is."""

    def test_in_the_data_of_a_record(self) -> None:
        for page in (0, 64, MB // PAGE - 2):
            lsn = self.record_at(page) + 1000
            self.flip(lsn)
            self.assert_refused(MB, self.wal.end_of(lsn), "XX001", CHECKSUM)

    def test_for_who_begins_there(self) -> None:
        for page in (0, 64, MB // PAGE - 2):
            lsn = self.record_at(page) + 1000
            self.flip(lsn)
            self.assert_refused(BAD, self.wal.end_of(lsn), "XX001", CHECKSUM)

    def test_in_the_header_of_a_record(self) -> None:
        for offset, message in (
            (0, ""),
            (4, CHECKSUM),
            (8, "record with incorrect prev-link "),
            (16, CHECKSUM),
            (17, CHECKSUM),
            (18, CHECKSUM),
            (20, CHECKSUM),
        ):
            start = self.record_at(64)
            self.flip(start + offset)
            self.assert_refused(2 * MB, start, "XX001", message)

    def test_in_the_header_of_a_page(self) -> None:
        for offset, message in (
            (0, "invalid magic number D108 in WAL segment"),
            (2, "invalid info bits 0015 in WAL segment"),
            (4, "unexpected timeline ID 17 \\(should be 1\\) in WAL segment"),
            (9, "unexpected pageaddr 0/381000 in WAL segment"),
            (16, "invalid contrecord length "),
        ):
            page = BAD + 64 * PAGE
            self.flip(page + offset)
            self.assert_refused(BAD, self.wal.end_of(page), "XX001", message)

    def test_in_what_goes_on_from_the_segment_before(self) -> None:
        """There the record before it is the last that is right."""
        lsn = BAD + 100
        end = self.wal.end_of(lsn)
        self.assertLess(end, BAD)
        self.flip(lsn)
        self.assert_refused(
            MB,
            end,
            "XX001",
            "incorrect resource manager data checksum in record at 0/2",
            name=self.file(end).name,
        )

    def test_anywhere(self) -> None:
        """In all bytes of a page that something vouches for: all but padding."""
        page = BAD + 70 * PAGE
        client = self.client()
        for offset in (*range(0, 12, 5), *range(SHORT_SIZE, PAGE, 251)):
            lsn = page + offset
            in_a_record = any(r.start <= lsn < r.last for r in self.wal.records)
            if offset >= SHORT_SIZE and not in_a_record:
                continue
            self.flip(lsn, 0x80)
            client.wal.clear()
            lines = self.tell(client, BAD + 60 * PAGE)
            self.assertRegex(lines[1], "^ERROR XX001: ")
            end = self.received(client, BAD + 60 * PAGE)
            self.assertEqual(end, self.wal.end_of(lsn))
            self.flip(lsn, 0x80)


class WrongFiles(Served):
    """An old segment that is not what it should be, or not there."""

    def test_a_missing_segment(self) -> None:
        self.file().unlink()
        name = self.file().name
        self.assert_refused(
            MB, BAD, "58P01", f"requested WAL segment {name} has already been removed"
        )

    def test_a_missing_segment_for_who_begins_in_it(self) -> None:
        self.file().unlink()
        lsn = self.record_at(64)
        self.assert_refused(lsn, lsn, "58P01", "requested WAL segment .* has already been removed")

    def test_a_truncated_segment(self) -> None:
        for size in (64 * PAGE, 64 * PAGE + 1234, MB - 1):
            os.truncate(self.file(), size)
            end = self.wal.end_of(BAD + size // PAGE * PAGE)
            self.assert_refused(
                MB, end, "XX001", f"could not read from WAL segment {self.file().name}"
            )

    def test_an_empty_segment(self) -> None:
        os.truncate(self.file(), 0)
        self.assert_refused(MB, BAD, "XX001", f"could not read from WAL segment {self.file().name}")

    def test_a_segment_of_another_cluster(self) -> None:
        self.file().write_bytes(built(system=99).segment(BAD))
        self.assert_refused(
            MB,
            BAD,
            "XX001",
            "WAL file is from different database system: WAL file database system identifier is 99",
        )

    def test_a_segment_of_another_timeline(self) -> None:
        other = built(tli=2)
        self.file().write_bytes(other.segment(BAD))
        message = rf"unexpected timeline ID 2 \(should be 1\) in WAL segment {self.file().name}"
        self.assert_refused(BAD, BAD, "XX001", message)
        self.file().write_bytes(other.segment(BAD))
        before = self.wal.end_of(BAD)
        self.assert_refused(MB, before, "XX001", message, name=self.file(before).name)

    def test_another_segment_under_its_name(self) -> None:
        self.file().write_bytes(self.wal.segment(2 * MB))
        self.assert_refused(
            BAD, BAD, "XX001", f"unexpected pageaddr 0/200000 in WAL segment {self.file().name}"
        )

    def test_zeroed_pages(self) -> None:
        for page in (0, 64, MB // PAGE - 1):
            lsn = BAD + page * PAGE
            self.patch_file(lsn, lambda _: bytes(PAGE), PAGE)
            self.assert_refused(
                BAD,
                self.wal.end_of(lsn) if page else BAD,
                "XX001",
                f"invalid magic number 0000 in WAL segment {self.file().name}",
            )

    def test_a_directory_under_its_name(self) -> None:
        self.file().unlink()
        self.file().mkdir()
        told = f'could not open file "pg_wal/{self.file().name}": it is not a regular file'
        self.assert_refused(MB, BAD, "58030", told)


class WhileItIsSent(Served):
    """A file that changes under a client that has part of it."""

    def under_way(self) -> tuple[Client, int]:
        """A client with some of the bad segment, whose transport is full; and how much."""
        client = self.client(capacity=100_000)
        client.take()
        self.assertEqual(client.send(query(f"START_REPLICATION {format_lsn(BAD)}")), [])
        client.take(50_000)
        self.assertTrue(client.transport.producer_paused)
        held = self.factory.connections[client.protocol.pid]._replica
        assert held is not None
        self.assertTrue(BAD < held.sent_lsn < 4 * MB)
        return client, held.sent_lsn

    def assert_told(self, sqlstate: str, message: str) -> None:
        """That it gets what was under way, then the error; then, mended, the rest."""
        lines = []
        for _ in range(1000):
            self.client_under_way.transport.take()
            more = self.client_under_way.hear()
            lines += [line for line in more if not line.startswith("w ")]
            if lines[-1:] == ["Z I"]:
                break
        self.assertEqual(lines[0], "W")
        self.assertRegex(lines[1], f"^ERROR {sqlstate}: {message}")
        self.assertEqual(lines[2:], ["Z I"])
        end = self.received(self.client_under_way, BAD)
        self.assertGreaterEqual(end, self.sent)
        self.assert_logged(sqlstate, self.file().name)
        self.assert_others_go_on()
        self.mend()
        self.client_under_way.transport.capacity = None
        self.assertEqual(self.tell(self.client_under_way, end), ["W"])
        self.assertEqual(self.received(self.client_under_way, BAD), self.wal.lsn)

    def setUp(self) -> None:
        super().setUp()
        self.client_under_way, self.sent = self.under_way()

    def test_it_shrinks(self) -> None:
        os.truncate(self.file(), (self.sent - BAD) // 2)
        self.assert_told("XX001", f"could not read from WAL segment {self.file().name}, ")

    def test_it_shrinks_to_within_the_next_message(self) -> None:
        os.truncate(self.file(), self.sent - BAD + 1000)
        self.assert_told("XX001", f"could not read from WAL segment {self.file().name}, ")

    def test_it_vanishes(self) -> None:
        self.file().unlink()
        self.assert_told("58P01", f"requested WAL segment {self.file().name} has already been")

    def test_it_is_recycled(self) -> None:
        future = self.file(77 * MB)
        self.file().rename(future)
        with open(future, "r+b") as file:
            file.write(self.wal.segment(MB))
        self.assert_told("58P01", f"requested WAL segment {self.file().name} has already been")

    def test_it_is_replaced_by_another_clusters(self) -> None:
        new = self.path / "new"
        new.write_bytes(built(system=99).segment(BAD))
        new.rename(self.file())
        self.assert_told("XX001", "WAL file is from different database system")


class AtTheTail(Served):
    """Damage at the end cannot be told from a record that is still being written."""

    def setUp(self) -> None:
        super().setUp()
        self.tail = 5 * MB

    def test_clients_get_what_is_before_it_and_wait(self) -> None:
        for record in (self.wal.records[-1], self.wal.records[-60]):
            self.mend(self.tail)
            self.flip(record.last - 1)
            self.serve()
            client = self.client()
            self.assertEqual(self.tell(client, 4 * MB), ["W"])
            self.assertEqual(self.received(client, 4 * MB), record.start)
            self.assertEqual(client.wait(1), [])
            self.mend(self.tail)
            self.look()
            client.hear()
            self.assertEqual(self.received(client, 4 * MB), self.wal.lsn)
            client.transport.drop()

    def test_with_later_wal_behind_it_it_is_damage(self) -> None:
        """Also for the client that had been following it, once it is noticed."""
        client = self.client()
        self.assertEqual(self.tell(client, self.wal.lsn), ["W"])
        start = self.wal.lsn
        self.wal.records_to(7 * MB + 90_000, 5000)
        for lsn in (5 * MB, 6 * MB, 7 * MB):
            self.file(lsn).write_bytes(self.wal.segment(lsn))
        bad = next(r for r in self.wal.records if r.start > 6 * MB + 64 * PAGE)
        self.flip(bad.start + 100)
        lines: list[str] = []
        for _ in range(3):
            self.look()
            lines += [line for line in client.hear() if not line.startswith("w ")]
        self.assertRegex(lines[0], "^ERROR XX001: incorrect resource manager data checksum")
        self.assertEqual(lines[1:], ["Z I"])
        self.assertEqual(self.received(client, start), bad.start)
        self.assert_logged("XX001", self.file(6 * MB).name)
        self.mend(6 * MB)
        self.look()
        self.assertEqual(self.tell(client, bad.start), ["W"])
        self.assertEqual(self.received(client, start), self.wal.lsn)

    def test_a_tail_that_shrinks_is_told_and_waited_for(self) -> None:
        os.truncate(self.file(self.tail), 10 * PAGE)
        client = self.client()
        lines = self.tell(client, self.tail)
        self.assertRegex(lines[1], "^ERROR XX001: could not read from WAL segment")
        self.assert_logged("XX001", self.file(self.tail).name)
        self.assertLessEqual(self.received(client, self.tail), self.tail + 10 * PAGE)
        self.mend(self.tail)
        self.look()
        client.wal.clear()
        self.assertEqual(self.tell(client, self.tail), ["W"])
        self.assertEqual(self.received(client, self.tail), self.wal.lsn)

    def test_a_tail_that_is_gone_is_told_and_waited_for(self) -> None:
        self.file(self.tail).unlink()
        client = self.client()
        lines = self.tell(client, self.tail)
        self.assertRegex(lines[1], "^ERROR 58P01: requested WAL segment .* has already been")
        self.assert_logged("58P01", self.file(self.tail).name)
        self.mend(self.tail)
        self.assertEqual(self.tell(client, self.tail), ["W"])
        self.assertEqual(self.received(client, self.tail), self.wal.lsn)


class Histories(Served):
    """A history file that is not there."""

    def test_it_is_told_and_asked_for_again(self) -> None:
        client = self.client()
        (*_, error, ready) = client.send(query("TIMELINE_HISTORY 2"))
        self.assertRegex(error, '^ERROR 58P01: could not open file "pg_wal/00000002.history": ')
        self.assertEqual(ready, "Z I")
        lines = [formatEvent(event) for event in self.logged]
        self.assertTrue(any(re.search(r"58P01.*00000002\.history", line) for line in lines))
        (self.path / "00000002.history").write_bytes(b"1\t0/500000\tx\n")
        self.assertEqual(client.send(query("TIMELINE_HISTORY 2"))[-1], "Z I")
