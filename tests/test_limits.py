"""How many may be connected who have not authenticated, and what each of them costs."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address as Endpoint4
from twisted.internet.address import IPv6Address as Endpoint6
from twisted.internet.address import UNIXAddress
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from tests.fakes import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    TERMINATE,
    MemoryTimeline,
    MemoryTransport,
    SlowTimeline,
    cancel_request,
    message,
    query,
    server,
    startup,
    told,
)
from tests.test_session import PASSWORD, Password
from walproto.access.limits import Unauthenticated
from walproto.server.factory import TOO_MANY, WalSenderFactory
from walproto.server.protocol import LINGER

Address = IPv4Address | IPv6Address | None

THIS_MACHINE = [None, ip_address("127.0.0.1"), ip_address("127.9.9.9"), ip_address("::1")]
STRANGERS = [ip_address(f"192.0.2.{number}") for number in range(3)]
NETWORK = [ip_address(f"2001:db8::{number:x}:1") for number in range(3)]
ANOTHER_NETWORK = ip_address("2001:db8:0:1::1")


# --- Counting ------------------------------------------------------------------------------------


def test_there_is_a_bound_for_each_address_and_one_for_all() -> None:
    one, two, _ = STRANGERS
    limits = Unauthenticated(5, 2)
    assert [limits.enter(one) for _ in range(3)] == [True, True, False]
    assert [limits.enter(two) for _ in range(3)] == [True, True, False]
    assert len(limits) == 4
    assert limits.enter(ANOTHER_NETWORK)
    for address in (*STRANGERS, *NETWORK):
        assert not limits.enter(address)
    assert len(limits) == 5
    limits.leave(ANOTHER_NETWORK)
    assert not limits.enter(one)
    limits.leave(two)
    assert limits.enter(two)
    assert len(limits) == 4


def test_a_network_of_ipv6_addresses_counts_as_one() -> None:
    limits = Unauthenticated(100, 3)
    assert [limits.enter(address) for address in NETWORK] == [True] * 3
    assert not limits.enter(ip_address("2001:db8::ffff:ffff:ffff:ffff"))
    assert limits.enter(ANOTHER_NETWORK)
    assert limits.enter(ip_address("2001:db7:ffff:ffff:ffff:ffff:ffff:ffff"))
    limits.leave(ip_address("2001:db8::5"))  # it is the network that counts
    assert limits.enter(NETWORK[0])


def test_this_machine_has_places_of_its_own() -> None:
    """As many as there are for all others, who do not keep it out; nor does it them."""
    limits = Unauthenticated(len(THIS_MACHINE) * 3, 1)
    assert limits.enter(STRANGERS[0])
    for address in THIS_MACHINE * 3:
        assert limits.enter(address)
    for address in (*THIS_MACHINE, STRANGERS[0]):
        assert not limits.enter(address)
    assert limits.enter(STRANGERS[1])


ADDRESSES = [*THIS_MACHINE, *STRANGERS, *NETWORK, ANOTHER_NETWORK]


def network_of(address: Address) -> object:
    """What counts as one address, said otherwise than in walproto."""
    if address is None or address in THIS_MACHINE:
        return None
    return address.exploded[:19] if isinstance(address, IPv6Address) else address


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.lists(st.tuples(st.booleans(), st.sampled_from(ADDRESSES)), max_size=80),
)
def test_counts_are_never_wrong_and_never_negative(
    total: int, each: int, steps: list[tuple[bool, Address]]
) -> None:
    limits = Unauthenticated(total, each)
    model: Counter[object] = Counter()
    inside: list[Address] = []
    for leaves, address in steps:
        network = network_of(address)
        if leaves:
            if address in inside:
                inside.remove(address)
                limits.leave(address)
                model[network] -= 1
        else:
            near, all_told = model[None], model.total()
            fits = near < total if network is None else all_told - near < total
            fits &= network is None or model[network] < each
            assert limits.enter(address) == fits
            if fits:
                inside.append(address)
                model[network] += 1
        assert len(limits) == len(inside) == model.total() <= 2 * total
    for address in inside:
        limits.leave(address)
    assert len(limits) == 0
    assert [limits.enter(STRANGERS[0]) for _ in range(each)] == [
        number < total for number in range(each)
    ]


# --- Connections ---------------------------------------------------------------------------------


class Connection:
    """A connection to the factory from some address, as a reactor makes it."""

    def __init__(self, factory: WalSenderFactory, clock: Clock, address: Any) -> None:
        self.clock = clock
        self.transport = MemoryTransport(clock)
        self.transport.getPeer = lambda: address  # type: ignore[method-assign]
        self.protocol = factory.buildProtocol(address)
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)

    def send(self, *data: bytes) -> list[str]:
        self.transport.deliver(b"".join(data))
        return self.told

    @property
    def told(self) -> list[str]:
        """All that it was told; ``EOF`` if that is the end."""
        self.clock.advance(0)
        return told(bytes(self.transport.arrived)) + ["EOF"] * (not self.transport.is_connected)


STRANGER = Endpoint4("TCP", "192.0.2.1", 40000)
REFUSED = ["FATAL 53300: sorry, too many clients already", "EOF"]
TIMEOUT = 60


class Server:
    """A factory whose clients need a password."""

    def __init__(self, timeline: Any = None, **options: Any) -> None:
        self.clock = Clock()
        options.setdefault("authenticator", Password())
        self.factory = server(timeline or MemoryTimeline(), self.clock, **options)

    def connect(self, address: Any = STRANGER) -> Connection:
        return Connection(self.factory, self.clock, address)

    @property
    def places_taken(self) -> int:
        return len(self.factory.unauthenticated)

    def assert_nothing_is_left(self) -> None:
        assert self.places_taken == 0
        assert self.factory.connections == {}
        assert self.clock.getDelayedCalls() == []


def test_who_finds_no_place_is_told_at_once_and_nothing_is_read_of_it() -> None:
    server = Server(max_unauthenticated_per_address=2)
    first, second = server.connect(), server.connect()
    with capturedLogs() as events:
        third = server.connect()
    assert third.told == REFUSED
    assert [formatEvent(event) for event in events] == [
        f"192.0.2.1:40000: FATAL 53300: sorry, too many clients already ({TOO_MANY.log})"
    ]
    assert third.protocol not in server.factory.connections.values()
    assert server.connect(Endpoint4("TCP", "192.0.2.2", 1)).told == []
    assert first.send(startup(), PASSWORD)[1:] == ["GREETING"]
    assert server.connect().told == []
    assert server.connect().told == REFUSED
    for _ in range(5):
        assert server.connect(Endpoint4("TCP", "127.0.0.1", 1)).told == []
        assert server.connect(UNIXAddress(None)).told == []
    assert second.told == []


def test_the_bound_for_all_holds_for_everybody_elsewhere_and_for_everybody_here() -> None:
    server = Server(max_unauthenticated=2)
    elsewhere = (
        STRANGER,
        Endpoint6("TCP", "2001:db8::1", 1),
        Endpoint6("TCP", "2001:db9::1", 1),
    )
    here = (
        Endpoint6("TCP", "::1", 1),
        Endpoint4("TCP", "127.0.0.1", 1),
        UNIXAddress("/a socket"),
    )
    for everybody in (elsewhere, here):
        clients = [server.connect(address) for address in everybody]
        assert [client.told for client in clients] == [[], [], REFUSED]
    clients[1].transport.drop()
    assert server.connect(STRANGER).told == REFUSED
    assert server.connect(UNIXAddress(None)).told == []
    assert server.places_taken == 4


def test_an_ipv4_address_within_an_ipv6_one_is_an_ipv4_address() -> None:
    server = Server(max_unauthenticated_per_address=1)
    assert server.connect(Endpoint6("TCP", "::ffff:192.0.2.1", 1)).told == []
    assert server.connect().told == REFUSED
    assert server.connect(Endpoint6("TCP", "::ffff:192.0.2.2", 1)).told == []
    for _ in range(3):
        assert server.connect(Endpoint6("TCP", "::ffff:127.0.0.1", 1)).told == []


ENDS: dict[str, Any] = {
    "it goes": lambda client: client.transport.drop(),
    "it goes in the middle": lambda client: (
        client.send(startup()[:7]),
        client.transport.drop(),
    ),
    "it is silent": lambda client: client.clock.advance(TIMEOUT),
    "it is silent after a request for encryption": lambda client: (
        client.send(SSL_REQUEST),
        client.clock.advance(TIMEOUT),
    ),
    "it says nonsense": lambda client: client.send(b"nonsense"),
    "it begins with TLS": lambda client: client.send(bytes.fromhex("16030100")),
    "it asks for encryption twice": lambda client: client.send(SSL_REQUEST, SSL_REQUEST),
    "it sends something behind the request": lambda client: client.send(GSSENC_REQUEST, b"x"),
    "it cancels": lambda client: client.send(cancel_request(1, b"1234")),
    "it speaks another version": lambda client: client.send(startup(2 << 16)),
    "it is nobody": lambda client: client.send(startup(user="")),
    "its password is wrong": lambda client: client.send(startup(), message(b"p", b"wrong\0")),
    "it does not answer": lambda client: (client.send(startup()), client.clock.advance(TIMEOUT)),
    "it answers otherwise": lambda client: client.send(startup(), query("SELECT 1")),
    "it answers too much": lambda client: client.send(startup(), b"p" + b"\x7f" * 4),
    "it changes its mind": lambda client: client.send(startup(), TERMINATE),
    "the server is shut down": lambda client: client.protocol.shut_down(),
    "it is disconnected": lambda client: client.protocol.abort(),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_place_is_free_when_its_connection_ends(end: str) -> None:
    server = Server(max_unauthenticated=1, authentication_timeout=TIMEOUT)
    for _ in range(3):
        client = server.connect()
        assert server.places_taken == 1
        assert server.connect().told == REFUSED
        ENDS[end](client)
        assert client.told[-1] == "EOF"
        server.assert_nothing_is_left()


def test_a_place_is_free_when_who_had_it_is_let_in() -> None:
    """Whatever becomes of it then, the place is not given back once more."""
    for end in ENDS:
        if "it goes" not in end and "server" not in end and "disconnected" not in end:
            continue
        server = Server(max_unauthenticated=1)
        client = server.connect()
        assert client.send(startup()) == ["R 3"]
        assert server.places_taken == 1
        assert client.send(PASSWORD)[-1] == "GREETING"
        assert server.places_taken == 0
        another = server.connect()
        assert server.places_taken == 1
        ENDS[end](client)
        assert client.told[-1] == "EOF"
        assert server.places_taken == 1
        another.transport.drop()
        server.assert_nothing_is_left()


def test_so_it_is_while_what_there_is_to_serve_is_looked_for() -> None:
    slow = SlowTimeline(MemoryTimeline())
    server = Server(slow, max_unauthenticated=1)
    client = server.connect()
    assert client.send(startup(), PASSWORD) == ["R 3"]
    assert server.places_taken == 0
    # It may well take so long that the client is given up; it is known who it is all the same.
    server.clock.advance(TIMEOUT)
    assert client.told == ["R 3", "EOF"]
    server.assert_nothing_is_left()


def test_who_does_not_take_its_refusal_has_a_place_until_it_is_cut_off() -> None:
    server = Server(max_unauthenticated=1)
    client = server.connect()
    client.transport.capacity = 10
    client.send(b"nonsense")
    assert server.connect().told == REFUSED
    server.clock.advance(LINGER)
    assert client.told == ["EOF"]
    server.assert_nothing_is_left()


# --- What it costs -------------------------------------------------------------------------------

PACKET = startup(user="x" * 9900)
TAKEN = {
    "a startup packet": (b"", PACKET[:-1]),
    "a password": (startup(), message(b"p", b"x" * 65_500)[:-1]),
    "another message": (startup(), message(b"Q", b"x" * 65_500)[:-1]),
}
FLOOD = 4 << 20
CLIENTS = 20


def held(
    server: Server, greeting: bytes, data: bytes, piece: int, *, capacity: int | None = None
) -> int:
    """The bytes that so many connections take on the average, which have sent all this in pieces,
    and of what they are told have taken no more than the ``capacity``."""
    clients = [server.connect() for _ in range(CLIENTS)]
    for client in clients:
        client.transport.capacity = capacity
        client.send(greeting)
    tracemalloc.start()
    for start in range(0, len(data), piece):
        for client in clients:
            if client.transport.is_reading:
                client.transport.deliver(data[start : start + piece])
    server.clock.advance(0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size // CLIENTS


@pytest.mark.parametrize("piece", [1000, 65_536])
@pytest.mark.parametrize("what", TAKEN)
def test_as_much_is_held_of_a_client_as_it_takes_to_know_who_it_is(what: str, piece: int) -> None:
    """One packet or message, and that is a buffer which has grown with it."""
    greeting, data = TAKEN[what]
    server = Server(max_unauthenticated_per_address=CLIENTS)
    assert len(data) / 2 < held(server, greeting, data, piece) < len(data) * 1.5 + 4096
    assert server.places_taken == CLIENTS


@pytest.mark.parametrize(
    ("greeting", "flood"),
    [
        (b"", SSL_REQUEST + GSSENC_REQUEST + startup(2 << 16)),
        (b"", startup() + message(b"p", b"wrong\0")),
        (b"", bytes.fromhex("00002718 00030000") + b"x" * 10_000),
        (startup(), message(b"p", b"x" * 60_000)),
        (startup(), query("SELECT 1")),
        (startup(), b"p\xff\xff\xff\xff"),
        (startup(), b"\0"),
    ],
)
def test_a_flood_leaves_nothing_behind(greeting: bytes, flood: bytes) -> None:
    """It goes on, for it is not heard that it is over."""
    server = Server(max_unauthenticated_per_address=CLIENTS)
    data = flood * (FLOOD // len(flood) // CLIENTS)
    assert held(server, greeting, data, 65_536, capacity=10) < 32_768
    assert server.places_taken == CLIENTS
    server.clock.advance(LINGER)
    server.clock.advance(0)
    server.assert_nothing_is_left()
