"""The options of ``twist walsender``: what they are, and what may be wrong with them.

What is wrong ends the program with one line on standard error and exit status 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from walproto.errors import InvalidParameterValue
from walproto.lsn import parse_lsn
from walproto.neon.callback import parse_address
from walproto.secrets import blanked, censored
from walproto.server.configuration import parse_version
from walproto.server.settings import parse_megabytes, parse_milliseconds

DEFAULT_ENDPOINT = "tcp:5433:interface=127.0.0.1"


def cannot_start(*problems: object) -> SystemExit:
    """What ends the program, and says why, a line for each of the problems: without a password that
    somebody has put where none belongs."""
    return SystemExit("twist walsender: " + "\n".join(censored(str(each)) for each in problems))


def _time(name: str, text: str) -> float:
    """Seconds that a time such as ``60s`` or ``1min`` stands for."""
    return parse_milliseconds(name, text) / 1000


def _period(name: str, text: str) -> float:
    """As `_time`, but more than 0."""
    period = _time(name, text)
    if not period:
        raise InvalidParameterValue(
            f'invalid value for parameter "{name}": "{text}"', hint="It must be more than 0."
        )
    return period


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
        raise InvalidParameterValue(
            f'invalid value for parameter "{name}": "{text}"',
            hint="It must be a number from 0 to 262143.",
        )
    return int(text)


def _positive(name: str, text: str) -> int:
    """As :func:`_count`, but at least 1."""
    count = _count(name, text)
    if not count:
        raise InvalidParameterValue(
            f'invalid value for parameter "{name}": "{text}"', hint="It must be at least 1."
        )
    return count


def _authentication_timeout(name: str, text: str) -> float:
    """As :func:`_time`, with a plain number being seconds, and PostgreSQL's bounds."""
    seconds = _time(name, f"{text}s" if text.isdecimal() else text)
    if not 1 <= seconds <= 600:
        raise InvalidParameterValue(
            f'invalid value for parameter "{name}": "{text}"',
            hint="It must be between 1s and 10min.",
        )
    return seconds


def _workers(name: str, text: str) -> int:
    """As :func:`_count`, but 64 at most."""
    if not re.fullmatch("[0-9]{1,2}", text) or int(text) > 64:
        raise InvalidParameterValue(
            f'invalid value for parameter "{name}": "{text}"',
            hint="It must be a number from 0 to 64.",
        )
    return int(text)


_VALUES: dict[str, Callable[[str, str], Any]] = {
    "wal-sender-timeout": _time,
    "wal-sender-shutdown-timeout": _time,
    "wal-receiver-timeout": _time,
    "wal-keep-size": _size,
    "max-slot-wal-keep-size": _bound,
    "max-wal-senders": _count,
    "max-replication-slots": _count,
    "workers": _workers,
    "recall-period": _period,
    "authentication-timeout": _authentication_timeout,
    "max-unauthenticated": _positive,
    "max-unauthenticated-per-address": _positive,
}
"""The options whose values are those of configuration parameters."""


class Options(UsageOptions):
    synopsis = (
        "(--wal-dir DIR [--upstream CONNINFO] | --data-dir DIR) [--listen ENDPOINT]... [options]"
    )
    longdesc = (
        "Serves the PostgreSQL WAL in a directory to standbys, pg_receivewal and every other "
        "client of the streaming replication protocol. The directory may be a primary's live "
        "pg_wal or an archive, and then nothing in it is ever changed; or, with --upstream, one "
        "into which WAL is received from a live server. With --data-dir it is a "
        "safekeeper's, with many timelines. WAL contains every row of the database: who is on "
        "this machine is served, and nobody else, unless TLS and passwords, tokens or an "
        "--hba-file say who may connect. SIGHUP has the files for these read anew."
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
            "data-dir",
            None,
            None,
            "Serve the timelines in DIR/<tenant ID>/<timeline ID>/ that a safekeeper keeps there.",
        ],
        [
            "advertise",
            None,
            None,
            "Ask pageservers to connect to us at HOST:PORT. [default: ask none]",
        ],
        [
            "recall-period",
            None,
            None,
            "Ask a pageserver again after so long, until it streams. [default: 10s]",
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
            "workers",
            None,
            "0",
            "Have so many other processes send WAL to clients without TLS, to use as many cores; "
            "one less than there are cores is enough.",
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
            "ssl-cert-file",
            None,
            None,
            "Offer TLS, with the server certificate in this PEM file; needs walproto[tls].",
        ],
        ["ssl-key-file", None, None, "The private key for it; nobody else may read the file."],
        [
            "ssl-ca-file",
            None,
            None,
            "Ask clients for certificates, and check them with the CA certificates in this file.",
        ],
        ["ssl-crl-file", None, None, "The client certificates that these have revoked."],
        [
            "ssl-min-protocol-version",
            None,
            None,
            "The oldest version of TLS that is spoken: TLSv1.2 or TLSv1.3. [default: TLSv1.3]",
        ],
        [
            "auth-file",
            None,
            None,
            "The users and their passwords or SCRAM secrets, as in PgBouncer's userlist.txt.",
        ],
        [
            "hba-file",
            None,
            None,
            "Who may connect from where and how, as in pg_hba.conf. [default: this machine without "
            "a password, others with TLS and a password or token]",
        ],
        [
            "jwt-public-key",
            None,
            None,
            "Take JSON web tokens as passwords that were signed for the public key in this PEM "
            "file; needs --data-dir, TLS and walproto[jwt].",
        ],
        [
            "authentication-timeout",
            None,
            "60s",
            "Disconnect a client that has not authenticated after so long.",
        ],
        [
            "max-unauthenticated",
            None,
            "200",
            "How many clients may be connected that have not authenticated yet.",
        ],
        [
            "max-unauthenticated-per-address",
            None,
            "50",
            "How many of these may be from one IPv4 address or one IPv6 network.",
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
        """Where to listen, as a Twisted endpoint: tcp:5433 (all of IPv4), tcp6:5433,
        unix:/run/walsender/.s.PGSQL.5433, ...; may be given more than once. [default:
        tcp:5433:interface=127.0.0.1]"""
        self["listen"].append(endpoint)

    opt_l = opt_listen

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        try:
            super().parseOptions(options)
        except UsageError as error:
            raise cannot_start(error) from None

    def parseArgs(self, *arguments: str) -> None:
        if arguments:
            raise UsageError(f"unexpected argument: {blanked(arguments[0])}")

    def postOptions(self) -> None:
        if self["data-dir"] is not None:
            for name in ("wal-dir", "upstream"):
                if self[name] is not None:
                    raise UsageError(f"--{name} and --data-dir exclude each other: say one")
        elif not self["wal-dir"]:
            raise UsageError(
                "--wal-dir is missing: say which directory holds the WAL (--data-dir if it is a "
                "safekeeper's)"
            )
        self._check_directory("wal-dir" if self["data-dir"] is None else "data-dir")
        self._check_upstream()
        self._check_callbacks()
        self._check_access()
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
        for endpoint in self["listen"]:
            if endpoint.startswith(("ssl:", "tls:")):
                raise UsageError(
                    f"--listen: {endpoint.split(':')[0]}: is not what PostgreSQL's clients speak: "
                    "give --ssl-cert-file, and listen on tcp:"
                )

    def _check_directory(self, name: str) -> None:
        directory = self[name]
        if not os.path.isdir(directory):
            what = "not a directory" if os.path.exists(directory) else "no such directory"
            raise UsageError(f"--{name}: {what}: {directory}")
        if not os.access(directory, os.R_OK | os.X_OK):
            raise UsageError(f"--{name}: no permission to read {directory}")

    def _check_callbacks(self) -> None:
        for name in ("advertise", "recall-period"):
            if self[name] is not None and self["data-dir"] is None:
                raise UsageError(f"--{name} means nothing without --data-dir")
        if self["advertise"] is not None:
            try:
                self["advertise"] = parse_address(self["advertise"])
            except ValueError as error:
                raise UsageError(f"--advertise: {error}") from None
        elif self["recall-period"] is not None:
            raise UsageError("--recall-period means nothing without --advertise")

    def _check_access(self) -> None:
        if (self["ssl-cert-file"] is None) != (self["ssl-key-file"] is None):
            raise UsageError("--ssl-cert-file and --ssl-key-file need each other")
        for name in ("ssl-ca-file", "ssl-crl-file", "ssl-min-protocol-version", "jwt-public-key"):
            if self[name] is not None and self["ssl-cert-file"] is None:
                raise UsageError(f"--{name} means nothing without --ssl-cert-file")
        if self["ssl-crl-file"] is not None and self["ssl-ca-file"] is None:
            raise UsageError("--ssl-crl-file means nothing without --ssl-ca-file")
        if self["ssl-min-protocol-version"] not in (None, "TLSv1.2", "TLSv1.3"):
            raise UsageError("--ssl-min-protocol-version: say TLSv1.2 or TLSv1.3")
        if self["jwt-public-key"] is not None and self["data-dir"] is None:
            raise UsageError("--jwt-public-key means nothing without --data-dir")

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
