"""SCRAM compared with PostgreSQL: every conversation had with a real server, and the secrets of one
side used on the other."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import struct
import unicodedata
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.certificates import Authority
from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    installations,
    tls_installations,
    workspace,
)
from tests.relays import seeded
from tests.scram_conversations import (
    BINDING,
    CHALLENGE,
    CONVERSATIONS,
    FINAL,
    GOOD,
    OFFER,
    OFFER_PLUS,
    PASSWORD,
    VERIFIER,
    WRONG_PASSWORD,
    Answer,
    Client,
    converse,
    final,
    shown,
)
from walproto.access.scram import Verifier, authenticate

HBA = """
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""
PASSWORDS = {
    "ascii": "correct horse",
    "quotes": 'it\'s "one" \\ two',
    "composed": "\u00e9t\u00e9",
    "decomposed": "e\u0301te\u0301",
    "spaces": "a\u00a0b\u200bc",
    "prohibited": "\u00e9\U0001f600",
    "mixed": "\u05d0a",
    "long": "x" * 500,
}


def secret(verifier: Verifier) -> str:
    """As PostgreSQL stores it."""
    salt, stored_key, server_key = (
        b64encode(each).decode()
        for each in (verifier.salt, verifier.stored_key, verifier.server_key)
    )
    return f"SCRAM-SHA-256${verifier.iterations}:{salt}${stored_key}:{server_key}"


# --- A real server, and a raw connection to it ---------------------------------------------------


@contextmanager
def serving(installation: Installation) -> Iterator[Cluster]:
    """A server that wants passwords of everybody but us; the user alice has that of VERIFIER."""
    with workspace() as space:
        cluster = space.cluster(installation, "server").init()
        space.file(cluster.directory / "pg_hba.conf", HBA.encode())
        if installation in tls_installations():
            files = Authority().server().write(cluster.directory, "server", space)
            cluster.configure(
                ssl="on", ssl_cert_file=str(files.certificate), ssl_key_file=str(files.key)
            )
        cluster.start()
        cluster.sql(f"CREATE ROLE alice LOGIN PASSWORD '{secret(VERIFIER)}'")
        yield cluster


@pytest.fixture(scope="module")
def newest() -> Iterator[Cluster]:
    with serving(installations()[0]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def with_tls() -> Iterator[Cluster]:
    with serving(tls_installations()[0]) as cluster:
        yield cluster


def certificate_of(connection: ssl.SSLSocket) -> bytes:
    certificate = connection.getpeercert(binary_form=True)
    assert certificate
    return certificate


def connected(cluster: Cluster, *, over_tls: bool) -> tuple[socket.socket, bytes | None]:
    """A connection, and what it can be bound to."""
    plain = socket.create_connection((HOST, cluster.port), timeout=30)
    if not over_tls:
        return plain, None
    plain.sendall(struct.pack(">II", 8, 80877103))
    assert plain.recv(1) == b"S"
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = context.wrap_socket(plain)
    return connection, hashlib.sha256(certificate_of(connection)).digest()


def received(connection: socket.socket) -> tuple[bytes, bytes]:
    """One message: its type byte, its contents."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = connection.recv(size - len(data))
            assert chunk, "the server has closed the connection"
            data += chunk
        return data

    tag, length = struct.unpack(">cI", exactly(5))
    return tag, exactly(length - 4)


def error_in_words(contents: bytes) -> str:
    fields = {field[:1]: field[1:].decode() for field in contents.split(b"\0") if field}
    assert b"H" not in fields
    detail = f" ({fields[b'D']})" if b"D" in fields else ""
    return f"{fields[b'S']} {fields[b'C']}: {fields[b'M']}{detail}"


def theirs(
    cluster: Cluster, answers: list[Answer], *, user: str = "alice", over_tls: bool = False
) -> list[str]:
    """What PostgreSQL tells a client."""
    connection, end_point = connected(cluster, over_tls=over_tls)
    client = Client(end_point)
    messages: list[str] = []
    left = list(answers)
    said = b""
    with closing(connection):
        packet = struct.pack(">I", 3 << 16) + b"user\0%b\0database\0postgres\0\0" % user.encode()
        connection.sendall(struct.pack(">I", len(packet) + 4) + packet)
        while True:
            tag, contents = received(connection)
            if tag == b"E":
                return [*messages, error_in_words(contents)]
            assert tag == b"R"
            (status,) = struct.unpack(">I", contents[:4])
            messages.append(shown(client, status, contents[4:], said))
            if status == 0 or (status in (10, 11) and not left):
                return messages
            if status in (10, 11):
                answer = left.pop(0)
                said = answer if isinstance(answer, bytes) else answer(client)
                connection.sendall(b"p" + struct.pack(">I", len(said) + 4) + said)


# --- The conversations ---------------------------------------------------------------------------


def test_postgresql_tells_a_client_the_same(newest: Cluster) -> None:
    told = {name: theirs(newest, answers) for name, (answers, _) in CONVERSATIONS.items()}
    assert told == {name: [OFFER, *expected] for name, (_, expected) in CONVERSATIONS.items()}


def test_so_it_does_with_channel_binding(with_tls: Cluster) -> None:
    told = {
        name: theirs(with_tls, answers, over_tls=True) for name, (answers, _) in BINDING.items()
    }
    assert told == {name: [OFFER_PLUS, *expected] for name, (_, expected) in BINDING.items()}


def test_an_unknown_user_is_told_what_one_with_a_wrong_password_is(newest: Cluster) -> None:
    newest.sql("CREATE ROLE nologin PASSWORD 'x'; CREATE ROLE nopassword LOGIN")
    wrong: list[Answer] = [GOOD[0], final(FINAL, "wrong")]
    for user in ("nobody", "nopassword", "\u00e9ve"):
        expected = [OFFER, CHALLENGE, WRONG_PASSWORD.format(user)]
        assert theirs(newest, wrong, user=user) == expected
        mock = Verifier(4096, bytes(16), bytes(32), bytes(32))
        exchange = authenticate(user, mock, False, None)
        assert converse(exchange, Client(), wrong).messages == expected


# --- Secrets -------------------------------------------------------------------------------------


def test_our_secrets_let_psql_in(with_tls: Cluster) -> None:
    # Made here, given to PostgreSQL, and proven by libpq.
    randomness = seeded()
    with_tls.sql(
        "\n".join(
            f"CREATE ROLE ours_{name} LOGIN PASSWORD "
            f"'{secret(Verifier.of(password, randomness.randbytes(16)))}';"
            for name, password in PASSWORDS.items()
        )
    )
    for name, password in PASSWORDS.items():
        quoted = password.replace("\\", "\\\\").replace("'", "\\'")
        conninfo = (
            f"host={HOST} port={with_tls.port} dbname=postgres user=ours_{name} "
            f"channel_binding={'require' if name == 'ascii' else 'prefer'} password='{{}}'"
        )
        run = with_tls.installation.run
        logged_in = run("psql", "-XAtqc", "SELECT session_user", conninfo.format(quoted))
        assert logged_in.stdout == f"ours_{name}\n"
    with pytest.raises(Failed, match="password authentication failed"):
        run("psql", "-XAtqc", "SELECT 1", conninfo.format("wrong"))


def test_postgresqls_secrets_let_in_here(newest: Cluster) -> None:
    for name, password in PASSWORDS.items():
        literal = password.replace("'", "''")
        newest.sql(f"CREATE ROLE theirs_{name} LOGIN PASSWORD '{literal}'")
        stored = newest.sql(f"SELECT rolpassword FROM pg_authid WHERE rolname = 'theirs_{name}'")
        verifier = Verifier.parse(stored)
        assert secret(verifier) == stored
        assert Verifier.of(password, verifier.salt, verifier.iterations) == verifier
    with_ascii = newest.sql("SELECT rolpassword FROM pg_authid WHERE rolname = 'theirs_ascii'")
    assert PASSWORDS["ascii"] == PASSWORD
    exchange = authenticate("theirs_ascii", Verifier.parse(with_ascii), True, None)
    assert converse(exchange, Client(), GOOD).messages == [OFFER, CHALLENGE, "R 12", "R 0"]


def characters(randomness: random.Random) -> list[str]:
    """Of all sorts: any at all, and those that have something to do with passwords."""
    points = [randomness.randrange(1, 0x3400) for _ in range(600)]
    points += [randomness.randrange(0x3400, 0x110000) for _ in range(300)]
    points += [*range(0x2000, 0x2070), *range(0x5D0, 0x600), *range(0x300, 0x350)]
    points += [0xAD, 0xA0, 0x180E, 0x1806, 0x2135, 0x3000, 0xFEFF, 0xFFFD, 0xE0001, 0x2F868]
    return [chr(point) for point in points if unicodedata.category(chr(point)) != "Cs"]


def test_postgresql_makes_the_same_of_any_password(newest: Cluster) -> None:
    """SASLprep: each password is hashed once there and once here."""
    randomness = seeded()
    some = characters(randomness)
    passwords = [*some, *(f"\u05d0{one}\u05d0" for one in some), *(f"\u00e9{one}" for one in some)]
    for _ in range(1000):
        passwords.append("".join(randomness.choices(some, k=randomness.randint(2, 6))))
    codes = ",".join("('{" + ",".join(str(ord(one)) for one in each) + "}')" for each in passwords)
    newest.sql(
        f"""
        CREATE ROLE prepared;
        CREATE TABLE said (id serial, codes int[], stored text);
        INSERT INTO said (codes) VALUES {codes};
        SET client_min_messages = error;
        SET scram_iterations = 1;
        DO $$
        DECLARE
            one record;
        BEGIN
            FOR one IN SELECT id, codes FROM said ORDER BY id LOOP
                EXECUTE format(
                    'ALTER ROLE prepared PASSWORD %L',
                    (SELECT string_agg(chr(code), '' ORDER BY place)
                     FROM unnest(one.codes) WITH ORDINALITY AS each (code, place)));
                UPDATE said SET stored = rolpassword FROM pg_authid
                WHERE id = one.id AND rolname = 'prepared';
                -- Or the row has so many versions that it takes longer and longer to find.
                IF one.id % 100 = 0 THEN COMMIT; END IF;
            END LOOP;
        END $$;
        """
    )
    stored = newest.sql("SELECT stored FROM said ORDER BY id").splitlines()
    for password, text in zip(passwords, stored, strict=True):
        verifier = Verifier.parse(text)
        assert Verifier.of(password, verifier.salt, 1) == verifier, ascii(password)
