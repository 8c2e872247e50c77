"""SIGHUP: all the files that say who may connect are put in force together, or none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority, Files, write
from tests.handshakes import a_client
from tests.postgres import WalSender
from tests.secured import fail_to_reload, reload_sender
from tests.strangers import Caller
from tests.test_directory import built

OURS = Authority("Our CA")
REJECTED = "pg_hba.conf rejects replication connection"


class Setting:
    """A walsender, and its files; each is one that can be used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.old = self.certificate()
        self.hba("trust")
        wal = directory / "wal"
        wal.mkdir()
        built().write_to(wal)
        self.sender = WalSender(
            wal,
            *("--hba-file", str(directory / "hba")),
            *("--ssl-cert-file", str(directory / "server.crt")),
            *("--ssl-key-file", str(directory / "server.key")),
        )
        self.sender.ready()

    def certificate(self) -> Files:
        self.identity = OURS.server()
        return self.identity.write(self.directory, "server")

    def hba(self, method: str) -> None:
        write(self.directory / "hba", f"host replication all all {method}\n".encode())

    def served(self) -> bytes | None:
        """The certificate that it shows."""
        with Caller(self.sender.port) as caller:
            return caller.encrypt(a_client()).getpeercert(binary_form=True)

    @property
    def is_rejected(self) -> bool:
        """Whether a client is, by the hba file; otherwise it is let in."""
        with Caller(self.sender.port) as caller:
            told = caller.start_up()
        assert (REJECTED in told) != (told == "R 0"), told
        return REJECTED in told


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    with made.sender:
        yield made
        made.sender.stop()


@pytest.mark.parametrize("damaged", ["hba", "server.key", "server.crt"])
def test_one_that_is_damaged_keeps_the_others_from_being_in_force(
    setting: Setting, damaged: str
) -> None:
    old = setting.identity
    setting.certificate()
    setting.hba("reject")
    good = (setting.directory / damaged).read_bytes()
    write(setting.directory / damaged, b"damaged\n", mode=0o600)
    assert str(setting.directory / damaged) in fail_to_reload(setting.sender)
    assert (setting.served(), setting.is_rejected) == (old.der, False)
    write(setting.directory / damaged, good, mode=0o600)
    reload_sender(setting.sender)
    assert (setting.served(), setting.is_rejected) == (setting.identity.der, True)
