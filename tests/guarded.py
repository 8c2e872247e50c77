"""Exchanges with a guard, and the files that it goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import write
from tests.jwt_keys import key, write_keys
from tests.scram_conversations import BARE, FINAL, Client, final, initial
from walproto.access.grant import Grant
from walproto.access.guard import AccessError, Guard
from walproto.access.peer import Peer, Tls
from walproto.errors import ReportedError
from walproto.wire.startup import Startup

A, B = "a" * 32, "b" * 32
PASSWORD = "correct horse"
TLS = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256)
LOCAL = Peer("[local]", is_local=True, is_near=True)
LOOPBACK = Peer("127.0.0.1:5", ip_address("127.0.0.1"), is_near=True)
LOOPBACK_6 = Peer("::1:5", ip_address("::1"), is_near=True)
FAR = Peer("203.0.113.9:5", ip_address("203.0.113.9"))
FAR_6 = Peer("2001:db8::9:5", ip_address("2001:db8::9"))
NEAR = (LOCAL, LOOPBACK, LOOPBACK_6, replace(LOOPBACK, tls=TLS))

CLEARTEXT = bytes.fromhex("52 00000008 00000003")
NO_ENTRY = (
    'FATAL 28000: no pg_hba.conf entry for replication connection from host "{}", user "{}", {}'
)
WRONG_PASSWORD = 'FATAL 28P01: password authentication failed for user "{}"'


def over_tls(peer: Peer = FAR, common_name: str | None = None) -> Peer:
    return replace(peer, tls=replace(TLS, common_name=common_name))


def startup(user: str = "alice", database: str = "", *, replication: bool = True) -> Startup:
    return Startup(user, database or user, replication, "", (), False)


class Said:
    """What became of an exchange: the server's messages, and how it ended."""

    def __init__(self, guard: Guard, startup: Startup, peer: Peer, answer: Any) -> None:
        self.messages: list[bytes] = []
        self.grant: Grant | None = None
        self.error: ReportedError | None = None
        exchange = guard.authenticate(startup, peer)
        try:
            self.messages.append(next(exchange))
            while True:
                self.messages.append(exchange.send(answer(self.messages)))
        except StopIteration as end:
            self.grant = end.value
        except ReportedError as error:
            self.error = error

    @property
    def outcome(self) -> str:
        """The rule and the method that let it in; or what it is told."""
        if self.grant is not None:
            return f"{self.grant.rule.rpartition('/')[2]} {self.grant.method}"
        assert self.error is not None
        assert (self.error.detail, self.error.hint) == (None, None)
        return f"{self.error.severity} {self.error.sqlstate}: {self.error.message}"

    @property
    def log(self) -> str | None:
        """What only the operator is told."""
        assert self.error is not None
        return self.error.log


def silent(messages: list[bytes]) -> bytes:
    raise AssertionError(f"it was asked for something: {messages}")


def cleartext(password: str) -> Callable[[list[bytes]], bytes]:
    """A client that answers the request for a password."""

    def answer(messages: list[bytes]) -> bytes:
        assert messages == [CLEARTEXT]
        return password.encode() + b"\0"

    return answer


def scram(password: str = PASSWORD) -> Callable[[list[bytes]], bytes]:
    """A client that proves that it knows a password."""
    client = Client()
    answers: Iterator[Any] = iter([initial(b"n,," + BARE), final(FINAL, password)])

    def answer(messages: list[bytes]) -> bytes:
        client.server_first = messages[-1][9:]
        made: bytes = next(answers)(client)
        return made

    return answer


def come(
    guard: Guard, peer: Peer, answer: Any = silent, *, user: str = "alice", **more: Any
) -> Said:
    return Said(guard, startup(user, **more), peer, answer)


# --- Files ---------------------------------------------------------------------------------------


class Files:
    """The three files of a guard, in a directory; each is given to it once it was written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.given: dict[str, Any] = {}

    def users(self, text: str = f'"alice" "{PASSWORD}"\n') -> Path:
        path = write(self.directory / "users", text.encode(), mode=0o600)
        self.given["auth_file"] = path
        return path

    def hba(self, text: str) -> Path:
        path = write(self.directory / "hba", text.encode())
        self.given["hba_file"] = path
        return path

    def keys(self, *pairs: Any) -> Path:
        path = write_keys(self.directory / "jwt.pem", *(pairs or (key(),)))
        self.given["jwt_public_key"] = path
        return path

    def guard(self, **options: Any) -> Guard:
        options = {"offers_tls": True, "checks_certificates": True, "has_tenants": True} | options
        return Guard(**self.given, **options)

    def problems(self, **options: Any) -> list[str]:
        with pytest.raises(AccessError) as caught:
            self.guard(**options)
        return str(caught.value).replace(f"{self.directory}/", "").splitlines()
