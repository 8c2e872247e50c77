"""What a target is, and what the targets have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.fuzz.backend import parse_messages
from walproto.errors import ReportedError
from walproto.server.results import error_response


@dataclass(frozen=True)
class Target:
    """Something that takes bytes from outside.

    ``check`` takes an input, and raises if it does what it must not.  ``seeds`` are the inputs to
    begin with, ``words`` what is worth trying in the middle of others; ``size`` is how long an
    input gets at most, in bytes.
    """

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[bytes, ...] = ()
    size: int = 4096


class Input:
    """An input, taken apart from its beginning; behind its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Whether there is more."""
        return self._position < len(self._data)

    def take(self, size: int) -> bytes:
        """So many bytes, or what is left."""
        taken = self._data[self._position : self._position + size]
        self._position += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(size).ljust(size, b"\0"), "big")

    def string(self) -> bytes:
        """Bytes behind their length, a number of two bytes."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        return self.take(len(self._data))


def string(data: bytes) -> bytes:
    """What :meth:`Input.string` takes."""
    return len(data).to_bytes(2, "big") + data


def text(data: bytes) -> str:
    """Bytes as a String of a message holds them: up to the first NUL."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def raw(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def check_told(error: ReportedError) -> None:
    """That a client can be told of ``error``."""
    ((tag, fields),) = parse_messages(error_response(error))
    assert tag == b"E"
    assert fields["S"] == ("FATAL" if error.fatal else "ERROR")
    assert len(fields["C"]) == 5
    assert fields["M"]
