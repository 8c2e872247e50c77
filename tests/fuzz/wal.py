# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: WAL, as it lies in files and as it comes from a server.

An input builds WAL and then spoils it, for no change at random would get a checksum right.
"""

from __future__ import annotations

from tests.fuzz.target import Input, Target
from tests.wal_builder import MB, PAGE, SYSTEM, WalBuilder, reader
from walproto.lsn import PAGE_SIZE
from walproto.timeline.history import Ancestor, History, parse_history
from walproto.wal.headers import InvalidWal, check_header
from walproto.wal.incoming import IncomingWal
from walproto.wal.pages import FORMATS, LONG_HEADER, Identity, parse_identity
from walproto.wal.scan import Scanner

START = 3 * MB
MAX_RECORDS = 12


def built(source: Input) -> WalBuilder:
    """Some WAL: a major, then records and what else there may be in WAL."""
    major = 13 + source.number() % 7
    wal = WalBuilder(major=major, start=START, seed=1)
    for _ in range(source.number() % MAX_RECORDS):
        kind = source.number()
        size = source.number(2) % (4 * PAGE)
        if wal.lsn >= START + MB - 8 * PAGE:
            break
        match kind % 8:
            case 0:
                wal.switch()
            case 1:
                wal.abandon(PAGE + 100 + size, 1)
            case 2 if wal.lsn > START and wal.tli < 5:
                wal = wal.fork(wal.tli + 1)
            case 3:
                wal.fill_to(max(wal.lsn + 7 & ~7, START) + PAGE - wal.lsn % PAGE + PAGE)
            case _:
                wal.record(24 + size)
    return wal


def spoilt(source: Input, image: bytes) -> bytearray:
    """The WAL, bytes of it written over."""
    spoilt = bytearray(image)
    for _ in range(source.number() % 6):
        # Few places are worth it: headers of pages, and of records in the first one.
        page, offset = source.number() % 32, source.number(2) % PAGE
        data = source.take(source.number() % 64)
        at = page * PAGE + (offset % 64 if offset & 0x1000 else offset)
        if at + len(data) <= len(spoilt):
            spoilt[at : at + len(data)] = data
    return spoilt


def identity_of(wal: WalBuilder) -> Identity:
    wal_format = next(known for known in FORMATS.values() if known.major == wal.major)
    return Identity(SYSTEM, MB, wal_format)


def history_of(wal: WalBuilder) -> History:
    return parse_history(wal.tli, wal.history_contents)


# --- Records -------------------------------------------------------------------------------------


def check_scan(data: bytes) -> None:
    """The end of WAL is where it was built to be; spoilt WAL ends somewhere; and it does not matter
    whether it was all there at once or has grown."""
    source = Input(data)
    wal = built(source)
    image = wal.image
    identity, history = identity_of(wal), history_of(wal)
    there = START + source.number(3) % (len(image) + 1)
    before = START + source.number(3) % (there - START + 1)
    budget = 1 + 512 * source.number()
    wrong = spoilt(source, image[: there - START])
    filled = image[: there - START] + bytes(len(image) - (there - START))
    # Zeros cannot be told from what is not there.
    end = wal.end_of(START + len(image) - len(image[there - START :].lstrip(b"\0")))

    def walked(*images: bytes | bytearray) -> Scanner:
        """What a scanner finds when these are there, one after the other."""
        scanner = Scanner(identity, history, START, lambda lsn, size: read(lsn, size))
        for there_now in images:
            read = reader(there_now, START, MB)
            while scanner.advance(budget):
                pass
            assert START <= scanner.end <= START + len(there_now)
            assert scanner.reason.isprintable()
        return scanner

    assert walked(filled).end == end
    growing = image[: before - START] + bytes(len(image) - (before - START))
    assert walked(growing, filled).end == end
    once, grown = walked(wrong), walked(wrong[: before - START], wrong)
    assert (grown.end, grown.last_record) == (once.end, once.last_record)


# --- Pages ---------------------------------------------------------------------------------------


def check_headers(data: bytes) -> None:
    """A page's header is what it should be there, or it is said what is wrong."""
    header = data[16:].ljust(LONG_HEADER.size, b"\0")
    address = int.from_bytes(data[:8], "little") & ~(PAGE_SIZE - 1)
    lsn = int.from_bytes(data[8:16], "little")
    history = History(2, (Ancestor(1, lsn, 2),))
    found = parse_identity(header)
    identity = found[0] if found else Identity(SYSTEM, MB, FORMATS[0xD118])
    try:
        size = check_header(header, address, identity, history)
    except InvalidWal as error:
        assert str(error).isprintable()
    else:
        assert size == (24 if address % identity.segment_size else 40)
        assert int.from_bytes(header[8:16], "little") == address
        assert int.from_bytes(header[:2], "little") == identity.wal_format.xlp_magic


def _header_seeds() -> list[bytes]:
    found = []
    for major in (13, 18, 19):
        wal = WalBuilder(major=major, start=START)
        wal.record(3 * PAGE)
        for lsn in (START, START + PAGE):
            page = wal.image[lsn - START :][:40]
            found += [
                lsn.to_bytes(8, "little") + at.to_bytes(8, "little") + page for at in (0, 1 << 40)
            ]
    return found


# --- WAL that comes in ---------------------------------------------------------------------------


def check_incoming(data: bytes) -> None:
    """However what comes is cut, the same is taken of it, in the order in which it came, or it is
    refused."""
    source = Input(data)
    wal = built(source)
    flags = source.number()
    skipped = 0 if flags & 1 else PAGE * (source.number() % 8)
    sizes = [source.number(2) + 1 for _ in range(3)]
    length = source.number(3) % (24 * PAGE)
    image = bytes(spoilt(source, wal.image))[skipped:][:length]
    start = START + skipped
    identity = identity_of(wal) if skipped or flags & 2 else None

    def incoming() -> IncomingWal:
        return IncomingWal(SYSTEM, MB, identity, history_of(wal), start)

    pieces: list[bytes] = []
    position = 0
    while position < len(image):
        pieces.append(image[position : position + sizes[len(pieces) % 3]])
        position += len(pieces[-1])
    whole, cut = _taken(incoming(), start, [image]), _taken(incoming(), start, pieces)
    assert image.startswith(cut[0])
    assert whole[1] == cut[1]
    if not whole[1]:
        assert whole[0] == cut[0]
        assert len(image) - len(whole[0]) < LONG_HEADER.size
    try:
        incoming().take(start + 1 + flags, memoryview(image))
    except InvalidWal:
        return
    raise AssertionError("what came is taken for something else")


def _taken(incoming: IncomingWal, lsn: int, pieces: list[bytes]) -> tuple[bytes, bool]:
    """What is taken, and whether it ends with a refusal."""
    taken = b""
    for piece in pieces:
        try:
            taken += incoming.take(lsn, memoryview(piece))
        except InvalidWal as error:
            assert str(error).isprintable()
            return taken, True
        lsn += len(piece)
        assert incoming.lsn == lsn
    return taken, False


def _built_seeds() -> list[bytes]:
    """Each begins with WAL; what follows is read differently by each target."""
    kinds = [
        bytes([5, 3, 9, 0, 80, 9, 0, 200, 9, 1, 0]),  # plain records
        bytes([5, 4, 9, 0, 80, 9, 90, 0, 0, 0, 0, 9, 0, 80]),  # one over pages, a switch
        bytes([2, 4, 9, 0, 80, 1, 4, 0, 9, 1, 0, 9, 0, 9]),  # one that is given up
        bytes([6, 5, 9, 0, 80, 2, 0, 0, 9, 90, 0, 3, 0, 0, 9, 0, 1]),  # a timeline that forks
    ]
    rest = [
        bytes([0x0F, 0xFF, 0xFF, 0, 0, 0x20, 0, 1, 0]),
        bytes([0, 0x30, 0, 2, 1, 0x10, 8, 4, 1, 2, 3, 4, 0, 0, 100, 2, 9, 9, 0, 0x10, 0, 0, 50]),
        bytes([2, 0, 100, 0x20, 0, 0, 7, 1, 0x40, 0, 0]),
        bytes([0, 2, 0x20, 0, 0, 50, 0, 90, 1, 0, 0, 0]),
    ]
    return [kind + end for kind in kinds for end in rest]


TARGETS = (
    Target("scan", check_scan, _built_seeds, size=400),
    Target("headers", check_headers, _header_seeds, size=64),
    Target("incoming", check_incoming, _built_seeds, size=400),
)
