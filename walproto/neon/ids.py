"""Tenants and timelines: what their IDs look like, and how a client names the ones it wants.

A timeline in Neon's sense is one database's WAL, whose PostgreSQL timeline ID is always 1.  A
client names it in the startup packet: ``ztenantid`` and ``ztimelineid``, or ``tenant_id`` and
``timeline_id`` as later versions call them; a pageserver adds ``pageserver_connstr``, by which it
is told from others.  Each is either a startup parameter or a word in ``options``, there with or
without ``-c``.

Neon: ``startup`` in the safekeeper's ``handler.rs``, ``pg_split_opts`` in PostgreSQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from walproto.errors import InvalidAuthorizationSpecification, InvalidParameterValue
from walproto.server.settings import split_options, unescape_option

_ID = re.compile("[0-9a-fA-F]{32}")

_TENANT = ("ztenantid", "tenant_id")
_TIMELINE = ("ztimelineid", "timeline_id")
_PAGESERVER = "pageserver_connstr"
_NAMES = frozenset((*_TENANT, *_TIMELINE, _PAGESERVER))

_HINT = (
    "Name both in the connection string, each with 32 hexadecimal digits: "
    "options='-c ztenantid=... -c ztimelineid=...'"
)


@dataclass(frozen=True, slots=True)
class TimelineIds:
    """A timeline and the tenant it belongs to; two strings as :func:`parse_id` returns them."""

    tenant_id: str
    timeline_id: str

    def __str__(self) -> str:
        """``<tenant ID>/<timeline ID>``, which is also its directory within the data directory."""
        return f"{self.tenant_id}/{self.timeline_id}"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client named in its startup packet, and what else was in there.

    A connection string may hold a password, so it is not in the ``repr``.
    """

    ids: TimelineIds
    pageserver_connstr: str = field(repr=False)
    """The connection string of the pageserver that asks, or that is to be asked to call back; empty
    if there is none."""
    parameters: tuple[tuple[str, str], ...] = field(repr=False)
    """The startup parameters that are none of the above, as they were."""
    options: str = field(repr=False)
    """The words of ``options`` that are none of the above, escaped as they were."""


def parse_id(text: str) -> str:
    """A tenant's or a timeline's ID in its canonical form, 32 lower-case hexadecimal digits.

    Upper-case ones are taken, too.  Raises ValueError.
    """
    if not _ID.fullmatch(text):
        raise ValueError(f'"{text}" is not an ID of 32 hexadecimal digits')
    return text.lower()


def requested_ids(parameters: Iterable[tuple[str, str]], options: str) -> Request:
    """What a client named in its startup packet, from ``parameters`` of their own and ``options``.

    One that comes later overrides one of the same name, and parameters override options, as with a
    PostgreSQL server.  The two names of one thing must not say different things.  Whether there is
    such a timeline is not looked at.  Raises InvalidParameterValue or, if an ID is missing,
    InvalidAuthorizationSpecification; both FATAL.
    """
    named, other_options = _named_in_options(options)
    others = []
    for name, value in parameters:
        if name.lower() in _NAMES:
            named[name.lower()] = value
        else:
            others.append((name, value))
    pageserver_connstr = named.get(_PAGESERVER, "")
    if not pageserver_connstr.isprintable():
        raise InvalidParameterValue(
            f'invalid value for parameter "{_PAGESERVER}"',
            detail="There are characters in it that cannot be printed.",
            fatal=True,
        )
    return Request(
        TimelineIds(_one_id(named, "tenant", *_TENANT), _one_id(named, "timeline", *_TIMELINE)),
        pageserver_connstr,
        tuple(others),
        other_options,
    )


def _named_in_options(options: str) -> tuple[dict[str, str], str]:
    """What is named in ``options``, and the words that are none of it."""
    named: dict[str, str] = {}
    others: list[str] = []
    words = iter(split_options(options))
    for word in words:
        taken, assignment = [word], unescape_option(word)
        if assignment == "--":  # it ends the options
            others += [word, *words]
            break
        if assignment == "-c":
            taken += islice(words, 1)
            assignment = unescape_option(taken[-1])
        else:
            assignment = assignment.removeprefix("-c").removeprefix("--")
        name, equals, value = assignment.partition("=")
        name = name.replace("-", "_").lower()
        if equals and name in _NAMES:
            named[name] = value
        else:
            others += taken
    return named, " ".join(others)


def _one_id(named: dict[str, str], what: str, *names: str) -> str:
    """The ID that is named by any of the names."""
    found: dict[str, str] = {}
    for name in names:
        if name in named:
            try:
                found[name] = parse_id(named[name])
            except ValueError:
                raise InvalidParameterValue(
                    f'invalid value for parameter "{name}": "{named[name]}"',
                    hint=f"A {what} ID has 32 hexadecimal digits.",
                    fatal=True,
                ) from None
    if not found:
        raise InvalidAuthorizationSpecification(
            f"no {what} ID specified in startup packet", hint=_HINT, fatal=True
        )
    if len(set(found.values())) > 1:
        raise InvalidParameterValue(
            " and ".join(f'"{name}"' for name in found) + f" name different {what}s",
            detail=" and ".join(found.values()),
            hint="Use one of them only.",
            fatal=True,
        )
    return next(iter(found.values()))
