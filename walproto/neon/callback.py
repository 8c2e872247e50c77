"""One call to a pageserver, which asks it to connect back to us.

It is one simple query, ``callmemaybe``, over an ordinary connection: the tenant, the timeline, and
the connection string to connect back with.  A pageserver connects in its own time; its answer says
only that it has understood.

Neon: ``request_callback`` in the safekeeper's ``callmemaybe.rs``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from walproto import secrets
from walproto.neon.ids import TimelineIds
from walproto.upstream.connection import UpstreamError

SYNTAX_ERROR = "42601"


@dataclass(frozen=True, slots=True)
class Subscription:
    """A timeline, and the pageserver that is to be called for it.

    One pageserver is told from another by its connection string, to the letter.  That may hold a
    password, so it is not in the ``repr``.
    """

    ids: TimelineIds
    pageserver_connstr: str = field(repr=False)


class CallError(Exception):
    """Why a call failed, and what the operator can do about it; there is no password in it.

    ``kind`` is the same for calls that failed in the same way, whatever the text says.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Caller:
    """Calls pageservers over libpq, and tells them to connect to ``host`` and ``port``.

    It is a client that says where a pageserver is, so nothing of ours is used there, no password
    and no certificate; see :mod:`walproto.upstream.foreign`.

    The Deferred of a call fires when the pageserver has answered, or fails with a CallError.  If it
    is cancelled, the connection is closed.

    Needs psycopg: ``walproto[upstream]``.
    """

    _log = Logger()

    def __init__(self, reactor: Any, host: str, port: int) -> None:
        from walproto.upstream import libpq
        from walproto.upstream.foreign import foreign_conninfo

        self._foreign_conninfo = foreign_conninfo
        self._libpq = libpq
        self._reactor = reactor
        self._host = host
        self._port = port

    def __call__(self, subscription: Subscription) -> Deferred[None]:
        return Deferred.fromCoroutine(self._call(subscription))

    async def _call(self, subscription: Subscription) -> None:
        connstr = subscription.pageserver_connstr

        def failed(kind: str, problem: str, advice: str) -> CallError:
            return CallError(kind, f"{masked(problem, connstr)}: {advice}")

        if os.environ.get("PGSERVICE"):
            problem = "PGSERVICE is set here, and what it stands for is not for pageservers"
            raise failed("service", problem, "start this walsender without it")
        try:
            conninfo = self._foreign_conninfo(connstr)
        except ValueError as error:
            advice = "correct the pageserver_connstr that clients of this timeline name"
            raise failed("string", str(error), advice) from None
        try:
            connection = await self._libpq.connect(self._reactor, conninfo)
        except UpstreamError as error:
            advice = "see that it runs, can be reached from here, and lets us in"
            raise failed("connecting", f"cannot connect: {error}", advice) from None
        connection.notice = lambda text: self._log.info(
            "pageserver {pageserver} for timeline {tenant}/{timeline} says: {text}",
            pageserver=pageserver_name(connstr),
            tenant=subscription.ids.tenant_id,
            timeline=subscription.ids.timeline_id,
            text=masked(text, connstr),
        )
        try:
            await connection.query(query_for(subscription, self._host, self._port))
        except UpstreamError as error:
            state = error.sqlstate
            if not state:
                raise failed("no answer", f"no answer: {error}", "its log may say why") from None
            if state == SYNTAX_ERROR:
                problem = f"it does not know callmemaybe: {error} (SQLSTATE {state})"
                advice = "see that its connection string names a pageserver"
            else:
                problem, advice = f"{error} (SQLSTATE {state})", "its log may say more"
            raise failed(f"answer {state}", problem, advice) from None
        finally:
            connection.lose("the call is over")


def query_for(subscription: Subscription, host: str, port: int) -> str:
    """The query that asks a pageserver to connect to ``host`` and ``port`` for a timeline.

    Behind the two IDs comes a connection string.  The words of its ``options`` are escaped, as
    ``pg_split_opts`` undoes it, and all of them are quoted then, as libpq undoes it.
    """
    tenant, timeline = subscription.ids.tenant_id, subscription.ids.timeline_id
    connstr = _word(subscription.pageserver_connstr)
    options = f"-c ztimelineid={timeline} ztenantid={tenant} pageserver_connstr={connstr}"
    if not re.fullmatch(r"[^\s'\\]+", host):
        host = _quoted(host)
    return f"callmemaybe {tenant} {timeline} host={host} port={port} options={_quoted(options)}"


def _word(value: str) -> str:
    """A value within ``options``, with what would end it escaped."""
    return re.sub(r"[\\\s]", r"\\\g<0>", value)


def _quoted(value: str) -> str:
    """A value of a connection string, in quotes."""
    return "'" + re.sub(r"[\\']", r"\\\g<0>", value) + "'"


def parse_address(text: str) -> tuple[str, int]:
    """The host and port in ``HOST:PORT``, with an IPv6 address in brackets.  Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f'"{text}" is not HOST:PORT, such as 192.0.2.1:5433 or [2001:db8::1]:5433')
    return match[1] or match[2], int(match[3])


# --- What may be logged -----------------------------------------------------------------------


def pageserver_name(connstr: str) -> str:
    """The host and port that a connection string names, for the log, and nothing else of it."""
    given = _settings(connstr)
    if given is None:
        return "(unknown)"
    host = given.get("host") or given.get("hostaddr") or given.get("service") or "(default)"
    host = host.rpartition("@")[2]  # before that, it is a piece of a password
    return _shown(f"{host}:{given.get('port') or '(default)'}")


def masked(text: str, connstr: str) -> str:
    """A text in which a server may repeat what it was told, for the log, without the passwords in
    the connection string: as they are or as they are written there, and however often escaped."""
    return _shown(secrets.masked(text, secrets.secrets_in(connstr)))


def _settings(connstr: str) -> dict[str, str] | None:
    """What a connection string says; None if it is none."""
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {name: str(value) for name, value in conninfo_to_dict(connstr).items()}
    except (Error, UnicodeError):
        return None


def _shown(text: str) -> str:
    """A text in one line, without what would spoil a log."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line)
