"""Record what real PostgreSQL programs say to a real walsender; README.rst describes the result.

Run it as a user that may start PostgreSQL (not root), once for each major version::

    python record.py --bindir DIRECTORY_OF_POSTGRES --out NEW_DIRECTORY

It starts a primary with 1 MB segments, fills a few nearly empty segments, waits until nothing
writes WAL any more, and lets the clients of the same version talk to it through a proxy that
copies bytes without understanding them. It takes about two minutes, most of them waiting.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
SEGMENT_SIZE = 1 << 20
QUIET_SECONDS = 27.0
"""The background writer logs a snapshot at most 15 s + one hibernation of 10 s after a change."""

SETTINGS = """
wal_level = replica
fsync = off
full_page_writes = on
autovacuum = off
checkpoint_timeout = 1h
wal_keep_size = 1GB
wal_recycle = off
max_replication_slots = 10
wal_receiver_status_interval = 2s
unix_socket_directories = ''
listen_addresses = '127.0.0.1'
"""


def lsn_text(lsn: int) -> str:
    """Print an LSN as PostgreSQL 18 and older do."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def lsn_value(text: str) -> int:
    """Read an LSN."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def segment_name(tli: int, segment: int) -> str:
    """Name the file of a 1 MB segment."""
    return f"{tli:08X}{segment >> 12:08X}{segment & 0xFFF:08X}"


# Bytes as text


def tokens(data: bytes) -> Iterator[str]:
    """Split bytes into hex tokens; a run of 64 or more equal bytes becomes ``HH*N``."""
    start = 0
    for run in re.finditer(rb"(.)\1{63,}", data, re.DOTALL):
        if run.start() > start:
            yield data[start : run.start()].hex()
        yield f"{run[1].hex()}*{len(run[0])}"
        start = run.end()
    if start < len(data):
        yield data[start:].hex()


@dataclass
class Conversation:
    """The bytes of one TCP connection, in the order in which the proxy saw them."""

    turns: list[tuple[str, bytearray]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def heard(self, direction: str, data: bytes) -> None:
        """Append to the current turn, or begin the next one."""
        if not self.turns or self.turns[-1][0] != direction:
            self.turns.append((direction, bytearray()))
        self.turns[-1][1].extend(data)

    def save(self, path: Path, about: Iterable[str]) -> None:
        """Write the file that README.rst describes."""
        lines = [f"# {line}" for line in about]
        lines += [f"{way} {' '.join(tokens(bytes(data)))}" for way, data in self.turns]
        path.write_text("\n".join(lines) + "\n", encoding="ascii")


class Proxy:
    """Listen on a port of its own, copy each connection to `upstream`, and remember it."""

    def __init__(self, upstream: int) -> None:
        self.conversations: list[Conversation] = []
        self._upstream = upstream
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            conversation = Conversation()
            self.conversations.append(conversation)
            server = socket.create_connection((HOST, self._upstream))
            sides = conversation, client, server
            threading.Thread(target=self._copy, args=sides, daemon=True).start()

    @staticmethod
    def _copy(conversation: Conversation, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, client, server:
            selector.register(client, selectors.EVENT_READ, ("F", server))
            selector.register(server, selectors.EVENT_READ, ("B", client))
            while selector.get_map():
                for key, _ in selector.select():
                    direction, target = key.data
                    assert isinstance(key.fileobj, socket.socket)
                    try:
                        data = key.fileobj.recv(65536)
                        if data:
                            conversation.heard(direction, data)
                            target.sendall(data)
                            continue
                        target.shutdown(socket.SHUT_WR)
                    except OSError:
                        pass
                    selector.unregister(key.fileobj)
        conversation.closed.set()


# The programs


class Raw:
    """As much of a replication client as we need ourselves."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=10)
        self._file = self._socket.makefile("rb")
        body = b"\0\3\0\0user\0postgres\0replication\0true\0application_name\0raw\0\0"
        self._socket.sendall(struct.pack("!I", len(body) + 4) + body)
        self.until(b"Z")

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Send one message."""
        self._socket.sendall(kind + struct.pack("!I", len(body) + 4) + body)

    def receive(self) -> tuple[bytes, bytes]:
        """Wait for one message."""
        kind, length = struct.unpack("!cI", self._file.read(5))
        return kind, self._file.read(length - 4)

    def until(self, wanted: bytes) -> list[tuple[bytes, bytes]]:
        """Wait for a message of this type; return all up to it."""
        messages = [self.receive()]
        while messages[-1][0] != wanted:
            messages.append(self.receive())
        return messages

    def identify(self) -> int:
        """Ask for the flush position."""
        self.send(b"Q", b"IDENTIFY_SYSTEM\0")
        row = next(body for kind, body in self.until(b"Z") if kind == b"D")
        position = re.search(rb"[0-9A-F]+/[0-9A-F]+", row)
        assert position
        return lsn_value(position[0].decode())

    def stream(self, start: int, flush: int) -> None:
        """Stream up to `flush`, ask for an answer on the way, and end the copy."""
        self.send(b"Q", f"START_REPLICATION {lsn_text(start)} TIMELINE 1\0".encode())
        self.until(b"W")
        received = start
        while received < flush:
            kind, body = self.receive()
            if kind == b"d" and body[:1] == b"w":
                received = int.from_bytes(body[1:9], "big") + len(body) - 25
        now = int((time.time() - 946684800) * 1000000)
        self.send(b"d", b"r" + struct.pack("!QQQQB", received, received, 0, now, 1))
        self.until(b"d")
        self.send(b"c")
        self.until(b"Z")

    def close(self) -> None:
        """Say goodbye, and wait for the server to close."""
        self.send(b"X")
        self._file.read()
        self._file.close()
        self._socket.close()


class Server:
    """A PostgreSQL server in a directory, from `initdb` or from a base backup."""

    def __init__(self, bindir: Path, directory: Path) -> None:
        self.bindir = bindir
        self.directory = directory
        with socket.create_server((HOST, 0)) as free:
            self.port: int = free.getsockname()[1]

    @property
    def wal(self) -> Path:
        """Where its segments are."""
        return self.directory / "pg_wal"

    def run(
        self, program: str, *arguments: str | Path, stdin: str = "", good: tuple[int, ...] = (0,)
    ) -> str:
        """Run one of the version's own programs; return what it printed."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        done = subprocess.run(
            [self.bindir / program, *arguments],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        if done.returncode not in good:
            raise RuntimeError(f"{program} exited with {done.returncode}: {done.stdout}")
        return done.stdout

    def create(self, major: int) -> None:
        """Make a new cluster."""
        plain = ["--no-data-checksums"] if major >= 18 else []
        how = ["-U", "postgres", "-A", "trust", "--wal-segsize=1", "-N", *plain]
        self.run("initdb", "-D", self.directory, *how)
        with (self.directory / "postgresql.conf").open("a") as file:
            file.write(SETTINGS)

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        log = self.directory.with_suffix(".log")
        port = ["-o", f"-p {self.port}"]
        # pg_ctl's server inherits standard output: it must not be the pipe that run() reads.
        subprocess.run(
            [self.bindir / "pg_ctl", "-D", self.directory, "-l", log, "-w", *port, "start"],
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def stop(self) -> None:
        """Stop at once; nothing is kept."""
        self.run("pg_ctl", "-D", self.directory, "-m", "immediate", "-w", "stop", good=(0, 1))

    def sql(self, statement: str) -> str:
        """Run SQL as the superuser."""
        where = f"host={HOST} port={self.port} user=postgres dbname=postgres"
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, where).strip()

    def message(self, text: str) -> None:
        """Write one small record, of `text`, into the WAL."""
        self.sql(f"SELECT pg_logical_emit_message(false, 'walproto', {text})")

    def switch(self) -> int:
        """Go on in a new segment; return its number."""
        self.sql("SELECT pg_switch_wal()")
        self.message("'begin'")
        return lsn_value(self.sql("SELECT pg_current_wal_insert_lsn()")) // SEGMENT_SIZE

    def flushed(self) -> int:
        """Ask a walsender, which itself writes no WAL."""
        client = Raw(self.port)
        position = client.identify()
        client.close()
        return position

    def settle(self) -> int:
        """Wait until the flush position has not moved for so long that nothing will move it."""
        position, since = self.flushed(), time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            time.sleep(1)
            now = self.flushed()
            if now != position:
                position, since = now, time.monotonic()
        return position

    def copy_wal(self, first: int, last: int, target: Path) -> None:
        """Store segments first..last of every timeline, and the history files."""
        target.mkdir(parents=True)
        for file in sorted(self.wal.iterdir()):
            if file.suffix == ".history":
                shutil.copyfile(file, target / file.name)
            elif re.fullmatch("[0-9A-F]{24}", file.name):
                number = int(file.name[8:16], 16) << 12 | int(file.name[16:], 16)
                if first <= number <= last:
                    packed = lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
                    (target / f"{file.name}.xz").write_bytes(packed)


# The recordings


class Session:
    """Everything that is recorded with one major version."""

    def __init__(self, bindir: Path, out: Path, scratch: Path) -> None:
        self.scratch = scratch
        self.primary = Server(bindir, scratch / "primary")
        self.version = self.primary.run("postgres", "--version").split(") ", 1)[1].strip()
        self.major = int(self.version.split(".")[0])
        self.out = out / str(self.major)
        self.out.mkdir(parents=True)

    @contextmanager
    def recorded(self, name: str, server: Server, served: str, what: str) -> Iterator[Proxy]:
        """Record the one connection that is made in this block; the WAL must not move meanwhile."""
        before = server.flushed()
        proxy = Proxy(server.port)
        yield proxy
        proxy.close()
        conversation = proxy.conversations[0]
        if not conversation.closed.wait(20):
            raise RuntimeError(f"{name}: the connection is still open")
        if server.flushed() != before:
            raise RuntimeError(f"{name}: the WAL has grown from {lsn_text(before)}")
        about = {
            "what": what,
            "server": f"PostgreSQL {self.version}",
            "flush": lsn_text(before),
            "wal": served,
        }
        conversation.save(self.out / f"{name}.txt", [f"{k}: {v}" for k, v in about.items()])
        connections = len(proxy.conversations)
        print(
            f"{self.major}/{name}: {connections} connection(s), flush {about['flush']}", flush=True
        )

    def receivewal(self, port: int, directory: Path, *arguments: str) -> None:
        """Run pg_receivewal until it is content (or until it has been waiting for long enough)."""
        directory.mkdir(exist_ok=True)
        where = ["-h", HOST, "-p", str(port), "-U", "postgres", "-w", "-n"]
        self.primary.run("pg_receivewal", "-D", directory, *where, *arguments)

    def simple(self, first: int, flush: int) -> None:
        """Record everything that needs only the primary."""
        server, archive = self.primary, self.scratch / "archive"
        commands = ["IDENTIFY_SYSTEM", "SHOW wal_segment_size", "TIMELINE_HISTORY 2", "SELECT 1"]
        what = f"psql {self.major} with replication=true: {', '.join(commands)}"
        with self.recorded("psql", server, "wal", what) as proxy:
            where = f"host={HOST} port={proxy.port} user=postgres dbname=postgres replication=true"
            server.run("psql", "-X", where, stdin=";\n".join([*commands, ""]))

        archive.mkdir()
        shutil.copy(server.wal / segment_name(1, first), archive)
        end = lsn_text((first + 2) * SEGMENT_SIZE + 0x3000)
        what = f"pg_receivewal {self.major} after {segment_name(1, first)}, --endpos={end}"
        with self.recorded("receivewal", server, "wal", what) as proxy:
            self.receivewal(proxy.port, archive, f"--endpos={end}")

        what = "a raw client streams up to the flush position, asks for a reply, ends the copy"
        with self.recorded("raw", server, "wal", what) as proxy:
            client = Raw(proxy.port)
            client.stream((first + 1) * SEGMENT_SIZE, flush)
            client.identify()
            client.close()

        for name, option in ("create", "--create-slot"), ("drop", "--drop-slot"):
            what = f"pg_receivewal {self.major} {option}"
            with self.recorded(f"slot-{name}", server, "wal", what) as proxy:
                self.receivewal(proxy.port, archive, option, "--slot=archive")
            if name == "create":
                self.with_slot(flush)

    def with_slot(self, flush: int) -> None:
        """Record pg_receivewal with a slot and an empty directory; SIGINT ends it."""
        what = f"pg_receivewal {self.major} --synchronous, a slot that reserves nothing yet; SIGINT"
        with self.recorded("slot-stream", self.primary, "wal", what) as proxy:
            directory = self.scratch / "slot"
            directory.mkdir()
            program = self.primary.bindir / "pg_receivewal"
            where = ["-h", HOST, "-p", str(proxy.port), "-U", "postgres", "-w", "-n"]
            how = ["-D", str(directory), "--slot=archive", "--synchronous"]
            with subprocess.Popen([program, *where, *how]) as process:
                partial = directory / f"{segment_name(1, flush // SEGMENT_SIZE)}.partial"
                while not partial.exists():
                    time.sleep(0.1)
                time.sleep(2)
                process.send_signal(signal.SIGINT)

    def record(self) -> None:
        """Make all recordings of this version."""
        primary = self.primary
        standby = Server(primary.bindir, self.scratch / "standby")
        primary.create(self.major)
        # What initdb recycled has old WAL in it, which would compress badly.
        state = primary.run("pg_controldata", "-D", primary.directory)
        current = re.search(r"REDO WAL file:\s+([0-9A-F]{24})", state)
        assert current
        for file in primary.wal.glob("0*"):
            if file.name > current[1]:
                file.unlink()
        try:
            primary.start()
            primary.switch()
            where = ["-h", HOST, "-p", str(primary.port), "-U", "postgres", "-w"]
            primary.run(
                "pg_basebackup", "-D", standby.directory, *where, "-X", "fetch", "-c", "fast"
            )
            first = primary.switch() - 1
            primary.switch()  # segment first + 2 will have a record of several pages
            primary.message("repeat('x', 20000)")
            primary.switch()  # and the next one a record that no single message can hold
            primary.message("repeat('y', 300000)")
            last = primary.switch()
            flush = primary.settle()
            primary.copy_wal(first, last, self.out / "wal")
            self.simple(first, flush)
            self.with_standby(standby, first, flush)
        finally:
            primary.stop()
            standby.stop()

    def with_standby(self, standby: Server, first: int, flush: int) -> None:
        """Record a standby's first connection; promote it and record a client that follows."""
        what = f"the walreceiver of a standby {self.major} from pg_basebackup, until its promotion"
        with self.recorded("standby", self.primary, "wal", what) as proxy:
            with (standby.directory / "postgresql.auto.conf").open("a") as file:
                file.write(f"\nprimary_conninfo = 'host={HOST} port={proxy.port} user=postgres'\n")
            (standby.directory / "standby.signal").touch()
            standby.start()
            while lsn_value(standby.sql("SELECT pg_last_wal_replay_lsn()")) < flush:
                time.sleep(0.2)
            time.sleep(5)
            standby.run("pg_ctl", "-D", standby.directory, "-w", "promote")
        standby.sql("CHECKPOINT")
        standby.switch()
        end = standby.settle()
        standby.copy_wal(first, end // SEGMENT_SIZE, self.out / "wal-promoted")

        archive = self.scratch / "follower"
        archive.mkdir()
        shutil.copy(self.primary.wal / segment_name(1, first + 2), archive)
        stop = lsn_text(end // SEGMENT_SIZE * SEGMENT_SIZE + 0x20)
        what = f"pg_receivewal {self.major} crosses from timeline 1 to 2, --endpos={stop}"
        with self.recorded("timeline", standby, "wal-promoted", what) as proxy:
            self.receivewal(proxy.port, archive, f"--endpos={stop}")


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bindir", type=Path, required=True, help="where postgres, psql, pg_receivewal... are"
    )
    parser.add_argument("--out", type=Path, required=True, help="a directory; MAJOR/ is made in it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        Session(arguments.bindir, arguments.out, Path(scratch)).record()


if __name__ == "__main__":
    main()
