"""The registry of those that stream, and what they say of themselves."""

from __future__ import annotations

import pytest

from walproto.timeline.replicas import Replica, Replicas
from walproto.wire.replication import Feedback, StatusUpdate


def replica(pid: int = 7) -> Replica:
    return Replica(
        pid=pid,
        user="repl",
        application_name="standby1",
        peer="192.0.2.1:40000",
        tli=1,
        sent_lsn=0x3000000,
    )


def test_a_replica_is_there_as_long_as_it_streams() -> None:
    replicas = Replicas()
    assert len(replicas) == 0
    one, two = replica(1), replica(2)
    replicas.add(one)
    replicas.add(two)
    assert list(replicas) == [one, two]
    replicas.remove(one)
    replicas.remove(one)
    assert list(replicas) == [two]
    assert len(replicas) == 1


def test_replicas_may_go_while_one_looks_at_them() -> None:
    replicas = Replicas()
    for pid in range(5):
        replicas.add(replica(pid))
    for one in replicas:
        replicas.remove(one)
    assert len(replicas) == 0


def test_positions_are_those_last_told_and_may_go_backwards() -> None:
    one = replica()
    assert (one.write_lsn, one.flush_lsn, one.apply_lsn, one.reply_time) == (0, 0, 0, 0)
    one.update(StatusUpdate(500, 400, 300, 11, False))
    assert (one.write_lsn, one.flush_lsn, one.apply_lsn, one.reply_time) == (500, 400, 300, 11)
    one.update(StatusUpdate(100, 0, 50, 12, True))
    assert (one.write_lsn, one.flush_lsn, one.apply_lsn, one.reply_time) == (100, 0, 50, 12)


def test_feedback_is_kept_beside_positions() -> None:
    one = replica()
    assert one.feedback is None
    one.update(StatusUpdate(500, 400, 300, 11, False))
    feedback = Feedback(13, 750, 0, 740, 0)
    one.update(feedback)
    assert one.feedback is feedback
    assert one.reply_time == 13
    assert one.flush_lsn == 400


@pytest.mark.parametrize(
    ("write", "flush", "confirmed"),
    [
        (0, 0, False),
        (1000, 1000, True),
        (1000, 999, False),
        (1000, 0, True),  # pg_receivewal without a slot reports no flushes
        (999, 0, False),
        (2000, 1000, True),
    ],
)
def test_what_is_flushed_is_confirmed_or_else_what_is_written(
    write: int, flush: int, confirmed: bool
) -> None:
    one = replica()
    one.update(StatusUpdate(write, flush, 0, 1, False))
    assert one.has_confirmed(1000) is confirmed


def test_a_replica_is_named_in_the_log_so_that_one_finds_it() -> None:
    assert str(replica()) == '"standby1" (pid 7, repl@192.0.2.1:40000)'
