"""A proposer that recovers receives all WAL that is there, committed or not, and then an end.

It is what walproposer.c does in WalProposerRecovery: libpq with `application_name` set, then
START_REPLICATION with a timeline; it takes WAL until the server has sent CopyDone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.neon_trees import Setting, Tree, setting_of
from tests.pageserver import Receiver, Standby
from tests.postgres import installations
from tests.relays import seeded
from tests.wal_decoder import PAGE, SEGMENT, Decoder

COMMAND = "START_REPLICATION {} TIMELINE 1"


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with setting_of(installations()[0]) as made:
        yield made


def proposer_of(setting: Setting, tree: Tree) -> Receiver:
    """With the connection string that walproposer.c makes, as libpq sends it."""
    return Receiver(
        setting.sender.port,
        f"-c ztimelineid={tree.ids.timeline_id} ztenantid={tree.ids.tenant_id}",
        database="replication",
        application_name="wal_proposer_recovery",
    )


def check_all_arrives(setting: Setting, proposer: Receiver, start: int, end: int) -> None:
    """All WAL from `start` to `end`, and then the end of the stream, behind which the connection
    is as good as before."""
    proposer.begin(start, COMMAND)
    proposer.take_all()
    assert (proposer.lsn, proposer.furthest_end) == (end, end if start < end else 0)
    assert bytes(proposer.wal) == setting.wal.read(start, end)
    proposer.send(b"c")
    assert proposer.rows() == []  # nothing follows that would be another PostgreSQL timeline
    ((system, timeline, *_),) = proposer.query("IDENTIFY_SYSTEM")
    assert (system, timeline) == (str(setting.wal.system_id), "1")


def test_the_uncommitted_tail_arrives_and_then_the_end(setting: Setting) -> None:
    chance, wal = seeded(), setting.wal
    commit_lsn = chance.randrange(wal.start, wal.end)
    starts = [
        wal.first,
        wal.start,
        commit_lsn,
        *(chance.randrange(wal.start, wal.end) for _ in range(3)),
        chance.choice(range(wal.start - wal.start % PAGE + PAGE, wal.end, PAGE)),
        chance.choice(range(wal.start - wal.start % SEGMENT + SEGMENT, wal.end, SEGMENT)),
        wal.end - 1,
        wal.end,
    ]
    tree = setting.tree(commit_lsn)
    for start in starts:
        with proposer_of(setting, tree) as proposer:
            check_all_arrives(setting, proposer, start, wal.end)


def test_it_is_wal_to_the_last_record(setting: Setting) -> None:
    """Decoded, and with the whole tail uncommitted; twice over one connection."""
    wal, tree = setting.wal, setting.tree(0)
    with proposer_of(setting, tree) as proposer:
        for _ in range(2):
            check_all_arrives(setting, proposer, wal.start, wal.end)
            decoder = Decoder(wal.start)
            decoder.feed(bytes(proposer.wal))
            assert decoder.records == wal.records
            assert decoder.end == wal.end


@pytest.mark.parametrize("more", [0, 1, PAGE, SEGMENT // 2])
def test_a_tail_that_was_cut_within_a_record(setting: Setting, more: int) -> None:
    """What is behind the last whole record is no WAL that anybody could use: it is not sent, or it
    is as it was written."""
    wal = setting.wal
    before, record = max(pairwise(wal.records), key=lambda pair: pair[1].size)
    shown = record.lsn + more
    tree = setting.tree(wal.start, shown)
    with proposer_of(setting, tree) as proposer:
        proposer.begin(wal.start, COMMAND)
        proposer.take_all()
        assert before.end <= proposer.lsn <= shown
        assert bytes(proposer.wal) == wal.read(wal.start, proposer.lsn)


def test_others_get_what_is_committed_at_the_same_time(setting: Setting) -> None:
    chance, wal = seeded(), setting.wal
    commit_lsn = chance.randrange(wal.start + 1, wal.end)
    tree = setting.tree(commit_lsn)
    with (
        setting.pageserver(tree) as pageserver,
        Standby(setting.sender.port, tree.options, application_name="standby") as standby,
        proposer_of(setting, tree) as proposer,
    ):
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        standby.begin(wal.start, COMMAND)
        check_all_arrives(setting, proposer, wal.start, wal.end)
        for one in (pageserver, standby):
            one.take_to(commit_lsn)
        assert pageserver.take() == "question"
        assert standby.furthest_end == pageserver.furthest_end == commit_lsn
        assert standby.wal == pageserver.wal == wal.read(wal.start, commit_lsn)


def test_wal_that_is_being_written_meanwhile(setting: Setting) -> None:
    """The end is that of a record that is there, and never before where it was the last time."""
    wal = setting.wal
    ends = {record.end for record in wal.records}
    shown = [record.end for record in wal.records[5000::5000]]
    tree = setting.tree(0, shown[0])
    before = shown[0]
    for lsn in shown:
        wal.put(tree.directory, lsn)
        with proposer_of(setting, tree) as proposer:
            proposer.begin(wal.start, COMMAND)
            proposer.take_all()
            assert bytes(proposer.wal) == wal.read(wal.start, proposer.lsn)
            assert proposer.lsn in ends
            assert before <= proposer.lsn <= lsn
            before = proposer.lsn


def test_wal_that_is_damaged_is_not_sent(setting: Setting) -> None:
    """A byte in the tail is another: what is before it arrives, and nothing of what is behind."""
    chance, wal, tree = seeded(), setting.wal, setting.tree(0)
    begun = wal.end - wal.end % SEGMENT
    record = chance.choice([record for record in wal.records if record.lsn >= begun])
    lsn = record.lsn + chance.randrange(8)  # these are on one page, and no padding
    path = tree.directory / f"{wal.name(lsn)}.partial"
    contents = bytearray(path.read_bytes())
    contents[lsn % SEGMENT] ^= 0xFF
    path.write_bytes(contents)
    with proposer_of(setting, tree) as proposer:
        proposer.begin(wal.start, COMMAND)
        proposer.take_all()
        assert proposer.lsn <= lsn
        assert bytes(proposer.wal) == wal.read(wal.start, proposer.lsn)
