"""SCRAM conversations: what clients say, rightly and wrongly, and what a server tells them.

test_scram has them with us, test_scram_clients with PostgreSQL.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass

from walproto.access.peer import Tls
from walproto.access.scram import Verifier
from walproto.errors import ReportedError

SALT = bytes(range(16))
PASSWORD = "correct horse"
VERIFIER = Verifier.of(PASSWORD, SALT)
NONCE = b"aClientsNonce"
BARE = b"n=,r=" + NONCE
BOUND = b"tls-server-end-point"
WRONG_PASSWORD = 'FATAL 28P01: password authentication failed for user "{}"'
Answer = bytes | Callable[["Client"], bytes]


def tls(end_point: bytes | None) -> Tls:
    return Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256, end_point=end_point)


# --- A client that says what a test has it say ---------------------------------------------------


class Client:
    """What a client needs to know to answer; written from RFC 5802, with nothing of walproto's."""

    def __init__(self, end_point: bytes | None = None) -> None:
        self.end_point = end_point or b""
        self.password = PASSWORD.encode()
        self.first_bare = b""
        self.server_first = b""

    @property
    def nonce(self) -> bytes:
        match = re.match(b"r=([^,]*),", self.server_first)
        return match[1] if match else b""

    def hmac_of(self, key: bytes, without_proof: bytes) -> bytes:
        message = b",".join([self.first_bare, self.server_first, without_proof])
        return hmac.new(key, message, "sha256").digest()

    @property
    def salted(self) -> bytes:
        match = re.search(b",s=([^,]*),i=([0-9]*)$", self.server_first)
        assert match, self.server_first
        salt = base64.b64decode(match[1])
        return hashlib.pbkdf2_hmac("sha256", self.password, salt, int(match[2]))

    def proof(self, without_proof: bytes) -> bytes:
        key = hmac.new(self.salted, b"Client Key", "sha256").digest()
        signature = self.hmac_of(hashlib.sha256(key).digest(), without_proof)
        return base64.b64encode(bytes(a ^ b for a, b in zip(key, signature, strict=True)))

    def server_signature(self, without_proof: bytes) -> bytes:
        key = hmac.new(self.salted, b"Server Key", "sha256").digest()
        return base64.b64encode(self.hmac_of(key, without_proof))


def initial(data: bytes | None, mechanism: bytes = b"SCRAM-SHA-256") -> Answer:
    """SASLInitialResponse."""

    def answer(client: Client) -> bytes:
        if data is None:
            return mechanism + b"\0" + struct.pack(">i", -1)
        client.first_bare = data.split(b",", 2)[-1]
        return mechanism + b"\0" + struct.pack(">i", len(data)) + data

    return answer


def plain(data: bytes) -> Answer:
    """The first message, where it comes without the mechanism's name."""

    def answer(client: Client) -> bytes:
        client.first_bare = data.split(b",", 2)[-1]
        return data

    return answer


def final(template: bytes, password: str = PASSWORD) -> Answer:
    """The last message, with <nonce>, <proof> and <end point> filled in."""

    def answer(client: Client) -> bytes:
        client.password = password.encode()
        bound = base64.b64encode(b"p=" + BOUND + b",," + client.end_point)
        said = template.replace(b"<nonce>", client.nonce).replace(b"<end point>", bound)
        return said.replace(b"<proof>", client.proof(said.partition(b",p=")[0]))

    return answer


FINAL = b"c=biws,r=<nonce>,p=<proof>"
GOOD = [initial(b"n,," + BARE), final(FINAL)]


def shown(client: Client, status: int, data: bytes, said: bytes) -> str:
    """One of the server's messages, with what is random in it left out."""
    if status == 10:
        return f"R 10 {data.decode()!r}"
    if status == 11 and data:
        client.server_first = data
        match = re.fullmatch(b"r=([!-+.-~]*),s=([A-Za-z0-9+/=]*),i=4096", data)
        assert match, data
        theirs = client.first_bare.partition(b"r=")[2].partition(b",")[0]
        assert match[1].startswith(theirs)
        assert re.fullmatch(b"[A-Za-z0-9+/]{24}", match[1][len(theirs) :]), data
        return f"R 11 salt of {len(base64.b64decode(match[2]))}"
    if status == 12:
        assert data == b"v=" + client.server_signature(said.partition(b",p=")[0])
    return f"R {status}"


def in_words(error: ReportedError) -> str:
    assert error.hint is None
    detail = f" ({error.detail})" if error.detail else ""
    return f"{error.severity} {error.sqlstate}: {error.message}{detail}"


@dataclass
class Told:
    """What a client was told, and what the operator was besides."""

    messages: list[str]
    log: str | None = None


def converse(
    exchange: Generator[bytes, bytes, bytes], client: Client, answers: list[Answer]
) -> Told:
    """Have a client say its answers; what it is told, up to an error or AuthenticationOk."""
    messages: list[str] = []
    said = b""

    def tell(message: bytes) -> None:
        tag, length, status = struct.unpack(">cII", message[:9])
        assert (tag, length + 1) == (b"R", len(message))
        messages.append(shown(client, status, message[9:], said))

    try:
        tell(next(exchange))
        for answer in answers:
            said = answer if isinstance(answer, bytes) else answer(client)
            tell(exchange.send(said))
    except StopIteration as end:
        tell(end.value)
        return Told([*messages, "R 0"])
    except ReportedError as error:
        return Told([*messages, in_words(error)], error.log)
    return Told(messages)


# --- What clients say, and what they are told ----------------------------------------------------

OFFER = r"R 10 'SCRAM-SHA-256\x00\x00'"
OFFER_PLUS = r"R 10 'SCRAM-SHA-256-PLUS\x00SCRAM-SHA-256\x00\x00'"
CHALLENGE = "R 11 salt of 16"
WELCOME = ["R 12", "R 0"]
MALFORMED = "FATAL 08P01: malformed SCRAM message"
NOT_BOUND = (
    f"{MALFORMED} (The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include "
    "channel binding data.)"
)
BOUND_AFTER_ALL = (
    f"{MALFORMED} (The client selected SCRAM-SHA-256 without channel binding, but the SCRAM "
    "message includes channel binding data.)"
)
NO_MECHANISM = "FATAL 08P01: client selected an invalid SASL authentication mechanism"
WRONG = WRONG_PASSWORD.format("alice")


def first(*said: bytes) -> list[Answer]:
    return [initial(b"".join(said))]


def last(template: bytes) -> list[Answer]:
    return [GOOD[0], final(template)]


CONVERSATIONS: dict[str, tuple[list[Answer], list[str]]] = {
    "as libpq does": (GOOD, [CHALLENGE, *WELCOME]),
    "a name, which is ignored": (
        [initial(b"n,,n=bob=2C,r=" + NONCE), final(FINAL)],
        [CHALLENGE, *WELCOME],
    ),
    "no nonce of its own": ([initial(b"n,,n=,r="), final(FINAL)], [CHALLENGE, *WELCOME]),
    "extensions": (
        [initial(b"n,," + BARE + b",x=1,Y=,z==="), final(b"c=biws,r=<nonce>,x=1,q=,p=<proof>")],
        [CHALLENGE, *WELCOME],
    ),
    "binding that it could do": (
        [initial(b"y,," + BARE), final(b"c=eSws,r=<nonce>,p=<proof>")],
        [CHALLENGE, *WELCOME],
    ),
    "no initial response": (
        [initial(None), plain(b"n,," + BARE), final(FINAL)],
        ["R 11", CHALLENGE, *WELCOME],
    ),
    # SASLInitialResponse
    "a wrong password": ([GOOD[0], final(FINAL, "wrong")], [CHALLENGE, WRONG]),
    "another mechanism": ([initial(b"n,," + BARE, b"SCRAM-SHA-1")], [NO_MECHANISM]),
    "no mechanism": ([initial(b"n,," + BARE, b"")], [NO_MECHANISM]),
    "the mechanism in small letters": ([initial(b"n,," + BARE, b"scram-sha-256")], [NO_MECHANISM]),
    "a mechanism that is not offered": (
        [initial(b"p=" + BOUND + b",," + BARE, b"SCRAM-SHA-256-PLUS")],
        [NO_MECHANISM],
    ),
    "no NUL behind the mechanism": (
        [b"SCRAM-SHA-256"],
        ["FATAL 08P01: invalid string in message"],
    ),
    "nothing": ([b""], ["FATAL 08P01: invalid string in message"]),
    "no length": ([b"SCRAM-SHA-256\0"], ["FATAL 08P01: insufficient data left in message"]),
    "half a length": (
        [b"SCRAM-SHA-256\0\0\0"],
        ["FATAL 08P01: insufficient data left in message"],
    ),
    "a length that is too much": (
        [b"SCRAM-SHA-256\0\0\0\0\x0cn,,n=,r=abc"],
        ["FATAL 08P01: insufficient data left in message"],
    ),
    "a length that is too little": (
        [b"SCRAM-SHA-256\0\0\0\0\x0an,,n=,r=abc"],
        ["FATAL 08P01: invalid message format"],
    ),
    "a length that is no length": (
        [b"SCRAM-SHA-256\0\xff\xff\xff\xfen,,n=,r=abc"],
        ["FATAL 08P01: insufficient data left in message"],
    ),
    "no data, and yet some": (
        [b"SCRAM-SHA-256\0\xff\xff\xff\xffn,,n=,r=abc"],
        ["FATAL 08P01: invalid message format"],
    ),
    "a long first message": (
        [initial(b"n,," + BARE + b"x" * (1020 - 18 - 3 - len(BARE))), b""],
        [CHALLENGE, f"{MALFORMED} (The message is empty.)"],
    ),
    "too long a first message": (
        [initial(b"n,," + BARE + b"x" * (1021 - 18 - 3 - len(BARE)))],
        [WRONG],
    ),
    "an empty first message": (first(), [f"{MALFORMED} (The message is empty.)"]),
    "no initial response, and then nothing": (
        [initial(None), b""],
        ["R 11", f"{MALFORMED} (The message is empty.)"],
    ),
    "no initial response, and then too much": ([initial(None), b"n" * 1021], ["R 11", WRONG]),
    "a NUL": (
        first(b"n,,", BARE, b"\0"),
        [f"{MALFORMED} (Message length does not match input length.)"],
    ),
    # client-first-message
    "another flag": (first(b"N,,"), [f"""{MALFORMED} (Unexpected channel-binding flag "'N'".)"""]),
    "no printable flag": (
        first(b"\xe9,,"),
        [f'{MALFORMED} (Unexpected channel-binding flag "0xe9".)'],
    ),
    "a quote for a flag": (
        first(b"'"),
        [f"""{MALFORMED} (Unexpected channel-binding flag "'''".)"""],
    ),
    "a blank for a flag": (first(b" "), [f'{MALFORMED} (Unexpected channel-binding flag "0x20".)']),
    "a flag alone": (
        first(b"n"),
        [f'{MALFORMED} (Comma expected, but found character "0x00".)'],
    ),
    "no comma behind a flag": (
        first(b"n=,,"),
        [f"""{MALFORMED} (Comma expected, but found character "'='".)"""],
    ),
    "no comma behind another flag": (
        first(b"y;,"),
        [f"""{MALFORMED} (Comma expected, but found character "';'".)"""],
    ),
    "binding to what is not there": (first(b"p=", BOUND, b",,", BARE), [BOUND_AFTER_ALL]),
    "an authorization identity": (
        first(b"n,a=bob,", BARE),
        ["FATAL 0A000: client uses authorization identity, but it is not supported"],
    ),
    "another header": (
        first(b"n,b=bob,", BARE),
        [f"""{MALFORMED} (Unexpected attribute "'b'" in client-first-message.)"""],
    ),
    "half a header": (
        first(b"n,"),
        [f'{MALFORMED} (Unexpected attribute "0x00" in client-first-message.)'],
    ),
    "a mandatory extension": (
        first(b"n,,m=x,", BARE),
        ["FATAL 0A000: client requires an unsupported SCRAM extension"],
    ),
    "a header alone": (first(b"n,,"), [f'{MALFORMED} (Expected attribute "n" but found "0x00".)']),
    "no name": (first(b"n,,r=x"), [f"""{MALFORMED} (Expected attribute "n" but found "'r'".)"""]),
    "half a name": (first(b"n,,n"), [f'{MALFORMED} (Expected character "=" for attribute "n".)']),
    "no nonce": (first(b"n,,n=,"), [f'{MALFORMED} (Expected attribute "r" but found "0x00".)']),
    "nothing behind the name": (
        first(b"n,,n=bob"),
        [f'{MALFORMED} (Expected attribute "r" but found "0x00".)'],
    ),
    "a blank in the nonce": (
        first(b"n,,n=,r=a b"),
        ["FATAL 08P01: non-printable characters in SCRAM nonce"],
    ),
    "a letter that is not ASCII in the nonce": (
        first("n,,n=,r=\u00e9".encode()),
        ["FATAL 08P01: non-printable characters in SCRAM nonce"],
    ),
    "an extension without a name": (
        first(b"n,,", BARE, b",,"),
        [f"""{MALFORMED} (Attribute expected, but found invalid character "','".)"""],
    ),
    "an extension with no letter for a name": (
        first(b"n,,", BARE, b",1=x"),
        [f"""{MALFORMED} (Attribute expected, but found invalid character "'1'".)"""],
    ),
    "an extension that is none": (
        first(b"n,,", BARE, b",xy"),
        [f'{MALFORMED} (Expected character "=" for attribute "x".)'],
    ),
    # client-final-message
    "an empty final message": (
        [GOOD[0], b""],
        [CHALLENGE, f"{MALFORMED} (The message is empty.)"],
    ),
    "a NUL in the final message": (
        last(FINAL + b"\0"),
        [CHALLENGE, f"{MALFORMED} (Message length does not match input length.)"],
    ),
    "too long a final message": (last(b"c=biws," + b"x" * 1014), [CHALLENGE, WRONG]),
    "no channel binding": (
        last(b"r=<nonce>,p=<proof>"),
        [CHALLENGE, f"""{MALFORMED} (Expected attribute "c" but found "'r'".)"""],
    ),
    "the other flag": (
        last(b"c=eSws,r=<nonce>,p=<proof>"),
        [
            CHALLENGE,
            "FATAL 08P01: unexpected SCRAM channel-binding attribute in client-final-message",
        ],
    ),
    "the other flag the other way round": (
        [initial(b"y,," + BARE), final(FINAL)],
        [
            CHALLENGE,
            "FATAL 08P01: unexpected SCRAM channel-binding attribute in client-final-message",
        ],
    ),
    "another nonce": (
        last(b"c=biws,r=<nonce>x,p=<proof>"),
        [CHALLENGE, "FATAL 08P01: invalid SCRAM response (Nonce does not match.)"],
    ),
    "a part of the nonce": (
        last(b"c=biws,r=" + NONCE + b",p=<proof>"),
        [CHALLENGE, "FATAL 08P01: invalid SCRAM response (Nonce does not match.)"],
    ),
    "no final nonce": (
        last(b"c=biws,p=<proof>"),
        [CHALLENGE, f"""{MALFORMED} (Expected attribute "r" but found "'p'".)"""],
    ),
    "no proof": (
        last(b"c=biws,r=<nonce>"),
        [CHALLENGE, f"{MALFORMED} (Attribute expected, but found end of string.)"],
    ),
    "extensions and no proof": (
        last(b"c=biws,r=<nonce>,x=1,"),
        [CHALLENGE, f"{MALFORMED} (Attribute expected, but found end of string.)"],
    ),
    "no letter where the proof is": (
        last(b"c=biws,r=<nonce>,\x7f"),
        [CHALLENGE, f'{MALFORMED} (Attribute expected, but found invalid character "0x7f".)'],
    ),
    "a proof without its sign": (
        last(b"c=biws,r=<nonce>,p"),
        [CHALLENGE, f'{MALFORMED} (Expected character "=" for attribute "p".)'],
    ),
    "an empty proof": (
        last(b"c=biws,r=<nonce>,p="),
        [CHALLENGE, f"{MALFORMED} (Malformed proof in client-final-message.)"],
    ),
    "half a proof": (
        last(b"c=biws,r=<nonce>,p=YWJj"),
        [CHALLENGE, f"{MALFORMED} (Malformed proof in client-final-message.)"],
    ),
    "a proof that is not base64": (
        last(b"c=biws,r=<nonce>,p=" + b"*" * 44),
        [CHALLENGE, f"{MALFORMED} (Malformed proof in client-final-message.)"],
    ),
    "too long a proof": (
        last(b"c=biws,r=<nonce>,p=" + base64.b64encode(bytes(33))),
        [CHALLENGE, f"{MALFORMED} (Malformed proof in client-final-message.)"],
    ),
    "a proof with too much behind it": (
        last(FINAL + b"="),
        [CHALLENGE, f"{MALFORMED} (Malformed proof in client-final-message.)"],
    ),
    "a proof of zeros": (
        last(b"c=biws,r=<nonce>,p=" + base64.b64encode(bytes(32))),
        [CHALLENGE, WRONG],
    ),
    "something behind the proof": (
        last(FINAL + b",x=1"),
        [CHALLENGE, f"{MALFORMED} (Garbage found at the end of client-final-message.)"],
    ),
}
"""Without TLS, by what is special: the answers, and what they are told, behind the offer."""

PLUS = b"SCRAM-SHA-256-PLUS"
NOT_NEGOTIATED = (
    "FATAL 28000: SCRAM channel binding negotiation error (The client supports SCRAM channel "
    "binding but thinks the server does not.  However, this server does support channel binding.)"
)
NO_BINDING_TYPE = "FATAL 08P01: unsupported SCRAM channel-binding type"
BOUND_FIRST = initial(b"p=" + BOUND + b",," + BARE, PLUS)
BINDING: dict[str, tuple[list[Answer], list[str]]] = {
    "as libpq does": (
        [BOUND_FIRST, final(b"c=<end point>,r=<nonce>,p=<proof>")],
        [CHALLENGE, *WELCOME],
    ),
    "no binding": (GOOD, [CHALLENGE, *WELCOME]),
    "a wrong password": (
        [BOUND_FIRST, final(b"c=<end point>,r=<nonce>,p=<proof>", "wrong")],
        [CHALLENGE, WRONG],
    ),
    "no initial response": (
        [
            initial(None, PLUS),
            plain(b"p=" + BOUND + b",," + BARE),
            final(b"c=<end point>,r=<nonce>,p=<proof>"),
        ],
        ["R 11", CHALLENGE, *WELCOME],
    ),
    "somebody in between took the offer away": ([initial(b"y,," + BARE)], [NOT_NEGOTIATED]),
    "PLUS without binding": ([initial(b"n,," + BARE, PLUS)], [NOT_BOUND]),
    "PLUS as if it were not offered": ([initial(b"y,," + BARE, PLUS)], [NOT_BOUND]),
    "binding without PLUS": ([initial(b"p=" + BOUND + b",," + BARE)], [BOUND_AFTER_ALL]),
    "another type": (
        [initial(b"p=tls-unique,," + BARE, PLUS)],
        [f'{NO_BINDING_TYPE} "tls-unique"'],
    ),
    "a type that is too long, and not ASCII": (
        [initial(b"p=\xc3\xa9 " + b"x" * 40 + b",," + BARE, PLUS)],
        [f'{NO_BINDING_TYPE} "???{"x" * 27}"'],
    ),
    "no type": ([initial(b"p=,," + BARE, PLUS)], [f'{NO_BINDING_TYPE} ""']),
    "a flag without a type": (
        [initial(b"p,," + BARE, PLUS)],
        [f'{MALFORMED} (Expected character "=" for attribute "p".)'],
    ),
    "a type alone": (
        [initial(b"p=" + BOUND, PLUS)],
        [f'{MALFORMED} (Unexpected attribute "0x00" in client-first-message.)'],
    ),
    "bound to nothing": (
        [BOUND_FIRST, final(FINAL)],
        [CHALLENGE, "FATAL 28000: SCRAM channel binding check failed"],
    ),
    "bound to another server": (
        [
            BOUND_FIRST,
            final(b"c=" + base64.b64encode(b"p=" + BOUND + b",," + bytes(32)) + b",r=<nonce>,p="),
        ],
        [CHALLENGE, "FATAL 28000: SCRAM channel binding check failed"],
    ),
}
"""The same over TLS, to a server that has a certificate."""
