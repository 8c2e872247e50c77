"""The walsender's certificate is exchanged at SIGHUP, and nobody who streams notices.

What is served comes from an upstream, over TLS too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.certificates import Authority, write
from tests.postgres import Cluster, Relay, tls_installations
from tests.relays import SLOT
from tests.secured import PASSWORD, Secured, fail_to_reload, reload_sender, secured
from tests.test_standby import connections

RULES = "hostssl replication alice all scram-sha-256\n"
ALICE = f"user=alice password={PASSWORD} sslmode=verify-full channel_binding=require"


@pytest.fixture(params=tls_installations(), ids=lambda installation: f"pg{installation.major}")
def setting(request: pytest.FixtureRequest) -> Iterator[Secured]:
    with secured(request.param, RULES) as setting:
        yield setting


def check_arrives(row: str, primary: Cluster, standby: Cluster) -> None:
    """That a row of the primary's becomes the standby's too."""
    primary.sql(f"INSERT INTO seen VALUES ('{row}')")
    standby.wait_until(f"EXISTS (SELECT FROM seen WHERE name = '{row}')")


def test_the_certificate_is_rotated_while_a_standby_streams(setting: Secured) -> None:
    """From RSA to an elliptic curve, and from one authority to another."""
    space, primary = setting.space, setting.primary
    primary.sql("CREATE TABLE seen (name text)")
    old, new = setting.authority, Authority("Another CA")
    trusting = {
        authority: f"{ALICE} sslrootcert={write(space.path / name, authority.pem)}"
        for name, authority in (("old.crt", old), ("new.crt", new))
    }
    directory = space.directory("rotated")
    files = old.server("RSA").write(directory, "server")
    relay = space.add(
        Relay(
            space.directory("relay"),
            f"{primary.conninfo} sslmode=require",
            *SLOT,
            *setting.access_options,
            *("--ssl-cert-file", str(files.certificate), "--ssl-key-file", str(files.key)),
        )
    )
    relay.ready()
    standby = space.add(primary.backup_to(space.path / "standby"))
    conninfo = setting.conninfo(trusting[old], relay.port)
    standby.make_standby(f"{conninfo} application_name=standby").start()
    check_arrives("before", primary, standby)

    def check_only_trusted_by(authority: Authority) -> None:
        for other, client in trusting.items():
            answer = setting.psql(client, relay.port)
            assert answer.is_let_in == (other is authority)
            assert answer.is_let_in or "SSL error: certificate verify failed" in answer.output

    check_only_trusted_by(old)
    new.server("P-256").write(directory, "server")
    reload_sender(relay)
    check_only_trusted_by(new)
    check_arrives("rotated", primary, standby)

    # A key that does not go with the certificate.
    write(files.key, old.server("P-256").key_pem, mode=0o600)
    setting.rules("hostssl replication alice all reject\n")
    problem = fail_to_reload(relay)
    assert problem.startswith(f'private key file "{files.key}" does not go with the certificate')
    check_only_trusted_by(new)
    check_arrives("still", primary, standby)

    assert len(re.findall(r'"standby" \(pid \d+, \S+\) streams from', relay.output)) == 1
    assert len(connections(standby)) == 1
    assert relay.output.count("#error") == 2
