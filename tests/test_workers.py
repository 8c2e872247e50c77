"""Workers: what clients are sent by other processes is what one process would send, to the byte,
whatever happens meanwhile; and those who decide nothing end with the one that does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.fakes import COPY_DONE, TERMINATE, cancel_request, query, startup, status, told, wal_of
from tests.postgres import (
    HOST,
    Cluster,
    ReceiveWal,
    Relay,
    WalSender,
    Workspace,
    installations,
    int_to_lsn,
    is_segment,
    lsn_to_int,
    same_wal,
    tls_installations,
    workspace,
)
from tests.test_standby import STREAMING, check_same
from walproto.lsn import parse_segment_name

SEGMENT = 2**20
PATIENCE = 30


@dataclass(frozen=True)
class Source:
    """A primary with segments of 1 MB, and an archive of what it wrote first."""

    space: Workspace
    primary: Cluster
    archive: Path

    @property
    def first(self) -> str:
        """The name of the oldest segment."""
        return min(path.name for path in self.archive.iterdir() if is_segment(path.name))

    @property
    def start(self) -> int:
        """Where it begins."""
        return lsn_of(self.first)

    def serve(self, directory: Path, *options: str) -> Served:
        """Serve it; it is ready when this returns."""
        sender = self.space.add(WalSender(directory, *options))
        workers = worker_pids(sender) if "--workers" in options else []
        sender.ready()
        return Served(self, sender, workers)


@dataclass(frozen=True)
class Served:
    """A walsender that has workers."""

    source: Source
    sender: WalSender
    workers: list[int]

    def receiver(self, name: str, *options: str) -> ReceiveWal:
        """pg_receivewal, which archives all there is."""
        return receiver(self.source, name, self.sender.port, *options)

    def sending(self, directory: Path) -> list[int]:
        """The workers that have WAL open."""
        return [pid for pid in self.workers if has_open(pid, directory)]

    def stop(self) -> None:
        """End it; its workers end with it, and nothing was wrong."""
        self.sender.stop()
        self.sender.check_log()
        for pid in self.workers:
            assert not Path(f"/proc/{pid}").exists()


def receiver(source: Source, name: str, port: int, *options: str) -> ReceiveWal:
    directory = source.space.directory(name)
    source.space.file(directory / f"{source.first}.partial")
    return source.space.add(ReceiveWal(source.primary.installation, directory, port, *options))


def lsn_of(name: str) -> int:
    parsed = parse_segment_name(name)
    assert parsed is not None
    return parsed.segno(SEGMENT) * SEGMENT


def worker_pids(sender: WalSender) -> list[int]:
    told_them = sender.expect(r"workers send WAL: processes ([\d, ]+)$")
    return [int(pid) for pid in told_them[1].split(", ")]


def has_open(pid: int, directory: Path) -> bool:
    return any(file.startswith(f"{directory}/") for file in open_files(pid))


def sockets(pid: int) -> int:
    return sum(file.startswith("socket:") for file in open_files(pid))


def open_files(pid: int) -> list[str]:
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found.append(os.readlink(file))
    return found


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    with workspace() as space:
        primary = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1).start()
        primary.pgbench("-i", "-s", "1")
        end = lsn_to_int(primary.switch_wal())
        archive = space.directory("archive")
        for path in primary.wal_dir.iterdir():
            if is_segment(path.name) and lsn_of(path.name) < end:
                space.file(archive / path.name, path.read_bytes())
        yield Source(space, primary, archive)


class Raw:
    """A client that says what a test has it say, and reads when a test has it read."""

    def __init__(self, address: str | int) -> None:
        """`address` is a port, or the path of a Unix socket."""
        self._socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(address if isinstance(address, str) else (HOST, address))
        self._unread = b""
        self.wal = bytearray()
        self.key = (0, b"")
        self._end = 0

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *data: bytes) -> None:
        self._socket.sendall(b"".join(data))

    def stream(self, lsn: int, tli: int = 1, **parameters: str) -> None:
        self.send(startup(**parameters), query("IDENTIFY_SYSTEM"), replicate(lsn, tli))
        self.read(lambda line: line == "W")

    def read(self, is_last: Callable[[str], bool]) -> list[str]:
        """What it is told up to such a line, or the end; WAL that goes on is one line."""
        lines: list[str] = []
        while not lines or not is_last(lines[-1]):
            message = self._message()
            if not message:
                return [*lines, "EOF"]
            for lsn, data in wal_of(message).items():
                self.wal += data
                goes_on = lines and lines[-1].startswith("w ") and lsn == self._end
                self._end = lsn + len(data)
                begin = lines.pop().split("-")[0] if goes_on else f"w {int_to_lsn(lsn)}"
                lines.append(f"{begin}-{int_to_lsn(self._end)}")
                break
            else:
                lines += told(message)
        return lines

    def _message(self) -> bytes:
        while len(self._unread) < 5 or len(self._unread) < self._size:
            data = self._socket.recv(1 << 16)
            if not data:
                return b""
            self._unread += data
        size = self._size
        message, self._unread = self._unread[:size], self._unread[size:]
        if message[:1] == b"K":
            self.key = int.from_bytes(message[5:9], "big"), message[9:]
        return message

    @property
    def _size(self) -> int:
        return int.from_bytes(self._unread[1:5], "big") + 1


def replicate(lsn: int, tli: int = 1) -> bytes:
    return query(f"START_REPLICATION {int_to_lsn(lsn)} TIMELINE {tli}")


def wal_in(directory: Path, start: int, end: int) -> bytes:
    """The WAL of timeline 1 in a directory of segments."""
    names = sorted(path.name for path in directory.iterdir() if is_segment(path.name))
    wanted = [name for name in names if start // SEGMENT * SEGMENT <= lsn_of(name) < end]
    wal = b"".join((directory / name).read_bytes() for name in wanted)
    return wal[start % SEGMENT :][: end - start]


# --- Real clients --------------------------------------------------------------------------------


def test_an_archive_and_what_comes(source: Source) -> None:
    served = source.serve(source.primary.wal_dir, "--workers", "2")
    receivers = [served.receiver(f"archived {number}") for number in range(2)]
    source.primary.pgbench("-n", "-c", "2", "-t", "300")
    end = source.primary.switch_wal()
    for each in receivers:
        each.expect(rf"finished segment at {re.escape(end)}")
        assert len(same_wal(source.primary.wal_dir, each.directory)) > 5
    assert served.sending(source.primary.wal_dir) == served.workers
    assert [each.stop() for each in receivers] == [0, 0]
    served.stop()


def test_an_archive_that_is_not_in_memory(source: Source) -> None:
    """As far as the kernel does what it is asked to: forget what is on disk."""
    archive = source.space.directory("cold")
    for path in sorted(source.archive.iterdir()):
        shutil.copy(path, archive)
    served = source.serve(archive, "--workers", "1")
    for path in archive.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    end = end_of(archive)
    with Raw(served.sender.port) as client:
        client.stream(source.start)
        client.read(lambda line: line.endswith(f"-{int_to_lsn(end)}"))
        assert client.wal == wal_in(archive, source.start, end)
    served.stop()


def test_a_relay(source: Source) -> None:
    space, primary = source.space, source.primary
    options = ("--workers", "2", "--upstream-start", int_to_lsn(source.start))
    relay = space.add(Relay(space.directory("relay"), primary.conninfo, *options))
    workers = worker_pids(relay)
    relay.receiving()
    standby = space.add(primary.backup_to(space.path / "standby"))
    standby.make_standby(relay.conninfo).start()
    standby.wait_until(STREAMING)
    archived = receiver(source, "relayed", relay.port)
    primary.pgbench("-n", "-c", "2", "-t", "300")
    end = primary.switch_wal()
    standby.wait_replayed(primary.lsn())
    check_same(primary, standby)
    archived.expect(rf"finished segment at {re.escape(end)}")
    same_wal(primary.wal_dir, archived.directory)
    assert all(has_open(pid, relay.directory) for pid in workers)
    relay.stop()
    relay.check_log()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    standby.stop()


def test_a_new_timeline(source: Source) -> None:
    space, primary = source.space, source.primary
    standby = space.add(primary.backup_to(space.path / "promoted"))
    standby.make_standby(primary.conninfo).start()
    standby.wait_until(STREAMING)
    first = min(path.name for path in standby.wal_dir.iterdir() if is_segment(path.name))
    served = source.serve(standby.wal_dir, "--workers", "2")
    directory = space.directory("over timelines")
    space.file(directory / f"{first}.partial")
    archived = space.add(ReceiveWal(primary.installation, directory, served.sender.port))
    archived.expect("starting log streaming")
    standby.promote()
    archived.expect("switched to timeline 2|timeline 2")
    standby.pgbench("-n", "-c", "2", "-t", "300")
    end = standby.switch_wal()
    archived.expect(rf"finished segment at {re.escape(end)} \(timeline 2\)")
    assert any(name.startswith("00000002") for name in same_wal(standby.wal_dir, directory))
    served.stop()
    standby.stop()


def test_one_with_tls_beside_one_without(source: Source, tmp_path: Path) -> None:
    files = Authority().server().write(tmp_path, "server")
    tls = ("--ssl-cert-file", str(files.certificate), "--ssl-key-file", str(files.key))
    client = tls_installations()[0]
    options = ("--workers", "1", "--server-version", f"{client.major}.0", *tls)
    served = source.serve(source.archive, *options)
    directory = source.space.directory("encrypted")
    source.space.file(directory / f"{source.first}.partial")
    with_tls = f"host={HOST} port={served.sender.port} user=postgres sslmode=require"
    encrypted = source.space.add(ReceiveWal(client, directory, served.sender.port, "-d", with_tls))
    plain = served.receiver("plain")
    last = max(path.name for path in source.archive.iterdir())
    end = int_to_lsn(lsn_of(last) + SEGMENT)
    for each in (encrypted, plain):
        each.expect(rf"finished segment at {re.escape(end)}")
        assert same_wal(source.archive, each.directory)
    assert len(re.findall("authorized: .* SSL", served.sender.output)) == 1
    served.stop()


def test_a_worker_that_is_killed(source: Source) -> None:
    """Clients come back by themselves, and have what they would have had."""
    served = source.serve(source.primary.wal_dir, "--workers", "1")
    archived = served.receiver("killed")
    archived.expect("finished segment at")
    (worker,) = served.workers
    os.kill(worker, signal.SIGKILL)
    served.sender.expect(rf"worker process {worker} has died \(signal 9\): its 1 clients")
    source.primary.pgbench("-n", "-c", "2", "-t", "100")
    end = source.primary.switch_wal()
    archived.expect(rf"finished segment at {re.escape(end)}")
    assert same_wal(source.primary.wal_dir, archived.directory)
    assert archived.stop() == 0
    served.sender.stop()
    assert not re.search("Traceback|Unhandled", served.sender.output)


def test_the_main_process_is_killed(source: Source) -> None:
    served = source.serve(source.archive, "--workers", "2")
    with Raw(served.sender.port) as client:
        client.stream(source.start)
        served.sender.kill()  # it fails if a worker goes on: they have its output open
        assert client.read(lambda line: False)[-1] == "EOF"
        sent = bytes(client.wal)
        assert sent == wal_in(source.archive, source.start, source.start + len(sent))


# --- Conversations -------------------------------------------------------------------------------


@pytest.fixture
def on_unix(source: Source, tmp_path: Path) -> Iterator[tuple[Served, str]]:
    """A walsender with a worker, on a Unix socket: what that takes at once is less than a worker
    sends in a turn, so whoever has been sent something and reads no more has a message waiting
    there that is cut."""
    path = str(tmp_path / "socket")
    served = source.serve(source.archive, "--workers", "1", "--listen", f"unix:{path}")
    (worker,) = served.workers
    before = sockets(worker), sockets(served.sender.pid)
    yield served, path
    deadline = time.monotonic() + PATIENCE
    while (sockets(worker), sockets(served.sender.pid)) != before:
        assert time.monotonic() < deadline, "a client's socket is still open"
    served.stop()


def end_of(archive: Path) -> int:
    return lsn_of(max(path.name for path in archive.iterdir())) + SEGMENT


def test_copy_done_within_a_message_and_a_second_stream(
    source: Source, on_unix: tuple[Served, str]
) -> None:
    _, path = on_unix
    later = source.start + 2 * SEGMENT
    with Raw(path) as client:
        client.stream(source.start)
        begun = client.read(lambda line: line.startswith("w "))
        client.send(COPY_DONE, query("SHOW wal_segment_size"), replicate(later), COPY_DONE)
        lines = begun + client.read(lambda line: line == "W")
        first = bytes(client.wal)
        client.wal.clear()
        lines += client.read(lambda line: line == "Z I")
        second = bytes(client.wal)
        assert [line.split()[0] for line in lines[2:8]] == ["c", "C", "C", "Z", "T", "D"]
        assert first == wal_in(source.archive, source.start, source.start + len(first))
        assert second == wal_in(source.archive, later, later + len(second))
        client.send(TERMINATE)
        assert client.read(lambda line: False) == ["EOF"]


def test_keepalives_and_cancellation(source: Source, on_unix: tuple[Served, str]) -> None:
    served, path = on_unix
    end = end_of(source.archive)
    with Raw(path) as client, Raw(path) as canceller:
        client.stream(end - SEGMENT)
        client.read(lambda line: line.endswith(int_to_lsn(end)))
        client.send(status(end, end, reply=1))
        assert client.read(lambda line: True) == [f"k {int_to_lsn(end)} reply=0"]
        canceller.send(cancel_request(*client.key))
        assert client.read(lambda line: line == "Z I") == [
            "ERROR 57014: canceling statement due to user request",
            "Z I",
        ]
        served.sender.expect(f"has ended streaming, sent up to {int_to_lsn(end)}")
        client.send(replicate(source.start))
        client.read(lambda line: line.startswith("w "))
        client.send(COPY_DONE, TERMINATE)
        lines = [line for line in client.read(lambda line: False) if line[0] != "w"]
        assert [line.split()[0] for line in lines] == ["c", "C", "C", "Z", "EOF"]


def test_a_client_that_takes_nothing_and_is_silent(
    source: Source, on_unix: tuple[Served, str]
) -> None:
    """It may still take what it has been sent."""
    served, path = on_unix
    with Raw(path) as client:
        client.stream(source.start, options="-c wal_sender_timeout=500ms")
        served.sender.expect("terminating walsender process due to replication timeout")
        assert client.read(lambda line: False)[-1] == "EOF"
        sent = bytes(client.wal)
        assert sent == wal_in(source.archive, source.start, source.start + len(sent))


def test_a_client_that_goes(source: Source, on_unix: tuple[Served, str]) -> None:
    served, path = on_unix
    with Raw(path) as client:
        client.stream(source.start)
    served.sender.expect("has ended streaming")


def test_an_orderly_end(source: Source, tmp_path: Path) -> None:
    """Whoever catches up is sent all, and says so, before the end; a signal to the workers, too,
    changes nothing."""
    path = str(tmp_path / "socket")
    options = ("--listen", f"unix:{path}", "--wal-sender-shutdown-timeout", "60s")
    served = source.serve(source.archive, "--workers", "1", *options)
    end = end_of(source.archive)
    with Raw(path) as client:
        client.stream(source.start)
        client.read(lambda line: line.startswith("w "))  # so it runs
        for pid in served.workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        served.sender.terminate()
        served.sender.expect("waiting up to 60 s for 1 clients")
        client.read(lambda line: line == f"k {int_to_lsn(end)} reply=1")
        assert client.wal == wal_in(source.archive, source.start, end)
        client.send(status(end, end))
        assert client.read(lambda line: False) == ["C COPY 0", "EOF"]
    served.sender.wait()
    served.stop()


def test_what_cannot_be_sent_is_told_as_by_one_process(source: Source) -> None:
    """A segment that is not there, and one that is damaged."""
    archive = source.space.directory("incomplete")
    names = sorted(path.name for path in source.archive.iterdir())
    for name in names:
        shutil.copy(source.archive / name, archive / name)
    (archive / names[1]).unlink()
    damaged = bytearray((archive / names[4]).read_bytes())
    damaged[SEGMENT // 2] ^= 0x10
    (archive / names[4]).write_bytes(damaged)
    told_by = {}
    for workers in ("0", "1"):
        served = source.serve(archive, "--workers", workers) if workers == "1" else None
        sender = served.sender if served else source.space.add(WalSender(archive))
        if served is None:
            sender.ready()
        with Raw(sender.port) as client:
            client.stream(lsn_of(names[0]))
            lines = client.read(lambda line: line == "Z I")
            client.send(replicate(lsn_of(names[2])))
            lines += client.read(lambda line: line == "Z I")
        sender.stop()
        complaints = re.findall(r" ((?:ERROR|FATAL) .*)", sender.output)
        told_by[workers] = lines, complaints, bytes(client.wal)
    assert told_by["1"] == told_by["0"]
    lines, complaints, _ = told_by["1"]
    assert len(complaints) == 2
    assert [line.split(":")[0] for line in lines if "ERROR" in line] == [
        "ERROR 58P01",
        "ERROR XX001",
    ]
