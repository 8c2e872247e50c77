"""Servers that a client names get nothing that is ours, though libpq would have it at hand.

They are plain sockets, which ask for it.  That libpq does give it to who is not so named, is shown
beside it: it is there to be given.
"""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from pathlib import Path
from typing import Any

import psycopg2  # type: ignore[import-untyped]
import pytest
import trustme
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from twisted.internet import reactor as global_reactor
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.askers import CLEARTEXT, GSS, MD5, SASL, Asker
from tests.postgres import HOST
from tests.test_libpq import environment, join_libpq
from walproto.neon.callback import Caller, CallError, Subscription
from walproto.neon.ids import TimelineIds
from walproto.upstream.foreign import foreign_conninfo

IDS = TimelineIds("a" * 32, "b" * 32)
SECRET = "correct horse"
reactor: Any = global_reactor


class Foreign(TestCase):
    """With a password in the environment and in password files, a service, and a certificate."""

    timeout = 60

    def setUp(self) -> None:
        self.addCleanup(join_libpq)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        home = Path(directory.name)
        (home / ".postgresql").mkdir()
        self.authority = trustme.CA()
        ours = self.authority.issue_cert("ours")
        self.key = home / ".postgresql" / "postgresql.key"
        self.certificate = home / ".postgresql" / "postgresql.crt"
        ours.private_key_pem.write_to_path(self.key)
        ours.cert_chain_pems[0].write_to_path(self.certificate)
        self.passwords = home / ".pgpass"
        self.passwords.write_text(f"*:*:*:*:{SECRET}\n")
        for path in (self.key, self.passwords):
            path.chmod(0o600)
        self.services = home / ".pg_service.conf"
        self.services.write_text(f"[ours]\npassword={SECRET}\nuser=ours\n")
        self.home = home
        self.environment()

    def environment(self, **variables: str) -> None:
        """Nothing but this, and a home in which all is where libpq looks for it."""
        environment(self, HOME=str(self.home), **variables)

    def asker(self, question: bytes, tls: ssl.SSLContext | None = None) -> Asker:
        made = Asker(question, tls)
        self.addCleanup(made.__exit__, None, None, None)
        return made

    async def call(self, asker: Asker, more: str = "sslmode=disable") -> CallError:
        """How a call ends to a pageserver that is there."""
        connstr = f"host={HOST} port={asker.port} {more}"
        with self.assertRaises(CallError) as caught:
            await Caller(reactor, "sk1", 5433)(Subscription(IDS, connstr))
        error: CallError = caught.exception
        self.assertNotIn(SECRET, str(error))
        return error

    async def connect(self, asker: Asker, more: str = "sslmode=disable") -> None:
        """As libpq does by itself."""
        with contextlib.suppress(psycopg2.OperationalError):
            await deferToThread(psycopg2.connect, f"host={HOST} port={asker.port} user=u {more}")

    # --- passwords -------------------------------------------------------------------------

    async def test_a_password_of_ours(self) -> None:
        """It stays here, wherever libpq has it from; and libpq has it."""
        places: list[dict[str, str]] = [
            {},
            {"PGPASSFILE": str(self.passwords)},
            {"PGPASSWORD": SECRET, "PGPASSFILE": "/dev/null/x"},
        ]
        for variables in places:
            self.environment(**variables)
            asker = self.asker(CLEARTEXT)
            await self.connect(asker)
            self.assertEqual(asker.answer(), f"p{SECRET}\0".encode())
            for question in (CLEARTEXT, MD5, SASL):
                asker = self.asker(question)
                error = await self.call(asker)
                self.assertEqual(asker.answer(), b"")
                self.assertEqual(error.kind, "connecting")
                self.assertIn("no password supplied", str(error))

    async def test_its_own_password(self) -> None:
        """It gets that, beside all of ours; and when it repeats it, that is not logged."""
        self.environment(PGPASSWORD=SECRET)
        for written in ("password=its\\ own", "password='its own'"):
            asker = self.asker(CLEARTEXT)
            error = await self.call(asker, f"sslmode=disable {written}")
            self.assertEqual(asker.answer(), b"pits own\0")
            self.assertIn("you said ***", str(error))
            self.assertNotIn("its own", str(error))

    async def test_no_password_is_none(self) -> None:
        self.environment(PGPASSWORD=SECRET)
        asker = self.asker(CLEARTEXT)
        await self.call(asker, "sslmode=disable password=''")
        self.assertEqual(asker.answer(), b"")

    async def test_who_we_are_is_not_said(self) -> None:
        """Nor where else we connect to: all that the environment has is passed over."""
        asker = self.asker(CLEARTEXT)
        self.environment(
            PGUSER="ours",
            PGDATABASE="ours",
            PGAPPNAME="ours",
            PGOPTIONS="-c ours=1",
            PGHOST="ours",
            PGHOSTADDR="192.0.2.1",
            PGPORT="1",
            PGTARGETSESSIONATTRS="standby",
            PGREQUIREAUTH="gss",
            PGSSLCERTMODE="require",
        )
        await self.call(asker)
        self.assertEqual(
            asker.startup(),
            {"user": "walproto", "database": "walproto", "application_name": "walproto"},
        )
        await self.call(asker, "sslmode=disable user=u dbname=d options='-c a=b'")
        self.assertEqual(
            asker.startup(),
            {
                "user": "u",
                "database": "d",
                "application_name": "walproto",
                "options": "-c a=b",
            },
        )

    async def test_with_a_service_none_is_called(self) -> None:
        """What it says would be added to what the client says."""
        self.environment(PGSERVICE="ours", PGSERVICEFILE=str(self.services))
        asker = self.asker(CLEARTEXT)
        await self.connect(asker)
        self.assertEqual(asker.answer(), f"p{SECRET}\0".encode())
        asker.startup()
        error = await self.call(asker)
        self.assertEqual(error.kind, "service")
        self.assertIn("PGSERVICE", str(error))
        self.assertTrue(asker.startups.empty())

    async def test_no_ticket_is_shown(self) -> None:
        asker = self.asker(GSS)
        error = await self.call(asker)
        self.assertEqual(asker.answer(), b"")
        self.assertIn("server requested GSSAPI authentication", str(error))

    # --- certificates ----------------------------------------------------------------------

    def tls(self) -> ssl.SSLContext:
        """One that asks for a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(HOST).configure_cert(context)
        self.authority.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    async def test_our_certificate_is_not_shown(self) -> None:
        named = {"PGSSLCERT": str(self.certificate), "PGSSLKEY": str(self.key)}
        for variables in ({}, named):
            self.environment(**variables)
            asker = self.asker(CLEARTEXT, self.tls())
            await self.connect(asker, "sslmode=require")
            self.assertIsNotNone(asker.certificate())
            await self.call(asker, "sslmode=require")
            self.assertIsNone(asker.certificate())


class ConnectionStrings(SynchronousTestCase):
    def setUp(self) -> None:
        environment(self)

    def refusal(self, conninfo: str) -> str:
        with self.assertRaises(ValueError) as caught:
            foreign_conninfo(conninfo)
        return str(caught.exception)

    def test_what_is_not_for_clients(self) -> None:
        """All that libpq knows is, or is not; and what it will know is not."""
        named = {option.keyword.decode() for option in pq.Conninfo.parse(b"")}
        for name in sorted(named):
            conninfo = f"host=ps1 {name}=disable" if name != "host" else "host=ps1"
            if name in ("port", "hostaddr", "sslrootcert"):
                continue
            try:
                foreign_conninfo(conninfo)
            except ValueError as error:
                self.assertEqual(
                    str(error),
                    f'there is "{name}" in its connection string, which is not for clients',
                )
            else:
                named.remove(name)
        for name in (
            *("service", "passfile", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslcrldir"),
            *("sslcertmode", "require_auth", "requirepeer", "krbsrvname", "gsslib"),
            *("gssdelegation", "load_balance_hosts"),
        ):
            self.assertIn(name, named)

    def test_authorities_that_the_machine_trusts(self) -> None:
        self.assertIn('"sslrootcert"', self.refusal("host=ps1 sslrootcert=/etc/shadow"))
        made = conninfo_to_dict(foreign_conninfo("host=ps1 sslrootcert=system"))
        self.assertEqual(made["sslrootcert"], "system")

    def test_it_names_a_host(self) -> None:
        for conninfo in ("", "port=1", "host=", "host=a,", "host=,a", "postgresql:///d", "host=''"):
            self.assertEqual(
                self.refusal(conninfo), "its connection string names no host: it has to name a host"
            )
        for conninfo in (
            "host=/tmp",
            "host=@abstract",
            "host=ps1,/tmp",
            "postgresql://%2Ftmp/d",
            "postgresql:///d?host=/tmp",
            "host=/tmp hostaddr=127.0.0.1",
        ):
            self.assertEqual(
                self.refusal(conninfo),
                "its connection string names a Unix socket: it has to name a host",
            )
        made = conninfo_to_dict(foreign_conninfo("hostaddr=192.0.2.1"))
        self.assertEqual((made["host"], made["hostaddr"]), ("192.0.2.1", "192.0.2.1"))

    def test_what_is_wrong_is_said_without_the_password(self) -> None:
        for conninfo in (
            "host=h password=secret words",
            "postgresql://u:secret@words@h/",
            "postgresql://u:secret/words@h/",
            "host=h password='secret\nwords' nonsense",
            "host=h password=secret\udcffwords",
            "host=h password=secret service=words",
        ):
            text = self.refusal(conninfo)
            self.assertNotIn("secret", text)
            self.assertNotIn("words", text)

    def test_a_libpq_that_is_too_old(self) -> None:
        """It does not know all that we have to forbid it; that is an ImportError's text."""
        import importlib

        from walproto.upstream import foreign

        patch = pytest.MonkeyPatch()
        self.addCleanup(importlib.reload, foreign)
        self.addCleanup(patch.undo)
        patch.setattr(pq, "version", lambda: 150015)
        with self.assertRaisesRegex(ImportError, "^libpq is older than 16"):
            importlib.reload(foreign)
