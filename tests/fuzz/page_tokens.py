"""Page tokens of an account's tokens and of the audit log.

The first byte of an input says whether it is a token as received, or the content for the service to
seal: a mutation alone would never have a valid seal.
"""

import base64
import random
import struct
from collections.abc import Iterable
from datetime import UTC, datetime

from latchkey_coherence.identifiers import TOKEN_ID
from latchkey_service.audit.audit_table import Cursor, Filter
from latchkey_service.errors import InvalidArgument
from latchkey_service.rpc import audit_service
from latchkey_service.tokens import page_tokens

from tests.fuzz.target import Finding, Target

ACCOUNTS = ("acme", "globex:eu", "a" * 64)
FILTERS = (
    Filter("", "", "", "", 0, None, None),
    Filter("acme", "tok_1", "shop", "/latchkey.v1.TokenService/List", 2, None, None),
    Filter(
        "é", "'", "\\", "", 1, datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
    ),
)
# The lists, and the ids in them.
KINDS = (
    (ACCOUNTS, TOKEN_ID),
    (tuple(map(repr, FILTERS)), audit_service._ID),
)
MOMENTS = (0, 1, -1, 10**15, -62135596800000000, 253402300799999999, 2**63 - 1, -(2**63))
PLAIN, SEALED = 0, 1


class PageTokens(Target):
    """Two kinds, each plain or sealed, for one of three accounts or filters."""

    length_max = 256
    mutates = True

    def seeds(self) -> Iterable[bytes]:
        moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
        for who in range(3):
            token_id = "tok_" + "0123456789abcdefghjkmnpqrs"
            of_tokens = page_tokens.encode(ACCOUNTS[who], moment, token_id)
            of_audit = page_tokens.encode(repr(FILTERS[who]), moment, "7")
            yield bytes([0, PLAIN, who]) + of_tokens.encode()
            yield bytes([1, PLAIN, who]) + of_audit.encode()
            yield bytes([0, SEALED, who]) + struct.pack(">q", MOMENTS[who]) + token_id.encode()
            yield bytes([1, SEALED, who]) + struct.pack(">q", MOMENTS[who]) + b"7"

    def mutate(self, data: bytes, length_max: int, chance: random.Random) -> bytes:
        head, body = bytearray(data[:3].ljust(3, b"\0")), bytearray(data[3:])
        place = chance.randint(0, len(body))
        match chance.randrange(6):
            case 0:
                head[chance.randrange(3)] = chance.randrange(3)
            case 1 if head[1] % 2 == SEALED:
                moment = chance.choice(MOMENTS) + chance.randint(-2, 2) * 10 ** chance.randrange(16)
                body[:8] = struct.pack(">Q", moment % 2**64)
            case 2 if head[1] % 2 == SEALED:
                body[8:] = chance.choice(
                    (
                        b"tok_" + b"0" * 26,
                        b"tok_" + b"z" * 26,
                        b"tok_",
                        b"\xff" * 8,
                        b"9" * 18,
                        b"07",
                    )
                )
            case 3:
                body[place:place] = chance.choice((b"=", b"+", b"/", b"-", b"_", b"A", b"\xc3\xa9"))
            case 4 if body:
                body[place % len(body)] = chance.randrange(256)
            case _:
                del body[place:]
        return bytes(head + body)

    def one(self, data: bytes) -> None:
        kind, sealed, who = (
            byte % n for byte, n in zip(data[:3].ljust(3, b"\0"), (2, 2, 3), strict=True)
        )
        body = data[3:]
        lists, ids = KINDS[kind]
        token = _text(page_tokens._seal(lists[who], body) + body if sealed else None, body)
        try:
            position = page_tokens.decode(lists[who], token, ids)
        except InvalidArgument as error:
            _clear(error)
            return
        if page_tokens.encode(lists[who], *position) != token:
            raise Finding("another page token stands for the same position")
        if kind == 1:
            # As the audit service reads it.
            Cursor(position[0], int(position[1]))
        for other in set(lists) - {lists[who]}:
            try:
                page_tokens.decode(other, token, ids)
            except InvalidArgument:
                continue
            raise Finding("a page token is valid for another account or other filters")


def _text(sealed: bytes | None, plain: bytes) -> str:
    if sealed is not None:
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")
    # In the form that protobuf produces; the parser rejects all other bytes.
    return plain.decode("utf-8", "replace")


def _clear(error: InvalidArgument) -> None:
    if [violation.field for violation in error.violations] != ["page_token"]:
        raise Finding("the error does not name the field")


TARGET = PageTokens
