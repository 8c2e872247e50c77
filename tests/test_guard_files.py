"""The files of a guard: what is wrong with them, what is in force then, and what nobody is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.certificates import write
from tests.guarded import FAR, PASSWORD, A, B, Files, cleartext, come, over_tls, scram, startup
from tests.jwt_keys import EVERYTHING, key, new_key
from tests.scram_conversations import BARE, FINAL, Client, final, initial
from walproto.access.guard import AccessError
from walproto.errors import ReportedError


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# --- What is wrong with the files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "problem"),
    [
        (
            "hostssl all all all trust",
            {"offers_tls": False},
            "hostssl record cannot match because SSL is disabled: give --ssl-cert-file and "
            "--ssl-key-file",
        ),
        (
            "hostssl all all all cert",
            {"checks_certificates": False},
            "client certificates can only be checked if a root certificate store is available: "
            "give --ssl-ca-file",
        ),
        (
            "hostssl all all all trust clientcert=verify-ca",
            {"checks_certificates": False},
            "client certificates can only be checked if a root certificate store is available: "
            "give --ssl-ca-file",
        ),
        ("local all all scram-sha-256", {}, "there are no passwords: give --auth-file"),
        ("hostssl all all all jwt", {}, "there are no keys for tokens: give --jwt-public-key"),
        (
            f"local all all trust tenant={A}",
            {"has_tenants": False},
            "tenant and timeline are for --data-dir: here there is one timeline",
        ),
        (
            f"local all all trust timeline={A}/{B}",
            {"has_tenants": False},
            "tenant and timeline are for --data-dir: here there is one timeline",
        ),
    ],
)
def test_a_rule_that_means_nothing_here(
    files: Files, rule: str, options: dict[str, bool], problem: str
) -> None:
    files.hba(f"host all all all trust\n\n{rule}\n")
    assert files.problems(**options) == [f"hba:3: {problem}"]


def test_all_that_is_wrong_is_told_at_once(files: Files) -> None:
    files.hba(f"hostssl all all all cert tenant={A}\nhostssl all all all jwt\n")
    options = {"offers_tls": False, "checks_certificates": False, "has_tenants": False}
    assert [line.split(" ")[0] for line in files.problems(**options)] == ["hba:1:"] * 3 + [
        "hba:2:"
    ] * 2
    write(files.keys(), b"no key\n")
    files.users("damaged\n")
    files.hba("host all all all md5\nlocal all all nothing\n")
    assert files.problems() == [
        'users:1: it is not "user" "secret", each in double quotes, and a quote in them twice',
        "jwt.pem: there is no PEM public key in it",
        'hba:1: authentication method "md5" is not offered; use scram-sha-256',
        'hba:2: invalid authentication method "nothing"',
    ]


def test_files_that_cannot_be_read(files: Files) -> None:
    for path in (files.users(), files.keys(), files.hba("local all all trust\n")):
        path.unlink()
    problems = files.problems()
    assert problems == [
        '--auth-file: could not open file "users": No such file or directory',
        '--jwt-public-key: could not open file "jwt.pem": No such file or directory',
        '--hba-file: could not open file "hba": No such file or directory',
    ]
    (files.directory / "hba").mkdir()
    assert files.problems()[2] == '--hba-file: could not open file "hba": Is a directory'


def test_a_file_of_comments_lets_nobody_in_by_mistake(files: Files) -> None:
    files.hba("# nothing\n")
    assert files.problems() == ["hba:1: the file contains no entries"]


# --- New files -----------------------------------------------------------------------------------


def test_new_files_are_in_force_at_once_and_for_those_who_have_not_begun(files: Files) -> None:
    files.users()
    files.hba("host replication alice all trust\nhostssl replication all all scram-sha-256\n")
    guard = files.guard()
    begun = guard.authenticate(startup("bob"), over_tls())
    next(begun)
    files.hba("host replication alice all reject\nhost replication carol all trust\n")
    files.users('"bob" "another"\n')
    assert come(guard, FAR).outcome == "hba:1 trust"
    guard.reload()
    assert come(guard, FAR).outcome.startswith("FATAL 28000: pg_hba.conf rejects ")
    assert come(guard, FAR, user="carol").outcome == "hba:2 trust"
    # bob goes by what it has begun with, in which it is not known.
    client = Client()
    client.server_first = begun.send(initial(b"n,," + BARE)(client))[9:]  # type: ignore[operator]
    with pytest.raises(ReportedError) as caught:
        begun.send(final(FINAL, "another")(client))  # type: ignore[operator]
    assert caught.value.message == 'password authentication failed for user "bob"'


def test_new_passwords_and_keys(files: Files) -> None:
    files.users()
    files.keys()
    files.hba("hostssl all all all scram-sha-256\nhostssl replication all all jwt\n")
    guard = files.guard()
    new = new_key()
    files.users('"alice" "new"\n')
    files.keys(new)
    guard.reload()
    for password, is_let_in in (("new", True), (PASSWORD, False)):
        said = come(guard, over_tls(), scram(password), replication=False)
        assert bool(said.grant) == is_let_in
    for pair, is_let_in in ((new, True), (key(), False)):
        said = come(guard, over_tls(), cleartext(pair.token(EVERYTHING)))
        assert bool(said.grant) == is_let_in


@pytest.mark.parametrize("damaged", ["users", "jwt.pem", "hba", "the rules together"])
def test_what_is_damaged_leaves_all_of_the_old_in_force(files: Files, damaged: str) -> None:
    """The other files are good and new."""
    files.users()
    files.keys()
    files.hba("hostssl all all all scram-sha-256\nhostssl replication all all jwt\n")
    guard = files.guard(has_tenants=False)
    warnings = guard.warnings
    files.users('"bob" "new"\n"bob" "newer"\n')
    files.keys(new_key())
    files.hba("host replication all all trust\n")
    if damaged == "the rules together":
        files.hba(f"host replication all all trust tenant={A}\n")
    else:
        (files.directory / damaged).write_bytes(b"damaged\n")
    for _ in range(2):
        with pytest.raises(AccessError) as caught:
            guard.reload()
        assert str(files.directory) in str(caught.value)
        assert guard.warnings == warnings
        assert come(guard, FAR).error
        assert come(guard, over_tls(), scram(), replication=False).grant
        assert come(guard, over_tls(), cleartext(key().token(EVERYTHING))).grant
    files.users('"bob" "new"\n')
    files.keys()
    files.hba("host replication all all trust\n")
    guard.reload()
    assert come(guard, FAR).outcome == "hba:1 trust"


# --- Warnings and secrets ------------------------------------------------------------------------


def test_the_operator_is_warned_of_the_files_in_force(files: Files) -> None:
    assert not files.guard().warnings
    path = files.users()
    guard = files.guard()
    assert [warning.partition(" (")[0] for warning in guard.warnings] == [
        f"{path}: there are passwords in plain text"
    ]
    path.chmod(0o644)
    guard.reload()
    assert len(guard.warnings) == 2
    write(path, b"", mode=0o600)
    guard.reload()
    assert not guard.warnings


NOT_FOR_REPLICATION = (
    "nobody is served by this rule: only the database replication matches replication, all does not"
)
NOT_ASKED = (
    "nobody is ever asked for a password: without TLS, or by the --hba-file, there is no need for "
    "one"
)
ALICE = f'"alice" "SCRAM-SHA-256$4096:AAECAwQFBgcICQoLDA0ODw==${"A" * 43}=:{"B" * 43}="\n'
"""A user of whom nothing has to be said."""


def warnings(files: Files, **options: Any) -> list[str]:
    told = files.guard(**options).warnings
    return [warning.replace(f"{files.directory}/", "") for warning in told]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("local all all trust", NOT_FOR_REPLICATION),
        ("host all all all scram-sha-256", NOT_FOR_REPLICATION),
        ('host "replication" all all trust', NOT_FOR_REPLICATION),
        ("hostssl postgres,sameuser alice all scram-sha-256", NOT_FOR_REPLICATION),
        ("host all bob all scram-sha-256", NOT_FOR_REPLICATION),
        ("host replication bob all scram-sha-256", 'user "bob" is not in users'),
        ("host replication alice,bob all scram-sha-256", 'user "bob" is not in users'),
        ("host replication md5 all scram-sha-256", 'user "md5" is not in users'),
        ('host replication "all" all scram-sha-256', 'user "all" is not in users'),
    ],
)
def test_a_rule_that_is_of_no_use_is_warned_of(files: Files, rule: str, told: str) -> None:
    files.users(ALICE + f'"md5" "md5{"0" * 32}"\n')
    files.hba(f"local replication all scram-sha-256\n{rule}\n")
    ours, theirs = warnings(files), f"hba:2: {told}"
    assert ours[0] == theirs
    assert not [warning for warning in ours[1:] if warning.startswith("hba:")]


def test_each_user_who_is_not_in_the_file_is_warned_of(files: Files) -> None:
    files.users(ALICE)
    files.hba("local replication dave,alice,bob scram-sha-256\nlocal replication erin trust\n")
    assert warnings(files) == [f'hba:1: user "{user}" is not in users' for user in ("bob", "dave")]


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        (None, {"offers_tls": False}),
        ("local replication all trust", {}),
        ("host all all all reject\nhostssl replication all all cert", {}),
    ],
)
def test_passwords_that_nobody_is_asked_for_are_warned_of(
    files: Files, rules: str | None, options: dict[str, bool]
) -> None:
    files.users(ALICE)
    if rules is not None:
        files.hba(rules)
    assert warnings(files, **options) == [f"users: {NOT_ASKED}"]


@pytest.mark.parametrize(
    "rules",
    [
        None,
        "hostssl replication alice all scram-sha-256",
        "host all,replication all all scram-sha-256",
        "local replication all trust\nhost replication bob 10.0.0.0/8 reject\n"
        "hostssl replication bob all cert\nhostssl replication all all scram-sha-256",
        "hostssl replication alice all scram-sha-256 clientcert=verify-full",
    ],
)
def test_of_a_good_configuration_there_is_nothing_to_say(files: Files, rules: str | None) -> None:
    assert warnings(files, offers_tls=False) == []
    files.users(ALICE)
    if rules is not None:
        files.hba(rules)
    assert warnings(files) == []


def test_the_warnings_are_of_the_files_in_force(files: Files) -> None:
    users = files.users(ALICE)
    files.hba("local replication alice scram-sha-256\n")
    guard = files.guard()
    assert not guard.warnings
    files.hba("local replication bob scram-sha-256\n")
    guard.reload()
    assert list(guard.warnings) == [f'{files.directory}/hba:1: user "bob" is not in {users}']
    files.hba("local all all trust\n")
    guard.reload()
    assert list(guard.warnings) == [
        f"{files.directory}/hba:1: {NOT_FOR_REPLICATION}",
        f"{users}: {NOT_ASKED}",
    ]
    files.hba("local replication bob scram-sha-256\n")
    files.users(ALICE + ALICE.replace("alice", "bob"))
    guard.reload()
    assert not guard.warnings


def test_no_secret_is_in_what_anybody_is_told(files: Files) -> None:
    secret = "tellNobody"
    token = key().token(EVERYTHING | {"aud": secret, "exp": 1})
    files.keys()
    files.users(f'"alice" "{secret}"\n"bob" "SCRAM-SHA-256${secret}"\n')
    told = files.problems()
    files.users(f'"alice" "{secret}" and\n"bob" {secret}\n')
    told += files.problems()
    path = files.users(f'"alice" "{secret}"\n"alice" "{secret}"\n')
    path.chmod(0o666)
    files.hba("hostssl all all all scram-sha-256\nhostssl replication all all jwt\n")
    guard = files.guard()
    told += [*guard.warnings, repr(guard)]
    for said in (
        come(guard, over_tls(), scram("wrong"), replication=False),
        come(guard, over_tls(), scram(secret), replication=False, user="bob"),
        come(guard, over_tls(), cleartext(token)),
        come(guard, over_tls(), cleartext(secret)),
    ):
        assert said.error
        told += [said.outcome, said.log or "", repr(said.error), repr(said.error.args)]
    accepted = come(guard, over_tls(), scram(secret), replication=False)
    told.append(repr(accepted.grant))
    assert accepted.grant
    for line in told:
        assert secret not in line
        assert token not in line
