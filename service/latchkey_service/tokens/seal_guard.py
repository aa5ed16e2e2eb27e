"""Decides which rows a process trusts by their seals, and seals the rows of earlier releases.

A row without a seal comes from a release without seals. This release seals such rows in the
background when it starts, and accepts them meanwhile. When none is left, and no server of an
earlier release runs, it stores a proof that only a holder of the pepper can make. From then on, a
row without a seal is not genuine. The proof is kept for each pepper.
"""

import asyncio
import math
from collections.abc import Callable

from latchkey_service.errors import NO_ANSWER, StoreUnavailable
from latchkey_service.secret_format import Keyring
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.seal import NO_SEAL, Sealer
from latchkey_service.tokens.upkeep_store import UpkeepStore
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["SealGuard", "seal_rows"]

# Between attempts at sealing. While a server of an earlier release runs, it makes rows to seal.
SEALING_SECONDS = 1.0
SEALING_BATCH = 1_000
# Between log lines about rows that are not genuine: somebody may have changed thousands.
LOG_SECONDS = 10.0


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


async def seal_rows(guard: SealGuard, store: UpkeepStore) -> None:
    """Seal the rows of earlier releases until none is left. Retries while the database is down."""
    sealed = 0
    while True:
        try:
            guard.learn(await store.seal_proofs(guard.pepper_ids))
            sealed += await _seal_all(guard, store)
            for pepper_id in guard.sealing:
                proof = guard.sealer.all_sealed(pepper_id)
                if proof is not None:
                    await store.store_seal_proof(pepper_id, proof)
            guard.learn(await store.seal_proofs(guard.pepper_ids))
        except StoreUnavailable:
            pass
        else:
            if not guard.sealing:
                break
        await asyncio.sleep(SEALING_SECONDS)
    if sealed:
        logger().info("rows of an earlier release are sealed", rows=sealed)


async def _seal_all(guard: SealGuard, store: UpkeepStore) -> int:
    """Seal the rows that have no seal; return how many there were."""
    count = 0
    while guard.sealing and (rows := await store.unsealed(sorted(guard.sealing), SEALING_BATCH)):
        await store.store_seals(
            [
                row._replace(secret=row.secret._replace(seal=_seal_of(guard.sealer, *row[:2])))
                for row in rows
            ]
        )
        count += len(rows)
        # Others keep the event loop meanwhile.
        await asyncio.sleep(0)
    return count


def _seal_of(sealer: Sealer, token: TokenRecord, secret: SecretRecord) -> bytes | None:
    ended = token.delete_time is not None or secret.retire_time is not None
    return NO_SEAL if ended else sealer.seal(token, secret)
