"""Bearer credentials of callers: their format, their digests, and how a call presents them.

A credential is `lkc_`, 43 base62 digits (256 random bits) and a 6-digit checksum.

The checksum is the CRC-32 of everything before it. As in token secrets, it serves secret scanners.
A policy stores the SHA-256 of the credential. A plain hash of 256 random bits reveals nothing
(ASVS 5.0 §11.5.1) and needs no key to protect.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from latchkey_service.errors import Unauthenticated
from latchkey_service.secret_format import (
    BODY_DIGITS,
    CREDENTIAL_PREFIX,
    CREDENTIAL_SHAPE,
    RANDOM_BYTES,
    Secret,
    base62,
    checksum,
)

__all__ = ["DIGEST", "bearer", "digest_of", "mint", "policy_digest"]

_ALGORITHM: Final = "sha256:"
DIGEST: Final = re.compile(_ALGORITHM + r"([0-9a-f]{64})")
_SHAPE: Final = re.compile(CREDENTIAL_SHAPE)
_SCHEME: Final = "bearer "
_SCHEME_LENGTH: Final = len(_SCHEME)


def mint(random_bytes: Callable[[int], bytes]) -> Secret:
    """Return a new credential. `random_bytes` is the operating system's CSPRNG."""
    body = f"{CREDENTIAL_PREFIX}_{base62(int.from_bytes(random_bytes(RANDOM_BYTES)), BODY_DIGITS)}"
    return Secret(body + checksum(body))


def bearer(authorization: str | bytes) -> str:
    """Return the credential in the value of `authorization` (RFC 6750 §2.1).

    Raises Unauthenticated for any other value: a call with a malformed credential does not count as
    anonymous. Only text in the shape of our own credentials is accepted, whatever its checksum.
    Otherwise, a policy with the digest of a guessable text would admit anyone who guesses it.
    """
    if isinstance(authorization, str) and authorization[:_SCHEME_LENGTH].lower() == _SCHEME:
        # As guards do: any number of spaces before the credential, and white space after it.
        credential = authorization[_SCHEME_LENGTH:].lstrip(" ").rstrip(" \t")
        if _SHAPE.fullmatch(credential):
            return credential
    raise Unauthenticated(
        "The metadata 'authorization' does not contain a bearer credential of a caller.",
        "CREDENTIAL_MALFORMED",
    )


def digest_of(presented: str) -> bytes:
    """Return the SHA-256 digest (32 bytes) of `presented`."""
    return sha256(presented.encode("utf-8", "surrogatepass")).digest()


def policy_digest(credential: Secret) -> str:
    """Return the digest of a credential as a policy file stores it."""
    return _ALGORITHM + digest_of(credential.reveal()).hex()
