"""What processes cost: CPU time and memory, as the kernel counts them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


class CpuTime:
    """The CPU time that these processes take from now on."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = {pid: _cpu_seconds(pid) for pid in pids}

    def spent(self) -> float:
        """Seconds, of all threads; without processes that have ended."""
        now = {pid: _cpu_seconds(pid) for pid in self._before}
        return sum(now[pid] - self._before[pid] for pid in now if now[pid])


def _cpu_seconds(pid: int) -> float:
    """Of all threads of a process that are alive; 0 if it is not."""
    nanoseconds = 0
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in (PROC / str(pid) / "task").iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def memory(pids: Iterable[int]) -> int:
    """The bytes of memory that these processes take, what they share with others by its share
    (PSS); without those that have ended."""
    total = 0
    for pid in filter(_command, pids):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def children(pid: int) -> list[int]:
    listed = (PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    return [int(child) for child in listed]


def with_children(pid: int) -> list[int]:
    """A process and those that it has started."""
    return [pid, *children(pid)]


def walsenders(postmaster: int) -> list[int]:
    """The processes of a PostgreSQL server that send WAL."""
    return [pid for pid in children(postmaster) if b"walsender" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return b""
