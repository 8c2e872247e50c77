"""What each replication command is answered, by the major that the server says it is: transcripts,
as real servers gave them to the same commands when they had no slots."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import START, SYSTEM, Client, MemoryTimeline, query, server
from walproto.lsn import format_lsn

MAJORS = range(13, 19)
SQL = "cannot execute SQL commands in WAL sender for physical replication"


class Answers(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.timelines = {major: MemoryTimeline(major=major) for major in MAJORS}
        self.timeline = self.timelines[18]
        self.factories = {
            major: server(timeline, self.clock) for major, timeline in self.timelines.items()
        }

    def tearDown(self) -> None:
        self.assertEqual(self.flushLoggedErrors(), [])

    def client(self, major: int = 18) -> Client:
        client = Client(self.factories[major], self.clock)
        self.assertEqual(client.start_up(), ["GREETING"])
        return client

    def answer(self, text: str, major: int = 18) -> list[str]:
        return self.client(major).send(query(text))

    def test_identify_system(self) -> None:
        end = format_lsn(self.timeline.commit_lsn)
        for major in MAJORS:
            timeline = "timeline:20(8)" if major >= 16 else "timeline:23(4)"
            self.assertEqual(
                self.answer("IDENTIFY_SYSTEM", major),
                [
                    f"T systemid:25(-1) {timeline} xlogpos:25(-1) dbname:25(-1)",
                    f"D {SYSTEM} 1 {end} NULL",
                    "C IDENTIFY_SYSTEM",
                    "Z I",
                ],
            )

    def test_it_tells_of_the_present(self) -> None:
        client = self.client()
        client.send(query("IDENTIFY_SYSTEM"))
        self.timeline.switch(START + 8192)
        self.timeline.commit(START + 16384)
        self.assertEqual(
            client.send(query("IDENTIFY_SYSTEM"))[1], f"D {SYSTEM} 2 0/{START + 16384:X} NULL"
        )

    def test_show(self) -> None:
        for text, name, value in (
            ("SHOW wal_segment_size", "wal_segment_size", "1MB"),
            ('SHOW "WAL_SEGMENT_SIZE";', "wal_segment_size", "1MB"),
            ("SHOW data_directory_mode", "data_directory_mode", "0700"),
            ("SHOW timezone", "TimeZone", "Etc/UTC"),
            ("SHOW server_version", "server_version", "18.0 (walproto)"),
            ("SHOW wal_sender_timeout", "wal_sender_timeout", "1min"),
        ):
            self.assertEqual(self.answer(text), [f"T {name}:25(-1)", f"D {value}", "C SHOW", "Z I"])

    def test_show_of_what_there_is_not(self) -> None:
        for text, name in (
            *(("SHOW nosuch", "nosuch"), ("SHOW a . b", "a.b"), ('SHOW ""', "")),
            *(("SHOW É", "É"), ("SHOW \udcff", "\udcff"), ("SHOW " + "n" * 70, "n" * 63)),
        ):
            self.assertEqual(
                self.answer(text),
                [f'ERROR 42704: unrecognized configuration parameter "{name}"', "Z I"],
            )

    def test_timeline_history(self) -> None:
        for major in MAJORS:
            content = "content:25(-1)" if major >= 14 else "content:17(-1)"
            columns = f"T filename:25(-1) {content}"
            if major <= 15:
                columns = f"T filename:25(-1)!0 {content}!0"
            self.timelines[major].switch(START + 8192)
            self.assertEqual(
                self.answer("TIMELINE_HISTORY 2", major),
                [
                    columns,
                    f"D 00000002.history 1\t0/{START + 8192:X}\tno",
                    "C TIMELINE_HISTORY",
                    "Z I",
                ],
            )
            self.assertEqual(
                self.answer("TIMELINE_HISTORY 99", major),
                [
                    columns,
                    'ERROR 58P01: could not open file "pg_wal/00000063.history": gone',
                    "Z I",
                ],
            )

    def test_sql_is_for_databases(self) -> None:
        for text in ("SELECT 1", "BEGIN", "identify_system", "READ_REPLICATION_SLOTS"):
            for major in MAJORS:
                sqlstate = "0A000" if major >= 15 else "XX000"
                self.assertEqual(self.answer(text, major), [f"ERROR {sqlstate}: {SQL}", "Z I"])
        for text in ("", ";", "!"):
            self.assertEqual(self.answer(text), [f"ERROR 0A000: {SQL}", "Z I"])

    def test_syntax_errors(self) -> None:
        for text, message in (
            ("SHOW", "syntax error"),
            ('SHOW "abc', "unterminated quoted string"),
            ("TIMELINE_HISTORY 0", "invalid timeline 0"),
        ):
            self.assertEqual(self.answer(text), [f"ERROR 42601: {message}", "Z I"])

    def test_there_are_no_slots(self) -> None:
        for major in MAJORS:
            setting = '"max_replication_slots"' if major >= 17 else "max_replication_slots"
            full = [
                "ERROR 53400: all replication slots are in use | "
                f"H: Free one or increase {setting}.",
                "Z I",
            ]
            none = [
                f"ERROR 55000: replication slots can only be used if {setting} > 0",
                "Z I",
            ]
            for text, expected in (
                ("CREATE_REPLICATION_SLOT s PHYSICAL", full),
                ("CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL", full),
                ("CREATE_REPLICATION_SLOT s LOGICAL test_decoding", none),
                ("START_REPLICATION SLOT s LOGICAL 0/0", none),
            ):
                self.assertEqual(self.answer(text, major), expected)
            client = self.client(major)
            client.send(query("IDENTIFY_SYSTEM"))
            for text in (
                *("DROP_REPLICATION_SLOT nope", 'DROP_REPLICATION_SLOT "nope" WAIT;'),
                *(
                    "START_REPLICATION SLOT nope 0/0",
                    'START_REPLICATION SLOT "nope" 7/7 TIMELINE 9',
                ),
            ):
                self.assertEqual(
                    client.send(query(text)),
                    ['ERROR 42704: replication slot "nope" does not exist', "Z I"],
                )
        self.assertEqual(
            self.answer("ALTER_REPLICATION_SLOT s (FAILOVER)"),
            ['ERROR 42704: replication slot "s" does not exist', "Z I"],
        )

    def test_a_slot_that_there_is_not_reads_as_nothing(self) -> None:
        for major in range(15, 19):
            self.assertEqual(
                self.answer("READ_REPLICATION_SLOT s", major),
                [
                    "T slot_type:25(-1) restart_lsn:25(-1) restart_tli:20(8)",
                    "D NULL NULL NULL",
                    "C READ_REPLICATION_SLOT",
                    "Z I",
                ],
            )

    def test_what_needs_a_database_is_refused(self) -> None:
        for text, command in (
            ("BASE_BACKUP", "BASE_BACKUP"),
            ("BASE_BACKUP (LABEL 'x')", "BASE_BACKUP"),
            ("UPLOAD_MANIFEST", "UPLOAD_MANIFEST"),
        ):
            self.assertEqual(
                self.answer(text),
                [
                    f"ERROR 0A000: {command} is not supported | "
                    "D: There is no database behind this WAL sender. | "
                    "H: Connect to the primary, or to a standby, for a base backup.",
                    "Z I",
                ],
            )

    def test_up_to_14_the_system_has_to_be_identified_first(self) -> None:
        for major in MAJORS:
            client = self.client(major)
            answers = client.send(query(f"START_REPLICATION 0/{START:X}"))
            if major >= 15:
                self.assertEqual(answers[0], "W")
                continue
            self.assertEqual(
                answers,
                [
                    "ERROR 55000: IDENTIFY_SYSTEM has not been run before START_REPLICATION",
                    "Z I",
                ],
            )
            client.send(query("IDENTIFY_SYSTEM"))
            self.assertEqual(client.send(query(f"START_REPLICATION 0/{START:X}"))[0], "W")

    def test_a_start_that_is_not_possible(self) -> None:
        flush = format_lsn(self.timeline.commit_lsn)
        for text, *expected in (
            (
                "START_REPLICATION 0/0",
                "W",
                "ERROR 58P01: requested WAL segment 000000010000000000000000 "
                "has already been removed",
            ),
            (
                "START_REPLICATION abc/def",
                "W",
                "ERROR XX000: requested starting point ABC/DEF is ahead of the WAL flush position "
                f"of this server {flush}",
            ),
            (
                "START_REPLICATION PHYSICAL 0/1000000 TIMELINE 7",
                "ERROR XX000: requested timeline 7 is not in this server's history",
            ),
        ):
            self.assertEqual(self.answer(text), [*expected, "Z I"])
        self.assertEqual(len(self.timeline.replicas), 0)
        self.assertEqual(self.timeline.observers, set())

    def test_a_start_on_a_timeline_that_has_ended(self) -> None:
        switch = START + 8192
        self.timeline.switch(switch)
        ended = [
            "T next_tli:20(8) next_tli_startpos:25(-1)",
            f"D 2 0/{switch:X}",
            "C START_STREAMING",
            "C START_REPLICATION",
            "Z I",
        ]
        self.assertEqual(self.answer(f"START_REPLICATION 0/{switch:X} TIMELINE 1"), ended)
        self.assertEqual(
            self.answer(f"START_REPLICATION 0/{switch + 1:X} TIMELINE 1"),
            [
                f"ERROR XX000: requested starting point 0/{switch + 1:X} on timeline 1 is not in "
                "this server's history | "
                f"D: This server's history forked from timeline 1 at 0/{switch:X}.",
                "Z I",
            ],
        )
        client = self.client()
        self.assertEqual(
            client.send(query(f"START_REPLICATION 0/{START:X} TIMELINE 1")),
            ["W", f"w 0/{START:X}+8192 of 0/{switch:X}", "c"],
        )
        self.assertEqual(client.send(b"c\0\0\0\4"), ended)

    def test_a_start_at_the_very_end(self) -> None:
        client = self.client()
        end = self.timeline.commit_lsn
        self.assertEqual(client.send(query(f"START_REPLICATION {format_lsn(end)}")), ["W"])
        self.assertEqual(len(self.timeline.replicas), 1)
