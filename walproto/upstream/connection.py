"""What a conversation needs of the connection it is held on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from twisted.internet.defer import Deferred

Row = list[bytes | None]


class UpstreamError(Exception):
    """What the server answered instead of what it was asked for, or why it is gone.

    ``sqlstate`` is empty for an error that no server sent.
    """

    def __init__(self, message: str, sqlstate: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: its rows, as text, and whether it streams from now on."""

    rows: list[Row]
    is_streaming: bool = False


class UpstreamConnection(Protocol):
    """A replication connection to a server.  One thing is asked of it at a time."""

    peer: str
    """Whom it is with, for the log."""
    major: int
    """The server's major version."""
    heard: Callable[[], None]
    """Called whenever something has come from the server."""

    def query(self, command: str) -> Deferred[Answer]:
        """Have a command executed.  Fails with an UpstreamError."""

    def copy(self, take: Callable[[memoryview], None]) -> Deferred[Answer]:
        """While it streams: have ``take`` called with the contents of every CopyData.

        Fires with what the server says behind the stream.  Fails with an UpstreamError, and with
        whatever ``take`` raises.
        """

    def send(self, data: bytes) -> None:
        """While it streams: send a CopyData."""

    @property
    def is_paused(self) -> bool: ...

    def pause(self) -> None:
        """Read nothing more, for now."""

    def resume(self) -> None:
        """Read again."""

    def lose(self, why: str) -> None:
        """Close the connection; who awaits something of it gets an UpstreamError."""
