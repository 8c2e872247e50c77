"""A real relay's password is not to be seen: in the process list, in what it logs, or elsewhere.

The upstream asks for the password, in clear, and repeats it in an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest.mock import patch

import pytest
from twisted.logger import capturedLogs, formatEvent

from tests.askers import CLEARTEXT, Asker
from tests.postgres import HOST, PROJECT, Process, free_port
from walproto.options import Options
from walproto.tap import makeService
from walproto.upstream.process_title import hide_in_process_title

SECRET = "correct horse"
MODULE = [sys.executable, "-m", "twisted"]
SCRIPT = [sys.executable, str(Path(sysconfig.get_path("scripts"), "twist"))]
WARNING = "the password on the command line is blanked in the process list, but was to be seen"

needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")


def command_line(pid: int) -> str:
    """What everybody can read of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def relay(program: list[str], directory: Path, *arguments: str, **variables: str) -> Process:
    """One that listens."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    made = Process(
        [
            *(*program, "--log-format=text", "walsender", "--wal-dir", str(directory)),
            *("--listen", f"tcp:{free_port()}:interface={HOST}"),
            *arguments,
        ],
        cwd=PROJECT,
        env=clean | variables,
    )
    made.expect("listening on")
    return made


@needs_proc
@pytest.mark.parametrize(
    ("program", "option", "conninfo", "shown"),
    [
        (SCRIPT, "--upstream {}", "{} password='correct horse'", "{} password=***"),
        (MODULE, "--upstream={}", "password=correct\\ horse {}", "password=*** {}"),
        (MODULE, "-u{}", "postgresql://u:correct%20horse@{}/", "postgresql://u:***@{}/"),
    ],
)
def test_a_password_on_the_command_line(
    tmp_path: Path, program: list[str], option: str, conninfo: str, shown: str
) -> None:
    with Asker(CLEARTEXT) as upstream:
        place = f"{HOST}:{upstream.port}"
        if "://" not in conninfo:
            place = f"host={HOST} port={upstream.port} user=u"
        words = [word.format(conninfo.format(place)) for word in option.split()]
        with relay(program, tmp_path, *words) as process:
            line = command_line(process.pid)
            assert upstream.answer() == f"p{SECRET}\0".encode()
            process.expect(r"FATAL:  you said \*\*\*")
            process.terminate()
            process.wait()
    assert SECRET.split()[1] not in line
    assert line.startswith(" ".join(program))
    assert line.endswith(" " + option.format(shown.format(place)))
    assert process.output.count(WARNING) == 1
    assert SECRET.split()[1] not in process.output


@needs_proc
def test_a_password_that_is_kept_elsewhere(tmp_path: Path) -> None:
    """The process is called what it was; and what the server repeats, is blanked as well."""
    file = tmp_path / "passwords"
    file.write_text(f"*:*:*:*:{SECRET}\n")
    file.chmod(0o600)
    directory = tmp_path / "wal"
    directory.mkdir()
    for more, variables in ((f" passfile={file}", {}), ("", {"PGPASSWORD": SECRET})):
        with Asker(CLEARTEXT) as upstream:
            conninfo = f"host={HOST} port={upstream.port} user=u{more}"
            with relay(MODULE, directory, "--upstream", conninfo, **variables) as process:
                assert command_line(process.pid) == " ".join(process.args)
                assert upstream.answer() == f"p{SECRET}\0".encode()
                process.expect(r"FATAL:  you said \*\*\*")
                process.terminate()
                process.wait()
        assert SECRET not in process.output
        assert "the password on the command line" not in process.output


def test_what_is_printed_when_it_does_not_start(tmp_path: Path) -> None:
    """Whatever is wrong with it, or asked for."""
    for upstream, status in {
        "host=h password='correct horse": 1,
        "host=h password=correct horse": 1,
        "postgresql://u:correct@horse@h/": 1,
        "postgresql://u:correct/horse@h/": 1,
        "password='correct\nhorse' nonsense": 1,
        "password=horse --help": 0,
    }.items():
        conninfo, *more = upstream.split(" --")
        done = subprocess.run(
            [*MODULE, "walsender", "--wal-dir", str(tmp_path), "-u", conninfo]
            + [f"--{word}" for word in more],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        assert "horse" not in done.stdout + done.stderr
        assert "correct" not in (done.stdout + done.stderr).replace("correct_", "")
        if status:
            assert done.stderr.startswith("twist walsender: --upstream: ")
            assert done.stderr.count("\n") == 1


def start(words: list[str]) -> None:
    """As far as it goes without a reactor."""
    options = Options()
    options.parseOptions(words)
    makeService(options)


@pytest.mark.parametrize("conninfo", ["host=h password=horse", "postgresql://u:horse@h/d"])
@pytest.mark.parametrize(
    ("option", "needs"),
    [
        ("--wal-dir", []),
        ("--data-dir", []),
        ("--upstream-slot", ["--upstream", "host=h"]),
        ("--upstream-start", ["--upstream", "host=h"]),
        ("--wal-receiver-timeout", []),
        ("--wal-keep-size", ["--upstream", "host=h"]),
        ("--advertise", ["--data-dir", "."]),
        ("--server-version", []),
        ("--wal-sender-timeout", []),
        ("--max-wal-senders", []),
        ("--ssl-cert-file", ["--ssl-key-file", "/none"]),
        ("--hba-file", []),
        ("--auth-file", []),
        ("--listen", []),
        ("--listen", ["--listen", "tcp:port"]),
    ],
)
def test_one_that_belongs_to_another_option(
    tmp_path: Path, option: str, needs: list[str], conninfo: str
) -> None:
    """It is said what is wrong with it, in a line without the password."""
    words = [option, conninfo, *needs]
    if not {"--wal-dir", "--data-dir"} & set(words):
        words += ["--wal-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as told:
        start(words)
    text = str(told.value)
    assert text.startswith("twist walsender: ")
    assert "\n" not in text
    assert conninfo.split("horse")[0] + "***" in text
    assert "horse" not in text


def test_without_setproctitle() -> None:
    """It is there for want of it; the operator is told, and what to do."""
    argv = ["python", "twist", "walsender", "--upstream", "host=h password=secret"]
    missing = {"setproctitle": None}
    with (
        patch.object(sys, "orig_argv", argv),
        patch.dict(sys.modules, missing),
        capturedLogs() as events,
    ):
        hide_in_process_title()
    (text,) = [str(formatEvent(event)) for event in events]
    assert "is to be seen in the process list" in text
    assert "pip install 'walproto[upstream]'" in text
    assert "secret" not in text


def test_other_words_stay_what_they_are() -> None:
    """Paths with something like a password in their names are no reason to do anything."""
    argv = ["python", "twist", "walsender", "--wal-dir=/pass/word", "--wal-dir", "/secret/x"]
    argv += ["--listen", "ssl:5433:privateKey=/pass/key.pem:certKey=/x", "-u", "passfile=/x"]
    with patch.object(sys, "orig_argv", argv), capturedLogs() as events:
        hide_in_process_title()
    assert events == []
