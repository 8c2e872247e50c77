"""What the files say together of who may connect: the rules, the users, the keys for tokens.

The server is closed unless it is opened.  Without an ``--hba-file`` the rules are these: who is on
this machine is trusted, be it on a Unix socket or on the loopback interface; everybody else needs
TLS, and a password (SCRAM) or a token (JWT).  With such a file, it alone says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from walproto.access.files import PathLike, read_file
from walproto.access.hba import Rule, Rules
from walproto.access.hba_file import MAX_SIZE, HbaError, parse_hba
from walproto.access.userlist import UserlistError, Users, load_users

if TYPE_CHECKING:
    from walproto.access.tokens import Keys

_NEAR = """
local all,replication all trust
host all,replication all all trust
"""
_FAR = "hostssl all,replication all all {method}\n"
_NO_FILE = "without --hba-file"


class AccessError(ValueError):
    """What is wrong with the files, a line for each problem."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the files say: ``near`` are the rules for who is on this machine, ``far`` those for the
    others, ``warnings`` what the operator should know of the files, a line each."""

    near: Rules
    far: Rules
    users: Users | None
    keys: Keys | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFiles:
    """The files, None for one that there is not, and what else there is.

    ``offers_tls`` tells whether clients can come over TLS, ``checks_certificates`` whether their
    certificates are checked then, and ``has_tenants`` whether there are many timelines, of which a
    client may be shown some.  ``secret`` is the ``server_secret`` of
    :func:`~walproto.access.userlist.parse_users`.
    """

    hba_file: PathLike | None = None
    auth_file: PathLike | None = None
    jwt_public_key: PathLike | None = None
    offers_tls: bool = False
    checks_certificates: bool = False
    has_tenants: bool = False
    secret: bytes = b""

    def load(self, before: Policy | None = None) -> Policy:
        """What they say now; ``before`` is what they said until now.  Raises AccessError, with all
        that is wrong."""
        problems: list[str] = []
        users, keys, near, far = None, None, Rules(()), Rules(())
        try:
            if self.auth_file is not None:
                users = load_users(self.auth_file, before.users if before else None, self.secret)
        except UserlistError as error:
            problems.append(_of("--auth-file", self.auth_file, str(error)))
        try:
            if self.jwt_public_key is not None:
                from walproto.access.tokens import load_keys

                keys = load_keys(self.jwt_public_key)
        except ValueError as error:
            problems.append(_of("--jwt-public-key", self.jwt_public_key, str(error)))
        try:
            if self.hba_file is None:
                near, far = self._default_rules()
            else:
                near = far = _load_hba(self.hba_file)
        except HbaError as error:
            problems += [_of("--hba-file", self.hba_file, problem) for problem in error.problems]
        problems += [
            f"{rule.source}: {it}" for rule in far.rules for it in self._problems_with(rule)
        ]
        if problems:
            raise AccessError("\n".join(problems))
        return Policy(near, far, users, keys, tuple(self._warnings(far, users)))

    def _default_rules(self) -> tuple[Rules, Rules]:
        if self.auth_file is not None and self.jwt_public_key is not None:
            raise HbaError(["--auth-file and --jwt-public-key: say with --hba-file who uses which"])
        far = ""
        if self.offers_tls and self.auth_file is not None:
            far = _FAR.format(method="scram-sha-256")
        elif self.offers_tls and self.jwt_public_key is not None:
            far = _FAR.format(method="jwt")
        return _default(_NEAR), _default(far) if far else Rules(())

    def _problems_with(self, rule: Rule) -> Iterator[str]:
        """Why nobody could ever come in by this rule, or more could be seen than it says."""
        if rule.type == "hostssl" and not self.offers_tls:
            yield (
                "hostssl record cannot match because SSL is disabled: give --ssl-cert-file and "
                "--ssl-key-file"
            )
        if rule.clientcert and not self.checks_certificates:
            yield (
                "client certificates can only be checked if a root certificate store is available: "
                "give --ssl-ca-file"
            )
        if rule.method == "scram-sha-256" and self.auth_file is None:
            yield "there are no passwords: give --auth-file"
        if rule.method == "jwt" and self.jwt_public_key is None:
            yield "there are no keys for tokens: give --jwt-public-key"
        if rule.scope is not None and not self.has_tenants:
            yield "tenant and timeline are for --data-dir: here there is one timeline"

    def _warnings(self, rules: Rules, users: Users | None) -> Iterator[str]:
        """What may not be as it was meant."""
        for rule in rules.rules:
            if rule.method == "reject":
                continue
            if "replication" not in rule.databases.keywords:
                yield (
                    f"{rule.source}: nobody is served by this rule: only the database replication "
                    "matches replication, all does not"
                )
            elif rule.method == "scram-sha-256" and users is not None:
                for name in sorted(rule.users.names):
                    if not users.is_known(name):
                        yield f'{rule.source}: user "{name}" is not in {users.name}'
        if users is not None:
            if not any(rule.method == "scram-sha-256" for rule in rules.rules):
                yield (
                    f"{users.name}: nobody is ever asked for a password: without TLS, or by the "
                    "--hba-file, there is no need for one"
                )
            yield from users.warnings


def _default(text: str) -> Rules:
    rules = parse_hba(text, _NO_FILE).rules
    return Rules(tuple(replace(rule, source=_NO_FILE) for rule in rules))


def _of(option: str, path: PathLike | None, problem: str) -> str:
    """A problem, with the option that names its file, unless it names the file itself."""
    is_clear = path is None or problem.startswith((f"{os.fspath(path)}:", "--"))
    return problem if is_clear else f"{option}: {problem}"


def _load_hba(path: PathLike) -> Rules:
    """The rules in a file.  Raises HbaError."""
    name = os.fspath(path)
    try:
        content, _ = read_file(name, MAX_SIZE)
    except OSError as error:
        raise HbaError([f'could not open file "{name}": {error.strerror}']) from None
    return parse_hba(content.decode("utf-8", "surrogateescape"), name)
