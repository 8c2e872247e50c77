"""Who is let in, by which rule, after what exchange; who is not, and what it and the operator are
told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guarded import (
    FAR,
    FAR_6,
    LOCAL,
    LOOPBACK,
    NEAR,
    NO_ENTRY,
    PASSWORD,
    WRONG_PASSWORD,
    A,
    B,
    Files,
    cleartext,
    come,
    over_tls,
    scram,
    silent,
)
from tests.jwt_keys import EVERYTHING, FOR_TENANT, TENANT, key, new_key
from walproto.access.grant import Scope
from walproto.access.guard import AccessError, Guard


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# --- Without an hba file -------------------------------------------------------------------------


def is_closed_to_others(guard: Guard) -> bool:
    """Whether nobody comes in from elsewhere, neither over TLS nor without it."""
    assert not guard.is_open_to_others
    for peer in (FAR, FAR_6):
        for replication in (True, False):
            for one, encryption in ((peer, "no encryption"), (over_tls(peer), "SSL encryption")):
                outcome = come(guard, one, replication=replication).outcome
                assert outcome.startswith("FATAL 28000: no pg_hba.conf entry for ")
                assert f'host "{one.address}"' in outcome
                assert outcome.endswith(encryption)
    return True


def test_who_is_near_is_trusted_and_nobody_else(files: Files) -> None:
    """That there is TLS alone, or passwords alone, opens nothing."""
    for guard in (Guard(), Guard(offers_tls=True), files.guard()):
        outcomes = {come(guard, peer).outcome for peer in NEAR}
        assert outcomes == {"without --hba-file trust"}
        assert come(guard, LOCAL, replication=False).outcome == "without --hba-file trust"
        assert is_closed_to_others(guard)
    files.users()
    assert is_closed_to_others(files.guard(offers_tls=False))


def test_passwords_and_tokens_take_rules(files: Files) -> None:
    files.users()
    files.keys()
    with pytest.raises(AccessError, match="say with --hba-file who uses which"):
        files.guard()


def test_an_address_of_this_machine_alone_makes_nobody_near(files: Files) -> None:
    """It may be what a proxy says."""
    claimed = replace(LOOPBACK, is_near=False)
    assert come(Guard(), claimed).outcome == NO_ENTRY.format("127.0.0.1", "alice", "no encryption")
    unix = replace(LOCAL, is_near=False)
    assert come(Guard(), unix).outcome == NO_ENTRY.format("[local]", "alice", "no encryption")
    files.users()
    guard = files.guard()
    assert come(guard, claimed).error
    assert come(guard, unix).error
    assert come(guard, over_tls(claimed), scram()).outcome == "without --hba-file scram-sha-256"


def test_the_others_need_tls_and_a_password(files: Files) -> None:
    files.users()
    guard = files.guard()
    assert guard.is_open_to_others
    for peer in (FAR, FAR_6):
        refusal = NO_ENTRY.format(peer.address, "alice", "no encryption")
        assert come(guard, peer).outcome == refusal
        for replication in (True, False):
            said = come(guard, over_tls(peer), scram(), replication=replication)
            assert said.grant
            assert said.outcome == "without --hba-file scram-sha-256"
            assert said.grant.scopes == ()
            assert said.grant.last_message[5:9] == b"\0\0\0\x0c"
    wrong = come(guard, over_tls(), scram("wrong"))
    assert (wrong.outcome, wrong.log) == (WRONG_PASSWORD.format("alice"), "The password is wrong.")
    nobody = come(guard, over_tls(), scram(), user="nobody")
    assert nobody.outcome == WRONG_PASSWORD.format("nobody")
    assert nobody.log == f'User "nobody" is not in {files.directory}/users.'
    assert come(guard, LOOPBACK).outcome == "without --hba-file trust"


def test_or_tls_and_a_token(files: Files) -> None:
    files.keys()
    guard = files.guard()
    assert come(guard, FAR).outcome == NO_ENTRY.format("203.0.113.9", "alice", "no encryption")
    said = come(guard, over_tls(), cleartext(key().token(EVERYTHING)))
    assert (said.outcome, said.grant and said.grant.scopes) == ("without --hba-file jwt", ())
    assert come(guard, LOCAL).outcome == "without --hba-file trust"


# --- With one ------------------------------------------------------------------------------------


def test_an_hba_file_alone_says(files: Files) -> None:
    """Who is near is nobody special then."""
    files.users()
    files.hba(
        "hostnossl replication alice 203.0.113.0/24 trust\n"
        "host replication mallory all reject\n"
        "hostssl replication bob,alice all scram-sha-256\n"
        "host postgres,sameuser all 127.0.0.1/32 trust\n"
    )
    guard = files.guard()
    assert guard.is_open_to_others
    assert come(guard, FAR).outcome == "hba:1 trust"
    assert come(guard, over_tls(), scram()).outcome == "hba:3 scram-sha-256"
    for peer, host in ((LOCAL, "[local]"), (LOOPBACK, "127.0.0.1"), (FAR_6, "2001:db8::9")):
        assert come(guard, peer).outcome == NO_ENTRY.format(host, "alice", "no encryption")
    rejected = come(guard, over_tls(LOOPBACK), user="mallory")
    assert rejected.outcome == (
        'FATAL 28000: pg_hba.conf rejects replication connection for host "127.0.0.1", user '
        '"mallory", SSL encryption'
    )
    assert come(guard, LOOPBACK, replication=False).outcome == "hba:4 trust"
    assert come(guard, LOOPBACK, replication=False, database="other").outcome == (
        'FATAL 28000: no pg_hba.conf entry for host "127.0.0.1", user "alice", database "other", '
        "no encryption"
    )


def test_the_first_rule_that_matches_counts_even_if_a_later_one_would_do(files: Files) -> None:
    files.users()
    files.hba("host all,replication all all scram-sha-256\nhost all,replication all all trust\n")
    guard = files.guard()
    assert come(guard, FAR, scram("wrong")).outcome == WRONG_PASSWORD.format("alice")
    assert come(guard, FAR, scram()).outcome == "hba:1 scram-sha-256"


# --- Certificates --------------------------------------------------------------------------------

CERTIFICATES = (
    "hostssl replication alice all cert\n"
    "hostssl replication bob all trust clientcert=verify-ca\n"
    "hostssl replication carol all trust clientcert=verify-full\n"
    "hostssl replication dave all scram-sha-256 clientcert=verify-ca\n"
    "hostssl replication erin all scram-sha-256 clientcert=verify-full\n"
    "hostssl replication frank all jwt clientcert=verify-full\n"
)
NO_CERTIFICATE = "FATAL 28000: connection requires a valid client certificate"


@pytest.fixture
def certified(files: Files) -> Guard:
    files.users("".join(f'"{user}" "{PASSWORD}"\n' for user in ("dave", "erin")))
    files.keys()
    files.hba(CERTIFICATES)
    return files.guard()


def test_who_shows_no_certificate_is_asked_for_nothing_more(files: Files, certified: Guard) -> None:
    for number, user in enumerate(("alice", "bob", "carol", "dave", "erin", "frank"), 1):
        said = come(certified, over_tls(), user=user)
        assert (said.outcome, said.log) == (NO_CERTIFICATE, f"{files.directory}/hba:{number}")
        assert said.messages == []


def test_a_certificate_of_ones_own_is_enough(certified: Guard) -> None:
    password, token = scram(), cleartext(key().token(EVERYTHING))
    for number, user, answer, method in (
        (1, "alice", silent, "cert"),
        (2, "bob", silent, "trust"),
        (3, "carol", silent, "trust"),
        (4, "dave", scram(), "scram-sha-256"),
        (5, "erin", password, "scram-sha-256"),
        (6, "frank", token, "jwt"),
    ):
        said = come(certified, over_tls(FAR, user), answer, user=user)
        assert said.outcome == f"hba:{number} {method}"


def test_one_of_somebody_else_is_where_only_the_authority_counts(certified: Guard) -> None:
    for user, answer in (("bob", silent), ("dave", scram())):
        assert come(certified, over_tls(FAR, "somebody"), answer, user=user).grant


def test_and_nowhere_else(files: Files, certified: Guard) -> None:
    """A password that is right does not help, nor can it be told from one that is wrong."""
    token = cleartext(key().token(EVERYTHING))
    for number, user, answer, told in (
        (1, "alice", silent, 'FATAL 28000: certificate authentication failed for user "alice"'),
        (3, "carol", silent, 'FATAL 28000: "trust" authentication failed for user "carol"'),
        (5, "erin", scram(), WRONG_PASSWORD.format("erin")),
        (6, "frank", token, WRONG_PASSWORD.format("frank")),
    ):
        for shown in ("somebody", user.upper(), f"{user} ", f"{user}\0"):
            said = come(certified, over_tls(FAR, shown), answer, user=user)
            assert (said.outcome, said.log) == (
                told,
                f"{files.directory}/hba:{number}: provided user name ({user}) and authenticated "
                f"user name ({shown}) do not match",
            )
            if user == "erin":
                answer = scram()


# --- Tokens and scopes ---------------------------------------------------------------------------


def test_a_token_is_asked_for_as_a_password(files: Files) -> None:
    files.keys()
    files.hba("hostssl all,replication all all jwt\n")
    guard = files.guard()
    grant = come(guard, over_tls(), cleartext(key().token(FOR_TENANT))).grant
    assert grant is not None
    assert grant.scopes == (Scope(frozenset({TENANT})),)
    assert grant.last_message == b""
    assert grant.may_see(TENANT, A)
    assert not grant.may_see(A, TENANT)

    expired = key().token(EVERYTHING | {"exp": int(time.time()) - 1})
    others = new_key().token(EVERYTHING)
    for token, reason in (
        (expired, "it has expired"),
        (others, "none of our EdDSA keys"),
        ("x", ""),
    ):
        said = come(guard, over_tls(), cleartext(token))
        assert said.outcome == WRONG_PASSWORD.format("alice")
        assert reason in (said.log or "")
        assert token not in (said.log or "") or token == "x"
    assert come(guard, over_tls(), cleartext("")).outcome == (
        "FATAL 28P01: empty password returned by client"
    )
    for malformed in (b"", b"token", b"a\0b\0"):
        said = come(guard, over_tls(), lambda messages, malformed=malformed: malformed)
        assert said.outcome == "FATAL 08P01: invalid password packet size"


def test_what_a_rule_shows_and_what_a_token_shows_must_both_hold(files: Files) -> None:
    files.keys()
    files.users()
    files.hba(
        f"hostssl replication alice all jwt tenant={A} timeline={TENANT}/{B}\n"
        f"host replication bob all trust timeline={A.upper()}/{B}\n"
        "host replication all all trust\n"
    )
    guard = files.guard()
    grant = come(guard, over_tls(), cleartext(key().token(FOR_TENANT))).grant
    assert grant is not None
    seen = [(A, A), (A, B), (TENANT, A), (TENANT, B), (B, B)]
    assert [pair for pair in seen if grant.may_see(*pair)] == [(TENANT, B)]
    everything = come(guard, over_tls(), cleartext(key().token(EVERYTHING))).grant
    assert everything is not None
    assert [pair for pair in seen if everything.may_see(*pair)] == [(A, A), (A, B), (TENANT, B)]
    one = come(guard, FAR, user="bob").grant
    assert one is not None
    assert [pair for pair in seen if one.may_see(*pair)] == [(A, B)]
    all_of_them = come(guard, FAR, user="carol").grant
    assert all_of_them is not None
    assert all_of_them.scopes == ()
