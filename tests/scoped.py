"""A data directory of which some may see this and some that, and a server of it.

Rules, tokens, directories and files are real; connections and time are not, nor is the TLS.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent
from zope.interface import implementer

from tests.fakes import Client, message, query, server, startup
from tests.jwt_keys import EVERYTHING, key, write_keys
from tests.safekeeper import put_control, put_wal
from tests.test_directory import built
from tests.wal_builder import MB, WalBuilder
from walproto.access.authentication import Exchange, IAuthenticator
from walproto.access.guard import Guard
from walproto.access.peer import Peer, Tls
from walproto.lsn import format_lsn
from walproto.neon.callmemaybe import Subscriptions
from walproto.neon.data_directory import DataDirectory
from walproto.neon.ids import TimelineIds
from walproto.neon.pageservers import Pageservers
from walproto.neon.timeline import SafekeeperTimeline
from walproto.neon.walsender import Safekeeper
from walproto.wire.startup import Startup

A, B, C, D = (letter * 32 for letter in "abcd")
HIDDEN = TimelineIds(A, "1" * 32)
"""What there is of it, the states say."""
SIBLING, OWN, OWN_TOO, THIRD = (
    TimelineIds(tenant, number * 32) for tenant, number in ((A, "2"), (B, "3"), (B, "4"), (C, "5"))
)
PRESENT = (SIBLING, OWN, OWN_TOO, THIRD)
NO_TENANT, NO_TIMELINE = TimelineIds(D, "8" * 32), TimelineIds(A, "9" * 32)
COMMITTED = MB + 200_000


@dataclass(frozen=True)
class User:
    """What the user's rule in the hba file ends with, what its token says, and what it sees of
    those that are present."""

    name: str
    options: str
    claims: dict[str, Any] | None
    sees: tuple[TimelineIds, ...]

    @property
    def rule(self) -> str:
        kind, method = ("host", "trust") if self.claims is None else ("hostssl", "jwt")
        return f"{kind} all,replication {self.name} all {method} {self.options}\n"

    @property
    def password(self) -> bytes:
        return b"" if self.claims is None else message(b"p", token(**self.claims) + b"\0")


@cache
def token(**claims: Any) -> bytes:
    return key().token(claims).encode()


def of(tenant: str) -> dict[str, Any]:
    return {"scope": "tenant", "tenant_id": tenant}


ALL = User("all_seeing", "", None, PRESENT)
ALL_BY_TOKEN = User("bearer", "", EVERYTHING, PRESENT)
OUTSIDERS = (
    User("tenant", f"tenant={B}", None, (OWN, OWN_TOO)),
    User("timeline", f"timeline={SIBLING}", None, (SIBLING,)),
    User("both", f"tenant={B} timeline={SIBLING}", None, (SIBLING, OWN, OWN_TOO)),
    User(
        "several",
        f"tenant={B.upper()} timeline={str(SIBLING).upper()} tenant={C} timeline={OWN}",
        None,
        PRESENT,
    ),
    User("token", "", of(B.upper()), (OWN, OWN_TOO)),
    User("scoped_token", "", EVERYTHING | {"tenant_id": C}, (THIRD,)),
    User("limited_bearer", f"tenant={B}", EVERYTHING, (OWN, OWN_TOO)),
    User("both_allow", f"tenant={B} tenant={C} timeline={SIBLING}", of(B), (OWN, OWN_TOO)),
    User("one_of_a_tenant", f"timeline={OWN}", of(B), (OWN,)),
    User("its_sibling", f"timeline={SIBLING} tenant={B}", of(A), (SIBLING,)),
    User("none_by_rule", f"tenant={B}", of(A), ()),
    User("none_by_token", f"tenant={A}", of(B), ()),
)
STRANGERS = "host all,replication unwanted all reject\n"


@implementer(IAuthenticator)
class OverTls:
    """Lets the guard believe that everybody comes over TLS."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def authenticate(self, startup: Startup, peer: Peer) -> Exchange:
        return self.guard.authenticate(startup, replace(peer, tls=Tls("TLSv1.3", "none", 0)))


@cache
def the_wal() -> WalBuilder:
    return built(0.5)


@dataclass
class World:
    """A data directory with the timelines that are present, and a server of them."""

    top: Path
    logged: Sequence[LogEvent]
    clock: Clock = field(default_factory=Clock)
    _told: int = 0

    def __post_init__(self) -> None:
        self.path = self.top / "data"
        self.path.mkdir()
        for ids in PRESENT:
            self.put(ids)
        self.directory = DataDirectory(self.path, self.clock)
        calls = Subscriptions(self.clock, lambda subscription: succeed(None))
        self.pageservers = Pageservers(calls)
        self.safekeeper = Safekeeper(self.directory, self.clock, self.pageservers)
        hba = self.top / "hba.conf"
        hba.write_text("".join(user.rule for user in (ALL, ALL_BY_TOKEN, *OUTSIDERS)) + STRANGERS)
        keys = write_keys(self.top / "keys", key())
        guard = Guard(hba_file=hba, jwt_public_key=keys, offers_tls=True, has_tenants=True)
        self.factory = server(
            self.safekeeper,
            self.clock,
            authenticator=OverTls(guard),
            max_unauthenticated=100_000,
        )

    def place(self, ids: TimelineIds = HIDDEN) -> Path:
        return self.path / str(ids)

    def put(self, ids: TimelineIds = HIDDEN, /, **control: Any) -> None:
        self.place(ids).mkdir(parents=True)
        put_wal(self.place(ids), the_wal())
        put_control(self.place(ids), ids, **{"commit_lsn": COMMITTED} | control)

    def open(self, ids: TimelineIds = HIDDEN) -> SafekeeperTimeline:
        timeline = self.directory.get(ids)
        self.clock.pump([0] * 20)
        timeline.require_ready()
        return timeline

    def ask(self, user: User, parameters: dict[str, str]) -> Client:
        """A client that has been answered as far as that goes at once."""
        client = Client(self.factory, self.clock)
        parameters = {"user": user.name} | parameters
        version = 3 << 16 | int(parameters.pop("minor", "0"))
        client.transport.deliver(startup(version, **parameters))
        client.transport.deliver(user.password)
        return client

    def greeted(self, ids: TimelineIds = HIDDEN, user: User = ALL, /, **more: str) -> Client:
        client = self.ask(user, {"options": named(ids)} | more)
        assert client.hear()[-1] == "GREETING"
        return client

    def streaming(self, ids: TimelineIds = HIDDEN, user: User = ALL, /) -> Client:
        client = self.greeted(ids, user)
        client.send(query("IDENTIFY_SYSTEM"))
        client.send(query(f"START_REPLICATION PHYSICAL {format_lsn(MB)}"))
        return client

    def lines(self) -> list[str]:
        """What was logged since the last time."""
        lines = [formatEvent(event) for event in self.logged[self._told :]]
        self._told = len(self.logged)
        return lines

    @contextmanager
    def nothing_touched(self) -> Iterator[None]:
        """Nothing in the data directory is looked at meanwhile, no timeline is opened or closed,
        and nothing is to be done later but to end connections."""
        before, later = self.about(), self.later()
        with self.touched() as touched:
            yield
        assert touched == []
        assert self.about() == before
        assert self.later() == later

    @contextmanager
    def touched(self) -> Iterator[list[str]]:
        """The paths in the data directory that are looked at meanwhile."""
        touched: list[str] = []

        def spied(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **named: Any) -> Any:
                if not isinstance(path, int) and os.fsdecode(path).startswith(str(self.path)):
                    touched.append(os.fsdecode(path))
                return real(path, *arguments, **named)

            return call

        with ExitStack() as spies:
            for name in ("stat", "lstat", "open", "listdir", "scandir", "readlink", "access"):
                spies.enter_context(patch.object(os, name, spied(getattr(os, name))))
            spies.enter_context(patch.object(builtins, "open", spied(open)))
            yield touched

    def about(self) -> Any:
        timelines = self.directory._timelines.items()
        return (
            {ids: (id(one), one.is_active, one.is_in_use) for ids, one in timelines},
            {ids: list(named) for ids, named in self.pageservers._named.items()},
            len(self.factory.senders),
        )

    def later(self) -> list[str]:
        """What is to be done, apart from the ends of connections."""
        delayed: Sequence[Any] = self.clock.getDelayedCalls()
        calls = [getattr(call.func, "__qualname__", "") for call in delayed]
        ends = ("._lost", "._lingered", "._authentication_timed_out")
        return sorted(call for call in calls if not call.endswith(ends))

    def close(self) -> None:
        self.factory.abort_all()
        self.clock.advance(0)
        assert self.safekeeper.stop().called
        self.directory.stop()
        assert self.clock.getDelayedCalls() == []
        assert not self.factory.connections
        assert not self.factory.unauthenticated
        assert [event for event in self.logged if "log_failure" in event] == []


def named(ids: TimelineIds) -> str:
    """What names it in a client's ``options``."""
    return f"-c ztenantid={ids.tenant_id} -c ztimelineid={ids.timeline_id}"
