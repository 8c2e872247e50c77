"""A defect of ours is logged with its traceback, and nothing that is secret is in that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, jsonFileLogObserver, textFileLogObserver
from zope.interface import implementer

from tests.fakes import Client, MemoryTimeline, message, server, startup
from tests.guarded import Files
from tests.jwt_keys import EVERYTHING, key
from tests.tls_sessions import OURS, encrypted, ended
from tests.wires import Server
from walproto.access.authentication import Exchange, IAuthenticator
from walproto.access.grant import Grant
from walproto.access.peer import Peer
from walproto.access.tls import ServerTls
from walproto.server.configuration import Configuration
from walproto.server.service import OneTimeline, Service
from walproto.wire.messages import AuthenticationCleartextPassword, CleartextPassword
from walproto.wire.startup import Startup

SECRET = "tellNobody"
DISCONNECTED = ["FATAL XX000: internal error in the WAL sender", "EOF"]


@contextmanager
def logs() -> Iterator[list[str]]:
    """All that is logged meanwhile, as ``twist`` writes it: as text, and as JSON."""
    written: list[str] = []
    with capturedLogs() as events:
        yield written
    for observer_of in (textFileLogObserver, jsonFileLogObserver):
        file = StringIO()
        observer = observer_of(file)
        for event in events:
            observer(event.copy())
        written.append(file.getvalue())


def fail(what: object) -> NoReturn:
    """A defect; what is in the variables of its callers may be secret."""
    raise RuntimeError(f"a defect, with {what!r}")


@implementer(IAuthenticator)
class Defective:
    """Asks for a password, in clear, and then does not know what to do with it."""

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        password = CleartextPassword.parse((yield AuthenticationCleartextPassword.build())).password
        assert password == SECRET
        fail(startup)
        return Grant("none")


@implementer(IAuthenticator)
class Asking:
    """Asks for a password, in clear, and then is content."""

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        password = CleartextPassword.parse((yield AuthenticationCleartextPassword.build())).password
        assert password == SECRET
        return Grant("password")


class NoService(OneTimeline):
    """It is known who the client is, and then there is a defect."""

    def serve(self, startup: Startup, configuration: Configuration, grant: Grant) -> Service:
        assert SECRET in str(startup.parameters)
        fail((startup, grant))


def assert_is_logged_without(secret: str, texts: list[str], function: str) -> None:
    """There is a defect in this function in the log, and nothing secret."""
    text, json = texts
    assert re.search(rf"Traceback .*in {function}\n.*RuntimeError: a defect", text, re.DOTALL)
    assert "RuntimeError" in json
    for written in texts:
        assert "a defect in walproto: disconnecting" in written
        assert secret not in written


@pytest.mark.parametrize(
    ("timeline", "authenticator"),
    [(MemoryTimeline(), Defective()), (NoService(MemoryTimeline()), Asking())],
    ids=["authenticator", "service"],
)
def test_a_password(timeline: Any, authenticator: Any) -> None:
    clock = Clock()
    client = Client(server(timeline, clock, authenticator=authenticator), clock)
    with logs() as texts:
        client.send(startup(pageserver_connstr=f"host=h password={SECRET}"))
        assert client.send(message(b"p", SECRET.encode() + b"\0"))[-2:] == DISCONNECTED
    assert_is_logged_without(SECRET, texts, "fail")


def test_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect is where its signature is looked at."""

    def defective(algorithms: list[str]) -> NoReturn:
        fail(algorithms)

    monkeypatch.setattr("walproto.access.tokens.PyJWS", defective)
    token = key().token(EVERYTHING)
    files = Files(tmp_path)
    files.keys()
    files.hba("hostssl replication all all jwt\n")
    tls = ServerTls(*OURS.server().write(tmp_path, "server"))
    with (
        Server(MemoryTimeline(), tls=tls, authenticator=files.guard()) as tls_server,
        logs() as texts,
    ):
        wire = encrypted(tls_server)
        wire.send(startup())
        wire.hear("R 3")
        wire.send(message(b"p", token.encode() + b"\0"))
        assert ended(tls_server, wire)[-2:] == DISCONNECTED
    for part in token.split("."):
        assert_is_logged_without(part, texts, "defective")
