"""How many may be connected that have not proven yet who they are.

Each costs a file descriptor and a little memory until ``authentication_timeout`` ends it.  So there
are bounds: one for all together, and one for those from one address, that one who floods does not
keep the others out.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address | None
"""None on a Unix socket."""

_INTERFACE_BITS = 64
"""Of an IPv6 address: whoever has one address of a network has all that differ in these."""


class Unauthenticated:
    """Counts them.  ``total`` is the most there may be from elsewhere, and the most that may be of
    this machine: nobody elsewhere keeps those out.  ``per_address`` is the most from one IPv4
    address or one /64 network of IPv6 addresses."""

    def __init__(self, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._networks: Counter[Address] = Counter()

    def __len__(self) -> int:
        return self._networks.total()

    def enter(self, address: Address) -> bool:
        """One more from ``address``; whether there was a place for it."""
        network = _network(address)
        near = self._networks[None]
        if network is None:
            is_full = near >= self._total
        else:
            is_full = len(self) - near >= self._total
            is_full |= self._networks[network] >= self._per_address
        if is_full:
            return False
        self._networks[network] += 1
        return True

    def leave(self, address: Address) -> None:
        """One that had entered from ``address`` is authenticated, or gone."""
        network = _network(address)
        self._networks[network] -= 1
        if not self._networks[network]:
            del self._networks[network]


def _network(address: Address) -> Address:
    """What counts as one address; None for this machine, which is no stranger."""
    if address is None or address.is_loopback:
        return None
    if isinstance(address, IPv6Address):
        return IPv6Address(int(address) >> _INTERFACE_BITS << _INTERFACE_BITS)
    return address
