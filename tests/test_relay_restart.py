"""A relay that starts again: it finds the true end of what it has, whatever lies behind it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faulty import KILLED_BEFORE, MADE, Call, Disk
from tests.postgres import (
    PROJECT,
    identify_system,
    installations,
    int_to_lsn,
    is_segment,
    lsn_to_int,
    same_wal,
)
from tests.relays import PAGE, SEGMENT, Relayed, relayed, seeded


@pytest.fixture
def setting() -> Iterator[Relayed]:
    with relayed(installations()[0]) as setting:
        yield setting


def end_of_wal(setting: Relayed) -> int:
    """Where the primary's WAL ends, which the relay has."""
    end = setting.primary.sql("SELECT pg_current_wal_flush_lsn()")
    setting.wait_flushed(end)
    return lsn_to_int(end)


def end_within_a_page(setting: Relayed) -> int:
    """Have the WAL end in the second half of a page, which is not the first of its segment: where
    it ends."""
    while True:
        setting.write(1500)
        end = end_of_wal(setting)
        if end % PAGE > PAGE // 2 + 500 and end % SEGMENT > PAGE:
            return end


def overwrite(path: Path, start: int, end: int, rng: random.Random) -> None:
    with open(path, "r+b") as file:
        file.seek(start % SEGMENT)
        file.write(rng.randbytes(end - start))


def test_it_finds_the_end_without_its_upstream(setting: Relayed) -> None:
    """What it has acknowledged is there and is served, to the last byte."""
    end = end_of_wal(setting)
    setting.relay.kill()
    setting.primary.kill()
    setting.restart_relay()
    assert lsn_to_int(setting.relay.ready()[4]) == end
    _, _, served = identify_system(setting.primary.installation, setting.relay.port)
    assert lsn_to_int(served) == end
    setting.primary.start()
    setting.relay.receiving()
    setting.check_archive()


@pytest.mark.parametrize("torn", ["behind the end", "in the last page", "in the page before"])
def test_torn_pages_are_repaired(setting: Relayed, torn: str) -> None:
    rng = seeded()
    end = end_within_a_page(setting)
    page = end - end % PAGE
    start, stop = {
        "behind the end": (end, page + 10 * PAGE),
        "in the last page": (page + PAGE // 2, page + PAGE),
        "in the page before": (page - PAGE // 2, page),
    }[torn]
    partial = setting.newest()
    setting.relay.kill()
    stop = min(stop, end - end % SEGMENT + SEGMENT)
    overwrite(partial, start, stop, rng)

    setting.restart_relay()
    served, begun = setting.started()
    assert begun % PAGE == 0
    assert begun <= start
    if torn == "behind the end":
        assert served >= end
    setting.wait_flushed(int_to_lsn(end))
    wal = (setting.primary.wal_dir / partial.stem).read_bytes()[: end % SEGMENT]
    assert partial.read_bytes()[: end % SEGMENT] == wal
    setting.write(2 * SEGMENT)
    assert setting.check_archive()


def test_a_segment_that_was_just_begun(setting: Relayed) -> None:
    """It is all zeros.  What came before it is served, and it is filled."""
    setting.relay.kill()
    disk, begun = Disk(), []

    def plan(call: Call) -> str:
        """Kill it when it is about to write into a new segment."""
        if call.name == "posix_fallocate":
            begun.append(call.file)
        return KILLED_BEFORE if call.name == "pwritev" and call.file in begun else MADE

    disk.plan = plan
    setting.restart_faulty(disk)
    setting.write(SEGMENT, wait=False)
    assert setting.relay.wait() == -9, setting.relay.output
    partial = setting.newest()
    assert partial.name in begun
    assert partial.read_bytes() == bytes(SEGMENT)

    setting.primary.kill()
    setting.restart_relay()
    served = lsn_to_int(setting.relay.ready()[4])
    last = max(path for path in setting.directory.iterdir() if is_segment(path.name))
    assert served // SEGMENT == int(last.name[16:], 16)
    same_wal(setting.primary.wal_dir, setting.directory)
    setting.primary.start()
    setting.relay.receiving()
    assert setting.check_archive()[-1] == last.name


def test_two_relays_on_one_directory(setting: Relayed) -> None:
    """The second one refuses to start, and the first one does not mind."""
    relay = setting.relay
    done = subprocess.run(
        [
            *(sys.executable, "-m", "twisted", "--log-format=text", "walsender"),
            *("--wal-dir", relay.directory, "--upstream", relay.upstream),
            *("--listen", "tcp:0:interface=127.0.0.1"),
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"another walsender receives into {relay.directory} already" in line
    setting.write(SEGMENT)
    assert setting.check_archive()
