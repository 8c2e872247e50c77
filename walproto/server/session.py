"""One client's conversation, as a state machine: no transport, no clock, no files.

Bytes go in at :meth:`Session.receive`, are dealt with in :meth:`Session.deal`, and come out
through the :class:`~walproto.server.events.Connection` the session was given, which also carries
out what a session only decides: to start and stop sending WAL, to close.  Whatever happens is an
event of :class:`~walproto.server.events.Events`.  The block of transitions at the end of this file
is the whole protocol: each line reads *in this state, when that happens, go there and do this*.

::

    starting ─▶ authenticating ─▶ opening ─▶ idle ◀─────────▶ streaming ─▶ stream_ended ─▶ idle
                                             ▲ │ ▲ │              │
                                             │ ▼ │ ▼              ▼
                                       skipping  waiting      stopping ─▶ closed  (◀─ all others)

While opening or waiting, for a disk or another session, nothing that the client says is dealt with,
but for a CancelRequest.  Nothing of what there is to serve is looked at for a client before it is
known who it is.

An event that an output causes is queued by the machine until that output has returned.

PostgreSQL: ``PostgresMain`` and ``forbidden_in_wal_sender`` in ``postgres.c``, ``WalSndLoop`` and
``ProcessRepliesIfAny`` in ``walsender.c``.
"""

from __future__ import annotations

from typing import Any

from automat import TypeMachineBuilder

from walproto.access.authentication import Exchange
from walproto.errors import ReportedError
from walproto.server import outputs as do
from walproto.server.answers import Answers
from walproto.server.configuration import Configuration
from walproto.server.events import Connection, Events
from walproto.server.results import Answer, StreamAnswer, Wait
from walproto.server.service import IServices, Service, Stream
from walproto.server.settings import Settings
from walproto.server.slot_commands import SlotCommands
from walproto.timeline.replicas import Replica
from walproto.wire import messages
from walproto.wire.framing import Framing
from walproto.wire.startup import (
    Cancellation,
    EncryptionRequest,
    Startup,
    parse_startup_packet,
)


class Session:
    """The conversation on one connection."""

    def __init__(
        self, connection: Connection, services: IServices, configuration: Configuration
    ) -> None:
        self.connection = connection
        self.services = services
        self.configuration = configuration
        self.framing = Framing()
        self.is_starting = True
        """Whether startup packets are awaited, and not messages."""
        self.is_greeted = False
        """Whether the startup phase is over."""
        self.is_closed = False
        self.encryption_requested: set[int] = set()
        self.log_prefix = ""
        """What a line in the log about this session begins with, in terms of ``log_fields``."""
        self.log_fields: dict[str, Any] = {}
        self.startup: Startup
        self.exchange: Exchange
        self.question = b""
        """What the client was last asked in it."""
        self.service: Service
        self.settings: Settings
        self.major: int
        self.answers: Answers
        self.answer: Answer | StreamAnswer | Wait
        """The one to the command that was the last; while opening, what that waits for."""
        self.is_waiting = False
        """Whether that waits for something."""
        self.slots: SlotCommands
        self.system_identified = False
        self.stream: Stream
        self.replica: Replica
        self.events: Events = _machine(self)
        event_of = {
            messages.Query: self.events.query,
            messages.Sync: self.events.sync,
            messages.Flush: self.events.flush,
            messages.CopyData: self.events.copy_data,
            messages.CopyDone: self.events.copy_done,
            messages.CopyFail: self.events.copy_fail,
            messages.Terminate: self.events.terminate,
            messages.PasswordMessage: self.events.password,
            messages.FunctionCall: self.events.function_call,
        }
        self._event_of_tag = {
            tag: event_of.get(message, self.events.extended_query)
            for tag, message in messages.FRONTEND.items()
        }

    def receive(self, data: bytes) -> None:
        """Bytes have come in, to be dealt with."""
        self.framing.receive(data)

    def deal(self, limit: int) -> bool:
        """Deal with at most ``limit`` of the messages that have come in; whether there may be
        more."""
        try:
            for _ in range(limit):
                if self.is_closed or self.is_waiting or self.connection.is_held:
                    break
                if not self._deal_with_one():
                    break
            else:
                return True
        except ReportedError as error:
            self.fail(error)
        if self.is_closed:
            self.framing.clear()
        return False

    def fail(self, error: ReportedError) -> None:
        """Something went wrong, and the client is to be told."""
        (self.events.failed_fatally if error.fatal else self.events.failed)(error)

    def clean_up(self) -> None:
        """What the session does is over, by an error or with it (``WalSndErrorCleanup``)."""
        if self.is_waiting:
            self.is_waiting = False
            self.connection.stop_waiting()
            self.answer.close()
        self.connection.end_replica()
        if self.is_greeted:
            self.slots.clean_up()

    def _deal_with_one(self) -> bool:
        """Deal with the next message; whether there was one."""
        if not self.is_starting:
            message = self.framing.next_message()
            if message is not None:
                self._event_of_tag[message[0]](*message)
            return message is not None
        if self.framing.begins_with_tls:
            self.events.tls_began()
            return True
        packet = self.framing.next_startup_packet()
        if packet is None:
            return False
        newest_version = self.services.newest_protocol_version(self.configuration)
        match parse_startup_packet(packet, newest_version):
            case EncryptionRequest() as encryption_request:
                self.events.encryption_requested(encryption_request)
            case Cancellation() as cancellation:
                self.events.cancel_requested(cancellation)
            case Startup() as startup:
                self.events.startup_received(startup)
        return True


_builder = TypeMachineBuilder(Events, Session)
E = Events

starting = _builder.state("starting")
authenticating = _builder.state("authenticating")
opening = _builder.state("opening")  # what there is to serve is being looked for
idle = _builder.state("idle")
waiting = _builder.state("waiting")  # with an answer, and every message behind its question
skipping = _builder.state("skipping")  # to the next Sync, behind an extended query
streaming = _builder.state("streaming")
stream_ended = _builder.state("stream_ended")  # our CopyDone is sent, the client's is awaited
stopping = _builder.state("stopping")  # the server shuts down, the client is to confirm
closed = _builder.state("closed")

starting.upon(E.encryption_requested).loop()(do.answer_encryption_request)
starting.upon(E.tls_began).loop()(do.begin_direct_tls)
starting.upon(E.cancel_requested).to(closed)(do.pass_cancellation_on)
starting.upon(E.startup_received).to(authenticating)(do.begin_authentication)

authenticating.upon(E.password).loop()(do.go_on_with_authentication)
authenticating.upon(E.authenticated).to(opening)(do.open_service)
for _message in (
    *(E.query, E.sync, E.flush, E.copy_data, E.copy_done, E.copy_fail, E.terminate),
    *(E.extended_query, E.function_call),
):
    authenticating.upon(_message).loop()(do.refuse_unauthenticated)

opening.upon(E.waiting_began).loop()(do.wait)
opening.upon(E.wait_over).loop()(do.go_on_with_opening)
opening.upon(E.opened).to(idle)(do.greet)

idle.upon(E.query).loop()(do.answer_query)
idle.upon(E.waiting_began).to(waiting)(do.wait)
idle.upon(E.streaming_started).to(streaming)(do.begin_stream)
idle.upon(E.sync).loop()(do.answer_sync)
idle.upon(E.extended_query).to(skipping)(do.refuse_extended_query)
idle.upon(E.function_call).loop()(do.refuse_function_call)
idle.upon(E.password).loop()(do.refuse_password)
idle.upon(E.terminate).to(closed)(do.close)
for _message in (E.flush, E.copy_data, E.copy_done, E.copy_fail):
    idle.upon(_message).loop()(do.ignore)  # what a stream that has just ended had under way

waiting.upon(E.wait_over).to(idle)(do.go_on_with_answer)

skipping.upon(E.sync).to(idle)(do.answer_sync)
skipping.upon(E.password).loop()(do.refuse_password)
skipping.upon(E.terminate).to(closed)(do.close)
for _message in (
    *(E.query, E.flush, E.copy_data, E.copy_done, E.copy_fail),
    *(E.extended_query, E.function_call),
):
    skipping.upon(_message).loop()(do.ignore)

streaming.upon(E.copy_done).to(idle)(do.answer_copy_done)
streaming.upon(E.timeline_ended).to(stream_ended)(do.send_copy_done)
streaming.upon(E.shutdown_requested).to(stopping)(do.finish_sending)

stream_ended.upon(E.copy_done).to(idle)(do.end_stream)
stream_ended.upon(E.shutdown_requested).to(closed)(do.tell_shutdown_and_close)

stopping.upon(E.replica_confirmed).to(closed)(do.tell_end_and_close)
stopping.upon(E.timeline_ended).to(closed)(do.tell_end_and_close)
stopping.upon(E.copy_done).to(closed)(do.send_copy_done_and_close)
stopping.upon(E.shutdown_requested).loop()(do.ignore)

for _state in (streaming, stream_ended, stopping):
    _state.upon(E.copy_data).loop()(do.hear_replica)
    _state.upon(E.terminate).to(closed)(do.close)
    for _message in (
        *(E.query, E.sync, E.flush, E.copy_fail),
        *(E.password, E.extended_query, E.function_call),
    ):
        _state.upon(_message).loop()(do.hear_other)

for _state in (starting, authenticating, opening, idle, waiting, skipping):
    _state.upon(E.shutdown_requested).to(closed)(do.tell_shutdown_and_close)

for _state in (starting, authenticating, opening, idle, skipping):
    _state.upon(E.cancelled).loop()(do.ignore)
for _state in (waiting, streaming, stream_ended):
    _state.upon(E.cancelled).to(idle)(do.tell_cancellation)
stopping.upon(E.cancelled).to(closed)(do.tell_shutdown_and_close)

for _state in (idle, streaming, stream_ended):
    _state.upon(E.failed).to(idle)(do.tell_error)
for _state in (starting, authenticating, opening, skipping, stopping):
    _state.upon(E.failed).to(closed)(do.tell_and_close)

for _state in (
    *(starting, authenticating, opening, idle, waiting, skipping),
    *(streaming, stream_ended, stopping),
):
    _state.upon(E.failed_fatally).to(closed)(do.tell_and_close)
    _state.upon(E.timed_out).to(closed)(do.close_on_timeout)
    _state.upon(E.connection_lost).to(closed)(do.close)

for _event in (
    *(E.query, E.sync, E.flush, E.copy_data, E.copy_done, E.copy_fail, E.terminate),
    *(E.password, E.extended_query, E.function_call),
):
    closed.upon(_event).loop()(do.ignore)
for _end in (E.timeline_ended, E.replica_confirmed, E.cancelled, E.timed_out, E.authenticated):
    closed.upon(_end).loop()(do.ignore)
for _end in (E.shutdown_requested, E.connection_lost):
    closed.upon(_end).loop()(do.ignore)
for _failure in (E.failed, E.failed_fatally):
    closed.upon(_failure).loop()(do.ignore)

_machine = _builder.build()
