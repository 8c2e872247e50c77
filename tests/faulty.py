"""`twist walsender` on a disk that does what a test says.

How it thinks: every system call that writes to the WAL directory, or syncs something in it, is
announced to the test before it is made, and the test answers what is to come of it: it is made,
or it fails, or it writes less than it should, or the process is killed before it, in the middle of
it, or right behind it; and as long as there is no answer, the disk is slow.  All else is the real
program, as its operator runs it.

    python -m tests.faulty FD walsender --wal-dir DIR ...

FD is a socket, inherited from the test, whose other end belongs to a `Disk` there.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.postgres import HOST, PROJECT, Process, Relay, free_port
from walproto.lsn import parse_segment_name

CALLS = ("posix_fallocate", "pwritev", "fdatasync", "fsync", "rename", "replace")

# What may become of a call.
MADE = "made"
KILLED_BEFORE = "killed before"
KILLED_BEHIND = "killed behind"


def fails(error: int) -> str:
    """It fails, with this errno."""
    return f"fails {error}"


def short(size: int) -> str:
    """It writes so many bytes and no more."""
    return f"short {size}"


def killed_within(size: int) -> str:
    """The process is killed when so many bytes are written."""
    return f"killed within {size}"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to be made.

    `file` is a name in the WAL directory, "." for the directory itself.
    """

    name: str
    file: str
    offset: int = 0
    size: int = 0

    def end(self, segment_size: int) -> int:
        """The LSN behind what it writes."""
        name = parse_segment_name(self.file)
        assert name is not None
        return name.segno(segment_size) * segment_size + self.offset + self.size


Plan = Callable[[Call], str]


def a_kill(rng: random.Random) -> Plan:
    """Have the process killed at some call or other, before, behind or within it."""
    name = rng.choice([call for call in CALLS if call != "replace"])
    often = {"pwritev": 30, "fdatasync": 30, "fsync": 6}
    left = rng.randint(1, often.get(name, 3))

    def plan(call: Call) -> str:
        nonlocal left
        left -= call.name == name
        if left > 0:
            return MADE
        if call.name == "pwritev":
            return killed_within(rng.randint(0, call.size))
        return rng.choice([KILLED_BEFORE, KILLED_BEHIND])

    return plan


class Disk:
    """The test's end: by `plan` each call is answered; `calls` are those that were made."""

    def __init__(self) -> None:
        self.plan: Plan = lambda call: MADE
        self.calls: list[Call] = []
        self._held = ""
        self._is_holding = False
        self._changed = threading.Condition()

    def answer(self, ours: socket.socket) -> None:
        """Answer a process for as long as it lives."""
        threading.Thread(target=self._answer, args=(ours,), daemon=True).start()

    def hold(self, name: str) -> None:
        """From now on calls of this name do not come to an end."""
        with self._changed:
            self._held = name

    def wait_held(self, timeout: float = 30) -> None:
        """Wait until a call is held."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_holding, timeout), self.calls[-20:]

    def release(self) -> None:
        with self._changed:
            self._held = ""
            self._changed.notify_all()

    def counts(self) -> Counter[str]:
        """How many calls there were of each name."""
        with self._changed:
            return Counter(call.name for call in self.calls)

    def synced_to(self, segment_size: int) -> int:
        """How far WAL was written when a sync was last allowed; more cannot be on disk."""
        synced = written = 0
        with self._changed:
            for call in self.calls:
                if call.name == "pwritev":
                    written = call.end(segment_size)
                elif call.name == "fdatasync":
                    synced = written
        return synced

    def _answer(self, ours: socket.socket) -> None:
        with suppress(OSError), ours, ours.makefile("r") as lines:  # until it is killed
            for line in lines:
                name, file, offset, size = line.split()
                answer = self._decide(Call(name, file, int(offset), int(size)))
                ours.sendall(f"{answer}\n".encode())

    def _decide(self, call: Call) -> str:
        with self._changed:
            if call.name == self._held:
                self._is_holding = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: call.name != self._held)
                self._is_holding = False
            answer = self.plan(call)
            if answer == MADE:
                self.calls.append(call)
                self._changed.notify_all()
            return answer


class FaultyRelay(Relay):
    """A relay whose disk is `disk`; it listens when this returns.

    `within` is a command that runs the one that it is given as its arguments.
    """

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        upstream: str,
        *options: str,
        port: int | None = None,
        within: Sequence[str | Path] = (),
    ) -> None:
        self.disk = disk
        self.directory = directory
        self.upstream = upstream
        self.options = options
        self.port = free_port() if port is None else port
        ours, theirs = socket.socketpair()
        with theirs:
            Process.__init__(
                self,
                [
                    *(
                        *within,
                        sys.executable,
                        "-m",
                        "tests.faulty",
                        str(theirs.fileno()),
                        "walsender",
                    ),
                    *("--wal-dir", directory, "--listen", f"tcp:{self.port}:interface={HOST}"),
                    *("--upstream", upstream, *options),
                ],
                cwd=PROJECT,
                pass_fds=[theirs.fileno()],
            )
        disk.answer(ours)
        try:
            self.expect(rf"listening on tcp:{self.port}\b")
        except BaseException:
            self.kill()
            raise

    @classmethod
    def instead_of(cls, relay: Relay, disk: Disk) -> Self:
        """The same as a relay that has ended, with this disk."""
        return cls(disk, relay.directory, relay.upstream, *relay.options, port=relay.port)


# -- In the process itself -----------------------------------------------------------------------


class _Test:
    """The test, to be asked."""

    def __init__(self, fd: int, directory: str) -> None:
        self._socket = socket.socket(fileno=fd)
        self._answers = self._socket.makefile("r")
        self._directory = os.path.realpath(directory)
        self._lock = threading.Lock()

    def file(self, target: int | str | os.PathLike[str]) -> str | None:
        """The name within the directory of a file or an open one; None if it is elsewhere."""
        path = f"/proc/self/fd/{target}" if isinstance(target, int) else os.fspath(target)
        name = os.path.relpath(os.path.realpath(path), self._directory)
        return None if name.startswith("..") else name

    def ask(self, call: Call) -> str:
        with self._lock:
            self._socket.sendall(f"{call.name} {call.file} {call.offset} {call.size}\n".encode())
            answer = self._answers.readline().strip()
        if not answer:
            os._exit(99)  # the test is over
        return answer


def _install(name: str, test: _Test) -> None:
    """Have the test asked before each call of this name."""
    real: Callable[..., Any] = getattr(os, name)

    def guarded(target: Any, *arguments: Any) -> Any:
        file = test.file(target)
        if file is None:
            return real(target, *arguments)
        data, offset = b"", 0
        if name == "pwritev":
            data, offset = b"".join(arguments[0]), arguments[1]
        answer, _, rest = test.ask(Call(name, file, offset, len(data))).rpartition(" ")
        match answer, rest:
            case "", "made":
                return real(target, *arguments)
            case "fails", number:
                raise OSError(int(number), os.strerror(int(number)), str(target))
            case "short", size:
                return os.pwrite(target, data[: int(size)], offset)
            case "killed within", size:
                os.pwrite(target, data[: int(size)], offset)
            case "killed", "behind":
                real(target, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, guarded)


def main() -> None:
    fd, *arguments = sys.argv[1:]
    test = _Test(int(fd), arguments[arguments.index("--wal-dir") + 1])
    for name in (*CALLS, "unlink"):
        _install(name, test)
    sys.argv = ["twist", "--log-format=text", *arguments]
    runpy.run_module("twisted", run_name="__main__")


if __name__ == "__main__":
    main()
