"""What answers are made of: result sets, tags and errors, as messages.

PostgreSQL documentation: "Message Formats"; "Error and Notice Message Fields".
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred

from walproto.errors import ReportedError
from walproto.wire.messages import (
    CommandComplete,
    DataRow,
    ErrorResponse,
    ReadyForQuery,
    RowDescription,
)

Wait = Generator[Deferred[Any], None, None]
"""What there is to wait for: it goes on when a Deferred that it yields has fired, and if it has
failed, that is thrown into it.  It may be closed instead: nobody waits any longer."""

Answer = Generator[bytes | Deferred[Any], None, None]
"""The messages that answer a command, one after the other; it may wait, too, as a :data:`Wait`.
What it raises is an error of the command."""

StreamAnswer = Generator[bytes | Deferred[Any], None, tuple[int, int] | None]
"""An answer to START_REPLICATION: if it returns a timeline ID and an LSN, the stream begins there.
"""

TEXT = (25, -1)
INT4 = (23, 4)
INT8 = (20, 8)
BYTEA = (17, -1)

READY_FOR_QUERY = ReadyForQuery.build()


def row_description(*columns: tuple[str, tuple[int, int]], modifier: int = -1) -> bytes:
    """A RowDescription of these columns: each its name and its type's OID and size in bytes."""
    return RowDescription.build(
        fields=[
            {"name": name, "type_oid": oid, "type_size": size, "type_modifier": modifier}
            for name, (oid, size) in columns
        ]
    )


def data_row(*values: str | bytes | None) -> bytes:
    """A DataRow; None is NULL."""
    return DataRow.build(
        columns=[
            value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            for value in values
        ]
    )


def command_complete(tag: str) -> bytes:
    return CommandComplete.build(command_tag=tag)


def error_response(error: ReportedError) -> bytes:
    """The ErrorResponse that tells a peer of ``error``."""
    fields = [
        ("S", error.severity),
        ("V", error.severity),
        ("C", error.sqlstate),
        ("M", error.message),
        ("D", error.detail),
        ("H", error.hint),
    ]
    return ErrorResponse.build(
        fields=[
            {"type": code.encode(), "value": value.replace("\0", "")}
            for code, value in fields
            if value is not None
        ]
        + [{"type": b"\0", "value": None}]
    )
