"""A replication client that notes when a commit has come."""

from __future__ import annotations

import struct
import time

from psycopg import pq
from psycopg.pq.abc import PGconn, PGresult

from walproto.wal.pages import RECORD_HEADER

XLOG_DATA = struct.Struct("!cQQQ")
STATUS_UPDATE = struct.Struct("!cQQQQB")
XACT, OPERATION, COMMIT = 1, 0x70, 0x00
SUCCESS = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COPY_BOTH)


def connect(conninfo: str) -> PGconn:
    pgconn = pq.PGconn.connect(conninfo.encode())
    if pgconn.status != pq.ConnStatus.OK:
        raise RuntimeError(pgconn.get_error_message())
    return pgconn


def execute(pgconn: PGconn, command: str) -> PGresult:
    """Have commands executed; the last one's result."""
    result = pgconn.exec_(command.encode())
    if result.status not in SUCCESS:
        raise RuntimeError(f"{command}: {result.error_message.decode()}")
    return result


def value(result: PGresult, column: int = 0) -> str:
    return (result.get_value(0, column) or b"").decode()


class Client:
    """Receives WAL from the server's current end on.

    A commit has come when its record has, all of it.  The record is found by its transaction ID:
    no LSN that a server tells afterwards is just that commit's, when others commit, too.
    """

    def __init__(self, conninfo: str) -> None:
        self.pgconn = connect(f"{conninfo} replication=true")
        lsn = value(execute(self.pgconn, "IDENTIFY_SYSTEM"), 2)
        execute(self.pgconn, f"START_REPLICATION PHYSICAL {lsn}")
        self.pgconn.nonblocking = 1
        self.end = 0
        """How far WAL has come."""
        self.commit_end = 0
        """Where the awaited commit's record ends; 0 as long as that is not known."""
        self.came_at: float | None = None
        """When the awaited commit had come."""
        self._xid = b""

    def await_commit(self, xid: int) -> None:
        self._xid = (xid % 2**32).to_bytes(4, "little")
        self.commit_end, self.came_at = 0, None

    def read(self) -> None:
        """Take what the socket has."""
        self.pgconn.consume_input()
        now = time.perf_counter()
        while True:
            size, data = self.pgconn.get_copy_data(1)
            if size == 0:
                return
            if size < 0:
                raise RuntimeError(f"the stream has ended: {self.pgconn.get_error_message()}")
            if data[0] == ord("w"):
                _, start, _, _ = XLOG_DATA.unpack_from(data)
                self._take(start, bytes(data[XLOG_DATA.size :]), now)

    def tell(self) -> None:
        """Tell the server how far we are, lest it takes us for dead."""
        self.pgconn.put_copy_data(STATUS_UPDATE.pack(b"r", self.end, self.end, 0, 0, 0))
        self.pgconn.flush()

    def _take(self, start: int, wal: bytes, now: float) -> None:
        self.end = start + len(wal)
        if self._xid and self.came_at is None:
            self.commit_end = self.commit_end or self._find_commit(start, wal)
            if 0 < self.commit_end <= self.end:
                self.came_at = now

    def _find_commit(self, start: int, wal: bytes) -> int:
        """Where the awaited commit's record ends if it begins in this WAL, else 0.

        It is overlooked if a page's or a message's end is within its header.
        """
        at = wal.find(self._xid)
        while at >= 0:
            header = at - 4
            if 0 <= header <= len(wal) - RECORD_HEADER.size:
                length, _, prev, info, rmid, _ = RECORD_HEADER.unpack_from(wal, header)
                lsn = start + header
                is_commit = rmid == XACT and info & OPERATION == COMMIT
                if is_commit and lsn % 8 == 0 and prev < lsn:
                    return int(lsn + length)
            at = wal.find(self._xid, at + 1)
        return 0
