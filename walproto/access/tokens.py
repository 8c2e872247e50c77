"""JSON Web Tokens as passwords: what a signed token lets its bearer see.

A token says what it is good for, ``scope``: with ``safekeeperdata`` everything may be seen, with
``tenant`` the timelines of the tenant whose ID is in ``tenant_id``.  It does not matter who the
client says it is.

What a token says of how to check it, is not believed: there are the keys of one file, and each is
used with the one algorithm that is its own.  No key is looked for anywhere else.

RFC 7519 (JWT), RFC 7515 (the signature), RFC 8725 (what to beware of).  Neon: ``utils::auth`` and
the safekeeper's ``auth.rs``, which do not require ``exp``, either.

Needs PyJWT and cryptography: ``walproto[jwt]``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWS
from jwt.exceptions import PyJWTError
from jwt.utils import base64url_decode

from walproto.access.files import PathLike, read_file
from walproto.access.grant import Scope

MAX_SIZE = 8192
"""Characters of a token at most; one that an RSA key of 4096 bits has signed has about 900."""

MAX_FILE_SIZE = 2**20
"""Bytes of a file with keys at most."""

MIN_RSA_BITS = 2048
"""RFC 7518, section 3.3."""

LAST_TIME = 253_402_300_799
"""The end of the year 9999, in seconds since 1970: a later time is one in milliseconds."""

_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\r?\n[^-]*+-----END \1-----")
_ID = re.compile("[0-9A-Fa-f]{32}")

_Key = Ed25519PublicKey | RSAPublicKey | EllipticCurvePublicKey


class KeysError(ValueError):
    """A file of public keys that cannot be used: one line that names it, and what is wrong."""


class InvalidToken(ValueError):
    """Why a token is refused: for the operator, and not for who has sent it.

    Nothing of the token is in it but a word or a time that the reason is about.
    """


@dataclass(frozen=True, slots=True)
class Keys:
    """Public keys, any of which may have signed a token; pairs of an algorithm and its key."""

    keys: tuple[tuple[str, _Key], ...]

    def verify(self, token: str, now: float) -> Scope | None:
        """What the bearer of a token may see, None for everything.

        ``now`` is in seconds since 1970.  Raises InvalidToken.
        """
        if len(token) > MAX_SIZE:
            raise InvalidToken(f"it has more than {MAX_SIZE} characters")
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            raise InvalidToken("it is no signed JSON Web Token")
        header = _object("header", parts[1])
        if "crit" in header:
            raise InvalidToken('its header has "crit", and no extension is known here')
        self._check_signature(token, header.get("alg"))
        claims = _object("payload", parts[2])
        _check_time(claims, now)
        return _scope(claims)

    def _check_signature(self, token: str, algorithm: object) -> None:
        of_its_kind = [(own, key) for own, key in self.keys if own == algorithm]
        if not of_its_kind:
            have = " or ".join(sorted({own for own, _ in self.keys}))
            raise InvalidToken(f"its alg is {_shown(algorithm)}, not {have}")
        for own, key in of_its_kind:
            try:
                PyJWS(algorithms=[own]).decode(token, key, algorithms=[own])
            except (PyJWTError, ValueError, RecursionError):
                continue
            return
        raise InvalidToken(f"none of our {algorithm} keys has signed it")


def load_keys(path: PathLike) -> Keys:
    """The public keys in a PEM file, one or more, as ``openssl pkey -pubout`` writes them.

    They are Ed25519 keys (for EdDSA), RSA keys of at least MIN_RSA_BITS (RS256) and P-256 keys
    (ES256).  A certificate is not taken for its key: that it expires, would be passed over.
    Text around the keys is.  Raises KeysError.
    """
    name = os.fspath(path)
    try:
        contents, _ = read_file(path, MAX_FILE_SIZE)
    except OSError as error:
        raise KeysError(f'could not open file "{name}": {error.strerror}') from None
    if b"PRIVATE KEY" in contents:
        raise KeysError(
            f"{name}: there is a private key in it, which belongs to who signs the tokens: "
            "give its public key only (openssl pkey -pubout)"
        )
    if b"-----" in _PEM.sub(b"", contents):
        raise KeysError(f"{name}: a PEM block in it is damaged")
    blocks = list(_PEM.finditer(contents))
    if not blocks:
        raise KeysError(f"{name}: there is no PEM public key in it")
    keys = []
    for number, block in enumerate(blocks, 1):
        try:
            keys.append(_key(block[1].decode(), block[0]))
        except ValueError as error:
            raise KeysError(f"{name}: key {number}: {error}") from None
    return Keys(tuple(keys))


def _key(label: str, pem: bytes) -> tuple[str, _Key]:
    """A key and its algorithm.  Raises ValueError."""
    if label == "CERTIFICATE":
        raise ValueError("it is a certificate: give its public key (openssl x509 -pubkey -noout)")
    if label != "PUBLIC KEY":
        raise ValueError(f'it is a "{label}", not a "PUBLIC KEY"')
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("it cannot be read as a public key") from None
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA", key
    if isinstance(key, RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            raise ValueError(f"an RSA key has at least {MIN_RSA_BITS} bits, not {key.key_size}")
        return "RS256", key
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256", key
    raise ValueError("it is none of Ed25519, RSA and P-256")


# --- What a token says ------------------------------------------------------------------------


def _object(what: str, part: str) -> Mapping[str, Any]:
    """The JSON object in a part of a token, which means the same to everybody who reads it."""
    try:
        value = json.loads(
            base64url_decode(part).decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except InvalidToken:
        raise
    except (ValueError, RecursionError):
        raise InvalidToken(f"its {what} is no JSON") from None
    if not isinstance(value, dict):
        raise InvalidToken(f"its {what} is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise InvalidToken("it says something twice")
    return made


def _no_constant(name: str) -> None:
    raise InvalidToken(f"there is {name} in it, which is no JSON")


def _check_time(claims: Mapping[str, Any], now: float) -> None:
    """RFC 7519, sections 4.1.4 and 4.1.5; without leeway."""
    expires, begins = _time(claims, "exp"), _time(claims, "nbf")
    if expires is not None and now >= expires:
        raise InvalidToken(f"it has expired (exp {expires}, and it is {now:.0f})")
    if begins is not None and now < begins:
        raise InvalidToken(f"it is not valid yet (nbf {begins}, and it is {now:.0f})")


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    """Seconds since 1970; None if the token does not say."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidToken(f'its "{name}" is no number')
    if not 0 <= value <= LAST_TIME:  # nor is 1e999, which is infinite here
        raise InvalidToken(f'its "{name}" is no time in seconds since 1970')
    return value


def _scope(claims: Mapping[str, Any]) -> Scope | None:
    """A tenant that is named limits the token to it, whatever its scope is."""
    if "aud" in claims:  # RFC 7519, section 4.1.3; Neon's tokens have none
        raise InvalidToken('it is meant for somebody else: it has an "aud"')
    scope, tenant_id = claims.get("scope"), claims.get("tenant_id")
    if scope not in ("tenant", "safekeeperdata"):
        raise InvalidToken(f'its scope is {_shown(scope)}, not "tenant" or "safekeeperdata"')
    if tenant_id is None:
        if scope == "tenant":
            raise InvalidToken('its scope is "tenant", and it has no tenant_id')
        return None
    if not isinstance(tenant_id, str) or not _ID.fullmatch(tenant_id):
        raise InvalidToken("its tenant_id is not an ID of 32 hexadecimal digits")
    return Scope(tenants=frozenset({tenant_id.lower()}))


def _shown(value: object) -> str:
    """A word in a token, for the log."""
    if value is None:
        return "missing"
    if isinstance(value, str) and re.fullmatch("[A-Za-z0-9_-]{1,20}", value):
        return f'"{value}"'
    return "something else"
