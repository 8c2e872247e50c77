"""What there may be of a timeline: each function brings the hidden one of a world into a state."""

from __future__ import annotations

import shutil
from dataclasses import replace

from tests.safekeeper import put_control, put_file
from tests.scoped import ALL, COMMITTED, HIDDEN, NO_TENANT, OWN, SIBLING, World, named
from walproto.neon.control_file import NAME


def nothing(world: World) -> None:
    pass


def all_there_is(world: World) -> None:
    world.put()


def opened(world: World) -> None:
    world.put()
    world.open()


def being_opened(world: World) -> None:
    world.put()
    client = world.ask(ALL, {"options": named(HIDDEN)})
    assert not client.transport.arrived


def suspended(world: World) -> None:
    world.put()
    assert world.open().suspend()


def streamed(world: World) -> None:
    world.put()
    assert world.streaming().wal


def a_pageservers(world: World) -> None:
    world.put()
    world.greeted(HIDDEN, options=named(HIDDEN) + " pageserver_connstr=host=ps1")


def waiting_for_a_proposer(world: World) -> None:
    world.put(wal_seg_size=0)
    assert not world.streaming().wal


def without_wal(world: World) -> None:
    world.place().mkdir()
    put_control(world.place(), HIDDEN)


def empty(world: World) -> None:
    world.place().mkdir()


def without_control_file(world: World) -> None:
    world.put()
    (world.place() / NAME).unlink()


def with_a_control_file_that_is_damaged(world: World) -> None:
    world.put()
    put_file(world.place(), b"damaged")


def damaged_meanwhile(world: World) -> None:
    streamed(world)
    put_file(world.place(), b"damaged")
    world.directory.get(HIDDEN).look()
    world.clock.advance(0)


def with_a_control_file_that_is_none(world: World) -> None:
    world.put()
    (world.place() / NAME).unlink()
    (world.place() / NAME).mkdir()


def with_anothers_control_file(world: World) -> None:
    world.put()
    put_control(world.place(), OWN, commit_lsn=COMMITTED)


def unreadable(world: World) -> None:
    world.put()
    world.place().chmod(0)


def no_directory(world: World) -> None:
    world.place().touch()


def linked_to_nowhere(world: World) -> None:
    world.place().symlink_to(world.place(NO_TENANT))


def linked_to_itself(world: World) -> None:
    world.place().symlink_to(world.place())


def linked_to_another(world: World) -> None:
    world.place().symlink_to(world.place(OWN))


def linked_out_of_the_tree(world: World) -> None:
    world.put()
    world.place().symlink_to(world.place().rename(world.top / "outside"))


def removed_meanwhile(world: World) -> None:
    streamed(world)
    shutil.rmtree(world.place())


def removed_and_noticed(world: World) -> None:
    removed_meanwhile(world)
    world.directory._timelines[HIDDEN].look()
    world.clock.advance(0)


def replaced_meanwhile(world: World) -> None:
    removed_meanwhile(world)
    world.put()


def served_to_as_many_as_may_be(world: World) -> None:
    streamed(world)
    world.factory.configuration = replace(world.factory.configuration, max_wal_senders=1)
    refused = world.ask(ALL, {"options": named(SIBLING)}).hear()
    assert refused[0].startswith("FATAL 53300: "), refused


STATES = (
    *(nothing, all_there_is, opened, being_opened, suspended, streamed, a_pageservers),
    *(waiting_for_a_proposer, without_wal, empty, without_control_file),
    *(with_a_control_file_that_is_damaged, damaged_meanwhile, with_a_control_file_that_is_none),
    *(with_anothers_control_file, unreadable, no_directory, linked_to_nowhere, linked_to_itself),
    *(linked_to_another, linked_out_of_the_tree, removed_meanwhile, removed_and_noticed),
    *(replaced_meanwhile, served_to_as_many_as_may_be),
)
