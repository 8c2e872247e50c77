"""A relay whose upstream says nothing any more, or the wrong things."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.middleman import Middleman, message
from tests.postgres import (
    HOST,
    Cluster,
    ReceiveWal,
    Relay,
    Workspace,
    identify_system,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal_to,
    workspace,
)
from tests.relays import PAGE, SEGMENT, SLOT, Relayed, told


@dataclass(frozen=True)
class Primary:
    """A primary with segments of 1 MB."""

    space: Workspace
    cluster: Cluster

    def relayed(self, name: str, conninfo: str, *options: str) -> Relayed:
        """With a new relay, which has received all there is."""
        relay = Relay(self.space.directory(name), conninfo, *SLOT, *options)
        setting = Relayed(self.space, self.cluster, self.space.add(relay))
        relay.ready()
        setting.wait_flushed(self.cluster.lsn())
        return setting


@pytest.fixture(scope="module")
def primary() -> Iterator[Primary]:
    with workspace() as space:
        cluster = space.cluster(installations()[0], "primary").init(wal_segsize_mb=1)
        cluster.configure(wal_sender_timeout="3s")
        yield Primary(space, cluster.start())


@pytest.fixture
def middleman(primary: Primary) -> Iterator[Middleman]:
    with Middleman(primary.cluster) as middleman:
        yield middleman


# -- Silence -------------------------------------------------------------------------------------


def test_the_upstream_falls_silent(primary: Primary, middleman: Middleman) -> None:
    """As behind a network that loses everything: it is noticed, told, and gone on from."""
    setting = primary.relayed("silent", middleman.conninfo, "--wal-receiver-timeout", "2s")
    end = setting.write(1000)
    middleman.fall_silent()
    setting.write(3 * SEGMENT, wait=False)
    setting.relay.expect("#warn.* upstream: terminating walreceiver due to timeout: trying again")
    setting.relay.expect("#warn.* upstream: .*timeout expired: trying again")
    _, _, served = identify_system(primary.cluster.installation, setting.relay.port)
    assert lsn_to_int(served) >= lsn_to_int(end)
    middleman.speak()
    setting.relay.receiving()
    assert setting.check_archive()


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A host that takes connections and never says anything."""
    with socket.create_server((HOST, 0)) as server:
        yield server


def test_a_host_that_does_not_answer(primary: Primary, silent: socket.socket) -> None:
    """It is given up when its time is over; what is here is served meanwhile; and who ends the
    relay need not wait for it."""
    setting = primary.relayed("unanswered", primary.cluster.conninfo)
    setting.relay.stop()
    conninfo = f"host={HOST} port={silent.getsockname()[1]} user=postgres connect_timeout="
    for seconds, line in (("2", "timeout expired: trying again"), ("1000", "ready to serve")):
        relay = setting.space.add(Relay(setting.directory, conninfo + seconds))
        with silent.accept()[0]:
            relay.expect(line)
            _, _, served = identify_system(primary.cluster.installation, relay.port)
            same_wal_to(served, primary.cluster.wal_dir, setting.directory)
            relay.stop()
        relay.check_log()


# -- Garbage -------------------------------------------------------------------------------------

Change = Callable[[int, bytes, int], bytes | None]
"""Given the LSN and the data of an XLogData message, and from which LSN on there is to be garbage:
what is sent in its place; None for the end of the connection."""


def with_data(lsn: int, data: bytes) -> bytes:
    """An XLogData message."""
    return message(b"d", b"w" + struct.pack(">QQq", lsn, lsn + len(data), 0) + data)


def with_header(
    lsn: int, data: bytes, begin: int, offset: int, new: bytes, every: int = PAGE
) -> bytes:
    """With other bytes in the header of each page, or of the first page of each segment."""
    changed = bytearray(data)
    for at in range(-lsn % every, len(data) - 40, every):
        if lsn + at >= begin:
            changed[at + offset : at + offset + len(new)] = new
    return with_data(lsn, bytes(changed))


INVALID = r"#critical\] upstream: what came is not the WAL that should: "
LOST = r"#warn\] upstream: "
CHANGES: dict[str, tuple[Change, str]] = {
    "magic number": (
        partial(with_header, offset=0, new=b"\x99\x99"),
        INVALID + "invalid magic number 9999",
    ),
    "timeline": (
        partial(with_header, offset=4, new=b"\7\0\0\0"),
        INVALID + r"unexpected timeline ID 7 \(should be 1\)",
    ),
    "page address": (
        partial(with_header, offset=8, new=bytes(8)),
        INVALID + "unexpected pageaddr 0/0",
    ),
    "another cluster": (
        partial(with_header, offset=24, new=b"\1\2\3\4\5\6\7\10", every=SEGMENT),
        INVALID + "WAL file is from different database system",
    ),
    "no header": (
        partial(with_header, offset=0, new=bytes(24)),
        INVALID + "WAL came behind a page without a header",
    ),
    "too far": (
        lambda lsn, data, begin: with_data(lsn + PAGE, data),
        INVALID + "WAL came for .* instead",
    ),
    "cut WAL message": (
        lambda lsn, data, begin: message(b"d", b"w" + bytes(10)),
        LOST + "invalid WAL message received from primary",
    ),
    "unknown message": (
        lambda lsn, data, begin: message(b"d", b"z" + data),
        LOST + "invalid replication message type 122",
    ),
    "unknown type": (
        lambda lsn, data, begin: message(b"?", data),
        LOST + 'lost synchronization with server: got message type "\\?"',
    ),
    "end of the stream": (
        lambda lsn, data, begin: message(b"c", b""),
        LOST + "replication terminated by the server",
    ),
    "half a message": (
        lambda lsn, data, begin: None,
        LOST + "server closed the connection unexpectedly",
    ),
}


class Meddler:
    """Changes what comes from the LSN `begin` on, for as long as `is_at_work`."""

    def __init__(self, change: Change, begin: int) -> None:
        self.is_at_work = True
        self.honest_to = begin
        """Up to where WAL has come as it is."""
        self._change = change
        self._begin = begin
        self._changed = 0
        self._condition = threading.Condition()

    def wait_changed(self, number: int) -> None:
        """Wait until so many messages were changed."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._changed >= number, 30)

    def meddle(self, kind: bytes, contents: bytes) -> bytes | None:
        honest = message(kind, contents)
        if kind != b"d" or contents[:1] != b"w" or not self.is_at_work:
            return honest
        (lsn,) = struct.unpack_from(">Q", contents, 1)
        honest = with_data(lsn, contents[25:])
        changed = self._change(lsn, contents[25:], self._begin)
        if changed == honest:
            self.honest_to = max(self.honest_to, lsn + len(contents) - 25)
            return honest
        with self._condition:
            self._changed += 1
            self._condition.notify_all()
        return changed


@pytest.mark.parametrize("what", CHANGES)
def test_the_upstream_sends_garbage(primary: Primary, middleman: Middleman, what: str) -> None:
    """Nothing of it is acknowledged, it is told once, and as soon as what comes is right again, it
    is received as if nothing had been."""
    setting = primary.relayed(what.replace(" ", "-"), middleman.conninfo)
    change, line = CHANGES[what]
    meddler = Meddler(change, middleman.acknowledged)
    middleman.meddle = meddler.meddle
    setting.write(2 * SEGMENT, wait=False)
    setting.relay.expect(line)
    meddler.wait_changed(3)
    acknowledged = middleman.acknowledged
    assert acknowledged <= meddler.honest_to
    same_wal_to(int_to_lsn(acknowledged), primary.cluster.wal_dir, setting.directory)

    meddler.is_at_work = False
    end = setting.write(1000)
    same_wal_to(end, primary.cluster.wal_dir, setting.directory)
    setting.relay.stop()
    # Where it noticed may have been another place the first time.
    lines = re.findall(r"(?m)^\S+ \[(.*upstream: .*)", setting.relay.output)
    assert len(set(lines)) == len(lines) <= 2, setting.relay.output
    assert all(re.search(line, one) for one in lines)
    assert "Traceback" not in setting.relay.output


def with_records(lsn: int, data: bytes, begin: int) -> bytes:
    """With another byte in the middle of each page, where no header is."""
    changed = bytearray(data)
    for at in range(-lsn % PAGE, len(data) - PAGE + 1, PAGE):
        if lsn + at >= begin:
            changed[at + 5000] ^= 0x55
    return with_data(lsn, bytes(changed))


def received(setting: Relayed, end: str) -> Path:
    """What a pg_receivewal gets of the relay up to there."""
    directory = setting.space.directory(f"{setting.directory.name}-received")
    options = ("--no-loop", f"--endpos={int_to_lsn(lsn_to_int(end) - 1)}")
    with ReceiveWal(setting.primary.installation, directory, setting.relay.port, *options) as it:
        assert it.wait() == 0, it.output
    return directory


def test_records_are_damaged_on_their_way(primary: Primary, middleman: Middleman) -> None:
    """No page shows it, but nothing from there on is acknowledged, or shown to clients; and it is
    fetched again, also when the relay is killed meanwhile."""
    setting = primary.relayed("records", middleman.conninfo)
    setting.wait_flushed(primary.cluster.switch_wal())
    meddler = Meddler(with_records, middleman.acknowledged)
    middleman.meddle = meddler.meddle
    setting.write(SEGMENT // 2, wait=False)
    line = (
        "the WAL that came for .* does not go on from what is here, or was damaged on its way: "
        "(incorrect resource manager data checksum|record with incorrect prev-link|invalid record)"
    )
    setting.relay.expect(r"#critical\] upstream: " + line)
    meddler.wait_changed(3)
    served = identify_system(primary.cluster.installation, setting.relay.port)[2]
    assert middleman.acknowledged <= lsn_to_int(served)
    same_wal_to(served, primary.cluster.wal_dir, received(setting, served))
    setting.relay.kill()
    assert "Traceback" not in setting.relay.output
    setting.restart_relay()
    setting.relay.expect(r"#critical\] upstream: " + line)
    assert identify_system(primary.cluster.installation, setting.relay.port)[2] == served
    assert middleman.acknowledged <= lsn_to_int(served)

    meddler.is_at_work = False
    end = setting.write(1000)
    same_wal_to(end, primary.cluster.wal_dir, setting.directory)
    setting.relay.stop()
    lines = re.findall(r"(?m)^\S+ \[(.*upstream: .*)", setting.relay.output)
    assert len(set(lines)) == len(lines) <= 2, setting.relay.output


def test_a_server_is_put_back_to_an_earlier_state(primary: Primary) -> None:
    """It goes on with other WAL than before, of the same timeline, from a segment's start on."""
    space = primary.space
    server = space.cluster(primary.cluster.installation, "server").init(wal_segsize_mb=1).start()
    relay = space.add(Relay(space.directory("server-wal"), server.conninfo))
    server.sql("CREATE TABLE rows (id int, filler text)")
    earlier = space.add(server.backup_to(space.path / "earlier", wal="fetch"))
    insert = (
        "INSERT INTO rows SELECT i, repeat(md5((i * {})::text), 9) FROM generate_series(1, {}) i"
    )
    server.sql(insert.format(3, 5000))
    end = server.switch_wal()
    server.wait_until(told("flush_lsn", end))
    server.kill()

    earlier.port = server.port
    earlier.start()
    while lsn_to_int(earlier.sql("SELECT pg_current_wal_lsn()")) < lsn_to_int(end) + 5 * PAGE:
        earlier.sql(insert.format(7, 500))
    refused = r"#critical\] upstream: the WAL that came for .* does not go on from what is here"
    for _ in range(2):
        relay.expect(refused)
        assert identify_system(primary.cluster.installation, relay.port)[2] == end
        acknowledged = earlier.sql("SELECT max(flush_lsn) FROM pg_stat_replication")
        assert not acknowledged or lsn_to_int(acknowledged) <= lsn_to_int(end)
        relay.kill()
        assert "Traceback" not in relay.output
        relay = space.add(relay.again())
    earlier.stop()
