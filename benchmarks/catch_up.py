"""A client that catches up: how fast WAL is sent that lies in the page cache, and at what cost.

Both servers read the same files, a primary's pg_wal.  Ours has proven them before it is measured
(`walproto.timeline.proofs`): that is done once for each file, whatever clients come.  What it
costs, the first pass over them tells, which has a line of its own.

The floor is a loop that sends as many bytes from the same files through the same kind of socket, to
the same load side, with no protocol: 128 kB at a time, as PostgreSQL does (ours sends 256).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench import Bench, lsn_of, make_wal
from benchmarks.figures import AT_LEAST, AT_MOST, Figure, Goal, alternate
from benchmarks.processes import CpuTime, walsenders, with_children
from tests.certificates import Authority
from tests.postgres import (
    HOST,
    Cluster,
    Installation,
    WalSender,
    installations,
    tls_installations,
)

SIZE = 512 << 20
"""Bytes of WAL that a client is sent."""
TIMES = 4
"""How often in a round: a server is now on the same core as the load side, now on another."""
PIECE = 128 << 10

Cost = tuple[float, float]
"""GB/s, and CPU seconds per GB of the server's."""


class Server:
    """Something that sends WAL: where it listens, and which processes do it."""

    def __init__(self, bench: Bench, start: int, pids: Callable[[], list[int]]) -> None:
        self._bench, self._start, self._pids = bench, start, pids

    def send(self, address: tuple[str, int] | str, tls: bool = False, clients: int = 1) -> Cost:
        """Send all the WAL, to so many clients at the same time a part each."""
        costs = [self.send_once(address, tls, clients) for _ in range(TIMES)]
        seconds, spent = (sum(column) for column in zip(*costs, strict=True))
        total = TIMES * SIZE / 1e9
        return total / seconds, spent / total

    def send_once(
        self, address: tuple[str, int] | str, tls: bool = False, clients: int = 1
    ) -> tuple[float, float]:
        """Seconds, and CPU seconds."""
        sink, part = self._bench.sink, SIZE // clients
        sink.connect(address, clients, tls)
        cpu = CpuTime(self._pids())
        begun = time.perf_counter()
        sink.start(*(lsn_of(self._start + number * part) for number in range(clients)))
        sink.discard(part)
        seconds = time.perf_counter() - begun
        spent = cpu.spent()
        sink.close()
        return seconds, spent


def measure(bench: Bench) -> Iterator[Figure]:
    for installation in installations():
        primary = bench.primary(installation).start(
            "-c", f"unix_socket_directories={bench.space.path}"
        )
        start, _ = make_wal(primary, SIZE)
        yield from _measure_bare(bench, installation, primary, start)
        primary.stop()
    for installation in tls_installations()[:1]:
        yield from _measure_tls(bench, installation)


def _measure_bare(
    bench: Bench, installation: Installation, primary: Cluster, start: int
) -> Iterator[Figure]:
    path = str(bench.space.path / f".s.PGSQL.{primary.port + 1}")
    which = f", PostgreSQL {installation.major}"
    with ExitStack() as stack:
        options = ("--max-wal-senders", "100", "--wal-sender-timeout", "0")
        ours = stack.enter_context(
            WalSender(primary.wal_dir, "--listen", f"unix:{path}:mode=666", *options)
        )
        ours.ready()
        server = Server(bench, start, lambda: with_children(ours.pid))
        theirs = Server(bench, start, lambda: walsenders(primary.pid))
        seconds, spent = server.send_once((HOST, ours.port))
        first, first_cost = SIZE / 1e9 / seconds, spent / (SIZE / 1e9)
        rounds = bench.rounds
        tcp = alternate(
            rounds,
            lambda: server.send((HOST, ours.port)),
            lambda: theirs.send((HOST, primary.port)),
        )
        yield from _figures(f"one client catching up, loopback{which}", tcp)
        unix = alternate(
            rounds,
            lambda: server.send(path),
            lambda: theirs.send(f"{bench.space.path}/.s.PGSQL.{primary.port}"),
        )
        yield _figures(f"the same, Unix socket{which}", unix)[0]
        if installation is not installations()[0]:
            return
        segments = sorted(primary.wal_dir.glob("0" * 7 + "1*"))[1:]
        floor = [_floor(bench, segments) for _ in range(rounds * 2)]
        yield from _measure_workers(bench, primary, start, server, ours)
        yield Figure("  floor: a bare loop, loopback", "GB/s", [one for one, _ in floor])
        yield Figure("  floor: its CPU", "s/GB", [cost for _, cost in floor])
        yield Figure("  the first pass, which proves WAL", "GB/s", [first])
        yield Figure("  its CPU", "s/GB", [first_cost])


def _measure_workers(
    bench: Bench, primary: Cluster, start: int, alone: Server, ours: WalSender
) -> Iterator[Figure]:
    """What a second core is good for."""
    with WalSender(primary.wal_dir, "--workers", "2", "--wal-sender-timeout", "0") as helped:
        helped.expect("workers send WAL")
        server = Server(bench, start, lambda: with_children(helped.pid))
        server.send_once((HOST, helped.port), clients=2)
        two, one = alternate(
            bench.rounds,
            lambda: server.send((HOST, helped.port), clients=2),
            lambda: alone.send((HOST, ours.port), clients=2),
        )
    what = "two clients catching up, --workers 2 against one process of ours"
    speed, cost = _figures(what, [two, one])
    yield Figure(speed.what, speed.unit, speed.ours, speed.theirs)
    yield Figure(cost.what, cost.unit, cost.ours, cost.theirs)


def _measure_tls(bench: Bench, installation: Installation) -> Iterator[Figure]:
    primary = bench.primary(installation)
    authority = Authority("bench")
    directory = bench.space.directory("tls")
    own = authority.server().write(directory, "ours")
    other = authority.server().write(directory, "theirs", bench.space)
    primary.configure(ssl="on", ssl_cert_file=str(other.certificate), ssl_key_file=str(other.key))
    primary.start()
    start, _ = make_wal(primary, SIZE)
    files = ("--ssl-cert-file", str(own.certificate), "--ssl-key-file", str(own.key))
    with WalSender(primary.wal_dir, *files, "--wal-sender-timeout", "0") as ours:
        ours.ready()
        server = Server(bench, start, lambda: with_children(ours.pid))
        theirs = Server(bench, start, lambda: walsenders(primary.pid))
        server.send_once((HOST, ours.port), tls=True)
        found = alternate(
            bench.rounds,
            lambda: server.send((HOST, ours.port), tls=True),
            lambda: theirs.send((HOST, primary.port), tls=True),
        )
        speed, cost = _figures(f"the same, TLS, PostgreSQL {installation.major}", found, 0.8)
        yield speed
        yield Figure(cost.what, cost.unit, cost.ours, cost.theirs)
    primary.stop()


def _figures(what: str, found: list[list[Cost]], least: float = 1.0) -> list[Figure]:
    (speeds, costs), (their_speeds, their_costs) = (zip(*of_one, strict=True) for of_one in found)
    return [
        Figure(what, "GB/s", speeds, their_speeds, Goal(AT_LEAST, least)),
        Figure("  its CPU", "s/GB", costs, their_costs, Goal(AT_MOST, 1.1)),
    ]


def _floor(bench: Bench, segments: list[Path]) -> Cost:
    """Send the segments to the load side, with nothing else."""
    with socket.create_server((HOST, 0)) as listener:
        bench.sink.connect_bare(listener.getsockname())
        connection, _ = listener.accept()
    bench.sink.begin_discarding(SIZE)
    buffer = memoryview(bytearray(PIECE))
    begun, before = time.perf_counter(), time.process_time()
    with connection:
        left = SIZE
        for path in segments:
            fd = os.open(path, os.O_RDONLY)
            offset = 0
            while left > 0 and (size := os.preadv(fd, [buffer], offset)):
                connection.sendall(buffer[:size])
                offset += size
                left -= size
            os.close(fd)
        bench.sink.end_discarding()
    seconds, spent = time.perf_counter() - begun, time.process_time() - before
    bench.sink.close()
    return SIZE / 1e9 / seconds, spent / (SIZE / 1e9)
