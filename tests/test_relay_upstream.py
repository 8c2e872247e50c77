"""A relay whose upstream says nothing any more, or the wrong things."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from tests.middleman import Middleman, message
from tests.postgres import (
    HOST,
    Cluster,
    Relay,
    Workspace,
    identify_system,
    installations,
    int_to_lsn,
    lsn_to_int,
    same_wal_to,
    workspace,
)
from tests.relays import PAGE, SEGMENT, SLOT, Relayed


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
    told = re.findall(r"(?m)^\S+ \[(.*upstream: .*)", setting.relay.output)
    assert len(set(told)) == len(told) <= 2, setting.relay.output
    assert all(re.search(line, one) for one in told)
    assert "Traceback" not in setting.relay.output
