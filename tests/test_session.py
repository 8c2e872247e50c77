"""Every state of the session against everything that can happen in it.

Each state is reached by a conversation, then one thing happens, and the table says what the client
hears and in which state that leaves the session.  That it is in that state is found out by talking
to it, too: no connection is left without an answer to what comes next.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from tests.fakes import (
    COPY_DONE,
    PAGE,
    SSL_REQUEST,
    START,
    SYNC,
    TERMINATE,
    Client,
    MemoryTimeline,
    SlowTimeline,
    cancel_request,
    feedback,
    message,
    query,
    server,
    startup,
    status,
)
from tests.upstream_fakes import HeldThreads
from walproto.access.authentication import Exchange, IAuthenticator
from walproto.access.grant import Grant
from walproto.access.peer import Peer
from walproto.errors import InvalidAuthorizationSpecification, UndefinedFile
from walproto.lsn import format_lsn
from walproto.server import session as session_module
from walproto.server.events import Events
from walproto.timeline.slot_file import NAME
from walproto.timeline.slots import Slots
from walproto.wire.messages import FRONTEND
from walproto.wire.startup import Startup

END = START + 4 * PAGE
AT_END = format_lsn(END)


@implementer(IAuthenticator)
class Password:
    """Asks for a password, in clear."""

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        answer = yield message(b"R", b"\0\0\0\3")
        if answer != b"secret\0":
            raise InvalidAuthorizationSpecification("no", fatal=True)
        return Grant("password")


PASSWORD = message(b"p", b"secret\0")

MESSAGES = {
    "Query": query("SHOW block_size"),
    "Sync": SYNC,
    "Flush": message(b"H"),
    "CopyData": status(START, reply=1),
    "CopyDone": COPY_DONE,
    "CopyFail": message(b"f", b"no\0"),
    "Terminate": TERMINATE,
    "PasswordMessage": PASSWORD,
    "Parse": message(b"P", b"\0SELECT 1\0\0\0"),
    "Bind": message(b"B", b"\0\0\0\0\0\0\0\0"),
    "Describe": message(b"D", b"S\0"),
    "Execute": message(b"E", b"\0\0\0\0\0"),
    "Close": message(b"C", b"S\0"),
    "FunctionCall": message(b"F", b"\0\0\0\1\0\0\0\0\0\0"),
}
EXTENDED = ("Parse", "Bind", "Describe", "Execute", "Close")
MALFORMED = {
    "Query without NUL": message(b"Q", b"SHOW block_size"),
    "Query with more behind": message(b"Q", b"SHOW block_size\0x"),
    "Sync with contents": message(b"S", b"x"),
    "feedback": feedback(1, 2),
    "empty CopyData": message(b"d"),
    "short status update": message(b"d", b"r" + bytes(32)),
    "status update with more behind": message(b"d", status(START)[5:] + b"more"),
    "unknown standby message": message(b"d", b"z"),
    "CopyDone with contents": message(b"c", b"x"),
    "unknown type": message(b"y"),
    "unknown type, no more": b"\xff",
    "length 3": b"Q\0\0\0\3",
    "length 2**32 - 1": b"Q\xff\xff\xff\xff",
}
EVENTS = (
    *("cancellation", "an hour goes by", "shutdown", "termination", "connection lost"),
    *("timeline switch", "WAL that is gone"),
)

CREATE = query("CREATE_REPLICATION_SLOT s PHYSICAL")
CREATED = [
    "T slot_name:25(-1) consistent_point:25(-1) snapshot_name:25(-1) output_plugin:25(-1)",
    "D s 0/0 NULL NULL",
    "C CREATE_REPLICATION_SLOT",
    "Z I",
]
SHOWN = ["T block_size:25(-1)", "D 8192", "C SHOW", "Z I"]
READY = ["Z I"]
COPIED = ["C START_STREAMING", "C START_REPLICATION", "Z I"]
NEXT_TIMELINE = ["T next_tli:20(8) next_tli_startpos:25(-1)"]
EXTENDED_ERROR = ["ERROR 08P01: extended query protocol not supported in a replication connection"]
FUNCTION_ERROR = [
    "ERROR 08P01: fastpath function calls not supported in a replication connection",
    "Z I",
]
ADMIN_SHUTDOWN = ["FATAL 57P01: terminating connection due to administrator command", "EOF"]
SHUTTING_DOWN = ["FATAL 57P03: the database system is shutting down", "EOF"]
PACKET_LENGTH = ["FATAL 08P01: invalid length of startup packet", "EOF"]
GONE = "58P01: requested WAL segment 000000010000000000000003 has already been removed"

Outcome = tuple[list[str], str]


def fatal(text: str) -> Outcome:
    return [f"FATAL 08P01: {text}", "EOF"], "closed"


def violations() -> dict[str, Outcome]:
    return {
        "unknown type": fatal("invalid frontend message type 121"),
        "unknown type, no more": fatal("invalid frontend message type 255"),
        "length 3": fatal("invalid message length"),
        "length 2**32 - 1": fatal("invalid message length"),
    }


def in_all(names: object, outcome: Outcome) -> dict[str, Outcome]:
    assert isinstance(names, tuple | list | dict)
    return dict.fromkeys(names, outcome)


def no_standby_messages() -> dict[str, Outcome]:
    """While streaming, anything but CopyData, CopyDone and Terminate ends the connection."""
    everything = MESSAGES | {
        name: data for name, data in MALFORMED.items() if name.startswith(("Query", "Sync"))
    }
    return {
        name: fatal(f'invalid standby message type "{chr(data[0])}"')
        for name, data in everything.items()
        if data[:1] not in (b"d", b"c", b"X")
    }


TABLE: dict[str, dict[str, Outcome]] = {
    "starting": {
        **in_all([*MESSAGES, *MALFORMED], (PACKET_LENGTH, "closed")),
        "unknown type, no more": ([], "stuck"),  # the authentication timeout ends that
        "cancellation": ([], "starting"),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": (SHUTTING_DOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "starting"),
        "WAL that is gone": ([], "starting"),
    },
    "opening": {
        **in_all([*MESSAGES, *MALFORMED], ([], "opening")),
        "cancellation": ([], "opening"),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": (SHUTTING_DOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "opening"),
        "WAL that is gone": ([], "opening"),
    },
    "authenticating": {
        **{
            name: fatal(f"expected password response, got message type {data[0]}")
            for name, data in (MESSAGES | MALFORMED).items()
        },
        **violations(),
        "PasswordMessage": (["GREETING"], "idle"),
        "cancellation": ([], "authenticating"),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": (SHUTTING_DOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "authenticating"),
        "WAL that is gone": ([], "authenticating"),
    },
    "idle": {
        **in_all(EXTENDED, (EXTENDED_ERROR, "skipping")),
        **violations(),
        "Query": (SHOWN, "idle"),
        "Sync": (READY, "idle"),
        "Flush": ([], "idle"),
        "CopyData": ([], "idle"),
        "CopyDone": ([], "idle"),
        "CopyFail": ([], "idle"),
        "Terminate": (["EOF"], "closed"),
        "PasswordMessage": fatal("invalid frontend message type 112"),
        "FunctionCall": (FUNCTION_ERROR, "idle"),
        "Query without NUL": (["ERROR 08P01: invalid string in message", *READY], "idle"),
        "Query with more behind": (["ERROR 08P01: invalid message format", *READY], "idle"),
        "Sync with contents": (["ERROR 08P01: invalid message format", *READY], "idle"),
        "feedback": ([], "idle"),
        "empty CopyData": ([], "idle"),
        "short status update": ([], "idle"),
        "status update with more behind": ([], "idle"),
        "unknown standby message": ([], "idle"),
        "CopyDone with contents": ([], "idle"),
        "cancellation": ([], "idle"),
        "an hour goes by": ([], "idle"),
        "shutdown": (ADMIN_SHUTDOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "idle"),
        "WAL that is gone": ([], "idle"),
    },
    "waiting": {
        **in_all([*MESSAGES, *MALFORMED], ([], "waiting")),
        "cancellation": (
            ["ERROR 57014: canceling statement due to user request", *READY],
            "idle",
        ),
        "an hour goes by": ([], "waiting"),
        "shutdown": (ADMIN_SHUTDOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "waiting"),
        "WAL that is gone": ([], "waiting"),
    },
    "skipping": {
        **in_all([*MESSAGES, *MALFORMED], ([], "skipping")),
        **violations(),
        "Sync": (READY, "idle"),
        "Sync with contents": (["ERROR 08P01: invalid message format", *READY], "idle"),
        "Terminate": (["EOF"], "closed"),
        "PasswordMessage": fatal("invalid frontend message type 112"),
        "cancellation": ([], "skipping"),
        "an hour goes by": ([], "skipping"),
        "shutdown": (ADMIN_SHUTDOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "skipping"),
        "WAL that is gone": ([], "skipping"),
    },
    "streaming": {
        **no_standby_messages(),
        **violations(),
        "CopyData": ([f"k {AT_END} reply=0"], "streaming"),
        "CopyDone": (["c", *COPIED], "idle"),
        "CopyDone with contents": (["c", *COPIED], "idle"),
        "Terminate": (["EOF"], "closed"),
        "feedback": ([], "streaming"),
        "status update with more behind": ([], "streaming"),
        "empty CopyData": (["ERROR 08P01: no data left in message", *READY], "idle"),
        "short status update": (
            ["ERROR 08P01: no data left in message", *READY],
            "idle",
        ),
        "unknown standby message": fatal('unexpected message type "z"'),
        "cancellation": (
            ["ERROR 57014: canceling statement due to user request", *READY],
            "idle",
        ),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": ([f"k {AT_END} reply=1"], "stopping"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": (["c"], "stream_ended"),
        "WAL that is gone": ([f"ERROR {GONE}", *READY], "idle"),
    },
    "stream_ended": {
        **no_standby_messages(),
        **violations(),
        "CopyData": ([], "stream_ended"),
        "CopyDone": ([*NEXT_TIMELINE, f"D 2 {AT_END}", *COPIED], "idle"),
        "CopyDone with contents": ([*NEXT_TIMELINE, f"D 2 {AT_END}", *COPIED], "idle"),
        "Terminate": (["EOF"], "closed"),
        "feedback": ([], "stream_ended"),
        "status update with more behind": ([], "stream_ended"),
        "empty CopyData": (["ERROR 08P01: no data left in message", *READY], "idle"),
        "short status update": (
            ["ERROR 08P01: no data left in message", *READY],
            "idle",
        ),
        "unknown standby message": fatal('unexpected message type "z"'),
        "cancellation": (
            ["ERROR 57014: canceling statement due to user request", *READY],
            "idle",
        ),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": (ADMIN_SHUTDOWN, "closed"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": ([], "stream_ended"),
        "WAL that is gone": ([], "stream_ended"),
    },
    "stopping": {
        **no_standby_messages(),
        **violations(),
        "CopyData": ([f"k {AT_END} reply=0", f"k {AT_END} reply=1"], "stopping"),
        "CopyDone": (["c", "EOF"], "closed"),
        "CopyDone with contents": (["c", "EOF"], "closed"),
        "Terminate": (["EOF"], "closed"),
        "feedback": ([f"k {AT_END} reply=1"], "stopping"),
        "status update with more behind": ([f"k {AT_END} reply=1"], "stopping"),
        "empty CopyData": (["ERROR 08P01: no data left in message", "EOF"], "closed"),
        "short status update": (
            ["ERROR 08P01: no data left in message", "EOF"],
            "closed",
        ),
        "unknown standby message": fatal('unexpected message type "z"'),
        "cancellation": (ADMIN_SHUTDOWN, "closed"),
        "an hour goes by": (["EOF"], "closed"),
        "shutdown": ([], "stopping"),
        "termination": (ADMIN_SHUTDOWN, "closed"),
        "connection lost": (["EOF"], "closed"),
        "timeline switch": (["C COPY 0", "EOF"], "closed"),
        "WAL that is gone": ([f"ERROR {GONE}", "EOF"], "closed"),
    },
    "closed": {
        **in_all([*MESSAGES, *MALFORMED, *EVENTS], ([], "closing")),
        "connection lost": (["EOF"], "closed"),
        "an hour goes by": (["EOF"], "closed"),
    },
}


class EveryState(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="walproto-")
        self.addCleanup(directory.cleanup)
        self.path = Path(directory.name)
        self.begin()

    def begin(self) -> None:
        self.path.joinpath(NAME).unlink(missing_ok=True)
        self.clock = Clock()
        self.timeline = MemoryTimeline(8 * PAGE)
        self.timeline.commit_lsn = END
        self.threads = HeldThreads()
        slots = Slots(self.path, self.threads)
        self.factory = server(self.timeline, self.clock, slots=slots)

    # --- the states ------------------------------------------------------------------------

    def in_starting(self) -> Client:
        return Client(self.factory, self.clock)

    def in_opening(self) -> Client:
        self.slow = SlowTimeline(self.timeline)
        self.factory = server(self.slow, self.clock)
        client = Client(self.factory, self.clock)
        self.assertEqual(client.start_up(), [])
        self.addCleanup(self.assert_nobody_waits, self.slow.opened)
        return client

    def assert_nobody_waits(self, opened: Deferred[None]) -> None:
        self.assertTrue(opened.called)
        opened.addErrback(lambda failure: failure.trap(CancelledError))

    def in_authenticating(self) -> Client:
        self.factory = server(self.timeline, self.clock, authenticator=Password())
        client = Client(self.factory, self.clock)
        self.assertEqual(client.start_up(), ["R 3"])
        return client

    def in_idle(self) -> Client:
        client = Client(self.factory, self.clock)
        self.assertEqual(client.start_up(), ["GREETING"])
        return client

    def in_waiting(self) -> Client:
        client = self.in_idle()
        self.assertEqual(client.send(CREATE), [])
        return client

    def in_skipping(self) -> Client:
        client = self.in_idle()
        self.assertEqual(client.send(MESSAGES["Parse"]), EXTENDED_ERROR)
        return client

    def in_streaming(self) -> Client:
        client = Client(self.factory, self.clock)
        self.assertEqual(client.stream()[0], "W")
        return client

    def in_stream_ended(self) -> Client:
        client = self.in_streaming()
        self.timeline.switch(END)
        self.assertEqual(client.hear(), ["c"])
        return client

    def in_stopping(self) -> Client:
        client = self.in_streaming()
        self.factory.shut_down(5.0)
        self.assertEqual(client.hear(), [f"k {AT_END} reply=1"])
        return client

    def in_closed(self) -> Client:
        """It stays in this state as long as the client has not taken what it was told."""
        client = Client(self.factory, self.clock, capacity=10_000)
        client.send(startup(), TERMINATE)
        self.assertTrue(client.transport.disconnecting)
        self.assertTrue(client.transport.is_connected)
        return client

    # --- and whether it is one of them -----------------------------------------------------

    def is_starting(self, client: Client) -> None:
        self.assertEqual(client.send(SSL_REQUEST), ["N"])
        self.assertEqual(client.start_up(), ["GREETING"])

    def is_opening(self, client: Client) -> None:
        """As while waiting."""
        self.slow.opened.callback(None)
        heard, after = TABLE["idle"][self.happened]
        if self.happened in EVENTS:
            heard, after = [], "idle"
        self.assertEqual(client.hear(), ["GREETING", *heard])
        getattr(self, f"is_{after}")(client)

    def is_authenticating(self, client: Client) -> None:
        self.assertEqual(client.send(PASSWORD), ["GREETING"])

    def is_idle(self, client: Client) -> None:
        self.assertEqual(client.send(MESSAGES["Query"]), SHOWN)
        self.assertEqual(list(self.timeline.replicas), [])
        self.assertEqual(self.timeline.observers, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def is_waiting(self, client: Client) -> None:
        """What was said meanwhile is dealt with when that is over, as if it were said then."""
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.threads.work()
        heard, after = TABLE["idle"][self.happened]
        self.assertEqual(client.hear(), CREATED + heard)
        getattr(self, f"is_{after}")(client)

    def is_skipping(self, client: Client) -> None:
        self.assertEqual(client.send(MESSAGES["Query"]), [])
        self.assertEqual(client.send(SYNC), READY)
        self.is_idle(client)

    def is_streaming(self, client: Client) -> None:
        self.assertEqual(client.send(status(START, reply=1)), [f"k {AT_END} reply=0"])
        self.assertEqual(len(self.timeline.replicas), 1)
        self.timeline.commit(END + PAGE)
        self.assertEqual(client.hear(), [f"w {AT_END}+{PAGE} of {format_lsn(END + PAGE)}"])

    def is_stream_ended(self, client: Client) -> None:
        self.assertEqual(len(self.timeline.replicas), 1)
        self.assertEqual(client.send(COPY_DONE)[-1:], READY)
        self.is_idle(client)

    def is_stopping(self, client: Client) -> None:
        self.assertEqual(client.send(status(END)), ["C COPY 0", "EOF"])
        self.is_closed(client)

    def is_closing(self, client: Client) -> None:
        self.assertTrue(client.transport.disconnecting)
        self.assertEqual(client.take(), ["GREETING", "EOF"])
        self.is_closed(client)

    def is_stuck(self, client: Client) -> None:
        self.assertEqual(client.wait(59.9), [])
        self.assertEqual(client.wait(0.2), ["EOF"])
        self.is_closed(client)

    def is_closed(self, client: Client) -> None:
        self.assertFalse(client.transport.is_connected)
        self.assertEqual(self.factory.connections, {})
        self.assertEqual(list(self.timeline.replicas), [])
        self.assertEqual(self.timeline.observers, set())
        self.assertEqual(client.transport.written_too_late, b"")

    # --- what happens ----------------------------------------------------------------------

    def happen(self, client: Client, what: str) -> list[str]:
        match what:
            case "cancellation":
                pid = client.protocol.pid
                key = b""
                if b"K\0\0\0\x0c" in client.transport.arrived:
                    _, key = client.key
                Client(self.factory, self.clock).send(cancel_request(pid, key))
                return client.hear()
            case "an hour goes by":
                return client.wait(3600)
            case "shutdown":
                client.protocol.shut_down()
                return client.hear()
            case "termination":
                client.protocol.terminate()
                return client.hear()
            case "connection lost":
                client.transport.drop()
                return client.hear()
            case "timeline switch":
                self.timeline.switch(END)
                return client.hear()
            case "WAL that is gone":
                self.timeline.error = UndefinedFile(GONE[7:])
                self.timeline.commit(END + 8)
                heard = client.hear()
                self.timeline.commit_lsn, self.timeline.error = END, None
                return heard
            case _:
                return client.send((MESSAGES | MALFORMED)[what])

    def go_through(self, state: str) -> None:
        for what, (heard, after) in TABLE[state].items():
            self.begin()
            self.happened = what
            client = getattr(self, f"in_{state}")()
            self.assertEqual(self.happen(client, what), heard, f"{state}: {what}")
            try:
                getattr(self, f"is_{after}")(client)
            except self.failureException as error:
                self.fail(f"{state}: {what}: is not {after} behind that: {error}")
            self.assertEqual(self.flushLoggedErrors(), [], f"{state}: {what}")

    def test_starting(self) -> None:
        self.go_through("starting")

    def test_opening(self) -> None:
        self.go_through("opening")

    def test_authenticating(self) -> None:
        self.go_through("authenticating")

    def test_idle(self) -> None:
        self.go_through("idle")

    def test_waiting(self) -> None:
        self.go_through("waiting")

    def test_skipping(self) -> None:
        self.go_through("skipping")

    def test_streaming(self) -> None:
        self.go_through("streaming")

    def test_stream_ended(self) -> None:
        self.go_through("stream_ended")

    def test_stopping(self) -> None:
        self.go_through("stopping")

    def test_closed(self) -> None:
        self.go_through("closed")

    def test_nothing_is_left_out(self) -> None:
        self.assertEqual({data[:1] for data in MESSAGES.values()}, set(FRONTEND))
        self.assertEqual(set(MESSAGES), {message.name for message in FRONTEND.values()})
        states = {
            name
            for name, value in vars(session_module).items()
            if isinstance(value, type(session_module.idle)) and name[0] != "_"
        }
        self.assertEqual(states, set(TABLE))
        for state in TABLE:
            self.assertTrue(hasattr(self, f"test_{state}"))
        for state, row in TABLE.items():
            self.assertEqual(set(row), {*MESSAGES, *MALFORMED, *EVENTS}, state)


class Authentication(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = server(MemoryTimeline(), self.clock, authenticator=Password())
        self.client = Client(self.factory, self.clock)

    def test_the_right_answer_lets_a_client_in(self) -> None:
        self.assertEqual(self.client.start_up(), ["R 3"])
        self.assertEqual(self.client.send(PASSWORD), ["GREETING"])

    def test_a_wrong_one_does_not(self) -> None:
        self.client.start_up()
        self.assertEqual(self.client.send(message(b"p", b"\0")), ["FATAL 28000: no", "EOF"])

    def test_nor_does_one_that_comes_too_soon(self) -> None:
        self.assertEqual(self.client.send(startup(), PASSWORD), ["R 3", "GREETING"])

    def test_nor_does_it_end_in_good_order(self) -> None:
        self.client.start_up()
        told = "FATAL 08P01: expected password response, got message type 88"
        self.assertEqual(self.client.send(TERMINATE), [told, "EOF"])


class Sequences(SynchronousTestCase):
    """More than one thing, as clients were seen to do it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.timeline = MemoryTimeline(4 * PAGE)
        self.client = Client(server(self.timeline, self.clock), self.clock)

    def tearDown(self) -> None:
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_everything_up_to_a_sync_is_skipped(self) -> None:
        self.client.start_up()
        skipped = [data for name, data in MESSAGES.items() if name not in ("Sync", "Terminate")]
        skipped.remove(PASSWORD)
        self.assertEqual(
            self.client.send(MESSAGES["Bind"], *skipped, SYNC, SYNC, MESSAGES["Query"]),
            [*EXTENDED_ERROR, *READY, *READY, *SHOWN],
        )

    def test_queries_may_be_pipelined(self) -> None:
        self.client.start_up()
        self.assertEqual(self.client.send(*[MESSAGES["Query"]] * 3, TERMINATE), [*SHOWN * 3, "EOF"])

    def test_the_next_command_may_come_with_copy_done(self) -> None:
        self.client.stream()
        again = query(f"START_REPLICATION {AT_END}")
        late = [status(END, reply=1), COPY_DONE, message(b"d"), message(b"f", b"\0")]
        self.assertEqual(
            self.client.send(
                status(END, reply=1), COPY_DONE, *late, SYNC, MESSAGES["Query"], again
            ),
            [f"k {AT_END} reply=0", "c", *COPIED, *READY, *SHOWN, "W"],
        )

    def test_so_may_one_that_fails(self) -> None:
        self.client.start_up()
        answers = self.client.send(query("START_REPLICATION F/0"), MESSAGES["Query"])
        self.assertEqual(answers[0], "W")
        self.assertEqual(
            answers[1:],
            [
                "ERROR XX000: requested starting point F/0 is ahead of the WAL flush position of "
                f"this server {AT_END}",
                *READY,
                *SHOWN,
            ],
        )

    def test_each_request_for_a_reply_is_answered(self) -> None:
        self.client.stream()
        self.assertEqual(self.client.send(*[status(END, reply=7)] * 3), [f"k {AT_END} reply=0"] * 3)

    def test_the_same_connection_goes_on_with_the_next_timeline(self) -> None:
        self.timeline.switch(START + PAGE)
        self.assertEqual(self.client.stream()[-1], "c")
        self.assertEqual(
            self.client.send(status(START + PAGE), COPY_DONE),
            [*NEXT_TIMELINE, f"D 2 {format_lsn(START + PAGE)}", *COPIED],
        )
        self.assertEqual(
            self.client.send(query(f"START_REPLICATION {format_lsn(START)} TIMELINE 2")),
            ["W", f"w {format_lsn(START)}+{4 * PAGE} of {AT_END}"],
        )


#: What cannot happen in a state, for nothing that is in being then could tell the session of it.
IMPOSSIBLE: dict[str, set[str]] = {
    "encryption_requested": set(TABLE) - {"starting"},
    "tls_began": set(TABLE) - {"starting"},
    "cancel_requested": set(TABLE) - {"starting"},
    "startup_received": set(TABLE) - {"starting"},
    "authenticated": set(TABLE) - {"authenticating", "closed"},
    "waiting_began": set(TABLE) - {"opening", "idle"},
    "wait_over": set(TABLE) - {"opening", "waiting"},
    "opened": set(TABLE) - {"opening"},
    "failed": {"waiting"},
    "streaming_started": set(TABLE) - {"idle"},
    "timeline_ended": {
        *("starting", "opening", "authenticating", "idle", "waiting", "skipping", "stream_ended")
    },
    "replica_confirmed": set(TABLE) - {"stopping", "closed"},
    **{
        event: {"starting", "opening", "waiting"}
        for event in (
            *("query", "sync", "flush", "copy_data", "copy_done", "copy_fail", "terminate"),
            *("password", "extended_query", "function_call"),
        )
    },
}


def test_the_machine_has_a_transition_for_all_that_is_possible() -> None:
    has = {
        (state.name, event)
        for state, event, _, _ in session_module._builder._automaton.allTransitions()
    }
    events = {name for name, value in vars(Events).items() if isinstance(value, Callable)}  # type: ignore[arg-type]
    possible = {
        (state, event)
        for state in TABLE
        for event in events
        if event[0] != "_" and state not in IMPOSSIBLE.get(event, set())
    }
    assert possible - has == set()
    assert has - possible == set()
