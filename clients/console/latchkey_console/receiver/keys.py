"""The public keys that sign reports: read from a file, and fetched from the partner's endpoint.

Owns the cache of keys and when it is refreshed. A report is accepted only with a signature by one
of these keys, so without a key the receiver refuses everything.

Anyone can send a report that names a made-up key, and only a fetch can show that it is made up. So
the keys are fetched regularly, whatever reports name. The further fetches that reports cause have
their own budget. Reports that name a known key never wait for a fetch.
"""

import asyncio
import base64
import binascii
import contextlib
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

__all__ = ["KeysError", "PublicKeys", "Undecided", "is_signed", "parse", "read"]

_log = logging.getLogger("latchkey.receiver")

# GitHub's document contains a few hundred bytes for each key, and about two keys.
DOCUMENT_BYTES_MAX: Final = 64 * 1024
KEYS_MAX: Final = 100
# For the whole fetch. GitHub waits 30 s for the answer to a report.
FETCH_SECONDS: Final = 5.0
# From one fetch to the next. GitHub allows 60 anonymous requests an hour for each address, which
# several receivers may share. A key that the partner withdraws is accepted for this long, or longer
# while the fetch fails: refusing genuine reports would leave leaked secrets alive.
POLL_SECONDS: Final = 300.0
# The budget of further fetches for reports that name an unknown key: so many at once, and one more
# after each such interval. Anyone can spend it, so it allows at most 35 an hour.
UNKNOWN_FETCHES_MAX: Final = 5
UNKNOWN_FETCH_SECONDS: Final = 120.0
# Reports that may wait for a fetch at the same time: a quarter of the receiver's connections, so
# that reports with made-up keys leave most of them free.
WAITING_MAX: Final = 16
# A P-256 signature in DER has at most 72 bytes.
_SIGNATURE_LENGTH_MAX: Final = 200

Keys = Mapping[str, EllipticCurvePublicKey]


class KeysError(ValueError):
    """The keys cannot be read. The message says why."""


class Undecided(Exception):
    """A key is unknown, and it cannot be fetched now. `seconds` is when to ask again."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the key is unknown, and the keys cannot be fetched now")
        self.seconds = seconds


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
        # Names of keys that a fetch for them did not find, and when. There are few, because each
        # fetch for an unknown key adds at most WAITING_MAX.
        self._absent: dict[str, float] = {}
        self._fetching: asyncio.Task[bool] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._waiting = 0
        self._budget = float(UNKNOWN_FETCHES_MAX)
        self._budget_at = monotonic()

    def has_any(self) -> bool:
        """Return whether there is any key."""
        return bool(self._fixed or self._fetched)

    async def find(self, identifier: str) -> EllipticCurvePublicKey | None:
        """Return the key with this identifier, or None if the partner has none.

        Fetches the keys if this one is unknown. Raises Undecided.
        """
        key = self._known(identifier)
        if key is not None or self._url is None or self._is_absent(identifier):
            return key
        if self._waiting >= WAITING_MAX:
            raise Undecided(FETCH_SECONDS)
        self._waiting += 1
        try:
            return await self._find_by_fetch(identifier, self._url)
        finally:
            self._waiting -= 1

    async def start(self) -> None:
        """Fetch the keys once, and from now on regularly. Logs failures."""
        if self._url is not None:
            await self._shared_fetch(self._url)
            self._polling = asyncio.create_task(self._poll(self._url))

    async def close(self) -> None:
        """Stop fetching, and close the connections."""
        for task in (self._polling, self._fetching):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._client.aclose()

    async def _poll(self, url: str) -> None:
        """Fetch the keys regularly. Reports cannot delay this."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self._shared_fetch(url)

    async def _find_by_fetch(self, identifier: str, url: str) -> EllipticCurvePublicKey | None:
        """Return the key, or None if a fetch that begins from now on does not find it."""
        if self._fetching is not None:
            # This fetch may have begun before the partner published the key. So it can only show
            # that the key exists.
            await asyncio.shield(self._fetching)
            if (key := self._known(identifier)) is not None:
                return key
        if self._fetching is None:
            self._spend()
        succeeded = await self._shared_fetch(url)
        if (key := self._known(identifier)) is not None:
            return key
        if not succeeded:
            raise Undecided(FETCH_SECONDS)
        self._absent[identifier] = self._monotonic()
        return None

    def _is_absent(self, identifier: str) -> bool:
        """Return whether a recent fetch did not find this key."""
        end = self._monotonic() - UNKNOWN_FETCH_SECONDS
        self._absent = {name: at for name, at in self._absent.items() if at > end}
        return identifier in self._absent

    def _spend(self) -> None:
        """Take one fetch for an unknown key from the budget. Raises Undecided."""
        now = self._monotonic()
        earned = (now - self._budget_at) / UNKNOWN_FETCH_SECONDS
        self._budget = min(self._budget + earned, UNKNOWN_FETCHES_MAX)
        self._budget_at = now
        if self._budget < 1:
            raise Undecided((1 - self._budget) * UNKNOWN_FETCH_SECONDS)
        self._budget -= 1

    async def _shared_fetch(self, url: str) -> bool:
        """Fetch the keys, or wait for the fetch that runs. Return whether it succeeded."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch_keys(url))
        # A client that leaves does not end the fetch for the others.
        return await asyncio.shield(self._fetching)

    async def _fetch_keys(self, url: str) -> bool:
        """Replace the fetched keys. Logs a failure, and returns whether it succeeded."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                keys = parse(await self._fetch(url))
        except KeysError as error:
            _log.warning("fetched keys are unusable: %s", error)
            return False
        except Exception as error:  # noqa: BLE001 - an unexpected one must not end the polls
            _log.warning("cannot fetch the keys: %s", type(error).__name__)
            return False
        else:
            self._fetched = keys
            return True
        finally:
            self._fetching = None

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
