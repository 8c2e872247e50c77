"""Passwords as they are hashed: the RFC's examples, PostgreSQL's own ways, another implementation.

What a real server makes of them is in test_scram_clients.
"""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scramp.utils import ScramException  # type: ignore[import-untyped]
from scramp.utils import saslprep as scramp_saslprep

from walproto.access.saslprep import saslprep

examples = settings(deadline=None, derandomize=True, max_examples=300)


@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        # RFC 4013, section 3.
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        # RFC 3454, section 6: from right to left, all of it.
        ("\u0627\u0628", "\u0627\u0628"),
        ("\u06271\u0628", "\u06271\u0628"),
        # Spaces of any kind.
        ("a\u00a0b\u2003c\u3000d", "a b c d"),
        ("I \u2665 \u00e9", "I \u2665 \u00e9"),
        # Composed and decomposed.
        ("e\u0301", "\u00e9"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("\ufb01", "fi"),
        # Nothing is left of the soft hyphen and the joiners.
        ("p\u00e4\u200d\u2060ss\ufeff", "p\u00e4ss"),
    ],
)
def test_what_is_typed_in_several_ways_is_one_password(password: str, prepared: str) -> None:
    assert saslprep(password.encode()) == prepared.encode()


@pytest.mark.parametrize(
    "password",
    [
        "\ufe8d\u00ad1",  # RFC 4013: from right to left, but for the end
        "1\ufe8d",
        "\ufe8da\ufe8d",
        "e\u0301\u0007",  # control characters
        "e\u0301\u007f",
        "e\u0301\u0085",
        "e\u0301\u0221",  # unassigned in Unicode 3.2
        "e\u0301\U0001f600",
        "e\u0301\ue000",  # private
        "e\u0301\ufffe",  # no characters at all
        "e\u0301\ufffd",
        "e\u0301\u2ff0",
        "e\u0301\u202e",
        "e\u0301\U000e0041",
        "e\u0341",  # U+0301 once it is normalized, which would be allowed
        "\u00ad\u200d",  # nothing would be left
    ],
)
def test_what_is_not_allowed_is_taken_as_it_is(password: str) -> None:
    assert saslprep(password.encode()) == password.encode()
    # Else this would be nothing to see.
    assert unicodedata.normalize("NFKC", password.replace("\u00ad", "")) != password


@pytest.mark.parametrize("password", [b"\xe9t\xe9", b"\xc3\xa9\xff", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_so_is_what_is_not_utf_8(password: bytes) -> None:
    assert saslprep(password) == password


@examples
@given(st.binary(max_size=20).map(lambda each: bytes(byte & 0x7F for byte in each)))
def test_ascii_stays_what_it_is(password: bytes) -> None:
    assert saslprep(password) == password


def test_where_postgresql_differs_from_the_rfc() -> None:
    # U+200B is in both tables; PostgreSQL looks at spaces first.
    assert saslprep("a\u200bb".encode()) == b"a b"
    # Letters that are written from left to right when they are asked, and not when normalized.
    assert saslprep("a\u2135".encode()) == "a\u05d0".encode()


# Where it is asked what is allowed makes no difference for these; U+200B is told of above.
SETTLED = st.characters(exclude_categories=["Cs"], exclude_characters="\u200b").filter(
    lambda character: unicodedata.normalize("NFKC", character) == character
)


@examples
@given(st.text(SETTLED, min_size=1, max_size=6))
@example("\u05d0\u00e9\u05d0")
@example("\u05d01\u05d0")
@example("\u00ad")
@example("e\u0301\u0323")
def test_another_implementation_agrees(text: str) -> None:
    try:
        expected = scramp_saslprep(text) or text
    except ScramException:
        expected = text
    if text.isascii():
        expected = text
    assert saslprep(text.encode()) == expected.encode()
