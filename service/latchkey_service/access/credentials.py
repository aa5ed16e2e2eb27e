"""Bearer credentials of callers: `lkc_`, 43 base62 digits (256 random bits), a 6-digit checksum.

The checksum is the CRC-32 of everything before it. As in token secrets, it serves secret scanners.
A policy stores the SHA-256 of the credential. A plain hash of 256 random bits reveals nothing
(ASVS 5.0 §11.5.1) and needs no key to protect.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from latchkey_service.secret_format import (
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
    """Return a new credential. `random_bytes` is the operating system's CSPRNG."""
    body = f"{CREDENTIAL_PREFIX}_{base62(int.from_bytes(random_bytes(RANDOM_BYTES)), BODY_DIGITS)}"
    return Secret(body + checksum(body))


def is_credential(presented: str) -> bool:
    """Return whether `presented` has the shape of a credential. Ignores the checksum."""
    return _SHAPE.fullmatch(presented) is not None


def digest_of(presented: str) -> bytes:
    """Return the SHA-256 digest (32 bytes) of `presented`."""
    return sha256(presented.encode("utf-8", "surrogatepass")).digest()


def policy_digest(credential: Secret) -> str:
    """Return the digest of a credential as a policy file stores it."""
    return _ALGORITHM + digest_of(credential.reveal()).hex()
