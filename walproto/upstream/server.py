"""What a server is asked, and what its answers say.

The commands are those of the PostgreSQL documentation, chapter "Streaming Replication Protocol".
A method of :class:`Commands` raises an UpstreamError if the server refuses, is silent, or answers
with something else than it should; a ValueError if what it answers makes no sense.
"""

from __future__ import annotations

from dataclasses import dataclass

from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime

from walproto.lsn import format_lsn, is_segment_size, parse_lsn
from walproto.timeline.history import History, parse_history
from walproto.upstream.connection import Answer, UpstreamConnection, UpstreamError


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself: IDENTIFY_SYSTEM, and the history of its timeline."""

    system_identifier: int
    tli: int
    lsn: int
    history: History
    history_contents: bytes
    segment_size: int

    def is_same_cluster(self, other: Server) -> bool:
        """Whether WAL of the one can go on with WAL of the other."""
        return (self.system_identifier, self.segment_size) == (
            other.system_identifier,
            other.segment_size,
        )


class Commands:
    """The commands that are given over ``connection``; ``timeout`` is in seconds, 0 for none."""

    def __init__(self, connection: UpstreamConnection, timeout: float, clock: IReactorTime) -> None:
        self._connection = connection
        self._timeout = timeout
        self._clock = clock

    async def identify(self) -> Server:
        """Who the server is, and which timelines it knows of."""
        (system_identifier, tli_text, lsn), *_ = await self._rows("IDENTIFY_SYSTEM", 3)
        ((size,), *_) = await self._rows("SHOW wal_segment_size", 1)
        tli = int(tli_text)
        if not 0 < tli < 1 << 32:
            raise UpstreamError(f"the server is on timeline {tli}, which no server can be")
        contents = await self.history(tli) if tli > 1 else b""
        return Server(
            system_identifier=int(system_identifier),
            tli=tli,
            lsn=parse_lsn(lsn),
            history=parse_history(tli, contents),
            history_contents=contents,
            segment_size=_parse_size(size),
        )

    async def history(self, tli: int) -> bytes:
        """The contents of a timeline's history file."""
        answer = await self._ask(f"TIMELINE_HISTORY {tli}")
        if not answer.rows or len(answer.rows[0]) != 2:
            raise UpstreamError("unexpected result of TIMELINE_HISTORY")
        return answer.rows[0][1] or b""

    async def slot(self, slot: str) -> int | None:
        """The slot's restart_lsn, 0 if it has none; None if there is no such slot, or no way to
        know."""
        if self._connection.major < 15:
            return None
        answer = await self._ask(f'READ_REPLICATION_SLOT "{slot}"')
        if not answer.rows or len(answer.rows[0]) != 3:
            raise UpstreamError("unexpected result of READ_REPLICATION_SLOT")
        kind, restart_lsn, _ = answer.rows[0]
        if kind is None:
            return None
        return parse_lsn(restart_lsn.decode()) if restart_lsn else 0

    async def create_slot(self, slot: str) -> None:
        """Create a physical replication slot and reserve WAL for it."""
        await self._ask(f'CREATE_REPLICATION_SLOT "{slot}" PHYSICAL RESERVE_WAL')

    async def start(self, lsn: int, tli: int, slot: str | None) -> Answer:
        """Have WAL streamed; at the end of the timeline there is none, but a row that names the
        next one."""
        using = f'SLOT "{slot}" ' if slot else ""
        return await self._ask(
            f"START_REPLICATION {using}PHYSICAL {format_lsn(lsn)} TIMELINE {tli}"
        )

    async def _ask(self, command: str) -> Answer:
        """Have a command executed.  UpstreamError if the server refuses, or is silent."""
        asked = self._connection.query(command)
        if self._timeout:
            asked.addTimeout(self._timeout, self._clock)
        try:
            return await asked
        except TimeoutError:
            raise UpstreamError(
                f"no answer to {command.split()[0]} for {self._timeout:g} s"
            ) from None

    async def _rows(self, command: str, columns: int) -> list[list[str]]:
        """The rows that a command results in, as so many columns of text none of which is NULL."""
        answer = await self._ask(command)
        rows = [
            [value.decode() for value in row[:columns] if value is not None] for row in answer.rows
        ]
        if not rows or any(len(row) != columns for row in rows):
            raise UpstreamError(f"unexpected result of {command}")
        return rows


def _parse_size(text: str) -> int:
    """The segment size in bytes that ``16MB`` or ``1GB`` stands for."""
    units = {"MB": 1 << 20, "GB": 1 << 30}
    number, unit = text[:-2], text[-2:]
    size = int(number) * units[unit] if number.isdecimal() and unit in units else 0
    if not is_segment_size(size):
        raise UpstreamError(f'wal_segment_size is "{text}", which no server can have')
    return size
