"""The files of TLS: which are refused, with which words, and which are only warned of."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.certificates import (
    DAY,
    Authority,
    Files,
    Identity,
    Kind,
    as_pem,
    now,
    self_signed,
    write,
)
from tests.handshakes import a_client, shake
from walproto.access.certificates import PERMISSIONS, check_permissions, read_key
from walproto.access.tls import ServerTls, TlsError

OURS = Authority("Our CA")
US, SOMEBODY_ELSE, ROOT = 1234, 1235, 0


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return OURS.server().write(tmp_path, "server")


def refusal(certificate: Path, key: Path, ca: Path | None = None, crl: Path | None = None) -> str:
    """What the operator is told of files that cannot be used: one line, without a traceback."""
    with pytest.raises(TlsError) as caught:
        ServerTls(certificate, key, ca, crl)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- The key and who may read it -------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "euid", "forbidden"), [(US, US, 0o077), (ROOT, US, 0o037), (ROOT, ROOT, 0o037)]
)
def test_nobody_else_may_read_the_key(
    monkeypatch: pytest.MonkeyPatch, owner: int, euid: int, forbidden: int
) -> None:
    """As PostgreSQL has it: all modes there are, of files that are ours and of files of root's."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    texts: dict[int, str] = dict.fromkeys(range(0o1000), "")
    for mode in texts:
        try:
            check_permissions("server.key", status(stat.S_IFREG | mode, owner))
        except TlsError as error:
            texts[mode] = str(error)
    refused = f'private key file "server.key" has group or world access. {PERMISSIONS}'
    assert texts == {mode: refused if mode & forbidden else "" for mode in texts}


@pytest.mark.parametrize(("owner", "euid"), [(SOMEBODY_ELSE, US), (US, ROOT)])
def test_the_key_must_be_ours(monkeypatch: pytest.MonkeyPatch, owner: int, euid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    with pytest.raises(TlsError) as caught:
        check_permissions("server.key", status(stat.S_IFREG | 0o600, owner))
    assert str(caught.value) == (
        'private key file "server.key" must be owned by the database user or root'
    )


def status(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o610, 0o601])
def test_a_real_key_with_too_wide_a_mode(files: Files, mode: int) -> None:
    files.key.chmod(mode)
    assert refusal(*files) == (
        f'private key file "{files.key}" has group or world access. File must have permissions '
        "u=rw (0600) or less if owned by the database user, or permissions u=rw,g=r (0640) or less "
        "if owned by root."
    )


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_real_key_of_our_own(files: Files, mode: int) -> None:
    files.key.chmod(mode)
    assert ServerTls(*files).warnings == ()


def test_the_key_must_be_a_file(files: Files, tmp_path: Path) -> None:
    """A pipe that nobody writes to does not hold the server up."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        text = refusal(files.certificate, path)
        assert text == f'private key file "{path}" is not a regular file'


def test_there_is_no_key(files: Files) -> None:
    files.key.unlink()
    assert refusal(*files) == (
        f'could not access private key file "{files.key}": No such file or directory'
    )


# --- What is in the key file -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        ("RSA", PrivateFormat.PKCS8),
        ("RSA", PrivateFormat.TraditionalOpenSSL),
        ("P-256", PrivateFormat.PKCS8),
        ("P-256", PrivateFormat.TraditionalOpenSSL),
        ("Ed25519", PrivateFormat.PKCS8),
    ],
)
def test_keys_of_every_kind_and_style(tmp_path: Path, kind: Kind, style: PrivateFormat) -> None:
    identity = self_signed(kind)
    files = identity.write(tmp_path, "server")
    contents = identity.key.private_bytes(Encoding.PEM, style, NoEncryption())
    write(files.key, contents, mode=0o600)
    assert shake(ServerTls(*files), a_client()).served == identity.der


def test_a_key_may_stand_in_the_certificates_file(tmp_path: Path) -> None:
    identity = OURS.server()
    for name, contents in (
        ("certificate first", identity.pem + identity.key_pem),
        ("key first", identity.key_pem + identity.pem),
    ):
        path = write(tmp_path / name, b"Subject: localhost\r\n" + contents, mode=0o600)
        assert shake(ServerTls(path, path), a_client()).served == identity.der


@pytest.mark.parametrize("style", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_passphrase_is_not_asked_for(files: Files, style: PrivateFormat) -> None:
    contents = OURS.server().key.private_bytes(
        Encoding.PEM,
        style,
        BestAvailableEncryption(b"secret"),
    )
    write(files.key, contents, mode=0o600)
    assert refusal(*files) == (
        f'private key file "{files.key}" requires a passphrase, which is not supported: '
        "write the key without one, with openssl pkey"
    )


def test_a_key_of_a_kind_that_signs_nothing(files: Files) -> None:
    contents = x25519.X25519PrivateKey.generate().private_bytes(
        Encoding.PEM,
        PrivateFormat.PKCS8,
        NoEncryption(),
    )
    write(files.key, contents, mode=0o600)
    assert refusal(*files) == (
        f'could not load private key file "{files.key}": '
        "it is to hold a key of the kind RSA, EC or EdDSA"
    )


def test_a_damaged_key_is_not_shown(files: Files) -> None:
    good = OURS.server("RSA").key_pem
    lines = good.splitlines(keepends=True)
    for contents in (b"", b"secret\n", good[:-200], b"".join(lines[:5] + lines[6:])):
        write(files.key, contents, mode=0o600)
        assert refusal(*files) == (
            f'could not load private key file "{files.key}": it is to hold a key in PEM format'
        )


def test_another_certificates_key(files: Files) -> None:
    for other in (OURS.server(), OURS.server("RSA")):
        write(files.key, other.key_pem, mode=0o600)
        assert refusal(*files).startswith(
            f'private key file "{files.key}" does not go with the certificate in '
            f'"{files.certificate}": '
        )


def test_the_key_that_is_read_is_the_one_in_the_file(tmp_path: Path) -> None:
    identity = OURS.server("RSA")
    key = read_key(identity.write(tmp_path, "server").key)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert isinstance(identity.key, rsa.RSAPrivateKey)
    assert key.private_numbers() == identity.key.private_numbers()


# --- Certificates and lists ------------------------------------------------------------------


def test_files_that_are_not_there(files: Files, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    ca = write(tmp_path / "ca.crt", OURS.pem)
    reason = f'file "{absent}": No such file or directory'
    assert refusal(absent, files.key) == f"could not load server certificate {reason}"
    assert refusal(*files, absent) == f"could not load root certificate {reason}"
    assert refusal(*files, ca, absent) == (
        f"could not load SSL certificate revocation list {reason}"
    )


def test_files_that_hold_something_else(files: Files, tmp_path: Path) -> None:
    ca = write(tmp_path / "ca.crt", OURS.pem)
    good_crl = OURS.crl()
    not_certificates = (b"", b"junk", OURS.server().key_pem, OURS.pem[:-100], as_pem(b"junk"))
    not_lists = (
        *(b"", b"junk", OURS.pem, good_crl[:-100], good_crl.splitlines(True)[0] * 100_000),
        *(good_crl + good_crl.replace(b"M", b"N"), good_crl + good_crl[:-100]),
        good_crl[:-100] + good_crl,
    )
    for contents in not_certificates:
        other = write(tmp_path / "other", contents)
        reason = f'file "{other}": it is to hold certificates in PEM format'
        assert refusal(other, files.key) == f"could not load server certificate {reason}"
        assert refusal(*files, other) == f"could not load root certificate {reason}"
    for contents in not_lists:
        other = write(tmp_path / "other", contents)
        assert refusal(*files, ca, other) == (
            f'could not load SSL certificate revocation list file "{other}": '
            "it is to hold revocation lists in PEM format"
        )


def test_a_certificate_of_a_version_that_does_not_exist(files: Files) -> None:
    der = OURS.server().der
    version = bytes.fromhex("a003020102")
    assert der.count(version) == 1
    write(files.certificate, as_pem(der.replace(version, bytes.fromhex("a003020105"))))
    assert refusal(*files) == (
        f'could not load server certificate file "{files.certificate}": '
        "it is to hold certificates in PEM format"
    )


def test_a_key_that_is_too_short_to_be_safe(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 1024)
    certificate = OURS.signed(OURS.name, key, [], now() - DAY, now() + DAY)
    files = Identity(certificate, key).write(tmp_path, "server")
    assert refusal(*files) == (
        f'could not load server certificate file "{files.certificate}": ee key too small'
    )


# --- What can be used, but should not --------------------------------------------------------


def test_an_expired_certificate_is_served_with_a_warning(tmp_path: Path) -> None:
    identity = OURS.server(expired=True)
    files = identity.write(tmp_path, "server")
    tls = ServerTls(*files)
    end = identity.certificate.not_valid_after_utc
    assert tls.warnings == (
        f'server certificate file "{files.certificate}": the certificate has expired at '
        f"{end:%Y-%m-%d %H:%M:%S} UTC",
    )
    assert shake(tls, a_client()).served == identity.der
    for renewed, warnings in ((OURS.server(), 0), (identity, 1)):
        renewed.write(tmp_path, "server")
        tls.reload()
        assert len(tls.warnings) == warnings


def test_a_certificate_that_is_not_valid_yet_is_served_with_a_warning(tmp_path: Path) -> None:
    key = OURS.server().key
    certificate = OURS.signed(OURS.name, key, [], now() + DAY, now() + 2 * DAY)
    files = Identity(certificate, key).write(tmp_path, "server")
    tls = ServerTls(*files)
    assert tls.warnings == (
        f'server certificate file "{files.certificate}": the certificate is not valid before '
        f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC",
    )
    assert shake(tls, a_client()).server.described
