"""``twist walsender``: the service that the options make.

What is wrong with them ends the program with one line on standard error and exit status 1.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReactorFromThreads

from walproto.access.guard import AccessError, Guard
from walproto.neon.callback import Caller
from walproto.neon.callmemaybe import RECALL_PERIOD, Subscriptions
from walproto.neon.data_directory import DataDirectory
from walproto.neon.pageservers import Pageservers
from walproto.neon.walsender import Safekeeper
from walproto.options import Options, cannot_start
from walproto.running import Served, WalSenderService
from walproto.server.factory import WalSenderFactory
from walproto.server.transports import ServerTls
from walproto.timeline.directory import WalDirectory
from walproto.timeline.slots import SlotOptions, SlotsError
from walproto.upstream.process_title import hide_in_process_title
from walproto.upstream.relay import WalRelay
from walproto.wal.writer import SyncError
from walproto.workers.pool import Workers


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
        raise cannot_start(error) from None
    except ValueError as error:
        problem = str(error)
    raise cannot_start(f"--upstream: {problem}")


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
            raise cannot_start(f"--advertise: {_missing(error)}") from None
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
        raise cannot_start(f"--ssl-cert-file: {_missing(error, 'tls')}") from None
    try:
        return OpenSslServerTls(
            options["ssl-cert-file"],
            options["ssl-key-file"],
            options["ssl-ca-file"],
            options["ssl-crl-file"],
            options["ssl-min-protocol-version"] or "TLSv1.3",
        )
    except TlsError as error:
        raise cannot_start(error) from None


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
        raise cannot_start(f"--jwt-public-key: {_missing(error, 'jwt')}") from None
    except AccessError as error:
        raise cannot_start(*str(error).split("\n")) from None


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
    workers = Workers(reactor, options["workers"]) if options["workers"] else None
    factory = WalSenderFactory(
        served.served,
        reactor,
        slots=served.slots,
        workers=workers,
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
            raise cannot_start(f'--listen: "{description}" is not an endpoint: {error}') from None
    return WalSenderService(
        IReactorFromThreads(reactor),
        served,
        factory,
        endpoints,
        guard,
        tls,
        options["wal-sender-shutdown-timeout"],
        workers,
    )
