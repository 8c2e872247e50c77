"""What a session does when something happens: the outputs of its state machine.

Each is a function of the machine's events, the session, and what the event came with.  Those that
may find something wrong raise a :class:`~walproto.errors.ReportedError`, which becomes an event
too.  Which of them runs when, the table in :mod:`walproto.server.session` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from twisted.internet.defer import Deferred

from walproto.access.grant import Grant
from walproto.errors import (
    AdminShutdown,
    CannotConnectNow,
    FeatureNotSupported,
    InternalError,
    ObjectNotInPrerequisiteState,
    ProtocolViolation,
    QueryCanceled,
    ReportedError,
)
from walproto.lsn import format_lsn
from walproto.server.answers import Answers, end_of_stream
from walproto.server.configuration import parse_version
from walproto.server.events import Events
from walproto.server.results import (
    READY_FOR_QUERY,
    StreamAnswer,
    command_complete,
    error_response,
)
from walproto.server.slot_commands import SlotCommands
from walproto.timeline.replicas import Replica
from walproto.wire import messages
from walproto.wire.commands import IdentifySystem, StartReplication, parse_command
from walproto.wire.replication import StatusUpdate
from walproto.wire.startup import Cancellation, EncryptionRequest, Startup, unsupported_version

if TYPE_CHECKING:
    from walproto.server.session import Session

P = ParamSpec("P")


def telling_errors(
    output: Callable[Concatenate[Events, Session, P], None],
) -> Callable[Concatenate[Events, Session, P], None]:
    """An output whose errors become events, so that the client is told of them."""

    def telling(events: Events, session: Session, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            output(events, session, *args, **kwargs)
        except ReportedError as error:
            session.fail(error)

    return telling


def ignore(events: Events, session: Session, /, *_: Any, **__: Any) -> None:
    pass


# --- Starting up ---------------------------------------------------------------------------------


@telling_errors
def answer_encryption_request(events: Events, session: Session, request: EncryptionRequest) -> None:
    connection = session.connection
    if request.code in session.encryption_requested:
        newest_version = session.services.newest_protocol_version(session.configuration)
        raise unsupported_version(request.code, newest_version)
    session.encryption_requested.add(request.code)
    is_accepted = request.is_tls and connection.offers_tls
    if not is_accepted:
        connection.write(b"N")
    if len(session.framing):
        raise ProtocolViolation(
            f"received unencrypted data after {request.name} request",
            detail="This could be either a client-software bug or evidence of an attempted "
            "man-in-the-middle attack.",
            fatal=True,
        )
    if is_accepted:
        connection.write(b"S")
        connection.start_tls(b"")


@telling_errors
def begin_direct_tls(events: Events, session: Session) -> None:
    """PostgreSQL 17's ``sslnegotiation=direct`` (``ProcessSSLStartup``)."""
    connection = session.connection
    if session.encryption_requested or not connection.offers_tls:
        raise ProtocolViolation(
            "invalid length of startup packet",
            fatal=True,
            log="it is the beginning of TLS, which is not offered"
            if not connection.offers_tls
            else None,
        )
    session.encryption_requested.add(messages.SSL_REQUEST_CODE)
    connection.start_tls(session.framing.take_all())


def pass_cancellation_on(events: Events, session: Session, request: Cancellation) -> None:
    session.connection.cancel(request)
    close(events, session)


@telling_errors
def begin_authentication(events: Events, session: Session, startup: Startup) -> None:
    session.is_starting = False
    session.connection.write(startup.negotiation)
    session.startup = startup
    session.services.require_ready()
    authenticator = session.configuration.authenticator
    session.exchange = authenticator.authenticate(startup, session.connection.peer)
    _authenticate(events, session, lambda: next(session.exchange))


@telling_errors
def go_on_with_authentication(
    events: Events, session: Session, tag: bytes, contents: bytes
) -> None:
    _authenticate(events, session, lambda: session.exchange.send(contents))


def _authenticate(events: Events, session: Session, proceed: Callable[[], bytes]) -> None:
    try:
        session.question = proceed()
        session.connection.write(session.question)
    except StopIteration as end:
        events.authenticated(end.value)
    except ReportedError as error:
        error.fatal = True  # whatever went wrong, the client is not let in
        raise


@telling_errors
def refuse_unauthenticated(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    kind = "SASL" if messages.asks_for_sasl(session.question) else "password"
    raise ProtocolViolation(f"expected {kind} response, got message type {tag[0]}", fatal=True)


@telling_errors
def open_service(events: Events, session: Session, grant: Grant) -> None:
    startup = session.startup
    session.connection.write(grant.last_message)
    session.connection.admit(startup, grant)
    session.service = service = session.services.serve(startup, session.configuration, grant)
    session.log_prefix = service.log_prefix
    session.log_fields |= service.log_fields
    session.answer = service.open()
    _open(events, session, lambda: next(session.answer))


@telling_errors
def go_on_with_opening(events: Events, session: Session, error: BaseException | None) -> None:
    _open(events, session, _after_waiting(session, error))


def _open(events: Events, session: Session, go_on: Callable[[], Any]) -> None:
    """Open as far as that goes without waiting."""
    try:
        events.waiting_began(go_on())
    except StopIteration:
        events.opened()


@telling_errors
def greet(events: Events, session: Session) -> None:
    service, connection = session.service, session.connection
    startup, timeline = service.startup, service.timeline
    service.require_ready()
    if startup.replication and not connection.take_place():
        raise service.too_many_connections()
    connection.write(messages.AuthenticationOk.build())
    if not startup.replication:
        raise FeatureNotSupported(
            "this server accepts only physical replication connections",
            detail="There is no database behind it.",
            hint="Connect with replication=true in the connection string.",
            fatal=True,
        )
    session.settings = settings = service.settings()
    settings.set_options(startup.options)
    for name, value in startup.parameters:
        settings.set(name, value)
    session.major, _ = parse_version(service.advertised_version)
    session.slots = SlotCommands(
        service.slots, timeline, connection, session.major, service.why_no_slots
    )
    session.answers = Answers(timeline, settings, session.slots, session.major)
    for name, value in settings.reported():
        connection.write(messages.ParameterStatus.build(name=name, value=value))
    key = connection.new_key(32 if startup.long_keys else 4)
    connection.write(messages.BackendKeyData.build(process_id=connection.pid, secret_key=key))
    connection.write(READY_FOR_QUERY)
    session.is_greeted = True
    session.log_fields["application_name"] = settings["application_name"]
    service.greeted(settings)


# --- Commands ------------------------------------------------------------------------------------


@telling_errors
def answer_query(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    if b"\0" not in contents:
        raise ProtocolViolation("invalid string in message")
    command = parse_command(messages.Query.parse(contents).query, session.major)
    session.system_identified |= isinstance(command, IdentifySystem)
    session.answer = (
        _start_replication(session, command)
        if isinstance(command, StartReplication)
        else session.answers.answer(command)
    )
    _answer(events, session, lambda: next(session.answer))


def wait(events: Events, session: Session, awaited: Deferred[Any]) -> None:
    session.is_waiting = True
    session.connection.wait_for(awaited)


@telling_errors
def go_on_with_answer(events: Events, session: Session, error: BaseException | None) -> None:
    _answer(events, session, _after_waiting(session, error))


def _after_waiting(session: Session, error: BaseException | None) -> Callable[[], Any]:
    """What goes on now that the wait is over."""
    session.is_waiting = False
    session.connection.stop_waiting()
    answer = session.answer
    return lambda: next(answer) if error is None else answer.throw(error)


def _answer(events: Events, session: Session, go_on: Callable[[], bytes | Deferred[Any]]) -> None:
    """Answer as far as that goes without waiting."""
    try:
        part = go_on()
        while isinstance(part, bytes):
            session.connection.write(part)
            part = next(session.answer)
    except StopIteration as end:
        if end.value is None:
            session.connection.write(READY_FOR_QUERY)
        else:
            events.streaming_started(*end.value)
    else:
        events.waiting_began(part)


def _start_replication(session: Session, command: StartReplication) -> StreamAnswer:
    if session.major < 15 and not session.system_identified:
        raise ObjectNotInPrerequisiteState(
            "IDENTIFY_SYSTEM has not been run before START_REPLICATION"
        )
    try:
        yield from session.service.ready_to_stream()
    except GeneratorExit:
        session.connection.note("does not wait any longer for its stream to begin")
        raise
    tli, switch_lsn = session.answers.stream(command)
    if command.start_lsn != switch_lsn:
        return tli, command.start_lsn
    session.slots.release()
    yield _end_of_stream(session, tli)
    return None


@telling_errors
def answer_sync(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    messages.Sync.parse(contents)
    session.connection.write(READY_FOR_QUERY)


@telling_errors
def refuse_extended_query(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    error = ProtocolViolation("extended query protocol not supported in a replication connection")
    session.clean_up()
    session.connection.report(error)
    session.connection.write(error_response(error))


@telling_errors
def refuse_function_call(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    raise ProtocolViolation("fastpath function calls not supported in a replication connection")


@telling_errors
def refuse_password(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    raise ProtocolViolation(f"invalid frontend message type {tag[0]}", fatal=True)


# --- Streaming -----------------------------------------------------------------------------------


@telling_errors
def begin_stream(events: Events, session: Session, tli: int, start_lsn: int) -> None:
    session.stream = stream = session.service.stream(session.settings)
    session.replica = Replica(
        pid=session.connection.pid,
        user=session.startup.user,
        application_name=session.settings["application_name"],
        peer=str(session.connection.peer),
        tli=tli,
        sent_lsn=start_lsn,
    )
    timeout = session.settings.wal_sender_timeout if stream.is_kept_alive else 0
    session.connection.start_sending(stream, session.replica, timeout)
    stream.require_allowed()
    session.slots.check_start(tli, start_lsn)
    end = stream.timeline.end_of(tli)
    if start_lsn > stream.furthest_start(tli):
        raise InternalError(
            f"requested starting point {format_lsn(start_lsn)} is ahead of the WAL flush "
            f"position of this server {format_lsn(end)}"
        )
    if start_lsn > end:
        session.connection.note(stream.ahead(start_lsn, end))


@telling_errors
def hear_replica(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    message = session.stream.parse(contents)
    session.replica.update(message)
    session.stream.heard()
    session.slots.hear(message)
    session.connection.replica_heard(isinstance(message, StatusUpdate) and message.reply_requested)


@telling_errors
def hear_other(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    session.stream.hear_other(tag)


def send_copy_done(events: Events, session: Session) -> None:
    session.connection.stop_sending()
    session.connection.write(messages.CopyDone.build())


def send_copy_done_and_close(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    send_copy_done(events, session)
    close(events, session)


def answer_copy_done(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    send_copy_done(events, session)
    end_stream(events, session, tag, contents)


def end_stream(events: Events, session: Session, tag: bytes, contents: bytes) -> None:
    session.connection.end_replica()
    session.slots.release()
    session.connection.write(_end_of_stream(session, session.replica.tli) + READY_FOR_QUERY)


def _end_of_stream(session: Session, tli: int) -> bytes:
    """It tells also which timeline goes on where this one ended, if it has ended."""
    ancestor = session.service.timeline.history.ancestor(tli)
    return end_of_stream((ancestor.next_tli, ancestor.switch_lsn) if ancestor else None)


def finish_sending(events: Events, session: Session) -> None:
    session.connection.finish_sending()


# --- Errors and ends -----------------------------------------------------------------------------


def tell_error(events: Events, session: Session, error: ReportedError) -> None:
    session.clean_up()
    session.connection.report(error)
    session.connection.write(error_response(error) + READY_FOR_QUERY)


def tell_and_close(events: Events, session: Session, error: ReportedError) -> None:
    session.clean_up()
    session.connection.report(error)
    session.connection.write(error_response(error))
    close(events, session)


def tell_cancellation(events: Events, session: Session) -> None:
    tell_error(events, session, QueryCanceled("canceling statement due to user request"))


def tell_end_and_close(events: Events, session: Session, /, *_: Any, **__: Any) -> None:
    session.clean_up()
    session.connection.write(command_complete("COPY 0"))
    close(events, session)


def tell_shutdown_and_close(events: Events, session: Session) -> None:
    error: ReportedError
    if session.is_greeted:
        error = AdminShutdown("terminating connection due to administrator command", fatal=True)
    else:
        error = CannotConnectNow("the database system is shutting down", fatal=True)
        session.connection.report(error)
    session.clean_up()
    session.connection.write(error_response(error))
    close(events, session)


def close(events: Events, session: Session, /, *_: Any, **__: Any) -> None:
    session.is_closed = True
    session.clean_up()
    session.connection.close()


def close_on_timeout(events: Events, session: Session) -> None:
    session.connection.note(
        "terminating walsender process due to replication timeout"
        if session.is_greeted
        else "canceling authentication due to timeout"
    )
    close(events, session)
