"""Tokens that are good, and all kinds of tokens that are not."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.jwt_keys import (
    EVERYTHING,
    FOR_TENANT,
    TENANT,
    KeyPair,
    base64url,
    key,
    new_key,
)
from walproto.access.grant import Scope
from walproto.access.tokens import (
    LAST_TIME,
    MAX_SIZE,
    InvalidToken,
    Keys,
)

NOW = 1_800_000_000.5
ALGORITHMS = ("EdDSA", "RS256", "ES256")
TENANT_ONLY = Scope(tenants=frozenset({TENANT}))


def of(*pairs: KeyPair) -> Keys:
    """What a file with these keys gives."""
    return Keys(tuple((pair.algorithm, pair.private.public_key()) for pair in pairs))


def refusal(token: str, keys: Keys | None = None) -> str:
    """Why a token is refused."""
    with pytest.raises(InvalidToken) as caught:
        (keys or of(key())).verify(token, NOW)
    reason = str(caught.value)
    assert reason.isprintable()
    assert len(reason) < 120
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for part in token.split("."):
        assert len(part) < 9 or part not in reason
    return reason


def claims(**more: Any) -> str:
    """The refusal of a token for everything that says this besides."""
    return refusal(key().token(EVERYTHING | more))


def payload(text: str) -> str:
    """The refusal of a token with that payload, which is signed as it should be."""
    return refusal(key().signed(text.encode()))


# --- What a token lets one see ---------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_token_is_good_for(algorithm: str) -> None:
    pair = key(algorithm)
    assert of(pair).verify(pair.token(EVERYTHING), NOW) is None
    assert of(pair).verify(pair.token(FOR_TENANT), NOW) == TENANT_ONLY


def test_a_tenant_id_in_capitals() -> None:
    token = key().token({"scope": "tenant", "tenant_id": TENANT.upper()})
    assert of(key()).verify(token, NOW) == TENANT_ONLY


def test_a_tenant_that_is_named_limits_any_token() -> None:
    token = key().token(EVERYTHING | {"tenant_id": TENANT})
    assert of(key()).verify(token, NOW) == TENANT_ONLY
    assert of(key()).verify(key().token(EVERYTHING | {"tenant_id": None}), NOW) is None


def test_what_else_a_token_may_say() -> None:
    """As Neon's do, which have ``iss`` and ``iat``; headers that point to keys are passed over."""
    more = {"iss": "neon.controlplane", "iat": 1678442479, "sub": "x", "jti": "1"}
    headers = {"kid": "k1", "jku": "https://example.org/", "x5u": "https://example.org/x"}
    assert of(key()).verify(key().token(EVERYTHING | more, headers), NOW) is None


def test_any_of_several_keys_will_do() -> None:
    first, second = new_key(), new_key()
    keys = of(first, key("RS256"), second, key("ES256"))
    for pair in (first, second, key("RS256"), key("ES256")):
        assert keys.verify(pair.token(EVERYTHING), NOW) is None
    assert refusal(new_key().token(EVERYTHING), keys) == "none of our EdDSA keys has signed it"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, "its scope is missing"),
        ({"scope": None}, "its scope is missing"),
        ({"scope": "pageserverapi"}, 'its scope is "pageserverapi", not "tenant" or'),
        ({"scope": "admin"}, 'its scope is "admin", not'),
        ({"scope": "Tenant", "tenant_id": TENANT}, 'its scope is "Tenant", not'),
        ({"scope": "tenant safekeeperdata"}, "its scope is something else"),
        ({"scope": "\n" * 50}, "its scope is something else"),
        ({"scope": ["safekeeperdata"]}, "its scope is something else"),
        ({"scope": {"safekeeperdata": 1}}, "its scope is something else"),
        ({"scope": True}, "its scope is something else"),
        ({"scope": "tenant"}, 'its scope is "tenant", and it has no tenant_id'),
        ({"scope": "tenant", "tenant_id": None}, 'its scope is "tenant", and it has no'),
        ({"scope": "tenant", "tenant_id": ""}, "its tenant_id is not an ID"),
        ({"scope": "tenant", "tenant_id": TENANT[1:]}, "its tenant_id is not an ID"),
        ({"scope": "tenant", "tenant_id": TENANT + "\n"}, "its tenant_id is not an ID"),
        ({"scope": "tenant", "tenant_id": TENANT[1:] + "٣"}, "its tenant_id is not an ID"),
        ({"scope": "tenant", "tenant_id": int(TENANT, 16)}, "its tenant_id is not an ID"),
        ({"scope": "tenant", "tenant_id": [TENANT]}, "its tenant_id is not an ID"),
        ({"scope": "safekeeperdata", "tenant_id": "all"}, "its tenant_id is not an ID"),
        (FOR_TENANT | {"aud": "somebody"}, "it is meant for somebody else"),
        (EVERYTHING | {"aud": None}, "it is meant for somebody else"),
    ],
)
def test_what_no_token_is_good_for(said: dict[str, Any], reason: str) -> None:
    assert refusal(key().signed(json.dumps(said).encode())).startswith(reason)


# --- When it is good -------------------------------------------------------------------------


def test_a_token_is_good_until_it_expires() -> None:
    keys = of(key())
    for expires in (NOW + 1, int(NOW) + 1, NOW + 0.25, LAST_TIME):
        assert keys.verify(key().token(EVERYTHING | {"exp": expires}), NOW) is None
    for expired in (NOW, int(NOW), 0, NOW - 0.25):
        assert claims(exp=expired).startswith(f"it has expired (exp {expired}, and it is 18000")


def test_a_token_is_good_from_when_it_says() -> None:
    keys = of(key())
    for begins in (0, NOW, int(NOW), NOW - 0.25):
        assert keys.verify(key().token(EVERYTHING | {"nbf": begins}), NOW) is None
    for later in (NOW + 0.25, int(NOW) + 1, LAST_TIME):
        assert claims(nbf=later).startswith(f"it is not valid yet (nbf {later}, and it is 18000")


@pytest.mark.parametrize("name", ["exp", "nbf"])
def test_what_is_no_time(name: str) -> None:
    for value in (f'"{LAST_TIME}"', "true", "false", "null", "[]", f"[{LAST_TIME}]", "{}", '""'):
        said = f'{{"scope":"safekeeperdata","{name}":{value}}}'
        assert payload(said) == f'its "{name}" is no number'
    for value in ("-1", "-1e9", "1e999", "-1e999", "9" * 400, f"{LAST_TIME}000", "1.8e12"):
        said = f'{{"scope":"safekeeperdata","{name}":{value}}}'
        assert payload(said) == f'its "{name}" is no time in seconds since 1970'
    for value in ("NaN", "Infinity", "-Infinity"):
        said = f'{{"scope":"safekeeperdata","{name}":{value}}}'
        assert payload(said) == f"there is {value} in it, which is no JSON"
    assert (
        payload(f'{{"scope":"safekeeperdata","{name}":{"9" * 5000}}}') == "its payload is no JSON"
    )


# --- Who has signed it -----------------------------------------------------------------------


@pytest.mark.parametrize("none", ["none", "None", "NONE", "nOnE", "", " none", "none\0"])
def test_none_is_no_algorithm(none: str) -> None:
    body = base64url(json.dumps(EVERYTHING).encode())
    header = base64url(json.dumps({"alg": none}).encode())
    *_, signature = key().token(EVERYTHING).split(".")
    assert refusal(f"{header}.{body}.") == "it is no signed JSON Web Token"
    assert refusal(f"{header}.{body}") == "it is no signed JSON Web Token"
    for keys in (of(key()), of(*map(key, ALGORITHMS))):
        assert refusal(f"{header}.{body}.{signature}", keys).startswith("its alg is ")


def test_an_unsigned_token_by_the_library() -> None:
    assert refusal(jwt.encode(EVERYTHING, "", "none")) == "it is no signed JSON Web Token"


@pytest.mark.parametrize("own", ALGORITHMS)
@pytest.mark.parametrize("hashed", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_secret(own: str, hashed: str) -> None:
    """The file with the public key, to the byte, in all the ways it might be taken for one."""
    pair = key(own)
    raw = pair.private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for secret in (pair.public_pem, pair.public_pem.strip(), raw, b""):
        for name in (hashed, own):
            header = base64url(json.dumps({"alg": name}).encode())
            text = f"{header}.{base64url(json.dumps(EVERYTHING).encode())}"
            digest = hashlib.new(hashed.replace("HS", "sha"))
            signature = hmac.digest(secret, text.encode(), digest.name)
            reason = refusal(f"{text}.{base64url(signature)}", of(pair))
            ours = f"none of our {own} keys has signed it"
            assert reason == (ours if name == own else f'its alg is "{hashed}", not {own}')


def test_a_key_is_used_with_its_own_algorithm_only() -> None:
    """Whatever the header says, and whoever has signed it with which."""
    for own in ALGORITHMS:
        for signer in ALGORITHMS:
            for said in (*ALGORITHMS, "RS384", "PS256", "ES384", "ES256K", "Ed25519", "eddsa"):
                header = json.dumps({"alg": said}).encode()
                token = key(signer).signed(json.dumps(EVERYTHING).encode(), header)
                if own == signer == said:
                    assert of(key(own)).verify(token, NOW) is None
                elif own == said:
                    assert refusal(token, of(key(own))) == f"none of our {own} keys has signed it"
                else:
                    assert refusal(token, of(key(own))) == f'its alg is "{said}", not {own}'


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
def test_an_rsa_key_is_used_with_one_hash(algorithm: str) -> None:
    token = jwt.encode(EVERYTHING, key("RS256").private, algorithm)
    assert refusal(token, of(key("RS256"))) == f'its alg is "{algorithm}", not RS256'


def test_a_key_that_the_token_brings_along() -> None:
    ours, theirs = key("RS256"), new_key("RS256")
    algorithm = jwt.get_algorithm_by_name("RS256")
    jwk = json.loads(algorithm.to_jwk(theirs.private.public_key()))
    for headers in ({"jwk": jwk}, {"x5c": [base64url(theirs.public_pem)]}, {"kid": "../key"}):
        token = theirs.token(EVERYTHING, headers)
        assert refusal(token, of(ours)) == "none of our RS256 keys has signed it"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_byte_may_be_changed(algorithm: str) -> None:
    """Each of the signed text's characters, and the signature's, to another one."""
    keys, token = of(key(algorithm)), key(algorithm).token(FOR_TENANT)
    for at, character in enumerate(token):
        if at == len(token) - 1:
            continue  # not all of its bits count
        for other in {"A", "Q"} - {character}:
            refusal(token[:at] + other + token[at + 1 :], keys)
    for size in range(len(token) - 1):
        refusal(token[:size], keys)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_claims_under_a_good_signature(algorithm: str) -> None:
    head, _, signature = key(algorithm).token(FOR_TENANT).split(".")
    body = base64url(json.dumps(EVERYTHING).encode())
    reason = refusal(f"{head}.{body}.{signature}", of(key(algorithm)))
    assert reason == f"none of our {algorithm} keys has signed it"


def test_signatures_of_nothing() -> None:
    """Zeros, which some libraries have taken for an ECDSA signature (CVE-2022-21449)."""
    for algorithm in ALGORITHMS:
        head, body, _ = key(algorithm).token(EVERYTHING).split(".")
        for signature in (bytes(1), bytes(64), bytes(256), b"\xff" * 64):
            refusal(f"{head}.{body}.{base64url(signature)}", of(key(algorithm)))


# --- What it looks like ----------------------------------------------------------------------


def test_what_is_no_token() -> None:
    good = key().token(EVERYTHING)
    head, body, signature = good.split(".")
    for wrong in (
        "",
        "secret",
        ".",
        "..",
        "a.b",
        f"{head}..{signature}",
        f"{good}.",
        f".{good}",
        f"{good}.{signature}.{signature}",
        f"{good}=",
        f"{good}\n",
        f" {good}",
        f"{good}\0",
        f"{head}=.{body}.{signature}",
        f"{head}.{body}.+/{signature}",
        f"{head}.{body}.é{signature}",
        f"{head}.{body}.\udcff{signature}",
        f"{head}．{body}.{signature}",  # noqa: RUF001
        f"Bearer {good}",
    ):
        assert refusal(wrong) == "it is no signed JSON Web Token"


def test_it_has_a_maximum_length() -> None:
    """Which is more than any token needs, and is not looked at any further."""
    filler = "x" * (MAX_SIZE // 2)
    assert of(key()).verify(key().token(EVERYTHING | {"more": filler}), NOW) is None
    assert claims(more=filler * 2) == f"it has more than {MAX_SIZE} characters"


@pytest.mark.parametrize("part", ["header", "payload"])
def test_parts_that_are_no_json_object(part: str) -> None:
    good = json.dumps(EVERYTHING).encode()

    def reason(text: bytes) -> str:
        token = key().signed(text) if part == "payload" else key().signed(good, text)
        return refusal(token)

    for text in (b"x", b"{", b"{}x", b"{'a':1}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a":"\xff"}'):
        assert reason(text) == f"its {part} is no JSON"
    for text in (b"[" * 5000, b'{"a":' * 1200, b"[" * 2500 + b"]" * 2500):
        assert reason(text) in (f"its {part} is no JSON", f"its {part} is no JSON object")
    for text in (b"[]", b"null", b"1", b'"x"', b"true", b"[" + good + b"]"):
        assert reason(text) == f"its {part} is no JSON object"
    for text in (b'{"a":NaN}', b'{"a":[Infinity]}', b'{"a":{"b":-Infinity}}'):
        assert reason(text).endswith("in it, which is no JSON")


def test_deep_nesting_in_a_token_that_is_good_otherwise() -> None:
    """How deep it may be depends on the version of Python."""
    deep = b"[" * 2000 + b"]" * 2000
    body = b'{"scope":"safekeeperdata","x":%s}' % deep
    for token in (
        key().signed(body),
        key().signed(json.dumps(EVERYTHING).encode(), b'{"alg":"EdDSA","x":%s}' % deep),
    ):
        try:
            outcome = str(of(key()).verify(token, NOW))
        except InvalidToken as refused:
            outcome = str(refused)
        assert outcome == "None" or "is no JSON" in outcome or "has signed it" in outcome


def test_nothing_is_said_twice() -> None:
    other = "f" * 32
    for text in (
        f'{{"scope":"tenant","tenant_id":"{TENANT}","tenant_id":"{other}"}}',
        f'{{"scope":"tenant","tenant_id":"{TENANT}","scope":"safekeeperdata"}}',
        '{"scope":"safekeeperdata","exp":1,"exp":9999999999}',
        r'{"scope":"safekeeperdata","\u0073cope":"safekeeperdata"}',
        '{"scope":"safekeeperdata","x":{"y":1,"y":1}}',
    ):
        assert payload(text) == "it says something twice"
    good = json.dumps(EVERYTHING).encode()
    token = key().signed(good, b'{"alg":"EdDSA","alg":"none"}')
    assert refusal(token) == "it says something twice"


def test_headers_that_ask_for_something() -> None:
    good = json.dumps(EVERYTHING).encode()
    for critical in ("[]", '["b64"]', '["exp"]', "null", '"x"'):
        header = f'{{"alg":"EdDSA","b64":true,"exp":1,"crit":{critical}}}'.encode()
        assert refusal(key().signed(good, header)).startswith('its header has "crit"')
    for text in (b'"alg":"EdDSA","b64":false', b'"alg":"EdDSA","kid":7'):
        assert refusal(key().signed(good, b"{%s}" % text)).startswith("none of our EdDSA keys")
    for text in (b"", b'"alg":null', b'"ALG":"EdDSA"', b'"alg":["EdDSA"]', b'"alg":{"EdDSA":1}'):
        assert refusal(key().signed(good, b"{%s}" % text)).startswith("its alg is ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
names = st.sampled_from(["alg", "typ", "crit", "kid", "b64", "scope", "tenant_id", "exp", "nbf"])
objects = st.dictionaries(names | st.text(), json_values | st.just("EdDSA"))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text() | st.from_regex(r"[\w-]+\.[\w-]+\.[\w-]+"))
@example("a.a.a")
@example("e30.e30.e30")
def test_random_text_is_refused(text: str) -> None:
    refusal(text)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(objects, objects | json_values)
def test_random_headers_and_payloads(header: Any, body: Any) -> None:
    """Signed as they should be: whatever is in there, nothing but a refusal comes of it."""
    header = {"alg": "EdDSA"} | header
    token = key().signed(json.dumps(body).encode(), json.dumps(header).encode())
    refusal(token)
