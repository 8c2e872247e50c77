"""Every error that a peer can be told of.

One class for each SQLSTATE in use, named as PostgreSQL's ``errcodes.txt`` names its condition (and
one for an end that is none of PostgreSQL's).
Whoever finds something wrong raises one of these, with PostgreSQL's own words where it has some;
:func:`walproto.server.results.error_response` makes an ErrorResponse of it, and nothing else does.
So an error of ours is never a traceback, and a traceback is always a defect.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from walproto.secrets import censored

MAX_SHOWN = 1000
"""Characters of one text in a line of a log."""


class ReportedError(Exception):
    """An error as an ErrorResponse carries it.

    ``message`` is the primary message, ``detail`` and ``hint`` are its optional second and third
    sentence.  With ``fatal`` the connection ends behind it (severity FATAL); without, the command
    does (severity ERROR) and the connection is ready for the next one.  ``log`` is what the
    operator reads beside it where that is more than the peer may know: which file, what to do.

    PostgreSQL documentation: "Error and Notice Message Fields"; "PostgreSQL Error Codes".
    """

    sqlstate: ClassVar[str] = "XX000"

    def __init__(
        self,
        message: str,
        *,
        detail: str | None = None,
        hint: str | None = None,
        fatal: bool = False,
        log: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint
        self.fatal = fatal
        self.log = log

    @property
    def severity(self) -> str:
        """``ERROR`` or ``FATAL``."""
        return "FATAL" if self.fatal else "ERROR"


class ProtocolViolation(ReportedError):
    sqlstate = "08P01"


class FeatureNotSupported(ReportedError):
    sqlstate = "0A000"


class InvalidParameterValue(ReportedError):
    sqlstate = "22023"


class InvalidAuthorizationSpecification(ReportedError):
    sqlstate = "28000"


class InvalidPassword(ReportedError):
    sqlstate = "28P01"


class CommandSyntaxError(ReportedError):
    """``syntax_error``; not called so, because Python has a SyntaxError of its own."""

    sqlstate = "42601"


class InvalidName(ReportedError):
    sqlstate = "42602"


class NameTooLong(ReportedError):
    sqlstate = "42622"


class UndefinedObject(ReportedError):
    sqlstate = "42704"


class DuplicateObject(ReportedError):
    sqlstate = "42710"


class DiskFull(ReportedError):
    sqlstate = "53100"


class TooManyConnections(ReportedError):
    sqlstate = "53300"


class ConfigurationLimitExceeded(ReportedError):
    sqlstate = "53400"


class ObjectNotInPrerequisiteState(ReportedError):
    sqlstate = "55000"


class ObjectInUse(ReportedError):
    sqlstate = "55006"


class CantChangeRuntimeParam(ReportedError):
    sqlstate = "55P02"


class QueryCanceled(ReportedError):
    sqlstate = "57014"


class AdminShutdown(ReportedError):
    sqlstate = "57P01"


class CannotConnectNow(ReportedError):
    sqlstate = "57P03"


class IoError(ReportedError):
    sqlstate = "58030"


class UndefinedFile(ReportedError):
    sqlstate = "58P01"


class InternalError(ReportedError):
    sqlstate = "XX000"


class DataCorrupted(ReportedError):
    sqlstate = "XX001"


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """What a peer has said, or has had a part in, as it may stand in one line of a log: without a
    password that it has put where none belongs, and no more than ``limit`` characters of it, with
    "..." behind them if there is more."""
    is_cut = len(text) > limit
    # What is cut off may be what tells a password in a URI: the "@" behind it.
    shown = censored(text[:limit] + "@").removesuffix("@") if is_cut else censored(text)
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in shown
    )
    return escaped[:limit] + "..." if is_cut or len(escaped) > limit else escaped


class EndReason(Enum):
    """Why a server ends a stream that nothing is wrong with."""

    SUSPENDED = "nobody brings WAL, and the replica has all there is"
    MOVED = "the timeline belongs to another pageserver"


class StreamingEnded(InternalError):
    """The server ends a stream, for ``reason``; the client may know it by the text, as it has no
    SQLSTATE of its own."""

    def __init__(self, reason: EndReason, message: str, *, fatal: bool = False) -> None:
        super().__init__(message, fatal=fatal, log=reason.value)
        self.reason = reason
