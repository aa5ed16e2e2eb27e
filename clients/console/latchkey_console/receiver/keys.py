"""The public keys that sign reports: read from a file, and fetched from the partner's endpoint.

Owns the cache of keys and when it is refreshed. A report is accepted only with a signature by one
of these keys, so without a key the receiver refuses everything.
"""

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

__all__ = ["KeysError", "PublicKeys", "is_signed", "parse", "read"]

_log = logging.getLogger("latchkey.receiver")

# GitHub's document has some hundred bytes for each key, and two keys or so.
DOCUMENT_BYTES_MAX: Final = 64 * 1024
KEYS_MAX: Final = 100
# For the whole fetch. GitHub waits 30 s for the answer to a report.
FETCH_SECONDS: Final = 5.0
# Anyone can name an unknown key. GitHub allows 60 anonymous requests an hour for each address.
REFRESH_SECONDS_MIN: Final = 120.0
# A key that the partner has withdrawn is accepted for this long, or longer while the fetch fails:
# refusing genuine reports would leave leaked secrets alive.
REFRESH_SECONDS: Final = 86_400.0
# A P-256 signature in DER has at most 72 bytes.
_SIGNATURE_LENGTH_MAX: Final = 200

Keys = Mapping[str, EllipticCurvePublicKey]


class KeysError(ValueError):
    """The keys cannot be read. The message says why."""


def parse(document: bytes) -> Keys:
    """Return the keys of a document in GitHub's format, by identifier. Raises KeysError.

    The document is `{"public_keys": [{"key_identifier": ..., "key": PEM}, ...]}`. Keys of another
    type than ECDSA with P-256 are ignored.
    """
    try:
        entries: Any = json.loads(document)["public_keys"]
        found = {str(entry["key_identifier"]): str(entry["key"]) for entry in entries}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KeysError("it is not JSON with an array public_keys") from None
    if len(found) > KEYS_MAX:
        raise KeysError(f"it has more than {KEYS_MAX} keys")
    keys: dict[str, EllipticCurvePublicKey] = {}
    for identifier, text in found.items():
        try:
            key = load_pem_public_key(text.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise KeysError("a key is not a public key in PEM format") from None
        if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
            keys[identifier] = key
    if not keys:
        raise KeysError("it has no ECDSA key with the curve P-256")
    return keys


def read(path: Path) -> Keys:
    """Return the keys in a file. Raises KeysError."""
    try:
        with path.open("rb") as file:
            return parse(file.read(DOCUMENT_BYTES_MAX))
    except OSError as error:
        raise KeysError(error.strerror or type(error).__name__) from None


def is_signed(key: EllipticCurvePublicKey, signature: str, body: bytes) -> bool:
    """Return whether `signature`, in base64, is the key's signature of exactly these bytes."""
    if len(signature) > _SIGNATURE_LENGTH_MAX:
        return False
    try:
        key.verify(base64.b64decode(signature, validate=True), body, ECDSA(SHA256()))
    except (binascii.Error, ValueError, InvalidSignature):
        return False
    return True


class PublicKeys:
    """The keys from a file and from a URL. Event loop only."""

    def __init__(
        self,
        fixed: Keys,
        url: str | None,
        monotonic: Callable[[], float],
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._fixed = fixed
        self._url = url
        self._monotonic = monotonic
        # No redirects: the operator has chosen whom to trust.
        self._client = client or httpx2.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False)
        self._fetched: Keys = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching = asyncio.Lock()

    def has_any(self) -> bool:
        """Return whether there is any key."""
        return bool(self._fixed or self._fetched)

    async def find(self, identifier: str) -> EllipticCurvePublicKey | None:
        """Return the key with this identifier, or None. May fetch the keys first."""
        if self._is_old() or self._known(identifier) is None:
            await self.refresh()
        return self._known(identifier)

    async def refresh(self) -> None:
        """Fetch the keys, unless that was tried a short time ago. Logs failures."""
        if self._url is None:
            return
        async with self._fetching:
            now = self._monotonic()
            if self._tried_at is not None and now - self._tried_at < REFRESH_SECONDS_MIN:
                return
            self._tried_at = now
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    keys = parse(await self._fetch(self._url))
            except KeysError as error:
                _log.warning("fetched keys are unusable: %s", error)
            except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
                _log.warning("cannot fetch the keys: %s", type(error).__name__)
            else:
                self._fetched, self._fetched_at = keys, now

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _fetch(self, url: str) -> bytes:
        async with self._client.stream("GET", url) as answer:
            if answer.status_code != httpx2.codes.OK:
                raise KeysError(f"the endpoint answered with status {answer.status_code}")
            document = b""
            async for part in answer.aiter_bytes():
                document += part
                if len(document) > DOCUMENT_BYTES_MAX:
                    raise KeysError(f"the answer has more than {DOCUMENT_BYTES_MAX} bytes")
            return document

    def _known(self, identifier: str) -> EllipticCurvePublicKey | None:
        return self._fetched.get(identifier) or self._fixed.get(identifier)

    def _is_old(self) -> bool:
        at = self._fetched_at
        return at is None or self._monotonic() - at > REFRESH_SECONDS
