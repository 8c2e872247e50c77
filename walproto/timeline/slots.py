"""Replication slots: promises to keep WAL for replicas that are away.

What ``pg_replication_slots`` is to a primary.  A slot is used by one session at a time, its
*holder*; a temporary one belongs to the session that made it, and goes with it.  A slot's
``restart_lsn`` is where the replica may have to go on: no WAL from there on is removed, unless that
breaks a bound that the operator has set, and then the slot is *invalidated*, for good.

A slot is on disk before its creation is confirmed, and no longer there when its removal is.  Its
position is saved now and then; after a crash it may be an earlier one, but none of which WAL has
been removed: how far that goes is saved before, and no slot was behind it.

PostgreSQL: ``slot.c``; documentation "Replication Slots" and "pg_replication_slots".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from walproto.errors import (
    AdminShutdown,
    DuplicateObject,
    InvalidName,
    NameTooLong,
    ObjectInUse,
    ObjectNotInPrerequisiteState,
    UndefinedObject,
)
from walproto.lsn import format_lsn
from walproto.timeline.slot_file import DAMAGED, NAME, SlotState, read_slots, write_slots
from walproto.timeline.threads import Threads
from walproto.wal.writer import SyncError

WAL_REMOVED = "wal_removed"
"""``invalidation_reason`` of a slot that kept more WAL than it might."""


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """How much may be promised, and how much WAL is kept; sizes are in bytes.

    ``wal_keep_size`` is how much is kept in any case, None for all there ever was;
    ``max_slot_wal_keep_size`` is how much slots may keep, None for as much as it takes.
    """

    max_replication_slots: int = 10
    wal_keep_size: int | None = None
    max_slot_wal_keep_size: int | None = None


class SlotsError(ValueError):
    """Why the slots in a directory cannot be used, for the operator."""


class Holder(Protocol):
    """A session that holds a slot."""

    pid: int

    def terminate(self) -> None:
        """End the session: the slot is taken from it."""


@dataclass(slots=True, eq=False)
class Slot:
    """One physical replication slot.  The values are those of :class:`SlotState`."""

    name: str
    is_temporary: bool = False
    restart_lsn: int = 0
    xmin: int = 0
    catalog_xmin: int = 0
    invalidated: str = ""
    holder: Holder | None = None
    """The session that uses it, PostgreSQL's ``active_pid``; None if none does."""
    is_changing: bool = False
    """Whether it is being created or dropped; whoever does it, holds it."""
    is_going: bool = False
    """Whether it is being dropped."""

    def state(self) -> SlotState:
        return SlotState(
            self.name, self.restart_lsn, self.xmin, self.catalog_xmin, self.invalidated
        )

    def is_kept_by(self, saved: SlotState | None, granularity: int) -> bool:
        """Whether ``saved`` will do after a crash: of a slot in use, a position that is the same as
        far as ``granularity`` bytes matter, and xmins that are older."""
        if saved is None or self.holder is None:
            return saved == self.state()
        return (
            self.restart_lsn // granularity == saved.restart_lsn // granularity
            and bool(self.xmin) == bool(saved.xmin)
            and bool(self.catalog_xmin) == bool(saved.catalog_xmin)
            and self.invalidated == saved.invalidated
        )


class Slots:
    """The slots of one timeline, kept in ``directory``.

    Those that are there already are known at once.  Raises SlotsError if they cannot be read, a
    damaged file cannot be kept, or there are more than there may be.
    """

    _log = Logger()

    def __init__(
        self, directory: Path, threads: Threads, options: SlotOptions = SlotOptions()
    ) -> None:
        self.options = options
        self.kept_from = 0
        """The LSN before which WAL is being removed, or was since the start."""
        self._directory = directory
        self._threads = threads
        self._slots: dict[str, Slot] = {}
        self._awaiting_release: dict[str, list[Deferred[None]]] = {}
        self._is_saving = False
        self._is_stopped = False
        self._awaiting_save: list[Deferred[None]] = []
        self._saved: dict[str, SlotState] | None
        """What is on disk; None if nobody knows what is."""
        try:
            file = read_slots(directory)
        except OSError as error:
            raise SlotsError(f"{error.filename or directory / NAME}: {error.strerror}") from None
        except SyncError as error:
            raise SlotsError(str(error)) from None
        self._removed_to = file.removed_to
        if file.problems:
            self._log.critical(
                "{path}: {problems}: it is kept as {damaged}, and no WAL is removed as long as "
                "that is there: see which slots are missing, and create them again",
                path=str(directory / NAME),
                problems="; ".join(file.problems),
                damaged=DAMAGED,
            )
        if len(file.slots) > options.max_replication_slots:
            raise SlotsError(
                f"there are {len(file.slots)} replication slots in {directory / NAME}, more than "
                f"max_replication_slots, which is {options.max_replication_slots}: increase that"
            )
        for state in file.slots:
            restart_lsn = state.restart_lsn
            self._slots[state.name] = Slot(
                state.name,
                restart_lsn=max(restart_lsn, self._removed_to) if restart_lsn else 0,
                xmin=state.xmin,
                catalog_xmin=state.catalog_xmin,
                invalidated=state.invalidated,
            )
        self._saved = None if file.problems else {state.name: state for state in file.slots}

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, name: str) -> Slot | None:
        return self._slots.get(name)

    @property
    def is_full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._slots) >= self.options.max_replication_slots

    # --- created, used, dropped ------------------------------------------------------------

    def check_new(self, name: str) -> None:
        """Raise what is to be said against a new slot of this name: InvalidName or NameTooLong
        (``ReplicationSlotValidateName``), or DuplicateObject."""
        if not name:
            raise InvalidName(f'replication slot name "{name}" is too short')
        if len(name.encode("utf-8", "surrogateescape")) > 63:
            raise NameTooLong(f'replication slot name "{name}" is too long')
        if not re.fullmatch("[a-z0-9_]+", name):
            raise InvalidName(
                f'replication slot name "{name}" contains invalid character',
                hint="Replication slot names may only contain lower case letters, numbers, and "
                "the underscore character.",
            )
        if name in self._slots:
            raise DuplicateObject(f'replication slot "{name}" already exists')

    def create(
        self, name: str, holder: Holder, *, restart_lsn: int = 0, temporary: bool = False
    ) -> Deferred[None]:
        """A new slot, which reserves WAL from ``restart_lsn`` on, or none as yet.

        ``check_new`` had nothing against it, and it is not full.  A temporary one stays with its
        holder.  Fires when it is on disk; fails as :meth:`save` does, and there is none then.
        """
        assert name not in self._slots
        slot = Slot(name, temporary, max(restart_lsn, self._removed_to) if restart_lsn else 0)
        slot.holder = holder
        self._slots[name] = slot
        if temporary:
            done = Deferred[None]()
            done.callback(None)
            return done
        slot.is_changing = True

        def created(result: Any) -> Any:
            slot.is_changing = False
            self.release(slot)
            return result

        def failed(result: Any) -> Any:
            self._slots.pop(name)
            return created(result)

        return self.save().addCallbacks(created, failed)

    def acquire(self, name: str, holder: Holder, *, invalidated_too: bool = False) -> Slot:
        """The slot, for ``holder`` to use until it is released.

        Raises UndefinedObject; ObjectInUse if another session holds it, or it is being created or
        dropped; unless ``invalidated_too``, ObjectNotInPrerequisiteState if it is invalidated
        (``ReplicationSlotAcquire``).
        """
        slot = self._slots.get(name)
        if slot is None:
            raise UndefinedObject(f'replication slot "{name}" does not exist')
        if slot.holder is not None and (slot.is_changing or slot.holder is not holder):
            raise ObjectInUse(f'replication slot "{name}" is active for PID {slot.holder.pid}')
        if slot.invalidated and not invalidated_too:
            raise ObjectNotInPrerequisiteState(
                f'can no longer access replication slot "{name}"',
                detail=f'This replication slot has been invalidated due to "{slot.invalidated}".',
            )
        slot.holder = holder
        return slot

    def release(self, slot: Slot) -> None:
        """It is not used for now; a temporary one stays its holder's."""
        if not slot.is_changing and not slot.is_temporary:
            slot.holder = None
            self._tell_released(slot.name)

    def when_released(self, name: str) -> Deferred[None]:
        """Fires when the slot is no longer held, or no longer there, as it may be already; but
        somebody else who has waited for that may hold it again."""
        slot = self._slots.get(name)
        if slot is None or slot.holder is None:
            return succeed(None)
        awaiting = self._awaiting_release.setdefault(name, [])
        released = Deferred[None](awaiting.remove)
        awaiting.append(released)
        return released

    def drop(self, slot: Slot) -> Deferred[None]:
        """Have the slot no longer; it is held by whoever wants that.

        Fires when it is no longer on disk.  Fails as :meth:`save` does, and it is still there then.
        """
        assert slot.holder is not None
        assert not slot.is_changing
        if slot.is_temporary:
            self._forget(slot)
            done = Deferred[None]()
            done.callback(None)
            return done
        slot.is_changing = slot.is_going = True

        def dropped(result: None) -> None:
            self._forget(slot)

        def failed(result: Any) -> Any:
            slot.is_changing = slot.is_going = False
            self.release(slot)
            return result

        return self.save().addCallbacks(dropped, failed)

    def clean_up(self, holder: Holder) -> None:
        """The session has had an error, or is over: what it holds is released, and its temporary
        slots are gone (``ReplicationSlotCleanup``)."""
        for slot in self:
            if slot.holder is holder:
                if slot.is_temporary:
                    self._forget(slot)
                else:
                    self.release(slot)

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.name]
        slot.holder = None
        self._tell_released(slot.name)

    def _tell_released(self, name: str) -> None:
        awaiting = self._awaiting_release.pop(name, [])
        while awaiting:  # one that is called may cancel another
            awaiting.pop(0).callback(None)

    # --- how far replicas are --------------------------------------------------------------

    def confirm(self, slot: Slot, flush_lsn: int) -> None:
        """The replica has WAL up to ``flush_lsn`` on disk; it may have been further before
        (``PhysicalConfirmReceivedLocation``)."""
        if slot.invalidated:
            return
        was_reserved = bool(slot.restart_lsn)
        slot.restart_lsn = max(flush_lsn, self._removed_to)
        if not was_reserved and not slot.is_temporary:
            # Or the slot would reserve nothing after a crash.  If it fails, it is tried again by
            # whoever saves positions.
            self.save().addErrback(lambda failure: failure.trap(OSError, SyncError, AdminShutdown))

    @property
    def restart_lsn(self) -> int | None:
        """The LSN from which on any slot keeps WAL; None if none keeps any."""
        return min((slot.restart_lsn for slot in self if slot.restart_lsn), default=None)

    def oldest_xmins(self) -> tuple[int, int]:
        """The oldest xmin and catalog_xmin that any slot asks to be kept, 0 if none does."""
        valid = [slot for slot in self if not slot.invalidated]
        xmins = [slot.xmin for slot in valid if slot.xmin]
        catalog = [slot.catalog_xmin for slot in valid if slot.catalog_xmin]
        return min(xmins, default=0), min(catalog, default=0)

    # --- WAL goes --------------------------------------------------------------------------

    def keep_from(self, lsn: int) -> None:
        """WAL before ``lsn`` is about to go, as soon as that is saved; no slot needs it, and none
        can reserve it any more."""
        self.kept_from = max(self.kept_from, lsn)
        self._removed_to = max(self._removed_to, lsn)

    def look_at_end(self, lsn: int) -> None:
        """The WAL that was found ends at ``lsn``.  If more than that had been removed once, it is
        other WAL, or an earlier state of it, and what had been removed means nothing for it."""
        if self._removed_to > lsn:
            self._log.warn(
                "{path}: WAL had been removed up to {removed}, but what is here ends at {end}: see "
                "whether the slots in there, and their replicas, still belong to it",
                path=str(self._directory / NAME),
                removed=format_lsn(self._removed_to),
                end=format_lsn(lsn),
            )
            self._removed_to = 0

    @property
    def is_damaged(self) -> bool:
        """Whether slots have been lost, and nobody has said yet that this is dealt with, by taking
        away what was kept of them."""
        return (self._directory / DAMAGED).exists()

    def invalidate_before(self, lsn: int) -> bool:
        """Take back the promise of every slot that keeps WAL before ``lsn``, and end the sessions
        that use them (``InvalidateObsoleteReplicationSlots``); whether there was one.  It has to
        be saved before that WAL is removed."""
        obsolete = [slot for slot in self if slot.restart_lsn and slot.restart_lsn < lsn]
        for slot in obsolete:
            excess = lsn - slot.restart_lsn
            where = format_lsn(slot.restart_lsn)
            slot.restart_lsn, slot.invalidated = 0, WAL_REMOVED
            self._log.warn(
                'invalidating obsolete replication slot "{slot}": its restart_lsn {lsn} exceeds '
                "the limit by {excess} bytes: its replica has to be made anew; increase "
                "max_slot_wal_keep_size for replicas that are away longer",
                slot=slot.name,
                lsn=where,
                excess=excess,
            )
        for slot in obsolete:  # whoever is told that it is over finds all of them invalidated
            if slot.holder is not None and not slot.is_changing:
                self._log.warn(
                    'terminating process {pid} to release replication slot "{slot}"',
                    pid=slot.holder.pid,
                    slot=slot.name,
                )
                slot.holder.terminate()
        return bool(obsolete)

    # --- saved -----------------------------------------------------------------------------

    def is_saved(self, granularity: int) -> bool:
        """Whether these slots and no others are on disk, but for those that are being created or
        dropped: exactly as they are or, of one in use, as far as it matters."""
        if self._saved is None:
            return False
        slots = {slot.name: slot for slot in self if not slot.is_temporary}
        return (
            all(
                slot.is_changing or slot.is_kept_by(self._saved.get(name), granularity)
                for name, slot in slots.items()
            )
            and self._saved.keys() <= slots.keys()
        )

    def save(self) -> Deferred[None]:
        """Bring all slots to disk as they are now; fires when they are.  Fails with OSError or
        SyncError, or with AdminShutdown if it is too late for it."""
        saved = Deferred[None]()
        if self._is_stopped:
            why = "terminating connection due to administrator command"
            saved.errback(AdminShutdown(why, fatal=True))
            return saved
        self._awaiting_save.append(saved)
        if not self._is_saving:
            self._save()
        return saved

    def stop(self) -> Deferred[None]:
        """Save them for the last time, unless they are.  Sessions may still use them, but none is
        created or dropped any more."""
        is_saved = not self._is_saving and self.is_saved(1)
        saved = succeed(None) if is_saved else self.save()
        self._is_stopped = True
        return saved

    def _save(self) -> None:
        awaiting, self._awaiting_save = self._awaiting_save, []
        states = [slot.state() for slot in self if not slot.is_temporary and not slot.is_going]
        removed_to = self._removed_to
        self._is_saving = True

        def saved(result: None) -> None:
            self._saved = {state.name: state for state in states}

        def failed(result: Any) -> Any:
            self._saved = None
            return result

        def done(result: Any) -> None:
            for deferred in awaiting:
                deferred.callback(result)  # a Failure is one here, too
            self._is_saving = False
            if self._awaiting_save:
                self._save()

        writing = self._threads.run(lambda: write_slots(self._directory, states, removed_to))
        writing.addCallbacks(saved, failed).addBoth(done)
