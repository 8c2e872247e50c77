"""pg_receivewal and psql against walproto: what they get is what a real server gives them.

Wherever it is possible the same program runs against the real server at the same time, and both
archives and all that it says are compared.  The WAL is pgbench's, written meanwhile.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.postgres import (
    HOST,
    Cluster,
    Failed,
    Installation,
    Process,
    ReceiveWal,
    WalSender,
    Workspace,
    free_port,
    identify_system,
    installations,
    is_segment,
    lsn_to_int,
    same_wal,
    workspace,
)

SEGMENT = 2**20


@dataclass(frozen=True)
class Source:
    """A primary with segments of 1 MB, and a walsender on its pg_wal."""

    space: Workspace
    primary: Cluster
    archive: Path
    """Where the primary's archive_command copies its segments to."""
    sender: WalSender

    @property
    def wal_dir(self) -> Path:
        return self.primary.wal_dir

    @property
    def installation(self) -> Installation:
        return self.primary.installation

    def receiver(self, name: str, port: int, *options: str, start: str | None = None) -> ReceiveWal:
        """pg_receivewal, archiving to a new directory from the segment `start` on; None: from the
        oldest there is."""
        directory = self.space.directory(name)
        begin_at(self.space, directory, start or oldest(self.wal_dir))
        return self.receiver_again(directory, port, *options)

    def receiver_again(self, directory: Path, port: int, *options: str) -> ReceiveWal:
        return self.space.add(ReceiveWal(self.installation, directory, port, *options))

    def work(self) -> Process:
        """pgbench, at work on the primary until it is killed."""
        return self.primary.client("pgbench", "-n", "-c", "2", "-T", "600", "postgres")


@pytest.fixture(
    scope="module",
    params=installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    with workspace() as space:
        archive = space.directory("archive")
        primary = space.cluster(request.param, "primary").init(wal_segsize_mb=1)
        primary.configure(
            archive_mode="on",
            archive_command=f'cp "%p" "{archive}/%f"',
            max_replication_slots=0,
            bgwriter_delay="10s",  # it writes to an idle server's WAL
        )
        primary.start()
        sender = space.add(WalSender(primary.wal_dir, "--server-version", request.param.version))
        sender.ready()
        primary.pgbench("-i", "-s", "1")
        yield Source(space, primary, archive, sender)
        sender.check_log()


def oldest(directory: Path) -> str:
    return min(path.name for path in directory.iterdir() if is_segment(path.name))


def begin_at(space: Workspace, directory: Path, segment: str) -> None:
    """Have pg_receivewal, which goes on where its archive ends, begin at this segment."""
    space.file(directory / f"{segment}.partial")


def finished(lsn: str) -> str:
    return rf"finished segment at {re.escape(lsn)} "


def said(receiver: ReceiveWal) -> str:
    """What pg_receivewal printed, less where it wrote to.

    Where exactly it stopped depends on how large the pieces are in which it gets its WAL.
    """
    output = receiver.output.replace(str(receiver.directory), "DIR")
    return re.sub(r"stopped log streaming at \S+", "stopped log streaming at LSN", output)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def partials(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix == ".partial"]


def check_partial(directory: Path, wal_dir: Path, end: str) -> None:
    """The unfinished segment in an archive has all WAL up to `end`."""
    (partial,) = partials(directory)
    size = lsn_to_int(end) % SEGMENT
    assert size > 0
    assert partial.read_bytes()[:size] == (wal_dir / partial.stem).read_bytes()[:size]


# -- A live primary's pg_wal ---------------------------------------------------------------------


def test_the_archive_is_the_one_that_the_primary_makes(source: Source) -> None:
    """From the oldest segment on, while more is written; stopped by Ctrl-C."""
    ours = source.receiver("live-ours", source.sender.port)
    theirs = source.receiver("live-theirs", source.primary.port)
    source.primary.pgbench("-n", "-c", "2", "-t", "200")
    end = source.primary.switch_wal()
    for receiver in (ours, theirs):
        receiver.expect(finished(end))
        assert receiver.stop() == 0
    assert len(same_wal(source.wal_dir, ours.directory)) >= 10
    assert same_wal(theirs.directory, ours.directory) == same_wal(source.wal_dir, theirs.directory)
    assert said(ours) == said(theirs)
    assert "starting log streaming" in said(ours)


def test_after_a_crash_pg_receivewal_goes_on_with_what_it_has(source: Source) -> None:
    directory = source.space.directory("killed")
    begin_at(source.space, directory, oldest(source.wal_dir))
    with source.work():
        receiver = source.receiver_again(directory, source.sender.port)
        receiver.expect("finished segment at")
        receiver.pause()
        # It could not go on behind a crash in which it has just made a file.
        while [path.stat().st_size for path in partials(directory)] != [SEGMENT]:
            receiver.resume()
            receiver.expect("finished segment at")
            receiver.pause()
        receiver.kill()
        (partial,) = partials(directory)
        again = source.receiver_again(directory, source.sender.port)
        again.expect("finished segment at")
    end = source.primary.switch_wal()
    again.expect(finished(end))
    assert again.stop() == 0
    assert partial.stem in same_wal(source.wal_dir, directory)


def test_it_stops_at_the_position_asked_for(source: Source) -> None:
    end = source.primary.lsn()
    start = source.primary.sql(f"SELECT pg_walfile_name('{end}')")
    options = (f"--endpos={end}", "--no-loop")
    ours = source.receiver("endpos-ours", source.sender.port, *options, start=start)
    theirs = source.receiver("endpos-theirs", source.primary.port, *options, start=start)
    for receiver in (ours, theirs):
        assert receiver.wait() == 0
        check_partial(receiver.directory, source.wal_dir, end)
    assert said(ours) == said(theirs)


def test_a_shutdown_waits_until_all_is_flushed_there(source: Source) -> None:
    sender = source.space.add(WalSender(source.wal_dir))
    sender.ready()
    receiver = source.receiver("synchronous", sender.port, "--synchronous", "--no-loop")
    end = source.primary.switch_wal()
    receiver.expect(finished(end))
    end = source.primary.lsn()
    sender.terminate()
    sent, flushed = sender.expect(
        r'"pg_receivewal" .* has ended streaming, sent up to (\S+), flushed there up to (\S+)'
    ).groups()
    assert flushed == sent
    assert lsn_to_int(sent) >= lsn_to_int(end)
    sender.wait()
    assert receiver.wait() == 1
    assert "replication stream was terminated before stop point" in receiver.output
    assert len(same_wal(source.wal_dir, receiver.directory)) >= 10
    check_partial(receiver.directory, source.wal_dir, end)
    sender.check_log()


def test_a_unix_socket_does_as_well(source: Source) -> None:
    sockets = source.space.directory("sockets")
    port = free_port()
    sender = source.space.add(
        WalSender(source.wal_dir, "--listen", f"unix:{sockets}/.s.PGSQL.{port}", port=port)
    )
    sender.ready()
    end = source.primary.switch_wal()
    receiver = source.receiver("by-socket", port, "-h", str(sockets))
    receiver.expect(finished(end))
    assert receiver.stop() == 0
    assert len(same_wal(source.wal_dir, receiver.directory)) >= 10
    sender.expect(r"pg_receivewal.*\[local\].* streams from")
    sender.stop()
    sender.check_log()


@pytest.mark.parametrize("megabytes", [16, 64])
@pytest.mark.parametrize(
    "installation", installations(), ids=lambda installation: f"pg{installation.major}"
)
def test_segments_of_other_sizes(installation: Installation, megabytes: int) -> None:
    with workspace() as space:
        primary = space.cluster(installation, "primary").init(wal_segsize_mb=megabytes).start()
        sender = space.add(WalSender(primary.wal_dir))
        sender.ready()
        directory = space.directory("archive")
        begin_at(space, directory, oldest(primary.wal_dir))
        receiver = space.add(ReceiveWal(installation, directory, sender.port, "--no-sync"))
        primary.pgbench("-i", "-s", "1")
        for _ in range(2):
            end = primary.switch_wal()
        receiver.expect(finished(end))
        assert receiver.stop() == 0
        assert len(same_wal(primary.wal_dir, directory)) >= 2
        sender.check_log()


# -- Archives ------------------------------------------------------------------------------------


def test_an_archive_that_another_pg_receivewal_is_writing(source: Source) -> None:
    """primary -> pg_receivewal -> directory -> walproto -> pg_receivewal, all at once."""
    directory = source.space.directory("first-hand")
    sender = source.space.add(WalSender(directory))
    first = source.receiver_again(directory, source.primary.port)
    first.expect("starting log streaming")
    source.primary.lsn()
    sender.ready()
    second = source.receiver("second-hand", sender.port, start=oldest_of_any(directory))
    with source.work():
        first.expect("finished segment at")
        second.expect("finished segment at")
    end = source.primary.switch_wal()
    second.expect(finished(end))

    # A segment need not be finished for what is in it to be passed on.
    middle = source.primary.lsn()
    options = (f"--endpos={middle}", "--no-loop")
    start = source.primary.sql(f"SELECT pg_walfile_name('{middle}')")
    third = source.receiver("third", sender.port, *options, start=start)
    assert third.wait() == 0
    check_partial(third.directory, source.wal_dir, middle)

    end = source.primary.switch_wal()
    second.expect(finished(end))
    assert second.stop() == 0
    assert first.stop() == 0
    assert len(same_wal(first.directory, second.directory)) >= 2
    assert same_wal(source.wal_dir, second.directory) == same_wal(source.wal_dir, first.directory)
    sender.check_log()


def oldest_of_any(directory: Path) -> str:
    """The oldest segment in an archive, finished or not."""
    return min(path.name.removesuffix(".partial") for path in directory.iterdir())


def test_an_archive_that_archive_command_fills(source: Source) -> None:
    source.primary.switch_wal()
    source.primary.wait_until("SELECT archived_count > 0 FROM pg_stat_archiver")
    sender = source.space.add(WalSender(source.archive))
    sender.ready()
    receiver = source.receiver("of-archive", sender.port, start=oldest(source.archive))
    with source.work():
        receiver.expect("finished segment at")
    end = source.primary.switch_wal()
    receiver.expect(finished(end))
    assert receiver.stop() == 0
    names = same_wal(source.archive, receiver.directory)
    assert len(names) >= 10
    assert same_wal(source.wal_dir, receiver.directory) == names
    sender.check_log()


def test_a_finished_archive(source: Source) -> None:
    end = source.primary.switch_wal()
    last = source.primary.sql(f"SELECT pg_walfile_name('{end}'::pg_lsn - 1)")
    source.primary.wait_until(f"SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver")
    archive = source.space.path / "finished"
    shutil.copytree(source.archive, archive)
    sender = source.space.add(WalSender(archive))
    assert sender.ready()[4] == end
    receiver = source.receiver("of-finished", sender.port, start=oldest(archive))
    receiver.expect(finished(end))
    assert receiver.stop() == 0
    names = same_wal(archive, receiver.directory)
    assert len(names) >= 10
    assert names[-1] == last
    sender.check_log()


# -- Before there is any WAL ---------------------------------------------------------------------


def test_an_empty_directory_is_served_as_soon_as_there_is_wal(source: Source) -> None:
    directory = source.space.directory("empty")
    sender = source.space.add(WalSender(directory))
    sender.expect("there is no WAL in .*/empty yet")
    with pytest.raises(Failed, match=r"FATAL: +the database system is starting up"):
        identify_system(source.installation, sender.port)

    source.primary.switch_wal()
    name = oldest(source.wal_dir)
    shutil.copy(source.wal_dir / name, directory / name)
    sender.ready()
    assert (
        identify_system(source.installation, sender.port)[:2]
        == identify_system(source.installation, source.primary.port)[:2]
    )
    sender.check_log()


@pytest.mark.parametrize("source", installations()[:1], ids=["newest"], indirect=True)
def test_pg_receivewal_waits_for_a_directory_to_be_filled(source: Source) -> None:
    """The one that is served is replaced by an empty one, to which the WAL comes later."""
    directory = source.space.directory("replaced")
    start = oldest(source.wal_dir)
    sender = source.space.add(WalSender(source.wal_dir))
    sender.ready()
    receiver = source.receiver("patient", sender.port, start=start)
    end = source.primary.switch_wal()
    receiver.expect(finished(end))
    sender.stop()
    sender = source.space.add(WalSender(directory, port=sender.port))
    receiver.expect("FATAL: +the database system is starting up")
    receiver.expect("waiting 5 seconds to try again")

    end = source.primary.switch_wal()
    for name in sorted(path.name for path in source.wal_dir.iterdir() if is_segment(path.name)):
        shutil.copy(source.wal_dir / name, directory / name)
    receiver.expect(finished(end))
    assert receiver.stop() == 0
    assert len(same_wal(source.wal_dir, receiver.directory)) >= 10
    sender.check_log()


# -- Timelines -----------------------------------------------------------------------------------


def test_it_follows_to_the_next_timeline(source: Source) -> None:
    """A standby is promoted, whose pg_wal is served; then what was archived of it is."""
    standby = source.space.add(source.primary.backup_to(source.space.path / "standby"))
    standby.configure(archive_mode="off")
    standby.make_standby(source.primary.conninfo).start()
    sender = source.space.add(WalSender(standby.wal_dir))
    source.primary.pgbench("-n", "-t", "20")
    standby.wait_replayed(source.primary.lsn())
    sender.ready()
    start = oldest(standby.wal_dir)
    ours = source.receiver("across-ours", sender.port, start=start)
    theirs = source.receiver("across-theirs", standby.port, start=start)
    source.primary.pgbench("-n", "-c", "2", "-t", "200")
    standby.wait_replayed(source.primary.lsn())

    standby.promote()
    standby.pgbench("-n", "-c", "2", "-t", "200")
    end = standby.switch_wal()
    for receiver in (ours, theirs):
        receiver.expect("switched to timeline 2 at")
        receiver.expect(finished(end))
        assert receiver.stop() == 0
    assert said(ours) == said(theirs)
    names = same_wal(standby.wal_dir, ours.directory)
    assert {name[:8] for name in names} == {"00000001", "00000002"}
    # What is left of the old timeline's last segment, too, and the history file.
    archived = files(theirs.directory)
    assert "00000002.history" in archived
    assert min(path.name[:8] for path in partials(theirs.directory)) == "00000001"
    unfinished = f"{names[-1]}~"
    for name, content in files(ours.directory).items():
        if name < unfinished:
            assert content == archived[name], name
    pids = re.findall(r"\(pid (\d+), .* streams from \S+ on timeline ([12])", sender.output)
    assert [tli for _, tli in pids] == ["1", "2"]
    assert len({pid for pid, _ in pids}) == 1
    sender.check_log()

    archive = source.space.add(WalSender(ours.directory))
    assert archive.ready()[1] == "2"
    later = source.receiver("across-later", archive.port, start=start)
    later.expect("switched to timeline 2 at")
    later.expect(finished(end))
    assert later.stop() == 0
    for name, content in files(later.directory).items():
        if name < unfinished:
            assert content == archived[name], name
    archive.check_log()


# -- psql ----------------------------------------------------------------------------------------

COMMANDS = [
    "SHOW wal_segment_size",
    "SHOW data_directory_mode",
    "SHOW server_version_num",
    "SHOW integer_datetimes",
    "SHOW WAL_SENDER_TIMEOUT",
    "SHOW application_name",
    "SHOW nosuch",
    "TIMELINE_HISTORY 0",
    "TIMELINE_HISTORY 2",
    "READ_REPLICATION_SLOT nosuch",
    "CREATE_REPLICATION_SLOT any PHYSICAL",
    "CREATE_REPLICATION_SLOT any TEMPORARY PHYSICAL (RESERVE_WAL)",
    "DROP_REPLICATION_SLOT nosuch",
    "START_REPLICATION SLOT nosuch 0/1000000",
    "START_REPLICATION 0/1000000 TIMELINE 7",
    "START_REPLICATION nowhere",
    "START_REPLICATION",
    "SELECT 1",
    "BEGIN",
    "identify_system",
    "IDENTIFY_SYSTEM;",
    "IDENTIFY_SYSTEM; IDENTIFY_SYSTEM",
]


def ask(source: Source, port: int, command: str) -> tuple[str, str]:
    """What psql shows of the answer: the result, and the error without where in the source it was
    raised."""
    conninfo = f"host={HOST} port={port} user=postgres dbname=postgres replication=true"
    options = ("-v", "VERBOSITY=verbose", "-c", command)
    with source.installation.start("psql", "-X", *options, conninfo) as psql:
        psql.wait()
    shown = re.sub(r"(?m)^LOCATION:.*\n?", "", psql.output).strip()
    # Where the WAL ends may have changed between two questions.
    lsn = re.search(r"0/[0-9A-F]{6,}", shown) if command.startswith("IDENTIFY") else None
    return shown.replace(lsn[0], "LSN") if lsn else shown, lsn[0] if lsn else ""


@pytest.mark.parametrize("command", ["IDENTIFY_SYSTEM", *COMMANDS])
def test_psql_is_answered_alike(source: Source, command: str) -> None:
    theirs, before = ask(source, source.primary.port, command)
    ours, position = ask(source, source.sender.port, command)
    assert ours == theirs
    assert bool(before) == bool(position)


def test_what_identify_system_says_is_true(source: Source) -> None:
    end = source.primary.lsn()
    start = source.primary.sql(f"SELECT pg_walfile_name('{end}')")
    options = (f"--endpos={end}", "--no-loop")
    assert source.receiver("seen", source.sender.port, *options, start=start).wait() == 0
    _, ours = ask(source, source.sender.port, "IDENTIFY_SYSTEM")
    _, theirs = ask(source, source.primary.port, "IDENTIFY_SYSTEM")
    assert lsn_to_int(end) <= lsn_to_int(ours) <= lsn_to_int(theirs)


def test_what_is_no_replication_client_is_told_so(source: Source) -> None:
    conninfo = f"host={HOST} port={source.sender.port} user=postgres dbname=postgres"
    with pytest.raises(Failed, match="only physical replication connections"):
        source.installation.run("psql", "-X", "-c", "SELECT 1", conninfo)
    directory = source.space.path / "backup"
    with pytest.raises(Failed, match="BASE_BACKUP is not supported"):
        source.installation.run(
            *("pg_basebackup", "-D", directory, "-h", HOST, "-p", str(source.sender.port)),
            *("-U", "postgres"),
        )


# -- The operator --------------------------------------------------------------------------------


def test_ctrl_c_twice_ends_it_as_well(source: Source) -> None:
    sender = source.space.add(WalSender(source.wal_dir))
    sender.ready()
    receiver = source.receiver("interrupted", sender.port, "--no-loop")
    receiver.expect("starting log streaming")
    sender.interrupt()
    sender.interrupt()
    sender.wait()
    assert receiver.wait() == 1
    assert "Traceback" not in sender.output


def test_who_has_said_all_is_still_answered(source: Source) -> None:
    """A client that closes its half of the connection behind a question gets the answer."""
    startup = b"\0\3\0\0user\0postgres\0replication\0true\0\0"
    question = b"IDENTIFY_SYSTEM\0"
    answers = []
    for port in (source.primary.port, source.sender.port):
        with socket.create_connection((HOST, port), timeout=30) as client:
            client.sendall((len(startup) + 4).to_bytes(4, "big") + startup)
            heard = b""
            while not heard.endswith(b"Z\0\0\0\5I"):
                heard += client.recv(65536)
            client.sendall(b"Q" + (len(question) + 4).to_bytes(4, "big") + question)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while data := client.recv(65536):
                answer += data
            answers.append(answer)
    theirs, ours = answers
    assert ours.count(b"IDENTIFY_SYSTEM\0") == theirs.count(b"IDENTIFY_SYSTEM\0") == 1
    assert ours.endswith(b"Z\0\0\0\5I")
