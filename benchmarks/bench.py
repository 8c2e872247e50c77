"""Where it is measured: servers of PostgreSQL and of ours side by side, and the load side."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sink import Sink
from tests.postgres import (
    Cluster,
    Installation,
    Relay,
    Workspace,
    int_to_lsn,
    lsn_to_int,
)

SEGMENT = 16 << 20
SETTINGS: dict[str, str | int] = {
    "fsync": "on",
    "shared_buffers": "128MB",
    "max_connections": 1300,
    "max_wal_senders": 1200,
    "wal_keep_size": "4GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "wal_sender_timeout": 0,
    "autovacuum": "off",
}
"""A primary's: as the tests' are, but with WAL made durable, and nothing going on by itself."""


@dataclass(frozen=True)
class Bench:
    """What all that is measured needs."""

    space: Workspace
    sink: Sink
    rounds: int
    names: list[str] = field(default_factory=list)

    def primary(self, installation: Installation, **settings: str | int) -> Cluster:
        """A primary that runs."""
        self.names.append("")
        name = f"primary{len(self.names)}"
        cluster = self.space.cluster(installation, name).init()
        cluster.configure(**SETTINGS | settings)
        return cluster

    def relay(self, primary: Cluster, *options: str) -> Relay:
        """A relay of ours that serves what it receives from there."""
        self.names.append("")
        directory = self.space.directory(f"relay{len(self.names)}")
        unlimited = ("--max-wal-senders", "1200", "--wal-sender-timeout", "0")
        relay = self.space.add(Relay(directory, primary.conninfo, *unlimited, *options))
        relay.expect("ready to serve")
        return relay

    def file(self, name: str, contents: bytes) -> Path:
        return self.space.file(self.space.path / name, contents)


def make_wal(primary: Cluster, size: int) -> tuple[int, int]:
    """Make at least `size` bytes of WAL with pgbench: the load of its tables, then updates, many
    in a transaction and few; where it begins, on a segment, and where it ends."""
    start = lsn_to_int(primary.switch_wal())
    primary.pgbench("-i", "-s", "20", "-q")
    script = primary.directory / "update.sql"
    script.write_text("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid <= 200000;\n")
    script.chmod(0o644)
    while lsn_to_int(primary.lsn()) - start < size:
        primary.pgbench("-n", "-c", "1", "-t", "1", "-f", str(script))
        primary.pgbench("-n", "-c", "4", "-t", "500")
    primary.switch_wal()
    return start, lsn_to_int(primary.lsn())


def lsn_of(lsn: int) -> str:
    return int_to_lsn(lsn)


def tell(text: str) -> None:
    """Tell on a terminal what is being done."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
