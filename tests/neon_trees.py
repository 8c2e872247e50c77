"""Real WAL in the directories of a safekeeper, and a real `twist walsender` that serves them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from tests.pageserver import Pageserver, Receiver
from tests.postgres import (
    Cluster,
    Installation,
    WalSender,
    is_segment,
    lsn_to_int,
    workspace,
)
from tests.safekeeper import CONTROL
from tests.wal_decoder import SEGMENT, Decoder, InvalidWal, Record
from walproto.neon.control_file import NAME, Control, TermSwitch, write_control_file
from walproto.neon.ids import TimelineIds


@dataclass(frozen=True)
class RealWal:
    """WAL that a PostgreSQL server has written, in segments of 1 MB."""

    major: int
    system_id: int
    first: int
    """The LSN of the first segment."""
    start: int
    """An LSN in there at which a record ends."""
    records: list[Record]
    """Those from `start` on."""
    data: bytes
    """From `first` to the end of the last record."""

    @property
    def end(self) -> int:
        return self.first + len(self.data)

    @property
    def middle(self) -> int:
        """An LSN in the middle of a long record, of a page, and of a segment."""
        record = max(self.records, key=lambda record: record.size)
        return record.lsn + 700_001

    def read(self, start: int, end: int) -> bytes:
        return self.data[start - self.first : end - self.first]

    @staticmethod
    def name(lsn: int) -> str:
        """The name of the segment in which this is."""
        high, low = divmod(lsn // SEGMENT, 2**32 // SEGMENT)
        return f"{1:08X}{high:08X}{low:08X}"

    def segment(self, lsn: int, shown: int | None = None) -> bytes:
        """The segment that begins there, as it is when the WAL is written up to `shown`."""
        end = min(lsn + SEGMENT, self.end if shown is None else shown)
        return self.read(lsn, end).ljust(SEGMENT, b"\0")

    def put(self, directory: Path, shown: int | None = None, first: int | None = None) -> None:
        """Write the segments as a safekeeper does that has WAL up to `shown`."""
        shown = self.end if shown is None else shown
        for lsn in range(self.first if first is None else first, shown, SEGMENT):
            complete = directory / self.name(lsn)
            partial = Path(f"{complete}.partial")
            if not complete.exists():
                with open(os.open(partial, os.O_WRONLY | os.O_CREAT), "wb") as file:
                    file.write(self.segment(lsn, shown))
                if shown >= lsn + SEGMENT:
                    partial.rename(complete)

    def control(self, ids: TimelineIds, commit_lsn: int) -> Control:
        return replace(
            CONTROL,
            tenant_id=ids.tenant_id,
            timeline_id=ids.timeline_id,
            term_history=(TermSwitch(1, self.first),),
            pg_version=self.major * 10000,
            system_id=self.system_id,
            timeline_start_lsn=self.first,
            local_start_lsn=self.first,
            commit_lsn=commit_lsn,
        )


def work_on(primary: Cluster) -> None:
    """Have a primary write some megabytes of WAL, with records short and long, and an early end of
    a segment."""
    primary.sql(
        "CREATE TABLE lines AS SELECT n, repeat('x', 90) AS filler FROM generate_series(1, 6000) n"
    )
    primary.sql("SELECT pg_logical_emit_message(true, 'long', repeat('y', 1500000))")
    primary.switch_wal()
    primary.sql("INSERT INTO lines SELECT n, repeat('z', 90) FROM generate_series(1, 6000) n")
    primary.sql("UPDATE lines SET filler = md5(filler) WHERE n % 3 = 0")
    primary.lsn()


def wal_of(primary: Cluster, start: str) -> RealWal:
    """What a primary has written up to now; `start` is where a record ends."""
    (system_id,) = primary.sql("SELECT system_identifier FROM pg_control_system()").split()
    names = sorted(path.name for path in primary.wal_dir.iterdir() if is_segment(path.name))
    high, low = int(names[0][8:16], 16), int(names[0][16:], 16)
    first, lsn = (high << 32) + low * SEGMENT, lsn_to_int(start)
    data = b"".join((primary.wal_dir / name).read_bytes() for name in names)
    decoder = Decoder(lsn)
    with suppress(InvalidWal):
        decoder.feed(data[lsn - first :])
    data = data[: decoder.end - first]
    return RealWal(primary.installation.major, int(system_id), first, lsn, decoder.records, data)


@dataclass(frozen=True)
class Tree:
    """A timeline in a data directory: WAL up to `shown`, and a control file with a commit LSN."""

    data_dir: Path
    ids: TimelineIds
    wal: RealWal

    @property
    def directory(self) -> Path:
        return self.data_dir / str(self.ids)

    @property
    def control_file(self) -> Path:
        return self.directory / NAME

    @property
    def options(self) -> str:
        """What names it in a client's `options`."""
        return f"-c ztimelineid={self.ids.timeline_id} -c ztenantid={self.ids.tenant_id}"

    def make(self, commit_lsn: int, shown: int | None = None) -> Tree:
        self.directory.mkdir(parents=True)
        self.wal.put(self.directory, shown)
        self.commit(commit_lsn)
        return self

    def commit(self, lsn: int) -> None:
        """Have WAL committed up to there."""
        write_control_file(self.control_file, self.wal.control(self.ids, lsn))


def ids_of(number: int, tenant: int = 0xA) -> TimelineIds:
    return TimelineIds(f"{tenant:032x}", f"{number:032x}")


class Safekeeper(WalSender):
    """`twist walsender` on a data directory; it listens when this returns."""

    directory_option = "--data-dir"


@dataclass
class Setting:
    """Real WAL, and a server of timelines that have it."""

    wal: RealWal
    data_dir: Path
    sender: Safekeeper
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def tree(self, commit_lsn: int, shown: int | None = None) -> Tree:
        """A new timeline."""
        return self.no_tree().make(commit_lsn, shown)

    def no_tree(self) -> Tree:
        """A timeline that is yet to be made."""
        return Tree(self.data_dir, ids_of(next(self._numbers)), self.wal)

    def pageserver(self, tree: Tree, **more: str) -> Pageserver:
        return Pageserver(self.sender.port, tree.ids.tenant_id, tree.ids.timeline_id, **more)

    def check(self, received: Receiver, end: int) -> None:
        """It has received just the WAL up to there."""
        assert received.lsn == end
        assert bytes(received.wal) == self.wal.read(received.start, end)
        assert received.furthest_end <= end


@contextmanager
def setting_of(
    installation: Installation, *options: str, port: int | None = None
) -> Iterator[Setting]:
    """Of WAL that this PostgreSQL has written; `options` are those of the walsender."""
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        start = primary.lsn()
        work_on(primary)
        wal = wal_of(primary, start)
        primary.stop()
        data_dir = space.directory("data")
        sender = space.add(Safekeeper(data_dir, *options, port=port))
        yield Setting(wal, data_dir, sender)
        sender.stop()
        sender.check_log()
