"""TLS, passwords and client certificates, with PostgreSQL's own clients: psql, pg_receivewal and a
standby.

Whatever psql says and does of a primary that has the same rules, it says and does of the walsender.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.certificates import Authority, write
from tests.postgres import Process, same_wal, tls_installations
from tests.secured import (
    PASSWORD,
    Secured,
    exchange,
    reload_primary,
    reload_sender,
    secured,
)
from tests.test_receivewal import begin_at, finished, oldest
from tests.test_tap import refusal

RULES = """
hostssl    replication  alice,alicf  all  scram-sha-256
hostnossl  replication  bob          all  scram-sha-256
hostssl    replication  dave         all  cert
hostssl    replication  erin         all  scram-sha-256  clientcert=verify-ca
"""
RIGHT = f"password={PASSWORD}"
ALICE = f"user=alice {RIGHT}"


@dataclass(frozen=True)
class Clients:
    """Both servers, and what their clients have."""

    both: Secured
    root: str
    """By which a client trusts our authority."""
    certificates: dict[str, str]

    def good(self) -> dict[str, str]:
        """Connection strings that either server lets in."""
        certificates, root = self.certificates, self.root
        clients = {
            "disable": f"user=bob {RIGHT} sslmode=disable",
            "allow": f"{ALICE} sslmode=allow",
            "prefer": f"{ALICE} sslmode=prefer",
            "require": f"{ALICE} sslmode=require",
            "verify-ca": f"{ALICE} sslmode=verify-ca {root}",
            "verify-full": f"{ALICE} sslmode=verify-full {root}",
            "channel-binding": f"{ALICE} sslmode=verify-full {root} channel_binding=require",
            "no-channel-binding": f"{ALICE} sslmode=require channel_binding=disable",
            "certificate": f"user=dave sslmode=verify-full {root} {certificates['dave']}",
            "both": f"user=erin {RIGHT} sslmode=verify-full {root} {certificates['alice']}",
        }
        if self.both.major >= 17:
            direct = f"sslmode=verify-full {root} sslnegotiation=direct"
            clients["direct"] = f"{ALICE} {direct} channel_binding=require"
            clients["direct-certificate"] = f"user=dave {direct} {certificates['dave']}"
        return clients


@pytest.fixture(
    scope="module",
    params=tls_installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    many = ("--max-wal-senders", "20")
    with secured(request.param, RULES, *many, max_wal_senders="20") as both:
        certificates = both.certificates(["alice", "dave"])
        yield Clients(both, f"sslrootcert={both.ca_file}", certificates)
        assert PASSWORD not in both.sender.output


def authorized(user: str, method: str, tls: str) -> str:
    """What the walsender's log says of a client that it has let in."""
    encryption = rf" SSL enabled \(protocol={re.escape(tls)}, " if tls else "$"
    return rf"replication connection authorized: user={user} method={method} \(\S+\){encryption}"


# -- Who gets in ---------------------------------------------------------------------------------


def test_psql_is_let_in(clients: Clients) -> None:
    sender = clients.both.sender
    for name, client in clients.good().items():
        assert clients.both.ask(client).is_let_in, name
        user = client.split()[0].removeprefix("user=")
        method = "cert" if user == "dave" else "scram-sha-256"
        sender.expect(authorized(user, method, "" if user == "bob" else "TLSv1.3"))


def test_the_messages_are_those_of_the_primary(clients: Clients) -> None:
    """Among them the server's own proof, without which libpq lets a server pass too."""
    for client in ("require", "no-channel-binding", "disable", "channel-binding"):
        told = clients.both.exchange(clients.good()[client])
        assert told[-3:] == ["B AuthenticationSASLFinal", "B BackendKeyData", "B ReadyForQuery"]


def test_pg_receivewal_gets_every_byte(clients: Clients) -> None:
    """All of them at once: what there is, and what is written meanwhile."""
    both = clients.both
    primary = both.primary
    primary.sql("SELECT pg_logical_emit_message(false, '', repeat('x', 3000000))")
    receivers: dict[str, Process] = {}
    for name, client in clients.good().items():
        directory = both.space.directory(f"received-{name}")
        begin_at(both.space, directory, oldest(primary.wal_dir))
        conninfo = both.conninfo(client, both.sender.port)
        options = ("-D", directory, "-d", conninfo, "-w", "-v", "--no-loop")
        receivers[name] = both.space.add(both.installation.start("pg_receivewal", *options))
    for receiver in receivers.values():
        receiver.expect("starting log streaming")
    primary.sql("SELECT pg_logical_emit_message(true, '', repeat('y', 2000000))")
    end = primary.switch_wal()
    last = primary.sql(f"SELECT pg_walfile_name('{end}'::pg_lsn - 1)")
    for name, receiver in receivers.items():
        receiver.expect(finished(end))
        receiver.interrupt()
        assert receiver.wait() == 0
        names = same_wal(primary.wal_dir, both.space.path / f"received-{name}")
        assert (names[0], names[-1]) == (oldest(primary.wal_dir), last)


def test_a_standby_streams(clients: Clients) -> None:
    """One that is told, again and again, to connect in another way."""
    both = clients.both
    primary, sender = both.primary, both.sender
    primary.sql("CREATE TABLE seen (name text)")
    standby = both.space.add(primary.backup_to(both.space.path / "standby"))
    standby.configure(archive_mode="off")
    for name, client in clients.good().items():
        conninfo = f"{both.conninfo(client, sender.port)} application_name={name}"
        if standby.log_text():
            standby.configure(primary_conninfo=conninfo)
            standby.reload()
        else:
            standby.make_standby(conninfo).start()
        sender.expect(rf'"{name}" \(pid \d+, .*\) streams from')
        primary.sql(f"INSERT INTO seen VALUES ('{name}')")
        standby.wait_until(f"EXISTS (SELECT FROM seen WHERE name = '{name}')")
        assert standby.sql("SELECT status FROM pg_stat_wal_receiver") == "streaming"
    standby.stop()
    assert primary.sql("SELECT count(*) FROM pg_stat_replication") == "0"


# -- Who does not --------------------------------------------------------------------------------


def test_psql_is_refused(clients: Clients) -> None:
    both, certificates = clients.both, clients.certificates
    wrong = write(both.space.path / "wrong.crt", Authority().pem)
    refused = {
        f"{ALICE} sslmode=disable": (
            'FATAL:  no pg_hba.conf entry for replication connection from host "127.0.0.1", '
            'user "alice", no encryption'
        ),
        f"user=bob {RIGHT} sslmode=require": (
            'FATAL:  no pg_hba.conf entry for replication connection from host "127.0.0.1", '
            'user "bob", SSL encryption'
        ),
        f"user=bob {RIGHT} sslmode=disable channel_binding=require": "channel binding",
        "user=alice sslmode=require": "no password supplied",
        "user=alice sslmode=require password=wrong": (
            'FATAL:  password authentication failed for user "alice"'
        ),
        "user=alice sslmode=require password=wrong channel_binding=require": (
            'FATAL:  password authentication failed for user "alice"'
        ),
        f"{ALICE} sslmode=verify-ca sslrootcert={wrong}": "SSL error: certificate verify failed",
        f"{ALICE} sslmode=verify-full {clients.root} host=example.org hostaddr=127.0.0.1": (
            'server certificate for "localhost" (and 1 other name) does not match host name '
            '"example.org"'
        ),
        f"{ALICE} sslmode=require ssl_max_protocol_version=TLSv1.2": "alert protocol version",
        "user=dave sslmode=require": "FATAL:  connection requires a valid client certificate",
        f"user=dave sslmode=require {certificates['alice']}": (
            'FATAL:  certificate authentication failed for user "dave"'
        ),
        f"user=dave sslmode=require {certificates['dave']} channel_binding=require": (
            "channel binding required, but server authenticated client without channel binding"
        ),
        f"user=erin {RIGHT} sslmode=require": (
            "FATAL:  connection requires a valid client certificate"
        ),
        f"user=erin password=wrong sslmode=require {certificates['alice']}": (
            'FATAL:  password authentication failed for user "erin"'
        ),
    }
    if both.major >= 17:
        refused[f"{ALICE} sslmode=disable sslnegotiation=direct"] = "weak sslmode"
        refused[f"{ALICE} sslmode=require require_auth=password"] = "server requested SASL"
        refused["user=alice password=wrong sslmode=require sslnegotiation=direct"] = (
            'FATAL:  password authentication failed for user "alice"'
        )
    for client, told in refused.items():
        answer = both.ask(client)
        assert answer.code == 2, client
        assert told in answer.output, client


def test_an_unknown_user_and_a_wrong_password_are_the_same(clients: Clients) -> None:
    """The same messages, as long as each other, and the same words; from either server."""
    both = clients.both
    client = "user=alice password=wrong sslmode=require"
    assert both.exchange(client)[-1] == (
        'B ErrorResponse FATAL|28P01|password authentication failed for user "alice"'
    )
    for port in (both.primary.port, both.sender.port):
        conninfo = both.conninfo(client, port)
        unknown = exchange(conninfo.replace("alice", "alicf"))
        assert [line.replace("alicf", "alice") for line in unknown] == exchange(conninfo)


def test_who_is_refused_is_gone_at_once(clients: Clients) -> None:
    """It takes no place from those who come next."""
    both = clients.both
    sender = both.another(*both.access_options, "--max-unauthenticated-per-address", "3")
    for _ in range(10):
        answer = both.psql("user=alice password=wrong sslmode=require", sender.port)
        assert "password authentication failed" in answer.output
        answer = both.psql("user=dave sslmode=require", sender.port)
        assert "connection requires a valid client certificate" in answer.output
    sender.check_log()


# -- Certificates that are no good ---------------------------------------------------------------

LOST = "Connection reset|closed the connection"
"""A client of TLS 1.3 goes on before its certificate is looked at, and may so miss the answer."""


def test_a_client_certificate_that_is_no_good(clients: Clients) -> None:
    both = clients.both
    expired = both.certificate(both.authority.client("dave", expired=True), "expired")
    foreign = both.certificate(Authority("Test CA").client("dave"), "foreign")
    for certificate, told, reason in (
        (expired, "alert certificate expired", "certificate has expired"),
        (foreign, "alert unknown ca", "unable to get local issuer certificate"),
    ):
        for port in (both.primary.port, both.sender.port):
            answer = both.psql(f"user=dave sslmode=require {certificate}", port)
            assert answer.code == 2
            assert re.search(f"{told}|{LOST}", answer.output)
        both.sender.expect(f"could not accept SSL connection: .*{reason}")


def test_certificates_are_revoked_by_a_new_ca_file(clients: Clients) -> None:
    """Who is there stays, and streams."""
    both = clients.both
    ca = write(both.space.path / "replaced.crt", both.authority.pem)
    sender = both.another(*both.access_options, "--ssl-ca-file", str(ca))
    dave = f"user=dave sslmode=require {clients.certificates['dave']}"
    assert both.psql(dave, sender.port).is_let_in
    directory = both.space.directory("revoked")
    options = ("-D", directory, "-d", both.conninfo(dave, sender.port), "-w", "-v", "--no-loop")
    receiver = both.space.add(both.installation.start("pg_receivewal", *options))
    receiver.expect("starting log streaming")

    successor = Authority("Test CA 2")
    write(ca, successor.pem)
    reload_sender(sender)
    answer = both.psql(dave, sender.port)
    assert answer.code == 2
    assert re.search(f"alert unknown ca|{LOST}", answer.output)
    new = both.certificate(successor.client("dave"), "successor")
    assert both.psql(f"user=dave sslmode=require {new}", sender.port).is_let_in
    receiver.expect(finished(both.primary.switch_wal()))
    sender.check_log()


def test_a_certificate_is_revoked_by_a_new_crl_file(clients: Clients) -> None:
    both = clients.both
    dave = both.authority.client("dave")
    crl = write(both.space.path / "revoked.crl", both.authority.crl())
    sender = both.another(*both.access_options, "--ssl-crl-file", str(crl))
    client = f"user=dave sslmode=require {both.certificate(dave, 'to-be-revoked')}"
    assert both.psql(client, sender.port).is_let_in
    write(crl, both.authority.crl(dave))
    reload_sender(sender)
    answer = both.psql(client, sender.port)
    assert answer.code == 2
    assert re.search(f"alert certificate revoked|{LOST}", answer.output)
    sender.expect("could not accept SSL connection: .*certificate revoked")
    other = f"user=dave sslmode=require {clients.certificates['dave']}"
    assert both.psql(other, sender.port).is_let_in
    sender.check_log()


# -- The server's options ------------------------------------------------------------------------


def test_tls_1_2_is_spoken_if_it_is_asked_for(clients: Clients) -> None:
    both = clients.both
    sender = both.another(*both.access_options, "--ssl-min-protocol-version=TLSv1.2")
    for client in (
        f"{ALICE} sslmode=verify-full {clients.root} channel_binding=require",
        f"user=dave sslmode=require {clients.certificates['dave']}",
    ):
        user = client.split()[0].removeprefix("user=")
        for version in ("TLSv1.2", "TLSv1.3"):
            bounds = f"ssl_min_protocol_version={version} ssl_max_protocol_version={version}"
            assert both.psql(f"{client} {bounds}", sender.port).is_let_in
            sender.expect(authorized(user, "(cert|scram-sha-256)", version))
    sender.check_log()


def test_a_key_that_others_may_read_is_refused(clients: Clients) -> None:
    """In the words of the primary, which goes on with the key that it has."""
    both = clients.both
    theirs = both.primary.directory / "server.key"
    theirs.chmod(0o644)
    reload_primary(both.primary)
    both.primary.expect_log('private key file "server.key" has group or world access')
    (permissions,) = both.primary.expect_log(r"DETAIL:  (File must have permissions .*)").groups()
    theirs.chmod(0o600)
    ours = write(both.space.path / "open.key", (both.space.path / "ours/server.key").read_bytes())
    options = ("--wal-dir", str(both.primary.wal_dir), *both.access_options)
    for mode in (0o604, 0o660):
        ours.chmod(mode)
        told = refusal(*options, "--ssl-key-file", ours)
        assert told == f'private key file "{ours}" has group or world access. {permissions}'
