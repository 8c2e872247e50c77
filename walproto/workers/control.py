"""What the main process and a worker say to each other.

They are one program: a message is one of the tuples below, pickled, with its length in front, and
nobody else can reach the socket pair that they go through.  A client's socket goes through a second
pair: the main process sends it before it says ``Lend``, so that it is there when that is read.

The main process decides, a worker sends.  Of a timeline, a worker is told how far it goes and in
which files it lies, once for all the clients that are lent to it.  What it is not told may be sent,
it asks for; there is no answer as long as it may not.  Positions are LSNs, streams and timelines
have numbers that are not used twice.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure

from walproto.errors import ReportedError
from walproto.timeline.history import History
from walproto.wal.pages import Identity

# --- To a worker: of a timeline ------------------------------------------------------------------


class Open(NamedTuple):
    """There will be streams of a timeline, whose files are in ``directory``."""

    timeline: int
    directory: str
    identity: Identity


class News(NamedTuple):
    """The timeline ends at ``commit_lsn``.

    All that is committed from ``since`` on may be sent at once; but with ``has_trouble``, a stream
    that has come to the end has to ask.
    """

    timeline: int
    history: History
    since: int
    commit_lsn: int
    has_trouble: bool


class Close(NamedTuple):
    """There are no streams of the timeline any more."""

    timeline: int


# --- To a worker: of a stream --------------------------------------------------------------------


class Lend(NamedTuple):
    """Send WAL of ``tli`` from ``lsn`` on; CopyBothResponse is sent."""

    stream: int
    timeline: int
    tli: int
    lsn: int


class Grant(NamedTuple):
    """The answer to ``Ask``: WAL up to ``lsn`` may be sent."""

    stream: int
    lsn: int


class SendKeepalive(NamedTuple):
    stream: int
    reply_requested: bool


class Finish(NamedTuple):
    """Tell when all is sent, now or later."""

    stream: int


class Recall(NamedTuple):
    """Send nothing more, and give the socket back."""

    stream: int


# --- From a worker -------------------------------------------------------------------------------


class Ready(NamedTuple):
    """It has started."""


class Ask(NamedTuple):
    """WAL is sent up to ``lsn``: how far may it be from there?"""

    stream: int
    lsn: int


class Sent(NamedTuple):
    """Up to where WAL is sent, by stream: of those that have come to an end for now."""

    positions: dict[int, int]


class Ended(NamedTuple):
    """All WAL of a timeline that is not the current one is sent."""

    stream: int
    lsn: int


class CaughtUp(NamedTuple):
    """It is to finish, and all there is has been sent."""

    stream: int
    lsn: int


class Failed(NamedTuple):
    """WAL cannot be read."""

    stream: int
    error: ReportedError


class Broken(NamedTuple):
    """There was an exception that is none of ours."""

    stream: int
    traceback: str


class Back(NamedTuple):
    """The answer to ``Recall``: the socket is closed there.  When ``unsent`` is sent, which comes
    before anything else, WAL is sent up to ``lsn``."""

    stream: int
    lsn: int
    unsent: bytes


class Channel(Int32StringReceiver):
    """One end of the pair: ``heard`` is called with each message, ``lost`` when the other end is
    gone."""

    MAX_LENGTH = 1 << 26
    transport: Any

    def __init__(self, heard: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._heard = heard
        self._lost = lost

    def say(self, message: NamedTuple) -> None:
        self.sendString(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        if self.transport.connected:
            self.transport.doWrite()  # now, and not when the reactor gets round to it

    def stringReceived(self, data: bytes) -> None:
        self._heard(pickle.loads(data))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._lost()


class OneChannel(Factory):
    """Has a reactor adopt a channel."""

    noisy = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def buildProtocol(self, addr: object) -> Channel:
        return self._channel
