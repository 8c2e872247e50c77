"""What the demo shows at its end, and whether it is as it should be."""

from __future__ import annotations

import hashlib
import platform
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.postgres import (
    HOST,
    Cluster,
    WalSender,
    identify_system,
    int_to_lsn,
    is_segment,
    lsn_to_int,
)

TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers", "moments")
SLOT = "walsender"


@dataclass(frozen=True)
class Setting:
    """What runs."""

    primary: Cluster
    sender: WalSender
    archive: Path  # what the walsender receives into
    standby: Cluster
    start: str  # where the standby began to stream


@dataclass(frozen=True)
class Absence:
    """How much WAL the standby missed while it was away, and where that began."""

    bytes_missed: int
    first_segment: str


@dataclass(frozen=True)
class Contents:
    """What there is of a table, or of a segment: so many rows, or bytes."""

    size: int
    checksum: str


def contents(cluster: Cluster, table: str) -> Contents:
    row = cluster.sql(
        "SELECT count(*), md5(coalesce(string_agg(t::text, ';' ORDER BY t::text), ''))"
        f" FROM {table} t"
    )
    rows, checksum = row.split("|")
    return Contents(int(rows), checksum)


def segments(setting: Setting, end: str) -> Iterator[tuple[str, Contents, Contents]]:
    """The segments that the primary wrote since the walsender began, up to `end`: what there is
    of each at the primary and at the walsender."""
    received = {path.name.removesuffix(".partial"): path for path in setting.archive.iterdir()}
    first, last_byte = min(filter(is_segment, received)), int_to_lsn(lsn_to_int(end) - 1)
    row = setting.primary.sql(f"SELECT * FROM pg_walfile_name_offset('{last_byte}')")
    last, offset = row.split("|")
    for path in sorted(setting.primary.wal_dir.iterdir()):
        if is_segment(path.name) and first <= path.name <= last:
            size = int(offset) + 1 if path.name == last else None
            files = (path, received.get(path.name))
            data = [file.read_bytes()[:size] if file else b"" for file in files]
            here, there = (Contents(len(one), hashlib.md5(one).hexdigest()) for one in data)
            yield path.name, here, there


def report(
    setting: Setting,
    worst: int,
    delays: list[tuple[float, float]],
    absence: Absence,
    wal: list[tuple[str, Contents, Contents]],
) -> list[str]:
    """Print the tables; the sentences that say what is not as it should be."""
    primary, sender, standby = setting.primary, setting.sender, setting.standby
    problems = []

    source = standby.sql("SELECT sender_host || ':' || sender_port FROM pg_stat_wal_receiver")
    if source != f"{HOST}:{sender.port}":
        problems.append(f"The standby streams from {source or 'nobody'}, not from the walsender.")
    clients = primary.sql("SELECT application_name, sync_state FROM pg_stat_replication")
    asked = set(re.findall(r"command: (START_REPLICATION .*)", primary.log_text()))
    if clients != "walproto|sync" or {f'"{SLOT}"' in command for command in asked} != {True}:
        problems.append(f"Not the walsender alone streams from the primary: {clients}, {asked}.")
    written = primary.sql("SELECT pg_current_wal_flush_lsn()")
    served = identify_system(primary.installation, sender.port)[2]
    replayed = standby.replayed_lsn()

    postgres = f"PostgreSQL {primary.installation.version}"
    walproto = f"walproto, Python {platform.python_version()}"
    print()
    show(
        ["", "what", "port", "pid", "WAL up to"],
        ["primary", postgres, f"{primary.port}", f"{primary.pid}", f"{written} written"],
        ["walsender", walproto, f"{sender.port}", f"{sender.pid}", f"{served} on disk"],
        ["standby", postgres, f"{standby.port}", f"{standby.pid}", f"{replayed} replayed"],
    )
    streamed = lsn_to_int(replayed) - lsn_to_int(setting.start)
    behind = max(0, lsn_to_int(written) - lsn_to_int(replayed))
    confirmed, shown = (
        f"{statistics.median(column):.1f} ms median, {max(column):.1f} ms the slowest"
        for column in zip(*delays, strict=True)
    )
    print()
    show(
        ["the primary streams to", "the walsender alone, its synchronous standby"],
        ["the standby streams from", f"{source} (the walsender) alone"],
        ["streamed", f"{streamed:,} bytes, from {setting.start} to {replayed}"],
        ["behind at the end", f"{behind:,} bytes ({worst:,} at the worst under pgbench)"],
        ["commit to confirmed", f"{confirmed}, on the walsender's disk by then"],
        ["commit to visible", f"{shown}, on the standby"],
        [
            "away",
            f"the standby missed {absence.bytes_missed:,} bytes; the walsender kept them from",
        ],
        ["", f"{absence.first_segment} on for its slot, the primary did not"],
    )

    tables = ((table, contents(primary, table), contents(standby, table)) for table in TABLES)
    for heads, pairs in (
        (["table", "rows here", "at the standby"], tables),
        (["WAL", "bytes here", "at the walsender"], wal),
    ):
        lines = [[*heads, "checksum here", "checksum there", ""]]
        for name, here, there in pairs:
            verdict = "same" if here == there else "DIFFERENT"
            if here != there:
                problems.append(f"{name} differs.")
            sizes = [f"{here.size:,}", f"{there.size:,}"]
            lines.append([name, *sizes, here.checksum[:12], there.checksum[:12], verdict])
        print()
        show(*lines)
    return problems


def show(*rows: list[str]) -> None:
    """Print rows as columns; numbers go to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if re.fullmatch(r"[\d,]{1,11}", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        print(("  " + "   ".join(cells)).rstrip())
