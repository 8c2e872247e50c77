"""What a directory that we receive into holds, one thing at a time."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.crashed import FIRST, START, Crashed, examined, spread
from tests.disk import Disk, files
from tests.test_scan import FILLINGS
from tests.test_segments import open_files
from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.timeline.history import Ancestor, History
from walproto.timeline.holding import examine
from walproto.wal.writer import SyncError


def test_where_there_is_no_wal_nothing_is_held(tmp_path: Path) -> None:
    assert examine(tmp_path) is None
    (tmp_path / "00000002.history").write_bytes(b"1\t0/2000000\tx\n")
    (tmp_path / "00000003.history").write_bytes(b"nonsense")
    assert examine(tmp_path) is None
    (tmp_path / "000000010000000000000002.partial").write_bytes(bytes(MB))
    (tmp_path / "000000010000000000000003").write_bytes(b"")
    assert examine(tmp_path) is None
    assert len(files(tmp_path)) == 4


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        examine(tmp_path / "nowhere")
    wal = WalBuilder(start=START)
    wal.record(1000)
    (path,) = wal.write_to(tmp_path)
    path.write_bytes(b"\x01\xd1" + path.read_bytes()[2:])
    with pytest.raises(ValueError, match="page magic D101"):
        examine(tmp_path)


def test_only_names_are_changed_and_nothing_is_left_open(tmp_path: Path) -> None:
    wal = spread()
    Crashed(tmp_path, wal, wal.lsn - 3000, FILLINGS["garbage"])
    before = files(tmp_path)
    examined(tmp_path)
    assert files(tmp_path) == before
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]


@pytest.mark.parametrize("filling", FILLINGS)
def test_a_last_page_that_is_torn_is_not_kept(tmp_path: Path, filling: str) -> None:
    """It goes on with the end of the last whole record, though the pages go on behind it."""
    wal = spread()
    last = wal.records[-1]
    there = (last.start + last.last) // 2
    holding = Crashed(tmp_path, wal, there, FILLINGS[filling]).assert_found()
    assert holding is not None
    assert holding.end == holding.valid_to == last.start < there


def test_the_newest_segment_begins_within_a_record_that_is_not_whole(tmp_path: Path) -> None:
    """All of that record would have to come again, but what came before this segment may be gone
    where it comes from, and is safe here."""
    wal = WalBuilder(start=START)
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    record = wal.record(9 * PAGE)
    holding = Crashed(tmp_path, wal, record.last - 1).assert_found()
    assert holding is not None
    assert (holding.valid_to, holding.end) == (record.start, wal.start + MB)
    # The last byte makes all the difference.
    holding = Crashed(tmp_path, wal, record.last).assert_found()
    assert holding is not None
    assert holding.valid_to == holding.end == record.end


def test_a_record_over_three_segments_that_is_not_whole(tmp_path: Path) -> None:
    wal = WalBuilder(start=START)
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    record = wal.record(2 * MB)
    for there in (START + 2 * MB + 5, START + 2 * MB + PAGE, record.last - 1):
        holding = Crashed(tmp_path, wal, there).assert_found()
        assert holding is not None
        assert (holding.valid_to, holding.end) == (record.start, START + 2 * MB)


def built(last: str = "") -> WalBuilder:
    """Segments whose first is ended by a record that ends with it, or by an XLOG_SWITCH, or by
    one that goes on in the next."""
    wal = WalBuilder(start=START)
    wal.records_to(wal.start + MB - 5 * PAGE, 3000)
    match last:
        case "record":
            wal.fill_to(wal.start + MB)
        case "switch":
            wal.switch()
        case _:
            wal.record(9 * PAGE)
    wal.records_to(wal.start + MB + 20 * PAGE, 3000)
    return wal


@pytest.mark.parametrize("last", ["record", "switch"])
def test_a_segment_that_is_whole_gets_its_name(tmp_path: Path, last: str) -> None:
    wal = built(last)
    Crashed(tmp_path, wal, wal.start + MB)
    assert list(files(tmp_path)) == [f"{FIRST}.partial"]
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == wal.start + MB
    assert files(tmp_path) == {FIRST: wal.segment(wal.start)}
    assert examined(tmp_path) == holding


@pytest.mark.parametrize("last", ["record", "switch"])
def test_a_segment_that_lacks_its_last_byte_does_not(tmp_path: Path, last: str) -> None:
    wal = built(last)
    Crashed(tmp_path, wal, wal.start + MB - 1, FILLINGS["ones"])
    before = files(tmp_path)
    holding = examined(tmp_path)
    end = wal.end_of(wal.start + MB - 1)
    assert holding.valid_to == holding.end == end < wal.start + MB
    assert files(tmp_path) == before


@pytest.mark.parametrize("lost", [0, 1, 500, 3 * PAGE])
def test_the_beginning_of_a_record_that_goes_on_in_the_next_segment_is_not_relied_on(
    tmp_path: Path, lost: int
) -> None:
    """Nobody can tell whether it is right; so a segment that ends with one, and had not got its
    name yet, does not get it."""
    wal = built()
    crashed = Crashed(tmp_path, wal, wal.start + MB)
    path = crashed.path(wal.start).with_suffix(".partial")
    path.write_bytes(wal.segment(wal.start)[: MB - lost] + bytes(lost))
    holding = examined(tmp_path)
    (over,) = (record for record in wal.records if record.start < wal.start + MB < record.end)
    assert holding.valid_to == holding.end == over.start
    assert list(files(tmp_path)) == [path.name]
    crashed.go_on(holding.end, 1)
    crashed.assert_complete()


def test_if_it_has_its_name_that_record_goes_on_in_the_next(tmp_path: Path) -> None:
    wal = built()
    Crashed(tmp_path, wal, wal.start + MB, is_named=True)
    holding = examined(tmp_path)
    (over,) = (record for record in wal.records if record.start < wal.start + MB < record.end)
    assert (holding.valid_to, holding.end) == (over.start, wal.start + MB)


@pytest.mark.parametrize("last", ["record", "switch", "over"])
def test_the_next_segment_has_only_just_been_begun(tmp_path: Path, last: str) -> None:
    """Its space is there, and nothing else yet."""
    wal = built(last)
    crashed = Crashed(tmp_path, wal, wal.start + MB, is_named=True)
    crashed.path(wal.start + MB).with_suffix(".partial").write_bytes(bytes(MB))
    holding = examined(tmp_path)
    assert holding.end == wal.start + MB
    crashed.go_on(holding.end, 1)
    crashed.assert_complete()


@pytest.mark.parametrize("filling", FILLINGS)
def test_a_segment_may_have_its_name_and_not_be_full(tmp_path: Path, filling: str) -> None:
    """As in a copy of a server's own pg_wal."""
    wal = built()
    there = wal.start + MB + 15 * PAGE
    crashed = Crashed(tmp_path, wal, there, FILLINGS[filling], is_named=True)
    holding = crashed.assert_found()
    assert holding is not None
    assert holding.valid_to == holding.end == wal.end_of(there)
    assert crashed.path(there).exists()
    crashed.go_on(holding.end, 1)
    crashed.assert_complete()


def test_a_segment_that_is_too_short(tmp_path: Path) -> None:
    wal = built()
    crashed = Crashed(tmp_path, wal, wal.lsn)
    path = crashed.path(wal.lsn).with_suffix(".partial")
    path.write_bytes(path.read_bytes()[: 15 * PAGE + 99])
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == wal.end_of(wal.start + MB + 15 * PAGE)
    crashed.go_on(holding.end, 1)
    crashed.assert_complete()


def test_zeros_behind_a_switch_count_when_they_are_all_there(tmp_path: Path) -> None:
    wal = built("switch")
    switch = [record for record in wal.records if record.last < wal.start + MB][-1]
    Crashed(tmp_path, wal, switch.last, FILLINGS["garbage"])
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == switch.end
    Crashed(tmp_path, wal, switch.last, FILLINGS["zeros"])
    assert examined(tmp_path).end == wal.start + MB


def test_a_piece_is_lost_of_the_record_that_the_newest_segment_begins_within(
    tmp_path: Path,
) -> None:
    """Records behind it are right, but this one has to come again."""
    wal = built()
    for lost in (50, PAGE + 50, 4 * PAGE - 20):
        crashed = Crashed(tmp_path, wal, wal.lsn)
        path = crashed.path(wal.lsn).with_suffix(".partial")
        contents = path.read_bytes()
        path.write_bytes(contents[:lost] + bytes(20) + contents[lost + 20 :])
        holding = examined(tmp_path)
        assert (holding.valid_to, holding.end) == (wal.lsn, wal.start + MB)
        crashed.go_on(holding.end, 1)
        crashed.assert_complete()
        for made in tmp_path.iterdir():
            made.unlink()


def test_the_record_that_the_first_segment_begins_within_cannot_be_checked(tmp_path: Path) -> None:
    wal = built()
    crashed = Crashed(tmp_path, wal, wal.lsn)
    crashed.path(wal.start).unlink()
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == wal.lsn


def test_a_record_of_which_only_the_end_is_there_is_none(tmp_path: Path) -> None:
    wal = built()
    crashed = Crashed(tmp_path, wal, wal.records[-1].last)
    (over,) = (record for record in wal.records if record.start < crashed.newest < record.end)
    path = crashed.path(crashed.newest).with_suffix(".partial")
    path.write_bytes(path.read_bytes()[: over.end - crashed.newest].ljust(MB, b"\0"))
    assert examined(tmp_path).end == over.end
    crashed.path(wal.start).unlink()
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == crashed.newest


def test_a_piece_is_lost_of_the_record_that_an_older_segment_begins_within(tmp_path: Path) -> None:
    """That was on disk, and got lost later: it is nothing that would have to come again."""
    wal = built()
    wal.records_to(wal.start + 2 * MB - 5 * PAGE, 3000)
    over = wal.record(9 * PAGE)
    crashed = Crashed(tmp_path, wal, over.last)
    with open(crashed.path(wal.start + MB), "r+b") as file:
        file.seek(PAGE + 50)
        file.write(bytes(20))
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == over.end


def test_a_whole_segment_within_a_single_record(tmp_path: Path) -> None:
    wal = WalBuilder(start=START)
    wal.record(3 * MB)
    path = tmp_path / wal.segment_name(START + MB)
    path.write_bytes(wal.segment(START + MB))
    assert examined(tmp_path).end == START + 2 * MB
    path.rename(path.with_suffix(".partial"))
    holding = examined(tmp_path)
    assert (holding.valid_to, holding.end) == (START + MB, START + MB)


def test_damage_before_the_newest_segment_is_no_concern(tmp_path: Path) -> None:
    wal = built("record")
    crashed = Crashed(tmp_path, wal, wal.lsn)
    crashed.path(wal.start).write_bytes(bytes(MB))
    assert examined(tmp_path).end == wal.lsn
    crashed.path(wal.start).unlink()
    assert examined(tmp_path).end == wal.lsn


# --- Timelines -------------------------------------------------------------------------------


def forked() -> tuple[WalBuilder, WalBuilder]:
    parent = WalBuilder(start=START)
    parent.records_to(parent.start + MB + 40 * PAGE, 3000)
    child = parent.fork(2)
    child.records_to(child.lsn + MB, 3000)
    return parent, child


def test_the_newest_timeline_counts(tmp_path: Path) -> None:
    parent, child = forked()
    Crashed(tmp_path, parent, parent.lsn)
    (tmp_path / child.name).write_bytes(child.history_contents)
    holding = examined(tmp_path)
    assert holding.history == History(1)
    assert holding.valid_to == holding.end == parent.lsn
    holding_of_child = Crashed(tmp_path, child, child.lsn - 5000).assert_found()
    assert holding_of_child is not None
    assert holding_of_child.history == History(2, (Ancestor(1, parent.lsn, 2),))
    assert holding_of_child.end == child.end_of(child.lsn - 5000)


def test_a_timeline_of_which_there_is_not_even_all_that_it_has_in_common(tmp_path: Path) -> None:
    """It goes on in the new one's file, which has to become whole all the same."""
    parent, child = forked()
    Crashed(tmp_path, parent, parent.lsn)
    there = parent.start + MB + 20 * PAGE
    crashed = Crashed(tmp_path, child, there)
    holding = crashed.assert_found()
    assert holding is not None
    assert holding.history.tli == 2
    assert holding.end == child.end_of(there) < parent.lsn
    crashed.go_on(holding.end, 2)
    assert crashed.path(there).read_bytes() == child.segment(there)


# --- On disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_named", [True, False])
def test_what_is_held_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    wal = built("record")
    Crashed(tmp_path, wal, wal.start + MB, is_named=is_named)
    disk = Disk(tmp_path, monkeypatch)
    examined(tmp_path)
    calls = [call for call in disk.calls if not call.startswith("open ")]
    partial = f"{FIRST}.partial"
    expected = [f"fsync {FIRST}"] if is_named else [f"fsync {partial}", f"rename {partial}"]
    assert calls == [*expected, "fsync ."]


@pytest.mark.parametrize("call", ["fsync 0", "fsync ."])
def test_what_cannot_be_brought_to_disk_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    wal = built()
    Crashed(tmp_path, wal, wal.lsn)
    Disk(tmp_path, monkeypatch).failing[call] = errno.EIO
    with pytest.raises(SyncError, match="could not fsync file"):
        examine(tmp_path)


def test_a_gap_that_was_filled_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that somebody else has put there, over the end of a timeline, are all there."""
    _, child = forked()
    child.records_to(child.lsn + 2 * MB, 3000)
    crashed = Crashed(tmp_path, child, child.lsn)
    holding = examined(tmp_path)
    between = range(START, crashed.newest, MB)
    assert len(between) == 4
    for lsn in between:
        path = crashed.path(lsn)
        for suffix in (".partial", ".gz"):
            other = path.rename(path.with_suffix(suffix))
            assert not holding.joins(START + 5000)
            assert holding.joins(lsn + MB)
            other.rename(path)
    disk = Disk(tmp_path, monkeypatch)
    assert holding.joins(START + 5000)
    assert [f"fsync {crashed.path(lsn).name}" in disk.calls for lsn in between] == [True] * 4
    disk.failing["fsync 0"] = errno.EIO
    with pytest.raises(SyncError):
        holding.joins(START + 5000)


def test_wal_that_does_not_go_on_from_what_is_before_it(tmp_path: Path) -> None:
    """It is right in itself, but of a server that was put back to an earlier state."""
    wal = WalBuilder(start=START)
    wal.records_to(wal.start + 2 * MB - 5000, 3000)
    wal.switch()
    wal.write_to(tmp_path)
    border = wal.start + 2 * MB
    other = WalBuilder(start=border, prev=border - 4000, seed=1)
    other.records_to(border + MB // 2, 3000)
    other.write_to(tmp_path, partial=True)
    holding = examined(tmp_path)
    assert holding.valid_to == holding.end == border
