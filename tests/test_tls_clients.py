"""Certificates of clients: asked for, verified if shown, and never believed otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from tests.certificates import DAY, Authority, Identity, as_pem, new_key, now, write
from tests.handshakes import Handshake, Server, a_client, shake
from walproto.access.certificates import NAME_LENGTH
from walproto.access.tls import ServerTls

VERSIONS = ("TLSv1.2", "TLSv1.3")
OURS = Authority("Our CA")
THEIRS = Authority("Their CA")
#: Of the same name as ours, but of another key.
NOT_OURS = Authority("Our CA")


class Place:
    """A directory with a server's files, and with those of clients."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = OURS.server().write(path, "server")
        self.ca = write(path / "ca.crt", OURS.pem)
        self.crl = path / "crl.pem"

    def revoke(self, *lists: bytes) -> Path:
        return write(self.crl, b"".join(lists))

    def tls(self, *, crl: bool = False) -> ServerTls:
        return ServerTls(
            *self.files, self.ca, self.crl if crl else None, min_protocol_version="TLSv1.2"
        )

    def shows(self, tls: ServerTls, identity: Identity, version: str = "TLSv1.3") -> Handshake:
        """A client connects that shows this certificate."""
        files = identity.write(self.path, "client")
        return shake(tls, a_client(version, shows=files))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def refused(handshake: Handshake) -> str:
    """Why the handshake was refused, without the certificate's names."""
    assert not handshake.server.session.is_encrypted
    assert handshake.alert
    reason, names = (handshake.server.refusal or "").split(" (at depth ")
    assert "unverified: " in names
    return reason.removeprefix("certificate verify failed: ")


# --- Who is let in ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_may_show_a_certificate(place: Place, version: str) -> None:
    handshake = place.shows(place.tls(), OURS.client("alice"), version)
    assert handshake.server.described.common_name == "alice"
    assert handshake.ask(b"?", b"!") == (b"?", b"!")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_need_not_show_one(place: Place, version: str) -> None:
    handshake = shake(place.tls(), a_client(version))
    assert handshake.server.described.common_name is None
    assert handshake.ask(b"?", b"!") == (b"?", b"!")


@pytest.mark.parametrize("version", VERSIONS)
def test_nobody_is_asked_for_one_without_authorities(place: Place, version: str) -> None:
    tls = ServerTls(*place.files, min_protocol_version="TLSv1.2")
    handshake = place.shows(tls, THEIRS.client("alice"), version)
    assert handshake.server.described.common_name is None
    assert handshake.server.connection.get_peer_certificate(as_cryptography=True) is None


def test_an_intermediate_authority_is_trusted_through_the_root(place: Place) -> None:
    handshake = place.shows(place.tls(), OURS.authority("Near").client("bob", "RSA"))
    assert handshake.server.described.common_name == "bob"


def test_clients_are_told_whose_certificates_are_accepted(place: Place) -> None:
    write(place.ca, OURS.pem + THEIRS.pem)
    server = Server(place.tls())
    client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    client.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        client.do_handshake()
    client.bio_write(server.exchange(client.bio_read(1 << 16)))
    client.do_handshake()
    assert client.get_client_ca_list(as_cryptography=True) == [OURS.name, THEIRS.name]


# --- Who is not ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("identity", "alert", "reason"),
    [
        (THEIRS.client("alice"), "unknown ca", "unable to get local issuer certificate"),
        (
            Authority("Our CA").client("alice"),
            "unknown ca",
            "unable to get local issuer certificate",
        ),
        (OURS.client("alice", expired=True), "certificate expired", "certificate has expired"),
        (OURS.server(), "unsupported certificate", "unsuitable certificate purpose"),
    ],
)
def test_a_certificate_that_does_not_verify_is_refused(
    place: Place, version: str, identity: Identity, alert: str, reason: str
) -> None:
    handshake = place.shows(place.tls(), identity, version)
    assert refused(handshake) == reason
    assert f"alert {alert}" in handshake.alert


def test_a_self_signed_certificate_is_refused(place: Place) -> None:
    alice = Authority("alice")
    shown = Identity(alice.certificate, alice.key)
    assert refused(place.shows(place.tls(), shown)) == "self-signed certificate"


def test_an_expired_server_certificate_keeps_no_client_with_a_good_one_out(place: Place) -> None:
    """Whether to go on is then for the client to say, as it is with PostgreSQL."""
    OURS.server(expired=True).write(place.path, "server")
    tls = place.tls()
    files = OURS.client("alice").write(place.path, "client")
    assert shake(tls, a_client(shows=files)).server.described.common_name == "alice"
    handshake = shake(tls, a_client(shows=files, trusts=OURS.pem))
    assert handshake.alert == "certificate verify failed"
    assert "alert certificate expired" in (handshake.server.refusal or "")


def test_a_refused_certificate_is_named_in_the_log(place: Place) -> None:
    """Whatever it calls itself, it is one short line."""
    name = "a" * NAME_LENGTH
    shown = Authority(name).client("eve\r\n\x1b[2J\u202e")
    assert place.shows(place.tls(), shown).server.refusal == (
        "certificate verify failed: unable to get local issuer certificate (at depth 0; "
        'unverified: subject "CN=eve\\r\\n\\x1b[2J\\u202e", '
        f'serial number {shown.certificate.serial_number}, issuer "CN={name[3:]}...")'
    )


def test_a_refused_certificate_may_be_unreadable(place: Place) -> None:
    """Its version is one that does not exist."""
    client = THEIRS.client("eve")
    version = bytes.fromhex("a003020102")
    assert client.der.count(version) == 1
    files = client.write(place.path, "client")
    write(files.certificate, as_pem(client.der.replace(version, bytes.fromhex("a003020105"))))
    handshake = shake(place.tls(), a_client(shows=files))
    assert "alert unknown ca" in handshake.alert
    assert "unverified: a certificate that cannot be read" in (handshake.server.refusal or "")


# --- Common names ----------------------------------------------------------------------------


def named(*names: str) -> Identity:
    """A client's certificate with these CNs."""
    key = new_key("P-256")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    certificate = OURS.signed(subject, key, [], now() - DAY, now() + DAY)
    return Identity(certificate, key)


@pytest.mark.parametrize(
    ("names", "common_name"),
    [
        (["alice"], "alice"),
        (["Zoë van der Berg"], "Zoë van der Berg"),
        (["alice", "bob"], "alice"),
        ([], ""),
        (["alice\0bob"], ""),
        (["alice\nbob"], ""),
    ],
)
def test_only_a_plain_common_name_counts(place: Place, names: list[str], common_name: str) -> None:
    handshake = place.shows(place.tls(), named(*names))
    assert handshake.server.described.common_name == common_name


# --- New authorities, and revocation ---------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_is_revoked(place: Place, version: str) -> None:
    alice, bob = OURS.client("alice"), OURS.client("bob")
    place.revoke(OURS.crl())
    tls = place.tls(crl=True)
    connected = place.shows(tls, alice, version)
    assert connected.server.described.common_name == "alice"
    place.revoke(OURS.crl(alice))
    tls.reload()
    handshake = place.shows(tls, alice, version)
    assert refused(handshake) == "certificate revoked"
    assert "alert certificate revoked" in handshake.alert
    assert place.shows(tls, bob, version).server.described.common_name == "bob"
    # She who was there before stays.
    assert connected.ask(b"?", b"!") == (b"?", b"!")


def test_every_authority_needs_a_list(place: Place) -> None:
    near = OURS.authority("Near")
    alice, bob = near.client("alice"), near.client("bob")
    place.revoke(OURS.crl())
    tls = place.tls(crl=True)
    assert refused(place.shows(tls, alice)) == "unable to get certificate CRL"
    place.revoke(OURS.crl(), near.crl(bob))
    tls.reload()
    assert place.shows(tls, alice).server.described.common_name == "alice"
    assert refused(place.shows(tls, bob)) == "certificate revoked"
    place.revoke(OURS.crl(Identity(near.certificate, near.key)), near.crl())
    tls.reload()
    assert refused(place.shows(tls, alice)) == "certificate revoked"


def test_a_revocation_list_of_another_authority_is_none(place: Place) -> None:
    alice = OURS.client("alice")
    place.revoke(NOT_OURS.crl())
    assert refused(place.shows(place.tls(crl=True), alice)) in (
        "unable to get certificate CRL",
        "crl signature failure",
    )


def test_an_outdated_revocation_list_lets_nobody_in(place: Place) -> None:
    place.revoke(OURS.crl(ended=True))
    tls = place.tls(crl=True)
    (warning,) = tls.warnings
    assert warning.startswith(
        f'SSL certificate revocation list file "{place.crl}": the list of "CN=Our CA" '
        "has expired at "
    )
    assert refused(place.shows(tls, OURS.client("alice"))) == "CRL has expired"
    # It is about those alone who show a certificate.
    assert shake(tls, a_client()).server.described.common_name is None


def test_the_authority_is_replaced(place: Place) -> None:
    ours, theirs = OURS.client("alice"), THEIRS.client("bob")
    tls = place.tls()
    connected = place.shows(tls, ours)
    write(place.ca, THEIRS.pem)
    tls.reload()
    assert refused(place.shows(tls, ours)) == "unable to get local issuer certificate"
    assert place.shows(tls, theirs).server.described.common_name == "bob"
    assert connected.server.described.common_name == "alice"
    assert connected.ask(b"?", b"!") == (b"?", b"!")
