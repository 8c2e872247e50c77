"""README.rst is true: its example runs, and its options are those that there are."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.postgres import Process, free_port, identify_system, installations, workspace
from walproto.options import Options

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.rst").read_text()


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for command in re.findall(r"^    make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_every_option_is_there_and_no_other() -> None:
    section = README.split("Options\n-------\n")[1].split("What to know\n")[0]
    lines = re.findall("^``--.*", section, re.MULTILINE)
    described = set(re.findall(r"``--([\w-]+)", "\n".join(lines)))
    options = Options()
    assert described == {name.rstrip("=") for name in options.longOpt} - {"version", "help"}


def test_the_example_serves_wal() -> None:
    """The very lines of the README, with only the directory and the port put in."""
    example = textwrap.dedent(
        README.split("**In your own reactor.**  ::\n")[1].split("\nAt the end, ")[0]
    ).strip()
    assert len(example.splitlines()) < 10
    installation = installations()[0]
    with workspace() as ws:
        cluster = ws.cluster(installation, "primary")
        cluster.init(wal_segsize_mb=1)
        cluster.start()
        port = free_port()
        program = example.replace("/srv/archive/main", str(cluster.wal_dir)).replace(
            "5433", str(port)
        )
        announced = program.replace(
            "reactor.run()", "reactor.callWhenRunning(print, 'running', flush=True)\nreactor.run()"
        )
        with Process([sys.executable, "-c", announced], cwd=PROJECT) as embedding:
            embedding.expect("running")
            for _ in range(100):
                done = subprocess.run(
                    [
                        *(installation.bindir / "psql", "-XAtq", "-c", "IDENTIFY_SYSTEM"),
                        f"host=127.0.0.1 port={port} user=postgres replication=true",
                    ],
                    capture_output=True,
                    text=True,
                )
                if "starting up" not in done.stderr:
                    break
            assert done.returncode == 0, done.stderr
            theirs = identify_system(installation, cluster.port)
            assert done.stdout.split("|")[:2] == [str(field) for field in theirs[:2]]


def test_every_test_that_the_docs_name_is_there() -> None:
    named = re.findall(r"``(\w+\.py)::(\w+)``", (PROJECT / "docs" / "security.rst").read_text())
    assert len(named) > 40
    for file, function in named:
        assert f"def {function}(" in (PROJECT / "tests" / file).read_text(), (file, function)
