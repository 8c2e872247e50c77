"""To whom may not see a timeline it makes no difference what there is of it, or that there is none.

Each outsider asks, in all the ways there are, for a timeline that is in this state or that, and for
two of which there is nothing.  The answers are the same to the byte, apart from the IDs, and come
before anything else happens; and nothing is looked at for them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle, islice, product
from pathlib import Path

import pytest
from twisted.logger import capturedLogs

from tests.fakes import Client, cancel_request, message, query, told
from tests.jwt_keys import EVERYTHING, new_key
from tests.scoped import (
    ALL,
    ALL_BY_TOKEN,
    COMMITTED,
    HIDDEN,
    NO_TENANT,
    NO_TIMELINE,
    OUTSIDERS,
    OWN,
    PRESENT,
    User,
    World,
    named,
    the_wal,
    token,
)
from tests.timeline_states import (
    STATES,
    a_pageservers,
    being_opened,
    linked_to_another,
    streamed,
    waiting_for_a_proposer,
    with_anothers_control_file,
)
from tests.wal_builder import MB
from walproto.neon.ids import TimelineIds

in_each_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with capturedLogs() as logged:
        made = World(tmp_path, logged)
        yield made
        made.close()


# --- How one may ask for a timeline --------------------------------------------------------------


def bare(ids: TimelineIds) -> str:
    return f"ztenantid={ids.tenant_id} ztimelineid={ids.timeline_id}"


def upper(ids: TimelineIds) -> str:
    return f"-c tenant_id={ids.tenant_id.upper()} --timeline-id={ids.timeline_id.upper()}"


REQUESTS: dict[str, Callable[[TimelineIds], dict[str, str]]] = {
    "options": lambda ids: {"options": named(ids)},
    "parameters": lambda ids: {"tenant_id": ids.tenant_id, "timeline_id": ids.timeline_id},
    "options overridden": lambda ids: {"options": named(OWN), **REQUESTS["older"](ids)},
    "older": lambda ids: {"ztenantid": ids.tenant_id, "ztimelineid": ids.timeline_id},
    "upper case": lambda ids: {"options": upper(ids)},
    "pageserver": lambda ids: {
        "options": f"{bare(ids)} pageserver_connstr=host=ps2",
        "application_name": "pageserver",
    },
    "names a pageserver": lambda ids: {"options": f"{bare(ids)} pageserver_connstr=host=ps3"},
    "recovery": lambda ids: {"options": bare(ids), "application_name": "wal_proposer_recovery"},
    "ordinary": lambda ids: {"options": named(ids), "replication": "false"},
    "logical": lambda ids: {
        "options": named(ids),
        "replication": "database",
        "database": ids.tenant_id,
    },
    "settings": lambda ids: {"options": f"{named(ids)} -c nosuch=1", "datestyle": "x"},
    "protocol": lambda ids: {"options": named(ids), "minor": "2"},
    "newer protocol": lambda ids: {"options": named(ids), "minor": "9", "_pq_.x": "y"},
}

ILL_NAMED: dict[str, Callable[[TimelineIds], dict[str, str]]] = {
    "no tenant": lambda ids: {"ztimelineid": ids.timeline_id},
    "no timeline": lambda ids: {"ztenantid": ids.tenant_id},
    "short": lambda ids: {"ztenantid": ids.tenant_id, "ztimelineid": ids.timeline_id[1:]},
    "a path": lambda ids: {"options": f"ztenantid=. ztimelineid={ids}"},
    "two paths": lambda ids: {"ztenantid": f"{ids.tenant_id}/", "ztimelineid": ids.timeline_id},
    "two tenants": lambda ids: {**REQUESTS["older"](ids), "tenant_id": OWN.tenant_id},
    "two timelines": lambda ids: {
        "options": f"{named(OWN)} timeline_id={ids.timeline_id}",
        "pageserver_connstr": "host=ps2",
    },
    "a connection string": lambda ids: {"options": named(ids), "pageserver_connstr": "\n"},
}


def without(text: str, ids: TimelineIds) -> str:
    """A text of these IDs, with stars for them."""
    text = re.sub(ids.tenant_id, "*" * 32, text)
    return re.sub(ids.timeline_id[0] + "{31,32}", lambda found: "*" * len(found[0]), text)


def answers(world: World, user: User, request: dict[str, str], ids: TimelineIds) -> tuple[str, str]:
    """What a client is sent at once that is refused for good, and what is logged of it."""
    world.lines()
    with world.nothing_touched():
        client = world.ask(user, request)
    assert client.transport.disconnecting
    sent = bytes(client.transport.arrived).decode("latin-1")
    return without(sent, ids), without("\n".join(world.lines()), ids)


def some_of_each(number: int) -> list[tuple[User, Callable[[TimelineIds], dict[str, str]]]]:
    """Each of the outsiders, and each of the requests; by whom, depends on the number."""
    users = islice(cycle(OUTSIDERS), number, None)
    return [
        *((user, REQUESTS["options"]) for user in OUTSIDERS),
        *zip(users, REQUESTS.values(), strict=False),
    ]


NO_SUCH = f'FATAL 42704: timeline "{"*" * 32}/{"*" * 32}" does not exist'


@in_each_state
def test_it_makes_no_difference(state: Callable[[World], None], world: World) -> None:
    state(world)
    for user, request in some_of_each(STATES.index(state)):
        outcomes = {
            answers(world, user, request(ids), ids) for ids in (HIDDEN, NO_TENANT, NO_TIMELINE)
        }
        ((sent, logged),) = outcomes
        last = told(sent.encode("latin-1"))[-1]
        assert last == NO_SUCH
        assert logged.splitlines() == [
            *logged.splitlines()[:1],
            f"192.0.2.1:40000: {NO_SUCH} (this client may not see it)",
        ]
        assert re.search(rf"connection authorized: user={user.name} method=\w+ \(", logged)


@in_each_state
def test_it_makes_no_difference_to_a_bad_request(
    state: Callable[[World], None], world: World
) -> None:
    """It is told from a good one before it is looked whether the client may see anything."""
    state(world)
    for name, request in ILL_NAMED.items():
        outcomes = {
            answers(world, user, request(ids), ids)[0].removeprefix("R\0\0\0\x08\0\0\0\3")
            for ids in (HIDDEN, NO_TENANT, NO_TIMELINE)
            for user in (ALL, ALL_BY_TOKEN, OUTSIDERS[0], OUTSIDERS[-1])
        }
        ((line,),) = (told(sent.encode("latin-1")) for sent in outcomes)
        assert re.match("FATAL (28000|22023): ", line), name


@in_each_state
def test_before_authentication_it_does_not_matter_what_is_asked_for(
    state: Callable[[World], None], world: World
) -> None:
    """The answers do not even contain the IDs."""
    state(world)
    ways = (
        REQUESTS["options"],
        REQUESTS["pageserver"],
        ILL_NAMED["no tenant"],
        ILL_NAMED["a path"],
    )
    wanted = [{}, *(way(ids) for way, ids in product(ways, (HIDDEN, NO_TENANT)))]
    for user, said, expected in (
        ("bearer", b"", None),
        ("bearer", message(b"p", b"guessed\0"), "28P01: password authentication failed"),
        ("bearer", message(b"p", OF_ANOTHER_KEY + b"\0"), "28P01: password authentication failed"),
        ("none_by_rule", message(b"p", EXPIRED + b"\0"), "28P01: password authentication failed"),
        ("bearer", message(b"p", b"\0"), "28P01: empty password returned by client"),
        ("bearer", message(b"p", b""), "08P01: invalid password packet size"),
        ("bearer", query("IDENTIFY_SYSTEM"), "08P01: expected password response"),
        ("unwanted", b"", "28000: pg_hba.conf rejects replication connection"),
        ("unknown", b"", "28000: no pg_hba.conf entry for replication connection"),
    ):
        outcomes = set()
        for parameters in wanted:
            stranger = User(user, "", None, ())
            with world.nothing_touched():
                client = world.ask(stranger, parameters)
                client.transport.deliver(said)
            assert client.transport.disconnecting == (expected is not None)
            outcomes.add(bytes(client.transport.arrived))
        (sent,) = outcomes
        *asked_for, last = told(sent)
        if expected is None:
            assert (asked_for, last) == ([], "R 3")
        else:
            assert last.startswith(f"FATAL {expected}")


OF_ANOTHER_KEY = new_key().token(EVERYTHING).encode()
EXPIRED = token(**EVERYTHING, exp=1)

# --- What is seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [ALL, ALL_BY_TOKEN, *OUTSIDERS], ids=lambda user: user.name)
def test_each_sees_what_its_rule_and_its_token_allow(user: User, world: World) -> None:
    """It streams that; of the rest, there is nothing."""
    for ids in PRESENT:
        if ids in user.sees:
            client = world.streaming(ids, user)
            wal = b"".join(data for _, data in sorted(client.wal.items()))
            assert wal == the_wal().image[: COMMITTED - MB]
        else:
            sent, logged = answers(world, user, {"options": named(ids)}, ids)
            assert told(sent.encode("latin-1"))[-1] == NO_SUCH
            assert logged.endswith("(this client may not see it)")
    assert set(world.directory._timelines) == set(user.sees)


def test_what_it_may_see_is_looked_for(world: World) -> None:
    """It is told the same if there is nothing; the operator is not.  (And this is how it shows that
    something is looked for.)"""
    missing = TimelineIds(OWN.tenant_id, "9" * 32)
    limited = next(user for user in OUTSIDERS if user.name == "tenant")
    for user in (ALL, limited):
        with world.touched() as touched:
            client = world.ask(user, {"options": named(missing)})
        assert str(world.place(missing)) in touched
        assert without(client.hear()[0], missing) == NO_SUCH
        assert world.lines()[-1].endswith(f"(there is no directory {world.place(missing)})")


def test_who_may_see_it_is_told_what_is_wrong_and_nothing_of_others(world: World) -> None:
    """Its directory has got another one's control file."""
    with_anothers_control_file(world)
    client = world.ask(ALL, {"options": named(HIDDEN)})
    told_it = client.hear()[0]
    assert told_it == (
        'FATAL XX001: invalid control file "safekeeper.control": it is that of another timeline'
    )
    assert any(str(OWN) in line and str(HIDDEN) in line for line in world.lines())


@pytest.mark.parametrize("is_there", [True, False])
def test_nor_by_a_link_to_another(is_there: bool, world: World) -> None:
    linked_to_another(world)
    if not is_there:
        world.place(OWN).rename(world.top / "away")
    client = world.ask(ALL, {"options": named(HIDDEN)})
    assert without(client.hear()[0], HIDDEN) == NO_SUCH


# --- What goes on at the same time ---------------------------------------------------------------


def test_who_may_see_it_goes_on(world: World) -> None:
    """Others ask while it is opened, streamed, and waited for."""
    being_opened(world)
    (opening,) = world.factory.connections.values()
    ask_for_it(world)
    world.clock.advance(0)
    assert opening._session.is_greeted
    streaming = world.streaming()
    ask_for_it(world)
    world.open().advance(COMMITTED + 10_000)
    streaming.hear()
    assert sum(map(len, streaming.wal.values())) == COMMITTED + 10_000 - MB


def ask_for_it(world: World) -> None:
    for user, request in product(OUTSIDERS, REQUESTS.values()):
        sent, _ = answers(world, user, request(HIDDEN), HIDDEN)
        assert told(sent.encode("latin-1"))[-1] == NO_SUCH


def test_its_pageserver_is_still_its_own(world: World) -> None:
    a_pageservers(world)
    ask_for_it(world)
    assert world.pageservers.belongs_to(HIDDEN, "host=ps1")
    assert not world.pageservers.belongs_to(HIDDEN, "host=ps2")


def test_a_stream_that_has_begun_ends_with_the_timeline(world: World) -> None:
    """It was allowed, and is told the reason."""
    streamed(world)
    client = next(iter(world.factory.connections.values())).transport
    shutil.rmtree(world.place())
    world.directory._timelines[HIDDEN].look()
    world.clock.advance(0)
    assert told(bytes(client.arrived))[-1] == (
        f'FATAL 58P01: the directory of timeline "{HIDDEN}" was removed or replaced'
    )


@pytest.mark.parametrize("state", [streamed, being_opened, waiting_for_a_proposer])
def test_a_cancel_request_with_a_wrong_key(state: Callable[[World], None], world: World) -> None:
    """Nothing comes of it, and nothing comes back, whatever the process ID."""
    state(world)
    (pid,) = world.factory.connections
    for number, secret in product((pid, 10**6), (b"", bytes(4), bytes(32), b"wrong")):
        with world.nothing_touched():
            client = Client(world.factory, world.clock)
            client.transport.deliver(cancel_request(number, secret))
        assert client.transport.disconnecting
        assert not client.transport.arrived
    assert not world.factory.connections[pid].transport.disconnecting
