"""``twist walsender``: the options, and the service they make.

What is wrong with the options ends the program with one line on standard error and exit status 1.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort, IReactorFromThreads, IStreamServerEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from walproto.errors import InvalidParameterValue
from walproto.lsn import parse_lsn
from walproto.server.configuration import parse_version
from walproto.server.protocol import WalSenderFactory
from walproto.server.settings import parse_megabytes, parse_milliseconds
from walproto.timeline.directory import WalDirectory
from walproto.timeline.slots import SlotOptions, SlotsError
from walproto.upstream.relay import WalRelay
from walproto.wal.writer import SyncError

DEFAULT_ENDPOINT = "tcp:5433:interface=127.0.0.1"


def _time(name: str, text: str) -> float:
    """Seconds that a time such as ``60s`` or ``1min`` stands for."""
    return parse_milliseconds(name, text) / 1000


def _size(name: str, text: str) -> int:
    """Bytes that a size such as ``64MB`` or ``64`` stands for."""
    return parse_megabytes(name, text, 0) << 20


def _bound(name: str, text: str) -> int | None:
    """As :func:`_size`; None for ``-1``, no bound."""
    megabytes = parse_megabytes(name, text, -1)
    return None if megabytes == -1 else megabytes << 20


def _count(name: str, text: str) -> int:
    """A number from 0 to 262143, which is MAX_BACKENDS."""
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) > 262143:
        raise InvalidParameterValue(f'invalid value for parameter "{name}": "{text}"')
    return int(text)


_VALUES: dict[str, Callable[[str, str], Any]] = {
    "wal-sender-timeout": _time,
    "wal-sender-shutdown-timeout": _time,
    "wal-receiver-timeout": _time,
    "wal-keep-size": _size,
    "max-slot-wal-keep-size": _bound,
    "max-wal-senders": _count,
    "max-replication-slots": _count,
}
"""The options whose values are those of configuration parameters."""


class Options(UsageOptions):
    synopsis = "--wal-dir DIR [--upstream CONNINFO] [--listen ENDPOINT]... [options]"
    longdesc = (
        "Serves the PostgreSQL WAL in a directory to standbys, pg_receivewal and every other "
        "client of the streaming replication protocol. The directory may be a primary's live "
        "pg_wal or an archive, and then nothing in it is ever changed; or, with --upstream, one "
        "into which WAL is received from a live server. WAL contains every row of the database, "
        "and whoever can connect is served: listen only where you trust everybody."
    )
    optParameters: ClassVar = [
        ["wal-dir", "d", None, "The directory with the WAL segments and history files."],
        [
            "upstream",
            "u",
            None,
            "Receive WAL into the directory from the server that this libpq connection string "
            "names: a primary, a standby, or another walsender. [default: receive nothing]",
        ],
        ["upstream-slot", None, None, "The physical replication slot to use on the upstream."],
        [
            "upstream-start",
            None,
            None,
            "The LSN to begin with if the directory is empty. [default: what the slot has "
            "reserved, else the upstream's current segment]",
        ],
        [
            "wal-receiver-timeout",
            None,
            "60s",
            "Connect anew to an upstream that has been silent for so long; 0 for never.",
        ],
        [
            "wal-keep-size",
            None,
            None,
            "Remove received WAL that is further behind its end than so many megabytes, and is "
            "needed by no slot and no connected client. [default: remove nothing]",
        ],
        [
            "max-slot-wal-keep-size",
            None,
            None,
            "Invalidate a slot that keeps more than so many megabytes of WAL; needs "
            "--wal-keep-size. [default: -1, keep as much as it takes]",
        ],
        [
            "max-replication-slots",
            None,
            None,
            "How many replication slots there may be on what is received. [default: 10]",
        ],
        [
            "max-wal-senders",
            None,
            "10",
            "How many clients may be connected at the same time.",
        ],
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

    optFlags: ClassVar = [
        ["upstream-create-slot", None, "Create the slot on the upstream if it is not there."],
        [
            "hot-standby-feedback",
            None,
            "Tell the upstream which transactions our standbys' queries still need to see.",
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
        self._check_upstream()
        if self["max-slot-wal-keep-size"] is not None and self["wal-keep-size"] is None:
            raise UsageError("--max-slot-wal-keep-size means nothing without --wal-keep-size")
        for name, value in _VALUES.items():
            if self[name] is None:
                continue
            try:
                self[name] = value(name.replace("-", "_"), self[name])
            except InvalidParameterValue as error:
                hint = f" ({error.hint})" if error.hint else ""
                raise UsageError(f"--{name}: {error.message}{hint}") from None
        if self["server-version"] is not None:
            try:
                parse_version(self["server-version"])
            except ValueError as error:
                raise UsageError(f"--server-version: {error}") from None
        self["listen"] = self["listen"] or [DEFAULT_ENDPOINT]

    def _check_upstream(self) -> None:
        if self["upstream"] is None:
            for name in (
                "upstream-slot",
                "upstream-start",
                "upstream-create-slot",
                "hot-standby-feedback",
                "wal-keep-size",
                "max-slot-wal-keep-size",
                "max-replication-slots",
            ):
                if self[name]:
                    raise UsageError(f"--{name} means nothing without --upstream")
            return
        if self["upstream-create-slot"] and self["upstream-slot"] is None:
            raise UsageError("--upstream-create-slot needs --upstream-slot: say which slot")
        slot = self["upstream-slot"]
        if slot is not None and not re.fullmatch("[a-z0-9_]{1,63}", slot):
            raise UsageError(
                f'--upstream-slot: invalid replication slot name: "{slot}": such names are of 1 '
                "to 63 lower case letters, numbers and underscores"
            )
        try:
            start = self["upstream-start"]
            self["upstream-start"] = 0 if start is None else parse_lsn(start)
        except ValueError as error:
            raise UsageError(f"--upstream-start: {error}") from None


class WalSenderService(Service):
    """Serves a directory of WAL at some endpoints while it runs, and receives into it if there is
    a ``relay``.

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
        relay: WalRelay | None = None,
    ) -> None:
        self._reactor = reactor
        self._relay = relay
        self._timeline = timeline
        self._factory = factory
        self._endpoints = endpoints
        self._shutdown_timeout = shutdown_timeout
        self._ports: list[IListeningPort] = []

    def startService(self) -> None:
        super().startService()
        for description, endpoint in self._endpoints:
            self._listen(description, endpoint)
        (self._relay or self._timeline).start()

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
        if self._relay is not None:
            await self._relay.stop()
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
        what = " ".join(str(error).split())  # it may be a list of what psycopg has tried
        problem = f"{what}: it takes pip install 'walproto[upstream]'"
    except SlotsError as error:
        raise SystemExit(f"twist walsender: {error}") from None
    except ValueError as error:
        problem = str(error)
    raise SystemExit(f"twist walsender: --upstream: {problem}")


def makeService(options: Options) -> WalSenderService:
    """The service that the options ask for, on the reactor that runs."""
    from twisted.internet import reactor

    relay = _make_relay(options, reactor)
    timeline = relay.timeline if relay else WalDirectory(Path(options["wal-dir"]), reactor)
    factory = WalSenderFactory(
        timeline,
        reactor,
        server_version=options["server-version"],
        wal_sender_timeout=options["wal-sender-timeout"],
        slots=relay.slots if relay else None,
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
        timeline,
        factory,
        endpoints,
        options["wal-sender-shutdown-timeout"],
        relay,
    )
