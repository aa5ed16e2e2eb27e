"""Seals rows, so that nobody who can only write to the database can revive, widen or plant a token.

A seal is an HMAC over everything that the verdict on a secret depends on. Its key is derived from
the pepper that made the secret's digest, and so it rotates with the pepper. Pure.

A change that ends a secret empties its seal instead of sealing the new state. So restoring the
other columns does not revive the secret, and such changes need not read the row first. What a seal
cannot detect is an older genuine row that somebody has kept and puts back.
"""

import hmac
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from latchkey_service.secret_format import Pepper
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["NO_SEAL", "Sealer"]

NO_SEAL = b""
"""The seal of a secret that has ended."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_KEY_USE = b"latchkey row seal\0"
_ALL_SEALED = b"latchkey: every row is sealed\0"


class Sealer:
    """Seals and checks rows with the keys derived from some peppers."""

    def __init__(self, peppers: Iterable[Pepper]) -> None:
        # HMACs that have processed their key: copying one takes half the time of a new HMAC.
        self._keyed = {
            pepper.id: hmac.new(hmac.digest(pepper.key, _KEY_USE, "sha256"), digestmod=sha256)
            for pepper in peppers
        }

    def seal(self, token: TokenRecord, secret: SecretRecord) -> bytes | None:
        """Return the seal (32 bytes) of a secret, or None without its pepper."""
        keyed = self._keyed.get(secret.pepper_id)
        if keyed is None:
            return None
        mac = keyed.copy()
        # A JSON list separates its elements unambiguously.
        mac.update(
            json.dumps(
                (
                    secret.digest.hex(),
                    token.id,
                    token.account_id,
                    token.scope,
                    _microseconds(token.expire_time),
                    token.disable_time is not None,
                    token.allowed_networks,
                    token.permissions,
                    _microseconds(secret.expire_time),
                    secret.retire_on_first_use,
                )
            ).encode()
        )
        return mac.digest()

    def is_genuine(self, token: TokenRecord, secret: SecretRecord) -> bool:
        """Return whether the stored seal is the right one."""
        expected = self.seal(token, secret)
        return (
            expected is not None
            and secret.seal is not None
            and hmac.compare_digest(expected, secret.seal)
        )

    def all_sealed(self, pepper_id: str) -> bytes | None:
        """Return the proof that every row was sealed, or None without this pepper."""
        keyed = self._keyed.get(pepper_id)
        if keyed is None:
            return None
        mac = keyed.copy()
        mac.update(_ALL_SEALED)
        return mac.digest()

    def proves_all_sealed(self, pepper_id: str, proof: bytes | None) -> bool:
        """Return whether `proof` was made with this pepper."""
        expected = self.all_sealed(pepper_id)
        return expected is not None and hmac.compare_digest(expected, proof or b"")


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - _EPOCH) // _MICROSECOND
