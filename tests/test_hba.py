"""Rules of who may connect: what a file says, what is wrong with it, and whom a rule matches."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from walproto.access.grant import Scope
from walproto.access.hba import Names, Network, Rule, Rules, no_entry, rejected
from walproto.access.hba_file import MAX_PROBLEM, MAX_PROBLEMS, MAX_SIZE, HbaError, parse_hba
from walproto.access.hba_tokens import MAX_TOKEN
from walproto.access.peer import Peer, Tls
from walproto.errors import InternalError
from walproto.wire.startup import Startup

A, B, C = "a" * 32, "b" * 32, "c" * 32
TLS = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256)
LOCAL = Peer("[local]", is_local=True, is_near=True)


def names(*values: str) -> Names:
    """Names that stand in a file, those of them that are keywords in angle brackets."""
    keywords = {value[1:-1] for value in values if value.startswith("<")}
    return Names(frozenset(keywords), frozenset(v for v in values if not v.startswith("<")))


def network(text: str) -> Network:
    address, mask = text.split(" ")
    return Network(ip_address(address), ip_address(mask))


def startup(user: str = "joe", database: str = "", *, replication: bool = True) -> Startup:
    return Startup(user, database or user, replication, "", (), False)


def peer(address: str, *, tls: bool = False) -> Peer:
    return Peer(f"{address}:5", ip_address(address), tls=TLS if tls else None)


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(HbaError) as caught:
        parse_hba(text, "hba")
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def problem(line: str) -> str:
    (only,) = problems(line + "\n")
    assert only.startswith("hba:1: ")
    return only.removeprefix("hba:1: ")


def rule(line: str) -> Rule:
    (only,) = parse_hba(line, "hba").rules
    assert only.source == "hba:1"
    return only


# -- What a file says ----------------------------------------------------------------------------


def test_a_file_is_read() -> None:
    text = f"""\
# TYPE  DATABASE        USER  ADDRESS  METHOD

local   all,replication all            trust
host\tsameuser\tjoe,jim\t10.1.2.3/8\tscram-sha-256\r
  hostssl "all", x      "joe" fe80:: ffff:: cert   # comment
hostnossl all           +   all        reject
hostssl replication \\
   joe 0.0.0.0/0        \\
   jwt tenant={A.upper()} timeline={B}/{C}
hostssl replication all ::1/128 trust clientcert=verify-ca clientname=CN""".replace("+", '"+"')
    assert parse_hba(text, "/etc/hba").rules == (
        Rule("/etc/hba:3", "local", names("<all>", "<replication>"), names("<all>"), None, "trust"),
        Rule(
            *("/etc/hba:4", "host", names("<sameuser>"), names("joe", "jim")),
            *(network("10.1.2.3 255.0.0.0"), "scram-sha-256"),
        ),
        Rule(
            *("/etc/hba:5", "hostssl", names("all", "x"), names("joe")),
            *(network("fe80:: ffff::"), "cert", "verify-full"),
        ),
        Rule("/etc/hba:6", "hostnossl", names("<all>"), names("+"), "all", "reject"),
        Rule(
            *("/etc/hba:7", "hostssl", names("<replication>"), names("joe")),
            *(network("0.0.0.0 0.0.0.0"), "jwt", ""),
            Scope(frozenset([A]), frozenset([(B, C)])),
        ),
        Rule(
            *("/etc/hba:10", "hostssl", names("<replication>"), names("<all>")),
            *(network("::1 " + ":".join(["ffff"] * 8)), "trust", "verify-ca"),
        ),
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("all", names("<all>")),
        ('"all"', names("all")),
        ('a"ll"', names("<all>")),
        ('""all', names("all")),
        ("ALL", names("ALL")),
        ("a,b", names("a", "b")),
        ("a,  b", names("a", "b")),
        ("a,,b", names("a", "b")),
        (",a", names("a")),
        ('"a b"', names("a b")),
        ('"a,b"', names("a,b")),
        ('"a#b"', names("a#b")),
        ('a" "b', names("a b")),
        ('"a""b"', names('a"b')),
        ('""""', names('"')),
        ('a""b', names("ab")),
        ('"a"""', names('a"')),
        ('"a"b"c"', names("abc")),
        ('"a""""b"', names('a""b')),
        ('""', names("")),
        ('"@x"', names("@x")),
        ("@", names("@")),
        ("a@b", names("a@b")),
        ('"+x"', names("+x")),
        ("x+", names("x+")),
        ("a/b", names("a/b")),
        ("sameuser,replication,samerole", names("sameuser", "replication", "samerole")),
        ("caf\u00e9", names("caf\u00e9")),
        ("caf\udce9", names("caf\udce9")),
        ("a\u00a0b", names("a\u00a0b")),
        ("a\fb\v", names("a\fb\v")),
        ("a\\b", names("a\\b")),
        ("x" * MAX_TOKEN, names("x" * MAX_TOKEN)),
    ],
)
def test_names_of_users(written: str, meant: Names) -> None:
    assert rule(f"local all {written} trust").users == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("all,sameuser,replication", names("<all>", "<sameuser>", "<replication>")),
        ('"replication"', names("replication")),
        ("+x", names("+x")),
        ("ab", names("ab")),
    ],
)
def test_names_of_databases(written: str, meant: Names) -> None:
    assert rule(f"local {written} x trust").databases == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1.2.3.4/32", "1.2.3.4 255.255.255.255"),
        ("1.2.3.4/0", "1.2.3.4 0.0.0.0"),
        ("1.2.3.4/09", "1.2.3.4 255.128.0.0"),
        ('"1.2.3.4/8"', "1.2.3.4 255.0.0.0"),
        ("1.2.3.4 255.0.255.0", "1.2.3.4 255.0.255.0"),
        ("1.2.3.4  0.0.0.255", "1.2.3.4 0.0.0.255"),
        ("::/0", ":: ::"),
        ("::1/001", "::1 8000::"),
        ("FE80::A/10", "fe80::a ffc0::"),
        ("::1.2.3.4/97", "::1.2.3.4 ffff:ffff:ffff:ffff:ffff:ffff:8000::"),
        ("fe80::1 ffff::ff00", "fe80::1 ffff::ff00"),
    ],
)
def test_addresses(written: str, meant: str) -> None:
    assert rule(f"host all all {written} trust").address == network(meant)


def test_lines_go_on_behind_a_backslash() -> None:
    """PostgreSQL: ``tokenize_auth_file``; a comment and a quoted name go on as well."""
    assert rule('lo\\\ncal all "a\\\r\n b" trust # c\\\nhost x').users == names("a b")
    parsed = parse_hba("# comment \\\nlocal all all trust\nlocal all all reject", "hba").rules
    assert [(each.source, each.method) for each in parsed] == [("hba:3", "reject")]
    # Of two backslashes but one goes; the other is at the end of no line.
    parsed = parse_hba("local all all trust # \\\\\n\nlocal all all reject", "hba").rules
    assert [(each.source, each.method) for each in parsed] == [
        ("hba:1", "trust"),
        ("hba:3", "reject"),
    ]
    assert rule("local all all trust\\").method == "trust"
    assert rule("\\\n" * 1000 + "local all all trust").source == "hba:1"
    assert problems("\\\nlocal\n\\\nhost all") == (
        "hba:1: end-of-line before database specification",
        "hba:3: end-of-line before role specification",
    )


def test_a_carriage_return_is_a_blank_but_ends_no_line() -> None:
    assert rule("local\rall\r\rall\rtrust\r\r\n").method == "trust"


def test_options() -> None:
    many = f"trust tenant={A},tenant={B} timeline={C}/{A},timeline={C}/{B} tenant={A}"
    assert rule(f"local all all {many}").scope == Scope(
        frozenset([A, B]), frozenset([(C, A), (C, B)])
    )
    ssl = "hostssl all all all"
    assert rule(f"{ssl} trust").clientcert == ""
    assert rule(f"{ssl} trust clientcert=verify-full").clientcert == "verify-full"
    assert rule(f"{ssl} jwt clientcert=verify-ca").clientcert == "verify-ca"
    assert rule(f"{ssl} cert clientcert=verify-full").clientcert == "verify-full"
    assert rule(f"{ssl} cert clientname=CN").clientcert == "verify-full"
    # The last one counts.
    twice = "clientcert=verify-full clientcert=verify-ca"
    assert rule(f"{ssl} scram-sha-256 {twice}").clientcert == "verify-ca"


# -- What is wrong with a file -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x", 'invalid connection type "x"'),
        ("LOCAL all all trust", 'invalid connection type "LOCAL"'),
        ("\ufefflocal all all trust", r'invalid connection type "\ufefflocal"'),
        ("local\u2028", r'invalid connection type "local\u2028"'),
        ("\x1b[1m", r'invalid connection type "\x1b[1m"'),
        ("hostgssenc all all all trust", 'connection type "hostgssenc" is not supported'),
        ("hostnogssenc all all all trust", 'connection type "hostnogssenc" is not supported'),
        ("include x", 'inclusion of files, "include", is not supported'),
        ("include_if_exists x", 'inclusion of files, "include_if_exists", is not supported'),
        ("include_dir x", 'inclusion of files, "include_dir", is not supported'),
        ("local,host", "multiple values specified for connection type"),
        ("local", "end-of-line before database specification"),
        ("local all,", "end-of-line before role specification"),
        ("local all, # all trust", "end-of-line before role specification"),
        ("local all all", "end-of-line before authentication method"),
        ("host all all", "end-of-line before IP address specification"),
        ("host all all 1.2.3.4", "end-of-line before netmask specification"),
        ("host all all 1.2.3.4 255.0.0.0", "end-of-line before authentication method"),
        ("host all all 1.2.3.4/8", "end-of-line before authentication method"),
        ("local all,@x all trust", 'inclusion of a file, "@x", is not supported'),
        ('local all @"x y" trust', 'inclusion of a file, "@x y", is not supported'),
        ("local all all trust @x", 'inclusion of a file, "@x", is not supported'),
        ('local all "all trust', "unterminated quoted string"),
        ('local all ""all" trust', "unterminated quoted string"),
        ('local all "all\\', "unterminated quoted string"),
        ("local all all\0 trust", "there is a null character in the line"),
        (f"local all {'x' * (MAX_TOKEN + 1)} trust", "authentication file token too long"),
        ("local samerole x trust", 'database "samerole" is not supported: ...'),
        ("local x,samegroup x trust", 'database "samegroup" is not supported: ...'),
        ("local /x x trust", 'regular expression "/x" is not supported'),
        ('local "/x" x trust', 'regular expression "/x" is not supported'),
        ("local x x,/^.*$ trust", 'regular expression "/^.*$" is not supported'),
        ("local x x,+y trust", 'user "+y" is not supported: there are no groups here'),
        ("local x + trust", 'user "+" is not supported: there are no groups here'),
        ("host x x 1.2.3.4/8,all trust", "multiple values specified for host address"),
        ("host x x 1.2.3.4 255.0.0.0,x trust", "multiple values specified for netmask"),
        ("host x x 1.2.3.4 trust", 'invalid IP mask "trust"'),
        ("host x x 1.2.3.4 255.0.0 trust", 'invalid IP mask "255.0.0"'),
        ("host x x 1.2.3.4 ffff:: trust", "IP address and mask do not match"),
        ("host x x ::1 255.0.0.0 trust", "IP address and mask do not match"),
        ("host x x ::1 ffff::%1 trust", 'invalid IP mask "ffff::%1"'),
        ("host x x 1.2.3.4/33 trust", 'invalid CIDR mask in address "1.2.3.4/33"'),
        ("host x x ::/129 trust", 'invalid CIDR mask in address "::/129"'),
        ("host x x 1.2.3.4/ trust", 'invalid CIDR mask in address "1.2.3.4/"'),
        ("host x x 1.2.3.4/-1 trust", 'invalid CIDR mask in address "1.2.3.4/-1"'),
        ("host x x 1.2.3.4/+8 trust", 'invalid CIDR mask in address "1.2.3.4/+8"'),
        ("host x x 1.2.3.4/8/8 trust", 'invalid CIDR mask in address "1.2.3.4/8/8"'),
        ("host x x 1.2.3.4/\u0668 trust", 'invalid CIDR mask in address "1.2.3.4/\u0668"'),
        (f"host x x ::/{'0' * 5000}8 trust", 'invalid CIDR mask in address "::/000...'),
        ("host x x 256.2.3.4/8 trust", 'invalid IP address "256.2.3.4"'),
        ("host x x 010.2.3.4/8 trust", 'invalid IP address "010.2.3.4"'),
        ("host x x 10/8 trust", 'invalid IP address "10"'),
        ("host x x fe80::1%lo/64 trust", 'invalid IP address "fe80::1%lo"'),
        ("host x x localhost trust", 'host name "localhost" is not supported: ...'),
        ("host x x .example.com trust", 'host name ".example.com" is not supported: ...'),
        ('host x x "all" trust', 'host name "all" is not supported: give an IP address'),
        ('host x x "" trust', 'host name "" is not supported: give an IP address'),
        ("host x x localhost/32 trust", "specifying both host name and CIDR mask is invalid: ..."),
        ("host x x /32 trust", 'specifying both host name and CIDR mask is invalid: "/32"'),
        ("local x x trust,x", "multiple values specified for authentication type"),
        ("local x x x", 'invalid authentication method "x"'),
        ("local x x Trust", 'invalid authentication method "Trust"'),
        ("local x x all trust", 'invalid authentication method "all"'),
        ("local x x cert", "cert authentication is only supported on hostssl connections"),
        ("host x x all cert", "cert authentication is only supported on hostssl connections"),
        ("hostnossl x x all cert", "cert authentication is only supported on hostssl connections"),
        ("local x x jwt", "jwt authentication is only supported on hostssl connections"),
        ("host x x all jwt", "jwt authentication is only supported on hostssl connections"),
        ("hostnossl x x all jwt", "jwt authentication is only supported on hostssl connections"),
        ("local x x trust x", "authentication option not in name=value format: x"),
        ("local x x trust x=y", 'unrecognized authentication option name: "x"'),
        ("local x x trust =", 'unrecognized authentication option name: ""'),
        ("hostssl x x all cert map=m", 'authentication option "map" is not supported'),
        ("local x x trust map=m", 'authentication option "map" is not supported'),
        (
            "host x x all trust clientcert=verify-ca",
            'clientcert can only be configured for "hostssl" rows',
        ),
        (
            "local x x trust clientname=CN",
            'clientname can only be configured for "hostssl" rows',
        ),
        ("hostssl x x all trust clientcert=1", 'invalid value for clientcert: "1"'),
        ("hostssl x x all trust clientcert=", 'invalid value for clientcert: ""'),
        (
            "hostssl x x all cert clientcert=verify-ca",
            'clientcert only accepts "verify-full" when using "cert" authentication',
        ),
        ("hostssl x x all cert clientname=DN", "clientname=DN is not supported; only ..."),
        ("hostssl x x all cert clientname=cn", 'invalid value for clientname: "cn"'),
        (
            "local x x trust tenant=x",
            'invalid value for tenant: "x" (it takes 32 hexadecimal digits)',
        ),
        (f"local x x trust tenant={A}a", "invalid value for tenant: ..."),
        (f"local x x trust tenant={A}/{B}", "invalid value for tenant: ..."),
        (f"local x x trust timeline={A}", 'invalid value for timeline: "" (it takes ...'),
        (f"local x x trust timeline=x/{A}", 'invalid value for timeline: "x" (it takes ...'),
        (f"local x x trust timeline={A}/{B}/", 'invalid value for timeline: "bbbb...'),
        (f"local x x trust tenant={A},{B}", f"authentication option not in name=value format: {B}"),
        (f"local x x reject tenant={A}", 'authentication option "tenant" is not valid for reject'),
        (
            f"local x x reject timeline={A}/{B}",
            'authentication option "timeline" is not valid for reject',
        ),
        *(
            (
                f"local x x {method}",
                f'authentication method "{method}" is not offered; use scram-sha-256',
            )
            for method in ("password", "md5")
        ),
        *(
            (f"host x x all {method}", f'authentication method "{method}" is not supported')
            for method in ("peer", "ident", "gss", "sspi", "pam", "bsd", "ldap", "radius", "oauth")
        ),
    ],
)
def test_what_is_wrong_is_told(line: str, expected: str) -> None:
    told = problem(line)
    assert told == expected if not expected.endswith("...") else told.startswith(expected[:-3])
    assert told.isprintable()


def test_all_that_is_wrong_is_told() -> None:
    text = "local\n\nlocal all all trust\nlocal all all md5\nhost x\n"
    assert problems(text) == (
        "hba:1: end-of-line before database specification",
        'hba:4: authentication method "md5" is not offered; use scram-sha-256',
        "hba:5: end-of-line before role specification",
    )


@pytest.mark.parametrize("text", ["", "\n", "# local all all trust", " \t,\r\n,#\n\\"])
def test_without_an_entry_a_file_is_wrong(text: str) -> None:
    assert problems(text) == ("hba:1: the file contains no entries",)


def test_what_is_told_is_bounded() -> None:
    told = problems("x\n" * (MAX_PROBLEMS + 50))
    assert told[MAX_PROBLEMS - 1 :] == (
        f'hba:{MAX_PROBLEMS}: invalid connection type "x"',
        f"hba:{MAX_PROBLEMS}: too many problems; the rest was not looked at",
    )
    assert len(problem("x" * MAX_TOKEN)) == MAX_PROBLEM + len("...")


def test_what_is_read_is_bounded() -> None:
    line = "local all all trust\n"
    # Counted are the bytes of the file, whatever they are to UTF-8.
    for filler, count in (("#", 1), ("\u20ac", 3), ("\udcff", 1)):
        padding = (MAX_SIZE - len(line) - 1) // count
        text = line + "#" + filler * padding
        assert rule(text).method == "trust"
        assert problems(text + filler + "##") == (
            f"hba:1: the file is longer than {MAX_SIZE} bytes",
        )


@pytest.mark.parametrize(
    "unit",
    [
        '""',
        '"',
        ",",
        "a,",
        "a ",
        '"a" ',
        "\\\n",
        "\\\r\n",
        "\r",
        "\n",
        '"\\\n',
        "#",
        "\0",
        "@",
        "a",
    ],
)
def test_the_worst_of_files_is_read_in_no_time(unit: str) -> None:
    """With anything quadratic in it, this would take longer than anybody waits."""
    assert len(problems(unit * (MAX_SIZE // 4 // len(unit)))) == 1


def test_samenet_takes_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ifaddr", None)
    assert problems("local all all trust\nhost x x samehost trust\nhost x x samenet trust") == (
        "hba:2: samehost: it takes pip install 'walproto[samenet]'",
        "hba:3: samenet: it takes pip install 'walproto[samenet]'",
    )
    assert rule("host all all all trust").address == "all"


def test_without_samenet_the_library_is_not_loaded() -> None:
    program = """
import sys
from walproto.access.hba_file import parse_hba
parse_hba("host all all 10.0.0.0/8 trust", "hba")
assert "ifaddr" not in sys.modules
parse_hba("host all all samenet trust", "hba")
assert "ifaddr" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# -- Whom a rule matches -------------------------------------------------------------------------

PHYSICAL = startup("joe", "db")
ORDINARY = startup("joe", "db", replication=False)
SAME = startup("joe", "joe", replication=False)


@pytest.mark.parametrize(
    ("databases", "matched"),
    [
        ("all", [ORDINARY, SAME]),
        ("replication", [PHYSICAL]),
        ("sameuser", [SAME]),
        ("db", [ORDINARY]),
        ("joe", [SAME]),
        ('"replication"', []),
        ('"all"', []),
        ('"sameuser"', []),
        ("x,y", []),
        ("x,db,sameuser", [ORDINARY, SAME]),
        ("all,replication", [PHYSICAL, ORDINARY, SAME]),
    ],
)
def test_physical_replication_is_matched_by_its_keyword_alone(
    databases: str, matched: list[Startup]
) -> None:
    rules = parse_hba(f"local {databases} joe trust", "hba")
    for each in (PHYSICAL, ORDINARY, SAME):
        assert (rules.match(each, LOCAL) is not None) == (each in matched)


def test_quoted_names_of_keywords_are_names() -> None:
    for name in ("replication", "all", "sameuser"):
        asked = startup("joe", name, replication=False)
        assert parse_hba(f'local "{name}" joe trust', "hba").match(asked, LOCAL)
    assert parse_hba('local db "all" trust', "hba").match(ORDINARY, LOCAL) is None
    asked = startup("all", "db", replication=False)
    assert parse_hba('local db "all" trust', "hba").match(asked, LOCAL)


@pytest.mark.parametrize(
    ("user", "matched"),
    [("joe", True), ("jo", False), ("Joe", False), ("", False), ("jim", True), ("all", False)],
)
def test_users_are_matched_by_name(user: str, matched: bool) -> None:
    rules = parse_hba("local replication joe,jim trust", "hba")
    assert (rules.match(startup(user), LOCAL) is not None) == matched
    assert parse_hba("local replication joe,all trust", "hba").match(startup(user), LOCAL)


@pytest.mark.parametrize(
    ("who", "matched"),
    [
        (LOCAL, ["local"]),
        (peer("127.0.0.1"), ["host", "hostnossl"]),
        (peer("::1", tls=True), ["host", "hostssl"]),
        # Somebody of whom it is not known where it is.
        (Peer("somebody"), []),
        (Peer("somebody", tls=TLS), []),
        (Peer("somebody", is_near=True), []),
    ],
)
def test_types_of_connections(who: Peer, matched: list[str]) -> None:
    for kind in ("local", "host", "hostssl", "hostnossl"):
        address = "" if kind == "local" else "all"
        rules = parse_hba(f"{kind} replication all {address} trust", "hba")
        assert (rules.match(PHYSICAL, who) is not None) == (kind in matched)


@pytest.mark.parametrize(
    ("address", "matched", "unmatched"),
    [
        ("10.1.2.3/8", ["10.0.0.0", "10.255.255.255"], ["9.255.255.255", "11.0.0.0", "::a01:203"]),
        ("10.1.2.3/32", ["10.1.2.3"], ["10.1.2.2", "10.1.2.4"]),
        ("10.1.2.3/31", ["10.1.2.2", "10.1.2.3"], ["10.1.2.1", "10.1.2.4"]),
        ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255"], ["::1", "::", "fe80::1"]),
        ("::/0", ["::1", "ffff::"], ["0.0.0.0", "1.2.3.4", "::ffff:1.2.3.4"]),
        ("1.0.3.0 255.0.255.0", ["1.2.3.4", "1.9.3.9"], ["1.2.4.4", "2.2.3.4"]),
        ("fe80::/10", ["fe80::1", "febf::", "fe80::1%eth0"], ["fec0::", "fe7f::"]),
        ("::1/128", ["::1"], ["::", "::2", "127.0.0.1", "0.0.0.1"]),
        ("all", ["1.2.3.4", "::1", "::ffff:1.2.3.4"], []),
        # A client of IPv4 is one of IPv4, whichever socket it came through, and no other.
        ("1.2.3.0/24", ["::ffff:1.2.3.4"], ["::1.2.3.4", "::fffe:1.2.3.4", "::ffff:1.2.4.4"]),
        ("::ffff:1.2.3.4/128", [], ["::ffff:1.2.3.4", "1.2.3.4"]),
    ],
)
def test_addresses_are_matched(address: str, matched: list[str], unmatched: list[str]) -> None:
    rules = parse_hba(f"host replication all {address} trust", "hba")
    assert [who for who in matched + unmatched if rules.match(PHYSICAL, peer(who))] == matched


def test_the_first_rule_counts() -> None:
    text = """
host replication joe 10.1.0.0/16 reject
host replication joe 10.0.0.0/8 trust
host replication all 10.1.0.0/16 scram-sha-256
host all all all trust
"""
    rules = parse_hba(text, "hba")
    for who, address, source in (
        ("joe", "10.1.2.3", "hba:2"),
        ("joe", "10.2.2.3", "hba:3"),
        ("jim", "10.1.2.3", "hba:4"),
    ):
        found = rules.match(startup(who), peer(address))
        assert found is not None
        assert found.source == source
    assert rules.match(startup("jim"), peer("10.2.2.3")) is None
    assert Rules(()).match(PHYSICAL, LOCAL) is None


def test_this_host_and_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    import ifaddr

    ips = [
        ifaddr.IP("10.1.2.3", 16, "eth0"),
        ifaddr.IP("172.16.0.1", 0, "tun0"),
        ifaddr.IP(("fd00::2", 0, 0), 64, "eth0"),
        ifaddr.IP(("fe80::9", 0, 4), 64, "eth0"),
    ]
    asked: list[int] = []

    def get_adapters() -> list[ifaddr.Adapter]:
        asked.append(len(asked))
        return [ifaddr.Adapter("", "", ips[:2]), ifaddr.Adapter("", "", ips[2:])]

    monkeypatch.setattr(ifaddr, "get_adapters", get_adapters)
    host = ["10.1.2.3", "172.16.0.1", "fd00::2", "fe80::9", "fe80::9%eth0", "::ffff:10.1.2.3"]
    net = ["10.1.0.0", "10.1.255.255", "fd00::", "fe80::1%eth1"]
    others = ["10.2.0.0", "172.16.0.2", "fd00:0:0:1::2", "::1", "127.0.0.1", "::a01:203"]
    for keyword, matched in (("samehost", host), ("samenet", host + net)):
        rules = parse_hba(f"host replication all {keyword} trust\n" * 3, "hba")
        everybody = host + net + others
        assert [who for who in everybody if rules.match(PHYSICAL, peer(who))] == matched
    # For each client anew, but once; and for none that the rest of the rule does not fit.
    asked.clear()
    assert rules.match(PHYSICAL, peer("192.0.2.1")) is None
    assert len(asked) == 1
    assert rules.match(ORDINARY, peer("10.1.2.3")) is None
    assert rules.match(PHYSICAL, LOCAL) is None
    assert len(asked) == 1


@pytest.mark.parametrize("error", [OSError("no memory"), AssertionError("no memory")])
def test_nobody_comes_in_if_the_interfaces_are_unknown(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on with the next rule might let somebody in whom this one rejects."""
    import ifaddr

    def get_adapters() -> list[ifaddr.Adapter]:
        raise error

    monkeypatch.setattr(ifaddr, "get_adapters", get_adapters)
    rules = parse_hba("host all all samenet reject\nhost all all all trust", "hba")
    with pytest.raises(InternalError, match="could not look at the network interfaces") as caught:
        rules.match(ORDINARY, peer("10.1.2.3"))
    assert caught.value.fatal
    assert caught.value.log == "no memory"


def test_loopback_is_this_host() -> None:
    rules = parse_hba("host replication all samehost trust", "hba")
    assert rules.match(PHYSICAL, peer("127.0.0.1"))
    assert rules.match(PHYSICAL, peer("127.0.0.2")) is None
    rules = parse_hba("host replication all samenet trust", "hba")
    assert rules.match(PHYSICAL, peer("127.0.0.2"))


# -- What a client is told -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "who", "rest"),
    [
        (PHYSICAL, LOCAL, 'host "[local]", user "joe", no encryption'),
        (ORDINARY, LOCAL, 'host "[local]", user "joe", database "db", no encryption'),
        (PHYSICAL, peer("1.2.3.4"), 'host "1.2.3.4", user "joe", no encryption'),
        (PHYSICAL, peer("::1", tls=True), 'host "::1", user "joe", SSL encryption'),
        (ORDINARY, peer("::ffff:1.2.3.4"), 'host "1.2.3.4", user "joe", database "db", no encry'),
    ],
)
def test_a_client_is_told_why(asked: Startup, who: Peer, rest: str) -> None:
    replication = "replication " if asked.replication else ""
    came_from = "replication connection from " if asked.replication else ""
    for error, expected in (
        (no_entry(asked, who), f"no pg_hba.conf entry for {came_from}{rest}"),
        (rejected(asked, who), f"pg_hba.conf rejects {replication}connection for {rest}"),
    ):
        assert error.message.startswith(expected)
        assert (error.sqlstate, error.severity, error.detail) == ("28000", "FATAL", None)


# -- Whatever a file says ------------------------------------------------------------------------

WORDS = """
local host hostssl hostnossl all replication sameuser samerole samehost samenet trust reject cert
scram-sha-256 jwt 10.0.0.0/8 ::1/128 1.2.3.4 255.0.0.0 ffff:: clientcert=verify-ca clientname=CN
map=x tenant= timeline= include / + @ = %
"""
MARKS = [" ", "\t", "\r", "\n", "\r\n", ",", "#", '"', "\\\n", "\\", "\0", A, f"{A}/"]
PIECES = st.one_of(
    st.sampled_from(WORDS.split()), st.sampled_from(MARKS), st.just(" "), st.text(max_size=3)
)
COLUMNS = st.lists(st.sampled_from(WORDS.split()), min_size=4, max_size=6).map(" ".join)
CONTENTS = st.one_of(
    st.lists(st.one_of(PIECES, COLUMNS)).map("".join), st.lists(COLUMNS).map("\n".join), st.binary()
)


@given(CONTENTS)
@example("local all all trust")
@example("\ud800\\")
def test_any_file_is_rules_or_an_error(contents: str | bytes) -> None:
    if isinstance(contents, bytes):
        contents = contents.decode("utf-8", "surrogateescape")
    try:
        rules, told = parse_hba(contents, "hba"), None
    except HbaError as error:
        rules, told = Rules(()), error.problems
    assert told is None or told
    assert all(each.startswith("hba:") and each.isprintable() for each in told or ())
    assert (told is None) == bool(rules.rules)
    for who in (LOCAL, peer("10.1.2.3"), peer("::1", tls=True)):
        for asked in (PHYSICAL, ORDINARY):
            found = rules.match(asked, who)
            assert found is None or found in rules.rules


NAMES = st.lists(
    st.text(st.characters(exclude_characters="\0\n\\"), max_size=8).filter(
        lambda name: not name.startswith("/") and not name.endswith("\r")
    ),
    min_size=1,
    max_size=4,
)
ADDRESSES = st.one_of(
    st.sampled_from(["all", "samehost", "samenet"]),
    st.builds(
        Network.of,
        st.integers(0, 2**32 - 1).map(IPv4Address),
        st.integers(0, 32),
    ),
    st.builds(
        Network,
        st.integers(0, 2**128 - 1).map(IPv6Address),
        st.integers(0, 2**128 - 1).map(IPv6Address),
    ),
)
IDS = st.text("0123456789abcdef", min_size=32, max_size=32)
WRITTEN = st.builds(
    Rule,
    st.just("hba:1"),
    st.sampled_from(["host", "hostssl", "hostnossl"]),
    st.builds(
        Names,
        st.frozensets(st.sampled_from(["all", "replication", "sameuser"])),
        NAMES.map(frozenset),
    ),
    st.builds(Names, st.frozensets(st.just("all")), NAMES.map(frozenset)),
    ADDRESSES,
    st.sampled_from(["trust", "scram-sha-256"]),
    st.just(""),
    st.one_of(
        st.none(),
        st.builds(
            Scope, st.frozensets(IDS, min_size=1), st.frozensets(st.tuples(IDS, IDS), max_size=3)
        ),
    ),
)


@given(WRITTEN, st.sampled_from([" ", "\t", "  ", " \\\n", "\r "]), st.sampled_from(["", "\r\n"]))
def test_what_is_written_is_read(written: Rule, blank: str, end: str) -> None:
    quote = '"{}"'.format

    def column(listed: Names) -> str:
        quoted = [quote(name.replace('"', '""')) for name in sorted(listed.names)]
        return ",".join([*sorted(listed.keywords), *quoted])

    columns = [written.type, column(written.databases), column(written.users)]
    if isinstance(written.address, Network):
        columns += [str(written.address.address), str(written.address.mask)]
    else:
        columns.append(str(written.address))
    columns.append(written.method)
    if written.scope is not None:
        columns += [f"tenant={each.upper()}" for each in sorted(written.scope.tenants)]
        columns += [f"timeline={a}/{b}" for a, b in sorted(written.scope.timelines)]
    assert rule(blank.join(columns) + end) == written
