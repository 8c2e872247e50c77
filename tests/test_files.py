"""The files that an operator names: what is read, and what stands in their place and is not."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.certificates import Authority, write
from tests.fakes import TERMINATE, query
from tests.guarded import Files
from tests.postgres import PROJECT, Process
from tests.secured import fail_to_reload, reload_sender
from tests.strangers import Caller
from tests.test_reload import Setting
from walproto.access import certificates, hba_file, tokens, userlist
from walproto.access.files import NotRegularError, read_file
from walproto.access.tls import ServerTls, TlsError

LIMIT = 100
NOT_REGULAR = "it is not a regular file"


def descriptors() -> set[str]:
    """What this process has open."""
    return {entry for entry in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{entry}")}


def problem(path: Path | str, limit: int = LIMIT) -> OSError:
    """Why a file is not read; nothing is left open."""
    before = descriptors()
    with pytest.raises(OSError, match=r".") as caught:
        read_file(path, limit)
    assert descriptors() <= before
    return caught.value


# --- What is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
def test_a_file_as_long_as_it_may_be(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "file", os.urandom(size), mode=0o640)
    before = descriptors()
    contents, status = read_file(path, LIMIT)
    assert descriptors() <= before
    assert contents == path.read_bytes()
    assert (status.st_size, status.st_mode & 0o777) == (size, 0o640)


def test_a_link_to_a_file(tmp_path: Path) -> None:
    """As certificates are renewed: the link is what changes; the status is the file's."""
    path = write(tmp_path / "file", b"contents", mode=0o600)
    (tmp_path / "link").symlink_to(path)
    contents, status = read_file(str(tmp_path / "link"), LIMIT)
    assert (contents, status.st_ino) == (b"contents", path.stat().st_ino)


def test_a_file_whose_size_does_not_tell_what_is_in_it() -> None:
    """It is read to its end, piece by piece if it comes so, and no more than may be."""
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert read_file(path, 1 << 20)[0].startswith(b"Name:")
    assert problem(path, 10).strerror == "it is larger than 10 bytes"


# --- What is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 40])
def test_a_file_that_is_too_large(tmp_path: Path, size: int) -> None:
    """No more of it is in memory than the limit: the longer one has a terabyte."""
    path = write(tmp_path / "file", b"")
    try:
        os.truncate(path, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        pytest.skip("the file system has no files of that size")
    assert problem(path).strerror == "it is larger than 100 bytes"


def test_what_is_no_file(tmp_path: Path) -> None:
    """Whether it would keep its reader waiting, or never end, or has nothing to be read."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:  # the whole path may be longer than a socket's can be
            listening.bind(f"/proc/self/fd/{descriptor}/socket")
        finally:
            os.close(descriptor)
        names = ("pipe", "link", "socket", "/dev/null", "/dev/zero")
        for path in [tmp_path / name for name in names]:
            error = problem(path)
            assert isinstance(error, NotRegularError), path
            assert error.strerror == NOT_REGULAR
    error = problem(tmp_path)
    assert isinstance(error, NotRegularError)
    assert error.strerror == "Is a directory"


def test_a_pipe_with_something_in_it_is_left_alone() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"contents")
        assert problem(f"/dev/fd/{reader}").strerror == NOT_REGULAR
        assert os.read(reader, 100) == b"contents"
    finally:
        os.close(reader)
        os.close(writer)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, number in (("none", errno.ENOENT), ("loop", errno.ELOOP)):
        error = problem(tmp_path / name)
        assert not isinstance(error, NotRegularError)
        assert (error.errno, error.strerror) == (number, os.strerror(number))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "file", b"contents", mode=0o200)
    assert problem(path).strerror == "Permission denied"


# --- Each of the files ---------------------------------------------------------------------------


def pipe(path: Path, limit: int) -> str:
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    return NOT_REGULAR


def device(path: Path, limit: int) -> str:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return NOT_REGULAR


def too_large(path: Path, limit: int) -> str:
    write(path, b"", mode=0o600)
    os.truncate(path, limit + 1)
    return f"it is larger than {limit} bytes"


@pytest.mark.parametrize("spoil", [pipe, device, too_large])
def test_who_may_connect(tmp_path: Path, spoil: Callable[[Path, int], str]) -> None:
    files = Files(tmp_path)
    paths = files.users(), files.keys(), files.hba("local all all trust\n")
    limits = userlist.MAX_SIZE, tokens.MAX_FILE_SIZE, hba_file.MAX_SIZE
    options = "--auth-file", "--jwt-public-key", "--hba-file"
    for path, limit in zip(paths, limits, strict=True):
        reason = spoil(path, limit)
        files.given[path.name] = f'could not open file "{path.name}": {reason}'
    told = [files.given.pop(path.name) for path in paths]
    assert files.problems() == [f"{option}: {it}" for option, it in zip(options, told, strict=True)]


@pytest.mark.parametrize("spoil", [pipe, device, too_large])
def test_tls(tmp_path: Path, spoil: Callable[[Path, int], str]) -> None:
    authority = Authority()
    certificate, key_file = authority.server().write(tmp_path, "server")
    ca, crl = write(tmp_path / "ca", authority.pem), write(tmp_path / "crl", authority.crl())
    for path, limit, kind in (
        (crl, certificates.MAX_LISTS_SIZE, certificates.REVOCATION_LISTS),
        (ca, certificates.MAX_SIZE, certificates.AUTHORITIES),
        (key_file, certificates.MAX_SIZE, ""),
        (certificate, certificates.MAX_SIZE, certificates.CERTIFICATE),
    ):
        reason = spoil(path, limit)
        with pytest.raises(TlsError) as caught:
            ServerTls(certificate, key_file, ca, crl)
        if kind:
            told = f'could not load {kind} file "{path}": {reason}'
        elif spoil is too_large:
            told = f'could not access private key file "{path}": {reason}'
        else:
            told = f'private key file "{path}" is not a regular file'
        assert str(caught.value) == told


# --- A server ------------------------------------------------------------------------------------


def test_a_server_that_is_given_a_pipe_does_not_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hba")
    arguments = ("--wal-dir", str(tmp_path), "--hba-file", str(tmp_path / "hba"))
    command = [sys.executable, "-m", "twisted", "walsender", *arguments]
    with Process(command, cwd=PROJECT) as server:
        assert server.wait() != 0
        assert f'could not open file "{tmp_path / "hba"}": {NOT_REGULAR}' in server.output


@pytest.mark.parametrize("name", ["hba", "server.crt"])
def test_a_server_that_is_given_a_pipe_goes_on_serving(tmp_path: Path, name: str) -> None:
    """Clients that are there, and those that come, by what was in force."""
    setting = Setting(tmp_path)
    path = tmp_path / name
    good = path.read_bytes()
    with setting.sender as sender, Caller(sender.port) as caller:
        assert caller.start_up() == "R 0"
        pipe(path, 0)
        told = fail_to_reload(sender)
        assert f'file "{path}": {NOT_REGULAR}' in told
        assert sender.output.count(NOT_REGULAR) == 1
        caller.socket.sendall(query("IDENTIFY_SYSTEM") + TERMINATE)
        answers = caller.hear_out()
        assert any(answer.startswith("D ") for answer in answers), answers
        assert not setting.is_rejected
        assert setting.served() == setting.identity.der
        setting.hba("reject")
        if name != "hba":
            write(path, good)
        reload_sender(sender)
        assert setting.is_rejected
        sender.stop()
