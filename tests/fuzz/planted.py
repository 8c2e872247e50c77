"""A target that is wrong, to see that it is found: the commands, with a defect in their parser.

It takes a timeline ID of 0, which no recorded conversation has.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

from tests.fuzz import wire
from walproto.wire import commands


def _tli(parser: commands._Parser) -> int:
    return parser.uint32()


def check_planted(data: bytes) -> None:
    with mock.patch.object(commands, "_tli", _tli):
        wire.check_commands(data)


PLANTED = replace(
    next(target for target in wire.TARGETS if target.name == "commands"),
    name="planted",
    check=check_planted,
)
