"""The SQL of List."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.filter_table import (
    Arguments,
    Start,
    best_order,
    condition_of,
    direction_of,
    walk,
)
from latchkey_service.tokens.filters import Filter, Order
from latchkey_service.tokens.token_table import (
    COLUMNS,
    DETAILS,
    SNAPSHOT,
    detailed_record_of,
    snapshot_of,
)
from latchkey_service.tokens.verdict import TokenRecord

if TYPE_CHECKING:
    import asyncpg

__all__ = ["EXAMINED_MAX", "Found", "ListStore"]

# Tokens that one statement reads, some 20 ms for the slowest filter. A larger limit would finish
# more lists in one call, and a smaller one would count fewer tokens exactly.
EXAMINED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Found:
    """A part of a list."""

    records: Sequence[TokenRecord]
    next: Start | None
    """Where the next part begins. None: this is the last part."""
    total: int | None
    """How many tokens match, if that was asked."""
    capped: bool
    """Whether more than `total` may match."""


class ListStore:
    """Lists tokens. Raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def list_tokens(
        self,
        account_id: str,
        selected: Filter,
        order: Order,
        *,
        reverse: bool,
        now: datetime,
        start: Start | None,
        size: int,
        count: bool,
    ) -> tuple[Found, Snapshot]:
        """Return up to `size` live tokens that match, those after `start`, and the snapshot.

        `selected` is folded. Reads at most EXAMINED_MAX tokens for the list, and as many to count.
        """
        # One more than requested shows whether anything follows.
        arguments = Arguments(account_id, size + 1)
        matches = f"t.id IS NOT NULL AND {condition_of(selected, now, arguments)}"
        walked = walk(
            selected,
            order,
            reverse=reverse,
            now=now,
            start=start,
            limit=EXAMINED_MAX,
            arguments=arguments,
        )
        way = direction_of(order, reverse=reverse)
        counted = "(SELECT NULL::bigint AS matching, NULL::bigint AS walked) c"
        if count:
            everything = walk(
                selected,
                best_order(selected),
                reverse=False,
                now=now,
                start=None,
                limit=EXAMINED_MAX + 1,
                arguments=arguments,
            )
            counted = f"""(SELECT count(*) FILTER (WHERE {matches}) AS matching, count(*) AS walked
                             FROM ({everything}) t) c"""  # noqa: S608 - constants and conditions
        # The last token that the walk may read comes back too, as the place to go on from.
        query = f"""
            SELECT h.revision, h.mark, h.timeline, c.matching, c.walked, page.*
              FROM {SNAPSHOT}
             CROSS JOIN {counted}
              LEFT JOIN (
                   SELECT t.n, t.key, t.key_id, coalesce({matches}, false), {COLUMNS}, {DETAILS}
                     FROM ({walked}) t
                    WHERE ({matches}) OR t.n = {EXAMINED_MAX}
                    ORDER BY t.key {way}, t.key_id {way}
                    LIMIT $2) page ON true
             ORDER BY page.n
            """  # noqa: S608 - constants, and conditions without values
        async with self._pool.session() as session:
            rows = await session.fetch(query, *arguments.values)
        matching, walked_rows = rows[0][3:5]
        total = None if matching is None else min(matching, EXAMINED_MAX)
        capped = bool(walked_rows is not None and walked_rows > EXAMINED_MAX)
        found = [row for row in rows if row[5] is not None]
        matched = [row for row in found if row[8]]
        following = None
        if len(matched) > size:
            following = _start(matched[size - 1])
        elif found and found[-1][5] == EXAMINED_MAX:
            following = _start(found[-1])
        records = [detailed_record_of(row) for row in matched[:size]]
        return Found(records, following, total, capped), snapshot_of(rows[0])


def _start(row: "asyncpg.Record") -> Start:
    key, token_id = row[6], row[7]
    # asyncpg returns infinity as the last microsecond of datetime, without a time zone, and accepts
    # it with one.
    return Start(key if key.tzinfo else key.replace(tzinfo=UTC), token_id)
