"""Tokens as passwords: PostgreSQL's own clients, and a pageserver, on timelines of two tenants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bearers import (
    EVERYBODYS,
    FIRST,
    KEYS,
    NOWHERE,
    OURS,
    OURS_TOO,
    THEIRS,
    TOKENS,
    Bearer,
    Setting,
    check_no_token,
    for_tenant,
    setting_of_tenants,
    token,
)
from tests.certificates import write
from tests.jwt_keys import EVERYTHING, KeyPair, new_key, write_keys
from tests.neon_trees import ids_of
from tests.pageserver import ServerError
from tests.postgres import HOST, free_port, int_to_lsn, same_wal_to
from tests.secured import PASSWORD, address_elsewhere, fail_to_reload, reload_sender
from tests.test_tap import refusal
from tests.wal_decoder import SEGMENT

CLEARTEXT = b"\0\0\0\3"
"""What asks for a password as it is."""

with_each_key = pytest.mark.parametrize("pair", KEYS, ids=lambda pair: pair.algorithm)


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with setting_of_tenants() as made:
        yield made


# --- Who sees what -------------------------------------------------------------------------------


@with_each_key
def test_a_tenants_token_is_for_its_timelines(setting: Setting, pair: KeyPair) -> None:
    assert setting.seen(token(for_tenant(OURS), pair)) == {OURS, OURS_TOO}
    assert setting.seen(token(for_tenant(THEIRS, exp=2**33, nbf=1), pair)) == {THEIRS}
    setting.sender.expect(
        r"replication connection authorized: user=bearer method=jwt \(.*hba.conf:6\) "
        r"SSL enabled \(protocol=TLSv1.3, cipher="
    )


def test_a_safekeepers_token_is_for_all(setting: Setting) -> None:
    assert setting.seen(token(EVERYTHING)) == set(EVERYBODYS)


def test_the_operator_is_told_what_is_so(setting: Setting) -> None:
    """Whether there is a timeline or not."""
    for user, claims, ids, reason in (
        ("one", for_tenant(OURS), THEIRS, "this client may not see it"),
        ("two", for_tenant(OURS), NOWHERE, "this client may not see it"),
        ("three", EVERYTHING, NOWHERE, f"there is no directory {setting.tree(NOWHERE).directory}"),
    ):
        assert not setting.psql(token(claims), ids, user).is_let_in
        setting.sender.expect(f"authorized: user={user} method=jwt")
        line = setting.sender.expect(f'FATAL 42704: timeline "{ids}" does not exist (.*)')
        assert line[1] == f"({reason})"


def test_rules_with_passwords_and_rules_with_tokens(setting: Setting) -> None:
    """What is seen, both the rule and the token allow."""
    assert setting.seen(PASSWORD, "alice") == {OURS, OURS_TOO}
    assert setting.seen(PASSWORD, "bob") == {OURS_TOO, THEIRS}
    assert setting.seen(PASSWORD, "carol") == set(EVERYBODYS)
    assert setting.seen(token(EVERYTHING), "limited") == {THEIRS}
    assert setting.seen(token(for_tenant(THEIRS)), "limited") == {THEIRS}
    assert setting.seen(token(for_tenant(OURS)), "limited") == set()
    for user, password in (("alice", token(EVERYTHING)), ("bearer", PASSWORD)):
        refused = setting.refused(setting.psql(password, OURS, user))
        assert refused == f'password authentication failed for user "{user}"'


# --- Streaming -----------------------------------------------------------------------------------


@with_each_key
def test_pg_receivewal(setting: Setting, pair: KeyPair) -> None:
    wal, archive = setting.wal, setting.space.directory(f"archive_{pair.algorithm}")
    setting.space.file(archive / f"{wal.name(wal.first)}.partial")  # it begins there
    end = f"--endpos={int_to_lsn(wal.end - 1)}"
    password = token(for_tenant(OURS), pair)
    options = ("-D", archive, "-w", "--no-loop", end)
    answer = setting.run(
        password, "pg_receivewal", *options, "-d", setting.conninfo(OURS, "bearer", "")
    )
    assert answer.code == 0, answer
    assert same_wal_to(int_to_lsn(wal.end), setting.pg_wal, archive) == [
        wal.name(lsn) for lsn in range(wal.first, wal.end // SEGMENT * SEGMENT, SEGMENT)
    ]
    answer = setting.run(
        password, "pg_receivewal", *options, "-d", setting.conninfo(THEIRS, "bearer", "")
    )
    assert answer.code == 1
    assert f'FATAL:  timeline "{THEIRS}" does not exist' in answer.output


def test_a_pageserver(setting: Setting) -> None:
    wal = setting.wal
    with Bearer(setting.sender, OURS, token(for_tenant(OURS)).encode() + b"\0") as pageserver:
        assert pageserver.questions == [CLEARTEXT]
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        pageserver.take_to(wal.end)
        assert pageserver.wal == wal.read(wal.start, wal.end)


# --- Who is refused ------------------------------------------------------------------------------

FAILED = 'password authentication failed for user "bearer"'
UNSIGNED = KEYS[0].signed(json.dumps(EVERYTHING).encode(), b'{"alg": "none"}')
BAD_TOKENS = {
    "expired": (token(for_tenant(OURS, exp=1_000_000_000)), "it has expired"),
    "not valid yet": (token(for_tenant(OURS, nbf=2**33)), "it is not valid yet"),
    "another's": (token(EVERYTHING, new_key()), "none of our EdDSA keys has signed it"),
    "another's RS256": (token(EVERYTHING, new_key("RS256")), "none of our RS256 keys"),
    "unsigned": (UNSIGNED, 'its alg is "none", not '),
    "without a tenant": (token({"scope": "tenant"}), 'its scope is "tenant", and it has no tenant'),
    "of another scope": (token({"scope": "pageserverapi"}), 'its scope is "pageserverapi", not'),
    "garbage": ("a-guess-in-place-of-a-token", "it is no signed JSON Web Token"),
}
TOKENS |= {made for made, _ in BAD_TOKENS.values()}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token(setting: Setting, name: str) -> None:
    """The client is told nothing of the reason, nor of timelines; the operator of the reason."""
    bad, reason = BAD_TOKENS[name]
    for ids in (OURS, THEIRS, NOWHERE):
        assert setting.refused(setting.psql(bad, ids)) == FAILED
        setting.sender.expect(rf"FATAL 28P01: {FAILED} \({reason}")
    questions: list[bytes] = []
    with pytest.raises(ServerError) as caught:
        Bearer(setting.sender, OURS, bad.encode() + b"\0", questions)
    assert str(caught.value) == f"FATAL 28P01: {FAILED}"
    assert questions == [CLEARTEXT]


def test_no_token(setting: Setting) -> None:
    """libpq sends none that is empty; others do."""
    answer = setting.psql("")
    assert answer.code == 2
    assert answer.output.endswith(": fe_sendauth: no password supplied")
    setting.sender.expect("has gone before it was authenticated")
    for contents, told in {
        b"\0": "28P01: empty password returned by client",
        b"": "08P01: invalid password packet size",
    }.items():
        with pytest.raises(ServerError) as caught:
            Bearer(setting.sender, OURS, contents)
        assert str(caught.value) == f"FATAL {told}"
        setting.sender.expect(f"FATAL {told}")


def test_nobody_is_asked_for_a_token_in_clear(setting: Setting) -> None:
    """Whether it would be a good one."""
    told = (
        f'no pg_hba.conf entry for replication connection from host "{HOST}", user "bearer", '
        "no encryption"
    )
    answer = setting.psql(token(EVERYTHING), more="sslmode=disable")
    assert setting.refused(answer) == told
    questions: list[bytes] = []
    with pytest.raises(ServerError) as caught:
        Bearer(setting.sender, OURS, token(EVERYTHING).encode() + b"\0", questions, tls=False)
    assert str(caught.value) == f"FATAL 28000: {told}"
    assert questions == []


# --- Other keys ----------------------------------------------------------------------------------


def test_keys_are_rotated_while_a_pageserver_streams(setting: Setting) -> None:
    wal, place = setting.wal, setting.space.path
    old, new = KEYS[0], new_key()
    keys = write_keys(place / "rotated.pem", old)
    hba = write(place / "rotated.conf", b"hostssl all,replication all all jwt")
    own = setting.on(setting.another("--jwt-public-key", keys, "--hba-file", hba))
    tree = setting.tree(ids_of(4, FIRST)).make(wal.start)
    for_old, for_new = token(for_tenant(OURS), old), token(for_tenant(OURS), new)

    with Bearer(own.sender, tree.ids, for_old.encode() + b"\0") as pageserver:
        pageserver.is_slow = True
        pageserver.follow(wal.start)
        commits = iter(wal.records[number].end for number in (100, 200, 300, 400))

        def check(*, good: str, bad: str) -> None:
            """These are the tokens that let in and that do not, and the stream goes on."""
            assert own.psql(good).is_let_in
            assert own.refused(own.psql(bad)) == FAILED
            lsn = next(commits)
            tree.commit(lsn)
            pageserver.take_to(lsn)
            assert pageserver.wal == wal.read(wal.start, lsn)

        check(good=for_old, bad=for_new)
        write_keys(keys, new)
        check(good=for_old, bad=for_new)
        reload_sender(own.sender)
        check(good=for_new, bad=for_old)
        keys.write_bytes(old.private_pem)
        assert fail_to_reload(own.sender).startswith(f"{keys}: there is a private key in it")
        check(good=for_new, bad=for_old)
    assert key_lines(old) not in own.sender.output
    check_no_token(own.sender.output)


def key_lines(pair: KeyPair) -> str:
    return pair.private_pem.decode().splitlines()[1]


# --- Without an hba file -------------------------------------------------------------------------


def test_without_tls_tokens_are_for_nobody(tmp_path: Path) -> None:
    """And so it does not start."""
    keys = write_keys(tmp_path / "keys.pem", *KEYS)
    told = refusal("--data-dir", tmp_path, "--jwt-public-key", keys, "--listen", "tcp:0")
    assert told == "--jwt-public-key means nothing without --ssl-cert-file"


@pytest.fixture(scope="module")
def unruled(setting: Setting) -> Setting:
    """A walsender that listens everywhere, and was told of keys only."""
    port = free_port()
    keys = write_keys(setting.space.path / "only.pem", *KEYS)
    sender = setting.another("--jwt-public-key", keys, "--listen", f"tcp:{port}:interface=0.0.0.0")
    sender.port = port
    return setting.on(sender)


def test_who_is_on_this_machine_needs_no_token(unruled: Setting) -> None:
    assert unruled.seen("") == set(EVERYBODYS)
    assert unruled.psql("", more="sslmode=disable").is_let_in


@pytest.mark.skipif(
    (ELSEWHERE := address_elsewhere()) is None,
    reason="this machine has no address but the loopback interface's",
)
def test_others_need_one(unruled: Setting) -> None:
    host = f"host={ELSEWHERE}"
    assert unruled.psql(token(for_tenant(OURS)), more=host).is_let_in
    for password, ids, more, told in (
        (token(for_tenant(OURS)), THEIRS, "", f'timeline "{THEIRS}" does not exist'),
        (PASSWORD, OURS, "", FAILED),
        (
            token(EVERYTHING),
            OURS,
            "sslmode=disable",
            f'no pg_hba.conf entry for replication connection from host "{ELSEWHERE}", user '
            '"bearer", no encryption',
        ),
    ):
        answer = unruled.psql(password, ids, more=f"{host} {more}")
        assert unruled.refused(answer, str(ELSEWHERE)) == told
    unruled.sender.check_log()
    check_no_token(unruled.sender.output)
