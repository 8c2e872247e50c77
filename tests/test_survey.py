"""The first look at a directory: whose WAL it is, and where it ends, whatever else lies there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.wal_builder import MAGIC, MB, PAGE, SYSTEM, WalBuilder
from walproto.timeline.history import Ancestor, History
from walproto.timeline.survey import Survey, load_history, newer_timelines, survey
from walproto.wal.pages import FORMATS, Identity


def built(
    segments: int = 3,
    *,
    major: int = 18,
    size: int = MB,
    system: int = SYSTEM,
    tli: int = 1,
    start: int = 0,
) -> WalBuilder:
    wal = WalBuilder(major=major, size=size, system=system, tli=tli, start=start)
    wal.records_to(wal.start + segments * size - 300_000, 100_000)
    wal.fill_to(wal.start + segments * size - PAGE)
    return wal


def surveyed(directory: Path) -> Survey:
    found = survey(directory)
    assert found is not None
    return found


def forked() -> tuple[WalBuilder, WalBuilder]:
    """A timeline of three segments, and one that branched off in the last."""
    parent = built()
    child = parent.fork(2)
    child.records_to(child.lsn + 2 * MB, 100_000)
    return parent, child


def test_an_empty_directory_holds_nothing_yet(tmp_path: Path) -> None:
    assert survey(tmp_path) is None


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        survey(tmp_path / "nowhere")


@pytest.mark.parametrize("major", MAGIC)
@pytest.mark.parametrize("size", [MB, 16 * MB])
def test_a_cluster_is_recognised(tmp_path: Path, major: int, size: int) -> None:
    wal = built(2, major=major, size=size, start=7 * size)
    wal.write_to(tmp_path)
    assert surveyed(tmp_path) == Survey(
        Identity(SYSTEM, size, FORMATS[MAGIC[major]]), History(1), 7 * size, 8 * size, ()
    )


def test_a_single_partial_segment_will_do(tmp_path: Path) -> None:
    built(1).write_to(tmp_path, partial=True)
    found = surveyed(tmp_path)
    assert (found.first_lsn, found.last_lsn, found.notes) == (MB, MB, ())


def test_the_newest_timeline_is_served_with_its_ancestors(tmp_path: Path) -> None:
    parent, child = forked()
    parent.write_to(tmp_path)
    child.write_to(tmp_path)
    found = surveyed(tmp_path)
    assert found.history == History(2, (Ancestor(1, parent.lsn, 2),))
    assert (found.first_lsn, found.notes) == (MB, ())
    assert found.last_lsn == child.start + len(child.image) - MB


def test_a_timeline_without_its_history_stands_alone_and_that_is_told(tmp_path: Path) -> None:
    parent, child = forked()
    parent.write_to(tmp_path)
    child.write_to(tmp_path)
    (tmp_path / "00000002.history").unlink()
    found = surveyed(tmp_path)
    assert found.history == History(2)
    assert found.first_lsn == parent.lsn // MB * MB
    assert found.notes == (
        "00000002.history is missing, so timeline 2 is served without those before it: copy it "
        "there from the server's pg_wal",
    )


def test_a_timeline_with_a_damaged_history_is_left_alone(tmp_path: Path) -> None:
    parent, child = forked()
    parent.write_to(tmp_path)
    child.write_to(tmp_path)
    (tmp_path / "00000002.history").write_bytes(b"\0" * 42)
    found = surveyed(tmp_path)
    assert found.history == History(1)
    assert found.last_lsn == 3 * MB
    (note,) = found.notes
    assert note.startswith("timeline 2 is left alone: syntax error in history file")


def test_a_history_without_wal_is_no_timeline_yet(tmp_path: Path) -> None:
    built().write_to(tmp_path)
    (tmp_path / "00000002.history").write_bytes(b"1\t0/300100\tx\n")
    assert surveyed(tmp_path).history == History(1)


def test_names_prove_nothing(tmp_path: Path) -> None:
    """A primary keeps old segments under future names, and some it has only filled with zeros."""
    wal = built()
    wal.write_to(tmp_path)
    (tmp_path / "000000010000000000000004").write_bytes(wal.segment(MB))
    (tmp_path / "000000010000000000000005").write_bytes(bytes(MB))
    (tmp_path / "000000090000000000000006").write_bytes(wal.segment(2 * MB))
    (tmp_path / "000000020000000000000007").write_bytes(b"\xff" * 100)
    (tmp_path / "000000020000000000000008").write_bytes(b"")
    found = surveyed(tmp_path)
    assert (found.history, found.first_lsn, found.last_lsn) == (History(1), MB, 3 * MB)
    assert found.notes == ()


def test_only_recycled_segments_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "000000010000000000000009").write_bytes(built().segment(MB))
    assert survey(tmp_path) is None


def test_foreign_files_are_passed_over(tmp_path: Path) -> None:
    wal = built()
    wal.write_to(tmp_path)
    last = wal.segment(3 * MB)
    # Were one of these taken for a segment, it would be the newest.
    newer = built(1, start=9 * MB).segment(9 * MB)
    name = "000000010000000000000009"
    for foreign in (
        f"{name}.gz",
        f"{name}.lz4",
        f"{name}.tmp",
        f"{name}.00000028.backup",
        f"{name}.partial.gz",
        f"{name}\n",
        f" {name}",
        "00000001000000000000000a",
        f"{name}0",
        f"xlogtemp.{os.getpid()}",
        "RECOVERYXLOG",
    ):
        (tmp_path / foreign).write_bytes(newer)
    for directory in ("archive_status", "summaries", "00000001000000000000000A"):
        (tmp_path / directory).mkdir()
    (tmp_path / "archive_status" / f"{name}.done").touch()
    (tmp_path / "archive_status" / name).write_bytes(newer)
    (tmp_path / "00000001000000000000000B").symlink_to(tmp_path / "nowhere")
    found = surveyed(tmp_path)
    assert (found.last_lsn, found.notes) == (3 * MB, ())
    assert last == (tmp_path / wal.segment_name(found.last_lsn)).read_bytes()


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    elsewhere, linked = tmp_path / "elsewhere", tmp_path / "linked"
    elsewhere.mkdir()
    linked.mkdir()
    for path in built().write_to(elsewhere):
        (linked / path.name).symlink_to(path)
    assert surveyed(linked).last_lsn == 3 * MB


def test_names_that_the_segment_size_forbids_are_none(tmp_path: Path) -> None:
    """Of 16 MB there are 256 to every 4 GB, so no name ends in more than FF."""
    wal = built(1, size=16 * MB, start=0x1_0000_0000)
    (tmp_path / "000000010000000000000100").write_bytes(wal.segment(wal.start))
    assert survey(tmp_path) is None
    wal.write_to(tmp_path)
    assert surveyed(tmp_path).last_lsn == 0x1_0000_0000


def test_the_majority_decides_whose_it_is(tmp_path: Path) -> None:
    built().write_to(tmp_path)
    stray = built(1, system=99, start=8 * MB)
    stray.write_to(tmp_path)
    found = surveyed(tmp_path)
    assert found.identity.system_identifier == SYSTEM
    assert (found.first_lsn, found.last_lsn) == (MB, 3 * MB)
    assert found.notes == (
        "a segment of another cluster is left alone: timeline 1, segment 8, system 99",
    )


def test_a_stray_segment_of_a_higher_timeline_is_not_the_newest(tmp_path: Path) -> None:
    built().write_to(tmp_path)
    built(1, system=99, tli=7, start=8 * MB).write_to(tmp_path)
    found = surveyed(tmp_path)
    assert found.identity.system_identifier == SYSTEM
    assert (found.history, found.last_lsn) == (History(1), 3 * MB)


def test_another_segment_size_or_version_is_another_cluster(tmp_path: Path) -> None:
    """As pg_upgrade leaves them, which keeps the names going up and gives a new identifier."""
    built(2, major=17, system=5).write_to(tmp_path)
    built(4, major=18, start=3 * MB).write_to(tmp_path)
    found = surveyed(tmp_path)
    assert found.identity == Identity(SYSTEM, MB, FORMATS[MAGIC[18]])
    assert (found.last_lsn, found.notes) == (6 * MB, ())


def test_holes_do_not_matter(tmp_path: Path) -> None:
    wal = built(6)
    wal.write_to(tmp_path)
    for lsn in (2 * MB, 3 * MB, 5 * MB):
        (tmp_path / wal.segment_name(lsn)).unlink()
    found = surveyed(tmp_path)
    assert (found.first_lsn, found.last_lsn) == (MB, 6 * MB)


def test_the_newest_segment_of_a_switch_is_not_that_of_the_parent(tmp_path: Path) -> None:
    """The old primary went on for a while on the old timeline: more of it is there."""
    parent = built()
    at = parent.records[5]
    child = parent.fork(2, at)
    child.record(100)
    parent.write_to(tmp_path)
    child.write_to(tmp_path)
    found = surveyed(tmp_path)
    assert found.history == History(2, (Ancestor(1, at.end, 2),))
    assert found.last_lsn == at.end // MB * MB < 3 * MB


def test_files_that_go_while_we_look_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = built()
    wal.write_to(tmp_path)
    entries = os.listdir(tmp_path)
    monkeypatch.setattr(os, "listdir", lambda _: [*entries, "000000010000000000000009"])
    assert surveyed(tmp_path).last_lsn == 3 * MB


def test_histories_are_loaded(tmp_path: Path) -> None:
    assert load_history(tmp_path, 2) == History(2)
    (tmp_path / "00000002.history").write_bytes(b"1\t0/300100\tx\n")
    assert load_history(tmp_path, 2) == History(2, (Ancestor(1, 0x300100, 2),))
    (tmp_path / "00000002.history").write_bytes(b"1\t0/3001")
    assert load_history(tmp_path, 2).start_lsn == 0x3001
    (tmp_path / "00000002.history").write_bytes(b"1\t0")
    with pytest.raises(ValueError, match="invalid LSN"):
        load_history(tmp_path, 2)


def test_newer_timelines_are_listed_the_newest_first() -> None:
    entries = [
        *("00000001.history", "00000003.history", "0000000A.history", "00000004.history.tmp"),
        *("0000000b.history", "00000005.histor", "000000040000000000000001"),
    ]
    assert newer_timelines(entries, 1) == [10, 3]
    assert newer_timelines(entries, 3) == [10]
    assert newer_timelines(entries, 10) == []
