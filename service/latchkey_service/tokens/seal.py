"""Seals rows, so that nobody who can only write to the database can revive, widen or plant a token.

A seal is an HMAC over everything that the verdict on a secret depends on. Its key is derived from
the pepper that made the secret's digest, and so it rotates with the pepper. Pure.

The row of a token has a seal too, over the same fields. A change of the token checks it before it
makes new seals. Without it, the row of a token whose secrets have all ended would prove nothing,
and its next secret would get whatever rights somebody had written into the row.

A change that ends a secret or a token empties its seal instead of sealing the new state. So
restoring the other columns does not revive it, and such changes need not read the row first. What a
seal cannot detect is an older genuine row that somebody has kept and puts back.

A row without a seal comes from a release without seals. `sealing.py` seals such rows when this
release starts, and they are accepted meanwhile. When none is left, and no server of an earlier
release runs, it stores a proof for the pepper that only a holder of the pepper can make. From then
on, a secret's row without a seal is not genuine, and neither is a token's row, unless the seal of a
secret proves the same fields. An earlier release that runs again after that leaves such tokens.
"""

import hmac
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NamedTuple

from latchkey_service.errors import NO_ANSWER, StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["NO_SEAL", "SealGuard", "Sealer", "TokenSeal"]

NO_SEAL = b""
"""The seal of a secret or token that has ended, or of a row that was not genuine."""
# Between log lines about rows that are not genuine: somebody may have changed thousands.
LOG_SECONDS = 10.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_KEY_USE = b"latchkey row seal\0"
_ALL_SEALED = b"latchkey: every row is sealed\0"
_TOKENS_SEALED = b"latchkey: every token is sealed\0"


class TokenSeal(NamedTuple):
    """The seal of a token's row, and the pepper that it was made with."""

    seal: bytes | None
    """None: not sealed yet. Empty: the token was deleted, or was not genuine."""
    pepper_id: str | None


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
        return self._digest(
            secret.pepper_id,
            secret.digest.hex(),
            *_rules_of(token),
            _microseconds(secret.expire_time),
            secret.retire_on_first_use,
            # The ordinal decides which secrets end when a newer one is used, or when the owner ends
            # all but the newest. The seal of a first secret omits it, so that a token that was
            # never replaced keeps the seal of an earlier build.
            *(() if secret.ordinal == 0 else (secret.ordinal,)),
        )

    def seal_token(self, token: TokenRecord, pepper_ids: Iterable[str]) -> TokenSeal:
        """Return the seal of a live token's row, made with the first of these peppers that this
        host has.

        Raises ValueError if none is.
        """
        for pepper_id in pepper_ids:
            # Its input contains no digest, so a token's seal never equals a secret's.
            if (seal := self._digest(pepper_id, "token", *_rules_of(token))) is not None:
                return TokenSeal(seal, pepper_id)
        raise ValueError("no pepper to seal with")

    def has(self, pepper_id: str | None) -> bool:
        """Return whether this pepper is here."""
        return pepper_id in self._keyed

    def is_genuine_token(self, token: TokenRecord, stored: TokenSeal) -> bool:
        """Return whether the stored seal of a live token's row is the right one."""
        if stored.seal is None or stored.pepper_id is None or not self.has(stored.pepper_id):
            return False
        expected = self.seal_token(token, [stored.pepper_id]).seal
        return expected is not None and hmac.compare_digest(expected, stored.seal)

    def is_genuine(self, token: TokenRecord, secret: SecretRecord) -> bool:
        """Return whether the stored seal is the right one."""
        # None and NO_SEAL: there is nothing to compare.
        return bool(secret.seal) and _is_same(self.seal(token, secret), secret.seal)

    def all_sealed(self, pepper_id: str) -> bytes | None:
        """Return the proof that every secret was sealed, or None without this pepper."""
        return self._mac(pepper_id, _ALL_SEALED)

    def proves_all_sealed(self, pepper_id: str, proof: bytes | None) -> bool:
        """Return whether `proof` was made with this pepper."""
        return _is_same(self.all_sealed(pepper_id), proof)

    def tokens_sealed(self, pepper_id: str) -> bytes | None:
        """Return the proof that every token was sealed, or None without this pepper."""
        return self._mac(pepper_id, _TOKENS_SEALED)

    def proves_tokens_sealed(self, pepper_id: str, proof: bytes | None) -> bool:
        """Return whether `proof` was made with this pepper."""
        return _is_same(self.tokens_sealed(pepper_id), proof)

    def _digest(self, pepper_id: str, *fields: Any) -> bytes | None:
        # A JSON list separates its elements unambiguously.
        return self._mac(pepper_id, json.dumps(fields).encode())

    def _mac(self, pepper_id: str, text: bytes) -> bytes | None:
        keyed = self._keyed.get(pepper_id)
        if keyed is None:
            return None
        mac = keyed.copy()
        mac.update(text)
        return mac.digest()


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
        # Whether all tokens were sealed. None: not known yet.
        self._tokens_sealed: bool | None = None
        self._logged_at = -math.inf
        self._log = logger()

    @property
    def sealing(self) -> frozenset[str]:
        """The peppers whose secrets may not all be sealed yet."""
        return frozenset(self.pepper_ids) if self._unsealed is None else self._unsealed

    @property
    def tokens_sealed(self) -> bool:
        """Whether all tokens were sealed, as far as this process knows."""
        return bool(self._tokens_sealed)

    def learn(self, proofs: Mapping[str, bytes | None]) -> None:
        """Learn from the stored proofs which peppers' secrets are all sealed.

        Once a process has seen a proof, it does not forget it.
        """
        self._unsealed = frozenset(
            pepper_id
            for pepper_id in self.sealing
            if not self.sealer.proves_all_sealed(pepper_id, proofs.get(pepper_id))
        )

    def learn_tokens(self, proofs: Mapping[str, bytes | None]) -> None:
        """Learn from the stored proofs whether all tokens are sealed.

        One proof is enough, whichever pepper it was made with. Once a process has seen a proof, it
        does not forget it.
        """
        self._tokens_sealed = self.tokens_sealed or any(
            self.sealer.proves_tokens_sealed(pepper_id, proof)
            for pepper_id, proof in proofs.items()
        )

    def trusts_token(
        self, token: TokenRecord, stored: TokenSeal, secrets: Sequence[SecretRecord]
    ) -> bool:
        """Return whether the row of a live token is genuine. Logs and counts it if not.

        `secrets` are those of the token that are not retired. Raises StoreUnavailable if the token
        or a secret has no seal, and it is not known yet whether it needs one.
        """
        if not all(self.trusts(token, secret) for secret in secrets):
            return False
        if self.sealer.is_genuine_token(token, stored):
            return True
        # An earlier release leaves a token without a seal, or with that of a pepper that was
        # removed since. Each secret's seal proves the same fields.
        if (stored.seal is None or (stored.seal and not self.sealer.has(stored.pepper_id))) and any(
            secret.seal is not None for secret in secrets
        ):
            return True
        if stored.seal is None:
            if self._tokens_sealed is None:
                raise StoreUnavailable(NO_ANSWER)
            if not self._tokens_sealed:
                return True
        return self._rejected(token)

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
        return self._rejected(token)

    def _rejected(self, token: TokenRecord) -> bool:
        """Count and log a row that is not genuine. Return False."""
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


def _rules_of(token: TokenRecord) -> tuple[Any, ...]:
    """Return the fields of a token that the verdicts on its secrets depend on."""
    return (
        token.id,
        token.account_id,
        token.scope,
        _microseconds(token.expire_time),
        token.disable_time is not None,
        token.allowed_networks,
        token.permissions,
        # Absent without a limit, so that the seals of earlier releases stay valid.
        *(() if token.rate_limit is None else (token.rate_limit,)),
    )


def _is_same(expected: bytes | None, proof: bytes | None) -> bool:
    return expected is not None and hmac.compare_digest(expected, proof or b"")


def _microseconds(moment: datetime | None) -> int | str | None:
    if moment is None:
        return None
    # The driver returns infinity as a time without a zone. No release writes it.
    return "infinity" if moment.tzinfo is None else (moment - _EPOCH) // _MICROSECOND
