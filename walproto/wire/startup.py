"""How a connection begins: the startup packets, and what they ask for.

PostgreSQL: ``ProcessStartupPacket`` in ``backend_startup.c``; documentation "Start-up" in chapter
"Message Flow", and "Protocol Versions".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from construct import ConstructError

from walproto.errors import (
    FeatureNotSupported,
    InvalidAuthorizationSpecification,
    InvalidParameterValue,
    ProtocolViolation,
)
from walproto.wire.messages import (
    CANCEL_REQUEST_CODE,
    GSSENC_REQUEST_CODE,
    PROTOCOL_3_2,
    SSL_REQUEST_CODE,
    CancelRequest,
    NegotiateProtocolVersion,
    StartupCode,
    StartupMessage,
)

ALPN = b"postgresql"
"""The protocol's name for the negotiation of application protocols within TLS (RFC 7301)."""

MAX_STRINGS = 1000
"""In a startup packet, which has a dozen: names and values of parameters, which anybody may send.
PostgreSQL takes as many as there is room for."""

_TRUE = ["true", "yes", "on", "1"]
_FALSE = ["false", "no", "off", "0"]


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """SSLRequest or GSSENCRequest."""

    code: int

    @property
    def is_tls(self) -> bool:
        return self.code == SSL_REQUEST_CODE

    @property
    def name(self) -> str:
        return "SSL" if self.code == SSL_REQUEST_CODE else "GSSAPI encryption"


@dataclass(frozen=True, slots=True)
class Cancellation:
    """CancelRequest: end what the connection with this process ID does, if the key is its own."""

    process_id: int
    secret_key: bytes


@dataclass(frozen=True, slots=True)
class Startup:
    """StartupMessage, and what it comes to.

    ``parameters`` are those that are settings, in the order they came in; ``negotiation`` is the
    NegotiateProtocolVersion that has to be sent first, or empty.  In ``options`` and ``parameters``
    may be a connection string with a password, so they are not in the ``repr``.
    """

    user: str
    database: str
    replication: bool
    options: str = field(repr=False)
    parameters: tuple[tuple[str, str], ...] = field(repr=False)
    long_keys: bool
    """Whether the client understands cancel keys of more than 4 bytes (protocol 3.2)."""
    negotiation: bytes = field(default=b"", repr=False)


def parse_startup_packet(
    packet: bytes, newest_version: int
) -> Startup | EncryptionRequest | Cancellation:
    """What a startup packet, without its length word, asks for.

    ``newest_version`` is the newest protocol version spoken here.  Raises a ReportedError, FATAL.
    """
    code = StartupCode.parse(packet).code
    if code in (SSL_REQUEST_CODE, GSSENC_REQUEST_CODE):
        return EncryptionRequest(code)
    if code == CANCEL_REQUEST_CODE:
        try:
            request = CancelRequest.parse(packet)
        except ConstructError:
            raise ProtocolViolation("invalid length of startup packet", fatal=True) from None
        return Cancellation(request.process_id, bytes(request.secret_key))
    return _parse_startup_message(packet, newest_version)


def unsupported_version(version: int, newest_version: int) -> FeatureNotSupported:
    """The error for a startup packet of a protocol version that is not spoken here."""
    return FeatureNotSupported(
        f"unsupported frontend protocol {version >> 16}.{version & 0xFFFF}: "
        f"server supports 3.0 to 3.{newest_version & 0xFFFF}",
        fatal=True,
    )


def _parse_startup_message(packet: bytes, newest_version: int) -> Startup:
    version = StartupCode.parse(packet).code
    if version >> 16 != 3:
        raise unsupported_version(version, newest_version)
    if packet.count(b"\0") > MAX_STRINGS:
        raise ProtocolViolation("too many parameters in startup packet", fatal=True)
    try:
        message = StartupMessage.parse(packet)
    except ConstructError:
        raise ProtocolViolation(
            "invalid startup packet layout: expected terminator as last byte", fatal=True
        ) from None
    known = {"user": "", "database": "", "options": "", "replication": "false"}
    parameters: list[tuple[str, str]] = []
    unrecognized: list[str] = []
    for parameter in message.parameters:
        if parameter.name.startswith("_pq_."):
            unrecognized.append(parameter.name)
        elif parameter.name in known:
            known[parameter.name] = parameter.value
        else:
            parameters.append((parameter.name, parameter.value))
    negotiated = min(version, newest_version)
    negotiation = b""
    if version > newest_version or unrecognized:
        negotiation = NegotiateProtocolVersion.build(
            newest_version=negotiated, unrecognized_options=unrecognized
        )
    replication = _parse_replication(known["replication"])
    if not known["user"]:
        raise InvalidAuthorizationSpecification(
            "no PostgreSQL user name specified in startup packet", fatal=True
        )
    return Startup(
        user=_as_name(known["user"]),
        database=_as_name(known["database"] or known["user"]),
        replication=replication,
        options=known["options"],
        parameters=tuple(parameters),
        long_keys=negotiated >= PROTOCOL_3_2,
        negotiation=negotiation,
    )


def _as_name(text: str) -> str:
    """As much of a name as PostgreSQL takes: 63 bytes (``NAMEDATALEN``)."""
    return text.encode("utf-8", "surrogateescape")[:63].decode("utf-8", "surrogateescape")


def _parse_replication(value: str) -> bool:
    """Whether physical replication is asked for; with ``database``, it is not."""
    lowered = value.lower()
    if lowered and lowered != "o":
        if any(word.startswith(lowered) for word in _TRUE):
            return True
        if value == "database" or any(word.startswith(lowered) for word in _FALSE):
            return False
    raise InvalidParameterValue(
        f'invalid value for parameter "replication": "{value}"',
        hint='Valid values are: "false", 0, "true", 1, "database".',
        fatal=True,
    )
