"""Page tokens: opaque texts for a position in a list (AIP-158). Pure.

    base64url(seal, microseconds since 1970 as 8 bytes, id)

A page token grants no rights: every query applies the account or the filters of its own call. So
the seal need not be a signature. It detects damage, and page tokens of another list.
"""

import base64
import binascii
import hashlib
import re
import struct
from datetime import UTC, datetime, timedelta
from typing import Final

from latchkey_service.errors import FieldViolation, InvalidArgument

__all__ = ["decode", "encode"]

LENGTH_MAX: Final = 200
_SEAL_BYTES: Final = 8
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def encode(of: str, time: datetime, identifier: str) -> str:
    """Return the page token for the position after the entry with this time and id.

    `of` describes the list, such as the account or all filters.
    """
    payload = struct.pack(">q", (time - _EPOCH) // _MICROSECOND) + identifier.encode()
    return base64.urlsafe_b64encode(_seal(of, payload) + payload).decode().rstrip("=")


def decode(of: str, page_token: str, ids: re.Pattern[str]) -> tuple[datetime, str]:
    """Return the time and the id, which matches `ids`.

    Raises InvalidArgument if the page token is damaged or belongs to another list.
    """
    damaged = FieldViolation(
        "page_token", "is damaged or belongs to another list; start with the first page"
    )
    if len(page_token) > LENGTH_MAX:
        raise InvalidArgument(damaged)
    try:
        # validate=True, because b64decode otherwise drops unknown characters.
        padded = page_token + "=" * (-len(page_token) % 4)
        raw = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
        seal, payload = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
        if seal != _seal(of, payload):
            raise InvalidArgument(damaged)
        (microseconds,) = struct.unpack(">q", payload[:8])
        time, identifier = _EPOCH + microseconds * _MICROSECOND, payload[8:].decode("ascii")
        # Some last characters of base64 have several spellings; accept only ours.
        if not ids.fullmatch(identifier) or encode(of, time, identifier) != page_token:
            raise InvalidArgument(damaged)
    except (binascii.Error, UnicodeError, struct.error, OverflowError):
        raise InvalidArgument(damaged) from None
    return time, identifier


def _seal(of: str, payload: bytes) -> bytes:
    bound = of.encode() + b"\0" + payload
    return hashlib.blake2s(bound, digest_size=_SEAL_BYTES, person=b"lk.page").digest()
