"""What the tests of replication slots and of retention have in common."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Self

from tests.fakes import messages_in, query, startup, told, wal_of
from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    Process,
    ReceiveWal,
    Relay,
    int_to_lsn,
    is_segment,
    lsn_to_int,
    same_wal,
)
from tests.relays import SEGMENT, Relayed
from tests.test_standby import STREAMING

FORGETFUL = {
    "wal_keep_size": "0",
    "min_wal_size": "2MB",
    "archive_mode": "on",
    "archive_command": 'mkdir -p ../archive && cp "%p" "../archive/%f"',
}
"""Settings of a primary that keeps no more WAL than it has to; all of it goes into an archive, for
comparison."""

KEEP = 2
"""Segments that a relay is told to keep in any case, behind the one that it writes to."""
MUCH = 24 * SEGMENT
"""Much more than can be on its way to a client."""

REMOVED = re.compile(r"removed \d+ segments?, (?:\w{24}\S* to )?(\w{24})\S*: (.*)")
PID = r'"{}" \(pid (\d+), .* streams from'


class RawClient:
    """A replication connection over a socket; what is sent, and what is heard, is written as in
    :mod:`tests.fakes`."""

    def __init__(self, port: int, **parameters: str) -> None:
        self.wal: dict[int, bytes] = {}
        """The WAL that came, by the LSN where it begins."""
        self.key = b""
        """Process ID and secret key."""
        self._socket = socket.create_connection((HOST, port), timeout=30)
        try:
            self.send(startup(**parameters))
            self.hear("Z I")
        except BaseException:
            self._socket.close()
            raise

    def send(self, *data: bytes) -> None:
        self._socket.sendall(b"".join(data))

    def hear(self, pattern: str) -> list[str]:
        """What the server says, as a transcript, up to the first line that matches."""
        lines: list[str] = []
        while not (lines and re.match(pattern, lines[-1])):
            try:
                data = self._read(5)
                data += self._read(int.from_bytes(data[1:], "big") - 4)
            except EOFError:
                raise Failed(f"the server closed the connection; it had said {lines}") from None
            self.wal.update(wal_of(data))
            self.key = next((key for tag, key in messages_in(data) if tag == b"K"), self.key)
            lines += told(data)
        return lines

    def run(self, command: str) -> list[str]:
        """What the server answers to a command."""
        self.send(query(command))
        return self.hear("Z I")[:-1]

    def position(self, slot: str) -> str | None:
        """The restart_lsn of a slot; None if it has none, or there is no such slot."""
        _, row, _ = self.run(f"READ_REPLICATION_SLOT {slot}")
        lsn = row.split()[2]
        return None if lsn == "NULL" else lsn

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def position(relay: Relay, slot: str) -> str | None:
    """The restart_lsn of a relay's slot; None if it has none, or there is no such slot."""
    with RawClient(relay.port) as client:
        return client.position(slot)


def create_slot(relay: Relay, slot: str) -> str:
    """Have a slot that reserves WAL; from where on."""
    with RawClient(relay.port) as client:
        answer = client.run(f"CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL")
        assert answer[-1] == "C CREATE_REPLICATION_SLOT", answer
        lsn = client.position(slot)
        assert lsn is not None
        return lsn


def drop(relay: Relay, *slots: str) -> None:
    """Have these slots no more."""
    with RawClient(relay.port) as client:
        for slot in slots:
            answer = client.run(f"DROP_REPLICATION_SLOT {slot} WAIT")
            assert answer == ["C DROP_REPLICATION_SLOT"], answer


def watch(setting: Relayed, slot: str) -> Process:
    """psql, which prints again and again what the relay says of a slot."""
    script = setting.space.file(
        setting.space.path / f"watch-{slot}",
        b"READ_REPLICATION_SLOT %s \\watch 0.05\n" % slot.encode(),
    )
    conninfo = f"{setting.relay.conninfo} dbname=postgres replication=true"
    return setting.primary.installation.start("psql", "-XAt", "-f", script, conninfo)


def wait_position(setting: Relayed, slot: str, lsn: str) -> None:
    """Wait until the slot reserves WAL no longer from before `lsn`."""
    with watch(setting, slot) as psql:
        while lsn_to_int(psql.expect(r"physical\|(\w+/\w+)\|")[1]) < lsn_to_int(lsn):
            pass


def wait_gone(setting: Relayed, slot: str) -> None:
    """Wait until there is no such slot."""
    with watch(setting, slot) as psql:
        psql.expect(r"^\|\|$")


def pg_receivewal(installation: Installation, port: int, *options: str | Path) -> tuple[int, str]:
    """Run it to its end: exit status and output."""
    server = ("-h", HOST, "-p", str(port), "-U", "postgres")
    process = installation.start("pg_receivewal", *server, *options)
    return process.wait(), process.output


def standby_with_slot(setting: Relayed, slot: str) -> Cluster:
    """A standby of the relay, which is streaming."""
    create_slot(setting.relay, slot)
    standby = setting.space.add(setting.primary.backup_to(setting.space.path / slot))
    standby.configure(primary_slot_name=slot)
    standby.make_standby(setting.relay.conninfo).start()
    standby.wait_until(STREAMING)
    return standby


def receiver(setting: Relayed, name: str, *options: str) -> ReceiveWal:
    """pg_receivewal, which archives to a directory of that name what the relay has."""
    directory = setting.space.path / name
    if not directory.exists():
        setting.space.directory(name)
    return setting.space.add(
        ReceiveWal(setting.primary.installation, directory, setting.relay.port, *options)
    )


def finished(lsn: str) -> str:
    """What pg_receivewal says when it has all before that, the start of a segment."""
    return rf"finished segment at {re.escape(lsn)} "


def number(lsn: str) -> int:
    """The number of the segment that holds an LSN."""
    return lsn_to_int(lsn) // SEGMENT


def segment_start(lsn: str) -> str:
    return int_to_lsn(number(lsn) * SEGMENT)


def segment_name(number: int) -> str:
    """The name of a segment of timeline 1."""
    return f"{1:08X}{number >> 12:08X}{number & 0xFFF:08X}"


def number_of(name: str) -> int:
    """The number of the segment in a file of that name."""
    return int(name[8:16], 16) << 12 | int(name[16:24], 16)


def numbers(directory: Path) -> list[int]:
    """The numbers of the segments in a directory, whichever timeline they are of; there must be
    no hole between them, and no piece of one."""
    paths = [path for path in directory.iterdir() if is_segment(path.name.removesuffix(".partial"))]
    assert {path.stat().st_size for path in paths if path.suffix != ".partial"} <= {SEGMENT}
    found = sorted({number_of(path.name) for path in paths})
    assert found == list(range(found[0], found[-1] + 1)), found
    return found


def wait_removed(relay: Relay, first: int) -> str:
    """Wait until the relay has said that all segments before that of number `first` are gone, and
    see that they are, and no more; why it goes no further."""
    while True:
        said = REMOVED.findall(relay.output)
        if said and number_of(said[-1][0]) >= first - 1:
            break
        relay.expect(REMOVED.pattern)
    assert numbers(relay.directory)[0] == first
    why: str = said[-1][1]
    return why


def forget(primary: Cluster) -> None:
    """Have the primary remove what WAL it need not keep."""
    primary.sql("CHECKPOINT; CHECKPOINT")


def archived(setting: Relayed, end: str) -> Path:
    """Where the primary's archive is, when all segments before the one of `end` are in it."""
    last = segment_name(number(end) - 1)
    setting.primary.wait_until(f"(SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver)")
    return setting.space.path / "archive"


def check_little_is_left(setting: Relayed) -> None:
    """Only what the relay is told to keep, no more for anybody: wait until that is so."""
    current = number(setting.write(1000))
    assert wait_removed(setting.relay, current - KEEP).endswith("wal_keep_size")


def check_archive(setting: Relayed) -> None:
    """What the relay has is what the primary wrote, and nothing went wrong."""
    end = setting.primary.switch_wal()
    setting.wait_flushed(end)
    assert same_wal(archived(setting, end), setting.relay.directory)
    setting.relay.check_log()
