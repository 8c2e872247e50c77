"""The scanner: it finds where valid WAL ends, to the byte, however the WAL comes to be there.

The oracle is :meth:`tests.wal_builder.WalBuilder.end_of`, which knows what was written; and at the
end of this file real PostgreSQL.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.postgres import Cluster, Installation, installations, lsn_to_int, workspace
from tests.wal_builder import (
    LONG_SIZE,
    MAGIC,
    MB,
    PAGE,
    SHORT_SIZE,
    SYSTEM,
    WalBuilder,
    first_difference,
    make_record,
    reader,
)
from walproto.lsn import format_lsn
from walproto.timeline.directory import STEP
from walproto.timeline.history import History, parse_history
from walproto.timeline.survey import survey
from walproto.wal.pages import FORMATS, Identity
from walproto.wal.scan import Scanner
from walproto.wal.segments import Segments

Read = Callable[[int, int], bytes]


def scanner_of(
    wal: WalBuilder, image: bytes | bytearray | None = None, read: Read | None = None
) -> Scanner:
    """A scanner over ``image``, which stays ours to change, or over what was written."""
    return Scanner(
        Identity(wal.system, wal.size, FORMATS[MAGIC[wal.major]]),
        parse_history(wal.tli, wal.history_contents),
        wal.start,
        read or reader(wal.image if image is None else image, wal.start, wal.size),
    )


def run(scanner: Scanner, budget: int = STEP) -> Scanner:
    """Walk on to where it stops."""
    while scanner.advance(budget):
        pass
    return scanner


def scan(wal: WalBuilder, image: bytes | bytearray | None = None) -> Scanner:
    return run(scanner_of(wal, image))


# --- WAL of every shape --------------------------------------------------------------------------

GARBAGE = random.Random(7).randbytes(MB)


@st.composite
def wals(draw: st.DrawFn, majors: tuple[int, ...] = tuple(MAGIC)) -> WalBuilder:
    """WAL with everything in it that WAL can have, in any order."""
    wal = WalBuilder(
        major=draw(st.sampled_from(majors)),
        seed=draw(st.integers(0, 1000)),
        start=draw(st.sampled_from([65 * MB, 255 * MB, 4095 * MB, 0x12_FFF0_0000])),
    )
    if draw(st.booleans()):
        # Begin close to the end of the segment, where more can go wrong.
        wal.fill_to(wal.lsn + MB - draw(st.integers(1, 4)) * PAGE + 8 * draw(st.integers(9, 99)))
    sizes = st.one_of(
        st.integers(24, 300),
        st.integers(PAGE - 200, PAGE + 200),
        st.integers(2 * PAGE, 6 * PAGE),
        st.sampled_from([24, 25, 32, PAGE - LONG_SIZE, PAGE - SHORT_SIZE]),
    )
    large = 0
    for what in draw(
        st.lists(
            st.sampled_from(["record"] * 6 + ["few", "large", "page", "switch", "abandon", "fork"]),
            min_size=1,
            max_size=10,
        )
    ):
        match what:
            case "record":
                wal.record(draw(sizes))
            case "few":
                for _ in range(draw(st.integers(2, 40))):
                    wal.record(draw(st.integers(24, 300)))
            case "large" if not large:
                large = draw(st.sampled_from([MB, MB + 12345, 2 * MB + 99]))
                wal.record(large)
            case "page":
                # The next record begins 0 to 24 bytes before a page ends: its header is split.
                end = wal.lsn - wal.lsn % PAGE + 2 * PAGE
                wal.fill_to(end - 8 * draw(st.integers(0, 3)))
            case "switch":
                wal.switch()
            case "abandon":
                pages = draw(st.integers(1, 3))
                wal.abandon((pages + 2) * PAGE + draw(st.integers(0, 9999)), pages)
            case "fork" if wal.records:
                wal = wal.fork(wal.tli + 1)
    return wal


def recycled(wal: WalBuilder) -> bytes:
    """What files under these names may have held before: older WAL of the same cluster."""
    older = WalBuilder(major=wal.major, system=wal.system, start=wal.start - 64 * MB, seed=99)
    older.records_to(older.start + 20 * PAGE, 300)
    older.record(len(wal.image))
    return older.image[: len(wal.image)]


FILLINGS: dict[str, Callable[[WalBuilder], bytes]] = {
    "zeros": lambda wal: bytes(len(wal.image)),
    "garbage": lambda wal: GARBAGE * (len(wal.image) // MB),
    "ones": lambda wal: b"\xff" * len(wal.image),
    "recycled": recycled,
}
"""What may be where there is no WAL (yet)."""


def offsets(wal: WalBuilder, some: random.Random, count: int) -> list[int]:
    """Where to break it off: in records, and about where they and pages begin and end."""
    result = []
    for _ in range(count):
        record = some.choice(wal.records)
        at = some.choice(
            [
                some.randrange(wal.start, wal.lsn + 2 * PAGE),
                some.choice([record.start, record.last]) + some.randint(-30, 30),
                some.randint(record.start, record.last),
                (record.start + PAGE) // PAGE * PAGE + some.randint(-9, 60),
            ]
        )
        result.append(min(max(at - wal.start, 0), len(wal.image)))
    return result


examples = settings(deadline=None, derandomize=True, max_examples=50)
randoms = st.integers(0, 2**32).map(random.Random)


@examples
@given(wals())
def test_all_of_it_is_walked_over(wal: WalBuilder) -> None:
    scanner = scan(wal)
    assert scanner.end == wal.end_of(1 << 64) == wal.lsn
    assert scanner.last_record == (wal.records[-1].start if wal.records else None)


@examples
@given(wals(), randoms)
def test_the_end_is_that_of_the_last_whole_record(wal: WalBuilder, some: random.Random) -> None:
    """Wherever the WAL breaks off, and whatever comes then."""
    wal.record(some.randint(24, 9999))
    image = wal.image
    for cut in offsets(wal, some, 4):
        for name, filling in FILLINGS.items():
            if name == "recycled" and wal.start + cut < wal.records[0].start + 24:
                continue  # nothing comes before the first record that its link could be held to
            broken = image[:cut] + filling(wal)[cut:]
            there = wal.start + first_difference(broken, image)
            assert scan(wal, broken).end == wal.end_of(there), (name, cut)
        # Of a file that is too short a page counts if all of it is there.
        there = wal.start + cut // PAGE * PAGE
        assert scan(wal, image[:cut]).end == wal.end_of(there), cut


@examples
@given(wals(), st.sampled_from(list(FILLINGS)), randoms)
def test_the_end_is_followed_as_bytes_appear(
    wal: WalBuilder, filling: str, some: random.Random
) -> None:
    """In steps of any size, in the middle of headers and of records, with looks in between."""
    wal.record(some.randint(24, 9999))
    image = wal.image
    visible = bytearray(FILLINGS[filling](wal))
    scanner = scanner_of(wal, visible)
    shown = 0
    # Nothing comes before the first record that the link of a recycled one could be held to.
    least = wal.records[0].start + 24 - wal.start if filling == "recycled" else 0
    for cut in [*sorted(offsets(wal, some, 30)), len(image)]:
        visible[shown:cut] = image[shown:cut]
        shown = cut
        there = wal.start + first_difference(visible, image)
        if cut < least:
            continue
        run(scanner, some.choice([1, PAGE, STEP]))
        assert scanner.end == wal.end_of(there), cut
    assert scanner.end == wal.lsn


@examples
@given(wals(), randoms)
def test_the_end_is_followed_as_pages_appear_in_any_order(
    wal: WalBuilder, some: random.Random
) -> None:
    wal.record(some.randint(24, 9999))
    image = wal.image
    visible = bytearray(recycled(wal))
    scanner = scanner_of(wal, visible)
    pages = list(range(0, len(image), PAGE))
    for first in range(0, len(pages), 16):
        group = pages[first : first + 16]
        some.shuffle(group)
        for offset in group:
            visible[offset : offset + PAGE] = image[offset : offset + PAGE]
            if some.random() < 0.2:
                there = wal.start + first_difference(visible, image)
                assert run(scanner).end == wal.end_of(there)
    assert run(scanner).end == wal.lsn


@examples
@given(wals(), st.integers(24, 30000), st.integers(3000, 40000), randoms)
def test_the_end_is_followed_where_wal_is_written_anew(
    wal: WalBuilder, size: int, lost_size: int, some: random.Random
) -> None:
    """A record is begun and never finished, and then there is another in its place: so it was
    before PostgreSQL wrote records that say so, and so it is in a directory put back."""
    lost, other = wal.copy(seed=1), wal.copy(seed=2)
    lost.record(lost_size)
    other.record(size)
    other.records_to(other.lsn + 3 * PAGE, 200)
    length = max(len(lost.image), len(other.image))
    before, after = (one.image.ljust(length, b"\0") for one in (lost, other))
    begun = some.randrange(lost.records[-1].start, lost.records[-1].last) - wal.start
    visible = bytearray(before[:begun].ljust(length, b"\0"))
    scanner = run(scanner_of(wal, visible))
    assert scanner.end == wal.lsn
    shown = wal.lsn - wal.start
    if some.random() < 0.5:
        visible[shown:] = bytes(length - shown)  # first it is taken back
        assert run(scanner).end == wal.lsn
    for cut in [*sorted(offsets(other, some, 20)), length]:
        cut = max(cut, shown)
        visible[shown:cut] = after[shown:cut]
        shown = cut
        there = other.start + first_difference(visible, after)
        assert run(scanner).end == other.end_of(there), cut
    assert scanner.end == other.lsn


# --- One thing at a time -------------------------------------------------------------------------


class Disk:
    """WAL that changes under a scanner."""

    def __init__(self, wal: WalBuilder) -> None:
        self.wal = wal
        self.image = bytearray(wal.image)
        self.scanner = scanner_of(wal, self.image)

    def put(self, lsn: int, data: bytes) -> Disk:
        offset = lsn - self.wal.start
        self.image[offset : offset + len(data)] = data
        return self

    def flip(self, lsn: int) -> Disk:
        return self.put(lsn, bytes([self.image[lsn - self.wal.start] ^ 0x10]))

    def show(self, wal: WalBuilder, start: int, end: int) -> Disk:
        """Have between these LSNs what is in ``wal``."""
        return self.put(start, wal.image[start - wal.start : end - wal.start])

    def run(self) -> Scanner:
        return run(self.scanner)


def small(major: int = 18, size: int = MB) -> WalBuilder:
    """A few pages of records of which every second one goes on in the next page."""
    wal = WalBuilder(major=major, size=size)
    wal.records_to(wal.start + 6 * PAGE, 6000)
    return wal


def stopped(disk: Disk) -> tuple[int, str]:
    scanner = disk.run()
    return scanner.end, scanner.reason


NAME = "000000010000000000000001"


def test_wal_of_another_version_is_none() -> None:
    wal = small()
    page = wal.start + 2 * PAGE
    assert stopped(Disk(wal).put(page, b"\x10\xd1")) == (
        wal.end_of(page),
        f"invalid magic number D110 in WAL segment {NAME}, LSN {format_lsn(page)}",
    )


@pytest.mark.parametrize(
    ("major", "info"), [(18, 0x0010), (18, 0x8001), (18, 0x0003), (19, 0x0009), (19, 0x0003)]
)
def test_info_bits_have_to_be_known_and_right(major: int, info: int) -> None:
    wal = small(major)
    page = wal.start + 2 * PAGE
    assert stopped(Disk(wal).put(page + 2, struct.pack("<H", info))) == (
        wal.end_of(page),
        f"invalid info bits {info:04X} in WAL segment {NAME}, LSN {format_lsn(page)}",
    )


def test_a_segment_begins_with_a_long_header() -> None:
    wal = small()
    assert stopped(Disk(wal).put(wal.start + 2, b"\x00\x00")) == (
        wal.start,
        f"invalid info bits 0000 in WAL segment {NAME}, LSN 0/100000",
    )


def test_pages_say_where_they_are() -> None:
    wal = small()
    page = wal.start + 3 * PAGE
    assert stopped(Disk(wal).put(page + 8, struct.pack("<Q", 0x7000_2000))) == (
        wal.end_of(page),
        f"unexpected pageaddr 0/70002000 in WAL segment {NAME}, LSN {format_lsn(page)}",
    )


def test_pages_are_of_the_right_timeline() -> None:
    wal = small()
    page = wal.start + 3 * PAGE
    assert stopped(Disk(wal).put(page + 4, struct.pack("<I", 2))) == (
        wal.end_of(page),
        f"unexpected timeline ID 2 (should be 1) in WAL segment {NAME}, LSN {format_lsn(page)}",
    )


def test_pages_of_an_earlier_timeline_end_where_it_was_left() -> None:
    child = small().fork(2)
    child.records_to(child.lsn + 3 * PAGE, 5000)
    page = child.start + 7 * PAGE
    name = "000000020000000000000001"
    assert stopped(Disk(child).put(page + 4, struct.pack("<I", 1))) == (
        child.end_of(page),
        f"unexpected timeline ID 1 (should be 2) in WAL segment {name}, LSN {format_lsn(page)}",
    )


def test_without_a_history_timelines_only_go_up() -> None:
    child = small().fork(2)
    child.records_to(child.lsn + 3 * PAGE, 5000)
    history = History(2)
    image = bytearray(child.image)
    identity = Identity(SYSTEM, MB, FORMATS[0xD118])
    read = reader(image, child.start, MB)
    assert run(Scanner(identity, history, child.start, read)).end == child.lsn
    page = child.start + 8 * PAGE
    image[8 * PAGE + 4] = 1
    scanner = run(Scanner(identity, history, child.start, read))
    assert scanner.end == child.end_of(page)
    assert scanner.reason == (
        "out-of-sequence timeline ID 1 (after 2) in WAL segment 000000020000000000000001, "
        f"LSN {format_lsn(page)}"
    )


def test_wal_of_another_cluster_is_none() -> None:
    wal = small()
    assert stopped(Disk(wal).put(wal.start + 24, struct.pack("<Q", 17))) == (
        wal.start,
        "WAL file is from different database system: WAL file database system identifier is 17, "
        f"expected {SYSTEM}, in WAL segment {NAME}, LSN 0/100000",
    )


@pytest.mark.parametrize(("offset", "value"), [(32, 2 * MB), (36, 4096)])
def test_sizes_have_to_be_those_of_the_cluster(offset: int, value: int) -> None:
    wal = small()
    assert stopped(Disk(wal).put(wal.start + offset, struct.pack("<I", value))) == (
        wal.start,
        f"incorrect segment size or page size in WAL segment {NAME}, LSN 0/100000",
    )


@pytest.mark.parametrize("length", [0, 1, 23])
def test_a_record_has_at_least_a_header(length: int) -> None:
    wal = small()
    at = wal.records[2]
    assert stopped(Disk(wal).put(at.start, struct.pack("<I", length))) == (
        at.start,
        f"invalid record length at {format_lsn(at.start)}: expected at least 24, got {length}",
    )


def test_every_record_names_the_one_before() -> None:
    for index in range(1, 6):
        wal = small()
        at = wal.records[index]
        disk = Disk(wal)
        data = wal.image[at.start - wal.start :][: at.last - at.start]
        if at.start // PAGE == (at.last - 1) // PAGE:
            record = make_record(0x123458, data[24:], rmid=10, info=0, xid=9)
            disk.put(at.start, record)
        else:
            disk.put(at.start + 8, struct.pack("<Q", 0x123458))
        before = wal.records[index - 1].end
        assert stopped(disk) == (
            before,
            f"record with incorrect prev-link 0/123458 at {format_lsn(at.start)}",
        )


def test_the_first_record_names_one_that_is_before_it() -> None:
    wal = small()
    first = wal.records[0]
    assert stopped(Disk(wal).put(first.start + 8, struct.pack("<Q", first.start))) == (
        wal.start,
        f"record with incorrect prev-link {format_lsn(first.start)} at {format_lsn(first.start)}",
    )


def test_a_flipped_bit_is_found_wherever_it_is() -> None:
    wal = small()
    for index, record in enumerate(wal.records):
        before = wal.records[index - 1].end if index else wal.start
        for lsn in (record.start + 16, record.start + 20, record.start + 24, record.last - 1):
            if (lsn % PAGE) < SHORT_SIZE:
                continue
            assert stopped(Disk(wal).flip(lsn)) == (
                before,
                "incorrect resource manager data checksum in record at " + format_lsn(record.start),
            )


def test_the_parts_of_a_record_have_to_fit() -> None:
    wal = small()
    record = next(r for r in wal.records if r.start // PAGE != (r.last - 1) // PAGE)
    page = record.start // PAGE * PAGE + PAGE
    before = wal.end_of(record.start)
    assert stopped(Disk(wal).put(page + 2, b"\x04\x00")) == (
        before,
        f"there is no contrecord flag at {format_lsn(page)}",
    )
    missing = record.last - page - SHORT_SIZE
    assert stopped(Disk(wal).put(page + 16, struct.pack("<I", missing + 8))) == (
        before,
        f"invalid contrecord length {missing + 8} (expected {missing}) at {format_lsn(page)}",
    )


def test_a_page_that_goes_on_with_nothing_is_wrong() -> None:
    wal = WalBuilder()
    wal.fill_to(wal.start + 2 * PAGE)
    wal.record(100)
    page = wal.start + 2 * PAGE
    disk = Disk(wal).put(page, wal.header(page, flags=1, rem_len=40))
    assert stopped(disk) == (page, f"unexpected contrecord flag at {format_lsn(page)}")


def test_a_file_that_is_not_there_or_too_short_is_told() -> None:
    wal = small()
    assert scan(wal, b"").reason == (
        f"could not read from WAL segment {NAME}, LSN 0/100000, offset 0: read 0 of 8192"
    )
    short = scan(wal, wal.image[: PAGE * 3 + 100])
    assert short.end == wal.end_of(wal.start + 3 * PAGE)
    assert short.reason == (
        f"could not read from WAL segment {NAME}, LSN 0/106000, offset 24576: read 100 of 8192"
    )


def test_a_walk_begins_behind_the_record_that_is_under_way() -> None:
    """Also if that one ends only some segments later, or just where a page ends."""
    for last in (3 * MB + 4000, 3 * MB + PAGE, 4 * MB, 5 * MB + 72):
        wal = WalBuilder()
        wal.records_to(wal.start + MB - 5 * PAGE, 1000)
        wal.fill_to(last)
        wal.record(300)
        wal.records_to(wal.lsn + 2 * PAGE)
        for start in range(2 * MB, last, MB):
            scanner = Scanner(
                Identity(SYSTEM, MB, FORMATS[0xD118]),
                History(1),
                start,
                reader(wal.image, wal.start, MB),
            )
            assert run(scanner).end == wal.lsn, (last, start)
            assert scanner.last_record == wal.records[-1].start


def test_a_walk_begins_in_a_record_that_is_given_up() -> None:
    """What is known of it must not be taken for the next record that goes on in another page."""
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 5 * PAGE, 1000)
    wal.abandon(4 * MB, pages=200)
    wal.record(9000)
    damaged = wal.record(9000)
    image = bytearray(wal.image)
    scanner = Scanner(
        Identity(SYSTEM, MB, FORMATS[0xD118]), History(1), 2 * MB, reader(image, wal.start, MB)
    )
    assert run(scanner).end == wal.lsn
    image[damaged.last - 1 - wal.start] ^= 1
    scanner = Scanner(
        Identity(SYSTEM, MB, FORMATS[0xD118]), History(1), 2 * MB, reader(image, wal.start, MB)
    )
    assert run(scanner).end == damaged.start


@pytest.mark.parametrize("major", [13, 18, 19])
@pytest.mark.parametrize("pages", [1, 2, 5])
def test_a_record_that_is_given_up_is_passed_over(major: int, pages: int) -> None:
    wal = WalBuilder(major=major)
    wal.records_to(wal.start + 3 * PAGE + 999, 700)
    before = wal.lsn
    marker = wal.abandon((pages + 3) * PAGE, pages)
    wal.records_to(marker.end + 3 * PAGE, 900)
    assert scan(wal).end == wal.lsn
    # Seen unfinished first, and then given up.
    disk = Disk(wal).put(marker.start // PAGE * PAGE, bytes(9 * PAGE))
    assert disk.run().end == before
    disk.show(wal, marker.start // PAGE * PAGE, marker.start + 10)
    assert disk.run().end == before
    disk.show(wal, marker.start, wal.lsn)
    assert disk.run().end == wal.lsn


def test_the_mark_of_a_record_given_up_is_another_bit_in_19() -> None:
    """What it was before 19 is no flag there, and what it is in 19 meant nothing before."""
    for major, flags in ((18, 0x0004), (19, 0x0008)):
        wal = WalBuilder(major=major)
        wal.records_to(wal.start + 3 * PAGE + 999, 700)
        before = wal.lsn
        page = wal.abandon(5 * PAGE).start // PAGE * PAGE
        disk = Disk(wal).put(page + 2, struct.pack("<H", flags))
        assert disk.run().end == before


def test_behind_a_switch_everything_has_to_be_zeros_up_to_the_next_segment() -> None:
    wal = small()
    switch = wal.switch()
    disk = Disk(wal)
    rest = bytes(len(wal.image) - (switch.end - wal.start))
    disk.put(switch.end, GARBAGE[: len(rest)])
    assert disk.run().end == switch.end
    assert "no zeros behind the XLOG_SWITCH record" in disk.scanner.reason
    # The zeros come page by page.
    for lsn in range(switch.end, wal.lsn, 50_000):
        disk.put(lsn, rest[:50_000][: wal.lsn - lsn])
        assert disk.run().end == (switch.end if lsn + 50_000 < wal.lsn else wal.lsn)
    wal.record(5000)
    after = Disk(wal)
    assert after.run().end == wal.lsn == after.scanner.end


def test_one_byte_in_the_zeros_is_too_many() -> None:
    for at in (0, 1, PAGE, 90 * PAGE + 5):
        wal = small()
        switch = wal.switch()
        lsn = min(switch.end + at, wal.lsn - 1)
        disk = Disk(wal).put(lsn, b"\x01")
        assert disk.run().end == switch.end
        disk.put(lsn, b"\x00")
        assert disk.run().end == wal.lsn


@pytest.mark.parametrize("before", [0, 8, 16, 24, 32])
@pytest.mark.parametrize("pages", [1, MB // PAGE - 6])
def test_a_switch_where_a_page_or_a_segment_ends(before: int, pages: int) -> None:
    """The record itself may end there, or go on behind it."""
    wal = small()
    end = wal.lsn - wal.lsn % PAGE + pages * PAGE
    wal.fill_to(end - before)
    switch = wal.switch()
    assert wal.lsn % MB == 0
    wal.record(400)
    wal.records_to(wal.lsn + PAGE)
    disk = Disk(wal)
    assert disk.run().end == wal.lsn
    # It is the switch that leads there.
    assert stopped(Disk(wal).flip(switch.start + 4))[0] == wal.end_of(switch.start)


def test_a_header_is_split_over_pages() -> None:
    """Only the length is sure to be in the page where the record begins."""
    for left in (8, 16):
        wal = WalBuilder()
        wal.fill_to(wal.start + 2 * PAGE - left)
        record = wal.record(5000)
        assert record.start % PAGE == PAGE - left
        wal.record(100)
        disk = Disk(wal)
        assert disk.run().end == wal.lsn
        for lsn in (record.start + 4, record.start + left + SHORT_SIZE, record.last - 1):
            end, reason = stopped(Disk(wal).flip(lsn))
            assert end == record.start
            assert format_lsn(record.start) in reason


def test_a_record_goes_on_over_segments() -> None:
    wal = small()
    record = wal.record(3 * MB + 777)
    wal.record(100)
    disk = Disk(wal)
    assert disk.run().end == wal.lsn
    for lsn in range(record.start + 30000, record.last, 300_007):
        assert stopped(Disk(wal).flip(lsn))[0] == record.start
    # Segment by segment.
    disk = Disk(wal).put(wal.start + MB, bytes(len(wal.image) - MB))
    for end in range(wal.start + MB, wal.start + len(wal.image), MB):
        assert disk.run().end == record.start
        disk.show(wal, end, end + MB)
    assert disk.run().end == wal.lsn


def test_a_long_record_is_read_once_as_it_comes() -> None:
    """Not from its start at each look, for then a large one would never be done."""
    wal = WalBuilder()
    wal.record(4 * MB)
    image = wal.image
    shown = 0
    count = 0

    def read(lsn: int, size: int) -> bytes:
        nonlocal count
        offset = lsn - wal.start
        data = image[offset : min(offset + size, shown, (lsn // MB + 1) * MB - wal.start)]
        count += len(data)
        return data

    scanner = scanner_of(wal, read=read)
    while shown < len(image):
        shown += 4 * PAGE
        run(scanner)
    assert scanner.end == wal.lsn
    assert count < 20 * len(image)


def test_a_walk_is_done_in_slices() -> None:
    wal = small()
    wal.records_to(wal.start + 50 * PAGE, 300)
    scanner = scanner_of(wal)
    position = scanner.position
    slices = 0
    while scanner.advance(PAGE):
        assert position < scanner.position <= position + 17 * PAGE
        position = scanner.position
        slices += 1
    assert slices >= 3
    assert scanner.end == wal.lsn


@pytest.mark.parametrize("size", [MB, 2 * MB, 64 * MB])
def test_segments_are_of_any_size(size: int) -> None:
    wal = small(size=size)
    wal.fill_to(wal.start + size - 100 * PAGE + 800)
    wal.records_to(wal.start + size + 5 * PAGE, 5000)
    assert scan(wal).end == wal.lsn


# --- Real PostgreSQL -----------------------------------------------------------------------------


def found_end(wal_dir: Path) -> tuple[int, int]:
    """The timeline and the end that we find there, from the oldest segment on."""
    found = survey(wal_dir)
    assert found is not None
    segments = Segments(wal_dir, found.identity)
    size = found.identity.segment_size

    def read(lsn: int, count: int) -> bytes:
        return segments.read(found.history.file_tli(lsn, size), lsn, count)

    end = run(Scanner(found.identity, found.history, found.first_lsn, read)).end
    segments.close()
    return found.history.tli, end


def assert_same_end(server: Cluster, tli: int) -> None:
    """That we find what the server says, as soon as it says the same before and after."""
    answers = []
    for _ in range(20):
        before, found, after = flushed(server), found_end(server.wal_dir), flushed(server)
        answers.append((before, found, after))
        if found == (tli, before) and before == after:
            return
    raise AssertionError(answers)


def flushed(server: Cluster) -> int:
    return lsn_to_int(server.sql("SELECT pg_current_wal_flush_lsn()"))


def write_some(server: Cluster) -> None:
    """Write what pgbench writes, large records, and a segment left before its end."""
    server.pgbench("-n", "-t", "50")
    server.sql(
        "SELECT count(pg_logical_emit_message(false, 'test', repeat('x', 3000000 + i * 1000)))"
        " FROM generate_series(1, 2) i;"
        "SELECT pg_switch_wal();"
        "SELECT pg_logical_emit_message(true, 'test', repeat('y', 2500001))"
    )
    server.pgbench("-n", "-t", "50")


@pytest.mark.parametrize("megabytes", [1, 16])
@pytest.mark.parametrize("installation", installations(), ids=lambda found: f"pg{found.major}")
def test_the_end_is_where_postgres_has_it(installation: Installation, megabytes: int) -> None:
    """On a primary that is quiet, before and behind a switch, and on the timeline after it."""
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=megabytes)
        # Nothing writes WAL but us.
        quiet: dict[str, str | int] = {
            "autovacuum": "off",
            "checkpoint_timeout": "1h",
            "max_wal_size": "4GB",
            "wal_writer_delay": "10ms",
            "bgwriter_lru_maxpages": 0,
        }
        primary.configure(**quiet)
        primary.start()
        primary.pgbench("-i", "-s", "1")
        write_some(primary)
        primary.sql("SELECT pg_switch_wal()")
        assert_same_end(primary, tli=1)
        standby = space.add(primary.backup_to(space.path / "standby", wal="fetch"))
        standby.make_standby("").start()
        write_some(primary)
        assert_same_end(primary, tli=1)
        primary.stop()
        standby.promote()
        standby.sql("CHECKPOINT")  # the one that its promotion began is done then
        assert_same_end(standby, tli=2)
        write_some(standby)
        assert_same_end(standby, tli=2)
