"""SASLprep, which makes one password of the several ways to type it (RFC 4013).

As PostgreSQL does it (``pg_saslprep`` in ``saslprep.c``), because what it has made of a password is
in the secrets that it has stored, and libpq does the same on the other side.  It differs from the
RFC in this:

- ASCII is taken as it is, control characters too.
- What is not allowed is no error: the password is then taken as it is, byte for byte.
- U+200B, which is in both tables, becomes a space and not nothing.
- What is allowed is asked of the characters before they are normalized, not behind that.
"""

from __future__ import annotations

import stringprep
import unicodedata

# Without C.1.2, which is mapped to spaces before, and C.5, surrogates, which are not in UTF-8.
_PROHIBITED = (
    stringprep.in_table_a1,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def saslprep(password: bytes) -> bytes:
    """The password as it is hashed."""
    if password.isascii():
        return password
    try:
        text = password.decode()
    except UnicodeDecodeError:
        return password
    mapped = "".join(map(_mapped, text))
    if not mapped or not _is_allowed(mapped):
        return password
    # The newest Unicode, as with PostgreSQL: normalization is stable for all that is allowed.
    return unicodedata.normalize("NFKC", mapped).encode()


def _mapped(character: str) -> str:
    if stringprep.in_table_c12(character):
        return " "
    return "" if stringprep.in_table_b1(character) else character


def _is_allowed(text: str) -> bool:
    if any(is_prohibited(character) for character in text for is_prohibited in _PROHIBITED):
        return False
    if not any(map(stringprep.in_table_d1, text)):
        return True
    # Text that is written from right to left (RFC 3454, section 6).
    ends_so = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return ends_so and not any(map(stringprep.in_table_d2, text))
