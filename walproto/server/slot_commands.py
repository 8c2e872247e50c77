"""What a session does with replication slots: the commands for them, and streaming with one.

PostgreSQL: ``CreateReplicationSlot``, ``DropReplicationSlot``, ``ReadReplicationSlot``,
``AlterReplicationSlot`` and ``ProcessStandbyMessage`` in ``walsender.c``; ``slot.c``.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Generator
from typing import Any

from twisted.internet.defer import Deferred

from walproto.errors import (
    CommandSyntaxError,
    ConfigurationLimitExceeded,
    DiskFull,
    FeatureNotSupported,
    InternalError,
    InvalidParameterValue,
    IoError,
    ObjectInUse,
    ObjectNotInPrerequisiteState,
    ReportedError,
    UndefinedFile,
    UndefinedObject,
)
from walproto.lsn import format_lsn, segment_name
from walproto.server.results import INT8, TEXT, Answer, data_row, row_description
from walproto.timeline.interfaces import ITimeline
from walproto.timeline.replicas import full_xmins
from walproto.timeline.slot_file import NAME
from walproto.timeline.slots import Holder, Slot, Slots
from walproto.wal.writer import SyncError
from walproto.wire.commands import (
    AlterReplicationSlot,
    CreateReplicationSlot,
    DropReplicationSlot,
    Option,
    Options,
    ReadReplicationSlot,
)
from walproto.wire.replication import Feedback, PageserverFeedback, StatusUpdate

_SNAPSHOTS = ("export", "nothing", "use")


class SlotCommands:
    """What the session of ``holder`` does with ``slots``.

    Without any it is as on a server whose ``max_replication_slots`` is 0; ``why_none`` tells the
    operator why that is.
    """

    def __init__(
        self,
        slots: Slots | None,
        timeline: ITimeline,
        holder: Holder,
        major: int,
        why_none: str,
    ) -> None:
        self._slots = slots
        self._why_none = why_none
        self._timeline = timeline
        self._holder = holder
        self._major = major
        self._used: Slot | None = None

    # --- commands --------------------------------------------------------------------------

    def create(self, command: CreateReplicationSlot) -> Answer:
        """Answer when the slot is on disk.  One that the client does not wait for any longer is
        there all the same, as PostgreSQL's is."""
        logical = {"snapshot", "two_phase"} | ({"failover"} if self._major >= 17 else set())
        options = parse_options(
            command.options,
            known=logical | {"reserve_wal"},
            fitting=logical if command.plugin is not None else {"reserve_wal"},
        )
        if command.plugin is not None:
            raise self.no_logical_decoding()
        if self._slots is None:
            raise self._full()
        self._slots.check_new(command.slot)
        if self._slots.is_full:
            raise self._full()
        restart_lsn = 0
        if options.get("reserve_wal"):
            restart_lsn = self._timeline.commit_lsn
            restart_lsn -= restart_lsn % self._timeline.identity.segment_size
        yield from _on_disk(
            self._slots.create(
                command.slot, self._holder, restart_lsn=restart_lsn, temporary=command.temporary
            )
        )
        yield row_description(
            *(("slot_name", TEXT), ("consistent_point", TEXT)),
            *(("snapshot_name", TEXT), ("output_plugin", TEXT)),
        )
        yield data_row(command.slot, "0/0", None, None)

    def drop(self, command: DropReplicationSlot) -> Answer:
        slot = yield from self._acquire(command.slot, command.wait, invalidated_too=True)
        assert self._slots is not None
        yield from _on_disk(self._slots.drop(slot))

    def read(self, command: ReadReplicationSlot) -> Answer:
        slot = None if self._slots is None else self._slots.get(command.slot)
        kind = lsn = tli = None
        if slot is not None:
            kind = "physical"
            if slot.restart_lsn:
                lsn = format_lsn(slot.restart_lsn)
                tli = str(self._timeline.history.page_tli(slot.restart_lsn))
        yield row_description(("slot_type", TEXT), ("restart_lsn", TEXT), ("restart_tli", INT8))
        yield data_row(kind, lsn, tli)

    def alter(self, command: AlterReplicationSlot) -> Answer:
        known = {"failover", "two_phase"} if self._major >= 18 else {"failover"}
        parse_options(command.options, known=known, fitting=known)
        yield from self._acquire(command.slot, True)
        raise FeatureNotSupported(
            "cannot use ALTER_REPLICATION_SLOT with a physical replication slot"
        )

    def no_logical_decoding(self) -> ReportedError:
        """Why there is none (``CheckLogicalDecodingRequirements``)."""
        if self._slots is None or self._slots.options.max_replication_slots == 0:
            setting = self._name("max_replication_slots")
            return ObjectNotInPrerequisiteState(
                f"replication slots can only be used if {setting} > 0"
            )
        setting, value = self._name("wal_level"), self._name("logical")
        return ObjectNotInPrerequisiteState(f"logical decoding requires {setting} >= {value}")

    def _full(self) -> ReportedError:
        return ConfigurationLimitExceeded(
            "all replication slots are in use",
            hint=f"Free one or increase {self._name('max_replication_slots')}.",
            log=f"{self._why_none}: let the client do without one"
            if self._slots is None
            else "drop one, or increase --max-replication-slots",
        )

    def _name(self, setting: str) -> str:
        """A setting, or its value, as it is written in a message."""
        return f'"{setting}"' if self._major >= 17 else setting

    def _acquire(
        self, name: str, wait: bool, *, invalidated_too: bool = False
    ) -> Generator[Deferred[None], None, Slot]:
        """The slot, now or, if ``wait``, as soon as no other session holds it."""
        if self._slots is None:
            raise no_slot(name)
        while True:
            try:
                return self._slots.acquire(name, self._holder, invalidated_too=invalidated_too)
            except ObjectInUse:
                if not wait:
                    raise
            released = self._slots.when_released(name)
            try:
                yield released
            finally:
                released.cancel()

    # --- streaming -------------------------------------------------------------------------

    def use(self, name: str) -> None:
        """Stream with this slot; raises what is to be said against it."""
        if self._slots is None:
            raise no_slot(name)
        self._used = self._slots.acquire(name, self._holder)

    def check_start(self, tli: int, lsn: int) -> None:
        """Raise UndefinedFile if WAL from ``lsn`` on is not kept any longer, even if it is still
        there."""
        if self._slots is not None and lsn < self._slots.kept_from:
            size = self._timeline.identity.segment_size
            file_tli = max(tli, self._timeline.history.file_tli(lsn, size))
            name = segment_name(file_tli, lsn // size, size)
            raise UndefinedFile(f"requested WAL segment {name} has already been removed")

    def hear(self, message: StatusUpdate | Feedback | PageserverFeedback) -> None:
        """What the replica says of itself, the slot keeps."""
        slot = self._used
        if slot is None or isinstance(message, PageserverFeedback):
            return
        assert self._slots is not None
        if isinstance(message, StatusUpdate):
            if message.flush_lsn:
                self._slots.confirm(slot, message.flush_lsn)
            return
        # PhysicalReplicationSlotNewXmin: as long as there is one, it does not go back.
        xmin, catalog_xmin = full_xmins(message)
        slot.xmin = max(xmin, slot.xmin) if xmin else 0
        slot.catalog_xmin = max(catalog_xmin, slot.catalog_xmin) if catalog_xmin else 0

    def release(self) -> None:
        """The stream is over."""
        if self._used is not None:
            assert self._slots is not None
            self._slots.release(self._used)
            self._used = None

    def clean_up(self) -> None:
        """The session has had an error, or is over: nothing is left of what it holds."""
        self._used = None
        if self._slots is not None:
            self._slots.clean_up(self._holder)


def no_slot(name: str) -> UndefinedObject:
    return UndefinedObject(f'replication slot "{name}" does not exist')


def parse_options(
    options: Options, *, known: Collection[str], fitting: Collection[str]
) -> dict[str, Any]:
    """What generic options of slots say; only ``fitting`` ones may be among them.

    Raises InternalError, CommandSyntaxError or InvalidParameterValue
    (``parseCreateReplSlotOptions``).
    """
    found: dict[str, Any] = {}
    for name, value in options:
        if name not in known:
            raise InternalError(f"unrecognized option: {name}")
        if name in found or name not in fitting:
            raise CommandSyntaxError("conflicting or redundant options")
        found[name] = (_snapshot if name == "snapshot" else _boolean)(name, value)
    return found


def _boolean(name: str, value: Option) -> bool:
    """``defGetBoolean``."""
    match value:
        case None | 1:
            return True
        case 0:
            return False
        case str() if value.lower() in ("true", "on"):
            return True
        case str() if value.lower() in ("false", "off"):
            return False
    raise CommandSyntaxError(f"{name} requires a Boolean value")


def _snapshot(name: str, value: Option) -> str:
    if value is None:
        raise CommandSyntaxError(f"{name} requires a parameter")
    if value not in _SNAPSHOTS:
        raise InvalidParameterValue(
            f'unrecognized value for CREATE_REPLICATION_SLOT option "{name}": "{value}"'
        )
    return str(value)


def _on_disk(saved: Deferred[None]) -> Answer:
    """Wait until what has been done is on disk."""
    try:
        yield saved
    except SyncError as error:
        reason = getattr(error.__cause__, "strerror", None) or "Input/output error"
        raise IoError(
            f'could not fsync file "{NAME}": {reason}',
            log=f"{error}: see to the disk; replication slots are not created or dropped until it "
            "takes them",
        ) from error
    except OSError as error:
        what = f'could not write to file "{NAME}": {error.strerror}'
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                what, log=f"{where}make room in the directory with the WAL, then try again"
            ) from error
        raise IoError(
            what, log=f"{where}see to the directory with the WAL and its disk, then try again"
        ) from error
