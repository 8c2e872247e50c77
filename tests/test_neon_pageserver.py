"""A pageserver follows a timeline of a data directory: up to the commit LSN, and never beyond it.

All of the WAL is on disk from the start, so nothing but the commit LSN in the control file holds it
back; that is moved in steps.  What arrives is compared byte for byte, and decoded on arrival.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Self

import pytest

from tests.neon_trees import RealWal, Setting, Tree, setting_of
from tests.pageserver import Gone, Pageserver, ServerError, StreamEnded
from tests.postgres import Installation, installations
from tests.relays import seeded
from tests.wal_decoder import PAGE, SEGMENT, Decoder, Record
from walproto.neon.control_file import write_control_file


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with setting_of(installations()[0]) as made:
        yield made


# -- Following -----------------------------------------------------------------------------------


def steps(wal: RealWal, chance: random.Random) -> list[int]:
    """Where commits stop: within records, what fills them up and headers, between records, at the
    borders of pages and of segments and close to them; the last one is the end."""
    pages = range(wal.start - wal.start % PAGE + PAGE, wal.end, PAGE)
    segments = range(wal.start - wal.start % SEGMENT + SEGMENT, wal.end, SEGMENT)
    within = [record.lsn + chance.randrange(1, record.size) for record in wal.records]
    chosen = {
        *(chance.choice(pages) for _ in range(3)),
        *(chance.choice(pages) + chance.randrange(1, 24) for _ in range(3)),
        *(chance.choice(pages) - chance.randrange(1, 24) for _ in range(3)),
        *chance.sample(within, 6),
        *(record.end - 1 for record in chance.sample(wal.records, 6)),
        *(record.lsn for record in chance.sample(wal.records, 6)),
        *chance.sample(segments, 2),
        *(lsn + chance.randrange(1, 40) for lsn in segments),
        *(lsn - chance.randrange(1, 40) for lsn in segments),
        *(chance.randrange(wal.start + 1, wal.end) for _ in range(4)),
        wal.middle,
    }
    return [*sorted(lsn for lsn in chosen if wal.start < lsn < wal.end), wal.end]


class Follower:
    """A pageserver that comes back each time that it was ended because it had all there was, and
    then begins where its last whole record has ended."""

    def __init__(self, setting: Setting, tree: Tree) -> None:
        self.setting = setting
        self.tree = tree
        self.ends = 0
        self._records: list[Record] = []
        self.pageserver = setting.pageserver(tree)
        self.system, self.tli, self.identified_lsn = self.pageserver.follow(setting.wal.start)

    @property
    def records(self) -> list[Record]:
        """All that it has decoded."""
        return self._records + self.pageserver.decoder.records

    def take(self) -> str:
        try:
            return self.pageserver.take()
        except StreamEnded:
            self.ends += 1
        self._records = self.records
        decoder = self.pageserver.decoder
        self.pageserver.close()
        self.pageserver = self.setting.pageserver(self.tree)
        self.pageserver.follow(decoder.end, decoder.zeros_to)
        return "end"

    def take_to(self, lsn: int) -> None:
        while self.pageserver.lsn < lsn:
            self.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.pageserver.close()


@pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: f"pg{installation.major}"
)
def test_it_follows_the_commit_lsn_and_never_sees_a_byte_beyond(installation: Installation) -> None:
    with setting_of(installation) as setting:
        chance, wal = seeded(), setting.wal
        commit_lsns = steps(wal, chance)
        pauses = chance.sample(commit_lsns, 3)
        tree = setting.tree(commit_lsns[0])
        with Follower(setting, tree) as follower:
            assert (follower.system, follower.tli) == (str(wal.system_id), 1)
            assert follower.identified_lsn == commit_lsns[0]
            for commit_lsn in commit_lsns:
                tree.commit(commit_lsn)
                follower.take_to(commit_lsn)
                setting.check(follower.pageserver, commit_lsn)
                if commit_lsn in pauses:
                    assert follower.take() != "wal"
                decoded = [record for record in wal.records if record.end <= commit_lsn]
                assert follower.records == decoded
            assert follower.records == wal.records
        print(f"{len(commit_lsns)} steps, {follower.ends} times ended meanwhile")


def test_two_timelines_do_not_mix(setting: Setting) -> None:
    """Each pageserver gets what is committed of its own timeline."""
    wal = setting.wal
    early, late = wal.middle - 300_000, wal.middle
    trees = [setting.tree(lsn) for lsn in (early, late)]
    with setting.pageserver(trees[0]) as one, setting.pageserver(trees[1]) as other:
        for pageserver, lsn in ((one, early), (other, late)):
            pageserver.is_slow = True
            pageserver.follow(wal.start)
            pageserver.take_to(lsn)
            setting.check(pageserver, lsn)
        trees[1].commit(wal.end)
        other.take_to(wal.end)
        setting.check(other, wal.end)
        assert one.take() == "question"
        setting.check(one, early)


def test_a_commit_lsn_that_goes_back_is_none(setting: Setting) -> None:
    wal = setting.wal
    lsn = wal.middle
    tree = setting.tree(lsn)
    with setting.pageserver(tree) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        pageserver.take_to(lsn)
        tree.commit(lsn - 100_000)
        assert pageserver.take() == "question"
        tree.commit(lsn + 100_000)
        pageserver.take_to(lsn + 100_000)
        setting.check(pageserver, lsn + 100_000)


def test_wal_that_is_written_while_it_streams(setting: Setting) -> None:
    """Segments and the commit LSN grow, the commit LSN ahead of the segments or behind them."""
    chance, wal = seeded(), setting.wal
    lsns = [*sorted(chance.choice(wal.records).lsn for _ in range(8)), wal.end]
    tree = setting.tree(wal.start, lsns[0])
    with setting.pageserver(tree) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        for lsn in lsns:
            changes = [
                lambda lsn=lsn: wal.put(tree.directory, lsn),
                lambda lsn=lsn: tree.commit(lsn),
            ]
            chance.shuffle(changes)
            for change in changes:
                change()
            pageserver.take_to(lsn)
            setting.check(pageserver, lsn)


# -- When nothing comes --------------------------------------------------------------------------


def test_it_is_asked_for_a_reply_when_nothing_comes(setting: Setting) -> None:
    """As long as it has not confirmed all that is committed, it may stay."""
    wal = setting.wal
    lsn = wal.middle
    tree = setting.tree(lsn)
    with setting.pageserver(tree) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        pageserver.take_to(lsn)
        for _ in range(2):
            assert pageserver.take() == "question"
            pageserver.tell(lsn - 1)
        tree.commit(wal.end)
        pageserver.take_to(wal.end)
        setting.check(pageserver, wal.end)
        assert pageserver.take() == "question"
        pageserver.is_slow = False
        pageserver.tell(wal.end)
        pageserver.expect_end()


@pytest.mark.parametrize("behind", [8, 500_000, 3 * SEGMENT])
def test_one_that_is_ahead_waits_until_the_commit_lsn_passes_it(
    setting: Setting, behind: int
) -> None:
    wal = setting.wal
    start = wal.records[-1000].lsn
    tree = setting.tree(start - behind)
    with setting.pageserver(tree) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(start)
        assert pageserver.take() == "question"
        tree.commit(start)
        assert pageserver.take() == "question"
        assert pageserver.lsn == start
        tree.commit(start + 9)
        pageserver.take_to(start + 9)
        tree.commit(wal.end)
        pageserver.take_to(wal.end)
        setting.check(pageserver, wal.end)


@pytest.mark.parametrize("all_of_it", [True, False], ids=["all", "a part"])
def test_it_is_ended_when_it_has_received_all_that_is_committed(
    setting: Setting, all_of_it: bool
) -> None:
    wal = setting.wal
    lsn = wal.end if all_of_it else wal.middle
    tree = setting.tree(lsn)
    for _ in range(2):  # the timeline that was suspended is there again when it is asked for
        with setting.pageserver(tree) as pageserver:
            pageserver.follow(wal.start)
            pageserver.take_to(lsn)
            pageserver.expect_end()
            setting.check(pageserver, lsn)
            setting.sender.expect(rf'{tree.ids}: "pageserver".* has ended streaming')
    tree.commit(wal.end)
    with setting.pageserver(tree) as pageserver:
        pageserver.follow(wal.start)
        pageserver.expect_end()
        setting.check(pageserver, wal.end)


def test_it_is_ended_when_nothing_is_committed_yet(setting: Setting) -> None:
    tree = setting.tree(0)
    with setting.pageserver(tree) as pageserver:
        pageserver.follow(setting.wal.start)
        pageserver.expect_end()
        assert not pageserver.wal


def test_the_segment_size_is_not_known_at_first(setting: Setting) -> None:
    """A proposer has yet to connect; replication begins when it has."""
    wal, tree = setting.wal, setting.no_tree()
    tree.directory.mkdir(parents=True)
    nothing = replace(
        wal.control(tree.ids, 0), wal_seg_size=0, system_id=0, pg_version=0, term_history=()
    )
    write_control_file(tree.control_file, nothing)
    with setting.pageserver(tree) as pageserver:
        pageserver.query("IDENTIFY_SYSTEM")
        pageserver.decoder = Decoder(wal.start)
        pageserver.ask(wal.start)
        for _ in range(2):
            setting.sender.expect(rf"{tree.ids.timeline_id}.* proposer")
        wal.put(tree.directory)
        tree.commit(wal.middle)
        pageserver.await_stream()
        pageserver.take_to(wal.middle)
        pageserver.expect_end()
        setting.check(pageserver, wal.middle)


def test_one_that_the_timeline_does_not_belong_to_any_more(setting: Setting) -> None:
    """Another one has come for it; the first is told so, also when it comes again."""
    wal, tree = setting.wal, setting.tree(setting.wal.middle)
    ids, port = tree.ids, setting.sender.port
    with setting.pageserver(tree) as first:
        first.is_slow = True
        first.follow(wal.start)
        first.take_to(wal.middle)
        assert first.take() == "question"
        with Pageserver(port, ids.tenant_id, ids.timeline_id, "host=another") as second:
            second.is_slow = True
            second.follow(wal.start)
            with pytest.raises(ServerError, match="belongs to another pageserver"):
                first.take_all()
            with pytest.raises(Gone):
                first.take()
            with setting.pageserver(tree) as again:
                again.is_slow = True
                again.follow(wal.start)
                with pytest.raises(ServerError, match="belongs to another pageserver"):
                    again.take_all()
            second.take_to(wal.middle)
            tree.commit(wal.end)
            second.take_to(wal.end)
            setting.check(second, wal.end)
