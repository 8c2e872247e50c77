"""The files of public keys that tokens are checked with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa, x25519
from trustme import CA

from tests.jwt_keys import EVERYTHING, FOR_TENANT, TENANT, key, new_key, write_keys
from walproto.access.grant import Scope
from walproto.access.tokens import MAX_FILE_SIZE, KeysError, load_keys

NOW = 1_800_000_000
ALGORITHMS = ("EdDSA", "RS256", "ES256")
TENANT_ONLY = Scope(tenants=frozenset({TENANT}))


def problem(path: Path) -> str:
    """What is wrong with a file of keys."""
    with pytest.raises(KeysError) as caught:
        load_keys(path)
    text = str(caught.value)
    assert text.isprintable()
    assert caught.value.__cause__ is None
    if text.startswith(cannot_open := f'could not open file "{path}": '):
        return text.replace(cannot_open, "cannot open: ")
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def public_pem(private: Any) -> bytes:
    made: bytes = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made


def test_one_key_or_several(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    for algorithm in ALGORITHMS:
        write_keys(path, key(algorithm))
        assert load_keys(str(path)).verify(key(algorithm).token(FOR_TENANT), NOW) == TENANT_ONLY
    pairs = [key(algorithm) for algorithm in ALGORITHMS] + [new_key()]
    write_keys(path, *pairs)
    keys = load_keys(path)
    assert [algorithm for algorithm, _ in keys.keys] == [*ALGORITHMS, "EdDSA"]
    for pair in pairs:
        assert keys.verify(pair.token(EVERYTHING), NOW) is None


def test_text_around_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    text = b"# of this year\r\n" + key().public_pem.replace(b"\n", b"\r\n") + b"\n# new: \xff\n"
    path.write_bytes(text + new_key().public_pem.rstrip())
    assert len(load_keys(path).keys) == 2


def test_a_private_key_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    for algorithm in ALGORITHMS:
        pem = key(algorithm).private_pem
        for contents in (pem, key().public_pem + pem, pem[:100]):
            path.write_bytes(contents)
            text = problem(path)
            assert text.startswith("there is a private key in it")
            for line in pem.splitlines()[1:-1]:
                assert line.decode() not in text


def test_other_keys_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    others = {
        ed448.Ed448PrivateKey.generate(): "it is none of Ed25519, RSA and P-256",
        x25519.X25519PrivateKey.generate(): "it is none of Ed25519, RSA and P-256",
        ec.generate_private_key(ec.SECP384R1()): "it is none of Ed25519, RSA and P-256",
        ec.generate_private_key(ec.SECP256K1()): "it is none of Ed25519, RSA and P-256",
        dsa.generate_private_key(1024): "it is none of Ed25519, RSA and P-256",
        rsa.generate_private_key(65537, 1024): "an RSA key has at least 2048 bits, not 1024",
    }
    for private, expected in others.items():
        path.write_bytes(key().public_pem + public_pem(private))
        assert problem(path) == f"key 2: {expected}"


def test_what_is_no_public_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    good = key().public_pem
    begin, middle, end = good.splitlines()
    certificate = CA().cert_pem.bytes()
    for contents, expected in {
        b"": "there is no PEM public key in it",
        b"x" * 1000: "there is no PEM public key in it",
        middle: "there is no PEM public key in it",
        bytes(range(256)): "there is no PEM public key in it",
        b"x" * (MAX_FILE_SIZE + 1): f"cannot open: it is larger than {MAX_FILE_SIZE} bytes",
        (begin + b"\n") * (MAX_FILE_SIZE // len(begin + b"\n")): "a PEM block in it is damaged",
        good[:-10]: "a PEM block in it is damaged",
        good + begin: "a PEM block in it is damaged",
        good + begin[1:] + b"\n" + middle + b"\n" + end: "a PEM block in it is damaged",
        begin + b"\nAAAA\n" + end: "key 1: it cannot be read as a public key",
        begin + b"\n" + end: "key 1: it cannot be read as a public key",
        begin + b"\n" + middle[:-8] + b"\n" + end: "key 1: it cannot be read as a public key",
        certificate: "key 1: it is a certificate: give its public key "
        "(openssl x509 -pubkey -noout)",
        good.replace(b"PUBLIC", b"RSA PUBLIC"): 'key 1: it is a "RSA PUBLIC KEY", not a '
        '"PUBLIC KEY"',
    }.items():
        path.write_bytes(contents)
        assert problem(path) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.pem") == "cannot open: No such file or directory"
    assert problem(tmp_path) == "cannot open: Is a directory"
    if os.geteuid() != 0:
        path = write_keys(tmp_path / "keys.pem", key())
        path.chmod(0)
        assert problem(path) == "cannot open: Permission denied"
