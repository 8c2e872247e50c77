"""After a crash, wherever it comes, the end of WAL is found to the byte, and what comes from there
on makes the files what they should have been."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.crashed import START, Crashed, examined, spread
from tests.test_scan import FILLINGS, offsets, wals
from tests.wal_builder import MB, PAGE, WalBuilder


@settings(deadline=None, derandomize=True, max_examples=50)
@given(wals(), st.sampled_from(list(FILLINGS)), st.integers(0, 2**32).map(random.Random))
def test_after_any_crash_it_goes_on_as_if_there_had_been_none(
    wal: WalBuilder, filling: str, some: random.Random
) -> None:
    wal.record(some.randint(24, 9999))
    for cut in (*offsets(wal, some, 3), some.randint(1, len(wal.image) // MB) * MB):
        there = max(wal.start + cut, wal.start + 1)
        with tempfile.TemporaryDirectory() as name:
            crashed = Crashed(Path(name), wal, there, FILLINGS[filling])
            if filling == "recycled" and there < crashed.first_record + 24:
                continue  # nothing comes before a first record that its link could be held to
            holding = crashed.assert_found()
            if holding is None:
                crashed.go_on(wal.start, crashed.history.file_tli(wal.start, MB))
            else:
                crashed.go_on(holding.end, holding.history.tli)
            crashed.assert_complete()


@pytest.mark.parametrize("filling", FILLINGS)
def test_every_byte_where_it_may_be_told_apart(tmp_path: Path, filling: str) -> None:
    """Where records begin and end, and the headers of pages do."""
    wal = spread()
    pages = [wal.start + MB + number * PAGE for number in (0, 1, 2, 3, 29, 30, 31, 32, 33)]
    borders = {page + more for page in pages for more in (0, 24, 40)}
    borders |= {lsn for record in wal.records for lsn in record if lsn > wal.start + MB - PAGE}
    near = {lsn + more for lsn in borders for more in (-8, -1, 0, 1, 23, 24)}
    crashed = Crashed(tmp_path, wal, wal.start + MB + 1)
    partial = crashed.path(wal.start + MB).with_suffix(".partial")
    whole, other = wal.image[MB:], FILLINGS[filling](wal)[MB:]
    found = set()
    for there in sorted(near):
        cut = there - wal.start - MB
        if cut < 0 or (filling == "recycled" and there < crashed.first_record + 24):
            continue
        partial.write_bytes(whole[:cut] + other[cut:])
        holding = crashed.assert_found()
        assert holding is not None
        found.add(holding.end)
    # The records that begin in the segment before it and within it.
    assert len(found) > 20


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 2**32).map(random.Random), st.sampled_from([512, 4096, PAGE]))
def test_after_a_loss_of_power_nothing_is_kept_that_was_lost(
    some: random.Random, sector: int
) -> None:
    """What was not yet synced is on disk or not in any order, a few bytes at a time."""
    wal = WalBuilder(start=START, seed=some.randrange(1000))
    wal.records_to(wal.start + MB - 4 * PAGE, 30_000)
    wal.fill_to(wal.start + MB - some.choice([8, 24, 600, 3 * PAGE]))
    sizes = [30, 700, PAGE, 5 * PAGE, 20 * PAGE]
    while wal.lsn < wal.start + 2 * MB - 60 * PAGE or some.random() < 0.8:
        wal.record(some.choice(sizes))
    synced = wal.start + MB + some.choice([0, PAGE, some.randrange(MB)])
    with tempfile.TemporaryDirectory() as name:
        crashed = Crashed(Path(name), wal, wal.start + 2 * MB)
        partial = crashed.path(wal.start + MB).with_suffix(".partial")
        image = wal.image[MB : 2 * MB]
        contents = bytearray(image)
        first = synced - wal.start - MB
        for at in range(0, MB, sector):
            if at >= first and some.random() < some.choice([0.01, 0.1, 0.5]):
                contents[at : at + sector] = bytes(sector)
        partial.write_bytes(contents)
        holding = examined(crashed.directory)
        assert holding.end >= max(wal.start + MB, wal.end_of(synced))
        kept = min(holding.end - wal.start - MB, MB)
        assert contents[:kept] == image[:kept]
        crashed.go_on(holding.end, 1)
        crashed.assert_complete()
