"""Certificates for the tests: authorities, what they sign, what they revoke, as files.

How it thinks:

* An `Authority` signs.  `Authority("Our CA").server()` is a certificate for localhost and
  127.0.0.1, `.client("alice")` one whose CN is alice, `.authority("Issuer")` an intermediate
  authority.  `.pem` is what `sslrootcert` or `--ssl-ca-file` take, `.crl(alice)` a revocation list.
* An `Identity` is a certificate with its key and its chain.  `alice.write(directory, "alice")`
  writes `alice.crt` and `alice.key`, with the modes that PostgreSQL and libpq ask for.
* The kinds of keys are `RSA`, `P-256` and `Ed25519`.  What a certificate is *signed* with is a
  property of its authority: kind of key, `digest`, and `pss`.  `self_signed()` is both in one.
* Files belong to us, who run walproto; with `workspace=` to the user that PostgreSQL's programs
  run as, since libpq wants a client's key to be its own.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.postgres import Workspace

Kind = Literal["RSA", "P-256", "Ed25519"]
Digest = hashes.SHA256 | hashes.SHA384 | hashes.SHA512
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

HOSTS = ("localhost", "127.0.0.1")
DAY = datetime.timedelta(days=1)
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


class Files(NamedTuple):
    """A certificate (with its chain) and its key, written down."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Identity:
    """A certificate, its key, and the intermediate authorities between it and the root."""

    certificate: x509.Certificate
    key: Key
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self) -> bytes:
        """The certificate, followed by its chain."""
        return b"".join(map(pem, (self.certificate, *self.chain)))

    @property
    def key_pem(self) -> bytes:
        return self.encrypted_key_pem(None)

    def encrypted_key_pem(self, passphrase: bytes | None) -> bytes:
        """The key as one can only read it with a passphrase; None: as everyone can."""
        encryption = (
            serialization.NoEncryption()
            if passphrase is None
            else serialization.BestAvailableEncryption(passphrase)
        )
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    @property
    def der(self) -> bytes:
        """The certificate's own bytes, which channel binding hashes."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def write(self, directory: Path, name: str, workspace: Workspace | None = None) -> Files:
        """Writes ``name.crt`` and ``name.key``, over any that are there."""
        return Files(
            write(directory / f"{name}.crt", self.pem, workspace=workspace),
            write(directory / f"{name}.key", self.key_pem, mode=0o600, workspace=workspace),
        )


class Authority:
    """One that signs certificates: with a key of its ``kind``, over the ``digest`` of what is
    signed, and, if the key is RSA, with ``pss`` for its padding."""

    def __init__(
        self,
        name: str = "Test CA",
        kind: Kind = "P-256",
        *,
        digest: Digest | None = None,
        pss: bool = False,
        parent: Authority | None = None,
    ) -> None:
        self.key = new_key(kind)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.digest = None if kind == "Ed25519" else digest or hashes.SHA256()
        self.padding = (
            padding.PSS(padding.MGF1(self.digest), padding.PSS.DIGEST_LENGTH)
            if pss and self.digest
            else None
        )
        self.chain: tuple[x509.Certificate, ...] = ()
        issuer = parent or self
        self.certificate = issuer.signed(
            self.name, self.key, CA_EXTENSIONS, now() - 30 * DAY, now() + 365 * DAY
        )
        if parent is not None:
            self.chain = (self.certificate, *parent.chain)

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return pem(self.certificate)

    def authority(self, name: str, kind: Kind = "P-256") -> Authority:
        """An intermediate authority, which this one has signed."""
        return Authority(name, kind, parent=self)

    def server(
        self,
        kind: Kind = "P-256",
        *,
        name: str = "localhost",
        hosts: Iterable[str] = HOSTS,
        expired: bool = False,
    ) -> Identity:
        """A server's certificate, for the names and addresses in ``hosts``."""
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self.identity(name, kind, [(names, False), _purpose(SERVER)], expired=expired)

    def client(self, name: str, kind: Kind = "P-256", *, expired: bool = False) -> Identity:
        """A client's certificate, with this CN."""
        return self.identity(name, kind, [_purpose(CLIENT)], expired=expired)

    def identity(
        self,
        name: str,
        kind: Kind,
        extensions: list[tuple[x509.ExtensionType, bool]],
        *,
        expired: bool = False,
    ) -> Identity:
        """A certificate with this CN and these extensions, which ended yesterday if ``expired``."""
        key = new_key(kind)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        end = now() + (-DAY if expired else 30 * DAY)
        certificate = self.signed(subject, key, [END, *extensions], now() - 2 * DAY, end)
        return Identity(certificate, key, self.chain)

    def signed(
        self,
        subject: x509.Name,
        key: Key,
        extensions: Iterable[tuple[x509.ExtensionType, bool]],
        begin: datetime.datetime,
        end: datetime.datetime,
    ) -> x509.Certificate:
        """The certificate of a key, signed by this authority."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, self.digest, rsa_padding=self.padding)

    def crl(self, *revoked: Identity, ended: bool = False) -> bytes:
        """This authority's list of certificates that it has revoked, in PEM; if it has ``ended``,
        it is one that was to be replaced yesterday."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now() - 2 * DAY)
            .next_update(now() + (-DAY if ended else 30 * DAY))
        )
        for identity in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(identity.certificate.serial_number)
                .revocation_date(now() - DAY)
                .build()
            )
        crl = builder.sign(self.key, self.digest, rsa_padding=self.padding)
        return crl.public_bytes(serialization.Encoding.PEM)


def self_signed(kind: Kind, *, digest: Digest | None = None, pss: bool = False) -> Identity:
    """A server's certificate that its own key has signed."""
    authority = Authority("localhost", kind, digest=digest, pss=pss)
    names = x509.SubjectAlternativeName([_general_name(host) for host in HOSTS])
    certificate = authority.signed(
        authority.name, authority.key, [END, (names, False)], now() - DAY, now() + 30 * DAY
    )
    return Identity(certificate, authority.key)


def new_key(kind: Kind) -> Key:
    if kind == "RSA":
        return rsa.generate_private_key(65537, 2048)
    if kind == "P-256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def as_pem(der: bytes) -> bytes:
    """A certificate that is only bytes."""
    text = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"


def write(
    path: Path, contents: bytes, *, mode: int = 0o644, workspace: Workspace | None = None
) -> Path:
    """Writes a file with exactly this mode; ``workspace``: it is PostgreSQL's user's."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(contents)
    if workspace is not None:
        workspace.file(path, contents)
    path.chmod(mode)
    return path


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _purpose(purpose: x509.ObjectIdentifier) -> tuple[x509.ExtensionType, bool]:
    return x509.ExtendedKeyUsage([purpose]), False


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


CA_EXTENSIONS: tuple[tuple[x509.ExtensionType, bool], ...] = (
    (x509.BasicConstraints(ca=True, path_length=None), True),
    (_usage(ca=True), True),
)
END: tuple[x509.ExtensionType, bool] = (x509.BasicConstraints(ca=False, path_length=None), True)
