"""Fuzzing, for a moment: see :mod:`tests.fuzz`, and ``make fuzz`` for more of it.

A run is as good as it is long, so this is not where most is found.  It shows that every target can
be run, that what it is given to begin with is taken as it should be, and that a defect is found.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.planted import PLANTED
from tests.fuzz.running import run
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS
from walproto.access.scram import Verifier
from walproto.server import answers
from walproto.server.protocol import WalSenderProtocol
from walproto.timeline.replicas import Replicas
from walproto.wire.framing import Framing

FOUND: dict[str, list[bytes]] = {
    # A server says within one connection that its segments are of another size now.
    "upstream": [
        bytes.fromhex(
            "000131010401007d7d7d7d7d7d7d7d7d013701000132010009302f3330303030303000000101"
            "0101000431364d42000101020100103030300000000000000000000000000000000000000000"
            "0000000000000000000000000000000000000000000000000000000000000000000000000000"
            "0000000000000000000000000000000000000000000000000000000000303030303233686900"
            "0d3109302f32ffffffff30302a3030300978"
        )
    ],
}
"""Inputs that once failed, by target: they are tried wherever the tests run."""

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="there is no atheris for "
    f"{sys.platform}, Python {sys.version_info.major}.{sys.version_info.minor}",
)


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_begins_with_and_what_was_found_is_taken(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds
    for data in [*seeds, b"", *FOUND.get(name, [])]:
        assert len(data) <= target.size
        target.check(data)


@needs_atheris
def test_nothing_is_found_in_a_moment(tmp_path: Path) -> None:
    """With the same seed each time; ``make fuzz`` draws others."""
    inputs, bad = 0, []
    targets = list(TARGETS.values())
    for found in run(targets, tmp_path / "corpus", tmp_path, seconds=1, seed=1, at_a_time=2):
        print(found)
        inputs += found.inputs
        assert found.inputs > 0
        bad += [] if found.is_good else [found.name]
    print(f"{inputs} inputs in all")
    assert not bad


@needs_atheris
def test_a_defect_is_found(tmp_path: Path) -> None:
    """In a minute at most; it mostly takes a second, and a run ends with what it has found."""
    (found,) = run([PLANTED], tmp_path / "corpus", tmp_path, seconds=60, seed=1)
    assert not found.is_good
    assert "AssertionError" in found.log
    (failure,) = found.failures
    with pytest.raises(AssertionError):
        PLANTED.check(failure)
    assert f"planted: fails with {failure!r}" in str(found)


def _fail(tag: str) -> bytes:
    raise KeyError(tag)


def _receive_and_keep(framing: Any, data: bytes) -> None:
    framing._buffer += data
    framing.__dict__.setdefault("kept", []).append(data)


def _close_and_say_more(protocol: Any) -> None:
    CLOSE(protocol)
    protocol.transport.write(b"S\0\0\0\4")


CLOSE = WalSenderProtocol.close
DEFECTS: dict[str, tuple[object, str, Any, str]] = {
    "an exception": (answers, "command_complete", _fail, "a defect in walproto"),
    "bytes are kept": (Framing, "receive", _receive_and_keep, "bytes are held"),
    "a replica stays": (Replicas, "remove", lambda replicas, one: None, "a replica is left"),
    "a timer runs on": (WalSenderProtocol, "_stop_timer", lambda protocol: None, "DelayedCall"),
    "more behind the end": (WalSenderProtocol, "close", _close_and_say_more, "too late"),
    "any password will do": (Verifier, "is_proven", lambda *_: True, "it is let in"),
}
"""What may be wrong with a server: where, what is there instead, and what is said of it."""


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_the_server_is_one_to_the_session(
    defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with the inputs that it begins with."""
    where, name, instead, said = DEFECTS[defect]
    target = TARGETS["session-password"]
    monkeypatch.setattr(where, name, instead)
    with pytest.raises(AssertionError, match=said):
        _check_all(target)


def _check_all(target: Target) -> None:
    for data in target.seeds():
        target.check(data)
