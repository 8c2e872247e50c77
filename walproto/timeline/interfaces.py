"""What a session needs of a timeline, whoever brings it."""

from __future__ import annotations

from collections.abc import Callable

from zope.interface import Attribute, Interface


class ITimeline(Interface):
    """One cluster's WAL, as it may be sent to clients.

    LSNs are byte positions, an end is the last byte + 1.  A timeline is used from the reactor's
    thread alone.
    """

    identity = Attribute("The cluster's :class:`~walproto.wal.pages.Identity`, once ready.")
    history = Attribute("The current timeline and its ancestors, a History, once ready.")
    commit_lsn = Attribute("The end of the WAL that may be sent of the current timeline.")
    replicas = Attribute("The clients that stream it, a Replicas.")

    def require_ready() -> None:
        """Raise CannotConnectNow (57P03) as long as there is nothing to serve yet."""

    def end_of(tli: int) -> int:
        """The end of what may be sent of ``tli``: the commit LSN, or where it was switched from.

        Raises InternalError if ``tli`` is not in the current history.
        """

    def sendable_to(tli: int, lsn: int) -> int:
        """How far WAL of ``tli`` can be sent from ``lsn`` at once; ``lsn`` or less if not yet.

        Observers are told when it may have become more.  Raises a ReportedError if it never will:
        the segment is missing, or damaged at ``lsn``.
        """

    def read_into(tli: int, lsn: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with WAL of ``tli`` from ``lsn``, no further than ``sendable_to`` said
        and no further than its segment goes.  Raises a ReportedError if that cannot be read.

        This and ``sendable_to`` may raise :class:`~walproto.wal.cold.NotInMemory`, so that nobody
        waits for a disk; observers are told when to try again."""

    def read_history(tli: int) -> bytes:
        """The contents of a timeline's history file; UndefinedFile if there is none."""

    def add_observer(observer: Callable[[], None]) -> None:
        """Have ``observer()`` called whenever there may be more to send, or a new timeline."""

    def remove_observer(observer: Callable[[], None]) -> None:
        """Take back ``add_observer``."""


class IFiledTimeline(ITimeline):
    """One whose WAL others may read, too, as far as it says: from segments where they lie."""

    directory = Attribute("Where the segments and history files are, a Path.")
