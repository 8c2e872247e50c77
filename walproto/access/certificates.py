"""Certificates and keys, read from the files that PostgreSQL takes too, and what they say.

It needs ``cryptography``, so it is imported only when TLS is used.

PostgreSQL documentation: "Secure TCP/IP Connections with SSL"; sources ``be-secure-openssl.c`` and
``be-secure-common.c``.
"""

from __future__ import annotations

import datetime
import os

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from walproto.access.files import NotRegularError, PathLike, read_file
from walproto.errors import printable

CERTIFICATE = "server certificate"
KEY = "private key"
AUTHORITIES = "root certificate"
REVOCATION_LISTS = "SSL certificate revocation list"

PERMISSIONS = (
    "File must have permissions u=rw (0600) or less if owned by the database user, "
    "or permissions u=rw,g=r (0640) or less if owned by root."
)
#: How much of a name in a certificate that nobody has verified is put in the log, in characters.
NAME_LENGTH = 64
#: Bytes of a file with certificates or a key at most.
MAX_SIZE = 1 << 20
#: The same of one with revocation lists, which grow over the years.
MAX_LISTS_SIZE = 16 << 20

Key = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)
_BEGIN_CRL, _END_CRL = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


class TlsError(ValueError):
    """A file cannot be used: one line that names it and says what is wrong, for the operator."""


def cannot_load(kind: str, path: PathLike, reason: str) -> TlsError:
    """The error in PostgreSQL's words; ``kind`` is its name for what the file is to hold."""
    return TlsError(f'could not load {kind} file "{path}": {reason}')


# --- Files -----------------------------------------------------------------------------------


def read_certificates(kind: str, path: PathLike) -> list[x509.Certificate]:
    """The certificates in a file, at least one; raises TlsError."""
    contents = _read(kind, path, MAX_SIZE)
    try:
        return x509.load_pem_x509_certificates(contents)
    except (ValueError, x509.InvalidVersion):
        raise cannot_load(kind, path, "it is to hold certificates in PEM format") from None


def read_revocation_lists(path: PathLike) -> list[x509.CertificateRevocationList]:
    """The revocation lists in a file, at least one; raises TlsError."""
    contents = _read(REVOCATION_LISTS, path, MAX_LISTS_SIZE)
    try:
        crls = [
            x509.load_pem_x509_crl(_BEGIN_CRL + b"".join(block.partition(_END_CRL)[:2]))
            for block in contents.split(_BEGIN_CRL)[1:]
        ]
    except ValueError:
        crls = []
    if not crls:
        reason = "it is to hold revocation lists in PEM format"
        raise cannot_load(REVOCATION_LISTS, path, reason)
    return crls


def read_key(path: PathLike) -> Key:
    """The key in a file that nobody else may read.

    Raises TlsError, which says nothing of what is in the file.
    """
    contents = _read_private(path)
    try:
        key = load_pem_private_key(contents, password=None)
    except TypeError:
        raise TlsError(
            f'private key file "{path}" requires a passphrase, which is not supported: '
            "write the key without one, with openssl pkey"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise cannot_load(KEY, path, "it is to hold a key in PEM format") from None
    if not isinstance(key, Key):
        raise cannot_load(KEY, path, "it is to hold a key of the kind RSA, EC or EdDSA")
    return key


def _read(kind: str, path: PathLike, limit: int) -> bytes:
    try:
        return read_file(path, limit)[0]
    except OSError as error:
        raise cannot_load(kind, path, error.strerror or str(error)) from None


def _read_private(path: PathLike) -> bytes:
    try:
        contents, status = read_file(path, MAX_SIZE)
    except NotRegularError:
        raise TlsError(f'private key file "{path}" is not a regular file') from None
    except OSError as error:
        raise TlsError(f'could not access private key file "{path}": {error.strerror}') from None
    check_permissions(path, status)
    return contents


def check_permissions(path: PathLike, status: os.stat_result) -> None:
    """PostgreSQL's ``check_ssl_key_file_permissions()``; but root, as whom PostgreSQL never runs,
    may use a key of its own that a group can read, as it may in libpq."""
    if status.st_uid not in (os.geteuid(), 0):
        raise TlsError(f'private key file "{path}" must be owned by the database user or root')
    if status.st_mode & (0o037 if status.st_uid == 0 else 0o077):
        raise TlsError(f'private key file "{path}" has group or world access. {PERMISSIONS}')


# --- What they say ---------------------------------------------------------------------------


def trouble_with_certificate(certificate: x509.Certificate) -> str:
    """Why clients will not accept our own certificate; empty if that is not for its time."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end < _now():
        return f"the certificate has expired at {_time(end)}"
    if begin > _now():
        return f"the certificate is not valid before {_time(begin)}"
    return ""


def trouble_with_revocation_list(crl: x509.CertificateRevocationList) -> str:
    """Why no client's certificate will be accepted; empty if that is not for the list's time."""
    end = crl.next_update_utc
    if end is None or end > _now():
        return ""
    return f'the list of "{name_of(crl.issuer)}" has expired at {_time(end)}'


def end_point(certificate: x509.Certificate) -> bytes | None:
    """The hash that ``tls-server-end-point`` binds to: that of the certificate's own signature, but
    never a weak one; None if the signature has no single one (RFC 5929, section 4.1)."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    if algorithm is None:
        return None
    if isinstance(algorithm, (hashes.MD5, hashes.SHA1)):
        algorithm = hashes.SHA256()
    return certificate.fingerprint(algorithm)


def common_name(certificate: x509.Certificate) -> str | None:
    """The first CN; None if there is none, or it is not one that can be printed."""
    try:
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except ValueError:
        return None
    name = names[0].value if names else ""
    return name if isinstance(name, str) and name and name.isprintable() else None


def name_of(name: x509.Name) -> str:
    """A name that nobody may have verified, for the log."""
    return printable(name.rfc4514_string(), NAME_LENGTH)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _time(time: datetime.datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
