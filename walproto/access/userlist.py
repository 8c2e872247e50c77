"""The users and their secrets: a file in the format of PgBouncer's ``userlist.txt``.

Each line is ``"user" "secret"``; a quote inside is doubled, and what follows is ignored.  Blank
lines and those that begin with ``;`` are skipped.  Of two lines for one user the last one counts.
(PgBouncer also takes quoted text that goes on in the next line; that is an error here.)

PgBouncer documentation: "Authentication File Format".  The secret is one of these:

- ``SCRAM-SHA-256$...``, as PostgreSQL stores it in ``pg_authid``.
- The password itself.  It is used like the above, and warned of.
- ``md5...`` or nothing at all: such a user cannot log in, as with PostgreSQL's ``scram-sha-256``.

Neither an error nor a warning says anything of a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field

from walproto.access.files import PathLike, read_file
from walproto.access.scram import ITERATIONS, SALT_LENGTH, Verifier
from walproto.access.scram_messages import KEY_LENGTH, SCHEME
from walproto.errors import printable

MAX_SIZE = 16 << 20
"""Bytes of a file at most."""

_QUOTED = r'"((?:[^"]|"")*)"(?!")'
_LINE = re.compile(rf"{_QUOTED}[ \t\v\f\r]+{_QUOTED}(?:[ \t\v\f\r].*)?", re.DOTALL)
_MD5 = re.compile("md5[0-9a-f]{32}")
_BLANKS = " \t\v\f\r"


class UserlistError(ValueError):
    """The file cannot be used: ``FILE:LINE: what is wrong``."""


@dataclass(frozen=True, slots=True)
class _Hashed:
    """What a password has come to, and a digest by which it is known to be still the same."""

    digest: bytes = field(repr=False)
    verifier: Verifier


class Users:
    """Who is in the file.

    ``warnings`` is what the operator should be told of it, a line each.
    """

    def __init__(self, name: str, before: Users | None = None, server_secret: bytes = b"") -> None:
        self.name = name
        self.warnings: tuple[str, ...] = ()
        # What a user is asked who has no salt in the file must not change when that is read again,
        # nor, if there is such a secret, over a restart (mock_authentication_nonce in PostgreSQL).
        self._server_secret: bytes = (
            (server_secret or os.urandom(32)) if before is None else before._server_secret
        )
        self._verifiers: dict[str, Verifier | None] = {}
        self._hashed: dict[str, _Hashed] = {}
        self._common = (ITERATIONS, SALT_LENGTH)

    def __len__(self) -> int:
        return len(self._verifiers)

    def is_known(self, user: str) -> bool:
        """Whether there is something that this user can log in with."""
        return self._verifiers.get(user) is not None

    def verifier(self, user: str) -> tuple[Verifier, bool]:
        """What the user's password is verified with, and True; for one that is not known, a mock
        and False.

        The mock is the same each time, and looks like most of the others.
        """
        mock = self._mock(user)  # made for everybody: time does not tell who is known
        found = self._verifiers.get(user)
        return (mock, False) if found is None else (found, True)

    def why_unknown(self, user: str) -> str:
        """For the operator: why there is only a mock for this user."""
        shown = printable(user)
        if user in self._verifiers:
            return f'User "{shown}" does not have a valid SCRAM secret.'
        return f'User "{shown}" is not in {self.name}.'

    def _mock(self, user: str) -> Verifier:
        iterations, salt_length = self._common
        salt = self._salt(user, salt_length)
        return Verifier(iterations, salt, bytes(KEY_LENGTH), bytes(KEY_LENGTH))

    def _salt(self, user: str, length: int) -> bytes:
        """For a user who has none in the file."""
        named = self._server_secret + user.encode("utf-8", "surrogateescape")
        return hashlib.shake_256(named).digest(length)

    def _hash(self, user: str, password: str, before: Users | None) -> _Hashed:
        said = password.encode("utf-8", "surrogateescape")
        digest = hmac.digest(self._server_secret, said, "sha256")
        old = None if before is None else before._hashed.get(user)
        if old is not None and hmac.compare_digest(old.digest, digest):
            return old
        return _Hashed(digest, Verifier.of(password, self._salt(user, SALT_LENGTH)))


def load_users(path: PathLike, before: Users | None = None, server_secret: bytes = b"") -> Users:
    """The users in a file; it is warned of if others can read it.  Raises UserlistError.

    See :func:`parse_users` for ``before`` and ``server_secret``.
    """
    name = os.fspath(path)
    try:
        contents, status = read_file(name, MAX_SIZE)
    except OSError as error:
        raise UserlistError(f'could not open file "{name}": {error.strerror}') from None
    users = parse_users(
        contents.decode("utf-8-sig", "surrogateescape"), name, before, server_secret
    )
    if _is_exposed(status):
        users.warnings += (
            f"{name}: the file has group or world access; it should have permissions u=rw (0600) "
            "or less, or u=rw,g=r (0640) or less if owned by root",
        )
    return users


def parse_users(
    text: str, name: str, before: Users | None = None, server_secret: bytes = b""
) -> Users:
    """The users in a file's ``text``, where bytes that are not UTF-8 are surrogate escapes.

    ``name`` is the file's, for errors.  ``before`` is what was in the file until now: a password
    that was there already is not hashed again, which takes its time.  ``server_secret`` is
    something that nobody else knows and that outlives this process, if there is such a thing: so it
    cannot be seen by what has changed over a restart who is in the file.  Raises UserlistError.
    """
    entries: dict[str, tuple[int, str]] = {}
    warnings: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        content = line.strip(_BLANKS)
        if not content or content.startswith(";"):
            continue
        user, secret = _parse_line(content, f"{name}:{number}")
        if user in entries:
            warnings.append(
                f'{name}:{number}: user "{printable(user)}" was in line {entries[user][0]} '
                "already; the last line counts"
            )
        entries[user] = number, secret

    users = Users(name, before, server_secret)
    plain: list[int] = []
    md5: list[int] = []
    for user, (number, secret) in entries.items():
        users._verifiers[user] = None
        if secret.startswith(f"{SCHEME}$"):
            try:
                users._verifiers[user] = Verifier.parse(secret)
            except ValueError as error:
                raise UserlistError(f"{name}:{number}: {error}") from None
        elif _MD5.fullmatch(secret):
            md5.append(number)
        elif secret:
            plain.append(number)
            users._hashed[user] = hashed = users._hash(user, secret, before)
            users._verifiers[user] = hashed.verifier
    if plain:
        warnings.append(
            f"{name}: there are passwords in plain text ({_lines(plain)}); "
            "better are SCRAM secrets, as PostgreSQL stores them in pg_authid"
        )
    if md5:
        warnings.append(
            f"{name}: there are MD5 secrets ({_lines(md5)}); "
            "their users cannot log in, as only SCRAM is offered"
        )
    users.warnings = tuple(warnings)
    known = filter(None, users._verifiers.values())
    shapes = Counter((verifier.iterations, len(verifier.salt)) for verifier in known)
    for shape, _ in shapes.most_common(1):
        users._common = shape
    return users


def _parse_line(line: str, place: str) -> tuple[str, str]:
    if "\0" in line:
        raise UserlistError(f"{place}: there is a NUL in it")
    match = _LINE.fullmatch(line)
    if match is None:
        raise UserlistError(
            f'{place}: it is not "user" "secret", each in double quotes, and a quote in them twice'
        )
    user, secret = (quoted.replace('""', '"') for quoted in match.groups())
    if not user:
        raise UserlistError(f"{place}: the user name is empty")
    return user, secret


def _lines(numbers: list[int]) -> str:
    first = f"line {min(numbers)}"
    return first if len(numbers) == 1 else f"{len(numbers)} of them, the first in {first}"


def _is_exposed(status: os.stat_result) -> bool:
    """PostgreSQL's rule for private keys (``check_ssl_key_file_permissions``)."""
    allowed = 0o640 if status.st_uid == 0 else 0o600
    return bool(stat.S_IMODE(status.st_mode) & 0o077 & ~allowed)
