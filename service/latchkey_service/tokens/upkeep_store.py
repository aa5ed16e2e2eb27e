"""The SQL of upkeep: sealing the rows of earlier releases, and removing what has ended."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.seal import TokenSeal
from latchkey_service.tokens.token_table import COLUMNS, record_of
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["Unsealed", "UnsealedToken", "UpkeepStore"]


class Unsealed(NamedTuple):
    """A secret without a seal, and its token."""

    token: TokenRecord
    secret: SecretRecord
    version: int
    """Of the token."""


class UnsealedToken(NamedTuple):
    """A live token whose row has no seal."""

    token: TokenRecord
    version: int
    newest_pepper_id: str | None
    """That of its newest secret. None: it has no secret, not even one that has ended."""
    secrets: tuple[SecretRecord, ...]
    """Those that are not retired."""


class UpkeepStore:
    """Maintains rows. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def seal_proofs(self, pepper_ids: Sequence[str]) -> dict[str, bytes | None]:
        """Return the stored proofs that all secrets of these peppers are sealed, by pepper."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                "SELECT id, all_sealed FROM pepper WHERE id = ANY($1::text[])", list(pepper_ids)
            )
        return {row[0]: row[1] for row in rows}

    @retry_on_conflict
    async def unsealed(self, pepper_ids: Sequence[str], limit: int) -> list[Unsealed]:
        """Return up to `limit` secrets of these peppers that have no seal."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT t.version, s.digest, s.pepper_id, s.expire_time, s.retire_time,
                       s.retire_on_first_use, s.seal, s.ordinal, {COLUMNS}
                  FROM secret s JOIN token t ON t.id = s.token_id
                 WHERE s.seal IS NULL AND s.pepper_id = ANY($1::text[])
                 ORDER BY s.digest
                 LIMIT $2
                """,  # noqa: S608 - constants only
                list(pepper_ids),
                limit,
            )
        return [Unsealed(record_of(row), SecretRecord(*row[1:8]), row[0]) for row in rows]

    @retry_on_conflict
    async def store_seals(self, sealed: Sequence[Unsealed]) -> None:
        """Store the seals in `sealed`, except for tokens that have changed since they were read."""
        async with self._pool.session() as session:
            await session.execute(
                """
                UPDATE secret s SET seal = k.seal
                  FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::boolean[])
                       AS k (digest, seal, version, deleted),
                       token t
                 WHERE s.digest = k.digest AND s.seal IS NULL AND t.id = s.token_id
                   AND t.version = k.version AND (t.delete_time IS NOT NULL) = k.deleted
                """,
                [one.secret.digest for one in sealed],
                [one.secret.seal for one in sealed],
                [one.version for one in sealed],
                [one.token.delete_time is not None for one in sealed],
            )

    @retry_on_conflict
    async def store_seal_proof(self, pepper_id: str, proof: bytes) -> bool:
        """Store the proof that all secrets of a pepper are sealed; return whether they are.

        Not while a verifier of an earlier release is registered, which creates tokens without
        seals.
        """
        async with self._pool.session() as session:
            status = await session.execute(
                """
                UPDATE pepper SET all_sealed = $2
                 WHERE id = $1
                   AND NOT EXISTS (SELECT FROM verifier v WHERE v.rules < 1)
                   AND NOT EXISTS (SELECT FROM secret s WHERE s.seal IS NULL AND s.pepper_id = $1)
                """,
                pepper_id,
                proof,
            )
        return bool(status == "UPDATE 1")

    @retry_on_conflict
    async def token_seal_proofs(self, pepper_ids: Sequence[str]) -> dict[str, bytes | None]:
        """Return the stored proofs that all tokens are sealed, by pepper."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                "SELECT id, tokens_sealed FROM pepper WHERE id = ANY($1::text[])", list(pepper_ids)
            )
        return {row[0]: row[1] for row in rows}

    @retry_on_conflict
    async def unsealed_tokens(self, after_id: str, limit: int) -> list[UnsealedToken]:
        """Return up to `limit` live tokens that have no seal, in the order of their ids."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT t.version,
                       (SELECT s.pepper_id FROM secret s
                         WHERE s.token_id = t.id ORDER BY s.ordinal DESC LIMIT 1),
                       (SELECT array_agg(ROW(s.digest, s.pepper_id, s.expire_time, s.retire_time,
                                             s.retire_on_first_use, s.seal, s.ordinal))
                          FROM secret s WHERE s.token_id = t.id AND s.retire_time IS NULL),
                       {COLUMNS}
                  FROM token t
                 WHERE t.seal IS NULL AND t.delete_time IS NULL AND t.id > $1
                 ORDER BY t.id
                 LIMIT $2
                """,  # noqa: S608 - constants only
                after_id,
                limit,
            )
        return [
            UnsealedToken(
                record_of(row), row[0], row[1], tuple(SecretRecord(*one) for one in row[2] or ())
            )
            for row in rows
        ]

    @retry_on_conflict
    async def store_token_seals(self, sealed: Sequence[tuple[UnsealedToken, TokenSeal]]) -> None:
        """Store the seals, except for tokens that have changed since they were read."""
        async with self._pool.session() as session:
            await session.execute(
                """
                UPDATE token t SET seal = k.seal, seal_pepper_id = k.pepper_id
                  FROM unnest($1::text[], $2::bigint[], $3::bytea[], $4::text[])
                       AS k (id, version, seal, pepper_id)
                 WHERE t.id = k.id AND t.version = k.version AND t.seal IS NULL
                   AND t.delete_time IS NULL
                """,
                [one.token.id for one, _ in sealed],
                [one.version for one, _ in sealed],
                [seal.seal for _, seal in sealed],
                [seal.pepper_id for _, seal in sealed],
            )

    @retry_on_conflict
    async def store_token_seal_proof(
        self, pepper_id: str, proof: bytes, *, known_sealed: bool
    ) -> None:
        """Store the proof that all tokens are sealed, if they are.

        With `known_sealed`, the proof of another pepper says so. Otherwise not while a verifier of
        an earlier release is registered, which changes tokens without sealing them.
        """
        async with self._pool.session() as session:
            await session.execute(
                """
                UPDATE pepper SET tokens_sealed = $2
                 WHERE id = $1
                   AND ($3 OR (
                       NOT EXISTS (SELECT FROM verifier v WHERE v.rules < 2)
                       AND NOT EXISTS (SELECT FROM token t
                                        WHERE t.seal IS NULL AND t.delete_time IS NULL)))
                """,
                pepper_id,
                proof,
                known_sealed,
            )

    @retry_on_conflict
    async def purge_tombstones(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` tombstones of tokens deleted before a time; return how many.

        Removes the uses of these tokens with them.
        """
        async with self._pool.session() as session:
            status = await session.execute(
                """
                WITH gone AS MATERIALIZED (
                    SELECT id FROM token
                     WHERE delete_time < $1
                     ORDER BY delete_time
                     LIMIT $2
                       FOR UPDATE SKIP LOCKED),
                days AS (DELETE FROM token_usage_day WHERE token_id IN (SELECT id FROM gone)),
                uses AS (DELETE FROM token_usage WHERE token_id IN (SELECT id FROM gone))
                DELETE FROM token WHERE id IN (SELECT id FROM gone)
                """,
                before,
                limit,
            )
        return int(status.removeprefix("DELETE "))

    @retry_on_conflict
    async def purge_ended(self, expired_before: datetime, before: datetime, limit: int) -> int:
        """Remove expired tokens, and secrets that ended before a time; return how many.

        Removes up to `limit` of each. Keeps the newest secret of a token. Removes the uses of the
        tokens with them.
        """
        async with self._pool.session() as session:
            tokens = await session.execute(
                """
                WITH gone AS MATERIALIZED (
                    SELECT id FROM token
                     WHERE delete_time IS NULL AND expire_time < $1
                     ORDER BY expire_time LIMIT $2 FOR UPDATE SKIP LOCKED),
                days AS (DELETE FROM token_usage_day WHERE token_id IN (SELECT id FROM gone)),
                uses AS (DELETE FROM token_usage WHERE token_id IN (SELECT id FROM gone))
                DELETE FROM token WHERE id IN (SELECT id FROM gone)
                """,
                expired_before,
                limit,
            )
            secrets = await session.execute(
                """
                DELETE FROM secret
                 WHERE digest IN (SELECT s.digest FROM secret s
                                   WHERE least(s.expire_time, s.retire_time) < $1
                                     AND EXISTS (SELECT FROM secret n
                                                  WHERE n.token_id = s.token_id
                                                    AND n.ordinal > s.ordinal)
                                   LIMIT $2 FOR UPDATE SKIP LOCKED)
                """,
                before,
                limit,
            )
        return sum(int(status.removeprefix("DELETE ")) for status in (tokens, secrets))

    @retry_on_conflict
    async def purge_requests(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` requests that arrived before a time; return how many."""
        async with self._pool.session() as session:
            status = await session.execute(
                """
                DELETE FROM request
                 WHERE (account_id, request_id) IN (
                       SELECT account_id, request_id FROM request WHERE create_time < $1
                        ORDER BY create_time LIMIT $2 FOR UPDATE SKIP LOCKED)
                """,
                before,
                limit,
            )
        return int(status.removeprefix("DELETE "))
