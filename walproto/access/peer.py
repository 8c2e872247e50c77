"""Who is at the other end of a connection, as far as the connection itself tells.

Nothing here was said by the client: the address is the transport's, and what is known of TLS is
what the handshake has proven.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address


@dataclass(frozen=True, slots=True)
class Tls:
    """A connection's encryption.

    ``version`` and ``cipher`` are OpenSSL's names, such as ``TLSv1.3`` and
    ``TLS_AES_256_GCM_SHA384``; ``bits`` is the cipher's strength.  ``common_name`` is that of the
    client's certificate, empty if that has none that can be printed, None if it has shown no
    certificate; one that our CA has not signed has ended the handshake.  ``end_point`` is the hash
    of our own certificate that ``tls-server-end-point`` binds an authentication to (RFC 5929,
    section 4), None if the certificate has none.
    """

    version: str
    cipher: str
    bits: int
    common_name: str | None = None
    end_point: bytes | None = None

    def __str__(self) -> str:
        """As PostgreSQL's log has it."""
        return f"SSL enabled (protocol={self.version}, cipher={self.cipher}, bits={self.bits})"


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    ``name`` is how it is called in the log: ``host:port``, or ``[local]`` on a Unix socket.
    ``address`` is None on a Unix socket, and where the transport does not know one.  ``is_near``
    tells that nothing can come that way but from this machine: the connection is one of a Unix
    socket or of the loopback interface, whatever a proxy in between says.
    """

    name: str
    address: IPv4Address | IPv6Address | None = None
    is_local: bool = False
    is_near: bool = False
    tls: Tls | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def host(self) -> str:
        """As PostgreSQL's messages have it: the address without the port, or ``[local]``."""
        if self.address is not None:
            return str(self.address)
        return self.name.rpartition(":")[0].strip("[]") or self.name

    @property
    def encryption(self) -> str:
        """As PostgreSQL's messages have it."""
        return "no encryption" if self.tls is None else "SSL encryption"
