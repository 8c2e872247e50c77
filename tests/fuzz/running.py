"""Runs targets, and reads what was found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.target import Target

SLOWEST = 30
"""Seconds that an input may take: one that takes so long takes for ever."""
MEMORY = 1024
"""MB that a process may take, of which Python and what it has imported take a hundred."""

_INPUTS = re.compile(r"^stat::number_of_executed_units:\s*(\d+)|^#(\d+)\s", re.MULTILINE)
_COVERED = re.compile(r"cov: (\d+)")
_NOISE = re.compile(r"^#\d+\s.*\n", re.MULTILINE)


@dataclass
class Found:
    """What a run of a target came to.

    ``inputs`` is how many it was given, ``covered`` how many branches of walproto they took;
    ``failures`` are those that failed, ``log`` says how.
    """

    name: str
    inputs: int
    covered: int
    failures: list[bytes] = field(default_factory=list)
    log: str = ""

    @property
    def is_good(self) -> bool:
        return not self.log

    def __str__(self) -> str:
        line = f"{self.name}: {self.inputs} inputs, {self.covered} branches"
        if self.is_good:
            return line
        literals = "".join(f"\n{self.name}: fails with {failure!r}" for failure in self.failures)
        return f"{line}\n{self.log.rstrip()}{literals}"


def run(
    targets: Sequence[Target],
    corpus: Path,
    work: Path,
    *,
    seconds: float,
    seed: int,
    at_a_time: int = 1,
) -> Iterator[Found]:
    """What each target came to when it was given inputs for ``seconds``, as they end.

    The corpus is in ``corpus``, a directory for each target that is made if it is not there;
    ``work`` is an empty one for all else.  ``seed`` is the random generators'.
    """
    flags = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-seed={seed}",
        f"-timeout={SLOWEST}",
        f"-rss_limit_mb={MEMORY}",
        "-print_final_stats=1",
    ]
    jobs = [
        {
            "target": target.name,
            "flags": [*flags, *_prepare(target, corpus / target.name, work / target.name)],
            "log": str(work / target.name / "log"),
        }
        for target in targets
    ]
    plan = json.dumps({"at_a_time": at_a_time, "jobs": jobs})
    errors = work / "errors"
    with (
        open(errors, "wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(plan)
        process.stdin.close()
        ended = 0
        for line in process.stdout:
            name, status = line.split()
            ended += 1
            yield _found(name, int(status), work / name)
    if process.returncode or ended < len(jobs):
        raise RuntimeError(f"fuzzing has failed:\n{errors.read_text(errors='replace')}")


def _prepare(target: Target, corpus: Path, work: Path) -> list[str]:
    """Have the directories that the target needs; the flags that say so."""
    seeds, failures, words = work / "seeds", work / "failures", work / "words"
    for directory in (corpus, seeds, failures):
        directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (seeds / str(number)).write_bytes(data[: target.size])
    flags = [f"-max_len={target.size}", f"-artifact_prefix={failures}/", str(corpus), str(seeds)]
    if target.words:  # libFuzzer takes an empty file for a mistake
        escaped = ("".join(f"\\x{byte:02X}" for byte in word) for word in target.words)
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        flags.insert(0, f"-dict={words}")
    return flags


def _found(name: str, status: int, work: Path) -> Found:
    log = (work / "log").read_text(errors="replace")
    counts = [int(most or one) for most, one in _INPUTS.findall(log)]
    covered = [int(count) for count in _COVERED.findall(log)]
    failures = [file.read_bytes() for file in sorted((work / "failures").iterdir())]
    return Found(
        name,
        max(counts, default=0),
        max(covered, default=0),
        failures,
        f"status {status}\n" + _NOISE.sub("", log) if status or failures else "",
    )
