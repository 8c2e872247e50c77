"""How many clients there may be at once: ``max_wal_senders``."""

from __future__ import annotations

from typing import Any

from tests.fakes import (
    SSL_REQUEST,
    TERMINATE,
    MemoryTimeline,
    cancel_request,
    message,
    query,
    server,
    startup,
)
from tests.test_protocol import Connections
from tests.test_session import PASSWORD, Password


class Places(Connections):
    def allow(self, count: int, **options: Any) -> None:
        self.factory = server(self.timeline, self.clock, max_wal_senders=count, **options)

    def full(self, count: int, major: int = 18) -> list[str]:
        name = '"max_wal_senders"' if major >= 17 else "max_wal_senders"
        return [
            f"FATAL 53300: number of requested standby connections exceeds {name} "
            f"(currently {count})",
            "EOF",
        ]

    def test_there_are_ten_unless_it_is_said_otherwise(self) -> None:
        clients = [self.client() for _ in range(11)]
        answers = [client.start_up() for client in clients]
        self.assertEqual(answers, [["GREETING"]] * 10 + [self.full(10)])
        self.assertEqual(clients[0].send(query("SHOW max_wal_senders"))[1], "D 10")

    def test_each_major_says_it_in_its_way(self) -> None:
        for major in range(13, 19):
            self.factory = server(MemoryTimeline(major=major), self.clock, max_wal_senders=0)
            self.assertEqual(self.client().start_up(), self.full(0, major))

    def test_a_place_is_free_as_soon_as_its_connection_ends(self) -> None:
        self.allow(1)
        ways: dict[str, Any] = {
            "Terminate": lambda client: client.send(TERMINATE),
            "connection lost": lambda client: client.transport.drop(),
            "half of it lost": lambda client: client.protocol.readConnectionLost(),
            "FATAL": lambda client: client.send(b"\xff"),
            "termination": lambda client: client.protocol.terminate(),
            "abort": lambda client: (client.protocol.abort(), client.hear()),
            "silence": lambda client: client.wait(60),
        }
        for name, leave in ways.items():
            client = self.client()
            self.assertEqual(client.stream()[0], "W", name)
            self.assertEqual(self.client().start_up(), self.full(1))
            leave(client)
        client = self.client(capacity=10_000)
        client.send(startup(), TERMINATE)  # it has not taken its greeting yet, and lingers
        self.assertTrue(client.transport.is_connected)
        self.assertEqual(self.client().start_up(), ["GREETING"])

    def test_who_is_not_authenticated_has_none(self) -> None:
        """So nobody is kept out by those who never will be; nor do they hear how full it is."""
        self.allow(1, authenticator=Password())
        first = self.client()
        self.assertEqual(first.start_up(), ["R 3"])
        second = self.client()
        self.assertEqual(second.start_up(), ["R 3"])
        self.assertEqual(second.send(PASSWORD), ["GREETING"])
        self.assertEqual(first.send(message(b"p", b"x\0")), ["FATAL 28000: no", "EOF"])
        third = self.client()
        self.assertEqual(third.start_up(), ["R 3"])
        self.assertEqual(third.send(PASSWORD), self.full(1))

    def test_others_have_none(self) -> None:
        """Those who have not said what they want, who want to cancel, who are no replicas."""
        self.allow(1)
        others = [self.client() for _ in range(3)]
        others[0].send(SSL_REQUEST)
        self.assertEqual(others[1].start_up(replication="false")[0], "R 0")
        self.assertEqual(others[2].start_up(replication="database")[0], "R 0")
        streaming = self.streaming()
        self.assertEqual(self.client().send(cancel_request(*streaming.key)), ["EOF"])
        self.assertEqual(streaming.hear()[-1], "Z I")
        self.assertEqual(others[0].start_up(), self.full(1))
