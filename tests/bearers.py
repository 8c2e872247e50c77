"""Timelines of two tenants, a walsender that shows each of its clients some of them, and clients
that have tokens.

The rules let some in by SCRAM, and everybody else by a token; all over TLS.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.certificates import Authority, write
from tests.fakes import SSL_REQUEST
from tests.jwt_keys import KeyPair, key, write_keys
from tests.neon_trees import RealWal, Safekeeper, Tree, ids_of, wal_of, work_on
from tests.pageserver import Pageserver
from tests.postgres import (
    HOST,
    Installation,
    Workspace,
    int_to_lsn,
    tls_installations,
    workspace,
)
from tests.secured import PASSWORD, Answer
from tests.wal_decoder import SEGMENT
from walproto.neon.ids import TimelineIds

KEYS = [key(algorithm) for algorithm in ("EdDSA", "RS256", "ES256")]
"""Of each kind; the server takes tokens that any of them has signed."""
FIRST, SECOND = 0xA, 0xB
"""The tenants."""
OURS, OURS_TOO, THEIRS = ids_of(1, FIRST), ids_of(2, FIRST), ids_of(3, SECOND)
EVERYBODYS = (OURS, OURS_TOO, THEIRS)
NOWHERE = ids_of(9, SECOND)

HBA = f"""
hostssl replication     alice    all scram-sha-256 tenant={OURS.tenant_id}
hostssl replication     bob      all scram-sha-256 timeline={OURS_TOO} timeline={THEIRS}
hostssl replication     carol    all scram-sha-256
hostssl replication     limited  all jwt tenant={THEIRS.tenant_id}
hostssl all,replication all      all jwt
"""
USERS = "".join(f'"{user}" "{PASSWORD}"\n' for user in ("alice", "bob", "carol"))


def for_tenant(ids: TimelineIds, **more: Any) -> dict[str, Any]:
    return {"scope": "tenant", "tenant_id": ids.tenant_id, **more}


@dataclass
class Setting:
    """WAL of a server, in a timeline of each of `EVERYBODYS`, which this walsender serves."""

    space: Workspace
    installation: Installation
    wal: RealWal
    pg_wal: Path
    """The WAL in whole segments."""
    data_dir: Path
    sender: Safekeeper = field(init=False)

    def tree(self, ids: TimelineIds) -> Tree:
        return Tree(self.data_dir, ids, self.wal)

    @property
    def ssl_options(self) -> tuple[str, ...]:
        files = [str(self.space.path / f"server.{kind}") for kind in ("crt", "key")]
        return ("--ssl-cert-file", files[0], "--ssl-key-file", files[1])

    def another(self, *options: str | Path) -> Safekeeper:
        """Another walsender of the same timelines."""
        return self.space.add(Safekeeper(self.data_dir, *self.ssl_options, *map(str, options)))

    def on(self, sender: Safekeeper) -> Setting:
        other = replace(self)
        other.sender = sender
        return other

    def conninfo(self, ids: TimelineIds, user: str, more: str) -> str:
        return (
            f"host={HOST} port={self.sender.port} user={user} sslmode=require "
            f"connect_timeout=30 options='{self.tree(ids).options}' {more}"
        )

    def run(self, password: str, program: str, *arguments: str | Path) -> Answer:
        """What a client program does that has this in PGPASSWORD."""
        env = shutil.which("env") or ""
        client = self.installation.bindir / program
        started = self.installation.start(env, f"PGPASSWORD={password}", client, *arguments)
        with started as process:
            code = process.wait()
        return Answer(code, process.output)

    def psql(
        self, password: str, ids: TimelineIds = OURS, user: str = "bearer", more: str = ""
    ) -> Answer:
        conninfo = f"{self.conninfo(ids, user, more)} replication=true"
        return self.run(password, "psql", "-XAtw", "-c", "IDENTIFY_SYSTEM", conninfo)

    def seen(self, password: str, user: str = "bearer") -> set[TimelineIds]:
        """The timelines that are shown to who has this password; of the rest there is nothing."""
        seen = set()
        for ids in (*EVERYBODYS, NOWHERE):
            answer = self.psql(password, ids, user)
            if answer.is_let_in:
                assert answer.output == f"{self.wal.system_id}|1|{int_to_lsn(self.wal.end)}|"
                seen.add(ids)
            else:
                assert self.refused(answer) == f'timeline "{ids}" does not exist'
        return seen

    def refused(self, answer: Answer, host: str = HOST) -> str:
        """What psql has said that it was told."""
        start = f'psql: error: connection to server at "{host}", port {self.sender.port} failed: '
        assert answer.code == 2
        assert answer.output.startswith(f"{start}FATAL:  "), answer
        return answer.output.removeprefix(f"{start}FATAL:  ")


TOKENS: set[str] = set()
"""All that were sent."""


def token(claims: dict[str, Any], pair: KeyPair | None = None) -> str:
    made = (pair or KEYS[0]).token(claims)
    TOKENS.add(made)
    return made


def check_no_token(log: str) -> None:
    """Nor any part of one."""
    assert TOKENS
    for part in {part for made in TOKENS for part in made.split(".") if part}:
        assert part not in log


class Bearer(Pageserver):
    """A pageserver that has a token, and comes over TLS or not.  Whenever it is asked for a
    password, there is one more in `questions`."""

    def __init__(
        self,
        sender: Safekeeper,
        ids: TimelineIds,
        token: bytes,
        questions: list[bytes] | None = None,
        *,
        tls: bool = True,
    ) -> None:
        self.questions = [] if questions is None else questions
        self._token = token
        self._tls = tls
        super().__init__(sender.port, ids.tenant_id, ids.timeline_id, user="bearer")

    def connect(self, host: str, port: int) -> socket.socket:
        connection = super().connect(host, port)
        if not self._tls:
            return connection
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection.sendall(SSL_REQUEST)
        assert connection.recv(1) == b"S"
        return context.wrap_socket(connection)

    def message(self) -> tuple[bytes, bytes]:
        tag, contents = super().message()
        if tag == b"R" and contents != b"\0\0\0\0":
            self.questions.append(contents)
            self.send(b"p", self._token)
        return tag, contents


@contextmanager
def setting_of_tenants() -> Iterator[Setting]:
    (installation, *_) = tls_installations()
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=1).start()
        start = primary.lsn()
        work_on(primary)
        wal = wal_of(primary, start)
        primary.stop()
        data_dir, pg_wal = space.directory("data"), space.directory("pg_wal")
        for lsn in range(wal.first, wal.end, SEGMENT):
            (pg_wal / wal.name(lsn)).write_bytes(wal.segment(lsn))
        made = Setting(space, installation, wal, pg_wal, data_dir)
        for ids in EVERYBODYS:
            made.tree(ids).make(wal.end)
        Authority().server().write(space.path, "server")
        made.sender = made.another(
            *("--hba-file", write(space.path / "hba.conf", HBA.encode())),
            *("--auth-file", write(space.path / "users.txt", USERS.encode(), mode=0o600)),
            *("--jwt-public-key", write_keys(space.path / "jwt.pem", *KEYS)),
        )
        yield made
        made.sender.stop()
        made.sender.check_log()
        check_no_token(made.sender.output)
