"""Seals the rows of earlier releases in the background, when a process starts (`seal.py`)."""

import asyncio

from latchkey_service.errors import StoreUnavailable
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.seal import NO_SEAL, Sealer, SealGuard
from latchkey_service.tokens.upkeep_store import UpkeepStore
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["seal_rows"]

# Between attempts at sealing. While a server of an earlier release runs, it makes rows to seal.
SEALING_SECONDS = 1.0
SEALING_BATCH = 1_000


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
