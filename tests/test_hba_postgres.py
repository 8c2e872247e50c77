"""Rules of who may connect mean to PostgreSQL what they mean here.

The same lines are given to real servers: what they read is compared (``pg_hba_file_rules``), and
whom they let in, and with which words they send the others away.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.fakes import SSL_REQUEST, startup
from tests.postgres import (
    Cluster,
    Installation,
    Workspace,
    installations,
    tls_installations,
    workspace,
)
from tests.relays import seeded
from walproto.access.hba import Network, Rule, no_entry, rejected
from walproto.access.hba_file import HbaError, parse_hba
from walproto.access.peer import Peer, Tls
from walproto.errors import printable
from walproto.wire.messages import PROTOCOL_3_0
from walproto.wire.startup import Startup, parse_startup_packet

# -- The servers ---------------------------------------------------------------------------------


def _can_listen_on_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


HOSTS = ["127.0.0.1", "::1"] if _can_listen_on_ipv6() else ["127.0.0.1"]
WITH_TLS = {installation.major: installation for installation in tls_installations()}
ALL = [
    *installations(),
    *(each for each in WITH_TLS.values() if each.major not in {it.major for it in installations()}),
]


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    with workspace() as made:
        yield made


@pytest.fixture(scope="module", params=ALL, ids=lambda installation: f"pg{installation.major}")
def server(request: pytest.FixtureRequest, space: Workspace) -> Cluster:
    """A server on a Unix socket and the loopback interface, with TLS if it can."""
    installation: Installation = request.param
    cluster = space.cluster(installation, f"pg{installation.major}").init()
    options = [
        f"listen_addresses={','.join(HOSTS)}",
        f"unix_socket_directories={cluster.directory}",
    ]
    if has_tls(cluster):
        certificate = trustme.CA().issue_cert("localhost")
        key = space.file(cluster.directory / "server.key", certificate.private_key_pem.bytes())
        key.chmod(0o600)
        chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
        space.file(cluster.directory / "server.crt", chain)
        options.append("ssl=on")
    return cluster.start(*(part for option in options for part in ("-c", option)))


def has_tls(server: Cluster) -> bool:
    return server.installation in WITH_TLS.values()


def hba_file(server: Cluster) -> Path:
    return server.directory / "pg_hba.conf"


def obey(server: Cluster, text: str) -> None:
    """Have a server go by these rules from the next connection on."""
    hba_file(server).write_text(text)
    os.kill(server.pid, signal.SIGHUP)
    # It reads them before it accepts another connection.
    server.expect_log("received SIGHUP, reloading configuration files")


# -- What they read ------------------------------------------------------------------------------

#: What PostgreSQL accepts, but not this: it would take something that there is not here, or means
#: something that nobody may have meant.
REFUSED_HERE = [
    r'authentication method "(md5|password)" is not offered; use scram-sha-256',
    r'authentication method "(peer|ident|pam|gss|ldap|radius)" is not supported',
    r'connection type "host(no)?gssenc" is not supported',
    r'authentication option "map" is not supported',
    r"clientname=DN is not supported; .*",
    r'database "same(role|group)" is not supported: there are no groups here',
    r'user "\+.*" is not supported: there are no groups here',
    r'regular expression "/.*" is not supported',
    r'host name ".*" is not supported: give an IP address',
    r"unterminated quoted string",
    r"authentication file token too long",  # no limit from 16 on
    r'invalid IP address ".*"',  # a host name, such as 256.1.1.1, or an address, such as 127.1
    r'invalid IP mask "(255\.255|ffff::%.*)"',
    r'invalid CIDR mask in address "1\.2\.3\.4/(\+8| 8|0008)"',
]

#: What PostgreSQL refuses as well, with other words (an included file, for one, does not exist).
REFUSED_BY_BOTH = [
    *REFUSED_HERE,
    r'inclusion of a file, "@.*", is not supported',
    r'inclusion of files, "include(_dir|_if_exists)?", is not supported',
    r'invalid IP mask ".*"',
    # It says so in its log alone.
    r'invalid value for client(cert|name): ".*"',
    r'clientcert only accepts "verify-full" when using "cert" authentication',
    r'authentication method ".*" is not supported',
]

LINES = r'''
local all all trust
"local" all all "trust"
local,host all all trust
LOCAL all all trust
x
local
local all
local all,
local all all
local all all trust,x
local all all foo
local all all Trust
local all all trust foo
local all all trust foo=x
local all all trust =
local all all trust map=x
local all all trust clientcert=verify-ca
local all all cert
local all all peer
local all all ident
local all all gss
local all all md5
local all all password
local all all scram-sha-256
local all all reject
local all all reject reject
local all all all trust
local a,b , c trust
local a, b c trust
local a b, c trust
local ,a,,b, c trust
local a #b c trust
local a b#c
local a "b#c" trust # comment
local a "b,c" trust
local a "b c",d trust
local a"b c"d e trust
local "a""b" x trust
local "" x trust
local """" x trust
local a""b x trust
local "a""" x trust
local "a"b"c" x trust
local a"ll" ""all trust
local sameuser samerole trust
local "sameuser" "all" trust
local samerole x trust
local x,samegroup samegroup trust
local "samerole" x trust
local replication replication trust
local "replication",all x trust
local /x x trust
local "/x" x trust
local x /( trust
local x x,/^a.*$ trust
local x +x trust
local x "+x" trust
local +x + trust
local @x x trust
local "@x" x trust
local @"x" x trust
local ""@x x trust
local @ x trust
local x x trust @x
local x "x trust
local x x "trust
local x café trust
local a\b c\ trust
include x
include x y
include_if_exists
include_dir x
hostgssenc all all all trust
hostnogssenc all all all trust
hostgss all all all trust
host
host all
host all all
host all all all
host all all all trust
host all all "all" trust
host all all samehost trust
host all all samenet trust
host all all all,samenet trust
host all all all peer
host all all all ident
host all all all cert
host all all all oauth
host all all all radius
host all all all sspi
host all all all bsd
host all all all scram-sha-256
host all all 1.2.3.4
host all all 1.2.3.4 trust
host all all 1.2.3.4 255.255.0.0
host all all 1.2.3.4 255.255.0.0 trust
host all all 1.2.3.4 255.0.255.0 trust
host all all 1.2.3.4 0.0.0.255 trust
host all all 1.2.3.4 255.255 trust
host all all 1.2.3.4 255.255.0.0,1 trust
host all all 1.2.3.4 ffff:: trust
host all all 1.2.3.4 foo trust
host all all 1.2.3.4/0 trust
host all all 1.2.3.4/32 trust
host all all 1.2.3.4/33 trust
host all all 1.2.3.4/08 trust
host all all 1.2.3.4/0008 trust
host all all 1.2.3.4/+8 trust
host all all "1.2.3.4/ 8" trust
host all all 1.2.3.4/8x trust
host all all 1.2.3.4/ trust
host all all 1.2.3.4/-1 trust
host all all 1.2.3.4/8/8 trust
host all all 1.2.3.4/8 255.0.0.0 trust
host all all "1.2.3.4/8" trust
host all all 1.2.3.4/8,5.6.7.8/8 trust
host all all 010.0.0.1/32 trust
host all all 127.1/32 trust
host all all 10/8 trust
host all all 256.1.1.1/8 trust
host all all 1.2.3.4.5/8 trust
host all all ::1/128 trust
host all all ::1/129 trust
host all all ::/0 trust
host all all FE80::A/10 trust
host all all fe80::1%lo/64 trust
host all all fe80:: ffff:: trust
host all all fe80:: ffc0::1 trust
host all all fe80:: 255.0.0.0 trust
host all all ::ffff:1.2.3.4/128 trust
host all all ::1.2.3.4/97 trust
host all all 1:2:3:4:5:6:7:8/77 trust
host all all 1:2:3:4:5:6:7:8:9/77 trust
host all all ::g/8 trust
host all all [::1]/128 trust
host all all localhost trust
host all all .example.com trust
host all all localhost/32 trust
host all all "" trust
host all all /32 trust
host all all all trust clientcert=verify-ca
host all all all trust clientname=CN
hostnossl all all all cert
hostnossl all all all trust
hostssl all all all trust
hostssl all all all trust clientcert=verify-ca
hostssl all all all trust clientcert=verify-full
hostssl all all all scram-sha-256 clientcert=verify-full clientcert=verify-ca clientname=CN
hostssl all all all trust clientcert=verify-ca,clientname=CN
hostssl all all all trust clientcert=x
hostssl all all all trust clientname=DN
hostssl all all all trust clientname=X
hostssl all all all cert
hostssl all all all cert clientcert=verify-full
hostssl all all all cert clientcert=verify-ca
hostssl all all all cert map=x
hostssl all all all reject clientcert=verify-ca
'''.strip().split("\n")

#: Some that the list above cannot show.
LINES += [
    "",
    " \t,\r",
    "# local all all trust",
    "\tlocal\tall\t\tall\ttrust\t",
    "local all all trust\r",
    "local\rall\rall\rtrust\r\r",
    "local all \\\nall \\\ntrust",
    'local "a\\\nb" x\\\r\n trust',
    "# comment \\\nlocal all all trust",
    "local a\\\nb c trust\\\n",
    "local a b trust # \\\\\n",
    "local \\\n\n",
    "local all\vall trust",
    "local a\fb c\u00a0d trust",
    "\ufefflocal all all trust",
    f"local all {'x' * 10_000} trust",
    f"local all {'x' * 10_400} trust",
]


def random_line(choices: random.Random) -> str:
    """A line of what may stand in one, mostly where it may."""

    def some(*values: str) -> str:
        return choices.choice(values)

    def listed(*values: str) -> str:
        count = choices.choice([1, 1, 1, 2, 3])
        return some(",", ", ", ",,").join(choices.choices(values, k=count))

    names = ["joe", "all", "replication", "sameuser", '"a b"', '"all"', 'al"l"', '"x""y"', "\u00e9"]
    kind = some("local", "host", "host", "hostssl", "hostnossl")
    columns = [kind, listed(*names), listed(*names)]
    if kind != "local":
        address = ".".join(str(choices.randrange(257)) for _ in range(4))
        address = some(address, f"{choices.randrange(1 << 16):x}::{choices.randrange(1 << 16):x}")
        bits = str(choices.randrange(40))
        columns += choices.choice(
            [["all"], ["samenet"], [f"{address}/{bits}"], [address, some("255.254.0.0", "ffff::")]]
        )
    columns.append(some("trust", "reject", "scram-sha-256", "cert"))
    columns += choices.choice([[], [], ["clientcert=verify-ca"], ["clientname=CN"]])
    if choices.random() < 0.1:
        column = some("md5", "+g", "samerole", "map=m", "/x", "@x", "x=y", "1.2.3.4/33")
        columns[choices.randrange(len(columns))] = column
    if choices.random() < 0.1:
        del columns[choices.randrange(len(columns))]
    if choices.random() < 0.1:
        columns.insert(choices.randrange(len(columns)), some("all", "x", ",", "#", '"', "1.2.3.4"))
    return some(" ", "\t", "  ", " \\\n").join(columns)


def read_here(line: str) -> Rule | str | None:
    """The rule that a line is, or what is wrong with it, or None if it is blank."""
    try:
        return parse_hba(line, "hba").rules[0]
    except HbaError as error:
        (problem,) = error.problems
        what = problem.split(": ", 1)[1]
        return None if what == "the file contains no entries" else what


def described(rule: Rule) -> dict[str, Any]:
    """A rule as it is in ``pg_hba_file_rules``."""
    address: object = rule.address
    mask = None
    if isinstance(rule.address, Network):
        address, mask = str(rule.address.address), str(rule.address.mask)
    return {
        "type": rule.type,
        "database": rule.databases.keywords | rule.databases.names,
        "user_name": rule.users.keywords | rule.users.names,
        "address": address,
        "netmask": mask,
        "auth_method": rule.method,
        "options": [f"clientcert={rule.clientcert}"] if rule.clientcert else [],
    }


def as_described(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ``pg_hba_file_rules``, so that addresses and lists can be compared."""
    described = {name: row[name] for name in ("type", "auth_method", "address", "netmask")}
    for name in ("address", "netmask"):
        if row[name] not in (None, "all", "samehost", "samenet"):
            described[name] = str(ip_address(row[name]))
    described["database"] = frozenset(row["database"])
    described["user_name"] = frozenset(row["user_name"])
    described["options"] = row["options"] or []
    return described


def difference(line: str, ours: Rule | str | None, row: dict[str, Any] | None) -> str:
    """What ours and PostgreSQL's reading of a line differ in, empty for nothing."""
    if ours is None or row is None:
        return "" if ours is None and row is None else f"{ours} is {row}"
    error = row["error"] or ""
    if error.endswith("not supported by this build") and "cert" in line and row["type"] is None:
        return ""  # a server without TLS has no such method, and looks no further
    if row["type"] is not None:
        if isinstance(ours, Rule):
            mine, theirs = described(ours), as_described(row)
            return "" if mine == theirs else f"{mine} is {theirs}"
        known = any(re.fullmatch(pattern, ours) for pattern in REFUSED_HERE)
        return "" if known else f"only here: {ours}"
    if isinstance(ours, Rule):
        return f"not here: {error}"
    known = any(re.fullmatch(pattern, ours) for pattern in REFUSED_BY_BOTH)
    return "" if known or ours == printable(error) else f"{ours} is {error}"


def test_lines_are_read_alike(server: Cluster) -> None:
    choices = seeded()
    lines = LINES + [random_line(choices) for _ in range(1000)]
    hba_file(server).write_bytes("".join(f"{line}\n" for line in lines).encode())
    rows: list[dict[str, Any]] = json.loads(
        server.sql("SELECT json_agg(rule) FROM pg_hba_file_rules AS rule")
    )
    by_line = {row["line_number"]: row for row in rows}
    number = 1
    differences = []
    for line in lines:
        ours = read_here(line)
        if found := difference(line, ours, by_line.pop(number, None)):
            differences.append(f"{line!r}: {found}")
        number += line.count("\n") + 1
    assert differences == []
    # Lines that nothing was expected of would be left.
    assert by_line == {}


# -- Whom they let in ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a client comes from; ``address`` is empty on a Unix socket."""

    address: str = ""
    to: str = ""
    over_tls: bool = False

    def connect(self, server: Cluster) -> socket.socket:
        if not self.address:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(30)
            connection.connect(str(server.directory / f".s.PGSQL.{server.port}"))
            return connection
        target = (self.to, server.port)
        connection = socket.create_connection(target, 30, source_address=(self.address, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.over_tls:
            return connection
        connection.sendall(SSL_REQUEST)
        assert connection.recv(1) == b"S"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(connection)

    @property
    def peer(self) -> Peer:
        if not self.address:
            return Peer("[local]", is_local=True, is_near=True)
        tls = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256) if self.over_tls else None
        return Peer(f"{self.address}:5", ip_address(self.address), is_near=True, tls=tls)


ORIGINS = [Origin(), *(Origin(host, host, tls) for host in HOSTS for tls in (False, True))]
if sys.platform == "linux":  # its loopback interface has the whole of 127.0.0.0/8
    ORIGINS.append(Origin("127.0.0.2", "127.0.0.1"))
SASL = (10).to_bytes(4, "big")
TERMINATE = b"X\0\0\0\4"
PACKETS = [
    *(startup(user=user, replication="true") for user in ("joe", "jim")),
    startup(user="joe", database="db", replication="true"),
    startup(user="joe", database="db", replication="database"),
    *(
        startup(user=user, database=database, replication="false")
        for user in ("joe", "all")
        for database in ("joe", "db", "replication", "all")
    ),
]


def answer_of(server: Cluster, origin: Origin, packet: bytes) -> str:
    """How a server begins its answer to a startup packet."""
    with origin.connect(server) as connection, connection.makefile("rb") as received:
        connection.sendall(packet)
        kind, length = struct.unpack(">cI", received.read(5))
        contents = received.read(length - 4)
        if contents.startswith(SASL):
            connection.sendall(TERMINATE)
        # The others end by themselves, for there are no such users; when the server has closed the
        # connection, it has a place for the next one.
        received.read()
    if kind == b"R":
        return f"method {int.from_bytes(contents[:4], 'big')}"
    assert kind == b"E"
    fields = {field[:1]: field[1:].decode() for field in contents.split(b"\0") if field}
    assert not {b"D", b"H"} & set(fields)
    return f"{fields[b'S']} {fields[b'C']}: {fields[b'M']}"


def expected_answer(text: str, origin: Origin, packet: bytes) -> str:
    """The same, if it were ours."""
    asked = parse_startup_packet(packet[4:], PROTOCOL_3_0)
    assert isinstance(asked, Startup)
    rule = parse_hba(text, "hba").match(asked, origin.peer)
    if rule is not None and rule.method != "reject":
        return {"trust": "method 0", "scram-sha-256": "method 10"}[rule.method]
    error = no_entry(asked, origin.peer) if rule is None else rejected(asked, origin.peer)
    return f"{error.severity} {error.sqlstate}: {error.message}"


FIRST = "host postgres postgres 127.0.0.1/32 trust\n"
"""For ourselves, to ask for the rules."""


def random_rule(choices: random.Random) -> str:
    kind = choices.choice(["local", "local", "host", "host", "hostnossl", "hostssl"])
    databases = [
        "all",
        "replication",
        "sameuser",
        "db",
        '"all"',
        '"replication"',
        "all,replication",
    ]
    columns = [kind, choices.choice(databases), choices.choice(["all", "joe", "jim,x", '"all"'])]
    if kind != "local":
        addresses = (
            "all samehost samenet 127.0.0.1/32 127.0.0.2/31 127.0.0.0/8 ::1/128 ::/0 0.0.0.0/0 "
            "10.0.0.0/8 ::ffff:127.0.0.1/128 1.0.0.2/2"
        )
        columns.append(choices.choice([*addresses.split(), "127.9.9.1 255.0.0.255"]))
    return " ".join([*columns, choices.choice(["trust", "reject", "scram-sha-256"])])


def test_clients_are_let_in_alike(server: Cluster) -> None:
    choices = seeded()
    texts = [FIRST]
    texts += ["".join(f"{random_rule(choices)}\n" for _ in range(8)) for _ in range(5)]
    texts.append("local all,replication all trust\nhost all,replication all all reject\n")
    texts.append("local all,replication joe scram-sha-256\nhost db,replication all all reject\n")
    texts.append("host all,replication all samehost trust\nhost all,replication all samenet reject")
    differences = []
    for text in texts:
        obey(server, FIRST + text)
        for origin, packet in itertools.product(ORIGINS, PACKETS):
            if origin.over_tls and not has_tls(server):
                continue
            mine = expected_answer(FIRST + text, origin, packet)
            theirs = answer_of(server, origin, packet)
            if mine != theirs:
                differences.append(f"{text!r} {origin} {packet!r}: {mine} is {theirs}")
    assert differences == []
