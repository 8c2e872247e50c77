"""Passwords in connection strings are found, however they are written; and libpq agrees."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from walproto.errors import MAX_SHOWN, printable
from walproto.neon.ids import requested_ids
from walproto.secrets import blanked, censored, masked, secrets_in
from walproto.wire.startup import Startup

# --- What is shown ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conninfo", "shown"),
    [
        ("", ""),
        ("host=db1 user=repl", "host=db1 user=repl"),
        ("host=db1 passfile=/p sslkey=/k sslcert=/c", "host=db1 passfile=/p sslkey=/k sslcert=/c"),
        ("password=x", "password=***"),
        ("password=x host=db1", "password=*** host=db1"),
        ("host=db1 password=a\\ b\\'c user=u", "host=db1 password=*** user=u"),
        ("host=db1 password='a b\\'c' user=u", "host=db1 password=*** user=u"),
        ("host=db1\tpassword \n =\r'a\nb' user=u", "host=db1\tpassword \n =\r*** user=u"),
        ("password=a\xa0b\x85c host=db1", "password=*** host=db1"),
        ("password= user=u host=db1", "password= *** host=db1"),
        ("password='a'user=u", "password=***user=u"),
        ("password='' host=db1", "password=*** host=db1"),
        ("sslpassword=x sslkey=/k", "sslpassword=*** sslkey=/k"),
        ("scram_client_key=x scram_server_key=y", "scram_client_key=*** scram_server_key=***"),
        ("oauth_client_id=i oauth_client_secret=s", "oauth_client_id=i oauth_client_secret=***"),
        ("options='-c a.password=b c' host=h", "options='-c a.password=***' host=h"),
        (r"options='-c c=\\ password=\'a\\ b\'' user=u", r"options='-c c=\\ password=***' user=u"),
        ("options='-c c=postgres://u:p@h' user=u", "options='-c c=postgres://u:***@h' user=u"),
        ("user='x password=' password=p", "user='x password=***' password=***"),
        ("postgresql://db1", "postgresql://db1"),
        ("postgresql://u@db1:5432/d?sslmode=require", "postgresql://u@db1:5432/d?sslmode=require"),
        ("postgresql://[::1]:5432/d", "postgresql://[::1]:5432/d"),
        ("postgresql://h1:1,h2:2/d?application_name=a@b", "postgresql://h1:1,h2:2/d?application_name=a@b"),
        ("postgresql://u:p@db1/d", "postgresql://u:***@db1/d"),
        ("postgres://u:p%40%20q@db1", "postgres://u:***@db1"),
        ("postgresql://:p@db1", "postgresql://:***@db1"),
        ("postgresql://u:p?x=1@db1", "postgresql://u:***@db1"),
        ("postgresql://db1?user=u&password=p&port=1", "postgresql://db1?user=u&password=***&port=1"),
        ("postgresql://db1?pass%77ord=p", "postgresql://db1?pass%77ord=***"),
        ("postgresql:///d?sslpassword=p&sslkey=/k", "postgresql:///d?sslpassword=***&sslkey=/k"),
        ("postgresql://h?options=-c%20a.password%3Dp", "postgresql://h?options=***"),
    ],
)  # fmt: skip
def test_what_is_shown_of_a_connection_string(conninfo: str, shown: str) -> None:
    assert blanked(conninfo) == shown
    if "***" not in shown:
        assert secrets_in(conninfo) == set()
    assert conninfo_to_dict(conninfo).keys() >= conninfo_to_dict(shown).keys()


@pytest.mark.parametrize(
    "conninfo",
    [
        "password='secret words",
        "host=db1 password=secret words",
        "host=db1 password=secret words user=u",
        "host=db1 password secret words",
        "host=db1 secret = words",
        "x password=secret words",
        "x pwd=secret words",
        "PASSWORD=secret",
        "host=db1 passwd='secret' words",
        "--upstream=password=secret words",
        "postgresql://u:secret@words@db1/",
        "postgresql://u:secret/words@db1/",
        "postgresql://u:secret?words@db1/",
        "postgresql://u:secret@w?ords=secret@db1/",
        "postgresql://u/x:secret@db1/",
        "postgresql://u:secret%zz@db1/",
        "postgresql://u:secret@[::1/",
        "postgresql://db1/?password=secret=words",
        "POSTGRES://u:secret@db1",
    ],
)
def test_one_that_libpq_may_not_understand(conninfo: str) -> None:
    """What is secret in it, shows from how somebody meant it."""
    shown = blanked(conninfo)
    for word in ("secret", "words", "ords"):
        assert word not in shown.replace("secret = ", "")
    assert "***" in shown


def test_what_is_found_is_secret() -> None:
    assert secrets_in("host=db1 password='a\\'b' sslpassword=c\\ d") >= {"a'b", "c d", "a\\'b"}
    assert secrets_in("postgresql://u:a%20b@db1?sslpassword=c%40") >= {"a b", "a%20b", "c@", "c%40"}
    assert "a" in secrets_in("postgresql://u:a@b@db1")  # for libpq the host is "b@db1"
    assert secrets_in("password=") == set()


words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
spaces = st.text(" \t\n\v\f\r", max_size=2)
names = ["password", "sslpassword", "user", "application_name", "options", "host"]


def quoted(value: str) -> str:
    return "'" + value.replace("\\", r"\\").replace("'", r"\'") + "'"


def escaped(value: str) -> str:
    return "".join("\\" + one if one in " \t\n\v\f\r\\'" else one for one in value) or "''"


def everything_every_way(text: str) -> str:
    return "".join(f"\\{one}" for one in text) or "''"


pairs = st.tuples(
    st.sampled_from(names),
    spaces,
    spaces,
    words,
    st.sampled_from([quoted, escaped, everything_every_way]),
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.lists(pairs, max_size=4, unique_by=lambda pair: pair[0]), st.sampled_from(" \t\n\v\f\r"))
@example(
    [("application_name", "", "", " password=", quoted), ("password", "", "", "x", quoted)], " "
)
def test_libpq_finds_only_what_is_no_secret(pairs: list[tuple[str, ...]], space: str) -> None:
    """Of what is shown, as of what is hidden: the passwords, and nothing else."""
    conninfo = space.join(
        f"{name}{before}={behind}{write(value)}"  # type: ignore[operator]
        for name, before, behind, value, write in pairs
    )
    given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    assert given == {name: value for name, _, _, value, _ in pairs}
    shown = conninfo_to_dict(blanked(conninfo))
    for name, value in given.items():
        if "password" in name:
            assert shown.pop(name) == "***"
            assert not value or value in secrets_in(conninfo)
            assert not value or value not in masked(f"<{value}>", secrets_in(conninfo)).strip("<*>")
        elif censored(value) == value and censored(quoted(value)) == quoted(value):
            assert shown.pop(name) == value
        else:
            del shown[name]
    assert shown == {}


@settings(deadline=None, derandomize=True, max_examples=300)
@given(words, words, words.filter(lambda value: censored(value) == value))
def test_a_uri_with_any_password(first: str, second: str, other: str) -> None:
    hidden, plain = quote(first, safe=""), quote(other, safe="")
    uri = f"postgresql://u{plain}:{hidden}@h:1/d?sslpassword={quote(second, safe='')}&user={plain}"
    shown = f"postgresql://u{plain}:***@h:1/d?sslpassword=***&user={plain}"
    assert blanked(uri) == shown
    assert {first, second, hidden} - {""} <= secrets_in(uri)
    assert conninfo_to_dict(uri).get("sslpassword") == second


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.text() | st.text("paswordPGt:/@?&='\\ %3D") | st.from_regex(r"postgresql://.*password.*"))
def test_any_text_at_all(text: str) -> None:
    """It may be called for whatever somebody gives; and what is hidden once, stays hidden."""
    assert secrets_in(blanked(text)) <= secrets_in(text) | {"***"}
    assert masked(text, secrets_in(text)).count("***") >= bool(secrets_in(text))
    assert censored(censored(text)) == censored(text)


# --- Long texts -------------------------------------------------------------------------------

REPEATED = {
    *("pass", "pass ", "pass%3", "password", "_key.", "a", "a=", "a= 'x\\' ", "'", "\\", " ", "="),
    *(
        "pass" + " " * 1000,
        "postgres://",
        "postgres://u:",
        "://",
        "://a:b",
        ":",
        "@",
        "/",
        "?",
        "&",
    ),
    *("a&", "a?", "%3d", "\\'"),
}


@pytest.mark.parametrize("part", sorted(REPEATED))
def test_a_long_text_takes_no_longer_than_it_is(part: str) -> None:
    """Whatever it is made of.  If the time grew with its square, it would take many minutes."""
    text = part * (400_000 // len(part))
    for begin in ("", "password=x ", "options='", "postgres://h?"):
        assert len(blanked(begin + text)) <= len(begin + text) + 3
        assert len(secrets_in(begin + text)) <= len(text)
    assert censored(censored(text)) == censored(text)
    assert masked(text + "x", {"x", part, "'x", "a" * 1000 + "b"}).endswith("***")
    assert len(printable(text)) <= MAX_SHOWN + len("...")


@pytest.mark.parametrize("secret", ["password={}", "postgres://u:{}@h", "postgres://u@h?secret={}"])
def test_a_long_text_is_cut_and_no_piece_of_a_secret_is_seen(secret: str) -> None:
    text = "abc " + secret.format("\N{SNOWMAN}" * 20) + " def"
    whole = censored(text)
    for limit in range(len(text)):
        shown = printable(text, limit)
        assert shown.endswith("...")
        assert len(shown) <= limit + len("...")
        assert "\N{SNOWMAN}" not in shown
        assert r"\u" not in shown
        assert shown.split("***")[0].removesuffix("...") in whole
    assert printable(text, len(text)) == whole


def test_what_is_escaped_is_cut_too() -> None:
    assert printable("\U000e0001" * 900) == r"\U000e0001" * 100 + "..."
    assert printable("x" * MAX_SHOWN) == "x" * MAX_SHOWN


# --- Other texts -----------------------------------------------------------------------------


def test_what_a_client_has_said_may_be_logged() -> None:
    """A client that has forgotten some quotes, and what it is told."""
    for text, logged in {
        "invalid command-line argument for server process: password=secret": "invalid "
        "command-line argument for server process: password=***",
        "invalid value: \"host=h password='secret words'\"": 'invalid value: "host=h password=***',
        "x postgresql://u:secret@h y": "x postgresql://u:***@h y",
        "pageserver_connstr%3Dpassword%3Dsecret": "pageserver_connstr%3Dpassword%3D***",
        "password%3Dc2VjcmV0%3D%3D": "password%3D***",
        "a\nb\x1b[2J": r"a\nb\x1b[2J",
        'password authentication failed for user "x"': "password authentication failed for user "
        '"x"',
        "": "",
    }.items():
        assert printable(text) == logged


def test_a_text_in_which_a_secret_is_repeated() -> None:
    assert masked("it is a b, or 'a\\ b', or a\\\\\\ b", {"a b"}) == "it is ***, or '***', or ***"
    assert masked("abc", {"b", "bc"}) == "a***"
    assert masked("abcd", {"abc", "cd"}) == "***"
    assert masked("abab", {"ab"}) == "******"
    assert masked("a*b", {"*", "b"}) == "a******"
    assert masked(r"a\\b\a", {"\\"}) == "a***b***a"
    assert masked("a.c", {"."}) == "a***c"
    assert masked("abc", set()) == "abc"


def test_what_a_client_asks_for_is_not_in_the_repr() -> None:
    """Of what may come into a traceback or a log by its repr."""
    ids = f"-c tenant_id={'a' * 32} -c timeline_id={'b' * 32}"
    options = f"{ids} -c pageserver_connstr=host=h\\ password=secret"
    startup = Startup("u", "d", True, options, (("pageserver_connstr", "secret"),), False)
    request = requested_ids(startup.parameters, f"{options} password=secret")
    assert request.pageserver_connstr == "secret"
    assert "secret" in request.options
    for one in (startup, request):
        assert "secret" not in repr(one)
        assert "a" * 32 in repr(request)
