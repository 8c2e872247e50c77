"""Slots that keep more WAL than they may are lost, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.postgres import installations, same_wal
from tests.relays import Relayed, relayed
from tests.slotted import (
    FORGETFUL,
    KEEP,
    MUCH,
    archived,
    check_archive,
    check_little_is_left,
    create_slot,
    drop,
    finished,
    position,
    receiver,
    standby_with_slot,
    wait_position,
)

LOST = 'can no longer access replication slot "lost"'
WHY = 'This replication slot has been invalidated due to "wal_removed".'
"""As PostgreSQL 18 says it; earlier ones say nothing of it."""


@pytest.fixture(params=installations(), ids=lambda installation: f"pg{installation.major}")
def setting(request: pytest.FixtureRequest) -> Iterator[Relayed]:
    """A relay whose slots may keep some segments."""
    options = ("--wal-keep-size", f"{KEEP}MB", "--max-slot-wal-keep-size", "8MB")
    patient = ("--wal-sender-timeout", "0")
    with relayed(request.param, *options, *patient, settings=FORGETFUL) as setting:
        setting.primary.pgbench("-i", "-s", "1")
        setting.wait_flushed(setting.primary.lsn())
        yield setting


def test_a_slot_beyond_the_bound(setting: Relayed) -> None:
    """It is lost for good, and whoever wants to use it is told so; another one's replica goes
    on.  One of the same name can be made anew."""
    primary = setting.primary
    lost = standby_with_slot(setting, "lost")
    create_slot(setting.relay, "good")
    good = receiver(setting, "good", "--slot", "good", "--synchronous")
    good.expect("starting log streaming")
    lost.stop()
    for _ in range(4):
        wait_position(setting, "good", setting.write(4 * 2**20))
    setting.relay.expect('invalidating obsolete replication slot "lost"')
    check_little_is_left(setting)
    check_lost(setting)
    lost.start(wait=False)
    lost.expect_log(LOST)
    lost.expect_log(WHY)
    end = primary.switch_wal()
    good.expect(finished(end))
    assert good.stop() == 0
    assert len(same_wal(archived(setting, end), good.directory)) > 16

    for end_of_relay in ("stop", "kill"):
        getattr(setting.relay, end_of_relay)()
        setting.restart_relay()
        setting.started()
        check_lost(setting)
        lost.expect_log(LOST)
    again = receiver(setting, "good", "--slot", "good")
    end = primary.switch_wal()
    again.expect(finished(end))
    assert same_wal(archived(setting, end), again.directory)

    drop(setting.relay, "lost")
    create_slot(setting.relay, "lost")
    anew = receiver(setting, "anew", "--slot", "lost")
    anew.expect("starting log streaming")
    end = primary.switch_wal()
    anew.expect(finished(end))
    check_archive(setting)


def check_lost(setting: Relayed) -> None:
    """The slot reserves nothing, and pg_receivewal cannot use it."""
    assert position(setting.relay, "lost") is None
    refused = receiver(setting, "refused", "--slot", "lost", "--no-loop")
    assert refused.wait() == 1
    assert f"{LOST}\nDETAIL:  {WHY}\n" in refused.output


@pytest.mark.parametrize("setting", installations()[:1], indirect=True, ids=["newest"])
def test_the_session_that_uses_a_slot_beyond_the_bound(setting: Relayed) -> None:
    """It is ended, though the client stands still and hears nothing of that."""
    relay = setting.relay
    create_slot(relay, "lost")
    stuck = receiver(setting, "stuck", "--slot", "lost", "--no-loop")
    stuck.expect("starting log streaming")
    end = setting.primary.switch_wal()
    stuck.expect(finished(end))
    pid = re.findall(r'"pg_receivewal" \(pid (\d+),', relay.output)[-1]
    stuck.pause()
    setting.write(MUCH)
    relay.expect('invalidating obsolete replication slot "lost"')
    relay.expect(f'terminating process {pid} to release replication slot "lost"')
    check_little_is_left(setting)
    drop(relay, "lost")
    stuck.resume()
    assert stuck.wait() == 1
    assert same_wal(archived(setting, end), stuck.directory)
    check_archive(setting)
