"""Runs targets, each in a process of its own, for libFuzzer does not return.

All of it is in :mod:`tests.fuzz.running`, which starts this as a program: it reads from its input
which targets to run, forks for each, and writes a line when one has ended.  So walproto is imported
once, with what tells libFuzzer of the branches that are taken; the tests' own do not count.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import import_module
from typing import Any, NoReturn


def main() -> None:
    plan = json.load(sys.stdin)
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=["walproto"]):
        targets = import_module("tests.fuzz.targets").ALL
    gc.collect()
    gc.freeze()
    running: dict[int, str] = {}
    for job in plan["jobs"]:
        if len(running) == plan["at_a_time"]:
            _wait_for_one(running)
        name = job["target"]
        pid = os.fork()
        if pid == 0:
            _become(atheris, targets[name].check, **job)
        running[pid] = name
    while running:
        _wait_for_one(running)


def _become(atheris: Any, check: Any, *, target: str, flags: list[str], log: str) -> NoReturn:
    """Be the process of a target, up to its exit, at which libFuzzer writes down what failed."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    atheris.Setup([target, *flags], check)
    atheris.Fuzz()
    raise SystemExit("libFuzzer has returned")


def _wait_for_one(running: dict[int, str]) -> None:
    pid, status = os.wait()
    print(running.pop(pid), os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
