"""Key pairs, and tokens that they sign."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

TENANT = "0123456789abcdef" * 2
EVERYTHING = {"scope": "safekeeperdata"}
FOR_TENANT = {"scope": "tenant", "tenant_id": TENANT}

PrivateKey = ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class KeyPair:
    """A private key, and the algorithm that its kind of keys signs tokens with."""

    algorithm: str
    private: PrivateKey

    @property
    def public_pem(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def private_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def token(self, claims: dict[str, Any], headers: dict[str, Any] | None = None) -> str:
        return jwt.encode(claims, self.private, self.algorithm, headers)

    def signed(self, payload: bytes, header: bytes | None = None) -> str:
        """A token with that to the byte, and a signature that is good."""
        header = json.dumps({"alg": self.algorithm}).encode() if header is None else header
        text = f"{base64url(header)}.{base64url(payload)}"
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        return f"{text}.{base64url(algorithm.sign(text.encode(), self.private))}"


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def new_key(algorithm: str = "EdDSA") -> KeyPair:
    """A new one of the kind that this algorithm is for: EdDSA, RS256 or ES256."""
    made: dict[str, Any] = {
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    }
    return KeyPair(algorithm, made[algorithm]())


@cache
def key(algorithm: str = "EdDSA") -> KeyPair:
    """As `new_key`, but always the same."""
    return new_key(algorithm)


def write_keys(path: Path, *keys: KeyPair) -> Path:
    """A file with their public keys."""
    path.write_bytes(b"".join(one.public_pem for one in keys))
    return path
