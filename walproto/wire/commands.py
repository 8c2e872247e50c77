"""Replication command text to values: PostgreSQL's grammar for replication commands.

A scanner of one regular expression, then a recursive descent that follows ``repl_gram.y`` rule by
rule; ``repl_scanner.l`` has the tokens.  Keywords are upper case only, names may be quoted or not,
a trailing semicolon is allowed.  A text whose first word is no replication command is SQL, which a
WAL sender for physical replication cannot run; that too is a value, :class:`Sql`.

Errors are those of PostgreSQL, which says no more than ``syntax error``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from walproto.errors import CommandSyntaxError

Option = str | int | None
"""A generic option's value; None where only its name was given."""

Options = tuple[tuple[str, Option], ...]
"""Generic options as they were given, be it twice."""


@dataclass(frozen=True, slots=True)
class IdentifySystem:
    tag = "IDENTIFY_SYSTEM"


@dataclass(frozen=True, slots=True)
class Show:
    tag = "SHOW"
    name: str


@dataclass(frozen=True, slots=True)
class TimelineHistory:
    tag = "TIMELINE_HISTORY"
    tli: int


@dataclass(frozen=True, slots=True)
class StartReplication:
    """``tli`` is None where the command names none: the server's current one."""

    tag = "START_REPLICATION"
    start_lsn: int
    tli: int | None = None
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class StartLogicalReplication:
    tag = "START_REPLICATION"
    start_lsn: int
    slot: str
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CreateReplicationSlot:
    """``plugin`` is None for a physical slot."""

    tag = "CREATE_REPLICATION_SLOT"
    slot: str
    plugin: str | None = None
    temporary: bool = False
    options: Options = ()


@dataclass(frozen=True, slots=True)
class ReadReplicationSlot:
    tag = "READ_REPLICATION_SLOT"
    slot: str


@dataclass(frozen=True, slots=True)
class AlterReplicationSlot:
    tag = "ALTER_REPLICATION_SLOT"
    slot: str
    options: Options = ()


@dataclass(frozen=True, slots=True)
class DropReplicationSlot:
    tag = "DROP_REPLICATION_SLOT"
    slot: str
    wait: bool = False


@dataclass(frozen=True, slots=True)
class BaseBackup:
    tag = "BASE_BACKUP"
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UploadManifest:
    tag = "UPLOAD_MANIFEST"


@dataclass(frozen=True, slots=True)
class Sql:
    tag = "SQL"
    text: str


Command = (
    IdentifySystem
    | Show
    | TimelineHistory
    | StartReplication
    | StartLogicalReplication
    | CreateReplicationSlot
    | ReadReplicationSlot
    | AlterReplicationSlot
    | DropReplicationSlot
    | BaseBackup
    | UploadManifest
    | Sql
)

MAX_TOKENS = 1000
"""Of one command, more than any that is of use has; PostgreSQL has no such limit."""

_NAMEDATALEN = 64

_SINCE = {"READ_REPLICATION_SLOT": 15, "ALTER_REPLICATION_SLOT": 17, "UPLOAD_MANIFEST": 17}
"""Commands that came later than 13: the first major that knows them."""

_COMMANDS = {
    "IDENTIFY_SYSTEM",
    "BASE_BACKUP",
    "START_REPLICATION",
    "CREATE_REPLICATION_SLOT",
    "READ_REPLICATION_SLOT",
    "DROP_REPLICATION_SLOT",
    "ALTER_REPLICATION_SLOT",
    "TIMELINE_HISTORY",
    "SHOW",
    "UPLOAD_MANIFEST",
}
_SLOT_OPTIONS: dict[str, tuple[str, Option]] = {
    "EXPORT_SNAPSHOT": ("snapshot", "export"),
    "NOEXPORT_SNAPSHOT": ("snapshot", "nothing"),
    "USE_SNAPSHOT": ("snapshot", "use"),
    "RESERVE_WAL": ("reserve_wal", None),
    "TWO_PHASE": ("two_phase", None),
}
"""The words behind CREATE_REPLICATION_SLOT, and the generic options that they became with 15."""
_KEYWORDS = (
    _COMMANDS
    | set(_SLOT_OPTIONS)
    | {"SLOT", "LOGICAL", "PHYSICAL", "TIMELINE", "TEMPORARY", "WAIT"}
)

# Quantifiers are possessive (``*+``) or cannot do otherwise: a long text is tried in one way only.
_TOKEN = r"""[%s]*+(?:
        (?P<RECPTR>[0-9A-Fa-f]++/[0-9A-Fa-f]++)
      | (?P<UCONST>[0-9]++)
      | (?P<IDENT>[A-Za-z\x80-\U0010ffff_][A-Za-z\x80-\U0010ffff_0-9$]*+)
      | "(?P<QUOTED>(?:[^"]|"")*)"(?!")
      | '(?P<SCONST>(?:[^']|'')*)'(?!')
      | (?P<open>['"])
      | (?P<char>.)
      | (?P<END>\Z)
    )"""
_TOKEN_SINCE = [
    (since, re.compile(_TOKEN % space, re.VERBOSE | re.DOTALL))
    for since, space in ((17, r" \t\n\r\f\v"), (15, r" \t\n\r\f"), (0, r" \t\n"))
]
"""What a token is, with the white space before it, and since which major."""


def _syntax_error(message: str = "syntax error") -> CommandSyntaxError:
    return CommandSyntaxError(message)


class _Parser:
    """One pass over the tokens; ``kind`` and ``text`` are those of the token looked at.

    A keyword's or a character's kind is itself, any other token's is that of its group.
    """

    kind: str
    text: str

    def __init__(self, source: str, major: int) -> None:
        self._source = source
        self.major = major
        self._token = next(token for since, token in _TOKEN_SINCE if major >= since)
        self._position = 0
        self._left = MAX_TOKENS
        self.advance()

    def advance(self) -> str:
        """Go to the next token; the text of the one left behind."""
        left = getattr(self, "text", "")
        if self._left == 0:
            raise _syntax_error(f"replication command has more than {MAX_TOKENS} tokens")
        self._left -= 1
        match = self._token.match(self._source, self._position)
        assert match is not None  # `char` and `END` match whatever the others do not
        assert match.lastgroup is not None
        kind, text = match.lastgroup, match[match.lastgroup]
        self._position = match.end()
        match kind:
            case "open":
                raise _syntax_error("unterminated quoted string")
            case "char":
                kind = text
            case "IDENT" if text in _KEYWORDS:
                kind = text
            case "IDENT":
                # downcase_truncate_identifier: ASCII letters only, cut to what a name can hold
                text = re.sub("[A-Z]+", lambda letters: letters[0].lower(), _truncate(text))
            case "QUOTED":
                if '""' in text and self.major < 18:
                    raise _syntax_error()  # to them the name ended there, and another began
                kind, text = "IDENT", _truncate(text.replace('""', '"'))
            case "SCONST":
                text = text.replace("''", "'")
        self.kind, self.text = kind, text
        return left

    def accept(self, kind: str) -> bool:
        """Whether the token is of this kind; if so, it is left behind."""
        if self.kind != kind:
            return False
        self.advance()
        return True

    def expect(self, kind: str) -> str:
        if self.kind != kind:
            raise _syntax_error()
        return self.advance()

    def uint32(self) -> int:
        return _uint32(self.expect("UCONST"), 10)

    def lsn(self) -> int:
        high, low = self.expect("RECPTR").split("/")
        return _uint32(high, 16) << 32 | _uint32(low, 16)

    def options(self) -> Options:
        """``( name [value], ... )``, the generic option list of PostgreSQL 15 and newer."""
        found: list[tuple[str, Option]] = []
        self.expect("(")
        while True:
            name = self.advance().lower() if self.kind in _KEYWORDS else self.expect("IDENT")
            value: Option = None
            if self.kind in ("IDENT", "SCONST"):
                value = self.advance()
            elif self.kind == "UCONST":
                value = self.uint32()
            found.append((name, value))
            if not self.accept(","):
                self.expect(")")
                return tuple(found)


def _uint32(digits: str, base: int) -> int:
    """What C makes of them: strtoul stops at 2**64 - 1, and a uint32 takes the low half of it."""
    return min(int(digits.lstrip("0")[:21] or "0", base), 2**64 - 1) & 0xFFFFFFFF


def _truncate(name: str) -> str:
    encoded = name.encode("utf-8", "surrogateescape")
    return encoded[: _NAMEDATALEN - 1].decode("utf-8", "ignore") if len(encoded) > 63 else name


def parse_command(text: str, major: int) -> Command:
    """The command that ``text`` spells to a PostgreSQL of this major version.

    Raises CommandSyntaxError with the messages of ``repl_gram.y`` and ``repl_scanner.l``.
    """
    parser = _Parser(text, major)
    name = parser.kind
    if name not in _COMMANDS or major < _SINCE.get(name, 0):
        if major < 15 and name != "IDENT" and name not in _SINCE:
            raise _syntax_error()  # to them SQL begins with a word
        return Sql(text)
    parser.advance()
    command = _command(name, parser)
    parser.accept(";")
    parser.expect("END")
    return command


def _command(name: str, parser: _Parser) -> Command:
    match name:
        case "IDENTIFY_SYSTEM":
            return IdentifySystem()
        case "SHOW":
            words = [parser.expect("IDENT")]
            while parser.accept("."):
                words.append(parser.expect("IDENT"))
            return Show(".".join(words))
        case "TIMELINE_HISTORY":
            return TimelineHistory(_tli(parser))
        case "START_REPLICATION":
            return _start_replication(parser)
        case "CREATE_REPLICATION_SLOT":
            return _create_replication_slot(parser)
        case "READ_REPLICATION_SLOT":
            return ReadReplicationSlot(parser.expect("IDENT"))
        case "DROP_REPLICATION_SLOT":
            return DropReplicationSlot(parser.expect("IDENT"), parser.accept("WAIT"))
        case "ALTER_REPLICATION_SLOT":
            return AlterReplicationSlot(parser.expect("IDENT"), parser.options())
        case "UPLOAD_MANIFEST":
            return UploadManifest()
        case _:
            return BaseBackup(_base_backup_options(parser))


def _tli(parser: _Parser) -> int:
    tli = parser.uint32()
    if tli == 0:
        raise _syntax_error("invalid timeline 0")
    return tli


def _start_replication(parser: _Parser) -> StartReplication | StartLogicalReplication:
    slot = parser.expect("IDENT") if parser.accept("SLOT") else None
    if slot is not None and parser.accept("LOGICAL"):
        start_lsn = parser.lsn()
        options = _plugin_options(parser) if parser.kind == "(" else {}
        return StartLogicalReplication(start_lsn, slot, options)
    parser.accept("PHYSICAL")
    start_lsn = parser.lsn()
    tli = _tli(parser) if parser.accept("TIMELINE") else None
    return StartReplication(start_lsn, tli, slot)


def _plugin_options(parser: _Parser) -> dict[str, Option]:
    """``( name ['value'], ... )``: options of an output plugin, whose values are strings."""
    found: dict[str, Option] = {}
    parser.expect("(")
    while True:
        name = parser.expect("IDENT")
        found[name] = parser.advance() if parser.kind == "SCONST" else None
        if not parser.accept(","):
            parser.expect(")")
            return found


def _create_replication_slot(parser: _Parser) -> CreateReplicationSlot:
    slot = parser.expect("IDENT")
    temporary = parser.accept("TEMPORARY")
    plugin = None
    if not parser.accept("PHYSICAL"):
        parser.expect("LOGICAL")
        plugin = parser.expect("IDENT")
    if parser.kind == "(" and parser.major >= 15:
        return CreateReplicationSlot(slot, plugin, temporary, parser.options())
    options: list[tuple[str, Option]] = []
    while parser.kind in _SLOT_OPTIONS:
        options.append(_SLOT_OPTIONS[parser.advance()])
    return CreateReplicationSlot(slot, plugin, temporary, tuple(options))


def _base_backup_options(parser: _Parser) -> dict[str, Option]:
    """Generic options or, up to 14, words, of which it need not be known what they mean to refuse
    them all."""
    if parser.major >= 15:
        return dict(parser.options()) if parser.kind == "(" else {}
    options: dict[str, Option] = {}
    while parser.kind == "IDENT":
        name = parser.advance()
        options[name] = parser.advance() if parser.kind in ("SCONST", "UCONST") else None
    return options
