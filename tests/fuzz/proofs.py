# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: what a client says to prove who it is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fuzz.access import TLS, decoded, some_verifier
from tests.fuzz.backend import parse_messages
from tests.fuzz.target import Input, Target, check_told, string
from tests.slots_fakes import quick_directory
from walproto.access.saslprep import saslprep
from walproto.access.scram import authenticate
from walproto.access.tokens import InvalidToken, Keys, KeysError, load_keys
from walproto.errors import ReportedError

# --- Passwords -----------------------------------------------------------------------------------


def check_saslprep(data: bytes) -> None:
    """A password comes to what it was, or to text that is normalized; ASCII is left alone."""
    prepared = saslprep(data)
    assert saslprep(data) == prepared
    if data.isascii():
        assert prepared == data
    if prepared != data:
        text = prepared.decode()
        assert unicodedata.normalize("NFKC", text) == text
        assert len(prepared) <= 20 * len(data)


# --- SCRAM ---------------------------------------------------------------------------------------


class ScramClient:
    """A client that knows a password (RFC 5802), as far as a server in memory can tell."""

    FIRST_BARE = b"n=,r=abcdefghijklmnopqrstuvwx"

    def __init__(self, password: bytes = b"secret") -> None:
        self._password = password

    def answer(self, kind: int, data: bytes) -> bytes:
        """The contents of the PasswordMessage that answers an authentication request."""
        if kind != 11:
            first = b"n,," + self.FIRST_BARE
            return b"SCRAM-SHA-256\0" + struct.pack(">i", len(first)) + first
        try:
            nonce, salt, iterations = (each[2:] for each in data.split(b","))
        except ValueError:  # asked for the first message, which was not there
            return b"n,," + self.FIRST_BARE
        salted = hashlib.pbkdf2_hmac(
            "sha256", self._password, base64.b64decode(salt), int(iterations)
        )
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        without_proof = b"c=biws,r=" + nonce
        exchanged = b",".join([self.FIRST_BARE, data, without_proof])
        signature = hmac.digest(hashlib.sha256(client_key).digest(), exchanged, "sha256")
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        return without_proof + b",p=" + base64.b64encode(proof)


def check_scram(data: bytes) -> None:
    """Nobody gets through who has not given the proof, and whoever does not is told a FATAL error
    of ours.  In what is made up, ``@`` stands for the nonce."""
    source = Input(data)
    flags = source.number()
    is_known = bool(flags & 1)
    tls = TLS if flags & 2 else None
    exchange = authenticate("postgres", some_verifier(), is_known, tls)
    client = ScramClient(b"secret" if flags & 4 else b"wrong")
    honest, made_up, nonce = 0, 0, b""
    try:
        asked = next(exchange)
        for _ in range(4):
            ((tag, (kind, contents)),) = parse_messages(asked)
            assert tag == b"R"
            assert kind in (10, 11)
            is_honest = not source or source.number() < 128
            nonce = contents[2:].partition(b",")[0] if kind == 11 else nonce
            if is_honest:
                honest += 1
                said = client.answer(kind, contents)
            else:
                made_up += 1
                said = source.string().replace(b"@", nonce)
            asked = exchange.send(said)
    except ReportedError as error:
        assert error.fatal
        check_told(error)
        assert made_up or not (is_known and flags & 4)
    except StopIteration as end:
        assert is_known
        assert flags & 4
        assert honest
        ((_, (kind, contents)),) = parse_messages(end.value)
        assert kind == 12
        assert contents.startswith(b"v=")
    else:
        raise AssertionError("the exchange does not end")


def _scram_seeds() -> list[bytes]:
    first = ScramClient().answer(10, b"")
    plus = b"p=tls-server-end-point,,n=,r=abc"
    plus = b"SCRAM-SHA-256-PLUS\0" + struct.pack(">i", len(plus)) + plus
    final = b"c=biws,r=@,p=" + base64.b64encode(bytes(32))
    return [
        b"\5",
        b"\0\0\0",
        b"\5\xff" + string(first),
        b"\5\xff" + string(b"SCRAM-SHA-256\0\xff\xff\xff\xff"),
        b"\7\xff" + string(plus) + b"\xff" + string(final),
        b"\5\0\xff" + string(final),
    ]


# --- Tokens --------------------------------------------------------------------------------------

NOW = 1_800_000_000.0


@cache
def _signing() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@cache
def _pem() -> bytes:
    return _signing().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def check_tokens(data: bytes) -> None:
    """Nobody gets through with a token that our key has not signed, for the purpose and the time
    that it says."""
    source = Input(data)
    how = source.number() % 4
    header, payload = source.string(), source.string()
    signed = _part(header) + b"." + _part(payload)
    signature = {
        0: _signing().sign(signed),
        1: hmac.digest(_pem(), signed, "sha256"),
        2: b"",
    }.get(how, source.string())
    token = signed + b"." + _part(signature) if how != 3 else source.rest()
    try:
        scope = Keys((("EdDSA", _signing().public_key()),)).verify(decoded(token), NOW)
    except InvalidToken as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
        return
    assert how == 0
    assert json.loads(header)["alg"] == "EdDSA"
    claims: dict[str, Any] = json.loads(payload)
    assert claims.get("exp", NOW + 1) > NOW
    assert claims.get("nbf", NOW) <= NOW
    if scope is None:
        assert claims["scope"] == "safekeeperdata"
        assert claims.get("tenant_id") is None
    else:
        assert scope.tenants == {claims["tenant_id"].lower()}
        assert not scope.timelines


def _token_seeds() -> list[bytes]:
    found = []
    for claims in (
        {"scope": "tenant", "tenant_id": "0123456789ABCDEF" * 2, "exp": NOW + 1},
        {"scope": "safekeeperdata", "nbf": NOW - 1, "tenant_id": None},
        {"scope": "pageserverapi", "exp": 1e300},
    ):
        payload = json.dumps(claims).encode()
        for how, algorithm in enumerate(("EdDSA", "HS256", "none")):
            header = json.dumps({"alg": algorithm, "typ": "JWT"}).encode()
            found.append(bytes([how]) + string(header) + string(payload))
    return [*found, b"\3\0\0\0\0\0\0aaaa.bbbb.cccc"]


def check_keys(data: bytes) -> None:
    """A file has keys, or it is said what is wrong with it."""
    with quick_directory() as name:
        path = Path(name, "keys.pem")
        path.write_bytes(data)
        try:
            keys = load_keys(path)
        except KeysError as error:
            assert str(error).startswith(f"{path}: ")
            assert str(error).isprintable()
        else:
            assert keys.keys
            assert all(algorithm in ("EdDSA", "RS256", "ES256") for algorithm, _ in keys.keys)


TARGETS = (
    Target(
        "saslprep",
        check_saslprep,
        lambda: [
            *("I\u00adX".encode(), "\u00aa\u2168".encode(), "\u0627\u0031".encode(), b"a\x7f"),
            *("\u06271\u0628".encode(), "a\u00a0\u200bb".encode(), "\ufdfa".encode(), b"\xff"),
        ],
        size=64,
    ),
    Target(
        "scram",
        check_scram,
        _scram_seeds,
        (b"SCRAM-SHA-256\0", b"SCRAM-SHA-256-PLUS\0", b"n,,", b"y,,", b",r=", b",p=", b"c=biws"),
        size=1536,
    ),
    Target(
        "tokens",
        check_tokens,
        _token_seeds,
        (
            *(b'"alg"', b'"EdDSA"', b'"crit"', b'"b64"', b'"scope"', b'"tenant"', b'"exp"'),
            *(b'"nbf"', b'"aud"', b'"tenant_id"', b"NaN", b"1e400", b"null", b"true", b"[" * 20),
        ),
        size=1024,
    ),
    Target(
        "keys",
        check_keys,
        lambda: [_pem(), b"x\n" + _pem() + b"y\n" + _pem().replace(b"PUBLIC", b"RSA PUBLIC")],
        (b"-----BEGIN ", b"-----END ", b"PUBLIC KEY", b"CERTIFICATE", b"PRIVATE KEY"),
        size=1024,
    ),
)
