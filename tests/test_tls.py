"""TLS handshakes: what is agreed upon, what is refused and why; new files while clients stay."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher

from tests.certificates import Authority, Digest, Files, Identity, Kind, as_pem, self_signed, write
from tests.handshakes import Server, a_client, shake
from walproto.access.peer import Tls
from walproto.access.tls import ServerTls, TlsError

VERSIONS = ("TLSv1.2", "TLSv1.3")
OURS = Authority("Our CA")
THEIRS = Authority("Their CA")


@pytest.fixture(autouse=True)
def nothing_is_logged() -> Iterator[None]:
    """A failed handshake is told in one line by whoever asks for it; Twisted has nothing to add."""
    events: list[LogEvent] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield
    globalLogPublisher.removeObserver(observer)
    assert [event["log_failure"] for event in events if "log_failure" in event] == []


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return OURS.server().write(tmp_path, "server")


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return write(tmp_path / "ca.crt", OURS.pem)


# --- Versions, ciphers, protocols ------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_verifies_all_is_served(files: Files, version: str) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    handshake = shake(tls, a_client(version, trusts=OURS.pem))
    assert handshake.ask(b"a question", b"an answer") == (b"a question", b"an answer")
    name, _, bits = handshake.client.cipher() or ("", "", 0)
    end_point = hashlib.sha256(handshake.served or b"").digest()
    assert handshake.server.described == Tls(version, name, bits, end_point=end_point)
    assert handshake.server.refusal is None


def test_tls_1_2_is_spoken_only_when_it_was_asked_for(files: Files) -> None:
    handshake = shake(ServerTls(*files), a_client("TLSv1.2"))
    assert "alert protocol version" in handshake.alert
    assert handshake.server.refusal == (
        "unsupported protocol: the client speaks no TLSv1.3 or newer"
    )


def test_older_versions_are_not_spoken(files: Files) -> None:
    client = a_client("TLSv1.2", ciphers="ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        client.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    handshake = shake(ServerTls(*files, min_protocol_version="TLSv1.2"), client)
    assert "alert protocol version" in handshake.alert
    assert (handshake.server.refusal or "").startswith("unsupported protocol")


@pytest.mark.parametrize(
    "ciphers", ["AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-SHA384", "ECDHE-ECDSA-AES128-SHA"]
)
def test_weak_ciphers_are_not_spoken(files: Files, ciphers: str) -> None:
    """One without forward secrecy, and two that encrypt and authenticate one after the other."""
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    handshake = shake(tls, a_client("TLSv1.2", ciphers=ciphers))
    assert "alert handshake failure" in handshake.alert
    assert handshake.server.refusal == "no shared cipher"


def test_the_server_chooses_among_the_clients_ciphers(files: Files) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    weak_first = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384"
    handshake = shake(tls, a_client("TLSv1.2", ciphers=weak_first))
    assert handshake.server.described.cipher == "ECDHE-ECDSA-AES256-GCM-SHA384"


@pytest.mark.parametrize("version", VERSIONS)
def test_no_session_is_resumed(files: Files, version: str) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    client = a_client(version)
    first = shake(tls, client)
    first.ask(b"a question", b"the answer, and before it any ticket")
    session = first.client.session
    assert session is not None
    if version == "TLSv1.2":
        assert (session.has_ticket, session.id) == (False, b"")
    again = shake(tls, client, session)
    assert again.ask(b"?", b"!") == (b"?", b"!")
    assert not again.client.session_reused


def test_a_client_cannot_renegotiate(files: Files) -> None:
    server = Server(ServerTls(*files, min_protocol_version="TLSv1.2"))
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    client = SSL.Connection(context, None)
    client.set_connect_state()

    def handshake() -> None:
        while True:
            try:
                client.do_handshake()
                return
            except SSL.WantReadError:
                answer = server.exchange(client.bio_read(1 << 16))
                assert answer, server.refusal
                client.bio_write(answer)

    handshake()
    assert server.described.version == "TLSv1.2"
    assert client.renegotiate()
    with pytest.raises(SSL.Error, match="no renegotiation"):
        handshake()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("offered", "selected"),
    [(None, None), (["postgresql"], "postgresql"), (["h2", "postgresql", "x"], "postgresql")],
)
def test_the_application_protocol_is_postgresql(
    files: Files, version: str, offered: list[str] | None, selected: str | None
) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    handshake = shake(tls, a_client(version, protocols=offered))
    assert handshake.client.selected_alpn_protocol() == selected
    assert tls.alpn(handshake.server.connection) == (selected or "").encode()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_of_another_application_protocol_is_refused(files: Files, version: str) -> None:
    tls = ServerTls(*files, min_protocol_version="TLSv1.2")
    handshake = shake(tls, a_client(version, protocols=["h2", "postgresql2"]))
    assert "alert no application protocol" in handshake.alert
    assert (handshake.server.refusal or "").startswith("no application protocol")
    # The next one does not suffer from it.
    assert shake(tls, a_client(version, protocols=["postgresql"])).server.described


# --- Handshakes that fail --------------------------------------------------------------------


def test_a_client_that_does_not_trust_us_goes(files: Files) -> None:
    handshake = shake(ServerTls(*files), a_client(trusts=THEIRS.pem))
    assert handshake.alert == "certificate verify failed"
    assert "alert unknown ca" in (handshake.server.refusal or "")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "http request"),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", "wrong version number"),
    ],
)
def test_what_is_no_tls_is_refused(files: Files, sent: bytes, reason: str) -> None:
    server = Server(ServerTls(*files))
    server.exchange(sent)
    assert server.refusal == reason


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
def test_a_client_that_just_goes_needs_no_reason(files: Files, sent: bytes) -> None:
    server = Server(ServerTls(*files))
    server.exchange(sent)
    server.lose()
    assert server.refusal == ""


# --- Channel binding -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "digest", "pss", "hash_name"),
    [
        ("RSA", hashes.SHA256(), False, "sha256"),
        ("RSA", hashes.SHA384(), False, "sha384"),
        ("RSA", hashes.SHA256(), True, "sha256"),
        ("RSA", hashes.SHA384(), True, "sha384"),
        ("P-256", hashes.SHA256(), False, "sha256"),
        ("P-256", hashes.SHA512(), False, "sha512"),
        ("Ed25519", None, False, None),
    ],
)
def test_the_end_point_is_the_hash_that_the_certificate_is_signed_with(
    tmp_path: Path, kind: Kind, digest: Digest | None, pss: bool, hash_name: str | None
) -> None:
    identity = self_signed(kind, digest=digest, pss=pss)
    tls = ServerTls(*identity.write(tmp_path, "server"))
    handshake = shake(tls, a_client(trusts=identity.pem))
    assert handshake.served == identity.der
    end_point = handshake.server.described.end_point
    assert end_point == (hash_name and hashlib.new(hash_name, identity.der).digest())


@pytest.mark.parametrize("weak", ["md5WithRSAEncryption", "sha1WithRSAEncryption"])
def test_a_weak_hash_is_replaced_by_sha_256(tmp_path: Path, weak: str) -> None:
    """Nobody signs so any longer, so the name of the algorithm is put in afterwards (which spoils
    the signature)."""
    names = {
        "md5WithRSAEncryption": "2a864886f70d010104",
        "sha1WithRSAEncryption": "2a864886f70d010105",
        "sha256WithRSAEncryption": "2a864886f70d01010b",
    }
    identity = self_signed("RSA")
    strong = bytes.fromhex(names["sha256WithRSAEncryption"])
    assert identity.der.count(strong) == 2
    der = identity.der.replace(strong, bytes.fromhex(names[weak]))
    files = identity.write(tmp_path, "server")
    write(files.certificate, as_pem(der))
    handshake = shake(ServerTls(*files), a_client())
    assert handshake.served == der
    assert handshake.server.described.end_point == hashlib.sha256(der).digest()


# --- New files -------------------------------------------------------------------------------


def test_new_certificates_are_for_new_connections(tmp_path: Path) -> None:
    """From RSA to P-256, under the same names, signed with another hash."""
    old = self_signed("RSA", digest=hashes.SHA384())
    tls = ServerTls(*old.write(tmp_path, "server"))
    client = a_client()
    before = shake(tls, client)
    # One that has begun, but has got no further.
    begun = Server(tls)
    new = self_signed("P-256")
    new.write(tmp_path, "server")
    tls.reload()
    after = shake(tls, client)
    assert (before.served, after.served) == (old.der, new.der)
    assert before.ask(b"still", b"here") == (b"still", b"here")
    assert before.server.described.end_point == hashlib.sha384(old.der).digest()
    assert after.server.described.end_point == hashlib.sha256(new.der).digest()
    assert tls.describe(begun.connection).end_point == hashlib.sha384(old.der).digest()


def test_what_cannot_be_used_leaves_the_old_in_force(tmp_path: Path) -> None:
    """Each of the files, one after the other, while the other files are good and new."""
    old, new = OURS.server(), OURS.server()
    alice = OURS.client("alice").write(tmp_path, "alice")
    names = (
        tmp_path / "server.crt",
        tmp_path / "server.key",
        tmp_path / "ca.crt",
        tmp_path / "crl.pem",
    )
    for damaged in names:
        old.write(tmp_path, "server")
        write(tmp_path / "ca.crt", OURS.pem)
        write(tmp_path / "crl.pem", OURS.crl())
        tls = ServerTls(*names)
        new.write(tmp_path, "server")
        write(tmp_path / "ca.crt", THEIRS.pem)
        write(tmp_path / "crl.pem", THEIRS.crl())
        write(damaged, b"damaged\n", mode=0o600)
        for _ in range(2):
            with pytest.raises(TlsError) as caught:
                tls.reload()
            assert f'"{damaged}"' in str(caught.value)
            handshake = shake(tls, a_client(trusts=OURS.pem, shows=alice))
            assert handshake.served == old.der
            assert handshake.server.described.common_name == "alice"


def test_a_key_that_was_not_renewed_with_its_certificate_is_noticed(tmp_path: Path) -> None:
    old, new = OURS.server(), OURS.server()
    files = old.write(tmp_path, "server")
    tls = ServerTls(*files)
    write(files.certificate, new.pem)
    with pytest.raises(TlsError) as caught:
        tls.reload()
    assert str(caught.value) == (
        f'private key file "{files.key}" does not go with the certificate in '
        f'"{files.certificate}": key values mismatch'
    )
    assert shake(tls, a_client()).served == old.der
    write(files.key, new.key_pem, mode=0o600)
    tls.reload()
    assert shake(tls, a_client()).served == new.der


def test_the_whole_chain_is_sent(tmp_path: Path) -> None:
    identity: Identity = OURS.authority("Near the root").authority("Far from it").server("RSA")
    assert len(identity.chain) == 2
    tls = ServerTls(*identity.write(tmp_path, "server"))
    assert shake(tls, a_client(trusts=OURS.pem)).server.described
