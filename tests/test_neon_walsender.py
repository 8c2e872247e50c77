"""The safekeeper's walsender in memory: which timeline a client is served, and by which rules.

Directories and files are real, connections and time are not.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import formatEvent

from tests.fakes import (
    COPY_DONE,
    SYNC,
    TERMINATE,
    Client,
    cancel_request,
    errors,
    message,
    parameter_statuses,
    query,
    server,
    status,
)
from tests.safekeeper import put_control, put_file, put_wal
from tests.test_directory import built
from tests.test_neon_data_directory import InMemory, ids_of
from tests.wal_builder import MB, SYSTEM
from walproto.errors import EndReason, StreamingEnded
from walproto.lsn import format_lsn
from walproto.neon.callback import Subscription
from walproto.neon.callmemaybe import Subscriptions
from walproto.neon.ids import TimelineIds
from walproto.neon.pageservers import REMEMBERED, Pageservers
from walproto.neon.streams import PageserverStream
from walproto.neon.walsender import Safekeeper
from walproto.server.factory import WalSenderFactory
from walproto.wire.replication import PageserverFeedback, pageserver_feedback

ONE, OTHER = ids_of(1), ids_of(2)
CONNSTR, ELSEWHERE = "host=ps1", "host=ps2"
COPIED = ["C START_STREAMING", "C START_REPLICATION", "Z I"]
CANCELED = ["ERROR 57014: canceling statement due to user request", "Z I"]
ADMIN_SHUTDOWN = ["FATAL 57P01: terminating connection due to administrator command", "EOF"]


def options(ids: TimelineIds = ONE, connstr: str = "", *more: str) -> str:
    named = f"-c ztenantid={ids.tenant_id} ztimelineid={ids.timeline_id}"
    return " ".join([named, *([f"pageserver_connstr={connstr}"] if connstr else []), *more])


def zenith(lsn: int) -> bytes:
    """What a pageserver says that has received WAL up to ``lsn``."""
    said = PageserverFeedback(ps_writelsn=lsn, ps_flushlsn=lsn - 8, ps_applylsn=lsn - 16)
    return message(b"d", pageserver_feedback(said))


def zenith_with(key: bytes) -> bytes:
    pairs = b"\1" + key + b"\0" + struct.pack(">I", 3) + b"xyz"
    return message(b"d", b"z" + struct.pack(">Q", len(pairs)) + pairs)


class Serving(InMemory):
    """A timeline of 1.5 MB of WAL, of which 0.3 MB are committed."""

    def setUp(self) -> None:
        super().setUp()
        self.called: list[Subscription] = []
        subscriptions = Subscriptions(self.clock, self.call)
        self.committed = MB + 300_000
        self.put(ONE, self.committed)
        self.begin(Pageservers(subscriptions))

    def begin(self, pageservers: Pageservers | None) -> None:
        self.safekeeper = Safekeeper(self.directory, self.clock, pageservers)
        self.factory: WalSenderFactory = server(self.safekeeper, self.clock)

    def stop(self) -> None:
        self.factory.abort_all()
        self.clock.advance(0)
        self.assertTrue(self.safekeeper.stop().called)
        for timeline in self.directory._timelines.values():
            self.assertEqual(list(timeline.replicas), [])
            self.assertFalse(timeline.is_in_use)
        super().stop()

    def call(self, subscription: Subscription) -> Deferred[None]:
        self.called.append(subscription)
        return succeed(None)

    def calls(self, seconds: float) -> list[Subscription]:
        """Those that are made within that time."""
        self.called.clear()
        self.clock.pump([0.5] * int(2 * seconds))
        return list(self.called)

    def client(self, capacity: int | None = None) -> Client:
        return Client(self.factory, self.clock, capacity)

    def greeted(self, ids: TimelineIds = ONE, connstr: str = "", **more: str) -> Client:
        client = self.client()
        self.assertEqual(client.start_up(options=options(ids, connstr), **more), ["GREETING"])
        return client

    def pageserver(self, start: int = MB, connstr: str = CONNSTR, ids: TimelineIds = ONE) -> Client:
        client = self.greeted(ids, connstr, application_name="pageserver")
        client.send(query("IDENTIFY_SYSTEM"))
        self.ask(client, start)
        self.assertIn("W", self.heard)
        return client

    def ask(self, client: Client, start: int = MB) -> list[str]:
        self.heard = client.send(query(f"START_REPLICATION PHYSICAL {format_lsn(start)}"))
        return self.heard

    def refused_at_once(self, **parameters: str) -> list[str]:
        """What a client is told, which must be logged in one line, and in short."""
        before = len(self.logged)
        told = self.client().start_up(**parameters)
        said = [
            formatEvent(event)
            for event in self.logged[before:]
            if event["log_level"].name != "debug" and ": FATAL " in formatEvent(event)
        ]
        self.assertEqual(len(said), 1)
        self.assertEqual(told[1:], ["EOF"])
        told = told[0].split(" | ")
        self.assertIn(told[0], said[0])
        return told

    def wal_of(self, client: Client, start: int = MB) -> int:
        """How far WAL has come without a gap; it must be what was put there."""
        end = start
        for lsn, data in sorted(client.wal.items()):
            self.assertEqual(lsn, end)
            end += len(data)
            self.assertEqual(data, self.wal.image[lsn - MB : end - MB])
        return end

    def ended(self, end: int) -> list[str]:
        return [f'ERROR XX000: ending streaming to "pageserver" at {format_lsn(end)}', "Z I"]


class Naming(Serving):
    def test_each_is_served_the_timeline_it_names(self) -> None:
        self.put(OTHER, MB + 1000)
        for ids, end in ((ONE, self.committed), (OTHER, MB + 1000)):
            client = self.greeted(ids)
            told = client.send(query("IDENTIFY_SYSTEM"))
            self.assertIn(f"D {SYSTEM} 1 {format_lsn(end)} NULL", told)
            self.ask(client)
            self.assertEqual(self.wal_of(client), end)

    def test_by_parameters_too(self) -> None:
        for names in (("ztenantid", "ztimelineid"), ("tenant_id", "timeline_id")):
            client = self.client()
            named = dict(zip(names, (ONE.tenant_id, ONE.timeline_id), strict=True))
            self.assertEqual(client.start_up(**named), ["GREETING"])

    def test_what_else_it_says_are_settings(self) -> None:
        client = self.client()
        more = "-c wal_sender_timeout=7s -c application_name=me"
        client.start_up(options=options(ONE, CONNSTR, more), client_encoding="LATIN1")
        told = parameter_statuses(bytes(client.transport.arrived))
        self.assertEqual((told["application_name"], told["client_encoding"]), ("me", "LATIN1"))
        self.assertIn("D 7s", client.send(query("SHOW wal_sender_timeout")))
        self.assertEqual(
            self.client().start_up(options=options(ONE, "", "-c nosuch=1"))[1:],
            ['FATAL 42704: unrecognized configuration parameter "nosuch"', "EOF"],
        )

    def test_ids_that_are_missing(self) -> None:
        told = self.refused_at_once()
        self.assertEqual(told[0], "FATAL 28000: no tenant ID specified in startup packet")
        self.assertIn("options='-c ztenantid=", told[1])
        told = self.refused_at_once(ztenantid=ONE.tenant_id)
        self.assertEqual(told[0], "FATAL 28000: no timeline ID specified in startup packet")

    def test_ids_that_are_none(self) -> None:
        told = self.refused_at_once(ztenantid="x", ztimelineid=ONE.timeline_id)
        self.assertEqual(told[0], 'FATAL 22023: invalid value for parameter "ztenantid": "x"')

    def test_what_cannot_be_printed_is_no_line_of_its_own_in_the_log(self) -> None:
        wrong = "x\n\x1b[2J\u2028y"
        parameters = [
            {"ztenantid": wrong, "ztimelineid": ONE.timeline_id},
            {"options": options(ONE, "", "-c no\\\nsuch=1")},
            {"options": options(), "replication": wrong},
            {"options": options(), "datestyle\n": "1"},
        ]
        for said in parameters:
            self.client().start_up(**said)
        client = self.greeted(ONE, "", user="a\nb", application_name="c\nd")
        client.send(query("NONSENSE\n!"))
        self.ask(client)
        client.send(message(b"f", b"e\nf\0"))
        lines = [formatEvent(event) for event in self.logged]
        self.assertEqual([line for line in lines if not line.isprintable()], [])
        self.assertEqual(len(self.lines("x\\n\\x1b[2J\\u2028y")), 2)
        self.assertTrue(self.lines("no\\nsuch"))
        self.assertTrue(self.lines("a\\nb@"))

    def test_ids_of_which_there_is_nothing(self) -> None:
        told = self.refused_at_once(options=options(OTHER))
        self.assertEqual(told, [f'FATAL 42704: timeline "{OTHER}" does not exist'])
        self.put(OTHER)
        self.greeted(OTHER)

    def test_one_that_is_refused_harms_no_other(self) -> None:
        put_file(self.put(OTHER), b"no control file")
        for _ in range(2):
            told = self.refused_at_once(options=options(OTHER))
            self.assertIn("FATAL XX001: invalid control file", told[0])
        self.greeted()

    def test_there_are_no_slots(self) -> None:
        told = self.greeted().send(query("CREATE_REPLICATION_SLOT s PHYSICAL"))
        self.assertTrue(told[0].startswith("ERROR 53400: all replication slots are in use"))
        (line,) = self.lines("all replication slots are in use")
        self.assertTrue(
            line.endswith(
                "(there are no slots on a safekeeper's WAL: let the client do without one)"
            )
        )

    def test_the_version_is_that_of_the_timeline(self) -> None:
        for server_version in (None, "15.2"):
            self.factory = server(self.safekeeper, self.clock, server_version=server_version)
            client = self.greeted()
            told = parameter_statuses(bytes(client.transport.arrived))
            self.assertEqual(told["server_version"], server_version or "18.0 (walproto)")

    def test_what_is_logged_says_of_whom(self) -> None:
        client = self.pageserver()
        client.transport.drop()
        of_it = [event for event in self.logged if "application_name" in event]
        self.assertEqual(len(of_it), 2)
        for event in of_it:
            self.assertEqual(event["tenant"], ONE.tenant_id)
            self.assertEqual(event["timeline"], ONE.timeline_id)
            self.assertEqual(event["application_name"], "pageserver")
            self.assertEqual(event["peer"], "192.0.2.1:40000")
            line = formatEvent(event)
            self.assertTrue(line.startswith(f'timeline {ONE}: "pageserver" (pid '), line)


class Replaced(Serving):
    """The timeline's directory is removed, and another made in its place."""

    def test_nobody_is_sent_what_was_there_before(self) -> None:
        before, idle = self.greeted(), self.greeted()
        self.ask(before)
        self.assertEqual(self.wal_of(before), self.committed)
        shutil.rmtree(self.path / str(ONE))
        self.wal = built(1.5, seed=99)
        self.put(ONE, MB + 5000)
        client = self.greeted()
        self.ask(client)
        self.assertEqual(self.wal_of(client), MB + 5000)
        told = [f'FATAL 58P01: the directory of timeline "{ONE}" was removed or replaced', "EOF"]
        self.assertEqual(before.hear()[-2:], told)
        self.assertEqual(self.ask(idle), told)

    def test_a_suspended_one_has_its_history(self) -> None:
        client = self.greeted()
        self.assertTrue(self.get(ONE).suspend())
        told = client.send(query("TIMELINE_HISTORY 1"))
        self.assertTrue(told[1].startswith("ERROR 58P01: could not open file"), told)


class Following(Serving):
    """A pageserver."""

    def test_it_follows_what_is_committed(self) -> None:
        client = self.pageserver()
        self.assertEqual(self.wal_of(client), self.committed)
        for lsn in (self.committed + 1, MB + 400_000, 2 * MB - 5, 2 * MB + 5, self.wal.lsn):
            self.get(ONE).advance(lsn)
            client.hear()
            self.assertEqual(self.wal_of(client), lsn)

    def test_it_is_asked_after_a_second_without_news(self) -> None:
        client = self.pageserver()
        asked = [f"k {format_lsn(self.committed)} reply=1"]
        self.assertEqual(client.wait(0.75), [])
        self.assertEqual(client.wait(0.25), asked)
        self.assertEqual(client.wait(1), asked)

    def test_its_feedback_is_kept(self) -> None:
        client = self.pageserver()
        self.assertEqual(client.send(zenith(self.committed - 8)), [])
        (replica,) = self.get(ONE).replicas
        self.assertEqual(
            (replica.write_lsn, replica.flush_lsn, replica.apply_lsn),
            (self.committed - 8, self.committed - 16, self.committed - 24),
        )

    def test_it_is_let_go_when_it_has_all(self) -> None:
        client, timeline = self.pageserver(), self.get(ONE)
        client.send(zenith(self.committed - 1))
        client.wait(1)
        client.send(zenith(self.committed))
        self.assertEqual(client.wait(1), self.ended(self.committed))
        self.assertEqual(list(timeline.replicas), [])
        self.assertFalse(timeline.is_active)
        self.assertEqual(len(self.lines("nobody brings WAL")), 1)

    def test_but_not_while_what_is_committed_is_not_here(self) -> None:
        """WAL that was committed ends early, by a record that is damaged, say."""
        directory = self.path / str(OTHER)
        directory.mkdir(parents=True)
        put_wal(directory, self.wal, MB + 400_000)
        put_control(directory, OTHER, commit_lsn=self.wal.lsn)
        client = self.pageserver(MB, CONNSTR, OTHER)
        end = self.wal_of(client)
        self.assertLess(end, self.wal.lsn)
        client.send(zenith(end))
        for _ in range(3):
            self.assertEqual(client.wait(1), [f"k {format_lsn(end)} reply=1"])
        client.transport.drop()
        self.assertTrue(self.calls(11))
        put_wal(directory, self.wal)
        self.get(OTHER).look()
        client = self.pageserver(end, CONNSTR, OTHER)
        self.assertEqual(self.wal_of(client, end), self.wal.lsn)
        client.send(zenith(self.wal.lsn))
        self.assertEqual(client.wait(1), self.ended(self.wal.lsn))
        self.assertEqual(self.calls(25), [])

    def test_but_not_while_a_proposer_is_there(self) -> None:
        client, timeline = self.pageserver(), self.get(ONE)
        timeline.is_proposer_connected = True
        client.send(zenith(self.committed))
        for _ in range(5):
            self.assertEqual(client.wait(1), [f"k {format_lsn(self.committed)} reply=1"])
        timeline.is_proposer_connected = False
        self.assertEqual(client.wait(1), self.ended(self.committed))

    def test_nor_is_the_timeline_suspended_while_others_stream(self) -> None:
        client, timeline = self.pageserver(), self.get(ONE)
        other = self.greeted()
        self.ask(other)
        client.send(zenith(self.committed))
        self.assertEqual(client.wait(1), self.ended(self.committed))
        self.assertTrue(timeline.is_active)
        timeline.advance(self.wal.lsn)
        other.hear()
        self.assertEqual(self.wal_of(other), self.wal.lsn)

    def test_it_may_begin_anew(self) -> None:
        client = self.pageserver()
        client.send(zenith(self.committed))
        client.wait(1)
        put_control(self.path / str(ONE), ONE, commit_lsn=self.wal.lsn)
        self.ask(client, self.committed)
        self.assertEqual(self.wal_of(client), self.wal.lsn)

    def test_where_nothing_is_committed_yet(self) -> None:
        self.put(OTHER)
        client = self.pageserver(MB, CONNSTR, OTHER)
        self.assertEqual(client.wait(1), self.ended(MB))

    def test_where_it_is_far_ahead(self) -> None:
        start = 100 * MB
        client = self.pageserver(start)
        client.send(zenith(start))
        self.get(ONE).is_proposer_connected = True
        self.assertEqual(client.wait(1), [f"k {format_lsn(start)} reply=1"])
        self.assertEqual(client.wal, {})
        (line,) = self.lines("bytes ahead")
        self.assertIn(
            f"is {start - self.committed} bytes ahead of what is committed here, which ends at "
            f"{format_lsn(self.committed)}: it is sent none until more is",
            line,
        )

    def test_the_reason_is_typed(self) -> None:
        client, caught = self.pageserver(), []
        client.send(zenith(self.committed))
        original = PageserverStream.check

        def check(stream: PageserverStream) -> None:
            try:
                original(stream)
            except StreamingEnded as error:
                caught.append((error.reason, error.message.startswith("ending streaming to ")))
                raise

        self.patch(PageserverStream, "check", check)
        client.wait(1)
        self.assertEqual(caught, [(EndReason.SUSPENDED, True)])

    def test_what_it_says_and_nobody_knows_is_logged_once(self) -> None:
        client = self.pageserver()
        for _ in range(3):
            client.send(zenith_with(b"ps_mood"))
        self.assertEqual(len(self.lines("ps_mood")), 1)

    def test_pageservers_that_disagree_are_logged_once(self) -> None:
        one, other = self.pageserver(), self.pageserver()
        for lsn in (1000, 2000, 3000):
            one.send(zenith(lsn))
            other.send(zenith(lsn + 1))
        self.assertEqual(len(self.lines("pageservers disagree")), 1)

    def test_feedback_that_is_wrong_ends_the_stream_and_no_other(self) -> None:
        other = self.pageserver()
        for wrong in (b"", b"z", b"z" + bytes(8), b"r", b"h" + bytes(3)):
            client = self.pageserver()
            (told, ready) = client.send(message(b"d", wrong))
            self.assertTrue(told.startswith("ERROR 08P01: "), told)
            self.assertEqual(ready, "Z I")
        self.assertEqual(len(self.get(ONE).replicas), 1)
        self.get(ONE).advance(self.wal.lsn)
        other.hear()
        self.assertEqual(self.wal_of(other), self.wal.lsn)

    def test_unexpected_messages_are_passed_over(self) -> None:
        client = self.pageserver()
        for _ in range(3):
            self.assertEqual(client.send(SYNC, query("SELECT 1"), message(b"H")), [])
        self.assertEqual(len(self.lines("passed over")), 2)
        self.get(ONE).advance(self.wal.lsn)
        client.hear()
        self.assertEqual(self.wal_of(client), self.wal.lsn)

    def test_copy_fail_ends_the_connection(self) -> None:
        client = self.pageserver()
        told = client.send(message(b"f", b"no\0"))
        self.assertEqual(told, ["FATAL 57014: Copy failed", "EOF"])

    def test_one_that_is_silent_is_left(self) -> None:
        client = self.pageserver()
        self.clock.pump([0.5] * 130)
        self.assertEqual(client.hear()[-1], "EOF")

    def test_shutdown(self) -> None:
        client = self.pageserver()
        client.protocol.shut_down()
        self.assertEqual(client.hear(), [f"k {format_lsn(self.committed)} reply=1"])
        self.assertEqual(client.send(zenith(self.committed)), ["C COPY 0", "EOF"])


class Others(Serving):
    """Standbys, and whoever else there is."""

    def test_they_have_the_rhythm_of_postgresql(self) -> None:
        client = self.greeted()
        self.ask(client)
        client.send(status(self.committed))
        self.assertEqual(client.wait(29.5), [])
        self.assertEqual(client.wait(0.5), [f"k {format_lsn(self.committed)} reply=1"])

    def test_they_say_nothing_that_standbys_do_not(self) -> None:
        client = self.greeted()
        self.ask(client)
        told = client.send(zenith(self.committed))
        self.assertEqual(told, ['FATAL 08P01: unexpected message type "z"', "EOF"])
        client = self.greeted()
        self.ask(client)
        self.assertEqual(
            client.send(SYNC), ['FATAL 08P01: invalid standby message type "S"', "EOF"]
        )

    def test_they_may_be_ahead_of_what_is_known_to_be_committed(self) -> None:
        self.put(OTHER)
        client = self.greeted(OTHER)
        self.assertEqual(self.ask(client, self.wal.lsn), ["W"])
        (line,) = self.lines("is sent none")
        self.assertIn(
            f"begins at {format_lsn(self.wal.lsn)}, and nothing is committed here yet", line
        )
        client = self.greeted(OTHER)
        (_, told, _) = self.ask(client, self.wal.lsn + MB + 1)
        self.assertIn("is ahead of the WAL flush position", told)

    def test_another_postgresql_timeline(self) -> None:
        told = self.greeted().send(query(f"START_REPLICATION {format_lsn(MB)} TIMELINE 2"))
        self.assertEqual(
            told, ["ERROR XX000: requested timeline 2 is not in this server's history", "Z I"]
        )


class Recovering(Serving):
    def proposer(self) -> Client:
        return self.greeted(ONE, CONNSTR, application_name="wal_proposer_recovery")

    def test_it_gets_all_there_is_and_the_end(self) -> None:
        client = self.proposer()
        for _ in range(2):
            client.wal.clear()
            told = self.ask(client)
            self.assertEqual((told[0], told[-1]), ("W", "c"))
            self.assertEqual(self.wal_of(client), self.wal.lsn)
            self.assertEqual(client.send(COPY_DONE), COPIED)
        self.assertEqual(self.get(ONE).commit_lsn, self.committed)

    def test_or_the_end_alone(self) -> None:
        for start in (self.wal.lsn, 100 * MB):
            client = self.proposer()
            self.assertEqual(self.ask(client, start), ["W", "c"])
            self.assertEqual(client.send(COPY_DONE), COPIED)
        (line,) = self.lines("ahead of the WAL here")
        self.assertTrue(line.endswith(f"ends at {format_lsn(self.wal.lsn)}: it is sent none"))

    def test_what_comes_meanwhile_is_for_others(self) -> None:
        self.wal, more = built(1.5), built(2.5)
        client = self.client(capacity=1000)
        named = {"application_name": "wal_proposer_recovery", "options": options()}
        client.start_up(**named)
        client.take()
        self.ask(client)
        put_wal(self.path / str(ONE), more)
        self.get(ONE).look()
        while client.take()[-1:] != ["c"]:
            pass
        self.assertEqual(self.wal_of(client), self.wal.lsn)

    def test_it_is_not_spoken_to_otherwise(self) -> None:
        client = self.client(capacity=1000)
        client.start_up(application_name="wal_proposer_recovery", options=options())
        client.take()
        self.ask(client)
        self.clock.pump([1] * 1000)
        self.assertTrue(client.transport.is_connected)
        self.assertEqual(self.lines("timeout"), [])
        client.transport.drop()

    def test_nobody_is_called(self) -> None:
        client = self.proposer()
        self.ask(client)
        client.send(COPY_DONE, TERMINATE)
        self.assertEqual(self.calls(30), [])


class Waiting(Serving):
    """For a proposer, who says how long segments are."""

    def setUp(self) -> None:
        super().setUp()
        self.place = self.path / str(OTHER)
        self.place.mkdir(parents=True)
        put_control(self.place, OTHER, wal_seg_size=0, pg_version=0, system_id=0)

    def wait(self, **more: str) -> Client:
        client = self.greeted(OTHER, **more)
        told = client.send(query("IDENTIFY_SYSTEM"))
        self.assertIn("D 0 1 0/0 NULL", told)
        self.assertEqual(self.ask(client), [])
        return client

    def complaints(self) -> int:
        return len(self.lines("before a proposer has connected"))

    def come(self) -> None:
        put_wal(self.place, self.wal)
        put_control(self.place, OTHER, commit_lsn=self.committed)
        self.directory.get(OTHER).look()
        self.clock.advance(0)

    def test_it_is_said_each_second_and_then_it_starts(self) -> None:
        client = self.wait(application_name="pageserver")
        self.assertEqual(self.complaints(), 1)
        self.assertEqual(client.wait(0.5), [])
        self.assertEqual(self.complaints(), 1)
        self.clock.pump([0.5] * 5)
        self.assertEqual(self.complaints(), 4)
        self.come()
        self.assertEqual(client.hear()[0], "W")
        self.assertEqual(self.wal_of(client), self.committed)
        self.clock.pump([0.5] * 5)
        self.assertEqual(self.complaints(), 4)

    def test_the_segment_size_is_enough(self) -> None:
        """Then there is nothing to send yet, and a pageserver is let go."""
        client, pageserver = self.wait(), self.wait(application_name="pageserver")
        put_control(self.place, OTHER, commit_lsn=0)
        self.directory.get(OTHER).look()
        self.assertEqual(client.hear(), ["W"])
        self.assertEqual(pageserver.hear(), ["W"])
        self.assertEqual(pageserver.wait(1), self.ended(MB))
        self.come()
        client.hear()
        self.assertEqual(self.wal_of(client), self.committed)

    def test_nothing_is_committed_of_wal_that_has_not_come(self) -> None:
        put_control(self.place, OTHER, commit_lsn=0)
        client = self.pageserver(MB, CONNSTR, OTHER)
        self.assertEqual(client.wait(1), self.ended(MB))
        self.assertEqual(self.complaints(), 0)

    def test_what_is_known_already_is_told(self) -> None:
        put_control(self.place, OTHER, wal_seg_size=0, pg_version=150004)
        client = self.greeted(OTHER)
        told = parameter_statuses(bytes(client.transport.arrived))
        self.assertEqual(told["server_version"], "15.0 (walproto)")
        self.assertIn(f"D {SYSTEM} 1 0/0 NULL", client.send(query("IDENTIFY_SYSTEM")))
        self.assertIn("D 0", client.send(query("SHOW wal_segment_size")))

    def test_it_turns_out_that_it_cannot(self) -> None:
        client = self.wait()
        put_file(self.place, b"")
        self.directory.get(OTHER).look()
        (told, end) = client.hear()
        self.assertTrue(told.startswith("FATAL XX001: invalid control file"), told)
        self.assertEqual(end, "EOF")

    def test_it_may_be_cancelled_and_asked_for_again(self) -> None:
        client = self.wait()
        pid, key = client.key
        self.client().send(cancel_request(pid, key))
        self.assertEqual(client.hear(), CANCELED)
        self.assertFalse(self.directory.get(OTHER).is_in_use)
        self.assertEqual(self.ask(client), [])
        self.come()
        self.assertEqual(client.hear()[0], "W")

    def test_whatever_ends_it_nothing_is_left(self) -> None:
        ends: list[tuple[Callable[[Client], Any], list[str]]] = [
            (lambda client: client.transport.drop(), ["EOF"]),
            (lambda client: client.protocol.shut_down(), ADMIN_SHUTDOWN),
            (lambda client: client.protocol.terminate(), ADMIN_SHUTDOWN),
        ]
        for number, (end, told) in enumerate(ends):
            client = self.wait()
            end(client)
            self.assertEqual(client.hear(), told)
            line = self.lines("does not wait any longer")[number]
            self.assertTrue(line.startswith(f"timeline {OTHER}: 192.0.2.1:40000: "), line)
            said = self.complaints()
            self.clock.pump([0.5] * 5)
            self.assertEqual(self.complaints(), said)
            self.assertFalse(self.directory.get(OTHER).is_in_use)


class Calling(Serving):
    """Call-backs."""

    def test_whoever_names_a_pageserver_has_it_called(self) -> None:
        self.greeted(ONE, CONNSTR).transport.drop()
        self.assertEqual(self.calls(25), [Subscription(ONE, CONNSTR)] * 2)

    def test_not_a_pageserver_itself(self) -> None:
        self.greeted(ONE, CONNSTR, application_name="pageserver")
        self.assertEqual(self.calls(25), [])

    def test_nor_for_a_timeline_that_there_is_not(self) -> None:
        self.client().start_up(options=options(OTHER, CONNSTR))
        self.assertEqual(self.calls(25), [])

    def test_it_is_called_until_it_streams_and_then_again(self) -> None:
        self.greeted(ONE, CONNSTR)
        for end in (
            lambda client: client.transport.drop(),
            lambda client: client.send(COPY_DONE),
            lambda client: client.send(message(b"d", b"z")),
            lambda client: client.send(message(b"f", b"\0")),
            lambda client: client.protocol.terminate(),
        ):
            self.assertTrue(self.calls(11))
            client = self.pageserver()
            self.assertEqual(self.calls(25), [])
            end(client)
            self.assertTrue(self.calls(11))

    def test_one_that_came_by_itself_is_called_when_its_stream_ends(self) -> None:
        client = self.pageserver()
        self.assertEqual(self.calls(25), [])
        client.transport.drop()
        self.assertEqual(self.calls(5), [Subscription(ONE, CONNSTR)])

    def test_one_that_has_all_is_not(self) -> None:
        self.greeted(ONE, CONNSTR)
        client = self.pageserver()
        client.send(zenith(self.committed))
        self.assertEqual(client.wait(1), self.ended(self.committed))
        self.assertEqual(self.calls(25), [])
        self.greeted(ONE, CONNSTR)
        self.assertEqual(self.called, [Subscription(ONE, CONNSTR)])

    def test_a_newer_one_takes_its_place(self) -> None:
        self.get(ONE).is_proposer_connected = True
        client = self.pageserver()
        self.greeted(ONE, ELSEWHERE)
        told = [f"FATAL XX000: timeline {ONE} belongs to another pageserver now", "EOF"]
        self.assertEqual(client.wait(1), told)
        self.assertEqual(set(self.calls(25)), {Subscription(ONE, ELSEWHERE)})
        self.pageserver()
        self.assertEqual(self.heard, ["W", *told])
        self.assertEqual(set(self.calls(25)), {Subscription(ONE, ELSEWHERE)})
        newer = self.pageserver(MB, ELSEWHERE)
        self.assertEqual(newer.wait(1), [f"k {format_lsn(self.committed)} reply=1"])
        self.assertEqual(self.calls(25), [])

    def test_also_while_wal_flows_and_while_none_is_taken(self) -> None:
        timeline = self.get(ONE)
        timeline.is_proposer_connected = True
        client, slow = self.pageserver(), self.client(capacity=1000)
        slow.start_up(options=options(ONE, CONNSTR), application_name="pageserver")
        slow.take()
        self.ask(slow)
        self.greeted(ONE, ELSEWHERE)
        told: list[str] = []
        for number in range(1, 5):
            timeline.advance(self.committed + 8 * number)
            told += client.wait(0.25)
        self.assertEqual(
            told[-2:], [f"FATAL XX000: timeline {ONE} belongs to another pageserver now", "EOF"]
        )
        self.assertEqual(len(timeline.replicas), 0)
        self.assertEqual(slow.take()[-2:], told[-2:])

    def test_also_one_that_comes_by_itself(self) -> None:
        self.get(ONE).is_proposer_connected = True
        client, newer = self.pageserver(), self.pageserver(MB, ELSEWHERE)
        self.assertEqual(client.wait(1)[1:], ["EOF"])
        self.assertEqual(newer.hear(), [f"k {format_lsn(self.committed)} reply=1"])
        newer.transport.drop()
        self.assertEqual(set(self.calls(25)), {Subscription(ONE, ELSEWHERE)})

    def test_an_embedding_program_has_the_last_word(self) -> None:
        self.get(ONE).is_proposer_connected = True
        client, newer = self.pageserver(), self.pageserver(MB, ELSEWHERE)
        self.safekeeper.pageservers.subscribe(ONE, CONNSTR)
        self.assertEqual(client.wait(1), [f"k {format_lsn(self.committed)} reply=1"])
        self.assertEqual(newer.hear()[1:], ["EOF"])

    def test_one_that_does_not_say_which_it_is(self) -> None:
        client = self.pageserver(MB, "")
        self.greeted(ONE, CONNSTR).transport.drop()
        client.wait(1)
        self.assertTrue(client.transport.is_connected)

    def test_without_an_address_nobody_is_called_and_that_is_said_once(self) -> None:
        self.begin(None)
        for connstr in (CONNSTR, ELSEWHERE):
            self.greeted(ONE, connstr)
        client = self.pageserver()
        client.transport.drop()
        self.assertEqual(self.calls(25), [])
        self.assertEqual(len(self.lines("--advertise HOST:PORT")), 1)

    def test_there_is_an_end_to_what_is_remembered(self) -> None:
        pageservers = self.safekeeper.pageservers
        for number in range(10 * REMEMBERED):
            pageservers.subscribe(ONE, f"host=ps{number}")
        self.assertEqual(len(pageservers._named[ONE]), REMEMBERED)
        self.assertTrue(pageservers.belongs_to(ONE, f"host=ps{number}"))


class Fields(Serving):
    def test_the_error_has_its_fields(self) -> None:
        client = self.pageserver()
        client.send(zenith(self.committed))
        client.wait(1)
        (error,) = errors(bytes(client.transport.arrived))
        self.assertEqual((error["S"], error["C"]), ("ERROR", "XX000"))
