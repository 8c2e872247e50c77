# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: files that are read again after a crash, or that others have written."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

from crc32c import crc32c

from tests.fuzz.target import Target
from tests.slots_fakes import quick_directory
from tests.test_neon_control_file import golden
from tests.test_recorded import MAJORS, RECORDED
from tests.test_slot_file import WRITTEN
from walproto.lsn import format_lsn
from walproto.neon.control_file import ControlFileError, build_control, parse_control
from walproto.timeline.history import History, parse_history
from walproto.timeline.slot_file import DAMAGED, NAME, read_slots, write_slots

# --- The control file ----------------------------------------------------------------------------


def check_control_file(data: bytes) -> None:
    """A control file, be its checksum as it is or as it should be, written once more."""
    for contents in (data, data + struct.pack("<I", crc32c(data))):
        try:
            control = parse_control(contents)
        except ControlFileError as error:
            assert str(error).isprintable()
            continue
        again = build_control(control)
        assert again[:-4].lower() == contents[:-4].lower()  # the digits of the IDs, in either case
        assert parse_control(again) == control
        assert control.identity.wal_format.major >= 13


def _control_seeds() -> list[bytes]:
    return [
        golden(),
        *(each[:-4] for each in (golden(), golden(segment_size=0), golden(version=4))),
        golden(terms=3)[:-4],
        golden(peers=1 << 40)[:-4],
    ]


# --- A timeline's history ------------------------------------------------------------------------


def check_history(data: bytes) -> None:
    """A history is one that can be: every LSN belongs to one of its timelines, in their order."""
    tli, contents = int.from_bytes(data[:4], "little"), data[4:]
    try:
        history = parse_history(tli, contents)
    except ValueError:
        return
    assert history.tli == tli
    tlis = [*(ancestor.tli for ancestor in history.ancestors), tli]
    assert all(one < other for one, other in pairwise(tlis))
    assert tlis[0] >= (len(tlis) > 1)
    for ancestor, following in zip(history.ancestors, tlis[1:], strict=True):
        assert ancestor.next_tli == following
        assert history.ancestor(ancestor.tli) == ancestor
        assert history.up_to(ancestor.tli).tli == ancestor.tli
        assert 0 <= ancestor.switch_lsn < 1 << 64
        for address in (max(ancestor.switch_lsn - 1, 0), ancestor.switch_lsn):
            assert history.page_tli(address) in tlis
            assert history.file_tli(address, 1 << 24) in tlis
    assert history.page_tli(1 << 64) == tli
    assert history.common_end(history) == 1 << 64
    assert parse_history(tli, _history_contents(history)) == history


def _history_contents(history: History) -> bytes:
    return "".join(
        f"{ancestor.tli}\t{format_lsn(ancestor.switch_lsn)}\tno recovery target specified\n\n"
        for ancestor in history.ancestors
    ).encode()


def _history_seeds() -> list[bytes]:
    files = [
        file.read_bytes() for major in MAJORS for file in (RECORDED / str(major)).rglob("*.history")
    ]
    more = b"# a comment\n1\t0/3000000\tx\n\n 7 1/FF y\r\n8\t2/0\n"
    return [tli.to_bytes(4, "little") + each for each in [*files, more] for tli in (2, 9)]


# --- The file of slots ---------------------------------------------------------------------------


def check_slot_file(data: bytes) -> None:
    """A file of slots, be its checksums as they are or as they should be, written once more."""
    with quick_directory() as name:
        directory = Path(name)
        for contents in (data, _with_checksums(data)):
            (directory / NAME).write_bytes(contents)
            (directory / DAMAGED).unlink(missing_ok=True)
            found = read_slots(directory)
            if found.problems:
                assert (directory / DAMAGED).read_bytes() == contents
            assert all(problem.isprintable() for problem in found.problems)
            assert 0 <= found.removed_to < 1 << 64
            write_slots(directory, found.slots, found.removed_to)
            again = read_slots(directory)
            assert (again.slots, again.removed_to) == (found.slots, found.removed_to)
            assert not again.problems


def _with_checksums(data: bytes) -> bytes:
    """Each line's text, without what may stand before it, behind its checksum."""
    texts = [line[line.find(b"{") :] if b"{" in line else line for line in data.split(b"\n")]
    return b"".join(b"%08x %b\n" % (crc32c(each), each) for each in texts if each)


TARGETS = (
    Target("control-file", check_control_file, _control_seeds, size=1024),
    Target("history", check_history, _history_seeds, (b"\t0/3000000\t", b"#", b"\r", b"\x85")),
    Target(
        "slot-file",
        check_slot_file,
        lambda: [WRITTEN, *WRITTEN.splitlines(keepends=True)],
        (
            *(b'"name": ', b'"restart_lsn": "0/0"', b'"slots": ', b'"removed_to": "0/0"'),
            *(b'"xmin": ', b'"invalidated": ', b"null", b"1e400", b'"\\ud800"', b"[" * 20),
        ),
        size=2048,
    ),
)
