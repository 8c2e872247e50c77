"""The Twisted side of a connection: bytes in, to the session; its decisions out, to the transport.

Everything a client is told goes through :meth:`WalSenderProtocol.write` and the producer, every
error ends up in an ErrorResponse.  An exception that is none of ours is a defect: it is logged
with its traceback, and the client gets an XX000 and is disconnected.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IHandshakeListener,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from walproto.access.grant import Grant
from walproto.access.limits import Address
from walproto.access.peer import Peer
from walproto.errors import (
    AdminShutdown,
    CannotConnectNow,
    InternalError,
    ProtocolViolation,
    ReportedError,
    StreamingEnded,
    printable,
)
from walproto.lsn import format_lsn
from walproto.server.encryption import Encryption
from walproto.server.heartbeat import Heartbeat, Lull
from walproto.server.lending import Outlet, Sending
from walproto.server.producer import WalProducer
from walproto.server.reader import Reader
from walproto.server.service import Stream
from walproto.server.session import Session
from walproto.server.transports import peer_of, tune
from walproto.timeline.replicas import Replica
from walproto.wire.startup import Cancellation, Startup

if TYPE_CHECKING:
    from walproto.server.factory import WalSenderFactory

NO_ALPN = ProtocolViolation(
    "received direct SSL connection request without ALPN protocol negotiation extension",
    fatal=True,
)

LINGER = 5.0
"""Seconds that a client has to take what it was last told."""


@implementer(IHalfCloseableProtocol, IHandshakeListener)
class WalSenderProtocol(Protocol):
    """One client.  Its session tells it what to do (:class:`~walproto.server.events.Connection`),
    its producer how that went (:class:`~walproto.server.producer.Listener`).  It holds the
    replication slots that the session uses (:class:`~walproto.timeline.slots.Holder`)."""

    _log = Logger()
    factory: WalSenderFactory
    transport: Any

    def __init__(self, factory: WalSenderFactory, pid: int, address: Address) -> None:
        self.factory = factory
        self.pid = pid
        self._configuration = factory.configuration
        self._address = address
        self.peer = Peer("")
        self._clock = factory.clock
        self._session = Session(self, factory.services, self._configuration)
        self._key = b""
        self._is_heard = False
        self._is_lost = False
        self._is_admitted = False
        self._encryption: Encryption
        self._stream: Stream
        self._replica: Replica | None = None
        self._reader: Reader
        self._outlet = Outlet(
            held=lambda: self._reader.pauseProducing(), free=lambda: self._reader.resumeProducing()
        )
        self._awaited: Deferred[Any] | None = None
        self._producer: Sending | None = None
        self._heartbeat: Heartbeat | None = None
        self._lull: Lull | None = None
        self._timer: IDelayedCall | None = None

    # --- for Twisted to call ---------------------------------------------------------------

    def connectionMade(self) -> None:
        self.peer = peer_of(self.transport)
        tune(self.transport)
        self.factory.connections[self.pid] = self
        self._encryption = Encryption(self.transport, self._configuration.tls)
        self._reader = Reader(self.transport, self._clock, self._deal)
        self.transport.registerProducer(self._reader, True)
        timeout = self._configuration.authentication_timeout
        self._timer = self._clock.callLater(timeout, self._authentication_timed_out)

    def dataReceived(self, data: bytes) -> None:
        if not self._is_heard:
            self._is_heard = True
            self.peer = peer_of(self.transport)  # a proxy may have told by now
        self.handshakeCompleted()  # a proxy's transport does not tell of it
        if not self._session.is_closed:
            self._session.receive(data)
            self._reader.go_on()

    def handshakeCompleted(self) -> None:
        if not self._encryption.is_under_way:
            return
        tls = self._encryption.finish()
        if tls is None:
            self._session.fail(NO_ALPN)
        else:
            self.peer = replace(self.peer, tls=tls)

    def readConnectionLost(self) -> None:
        """The client says nothing more; what it has been answered, it still gets."""
        self._tell_early_end(connectionDone)
        self._session.events.connection_lost()

    def writeConnectionLost(self) -> None:
        pass

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._is_lost = True
        self._reader.stop()
        self._tell_early_end(reason)
        if not self._is_admitted:
            self.factory.unauthenticated.leave(self._address)
        self.factory.connection_gone(self)
        self._session.events.connection_lost()
        self._stop_timer()

    # --- for the service to call -----------------------------------------------------------

    def shut_down(self) -> None:
        """Send what may be sent, tell the client, and close the connection."""
        self._session.events.shutdown_requested()

    def abort(self) -> None:
        """Close the connection now."""
        self.transport.abortConnection()

    def terminate(self) -> None:
        """Tell the client that the connection is taken from it, and close it."""
        self._session.fail(
            AdminShutdown("terminating connection due to administrator command", fatal=True)
        )

    def cancel_with(self, key: bytes) -> bool:
        """Cancel what the session does, if this is its key; whether it is."""
        is_right = bool(self._key) and hmac.compare_digest(self._key, key)
        if is_right:
            self._session.events.cancelled()
        return is_right

    # --- Connection, for the session to call -----------------------------------------------

    @property
    def is_held(self) -> bool:
        return self._outlet.is_held

    def write(self, data: bytes) -> None:
        self._outlet.do(lambda: self.transport.write(data))

    def new_key(self, length: int) -> bytes:
        self._key = os.urandom(length)
        return self._key

    def cancel(self, request: Cancellation) -> None:
        other = self.factory.connections.get(request.process_id)
        if other is None:
            self.note(f"PID {request.process_id} in cancel request did not match any process")
        elif not other.cancel_with(request.secret_key):
            self.note(f"wrong key in cancel request for process {request.process_id}")

    @property
    def offers_tls(self) -> bool:
        return self._encryption.is_offered

    def start_tls(self, received: bytes) -> None:
        self._encryption.begin(received)

    def admit(self, startup: Startup, grant: Grant) -> None:
        self._is_admitted = True
        self.factory.unauthenticated.leave(self._address)
        tls = self.peer.tls
        self._tell(
            self._log.info,
            "{peer}: {kind} authorized: user={user} method={method}{rule}{encryption}",
            kind="replication connection" if startup.replication else "connection",
            user=printable(startup.user),
            method=grant.method,
            rule=f" ({grant.rule})" if grant.rule else "",
            encryption="" if tls is None else f" {tls}",
        )

    def take_place(self) -> bool:
        senders = self.factory.senders
        if len(senders) >= self._configuration.max_wal_senders:
            return False
        senders.add(self.pid)
        return True

    def wait_for(self, awaited: Deferred[Any]) -> None:
        self._awaited = awaited
        self._reader.hold()
        awaited.addBoth(self._wait_over, awaited)

    def stop_waiting(self) -> None:
        self._awaited = None
        self._reader.let_go()

    def start_sending(self, stream: Stream, replica: Replica, timeout: float) -> None:
        self._stream, self._replica = stream, replica
        stream.timeline.replicas.add(replica)
        stream.begin(replica)
        self._heartbeat = Heartbeat(
            self._clock,
            timeout,
            ask=lambda: self._send_keepalive(True),
            give_up=self._session.events.timed_out,
        )
        self._heartbeat.start()
        self.transport.unregisterProducer()
        self._reader.release()
        self._producer = producer = self._sending(stream, replica)
        producer.start()
        if stream.patience is not None:
            self._lull = Lull(
                self._clock,
                stream.patience,
                lambda: producer.idle_since,
                check=self._check_allowed,
                ring=self._check,
            )
        self._tell(
            self._log.info,
            "{replica} streams from {lsn} on timeline {tli}",
            replica=replica,
            lsn=format_lsn(replica.sent_lsn),
            tli=replica.tli,
        )

    def stop_sending(self) -> None:
        self._stop_checking()
        if self._producer is None:
            return
        if self._is_lost:
            self._producer.stopProducing()
        else:
            self._producer.stop()
            self._outlet.do(lambda: self.transport.registerProducer(self._reader, True))
        self._producer = None

    def finish_sending(self) -> None:
        self._stop_checking()
        if self._producer is not None:
            self._producer.finish()

    def end_replica(self) -> None:
        self.stop_sending()
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._replica is not None:
            self._stream.timeline.replicas.remove(self._replica)
            self._outlet.do(partial(self._tell_end, self._replica))
            self._replica = None
            self._stream.end()

    def replica_heard(self, reply_requested: bool) -> None:
        if self._heartbeat is not None:
            self._heartbeat.heard()
        if reply_requested:
            self._send_keepalive(False)
        if self._producer is not None and self._producer.is_finishing:
            self._producer.finish()  # this may have been the confirmation it waits for

    def report(self, error: ReportedError) -> None:
        log = self._log.warn
        if isinstance(error, (CannotConnectNow, StreamingEnded)):
            log = self._log.info
        tls = None if self._is_admitted else self.peer.tls
        more = [text for text in (error.detail, error.log) if text]
        self._tell(
            log,
            "{peer}: {severity} {sqlstate}: {text}{more}{encryption}",
            severity=error.severity,
            sqlstate=error.sqlstate,
            text=printable(error.message),
            more=f" ({printable('; '.join(more))})" if more else "",
            encryption="" if tls is None else f" {tls}",
        )

    def note(self, text: str) -> None:
        self._tell(self._log.info, "{who}: {text}", who=self._replica or str(self.peer), text=text)

    def close(self) -> None:
        self.factory.senders.discard(self.pid)
        self._reader.stop()
        self._stop_timer()
        if self._is_lost:
            return  # and its transport is good for nothing any more
        if self._encryption.is_under_way:
            self.transport.unregisterProducer()
            self.transport.abortConnection()  # there is nobody yet who could be told anything
            return
        self._outlet.do(self._lose_connection)
        self._timer = self._clock.callLater(LINGER, self._lingered)

    # --- Listener, for the producer to call ------------------------------------------------

    def timeline_ended(self) -> None:
        self._session.events.timeline_ended()

    def failed(self, error: ReportedError) -> None:
        self._session.fail(error)

    def broken(self) -> None:
        self._log.failure("a defect in walproto: disconnecting {peer}", peer=str(self.peer))
        self._session.fail(InternalError("internal error in the WAL sender", fatal=True))

    def caught_up(self) -> None:
        replica = self._replica
        if replica is None:
            return
        if replica.has_confirmed(replica.sent_lsn):
            self._session.events.replica_confirmed()
        elif self._heartbeat is not None:
            self._heartbeat.ask()

    # --- within ----------------------------------------------------------------------------

    def _sending(self, stream: Stream, replica: Replica) -> Sending:
        """What sends the replica its WAL: a worker, if there is one for it."""
        workers, transport = self.factory.workers, self.transport
        sending = None
        if workers is not None:
            sending = workers.lend(transport, self._outlet, stream.timeline, replica, self)
        turns, clock = self.factory.turns, self._clock
        return sending or WalProducer(
            transport, stream.timeline, replica, stream.piece, turns, clock, self
        )

    def _tell_end(self, replica: Replica) -> None:
        self._tell(
            self._log.info,
            "{replica} has ended streaming, sent up to {sent}, flushed there up to {flush}",
            replica=replica,
            sent=format_lsn(replica.sent_lsn),
            flush=format_lsn(replica.flush_lsn),
        )

    def _lose_connection(self) -> None:
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def _tell_early_end(self, reason: Failure) -> None:
        """Tell the operator if the connection has ended before the client has said who it is."""
        if self._is_admitted or self._session.is_closed:
            return  # if it was closed, that was told
        if self._encryption.is_under_way:
            why = self._encryption.why_not(reason)
            self.note(f"could not accept SSL connection: {why}")
        else:
            self.note("has gone before it was authenticated")

    def _tell(self, log: Callable[..., None], text: str, /, **fields: Any) -> None:
        """Tell the operator something of this connection."""
        session = self._session
        log(session.log_prefix + text, **(session.log_fields | {"peer": str(self.peer)} | fields))

    def _check_allowed(self) -> None:
        self._passes(self._stream.require_allowed)

    def _check(self) -> None:
        """There has been nothing to send for a while."""
        if self._passes(self._stream.check):
            self._send_keepalive(True)

    def _passes(self, check: Callable[[], None]) -> bool:
        """Whether the stream passes this check; it has ended if not."""
        try:
            check()
        except ReportedError as error:
            self._session.fail(error)
        except Exception:
            self.broken()
        else:
            return True
        return False

    def _stop_checking(self) -> None:
        if self._lull is not None:
            self._lull.stop()
            self._lull = None

    def _deal(self, limit: int) -> bool:
        more = False
        try:
            more = self._session.deal(limit)
        except Exception:
            self.broken()
        if self._session.is_greeted and not self._session.is_closed:
            self._stop_timer()
        return more

    def _wait_over(self, outcome: Any, awaited: Deferred[Any]) -> None:
        error = outcome.value if isinstance(outcome, Failure) else None
        if self._awaited is awaited:
            try:
                self._session.events.wait_over(error)
            except Exception:
                self.broken()
        elif error is not None and not isinstance(error, CancelledError):
            self._log.warn(
                "{peer}: what it has stopped waiting for has failed: {error}",
                peer=str(self.peer),
                error=error,
            )

    def _send_keepalive(self, reply_requested: bool) -> None:
        if self._producer is not None:
            self._producer.send_keepalive(reply_requested)

    def _lingered(self) -> None:
        self._timer = None
        self.abort()

    def _authentication_timed_out(self) -> None:
        self._timer = None
        self._session.events.timed_out()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
