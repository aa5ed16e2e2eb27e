"""The SQL of the audit log's chain."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from latchkey_service.audit.audit_chain import Batch, Head, Start
from latchkey_service.audit.audit_table import ENTRY_COLUMNS, Entry
from latchkey_service.postgres.connections import Pool, retry_on_conflict

if TYPE_CHECKING:
    import asyncpg

__all__ = ["ChainReader", "ChainTable"]

# Any number works, as long as every release uses the same one and other locks use others.
_LOCK: Final = 0x6175646974  # "audit"
_BATCH_COLUMNS: Final = "c.number, c.entry_ids, c.digest, c.pepper_id, c.seal, c.time"
_NEWEST: Final = f"SELECT {_BATCH_COLUMNS} FROM audit_chain c ORDER BY c.number DESC LIMIT 1"  # noqa: S608


class ChainTable:
    """The chain, as the service extends it. All methods raise StoreUnavailable if too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def append(
        self, limit: int, make: Callable[[Batch | None, Sequence[Entry]], Batch | None]
    ) -> Batch | None:
        """Append the batch that `make` makes of the newest batch and up to `limit` entries.

        Returns the new batch. Returns None if `make` makes none, or another process is doing this.
        """
        async with self._pool.session() as session, session.transaction():
            if not await session.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                return None
            row = await session.fetchrow(_NEWEST)
            rows = await session.fetch(
                f"""
                SELECT {ENTRY_COLUMNS}
                  FROM audit_unsealed u JOIN audit a ON a.id = u.entry_id
                 ORDER BY a.id
                 LIMIT $1
                """,  # noqa: S608 - constants only
                limit,
            )
            batch = make(None if row is None else Batch(*row), [Entry(*row) for row in rows])
            if batch is None:
                return None
            await session.execute(
                """
                WITH covered AS (
                    DELETE FROM audit_unsealed WHERE entry_id = ANY($2::bigint[]))
                INSERT INTO audit_chain (number, entry_ids, digest, pepper_id, seal, time)
                -- A host whose clock is ahead must not delay retention.
                VALUES ($1, $2, $3, $4, $5, least($6, clock_timestamp()))
                """,
                *batch,
            )
        return batch

    @retry_on_conflict
    async def look(self, known: int) -> tuple[bytes | None, Batch | None, bool]:
        """Return the digest of the batch `known`, the newest batch, and whether entries wait."""
        async with self._pool.session() as session:
            row: Any = await session.fetchrow(
                f"""
                SELECT (SELECT digest FROM audit_chain WHERE number = $1),
                       EXISTS (SELECT FROM audit_unsealed), n.*
                  FROM (SELECT) one LEFT JOIN ({_NEWEST}) n ON true
                """,  # noqa: S608 - constants only
                known,
            )
        return row[0], None if row[2] is None else Batch(*row[2:]), row[1]

    @retry_on_conflict
    async def removable(self, before: datetime, limit: int) -> Head | None:
        """Return the last batch that retention may remove next, or None.

        It and the batches before it contain up to `limit` entries, unless it is the first.
        """
        async with self._pool.session() as session:
            row = await session.fetchrow(
                """
                SELECT o.number, o.digest
                  FROM (SELECT c.number, c.digest,
                               sum(cardinality(c.entry_ids)) OVER w AS entries,
                               row_number() OVER w AS place,
                               max(c.time) OVER w AS newest
                          FROM (SELECT * FROM audit_chain c
                                 WHERE c.number > (SELECT number FROM audit_start)
                                 ORDER BY c.number
                                 LIMIT $2) c
                        WINDOW w AS (ORDER BY c.number)) o
                 WHERE o.newest < $1 AND (o.entries <= $2 OR o.place = 1)
                 ORDER BY o.number DESC
                 LIMIT 1
                """,
                before,
                limit,
            )
        return None if row is None else Head(*row)

    @retry_on_conflict
    async def remove(self, before: datetime, last: Head, pepper_id: str, seal: bytes) -> int:
        """Remove the entries of the batches up to `last`; return how many there were."""
        async with self._pool.session() as session:
            removed = await session.fetchval(
                "SELECT audit_prune($1, $2, $3, $4)", before, last.number, pepper_id, seal
            )
        return int(removed)


class ChainReader:
    """The chain, as a check reads it: in one transaction, on one connection."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    async def start(self) -> Start:
        """Return the start."""
        row = await self._connection.fetchrow("SELECT number, pepper_id, seal FROM audit_start")
        return Start(0, None, None) if row is None else Start(*row)

    async def batches(self, after: int, limit: int) -> list[Batch]:
        """Return up to `limit` batches after a number."""
        rows = await self._connection.fetch(
            f"SELECT {_BATCH_COLUMNS} FROM audit_chain c WHERE c.number > $1"  # noqa: S608
            " ORDER BY c.number LIMIT $2",
            after,
            limit,
        )
        return [Batch(*row) for row in rows]

    async def entries(self, ids: Sequence[int]) -> list[Entry]:
        """Return the entries with these ids that exist, in the order of their ids."""
        rows = await self._connection.fetch(
            f"SELECT {ENTRY_COLUMNS} FROM audit a"  # noqa: S608 - constants only
            " WHERE a.id = ANY($1::bigint[]) ORDER BY a.id",
            ids,
        )
        return [Entry(*row) for row in rows]

    async def outside(self, limit: int) -> list[int]:
        """Return up to `limit` entries that neither a batch nor the queue contains."""
        rows: Any = await self._connection.fetch(
            """
            SELECT a.id FROM audit a
            EXCEPT (SELECT entry_id FROM audit_unsealed
                    UNION ALL SELECT unnest(entry_ids) FROM audit_chain)
             ORDER BY 1 LIMIT $1
            """,
            limit,
        )
        return [row[0] for row in rows]

    async def unsealed(self) -> tuple[int, datetime | None]:
        """Return how many entries no batch covers yet, and the time of the oldest."""
        row: Any = await self._connection.fetchrow(
            "SELECT count(*), min(a.time) FROM audit_unsealed u JOIN audit a ON a.id = u.entry_id"
        )
        return row[0], row[1]

    async def vanished(self, limit: int) -> list[int]:
        """Return up to `limit` entries that were removed before a batch covered them."""
        rows = await self._connection.fetch(
            """
            SELECT u.entry_id FROM audit_unsealed u
             WHERE NOT EXISTS (SELECT FROM audit a WHERE a.id = u.entry_id)
             ORDER BY 1 LIMIT $1
            """,
            limit,
        )
        return [row[0] for row in rows]
