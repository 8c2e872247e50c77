"""Closed unless it is opened: who may connect where ``twist walsender`` was not told who may."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import Authority, write
from tests.postgres import HOST, free_port, same_wal_to, tls_installations
from tests.secured import PASSWORD, Answer, Secured, address_elsewhere, has_ipv6, secured
from tests.test_receivewal import begin_at, oldest
from tests.test_tap import refusal

ELSEWHERE = address_elsewhere()
RIGHT = f"user=alice password={PASSWORD}"

EVERYWHERE = "tcp:{}:interface=0.0.0.0"
EVERYWHERE_IPV6 = r"tcp:{}:interface=\:\:"
"""On Linux that is for IPv4 as well."""


@pytest.mark.parametrize("given", ["nothing", "TLS", "passwords"])
def test_it_does_not_start_where_nobody_could_connect(given: str, tmp_path: Path) -> None:
    """One line says what to give; a part of it is not enough."""
    files = Authority().server().write(tmp_path, "server")
    users = write(tmp_path / "users.txt", b'"alice" "secret"\n', mode=0o600)
    endpoint, options = {
        "nothing": (EVERYWHERE.format(0), ()),
        "TLS": (
            EVERYWHERE_IPV6.format(0) if has_ipv6() else EVERYWHERE.format(0),
            ("--ssl-cert-file", files.certificate, "--ssl-key-file", files.key),
        ),
        "passwords": ("tcp:0", ("--auth-file", users)),
    }[given]
    told = refusal("--wal-dir", tmp_path, "--listen", endpoint, *options)
    assert told == (
        f"cannot listen on {endpoint}: nobody could connect from elsewhere: give "
        "--ssl-cert-file, --ssl-key-file and --auth-file (or --jwt-public-key, with --data-dir), "
        "or say in an --hba-file who may"
    )


def test_nor_where_one_of_its_endpoints_is_such(tmp_path: Path) -> None:
    endpoints = ("--listen", f"tcp:0:interface={HOST}", "--listen", EVERYWHERE.format(0))
    told = refusal("--wal-dir", tmp_path, *endpoints)
    assert told.startswith(f"cannot listen on {EVERYWHERE.format(0)}: nobody could connect")


@dataclass(frozen=True)
class Opened:
    """A walsender that has no hba file, but TLS and passwords."""

    setting: Secured
    ports: list[int]
    """Those at which it listens everywhere: for IPv4, and, if there is that, for IPv6 too."""

    def answers(self, client: str) -> Iterator[Answer]:
        """What psql says that connects so to any of the ports."""
        return (self.setting.psql(client, port) for port in self.ports)


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    (installation, *_) = tls_installations()
    with secured(installation, "") as setting:
        ports = [free_port("0.0.0.0")]
        endpoints = [EVERYWHERE.format(ports[0])]
        if has_ipv6():
            ports.append(free_port("::"))
            endpoints.append(EVERYWHERE_IPV6.format(ports[1]))
        endpoints += [f"unix:{setting.sockets}/.s.PGSQL.{port}" for port in ports]
        sender = setting.another(
            *(*setting.ssl_options, "--auth-file", str(setting.auth_file)),
            *(option for endpoint in endpoints for option in ("--listen", endpoint)),
        )
        yield Opened(setting, ports)
        sender.check_log()


def test_who_is_on_this_machine_is_trusted(opened: Opened) -> None:
    for user in ("alice", "nobody"):
        for way in (
            f"host={HOST}",
            f"host={HOST} sslmode=require",
            f"host={opened.setting.sockets}",
        ):
            assert all(answer.is_let_in for answer in opened.answers(f"user={user} {way}"))
    if has_ipv6():
        assert opened.setting.psql("user=alice host=::1", opened.ports[-1]).is_let_in


needs_elsewhere = pytest.mark.skipif(
    ELSEWHERE is None, reason="this machine has no address but the loopback interface's"
)


@needs_elsewhere
def test_others_need_tls_and_a_password(opened: Opened) -> None:
    for client, told in {
        f"{RIGHT} sslmode=disable": (
            f'no pg_hba.conf entry for replication connection from host "{ELSEWHERE}", user '
            '"alice", no encryption'
        ),
        "user=alice password=wrong sslmode=require": (
            'password authentication failed for user "alice"'
        ),
        f"user=nobody password={PASSWORD} sslmode=require": (
            'password authentication failed for user "nobody"'
        ),
    }.items():
        start = f'psql: error: connection to server at "{ELSEWHERE}", port PORT failed: FATAL:  '
        for answer in opened.answers(f"host={ELSEWHERE} {client}"):
            assert (answer.code, answer.output) == (2, start + told)
    root = f"sslmode=verify-ca sslrootcert={opened.setting.ca_file}"
    for answer in opened.answers(f"host={ELSEWHERE} {RIGHT} {root} channel_binding=require"):
        assert answer.is_let_in


@needs_elsewhere
def test_others_stream_who_have_both(opened: Opened) -> None:
    setting = opened.setting
    primary = setting.primary
    directory = setting.space.directory("received")
    begin_at(setting.space, directory, oldest(primary.wal_dir))
    primary.switch_wal()
    end = primary.lsn()
    conninfo = setting.conninfo(f"host={ELSEWHERE} {RIGHT} sslmode=require", opened.ports[0])
    options = ("-D", directory, "-d", conninfo, "-w", f"--endpos={end}", "--no-loop")
    setting.installation.run("pg_receivewal", *options)
    assert same_wal_to(end, primary.wal_dir, directory)
