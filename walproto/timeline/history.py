"""A timeline's ancestry, as its history file tells it, and which file holds what along it.

PostgreSQL: ``timeline.c`` (readTimeLineHistory), whose rules and messages these are;
``WalSndSegmentOpen`` and ``XLogReaderValidatePageHeader`` for the files and pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from walproto.lsn import parse_lsn


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A timeline that ended: where, and which one went on from there."""

    tli: int
    switch_lsn: int
    next_tli: int


@dataclass(frozen=True, slots=True)
class History:
    """The timeline ``tli`` and those it descends from, the oldest first."""

    tli: int
    ancestors: tuple[Ancestor, ...] = ()

    @property
    def start_lsn(self) -> int:
        """Where the timeline branched off; 0 for one without ancestors."""
        return self.ancestors[-1].switch_lsn if self.ancestors else 0

    def ancestor(self, tli: int) -> Ancestor | None:
        """How the timeline ended, if it is one that this one descends from."""
        return next((ancestor for ancestor in self.ancestors if ancestor.tli == tli), None)

    def up_to(self, tli: int) -> History:
        """The history of tli, which is this timeline or one that it descends from."""
        return History(tli, tuple(one for one in self.ancestors if one.tli < tli))

    def common_end(self, other: History) -> int:
        """Up to which LSN the WAL along both histories is the same; 2**64 if neither forks from
        the other.  What came before our oldest known timeline is not looked at."""
        line = other._line()
        first = self._line()[0][0]
        while line and line[0][0] < first:
            line = line[1:]
        common = 0
        for (tli, end), (other_tli, other_end) in zip(self._line(), line, strict=False):
            if tli != other_tli:
                return common
            common = min(end, other_end)
            if end != other_end:
                return common
        return common

    def _line(self) -> list[tuple[int, int]]:
        """Each timeline, and where it ends."""
        ended = [(ancestor.tli, ancestor.switch_lsn) for ancestor in self.ancestors]
        return [*ended, (self.tli, 2**64)]

    def page_tli(self, address: int) -> int:
        """The timeline that wrote the page at ``address``, which the page's header must name."""
        for ancestor in self.ancestors:
            if address < ancestor.switch_lsn:
                return ancestor.tli
        return self.tli

    def file_tli(self, lsn: int, segment_size: int) -> int:
        """The timeline in whose file the segment with ``lsn`` is read.

        That is the last one that has it: a switch copies the segment it happens in, and the old
        timeline's copy may be a ``.partial`` or gone.
        """
        return self.page_tli(lsn - lsn % segment_size + segment_size - 1)


def parse_history(tli: int, contents: bytes) -> History:
    """The history that the contents of ``tli``'s history file tell.

    Raises ValueError with PostgreSQL's words if they are not such contents.
    """
    parents: list[tuple[int, int]] = []
    for line in contents.decode("utf-8", "replace").splitlines():
        fields = line.split(maxsplit=2)
        if not fields or fields[0].startswith("#"):
            continue
        if not (fields[0].isascii() and fields[0].isdigit()):
            raise ValueError(f"syntax error in history file: {line}: expected a timeline ID")
        if len(fields) < 2:
            raise ValueError(f"syntax error in history file: {line}: expected a switchpoint")
        parent = int(fields[0])
        if parent <= (parents[-1][0] if parents else 0):
            raise ValueError(f"invalid data in history file: {line}: IDs must increase")
        parents.append((parent, parse_lsn(fields[1])))
    if parents and parents[-1][0] >= tli:
        raise ValueError(f"invalid data in history file: IDs must be less than the child's, {tli}")
    children = [parent for parent, _ in parents[1:]] + [tli]
    return History(
        tli,
        tuple(
            Ancestor(parent, switch_lsn, child)
            for (parent, switch_lsn), child in zip(parents, children, strict=False)
        ),
    )
