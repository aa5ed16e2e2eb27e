"""Bearer credentials of callers: `lkc_`, 43 base62 digits (256 random bits), 6 of a checksum.

The checksum, CRC-32 of all that comes before it, is for scanners, as in secrets of tokens. A policy
has SHA-256 of the whole: of 256 random bits a plain hash tells nothing (ASVS 5.0 §11.5.1), and it
needs no key that would have to be kept.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from latchkey_service.secrets import (
    BODY_DIGITS,
    CREDENTIAL_PREFIX,
    CREDENTIAL_SHAPE,
    RANDOM_BYTES,
    Secret,
    base62,
    checksum,
)

__all__ = ["DIGEST", "digest_of", "is_credential", "mint", "policy_digest"]

_ALGORITHM: Final = "sha256:"
DIGEST: Final = re.compile(_ALGORITHM + r"([0-9a-f]{64})")
_SHAPE: Final = re.compile(CREDENTIAL_SHAPE)


def mint(random_bytes: Callable[[int], bytes]) -> Secret:
    """Return a new credential. `random_bytes` is the OS's CSPRNG, passed in."""
    body = f"{CREDENTIAL_PREFIX}_{base62(int.from_bytes(random_bytes(RANDOM_BYTES)), BODY_DIGITS)}"
    return Secret(body + checksum(body))


def is_credential(presented: str) -> bool:
    """Tell whether it has a credential's shape; the checksum is not looked at."""
    return _SHAPE.fullmatch(presented) is not None


def digest_of(presented: str) -> bytes:
    """Return the digest (32 bytes) of whatever was presented."""
    return sha256(presented.encode("utf-8", "surrogatepass")).digest()


def policy_digest(credential: Secret) -> str:
    """Return what a policy file has of a credential."""
    return _ALGORITHM + digest_of(credential.reveal()).hex()
