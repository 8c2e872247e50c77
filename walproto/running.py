"""What runs while ``twist walsender`` does.

It listens, but only where somebody may connect; has the files that say who may read anew at SIGHUP;
and ends in good order at SIGINT and SIGTERM, or at once at the second of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from twisted.application.service import Service
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IListeningPort, IReactorFromThreads, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure

from walproto.access.guard import Guard
from walproto.errors import printable
from walproto.options import cannot_start
from walproto.server.factory import WalSenderFactory
from walproto.server.service import IServices
from walproto.server.transports import ServerTls, parse_address
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.slots import Slots
from walproto.workers.pool import Workers

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
    ``workers`` are the factory's.
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
        workers: Workers | None = None,
    ) -> None:
        self._reactor = reactor
        self._served = served
        self._factory = factory
        self._endpoints = endpoints
        self._guard = guard
        self._files: list[Guard | ServerTls] = [guard] if tls is None else [guard, tls]
        self._shutdown_timeout = shutdown_timeout
        self._workers = workers
        self._ports: list[IListeningPort] = []
        self._is_ending = False
        self._hangup_before: Any = None

    def startService(self) -> None:
        super().startService()
        self._hangup_before = signal.signal(signal.SIGHUP, self._hang_up)
        self._tell_warnings()
        for description, endpoint in self._endpoints:
            self._listen(description, endpoint)
        if self._workers is not None:
            self._workers.start()
        self._served.start()
        self._reactor.callFromThread(self._take_signals)  # when it runs, and has handlers for them

    def _listen(self, description: str, endpoint: IStreamServerEndpoint) -> None:
        """Listen there.  SystemExit if it turns out at once that this cannot be; if it does later,
        the operator is told."""
        refusals: list[str] = []
        at_once = True

        def listening(port: IListeningPort) -> None:
            if self._guard.is_open_to_others or _is_near(port):
                self._ports.append(port)
                self._log.info("listening on {description}", description=description)
            else:
                maybeDeferred(port.stopListening)
                refuse(_CLOSED)

        def failed(failure: Failure) -> None:
            _release_lock(description)
            refuse(getattr(failure.value, "socketError", None) or failure.value)

        def refuse(reason: object) -> None:
            refusals.append(f"cannot listen on {description}: {reason}")
            if not at_once:
                self._log.critical("{refusal}", refusal=printable(refusals[-1]))

        endpoint.listen(self._factory).addCallbacks(listening, failed)
        at_once = False
        if refusals:
            raise cannot_start(refusals[-1])

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
        if self._workers is not None:
            await self._workers.stop()
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
