"""What the tests of retention have in common: a directory into which WAL is received, its slots,
and a retention that looks at it when the test lets time go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from tests.upstream_fakes import HeldThreads, Logged
from tests.wal_builder import MB, SYSTEM, WalBuilder, page_header
from walproto.timeline.directory import WalDirectory
from walproto.timeline.received import Received
from walproto.timeline.replicas import Replica
from walproto.timeline.retention import INTERVAL, Retention
from walproto.timeline.slots import Slot, SlotOptions, Slots
from walproto.wal.writer import SegmentWriter

OTHER = SYSTEM + 1
"""Another cluster's system identifier."""


def name_of(segno: int, tli: int = 1, size: int = MB) -> str:
    high, low = divmod(segno * size, 2**32)
    return f"{tli:08X}{high:08X}{low // size:08X}"


def put(
    directory: Path,
    *segnos: int,
    tli: int = 1,
    size: int = MB,
    system: int = SYSTEM,
    suffix: str = "",
) -> list[str]:
    """Have these segments there, or the first page of each; their names."""
    names = []
    for segno in segnos:
        page = page_header(segno * size, major=18, tli=tli, size=size, system=system)
        names.append(name_of(segno, tli, size) + suffix)
        (directory / names[-1]).write_bytes(page.ljust(8192, b"\0"))
    return names


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


FIRST, CURRENT, LAST = 100, 110, 114
"""Numbers of segments: where the WAL begins, where it ends at first, and all that may come."""


def built() -> WalBuilder:
    wal = WalBuilder(start=FIRST * MB)
    wal.records_to(LAST * MB + MB // 2, 60_000)
    return wal


WAL = built()


class Session:
    """One that holds a slot."""

    def __init__(self, pid: int = 7) -> None:
        self.pid = pid
        self.is_terminated = False

    def terminate(self) -> None:
        self.is_terminated = True


class Kept:
    """A directory into which WAL is received, up to within segment CURRENT at first, its slots and
    its retention; ``options`` are those of SlotOptions."""

    def __init__(
        self, path: Path, log: Logged, wal: WalBuilder = WAL, end: int = 0, **options: int
    ) -> None:
        self.path = path
        self.log = log
        self.wal = wal
        self.strange: set[str] = set()
        self.begin(wal, wal.start)
        self.write(end or CURRENT * MB + MB // 2)
        self.start(**options)

    def start(self, **options: int) -> None:
        """Serve the directory, as a program that is started does."""
        self.clock = Clock()
        self.threads = HeldThreads()
        self.timeline = WalDirectory(self.path, self.clock, self.received)
        self.slots = Slots(self.path, self.threads, SlotOptions(**options))
        self.retention = Retention(self.timeline, self.slots, self.clock, self.threads)
        self.retention.start()
        self.timeline.start()
        self.clock.advance(0)

    def stop(self) -> None:
        """End it as a crash does."""
        self.retention.stop()
        self.timeline.stop()
        self.writer.close()

    def restart(self, **options: int) -> None:
        self.stop()
        self.begin(self.wal, self.writer.lsn)
        self.start(**options)

    # --- WAL comes -------------------------------------------------------------------------

    def begin(self, wal: WalBuilder, lsn: int) -> None:
        self.wal = wal
        self.received = Received()
        self.writer = SegmentWriter(self.path, wal.tli, MB, lsn)
        self.received.begin(wal.tli, lsn, lsn)

    def write(self, end: int) -> None:
        start, wal = self.writer.lsn, self.wal
        data = memoryview(wal.image)[start - wal.start : end - wal.start]
        self.received.append(data)
        self.writer.write(start, [data])
        self.writer.sync()
        for lsn, stamp in self.writer.completed:
            self.received.complete(wal.tli, lsn, stamp)
        self.writer.completed.clear()
        self.received.synced(self.writer.lsn)

    def come(self, segno: int) -> None:
        """WAL comes up to within this segment."""
        self.write(segno * MB + MB // 2)
        self.timeline.look()
        self.clock.advance(0)

    # --- slots, replicas -------------------------------------------------------------------

    def slot(self, name: str, lsn: int = 0) -> Slot:
        """A slot that reserves WAL from there on, which nobody uses."""
        self.slots.create(name, Session(), restart_lsn=lsn)
        self.threads.work_all()
        slot = self.slots.get(name)
        assert slot is not None
        return slot

    def replica(self, lsn: int) -> Replica:
        replica = Replica(7, "postgres", "standby", "192.0.2.1:40000", 1, lsn)
        self.timeline.replicas.add(replica)
        return replica

    # --- time goes by ----------------------------------------------------------------------

    def look(self) -> list[int]:
        """Let it look, and do all that it then wants to; the segments that are there."""
        self.clock.advance(INTERVAL)
        self.threads.work_all()
        return self.there()

    def there(self) -> list[int]:
        """The numbers of the segments; there is no hole, but for what is strange."""
        found = names_in(self.path) - self.strange
        names = (name for name in found if len(name.removesuffix(".partial")) == 24)
        numbers = sorted({int(name[16:24], 16) for name in names})
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        return numbers


Make = Callable[..., Kept]


@contextmanager
def making(path: Path) -> Iterator[Make]:
    """What makes a Kept in ``path``; what was logged by then does not matter."""
    made: list[Kept] = []
    with capturedLogs() as events:

        def make(**options: Any) -> Kept:
            made.append(Kept(path, Logged(events), **options))
            made[-1].log.lines()
            return made[-1]

        yield make
        for one in made:
            one.stop()
            assert one.clock.getDelayedCalls() == []
        assert [event for event in events if "log_failure" in event] == []


def cannot_save(one: Kept, problem: str) -> str:
    """The line that tells of it."""
    return (
        f"critical: cannot save replication slots in {one.path}: {problem}: trying again; until "
        "then they are not created or dropped, and no WAL is removed"
    )


def removed(first: int, last: int, oldest: str, why: str) -> str:
    """The line that tells of it."""
    which = f"1 segment, {name_of(first)}"
    if last > first:
        which = f"{last - first + 1} segments, {name_of(first)} to {name_of(last)}"
    return f"info: removed {which}: the oldest WAL that is kept is at {oldest}, for {why}"
