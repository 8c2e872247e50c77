"""What a client says in a SCRAM exchange, taken apart (RFC 5802, section 7).

In the order in which ``auth-sasl.c`` and ``auth-scram.c`` look at it, so that whatever is wrong is
called what PostgreSQL calls it.  Every error is FATAL.
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from binascii import a2b_base64
from dataclasses import dataclass

from construct import ConstructError, StreamError

from walproto.errors import (
    FeatureNotSupported,
    InvalidAuthorizationSpecification,
    ProtocolViolation,
)
from walproto.wire.messages import SASLInitialResponse

SCHEME = "SCRAM-SHA-256"
SCHEME_PLUS = "SCRAM-SHA-256-PLUS"
KEY_LENGTH = 32
"""Bytes, of a proof and of each of the keys: the length of a SHA-256."""

_BINDING = b"tls-server-end-point"


def parse_initial_response(contents: bytes) -> tuple[str, bytes | None]:
    """The mechanism that is chosen, and its first message unless that is to come separately."""
    try:
        message = SASLInitialResponse.contents.parse(contents)
    except StreamError:
        what = "insufficient data left" if b"\0" in contents else "invalid string"
        raise ProtocolViolation(f"{what} in message", fatal=True) from None
    except ConstructError:
        raise ProtocolViolation("invalid message format", fatal=True) from None
    return message.mechanism, message.data


@dataclass(frozen=True, slots=True)
class ClientFirst:
    """``client-first-message``: the header about channel binding, what follows it, and the nonce
    that is in there."""

    header: bytes
    bare: bytes
    nonce: bytes

    @classmethod
    def parse(cls, message: bytes, is_plus: bool, offers_plus: bool) -> ClientFirst:
        """``is_plus``: SCRAM-SHA-256-PLUS was selected; ``offers_plus``: it could have been."""
        reader = _Reader(message)
        flag = reader.ahead
        if flag in (b"n", b"y"):
            if is_plus:
                raise _malformed(
                    f"The client selected {SCHEME_PLUS}, but the SCRAM message does not include "
                    "channel binding data."
                )
            if flag == b"y" and offers_plus:
                raise InvalidAuthorizationSpecification(
                    "SCRAM channel binding negotiation error",
                    detail="The client supports SCRAM channel binding but thinks the server does "
                    "not.  However, this server does support channel binding.",
                    fatal=True,
                )
            reader.skip()
            if reader.ahead != b",":
                raise _malformed(f'Comma expected, but found character "{reader.shown}".')
            reader.skip()
        elif flag == b"p":
            if not is_plus:
                raise _malformed(
                    f"The client selected {SCHEME} without channel binding, but the SCRAM message "
                    "includes channel binding data."
                )
            kind = reader.value(b"p")
            if kind != _BINDING:
                raise ProtocolViolation(
                    f'unsupported SCRAM channel-binding type "{_printable(kind)}"', fatal=True
                )
        else:
            raise _malformed(f'Unexpected channel-binding flag "{reader.shown}".')
        if reader.ahead == b"a":
            raise FeatureNotSupported(
                "client uses authorization identity, but it is not supported", fatal=True
            )
        if reader.ahead != b",":
            raise _malformed(f'Unexpected attribute "{reader.shown}" in client-first-message.')
        reader.skip()
        header, bare = message[: reader.position], reader.rest
        if reader.ahead == b"m":
            raise FeatureNotSupported("client requires an unsupported SCRAM extension", fatal=True)
        reader.value(b"n")
        nonce = reader.value(b"r")
        if not all(0x21 <= byte <= 0x7E for byte in nonce):
            raise ProtocolViolation("non-printable characters in SCRAM nonce", fatal=True)
        while reader.rest:
            reader.attribute()
        return cls(header, bare, nonce)


@dataclass(frozen=True, slots=True)
class ClientFinal:
    """``client-final-message``: the whole nonce, the proof, and what the proof is about."""

    nonce: bytes
    proof: bytes
    without_proof: bytes

    @classmethod
    def parse(cls, message: bytes, header: bytes, binding: bytes | None) -> ClientFinal:
        """``header`` is that of the first message; ``binding`` is what a client must be bound to
        that has selected SCRAM-SHA-256-PLUS, and None with another."""
        reader = _Reader(message)
        bound = reader.value(b"c")
        if not hmac.compare_digest(bound, b64encode(header + (binding or b""))):
            if binding is not None:
                raise InvalidAuthorizationSpecification(
                    "SCRAM channel binding check failed", fatal=True
                )
            raise ProtocolViolation(
                "unexpected SCRAM channel-binding attribute in client-final-message", fatal=True
            )
        nonce = reader.value(b"r")
        name = b""
        while name != b"p":
            end = reader.position - 1
            name, value = reader.attribute()
        try:
            proof = decoded(value)
        except ValueError:
            proof = b""
        if len(proof) != KEY_LENGTH:
            raise _malformed("Malformed proof in client-final-message.")
        if reader.rest:
            raise _malformed("Garbage found at the end of client-final-message.")
        return cls(nonce, proof, message[:end])


class _Reader:
    """A SCRAM message, read attribute by attribute: ``NAME=VALUE,NAME=VALUE``."""

    def __init__(self, message: bytes) -> None:
        if not message:
            raise _malformed("The message is empty.")
        if b"\0" in message:
            raise _malformed("Message length does not match input length.")
        self.message = message
        self.position = 0

    @property
    def rest(self) -> bytes:
        return self.message[self.position :]

    @property
    def ahead(self) -> bytes:
        """The next byte; nothing at the end."""
        return self.message[self.position : self.position + 1]

    @property
    def shown(self) -> str:
        """The next byte, for an error."""
        (byte,) = self.ahead or b"\0"
        return f"'{chr(byte)}'" if 0x21 <= byte <= 0x7E else f"0x{byte:02x}"

    def skip(self) -> None:
        self.position += 1

    def value(self, name: bytes) -> bytes:
        """The value of the next attribute, which must be this one."""
        if self.ahead != name:
            raise _malformed(f'Expected attribute "{name.decode()}" but found "{self.shown}".')
        return self._value(name)

    def attribute(self) -> tuple[bytes, bytes]:
        """The next attribute, its name and its value, whatever it is."""
        name = self.ahead
        if not name:
            raise _malformed("Attribute expected, but found end of string.")
        if not name.isalpha():
            raise _malformed(f'Attribute expected, but found invalid character "{self.shown}".')
        return name, self._value(name)

    def _value(self, name: bytes) -> bytes:
        self.skip()
        if self.ahead != b"=":
            raise _malformed(f'Expected character "=" for attribute "{name.decode()}".')
        self.skip()
        value, comma, _ = self.rest.partition(b",")
        self.position += len(value) + len(comma)
        return value


def _malformed(detail: str) -> ProtocolViolation:
    return ProtocolViolation("malformed SCRAM message", detail=detail, fatal=True)


def _printable(text: bytes) -> str:
    """As ``sanitize_str`` does: the beginning, with ? for what is not printable ASCII."""
    return "".join(chr(byte) if 0x21 <= byte <= 0x7E else "?" for byte in text[:30])


def decoded(text: bytes) -> bytes:
    """Base64, decoded; ValueError if it is none."""
    return a2b_base64(text, strict_mode=True)
