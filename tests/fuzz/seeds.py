"""Inputs to begin with, from recorded conversations (``recorded/README.rst``)."""

from __future__ import annotations

from functools import cache
from itertools import product

from tests.test_recorded import MAJORS, SLOTS, WHOLE, Recording, recording

NAMES = (*WHOLE, *SLOTS)


def recordings() -> list[Recording]:
    return [recording(major, name) for major, name in product(MAJORS, NAMES)]


def startup_packets() -> list[bytes]:
    """What clients began with, without the length word."""
    return unique(one.requests()[0] for one in recordings())


def requests() -> list[bytes]:
    """The messages that clients sent then, whole."""
    return unique(request for one in recordings() for request in one.requests()[1:])


def conversations() -> list[list[bytes]]:
    """For each recording, the startup packet without its length word, then the messages whole."""
    return [one.requests() for one in recordings()]


@cache
def copied() -> tuple[bytes, ...]:
    """What servers sent inside CopyData."""
    return tuple(
        unique(contents for one in recordings() for tag, contents in one.answers() if tag == b"d")
    )


def queries() -> list[bytes]:
    """The text of what clients asked."""
    return unique(request[5:-1] for request in requests() if request[:1] == b"Q")


def unique(found: object) -> list[bytes]:
    return list(dict.fromkeys(found))  # type: ignore[call-overload]
