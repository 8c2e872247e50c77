"""The file of users: its lines, what is wrong with them, who comes in, reading it anew."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scram_conversations import (
    CHALLENGE,
    FINAL,
    GOOD,
    WRONG_PASSWORD,
    Client,
    converse,
    final,
)
from walproto.access.scram import Verifier, authenticate
from walproto.access.userlist import UserlistError, Users, load_users, parse_users

SECRET = (
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY="
    ":wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
)
LONGER = "SCRAM-SHA-256$8192:AAECAwQFBgcICQoLDA0ODxAREhM=$" + SECRET.split("$")[2]
MD5 = "md5a3556571e93b0d20722ba62be61e8c2d"
NOT_SO = 'it is not "user" "secret", each in double quotes, and a quote in them twice'


def proves(users: Users, user: str, password: str) -> list[str]:
    """What a client is told that says it is this user, with this password."""
    verifier, is_known = users.verifier(user)
    exchange = authenticate(user, verifier, is_known, None)
    return converse(exchange, Client(), [GOOD[0], final(FINAL, password)]).messages[1:]


WELCOME = [CHALLENGE, "R 12", "R 0"]


# --- Lines ---------------------------------------------------------------------------------------


def test_a_secret_is_taken_as_it_is() -> None:
    users = parse_users(f'"alice" "{SECRET}"\n', "users.txt")
    assert users.verifier("alice") == (Verifier.parse(SECRET), True)
    assert (len(users), users.is_known("alice"), users.is_known("bob")) == (1, True, False)
    assert users.warnings == ()
    assert proves(users, "alice", "pencil") == WELCOME
    assert proves(users, "alice", "Pencil") == [CHALLENGE, WRONG_PASSWORD.format("alice")]


@pytest.mark.parametrize(
    ("line", "user"),
    [
        ('"alice" "{}"', "alice"),
        ('  "alice"\t \t"{}"  ', "alice"),
        ('"alice" "{}"\r', "alice"),
        ('"alice" "{}" "2030-01-01" and more', "alice"),
        ('"alice" "{}" ; is with us since May', "alice"),
        ('"a b" "{}"', "a b"),
        ('"a""b" "{}"', 'a"b'),
        ('"""" "{}"', '"'),
        ('"" "{}"'.replace('""', '"; no comment"'), "; no comment"),
        ('"\u00e9ve" "{}"', "\u00e9ve"),
        ('"a\udce9" "{}"', "a\udce9"),
        ('"a\u2028\x85\x1cb" "{}"', "a\u2028\x85\x1cb"),
        ('"' + "x" * 1000 + '" "{}"', "x" * 1000),
    ],
)
def test_lines(line: str, user: str) -> None:
    text = f'; ours\n\n \t\r\n;"nobody" "{SECRET}"\n  ; more\n{line.replace("{}", SECRET)}\n;'
    users = parse_users(text, "users.txt")
    assert len(users) == 1
    assert users.verifier(user) == (Verifier.parse(SECRET), True)
    assert users.warnings == ()


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice secret",
        '"alice"',
        '"alice" ',
        '"alice" secret',
        '"alice" "secret',
        '"alice""secret"',
        '"alice", "secret"',
        '"alice" "sec"ret"',
        '"alice" "secret"x',
        '"alice" "secret""',
        '"alice" secret "secret"',
        "'alice' 'secret'",
        'alice "secret"',
        '"al"ice" "secret"',
        '# "alice" "secret"',
        '"alice"\u00a0"secret"',
        '"alice" "sec\nret"',
        "secret",
        '"',
        '"' * 1001,
    ],
)
def test_what_is_no_line(line: str) -> None:
    with pytest.raises(UserlistError) as caught:
        parse_users(f'\n"bob" "{SECRET}"\n{line}\n', "/etc/users.txt")
    assert str(caught.value) == f"/etc/users.txt:3: {NOT_SO}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('"" "secret"', "the user name is empty"),
        ('"alice" "sec\0ret"', "there is a NUL in it"),
        ('"alice" "SCRAM-SHA-256$secret"', "not a SCRAM-SHA-256 secret as PostgreSQL stores it"),
        (f'"alice" "{SECRET}x"', "not a SCRAM-SHA-256 secret as PostgreSQL stores it"),
    ],
)
def test_what_is_wrong_in_a_line(line: str, problem: str) -> None:
    with pytest.raises(UserlistError) as caught:
        parse_users(f"{line}\n", "users.txt")
    assert str(caught.value) == f"users.txt:1: {problem}"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.text(
        st.sampled_from('"";\n\t \r\0ab\udcff\u2028$:') | st.characters(min_codepoint=0x80),
        max_size=40,
    )
)
def test_any_text_is_users_or_an_error_of_a_line(text: str) -> None:
    told, users = "", Users("F")
    try:
        users = parse_users(text, "F")
    except UserlistError as error:
        told = str(error)
    if told:
        assert re.fullmatch("F:[0-9]+: [^\n]+", told)
        assert not [word for word in re.findall(r"\w{4,}", text) if word in told]
    assert len(users) <= text.count('"') // 4
    assert not [warning for warning in users.warnings if not warning.isprintable()]


def test_it_takes_no_time_that_grows_with_the_square() -> None:
    for text in ('"' * 200_001, '"' + "a" * 200_000, '"a" "' + '""' * 100_000, " " * 200_000):
        with contextlib.suppress(UserlistError):
            parse_users(text, "F")


# --- Secrets -------------------------------------------------------------------------------------


def test_a_password_in_plain_text_is_good_for_scram_and_is_warned_of() -> None:
    text = f'"a" "pass""word"\n"b" "{SECRET}"\n"c" "\u00e9te\u0301"\n'
    users = parse_users(text, "users.txt")
    assert proves(users, "a", 'pass"word') == WELCOME
    # This client does no SASLprep: it is the composed one that it has to know.
    assert proves(users, "c", "\u00e9t\u00e9") == WELCOME
    assert users.warnings == (
        "users.txt: there are passwords in plain text (2 of them, the first in line 1); "
        "better are SCRAM secrets, as PostgreSQL stores them in pg_authid",
    )
    (warning,) = parse_users('\n"a" "password"', "users.txt").warnings
    assert "(line 2)" in warning


def test_bytes_that_are_not_utf_8_are_a_password_too() -> None:
    users = parse_users('"a" "p\udce4ss"', "F")
    verifier, _ = users.verifier("a")
    salted = hashlib.pbkdf2_hmac("sha256", b"p\xe4ss", verifier.salt, 4096)
    assert verifier.server_key == hashlib_hmac(salted)


def hashlib_hmac(key: bytes) -> bytes:
    """HMAC-SHA-256 of "Server Key", spelled out (RFC 2104)."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + b"Server Key").digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).digest()


def test_md5_and_no_password_let_nobody_in() -> None:
    users = parse_users(f'"a" "{MD5}"\n"b" ""\n"c" "{SECRET}"', "users.txt")
    assert len(users) == 3
    for user, password in (("a", MD5), ("a", "x"), ("b", ""), ("b", "x"), ("nobody", "")):
        assert not users.is_known(user)
        assert proves(users, user, password) == [CHALLENGE, WRONG_PASSWORD.format(user)]
    assert users.why_unknown("a") == 'User "a" does not have a valid SCRAM secret.'
    assert users.why_unknown("b") == 'User "b" does not have a valid SCRAM secret.'
    assert users.why_unknown("no\nbody") == 'User "no\\nbody" is not in users.txt.'
    assert users.warnings == (
        "users.txt: there are MD5 secrets (line 1); their users cannot log in, as only SCRAM is "
        "offered",
    )


@pytest.mark.parametrize("password", [MD5[:-1], MD5 + "0", MD5.upper(), MD5[:-1] + "g", "scram-"])
def test_what_only_looks_like_a_secret_is_a_password(password: str) -> None:
    assert proves(parse_users(f'"a" "{password}"', "F"), "a", password) == WELCOME


def test_the_last_line_of_a_user_counts() -> None:
    users = parse_users(f'"a" "first"\n"b" "{MD5}"\n"a" "{SECRET}"\n"b" ""', "users.txt")
    assert len(users) == 2
    assert proves(users, "a", "pencil") == WELCOME
    assert proves(users, "a", "first") == [CHALLENGE, WRONG_PASSWORD.format("a")]
    assert users.warnings == (
        'users.txt:3: user "a" was in line 1 already; the last line counts',
        'users.txt:4: user "b" was in line 2 already; the last line counts',
    )


def test_names_are_told_apart_to_the_letter() -> None:
    users = parse_users(f'"Alice" "{SECRET}"\n"\u00e9" "{SECRET}"', "F")
    assert users.is_known("Alice")
    for other in ("alice", "ALICE", "Alice ", "e\u0301", ""):
        assert not users.is_known(other)


def test_nothing_of_a_secret_is_shown() -> None:
    users = parse_users(f'"a" "pencil"\n"b" "{SECRET}"', "F")
    verifiers = [users.verifier(user)[0] for user in ("a", "b", "nobody")]
    for shown in (repr(users), repr(verifiers), repr(vars(users)["_hashed"]), *users.warnings):
        assert not re.search("pencil|b'|[0-9A-Za-z+/]{20}", shown), shown


# --- Those who are not there ---------------------------------------------------------------------


def test_an_unknown_user_is_asked_what_a_known_one_might_be() -> None:
    for text, iterations, salt_length in (
        ("", 4096, 16),
        (f'"x" "{MD5}"', 4096, 16),
        (f'"a" "{SECRET}"\n"b" "{LONGER}"\n"c" "{LONGER}"', 8192, 20),
        (f'"a" "{SECRET}"\n"b" "{LONGER}"\n"c" "password"', 4096, 16),
    ):
        users = parse_users(text, "F")
        mock, is_known = users.verifier("nobody")
        assert not is_known
        assert (mock.iterations, len(mock.salt)) == (iterations, salt_length)
        assert users.verifier("nobody") == (mock, False)
        assert users.verifier("nobody else")[0].salt != mock.salt
        assert users.verifier("x")[0].salt not in (mock.salt, bytes(salt_length))
        assert parse_users(text + "\n", "F", users).verifier("nobody") == (mock, False)
        assert parse_users(text, "F").verifier("nobody")[0].salt != mock.salt
    assert users.verifier("a\udcff")[0].salt


# --- Reading it anew -----------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that were hashed."""
    passwords: list[bytes] = []
    original = hashlib.pbkdf2_hmac

    def pbkdf2_hmac(name: str, password: bytes, salt: bytes, iterations: int) -> bytes:
        passwords.append(password)
        return original(name, password, salt, iterations)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", pbkdf2_hmac)
    return passwords


def test_a_password_that_was_there_already_is_not_hashed_again(hashed: list[bytes]) -> None:
    users = parse_users('"a" "one"\n"b" "two"\n"c" "three"', "F")
    assert hashed == [b"one", b"two", b"three"]
    hashed.clear()
    again = parse_users(f'"d" "four"\n"c" "{SECRET}"\n"b" "TWO"\n"a" "one"', "F", users)
    assert hashed == [b"four", b"TWO"]
    assert again.verifier("a") == users.verifier("a")
    assert proves(again, "b", "TWO") == proves(again, "a", "one") == WELCOME
    assert proves(again, "c", "pencil") == WELCOME
    assert proves(again, "b", "two") == [CHALLENGE, WRONG_PASSWORD.format("b")]
    hashed.clear()
    once_more = parse_users('"c" "three"\n"d" "four"', "F", again)
    assert hashed == [b"three"]
    assert not once_more.is_known("a")


# --- The file ------------------------------------------------------------------------------------


def written(directory: Path, contents: bytes, mode: int = 0o600) -> Path:
    path = directory / "users.txt"
    path.write_bytes(contents)
    path.chmod(mode)
    return path


def test_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, f'\ufeff"\u00e9" "{SECRET}"\r\n'.encode() + b'"\xe9" "p\xe4ss"')
    users = load_users(path)
    assert users.is_known("\u00e9")
    assert users.is_known("\udce9")
    (warning,) = users.warnings
    assert warning.startswith(f"{path}: there are passwords in plain text (line 2)")
    again = load_users(str(path), users)
    assert again.verifier("\udce9") == users.verifier("\udce9")
    path.write_bytes(b'"a" "b\0"')
    with pytest.raises(UserlistError) as caught:
        load_users(path, again)
    assert str(caught.value) == f"{path}:1: there is a NUL in it"


WARNING = (
    "{}: the file has group or world access; it should have permissions u=rw (0600) or less, or "
    "u=rw,g=r (0640) or less if owned by root"
)


@pytest.mark.parametrize("mode", [0o660, 0o604, 0o644, 0o602, 0o610, 0o601, 0o777])
def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path, f'"a" "{SECRET}"'.encode(), mode)
    users = load_users(path)
    assert users.is_known("a")
    assert users.warnings == (WARNING.format(path),)


def test_its_group_may_read_it_if_it_is_roots(tmp_path: Path) -> None:
    """As PostgreSQL has it for keys."""
    path = written(tmp_path, f'"a" "{SECRET}"'.encode(), 0o640)
    if os.geteuid() == 0:
        assert load_users(path).warnings == ()
        os.chown(path, 65534, 65534)
    assert load_users(path).warnings == (WARNING.format(path),)
    path.chmod(0o600)
    assert load_users(path).warnings == ()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "users", "No such file or directory"),
    ):
        with pytest.raises(UserlistError) as caught:
            load_users(path)
        assert str(caught.value) == f'could not open file "{path}": {problem}'


def test_a_pipe_is_not_read() -> None:
    """Though there is something in it: a shell's ``<(...)`` could not be read anew, either."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(f'"a" "{SECRET}"'.encode())
    path = f"/dev/fd/{reader}"
    try:
        with pytest.raises(UserlistError) as caught:
            load_users(path)
    finally:
        os.close(reader)
    assert str(caught.value) == f'could not open file "{path}": it is not a regular file'
