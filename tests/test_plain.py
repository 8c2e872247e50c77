"""Many records that are checked at once: as if each had been checked alone.

The oracles are the builder, which knows what was written where, and the scanner itself with the
short cuts taken from it, so that it goes step by step.
"""

from __future__ import annotations

import random
import struct
from itertools import takewhile

import pytest
from crc32c import crc32c

from tests.test_scan import Disk, scan
from tests.wal_builder import (
    PAGE,
    RECORD_SIZE,
    RM_HEAP,
    SHORT_SIZE,
    Record,
    WalBuilder,
    make_record,
)
from walproto.wal import scan as scan_module
from walproto.wal.plain import GLUE, pass_pages, walk_plain
from walproto.wal.scan import WINDOW

Walked = tuple[int, int] | None


def mixed(wal: WalBuilder, lsn: int, seed: int) -> WalBuilder:
    """Write records up to ``lsn`` and some further: small ones that end anywhere, some that fill
    pages or end with one, and some whose header is split."""
    some = random.Random(seed)
    while wal.lsn < lsn:
        for _ in range(some.randint(1, 30)):
            wal.record(some.randint(25, 400))
        wal.record(some.choice([3000, PAGE, PAGE + 300, 2 * PAGE + 500, 3 * PAGE - 40]))
        # Now one or two that begin 0 to 24 bytes before a page ends.
        for _ in range(some.randint(0, 2)):
            wal.fill_to(wal.lsn - wal.lsn % PAGE + 2 * PAGE - 8 * some.randint(0, 3))
            wal.record(some.choice([25, 30, 300, 5000]))
    return wal


class Window:
    """Pages of ``wal`` from the one at ``start`` on, and of the records that begin there those
    that can be walked over at once."""

    def __init__(self, wal: WalBuilder, start: int, pages: int) -> None:
        self.start = start
        offset = start - wal.start
        self.data = bytearray(wal.image[offset : offset + pages * PAGE])
        self.end = start + len(self.data)
        first = next(i for i, one in enumerate(wal.records) if one.start >= start)
        self.before = wal.records[first - 1]
        self.records = list(takewhile(self._is_plain, wal.records[first:]))
        self._lead = int.from_bytes(wal.header(start)[:8], "little") | 0x0004 << 16

    def _is_plain(self, record: Record) -> bool:
        """Whether it is whole here, and not both long and with its header in two pages."""
        page_end = record.start - record.start % PAGE + PAGE
        is_split = record.start + RECORD_SIZE > page_end
        return record.last <= min(self.end, page_end + PAGE if is_split else self.end)

    def walk(self) -> Walked:
        """Where the walk ends, and the last record, as LSNs; None if something was wrong."""
        offset = self.records[0].start - self.start
        walked = walk_plain(bytes(self.data), offset, self.start, self.before.start, self._lead)
        return walked and (self.start + walked[0], walked[1])

    def flip(self, lsn: int, bit: int) -> None:
        self.data[lsn - self.start] ^= 1 << bit


def test_the_glue_undoes_a_message_and_its_crc() -> None:
    for message in (b"", b"x", bytes(1000), random.Random(3).randbytes(12345)):
        crc = crc32c(message).to_bytes(4, "little")
        assert crc32c(message + crc + GLUE) == crc32c(b"") == 0


@pytest.mark.parametrize("seed", range(4))
def test_all_that_is_plain_is_walked_over_at_once(seed: int) -> None:
    wal = WalBuilder(seed=seed)
    mixed(wal, wal.start + 90 * PAGE, seed)
    for first in range(1, 40):
        for pages in (1, 2, 16, 40):
            window = Window(wal, wal.start + first * PAGE, pages)
            if window.records:
                last = window.records[-1]
                assert window.walk() == (last.end, last.start)


def test_no_bit_of_a_record_can_be_flipped_unseen() -> None:
    wal = WalBuilder(seed=1)
    mixed(wal, wal.start + 20 * PAGE, 4)
    window = Window(wal, wal.start + PAGE, 16)
    assert window.records[-1].last > window.end - 3 * PAGE
    # Where the walk must stop at the latest if this byte is wrong.
    stops: dict[int, int] = {}
    for record in window.records:
        stops.update(dict.fromkeys(range(record.start, record.last), record.start))
    for page in range(window.start + PAGE, window.end, PAGE):
        crossing = [one.start for one in window.records if one.start < page < one.last]
        stops.update(dict.fromkeys(range(page, page + 16), crossing[0] if crossing else page))
        # How much is still to come counts if something is; the rest is padding.
        for lsn in range(page + 16, page + SHORT_SIZE):
            if crossing and lsn < page + 20:
                stops[lsn] = crossing[0]
            else:
                stops.pop(lsn, None)
    some = random.Random(6)
    whole = window.walk()
    assert whole is not None
    every = range(window.records[0].start, window.records[-1].last)
    near = [lsn for lsn in every if lsn % PAGE < 64 or lsn % PAGE > PAGE - 64]
    heads = [one.start + some.randrange(RECORD_SIZE) for one in window.records]
    for lsn in [*near, *heads, *some.sample(every, 2000)]:
        bit = some.randrange(8)
        window.flip(lsn, bit)
        walked = window.walk()
        if lsn in stops:
            assert walked is None or walked[0] <= stops[lsn], (lsn, bit)
        else:
            assert walked == whole, (lsn, bit)
        window.flip(lsn, bit)


def test_the_same_error_in_two_records_is_seen() -> None:
    wal = WalBuilder(seed=1)
    wal.records_to(wal.start + 18 * PAGE, 104)
    window = Window(wal, wal.start + PAGE, 16)
    whole = [one for one in window.records if one.start // PAGE == one.last // PAGE]
    some = random.Random(2)
    for _ in range(300):
        error = some.randbytes(some.randint(0, 10)) + bytes([some.randint(1, 255)])
        at = some.randint(16, 104 - len(error))  # behind the length and the link
        two = some.sample(whole, 2)
        for count in (1, 2, 1, 0):
            record = two[count % 2]
            for lsn, byte in enumerate(error, record.start + at - window.start):
                window.data[lsn] ^= byte
            assert (window.walk() is None) == bool(count), (error, at, two)


def step_by_step(wal: WalBuilder, image: bytes | bytearray) -> tuple[int, int | None, int, str]:
    """How a walk without short cuts ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "walk_plain", lambda *_: None)
        patch.setattr(scan_module, "pass_pages", lambda *args: (args[1], args[4], args[5]))
        return ending(wal, image)


def ending(wal: WalBuilder, image: bytes | bytearray) -> tuple[int, int | None, int, str]:
    scanner = scan(wal, image)
    return scanner.end, scanner.last_record, scanner.last_page, scanner.reason


def test_a_wrong_bit_ends_a_walk_where_it_would_step_by_step() -> None:
    """And in the same words: in small records, in one that is longer than what is read at a time,
    behind a switch and behind one that was given up."""
    wal = WalBuilder(seed=2)
    mixed(wal, wal.start + 5 * PAGE, 8)
    wal.record(3 * WINDOW)
    wal.abandon(5 * PAGE, 2)
    mixed(wal, wal.lsn + 9 * PAGE, 9)
    wal.switch()
    mixed(wal, wal.lsn + 9 * PAGE, 10)
    image = bytearray(wal.image)
    assert ending(wal, image)[0] == wal.lsn
    assert ending(wal, image) == step_by_step(wal, image)
    for there in range(0, len(image), PAGE):
        assert ending(wal, image[:there]) == step_by_step(wal, image[:there]), there
    starts = [one.start for one in wal.records]
    pages = range(wal.start, wal.lsn, PAGE)
    some = random.Random(3)
    for _ in range(500):
        lsn = some.choice(
            [
                some.choice(starts) + some.randrange(40),
                some.choice(pages) + some.randrange(40),
                some.randrange(wal.start, wal.lsn),
            ]
        )
        bit = 1 << some.randrange(8)
        image[lsn - wal.start] ^= bit
        assert ending(wal, image) == step_by_step(wal, image), (lsn, bit)
        image[lsn - wal.start] ^= bit


def test_a_flag_that_means_nothing_may_come_and_go() -> None:
    wal = WalBuilder()
    mixed(wal, wal.start + 40 * PAGE, 1)
    disk = Disk(wal)
    for page in (3, 4, 5, 11, 20, 22, 24):
        flags = disk.image[page * PAGE + 2] & ~0x0004
        disk.put(wal.start + page * PAGE + 2, bytes([flags]))
    assert disk.run().end == wal.lsn


def test_a_record_over_two_pages_has_the_right_link() -> None:
    for before, size in ((96, 300), (96, 9000), (16, 300)):
        wal = WalBuilder()
        wal.records_to(wal.start + 3 * PAGE)
        wal.fill_to(wal.start + 5 * PAGE - before)
        wal.prev = wal.records[-2].start
        wrong = wal.record(size)
        disk = Disk(wal)
        assert disk.run().end == wrong.start
        assert disk.scanner.reason.startswith("record with incorrect prev-link")


def test_a_record_behind_a_switch_is_none() -> None:
    """In a segment that was recycled, say, it stands where zeros have to come first."""
    wal = WalBuilder()
    wal.records_to(wal.start + 3 * PAGE)
    switch = wal.switch()
    record = make_record(switch.start, bytes(100), rmid=RM_HEAP, info=0, xid=1)
    disk = Disk(wal).put(switch.end, record)
    for _ in range(2):
        assert disk.run().end == switch.end
        assert disk.scanner.reason.startswith("no zeros behind the XLOG_SWITCH record")


def test_a_page_says_where_it_is_if_nothing_goes_on_in_it_too() -> None:
    wal = WalBuilder()
    for end in range(wal.start + PAGE, wal.start + 6 * PAGE, PAGE):
        wal.record(1000)
        wal.fill_to(end)
    page = wal.start + 4 * PAGE
    scanner = Disk(wal).put(page + 8, struct.pack("<Q", page - PAGE)).run()
    assert scanner.end == page
    assert scanner.reason.startswith("unexpected pageaddr")


@pytest.mark.parametrize("switched_in", [5, WINDOW // PAGE - 1])
def test_pages_do_not_go_on_with_a_timeline_that_has_ended(switched_in: int) -> None:
    """Be it that of the page before, be that in what was read before."""
    parent = WalBuilder()
    mixed(parent, parent.start + (switched_in - 4) * PAGE, 1)
    end = parent.start + (switched_in + 1) * PAGE
    assert parent.lsn < end - PAGE
    parent.fill_to(end)
    wal = parent.fork(2)
    mixed(wal, wal.lsn + 20 * PAGE, 2)
    for page in (end, end + 7 * PAGE):
        scanner = Disk(wal).put(page + 4, struct.pack("<I", 1)).run()
        assert scanner.end == wal.end_of(page)
        assert scanner.reason.startswith("unexpected timeline ID 1 (should be 2)")


def test_pages_do_not_begin_the_next_timeline_too_early() -> None:
    parent = WalBuilder()
    mixed(parent, parent.start + 12 * PAGE, 1)
    wal = parent.fork(2)
    mixed(wal, wal.lsn + 20 * PAGE, 2)
    page = wal.start + 9 * PAGE
    disk = Disk(wal).put(page + 4, struct.pack("<I", 2))
    scanner = disk.run()
    assert scanner.end == wal.end_of(page)
    assert scanner.reason.startswith("unexpected timeline ID 2 (should be 1)")


def test_whole_pages_of_a_record_are_passed_over_up_to_its_last() -> None:
    wal = WalBuilder()
    record = wal.record(9 * PAGE)
    page = wal.start + PAGE
    view = memoryview(wal.image)
    lead = int.from_bytes(wal.header(page, 0x0004)[:8], "little")
    missing = int.from_bytes(view[PAGE + 16 : PAGE + 20], "little")
    offset, left, _ = pass_pages(view, PAGE, wal.start, lead, missing, 0)
    assert (offset, left) == (9 * PAGE, record.last - wal.start - 9 * PAGE - SHORT_SIZE)
    # What is not there, or not right, is not passed over.
    assert pass_pages(view[: 4 * PAGE], PAGE, wal.start, lead, missing, 0)[0] == 4 * PAGE
    assert pass_pages(view, PAGE, wal.start, lead, missing - 1, 5) == (PAGE, missing - 1, 5)
    assert pass_pages(view, PAGE, wal.start, lead + 1, missing, 5) == (PAGE, missing, 5)
    assert pass_pages(view, PAGE, wal.start + PAGE, lead, missing, 5) == (PAGE, missing, 5)
