"""``--hba-file``: psql is let in, or refused in so many words, as by a primary with the same file.

What may come of it is written down here besides: who gets in, and what those who do not are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest

from tests.postgres import HOST, tls_installations
from tests.secured import (
    PASSWORD,
    USERS,
    Secured,
    address_elsewhere,
    fail_to_reload,
    has_ipv6,
    reload_primary,
    reload_sender,
    secured,
)
from tests.test_receivewal import finished

ELSEWHERE = address_elsewhere()
ADDRESSES = (HOST, *(["::1"] if has_ipv6() else []), *([ELSEWHERE] if ELSEWHERE else []))


@pytest.fixture(
    scope="module",
    params=tls_installations(),
    ids=lambda installation: f"pg{installation.major}",
)
def both(request: pytest.FixtureRequest) -> Iterator[Secured]:
    with secured(request.param, "", hosts=ADDRESSES) as both:
        yield both


def rules(both: Secured, text: str) -> None:
    """Have these rules in force."""
    both.rules(text)
    both.reload()


# -- Types and methods ---------------------------------------------------------------------------

KINDS = f"""
# TYPE     DATABASE     USER     ADDRESS      METHOD
local      replication  alice                 trust
host       replication  alice    {HOST}/32    trust
local      replication  bob                   scram-sha-256
host       replication  bob      {HOST}/32    scram-sha-256
local      replication  carol                 reject
hostssl    replication  carol    {HOST}/32    scram-sha-256
hostnossl  replication  carol    {HOST}/32    reject
hostssl    replication  dave     {HOST}/32    cert
hostssl    replication  erin     {HOST}/32    scram-sha-256  clientcert=verify-ca
hostssl    replication  frank    {HOST}/32    scram-sha-256  clientcert=verify-full
hostssl    replication  grace    {HOST}/32    reject
hostnossl  replication  grace    {HOST}/32    trust
hostssl    replication  heidi    {HOST}/32    trust          clientcert=verify-full
local      replication  ivan                  trust
host       replication  mallory  {HOST}/32    reject
"""

LET_IN = {
    "alice": {
        "socket": "any",
        "clear": "any",
        "TLS": "any",
        "own certificate": "any",
        "another's certificate": "any",
    },
    "bob": {
        "socket": "right",
        "clear": "right",
        "TLS": "right",
        "own certificate": "right",
        "another's certificate": "right",
    },
    "carol": {"TLS": "right", "own certificate": "right", "another's certificate": "right"},
    "dave": {"own certificate": "any"},
    "erin": {"own certificate": "right", "another's certificate": "right"},
    "frank": {"own certificate": "right"},
    "grace": {"clear": "any"},
    "heidi": {"own certificate": "any"},
    "ivan": {"socket": "any"},
    "judy": {},
    "mallory": {},
}
"""With what password, by the user and the way in."""


def test_types_and_methods(both: Secured) -> None:
    rules(both, KINDS)
    certificates = both.certificates([*LET_IN, "Oscar"])
    for user, let_in in LET_IN.items():
        ways = {
            "socket": f"host={both.sockets}",
            "clear": "sslmode=disable",
            "TLS": "sslmode=require",
            "own certificate": f"sslmode=require {certificates[user]}",
            "another's certificate": f"sslmode=require {certificates['Oscar']}",
        }
        for way, password in product(ways, (PASSWORD, "wrong")):
            answer = both.ask(f"user={user} password={password} {ways[way]}")
            expected = let_in.get(way) in ("any", "right" if password == PASSWORD else "any")
            assert answer.is_let_in == expected, (user, way, password, answer)


def refusal(both: Secured, client: str) -> str:
    """What both tell a client whom they do not let in."""
    answer = both.ask(client)
    assert answer.code == 2
    start = f'psql: error: connection to server at "{HOST}", port PORT failed: FATAL:  '
    assert answer.output.startswith(start)
    return answer.output.removeprefix(start)


def test_what_the_refused_are_told(both: Secured) -> None:
    rules(both, KINDS)
    certificate = both.certificates(["Oscar"])["Oscar"]
    right, wrong = f"password={PASSWORD}", "password=wrong"
    clear, tls = "sslmode=disable", "sslmode=require"
    for client, (sqlstate, told) in {
        f"user=judy {right} {clear}": (
            "28000",
            f'no pg_hba.conf entry for replication connection from host "{HOST}", user "judy", '
            "no encryption",
        ),
        f"user=dave {right} {clear}": (
            "28000",
            f'no pg_hba.conf entry for replication connection from host "{HOST}", user "dave", '
            "no encryption",
        ),
        f"user=judy {right} {tls}": (
            "28000",
            f'no pg_hba.conf entry for replication connection from host "{HOST}", user "judy", '
            "SSL encryption",
        ),
        f"user=judy replication=false {clear}": (
            "28000",
            f'no pg_hba.conf entry for host "{HOST}", user "judy", database "postgres", '
            "no encryption",
        ),
        f"user=mallory {right} {clear}": (
            "28000",
            f'pg_hba.conf rejects replication connection for host "{HOST}", user "mallory", '
            "no encryption",
        ),
        f"user=mallory {right} {tls}": (
            "28000",
            f'pg_hba.conf rejects replication connection for host "{HOST}", user "mallory", '
            "SSL encryption",
        ),
        f"user=bob {wrong} {clear}": ("28P01", 'password authentication failed for user "bob"'),
        f"user=bob {wrong} {tls}": ("28P01", 'password authentication failed for user "bob"'),
        f"user=dave {tls}": ("28000", "connection requires a valid client certificate"),
        f"user=dave {tls} {certificate}": (
            "28000",
            'certificate authentication failed for user "dave"',
        ),
        f"user=erin {right} {tls}": ("28000", "connection requires a valid client certificate"),
        f"user=frank {right} {tls} {certificate}": (
            "28P01",
            'password authentication failed for user "frank"',
        ),
        f"user=heidi {tls} {certificate}": (
            "28000",
            '"trust" authentication failed for user "heidi"',
        ),
    }.items():
        assert refusal(both, client) == told
        both.sender.expect(rf"127\.0\.0\.1:\d+: FATAL {sqlstate}: {re.escape(told)}")
        if "sslkey" not in client:  # a key that is not ours
            assert both.exchange(client)[-1] == f"B ErrorResponse FATAL|{sqlstate}|{told}"
    answer = both.ask(f"user=bob host={both.sockets} {wrong}")
    assert answer.output.endswith('FATAL:  password authentication failed for user "bob"')
    answer = both.ask(f"user=judy host={both.sockets}")
    assert answer.output.endswith(
        'FATAL:  no pg_hba.conf entry for replication connection from host "[local]", user "judy", '
        "no encryption"
    )


# -- Addresses -----------------------------------------------------------------------------------

PLACES = {
    "alice": ("127.0.0.1/32", True),
    "bob": ("127.0.0.0/8", True),
    "carol": ("127.0.0.1 255.255.255.255", True),
    "dave": ("126.0.0.0 254.0.0.0", True),
    "erin": ("127.0.0.2/32", False),
    "frank": ("127.0.0.2 255.255.255.0", True),
    "grace": ("samehost", True),
    "heidi": ("samenet", True),
    "ivan": ("0.0.0.0/0", True),
    "judy": ("all", True),
    "mallory": ("::1/128", False),
    "Oscar": ("::/0", False),
    "all": ("192.0.2.77/32", False),
}
"""For each user, from where they are let in, and whether that includes 127.0.0.1."""


def test_addresses(both: Secured) -> None:
    text = [f'host replication "{user}" {place} trust' for user, (place, _) in PLACES.items()]
    rules(both, "\n".join(text) + "\n")
    for user, (_, is_let_in) in PLACES.items():
        answers = {host: both.ask(f"user={user} host={host} sslmode=disable") for host in ADDRESSES}
        assert answers[HOST].is_let_in == is_let_in, user
        for host, answer in answers.items():
            assert answer.is_let_in or f'connection from host "{host}"' in answer.output


# -- Names, and which rule counts ----------------------------------------------------------------

NAMES = """
host  replication           mallory     all  reject
host  "replication"         alice       all  trust  # a database of that name
host  all                   bob         all  trust  # but not replication
host  postgres,replication  carol,dave  all  trust
host  replication           "all"       all  trust
host  replication \\
      Oscar                             all  trust
host  replication           erin        all  reject
host  replication           erin        all  trust
host  replication           frank       all  trust
host  replication           frank       all  reject
host  replication           "all",all   all  scram-sha-256
"""


def test_names_and_the_first_match(both: Secured) -> None:
    rules(both, NAMES)
    by_trust = {"all", "carol", "dave", "frank", "Oscar"}
    rejected = {"mallory", "erin"}
    for user in [*USERS, "oscar", "nobody"]:
        wrong, right = (
            both.ask(f"user={user} password={password}  sslmode=disable")
            for password in ("wrong", PASSWORD)
        )
        assert wrong.is_let_in == (user in by_trust)
        assert right.is_let_in == (user in USERS and user not in rejected)
        assert ("pg_hba.conf rejects" in wrong.output) == (user in rejected)


# -- Rules that change ---------------------------------------------------------------------------


def test_new_rules_are_for_new_connections(both: Secured) -> None:
    """Who streams is not asked again."""
    rules(both, "host replication alice all trust\n")
    directory = both.space.directory(f"streaming-{both.major}")
    conninfo = both.conninfo("user=alice sslmode=disable", both.sender.port)
    options = ("-D", directory, "-d", conninfo, "-w", "-v", "--no-loop")
    with both.installation.start("pg_receivewal", *options) as receiver:
        receiver.expect("starting log streaming")
        rules(both, "host replication alice all reject\nhost replication bob all trust\n")
        assert "pg_hba.conf rejects" in refusal(both, "user=alice sslmode=disable")
        assert both.ask("user=bob sslmode=disable").is_let_in
        receiver.expect(finished(both.primary.switch_wal()))
        assert receiver.running


BAD = (
    "hots     replication  alice  all           trust",
    "host",
    "host     replication",
    "host     replication  alice",
    "host     replication  alice  127.0.0.1     trust",
    "host     replication  alice  127.0.0.1/33  trust",
    "host     replication  alice  127.0.0.1/8",
    "host     replication  alice  all           trsut",
    "host     replication  alice  all           cert",
    "local    replication  alice                cert",
    "host     replication  alice  all           trust  clientcert=verify-ca",
    "hostssl  replication  alice  all           trust  clientcert=1",
    "hostssl  replication  alice  all           trust  clientcert",
    "hostssl  replication  alice  all           trust  frobnicate=1",
    "hostssl  replication  alice  all           cert   clientcert=verify-ca",
)


def test_a_bad_file_leaves_the_old_rules_in_force(both: Secured) -> None:
    """The log names file and line, and says in the primary's words what is wrong there."""
    sender = both.another(*both.access_options)
    both.rules("host replication alice all trust\n")
    reload_primary(both.primary)
    reload_sender(sender)
    for line in BAD:
        both.rules(f"host replication alice all reject\n# the next one\n{line}\n")
        place, told = fail_to_reload(sender).split(": ", 1)
        assert place == f"{both.hba_file}:3"
        reload_primary(both.primary)
        # We take no names of hosts, so nobody is asked for one.
        both.primary.expect_log(f"LOG:  {re.escape(told)}(: Name or service not known)?$")
        both.primary.expect_log("line 3 of configuration file")
        assert both.psql("user=alice sslmode=disable", sender.port).is_let_in
        assert both.psql("user=alice sslmode=disable", both.primary.port).is_let_in
    both.rules("host replication alice all reject\n")
    reload_primary(both.primary)
    reload_sender(sender)
    assert not both.psql("user=alice sslmode=disable", sender.port).is_let_in
