"""``twist walsender``: the options, and the service they make.

What is wrong with the options ends the program with one line on standard error and exit status 1.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort, IReactorFromThreads, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from walproto.errors import InvalidParameterValue
from walproto.server.configuration import parse_version
from walproto.server.protocol import WalSenderFactory
from walproto.server.settings import parse_milliseconds
from walproto.timeline.directory import WalDirectory

DEFAULT_ENDPOINT = "tcp:5433:interface=127.0.0.1"


def _time(name: str, text: str) -> float:
    """Seconds that a time such as ``60s`` or ``1min`` stands for."""
    try:
        return parse_milliseconds(name, text) / 1000
    except InvalidParameterValue as error:
        raise ValueError(error.message + (f" ({error.hint})" if error.hint else "")) from None


class Options(UsageOptions):
    synopsis = "--wal-dir DIR [--listen ENDPOINT]... [options]"
    longdesc = (
        "Serves the PostgreSQL WAL in a directory to standbys, pg_receivewal and every other "
        "client of the streaming replication protocol. The directory may be a primary's live "
        "pg_wal or an archive; nothing in it is ever changed. WAL contains every row of the "
        "database, and whoever can connect is served: listen only where you trust everybody."
    )
    optParameters: ClassVar = [
        ["wal-dir", "d", None, "The directory with the WAL segments and history files."],
        [
            "server-version",
            None,
            None,
            "The server_version that clients are told, such as 18.6. [default: the major version "
            "that wrote the WAL]",
        ],
        [
            "wal-sender-timeout",
            None,
            "60s",
            "Disconnect a client that has been silent for so long while it streams; 0 for never. "
            "A client may choose its own by options='-c wal_sender_timeout=...'.",
        ],
        [
            "wal-sender-shutdown-timeout",
            None,
            "10s",
            "At shutdown, wait so long for clients to confirm that they have received all WAL.",
        ],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, endpoint: str) -> None:
        """Where to listen, as a Twisted endpoint: tcp:5433, unix:/run/walsender/.s.PGSQL.5433,
        ...; may be given more than once. [default: tcp:5433:interface=127.0.0.1]"""
        self["listen"].append(endpoint)

    opt_l = opt_listen

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        try:
            super().parseOptions(options)
        except UsageError as error:
            raise SystemExit(f"twist walsender: {error}") from None

    def parseArgs(self, *arguments: str) -> None:
        if arguments:
            raise UsageError(f"unexpected argument: {arguments[0]}")

    def postOptions(self) -> None:
        directory = self["wal-dir"]
        if not directory:
            raise UsageError("--wal-dir is missing: say which directory holds the WAL")
        if not os.path.isdir(directory):
            what = "not a directory" if os.path.exists(directory) else "no such directory"
            raise UsageError(f"--wal-dir: {what}: {directory}")
        if not os.access(directory, os.R_OK | os.X_OK):
            raise UsageError(f"--wal-dir: no permission to read {directory}")
        for name in ("wal-sender-timeout", "wal-sender-shutdown-timeout"):
            try:
                self[name] = _time(name.replace("-", "_"), self[name])
            except ValueError as error:
                raise UsageError(f"--{name}: {error}") from None
        if self["server-version"] is not None:
            try:
                parse_version(self["server-version"])
            except ValueError as error:
                raise UsageError(f"--server-version: {error}") from None
        self["listen"] = self["listen"] or [DEFAULT_ENDPOINT]


class WalSenderService(Service):
    """Serves a directory of WAL at some endpoints while it runs.

    ``endpoints`` are pairs of an endpoint and its description.  ``shutdown_timeout`` is in
    seconds.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        timeline: WalDirectory,
        factory: WalSenderFactory,
        endpoints: Sequence[tuple[str, IStreamServerEndpoint]],
        shutdown_timeout: float,
    ) -> None:
        self._reactor = reactor
        self._timeline = timeline
        self._factory = factory
        self._endpoints = endpoints
        self._shutdown_timeout = shutdown_timeout
        self._ports: list[IListeningPort] = []

    def startService(self) -> None:
        super().startService()
        for description, endpoint in self._endpoints:
            self._listen(description, endpoint)
        self._timeline.start()

    def _listen(self, description: str, endpoint: IStreamServerEndpoint) -> None:
        """Listen there.  SystemExit if it turns out at once that this cannot be; if it does later,
        the operator is told."""
        refusals: list[str] = []
        at_once = True

        def listening(port: IListeningPort) -> None:
            self._ports.append(port)
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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hurry)
        return Deferred.fromCoroutine(self._stop())

    def _hurry(self, number: int, frame: FrameType | None) -> None:
        """A second signal: wait for nobody."""
        self._reactor.callFromThread(self._factory.abort_all)

    async def _stop(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        if self._factory.connections:
            self._log.info(
                "waiting up to {seconds:g} s for {count} clients to confirm what they were sent",
                seconds=self._shutdown_timeout,
                count=len(self._factory.connections),
            )
        await self._factory.shut_down(self._shutdown_timeout)
        self._timeline.stop()


def _release_lock(description: str) -> None:
    """Take back the lock that Twisted leaves behind when it cannot listen on a Unix socket: the
    next try would take it for that of a server that has died, and replace a living one's socket."""
    kind, _, rest = description.partition(":")
    lock = rest.removeprefix("address=").split(":")[0] + ".lock"
    if kind == "unix" and os.path.islink(lock) and os.readlink(lock) == str(os.getpid()):
        os.unlink(lock)


def makeService(options: Options) -> WalSenderService:
    """The service that the options ask for, on the reactor that runs."""
    from twisted.internet import reactor

    timeline = WalDirectory(Path(options["wal-dir"]), reactor)
    factory = WalSenderFactory(
        timeline,
        reactor,
        server_version=options["server-version"],
        wal_sender_timeout=options["wal-sender-timeout"],
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
        timeline,
        factory,
        endpoints,
        options["wal-sender-shutdown-timeout"],
    )
