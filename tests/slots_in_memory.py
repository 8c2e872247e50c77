"""Slots on a timeline in memory, for tests of sessions that use them.

The file that the slots are kept in is a real one; when it is written, the test says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.task import Clock

from tests.fakes import PAGE, START, Client, MemoryTimeline, cancel_request, query, server
from tests.upstream_fakes import HeldThreads
from walproto.lsn import format_lsn
from walproto.timeline.slot_file import read_slots
from walproto.timeline.slots import Slot, SlotOptions, Slots

END = START + 4 * PAGE
AT_END = format_lsn(END)

CREATED = "T slot_name:25(-1) consistent_point:25(-1) snapshot_name:25(-1) output_plugin:25(-1)"
DROPPED = ["C DROP_REPLICATION_SLOT", "Z I"]
READ = "T slot_type:25(-1) restart_lsn:25(-1) restart_tli:20(8)"
CANCELED = ["ERROR 57014: canceling statement due to user request", "Z I"]
TERMINATED = ["FATAL 57P01: terminating connection due to administrator command", "EOF"]
COPIED = ["C START_STREAMING", "C START_REPLICATION", "Z I"]


class Served:
    """A WAL sender of that major, with slots in ``directory``; its WAL ends at :data:`END`, and
    there is another segment behind that."""

    def __init__(self, directory: Path, major: int = 18, **options: Any) -> None:
        self.directory = directory
        self.clock = Clock()
        self.timeline = MemoryTimeline(300 * PAGE, major=major)
        self.timeline.commit_lsn = END
        self.threads = HeldThreads()
        self.slots = Slots(directory, self.threads, SlotOptions(**options))
        self.factory = server(self.timeline, self.clock, slots=self.slots)

    def client(self, **parameters: str) -> Client:
        """One that has started up."""
        client = Client(self.factory, self.clock)
        assert client.start_up(**parameters) == ["GREETING"]
        return client

    def ask(self, client: Client, command: str) -> list[str]:
        """What is answered to a command when all has gone to the disk that has to."""
        heard = client.send(query(command))
        while self.threads.is_busy:
            self.threads.work()
            heard += client.hear()
        return heard

    def create(self, client: Client, *commands: str) -> None:
        """Have slots created: their names, and what else is to be said of them."""
        for command in commands:
            name, *rest = command.split()
            answer = self.ask(client, " ".join(["CREATE_REPLICATION_SLOT", name, *rest]))
            assert answer == [
                CREATED,
                f"D {name} 0/0 NULL NULL",
                "C CREATE_REPLICATION_SLOT",
                "Z I",
            ]

    def slot(self, name: str) -> Slot:
        slot = self.slots.get(name)
        assert slot is not None
        return slot

    def cancel(self, client: Client) -> list[str]:
        """Cancel what a client does; what it hears of it."""
        assert Client(self.factory, self.clock).send(cancel_request(*client.key)) == ["EOF"]
        return client.hear()

    def position(self, name: str) -> list[str]:
        """What READ_REPLICATION_SLOT says of a slot: kind, LSN, timeline."""
        client = self.client()
        columns, row, *rest = client.send(query(f"READ_REPLICATION_SLOT {name}"))
        assert (columns, rest) == (READ, ["C READ_REPLICATION_SLOT", "Z I"])
        client.transport.drop()
        return row.split()[1:]

    def stream(self, client: Client, slot: str, lsn: int = START, *more: str) -> list[str]:
        """Have the client stream with a slot."""
        client.send(query("IDENTIFY_SYSTEM"))
        options = " ".join(["", *more])
        return client.send(query(f"START_REPLICATION SLOT {slot} {format_lsn(lsn)}{options}"))

    def names(self) -> list[str]:
        return sorted(slot.name for slot in self.slots)

    def names_on_disk(self) -> list[str]:
        file = read_slots(self.directory)
        states, problems = file.slots, file.problems
        assert problems == []
        return sorted(state.name for state in states)

    def is_free(self, name: str) -> bool:
        return self.slot(name).holder is None


def created(name: str = "s") -> list[str]:
    return [CREATED, f"D {name} 0/0 NULL NULL", "C CREATE_REPLICATION_SLOT", "Z I"]


def active(name: str, client: Client) -> list[str]:
    """The answer to who wants to use a slot that another session uses."""
    pid, _ = client.key
    return [f'ERROR 55006: replication slot "{name}" is active for PID {pid}', "Z I"]


def missing(name: str) -> list[str]:
    return [f'ERROR 42704: replication slot "{name}" does not exist', "Z I"]
