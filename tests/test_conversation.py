"""What is said to a server, from who it is to where it streams from, and what it may answer."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tests.upstream_fakes import Stored, Upstream, keepalive, told, wal_message
from tests.wal_builder import MB, PAGE, WalBuilder
from walproto.lsn import format_lsn
from walproto.timeline.holding import examine
from walproto.timeline.replicas import Replicas
from walproto.upstream.connection import Answer, UpstreamError
from walproto.upstream.conversation import Conversation, Refusal, UpstreamOptions
from walproto.wal.writer import SyncError

START = 16 * MB
IDENTIFY = ["IDENTIFY_SYSTEM", "SHOW wal_segment_size"]


def written(to: int = 5 * MB // 2, *, start: int = START, system: int | None = None) -> WalBuilder:
    """WAL of timeline 1, so many bytes of it."""
    wal = WalBuilder(start=start) if system is None else WalBuilder(start=start, system=system)
    wal.records_to(start + to, 700)
    return wal


def forked(wal: WalBuilder, tli: int, at: int, more: int = MB // 2) -> WalBuilder:
    """A timeline that branches off at the end of the first record that ends at ``at`` or behind."""
    record = next(record for record in wal.records if record.end >= at)
    child = wal.fork(tli, record)
    child.records_to(record.end + more, 900)
    return child


def start_at(lsn: int, tli: int = 1, slot: str = "") -> str:
    return f"START_REPLICATION {slot}PHYSICAL {format_lsn(lsn)} TIMELINE {tli}"


def put(directory: Path, wal: WalBuilder, upto: int) -> None:
    """The timeline's files, as they are when WAL up to ``upto`` has been received."""
    if wal.history:
        (directory / wal.name).write_bytes(wal.history_contents)
    segments = wal.segments()
    first = -(-wal.lsn // wal.size) * wal.size - len(segments) * wal.size
    for lsn, (name, contents) in zip(count(first, wal.size), segments.items(), strict=False):
        if upto >= lsn + wal.size:
            (directory / name).write_bytes(contents)
        elif upto > lsn:
            there = contents[: upto - lsn]
            (directory / f"{name}.partial").write_bytes(there + bytes(wal.size - len(there)))


class Talk:
    """Conversations with a server that has the WAL of ``wal``, for a directory."""

    def __init__(self, directory: Path, wal: WalBuilder, lsn: int | None = None) -> None:
        self.directory = directory
        self.clock = Clock()
        self.stored = Stored(directory, self.clock)
        self.store = self.stored.store
        self.upstream = Upstream(self.clock, wal, lsn)
        self.replicas = Replicas()
        self.options: dict[str, Any] = {}
        self.streams = 0
        self.outcome: list[Any] = []
        if (holding := examine(directory)) is not None:
            self.store.go_on_from(holding)

    def start(self) -> list[str]:
        """Begin a conversation; what the server is asked."""
        conversation = Conversation(
            self.upstream.connection,
            self.directory,
            self.store,
            self.replicas.oldest_xmins,
            UpstreamOptions(**self.options),
            self.clock,
            self.stored.threads,
            self._streaming,
        )
        self.stored.observer = conversation.progressed
        self.outcome = []
        ensureDeferred(conversation.hold()).addBoth(self.outcome.append)
        return self.asked()

    def asked(self) -> list[str]:
        """What the server was asked since the last time, once all has happened that does."""
        while self.stored.threads.work_all():
            self.clock.advance(0)
        asked, self.upstream.connection.asked = self.upstream.connection.asked, []
        return asked

    def stream(self, lsn: int | None = None) -> list[str]:
        """The server sends WAL; what it is asked then."""
        self.upstream.stream(lsn)
        return self.asked()

    def told(self) -> list[str]:
        return told(self.clock, self.upstream.connection.sent)

    @property
    def ended(self) -> Exception:
        """What the conversation ended with."""
        (failure,) = self.outcome
        assert isinstance(failure, Failure)
        error = failure.value
        assert isinstance(error, Exception)
        return error

    def again(self, wal: WalBuilder, lsn: int | None = None) -> list[str]:
        """The connection is lost; begin a conversation with a server that has this WAL."""
        self.upstream.connection.lose("it is gone")
        assert self.outcome
        slots = self.upstream.slots
        self.upstream = Upstream(self.clock, wal, lsn)
        self.upstream.slots = slots
        return self.start()

    def check_files(self, wal: WalBuilder) -> None:
        """That the timeline's files hold its WAL, from the first that is here on to the end."""
        segments = list(wal.segments().items())
        there = [any(self.directory.glob(f"{name}*")) for name, _ in segments]
        for name, contents in segments[there.index(True) :]:
            path = self.directory / name
            if not path.exists():
                path = path.with_suffix(".partial")
            assert path.read_bytes() == contents, name

    def close(self) -> None:
        self.upstream.connection.lose("the test is over")
        self.asked()
        ensureDeferred(self.store.stop())
        assert self.clock.getDelayedCalls() == []

    def _streaming(self) -> None:
        self.streams += 1


Begin = Callable[..., Talk]


@pytest.fixture
def begin(tmp_path: Path) -> Any:
    """Makes a Talk."""
    made: list[Talk] = []

    def make(wal: WalBuilder, lsn: int | None = None, **options: Any) -> Talk:
        made.append(Talk(tmp_path, wal, lsn))
        made[-1].options = options
        return made[-1]

    yield make
    for talk in made:
        talk.close()


# -- From where ----------------------------------------------------------------------------------


def test_an_empty_directory_begins_with_the_segment_that_is_written(begin: Begin) -> None:
    wal = written()
    talk = begin(wal)
    assert talk.start() == [*IDENTIFY, start_at(START + 2 * MB)]
    assert talk.told() == ["r 0/0 0/0 0/0 reply", "h 0:0 0:0"]
    assert talk.streams == 0  # it may still say that it has no such WAL
    assert talk.stream() == []
    assert talk.streams == 1
    end = format_lsn(wal.lsn)
    assert talk.told()[-1] == f"r {end} {end} 0/0"
    talk.check_files(wal)
    assert [path.name for path in talk.directory.iterdir()] == [
        wal.segment_name(wal.lsn) + ".partial"
    ]
    assert not talk.outcome


@pytest.mark.parametrize("start", [START, START + 1, START + MB + 12345, START + 2 * MB])
def test_an_empty_directory_begins_where_it_is_told_to(begin: Begin, start: int) -> None:
    wal = written()
    talk = begin(wal, start_lsn=start, slot="r1", create_slot=True)
    assert talk.start()[-1] == start_at(start - start % MB, slot='SLOT "r1" ')
    talk.stream()
    talk.check_files(wal)


def test_an_empty_directory_begins_with_what_the_slot_holds(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, slot="r1")
    talk.upstream.slots["r1"] = START + MB + 5000
    assert talk.start() == [
        *IDENTIFY,
        'READ_REPLICATION_SLOT "r1"',
        start_at(START + MB, slot='SLOT "r1" '),
    ]
    talk.told()
    talk.stream(START + MB + 4999)
    talk.stream(START + MB + 5000)
    flushes = [line.split()[2] for line in talk.told()]
    assert flushes[0] == "0/0"  # the slot must not be moved back
    assert set(flushes) == {"0/0", format_lsn(START + MB + 5000)}


def test_a_slot_that_holds_nothing_is_used_all_the_same(begin: Begin) -> None:
    talk = begin(written(), slot="r1")
    talk.upstream.slots["r1"] = None
    assert talk.start()[-1] == start_at(START + 2 * MB, slot='SLOT "r1" ')


def test_a_slot_that_is_missing_is_for_the_operator(begin: Begin) -> None:
    talk = begin(written(), slot="r1")
    assert talk.start() == [*IDENTIFY, 'READ_REPLICATION_SLOT "r1"']
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        'replication slot "r1" does not exist: create it, or have it created with '
        "--upstream-create-slot"
    )
    assert talk.ended.fence_lsn is None
    assert talk.streams == 0


def test_a_slot_is_created_when_that_is_asked_for(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, slot="r1", create_slot=True)
    read, create = 'READ_REPLICATION_SLOT "r1"', 'CREATE_REPLICATION_SLOT "r1" PHYSICAL RESERVE_WAL'
    start = start_at(START, slot='SLOT "r1" ')
    assert talk.start() == [*IDENTIFY, read, create, read, start]
    talk.stream()
    talk.check_files(wal)
    start = start_at(wal.lsn - wal.lsn % PAGE, slot='SLOT "r1" ')
    assert talk.again(wal) == [*IDENTIFY, read, start]


def test_a_server_that_cannot_tell_of_slots_is_not_asked(begin: Begin) -> None:
    """Before 15 there is no READ_REPLICATION_SLOT."""
    slot = 'SLOT "r1" '
    talk = begin(written(), slot="r1")
    talk.upstream.connection.major = 14
    assert talk.start() == [*IDENTIFY, start_at(START + 2 * MB, slot=slot)]
    assert isinstance(talk.ended, UpstreamError)
    assert (str(talk.ended), talk.ended.sqlstate) == (
        'replication slot "r1" does not exist',
        "42704",
    )
    talk.options["create_slot"] = True
    create = 'CREATE_REPLICATION_SLOT "r1" PHYSICAL RESERVE_WAL'
    for _ in range(2):  # the second time it is there
        talk.upstream = Upstream(talk.clock, talk.upstream.wal)
        talk.upstream.slots["r1"] = None
        talk.upstream.connection.major = 14
        assert talk.start() == [*IDENTIFY, create, start_at(START + 2 * MB, slot=slot)]
        talk.upstream.connection.lose("again")


def test_it_goes_on_from_what_is_here(begin: Begin, tmp_path: Path) -> None:
    """From the page in which it ends, whose beginning is compared and not written again."""
    wal = written()
    put(tmp_path, wal, START + MB + 100_000)
    end = wal.end_of(START + MB + 100_000)
    talk = begin(wal)
    assert talk.start() == [*IDENTIFY, start_at(end - end % PAGE)]
    assert talk.told() == [f"r {format_lsn(end)} {format_lsn(end)} 0/0 reply", "h 0:0 0:0"]
    talk.stream(end)
    assert talk.store.received_lsn == end
    talk.stream()
    talk.check_files(wal)


def test_it_goes_on_with_a_connection_after_another(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, start_lsn=START)
    talk.start()
    for lsn in (START + 10, START + 5000, START + MB - 20, START + MB, START + 2 * MB + 7):
        talk.stream(lsn)
        received = talk.store.received_lsn
        assert lsn - 40 < received <= lsn
        assert talk.again(wal)[-1] == start_at(received - received % PAGE)
    talk.stream()
    talk.check_files(wal)


def test_what_is_here_must_be_what_the_server_has(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    put(tmp_path, wal.copy(1), START + 300_000)
    (path,) = tmp_path.iterdir()
    end = wal.end_of(START + 300_000)
    talk = begin(written(to=MB // 2))
    other = bytearray(wal.image)
    other[end - START - 1] ^= 1
    talk.upstream.wal = wal.copy(1)
    talk.upstream.wal._data = other
    before = path.read_bytes()
    talk.start()
    talk.stream(end + 1000)
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended).startswith("what came is not the WAL that should: WAL that came for ")
    assert path.read_bytes() == before


def test_what_has_gone_from_here_is_not_gone_on_from(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    put(tmp_path, wal, START + 300_000)
    talk = begin(wal)
    (path,) = tmp_path.iterdir()
    path.unlink()
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, Refusal)
    assert str(path.with_suffix("")) in str(talk.ended)
    assert list(tmp_path.iterdir()) == []


# -- Whose WAL it is -----------------------------------------------------------------------------


def test_another_cluster_is_refused(begin: Begin, tmp_path: Path) -> None:
    put(tmp_path, written(), START + 300_000)
    talk = begin(written(system=4711))
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        "the database system identifier differs: the server's is 4711, that of the WAL here is "
        f"{written().system}: connect to the right server, or receive into another directory"
    )
    assert talk.ended.fence_lsn is None


def test_another_segment_size_is_refused(begin: Begin, tmp_path: Path) -> None:
    put(tmp_path, written(), START + 300_000)
    talk = begin(written())
    talk.upstream.instead["SHOW"] = Answer([[b"1GB"]])
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        "the server's WAL segments have 1073741824 bytes, those here 1048576"
    )


def test_a_server_that_has_less_than_we_is_waited_for(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    put(tmp_path, wal, START + MB)
    talk = begin(wal, START + MB - PAGE)
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, UpstreamError)
    assert str(talk.ended).startswith(f"the server's WAL ends before {format_lsn(START + MB)}")
    assert talk.again(wal) == [*IDENTIFY, start_at(START + MB)]


# -- Timelines -----------------------------------------------------------------------------------


def test_a_server_on_a_newer_timeline_is_followed(begin: Begin, tmp_path: Path) -> None:
    """The old timeline to its end, then the new one from the start of the segment they share."""
    wal = written()
    new = forked(wal, 2, START + MB + 300_000)
    switch = new.history[-1][1]
    put(tmp_path, wal, START + 300_000)
    end = wal.end_of(START + 300_000)
    talk = begin(new)
    history = "TIMELINE_HISTORY 2"
    assert talk.start() == [*IDENTIFY, history, start_at(end - end % PAGE)]
    assert (tmp_path / "00000002.history").read_bytes() == new.history_contents
    talk.told()
    assert talk.stream() == [*IDENTIFY, history, start_at(START + MB, 2)]
    at_switch = format_lsn(switch)
    assert talk.told()[-2:] == [f"r {at_switch} {at_switch} 0/0 reply", "h 0:0 0:0"]
    # The part that both share comes again; what we have of it we do not forget.
    talk.stream(START + MB + 100_000)
    assert talk.told() == []
    talk.stream()
    talk.check_files(new)
    old = (tmp_path / (wal.segment_name(switch) + ".partial")).read_bytes()
    assert old == wal.image[MB : switch - START] + bytes(START + 2 * MB - switch)
    assert talk.told()[-1] == f"r {format_lsn(new.lsn)} {format_lsn(new.lsn)} 0/0"
    assert talk.streams == 2
    assert not talk.outcome


def test_a_server_that_is_two_timelines_ahead_is_followed(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    second = forked(wal, 2, START + MB + 300_000, MB)
    third = forked(second, 3, START + 2 * MB + 100_000)
    put(tmp_path, wal, START + 300_000)
    (tmp_path / second.name).write_bytes(b"1\t0/ABC\tof another timeline 2, which is gone\n")
    talk = begin(third)
    talk.upstream.histories[2] = second.history_contents
    assert talk.start()[:4] == [*IDENTIFY, "TIMELINE_HISTORY 3", "TIMELINE_HISTORY 2"]
    again = [*IDENTIFY, "TIMELINE_HISTORY 3"]
    assert talk.stream() == [*again, "TIMELINE_HISTORY 2", start_at(START + MB, 2)]
    assert talk.stream() == [*again, start_at(START + 2 * MB, 3)]
    talk.stream()
    for one in (second, third):
        assert (tmp_path / one.name).read_bytes() == one.history_contents
    image = b"".join(
        (tmp_path / name).read_bytes()
        for name in (
            wal.segment_name(START),
            second.segment_name(START + MB),
            third.segment_name(START + 2 * MB) + ".partial",
        )
    )
    assert image == third.image
    assert not talk.outcome


def test_an_empty_directory_begins_on_the_timeline_that_has_the_segment(begin: Begin) -> None:
    new = forked(written(), 2, START + MB + 300_000)
    talk = begin(new, start_lsn=START)
    assert talk.start() == [*IDENTIFY, "TIMELINE_HISTORY 2", start_at(START)]
    assert talk.stream()[-1] == start_at(START + MB, 2)
    talk.upstream.connection.lose("")
    for path in talk.directory.iterdir():
        path.unlink()
    talk = begin(new, start_lsn=START + MB)
    assert talk.start() == [*IDENTIFY, "TIMELINE_HISTORY 2", start_at(START + MB, 2)]
    talk.stream()
    talk.check_files(new)


@pytest.mark.parametrize("page", [False, True])
def test_a_timeline_of_which_nothing_is_lacking_is_not_asked_for(
    begin: Begin, tmp_path: Path, page: bool
) -> None:
    """We are where the old timeline ended, be it at the end of a page or within one."""
    wal = written()
    if page:
        wal = written(to=MB + 300_000)
        wal.fill_to(wal.lsn + -wal.lsn % PAGE + PAGE)
    switch = wal.lsn
    new = forked(wal, 2, switch)
    assert new.history == [(1, switch)]
    assert (switch % PAGE == 0) is page
    put(tmp_path, wal, switch)
    start = switch - switch % MB
    talk = begin(new)
    assert talk.start() == [*IDENTIFY, "TIMELINE_HISTORY 2", start_at(start, 2)]
    at_switch = format_lsn(switch)
    assert talk.told() == [f"r {at_switch} {at_switch} 0/0 reply", "h 0:0 0:0"]
    talk.stream()
    talk.check_files(new)


def test_a_server_may_be_promoted_in_mid_stream(begin: Begin) -> None:
    wal = written(MB + 500_000)
    talk = begin(wal, start_lsn=START)
    talk.start()
    talk.stream(START + MB + 200_000)
    new = forked(wal, 2, START + MB + 300_000)
    talk.upstream.promote(new)
    assert talk.stream() == [*IDENTIFY, "TIMELINE_HISTORY 2", start_at(START + MB, 2)]
    assert (talk.directory / "00000002.history").read_bytes() == new.history_contents
    talk.stream()
    talk.check_files(new)
    assert not talk.outcome


def test_a_server_may_be_promoted_just_before_it_is_to_stream(begin: Begin) -> None:
    """So late that it has told of its old timeline, and has nothing more of that to send."""
    wal = written(MB + 500_000)
    wal.fill_to(wal.lsn + -wal.lsn % PAGE + PAGE)
    talk = begin(wal, start_lsn=START)
    talk.start()
    talk.stream()
    assert talk.again(wal)[-1] == start_at(wal.lsn)
    new = forked(wal, 2, wal.lsn)
    talk.upstream.connection.lose("")
    talk.upstream = Upstream(talk.clock, wal)
    talk.upstream.at_first["IDENTIFY_SYSTEM"] = talk.upstream.answer("IDENTIFY_SYSTEM")
    talk.upstream.promote(new)
    assert talk.start() == [
        *IDENTIFY,
        start_at(wal.lsn),
        *IDENTIFY,
        "TIMELINE_HISTORY 2",
        start_at(wal.lsn - wal.lsn % MB, 2),
    ]
    talk.stream()
    talk.check_files(new)


def test_a_stream_that_ends_for_no_reason_is_begun_anew(begin: Begin) -> None:
    talk = begin(written())
    talk.start()
    talk.stream()
    talk.upstream.connection.end([[b"2", b"0/1000000"]])
    assert talk.asked() == IDENTIFY
    assert isinstance(talk.ended, UpstreamError)
    assert str(talk.ended) == "the server has ended the stream and does not say why"


def test_a_server_may_shut_down(begin: Begin) -> None:
    talk = begin(written())
    talk.start()
    talk.stream()
    talk.upstream.connection.end()
    assert talk.asked() == []
    assert isinstance(talk.ended, UpstreamError)
    assert str(talk.ended) == "replication terminated by the server, as at a shutdown"


def test_a_history_of_ours_that_makes_no_sense(begin: Begin, tmp_path: Path) -> None:
    wal = forked(written(), 2, START + MB + 300_000)
    put(tmp_path, wal, wal.lsn)
    talk = begin(wal)
    (tmp_path / "00000002.history").write_text("nonsense")
    talk.start()
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        f"{tmp_path / '00000002.history'}: syntax error in history file: nonsense: expected a "
        "timeline ID: put a good one in its place"
    )


def test_histories_are_on_disk_before_their_timeline_is_asked_for(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = forked(written(), 2, START + MB + 300_000)
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", fsync)
    talk = begin(new)
    conversation = talk.upstream.connection.asked
    ensureDeferred(_hold(talk)).addBoth(talk.outcome.append)
    assert conversation == [*IDENTIFY, "TIMELINE_HISTORY 2"]
    talk.stored.threads.begin()
    assert conversation == [*IDENTIFY, "TIMELINE_HISTORY 2"]
    history = talk.directory / "00000002.history"
    assert history.read_bytes() == new.history_contents
    assert synced == [f"{history}.tmp", str(talk.directory)]
    talk.stored.threads.finish()
    assert conversation[3:] == [start_at(START + MB, 2)]


async def _hold(talk: Talk) -> None:
    await Conversation(
        talk.upstream.connection,
        talk.directory,
        talk.store,
        talk.replicas.oldest_xmins,
        UpstreamOptions(),
        talk.clock,
        talk.stored.threads,
        lambda: None,
    ).hold()


def test_a_history_that_cannot_be_stored_is_no_fault_of_the_server(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    talk = begin(forked(written(), 2, START + MB))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        talk.start()
    assert isinstance(talk.ended, SyncError)
    talk = begin(talk.upstream.wal)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        talk.start()
    assert isinstance(talk.ended, OSError)
    assert not (talk.directory / "00000002.history").exists()


def test_a_history_that_is_none_of_its_ancestors_may_be_missing(begin: Begin) -> None:
    new = forked(written(), 4, START + MB)
    talk = begin(new)
    asked = [f"TIMELINE_HISTORY {tli}" for tli in (4, 2, 3)]
    assert talk.start() == [*IDENTIFY, *asked, start_at(START + MB, 4)]
    assert [path.name for path in talk.directory.iterdir()] == ["00000004.history"]
    talk.upstream.instead["TIMELINE_HISTORY 2"] = UpstreamError("out of memory", "53200")
    other = Upstream(talk.clock, new)
    other.instead = talk.upstream.instead
    talk.upstream.connection.lose("")
    talk.upstream = other
    talk.start()
    assert str(talk.ended) == "out of memory"


# -- Where we do not go --------------------------------------------------------------------------


def test_a_server_on_an_older_timeline_is_not_followed(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    new = forked(wal, 2, START + MB + 300_000)
    put(tmp_path, new, new.lsn)
    talk = begin(wal)
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        "the server's timeline 1 is behind timeline 2, which is here: it is not the primary any "
        "longer"
    )
    assert talk.ended.fence_lsn is None


def check_fenced(talk: Talk, new: WalBuilder, valid_to: int) -> None:
    """That it was refused for it branched off before our end, and nothing is here of it."""
    switch = new.history[-1][1]
    assert isinstance(talk.ended, Refusal)
    assert talk.ended.fence_lsn == switch
    message = str(talk.ended)
    assert message.startswith(
        f"the server's timeline 2 forked from timeline 1 at {format_lsn(switch)}, and WAL up to "
        f"{format_lsn(valid_to)} of timeline 1 is here"
    )
    assert f"move the segments from 00000001{new.segment_name(switch)[8:]} on" in message
    assert not list(talk.directory.glob("*.history"))
    assert not list(talk.directory.glob("00000002*"))


def test_a_server_that_branched_off_before_our_end_is_fenced(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    put(tmp_path, wal, START + MB + 400_000)
    new = forked(wal, 2, START + MB + 300_000)
    talk = begin(new)
    assert talk.start() == [*IDENTIFY, "TIMELINE_HISTORY 2"]
    check_fenced(talk, new, wal.end_of(START + MB + 400_000))


def test_a_server_that_branches_off_before_what_it_has_sent_is_fenced(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, start_lsn=START)
    talk.start()
    end = wal.end_of(START + MB + 400_000)
    talk.stream(end)
    new = forked(wal, 2, START + MB + 300_000)
    talk.upstream.promote(new)
    assert talk.stream() == [*IDENTIFY, "TIMELINE_HISTORY 2"]
    check_fenced(talk, new, end)


def test_siblings_are_fenced_at_the_earlier_fork(begin: Begin, tmp_path: Path) -> None:
    """Ours is timeline 3, the server's is 2; both branched off 1."""
    wal = written()
    ours, theirs = forked(wal, 3, START + MB + 400_000), forked(wal, 2, START + MB + 300_000)
    put(tmp_path, ours, ours.lsn)
    talk = begin(theirs)
    assert talk.start() == [*IDENTIFY, "TIMELINE_HISTORY 2"]
    assert isinstance(talk.ended, Refusal)
    assert talk.ended.fence_lsn == theirs.history[-1][1]
    assert not (tmp_path / "00000002.history").exists()


def test_a_part_of_a_record_does_not_count(begin: Begin) -> None:
    """It was never finished where it was begun, so nobody has gone another way."""
    wal = written()
    talk = begin(wal, start_lsn=START)
    talk.start()
    new = forked(wal, 2, START + MB + 300_000)
    switch = new.history[-1][1]
    talk.stream(switch + 30)
    assert talk.store.flush_lsn == switch + 30
    assert talk.again(new) == [*IDENTIFY, "TIMELINE_HISTORY 2", start_at(START + MB, 2)]
    talk.stream()
    talk.check_files(new)
    assert not talk.outcome


# -- Errors --------------------------------------------------------------------------------------

REMOVED = UpstreamError("requested WAL segment ... has already been removed", "58P01")


def test_wal_that_is_not_there_any_more_is_for_the_operator(begin: Begin, tmp_path: Path) -> None:
    wal = written()
    put(tmp_path, wal, START + MB + 300_000)
    end = wal.end_of(START + MB + 300_000)
    talk = begin(wal)
    talk.upstream.instead["START_REPLICATION"] = REMOVED
    talk.start()
    assert isinstance(talk.ended, Refusal)
    assert talk.ended.fence_lsn is None
    assert str(talk.ended) == (
        f"the server has no WAL from {format_lsn(end)} on any more ({REMOVED}): copy the missing "
        f"segments, from {wal.segment_name(end)} on, into {tmp_path} from an archive or another "
        "server; or begin anew with an empty directory"
    )


def test_wal_may_go_while_it_is_streamed(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, start_lsn=START)
    talk.start()
    talk.stream(START + 2 * MB + 10 * PAGE)
    talk.upstream.connection.fail(REMOVED)
    assert isinstance(talk.ended, Refusal)
    where = f"from {format_lsn(START + 2 * MB + 10 * PAGE)} on any more"
    assert where in str(talk.ended)
    assert f"from {wal.segment_name(START + 2 * MB)} on" in str(talk.ended)


def test_wal_may_not_be_there_for_an_empty_directory(begin: Begin) -> None:
    talk = begin(written(), start_lsn=START)
    talk.upstream.instead["START_REPLICATION"] = REMOVED
    talk.start()
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended) == (
        f"the server has no WAL from {format_lsn(START)} on any more ({REMOVED}): begin later, "
        "with another slot or --upstream-start"
    )


def test_a_slot_that_was_invalidated_is_for_the_operator(begin: Begin) -> None:
    talk = begin(written(), slot="r1")
    talk.upstream.instead["READ_REPLICATION_SLOT"] = Answer([[b"physical", None, None]])
    error = UpstreamError('can no longer access replication slot "r1"', "55000")
    talk.upstream.instead["START_REPLICATION"] = error
    talk.start()
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended).startswith(f"{error}: drop the slot there and create it again")


COMMANDS = [
    "IDENTIFY_SYSTEM",
    "SHOW",
    "TIMELINE_HISTORY",
    "READ_REPLICATION_SLOT",
    "CREATE_REPLICATION_SLOT",
    "START_REPLICATION",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_any_other_error_is_as_the_server_says(begin: Begin, command: str) -> None:
    talk = begin(forked(written(), 2, START + MB), slot="r1", create_slot=True)
    talk.upstream.instead[command] = UpstreamError("the server is tired", "55006")
    assert talk.start()[-1].startswith(command)
    assert isinstance(talk.ended, UpstreamError)
    assert (str(talk.ended), talk.ended.sqlstate) == ("the server is tired", "55006")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_that_does_not_answer_is_given_up(begin: Begin, command: str) -> None:
    talk = begin(forked(written(), 2, START + MB), slot="r1", create_slot=True, timeout=8)
    talk.upstream.instead[command] = None
    assert talk.start()[-1].startswith(command)
    talk.clock.advance(7.9)
    assert not talk.outcome
    talk.clock.advance(0.1)
    assert isinstance(talk.ended, UpstreamError)
    assert str(talk.ended) == f"no answer to {command} for 8 s"


def test_without_a_timeout_an_answer_is_waited_for(begin: Begin) -> None:
    talk = begin(written(), timeout=0)
    talk.upstream.instead["SHOW"] = None
    talk.start()
    talk.clock.advance(1_000_000)
    assert not talk.outcome
    talk.upstream.connection.lose("gone")
    assert (type(talk.ended), str(talk.ended)) == (UpstreamError, "gone")


def test_a_stream_that_fails_is_as_the_server_says(begin: Begin) -> None:
    talk = begin(written())
    talk.start()
    talk.upstream.connection.fail(UpstreamError("terminating connection", "57P01"))
    assert talk.asked() == []
    assert (type(talk.ended), str(talk.ended)) == (UpstreamError, "terminating connection")


def test_a_stream_that_is_none_is_refused(begin: Begin) -> None:
    wal = written()
    talk = begin(wal, start_lsn=START)
    talk.start()
    talk.upstream.connection.deliver(b"hello")
    assert isinstance(talk.ended, UpstreamError)
    talk.again(wal)
    talk.upstream.connection.deliver(wal_message(START, bytes(PAGE)))
    assert isinstance(talk.ended, Refusal)
    assert str(talk.ended).startswith("what came is not the WAL that should: ")
    talk.again(wal)
    talk.upstream.connection.deliver(keepalive(START))
    assert not talk.outcome
    assert list(talk.directory.iterdir()) == []


@pytest.mark.parametrize("tli", [b"0", b"-1", b"4294967296"])
def test_a_timeline_that_cannot_be_is_refused(begin: Begin, tli: bytes) -> None:
    talk = begin(written())
    talk.upstream.instead["IDENTIFY_SYSTEM"] = Answer([[b"1", tli, b"0/1000000", None]])
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, UpstreamError)
    assert f"timeline {tli.decode()}," in str(talk.ended)


@pytest.mark.parametrize("size", [b"", b"MB", b"0MB", b"3MB", b"2GB", b"512kB", b"16", b"-1MB"])
def test_a_segment_size_that_cannot_be_is_refused(begin: Begin, size: bytes) -> None:
    talk = begin(written())
    talk.upstream.instead["SHOW"] = Answer([[size]])
    assert talk.start() == IDENTIFY
    assert isinstance(talk.ended, UpstreamError)
    assert f'wal_segment_size is "{size.decode()}"' in str(talk.ended)


VALUES = st.one_of(
    st.none(),
    st.sampled_from(
        [
            *(b"", b"0", b"1", b"2", b"3", b"-1", b"99999999999", b"1e3", b"physical", b"logical"),
            *(b"0/0", b"0/1000000", b"1/1100028", b"FFFFFFFF/FFFFFFFF", b"0/0/0", b"1MB", b"16MB"),
            *(b"1\t0/1100000\tno\n", b"2\t0/1100000\n1\t0/1100000\n", b"1\t0/9\n2\t0/3\n"),
            *(b"9\n", str(written(0).system).encode()),
        ]
    ),
    st.binary(max_size=20),
    st.text(max_size=20).map(str.encode),
)
ROWS = st.lists(st.lists(VALUES, max_size=5), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(COMMANDS), st.builds(Answer, ROWS, st.booleans()), min_size=1),
    st.booleans(),
    st.booleans(),
)
def test_answers_that_make_no_sense_are_refused(
    answers: dict[str, Answer | UpstreamError | None], holds: bool, slot: bool
) -> None:
    wal = written(to=100_000)
    with tempfile.TemporaryDirectory() as directory:
        if holds:
            put(Path(directory), wal, START + 50_000)
        talk = Talk(Path(directory), forked(wal, 2, START + 80_000))
        talk.options = {"slot": "r1", "create_slot": True} if slot else {}
        talk.upstream.instead = answers
        talk.start()
        if talk.upstream.connection.is_streaming and "START_REPLICATION" not in answers:
            talk.stream()
        talk.upstream.connection.lose("the test is over")
        assert isinstance(talk.ended, (UpstreamError, Refusal)), talk.ended
        talk.close()
