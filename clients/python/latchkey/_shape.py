"""Checks the format of a secret without a server. Pure.

Format and checksum are public. Only the server can say whether a secret is known.
"""

import re
import zlib
from typing import Final

# Prefix and underscore, 43 random characters, 8 of tag, 6 of checksum.
_SECRET: Final = re.compile(r"[a-z]{2,10}_[0-9A-Za-z]{57}")
# A secret that was imported into the service: the characters of a bearer token (RFC 6750 §2.1).
_IMPORTED: Final = re.compile(r"[0-9A-Za-z._~+/=-]{16,128}")
_CHECKSUM_LENGTH: Final = 6
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def is_well_formed(text: str) -> bool:
    """Return whether `text`, which may be any string, has a secret's format and checksum."""
    # `$` would accept a trailing newline, so use fullmatch. A match contains only ASCII.
    if _SECRET.fullmatch(text) is None:
        return False
    return checksum(text[:-_CHECKSUM_LENGTH]) == text[-_CHECKSUM_LENGTH:]


def may_be_secret(text: str, imported_prefixes: tuple[str, ...] | None) -> bool:
    """Return whether the service may know `text`, which may be any string.

    It may if `text` is well-formed, or looks like an imported secret with one of the prefixes. None
    means that the prefixes are not known. An empty prefix stands for any.
    """
    if is_well_formed(text):
        return True
    if imported_prefixes is not None and not text.startswith(imported_prefixes):
        return False
    return _IMPORTED.fullmatch(text) is not None


def checksum(body: str) -> str:
    """Return the CRC-32 of `body` (ASCII) as 6 base62 digits, most significant first."""
    rest = zlib.crc32(body.encode("ascii"))
    digits = ""
    for _ in range(_CHECKSUM_LENGTH):
        rest, digit = divmod(rest, 62)
        digits = _BASE62[digit] + digits
    return digits


def placeholder(secret: str) -> str:
    """Return a text to show instead of `secret`: its prefix, if it has a secret's format."""
    if _SECRET.fullmatch(secret) is None:
        return "…(redacted)"
    return f"{secret.partition('_')[0]}_…(redacted)"
