"""Call-backs, end to end: a small pageserver is called by `twist walsender`, and connects back.

That one listens with a few lines of the protocol; what it does when it connects back is what
every pageserver here does.  Times are told by what the walsender says meanwhile: a stream on which
nothing comes is asked for a reply each second, and a pageserver that does not stream is called
each recall period, which is much shorter here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.callbacks import Listener
from tests.neon_trees import Safekeeper, Setting, Tree, ids_of, setting_of
from tests.pageserver import TIMEOUT, Connection, Gone, Pageserver, Receiver, ServerError
from tests.postgres import HOST, free_port, installations
from walproto.neon.control_file import write_control_file

PERIOD = "200ms"


def as_word(connstr: str) -> str:
    """A connection string as a word of `options`."""
    return re.sub(r"[\\\s]", r"\\\g<0>", connstr)


def first_visit(setting: Setting, tree: Tree, connstr: str, lsn: int) -> None:
    """A pageserver comes by itself, takes WAL up to `lsn`, confirms nothing, and is gone."""
    ids, word = tree.ids, as_word(connstr)
    with Pageserver(setting.sender.port, ids.tenant_id, ids.timeline_id, word) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(setting.wal.start)
        pageserver.take_to(lsn)


def connect_back(setting: Setting, call: str, tree: Tree) -> Pageserver:
    """Do what a call says: it must be for that timeline, and name this server."""
    match = re.fullmatch(r"callmemaybe ([0-9a-f]{32}) ([0-9a-f]{32}) (.*)", call)
    assert match is not None
    assert match.groups()[:2] == (tree.ids.tenant_id, tree.ids.timeline_id)
    told = conninfo_to_dict(match[3])
    assert (told["host"], told["port"]) == (HOST, str(setting.sender.port))
    assert set(told) == {"host", "port", "options"}
    return Pageserver(setting.sender.port, "", "", options=str(told["options"]))


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    port = free_port()
    options = ("--advertise", f"{HOST}:{port}", "--recall-period", PERIOD)
    with setting_of(installations()[0], *options, port=port) as made:
        yield made
        assert "secret" not in made.sender.output


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def calls_meanwhile(setting: Setting) -> Iterator[Callable[[], None]]:
    """Waits for some recall periods: until a pageserver that never comes was called five times."""
    tree = setting.tree(setting.wal.end)
    with Listener() as never_comes:
        first_visit(setting, tree, never_comes.connstr, setting.wal.start + 1)

        def wait() -> None:
            never_comes.calls_so_far()
            for _ in range(5):
                never_comes.call()

        yield wait


def test_it_is_called_whenever_its_stream_has_ended(setting: Setting, listener: Listener) -> None:
    """It comes back, and is left alone while it streams; the WAL goes on where it was."""
    wal = setting.wal
    step = (wal.end - wal.start) // 4
    commit_lsn = wal.start + step
    tree = setting.tree(commit_lsn)
    first_visit(setting, tree, listener.connstr, commit_lsn)
    end = wal.start
    for _ in range(2):
        with connect_back(setting, listener.call(), tree) as pageserver:
            pageserver.is_slow = True
            pageserver.follow(end)
            pageserver.take_to(commit_lsn)
            assert pageserver.take() == "question"
            listener.calls_so_far()  # such as came before the stream was up
            commit_lsn += step
            tree.commit(commit_lsn)
            pageserver.take_to(commit_lsn)
            for _ in range(2):
                assert pageserver.take() == "question"
            assert listener.calls_so_far() == []
            assert pageserver.wal == wal.read(end, commit_lsn)
            end = pageserver.decoder.end


def test_it_is_called_no_more_when_it_has_all(
    setting: Setting, listener: Listener, calls_meanwhile: Callable[[], None]
) -> None:
    tree = setting.tree(setting.wal.end)
    first_visit(setting, tree, listener.connstr, setting.wal.end)
    with connect_back(setting, listener.call(), tree) as pageserver:
        pageserver.follow(setting.wal.start)
        pageserver.expect_end()
        assert pageserver.wal == setting.wal.read(setting.wal.start, setting.wal.end)
        listener.calls_so_far()
        calls_meanwhile()
    calls_meanwhile()
    assert listener.calls_so_far() == []


def test_a_call_that_hangs_is_abandoned(setting: Setting, listener: Listener) -> None:
    tree = setting.tree(setting.wal.end)
    listener.hangs = True
    first_visit(setting, tree, listener.connstr, setting.wal.start + 1)
    for _ in range(3):
        listener.call()
        listener.abandoned.get(timeout=TIMEOUT)
    listener.hangs = False
    listener.calls_so_far()
    with connect_back(setting, listener.call(), tree) as pageserver:
        pageserver.follow(setting.wal.start)
        pageserver.take_to(setting.wal.end)
        pageserver.expect_end()
    setting.sender.expect(
        rf"{HOST}:{listener.port} for timeline {tree.ids}: no answer within 0.2 s"
    )


def test_one_that_connects_back_before_it_answers(setting: Setting, listener: Listener) -> None:
    """Its stream is not concerned by what becomes of the call."""
    tree = setting.tree(setting.wal.end - 1)
    listener.hangs = True
    first_visit(setting, tree, listener.connstr, setting.wal.start + 1)
    with connect_back(setting, listener.call(), tree) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(setting.wal.start)
        pageserver.take_to(setting.wal.end - 1)
        for _ in range(2):
            assert pageserver.take() == "question"
        tree.commit(setting.wal.end)
        pageserver.take_to(setting.wal.end)
        assert pageserver.wal == setting.wal.read(setting.wal.start, setting.wal.end)
        listener.hangs = False


def test_one_that_is_not_there_is_called_until_it_is(setting: Setting) -> None:
    tree, port = setting.tree(setting.wal.end), free_port()
    first_visit(setting, tree, f"host={HOST} port={port} user=no_user", setting.wal.start + 1)
    setting.sender.expect(rf"{HOST}:{port} for timeline {tree.ids}: cannot connect: ")
    with (
        Listener(port) as listener,
        connect_back(setting, listener.call(), tree) as pageserver,
    ):
        pageserver.follow(setting.wal.start)
        pageserver.take_to(setting.wal.end)
        pageserver.expect_end()
    assert len(re.findall(f"{port} for timeline {tree.ids}: cannot", setting.sender.output)) == 1


def test_a_recovery_has_nothing_to_do_with_it(
    setting: Setting, listener: Listener, calls_meanwhile: Callable[[], None]
) -> None:
    tree = setting.tree(setting.wal.start)
    parameters = {
        "options": f"{tree.options} -c pageserver_connstr=postgresql://no_user@{HOST}:{listener.port}",
        "application_name": "wal_proposer_recovery",
    }
    with Receiver(setting.sender.port, **parameters) as proposer:
        proposer.begin(setting.wal.start, "START_REPLICATION {} TIMELINE 1")
        proposer.take_all()
        calls_meanwhile()
    calls_meanwhile()
    assert listener.calls_so_far() == []


def name_it(setting: Setting, tree: Tree, connstr: str) -> None:
    """Connect as a compute does: one that is no pageserver itself, and names one."""
    options = f"{tree.options} -c pageserver_connstr={as_word(connstr)}"
    with Connection(setting.sender.port, options, application_name="walproposer") as compute:
        compute.query("IDENTIFY_SYSTEM")


def test_the_one_that_was_named_last_is_called(
    setting: Setting, listener: Listener, calls_meanwhile: Callable[[], None]
) -> None:
    """A pageserver that was never here is called when a compute names it, and no more when another
    one is named."""
    tree = setting.tree(setting.wal.end)
    name_it(setting, tree, listener.connstr)
    for _ in range(2):
        listener.call()
    with Listener() as other:
        name_it(setting, tree, other.connstr)
        with connect_back(setting, other.call(), tree) as pageserver:
            listener.calls_so_far()
            calls_meanwhile()
            assert listener.calls_so_far() == []
            pageserver.follow(setting.wal.start)
            pageserver.expect_end()
        assert pageserver.wal == setting.wal.read(setting.wal.start, setting.wal.end)


def test_each_timeline_is_called_for_on_its_own(setting: Setting, listener: Listener) -> None:
    """One pageserver, three timelines: while one of them streams, it is called for the others."""
    trees = [setting.tree(setting.wal.end) for _ in range(3)]
    for tree in trees:
        first_visit(setting, tree, listener.connstr, setting.wal.start + 1)
    while trees[0].ids.timeline_id not in (call := listener.call()):
        pass
    with connect_back(setting, call, trees[0]) as pageserver:
        pageserver.is_slow = True
        pageserver.follow(setting.wal.start)
        pageserver.take_to(setting.wal.end)
        assert pageserver.take() == "question"
        listener.calls_so_far()
        calls = [listener.call() for _ in range(10)]
    called = {call.split()[2] for call in calls}
    assert called == {tree.ids.timeline_id for tree in trees[1:]}


def test_it_can_be_stopped_meanwhile(setting: Setting, tmp_path: Path) -> None:
    """While a call hangs, a client waits for a proposer, and a pageserver streams."""
    wal, port = setting.wal, free_port()
    trees = [Tree(tmp_path, ids_of(number), wal) for number in range(3)]
    for tree in trees[:2]:
        tree.make(wal.end)
    trees[2].directory.mkdir()
    unknown = replace(wal.control(trees[2].ids, 0), wal_seg_size=0, system_id=0, term_history=())
    write_control_file(trees[2].control_file, unknown)
    options = ("--advertise", f"{HOST}:{port}", "--wal-sender-shutdown-timeout", "1s")
    with Listener() as listener, Safekeeper(tmp_path, *options, port=port) as sender:
        listener.hangs = True
        name_it(replace(setting, sender=sender), trees[0], listener.connstr)
        listener.call()
        with (
            Pageserver(port, trees[1].ids.tenant_id, trees[1].ids.timeline_id) as pageserver,
            Pageserver(port, trees[2].ids.tenant_id, trees[2].ids.timeline_id) as waits,
        ):
            waits.ask(wal.start)
            sender.expect(rf"{trees[2].ids}: .*proposer")
            pageserver.is_slow = True
            pageserver.follow(wal.start)
            pageserver.take_to(wal.end)
            sender.terminate()
            for one in (pageserver, waits):
                with pytest.raises((ServerError, Gone)):
                    one.take_all()
        listener.abandoned.get(timeout=TIMEOUT)
        sender.wait()
        sender.check_log()
