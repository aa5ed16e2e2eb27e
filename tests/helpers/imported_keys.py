"""Keys as another system makes them, and their hashes, for tests that import them."""

import hashlib
import secrets

__all__ = ["IMPORTED_PREFIX", "imported_key", "sha256_of"]

IMPORTED_PREFIX = "acme_live_"
"""Of all keys here. A server accepts them with the setting `imported_prefixes`."""


def imported_key() -> str:
    """Return a new key."""
    return IMPORTED_PREFIX + secrets.token_urlsafe(24)


def sha256_of(key: str) -> bytes:
    """Return the hash with which a key is imported."""
    return hashlib.sha256(key.encode()).digest()
