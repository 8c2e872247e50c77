"""SCRAM-SHA-256: a client proves that it knows a password, and the password stays with it.

RFC 5802 and RFC 7677; PostgreSQL documentation: "SASL Authentication" in chapter "Frontend/Backend
Protocol".  Messages and errors are those of ``auth-sasl.c`` and ``auth-scram.c``, which is more
tolerant than the RFC here and there.  The user is the one of the startup packet: the name in the
SCRAM messages, which libpq leaves empty, means nothing.

An unknown user is asked for a proof like any other, for one that nobody can give, and all is
computed that would be for a known one: neither the messages nor the time it takes tell who exists.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from base64 import b64encode
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from walproto.access.peer import Tls
from walproto.access.saslprep import saslprep
from walproto.access.scram_messages import (
    KEY_LENGTH,
    SCHEME,
    SCHEME_PLUS,
    ClientFinal,
    ClientFirst,
    decoded,
    parse_initial_response,
)
from walproto.errors import InvalidPassword, ProtocolViolation
from walproto.wire.messages import (
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
)

ITERATIONS = 4096
"""How often a password is hashed, where nothing else is asked for (``scram_iterations``)."""
SALT_LENGTH = 16
"""Bytes (``SCRAM_DEFAULT_SALT_LEN``)."""
MESSAGE_LIMIT = 1024
"""Bytes of a client's message, counting the length word (``PG_MAX_SASL_MESSAGE_LENGTH``)."""
MAX_ITERATIONS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a server keeps of a password: enough to verify a proof, not to make one.

    The ``server_key`` proves the server to the client.  Nothing but ``iterations`` is in the repr.
    """

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """From ``SCRAM-SHA-256$ITERATIONS:SALT$STORED_KEY:SERVER_KEY``, as PostgreSQL stores it.

        Raises ValueError, which does not repeat any of it.
        """
        problem = ValueError("not a SCRAM-SHA-256 secret as PostgreSQL stores it")
        try:
            scheme, parameters, keys = text.split("$")
            iterations, salt = parameters.split(":")
            stored_key, server_key = map(decoded, keys.encode().split(b":"))
            verifier = cls(int(iterations), decoded(salt.encode()), stored_key, server_key)
        except ValueError:
            raise problem from None
        if (
            scheme != SCHEME
            or not (iterations.isascii() and iterations.isdigit())
            or not 1 <= verifier.iterations <= MAX_ITERATIONS
            or not verifier.salt
            or {len(stored_key), len(server_key)} != {KEY_LENGTH}
        ):
            raise problem
        return verifier

    @classmethod
    def of(cls, password: str, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
        """Of a password; bytes of it that are not UTF-8 are surrogate escapes.

        It takes some time: about a millisecond for 4096 iterations.
        """
        prepared = saslprep(password.encode("utf-8", "surrogateescape"))
        salted = hashlib.pbkdf2_hmac("sha256", prepared, salt, iterations)
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        server_key = hmac.digest(salted, b"Server Key", "sha256")
        return cls(iterations, salt, hashlib.sha256(client_key).digest(), server_key)

    def is_proven(self, proof: bytes, exchanged: bytes) -> bool:
        """Whether whoever made the ``proof`` for an exchange knows the password."""
        signature = hmac.digest(self.stored_key, exchanged, "sha256")
        client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
        return hmac.compare_digest(hashlib.sha256(client_key).digest(), self.stored_key)

    def signature(self, exchanged: bytes) -> bytes:
        """The server's own proof for an exchange."""
        return hmac.digest(self.server_key, exchanged, "sha256")


def new_nonce() -> bytes:
    """What no exchange has had before: 18 random bytes, encoded (``SCRAM_RAW_NONCE_LEN``)."""
    return b64encode(os.urandom(18))


def authenticate(
    user: str,
    verifier: Verifier,
    is_known: bool,
    tls: Tls | None,
    *,
    why_unknown: str = "There is no such user.",
    make_nonce: Callable[[], bytes] = new_nonce,
) -> Generator[bytes, bytes, bytes]:
    """The exchange with a client that says it is ``user``.

    It yields messages for the client and is sent the contents of its PasswordMessages.  When the
    client has proven it, it returns the last message, AuthenticationSASLFinal: the client gives no
    answer to that one, and AuthenticationOk comes right behind it.  Otherwise it raises a FATAL
    ReportedError.

    If the user is not known, the ``verifier`` is a mock, and ``why_unknown`` is what the operator
    is told.  ``make_nonce`` makes our part of the nonce.
    """
    end_point = tls.end_point if tls else None
    names = [SCHEME_PLUS, SCHEME] if end_point else [SCHEME]
    answer = yield AuthenticationSASL.build(mechanisms=[*names, ""])
    _require_short(user, answer)
    mechanism, data = parse_initial_response(answer)
    if mechanism not in names:
        raise ProtocolViolation(
            "client selected an invalid SASL authentication mechanism", fatal=True
        )
    if data is None:
        data = yield AuthenticationSASLContinue.build(data=b"")
        _require_short(user, data)
    is_plus = mechanism == SCHEME_PLUS
    first = ClientFirst.parse(data, is_plus, SCHEME_PLUS in names)
    nonce = first.nonce + make_nonce()
    salt = b64encode(verifier.salt)
    server_first = b"r=%b,s=%b,i=%d" % (nonce, salt, verifier.iterations)
    answer = yield AuthenticationSASLContinue.build(data=server_first)
    _require_short(user, answer)
    final = ClientFinal.parse(answer, first.header, end_point if is_plus else None)
    if not hmac.compare_digest(final.nonce, nonce):
        raise ProtocolViolation(
            "invalid SCRAM response", detail="Nonce does not match.", fatal=True
        )
    exchanged = b",".join([first.bare, server_first, final.without_proof])
    is_proven = verifier.is_proven(final.proof, exchanged)
    signature = b64encode(verifier.signature(exchanged))
    if not (is_proven and is_known):
        raise _failed(user, "The password is wrong." if is_known else why_unknown)
    return AuthenticationSASLFinal.build(data=b"v=" + signature)


def _failed(user: str, log: str) -> InvalidPassword:
    return InvalidPassword(f'password authentication failed for user "{user}"', fatal=True, log=log)


def _require_short(user: str, contents: bytes) -> None:
    """As ``pq_getmessage`` does: what is longer is not looked at."""
    if len(contents) + 4 > MESSAGE_LIMIT:
        raise _failed(user, "Its message is too long.")
