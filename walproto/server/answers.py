"""What each replication command is answered, short of streaming.

Result sets, tags and errors are those of the PostgreSQL major that the server says it is.

PostgreSQL: ``exec_replication_command`` in ``walsender.c``; documentation "Streaming Replication
Protocol".
"""

from __future__ import annotations

from walproto.errors import FeatureNotSupported, InternalError
from walproto.lsn import format_lsn, history_name
from walproto.server.results import (
    BYTEA,
    INT4,
    INT8,
    TEXT,
    Answer,
    command_complete,
    data_row,
    row_description,
)
from walproto.server.settings import Settings
from walproto.server.slot_commands import SlotCommands
from walproto.timeline.interfaces import ITimeline
from walproto.wire import commands


def end_of_stream(next_timeline: tuple[int, int] | None) -> bytes:
    """What follows CopyDone from both sides.

    After a historic timeline, which one went on and where; then, always, two CommandCompletes:
    clients read both (``libpqrcv_endstreaming``).  ReadyForQuery follows.
    """
    result = b""
    if next_timeline is not None:
        tli, start = next_timeline
        result = row_description(("next_tli", INT8), ("next_tli_startpos", TEXT)) + data_row(
            str(tli), format_lsn(start)
        )
    return result + command_complete("START_STREAMING") + command_complete("START_REPLICATION")


class Answers:
    """Answers the commands of one connection."""

    def __init__(
        self, timeline: ITimeline, settings: Settings, slots: SlotCommands, major: int
    ) -> None:
        self._timeline = timeline
        self._settings = settings
        self._slots = slots
        self._major = major

    def answer(self, command: commands.Command) -> Answer:
        """The answer to a command other than START_REPLICATION, but for ReadyForQuery."""
        match command:
            case commands.IdentifySystem():
                yield from self._identify_system()
            case commands.Show(name=name):
                canonical, value = self._settings.show(name)
                yield row_description((canonical, TEXT)) + data_row(value)
            case commands.TimelineHistory(tli=tli):
                yield from self._timeline_history(tli)
            case commands.CreateReplicationSlot():
                yield from self._slots.create(command)
            case commands.ReadReplicationSlot():
                yield from self._slots.read(command)
            case commands.AlterReplicationSlot():
                yield from self._slots.alter(command)
            case commands.DropReplicationSlot():
                yield from self._slots.drop(command)
            case commands.StartLogicalReplication():
                raise self._slots.no_logical_decoding()
            case commands.Sql():
                raise (FeatureNotSupported if self._major >= 15 else InternalError)(
                    "cannot execute SQL commands in WAL sender for physical replication"
                )
            case _:
                raise FeatureNotSupported(
                    f"{command.tag} is not supported",
                    detail="There is no database behind this WAL sender.",
                    hint="Connect to the primary, or to a standby, for a base backup.",
                )
        yield command_complete(command.tag)

    def stream(self, command: commands.StartReplication) -> tuple[int, int | None]:
        """The timeline ID that START_REPLICATION asks for, and where that timeline was switched
        from, None if it is the current one; its slot is in use from now on
        (``StartReplication``)."""
        if command.slot is not None:
            self._slots.use(command.slot)
        history = self._timeline.history
        tli = command.tli or history.tli
        if tli == history.tli:
            return tli, None
        end = self._timeline.end_of(tli)
        if command.start_lsn > end:
            raise InternalError(
                f"requested starting point {format_lsn(command.start_lsn)} on timeline {tli} "
                "is not in this server's history",
                detail=f"This server's history forked from timeline {tli} at {format_lsn(end)}.",
            )
        return tli, end

    def _identify_system(self) -> Answer:
        timeline = self._timeline
        yield row_description(
            ("systemid", TEXT),
            ("timeline", INT8 if self._major >= 16 else INT4),
            ("xlogpos", TEXT),
            ("dbname", TEXT),
        )
        yield data_row(
            str(timeline.identity.system_identifier),
            str(timeline.history.tli),
            format_lsn(timeline.commit_lsn),
            None,
        )

    def _timeline_history(self, tli: int) -> Answer:
        yield row_description(
            ("filename", TEXT),
            ("content", TEXT if self._major >= 14 else BYTEA),
            modifier=-1 if self._major >= 16 else 0,
        )
        yield data_row(history_name(tli), self._timeline.read_history(tli))
