"""``twist walsender``: what is wrong ends it with one clear line, and it starts and stops well."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import Process, free_port, installations, workspace
from tests.wal_builder import MB
from walproto.options import Options
from walproto.tap import _make_relay, _make_safekeeper
from walproto.timeline.slot_file import SlotState, write_slots
from walproto.timeline.slots import SlotOptions

PROJECT = Path(__file__).parent.parent
TWIST = [sys.executable, "-m", "twisted", "--log-format=text", "walsender"]


def refusal(*arguments: str | Path, **variables: str) -> str:
    """What ``twist walsender`` says before it ends, which must be one line on standard error.

    ``variables`` are put in its environment.
    """
    done = subprocess.run(
        [*TWIST, *map(str, arguments)],
        cwd=PROJECT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in done.stdout
    return line.removeprefix("twist walsender: ")


def test_options_that_are_wrong(tmp_path: Path) -> None:
    nowhere, file = tmp_path / "nowhere", tmp_path / "file"
    file.touch()
    assert refusal() == (
        "--wal-dir is missing: say which directory holds the WAL (--data-dir if it is a "
        "safekeeper's)"
    )
    assert refusal("--wal-dir", nowhere) == f"--wal-dir: no such directory: {nowhere}"
    assert refusal("--wal-dir", file) == f"--wal-dir: not a directory: {file}"
    good = ("--wal-dir", tmp_path)
    assert refusal(*good, "DIR") == "unexpected argument: DIR"
    assert refusal(*good, "password=x") == "unexpected argument: password=***"
    assert refusal(*good, "--frobnicate") == "option --frobnicate not recognized"
    assert refusal(*good, "--server-version", "9.6").startswith('--server-version: "9.6" is not')
    assert refusal(*good, "--wal-sender-timeout", "soon") == (
        '--wal-sender-timeout: invalid value for parameter "wal_sender_timeout": "soon"'
    )


def test_endpoints_that_are_wrong(tmp_path: Path) -> None:
    good = ("--wal-dir", tmp_path, "--listen")
    for endpoint in ("nonsense", "tcp", "tcp:port", "5433", ""):
        assert refusal(*good, endpoint).startswith(f'--listen: "{endpoint}" is not an endpoint: ')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        assert refusal(*good, endpoint) == (
            f"cannot listen on {endpoint}: [Errno 98] Address already in use"
        )
    assert refusal(*good, "tcp:0:interface=192.0.2.1").startswith("cannot listen on tcp:0:")
    assert refusal(*good, f"unix:{tmp_path}/no/socket").startswith("cannot listen on unix:")


def test_a_socket_on_which_somebody_listens_stays_theirs(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        for _ in range(2):
            told = refusal("--wal-dir", tmp_path, "--listen", f"unix:{path}")
            assert told == f"cannot listen on unix:{path}: [Errno 98] Address already in use"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(SystemExit, match=f"--wal-dir: no permission to read {tmp_path}"):
        Options().parseOptions(["--wal-dir", str(tmp_path)])


def refused(*arguments: str | Path) -> str:
    """As `refusal`, of options that are not looked at any further."""
    with pytest.raises(SystemExit) as ended:
        Options().parseOptions(list(map(str, arguments)))
    return str(ended.value).removeprefix("twist walsender: ")


def test_options_that_need_an_upstream(tmp_path: Path) -> None:
    good = ("--wal-dir", tmp_path)
    for option in (
        ("--upstream-slot", "r1"),
        ("--upstream-start", "0/1000000"),
        ("--upstream-create-slot",),
        ("--hot-standby-feedback",),
        ("--wal-keep-size", "1GB"),
        ("--wal-keep-size", "0"),
        ("--wal-keep-size", "-1"),
        ("--max-slot-wal-keep-size", "0"),
        ("--max-replication-slots", "0"),
    ):
        assert refused(*good, *option) == f"{option[0]} means nothing without --upstream"


def test_options_of_the_upstream_that_are_wrong(tmp_path: Path) -> None:
    good = ("--wal-dir", tmp_path, "--upstream", "host=127.0.0.1")
    assert refused(*good, "--upstream-create-slot") == (
        "--upstream-create-slot needs --upstream-slot: say which slot"
    )
    for slot in ("", "Relay", "my-relay", 'r"; DROP', "r" * 64, "é"):
        told = refused(*good, "--upstream-slot", slot)
        assert told.startswith(f'--upstream-slot: invalid replication slot name: "{slot}": ')
    for lsn in ("0", "16/", "0/G", "100000000/0", " 0/1", "-1/0"):
        told = refused(*good, f"--upstream-start={lsn}")
        assert told == f'--upstream-start: invalid LSN: "{lsn}"'
    assert refused(*good, "--wal-receiver-timeout", "soon") == (
        '--wal-receiver-timeout: invalid value for parameter "wal_receiver_timeout": "soon"'
    )
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory(tmp_path: Path) -> None:
    nowhere, file = tmp_path / "nowhere", tmp_path / "file"
    file.touch()
    assert refused("--data-dir", nowhere) == f"--data-dir: no such directory: {nowhere}"
    assert refused("--data-dir", file) == f"--data-dir: not a directory: {file}"
    assert refused("--data-dir", "") == "--data-dir: no such directory: "
    good = ("--data-dir", tmp_path)
    for option in ("--wal-dir", "--upstream"):
        assert refused(*good, option, "") == f"{option} and --data-dir exclude each other: say one"
    for option in ("--upstream-slot", "--wal-keep-size", "--max-replication-slots"):
        assert refused(*good, option, "1") == f"{option} means nothing without --upstream"
    for name in ("advertise", "recall-period"):
        told = refused("--wal-dir", tmp_path, f"--{name}", "1")
        assert told == f"--{name} means nothing without --data-dir"


def test_whom_to_call_back(tmp_path: Path) -> None:
    good = ("--data-dir", str(tmp_path))
    assert refused(*good, "--recall-period", "5s") == (
        "--recall-period means nothing without --advertise"
    )
    for wrong in ("", "5433", "host", "host:", ":5433", "host:0", "host:65536", "a b:1"):
        told = refused(*good, "--advertise", wrong)
        assert told.startswith(f'--advertise: "{wrong}" is not HOST:PORT'), told
    calling = (*good, "--advertise", "192.0.2.1:5433")
    for wrong in ("", "soon", "-1"):
        assert refused(*calling, f"--recall-period={wrong}").startswith("--recall-period: ")
    told = refused(*calling, "--recall-period", "0")
    assert told.endswith('for parameter "recall_period": "0" (It must be more than 0.)')
    options = Options()
    options.parseOptions([*calling, "--recall-period", "1500ms"])
    assert options["advertise"] == ("192.0.2.1", 5433)
    assert options["recall-period"] == 1.5
    options = Options()
    options.parseOptions([*good, "--advertise", "[2001:db8::1]:5433"])
    assert options["advertise"] == ("2001:db8::1", 5433)
    assert options["recall-period"] is None


def test_calling_needs_psycopg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options()
    options.parseOptions(["--data-dir", str(tmp_path), "--advertise", "192.0.2.1:5433"])
    for module in ("walproto.upstream.libpq", "psycopg"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("walproto.upstream.libpq", raising=False)
    with pytest.raises(SystemExit, match=r"--advertise: .*: it takes pip install 'walproto\["):
        _make_safekeeper(options, None)


def taken(directory: Path, *arguments: str) -> Options:
    """The options of a relay, as they are taken."""
    options = Options()
    options.parseOptions(["--wal-dir", str(directory), "--upstream", "", *arguments])
    return options


SIZES = {
    "0": 0,
    "64": 64 * MB,
    "64MB": 64 * MB,
    " 2 GB ": 2048 * MB,
    "0.5TB": 2**39,
    "10240kB": 10 * MB,
    "1048576B": MB,
    "0x10": 16 * MB,
    "1.5": 2 * MB,
    "1023kB": MB,
    "2147483647": (2**31 - 1) * MB,
}
"""Of a setting whose unit is MB, in bytes; what is no whole number of those is rounded."""


@pytest.mark.parametrize(
    ("option", "smallest"), [("wal-keep-size", 0), ("max-slot-wal-keep-size", -1)]
)
def test_sizes(tmp_path: Path, option: str, smallest: int) -> None:
    assert taken(tmp_path)[option] is None
    keep = ("--wal-keep-size=0",)
    for text, size in SIZES.items():
        assert taken(tmp_path, *keep, f"--{option}={text}")[option] == size, text
    name = option.replace("-", "_")
    for text in ("", "much", "1 mb", "1MiB", "1GBs", "12 12", "1e", "GB", "--5"):
        told = refused("--wal-dir", tmp_path, "--upstream", "", *keep, f"--{option}={text}")
        assert told.startswith(f'--{option}: invalid value for parameter "{name}": "{text}"')
    units = 'Valid units for this parameter are "B", "kB", "MB", "GB", and "TB".'
    for text, problem in {
        "1m": f'invalid value for parameter "{name}": "1m" ({units})',
        f"{smallest - 1}": f'{smallest - 1} MB is outside the valid range for parameter "{name}" '
        f"({smallest} MB .. 2147483647 MB)",
        "2147483648": f'invalid value for parameter "{name}": "2147483648" (Value exceeds integer '
        "range.)",
    }.items():
        told = refused("--wal-dir", tmp_path, "--upstream", "", *keep, f"--{option}={text}")
        assert told == f"--{option}: {problem}"


def test_a_bound_for_slots_needs_a_size(tmp_path: Path) -> None:
    """For without one nothing is removed, whatever slots keep."""
    for text in ("0", "64MB", "-1", "much"):
        told = refused("--wal-dir", tmp_path, "--upstream", "", f"--max-slot-wal-keep-size={text}")
        assert told == "--max-slot-wal-keep-size means nothing without --wal-keep-size"
    both = taken(tmp_path, "--wal-keep-size=0", "--max-slot-wal-keep-size=-1")
    assert both["max-slot-wal-keep-size"] is None


def test_counts(tmp_path: Path) -> None:
    assert taken(tmp_path)["max-wal-senders"] == 10
    for option in ("max-wal-senders", "max-replication-slots"):
        for text, count in {"0": 0, "7": 7, "0500": 500, "262143": 262143}.items():
            assert taken(tmp_path, f"--{option}={text}")[option] == count
        for text in (
            "",
            "-1",
            "+1",
            "ten",
            "262144",
            "1000000",
            "1.0",
            "0x1",
            " 1",
            "1\n",
            "\u0661",
        ):
            told = refused("--wal-dir", tmp_path, "--upstream", "", f"--{option}={text}")
            name = option.replace("-", "_")
            assert told == (
                f'--{option}: invalid value for parameter "{name}": "{text}" '
                "(It must be a number from 0 to 262143.)"
            )


def test_how_many_workers_there_are(tmp_path: Path) -> None:
    assert taken(tmp_path)["workers"] == 0
    for text, count in {"0": 0, "1": 1, "64": 64}.items():
        assert taken(tmp_path, f"--workers={text}")["workers"] == count
    for text in ("65", "", "-1", "two"):
        assert refused("--wal-dir", tmp_path, f"--workers={text}") == (
            f'--workers: invalid value for parameter "workers": "{text}" '
            "(It must be a number from 0 to 64.)"
        )


def test_how_many_clients_there_may_be_can_be_said_of_any_directory(tmp_path: Path) -> None:
    options = Options()
    options.parseOptions(["--wal-dir", str(tmp_path), "--max-wal-senders", "0"])
    assert options["max-wal-senders"] == 0


def test_what_is_said_of_slots_and_sizes_holds(tmp_path: Path) -> None:
    """Also if it is nothing, and PostgreSQL's defaults if nothing is said."""
    relay = _make_relay(taken(tmp_path), None)
    assert relay is not None
    assert relay.slots.options == SlotOptions(10, None, None)
    arguments = ("--max-replication-slots=0", "--wal-keep-size=0", "--max-slot-wal-keep-size=0")
    other = tmp_path / "other"
    other.mkdir()
    relay = _make_relay(taken(other, *arguments), None)
    assert relay is not None
    assert relay.slots.options == SlotOptions(0, 0, 0)


def test_slots_that_are_not_to_be_had(tmp_path: Path) -> None:
    """Nothing is received or served without the slots that were promised."""
    path = tmp_path / "walproto.slots"
    relay = ("--wal-dir", tmp_path, "--upstream", "host=127.0.0.1")
    write_slots(tmp_path, [SlotState(f"s{number}", 0) for number in range(12)])
    assert refusal(*relay) == (
        f"there are 12 replication slots in {path}, more than max_replication_slots, which is 10: "
        "increase that"
    )
    assert refusal(*relay, "--max-replication-slots=0").endswith("which is 0: increase that")
    path.unlink()
    path.mkdir()
    assert refusal(*relay) == f"{path}: Is a directory"
    path.rmdir()
    path.write_bytes(b"damaged")
    temporary = tmp_path / "walproto.slots.damaged.tmp"
    temporary.mkdir()
    assert refusal(*relay) == f"{temporary}: Is a directory"
    assert path.read_bytes() == b"damaged"


def test_connection_strings_that_are_wrong(tmp_path: Path) -> None:
    for conninfo, problem in {
        "nonsense": 'missing "=" after "nonsense" in connection info string',
        "hots=db1": 'invalid connection option "hots"',
        "postgresql://[::1/": "end of string reached when looking for matching",
    }.items():
        told = refusal("--wal-dir", tmp_path, "--upstream", conninfo)
        assert told.startswith(f"--upstream: {problem}")


def test_psycopg_is_needed_for_an_upstream_and_for_nothing_else(tmp_path: Path) -> None:
    """Be it that it is not installed, or that it has nothing to call libpq with."""
    wal = tmp_path / "wal"
    wal.mkdir()
    relay = ("--wal-dir", wal, "--upstream", "host=127.0.0.1")
    needed = "it takes pip install 'walproto[upstream]'"

    def blocking(name: str, **modules: str) -> dict[str, str]:
        """The environment in which these modules are what they should not be."""
        directory = tmp_path / name
        directory.mkdir()
        for module, contents in modules.items():
            (directory / f"{module}.py").write_text(contents)
        return {"PYTHONPATH": str(directory)}

    blocked = blocking("one", psycopg="raise ImportError('no psycopg')")
    assert refusal(*relay, **blocked) == f"--upstream: no psycopg: {needed}"
    without_libpq = blocking(
        "other",
        psycopg_binary="raise ImportError('no psycopg_binary')",
        psycopg_c="raise ImportError('no psycopg_c')",
        sitecustomize="import ctypes.util; ctypes.util.find_library = lambda name: None",
    )
    told = refusal(*relay, **without_libpq)
    assert told.startswith("--upstream: no pq wrapper available. ")
    assert told.endswith(needed)
    listen = f"unix:{tmp_path}/socket"
    command = [*TWIST, "--wal-dir", str(wal), "--listen", listen]
    with Process(command, cwd=PROJECT, env=os.environ | blocked) as sender:
        sender.expect(f"listening on {listen}")
        sender.terminate()
        assert sender.wait() == -signal.SIGTERM
        assert "Traceback" not in sender.output


def test_a_directory_is_received_into_by_one(tmp_path: Path) -> None:
    wal = tmp_path / "wal"
    wal.mkdir()
    relay = ("--wal-dir", wal, "--upstream", f"host=127.0.0.1 port={free_port()}")
    listen = [f"unix:{tmp_path}/{name}" for name in ("one", "two", "three")]
    with Process([*TWIST, *relay, "--listen", listen[0]], cwd=PROJECT) as one:
        one.expect(f"listening on {listen[0]}")
        told = refusal(*relay, "--listen", listen[1])
        assert told == f"--upstream: another walsender receives into {wal} already"
        assert list(wal.iterdir()) == []
        # Who only serves it, may do so.
        with Process([*TWIST, "--wal-dir", wal, "--listen", listen[2]], cwd=PROJECT) as other:
            other.expect(f"listening on {listen[2]}")
        assert one.running


def test_a_servers_own_directory_is_not_received_into(tmp_path: Path) -> None:
    """One that lies elsewhere than in the data directory, too."""
    with workspace() as space:
        elsewhere = space.path / "elsewhere"
        installation = installations()[0]
        directory = space.path / "data"
        installation.run(
            *("initdb", "-D", directory, "--waldir", elsewhere, "-U", "postgres", "--no-sync")
        )
        for wal in (directory / "pg_wal", elsewhere):
            before = sorted(wal.iterdir())
            told = refusal("--wal-dir", wal, "--upstream", "host=127.0.0.1")
            assert told == (
                f"--upstream: {wal} is the pg_wal of a PostgreSQL server, which writes to it "
                "itself (there is archive_status in it)"
            )
            assert sorted(wal.iterdir()) == before


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_waits_for_wal_and_ends_when_told(
    tmp_path: Path, ending: signal.Signals, times: int
) -> None:
    listen = f"unix:{tmp_path}/socket"
    with Process([*TWIST, "--wal-dir", str(tmp_path), "--listen", listen], cwd=PROJECT) as sender:
        sender.expect(f"listening on {listen}")
        sender.expect(f"there is no WAL in {tmp_path} yet: waiting for a first segment")
        for _ in range(times):
            sender.send(ending)
        sender.wait()
        assert "Traceback" not in sender.output


def test_it_serves_a_data_directory_and_ends_when_told(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    options = ("--data-dir", str(tmp_path), "--advertise", "192.0.2.1:5433", "--listen", listen)
    with Process([*TWIST, *options], cwd=PROJECT) as sender:
        sender.expect(f"listening on {listen}")
        sender.expect(f"serving the timelines in {tmp_path}")
        sender.send(signal.SIGTERM)
        sender.wait()
        assert "Traceback" not in sender.output
