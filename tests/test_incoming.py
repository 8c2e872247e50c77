"""WAL as it comes in: all that is right is let through, byte for byte, however it is cut; nothing
of a page that is wrong is."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_scan import wals
from tests.wal_builder import LONG, LONG_SIZE, MAGIC, MB, PAGE, SHORT_SIZE, WalBuilder
from walproto.timeline.history import parse_history
from walproto.wal.headers import InvalidWal
from walproto.wal.incoming import IncomingWal
from walproto.wal.pages import FORMATS, Identity

examples = settings(deadline=None, derandomize=True, max_examples=50)


def identity_of(wal: WalBuilder) -> Identity:
    return Identity(wal.system, wal.size, FORMATS[MAGIC[wal.major]])


def incoming_of(wal: WalBuilder, lsn: int | None = None) -> IncomingWal:
    """What takes the WAL from its start, whose format it is to learn, or from ``lsn``."""
    return IncomingWal(
        wal.system,
        wal.size,
        None if lsn is None else identity_of(wal),
        parse_history(wal.tli, wal.history_contents),
        wal.start if lsn is None else lsn,
    )


class Taken:
    """What an IncomingWal let through of what it was given."""

    def __init__(self, incoming: IncomingWal) -> None:
        self.incoming = incoming
        self.data = bytearray()
        self._begin = incoming.lsn

    def give(self, data: bytes, sizes: Iterable[int]) -> None:
        """Give it ``data`` in pieces of these sizes, over and over."""
        offset = 0
        for size in itertools.cycle(sizes):
            piece = memoryview(data)[offset : offset + size]
            before = self.incoming.lsn
            self.data += self.incoming.take(before, piece)
            offset += len(piece)
            assert self.incoming.lsn == before + len(piece)
            held = self.incoming.lsn - self._begin - len(self.data)
            assert 0 <= held < LONG_SIZE
            if offset == len(data):
                break

    def give_wrong(self, data: bytes, sizes: Iterable[int]) -> str:
        """The same, and why it is refused."""
        with pytest.raises(InvalidWal) as caught:
            self.give(data, sizes)
        return str(caught.value)


cuts = st.lists(
    st.one_of(
        st.integers(1, 50),
        st.integers(PAGE - 50, PAGE + 50),
        st.integers(1, 300_000),
        st.sampled_from([SHORT_SIZE, LONG_SIZE, PAGE, 16 * PAGE]),
    ),
    max_size=8,
).map(lambda sizes: [*sizes, 100_000])
"""Sizes of pieces, over and over; one at least is large, so that it does not take for ever."""


# --- What is right ---------------------------------------------------------------------------


@examples
@given(wals(), cuts)
def test_all_of_it_is_let_through(wal: WalBuilder, sizes: list[int]) -> None:
    """To where it ends, and then on to the end of the segment, which it may be ended with."""
    taken = Taken(incoming_of(wal))
    written = wal.lsn - wal.start
    taken.give(wal.image[:written], sizes)
    assert wal.image[:written].startswith(taken.data)
    taken.give(wal.image[written:], sizes)
    assert taken.data == wal.image
    assert taken.incoming.lsn == wal.start + len(wal.image)


@pytest.mark.parametrize("major", MAGIC)
@pytest.mark.parametrize("size", [MB, 2 * MB, 16 * MB])
def test_the_format_is_learned_from_the_first_page(major: int, size: int) -> None:
    wal = WalBuilder(major=major, size=size, start=3 * size)
    wal.records_to(wal.start + size - 5 * PAGE, 100_000)
    wal.records_to(wal.start + size + 3 * PAGE, 3000)
    taken = Taken(incoming_of(wal))
    assert taken.incoming.identity is None
    taken.give(wal.image[: LONG_SIZE - 1], [7])
    assert not taken.data
    assert taken.incoming.identity is None
    taken.give(wal.image[LONG_SIZE - 1 : LONG_SIZE], [1])
    assert taken.data == wal.image[:LONG_SIZE]
    assert taken.incoming.identity == identity_of(wal)
    taken.give(wal.image[LONG_SIZE : wal.lsn - wal.start], [100_001])
    assert taken.data == wal.image[: wal.lsn - wal.start]


def test_byte_by_byte_no_more_is_held_back_than_headers_that_are_not_whole() -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 2 * PAGE, 3000)
    wal.record(3 * PAGE)
    wal.records_to(wal.start + MB + 2 * PAGE, 300)
    begin = wal.start + MB - 3 * PAGE
    coming = memoryview(wal.image)[begin - wal.start : wal.lsn - wal.start]
    taken = Taken(incoming_of(wal, begin))
    for lsn in range(begin, wal.lsn):
        taken.data += taken.incoming.take(lsn, coming[lsn - begin : lsn - begin + 1])
        there = lsn + 1
        header = SHORT_SIZE if there // PAGE * PAGE % MB else LONG_SIZE
        expected = there - there % PAGE if there % PAGE < header else there
        assert len(taken.data) == expected - begin, hex(lsn)
    assert taken.data == coming


@pytest.mark.parametrize("size", [1, 7, SHORT_SIZE, PAGE - 1])
def test_a_record_is_followed_by_zeros_to_the_end_of_the_segment(size: int) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 4 * PAGE, 3000)
    wal.switch()
    wal.record(1000)
    begin = wal.start + MB - 5 * PAGE
    taken = Taken(incoming_of(wal, begin))
    taken.give(wal.image[begin - wal.start : wal.lsn - wal.start], [size])
    assert taken.data == wal.image[begin - wal.start : wal.lsn - wal.start]


@examples
@given(wals(), st.integers(0, 2**32).map(random.Random), cuts)
def test_it_may_begin_with_any_page(wal: WalBuilder, some: random.Random, sizes: list[int]) -> None:
    """Those within the zeros behind an XLOG_SWITCH are no exception."""
    wal.record(some.randint(24, 9999))
    begin = some.randrange(wal.start, wal.start + len(wal.image), PAGE)
    taken = Taken(incoming_of(wal, begin))
    taken.give(wal.image[begin - wal.start :], sizes)
    assert taken.data == wal.image[begin - wal.start :]


def test_nothing_is_nothing() -> None:
    wal = WalBuilder()
    wal.record(1000)
    taken = Taken(incoming_of(wal))
    for end in (0, 3, LONG_SIZE, 100):
        taken.give(wal.image[taken.incoming.lsn - wal.start : end], [100])
        before = taken.incoming.lsn
        assert len(taken.incoming.take(before, memoryview(b""))) == 0
        assert taken.incoming.lsn == before
    assert taken.data == wal.image[:100]


def test_a_timeline_goes_on_within_a_segment_of_another() -> None:
    parent = WalBuilder()
    parent.records_to(parent.start + MB + 3 * PAGE + 2000, 3000)
    child = parent.fork(2)
    child.records_to(child.lsn + MB, 3000)
    last = parent.lsn - parent.lsn % PAGE
    # The page within which it goes on has been begun by the one before.
    tlis = [struct.unpack_from("<I", child.image, at + 4)[0] for at in range(MB, 2 * MB, PAGE)]
    assert tlis.index(2) == (last - parent.start - MB) // PAGE + 1
    for begin in (child.start + MB, last, last + PAGE):
        taken = Taken(incoming_of(child, begin))
        taken.give(child.image[begin - child.start : child.lsn - child.start], [5000])
        assert taken.data == child.image[begin - child.start : child.lsn - child.start]
    # The other way round neither is the other's.
    parent.records_to(child.lsn, 3000)
    for mine, other in ((parent, child), (child, parent)):
        taken = Taken(incoming_of(mine, child.start + MB))
        message = taken.give_wrong(other.image[MB : other.lsn - other.start], [5000])
        assert message.startswith(f"unexpected timeline ID {other.tli} (should be {mine.tli}) ")
        # The first page that is the other's for certain is the first with its own header.
        assert other.image[MB : last + PAGE - other.start].startswith(taken.data)


# --- What is wrong ---------------------------------------------------------------------------


def test_wal_for_elsewhere_is_refused() -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + 3 * PAGE, 500)
    for held in (0, 10):
        begin = 2 * PAGE + held
        taken = Taken(incoming_of(wal))
        taken.give(wal.image[:begin], [PAGE])
        at = wal.start + begin
        for lsn in (at - 1, at + 1, at - begin, at + MB, 0):
            piece = memoryview(wal.image)[lsn - wal.start :][:100] if lsn else memoryview(b"")
            with pytest.raises(InvalidWal) as caught:
                taken.incoming.take(lsn, piece)
            assert str(caught.value) == f"WAL came for 0/{lsn:X} instead of 0/{at:X}"
        # That was no harm to what comes next.
        taken.give(wal.image[begin : 3 * PAGE], [PAGE])
        assert taken.data == wal.image[: 3 * PAGE]


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (0, "H", 0xD101, "is no first page of a segment of PostgreSQL 13 to 19: its page magic is"),
        (0, "H", 0, "is no first page of a segment of PostgreSQL 13 to 19: its page magic is 0000"),
        (2, "H", 0x0004, "is no first page of a segment"),
        (2, "H", 0x8006, "invalid info bits 8006"),
        (4, "I", 2, "unexpected timeline ID 2 (should be 1)"),
        (4, "I", 0, "unexpected timeline ID 0 (should be 1)"),
        (8, "Q", 5 * MB, "unexpected pageaddr 0/500000"),
        (8, "Q", MB + PAGE, "is no first page of a segment"),
        (24, "Q", 99, "WAL came of system 99 with segments of 1048576 bytes, instead of system"),
        (32, "I", 16 * MB, "is no first page of a segment"),
        (32, "I", MB // 2, "is no first page of a segment"),
        (36, "I", 32768, "is no first page of a segment"),
    ],
)
def test_a_first_page_that_is_not_the_clusters_is_refused(
    offset: int, kind: str, value: int, message: str
) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + 3 * PAGE, 500)
    wrong = bytearray(wal.image)
    struct.pack_into(f"<{kind}", wrong, offset, value)
    for sizes in ([1], [MB], [LONG_SIZE]):
        taken = Taken(incoming_of(wal))
        assert message in taken.give_wrong(bytes(wrong), sizes)
        assert taken.data == b""


def test_a_first_page_with_other_segments_is_refused() -> None:
    wal = WalBuilder(size=2 * MB, start=4 * MB)
    wal.record(1000)
    line = parse_history(wal.tli, wal.history_contents)
    taken = Taken(IncomingWal(wal.system, MB, None, line, wal.start))
    assert "with segments of 2097152 bytes, instead of system" in taken.give_wrong(
        wal.image, [PAGE]
    )
    assert taken.data == b""


def is_noticed(wal: WalBuilder, address: int, offset: int, page: bytes | bytearray) -> bool:
    """Whether a byte of the header at ``address`` that was changed at ``offset`` makes it wrong.

    What is not checked is how much is missing of a record, and what fills the header up.
    """
    if 16 <= offset < SHORT_SIZE:
        return False
    if offset not in (2, 3):
        return True
    (info,) = struct.unpack_from("<H", page, 2)
    known = 0x000F if wal.major < 19 else 0x0007
    return bool(info & ~known) or bool(info & LONG) != (address % wal.size == 0)


@examples
@given(wals(), st.integers(0, 2**32).map(random.Random), cuts)
def test_no_byte_of_a_page_with_a_wrong_header_is_let_through(
    wal: WalBuilder, some: random.Random, sizes: list[int]
) -> None:
    wal.records_to(wal.lsn + 3 * PAGE, 1000)
    image = wal.image
    pages = [at for at in range(0, wal.lsn - wal.start - SHORT_SIZE, PAGE) if image[at]]
    for _ in range(8):
        at = some.choice([some.choice(pages), *(at for at in pages if at % MB == 0)])
        size = SHORT_SIZE if at % MB else LONG_SIZE
        offset = some.randrange(size)
        wrong = bytearray(image)
        wrong[at + offset] ^= some.randint(1, 255)
        taken = Taken(incoming_of(wal, wal.start))
        if is_noticed(wal, wal.start + at, offset, wrong[at : at + size]):
            taken.give_wrong(bytes(wrong), sizes)
            assert image[:at].startswith(taken.data), (at, offset)
        else:
            taken.give(bytes(wrong), sizes)
            assert taken.data == wrong, (at, offset)


@pytest.mark.parametrize("major", [major for major in MAGIC if major != 18])
def test_a_version_is_learned_once(major: int) -> None:
    """A server may be upgraded, but its WAL does not go on then."""
    wal, other = (WalBuilder(major=number) for number in (18, major))
    for one in (wal, other):
        one.records_to(one.start + 3 * PAGE, 500)
    taken = Taken(incoming_of(wal))
    message = taken.give_wrong(wal.image[: 2 * PAGE] + other.image[2 * PAGE :], [1000])
    assert message.startswith(f"invalid magic number {MAGIC[major]:04X} in WAL segment ")
    assert wal.image[: 2 * PAGE].startswith(taken.data)


@pytest.mark.parametrize("size", [1, 1000, MB])
def test_a_page_of_zeros_is_not_followed_by_anything_else(size: int) -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB + 3 * PAGE, 3000)
    begin = wal.start + MB - 6 * PAGE
    image = wal.image[MB - 6 * PAGE : MB + 2 * PAGE]
    zeros = image[: 2 * PAGE] + bytes(4 * PAGE) + image[6 * PAGE :]
    taken = Taken(incoming_of(wal, begin))
    taken.give(zeros, [size])
    assert taken.data == zeros
    for at in (2 * PAGE + 5, 3 * PAGE - 1, 3 * PAGE, 4 * PAGE + 99, 6 * PAGE - 1):
        # One byte is enough: in the page's header, in its contents, or pages later.
        wrong = zeros[:at] + b"\1" + zeros[at + 1 :]
        taken = Taken(incoming_of(wal, begin))
        assert taken.give_wrong(wrong, [size]) == (
            "WAL came behind a page without a header, in WAL segment "
            f"000000010000000000000001, LSN 0/{begin + at - at % PAGE:X}"
        )
        assert zeros[:at].startswith(taken.data)


def test_zeros_end_with_their_segment() -> None:
    wal = WalBuilder()
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    wal.switch()
    begin = wal.start + MB - 6 * PAGE
    coming = wal.image[MB - 6 * PAGE : MB] + bytes(PAGE)
    for size in (1, 1000, MB):
        taken = Taken(incoming_of(wal, begin))
        message = taken.give_wrong(coming, [size])
        assert message.startswith("invalid magic number 0000 in WAL segment 00000001000000000000")
        assert coming[: 6 * PAGE].startswith(taken.data)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.sampled_from([0, 5, LONG_SIZE, PAGE, PAGE + 9, 3 * PAGE]),
    st.booleans(),
    st.lists(st.binary(max_size=200), min_size=1),
    st.sampled_from([0, 1, LONG_SIZE, PAGE]),
    st.booleans(),
)
def test_on_garbage_nothing_but_invalid_wal_is_raised(
    good: int, learns: bool, pieces: list[bytes], zeros: int, has_header: bool
) -> None:
    """Be it at the start, or behind some WAL, or some zeros, or a header."""
    wal = WalBuilder(tli=1)
    wal.records_to(wal.start + 4 * PAGE, 500)
    incoming = incoming_of(wal, None if learns else wal.start)
    incoming.take(wal.start, memoryview(wal.image)[:good])
    for piece in (bytes(zeros), wal.header(incoming.lsn) if has_header else b"", *pieces * 30):
        try:
            taken = incoming.take(incoming.lsn, memoryview(piece))
        except InvalidWal:
            return
        assert len(taken) <= len(piece) + LONG_SIZE
