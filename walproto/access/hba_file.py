"""Rules of who may connect, read from a file in the syntax of ``pg_hba.conf``.

What would need a catalogue, a name server or another file (groups, host names, inclusion) is
refused when the file is read, as is everything else that is not supported here: no line means
less or more than it says.

PostgreSQL: documentation "The pg_hba.conf File"; ``parse_hba_line`` in ``hba.c``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from walproto.access.grant import Scope
from walproto.access.hba import METHODS, Address, Names, Network, Rule, Rules
from walproto.access.hba_tokens import Field, Malformed, Token, continued_lines, fields_of
from walproto.errors import printable

#: The longest file that is read, of bytes.
MAX_SIZE = 1 << 20
#: After so many problems the rest of a file is not looked at.
MAX_PROBLEMS = 100
#: Of characters: a problem is told in one line, and the longest token is long.
MAX_PROBLEM = 500

_NOT_OFFERED = ("md5", "password")
_NOT_SUPPORTED = ("bsd", "gss", "ident", "ldap", "oauth", "pam", "peer", "radius", "sspi")
_ONLY_OVER_TLS = ("cert", "jwt")
_INCLUDES = ("include", "include_if_exists", "include_dir")
_ID = re.compile(r"[0-9A-Fa-f]{32}")


class HbaError(ValueError):
    """All that is wrong with a file; each of ``problems`` is ``FILE:LINE: what is wrong``."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def parse_hba(text: str, name: str) -> Rules:
    """The rules of a file, which problems call ``name``.

    ``text`` is decoded as names in a startup packet are (UTF-8, with ``surrogateescape``), and has
    the line ends that the file has.  Raises HbaError.
    """
    if len(text.encode("utf-8", "replace")) > MAX_SIZE:  # an escaped byte becomes a byte again
        raise HbaError([f"{name}:1: the file is longer than {MAX_SIZE} bytes"])
    rules: list[Rule] = []
    problems: list[str] = []
    for number, line in continued_lines(text):
        source = f"{name}:{number}"
        try:
            if fields := fields_of(line):
                rules.append(_parse_rule(source, fields))
        except Malformed as error:
            problems.append(f"{source}: {printable(str(error), MAX_PROBLEM)}")
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{source}: too many problems; the rest was not looked at")
            break
    if not rules and not problems:
        problems.append(f"{name}:1: the file contains no entries")
    if problems:
        raise HbaError(problems)
    return Rules(tuple(rules))


def _parse_rule(source: str, fields: list[Field]) -> Rule:
    """PostgreSQL: ``parse_hba_line``."""
    rest = iter(fields)
    type = _type(_single(rest, "connection type", "connection type"))
    databases = _databases(_next(rest, "database specification"))
    users = _users(_next(rest, "role specification"))
    address = None if type == "local" else _address(rest)
    method = _method(_single(rest, "authentication method", "authentication type"), type)
    clientcert, scope = _options(rest, type, method)
    return Rule(source, type, databases, users, address, method, clientcert, scope)


def _next(rest: Iterator[Field], what: str) -> Field:
    column = next(rest, None)
    if column is None:
        raise Malformed(f"end-of-line before {what}")
    return column


def _single(rest: Iterator[Field], what: str, value: str) -> Token:
    """The next column, which is ``what`` and may hold but one ``value``."""
    column = _next(rest, what)
    if len(column) > 1:
        raise Malformed(f"multiple values specified for {value}")
    return column[0]


def _type(token: Token) -> str:
    if token.text in ("local", "host", "hostssl", "hostnossl"):
        return token.text
    if token.text in ("hostgssenc", "hostnogssenc"):
        raise Malformed(f'connection type "{token.text}" is not supported')
    if token.text in _INCLUDES:
        raise Malformed(f'inclusion of files, "{token.text}", is not supported')
    raise Malformed(f'invalid connection type "{token.text}"')


def _databases(column: Field) -> Names:
    for token in column:
        if token.is_one_of("samerole", "samegroup"):
            raise Malformed(f'database "{token.text}" is not supported: there are no groups here')
    return _names(column, "all", "sameuser", "replication")


def _users(column: Field) -> Names:
    for token in column:
        if token.text.startswith("+") and not token.is_quoted:
            raise Malformed(f'user "{token.text}" is not supported: there are no groups here')
    return _names(column, "all")


def _names(column: Field, *keywords: str) -> Names:
    for token in column:
        # So PostgreSQL sees it from 16 on, with quotes and without.
        if token.text.startswith("/"):
            raise Malformed(f'regular expression "{token.text}" is not supported')
    special = frozenset(token.text for token in column if token.is_one_of(*keywords))
    names = frozenset(token.text for token in column if not token.is_one_of(*keywords))
    return Names(special, names)


def _address(rest: Iterator[Field]) -> Network | str:
    """The address, and the mask if that is a column of its own."""
    token = _single(rest, "IP address specification", "host address")
    if token.is_one_of("all", "samehost", "samenet"):
        if token.text != "all":
            _check_interfaces_can_be_seen(token.text)
        return token.text
    text, slash, bits = token.text.partition("/")
    address = _ip(text)
    if address is None:
        raise _not_an_address(token.text, text)
    if slash:
        if re.fullmatch(r"[0-9]{1,3}", bits) is None or int(bits) > address.max_prefixlen:
            raise Malformed(f'invalid CIDR mask in address "{token.text}"')
        return Network.of(address, int(bits))
    mask_token = _single(rest, "netmask specification", "netmask")
    mask = _ip(mask_token.text)
    if mask is None:
        raise Malformed(f'invalid IP mask "{mask_token.text}"')
    if mask.version != address.version:
        raise Malformed("IP address and mask do not match")
    return Network(address, mask)


def _ip(text: str) -> Address | None:
    """None for what is no address, and for one of but a single interface (``fe80::1%eth0``)."""
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def _not_an_address(written: str, host: str) -> Malformed:
    if re.fullmatch(r"[0-9.]+|.*:.*", host):
        return Malformed(f'invalid IP address "{host}"')
    if written != host:
        return Malformed(f'specifying both host name and CIDR mask is invalid: "{written}"')
    return Malformed(f'host name "{host}" is not supported: give an IP address')


def _check_interfaces_can_be_seen(keyword: str) -> None:
    try:
        import ifaddr  # noqa: F401
    except ImportError:
        raise Malformed(f"{keyword}: it takes pip install 'walproto[samenet]'") from None


def _method(token: Token, type: str) -> str:
    method = token.text
    if method in _NOT_OFFERED:
        raise Malformed(f'authentication method "{method}" is not offered; use scram-sha-256')
    if method in _NOT_SUPPORTED:
        raise Malformed(f'authentication method "{method}" is not supported')
    if method not in METHODS:
        raise Malformed(f'invalid authentication method "{method}"')
    if method in _ONLY_OVER_TLS and type != "hostssl":
        raise Malformed(f"{method} authentication is only supported on hostssl connections")
    return method


def _options(rest: Iterator[Field], type: str, method: str) -> tuple[str, Scope | None]:
    """The certificate that is asked for, and what may be seen.

    PostgreSQL: ``parse_hba_auth_opt``; ``tenant`` and ``timeline`` are our own.
    """
    clientcert = "verify-full" if method == "cert" else ""
    tenants: set[str] = set()
    timelines: set[tuple[str, str]] = set()
    for option in (token.text for column in rest for token in column):
        name, equals, value = option.partition("=")
        if not equals:
            raise Malformed(f"authentication option not in name=value format: {option}")
        if name in ("clientcert", "clientname") and type != "hostssl":
            raise Malformed(f'{name} can only be configured for "hostssl" rows')
        if name in ("tenant", "timeline") and method == "reject":
            raise Malformed(f'authentication option "{name}" is not valid for reject')
        if name == "clientcert":
            clientcert = _clientcert(value, method)
        elif name == "clientname":
            _check_clientname(value)
        elif name == "map":
            raise Malformed('authentication option "map" is not supported')
        elif name == "tenant":
            tenants.add(_id(name, value))
        elif name == "timeline":
            tenant, _, timeline = value.partition("/")
            timelines.add((_id("timeline", tenant), _id("timeline", timeline)))
        else:
            raise Malformed(f'unrecognized authentication option name: "{name}"')
    if not tenants and not timelines:
        return clientcert, None
    return clientcert, Scope(frozenset(tenants), frozenset(timelines))


def _clientcert(value: str, method: str) -> str:
    if value not in ("verify-ca", "verify-full"):
        raise Malformed(f'invalid value for clientcert: "{value}"')
    if value == "verify-ca" and method == "cert":
        raise Malformed('clientcert only accepts "verify-full" when using "cert" authentication')
    return value


def _check_clientname(value: str) -> None:
    if value == "DN":
        raise Malformed("clientname=DN is not supported; only the common name (CN) is looked at")
    if value != "CN":
        raise Malformed(f'invalid value for clientname: "{value}"')


def _id(option: str, value: str) -> str:
    if _ID.fullmatch(value) is None:
        form = "32 hexadecimal digits" + ("/32 hexadecimal digits" if option == "timeline" else "")
        raise Malformed(f'invalid value for {option}: "{value}" (it takes {form})')
    return value.lower()
