# ruff: noqa: PT017 - what an error says is looked at where it is caught
"""Targets: settings, IDs, positions and the names of files."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import seeds
from tests.fuzz.target import Target, check_told, raw, text
from walproto.errors import ReportedError, printable
from walproto.lsn import (
    format_lsn,
    history_name,
    parse_history_name,
    parse_lsn,
    parse_segment_name,
    segment_name,
)
from walproto.neon.ids import Request, parse_id, requested_ids
from walproto.secrets import blanked, censored, masked, secrets_in
from walproto.server.configuration import parse_version
from walproto.server.settings import (
    Settings,
    format_milliseconds,
    format_size,
    parse_megabytes,
    parse_milliseconds,
)
from walproto.wire.messages import ParameterStatus

Pairs = list[tuple[str, str]]


def strings(data: bytes) -> tuple[str, Pairs]:
    """The first of the strings that NULs end, and the others in pairs."""
    first, *others = (text(part) for part in data.split(b"\0"))
    return first, list(zip(others[::2], others[1::2], strict=False))


# --- Settings ------------------------------------------------------------------------------------


def check_settings(data: bytes) -> None:
    """What a client sets at startup, and what it is told then; times and sizes."""
    major = 13 + data[0] % 7 if data else 18
    options, pairs = strings(data[1:])
    server = {
        "server_version": f"{major}.0",
        "server_version_num": f"{major}0000",
        "wal_segment_size": "16MB",
        "session_authorization": "postgres",
    }
    settings = Settings(major, server, 60.0)
    try:
        settings.set_options(options)
        for name, value in pairs:
            settings.set(name, value)
    except ReportedError as error:
        assert error.fatal
        check_told(error)
    for name, value in settings.reported():
        ParameterStatus.build(name=name, value=value)
    assert 0 <= settings.wal_sender_timeout < 1 << 31
    shown = settings["wal_sender_timeout"]
    assert parse_milliseconds("", shown) == round(settings.wal_sender_timeout * 1000)
    assert raw(settings["application_name"]).isascii()
    for name, _ in pairs:
        try:
            canonical, _ = settings.show(name)
        except ReportedError as error:
            check_told(error)
        else:
            assert settings.show(canonical.upper()) == (canonical, settings[canonical])
    _check_quantities(options)


def _check_quantities(quantity: str) -> None:
    try:
        milliseconds = parse_milliseconds("a", quantity)
        assert 0 <= milliseconds < 1 << 31
        assert parse_milliseconds("a", format_milliseconds(milliseconds)) == milliseconds
    except ReportedError as error:
        check_told(error)
    try:
        megabytes = parse_megabytes("a", quantity, -1)
        assert -1 <= megabytes < 1 << 31
        size = megabytes << 20 if megabytes >= 0 else None
        assert parse_megabytes("a", format_size(size), -1) == megabytes
    except ReportedError as error:
        check_told(error)


def _settings_seeds() -> list[bytes]:
    found = [b"\5\0" + packet[4:] for packet in seeds.startup_packets()]
    options = ["-c wal_sender_timeout=1.5min", "--DateStyle=sql\\,\\ dmy -c client_encoding=utf-8"]
    quantities = ["0x7fffffff", "017 ms", "1e3us", "-1", "1.5 GB", " 64MB ", "4 TB"]
    found += [bytes([major]) + each.encode() for each in options + quantities for major in (1, 5)]
    pairs = b"application_name\0a\xe4\1\0client_encoding\0utf8\0DateStyle\0german, ymd\0a.b\0c"
    return [*found, b"\2\0" + pairs, b"\6-- x\0wal_level\0minimal", b"\5\0max_wal_senders\0001"]


_SETTING_WORDS = (
    *(b"client_encoding", b"DateStyle", b"wal_sender_timeout", b"application_name"),
    *(b"search_path", b"server_version", b"wal_level", b"wal_keep_size", b"-c ", b"--"),
    *(b"us", b"ms", b"min", b"kB", b"MB", b"TB", b"0x", b"e9", b"2147483647"),
)


# --- Tenants and timelines -----------------------------------------------------------------------

_NAMES = ("ztenantid", "tenant_id", "ztimelineid", "timeline_id", "pageserver_connstr")


def check_ids(data: bytes) -> None:
    """The timeline that a client names, named once more."""
    options, pairs = strings(data)
    try:
        request = requested_ids(pairs, options)
    except ReportedError as error:
        assert error.fatal
        check_told(error)
        return
    for found in (request.ids.tenant_id, request.ids.timeline_id):
        assert len(found) == 32
        assert set(found) <= set("0123456789abcdef")
        assert parse_id(found.upper()) == found
    assert all(pair in pairs and pair[0].lower() not in _NAMES for pair in request.parameters)
    named = [
        ("tenant_id", request.ids.tenant_id),
        ("ztimelineid", request.ids.timeline_id),
        ("pageserver_connstr", request.pageserver_connstr),
    ]
    again = requested_ids([*request.parameters, *named], request.options)
    assert again == Request(
        request.ids, request.pageserver_connstr, request.parameters, request.options
    )


def _id_seeds() -> list[bytes]:
    tenant, timeline = "0123456789abcdef" * 2, "FEDCBA9876543210" * 2
    texts = [
        f"-c ztenantid={tenant} -c ztimelineid={timeline}",
        f"tenant_id={tenant} ztimelineid={timeline} -c pageserver_connstr=host=a\\ port=1",
        f"--tenant-id={tenant} -cztimelineid={timeline} -c search_path=a -- b",
        f"\0user\0a\0ztenantid\0{tenant}\0timeline_id\0{timeline}\0pageserver_connstr\0host=b",
    ]
    return [each.encode() for each in texts]


# --- Positions and names -------------------------------------------------------------------------


def check_names(data: bytes) -> None:
    """LSNs, names of files, and versions: what was read is written as it was."""
    given = text(data)
    try:
        lsn = parse_lsn(given)
    except ValueError:
        pass
    else:
        assert 0 <= lsn < 1 << 64
        assert parse_lsn(format_lsn(lsn)) == lsn
    if (name := parse_segment_name(given)) is not None:
        assert str(name) == given
        for size in (1 << 20, 1 << 24, 1 << 30):
            if name.is_possible(size):
                again = segment_name(name.tli, name.segno(size), size)
                assert again == given.removesuffix(".partial")
    if (tli := parse_history_name(given)) is not None:
        assert history_name(tli) == given
    try:
        major, minor = parse_version(given)
    except ValueError:
        pass
    else:
        assert 13 <= major < 100
        assert 0 <= minor < 100


def _texts(*found: str) -> Callable[[], list[bytes]]:
    return lambda: [each.encode() for each in found]


# --- Secrets -------------------------------------------------------------------------------------

_HIDDEN = "\N{SNOWMAN}" * 3


def check_secrets(data: bytes) -> None:
    """Whatever is around it: a secret is not shown, nor a piece of it where a text is cut."""
    limit, given = len(data[:1]) and data[0], text(data[1:]).replace(_HIDDEN[0], "")
    assert censored(censored(given)) == censored(given)
    assert len(blanked(given)) <= 4 * len(given) + 3
    for secret in secrets_in(given):
        assert masked(secret, {secret}) != secret or not secret.strip("\\*")
    assert _HIDDEN[0] not in masked(f"{given}\N{SNOWMAN}\\{_HIDDEN[1:]}", {given, _HIDDEN})
    for said in (f"{given} password={_HIDDEN} x", f"{given} postgresql://u:{_HIDDEN}@h x"):
        assert _HIDDEN[0] not in censored(said)
        shown = printable(said, limit)
        assert shown.isprintable()
        assert _HIDDEN[0] not in shown
        assert len(shown) <= limit + len("...")


_SECRET_WORDS = (
    *(b"pass", b"password=", b"password", b"passfile", b"secret", b"pwd", b"_key", b"%3d", b"="),
    *(b"postgres://", b"postgresql://u:", b"://", b"@", b"options='", b"\\'", b"'", b" "),
)


def _secret_seeds() -> list[bytes]:
    found = [
        "host=h password='a\\'b' user=u",
        "options='-c a.password=b' secret = x",
        "postgresql://u:p@h/d?sslpassword=q&user=u",
        "invalid: postgres://u:p@h and pageserver_connstr%3Dpassword%3Dx",
        "passpasspass",
    ]
    return [b"\x14" + each.encode() for each in found]


TARGETS = (
    Target("secrets", check_secrets, _secret_seeds, _SECRET_WORDS),
    Target("settings", check_settings, _settings_seeds, _SETTING_WORDS),
    Target(
        "ids", check_ids, _id_seeds, (*(f"{name}=".encode() for name in _NAMES), *_SECRET_WORDS[:3])
    ),
    Target(
        "names",
        check_names,
        _texts(
            "16/B374D848",
            "000000010000000000000003",
            "0000000100000001000000FF.partial",
            "00000002.history",
            "18.6",
            "15.18 (Debian 15.18-1)",
        ),
        (b".partial", b".history"),
        size=64,
    ),
)
