# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: the files that say who may connect."""

from __future__ import annotations

import base64
import re
from functools import cache
from ipaddress import ip_address

from tests.fuzz.target import Input, Target, check_told, string
from walproto.access.hba import METHODS, no_entry, rejected
from walproto.access.hba_file import HbaError, parse_hba
from walproto.access.peer import Peer, Tls
from walproto.access.scram import Verifier
from walproto.access.userlist import UserlistError, parse_users
from walproto.errors import InternalError
from walproto.wire.startup import Startup


def decoded(data: bytes) -> str:
    """A file's contents as they are decoded to be parsed."""
    return data.decode("utf-8", "surrogateescape")


# --- pg_hba.conf ---------------------------------------------------------------------------------

_STARTUPS = [
    Startup("postgres", "postgres", replication, "", (), False) for replication in (True, False)
]
TLS = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256, "postgres", b"x" * 32)
_PEERS = [
    Peer("[local]", is_local=True, is_near=True),
    Peer("a:1", ip_address("127.0.0.1"), is_near=True),
    Peer("a:1", ip_address("192.0.2.1")),
    Peer("a:1", ip_address("2001:db8::1"), tls=TLS),
    Peer("a:1", ip_address("::ffff:192.0.2.1"), tls=TLS),
    Peer("a:1"),
]


def check_hba(data: bytes) -> None:
    """A file has rules that somebody can be measured by, or it is said what is wrong, line by
    line."""
    try:
        rules = parse_hba(decoded(data), "hba.conf")
    except HbaError as error:
        assert error.problems
        assert len(error.problems) < 200
        for problem in error.problems:
            assert problem.startswith("hba.conf:")
            assert problem.isprintable()
        return
    assert rules.rules
    for rule in rules.rules:
        assert rule.method in METHODS
        assert rule.clientcert in ("", "verify-ca", "verify-full")
        assert (rule.address is None) == (rule.type == "local")
        assert rule.method != "jwt" or rule.type == "hostssl"
    for startup in _STARTUPS:
        for peer in _PEERS:
            try:
                rule_found = rules.match(startup, peer)
            except InternalError as error:
                check_told(error)
                continue
            assert rule_found is None or rule_found in rules.rules
            check_told(no_entry(startup, peer))
            check_told(rejected(startup, peer))


_HBA = b"""# who may connect
local all,replication all trust
host  replication  "a b",c  192.0.2.0/24 scram-sha-256
host  all all 192.0.2.1 255.255.255.0 reject
hostssl replication all 2001:db8::/32 cert clientcert=verify-full
hostnossl sameuser,"x" all all reject
hostssl all all samenet jwt tenant=0123456789abcdef0123456789abcdef \\
  timeline=0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef
"""


# --- The users and their secrets -----------------------------------------------------------------


def check_users(data: bytes) -> None:
    """A file has users that can be asked for a proof, known or not, or it is said what is wrong;
    and no secret is told."""
    try:
        users = parse_users(decoded(data), "users.txt")
    except UserlistError as error:
        assert str(error).startswith("users.txt:")
        assert str(error).isprintable()
        return
    assert all(warning.isprintable() for warning in users.warnings)
    for user in ("postgres", "\udcff", *(user for user in list(users._verifiers)[:3])):
        verifier, is_known = users.verifier(user)
        assert is_known == users.is_known(user)
        assert is_known or users.verifier(user) == (verifier, False)


def check_written_users(data: bytes) -> None:
    """Users that are written as PgBouncer does are read."""
    source = Input(data)
    written: dict[str, str] = {}
    lines = []
    while source:
        user, secret = decoded(source.string()), decoded(source.string())
        if not user or any(character in user + secret for character in "\0\n"):
            continue
        written[user] = secret
        quoted = (each.replace('"', '""') for each in (user, secret))
        lines.append('"{}" "{}"'.format(*quoted))
    try:
        users = parse_users("\n".join(lines), "users.txt")
    except UserlistError:
        assert any(secret.startswith("SCRAM-SHA-256$") for secret in written.values())
        return
    assert len(users) == len(written)
    for user, secret in written.items():
        is_of_use = secret != "" and not re.fullmatch("md5[0-9a-f]{32}", secret)
        assert users.is_known(user) == is_of_use


@cache
def some_verifier() -> Verifier:
    """That of the password ``secret``."""
    return Verifier.of("secret", b"salt" * 4, 1)


def written(verifier: Verifier) -> str:
    """As PostgreSQL stores it."""
    salt, stored, server = (
        base64.b64encode(each).decode()
        for each in (verifier.salt, verifier.stored_key, verifier.server_key)
    )
    return f"SCRAM-SHA-256${verifier.iterations}:{salt}${stored}:{server}"


def check_verifier(data: bytes) -> None:
    """A secret as PostgreSQL stores it, stored once more."""
    secret = decoded(data)
    try:
        verifier = Verifier.parse(secret)
    except ValueError as error:
        assert str(error) == "not a SCRAM-SHA-256 secret as PostgreSQL stores it"
        return
    assert 0 < verifier.iterations < 1 << 31
    assert verifier.salt
    assert Verifier.parse(written(verifier)) == verifier


TARGETS = (
    Target(
        "hba",
        check_hba,
        lambda: [_HBA, *(line + b"\n" for line in _HBA.splitlines())],
        (
            *(b"local", b"host", b"hostssl", b"hostnossl", b"all", b"replication", b"sameuser"),
            *(b"samehost", b"samenet", b"trust", b"reject", b"scram-sha-256", b"cert", b"jwt"),
            *(b"clientcert=verify-ca", b"clientname=CN", b"map=a", b"tenant=", b"timeline="),
            *(b"127.0.0.1/32", b"::1/128", b"255.255.255.0", b"include", b'""', b"\\\n", b"@a"),
        ),
    ),
    Target(
        "users",
        check_users,
        lambda: [
            b'"postgres" "secret"\n; comment\n"a""b" "md5%b"\n' % (b"0" * 32),
            b'\xef\xbb\xbf"\xe4\xff" "%b" more\n"x" ""\n' % written(some_verifier()).encode(),
        ],
        (b'"a" "', b'""', b"SCRAM-SHA-256$", b"4096:", b"md5", b";"),
        size=512,
    ),
    Target(
        "written-users",
        check_written_users,
        lambda: [
            string(b"postgres") + string(b"secret") + string(b'a"b') + string(b' x"'),
            string(b"u")
            + string(written(some_verifier()).encode())
            + string(b";")
            + string(b"md5"),
        ],
        (b"SCRAM-SHA-256$", b'"', b"\t", b"\r", b"\x0b", b"\xc2\x85"),
        size=256,
    ),
    Target(
        "verifier",
        check_verifier,
        lambda: [written(some_verifier()).encode(), b"SCRAM-SHA-256$1:YQ==$:"],
        (b"SCRAM-SHA-256$", b"4096:", b"$", b"=="),
        size=256,
    ),
)
