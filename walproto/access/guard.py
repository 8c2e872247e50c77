"""Who may connect, all told: which rule is for a client, how it proves who it is, what it may see.

The rules, and what they need, are in files; these are read anew on demand: all of them, or none if
there is anything wrong with one.  What they say, and what goes without them, is a
:class:`~walproto.access.policy.Policy`.

PostgreSQL: ``ClientAuthentication`` in ``auth.c``; documentation chapter "Client Authentication".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

from zope.interface import implementer

from walproto.access.authentication import Exchange, IAuthenticator
from walproto.access.grant import Grant, Scope
from walproto.access.hba import Rule, no_entry, rejected
from walproto.access.peer import Peer
from walproto.access.policy import AccessError, Policy, PolicyFiles
from walproto.access.scram import authenticate
from walproto.errors import InvalidAuthorizationSpecification, InvalidPassword, ReportedError
from walproto.wire.messages import AuthenticationCleartextPassword, CleartextPassword
from walproto.wire.startup import Startup

__all__ = ["AccessError", "Guard"]


@implementer(IAuthenticator)
class Guard:
    """Lets clients in, or not, as the ``files`` say, which are the fields of
    :class:`~walproto.access.policy.PolicyFiles`.  Raises AccessError."""

    def __init__(self, **files: Any) -> None:
        self._files = PolicyFiles(**files)
        self._policy = self._files.load()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know of the files that are in force, a line each."""
        return self._policy.warnings

    @property
    def is_open_to_others(self) -> bool:
        """Whether there is a rule for clients that are not on this machine."""
        return bool(self._policy.far.rules)

    def prepare(self) -> Callable[[], None]:
        """Read the files anew; what is returned puts them in force.  Raises AccessError."""
        policy = self._files.load(self._policy)

        def put_in_force() -> None:
            self._policy = policy

        return put_in_force

    def reload(self) -> None:
        """Read the files anew.  Raises AccessError, and then all is as it was."""
        self.prepare()()

    # --- IAuthenticator --------------------------------------------------------------------

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        policy = self._policy
        rule = (policy.near if peer.is_near else policy.far).match(startup, peer)
        if rule is None:
            error = no_entry(startup, peer)
            error.log = self._why_no_entry(peer)
            raise error
        if rule.method == "reject":
            raise rejected(startup, peer)
        common_name = None if peer.tls is None else peer.tls.common_name
        if rule.clientcert and common_name is None:
            raise InvalidAuthorizationSpecification(
                "connection requires a valid client certificate", fatal=True, log=rule.source
            )
        scopes, last_message = [] if rule.scope is None else [rule.scope], b""
        if rule.method == "scram-sha-256":
            last_message = yield from self._scram(startup, peer, policy)
        elif rule.method == "jwt":
            scopes += yield from self._take_token(startup, policy)
        if rule.clientcert == "verify-full" and common_name != startup.user:
            raise _wrong_name(rule, startup, common_name)
        return Grant(rule.method, rule.source, tuple(scopes), last_message)

    def _why_no_entry(self, peer: Peer) -> str | None:
        if peer.address is None and not peer.is_local:
            return "it has no address to go by: a proxy names none, or this machine's"
        if self._files.hba_file is not None:
            return None
        if self._policy.far.rules:
            return "without --hba-file, those elsewhere need TLS"
        return "without --hba-file, and without TLS and passwords or tokens, only this machine may"

    def _scram(
        self, startup: Startup, peer: Peer, policy: Policy
    ) -> Generator[bytes, bytes, bytes]:
        assert policy.users is not None
        verifier, is_known = policy.users.verifier(startup.user)
        why_unknown = "" if is_known else policy.users.why_unknown(startup.user)
        return (
            yield from authenticate(
                startup.user, verifier, is_known, peer.tls, why_unknown=why_unknown
            )
        )

    def _take_token(self, startup: Startup, policy: Policy) -> Generator[bytes, bytes, list[Scope]]:
        """Ask for a token; what it is for."""
        from walproto.access.tokens import InvalidToken

        assert policy.keys is not None
        answer = yield AuthenticationCleartextPassword.build()
        password = CleartextPassword.parse(answer).password
        if not password:
            raise InvalidPassword("empty password returned by client", fatal=True)
        try:
            scope = policy.keys.verify(password, time.time())
        except InvalidToken as error:
            raise _wrong_password(startup, log=str(error)) from None
        return [] if scope is None else [scope]


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
