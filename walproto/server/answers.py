"""What each replication command is answered, short of streaming.

Result sets, tags and errors are those of the PostgreSQL major that the server says it is.

PostgreSQL: ``exec_replication_command`` in ``walsender.c``; documentation "Streaming Replication
Protocol".
"""

from __future__ import annotations

from collections.abc import Iterator

from walproto.errors import (
    ConfigurationLimitExceeded,
    FeatureNotSupported,
    InternalError,
    ObjectNotInPrerequisiteState,
    ReportedError,
    UndefinedObject,
)
from walproto.lsn import format_lsn, history_name
from walproto.server.settings import Settings
from walproto.timeline.interfaces import ITimeline
from walproto.wire import commands
from walproto.wire.messages import (
    CommandComplete,
    DataRow,
    ErrorResponse,
    ReadyForQuery,
    RowDescription,
)

TEXT = (25, -1)
INT4 = (23, 4)
INT8 = (20, 8)
BYTEA = (17, -1)

READY_FOR_QUERY = ReadyForQuery.build()


def row_description(*columns: tuple[str, tuple[int, int]], modifier: int = -1) -> bytes:
    """A RowDescription of these columns: each its name and its type's OID and size in bytes."""
    return RowDescription.build(
        fields=[
            {"name": name, "type_oid": oid, "type_size": size, "type_modifier": modifier}
            for name, (oid, size) in columns
        ]
    )


def data_row(*values: str | bytes | None) -> bytes:
    """A DataRow; None is NULL."""
    return DataRow.build(
        columns=[
            value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            for value in values
        ]
    )


def command_complete(tag: str) -> bytes:
    return CommandComplete.build(command_tag=tag)


def error_response(error: ReportedError) -> bytes:
    """The ErrorResponse that tells a peer of ``error``."""
    fields = [
        ("S", error.severity),
        ("V", error.severity),
        ("C", error.sqlstate),
        ("M", error.message),
        ("D", error.detail),
        ("H", error.hint),
    ]
    return ErrorResponse.build(
        fields=[
            {"type": code.encode(), "value": value.replace("\0", "")}
            for code, value in fields
            if value is not None
        ]
        + [{"type": b"\0", "value": None}]
    )


def end_of_stream(next_timeline: tuple[int, int] | None) -> bytes:
    """What follows CopyDone from both sides.

    After a historic timeline, which one went on and where; then, always, two CommandCompletes:
    clients read both (``libpqrcv_endstreaming``).
    """
    result = b""
    if next_timeline is not None:
        tli, start = next_timeline
        result = row_description(("next_tli", INT8), ("next_tli_startpos", TEXT)) + data_row(
            str(tli), format_lsn(start)
        )
    return (
        result
        + command_complete("START_STREAMING")
        + command_complete("START_REPLICATION")
        + READY_FOR_QUERY
    )


class Answers:
    """Answers the commands of one connection."""

    def __init__(self, timeline: ITimeline, settings: Settings, major: int) -> None:
        self._timeline = timeline
        self._settings = settings
        self._major = major

    def answer(self, command: commands.Command) -> Iterator[bytes]:
        """The messages that answer a command other than START_REPLICATION, one after the other:
        an error may be raised behind the first of them.  ReadyForQuery is not among them."""
        match command:
            case commands.IdentifySystem():
                yield from self._identify_system()
            case commands.Show(name=name):
                canonical, value = self._settings.show(name)
                yield row_description((canonical, TEXT)) + data_row(value)
            case commands.TimelineHistory(tli=tli):
                yield from self._timeline_history(tli)
            case commands.ReadReplicationSlot():
                yield row_description(
                    ("slot_type", TEXT), ("restart_lsn", TEXT), ("restart_tli", INT8)
                ) + data_row(None, None, None)
            case _:
                raise self._refusal(command)
        yield command_complete(command.tag)

    def stream(self, command: commands.StartReplication) -> tuple[int, int | None]:
        """The timeline ID that START_REPLICATION asks for, and where that timeline was switched
        from, None if it is the current one (``StartReplication``)."""
        if command.slot is not None:
            raise no_slot(command.slot)
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

    def _identify_system(self) -> Iterator[bytes]:
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

    def _timeline_history(self, tli: int) -> Iterator[bytes]:
        yield row_description(
            ("filename", TEXT),
            ("content", TEXT if self._major >= 14 else BYTEA),
            modifier=-1 if self._major >= 16 else 0,
        )
        yield data_row(history_name(tli), self._timeline.read_history(tli))

    def _refusal(self, command: commands.Command) -> ReportedError:
        """Why a command that we do not do fails: as it would on a server without slots."""
        match command:
            case commands.Sql():
                return (FeatureNotSupported if self._major >= 15 else InternalError)(
                    "cannot execute SQL commands in WAL sender for physical replication"
                )
            case commands.CreateReplicationSlot(plugin=str()) | commands.StartLogicalReplication():
                return ObjectNotInPrerequisiteState(
                    f"replication slots can only be used if {self._slots_setting} > 0"
                )
            case commands.CreateReplicationSlot():
                return ConfigurationLimitExceeded(
                    "all replication slots are in use",
                    hint=f"Free one or increase {self._slots_setting}.",
                )
            case commands.DropReplicationSlot(slot=slot) | commands.AlterReplicationSlot(slot=slot):
                return no_slot(slot)
            case _:
                return FeatureNotSupported(
                    f"{command.tag} is not supported",
                    detail="There is no database behind this WAL sender.",
                    hint="Connect to the primary, or to a standby, for a base backup.",
                )

    @property
    def _slots_setting(self) -> str:
        return '"max_replication_slots"' if self._major >= 17 else "max_replication_slots"


def no_slot(name: str) -> UndefinedObject:
    return UndefinedObject(f'replication slot "{name}" does not exist')
