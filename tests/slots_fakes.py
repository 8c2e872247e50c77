"""Slots in a directory, sessions that use them, and saving that fails.

Files are real, and so are errors where the operating system can be made to have them.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from tests.disk import Disk
from tests.upstream_fakes import HeldThreads
from walproto.errors import ObjectInUse, UndefinedObject
from walproto.timeline.slot_file import read_slots
from walproto.timeline.slots import Slots

MEMORY = Path("/dev/shm")


def quick_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory in memory, if there can be one: thousands of saves need not wait for a disk."""
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


class Session:
    """One that holds slots, and lets go of them at once when it is told that it is over."""

    def __init__(self, slots: Slots, pid: int) -> None:
        self.slots = slots
        self.pid = pid
        self.terminated = 0

    def terminate(self) -> None:
        self.terminated += 1
        self.slots.clean_up(self)


class Setting:
    """Slots in a directory, two sessions, and a thread that the test has in hand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.threads = HeldThreads()
        self.slots = Slots(directory, self.threads)
        self.one, self.two = Session(self.slots, 101), Session(self.slots, 102)

    def on_disk(self) -> dict[str, int]:
        """The slots in the file, and their positions."""
        file = read_slots(self.directory)
        states, problems = file.slots, file.problems
        assert problems == []
        return {state.name: state.restart_lsn for state in states}

    def create(self, *names: str, restart_lsn: int = 0) -> None:
        for name in names:
            done = self.slots.create(name, self.one, restart_lsn=restart_lsn)
            self.threads.work_all()
            assert done.called

    def restart(self) -> Slots:
        return Slots(self.directory, self.threads)

    def is_active(self, name: str, pid: int) -> None:
        """That the slot is refused to both, for it is used by this one."""
        for session in (self.one, self.two):
            with pytest.raises(ObjectInUse) as caught:
                self.slots.acquire(name, session, invalidated_too=True)
            assert caught.value.message == f'replication slot "{name}" is active for PID {pid}'

    def is_gone(self, name: str) -> None:
        assert self.slots.get(name) is None
        with pytest.raises(UndefinedObject) as caught:
            self.slots.acquire(name, self.one)
        assert caught.value.message == f'replication slot "{name}" does not exist'
        self.slots.check_new(name)


def failure(deferred: Deferred[Any]) -> BaseException | None:
    """What it has failed with."""
    caught: list[Failure] = []
    deferred.addErrback(caught.append)
    return caught[0].value


Breaking = Callable[[Setting, pytest.MonkeyPatch], Callable[[], object]]


def without_directory(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    elsewhere = setting.directory.with_name("elsewhere")
    setting.directory.rename(elsewhere)
    return lambda: elsewhere.rename(setting.directory)


def failing(call: str) -> Breaking:
    def fail(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
        disk = Disk(setting.directory, monkeypatch)
        disk.failing[call] = errno.EIO
        return disk.failing.clear

    return fail


# The last one fails when the new file is there already, though perhaps not for good.
breaking = pytest.mark.parametrize(
    "breaks",
    [without_directory, failing("fsync walproto"), failing("rename"), failing("fsync .")],
    ids=["open", "fsync", "rename", "directory"],
)
