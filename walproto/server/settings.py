"""Configuration parameters, as far as a WAL sender has any: SHOW, ParameterStatus, ``options``.

A connection has each parameter at the server's value or at what its client asked for at startup.
What a client may set is accepted as by a PostgreSQL server, so that nobody's driver stumbles; the
few that mean something here are checked as a server checks them.

PostgreSQL: ``guc.c`` (set_config_option, parse_int), ``guc_tables.c``; documentation
"Asynchronous Operations" in chapter "Frontend/Backend Protocol" for those that are reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from walproto.errors import (
    CantChangeRuntimeParam,
    CommandSyntaxError,
    InvalidParameterValue,
    UndefinedObject,
)

DEFAULT_WAL_SENDER_TIMEOUT = 60.0
"""Seconds, PostgreSQL's default for ``wal_sender_timeout``."""

_FIXED = {
    "block_size": "8192",
    "data_directory_mode": "0700",
    "in_hot_standby": "off",
    "integer_datetimes": "on",
    "is_superuser": "on",
    "max_identifier_length": "63",
    "server_encoding": "SQL_ASCII",
    "wal_block_size": "8192",
}
_FIXED_AT_START = {
    "hot_standby": "on",
    "max_replication_slots": "0",
    "max_wal_senders": "10",
    "wal_level": "replica",
}
_FOR_ALL = {
    "max_slot_wal_keep_size": "-1",
    "wal_keep_size": "0",
}
"""Those that may change while a server runs, but not for one connection alone."""
_CHANGEABLE = {
    "application_name": "",
    "bytea_output": "hex",
    "client_encoding": "SQL_ASCII",
    "client_min_messages": "notice",
    "DateStyle": "ISO, MDY",
    "default_transaction_read_only": "off",
    "extra_float_digits": "1",
    "geqo": "on",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "IntervalStyle": "postgres",
    "jit": "on",
    "lock_timeout": "0",
    "log_replication_commands": "off",
    "row_security": "on",
    "scram_iterations": "4096",
    "search_path": '"$user", public',
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "synchronous_commit": "on",
    "tcp_keepalives_count": "0",
    "tcp_keepalives_idle": "0",
    "tcp_keepalives_interval": "0",
    "tcp_user_timeout": "0",
    "TimeZone": "Etc/UTC",
    "transaction_read_only": "off",
    "transaction_timeout": "0",
    "work_mem": "4MB",
}
_SINCE = {"scram_iterations": 16, "transaction_timeout": 17, "idle_session_timeout": 14}

_REPORTED = {
    "in_hot_standby": 14,
    "integer_datetimes": 0,
    "TimeZone": 0,
    "IntervalStyle": 0,
    "search_path": 18,
    "is_superuser": 0,
    "application_name": 0,
    "default_transaction_read_only": 14,
    "scram_iterations": 16,
    "DateStyle": 0,
    "standard_conforming_strings": 0,
    "session_authorization": 0,
    "client_encoding": 0,
    "server_version": 0,
    "server_encoding": 0,
}
"""What a client is told by ParameterStatus, and since which major."""

_ENCODINGS = """
    SQL_ASCII EUC_JP EUC_CN EUC_KR EUC_TW EUC_JIS_2004 UTF8 MULE_INTERNAL LATIN1 LATIN2 LATIN3
    LATIN4 LATIN5 LATIN6 LATIN7 LATIN8 LATIN9 LATIN10 WIN1256 WIN1258 WIN866 WIN874 KOI8R
    WIN1251 WIN1252 ISO_8859_5 ISO_8859_6 ISO_8859_7 ISO_8859_8 WIN1250 WIN1253 WIN1254 WIN1255
    WIN1257 KOI8U SJIS BIG5 GBK UHC GB18030 JOHAB SHIFT_JIS_2004
"""
_ENCODING_NAMES = {name.replace("_", "").lower(): name for name in _ENCODINGS.split()} | {
    "unicode": "UNICODE"
}

_UNITS = {"us": 0.001, "ms": 1.0, "": 1.0, "s": 1000.0, "min": 60e3, "h": 3600e3, "d": 86400e3}
_SIZES = {"B": 2**-20, "kB": 2**-10, "MB": 1.0, "": 1.0, "GB": 2.0**10, "TB": 2.0**20}
_MAX_INT = 2**31 - 1
_NUMBER = re.compile(
    r"""\s*+([+-]?(?:0[xX][0-9a-fA-F]++|(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?))
        \s*+(\w*+)\s*+\Z""",
    re.ASCII | re.VERBOSE,
)
"""A number and its unit.  Its quantifiers are possessive, for a long text is not to be tried in
more than one way."""


class Settings:
    """The parameters of one connection.

    ``server`` has the values that are the server's own: ``server_version``,
    ``server_version_num``, ``wal_segment_size``, ``session_authorization``; and those of others
    that a client may not set where they are not the defaults.
    """

    def __init__(self, major: int, server: Mapping[str, str], wal_sender_timeout: float) -> None:
        self._major = major
        values = {**_FIXED, **_FIXED_AT_START, **_FOR_ALL, **_CHANGEABLE, **server}
        values["wal_sender_timeout"] = format_milliseconds(round(wal_sender_timeout * 1000))
        self._values = {
            name: value for name, value in values.items() if major >= _SINCE.get(name, 0)
        }
        self._names = {name.lower(): name for name in self._values}
        self.wal_sender_timeout = wal_sender_timeout
        """Seconds; 0 means never."""

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def reported(self) -> Iterator[tuple[str, str]]:
        """The parameters that a client of this major is told of, with their values."""
        for name, since in _REPORTED.items():
            if self._major >= since:
                yield name, self._values[name]

    def show(self, name: str) -> tuple[str, str]:
        """A parameter's own spelling of its name, and its value; UndefinedObject if unknown."""
        canonical = self._names.get(name.lower())
        if canonical is None:
            raise _unrecognized(name)
        return canonical, self._values[canonical]

    def set(self, name: str, value: str) -> None:
        """Set a parameter as a client may at startup.

        Raises UndefinedObject, CantChangeRuntimeParam or InvalidParameterValue, all FATAL.
        """
        canonical = self._names.get(name.lower())
        if canonical is None:
            if "." in name:
                return  # a custom parameter of somebody's extension
            raise _unrecognized(name, fatal=True)
        if canonical not in _CHANGEABLE and canonical != "wal_sender_timeout":
            when = ""
            if canonical in _FIXED_AT_START:
                when = " without restarting the server"
            elif canonical in _FOR_ALL:
                when = " now"
            raise CantChangeRuntimeParam(
                f'parameter "{canonical}" cannot be changed{when}', fatal=True
            )
        check = _CHECKS.get(canonical)
        if check is not None:
            value = check(value)
        if canonical == "application_name":
            value = _clean_ascii(value, self._major)
        if canonical == "wal_sender_timeout":
            self.wal_sender_timeout = parse_milliseconds(canonical, value) / 1000
        self._values[canonical] = value

    def set_options(self, options: str) -> None:
        """Set what the startup parameter ``options`` asks for (``process_postgres_switches``)."""
        words = map(unescape_option, split_options(options))
        for word in words:
            if word == "--":
                return
            if word.startswith("--"):
                flag, assignment = "--", word[2:]
            elif word.startswith("-c"):
                flag, assignment = "-c ", word[2:] or next(words, "")
            else:
                assignment = ""
            if not assignment:
                raise CommandSyntaxError(
                    f"invalid command-line argument for server process: {word}",
                    hint='Try "postgres --help" for more information.',
                    fatal=True,
                )
            name, equals, value = assignment.partition("=")
            if not equals:
                raise CommandSyntaxError(f"{flag}{assignment} requires a value", fatal=True)
            self.set(name.replace("-", "_"), value)


def parse_milliseconds(name: str, text: str) -> int:
    """A time as a server's configuration takes it, ``6s`` or ``1.5min``, in milliseconds.

    Raises InvalidParameterValue (FATAL) for what is none, or is not in 0 .. 2**31 - 1.
    """
    return _parse_integer(name, text, "ms", _UNITS, 0)


def parse_megabytes(name: str, text: str, minimum: int) -> int:
    """A size as a server's configuration takes it, ``64MB``, ``1GB`` or ``64``, in megabytes.

    Raises InvalidParameterValue (FATAL) for what is none, or is not in ``minimum`` .. 2**31 - 1.
    """
    return _parse_integer(name, text, "MB", _SIZES, minimum)


def _parse_integer(
    name: str, text: str, unit: str, units: Mapping[str, float], minimum: int
) -> int:
    """``text`` as a number of ``unit``, the one that needs not be said (``parse_int``)."""
    match = _NUMBER.match(text)
    if match is None:
        raise _invalid(name, text)
    number, given = match.groups()
    if given not in units:
        *most, last = (f'"{known}"' for known in units if known)
        raise _invalid(
            name,
            text,
            hint=f"Valid units for this parameter are {', '.join(most)}, and {last}.",
        )
    if re.fullmatch("[+-]?0[xX].*", number):
        value = float(_clamp(int(number, 16)))
    elif re.fullmatch("[+-]?0[0-7]+", number):
        value = float(_clamp(int(number, 8)))
    else:
        value = float(number)
    value *= units[given]
    if not math.isfinite(value) or abs(value) > _MAX_INT:
        raise _invalid(name, text, hint="Value exceeds integer range.")
    result = round(value)
    if result < minimum:
        raise InvalidParameterValue(
            f"{result} {unit} is outside the valid range for parameter "
            f'"{name}" ({minimum} {unit} .. {_MAX_INT} {unit})',
            fatal=True,
        )
    return result


def _clamp(number: int) -> int:
    """The number, or one that is out of range like it and yet a float can hold."""
    return max(-(2**64), min(number, 2**64))


def format_milliseconds(milliseconds: int) -> str:
    """Milliseconds in the largest unit that divides them, as SHOW has it: ``1min``, ``90s``."""
    if milliseconds == 0:
        return "0"
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)):
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def format_size(size: int | None) -> str:
    """A size in bytes as SHOW has one that is in megabytes: ``16MB``, ``1GB``; ``-1`` for None."""
    if size is None:
        return "-1"
    megabytes = size >> 20
    if megabytes == 0:
        return "0"
    for unit, factor in (("TB", 1 << 20), ("GB", 1 << 10)):
        if megabytes % factor == 0:
            return f"{megabytes // factor}{unit}"
    return f"{megabytes}MB"


def split_options(options: str) -> list[str]:
    """Words between white space, a backslash and the character behind it taken as they are
    (``pg_split_opts``); they are still escaped."""
    return re.findall(r"(?:\\.|[^\s\\]++)+", options, re.DOTALL)


def unescape_option(word: str) -> str:
    """A word of ``options`` without the backslashes that escape what is in it."""
    return re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL)


def _check_timeout(value: str) -> str:
    return format_milliseconds(parse_milliseconds("wal_sender_timeout", value))


def _check_encoding(value: str) -> str:
    name = _ENCODING_NAMES.get(re.sub("[^a-z0-9]", "", value.lower()))
    if name is None:
        raise _invalid("client_encoding", value)
    return name


def _check_date_style(value: str) -> str:
    style, order = "ISO", "MDY"
    for word in filter(None, (word.strip().lower() for word in value.split(","))):
        if word in ("iso", "sql", "postgres", "german"):
            style = {"iso": "ISO", "sql": "SQL"}.get(word, word.capitalize())
            order = "DMY" if word == "german" else order
        elif word in ("dmy", "mdy", "ymd"):
            order = word.upper()
        else:
            raise _invalid("DateStyle", value, detail=f'Unrecognized key word: "{word}".')
    return f"{style}, {order}"


def _clean_ascii(name: str, major: int) -> str:
    """A name cut to what one can hold, without what would spoil a log (``pg_clean_ascii``)."""
    return "".join(
        chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" if major >= 16 else "?"
        for byte in name.encode("utf-8", "surrogateescape")[:63]
    )


_CHECKS: dict[str, Callable[[str], str]] = {
    "client_encoding": _check_encoding,
    "DateStyle": _check_date_style,
    "wal_sender_timeout": _check_timeout,
}


def _unrecognized(name: str, fatal: bool = False) -> UndefinedObject:
    return UndefinedObject(f'unrecognized configuration parameter "{name}"', fatal=fatal)


def _invalid(
    name: str, value: str, *, detail: str | None = None, hint: str | None = None
) -> InvalidParameterValue:
    return InvalidParameterValue(
        f'invalid value for parameter "{name}": "{value}"', detail=detail, hint=hint, fatal=True
    )
