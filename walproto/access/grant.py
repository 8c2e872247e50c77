"""What one that is let in may see, and how it has proven who it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Scope:
    """Some timelines: all of ``tenants``, and besides them the single ``timelines``.

    ``tenants`` are tenant IDs, ``timelines`` are pairs of a tenant's and a timeline's ID; each as
    32 lower-case hexadecimal digits.
    """

    tenants: frozenset[str] = frozenset()
    timelines: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Grant:
    """A client is let in.

    ``method`` is PostgreSQL's name for how it has proven who it is, such as ``scram-sha-256``;
    ``rule`` says where it stands that this is enough, such as ``/etc/walproto/hba.conf:5``.
    What it may see is in all of the ``scopes``; everything is, if there are none.
    ``last_message`` is what ends the exchange, and is not answered: the client is sent it before
    AuthenticationOk.
    """

    method: str
    rule: str = ""
    scopes: tuple[Scope, ...] = ()
    last_message: bytes = field(default=b"", repr=False)

    def may_see(self, tenant_id: str, timeline_id: str) -> bool:
        """Whether a timeline, named as in :class:`Scope`, is shown to this client."""
        return all(
            tenant_id in scope.tenants or (tenant_id, timeline_id) in scope.timelines
            for scope in self.scopes
        )
