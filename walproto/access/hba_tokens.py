"""The lines of a ``pg_hba.conf``, taken apart: comments, continued lines, lists, quotes.

PostgreSQL: ``tokenize_auth_file``, ``next_field_expand`` and ``next_token`` in ``hba.c``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Of characters; a startup packet, and so a name that a client gives, is no longer.
MAX_TOKEN = 10_000

_BETWEEN = re.compile(r"[ \t\r,]*+")
_TOKEN = re.compile(r'(?:[^ \t\r,#"]++|"[^"]*+")+')


class Malformed(ValueError):
    """What is wrong with a line."""


@dataclass(frozen=True, slots=True)
class Token:
    """A word without its quotes; one that began with a quote is no keyword, whatever it says."""

    text: str
    is_quoted: bool

    def is_one_of(self, *keywords: str) -> bool:
        return not self.is_quoted and self.text in keywords


#: What stands between blanks: one token, or several with commas in between.
Field = list[Token]


def continued_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a file, each with the number of its first line.

    A line that ends with a backslash goes on in the next one, even in a comment or in quotes.
    """
    first = 1
    parts: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        part = line.rstrip("\r")
        if part.endswith("\\"):
            parts.append(part[:-1])
        else:
            yield first, "".join([*parts, part])
            parts = []
            first = number + 1
    if parts:
        yield first, "".join(parts)


def fields_of(line: str) -> list[Field]:
    """The fields of a line, none if it is blank or a comment.  Raises Malformed."""
    fields: list[Field] = []
    goes_on = False
    for token, goes_on_behind in _tokens(line):
        if goes_on:
            fields[-1].append(token)
        else:
            fields.append([token])
        goes_on = goes_on_behind
    return fields


def _tokens(line: str) -> Iterator[tuple[Token, bool]]:
    """The tokens of a line, each with whether a comma follows at once."""
    if "\0" in line:
        raise Malformed("there is a null character in the line")
    position = _end(_BETWEEN, line, 0)
    while position < len(line) and line[position] != "#":
        end = _end(_TOKEN, line, position)
        if line.startswith('"', end):
            raise Malformed("unterminated quoted string")
        token = _unquoted(line[position:end])
        if len(token.text) > MAX_TOKEN:
            raise Malformed("authentication file token too long")
        if token.text.startswith("@") and len(token.text) > 1 and not token.is_quoted:
            raise Malformed(f'inclusion of a file, "{token.text}", is not supported')
        yield token, line.startswith(",", end)
        position = _end(_BETWEEN, line, end)


def _end(pattern: re.Pattern[str], line: str, position: int) -> int:
    match = pattern.match(line, position)
    return position if match is None else match.end()


def _unquoted(raw: str) -> Token:
    # What is outside of quotes and what is inside take turns.  Nothing between two quoted parts
    # means that a quote was written twice, for itself.
    parts = raw.split('"')
    for index in range(2, len(parts) - 1, 2):
        parts[index] = parts[index] or '"'
    return Token("".join(parts), raw.startswith('"'))
