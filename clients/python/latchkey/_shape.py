"""What every secret looks like: the check that needs no server. Pure.

It owns shape and checksum, which are public. Whether a secret is known is the server's to say.
"""

import re
import zlib
from typing import Final

# Prefix and underscore, 43 characters of randomness, 8 of tag, 6 of checksum.
_SECRET: Final = re.compile(r"[a-z]{2,10}_[0-9A-Za-z]{57}")
# Anywhere in a text, longer runs too, and one stuck to the end of another, which has taken its
# prefix, and a caller's credential, which has no tag: for redaction, too much is better than too
# little.
_SECRET_WITHIN: Final = re.compile(r"([a-z]{2,10})(?:_[0-9A-Za-z]{49,})+")
_CHECKSUM_LENGTH: Final = 6
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def is_well_formed(text: str) -> bool:
    """Tell whether `text` has a secret's shape and checksum. Any string may be asked about."""
    # fullmatch, for `$` would let a trailing newline through. What matches is ASCII.
    if _SECRET.fullmatch(text) is None:
        return False
    return checksum(text[:-_CHECKSUM_LENGTH]) == text[-_CHECKSUM_LENGTH:]


def checksum(body: str) -> str:
    """Return the CRC-32 of `body` (ASCII) as 6 base62 digits, most significant first."""
    rest = zlib.crc32(body.encode("ascii"))
    digits = ""
    for _ in range(_CHECKSUM_LENGTH):
        rest, digit = divmod(rest, 62)
        digits = _BASE62[digit] + digits
    return digits


def placeholder(secret: str) -> str:
    """Return what is shown in place of `secret`: its prefix, if it has a secret's shape."""
    if _SECRET.fullmatch(secret) is None:
        return "…(redacted)"
    return f"{secret.partition('_')[0]}_…(redacted)"


def redact(text: str) -> str:
    """Return `text` with everything that looks like a secret replaced by its prefix."""
    return _SECRET_WITHIN.sub(r"\1_…(redacted)", text)
