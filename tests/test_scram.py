"""SCRAM in memory: the RFC's own example, another implementation as the client, and all that a
client can say wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import struct
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scramp import ScramClient, ScramException  # type: ignore[import-untyped]

from tests.guarded import WRONG_PASSWORD as REFUSED
from tests.guarded import Files, come, over_tls, scram
from tests.scram_conversations import (
    BARE,
    BINDING,
    BOUND,
    CHALLENGE,
    CONVERSATIONS,
    FINAL,
    GOOD,
    NONCE,
    OFFER,
    OFFER_PLUS,
    PASSWORD,
    SALT,
    VERIFIER,
    WRONG,
    WRONG_PASSWORD,
    Answer,
    Client,
    converse,
    final,
    tls,
)
from walproto.access.scram import Verifier, authenticate, new_nonce
from walproto.errors import InvalidPassword, ReportedError


def ours(answers: list[Answer], end_point: bytes | None = None) -> list[str]:
    """What we tell a client; over TLS if there is an end point."""
    exchange = authenticate("alice", VERIFIER, True, tls(end_point) if end_point else None)
    return converse(exchange, Client(end_point), answers).messages


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_without_tls(name: str) -> None:
    answers, told = CONVERSATIONS[name]
    assert ours(answers) == [OFFER, *told]


@pytest.mark.parametrize("name", BINDING)
def test_with_channel_binding(name: str) -> None:
    answers, told = BINDING[name]
    assert ours(answers, b"of a certificate") == [OFFER_PLUS, *told]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_over_tls_with_nothing_to_bind_to_it_is_as_without(name: str) -> None:
    answers, told = CONVERSATIONS[name]
    exchange = authenticate("alice", VERIFIER, True, tls(None))
    assert converse(exchange, Client(), answers).messages == [OFFER, *told]


# --- Whom it lets in -----------------------------------------------------------------------------


def test_the_example_of_rfc_7677() -> None:
    verifier = Verifier.of("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
    exchange = authenticate(
        "user", verifier, True, None, make_nonce=lambda: b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    next(exchange)
    message = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    challenge = exchange.send(b"SCRAM-SHA-256\0" + struct.pack(">I", len(message)) + message)
    nonce = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    assert challenge[9:] == nonce + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    with pytest.raises(StopIteration) as end:
        exchange.send(b"c=biws," + nonce + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    assert end.value.value[9:] == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def scramp(
    exchange: Generator[bytes, bytes, bytes], password: str, end_point: bytes | None
) -> None:
    """Another implementation as the client; it raises what either of them does."""
    offered = next(exchange)[9:].rstrip(b"\0").decode().split("\0")
    binding = end_point and ("tls-server-end-point", end_point)
    client = ScramClient(offered, "ignored", password, channel_binding=binding)
    said = client.get_client_first().encode()
    mechanism = client.mechanism_name.encode()
    challenge = exchange.send(mechanism + b"\0" + struct.pack(">I", len(said)) + said)
    client.set_server_first(challenge[9:].decode())
    with pytest.raises(StopIteration) as end:
        exchange.send(client.get_client_final().encode())
    client.set_server_final(end.value.value[9:].decode())


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    password=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)
    | st.sampled_from(["p\u00e4ssword", "pa\u0308ssword", "\u2168\u00ad", "\u05d0\u05d1"]),
    salt=st.binary(min_size=12, max_size=40),
    iterations=st.integers(4096, 5000),
    end_point=st.none() | st.binary(min_size=1, max_size=64),
    has_tls=st.booleans(),
)
def test_another_implementation_comes_in(
    password: str, salt: bytes, iterations: int, end_point: bytes | None, has_tls: bool
) -> None:
    assume(password != "wrong")
    verifier = Verifier.of(password, salt, iterations)
    is_tls = has_tls or end_point is not None
    connection = tls(end_point) if is_tls else None
    scramp(authenticate("alice", verifier, True, connection), password, end_point)
    with pytest.raises(InvalidPassword):
        scramp(authenticate("alice", verifier, True, connection), "wrong", end_point)
    with pytest.raises(InvalidPassword):
        scramp(authenticate("alice", verifier, False, connection), password, end_point)


def test_another_implementation_that_could_bind_comes_in_where_that_is_not_offered() -> None:
    # It says so with the flag "y".
    scramp(authenticate("alice", VERIFIER, True, tls(None)), PASSWORD, b"what it knows of us")


def test_it_notices_a_server_that_does_not_know_the_password() -> None:
    other = Verifier.of("other", SALT)
    odd = Verifier(4096, SALT, VERIFIER.stored_key, other.server_key)
    with pytest.raises(ScramException, match="server signature"):
        scramp(authenticate("alice", odd, True, None), PASSWORD, None)


def test_only_the_operator_is_told_who_is_known() -> None:
    wrong: list[Answer] = [GOOD[0], final(FINAL, "wrong")]
    told = {
        name: converse(authenticate("alice", VERIFIER, is_known, None), Client(), answers)
        for name, is_known, answers in (
            ("wrong", True, wrong),
            ("unknown", False, wrong),
            ("unknown and right", False, GOOD),
        )
    }
    assert {tuple(each.messages) for each in told.values()} == {(OFFER, CHALLENGE, WRONG)}
    assert told["wrong"].log == "The password is wrong."
    assert told["unknown"].log == told["unknown and right"].log == "There is no such user."
    exchange = authenticate("alice", VERIFIER, False, None, why_unknown="She has left.")
    assert converse(exchange, Client(), GOOD).log == "She has left."


COSTLY = (
    *((hashlib, "pbkdf2_hmac"), (hashlib, "sha256"), (hashlib, "shake_256")),
    *((hmac, "digest"), (hmac, "compare_digest")),
)
"""What is called to make and to verify a proof."""


def test_an_unknown_user_costs_what_a_known_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is computed of as many bytes, one after the other, from who the user is to the
    refusal; the names are as long as each other."""
    calls: list[tuple[object, ...]] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((name, *(len(arg) if isinstance(arg, bytes) else arg for arg in args)))
            return function(*args)

        return call

    files = Files(tmp_path)
    stored = f"SCRAM-SHA-256$4096:{base64.b64encode(SALT).decode()}${'A' * 43}=:{'B' * 43}="
    md5 = "md5" + "0" * 32
    files.users(f'"alice" "{PASSWORD}"\n"clara" "{stored}"\n"david" "{md5}"\n"edgar" ""\n')
    guard = files.guard()
    for module, name in COSTLY:
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    costs = {}
    for user in ("alice", "clara", "david", "edgar", "nobod"):
        calls.clear()
        said = come(guard, over_tls(), scram("wrong"), user=user)
        assert said.outcome == REFUSED.format(user)
        costs[user] = list(calls)
    assert {name for name, *_ in costs["alice"]} == {name for _, name in COSTLY}
    for user, cost in costs.items():
        assert cost == costs["alice"], user


def test_a_proof_is_of_no_use_twice() -> None:
    said: list[bytes] = []

    def overheard(client: Client) -> bytes:
        answer = GOOD[1]
        assert callable(answer)
        said.append(answer(client))
        return said[0]

    assert ours([GOOD[0], overheard])[-1] == "R 0"
    assert "Nonce does not match" in ours([GOOD[0], said[0]])[-1]


def test_no_nonce_is_made_twice() -> None:
    nonces = {new_nonce() for _ in range(1000)}
    assert len(nonces) == 1000
    assert {len(nonce) for nonce in nonces} == {24}


def test_names_are_told_as_they_were_said() -> None:
    for user in ("\u00e9ve", "a\udce9b", 'q"uote'):
        exchange = authenticate(user, VERIFIER, True, None)
        told = converse(exchange, Client(), [GOOD[0], final(FINAL, "wrong")])
        assert told.messages[-1] == WRONG_PASSWORD.format(user)


# --- Whatever a client says ----------------------------------------------------------------------

examples = settings(deadline=None, derandomize=True, max_examples=300)
pieces = st.sampled_from(
    [
        *(b"n", b"y", b"p", b"p=", BOUND, b",", b",,", b"=", b"n=", b"r=", NONCE, b"c=", b"biws"),
        *(b"eSws", b"m=", b"a=", b"x=1", b"\0", b"\xff", b"v", b"p=" + b"A" * 43 + b"="),
    ]
)
something = st.binary(max_size=40) | st.lists(pieces, max_size=12).map(b"".join)
beginnings = st.sampled_from([b"", b"SCRAM-SHA-256\0", b"SCRAM-SHA-256-PLUS\0"])


def counted(beginning: bytes, data: bytes) -> bytes:
    return beginning + struct.pack(">I", len(data)) + data


@examples
@given(
    answers=st.tuples(
        st.builds(counted, beginnings, something) | something,
        something | st.just(b"n,," + BARE),
        something,
    ),
    end_point=st.none() | st.just(b"of a certificate"),
    is_known=st.booleans(),
)
@example((counted(b"SCRAM-SHA-256\0", b"n,," + BARE), b"c=biws,r=", b""), None, True)
def test_whatever_it_says_it_is_refused(
    answers: tuple[bytes, ...], end_point: bytes | None, is_known: bool
) -> None:
    exchange = authenticate("alice", VERIFIER, is_known, tls(end_point))
    next(exchange)
    end: BaseException | None = None
    for answer in answers:
        try:
            exchange.send(answer)
        except (ReportedError, StopIteration) as error:
            end = error
            break
    assert isinstance(end, ReportedError)
    assert end.fatal


@examples
@given(st.data())
def test_a_final_message_that_was_changed_is_refused(data: st.DataObject) -> None:
    def changed(client: Client) -> bytes:
        answer = GOOD[1]
        assert callable(answer)
        good = answer(client)
        position = data.draw(st.integers(0, len(good)))
        end = data.draw(st.integers(position, len(good)))
        instead = data.draw(st.binary(max_size=3))
        bad = good[:position] + instead + good[end:]
        # Two ways to write one proof: the last character has bits to spare.
        return bad if bad[:-2] != good[:-2] or len(bad) != len(good) else b""

    (*_, told) = ours([GOOD[0], changed])
    assert told.startswith("FATAL ")


# --- What is stored ------------------------------------------------------------------------------

STORED = (
    "SCRAM-SHA-256$4096:AAECAwQFBgcICQoLDA0ODw=="
    f"${base64.b64encode(VERIFIER.stored_key).decode()}"
    f":{base64.b64encode(VERIFIER.server_key).decode()}"
)


def test_a_secret_as_postgresql_stores_it() -> None:
    assert Verifier.parse(STORED) == VERIFIER
    assert Verifier.parse(STORED.replace("4096", "2147483647")).iterations == 2**31 - 1


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("SCRAM-SHA-256", "SCRAM-SHA-1"),
        ("SCRAM", "scram"),
        ("SCRAM-SHA-256$", ""),
        ("4096", ""),
        ("4096", "0"),
        ("4096", "-1"),
        ("4096", "2147483648"),
        ("4096", "4_096"),
        ("4096", " 4096"),
        ("4096", "\u0664"),
        ("4096", "9" * 5000),
        ("4096:", "4096"),
        ("AAECAwQFBgcICQoLDA0ODw==", ""),
        ("AAECAwQFBgcICQoLDA0ODw==", "AAECAwQFBgcICQoLDA0ODw"),
        ("AAECAwQFBgcICQoLDA0ODw==", "!"),
        ("==$", "==$AAAA"),
        ("==$", "==:"),
        ("==$", "==$$"),
        (STORED[-44:], "AAAA"),
        (STORED[-44:], ""),
        (STORED[-44:], "\u00e9" * 44),
        (STORED[-44:], "\udce9"),
        (STORED[-45:], ""),
        (STORED, STORED + ":AAAA"),
        (STORED, ""),
    ],
)
def test_what_is_no_secret(part: str, instead: str) -> None:
    assert part in STORED
    bad = STORED.replace(part, instead, 1)
    with pytest.raises(ValueError, match="not a SCRAM-SHA-256 secret") as caught:
        Verifier.parse(bad)
    shown = "".join(traceback.format_exception(caught.value))
    assert not [key for key in re.findall(r"[A-Za-z0-9+/]{20,}", bad) if key in shown]


def test_a_repr_shows_no_secret() -> None:
    assert repr(VERIFIER) == "Verifier(iterations=4096)"
    assert str(VERIFIER) == "Verifier(iterations=4096)"
