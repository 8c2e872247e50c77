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


def feeding(pid: int, xmin: int, catalog_xmin: int = 0, *, epoch: int = 0) -> Replica:
    """One that asks for transactions to be kept, from so many on of a 32-bit count."""
    one = replica(pid)
    one.update(
        Feedback(
            reply_time=1,
            xmin=xmin,
            xmin_epoch=epoch if xmin else 0,
            catalog_xmin=catalog_xmin,
            catalog_xmin_epoch=epoch if catalog_xmin else 0,
        )
    )
    return one


def oldest_xmins(*those: Replica) -> tuple[int, int]:
    replicas = Replicas()
    for one in those:
        replicas.add(one)
    return replicas.oldest_xmins()


def test_where_nobody_asks_nothing_is_to_be_kept() -> None:
    assert oldest_xmins() == (0, 0)
    assert oldest_xmins(replica(1), replica(2)) == (0, 0)
    assert oldest_xmins(feeding(1, 0, 0), replica(2)) == (0, 0)


def test_the_oldest_that_anybody_asks_for_is_kept() -> None:
    assert oldest_xmins(feeding(1, 800)) == (800, 0)
    assert oldest_xmins(feeding(1, 800), feeding(2, 750), feeding(3, 900)) == (750, 0)
    # Those who do not ask do not count, be it for the one or for the other.
    assert oldest_xmins(replica(1), feeding(2, 800), feeding(3, 0, 600)) == (800, 600)
    assert oldest_xmins(feeding(1, 800, 700), feeding(2, 750, 710)) == (750, 700)


def test_the_older_count_is_older_whatever_the_number() -> None:
    before, after = feeding(1, 2**32 - 5, 2**32 - 6), feeding(2, 10, 9, epoch=1)
    assert oldest_xmins(before, after) == (2**32 - 5, 2**32 - 6)
    assert oldest_xmins(after) == (1 << 32 | 10, 1 << 32 | 9)
    assert oldest_xmins(after, feeding(3, 11, 8, epoch=1)) == (1 << 32 | 10, 1 << 32 | 8)


def test_what_a_replica_asked_for_is_kept_until_it_asks_for_something_else_or_leaves() -> None:
    replicas = Replicas()
    one, two = feeding(1, 700), feeding(2, 800)
    replicas.add(one)
    replicas.add(two)
    one.update(StatusUpdate(500, 400, 300, 11, False))
    assert replicas.oldest_xmins() == (700, 0)
    one.update(Feedback(12, 900, 0, 0, 0))
    assert replicas.oldest_xmins() == (800, 0)
    replicas.remove(two)
    assert replicas.oldest_xmins() == (900, 0)
    one.update(Feedback(13, 0, 0, 0, 0))
    assert replicas.oldest_xmins() == (0, 0)
