"""What there is in a timeline's directory: WAL and a control file, which must fit together.

A new proposer may have WAL cut off that is not committed, and write other WAL in its place.  It is
then in the term history of the control file, which is written after that; and so the end of WAL is
looked for anew when the term history has changed.

Neon: ``ProposerElected`` in ``safekeeper.rs``, ``truncate_wal`` in ``wal_storage.rs``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from walproto.errors import CannotConnectNow, DataCorrupted, IoError, ReportedError, UndefinedFile
from walproto.lsn import format_lsn
from walproto.neon.control_file import MAX_SIZE, NAME, Control, ControlFileError, parse_control
from walproto.neon.directory_id import DirectoryId, directory_id
from walproto.neon.ids import TimelineIds
from walproto.timeline.directory import WalDirectory
from walproto.timeline.history import History
from walproto.timeline.replicas import Replicas
from walproto.timeline.survey import survey
from walproto.wal.pages import Identity
from walproto.wal.segments import OpenFiles, open_file

PG_TLI = 1
"""The PostgreSQL timeline ID of all WAL that a safekeeper has."""

PATIENCE = 1.0
"""Seconds in which WAL that is committed ought to come; the control file may be seen first."""

LOG_PREFIX = "timeline {tenant}/{timeline}: "


class Contents:
    """What is in ``directory``, which is that of the timeline ``ids``.

    ``changed`` is called when there is more WAL, or more of it is proven.  ``files`` bounds how
    many are kept open.  ``replicas`` are those who stream it.
    """

    _log = Logger()

    def __init__(
        self,
        directory: Path,
        ids: TimelineIds,
        clock: IReactorTime,
        files: OpenFiles | None,
        replicas: Replicas,
        changed: Callable[[], None],
    ) -> None:
        self.control: Control | None = None
        """What the control file said when it was last right."""
        self.committed = 0
        """The furthest commit LSN that the control file has said, while there was WAL with it."""
        self.wal: WalDirectory | None = None
        """The WAL, once its end was found."""
        self.new_wal: WalDirectory | None = None
        """The same, if its end is being looked for, for the first time or anew."""
        self.refusal: ReportedError | None = None
        """Why nothing of it may be served."""
        self.is_over = False
        """Whether the directory was removed, or another one took its place: then it is refused for
        good, for what was found here is of no consequence to what is there now."""
        self._directory = directory
        self._ids = ids
        self._log_fields = {"tenant": ids.tenant_id, "timeline": ids.timeline_id}
        self._clock = clock
        self._files = files
        self._replicas = replicas
        self._changed = changed
        self._directory_id: DirectoryId | None = None
        self._read: tuple[bytes, Control] | None = None
        self._waiting_for = ""
        self._had_wal = False
        self._short: tuple[int, float] | None = None
        """Where WAL ends before what is committed, and since when that has been so."""
        self._said_short: int | None = None
        """Where it ended when that was last said."""

    @property
    def waiting_for(self) -> str:
        """What has yet to come, if there is no WAL yet but nothing is wrong; else empty."""
        if self.wal is not None or self.refusal is not None:
            return ""
        return _unready(self.new_wal) or self._waiting_for

    @property
    def is_empty(self) -> bool:
        """Whether there is no WAL yet, though it is known how long its segments will be."""
        return self.control is not None and self.control.wal_seg_size > 0 and bool(self.waiting_for)

    def look_at_directory(self) -> None:
        """Find out whether the directory is the one that it was the first time."""
        try:
            found = directory_id(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except OSError:
            return  # whoever reads what is in there is told
        self._directory_id = self._directory_id or found
        if found != self._directory_id and not self.is_over:
            self.is_over = True
            self._refuse(
                UndefinedFile(
                    f'the directory of timeline "{self._ids}" was removed or replaced',
                    fatal=True,
                    log=f"{self._directory}: what is there now is opened anew",
                )
            )

    def look(self) -> bool:
        """Have a look; whether there is news, apart from how far the WAL goes."""
        before = self.refusal, self.waiting_for
        self.look_at_directory()
        if self.is_over:
            return before != (self.refusal, self.waiting_for)
        try:
            control = self._read_control()
            self._look_at_wal(control)
            self._adopt(control)
            self._look_whether_all_is_here(control)
        except ReportedError as error:
            self._refuse(error)
        else:
            self.refusal = None
        return before != (self.refusal, self.waiting_for)

    def close(self) -> None:
        """Close all files, and forget what was found."""
        for wal in (self.wal, self.new_wal):
            if wal is not None:
                wal.stop()
        self.wal = self.new_wal = self._short = None
        self._waiting_for = ""
        if not self.is_over:
            self.refusal = None

    def _read_control(self) -> Control:
        """What the control file says.  Raises a ReportedError if it is bad."""
        path = self._directory / NAME
        try:
            with open(open_file(path), "rb") as file:
                data = file.read(MAX_SIZE + 1)
        except OSError as error:
            kind = UndefinedFile if isinstance(error, FileNotFoundError) else IoError
            raise kind(
                f'could not open file "{NAME}": {error.strerror}',
                fatal=True,
                log=f"{path}: restore it, or remove the directory if the timeline is gone",
            ) from None
        if self._read is None or self._read[0] != data:
            self._read = data, self._parse_control(data, path)
        return self._read[1]

    def _parse_control(self, data: bytes, path: Path) -> Control:
        problem = f'invalid control file "{NAME}": '
        try:
            control = parse_control(data)
        except ControlFileError as error:
            raise DataCorrupted(
                f"{problem}{error}", fatal=True, log=f"{path}: restore it"
            ) from None
        try:
            control.require_ids(self._ids)
        except ControlFileError as error:  # it names another one, which the client may not see
            raise DataCorrupted(
                f"{problem}it is that of another timeline",
                fatal=True,
                log=f"{path}: {error}: restore it",
            ) from None
        return control

    def _look_at_wal(self, control: Control) -> None:
        """Look for WAL, or for more of it.  Raises a ReportedError if it is not as it should be."""
        if control.wal_seg_size == 0 and not self._had_wal:
            self._wait_for("the segment size is not known yet: waiting for a proposer")
            return
        if self.wal is not None:
            self._check(control, self.wal.identity, self.wal.history)
        elif self.new_wal is None:
            self._find_wal(control)
        wal = self.new_wal or self.wal
        if wal is not None:
            wal.look()

    def _find_wal(self, control: Control) -> None:
        try:
            found = survey(self._directory)
        except OSError as error:
            raise IoError(
                f"could not read the directory of the timeline: {error.strerror}",
                fatal=True,
                log=f"{self._directory}: make it readable",
            ) from None
        except ValueError as error:
            raise DataCorrupted(
                "the WAL of the timeline is in a format that is not known",
                fatal=True,
                log=str(error),
            ) from None
        if found is None:
            self._wait_for("there is no WAL yet: a proposer has to bring it")
            return
        self._check(control, found.identity, found.history)
        self._find_end()

    def _find_end(self) -> None:
        """Look for the end of WAL from scratch; until it is found, what was found before counts."""
        if self.new_wal is not None:
            self.new_wal.stop()
        self._waiting_for = ""
        self.new_wal = WalDirectory(
            self._directory,
            self._clock,
            files=self._files,
            log_prefix=LOG_PREFIX,
            log_fields=self._log_fields,
            replicas=self._replicas,
        )
        self.new_wal.add_observer(self._wal_changed)
        self.new_wal.look()

    def _wal_changed(self) -> None:
        """Of the one WAL or the other more is there, or proven, or its end was found."""
        assert self.control is not None
        if self.new_wal is not None and _unready(self.new_wal) is None:
            if self.wal is not None:
                self.wal.stop()
            self.wal, self.new_wal = self.new_wal, None
            self._had_wal = True
            if self.wal.commit_lsn < self.control.commit_lsn:
                self._say_short(self.wal.commit_lsn, self.control)
        assert self.wal is not None
        try:
            self._check(self.control, self.wal.identity, self.wal.history)
        except ReportedError as error:
            self._refuse(error)
        self._changed()

    def _adopt(self, control: Control) -> None:
        """Go by this control file from now on."""
        before, self.control = self.control or control, control
        if self.wal is None and self.new_wal is None:
            return  # there is nothing yet that would show that it is not another cluster's
        if control.commit_lsn < self.committed and control is not before:
            self._say(
                f"the commit LSN in the control file goes back from {format_lsn(self.committed)} "
                f"to {format_lsn(control.commit_lsn)}: going on from the former"
            )
        self.committed = max(self.committed, control.commit_lsn)
        if control.term_history != before.term_history:
            self._find_end()

    def _look_whether_all_is_here(self, control: Control) -> None:
        """Say it once if WAL ends before what is committed, and has not gone on for a while."""
        if self.new_wal is not None and _unready(self.new_wal) == "":
            return  # its end is being looked for
        end = 0 if self.wal is None else self.wal.commit_lsn
        now = self._clock.seconds()
        if control.commit_lsn <= end:
            self._short = None
        elif self._short is None or self._short[0] != end:
            self._short = end, now
        elif now - self._short[1] >= PATIENCE and self._said_short != end:
            self._say_short(end, control)

    def _say_short(self, end: int, control: Control) -> None:
        self._said_short = end
        self._say(
            (f"WAL ends at {format_lsn(end)}" if end else "there is no WAL")
            + f", and the control file says that it is committed up to "
            f"{format_lsn(control.commit_lsn)}: restore it"
        )

    def _check(self, control: Control, identity: Identity, history: History) -> None:
        """Raise DataCorrupted unless the WAL is that of the control file."""
        error = ""
        if control.system_id != identity.system_identifier:
            ids = f"{control.system_id} and {identity.system_identifier}"
            error = f"their system identifiers are {ids}"
        elif control.wal_seg_size != identity.segment_size:
            sizes = f"{control.wal_seg_size} and {identity.segment_size}"
            error = f"their segment sizes are {sizes}"
        elif history.tli != PG_TLI:
            error = f"the WAL is of PostgreSQL timeline {history.tli}, and not {PG_TLI}"
        if error:
            raise DataCorrupted(
                f"control file and WAL do not belong together: {error}",
                fatal=True,
                log=f"{self._directory}: put back what belongs there",
            )

    def _refuse(self, error: ReportedError) -> None:
        """Serve nobody until it is mended; say why, once."""
        known = self.refusal
        self.close()
        if known is None or known.message != error.message:
            self._say(f"refused: {error.message} ({error.log})")
            known = error
        self.refusal = known

    def _wait_for(self, what: str) -> None:
        if self._waiting_for != what:
            self.close()
            self._waiting_for = what
            self._say(what)

    def _say(self, what: str) -> None:
        self._log.warn(LOG_PREFIX + "{what}", what=what, **self._log_fields)


def _unready(wal: WalDirectory | None) -> str | None:
    """What it waits for, empty as long as it is being looked for; None if it is ready."""
    try:
        if wal is not None:
            wal.require_ready()
    except CannotConnectNow as error:
        return error.log or ""
    return None
