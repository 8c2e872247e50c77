"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def describe(directory: Path) -> list[str]:
    """The machine, the filesystem that `directory` is on, and how busy it was: lines of text."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return [
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        f"{platform.system()} {platform.release()}, {_filesystem(directory)}, Python"
        f" {platform.python_version()}; load average in the minute before {os.getloadavg()[0]:.1f}",
    ]


def _filesystem(directory: Path) -> str:
    """The type of filesystem that a directory is on, and what it is mounted from."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = "an unknown filesystem"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, what = line.partition(" - ")
        if mount.split()[2] == wanted:
            kind, source, _ = what.split(maxsplit=2)
            found = f"{kind} on {source}"
    return found
