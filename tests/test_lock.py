"""A directory is received into by one, and never if a server writes to it."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.postgres import PROJECT, Process
from tests.test_watch import open_files
from walproto.upstream.lock import DirectoryLock

HOLDER = (
    "import pathlib, signal, sys; from walproto.upstream.lock import DirectoryLock; "
    "lock = DirectoryLock(pathlib.Path(sys.argv[1])); print('it is mine', flush=True); "
    "signal.pause()"
)


def refused(directory: Path, why: str) -> None:
    """That the directory cannot be had, for that reason, and that nothing is left open."""
    before = open_files()
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        DirectoryLock(directory)
    assert str(error.value) == why
    assert open_files() == before


def test_a_directory_is_of_one_until_it_is_released(tmp_path: Path) -> None:
    before = open_files()
    lock = DirectoryLock(tmp_path)
    for _ in range(2):
        refused(tmp_path, f"another walsender receives into {tmp_path} already")
    other = tmp_path / "other"
    other.mkdir()
    DirectoryLock(other).release()
    lock.release()
    DirectoryLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == [other]
    assert open_files() == before


def test_another_name_is_no_other_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, link = tmp_path / "wal", tmp_path / "link"
    directory.mkdir()
    link.symlink_to(directory)
    monkeypatch.chdir(directory)
    lock = DirectoryLock(Path())
    for name in (directory, link, link / ".." / "wal"):
        refused(name, f"another walsender receives into {name} already")
    lock.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_gone_holds_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with Process([sys.executable, "-c", HOLDER, tmp_path], cwd=PROJECT) as holder:
        holder.expect("it is mine")
        refused(tmp_path, f"another walsender receives into {tmp_path} already")
        holder.send(number)
        holder.wait()
    DirectoryLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_is_started_does_not_inherit_it(tmp_path: Path) -> None:
    """It might live longer than we, and the directory would be held for nobody."""
    lock = DirectoryLock(tmp_path)
    with Process(
        [sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"]
    ) as other:
        other.expect("1")
        lock.release()
        DirectoryLock(tmp_path).release()


def test_it_can_be_released_twice(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.release()
    with open(tmp_path / "file", "w") as file:  # whose descriptor may be that of the lock
        lock.release()
        file.write("still open")


def test_a_directory_that_a_server_writes_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "archive_status").mkdir()
    refused(
        tmp_path,
        f"{tmp_path} is the pg_wal of a PostgreSQL server, which writes to it itself (there is "
        "archive_status in it)",
    )


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    file, nowhere = tmp_path / "file", tmp_path / "nowhere"
    file.touch()
    refused(file, f"{file}: Not a directory")
    refused(nowhere, f"{nowhere}: No such file or directory")


def test_a_directory_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may = os.access
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, mode: may(path, mode) and not mode & os.W_OK)
        refused(tmp_path, f"no permission to write to {tmp_path}")
    DirectoryLock(tmp_path).release()
