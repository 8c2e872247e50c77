"""How a client names its tenant and timeline, and how its pageserver."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_settings import settings as server_settings
from walproto.errors import ReportedError
from walproto.neon.ids import TimelineIds, parse_id, requested_ids
from walproto.server.settings import split_options

TENANT = "0123456789abcdef0123456789abcdef"
TIMELINE = "fedcba9876543210fedcba9876543210"
OTHER = "00112233445566778899aabbccddeeff"
IDS = TimelineIds(TENANT, TIMELINE)
CONNSTR = "postgresql://no_user@127.0.0.1:64000/no_db"
BOTH = f"-c ztenantid={TENANT} ztimelineid={TIMELINE}"

examples = settings(deadline=None, derandomize=True, max_examples=200)


def refusal(options: str = "", **parameters: str) -> tuple[str, str, str | None, str | None]:
    with pytest.raises(ReportedError) as caught:
        requested_ids(parameters.items(), options)
    error = caught.value
    assert error.fatal
    return error.sqlstate, error.message, error.detail, error.hint


# --- IDs -----------------------------------------------------------------------------------------


def test_an_id_has_32_hexadecimal_digits_and_lower_case_is_canonical() -> None:
    assert parse_id(TENANT) == TENANT
    assert parse_id(TENANT.upper()) == TENANT
    assert parse_id("Aa" * 16) == "aa" * 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 31,
        "0" * 33,
        "g" * 32,
        "0" * 32 + "\n",
        " " + "0" * 31,
        "0x" + "0" * 30,
        "\N{FULLWIDTH DIGIT ONE}" * 32,
        "01234567-89ab-cdef-0123-456789abcdef",
        "../" * 10 + "aa",
    ],
)
def test_nothing_else_is_an_id(text: str) -> None:
    with pytest.raises(ValueError, match="is not an ID of 32 hexadecimal digits"):
        parse_id(text)


def test_ids_are_told_as_the_directory_they_are() -> None:
    assert str(IDS) == f"{TENANT}/{TIMELINE}"


# --- Ways to name them ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        BOTH,  # as a pageserver and a wal proposer do
        f"-c tenant_id={TENANT} -c timeline_id={TIMELINE}",
        f"ztenantid={TENANT} timeline_id={TIMELINE}",
        f"-cztenantid={TENANT} --ztimelineid={TIMELINE}",
        f"--tenant-id={TENANT} --timeline-id={TIMELINE}",
        f"  -c\tZTenantId={TENANT.upper()}\n ZTIMELINEID={TIMELINE.upper()} ",
        f"-c ztenantid={TENANT} tenant_id={TENANT.upper()} ztimelineid={TIMELINE}",
        f"\\-c ztenant\\id={TENANT} ztimelineid={TIMELINE[:5]}\\{TIMELINE[5:]}",
        f"ztenantid={OTHER} ztimelineid=nonsense {BOTH}",
    ],
)
def test_ids_in_options(options: str) -> None:
    request = requested_ids([], options)
    assert request.ids == IDS
    assert request.pageserver_connstr == ""
    assert request.parameters == ()
    assert request.options == ""


@pytest.mark.parametrize("tenant", ["ztenantid", "tenant_id", "TENANT_ID"])
@pytest.mark.parametrize("timeline", ["ztimelineid", "timeline_id"])
def test_ids_as_parameters_of_their_own(tenant: str, timeline: str) -> None:
    named = [(tenant, TENANT), ("application_name", "pageserver"), (timeline, TIMELINE)]
    request = requested_ids(named, "-c wal_sender_timeout=5s")
    assert request.ids == IDS
    assert request.parameters == (("application_name", "pageserver"),)
    assert request.options == "-c wal_sender_timeout=5s"


def test_parameters_override_options_and_the_last_the_ones_before() -> None:
    parameters = [("ztenantid", OTHER), ("ztenantid", TENANT)]
    request = requested_ids(parameters, f"-c ztenantid={OTHER} ztimelineid={TIMELINE}")
    assert request.ids == IDS
    assert requested_ids([], f"{BOTH} ztenantid={OTHER}").ids == TimelineIds(OTHER, TIMELINE)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (CONNSTR, CONNSTR),
        ("", ""),
        ("host=127.0.0.1\\ port=64000\\ user=no_user", "host=127.0.0.1 port=64000 user=no_user"),
        (r"postgresql://h/d?options=-c%20a\\b", r"postgresql://h/d?options=-c%20a\b"),
        ("x pageserver_connstr=y", "y"),
    ],
)
def test_a_pageserver_names_itself(written: str, meant: str) -> None:
    assert requested_ids([], f"{BOTH} pageserver_connstr={written}").pageserver_connstr == meant
    assert requested_ids([], f"pageserver_connstr={written} {BOTH}").ids == IDS


def test_a_pageserver_names_itself_in_a_parameter() -> None:
    written = r"host=h port=1 password=\ "
    parameters = [("pageserver_connstr", written)]
    request = requested_ids(parameters, f"{BOTH} pageserver_connstr={CONNSTR}")
    assert request.pageserver_connstr == written


# --- What is left for others ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (f"-c jit=off {BOTH} -cgeqo=off", "-c jit=off -cgeqo=off"),
        (f"-c application_name=a\\ b\\\\c {BOTH}", "-c application_name=a\\ b\\\\c"),
        (f"{BOTH} --work-mem=1MB", "--work-mem=1MB"),
        (f"{BOTH} -c", "-c"),
        (f"-c -c {BOTH[3:]}", "-c -c"),
        (f"{BOTH} -c ztenantid", "-c ztenantid"),
        (f"{BOTH} ztenantid", "ztenantid"),
        (f"{BOTH} nonsense xtenantid=1", "nonsense xtenantid=1"),
        (f"{BOTH} -- ztenantid={OTHER} -c x=1", f"-- ztenantid={OTHER} -c x=1"),
        (f"{BOTH} -d ztenantid={TENANT}", "-d"),
    ],
)
def test_other_options_are_handed_back_as_they_were(options: str, left: str) -> None:
    request = requested_ids([], options)
    assert request.options == left
    assert request.ids == IDS


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[str, list[str], dict[str, str]]:
    """Options, the words in it that are none of ours, and what is named last."""
    texts, others, named = [], [], {"ztenantid": TENANT, "ztimelineid": TIMELINE}
    ours = st.sampled_from(["ztenantid", "ztimelineid", "pageserver_connstr"])
    foreign = st.sampled_from(
        [
            "-c jit=off",
            "-cgeqo=off",
            "--jit=on",
            "-c application_name=a\\ -c\\ \\\\",
            "-c work-mem=1",
        ]
    )
    texts += [f"{name}={value}" for name, value in named.items()]
    for word in draw(st.lists(st.one_of(ours, foreign), max_size=12)):
        if word[0] == "-":
            texts.append(word)
            others += split_options(word)
            continue
        value = draw(st.text("0123456789abcdef", min_size=32, max_size=32))
        named[word] = value
        texts.append(draw(st.sampled_from(["", "-c ", "-c", "--"])) + f"{word}={value}")
    space = draw(st.sampled_from([" ", "\t \n"]))
    return space.join(texts), others, named


@examples
@given(mixtures())
def test_whatever_is_between_them_the_last_of_each_counts(
    mixture: tuple[str, list[str], dict[str, str]],
) -> None:
    options, others, named = mixture
    request = requested_ids([], options)
    assert request.ids == TimelineIds(named["ztenantid"], named["ztimelineid"])
    assert request.pageserver_connstr == named.get("pageserver_connstr", "")
    assert split_options(request.options) == others
    expected, left = server_settings(), server_settings()
    expected.set_options(" ".join(others))
    left.set_options(request.options)
    for name in ("jit", "geqo", "application_name", "work_mem"):
        assert left[name] == expected[name]


@examples
@given(st.text(" -c=\\\tztenaidml\n", max_size=60))
def test_garbage_names_nothing_and_is_all_handed_back(garbage: str) -> None:
    request = requested_ids([("tenant_id", TENANT), ("timeline_id", TIMELINE)], garbage)
    assert request.ids == IDS
    assert split_options(request.options) == split_options(garbage)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no tenant ID specified in startup packet"),
        ("-c jit=off", "no tenant ID specified in startup packet"),
        (f"-c ztimelineid={TIMELINE}", "no tenant ID specified in startup packet"),
        (f"-c ztenantid={TENANT}", "no timeline ID specified in startup packet"),
        (f"-- {BOTH}", "no tenant ID specified in startup packet"),
    ],
)
def test_what_is_missing_is_said(options: str, message: str) -> None:
    sqlstate, said, _, hint = refusal(options)
    assert (sqlstate, said) == ("28000", message)
    assert hint is not None
    assert "options='-c ztenantid=... -c ztimelineid=...'" in hint


@pytest.mark.parametrize("name", ["ztenantid", "tenant_id", "ztimelineid", "timeline_id"])
@pytest.mark.parametrize("value", ["", "1234", TENANT + "0", "g" * 32, "..", "/" * 32])
def test_what_is_malformed_is_said(name: str, value: str) -> None:
    what = "tenant" if "tenant" in name else "timeline"
    expected = (
        "22023",
        f'invalid value for parameter "{name}": "{value}"',
        None,
        f"A {what} ID has 32 hexadecimal digits.",
    )
    assert refusal(f"{BOTH} {name}={value}") == expected
    assert refusal(BOTH, **{name: value}) == expected


def test_two_names_of_one_thing_must_not_differ() -> None:
    assert refusal(f"{BOTH} tenant_id={OTHER}") == (
        "22023",
        '"ztenantid" and "tenant_id" name different tenants',
        f"{TENANT} and {OTHER}",
        "Use one of them only.",
    )
    assert refusal(BOTH, timeline_id=OTHER)[1] == (
        '"ztimelineid" and "timeline_id" name different timelines'
    )


@pytest.mark.parametrize("text", ["a\\\nb", "\\\x1b[1m", "\udc80"])
def test_a_connection_string_that_would_spoil_a_log_is_refused(text: str) -> None:
    assert refusal(f"{BOTH} pageserver_connstr={text}") == (
        "22023",
        'invalid value for parameter "pageserver_connstr"',
        "There are characters in it that cannot be printed.",
        None,
    )
