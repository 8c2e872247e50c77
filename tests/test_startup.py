"""How a connection begins: requests for encryption, protocol versions, parameters, cancellation.

Most of it are transcripts of what a client says and a server of some major answers.
"""

from __future__ import annotations

import struct

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import (
    COPY_DONE,
    GSSENC_REQUEST,
    SSL_REQUEST,
    START,
    Client,
    MemoryTimeline,
    cancel_request,
    parameter_statuses,
    query,
    server,
    startup,
    startup_packet,
    status,
)
from walproto.errors import ReportedError
from walproto.wire.messages import PROTOCOL_3_0, PROTOCOL_3_2
from walproto.wire.startup import Cancellation, EncryptionRequest, Startup, parse_startup_packet

VERSION_3_0 = 3 << 16
LAYOUT = "FATAL 08P01: invalid startup packet layout: expected terminator as last byte"
UNENCRYPTED = (
    "D: This could be either a client-software bug or evidence of an attempted "
    "man-in-the-middle attack."
)
BAD_REPLICATION = (
    'FATAL 22023: invalid value for parameter "replication": "{}" | '
    'H: Valid values are: "false", 0, "true", 1, "database".'
)
NO_DATABASE = (
    "FATAL 0A000: this server accepts only physical replication connections | "
    "D: There is no database behind it. | "
    "H: Connect with replication=true in the connection string."
)


class Conversation(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.timelines = {major: MemoryTimeline(major=major) for major in range(13, 19)}
        self.timeline = self.timelines[18]
        self.factories = {
            major: server(timeline, self.clock) for major, timeline in self.timelines.items()
        }
        self.factory = self.factories[18]

    def tearDown(self) -> None:
        self.assertEqual(self.flushLoggedErrors(), [])

    def client(self, major: int = 18) -> Client:
        return Client(self.factories[major], self.clock)

    def answer(self, *data: bytes, major: int = 18) -> list[str]:
        return self.client(major).send(*data)


class Encryption(Conversation):
    def test_each_kind_is_refused_once(self) -> None:
        client = self.client()
        self.assertEqual(client.send(SSL_REQUEST), ["N"])
        self.assertEqual(client.send(GSSENC_REQUEST), ["N"])
        self.assertEqual(client.start_up(), ["GREETING"])
        client = self.client()
        self.assertEqual(client.send(GSSENC_REQUEST), ["N"])
        self.assertEqual(client.send(SSL_REQUEST), ["N"])
        self.assertEqual(client.send(startup(3 << 16 | 3))[0], "v 3.2")

    def test_and_no_second_time(self) -> None:
        for request, code in ((SSL_REQUEST, 5679), (GSSENC_REQUEST, 5680)):
            for between in ((), (SSL_REQUEST if code == 5680 else GSSENC_REQUEST,)):
                client = self.client()
                for each in (request, *between):
                    self.assertEqual(client.send(each), ["N"])
                self.assertEqual(
                    client.send(request),
                    [
                        f"FATAL 0A000: unsupported frontend protocol 1234.{code}: "
                        "server supports 3.0 to 3.2",
                        "EOF",
                    ],
                )

    def test_nothing_may_come_before_the_answer(self) -> None:
        for request, name in ((SSL_REQUEST, "SSL"), (GSSENC_REQUEST, "GSSAPI encryption")):
            for behind in (startup(), b"\x16", SSL_REQUEST + startup()):
                self.assertEqual(
                    self.answer(request, behind),
                    [
                        "N",
                        f"FATAL 08P01: received unencrypted data after {name} request | "
                        + UNENCRYPTED,
                        "EOF",
                    ],
                )

    def test_a_longer_request_is_taken_too(self) -> None:
        client = self.client()
        self.assertEqual(client.send(startup_packet(80877103, b"more")), ["N"])
        self.assertEqual(client.start_up(), ["GREETING"])

    def test_a_tls_handshake_without_asking_is_no_startup_packet(self) -> None:
        *refusal, end = self.answer(bytes.fromhex("160301020001000001fc0303"))
        self.assertEqual(end, "EOF")
        self.assertEqual(len(refusal), 1)


class Versions(Conversation):
    def test_3_0_to_3_2_are_spoken(self) -> None:
        for minor in (0, 1, 2):
            self.assertEqual(self.answer(startup(3 << 16 | minor)), ["GREETING"])

    def test_newer_ones_are_negotiated_down(self) -> None:
        for minor in (3, 9999, 65535):
            self.assertEqual(self.answer(startup(3 << 16 | minor)), ["v 3.2", "GREETING"])

    def test_before_18_to_3_0(self) -> None:
        for major in range(13, 18):
            self.assertEqual(self.answer(startup(), major=major), ["GREETING"])
            for minor in (1, 2, 9999):
                self.assertEqual(
                    self.answer(startup(3 << 16 | minor), major=major), ["v 3.0", "GREETING"]
                )

    def test_protocol_options_are_named_as_unknown(self) -> None:
        for minor, negotiated in ((0, 0), (1, 1), (2, 2), (3, 2), (9999, 2)):
            self.assertEqual(
                self.answer(startup(3 << 16 | minor, **{"_pq_.b": "1", "_pq_.a": "2"})),
                [f"v 3.{negotiated} _pq_.b _pq_.a", "GREETING"],
            )
        self.assertEqual(
            self.answer(startup(3 << 16 | 2, **{"_pq_.x": "1"}), major=15),
            ["v 3.0 _pq_.x", "GREETING"],
        )
        self.assertEqual(self.answer(startup(**{"_pq_.": "1"})), ["v 3.0 _pq_.", "GREETING"])

    def test_what_only_looks_like_one_is_a_parameter(self) -> None:
        self.assertEqual(self.answer(startup(**{"_PQ_.x": "1"})), ["GREETING"])
        self.assertEqual(
            self.answer(startup(_pq_="1"))[-2:],
            ['FATAL 42704: unrecognized configuration parameter "_pq_"', "EOF"],
        )

    def test_no_other_version_is_spoken(self) -> None:
        for version in (0, 1 << 16, 2 << 16, 4 << 16, 4 << 16 | 1, 5 << 16 | 7, 1234 << 16 | 5681):
            for major, newest in ((18, 2), (15, 0)):
                self.assertEqual(
                    self.answer(startup(version), major=major),
                    [
                        f"FATAL 0A000: unsupported frontend protocol "
                        f"{version >> 16}.{version & 0xFFFF}: server supports 3.0 to 3.{newest}",
                        "EOF",
                    ],
                )

    def test_keys_are_longer_with_3_2(self) -> None:
        for major, minor, length in (
            *((18, 0, 4), (18, 1, 4), (18, 2, 32), (18, 3, 32)),
            *((17, 0, 4), (17, 2, 4), (17, 9999, 4)),
        ):
            client = self.client(major)
            client.send(startup(3 << 16 | minor))
            self.assertEqual(len(client.key[1]), length)


class Layout(Conversation):
    def test_a_packet_has_to_end_with_a_terminator(self) -> None:
        pairs = b"user\0postgres\0replication\0true\0"
        for contents in (
            *(b"", pairs, pairs + b"\0\0", pairs + b"\0x", pairs[:-1], b"user\0postgres\0x\0"),
            *(b"\0\0", b"\0x\0\0", b"user"),
        ):
            self.assertEqual(self.answer(startup_packet(VERSION_3_0, contents)), [LAYOUT, "EOF"])

    def test_a_name_without_a_value_has_an_empty_one(self) -> None:
        self.assertEqual(
            self.answer(startup_packet(VERSION_3_0, b"user\0postgres\0replication\0\0\0")),
            [BAD_REPLICATION.format(""), "EOF"],
        )

    def test_the_length_has_limits(self) -> None:
        for length in (0, 3, 4, 7, 10_005, 2**32 - 1, int.from_bytes(b"GET ", "big")):
            self.assertEqual(
                self.answer(struct.pack(">I", length)),
                ["FATAL 08P01: invalid length of startup packet", "EOF"],
            )
        for length in (8, 10_000, 10_004):
            self.assertEqual(self.answer(struct.pack(">I", length)), [])

    def test_a_packet_may_be_as_long_as_the_limit(self) -> None:
        name = b"user\0postgres\0replication\0true\0application_name\0"
        contents = name + b"x" * (10_004 - 8 - len(name) - 2) + b"\0\0"
        self.assertEqual(self.answer(startup_packet(VERSION_3_0, contents)), ["GREETING"])

    def test_nobody_has_five_hundred_parameters(self) -> None:
        too_many = ["FATAL 08P01: too many parameters in startup packet", "EOF"]
        for count, answer in ((496, ["GREETING"]), (497, too_many), (3000, too_many)):
            pairs = b"user\0postgres\0replication\0true\0"
            repeated = b"application_name\0x\0" if count < 500 else b"a\0\0"
            contents = pairs + repeated * count + b"\0"
            self.assertEqual(self.answer(startup_packet(VERSION_3_0, contents)), answer)

    def test_a_client_may_leave_in_the_middle(self) -> None:
        for size in (0, 2, 20):
            client = self.client()
            self.assertEqual(client.send(startup()[:size]), [])
            client.transport.drop()
            self.assertEqual(client.hear(), ["EOF"])
            self.assertEqual(self.factory.connections, {})


class Parameters(Conversation):
    def test_a_user_must_be_named(self) -> None:
        for contents in (b"\0", b"replication\0true\0\0", b"user\0\0\0"):
            self.assertEqual(
                self.answer(startup_packet(VERSION_3_0, contents)),
                ["FATAL 28000: no PostgreSQL user name specified in startup packet", "EOF"],
            )

    def test_replication_is_a_boolean(self) -> None:
        for value in ("true", "t", "tr", "TRUE", "on", "1", "YES", "y"):
            self.assertEqual(self.answer(startup(replication=value)), ["GREETING"])

    def test_or_not(self) -> None:
        for value in ("bogus", "o", "DataBase", "DATABASE", "databas", "", "2", "d", " true"):
            self.assertEqual(
                self.answer(startup(replication=value)), [BAD_REPLICATION.format(value), "EOF"]
            )

    def test_without_replication_there_is_nothing_here(self) -> None:
        for value in ("false", "of", "off", "f", "0", "no", "database"):
            self.assertEqual(self.answer(startup(replication=value)), ["R 0", NO_DATABASE, "EOF"])
        self.assertEqual(
            self.answer(startup_packet(VERSION_3_0, b"user\0postgres\0database\0postgres\0\0")),
            ["R 0", NO_DATABASE, "EOF"],
        )

    def test_with_replication_the_database_does_not_matter(self) -> None:
        self.assertEqual(self.answer(startup(database="nonexistent")), ["GREETING"])

    def test_the_last_of_two_counts(self) -> None:
        client = self.client()
        contents = (
            b"user\0nobody\0replication\0bogus\0replication\0true\0user\0postgres\0"
            b"application_name\0a\0application_name\0b\0options\0--foo\0options\0-c geqo=off\0\0"
        )
        self.assertEqual(client.send(startup_packet(VERSION_3_0, contents)), ["GREETING"])
        reported = parameter_statuses(bytes(client.transport.arrived))
        self.assertEqual(reported["session_authorization"], "postgres")
        self.assertEqual(reported["application_name"], "b")

    def test_a_parameter_beats_options(self) -> None:
        client = self.client()
        client.start_up(wal_sender_timeout="2s", options="-c wal_sender_timeout=1s")
        self.assertEqual(client.send(query("SHOW wal_sender_timeout"))[1], "D 2s")

    def test_bad_ones_are_told_of_behind_authentication(self) -> None:
        for name, value, expected in (
            ("nosuchguc", "1", '42704: unrecognized configuration parameter "nosuchguc"'),
            ("server_version", "1", '55P02: parameter "server_version" cannot be changed'),
            ("client_encoding", "x", '22023: invalid value for parameter "client_encoding": "x"'),
            ("options", "--foo", "42601: --foo requires a value"),
            ("options", "-c nosuch=1", '42704: unrecognized configuration parameter "nosuch"'),
        ):
            self.assertEqual(
                self.answer(startup(**{name: value})), ["R 0", f"FATAL {expected}", "EOF"]
            )

    def test_options_come_before_parameters(self) -> None:
        self.assertEqual(
            self.answer(startup(nosuch1="1", options="-c nosuch2=1")),
            ["R 0", 'FATAL 42704: unrecognized configuration parameter "nosuch2"', "EOF"],
        )

    def test_a_client_is_told_the_parameters(self) -> None:
        common = {
            "DateStyle": "ISO, MDY",
            "IntervalStyle": "postgres",
            "TimeZone": "Etc/UTC",
            "application_name": "",
            "client_encoding": "UTF8",
            "integer_datetimes": "on",
            "is_superuser": "on",
            "server_encoding": "SQL_ASCII",
            "session_authorization": "somebody",
            "standard_conforming_strings": "on",
        }
        added = {
            14: {"default_transaction_read_only": "off", "in_hot_standby": "off"},
            16: {"scram_iterations": "4096"},
            18: {"search_path": '"$user", public'},
        }
        for major in range(13, 19):
            common |= added.get(major, {})
            client = self.client(major)
            self.assertEqual(client.start_up(user="somebody", client_encoding="utf8"), ["GREETING"])
            reported = parameter_statuses(bytes(client.transport.arrived))
            self.assertEqual(reported.pop("server_version"), f"{major}.0 (walproto)")
            self.assertEqual(reported, common)

    def test_the_version_may_be_said_to_be_another(self) -> None:
        factory = server(self.timeline, self.clock, server_version="15.18 (Debian)")
        client = Client(factory, self.clock)
        self.assertEqual(client.send(startup(3 << 16 | 2)), ["v 3.0", "GREETING"])
        reported = parameter_statuses(bytes(client.transport.arrived))
        self.assertEqual(reported["server_version"], "15.18 (Debian)")
        self.assertNotIn("search_path", reported)
        self.assertEqual(client.send(query("SHOW server_version_num"))[1], "D 150018")

    def test_what_is_sent_behind_the_packet_is_answered(self) -> None:
        answers = self.answer(startup(), query("SHOW block_size"))
        self.assertEqual(answers, ["GREETING", "T block_size:25(-1)", "D 8192", "C SHOW", "Z I"])


class NotReady(Conversation):
    def test_until_the_timeline_is_ready_nobody_comes_in(self) -> None:
        starting = "FATAL 57P03: the database system is starting up"
        self.timeline.is_ready = False
        self.assertEqual(self.answer(startup()), [starting, "EOF"])
        self.assertEqual(self.answer(startup(3 << 16 | 3)), ["v 3.2", starting, "EOF"])
        self.assertEqual(self.answer(startup(replication="false")), [starting, "EOF"])
        self.assertEqual(self.answer(startup(nosuch="1")), [starting, "EOF"])
        self.timeline.is_ready = True
        self.assertEqual(self.answer(startup()), ["GREETING"])

    def test_what_is_wrong_with_the_packet_is_told_first(self) -> None:
        self.timeline.is_ready = False
        self.assertEqual(self.answer(startup(replication="x"))[0], BAD_REPLICATION.format("x"))
        self.assertEqual(
            self.answer(startup(user=""))[0],
            "FATAL 28000: no PostgreSQL user name specified in startup packet",
        )
        self.assertEqual(
            self.answer(startup(4 << 16))[0],
            "FATAL 0A000: unsupported frontend protocol 4.0: server supports 3.0 to 3.2",
        )
        self.assertEqual(self.answer(SSL_REQUEST), ["N"])


class Cancelling(Conversation):
    def cancel(self, pid: int, key: bytes, *before: bytes) -> list[str]:
        client = self.client()
        for each in before:
            client.send(each)
        return client.send(cancel_request(pid, key))[-1:]

    def test_the_right_key_ends_a_stream_and_leaves_the_connection(self) -> None:
        for version in (0, 2):
            victim = self.client()
            victim.send(startup(3 << 16 | version))
            victim.send(query(f"START_REPLICATION 0/{START:X}"))
            self.assertEqual(len(self.timeline.replicas), 1)
            self.assertEqual(self.cancel(*victim.key), ["EOF"])
            self.assertEqual(
                victim.hear(), ["ERROR 57014: canceling statement due to user request", "Z I"]
            )
            self.assertEqual(len(self.timeline.replicas), 0)
            self.assertEqual(victim.send(status(START, reply=1), COPY_DONE), [])
            self.assertEqual(victim.send(query("IDENTIFY_SYSTEM"))[-1], "Z I")
            self.assertEqual(victim.send(query(f"START_REPLICATION 0/{START:X}"))[0], "W")
            victim.transport.drop()

    def test_so_it_does_behind_a_request_for_encryption(self) -> None:
        victim = self.client()
        victim.stream()
        self.assertEqual(self.cancel(*victim.key, SSL_REQUEST), ["EOF"])
        self.assertEqual(victim.hear()[-1], "Z I")

    def test_a_wrong_key_does_nothing(self) -> None:
        victim = self.client()
        victim.stream()
        pid, key = victim.key
        wrong = bytes([key[0] ^ 1]) + key[1:]
        for other_pid, other_key in (
            *((pid, wrong), (pid, b""), (pid, key[:2]), (pid, key + key), (pid, b"\0" * 300)),
            *((pid + 1000, key), (0, key), (2**32 - 1, key)),
        ):
            self.assertEqual(self.cancel(other_pid, other_key), ["EOF"])
            self.assertEqual(victim.hear(), [])
        self.assertEqual(victim.send(status(START, reply=1))[-1][:1], "k")

    def test_an_idle_connection_does_not_notice(self) -> None:
        victim = self.client()
        victim.start_up()
        self.assertEqual(self.cancel(*victim.key), ["EOF"])
        self.assertEqual(victim.hear(), [])
        self.assertEqual(victim.send(query("SHOW block_size"))[1], "D 8192")

    def test_a_connection_that_has_no_key_yet_has_no_key(self) -> None:
        self.client()
        victim = self.client()
        for pid in list(self.factory.connections):
            self.assertEqual(self.cancel(pid, b""), ["EOF"])
        self.assertEqual(victim.start_up(), ["GREETING"])

    def test_no_two_keys_are_alike(self) -> None:
        self.factories[18] = server(self.timeline, self.clock, max_wal_senders=20)
        keys = set()
        for _ in range(20):
            client = self.client()
            client.start_up()
            keys.add(client.key)
        self.assertEqual(len({pid for pid, _ in keys}), 20)
        self.assertEqual(len({key for _, key in keys}), 20)


class Parsed(SynchronousTestCase):
    """The values that a packet comes to."""

    def parse(self, packet: bytes, newest: int = PROTOCOL_3_2) -> object:
        return parse_startup_packet(packet[4:], newest)

    def test_requests(self) -> None:
        self.assertEqual(self.parse(SSL_REQUEST), EncryptionRequest(80877103))
        self.assertEqual(self.parse(GSSENC_REQUEST), EncryptionRequest(80877104))
        self.assertEqual(self.parse(cancel_request(7, b"key!")), Cancellation(7, b"key!"))
        with self.assertRaises(ReportedError) as caught:
            self.parse(startup_packet(80877102, b""))
        self.assertTrue(caught.exception.fatal)

    def test_a_walreceivers_startup(self) -> None:
        contents = (
            b"user\0postgres\0database\0replication\0replication\0true\0"
            b"application_name\0walreceiver\0\0"
        )
        self.assertEqual(
            self.parse(startup_packet(VERSION_3_0, contents)),
            Startup(
                user="postgres",
                database="replication",
                replication=True,
                options="",
                parameters=(("application_name", "walreceiver"),),
                long_keys=False,
            ),
        )

    def test_the_database_is_that_of_the_user_if_none_is_named(self) -> None:
        parsed = self.parse(startup(), PROTOCOL_3_0)
        assert isinstance(parsed, Startup)
        self.assertEqual(parsed.database, "postgres")
