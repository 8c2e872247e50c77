"""What a session deals with: what can happen to it, and what it has done for it.

The session itself, in :mod:`walproto.server.session`, knows nothing of transports and clocks; these
two interfaces are all that stands between it and them.
"""

from __future__ import annotations

from typing import Any, Protocol

from twisted.internet.defer import Deferred

from walproto.access.grant import Grant
from walproto.access.peer import Peer
from walproto.errors import ReportedError
from walproto.server.service import Stream
from walproto.timeline.replicas import Replica
from walproto.timeline.slots import Holder
from walproto.wire.startup import Cancellation, EncryptionRequest, Startup


class Events(Protocol):
    """What can happen to a session.

    The first six are of the startup phase.  Then come the frontend messages, each with its type
    byte and contents; Parse, Bind, Describe, Execute and Close are one event, as they are one to
    us.  The rest comes from inside.
    """

    def encryption_requested(self, request: EncryptionRequest) -> None: ...
    def tls_began(self) -> None: ...
    def cancel_requested(self, request: Cancellation) -> None: ...
    def startup_received(self, startup: Startup) -> None: ...
    def authenticated(self, grant: Grant) -> None: ...
    def opened(self) -> None: ...

    def query(self, tag: bytes, contents: bytes) -> None: ...
    def sync(self, tag: bytes, contents: bytes) -> None: ...
    def flush(self, tag: bytes, contents: bytes) -> None: ...
    def copy_data(self, tag: bytes, contents: bytes) -> None: ...
    def copy_done(self, tag: bytes, contents: bytes) -> None: ...
    def copy_fail(self, tag: bytes, contents: bytes) -> None: ...
    def terminate(self, tag: bytes, contents: bytes) -> None: ...
    def password(self, tag: bytes, contents: bytes) -> None: ...
    def extended_query(self, tag: bytes, contents: bytes) -> None: ...
    def function_call(self, tag: bytes, contents: bytes) -> None: ...

    def waiting_began(self, awaited: Deferred[Any]) -> None: ...
    def wait_over(self, error: BaseException | None) -> None: ...
    def streaming_started(self, tli: int, start_lsn: int) -> None: ...
    def timeline_ended(self) -> None: ...
    def replica_confirmed(self) -> None: ...
    def failed(self, error: ReportedError) -> None: ...
    def failed_fatally(self, error: ReportedError) -> None: ...
    def cancelled(self) -> None: ...
    def timed_out(self) -> None: ...
    def shutdown_requested(self) -> None: ...
    def connection_lost(self) -> None: ...


class Connection(Holder, Protocol):
    """What a session has done for it."""

    peer: Peer

    @property
    def is_held(self) -> bool:
        """Whether what is written has to wait, because WAL is still being sent elsewhere: then no
        message is dealt with."""

    def write(self, data: bytes) -> None:
        """Send ``data`` behind all that was sent before."""

    def new_key(self, length: int) -> bytes:
        """Make up this connection's cancel key, of so many bytes."""

    def cancel(self, request: Cancellation) -> None:
        """Cancel what another connection does, if the key is right."""

    @property
    def offers_tls(self) -> bool:
        """Whether the connection can be encrypted."""

    def start_tls(self, received: bytes) -> None:
        """Be the server of a TLS handshake, of which ``received`` has come already; what is said
        and written from now on is encrypted.  ``peer`` tells of it when it is done."""

    def admit(self, startup: Startup, grant: Grant) -> None:
        """The client is who it says it is."""

    def take_place(self) -> bool:
        """Be one of the ``max_wal_senders`` until the connection is closed; whether there was a
        place left."""

    def wait_for(self, awaited: Deferred[Any]) -> None:
        """Deal with no message from now on.  When ``awaited`` has fired, ``wait_over`` comes of it,
        with the error if it has failed."""

    def stop_waiting(self) -> None:
        """Go on with the messages; ``wait_over`` comes no more."""

    def start_sending(self, stream: Stream, replica: Replica, timeout: float) -> None:
        """The client is ``replica`` from now on: send CopyBothResponse, then WAL from
        ``replica.sent_lsn`` on, as ``stream`` says.  ``timeline_ended`` or ``failed`` may come of
        it, and ``timed_out`` when the replica is silent for ``timeout`` seconds, unless that is
        0."""

    def stop_sending(self) -> None:
        """Send no more WAL; the client is still a replica, and its messages are awaited."""

    def finish_sending(self) -> None:
        """Send all there is, ask for confirmation; ``replica_confirmed`` comes of it."""

    def end_replica(self) -> None:
        """Send no more WAL, the client is no replica any longer; nothing if it was none."""

    def replica_heard(self, reply_requested: bool) -> None:
        """The replica is alive, and wants a keepalive at once or not."""

    def report(self, error: ReportedError) -> None:
        """Tell the operator of an error that the client is told of."""

    def note(self, text: str) -> None:
        """Tell the operator what becomes of the connection."""

    def close(self) -> None:
        """Close the connection when all is sent."""
