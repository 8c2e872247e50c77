"""A connection to a server, made by libpq and driven by the reactor.

libpq knows all that a connection string may say: hosts that are tried in turn, TLS, passwords and
where they are kept.  It connects in a thread of its own, for it may wait there for a name server
or for a host that does not answer.  From then on nothing waits: libpq is asked whenever its socket
has something to read or takes something to write.

PostgreSQL documentation: "libpq", chapters "Asynchronous Command Processing" and "Functions
Associated with the COPY Command".
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from psycopg import Error as PsycopgError
from psycopg import pq
from psycopg.conninfo import (
    conninfo_attempts,
    conninfo_to_dict,
    make_conninfo,
    timeout_from_conninfo,
)
from psycopg.pq.abc import PGconn, PGresult
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReadWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from walproto.secrets import blanked, masked
from walproto.upstream.connection import Answer, Row, UpstreamError

CONNECT_TIMEOUT = 10
"""Seconds for each host to answer, unless the connection string says otherwise."""

LOOK_UP = 0.5
"""Seconds after which it is looked whether a connection is still wanted."""

TURN = 16
"""Messages that are dealt with before it is others' turn."""


def replication_conninfos(conninfo: str) -> list[str]:
    """The connection strings for a replication connection as ``conninfo`` has it, a string of
    keywords or a URI.

    There is one for each of the hosts it names, with that one first: libpq tries them in turn, but
    always from the first, be it one that answers and is of no use.  Raises ValueError if it is no
    connection string.
    """
    # As walreceiver has it: "replication" is the database in a password file.
    return _conninfos(conninfo, replication="true", dbname="replication")


def _conninfos(conninfo: str, **ours: str) -> list[str]:
    given = settings_in(conninfo)
    try:
        service = given.get("service") or os.environ.get("PGSERVICE")
        settings = _defaults(service) | given
        made: dict[str, Any] = {"fallback_application_name": "walproto"}
        if service:
            made |= {name: settings[name] for name in _FROM_SERVICE if settings.get(name)}
        if not settings.get("connect_timeout"):
            made["connect_timeout"] = CONNECT_TIMEOUT
        made |= ours
        lists = {name: settings[name].split(",") for name in _HOSTS if settings.get(name)}
        count = max(map(len, lists.values()), default=1)
        return [make_conninfo(conninfo, **(made | _turned(lists, turn))) for turn in range(count)]
    except PsycopgError as error:
        raise ValueError(str(error).strip()) from None


def settings_in(conninfo: str) -> dict[str, str]:
    """What a connection string says.  Raises ValueError, in whose text there is no password, if it
    is none."""
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    except UnicodeError:
        raise ValueError("it is not in UTF-8") from None
    except PsycopgError as error:
        text = str(error).strip()
        if blanked(conninfo) != conninfo or _may_hide(conninfo):
            # What is wrong may be the password.
            text = re.sub('"="|(?s:".*")', lambda it: it[0] if it[0] == '"="' else '"..."', text)
        raise ValueError(text) from None
    if any("@" in host[1:] for host in given.get("host", "").split(",")):
        raise ValueError('there is a "@" in the name of a host: in a password it is written "%40"')
    if not all(re.fullmatch(r"\s*+\d*+\s*+", port) for port in given.get("port", "").split(",")):
        raise ValueError('a port is no number; if it is a password, a "/" there is written "%2F"')
    return given


def _may_hide(conninfo: str) -> bool:
    """Whether there may be a password in a connection string that nobody can read."""
    return "pass" in conninfo or "@" in conninfo.partition("://")[2]


_HOSTS = ("host", "hostaddr", "port")
_FROM_SERVICE = (*_HOSTS, "connect_timeout", "target_session_attrs", "load_balance_hosts")
"""What has to be known before libpq is asked, which alone would look it up in a service file."""


def _turned(lists: dict[str, list[str]], turn: int) -> dict[str, str]:
    """The lists of hosts and ports, begun with another one; a single port is that of all hosts."""
    if turn == 0:
        return {}
    return {
        name: ",".join(values[turn:] + values[:turn]) if len(values) > 1 else values[0]
        for name, values in lists.items()
    }


def _defaults(service: str | None) -> dict[str, str]:
    """What the environment, and the service file, say where the connection string does not."""
    before = os.environ.get("PGSERVICE")
    if service:
        os.environ["PGSERVICE"] = service
    try:
        defaults = pq.Conninfo.get_defaults()
    except MemoryError:  # as psycopg calls it; that there is no such service, libpq says later
        defaults = []
    finally:
        if service and before is None:
            del os.environ["PGSERVICE"]
        elif service and before is not None:
            os.environ["PGSERVICE"] = before
    return {one.keyword.decode(): one.val.decode() for one in defaults if one.val}


def connect(reactor: Any, conninfo: str) -> Deferred[Connection]:
    """Connect; the Deferred fails with an UpstreamError if that is not to be.

    If it is cancelled, whatever comes of it is closed.
    """
    connected = Deferred[Connection](lambda _: None)

    def work() -> None:
        try:
            found: PGconn | str = _connect(conninfo, lambda: connected.called)
        except Exception as error:
            found = _one_line(str(error))
        reactor.callFromThread(done, found)

    def done(found: PGconn | str) -> None:
        if isinstance(found, str):
            if not connected.called:
                connected.errback(UpstreamError(found))
        elif connected.called:
            found.finish()
        else:
            connected.callback(Connection(found, reactor))

    threading.Thread(target=work, name="libpq", daemon=True).start()
    return connected


def _attempts(conninfo: str) -> Iterator[dict[str, Any]]:
    """What to try in turn: each address of each host.  To prefer a standby is to look for one at
    all of them before anything else will do."""
    settings = conninfo_to_dict(conninfo)
    if settings.get("target_session_attrs") == "prefer-standby":
        yield from conninfo_attempts(settings | {"target_session_attrs": "standby"})
        settings["target_session_attrs"] = "any"
    yield from conninfo_attempts(settings)


def _connect(conninfo: str, is_in_vain: Callable[[], bool]) -> PGconn:
    """Connect to the first host that will do; an UpstreamError tells why none does.

    It waits as PQconnectdb does, but not within libpq, where psycopg would have every other thread
    wait, too.
    """
    problems = []
    for attempt in _attempts(conninfo):
        until = time.monotonic() + timeout_from_conninfo(attempt)
        pgconn = pq.PGconn.connect_start(make_conninfo("", **attempt).encode())
        events = select.POLLOUT
        while pgconn.status != pq.ConnStatus.BAD and time.monotonic() < until and not is_in_vain():
            poller = select.poll()
            poller.register(pgconn.socket, events)
            if not poller.poll(LOOK_UP * 1000):
                continue
            match pgconn.connect_poll():
                case pq.PollingStatus.OK:
                    return pgconn
                case pq.PollingStatus.READING:
                    events = select.POLLIN
                case _:
                    events = select.POLLOUT
        problem = masked(_one_line(pgconn.get_error_message()), _passwords(pgconn))
        in_time = pgconn.status == pq.ConnStatus.BAD
        problems.append(problem if in_time else f"{problem} timeout expired")
        pgconn.finish()
        if is_in_vain():
            break
    raise UpstreamError("; ".join(problems))


@implementer(IReadWriteDescriptor)
class Connection:
    """A connection that is there: an :class:`~walproto.upstream.connection.UpstreamConnection`."""

    _log = Logger()

    def __init__(self, pgconn: PGconn, reactor: Any) -> None:
        self._pgconn = pgconn
        self._reactor = reactor
        # One of our own: libpq closes its own when the connection breaks, whoever watches it.
        self._fd = os.dup(pgconn.socket)
        self._secrets = _passwords(pgconn)
        self._rows: list[Row] = []
        self._awaiting: Deferred[Answer] | None = None
        self._take: Callable[[memoryview], None] | None = None
        self._next_turn: IDelayedCall | None = None
        self._is_paused = False
        self._problem: UpstreamError | None = None
        self._cut: UpstreamError | None = None
        self._error: UpstreamError | None = None
        self.heard: Callable[[], None] = lambda: None
        self.notice: Callable[[str], None] = self._log_notice
        """Called with the text of each notice that the server sends."""
        self.peer = _address(pgconn)
        self.major = pgconn.server_version // 10000
        pgconn.nonblocking = 1
        pgconn.notice_handler = self._notice
        reactor.addReader(self)

    def query(self, command: str) -> Deferred[Answer]:
        return self._await(lambda: self._pgconn.send_query(command.encode()))

    def copy(self, take: Callable[[memoryview], None]) -> Deferred[Answer]:
        self._take = take
        return self._await(lambda: None)

    def send(self, data: bytes) -> None:
        if self._error is None and self._take is not None:
            try:
                self._pgconn.put_copy_data(data)
                self._flush()
            except PsycopgError as error:
                self._cut_off(error)
                self._schedule()

    def pause(self) -> None:
        if not self._is_paused and self._error is None:
            self._is_paused = True
            self._reactor.removeReader(self)

    def resume(self) -> None:
        if self._is_paused and self._error is None:
            self._is_paused = False
            self._reactor.addReader(self)
            self._schedule()  # libpq may have read more than we took

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def lose(self, why: str) -> None:
        self._end(UpstreamError(why))

    # --- for the reactor to call -----------------------------------------------------------

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return "upstream"

    def doRead(self) -> None:
        if self._error is not None or self._next_turn is not None:
            return  # what has been read comes first
        try:
            self._pgconn.consume_input()
        except PsycopgError as error:
            self._cut_off(error)
        else:
            self.heard()
        self._advance()

    def doWrite(self) -> None:
        try:
            self._flush()
        except PsycopgError as error:
            self._cut_off(error)
            self._schedule()

    def connectionLost(self, reason: Failure) -> None:
        self.doRead()
        self.lose("the connection was lost")

    # --- within ----------------------------------------------------------------------------

    def _await(self, ask: Callable[[], None]) -> Deferred[Answer]:
        assert self._awaiting is None
        awaiting = Deferred[Answer]()
        self._awaiting = awaiting
        self._rows, self._problem = [], None
        if self._error is not None:
            self._fail(self._error)
            return awaiting
        try:
            ask()
            self._flush()
        except PsycopgError as error:
            self.lose(_one_line(str(error)))
        else:
            self._schedule()
        return awaiting

    def _schedule(self) -> None:
        if self._next_turn is None and not self._is_paused:
            self._next_turn = self._reactor.callLater(0, self._take_turn)

    def _take_turn(self) -> None:
        self._next_turn = None
        self._advance()

    def _cut_off(self, error: PsycopgError) -> None:
        """The connection has broken; what came before that, may tell more."""
        self._cut = self._cut or UpstreamError(_one_line(str(error)))
        self._reactor.removeWriter(self)

    def _advance(self) -> None:
        """Deal with what libpq has read; if there is no more to come, that is the end."""
        try:
            if self._take is None or self._take_data(self._take):
                while self._awaiting and not self._take and not self._pgconn.is_busy():
                    self._take_result()
        except PsycopgError as error:
            self.lose(_one_line(str(error)))
        except Exception as error:  # raised by who takes the data
            self._fail(error)
        if self._cut is not None and self._next_turn is None and not self._is_paused:
            self._end(self._problem or self._cut)

    def _take_data(self, take: Callable[[memoryview], None]) -> bool:
        """Deal with some messages; whether the stream is over."""
        for _ in range(TURN):
            if self._is_paused or self._error is not None:
                return False
            size, data = self._pgconn.get_copy_data(1)
            if size == 0:
                return False
            if size < 0:
                self._take = None
                return True
            take(memoryview(data))
        self._schedule()
        return False

    def _take_result(self) -> None:
        result = self._pgconn.get_result()
        if result is None:
            if self._problem is not None:
                self._fail(self._problem)
            else:
                self._succeed(Answer(self._rows))
            return
        match result.status:
            case pq.ExecStatus.COPY_IN:  # it has ended the stream, so do we
                self._pgconn.put_copy_end()
                self._flush()
            case pq.ExecStatus.COPY_BOTH:
                self._succeed(Answer(self._rows, is_streaming=True))
            case pq.ExecStatus.TUPLES_OK:
                columns = range(result.nfields)
                self._rows += [
                    [result.get_value(row, column) for column in columns]
                    for row in range(result.ntuples)
                ]
            case pq.ExecStatus.FATAL_ERROR:
                self._problem = self._problem or _problem(result, self._secrets)
            case pq.ExecStatus.COMMAND_OK:
                pass
            case unexpected:
                self.lose(f"unexpected result ({pq.ExecStatus(unexpected).name})")

    def _succeed(self, answer: Answer) -> None:
        awaiting, self._awaiting = self._awaiting, None
        if awaiting is not None:
            awaiting.callback(answer)

    def _fail(self, error: Exception) -> None:
        awaiting, self._awaiting = self._awaiting, None
        self._take = None
        if awaiting is not None:
            awaiting.errback(error)

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._reactor.addWriter(self)
        else:
            self._reactor.removeWriter(self)

    def _notice(self, result: PGresult) -> None:
        text = result.error_message.decode("utf-8", "replace").strip()
        self.notice(masked(text, self._secrets))

    def _log_notice(self, text: str) -> None:
        self._log.info("{peer} says: {text}", peer=self.peer, text=text)

    def _end(self, error: UpstreamError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        self._pgconn.finish()
        os.close(self._fd)
        self._fail(error)


def _address(pgconn: PGconn) -> str:
    host, port = pgconn.host.decode(), pgconn.port.decode()
    return host if host.startswith("/") else f"{host}:{port}"


def _passwords(pgconn: PGconn) -> set[str]:
    """What must not be logged, though the server may repeat it: the password that was used,
    wherever it came from."""
    return {pgconn.password.decode("utf-8", "replace")} - {""}


def _one_line(message: str) -> str:
    """What libpq says of one host or several, less its guesses, which it indents, and what psycopg
    puts before it."""
    lines = re.sub(r"\A[a-z ]+ failed: ", "", message.strip()).splitlines()
    return "; ".join(line.strip() for line in lines if not line.startswith("\t"))


def _problem(result: PGresult, secrets: set[str]) -> UpstreamError:
    """The error that a result carries."""

    def field(code: pq.DiagnosticField) -> str:
        return (result.error_field(code) or b"").decode("utf-8", "replace")

    message = field(pq.DiagnosticField.MESSAGE_PRIMARY)
    if not message:  # it is libpq's own, and what follows in it are guesses
        message = result.error_message.decode("utf-8", "replace").strip().split("\n")[0]
    detail = field(pq.DiagnosticField.MESSAGE_DETAIL)
    text = masked(f"{message} ({detail})" if detail else message, secrets)
    return UpstreamError(text, field(pq.DiagnosticField.SQLSTATE))
