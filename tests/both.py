"""The same conversation with a primary and with its relay, at the same time, message by message.

What may differ is said in one place, :func:`comparable`.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket

from tests.fakes import COPY_DONE, cancel_request, message, query, told
from tests.postgres import HOST, lsn_to_int
from tests.relays import SEGMENT, Relayed
from tests.slotted import RawClient
from walproto.timeline.slot_file import read_slots


def comparable(lines: list[str]) -> list[str]:
    """A transcript without what may differ.

    Positions and process IDs are each server's own; WAL and keepalives come when they come.  The
    notice that a name was cut we do not give.
    """
    return [
        re.sub(
            r"(?<=for PID )\d+|(?<=currently )\d+|\b(?!0/0\b)[0-9A-F]{1,8}/[0-9A-F]{1,8}\b",
            "…",
            line,
        )
        for line in lines
        if line[:2] not in ("N ", "w ", "k ")
    ]


class Session(RawClient):
    """A session with one of the two servers."""

    def end(self) -> list[str]:
        """What the server says until it closes the connection."""
        return _to_end(self._socket)

    def is_silent(self) -> bool:
        """Whether nothing has arrived that was not heard."""
        return not select.select([self._socket], [], [], 0)[0]


def _to_end(connection: socket.socket) -> list[str]:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return [*told(data), "EOF"]


def say(port: int, packet: bytes) -> list[str]:
    """What a server says to this on a connection of its own, which it closes then."""
    with socket.create_connection((HOST, port), timeout=30) as connection:
        connection.sendall(packet)
        return _to_end(connection)


class Both:
    """A primary and its relay, who are told the same and have to say the same.

    Sessions have names, and begin when they are first named.
    """

    def __init__(self, setting: Relayed, running: contextlib.ExitStack) -> None:
        self.primary, self.relay = setting.primary, setting.relay
        self.ports = self.primary.port, self.relay.port
        self.major = setting.primary.installation.major
        self._running = running
        self._sessions: dict[str, tuple[Session, Session]] = {}

    def session(self, name: str) -> tuple[Session, Session]:
        """With the primary, and with the relay."""
        if name not in self._sessions:
            theirs, ours = (self._running.enter_context(Session(port)) for port in self.ports)
            self._sessions[name] = theirs, ours
        return self._sessions[name]

    def send(self, name: str, *data: bytes) -> None:
        for session in self.session(name):
            session.send(*data)

    def hear(self, name: str, pattern: str = "Z I") -> list[str]:
        """What both say up to a line that matches."""
        theirs, ours = (comparable(session.hear(pattern)) for session in self.session(name))
        assert ours == theirs
        return ours

    def ask(self, name: str, command: str, pattern: str = "Z I") -> list[str]:
        """What both answer to a command."""
        self.send(name, query(command))
        return self.hear(name, pattern)

    def stream(self, name: str, slot: str) -> None:
        """Have a session stream with a slot, from the start of its server's last segment."""
        for session in self.session(name):
            end = lsn_to_int(session.run("IDENTIFY_SYSTEM")[1].split()[3])
            start = f"0/{end - end % SEGMENT:X}"
            session.send(query(f"START_REPLICATION SLOT {slot} {start} TIMELINE 1"))
        assert self.hear(name, "[WZ]") == ["W"]

    def end_stream(self, name: str) -> None:
        self.send(name, COPY_DONE)
        assert self.hear(name) == ["c", "C START_STREAMING", "C START_REPLICATION", "Z I"]

    def cancel(self, name: str) -> list[str]:
        """What both say when somebody else cancels what they do."""
        for session, port in zip(self.session(name), self.ports, strict=True):
            pid, key = int.from_bytes(session.key[:4], "big"), session.key[4:]
            assert say(port, cancel_request(pid, key)) == ["EOF"]
        return self.hear(name)

    def leave(self, name: str) -> None:
        """End a session; it is over when this returns."""
        self.send(name, message(b"X"))
        theirs, ours = (comparable(session.end()) for session in self._sessions.pop(name))
        assert ours == theirs == ["EOF"]

    def wait_waiting(self, name: str) -> None:
        """Wait until a session waits for a slot."""
        self.primary.wait_until(
            "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'ReplicationSlotDrop')"
        )
        self.ask("anybody", "IDENTIFY_SYSTEM")
        for session in self.session(name):
            assert session.is_silent()

    def slots(self) -> list[str]:
        """The slots that there are, in files at least, and not the relay's own on the primary."""
        theirs = self.primary.sql(
            "SELECT slot_name FROM pg_replication_slots"
            " WHERE slot_name <> 'relay' AND NOT temporary ORDER BY slot_name"
        )
        file = read_slots(self.relay.directory)
        states, problems = file.slots, file.problems
        assert problems == []
        assert sorted(state.name for state in states) == theirs.split()
        return theirs.split()

    def end(self) -> None:
        """Have no sessions and no slots any more."""
        for name in list(self._sessions):
            self.leave(name)
        for slot in self.slots():
            assert self.ask("a", f"DROP_REPLICATION_SLOT {slot} WAIT")[0].startswith("C")
        for name in list(self._sessions):
            self.leave(name)
        assert self.slots() == []
