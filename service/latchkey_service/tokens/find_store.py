"""The SQL of Find."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, snapshot_of
from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.token_table import COLUMNS, DETAILS, USES, detailed_record_of
from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["BY_HINT", "BY_ID", "END_LENGTH", "FindStore", "Found"]

# As many characters of a secret as its hint shows, and as the index `secret_hint` has.
END_LENGTH: Final = 4
_END: Final = f'lower(right(s.hint, {END_LENGTH}) COLLATE "C")'
# The next token before `{before}` with a secret whose hint ends with $1.
_NEXT: Final = f"""
    SELECT s.token_id AS id
      FROM secret s
     WHERE {_END} = $1 AND s.token_id < {{before}}
     ORDER BY s.token_id DESC
     LIMIT 1"""  # noqa: S608 - a constant only
# Ids grow, so the newest token comes first. The query probes the index once for each token: for all
# of them at once, the planner may read and sort every secret with the hint. If it expected few
# matches, it might do so even for each token, so the rest of a hint is a column and not a
# condition.
_IDS_BY_HINT: Final = f"""
    WITH RECURSIVE w (id, n) AS (
        (SELECT id, 1 FROM ({_NEXT.format(before="$3")}) x)
        UNION ALL
        SELECT x.id, w.n + 1
          FROM w CROSS JOIN LATERAL ({_NEXT.format(before="w.id")}) x
         WHERE w.n < $4)
    SELECT id,
           $2 = '' OR (SELECT bool_or(lower(s.hint COLLATE "C") = $2) FROM secret s
                        WHERE s.token_id = w.id) AS matches
      FROM w"""  # noqa: S608 - constants only


def _query(ids: str) -> str:
    return f"""
SELECT h.revision, h.mark, h.timeline, page.*
  FROM {SNAPSHOT}
  LEFT JOIN (
       SELECT f.matches, {COLUMNS}, {DETAILS}
         FROM ({ids}) f JOIN token t ON t.id = f.id {USES}) page ON true
 ORDER BY page.id DESC
"""  # noqa: S608 - constants only


BY_ID: Final = _query("SELECT $1::text AS id, true AS matches")
BY_HINT: Final = _query(_IDS_BY_HINT)
# Greater than any id of a token.
_FIRST: Final = "~"


class Found(NamedTuple):
    """A token whose hint ends as asked for."""

    record: TokenRecord
    matches: bool
    """Whether the rest of the hint is as asked for too."""


class FindStore:
    """Finds tokens of all accounts. Raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def by_id(self, token_id: str) -> tuple[Sequence[Found], Snapshot]:
        """Return the token with this id, if there is one, and the snapshot of the read."""
        return await self._fetch(BY_ID, token_id)

    async def by_hint(
        self, end: str, whole: str, before: str, limit: int
    ) -> tuple[Sequence[Found], Snapshot]:
        """Return up to `limit` tokens, newest first, and the snapshot of the read.

        `end` is the last characters of a hint. `whole` is the whole hint, or "" for any. Both are
        in lower case. With `before`, returns only tokens with a smaller id.
        """
        return await self._fetch(BY_HINT, end, whole, before or _FIRST, limit)

    @retry_on_conflict
    async def _fetch(self, query: str, *arguments: Any) -> tuple[Sequence[Found], Snapshot]:
        async with self._pool.session() as session:
            rows = await session.fetch(query, *arguments)
        found = [Found(detailed_record_of(row), row[3]) for row in rows if row[3] is not None]
        return found, snapshot_of(rows[0])
