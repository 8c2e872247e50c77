"""Who may connect, all told: which rule is for a client, how it proves who it is, what it may see.

The server is closed unless it is opened.  Without an ``--hba-file`` the rules are these: who is on
this machine is trusted, be it on a Unix socket or on the loopback interface; everybody else needs
TLS, and a password (SCRAM) or a token (JWT).  With such a file, it alone says.

The files are read anew on demand: all of them, or, if there is anything wrong with one, none.

PostgreSQL: ``ClientAuthentication`` in ``auth.c``; documentation chapter "Client Authentication".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zope.interface import implementer

from walproto.access.authentication import Exchange, IAuthenticator
from walproto.access.grant import Grant, Scope
from walproto.access.hba import Rule, Rules, no_entry, rejected
from walproto.access.hba_file import MAX_SIZE, HbaError, parse_hba
from walproto.access.peer import Peer
from walproto.access.scram import authenticate
from walproto.access.userlist import UserlistError, Users, load_users
from walproto.errors import InvalidAuthorizationSpecification, InvalidPassword, ReportedError
from walproto.wire.messages import AuthenticationCleartextPassword, CleartextPassword
from walproto.wire.startup import Startup

if TYPE_CHECKING:
    from walproto.access.tokens import Keys

_NEAR = """
local all,replication all trust
host all,replication all all trust
"""
_FAR = "hostssl all,replication all all {method}\n"


class AccessError(ValueError):
    """What is wrong with the files, a line for each problem."""


@dataclass(frozen=True, slots=True)
class _Access:
    """What the files say: the rules for who is near and for the others, the users, the keys."""

    near: Rules
    far: Rules
    users: Users | None
    keys: Keys | None


@implementer(IAuthenticator)
class Guard:
    """Lets clients in, or not.

    ``hba_file``, ``auth_file`` and ``jwt_public_key`` are paths, None for none.  ``offers_tls``
    tells whether clients can come over TLS, ``checks_certificates`` whether their certificates are
    checked then, and ``has_tenants`` whether there are many timelines, of which a client may be
    shown some.  ``secret`` is the ``server_secret`` of
    :func:`~walproto.access.userlist.parse_users`.  Raises AccessError.
    """

    def __init__(
        self,
        *,
        hba_file: str | os.PathLike[str] | None = None,
        auth_file: str | os.PathLike[str] | None = None,
        jwt_public_key: str | os.PathLike[str] | None = None,
        offers_tls: bool = False,
        checks_certificates: bool = False,
        has_tenants: bool = False,
        secret: bytes = b"",
    ) -> None:
        self._hba_file = hba_file
        self._auth_file = auth_file
        self._jwt_public_key = jwt_public_key
        self._offers_tls = offers_tls
        self._checks_certificates = checks_certificates
        self._has_tenants = has_tenants
        self._secret = secret
        self._access = self._load(None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know of the files that are in force, a line each."""
        users = self._access.users
        return () if users is None else users.warnings

    @property
    def is_open_to_others(self) -> bool:
        """Whether there is a rule for clients that are not on this machine."""
        return bool(self._access.far.rules)

    def prepare(self) -> Callable[[], None]:
        """Read the files anew; what is returned puts them in force.  Raises AccessError."""
        access = self._load(self._access)

        def put_in_force() -> None:
            self._access = access

        return put_in_force

    def reload(self) -> None:
        """Read the files anew.  Raises AccessError, and then all is as it was."""
        self.prepare()()

    # --- IAuthenticator --------------------------------------------------------------------

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        access = self._access
        rule = (access.near if peer.is_near else access.far).match(startup, peer)
        if rule is None:
            raise no_entry(startup, peer)
        if rule.method == "reject":
            raise rejected(startup, peer)
        common_name = None if peer.tls is None else peer.tls.common_name
        if rule.clientcert and common_name is None:
            raise InvalidAuthorizationSpecification(
                "connection requires a valid client certificate", fatal=True, log=rule.source
            )
        scopes, last_message = [] if rule.scope is None else [rule.scope], b""
        if rule.method == "scram-sha-256":
            last_message = yield from self._scram(startup, peer, access)
        elif rule.method == "jwt":
            scopes += yield from self._take_token(startup, access)
        if rule.clientcert == "verify-full" and common_name != startup.user:
            raise _wrong_name(rule, startup, common_name)
        return Grant(rule.method, rule.source, tuple(scopes), last_message)

    def _scram(
        self, startup: Startup, peer: Peer, access: _Access
    ) -> Generator[bytes, bytes, bytes]:
        assert access.users is not None
        verifier, is_known = access.users.verifier(startup.user)
        why_unknown = "" if is_known else access.users.why_unknown(startup.user)
        return (
            yield from authenticate(
                startup.user, verifier, is_known, peer.tls, why_unknown=why_unknown
            )
        )

    def _take_token(
        self, startup: Startup, access: _Access
    ) -> Generator[bytes, bytes, list[Scope]]:
        """Ask for a token; what it is for."""
        from walproto.access.tokens import InvalidToken

        assert access.keys is not None
        answer = yield AuthenticationCleartextPassword.build()
        password = CleartextPassword.parse(answer).password
        if not password:
            raise InvalidPassword("empty password returned by client", fatal=True)
        try:
            scope = access.keys.verify(password, time.time())
        except InvalidToken as error:
            raise _wrong_password(startup, log=str(error)) from None
        return [] if scope is None else [scope]

    # --- the files -------------------------------------------------------------------------

    def _load(self, before: _Access | None) -> _Access:
        problems: list[str] = []
        users, keys = None, None
        try:
            if self._auth_file is not None:
                users_before = None if before is None else before.users
                users = load_users(self._auth_file, users_before, self._secret)
        except UserlistError as error:
            problems.append(str(error))
        try:
            if self._jwt_public_key is not None:
                from walproto.access.tokens import load_keys

                keys = load_keys(self._jwt_public_key)
        except ValueError as error:
            problems.append(str(error))
        near, far = Rules(()), Rules(())
        try:
            if self._hba_file is None:
                near, far = self._default_rules()
            else:
                near = far = _load_hba(self._hba_file)
        except HbaError as error:
            problems += error.problems
        problems += [
            f"{rule.source}: {problem}"
            for rule in far.rules
            for problem in self._problems_with(rule)
        ]
        if problems:
            raise AccessError("\n".join(problems))
        return _Access(near, far, users, keys)

    def _default_rules(self) -> tuple[Rules, Rules]:
        near = parse_hba(_NEAR, "default")
        if self._auth_file is not None and self._jwt_public_key is not None:
            raise HbaError(["--auth-file and --jwt-public-key: say with --hba-file who uses which"])
        methods = {"scram-sha-256": self._auth_file, "jwt": self._jwt_public_key}
        method = next((method for method, file in methods.items() if file is not None), None)
        if method is None or not self._offers_tls:
            return near, Rules(())
        return near, parse_hba(_FAR.format(method=method), "default")

    def _problems_with(self, rule: Rule) -> list[str]:
        """Why nobody could ever come in by this rule, or more could be seen than it says."""
        problems = []
        if rule.type == "hostssl" and not self._offers_tls:
            problems.append(
                "hostssl record cannot match because SSL is disabled: give --ssl-cert-file and "
                "--ssl-key-file"
            )
        if rule.clientcert and not self._checks_certificates:
            problems.append(
                "client certificates can only be checked if a root certificate store is available: "
                "give --ssl-ca-file"
            )
        if rule.method == "scram-sha-256" and self._auth_file is None:
            problems.append("there are no passwords: give --auth-file")
        if rule.method == "jwt" and self._jwt_public_key is None:
            problems.append("there are no keys for tokens: give --jwt-public-key")
        if rule.scope is not None and not self._has_tenants:
            problems.append("tenant and timeline are for --data-dir: here there is one timeline")
        return problems


def _load_hba(path: str | os.PathLike[str]) -> Rules:
    """The rules in a file.  Raises HbaError."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise HbaError([f'could not open file "{name}": {error.strerror}']) from None
    return parse_hba(content.decode("utf-8", "surrogateescape"), name)


def _wrong_password(startup: Startup, *, log: str) -> ReportedError:
    return InvalidPassword(
        f'password authentication failed for user "{startup.user}"', fatal=True, log=log
    )


def _wrong_name(rule: Rule, startup: Startup, common_name: str | None) -> ReportedError:
    """The certificate is somebody else's (``auth_failed``)."""
    log = (
        f"{rule.source}: provided user name ({startup.user}) and authenticated user name "
        f"({common_name}) do not match"
    )
    if rule.method in ("scram-sha-256", "jwt"):
        return _wrong_password(startup, log=log)
    kind = "certificate" if rule.method == "cert" else '"trust"'
    return InvalidAuthorizationSpecification(
        f'{kind} authentication failed for user "{startup.user}"', fatal=True, log=log
    )
