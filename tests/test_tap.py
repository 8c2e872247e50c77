"""``twist walsender``: what is wrong ends it with one clear line, and it starts and stops well."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import Process
from walproto.tap import Options

PROJECT = Path(__file__).parent.parent
TWIST = [sys.executable, "-m", "twisted", "--log-format=text", "walsender"]


def refusal(*arguments: str | Path) -> str:
    """What ``twist walsender`` says before it ends, which must be one line on standard error."""
    done = subprocess.run(
        [*TWIST, *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in done.stdout
    return line.removeprefix("twist walsender: ")


def test_options_that_are_wrong(tmp_path: Path) -> None:
    nowhere, file = tmp_path / "nowhere", tmp_path / "file"
    file.touch()
    assert refusal() == "--wal-dir is missing: say which directory holds the WAL"
    assert refusal("--wal-dir", nowhere) == f"--wal-dir: no such directory: {nowhere}"
    assert refusal("--wal-dir", file) == f"--wal-dir: not a directory: {file}"
    good = ("--wal-dir", tmp_path)
    assert refusal(*good, "DIR") == "unexpected argument: DIR"
    assert refusal(*good, "--frobnicate") == "option --frobnicate not recognized"
    assert refusal(*good, "--server-version", "9.6").startswith('--server-version: "9.6" is not')
    assert refusal(*good, "--wal-sender-timeout", "soon") == (
        '--wal-sender-timeout: invalid value for parameter "wal_sender_timeout": "soon"'
    )


def test_endpoints_that_are_wrong(tmp_path: Path) -> None:
    good = ("--wal-dir", tmp_path, "--listen")
    for endpoint in ("nonsense", "tcp", "tcp:port", "5433", ""):
        assert refusal(*good, endpoint).startswith(f'--listen: "{endpoint}" is not an endpoint: ')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        assert refusal(*good, endpoint) == (
            f"cannot listen on {endpoint}: [Errno 98] Address already in use"
        )
    assert refusal(*good, "tcp:0:interface=192.0.2.1").startswith("cannot listen on tcp:0:")
    assert refusal(*good, f"unix:{tmp_path}/no/socket").startswith("cannot listen on unix:")


def test_a_socket_on_which_somebody_listens_stays_theirs(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        for _ in range(2):
            told = refusal("--wal-dir", tmp_path, "--listen", f"unix:{path}")
            assert told == f"cannot listen on unix:{path}: [Errno 98] Address already in use"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(SystemExit, match=f"--wal-dir: no permission to read {tmp_path}"):
        Options().parseOptions(["--wal-dir", str(tmp_path)])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_waits_for_wal_and_ends_when_told(
    tmp_path: Path, ending: signal.Signals, times: int
) -> None:
    listen = f"unix:{tmp_path}/socket"
    with Process([*TWIST, "--wal-dir", str(tmp_path), "--listen", listen], cwd=PROJECT) as sender:
        sender.expect(f"listening on {listen}")
        sender.expect(f"there is no WAL in {tmp_path} yet: waiting for a first segment")
        for _ in range(times):
            sender.send(ending)
        sender.wait()
        assert "Traceback" not in sender.output
