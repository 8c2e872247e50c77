"""WAL that is not in memory: nobody but who wants it waits for the disk."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from tests.slow_disk import NOWAIT, PAGE, Later, PageCache
from tests.wal_builder import MB, WalBuilder
from walproto.errors import CannotConnectNow, DataCorrupted, IoError
from walproto.timeline import directory as directory_module
from walproto.timeline.directory import WalDirectory
from walproto.timeline.replicas import Replica
from walproto.wal.cold import CHUNK, ColdFile, NotInMemory

pytestmark = pytest.mark.skipif(not NOWAIT, reason="here reads always wait for the disk")


@pytest.fixture
def threads() -> Later:
    return Later()


@pytest.fixture
def cache(threads: Later, monkeypatch: pytest.MonkeyPatch) -> PageCache:
    cache = PageCache(threads)
    monkeypatch.setattr(os, "preadv", cache.preadv)
    monkeypatch.setattr(os, "posix_fadvise", cache.posix_fadvise)
    return cache


class Cold:
    """A file of 3.5 chunks, none of it in memory."""

    def __init__(self, path: Path, threads: Later, cache: PageCache) -> None:
        self.contents = random.Random(1).randbytes(3 * CHUNK + CHUNK // 2)
        path.write_bytes(self.contents)
        self.fd = os.open(path, os.O_RDONLY)
        self.threads = threads
        self.cache = cache
        self.file = ColdFile(self.fd, self.elsewhere)

    def elsewhere(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self.threads.run(work).addCallback(lambda _: done())

    def warm(self, offset: int, size: int) -> None:
        self.cache.pages.update(self.cache.pages_of(self.fd, offset, size))

    def read(self, offset: int, size: int) -> bytes | None:
        """What is there; None if it is not in memory."""
        buffer = bytearray(size)
        try:
            count = self.file.read_into(buffer, offset)
        except NotInMemory:
            return None
        assert buffer[:count] == self.contents[offset : offset + count]
        return bytes(buffer[:count])


@pytest.fixture
def cold(tmp_path: Path, threads: Later, cache: PageCache) -> Iterator[Cold]:
    cold = Cold(tmp_path / "file", threads, cache)
    yield cold
    os.close(cold.fd)
    assert not threads.waiting


def test_what_is_in_memory_is_read_at_once(cold: Cold) -> None:
    cold.warm(0, CHUNK)
    assert cold.read(100, 50_000) == cold.contents[100:50_100]


def test_what_is_not_is_read_once_a_thread_has_loaded_it(cold: Cold) -> None:
    for _ in range(3):
        assert cold.read(CHUNK + 5, 100_000) is None
    assert cold.read(CHUNK + 500_000, 1) is None
    assert len(cold.threads.waiting) == 1
    cold.threads.work()
    assert cold.read(CHUNK, CHUNK) == cold.contents[CHUNK : 2 * CHUNK]
    assert cold.cache.waited == []


@pytest.mark.parametrize("there", [1, PAGE, 10 * PAGE])
def test_a_part_of_it_is_not_enough(cold: Cold, there: int) -> None:
    cold.warm(0, there)
    assert cold.read(0, 100_000) is None
    cold.threads.work()
    assert cold.read(0, 100_000) == cold.contents[:100_000]
    assert cold.cache.waited == []


def test_what_lies_across_two_chunks_is_loaded_one_after_the_other(cold: Cold) -> None:
    for _ in range(2):
        assert cold.read(CHUNK - 10, 20) is None
        cold.threads.work()
    assert cold.read(CHUNK - 10, 20) == cold.contents[CHUNK - 10 : CHUNK + 10]
    assert cold.cache.waited == []


def test_several_chunks_are_loaded_at_the_same_time(cold: Cold) -> None:
    assert cold.read(0, 1) is None
    assert cold.read(2 * CHUNK, 1) is None
    cold.threads.work(1)
    assert cold.read(0, 1) is None
    assert cold.read(2 * CHUNK, 1) == cold.contents[2 * CHUNK : 2 * CHUNK + 1]
    cold.threads.work()
    assert cold.read(0, 1) == cold.contents[:1]


def test_it_ends_where_the_file_does(cold: Cold) -> None:
    size = len(cold.contents)
    assert cold.read(size, 10) == b""
    assert cold.read(size - 10, 100) is None
    cold.threads.work()
    assert cold.read(size - 10, 100) == cold.contents[-10:]


def test_the_file_may_be_closed_meanwhile(cold: Cold) -> None:
    before = os.listdir("/proc/self/fd")
    assert cold.read(0, 10) is None
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, cold.fd)
    os.close(null)
    cold.threads.work()
    assert os.listdir("/proc/self/fd") == before


def test_what_cannot_be_read_is_an_error_and_not_waited_for_again(cold: Cold) -> None:
    cold.cache.unreadable.update(cold.cache.pages_of(cold.fd, 20 * PAGE, 1))
    assert cold.read(20 * PAGE, 10) is None
    cold.threads.work()
    with pytest.raises(OSError, match="Input/output error"):
        cold.read(20 * PAGE, 10)
    # Its neighbours are none the worse for it.
    cold.warm(0, PAGE)
    assert cold.read(0, PAGE) == cold.contents[:PAGE]


def test_what_memory_loses_as_soon_as_it_is_there_is_waited_for(cold: Cold) -> None:
    """Or nobody would get anywhere; but what was read meanwhile is loaded anew."""
    assert cold.read(0, 10) is None
    cold.threads.work()
    cold.cache.pages.clear()
    assert cold.read(0, 10) == cold.contents[:10]
    assert cold.cache.waited == [(0, 10)]
    cold.cache.pages.clear()
    assert cold.read(0, 10) is None
    cold.threads.work()
    assert cold.read(0, 10) == cold.contents[:10]
    cold.cache.pages.clear()
    assert cold.read(0, 10) is None
    cold.threads.work()
    assert cold.cache.waited == [(0, 10)]


def test_where_nobody_can_tell_it_waits(cold: Cold) -> None:
    cold.cache.cannot_tell = True
    assert cold.read(0, 10) == cold.contents[:10]
    assert cold.read(2 * CHUNK, 10) == cold.contents[2 * CHUNK : 2 * CHUNK + 10]
    assert len(cold.cache.waited) == 2


def test_what_had_to_be_loaded_is_given_back_and_nothing_else(cold: Cold) -> None:
    cold.warm(0, CHUNK)
    before = set(cold.cache.pages)
    for chunk in (1, 2):
        assert cold.read(chunk * CHUNK, 1) is None
        cold.threads.work()
    cold.file.give_back(0)
    cold.file.give_back(1)
    assert cold.cache.pages - before == set(cold.cache.pages_of(cold.fd, 2 * CHUNK, CHUNK))
    cold.file.give_back(2)
    assert cold.cache.pages == before


def test_what_others_have_loaded_since_is_not_given_back(cold: Cold) -> None:
    assert cold.read(0, 1) is None
    cold.threads.work()
    cold.file.give_back(0)
    assert not cold.cache.pages
    cold.warm(0, CHUNK)
    before = set(cold.cache.pages)
    assert cold.read(0, 1) == cold.contents[:1]
    cold.file.give_back(0)
    assert cold.cache.pages == before


class Reader:
    """Reads all of an archive, as a producer does: on when it is told to."""

    def __init__(self, directory: WalDirectory, start: int) -> None:
        self.directory = directory
        self.start = start
        self.data = bytearray()
        directory.add_observer(self.go_on)

    @property
    def lsn(self) -> int:
        return self.start + len(self.data)

    def go_on(self) -> None:
        try:
            self.directory.require_ready()
            while self.lsn < self.directory.commit_lsn:
                end = min(self.directory.sendable_to(1, self.lsn), self.lsn - self.lsn % MB + MB)
                buffer = bytearray(max(0, min(end - self.lsn, 100_000)))
                if not buffer:
                    return
                self.directory.read_into(1, self.lsn, memoryview(buffer))
                self.data += buffer
        except (CannotConnectNow, NotInMemory):
            return


class Archive:
    """Four segments and some, of which nothing is in memory, and the directory they are in."""

    def __init__(self, path: Path, threads: Later, cache: PageCache) -> None:
        self.wal = WalBuilder()
        self.wal.records_to(self.wal.start + 4 * MB + 300_000, 5000)
        self.paths = self.wal.write_to(path)
        self.threads = threads
        self.cache = cache
        self.clock = Clock()
        self.directory = WalDirectory(path, self.clock, threads=threads)
        self.directory.start()
        self.clock.advance(0)

    def expected(self, start: int) -> bytes:
        return self.wal.image[start - self.wal.start : self.wal.lsn - self.wal.start]

    def in_memory(self) -> list[bool]:
        """Of which segments there is something in memory."""
        result = []
        for path in self.paths:
            with open(path, "rb") as file:
                pages = self.cache.pages_of(file.fileno(), 0, MB)
            result.append(not self.cache.pages.isdisjoint(pages))
        return result

    def work(self, index: int = 0) -> None:
        self.threads.work(index)
        self.clock.advance(0)

    def work_all(self) -> None:
        for _ in range(1000):
            if not self.threads.waiting:
                return
            self.work()
        raise AssertionError("it goes on for ever")


@pytest.fixture
def archive(tmp_path: Path, threads: Later, cache: PageCache) -> Iterator[Archive]:
    archive = Archive(tmp_path, threads, cache)
    yield archive
    archive.directory.stop()
    assert archive.clock.getDelayedCalls() == []


def test_the_end_of_wal_is_found_without_waiting(archive: Archive) -> None:
    with pytest.raises(CannotConnectNow):
        archive.directory.require_ready()
    archive.work_all()
    archive.directory.require_ready()
    assert archive.directory.commit_lsn == archive.wal.lsn
    assert archive.cache.waited == []


def test_all_of_it_is_read_without_waiting(archive: Archive) -> None:
    reader = Reader(archive.directory, MB)
    archive.work_all()
    assert reader.data == archive.expected(MB)
    assert archive.cache.waited == []


def test_who_waits_for_the_disk_keeps_nobody_waiting(archive: Archive) -> None:
    archive.work_all()
    slow = Reader(archive.directory, MB)
    slow.go_on()
    archive.clock.advance(0)
    assert len(archive.threads.waiting) == 1
    fast = Reader(archive.directory, 3 * MB)
    fast.go_on()
    while archive.threads.waiting[1:]:
        archive.work(1)
    assert fast.data == archive.expected(3 * MB)
    assert slow.data == b""
    archive.work_all()
    assert slow.data == archive.expected(MB)
    assert archive.cache.waited == []


def test_nothing_is_done_while_all_wait(archive: Archive) -> None:
    archive.work_all()
    told: list[None] = []
    Reader(archive.directory, MB).go_on()
    archive.directory.add_observer(lambda: told.append(None))
    archive.clock.advance(0)
    before = len(told)
    (poll,) = archive.clock.getDelayedCalls()
    assert poll.getTime() > archive.clock.seconds()
    archive.directory.look()
    archive.clock.advance(0)
    assert len(told) == before
    archive.work_all()
    assert len(told) > before


def test_behind_the_last_client_memory_is_given_back(archive: Archive) -> None:
    archive.work_all()
    reader = Reader(archive.directory, MB)
    reader.go_on()
    archive.work_all()
    assert reader.lsn == archive.wal.lsn
    # What was sent up to the newest segment; that one all who follow want.
    assert archive.in_memory() == [False, False, False, False, True]


@pytest.mark.parametrize("behind", [0, 8, MB, MB + 8])
def test_but_not_before_one_that_is_near(
    archive: Archive, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "NEAR", MB)
    archive.work_all()
    other = Replica(1, "postgres", "", "", 1, 5 * MB - behind)
    archive.directory.replicas.add(other)
    Reader(archive.directory, 4 * MB).go_on()
    archive.work_all()
    assert archive.in_memory()[3:] == [0 < behind <= MB, True]


def test_a_record_from_the_segment_before_is_walked_over_without_waiting(archive: Archive) -> None:
    archive.work_all()
    reader = Reader(archive.directory, 3 * MB)  # a record goes on there
    reader.go_on()
    archive.work_all()
    assert reader.data == archive.expected(3 * MB)
    assert archive.cache.waited == []


def test_damage_is_found_all_the_same(archive: Archive) -> None:
    lsn = 2 * MB + 64 * 8192 + 5000
    with open(archive.paths[1], "r+b") as file:
        file.seek(lsn - 2 * MB)
        file.write(bytes(100))
    reader = Reader(archive.directory, MB)
    with pytest.raises(DataCorrupted):
        archive.work_all()
    assert reader.lsn == archive.wal.end_of(lsn)


def test_what_the_disk_does_not_give_is_told(archive: Archive) -> None:
    archive.work_all()
    Reader(archive.directory, 4 * MB).go_on()
    archive.work_all()
    assert archive.directory.sendable_to(1, 4 * MB) == 5 * MB
    with open(archive.paths[3], "rb") as file:
        page = archive.cache.pages_of(file.fileno(), 8192, 1)
    archive.cache.pages.difference_update(page)
    archive.cache.unreadable.update(page)
    buffer = memoryview(bytearray(100))
    with pytest.raises(NotInMemory):
        archive.directory.read_into(1, 4 * MB + 8192, buffer)
    archive.work()
    with pytest.raises(IoError, match="Input/output error"):
        archive.directory.read_into(1, 4 * MB + 8192, buffer)


def test_what_is_loaded_when_all_is_over_is_of_no_consequence(archive: Archive) -> None:
    archive.work_all()
    reader = Reader(archive.directory, MB)
    reader.go_on()
    archive.clock.advance(0)
    archive.directory.stop()
    archive.threads.work()
    assert reader.data == b""
    assert archive.clock.getDelayedCalls() == []
    archive.directory.start()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_memory_loses_meanwhile_all_is_read(archive: Archive, seed: int) -> None:
    dice = random.Random(seed)
    starts = [dice.randrange(MB // 8, 5 * MB // 8) * 8 for _ in range(3)]
    readers = [Reader(archive.directory, start) for start in starts]
    for _ in range(2000):
        if not archive.threads.waiting:
            break
        archive.work(dice.randrange(len(archive.threads.waiting)))
        for page in sorted(archive.cache.pages):
            if dice.random() < 0.1:
                archive.cache.pages.discard(page)
        for reader in readers:
            reader.go_on()
        archive.clock.advance(0)
    for reader in readers:
        assert reader.data == archive.expected(reader.start), starts


class OnDisk(TestCase):
    """The same with the real page cache, which may hold what it likes."""

    timeout = 60

    def test_all_of_it_is_read(self) -> Deferred[None]:
        path = Path(self.enterContext(tempfile.TemporaryDirectory()))
        wal = WalBuilder()
        wal.records_to(wal.start + 4 * MB + 300_000, 5000)
        for file in wal.write_to(path):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        directory = WalDirectory(path, reactor)
        reader = Reader(directory, MB)
        done = Deferred[None]()

        def look() -> None:
            reader.go_on()
            if reader.lsn == wal.lsn and not done.called:
                done.callback(None)

        directory.add_observer(look)
        directory.start()
        self.addCleanup(directory.stop)
        return done.addCallback(
            lambda _: self.assertEqual(reader.data, wal.image[: len(reader.data)])
        )
