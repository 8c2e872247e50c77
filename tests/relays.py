"""A primary and a relay that receives from it, as most tests of relays begin with."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faulty import Disk, FaultyRelay
from tests.postgres import (
    Cluster,
    Installation,
    Process,
    Relay,
    Workspace,
    lsn_to_int,
    same_wal_to,
    workspace,
)

SEGMENT = 2**20
PAGE = 8192
SLOT = ("--upstream-slot", "relay", "--upstream-create-slot")

MESSAGES = b"""
\\set size random(0, 60000)
SELECT pg_logical_emit_message(true, 'relay', repeat('x', :size));
"""
"""For pgbench: records of all sizes, many of them larger than a page."""


@dataclass
class Relayed:
    """A primary with segments of 1 MB, and a relay that has a slot on it."""

    space: Workspace
    primary: Cluster
    relay: Relay

    @property
    def directory(self) -> Path:
        return self.relay.directory

    def restart_relay(self) -> None:
        """Start it once more when it has ended, with nothing wrong any more."""
        self.relay = self.space.add(self.relay.again())

    def restart_faulty(self, disk: Disk) -> None:
        """Start it once more when it has ended, on this disk."""
        self.relay = self.space.add(FaultyRelay.instead_of(self.relay, disk))

    def started(self) -> tuple[int, int]:
        """Wait until it serves and receives; up to where what it had then goes, and from where on
        it receives."""
        pattern = r"(ready to serve) .* to (\S+/\S+)|(receiving from) .* from (\S+/\S+)"
        # One comes before the other, or the other before the one.
        found = {match[1] or match[3]: match for match in map(self.relay.expect, [pattern] * 2)}
        return lsn_to_int(found["ready to serve"][2]), lsn_to_int(found["receiving from"][4])

    def write(self, size: int, wait: bool = True) -> str:
        """Have the primary write so many bytes, in records of some 1000; where they end."""
        end = self.primary.sql(
            "SET synchronous_commit = local;"
            "SELECT max(pg_logical_emit_message(true, 'relay', repeat('x', 950)))"
            f" FROM generate_series(1, {size // 1000})"
        )
        if wait:
            self.wait_flushed(end)
        return end

    def load(self) -> Process:
        """Have clients at work on the primary, which has pgbench's tables, until this is killed.

        They make much WAL for little work: there is a new segment every other moment.
        """
        script = self.space.file(self.space.path / "load", MESSAGES)
        mix = ("-b", "tpcb-like", "-f", script, "-R", "300")
        return self.primary.client("pgbench", "-n", "-c", "2", "-T", "600", *mix, "postgres")

    def wait_flushed(self, lsn: str) -> None:
        """Wait until the relay has told the primary that it has all WAL up to there."""
        self.primary.wait_until(told("flush_lsn", lsn))

    def told(self, what: str) -> int:
        """The position, "write_lsn" or "flush_lsn", that the relay told the primary last."""
        query = f"SELECT {what} FROM pg_stat_replication WHERE application_name = 'walproto'"
        return lsn_to_int(self.primary.sql(query))

    def newest(self) -> Path:
        """The segment that the relay writes to."""
        (partial,) = self.directory.glob("*.partial")
        return partial

    def check_archive(self, *complaints: str) -> list[str]:
        """That the relay gets all there is, and holds what the primary holds, byte for byte; and
        that it has complained of nothing else than these patterns, of each once.

        The names of the complete segments.
        """
        end = self.primary.lsn()
        self.wait_flushed(end)
        names = same_wal_to(end, self.primary.wal_dir, self.directory)
        self.relay.stop()
        self.check_complaints(*complaints)
        return names

    def check_complaints(self, *complaints: str) -> None:
        """That the relay has complained of these patterns, once of each, and of nothing else."""
        bad = re.findall(r"(?m)^.*(?:#error|#critical|Traceback|Unhandled).*$", self.relay.output)
        assert len(bad) == len(complaints), self.relay.output
        for line, complaint in zip(bad, complaints, strict=True):
            assert re.search(complaint, line), line


def told(what: str, lsn: str) -> str:
    """The SQL condition that the relay has told the primary a position of at least that."""
    return (
        "EXISTS (SELECT FROM pg_stat_replication"
        f" WHERE application_name = 'walproto' AND {what} >= '{lsn}')"
    )


@contextmanager
def relayed(
    installation: Installation,
    *options: str,
    disk: Disk | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Relayed]:
    """`options` are the relay's, `disk` its disk, `settings` the primary's."""
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1)
        primary.configure(**(settings or {}))
        primary.start()
        directory = space.directory("relay")
        relay: Relay = space.add(
            FaultyRelay(disk, directory, primary.conninfo, *SLOT, *options)
            if disk
            else Relay(directory, primary.conninfo, *SLOT, *options)
        )
        relay.ready()
        setting = Relayed(space, primary, relay)
        setting.wait_flushed(primary.lsn())
        yield setting


def seeded() -> random.Random:
    """Random choices that can be made again: the seed is printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)
