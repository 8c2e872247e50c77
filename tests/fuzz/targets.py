"""All targets."""

from __future__ import annotations

from tests.fuzz import access, files, proofs, session, texts, upstream, wal, wire
from tests.fuzz.planted import PLANTED

TARGETS = {
    target.name: target
    for module in (wire, texts, files, wal, upstream, access, proofs, session)
    for target in module.TARGETS
}
"""Each by its name, in the order in which they are run."""

ALL = TARGETS | {PLANTED.name: PLANTED}
