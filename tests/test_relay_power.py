"""A relay whose machine loses its power: what was not synced is lost, and nothing else.

No machine is switched off for it.  A `Platter` knows, by all that the relay asks of its disk, what
must have survived; of all else it keeps what it happens to keep.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faulty import Call, Disk, Plan, a_kill
from tests.postgres import installations, lsn_to_int
from tests.relays import SEGMENT, relayed, seeded

SECTOR = 512


class Platter:
    """What is on disk of a directory.

    Contents are as of the last sync of the file, names as of the last sync of the directory.
    """

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self._directory = directory
        self._rng = rng
        self._names = self._found()
        self._contents = {number: self._read(number) for number in self._names.values()}
        self._end_last: Callable[[], None] = lambda: None

    def watched(self, plan: Plan) -> Plan:
        """The same plan, while we watch."""

        def watch(call: Call) -> str:
            self._note(call)
            return plan(call)

        return watch

    def lose_power(self) -> None:
        """Make of the directory what is on disk; of what was not synced it keeps some."""
        names = self._rng.choice([self._names, self._found()])
        kept = {name: self._survived(number) for name, number in names.items()}
        for path in self._directory.iterdir():
            path.unlink()
        for name, contents in kept.items():
            (self._directory / name).write_bytes(contents)

    def _note(self, call: Call) -> None:
        """The call before this one has come to its end, this one has not yet begun."""
        self._end_last()
        self._end_last = partial(self._synced, *self._to_be_synced(call))

    def _to_be_synced(self, call: Call) -> tuple[dict[str, int], dict[int, bytes]]:
        """Names and contents that are on disk when this call has come to its end."""
        if call.name not in ("fsync", "fdatasync"):
            return self._names, {}
        if call.file == ".":
            return self._found(), {}
        number = (self._directory / call.file).stat().st_ino
        return self._names, {number: self._read(number)}

    def _synced(self, names: dict[str, int], contents: dict[int, bytes]) -> None:
        self._names = names
        self._contents |= contents

    def _survived(self, number: int) -> bytes:
        """What is left of a file."""
        synced, written = self._contents.get(number, b""), self._read(number)
        if len(synced) != len(written):
            return self._rng.choice([synced, written])
        kept = bytearray(synced)
        for at in range(0, len(synced), SECTOR):
            sector = slice(at, at + SECTOR)
            if synced[sector] != written[sector] and self._rng.random() < 0.5:
                kept[sector] = written[sector]
        return bytes(kept)

    def _found(self) -> dict[str, int]:
        """The inode numbers of the files by their names."""
        return {path.name: path.stat().st_ino for path in self._directory.iterdir()}

    def _read(self, number: int) -> bytes:
        (path,) = (path for path in self._directory.iterdir() if path.stat().st_ino == number)
        return path.read_bytes()


def check_holds(directory: Path, source: Path, end: int) -> None:
    """That all WAL is there up to `end`, from the oldest segment that is there on."""
    oldest = min(path.name for path in directory.iterdir())
    for lsn in range(int(oldest[16:24], 16) * SEGMENT, end, SEGMENT):
        name = f"{oldest[:16]}{lsn // SEGMENT:08X}"
        path = directory / name
        data = (path if path.exists() else directory / f"{name}.partial").read_bytes()
        size = min(end - lsn, SEGMENT)
        assert data[:size] == (source / name).read_bytes()[:size], (name, end)


def test_the_power_fails() -> None:
    """Whatever was acknowledged or shown to a standby is there, again and again."""
    rng = seeded()
    with relayed(installations()[0]) as setting:
        primary = setting.primary
        primary.pgbench("-i", "-s", "1")
        standby = setting.space.add(primary.backup_to(setting.space.path / "standby"))
        standby.make_standby(setting.relay.conninfo).start()
        setting.wait_flushed(primary.lsn())
        setting.relay.stop()
        with setting.load() as load:
            for _ in range(15):
                platter, disk = Platter(setting.directory, rng), Disk()
                disk.plan = platter.watched(a_kill(rng))
                setting.restart_faulty(disk)
                assert setting.relay.wait() == -9, setting.relay.output
                setting.relay.check_log()
                platter.lose_power()
                primary.wait_until("NOT EXISTS (SELECT FROM pg_stat_replication)")
                standby.wait_until("NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")
                acknowledged = primary.sql("SELECT restart_lsn FROM pg_replication_slots")
                shown = standby.sql("SELECT pg_last_wal_receive_lsn()")
                end = max(lsn_to_int(acknowledged), lsn_to_int(shown))
                check_holds(setting.directory, primary.wal_dir, end)
            setting.restart_relay()
            setting.relay.receiving()
            load.kill()
        standby.wait_replayed(primary.lsn())
        assert setting.check_archive()
