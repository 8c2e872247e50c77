"""The server's side of TLS.

It needs pyOpenSSL, which comes with ``Twisted[tls]``, so it is imported only when TLS is used.

PostgreSQL documentation: "Secure TCP/IP Connections with SSL"; source ``be-secure-openssl.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509Store, X509StoreFlags
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.python.failure import Failure
from zope.interface import implementer

from walproto.access.certificates import (
    AUTHORITIES,
    CERTIFICATE,
    REVOCATION_LISTS,
    TlsError,
    cannot_load,
    common_name,
    end_point,
    name_of,
    read_certificates,
    read_key,
    read_revocation_lists,
    trouble_with_certificate,
    trouble_with_revocation_list,
)
from walproto.access.files import PathLike
from walproto.access.peer import Tls
from walproto.wire.startup import ALPN

__all__ = ["PROTOCOL_VERSIONS", "ServerTls", "TlsError"]

#: PostgreSQL's names for what may be the oldest version that is spoken.
PROTOCOL_VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}

#: For TLS 1.2: forward secrecy and authenticated encryption only.  TLS 1.3 has nothing else.
CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"

_CODES = SSL.X509VerificationCodes

#: What a client's certificate is refused for, in OpenSSL's words where it is usual, and by the
#: name that OpenSSL has for it where it is not.
VERIFICATION_ERRORS: dict[int, str] = {
    value: name.removeprefix("ERR_").replace("_", " ").lower()
    for name, value in vars(_CODES).items()
    if name.startswith("ERR_")
} | {
    _CODES.ERR_CERT_HAS_EXPIRED: "certificate has expired",
    _CODES.ERR_CERT_NOT_YET_VALID: "certificate is not yet valid",
    _CODES.ERR_CERT_REVOKED: "certificate revoked",
    _CODES.ERR_CERT_SIGNATURE_FAILURE: "certificate signature failure",
    _CODES.ERR_CRL_HAS_EXPIRED: "CRL has expired",
    _CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "self-signed certificate",
    _CODES.ERR_INVALID_PURPOSE: "unsuitable certificate purpose",
    _CODES.ERR_SELF_SIGNED_CERT_IN_CHAIN: "self-signed certificate in certificate chain",
    _CODES.ERR_UNABLE_TO_GET_CRL: "unable to get certificate CRL",
    _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT: "unable to get issuer certificate",
    _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "unable to get local issuer certificate",
}


class ServerTls:
    """TLS as these files have it; ``reload()`` goes by what has become of them.

    ``cert_file`` holds the server's certificate, followed by those of the intermediate authorities
    between it and the one that clients trust; ``key_file`` its key.  With ``ca_file`` clients may
    show a certificate, and one that is shown must be signed by an authority in there; ``crl_file``
    holds what these have revoked.  All are PEM.  ``min_protocol_version`` is one of
    `PROTOCOL_VERSIONS`.  Raises TlsError.

    What a handshake has begun with stays with its connection, whatever is loaded later.
    """

    def __init__(
        self,
        cert_file: PathLike,
        key_file: PathLike,
        ca_file: PathLike | None = None,
        crl_file: PathLike | None = None,
        min_protocol_version: str = "TLSv1.3",
    ) -> None:
        self._files = cert_file, key_file, ca_file, crl_file
        self._min_protocol_version = min_protocol_version
        self.context_factory = self._load()
        """What new connections are encrypted by, for a transport's ``startTLS``."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know of the files in force, though they can be used."""
        return self.context_factory.warnings

    def prepare(self) -> Callable[[], None]:
        """Reads all files anew; what is returned has them used for the handshakes to come.  Raises
        TlsError if any of them cannot be used."""
        loaded = self._load()

        def put_in_force() -> None:
            self.context_factory = loaded

        return put_in_force

    def reload(self) -> None:
        """Reads all files anew, for the handshakes to come; raises TlsError and changes nothing
        if any of them cannot be used."""
        self.prepare()()

    def describe(self, connection: SSL.Connection) -> Tls:
        """What a handshake that is complete has come to."""
        loaded: _Loaded = connection.get_context().get_app_data()
        return Tls(
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            bits=connection.get_cipher_bits() or 0,
            common_name=_common_name(connection),
            end_point=loaded.end_point,
        )

    def alpn(self, connection: SSL.Connection) -> bytes:
        """The application protocol that was agreed upon, empty if the client has named none."""
        return connection.get_alpn_proto_negotiated()

    def reason_of(self, failure: Failure) -> str:
        """Why a handshake has failed, in OpenSSL's words; empty if the connection was just lost."""
        error = failure.value
        # The system's errors (SysCallError) begin with a number.
        if not isinstance(error, SSL.Error) or not error.args or isinstance(error.args[0], int):
            return ""
        reason = _reason(error)
        if reason == "unsupported protocol":
            reason += f": the client speaks no {self._min_protocol_version} or newer"
        return reason

    def _load(self) -> _Loaded:
        cert_file, key_file, ca_file, crl_file = self._files
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(PROTOCOL_VERSIONS[self._min_protocol_version])
        context.set_options(
            SSL.OP_NO_COMPRESSION
            | SSL.OP_NO_RENEGOTIATION
            | SSL.OP_NO_TICKET
            | SSL.OP_CIPHER_SERVER_PREFERENCE
        )
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_cipher_list(CIPHERS)
        context.set_alpn_select_callback(_select_protocol)
        certificate, *chain = read_certificates(CERTIFICATE, cert_file)
        warnings = _use_certificate(context, cert_file, certificate, chain)
        _use_key(context, key_file, cert_file)
        if ca_file is not None:
            _use_authorities(context, ca_file)
        if crl_file is not None:
            warnings += _use_revocation_lists(context, crl_file)
        loaded = _Loaded(context, end_point(certificate), tuple(warnings))
        context.set_app_data(loaded)
        return loaded


@implementer(IOpenSSLServerConnectionCreator)
@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """What was read at one time: it, and no later one, is what a connection's context knows of."""

    context: SSL.Context
    end_point: bytes | None
    warnings: tuple[str, ...]

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        return SSL.Connection(self.context, None)


# --- Files -----------------------------------------------------------------------------------


def _use_certificate(
    context: SSL.Context,
    path: PathLike,
    certificate: x509.Certificate,
    chain: list[x509.Certificate],
) -> list[str]:
    """Returns warnings.  One that has expired is served all the same, as PostgreSQL serves it."""
    try:
        context.use_certificate(certificate)
        for issuer in chain:
            context.add_extra_chain_cert(issuer)
    except SSL.Error as error:
        raise cannot_load(CERTIFICATE, path, _reason(error)) from None
    trouble = trouble_with_certificate(certificate)
    return [f'{CERTIFICATE} file "{path}": {trouble}'] if trouble else []


def _use_key(context: SSL.Context, path: PathLike, cert_file: PathLike) -> None:
    key = read_key(path)
    try:
        context.use_privatekey(key)
        context.check_privatekey()
    except SSL.Error as error:
        raise TlsError(
            f'private key file "{path}" does not go with the certificate in "{cert_file}": '
            f"{_reason(error)}"
        ) from None


def _use_authorities(context: SSL.Context, path: PathLike) -> None:
    """Clients are asked for a certificate, told whose, and need not show one."""
    store = _store(context)
    for authority in read_certificates(AUTHORITIES, path):
        store.add_cert(X509.from_cryptography(authority))
        context.add_client_ca(authority)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_CLIENT_ONCE, _verify)


def _use_revocation_lists(context: SSL.Context, path: PathLike) -> list[str]:
    """Returns warnings.  Every authority in a chain must have a list, and one that is valid."""
    store = _store(context)
    warnings = []
    for crl in read_revocation_lists(path):
        store.add_crl(crl)
        if trouble := trouble_with_revocation_list(crl):
            warnings.append(f'{REVOCATION_LISTS} file "{path}": {trouble}')
    store.set_flags(X509StoreFlags.CRL_CHECK | X509StoreFlags.CRL_CHECK_ALL)
    return warnings


def _store(context: SSL.Context) -> X509Store:
    """What clients' certificates are verified with."""
    store = context.get_cert_store()
    assert store is not None
    return store


# --- Handshakes ------------------------------------------------------------------------------


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    # What a callback raises ends the handshake: here with the alert no_application_protocol.
    raise _handshake_error("no application protocol: the client's (ALPN) are not postgresql")


def _verify(
    connection: SSL.Connection, certificate: X509, error: int, depth: int, preverified: int
) -> bool:
    """Accepts what OpenSSL accepts; of what it does not, says which certificate it is, and why."""
    if preverified:
        return True
    try:
        shown = certificate.to_cryptography()
        names = (
            f'subject "{name_of(shown.subject)}", serial number {shown.serial_number}, '
            f'issuer "{name_of(shown.issuer)}"'
        )
    except Exception:
        # It is a stranger's, and this is for the log only: whatever is odd about it, it is refused.
        names = "a certificate that cannot be read"
    reason = VERIFICATION_ERRORS.get(error, f"error {error}")
    raise _handshake_error(
        f"certificate verify failed: {reason} (at depth {depth}; unverified: {names})"
    )


def _common_name(connection: SSL.Connection) -> str | None:
    """That of the client's certificate; one that does not verify has failed the handshake."""
    try:
        certificate = connection.get_peer_certificate(as_cryptography=True)
    except (ValueError, x509.InvalidVersion):
        return None
    return None if certificate is None else common_name(certificate) or ""


def _handshake_error(reason: str) -> SSL.Error:
    """An error in the form of OpenSSL's own, which Twisted looks into."""
    return SSL.Error([("SSL routines", "", reason)])


def _reason(error: SSL.Error) -> str:
    """The first error of OpenSSL's queue that has a text."""
    queue = error.args[0] if error.args else ()
    return next((reason for _, _, reason in queue if reason), "no SSL error reported")
