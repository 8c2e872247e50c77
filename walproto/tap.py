"""``twist walsender``: the service that the options make.

What is wrong with them ends the program with one line on standard error and exit status 1.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from twisted.application.service import Service
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort, IReactorFromThreads, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.access.guard import AccessError, Guard
from walproto.errors import printable
from walproto.neon.callback import Caller
from walproto.neon.callmemaybe import RECALL_PERIOD, Subscriptions
from walproto.neon.data_directory import DataDirectory
from walproto.neon.pageservers import Pageservers
from walproto.neon.walsender import Safekeeper
from walproto.options import Options
from walproto.server.protocol import WalSenderFactory
from walproto.server.service import IServices
from walproto.server.transports import ServerTls, parse_address
from walproto.timeline.directory import WalDirectory
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.slots import SlotOptions, Slots, SlotsError
from walproto.upstream.process_title import hide_in_process_title
from walproto.upstream.relay import WalRelay
from walproto.wal.writer import SyncError

_CLOSED = (
    "nobody could connect from elsewhere: give --ssl-cert-file, --ssl-key-file and --auth-file (or "
    "--jwt-public-key, with --data-dir), or say in an --hba-file who may"
)


@dataclass(frozen=True, slots=True)
class Served:
    """What there is to serve, how it is started and stopped, and how to stop first what is done
    beside it: a relay receives, a safekeeper calls pageservers."""

    served: ITimeline | IServices
    start: Callable[[], None]
    stop: Callable[[], None]
    stop_work: Callable[[], Deferred[None]] = lambda: succeed(None)
    slots: Slots | None = None


class WalSenderService(Service):
    """Serves what there is at some endpoints while it runs.

    ``endpoints`` are pairs of an endpoint and its description.  ``guard`` and ``tls`` are the
    factory's; their files are read anew at SIGHUP.  ``shutdown_timeout`` is in seconds.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        served: Served,
        factory: WalSenderFactory,
        endpoints: Sequence[tuple[str, IStreamServerEndpoint]],
        guard: Guard,
        tls: ServerTls | None,
        shutdown_timeout: float,
    ) -> None:
        self._reactor = reactor
        self._served = served
        self._factory = factory
        self._endpoints = endpoints
        self._guard = guard
        self._files: list[Guard | ServerTls] = [guard] if tls is None else [guard, tls]
        self._shutdown_timeout = shutdown_timeout
        self._ports: list[IListeningPort] = []
        self._is_ending = False
        self._hangup_before: Any = None

    def startService(self) -> None:
        super().startService()
        self._hangup_before = signal.signal(signal.SIGHUP, self._hang_up)
        self._tell_warnings()
        for description, endpoint in self._endpoints:
            self._listen(description, endpoint)
        self._served.start()
        self._reactor.callFromThread(self._take_signals)  # when it runs, and has handlers for them

    def _listen(self, description: str, endpoint: IStreamServerEndpoint) -> None:
        """Listen there.  SystemExit if it turns out at once that this cannot be; if it does later,
        the operator is told."""
        refusals: list[str] = []
        at_once = True

        def listening(port: IListeningPort) -> None:
            self._ports.append(port)
            if not self._guard.is_open_to_others and not _is_near(port):
                refusals.append(f"cannot listen on {description}: {_CLOSED}")
                return
            self._log.info("listening on {description}", description=description)

        def refused(failure: Failure) -> None:
            reason = getattr(failure.value, "socketError", None) or failure.value
            refusals.append(f"cannot listen on {description}: {reason}")
            _release_lock(description)
            if not at_once:
                self._log.critical("{refusal}", refusal=refusals[-1])

        endpoint.listen(self._factory).addCallbacks(listening, refused)
        at_once = False
        if refusals:
            raise SystemExit(f"twist walsender: {refusals[-1]}")

    def stopService(self) -> Deferred[None]:
        super().stopService()
        self._is_ending = True
        return Deferred.fromCoroutine(self._stop())

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._reactor.callFromThread(self._reload)

    def _reload(self) -> None:
        """Read the files anew that say who may connect."""
        ready: list[Callable[[], None]] = []
        try:
            for files in self._files:
                ready.append(files.prepare())
        except ValueError as error:
            for problem in str(error).splitlines():
                self._log.error("{problem}", problem=printable(problem))
            self._log.error("what was in force before SIGHUP, still is")
            return
        for put_in_force in ready:
            put_in_force()
        self._log.info("the files that say who may connect have been read anew")
        self._tell_warnings()

    def _tell_warnings(self) -> None:
        for files in self._files:
            for warning in files.warnings:
                self._log.warn("{warning}", warning=printable(warning))

    def _take_signals(self) -> None:
        """Be there before the reactor when a signal comes: the next one may follow at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                signal.signal(number, partial(self._end, handler))

    def _end(self, handler: Callable[..., Any], number: int, frame: FrameType | None) -> None:
        """The first signal ends the reactor."""
        if self._is_ending:
            self._hurry(number, frame)
        else:
            self._is_ending = True
            handler(number, frame)

    def _hurry(self, number: int, frame: FrameType | None) -> None:
        """A second signal: wait for nobody."""
        self._reactor.callFromThread(self._factory.abort_all)

    async def _stop(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        await self._served.stop_work()
        if self._factory.connections:
            self._log.info(
                "waiting up to {seconds:g} s for {count} clients to confirm what they were sent",
                seconds=self._shutdown_timeout,
                count=len(self._factory.connections),
            )
        await self._factory.shut_down(self._shutdown_timeout)
        self._served.stop()
        signal.signal(signal.SIGHUP, self._hangup_before)


def _is_near(port: IListeningPort) -> bool:
    """Whether nobody can connect there but from this machine."""
    address = port.getHost()
    ip = parse_address(getattr(address, "host", ""))
    return isinstance(address, UNIXAddress) or (ip is not None and ip.is_loopback)


def _release_lock(description: str) -> None:
    """Take back the lock that Twisted leaves behind when it cannot listen on a Unix socket: the
    next try would take it for that of a server that has died, and replace a living one's socket."""
    kind, _, rest = description.partition(":")
    lock = rest.removeprefix("address=").split(":")[0] + ".lock"
    if kind == "unix" and os.path.islink(lock) and os.readlink(lock) == str(os.getpid()):
        os.unlink(lock)


def _end(error: Exception) -> None:
    """End the program, for nothing more can be received: in good order, and with an exit status
    that tells why."""
    from twisted.internet import reactor

    def exit_at_once() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(os.EX_IOERR if isinstance(error, SyncError) else 1)

    reactor.addSystemEventTrigger("after", "shutdown", exit_at_once)
    with suppress(ReactorNotRunning):  # it is being stopped already
        reactor.stop()


def _slot_options(options: Options) -> SlotOptions:
    names = ("max-replication-slots", "wal-keep-size", "max-slot-wal-keep-size")
    given = {name.replace("-", "_"): options[name] for name in names}
    return SlotOptions(**{name: value for name, value in given.items() if value is not None})


def _make_relay(options: Options, reactor: Any) -> WalRelay | None:
    """The relay that the options ask for, if they do; SystemExit if it is not to be had."""
    if options["upstream"] is None:
        return None
    hide_in_process_title()
    try:
        return WalRelay(
            options["wal-dir"],
            options["upstream"],
            reactor,
            failed=_end,
            slot_options=_slot_options(options),
            slot=options["upstream-slot"],
            create_slot=bool(options["upstream-create-slot"]),
            start_lsn=options["upstream-start"],
            timeout=options["wal-receiver-timeout"],
            feedback=bool(options["hot-standby-feedback"]),
        )
    except ImportError as error:
        problem = _missing(error)
    except SlotsError as error:
        raise SystemExit(f"twist walsender: {error}") from None
    except ValueError as error:
        problem = str(error)
    raise SystemExit(f"twist walsender: --upstream: {problem}")


def _missing(error: ImportError, extra: str = "upstream") -> str:
    what = " ".join(str(error).split())  # it may be a list of what psycopg has tried
    return f"{what}: it takes pip install 'walproto[{extra}]'"


def _make_safekeeper(options: Options, reactor: Any) -> Safekeeper | None:
    """The safekeeper's walsender that the options ask for, if they do; SystemExit if it is not to
    be had."""
    if options["data-dir"] is None:
        return None
    subscriptions = None
    if options["advertise"] is not None:
        try:
            caller = Caller(reactor, *options["advertise"])
        except ImportError as error:
            raise SystemExit(f"twist walsender: --advertise: {_missing(error)}") from None
        period = options["recall-period"] or RECALL_PERIOD
        subscriptions = Subscriptions(reactor, caller, period)
    directory = DataDirectory(options["data-dir"], reactor)
    return Safekeeper(directory, reactor, Pageservers(subscriptions))


def _make_tls(options: Options) -> ServerTls | None:
    """The server's side of TLS that the options ask for, if they do; SystemExit if it is not to be
    had."""
    if options["ssl-cert-file"] is None:
        return None
    try:
        from walproto.access.tls import ServerTls as OpenSslServerTls
        from walproto.access.tls import TlsError
    except ImportError as error:
        raise SystemExit(f"twist walsender: --ssl-cert-file: {_missing(error, 'tls')}") from None
    try:
        return OpenSslServerTls(
            options["ssl-cert-file"],
            options["ssl-key-file"],
            options["ssl-ca-file"],
            options["ssl-crl-file"],
            options["ssl-min-protocol-version"] or "TLSv1.3",
        )
    except TlsError as error:
        raise SystemExit(f"twist walsender: {error}") from None


def _secret(options: Options) -> bytes:
    """What nobody else knows, and we shall know the next time, too; empty if there is nothing."""
    if options["ssl-key-file"] is None:
        return b""
    return hashlib.sha256(b"walproto" + Path(options["ssl-key-file"]).read_bytes()).digest()


def _make_guard(options: Options) -> Guard:
    """Who may connect; SystemExit if the files that say so are no good."""
    try:
        return Guard(
            hba_file=options["hba-file"],
            auth_file=options["auth-file"],
            jwt_public_key=options["jwt-public-key"],
            offers_tls=options["ssl-cert-file"] is not None,
            checks_certificates=options["ssl-ca-file"] is not None,
            has_tenants=options["data-dir"] is not None,
            secret=_secret(options),
        )
    except ImportError as error:
        raise SystemExit(f"twist walsender: --jwt-public-key: {_missing(error, 'jwt')}") from None
    except AccessError as error:
        raise SystemExit(f"twist walsender: {error}") from None


def _make_served(options: Options, reactor: Any) -> Served:
    """What the options ask for; SystemExit if it is not to be had."""
    safekeeper = _make_safekeeper(options, reactor)
    if safekeeper is not None:
        stop = safekeeper.directory.stop
        return Served(safekeeper, safekeeper.start, stop, safekeeper.stop)
    relay = _make_relay(options, reactor)
    if relay is not None:
        return Served(relay.timeline, relay.start, relay.timeline.stop, relay.stop, relay.slots)
    wal = WalDirectory(Path(options["wal-dir"]), reactor)
    return Served(wal, wal.start, wal.stop)


def makeService(options: Options) -> WalSenderService:
    """The service that the options ask for, on the reactor that runs."""
    from twisted.internet import reactor

    served = _make_served(options, reactor)
    tls = _make_tls(options)
    guard = _make_guard(options)
    factory = WalSenderFactory(
        served.served,
        reactor,
        slots=served.slots,
        authenticator=guard,
        tls=tls,
        authentication_timeout=options["authentication-timeout"],
        max_unauthenticated=options["max-unauthenticated"],
        max_unauthenticated_per_address=options["max-unauthenticated-per-address"],
        server_version=options["server-version"],
        wal_sender_timeout=options["wal-sender-timeout"],
        max_wal_senders=options["max-wal-senders"],
    )
    endpoints = []
    for description in options["listen"]:
        try:
            endpoints.append((description, serverFromString(reactor, description)))
        except Exception as error:
            raise SystemExit(
                f'twist walsender: --listen: "{description}" is not an endpoint: {error}'
            ) from None
    return WalSenderService(
        IReactorFromThreads(reactor),
        served,
        factory,
        endpoints,
        guard,
        tls,
        options["wal-sender-shutdown-timeout"],
    )
