"""A directory as a crash leaves it, and what becomes of it when WAL comes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.test_scan import FILLINGS
from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder, first_difference
from walproto.timeline.history import parse_history
from walproto.timeline.holding import Holding, examine
from walproto.wal.pages import FORMATS, Identity, parse_identity
from walproto.wal.writer import SegmentWriter, store_history

START = 65 * MB
"""Where the first segment begins; there was WAL before it."""
FIRST = "000000010000000000000041"


def spread() -> WalBuilder:
    """WAL with records over pages and segments, and others between them."""
    wal = WalBuilder(start=START)
    wal.records_to(wal.start + MB - 3 * PAGE, 30_000)
    wal.record(5 * PAGE)
    wal.records_to(wal.lsn + 3 * PAGE, 900)
    wal.fill_to(wal.start + MB + 30 * PAGE - 8)
    wal.record(3 * PAGE)
    wal.records_to(wal.lsn + PAGE, 2000)
    return wal


def examined(directory: Path) -> Holding:
    holding = examine(directory)
    assert holding is not None
    return holding


def history_contents(wal: WalBuilder, tli: int) -> bytes:
    """The history file of a timeline that the WAL's own descends from, or of that itself."""
    lines = wal.history_contents.splitlines(keepends=True)
    return b"".join(line for line in lines if line.strip() and int(line.split()[0]) < tli)


class Crashed:
    """A directory in which there is the WAL below the LSN ``there``, and then something else.

    A record comes with what fills it up to a multiple of eight bytes.  What was full has its name,
    but for the last segment, unless ``is_named``.
    """

    def __init__(
        self,
        directory: Path,
        wal: WalBuilder,
        there: int,
        filling: Callable[[WalBuilder], bytes] = FILLINGS["zeros"],
        is_named: bool = False,
    ) -> None:
        self.directory = directory
        self.wal = wal
        self.image = wal.image
        self.history = parse_history(wal.tli, wal.history_contents)
        there = next((it.end for it in wal.records if it.last <= there < it.end), there)
        offset = there - wal.start
        contents = self.image[:offset] + filling(wal)[offset:]
        self.newest = (there - 1) // MB * MB
        """Where the newest segment begins."""
        for lsn in range(wal.start, there, MB):
            path = self.path(lsn)
            if lsn == self.newest and not is_named:
                path = path.with_name(f"{path.name}.partial")
            path.write_bytes(contents[lsn - wal.start :][:MB])
        for tli in range(2, self.history.file_tli(self.newest, MB) + 1):
            (directory / f"{tli:08X}.history").write_bytes(history_contents(wal, tli))

    def path(self, lsn: int) -> Path:
        """The file of the segment that ``lsn`` is in, once it is full."""
        name = self.wal.segment_name(lsn)
        return self.directory / f"{self.history.file_tli(lsn, MB):08X}{name[8:]}"

    def newest_contents(self) -> bytes:
        path = self.path(self.newest)
        return (path if path.exists() else path.with_name(f"{path.name}.partial")).read_bytes()

    @property
    def there(self) -> int:
        """Up to where the WAL is there, perhaps because what comes behind it is the same."""
        segment = self.image[self.newest - self.wal.start :][:MB]
        return self.newest + first_difference(self.newest_contents(), segment)

    @property
    def first_record(self) -> int:
        """Where the first record of the newest segment begins, or its pages."""
        starts = [record.start for record in self.wal.records if record.start > self.newest]
        return min(starts, default=self.newest + PAGE)

    def assert_found(self) -> Holding | None:
        """That what is found is what is there."""
        there, begin = self.there, self.newest
        end = self.wal.end_of(there)
        is_nothing = begin == self.wal.start and parse_identity(self.newest_contents()) is None
        holding = examine(self.directory)
        if is_nothing:
            assert holding is None
            return None
        assert holding is not None
        assert holding.valid_to == (end if end > self.wal.start else begin)
        assert holding.end == max(end, begin)
        assert holding.identity == Identity(SYSTEM, MB, FORMATS[MAGIC[self.wal.major]])
        assert self.history.up_to(holding.history.tli) == holding.history
        return holding

    def go_on(self, lsn: int, tli: int) -> None:
        """Receive all that is missing, as a relay does: over the ends of timelines, too."""
        while True:
            ended = self.history.ancestor(tli)
            end = ended.switch_lsn if ended else self.wal.start + len(self.image)
            writer = SegmentWriter(self.directory, tli, MB, lsn)
            data = memoryview(self.image)[lsn - self.wal.start : end - self.wal.start]
            writer.write(lsn, [data[at : at + 99_999] for at in range(0, len(data), 99_999)])
            writer.sync()
            writer.close()
            if ended is None:
                return
            lsn, tli = ended.switch_lsn - ended.switch_lsn % MB, ended.next_tli
            store_history(self.directory, tli, history_contents(self.wal, tli))

    def assert_complete(self) -> None:
        """That the files are what they would be if there had been no crash."""
        for lsn in range(self.wal.start, self.wal.start + len(self.image), MB):
            assert self.path(lsn).read_bytes() == self.image[lsn - self.wal.start :][:MB], hex(lsn)
            assert not self.path(lsn).with_name(f"{self.path(lsn).name}.partial").exists()
