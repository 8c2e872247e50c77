"""What may not be logged, and how it is kept out of a text that may.

Passwords and other secrets come in connection strings, of libpq's two kinds: keywords and values,
or a URI.  Operators write them, and clients, well or badly; and clients that nobody knows yet may
write what takes long.  So all that is done here takes time in proportion to the length of the text:
a search begins only where a word does, and quantifiers are possessive (``*+``, never of a group:
Python before 3.11.5 has them wrong) or have but one way.

PostgreSQL documentation: "libpq", chapter "Connection Strings" (``conninfo_parse`` and
``conninfo_uri_parse_options`` in ``fe-connect.c``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

BLANK = "***"
"""What stands in a text where a secret was."""

# What the name of a secret contains: password, sslpassword, scram_client_key, oauth_client_secret,
# and what one may take for them.  Not passfile, sslkey and others that name a file.
_SECRET = "pass(?!file)|pwd|secret|_key"
_IS_SECRET = re.compile(_SECRET, re.IGNORECASE)
_IN_TEXT = re.compile(
    rf"""(?<![\w.%-])  # the whole word with the name
        ((?:(?!{_SECRET})[\w.%-])* (?:{_SECRET}) (?:(?!%3d)[\w.%-])* \s*+ (?:=|%3d))
        .*""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_USER_IN_URI = r"postgres(?:ql)?://[^:@/\s]*+:"
_URI_IN_TEXT = re.compile(rf"(?<!\S)((?:(?!{_USER_IN_URI})\S)*{_USER_IN_URI})\S*@", re.IGNORECASE)

# Spaces are those of C, which are fewer than Python's.
_SPACES = " \t\n\v\f\r"
_PAIR = re.compile(
    r"\s*(?P<keyword>[^=\s]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?!')(?:[^\s\\]|\\.|\\$)*)",
    re.ASCII | re.DOTALL,
)
_BACKSLASHES = re.compile(r"\\+")
_REST = re.compile(r"\s*", re.ASCII)
_SECRET_REST = re.compile(rf"(?:{_SECRET})[\w.%-]*\s*=?\s*'?", re.ASCII | re.IGNORECASE)
_URI = re.compile(r"postgres(?:ql)?://", re.IGNORECASE)
_PASSWORD_IN_URI = re.compile(r"://[^:@/]*:([^@/]*)@")
# Who has forgotten to escape a "@", "/" or "?" in a password, meant it up to a later "@".
_MEANT_IN_URI = re.compile(r"://[^:@?]*:(?P<value>(?=[^@/]*@).*|[^?]*)@", re.DOTALL)
_PARAMETER = re.compile(r"(?<=[?&])(?P<keyword>[^?&=]*+)=(?P<value>[^&]*+)")


def blanked(conninfo: str) -> str:
    """A connection string for the log: the secrets in it are blanked, whatever it looks like."""
    made: list[str] = []
    position = 0
    for start, end, shown in _blanks(conninfo):
        made += [conninfo[position:start], shown]
        position = end
    return "".join([*made, conninfo[position:]])


def censored(text: str) -> str:
    """A text for the log, in which there may be connection strings or pieces of them: behind
    what looks like the keyword of a secret, nothing is left of it."""
    return _IN_TEXT.sub(rf"\1{BLANK}", _URI_IN_TEXT.sub(rf"\1{BLANK}@", text))


def secrets_in(conninfo: str) -> set[str]:
    """The secrets in a connection string, as they are and as they are written there."""
    found = set(_PASSWORD_IN_URI.findall(conninfo))
    for start, end, shown in _blanks(conninfo):
        if shown == BLANK:
            found.add(conninfo[start:end])
    unquoted = {written[1:].removesuffix("'") for written in found if written.startswith("'")}
    found |= unquoted
    found |= {re.sub(r"(?s)\\(.)", r"\1", written) for written in found}
    return (found | {unquote(written) for written in found}) - {""}


def masked(text: str, secrets: Iterable[str]) -> str:
    """A text in which a server may repeat what it was told, for the log, without these secrets,
    however often they are escaped."""
    # It is looked for in the text without backslashes, and masked with those in it and before it.
    unescaped = text.replace("\\", "")
    positions = [-1, *(at for at, character in enumerate(text) if character != "\\")]
    spans = []
    for secret in secrets:
        wanted = secret.replace("\\", "")
        if not wanted:
            spans += [found.span() for found in _BACKSLASHES.finditer(text)]
            continue
        start = unescaped.find(wanted)
        while start >= 0:
            end = start + len(wanted)
            spans.append((positions[start] + 1, positions[end] + 1))
            start = unescaped.find(wanted, end)
    made: list[str] = []
    position = 0
    for start, end in sorted(spans):
        if start >= position:  # otherwise it overlaps what has been masked already
            made += [text[position:start], BLANK]
        position = max(position, end)
    return "".join([*made, text[position:]])


def _blanks(conninfo: str) -> Iterator[tuple[int, int, str]]:
    """What of a connection string is not shown, and what is in its place."""
    if _URI.match(conninfo):
        yield from _blanks_in_uri(conninfo)
        return
    position, length, has_secret = 0, len(conninfo.rstrip(_SPACES)), False
    while position < length:
        pair = _PAIR.match(conninfo, position)
        if pair is None:  # libpq does not understand it from here on, either
            rest = _REST.match(conninfo, position) if has_secret else None
            rest = rest or _SECRET_REST.search(conninfo, position)
            if rest is not None:
                yield rest.end(), length, BLANK
            return
        position = pair.end()
        start, end = pair.span("value")
        value = pair["value"]
        if _IS_SECRET.search(pair["keyword"]):
            has_secret = True
            yield start, end, BLANK
        elif (shown := censored(value)) != value:
            has_secret = True
            is_cut = value.startswith("'") and shown.endswith(BLANK)
            yield start, end, shown + "'" * is_cut


def _blanks_in_uri(uri: str) -> Iterator[tuple[int, int, str]]:
    position = 0
    password = _MEANT_IN_URI.match(uri, uri.index("://"))
    if password is not None:
        position = password.end()
        yield *password.span("value"), BLANK
    query = uri.find("?", position)
    for parameter in _PARAMETER.finditer(uri, query) if query >= 0 else ():
        value = unquote(parameter["value"])
        if _IS_SECRET.search(unquote(parameter["keyword"])) or censored(value) != value:
            yield *parameter.span("value"), BLANK
