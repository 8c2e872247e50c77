"""A client has its say a turn at a time, and no more than it takes answers."""

from __future__ import annotations

from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from tests.fakes import PAGE, Client, MemoryTimeline, query, server, status, told
from walproto.server.reader import TURN, UNHEARD, Reader


@implementer(IPushProducer)
class Source:
    """A transport that only notes whether it is read."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        raise AssertionError("nobody calls this")


class Turns(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.source = Source()
        self.waiting = 0
        self.dealt: list[int] = []
        self.reader = Reader(self.source, self.clock, self.deal)

    def deal(self, limit: int) -> bool:
        dealt = min(limit, self.waiting)
        self.waiting -= dealt
        self.dealt.append(dealt)
        return self.waiting > 0

    def test_a_little_is_dealt_with_at_once(self) -> None:
        self.waiting = 3
        self.reader.go_on()
        self.assertEqual((self.dealt, self.source.calls), ([3], []))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_much_is_dealt_with_in_turns_and_nothing_read_meanwhile(self) -> None:
        self.waiting = 2 * TURN + 1
        self.reader.go_on()
        self.assertEqual((self.dealt, self.source.calls), ([TURN], ["pause"]))
        self.reader.go_on()
        self.assertEqual(self.dealt, [TURN])
        self.clock.advance(0)
        self.clock.advance(0)
        self.assertEqual((self.dealt, self.source.calls), ([TURN, TURN, 1], ["pause", "resume"]))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_while_answers_are_not_taken_questions_wait(self) -> None:
        self.reader.pauseProducing()
        self.waiting = 3
        self.reader.go_on()
        self.assertEqual((self.dealt, self.source.calls), ([], ["pause"]))
        self.reader.resumeProducing()
        self.assertEqual((self.dealt, self.source.calls), ([3], ["pause", "resume"]))

    def test_when_another_produces_they_do_not(self) -> None:
        self.reader.pauseProducing()
        self.reader.release()
        self.waiting = 3
        self.reader.go_on()
        self.assertEqual((self.dealt, self.source.calls), ([3], ["pause", "resume"]))

    def test_while_it_is_held_it_reads_a_little_more_and_deals_with_nothing(self) -> None:
        self.waiting = 1
        self.reader.hold()
        self.assertEqual(self.source.calls, [])
        for _ in range(UNHEARD + 2):
            self.assertEqual(self.source.calls, ["pause"] if self.waiting > UNHEARD else [])
            self.waiting += 1
            self.reader.go_on()
            self.clock.advance(0)
        self.assertEqual((self.dealt, self.source.calls), ([], ["pause"]))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.reader.let_go()
        self.assertEqual(self.dealt, [])
        self.clock.advance(0)
        self.assertEqual((self.dealt, self.source.calls), ([UNHEARD + 3], ["pause", "resume"]))

    def test_it_may_be_let_go_while_answers_are_not_taken(self) -> None:
        self.reader.hold()
        self.waiting = 3
        self.reader.go_on()
        self.reader.pauseProducing()
        self.reader.let_go()
        self.clock.advance(0)
        self.assertEqual((self.dealt, self.source.calls), ([], ["pause"]))
        self.reader.resumeProducing()
        self.assertEqual((self.dealt, self.source.calls), ([3], ["pause", "resume"]))

    def test_answers_may_be_taken_while_it_is_held(self) -> None:
        self.reader.pauseProducing()
        self.reader.hold()
        self.waiting = 3
        self.reader.resumeProducing()
        self.assertEqual((self.dealt, self.source.calls), ([], ["pause", "resume"]))
        self.reader.let_go()
        self.clock.advance(0)
        self.assertEqual(self.dealt, [3])

    def test_it_may_be_held_again_before_it_has_gone_on(self) -> None:
        self.reader.hold()
        self.reader.let_go()
        self.reader.hold()
        self.waiting = 3
        self.clock.advance(0)
        self.assertEqual(self.dealt, [])
        self.reader.let_go()
        self.reader.stop()
        self.clock.advance(0)
        self.assertEqual(self.dealt, [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_once_stopped_nothing_is_dealt_with(self) -> None:
        self.waiting = 2 * TURN
        self.reader.go_on()
        self.reader.stop()
        self.reader.go_on()
        self.clock.advance(0)
        self.assertEqual(self.dealt, [TURN])


class Floods(SynchronousTestCase):
    def test_a_client_that_asks_much_is_answered_in_turns(self) -> None:
        clock = Clock()
        client = Client(server(MemoryTimeline(PAGE), clock), clock)
        client.start_up()
        before = told(bytes(client.transport.arrived)).count("Z I")
        client.transport.deliver(query("IDENTIFY_SYSTEM") * (2 * TURN + 1))
        at_once = told(bytes(client.transport.arrived)).count("Z I") - before
        self.assertEqual(at_once, TURN)
        self.assertEqual(client.hear().count("Z I"), 2 * TURN + 1)

    def test_who_always_wants_a_reply_gets_wal_all_the_same(self) -> None:
        clock, timeline = Clock(), MemoryTimeline(40 * PAGE)
        client = Client(server(timeline, clock), clock)
        client.stream()
        heard: list[str] = []
        for _ in range(100):
            heard += client.send(status(0, reply=1))
        self.assertEqual(len([line for line in heard if line.startswith("k")]), 100)
        self.assertEqual(next(iter(timeline.replicas)).sent_lsn, timeline.commit_lsn)
