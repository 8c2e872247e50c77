"""A primary that can TLS, and a walsender on its WAL, which let in the same clients by the same
rules.

How it thinks:

* Both read one and the same hba file, and one and the same CA file.  Their users' passwords are
  the primary's: the walsender's auth file holds the verifiers that the primary made.
* A client is a libpq connection string.  What psql says, and its exit status, is an `Answer`;
  `Secured.ask` asks both servers and fails unless both answers are the same.  What may differ is
  said in one place, `_comparable`.
* Certificates are one authority's, `Secured.authority`, unless a test makes another.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from psycopg import pq

from tests.certificates import Authority, Identity, write
from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    WalSender,
    Workspace,
    free_port,
    workspace,
)

OK, FAILED = pq.PollingStatus.OK, pq.PollingStatus.FAILED

PASSWORD = "secret"
USERS = (
    *("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy"),
    *("mallory", "Oscar", "all", "replication"),
)
"""All of them may replicate, and have the same password."""
ADMIN = f"host postgres,replication postgres {HOST}/32 trust\n"
"""The rule by which the harness itself gets in."""


@dataclass(frozen=True)
class Answer:
    """What psql did: its exit status, and what it printed."""

    code: int
    output: str

    @property
    def is_let_in(self) -> bool:
        return self.code == 0


@dataclass
class Secured:
    """A primary with segments of 1 MB, and a walsender on its pg_wal."""

    space: Workspace
    primary: Cluster
    authority: Authority
    sender: WalSender = field(init=False)

    @property
    def installation(self) -> Installation:
        return self.primary.installation

    @property
    def major(self) -> int:
        return self.installation.major

    # The files that both read

    @property
    def hba_file(self) -> Path:
        return self.space.path / "hba.conf"

    @property
    def ca_file(self) -> Path:
        return self.space.path / "ca.crt"

    @property
    def auth_file(self) -> Path:
        """The walsender's users."""
        return self.space.path / "users.txt"

    @property
    def sockets(self) -> Path:
        """Where both have their Unix socket."""
        return self.space.path / "sockets"

    @property
    def ssl_options(self) -> tuple[str, ...]:
        """The walsender's certificate, key, and CA."""
        directory = self.space.path / "ours"
        return (
            *("--ssl-cert-file", str(directory / "server.crt")),
            *("--ssl-key-file", str(directory / "server.key")),
            *("--ssl-ca-file", str(self.ca_file)),
        )

    @property
    def access_options(self) -> tuple[str, ...]:
        """All that the walsender has to be told of who may connect."""
        files = ("--hba-file", str(self.hba_file), "--auth-file", str(self.auth_file))
        return (*self.ssl_options, *files)

    def rules(self, rules: str) -> None:
        """Write the hba file, for the next start or `reload`."""
        write(self.hba_file, (rules + ADMIN).encode())

    def reload(self) -> None:
        """Have both read their files again; the new ones are in force when this returns."""
        reload_primary(self.primary)
        reload_sender(self.sender)

    # Servers

    def another(self, *options: str) -> WalSender:
        """Another walsender on the same WAL, with no other options than these."""
        sender = self.space.add(WalSender(self.primary.wal_dir, *options))
        sender.ready()
        return sender

    # Clients

    def conninfo(self, client: str, port: int) -> str:
        """A client's connection string for the server at this port."""
        if "host=" not in client:
            client = f"host={HOST} {client}"
        return f"port={port} dbname=postgres connect_timeout=30 {client}"

    def certificate(self, identity: Identity, name: str) -> str:
        """The part of a connection string by which a client shows this certificate."""
        directory = self.space.path / "clients"
        files = identity.write(directory, name, workspace=self.space)
        return f"sslcert={files.certificate} sslkey={files.key}"

    def certificates(self, names: Iterable[str]) -> dict[str, str]:
        """As `certificate`, for each of these users one of our authority's."""
        return {name: self.certificate(self.authority.client(name), name) for name in names}

    def psql(self, client: str, port: int) -> Answer:
        """What psql says that connects so to the server at this port."""
        (answer,) = self._psqls(client, port)
        return answer

    def ask(self, client: str) -> Answer:
        """What psql says that connects so to either server."""
        ours, theirs = self._psqls(client, self.sender.port, self.primary.port)
        assert ours == theirs, f"{client}:\nthe walsender: {ours}\nthe primary: {theirs}"
        return ours

    def _psqls(self, client: str, *ports: int) -> list[Answer]:
        with ExitStack() as running:
            psqls = []
            for port in ports:
                conninfo = f"replication=true {self.conninfo(client, port)}"
                psql = self.installation.start("psql", "-XAtw", "-c", "IDENTIFY_SYSTEM", conninfo)
                psqls.append(running.enter_context(psql))
            return [Answer(psql.wait(), self._comparable(psql.output)) for psql in psqls]

    def exchange(self, client: str) -> list[str]:
        """The messages of an attempt to connect so, which are the same with both servers."""
        ours, theirs = (
            [re.sub(r"^(.) \d+", r"\1", line) for line in exchange(self.conninfo(client, port))]
            for port in (self.sender.port, self.primary.port)
        )
        assert ours == theirs, f"{client}:\nthe walsender: {ours}\nthe primary: {theirs}"
        return ours

    def _comparable(self, output: str) -> str:
        """Each server has its own port, and knows another end of WAL."""
        output = re.sub(r"(?<= port )\d+|(?<=PGSQL\.)\d+", "PORT", output)
        return re.sub(r"\|[0-9A-F]+/[0-9A-F]+\|", "|LSN|", output)


def reload_primary(primary: Cluster) -> None:
    """Have it read its files again; it has when this returns."""
    os.kill(primary.pid, signal.SIGHUP)
    # It takes no connection between this line and the end of the reading.
    primary.expect_log("received SIGHUP, reloading configuration files")


def reload_sender(sender: WalSender) -> None:
    """Have it read its files again; it has when this returns."""
    sender.send(signal.SIGHUP)
    sender.expect("the files that say who may connect have been read anew")


@contextmanager
def secured(
    installation: Installation,
    rules: str,
    *options: str,
    hosts: tuple[str, ...] = (HOST,),
    **settings: str,
) -> Iterator[Secured]:
    """`rules` are those of the hba file, `options` more of the walsender's, `hosts` where both
    listen, `settings` the primary's."""
    with workspace() as space:
        authority = Authority()
        others = [host for host in hosts if host != HOST]
        primary = space.add(Cluster(installation, space.path / "primary", free_port(*others)))
        primary.init(wal_segsize_mb=1)
        setting = Secured(space, primary, authority)
        for name in ("ours", "clients", "sockets"):
            space.directory(name).chmod(0o755)
        setting.rules(rules)
        write(setting.ca_file, authority.pem)
        server = authority.server("RSA")
        server.write(space.path / "ours", "server")
        server.write(primary.directory, "server", workspace=space)
        primary.configure(
            ssl="on",
            ssl_ca_file=str(setting.ca_file),
            ssl_min_protocol_version="TLSv1.3",
            hba_file=str(setting.hba_file),
            **settings,
        )
        primary.start(
            *("-c", f"listen_addresses={','.join(hosts)}"),
            *("-c", f"unix_socket_directories={setting.sockets}"),
        )
        _make_users(setting)
        port = free_port(*others)
        endpoints = [f"unix:{setting.sockets}/.s.PGSQL.{port}"]
        endpoints += [tcp_endpoint(port, host) for host in others]
        setting.sender = space.add(
            WalSender(
                primary.wal_dir,
                *("--server-version", installation.version),
                *setting.access_options,
                *(option for endpoint in endpoints for option in ("--listen", endpoint)),
                *options,
                port=port,
            )
        )
        setting.sender.ready()
        yield setting
        setting.sender.check_log()


def tcp_endpoint(port: int, host: str) -> str:
    return f"tcp:{port}:interface={host}".replace(f"={host}", "=" + host.replace(":", "\\:"))


def _make_users(setting: Secured) -> None:
    """Have the primary make its users, and the walsender know them too."""
    setting.primary.sql(
        ";".join(
            f"""CREATE ROLE "{user}" LOGIN REPLICATION PASSWORD '{PASSWORD}'""" for user in USERS
        )
    )
    known = setting.primary.sql(
        """SELECT format('"%s" "%s"', rolname, rolpassword) FROM pg_authid WHERE rolcanlogin"""
        " AND rolpassword IS NOT NULL ORDER BY rolname"
    )
    write(setting.auth_file, f"{known}\n".encode(), mode=0o600)


def address_elsewhere() -> str | None:
    """An IPv4 address of this machine that is not the loopback interface's, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def has_ipv6() -> bool:
    """Whether this machine's loopback interface has an IPv6 address."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def exchange(conninfo: str) -> list[str]:
    """The messages of an attempt to connect, by libpq's trace: who sent them (F, B), their length
    and their name, and what an error says; up to its end, or the end of authentication."""
    connection = pq.PGconn.connect_start(f"replication=true {conninfo}".encode())
    with tempfile.TemporaryFile() as file:
        connection.trace(file.fileno())
        connection.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
        while (status := connection.connect_poll()) not in (OK, FAILED):
            sockets = [connection.socket]
            is_reading = status == pq.PollingStatus.READING
            directions = (sockets, []) if is_reading else ([], sockets)
            if not any(select.select(*directions, [], 30)):
                raise Failed(f"waited 30 s for the server, with {conninfo}")
        connection.untrace()
        connection.finish()
        file.seek(0)
        trace = file.read().decode()
    lines = [line.split("\t") for line in trace.splitlines()]
    return [_told(*line) for line in lines if line[2:3] != ["ParameterStatus"]]


def _told(sender: str, length: str, name: str, contents: str = "") -> str:
    if name != "ErrorResponse":
        return f"{sender} {length} {name}"
    fields = re.findall(r'([SCMDH]) "(.*?)"(?= [A-Z] "| \\x00)', contents)
    return f"{sender} {name} " + "|".join(text for _, text in fields)


def fail_to_reload(sender: WalSender) -> str:
    """Have it read its files again, of which one is no good; what it says of that, in one line."""
    sender.send(signal.SIGHUP)
    problem: str = sender.expect(r"#error\] (.*)")[1]
    sender.expect(r"#error\] what was in force before SIGHUP, still is")
    return problem
