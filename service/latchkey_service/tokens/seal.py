"""Seals rows, so that nobody who can only write to the database can revive, widen or plant a token.

A seal is an HMAC over everything that the verdict on a secret depends on. Its key is derived from
the pepper that made the secret's digest, and so it rotates with the pepper. Pure.

A change that ends a secret empties its seal instead of sealing the new state. So restoring the
other columns does not revive the secret, and such changes need not read the row first. What a seal
cannot detect is an older genuine row that somebody has kept and puts back.

A row without a seal comes from a release without seals. `sealing.py` seals such rows when this
release starts, and they are accepted meanwhile. When none is left, and no server of an earlier
release runs, it stores a proof for the pepper that only a holder of the pepper can make. From then
on, a row without a seal is not genuine.
"""

import hmac
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from latchkey_service.errors import NO_ANSWER, StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["NO_SEAL", "SealGuard", "Sealer"]

NO_SEAL = b""
"""The seal of a secret that has ended."""
# Between log lines about rows that are not genuine: somebody may have changed thousands.
LOG_SECONDS = 10.0
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
        # Absent without a limit, so that the seals of earlier releases stay right.
        limit = () if token.rate_limit is None else (token.rate_limit,)
        # A JSON list separates its elements unambiguously.
        elements = (
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
            *limit,
        )
        mac.update(json.dumps(elements).encode())
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


class SealGuard:
    """Checks seals. Event loop only."""

    def __init__(self, keyring: Keyring, monotonic: Callable[[], float]) -> None:
        self.sealer = Sealer(keyring.peppers)
        self.pepper_ids = tuple(pepper.id for pepper in keyring.peppers)
        self.rejected = 0
        """Rows that were not genuine. Only rises."""
        self._monotonic = monotonic
        # Peppers whose secrets need no seal yet. None: not known yet.
        self._unsealed: frozenset[str] | None = None
        self._logged_at = -math.inf
        self._log = logger()

    @property
    def sealing(self) -> frozenset[str]:
        """The peppers whose secrets may not all be sealed yet."""
        return frozenset(self.pepper_ids) if self._unsealed is None else self._unsealed

    def learn(self, proofs: dict[str, bytes | None]) -> None:
        """Learn from the stored proofs which peppers' secrets are all sealed.

        Once a process has seen a proof, it does not forget it.
        """
        self._unsealed = frozenset(
            pepper_id
            for pepper_id in self.sealing
            if not self.sealer.proves_all_sealed(pepper_id, proofs.get(pepper_id))
        )

    def trusts(self, token: TokenRecord, secret: SecretRecord) -> bool:
        """Return whether a row that has not ended is genuine. Logs and counts it if not.

        Raises StoreUnavailable if the row has no seal, and it is not known yet whether it needs
        one.
        """
        if secret.seal is None:
            if self._unsealed is None:
                raise StoreUnavailable(NO_ANSWER)
            if secret.pepper_id in self._unsealed:
                return True
        elif self.sealer.is_genuine(token, secret):
            return True
        self.rejected += 1
        now = self._monotonic()
        if now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            self._log.error(
                "a token was changed outside of Latchkey and is refused",
                token_id=token.id,
                account_id=token.account_id,
                rejected=self.rejected,
            )
        return False


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - _EPOCH) // _MICROSECOND
