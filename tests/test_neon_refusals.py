"""Who is served no timeline or no more of it, and that it harms nobody else."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from crc32c import crc32c

from tests.neon_trees import Setting, setting_of
from tests.pageserver import Gone, Pageserver, ServerError
from tests.postgres import installations
from tests.safekeeper import put_file
from tests.wal_decoder import SEGMENT
from walproto.neon.control_file import build_control


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with setting_of(installations()[0]) as made:
        yield made


def refused(connect: Callable[[], Pageserver], start: int) -> ServerError:
    with pytest.raises(ServerError) as caught, connect() as pageserver:
        pageserver.follow(start)
    return caught.value


def test_a_timeline_that_is_not_named_or_not_there(setting: Setting) -> None:
    tree = setting.tree(setting.wal.end)
    tenant, timeline, unknown = tree.ids.tenant_id, tree.ids.timeline_id, "f" * 32
    for options, code, text in (
        (f"-c ztimelineid={timeline}", "28000", "tenant ID"),
        (f"ztenantid={tenant}", "28000", "timeline ID"),
        ("", "28000", "ID"),
        (f"ztenantid={tenant} ztimelineid={timeline[1:]}", "22023", timeline[1:]),
        (f"ztenantid=../{tenant} ztimelineid={timeline}", "22023", tenant),
        (f"ztenantid={tenant} ztimelineid={timeline[:-1]}g", "22023", timeline[:-1]),
        (f"ztenantid={tenant} ztimelineid={unknown}", "42704", unknown),
        (f"ztenantid={unknown} ztimelineid={timeline}", "42704", unknown),
        (f"ztenantid={tenant} tenant_id={unknown} ztimelineid={timeline}", "22023", unknown),
    ):
        error = refused(partial(setting.pageserver, tree, options=options), setting.wal.start)
        assert error.code == code, error
        assert text in str(error)
        setting.sender.expect(rf"{code}: {re.escape(error.text)}")


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ("ztimelineid={timeline} ztenantid={tenant} pageserver_connstr=x", {}),
        ("-c ztimelineid={timeline} -c ztenantid={tenant}", {}),
        ("-c timeline_id={timeline} tenant_id={tenant}", {}),
        ("", {"ztimelineid": "{timeline}", "ztenantid": "{tenant}"}),
        ("tenant_id={tenant}", {"timeline_id": "{timeline}", "pageserver_connstr": "x"}),
    ],
)
def test_the_ways_to_name_it(setting: Setting, options: str, parameters: dict[str, str]) -> None:
    tree = setting.tree(setting.wal.middle)
    ids = {"tenant": tree.ids.tenant_id, "timeline": tree.ids.timeline_id}
    named = {name: value.format(**ids) for name, value in parameters.items()}
    more = {"options": options.format(**ids)} | named
    with setting.pageserver(tree, **more) as pageserver:
        pageserver.follow(setting.wal.start)
        pageserver.take_to(setting.wal.middle)
        setting.check(pageserver, setting.wal.middle)


def test_wal_that_is_not_there_any_more(setting: Setting) -> None:
    tree = setting.tree(setting.wal.end)
    with setting.pageserver(tree) as pageserver:
        pageserver.follow(setting.wal.first - SEGMENT)
        with pytest.raises(ServerError, match="has already been removed"):
            pageserver.take()


def test_a_bad_control_file(setting: Setting) -> None:
    """Its timeline is refused until it is mended; another one's stream goes on meanwhile."""
    wal, tree, good = setting.wal, setting.tree(setting.wal.middle), setting.no_tree()
    good.make(wal.start)
    contents = build_control(wal.control(tree.ids, wal.middle))
    other = build_control(wal.control(good.ids, wal.middle))

    def changed(offset: int, value: bytes) -> bytes:
        """With a checksum that is right."""
        data = contents[:offset] + value + contents[offset + len(value) : -4]
        return data + struct.pack("<I", crc32c(data))

    with setting.pageserver(good) as witness:
        witness.is_slow = True
        witness.follow(wal.start)
        for number, (data, text) in enumerate(
            (
                (changed(0, b"\0"), "magic"),
                (changed(4, b"\6"), "version"),
                (changed(8, b"\x21"), "tenant_id"),
                (contents[:-20] + b"\1" + contents[-19:], "checksum"),
                (contents[:-4] + b"    ", "checksum"),
                (contents[:100], "100 bytes"),
                (b"", "0 bytes"),
                (contents + b"\0", "behind its end"),
                (other, "another timeline"),
                (None, "No such file"),
            ),
            start=1,
        ):
            if data is None:
                tree.control_file.unlink()
            else:
                put_file(tree.directory, data)
            error = refused(partial(setting.pageserver, tree), wal.start)
            assert error.code == ("58P01" if data is None else "XX001"), error
            assert "safekeeper.control" in error.text
            assert text in error.text
            setting.sender.expect(rf"{tree.ids.timeline_id}.*{re.escape(error.text)}")
            lsn = wal.start + 1000 * number
            good.commit(lsn)
            witness.take_to(lsn)
            setting.check(witness, lsn)
    put_file(tree.directory, contents)
    with setting.pageserver(tree) as pageserver:
        pageserver.follow(wal.start)
        pageserver.take_to(wal.middle)
        setting.check(pageserver, wal.middle)


# -- The other half ------------------------------------------------------------------------------


def fail_the_copy(pageserver: Pageserver) -> None:
    pageserver.send(b"f", b"no room\0")


def talk_nonsense(pageserver: Pageserver) -> None:
    pageserver.send(b"d", b"z" + struct.pack(">QB", 5, 9) + b"abcd")


def reset(pageserver: Pageserver) -> None:
    pageserver.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pageserver.close()


def leave(pageserver: Pageserver) -> None:
    pageserver.socket.shutdown(socket.SHUT_WR)


def check_it_is_told(pageserver: Pageserver) -> None:
    """The stream has ended there: by an error, or with CopyDone, and the connection then."""
    try:
        pageserver.take_all()
        pageserver.message()
    except (ServerError, Gone):
        return
    raise AssertionError("it goes on")


@pytest.mark.parametrize("end", [fail_the_copy, talk_nonsense, reset, leave])
def test_when_one_half_fails_the_other_ends(
    setting: Setting, end: Callable[[Pageserver], None]
) -> None:
    """The replica is gone then, and others of the timeline are not concerned."""
    wal, tree = setting.wal, setting.tree(setting.wal.middle)
    ended = rf'{tree.ids}: "pageserver".* has ended streaming'
    with setting.pageserver(tree) as pageserver, setting.pageserver(tree) as witness:
        for one in (pageserver, witness):
            one.is_slow = True
            one.follow(wal.start)
            one.take_to(wal.middle)
        end(pageserver)
        setting.sender.expect(ended)
        if end is not reset:
            check_it_is_told(pageserver)
        tree.commit(wal.end)
        witness.take_to(wal.end)
        setting.check(witness, wal.end)
    setting.sender.expect(ended)
