"""Seals the rows of earlier releases in the background, when a process starts (`seal.py`).

First the secrets, then the tokens: the seals of a token's secrets show whether its row is genuine.
"""

import asyncio

from latchkey_service.errors import StoreUnavailable
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.seal import NO_SEAL, Sealer, SealGuard, TokenSeal
from latchkey_service.tokens.upkeep_store import UnsealedToken, UpkeepStore
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
            sealed += await _seal_secrets(guard, store)
            # A token can be judged only by secrets that are sealed.
            if not guard.sealing:
                sealed += await _seal_tokens(guard, store)
        except StoreUnavailable:
            pass
        else:
            if not guard.sealing and guard.tokens_sealed:
                break
        await asyncio.sleep(SEALING_SECONDS)
    if sealed:
        logger().info("rows of an earlier release are sealed", rows=sealed)


async def _seal_secrets(guard: SealGuard, store: UpkeepStore) -> int:
    """Seal the secrets without a seal, and store the proofs; return how many there were."""
    guard.learn(await store.seal_proofs(guard.pepper_ids))
    # Before this process seals its first row, because calls wait for it.
    guard.learn_tokens(await store.token_seal_proofs(guard.pepper_ids))
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
    for pepper_id in guard.sealing:
        proof = guard.sealer.all_sealed(pepper_id)
        if proof is not None:
            await store.store_seal_proof(pepper_id, proof)
    guard.learn(await store.seal_proofs(guard.pepper_ids))
    return count


async def _seal_tokens(guard: SealGuard, store: UpkeepStore) -> int:
    """Seal the tokens without a seal, and store the proofs; return how many were sealed."""
    count, after_id = 0, ""
    while rows := await store.unsealed_tokens(after_id, SEALING_BATCH):
        after_id = rows[-1].token.id
        sealed = [(row, seal) for row in rows if (seal := _token_seal_of(guard, row)) is not None]
        await store.store_token_seals(sealed)
        count += len(sealed)
        await asyncio.sleep(0)
    proofs = await store.token_seal_proofs(guard.pepper_ids)
    guard.learn_tokens(proofs)
    for pepper_id in guard.pepper_ids:
        proof = guard.sealer.tokens_sealed(pepper_id)
        # A pepper that is added later gets its proof from that of an earlier one.
        if proof is not None and proofs.get(pepper_id) != proof:
            await store.store_token_seal_proof(pepper_id, proof, known_sealed=guard.tokens_sealed)
    guard.learn_tokens(await store.token_seal_proofs(guard.pepper_ids))
    return count


def _seal_of(sealer: Sealer, token: TokenRecord, secret: SecretRecord) -> bytes | None:
    ended = token.delete_time is not None or secret.retire_time is not None
    return NO_SEAL if ended else sealer.seal(token, secret)


def _token_seal_of(guard: SealGuard, row: UnsealedToken) -> TokenSeal | None:
    """Return the seal for a token's row, or None if another host has to judge it.

    A row that its secrets show to be changed gets a seal that is never valid. A row without a
    working secret is sealed as it is, but only before all tokens were sealed for the first time.
    """
    sealer = guard.sealer
    if row.newest_pepper_id is None:
        # Each token has at least one row of a secret, which only its removal takes.
        return TokenSeal(NO_SEAL, None)
    if not sealer.has(row.newest_pepper_id):
        return None
    judges = [secret for secret in row.secrets if sealer.has(secret.pepper_id)]
    if not all(guard.trusts(row.token, secret) for secret in judges):
        return TokenSeal(NO_SEAL, None)
    if not judges and guard.tokens_sealed:
        return None
    return sealer.seal_token(row.token, [row.newest_pepper_id])
