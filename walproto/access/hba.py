"""Who may connect from where, and what they must prove for it: the rules of ``pg_hba.conf``.

A rule means what it means to PostgreSQL; :mod:`walproto.access.hba_file` reads them.

PostgreSQL: documentation "The pg_hba.conf File"; ``check_hba`` in ``hba.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address

from walproto.access.grant import Scope
from walproto.access.peer import Peer
from walproto.errors import InternalError, InvalidAuthorizationSpecification, ReportedError
from walproto.wire.startup import Startup

Address = IPv4Address | IPv6Address

METHODS = ("trust", "reject", "scram-sha-256", "cert", "jwt")


@dataclass(frozen=True, slots=True)
class Names:
    """What a rule's database or user column lists."""

    keywords: frozenset[str]
    names: frozenset[str]

    def has_database_of(self, startup: Startup) -> bool:
        """PostgreSQL: ``check_db``.  Physical replication is no matter of databases."""
        if startup.replication:
            return "replication" in self.keywords
        return (
            "all" in self.keywords
            or startup.database in self.names
            or ("sameuser" in self.keywords and startup.database == startup.user)
        )

    def has_user_of(self, startup: Startup) -> bool:
        """PostgreSQL: ``check_role``."""
        return "all" in self.keywords or startup.user in self.names


@dataclass(frozen=True, slots=True)
class Network:
    """Addresses that are the same as ``address`` where ``mask`` has a one."""

    address: Address
    mask: Address

    @classmethod
    def of(cls, address: Address, bits: int) -> Network:
        """Those whose first ``bits`` bits are the same."""
        ones = (1 << bits) - 1 << (address.max_prefixlen - bits)
        return cls(address, type(address)(ones))

    def __contains__(self, address: Address) -> bool:
        return (
            address.version == self.address.version
            and (int(address) ^ int(self.address)) & int(self.mask) == 0
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of the file.

    ``source`` is where it stands, ``FILE:LINE``.  ``method`` is one of :data:`METHODS`;
    ``clientcert`` is ``verify-ca`` or ``verify-full`` if the client needs a certificate, otherwise
    empty; ``scope`` is what it may see, None for everything.  ``type`` is the first column;
    ``address`` is None for ``local``, and may be ``all``, ``samehost`` or ``samenet``.
    """

    source: str
    type: str
    databases: Names
    users: Names
    address: Network | str | None
    method: str
    clientcert: str = ""
    scope: Scope | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a file, in its order."""

    rules: tuple[Rule, ...]

    def match(self, startup: Startup, peer: Peer) -> Rule | None:
        """The first rule that matches; it alone counts.

        Raises InternalError, FATAL, where that depends on this machine's network interfaces and
        the system does not tell them.
        """
        origin = _Origin(peer)
        for rule in self.rules:
            if (
                rule.type in origin.types
                and rule.databases.has_database_of(startup)
                and rule.users.has_user_of(startup)
                and origin.is_in(rule.address)
            ):
                return rule
        return None


def no_entry(startup: Startup, peer: Peer) -> ReportedError:
    """The error for a client that no rule matches."""
    kind = "replication connection from " if startup.replication else ""
    return _refusal(f"no pg_hba.conf entry for {kind}host", startup, peer)


def rejected(startup: Startup, peer: Peer) -> ReportedError:
    """The error for a client that a rule with the method ``reject`` matches."""
    kind = "replication connection" if startup.replication else "connection"
    return _refusal(f"pg_hba.conf rejects {kind} for host", startup, peer)


def _refusal(start: str, startup: Startup, peer: Peer) -> ReportedError:
    """PostgreSQL: ``ClientAuthentication`` in ``auth.c``."""
    address = _unmapped(peer.address)
    host = peer.host if address is None else str(address)
    database = "" if startup.replication else f', database "{startup.database}"'
    return InvalidAuthorizationSpecification(
        f'{start} "{host}", user "{startup.user}"{database}, {peer.encryption}', fatal=True
    )


def _unmapped(address: Address | None) -> Address | None:
    """An address of IPv4 as such, also if it came through a socket of IPv6."""
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or address
    return address


# -- Matching ------------------------------------------------------------------------------------


class _Origin:
    """Where a client is, as rules see it: ``types`` are the first columns that fit it.

    Of one that is not local and whose address is unknown, none does.
    """

    def __init__(self, peer: Peer) -> None:
        self.address = _unmapped(peer.address)
        self.types: tuple[str, ...] = ()
        if peer.is_local:
            self.types = ("local",)
        elif self.address is not None:
            self.types = ("host", "hostnossl" if peer.tls is None else "hostssl")

    def is_in(self, where: Network | str | None) -> bool:
        """PostgreSQL: ``check_ip``, ``check_same_host_or_net``."""
        if where is None or where == "all":
            return True
        if self.address is None:
            return False
        if isinstance(where, Network):
            return self.address in where
        return any(
            self.address
            in Network.of(address, address.max_prefixlen if where == "samehost" else bits)
            for address, bits in self.interfaces
        )

    @cached_property
    def interfaces(self) -> list[tuple[Address, int]]:
        """This machine's addresses, each with the length of its network's prefix.

        As in PostgreSQL they are asked for anew for each client, and a network without a mask is
        the one address.
        """
        import ifaddr

        try:
            found = [ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
        except (OSError, ValueError, AssertionError) as error:
            raise InternalError(
                "could not look at the network interfaces", fatal=True, log=str(error)
            ) from None
        return [_address_and_bits(ip.ip, ip.network_prefix) for ip in found]


def _address_and_bits(ip: str | tuple[str, int, int], bits: int) -> tuple[Address, int]:
    address = ip_address(ip if isinstance(ip, str) else ip[0])
    return address, bits or address.max_prefixlen
