"""README.rst is true: its examples run, and its options are those that there are."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority, write
from tests.postgres import (
    Cluster,
    Installation,
    Process,
    free_port,
    identify_system,
    installations,
    tls_installations,
    workspace,
)
from tests.secured import address_elsewhere
from walproto.access.hba_file import parse_hba
from walproto.access.peer import Peer
from walproto.options import Options
from walproto.wire.startup import Startup

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.rst").read_text()
ELSEWHERE = address_elsewhere()


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


# --- In your own reactor -------------------------------------------------------------------------

IN_YOUR_REACTOR = README.split("**In your own reactor.**  ::\n")[1]
EXAMPLE = textwrap.dedent(IN_YOUR_REACTOR.split("\nAt the end, ")[0]).strip()
"""It serves a directory to this machine."""
GUARDED, GUARDED_EXAMPLE = IN_YOUR_REACTOR.split("\nClients on other machines ")[1].split("::\n", 1)
GUARDED_EXAMPLE = textwrap.dedent(re.match(r"(?:(?: {4}.*)?\n)+", GUARDED_EXAMPLE)[0]).strip()  # type: ignore[index]
"""What is said before another one, with what it needs; and that one, which serves others too."""


@pytest.fixture(scope="module")
def primary() -> Iterator[Cluster]:
    with workspace() as space:
        yield space.cluster(installations()[0], "primary").init(wal_segsize_mb=1).start()


def running(program: str, cluster: Cluster, port: int) -> Process:
    """A program on a cluster's WAL, at a port; it runs when this returns."""
    assert program.count("5433") == program.count("reactor.run()") == 1
    program = program.replace("/srv/archive/main", str(cluster.wal_dir)).replace("5433", str(port))
    announced = program.replace(
        "reactor.run()", "reactor.callWhenRunning(print, 'running', flush=True)\nreactor.run()"
    )
    process = Process([sys.executable, "-c", announced], cwd=PROJECT)
    try:
        process.expect("^running$")
    except BaseException:
        process.kill()
        raise
    return process


def ask(installation: Installation, conninfo: str) -> subprocess.CompletedProcess[str]:
    """What psql says, when the server has started up."""
    for _ in range(100):
        done = subprocess.run(
            [
                *(installation.bindir / "psql", "-XAtqw", "-c", "IDENTIFY_SYSTEM"),
                f"{conninfo} user=postgres replication=true",
            ],
            capture_output=True,
            text=True,
        )
        if "starting up" not in done.stderr:
            break
    return done


def assert_serves(done: subprocess.CompletedProcess[str], cluster: Cluster) -> None:
    assert done.returncode == 0, done.stderr
    theirs = identify_system(cluster.installation, cluster.port)
    assert done.stdout.split("|")[:2] == [str(field) for field in theirs[:2]]


def test_the_example_serves_wal(primary: Cluster) -> None:
    """The very lines of the README, with only the directory and the port put in."""
    assert len(EXAMPLE.splitlines()) < 10
    port = free_port()
    with running(EXAMPLE, primary, port):
        assert_serves(ask(primary.installation, f"host=127.0.0.1 port={port}"), primary)


def test_the_example_serves_others_over_tls(primary: Cluster, tmp_path: Path) -> None:
    """So do these, with the files put in; what is imported is what the text before names."""
    imports = re.findall(r"``(\w+)``\s+from\s+``([\w.]+)``", GUARDED)
    assert dict(imports).keys() == {"Guard", "ServerTls"}
    lines = [line for line in EXAMPLE.splitlines() if not line.startswith("reactor.")]
    program = "\n".join(
        [
            *(f"from {module} import {name}" for name, module in imports),
            *(*lines, GUARDED_EXAMPLE, "reactor.run()"),
        ]
    )
    authority = Authority()
    given = {
        **authority.server().write(tmp_path, "server")._asdict(),
        "users": write(tmp_path / "users.txt", b'"postgres" "secret"\n', mode=0o600),
    }
    for file in given.values():
        assert program.count(f'"{file.name}"') == 1
        program = program.replace(f'"{file.name}"', f'"{file}"')
    psql = tls_installations()[0]
    port = free_port(*([ELSEWHERE] if ELSEWHERE else []))
    encrypted = f"port={port} sslmode=require password"
    with running(program, primary, port):
        assert_serves(ask(psql, f"host=127.0.0.1 {encrypted}=any"), primary)
        if ELSEWHERE:
            assert_serves(ask(psql, f"host={ELSEWHERE} {encrypted}=secret"), primary)
            refused = ask(psql, f"host={ELSEWHERE} {encrypted}=wrong")
            assert "password authentication failed for user" in refused.stderr
            refused = ask(psql, f"host={ELSEWHERE} port={port} sslmode=disable password=secret")
            assert "no pg_hba.conf entry for replication connection" in refused.stderr


# --- Security ------------------------------------------------------------------------------------


def test_the_rules_files_let_somebody_in() -> None:
    """They are read, and replication is meant in every line."""
    section = README.split("Security\n--------\n")[1].split("How it is made\n")[0]
    files = re.findall(r"(?m)^    # TYPE .*\n(?:    .+\n)+", section)
    assert files
    found = [parse_hba(textwrap.dedent(file), "hba") for file in files]
    for rules, file in zip((each.rules for each in found), files, strict=True):
        assert len(rules) == len(file.splitlines()) - file.count("#")
        assert all("replication" in rule.databases.keywords for rule in rules)
    client = Startup("postgres", "postgres", True, "", (), False)
    on_a_socket = Peer("[local]", is_local=True, is_near=True)
    assert any(rules.match(client, on_a_socket) for rules in found)


def test_every_test_that_the_docs_name_is_there() -> None:
    named = re.findall(r"``(\w+\.py)::(\w+)``", (PROJECT / "docs" / "security.rst").read_text())
    assert len(named) > 40
    for file, function in named:
        assert f"def {function}(" in (PROJECT / "tests" / file).read_text(), (file, function)
