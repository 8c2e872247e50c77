"""What a client says in TLS 1.3 that no library lets a test say: KeyUpdates, whole and in halves.

The client's handshake is one of the ssl module, which writes its secret to a file (`KEYS` of that
context); all that it says from then on is encrypted here.  What it hears it still decrypts itself.

RFC 8446: sections 4.6.3, 5.2, 7.1 to 7.3.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

HANDSHAKE, APPLICATION_DATA = 22, 23
KEY_UPDATE = b"\x18\0\0\1\1"
"""It asks for one in return."""


class Sealed:
    """What the client says, for TLS_AES_256_GCM_SHA384."""

    def __init__(self, context: ssl.SSLContext, directory: Path) -> None:
        """To be made before the handshake."""
        self._keys = directory / "keys"
        context.keylog_filename = str(self._keys)
        self._secret = b""

    def records(self, data: bytes) -> bytes:
        """Records that say this."""
        return self._record(APPLICATION_DATA, data)

    def key_update(self, *, cut: int = 0) -> bytes:
        """A record, or two of which the first has so many bytes of the message."""
        parts = [KEY_UPDATE[:cut], KEY_UPDATE[cut:]] if cut else [KEY_UPDATE]
        records = b"".join(self._record(HANDSHAKE, part) for part in parts)
        self._begin(_expand(self._secret, b"traffic upd", 48))
        return records

    def _record(self, kind: int, data: bytes) -> bytes:
        if not self._secret:
            lines = dict(line.split()[::2] for line in self._keys.read_text().splitlines()[1:])
            self._begin(bytes.fromhex(lines["CLIENT_TRAFFIC_SECRET_0"]))
        contents = data + bytes([kind])
        header = b"\x17\x03\x03" + (len(contents) + 16).to_bytes(2, "big")
        nonce = (int.from_bytes(self._iv, "big") ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._key.encrypt(nonce, contents, header)

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        self._key = AESGCM(_expand(secret, b"key", 32))
        self._iv = _expand(secret, b"iv", 12)
        self._number = 0


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    name = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA384(), size, info).derive(secret)
