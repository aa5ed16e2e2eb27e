"""The SQL of List."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, snapshot_of
from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.filter_table import (
    Arguments,
    Start,
    best_order,
    condition_of,
    order_of,
    walk,
)
from latchkey_service.tokens.filters import Filter, Order
from latchkey_service.tokens.token_table import (
    COLUMNS,
    DETAILS,
    USES,
    detailed_record_of,
)
from latchkey_service.tokens.verdict import TokenRecord

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Found", "ListStore"]


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
        examined: int,
        counted: int,
    ) -> tuple[Found, Snapshot]:
        """Return up to `size` live tokens that match, those after `start`, and the snapshot.

        `selected` is folded. Reads at most `examined` tokens for the list. Counts among the first
        `counted` tokens, if that is more than 0.
        """
        # One more than requested shows whether anything follows.
        arguments = Arguments(account_id, size + 1, hidden=True)
        condition = condition_of(selected, now, arguments)
        account = arguments.sql(1, "text")
        matches = f"t.account_id = {account} AND t.delete_time IS NULL AND {condition}"
        if selected == Filter():
            examined = min(examined, size + 1)
        walked = walk(
            selected,
            order,
            reverse=reverse,
            now=now,
            start=start,
            limit=examined,
            arguments=arguments,
        )
        counts = "(SELECT NULL::bigint AS matching, NULL::bigint AS walked) c"
        if counted:
            fastest = best_order(selected)
            # The other walks contain only live tokens of the account. With these conditions
            # repeated, Postgres would read each row instead of the index alone.
            counts_as = matches if fastest is Order.LAST_USE else condition
            everything = walk(
                selected,
                fastest,
                reverse=False,
                now=now,
                start=None,
                limit=counted + 1,
                arguments=arguments,
                # The condition alone: a column that nobody reads takes time for each token too.
                columns=f"({counts_as}) AS matches",
            )
            counts = f"""(SELECT count(*) FILTER (WHERE t.matches) AS matching, count(*) AS walked
                             FROM ({everything}) t) c"""  # noqa: S608 - constants and conditions
        # The last token that the walk may read comes back too, as the place to go on from. OFFSET 0
        # keeps the planner from computing the condition twice for each token. It only sees that the
        # walk is sorted, and can stop early, if each level states the order.
        ordered = order_of(selected, order, reverse=reverse)
        query = f"""
            SELECT h.revision, h.mark, h.timeline, c.matching, c.walked, page.*
              FROM {SNAPSHOT}
             CROSS JOIN {counts}
              LEFT JOIN (
                   SELECT t.n, t.key, t.key_id, t.matches, {COLUMNS}, {DETAILS}
                     FROM (SELECT t.*, coalesce({matches}, false) AS matches
                             FROM ({walked}) t
                            ORDER BY {ordered}
                           OFFSET 0) t
                    {USES}
                    WHERE t.matches OR t.n = {examined}
                    ORDER BY {ordered}
                    LIMIT {arguments.sql(2, "bigint")}) page ON true
             ORDER BY page.n
            """  # noqa: S608 - constants, and conditions without values
        async with self._pool.session() as session:
            rows = await session.fetch(query, *arguments.values)
        matching, walked_rows = rows[0][3:5]
        total = None if matching is None else min(matching, counted)
        capped = bool(walked_rows is not None and walked_rows > counted)
        found = [row for row in rows if row[5] is not None]
        matched = [row for row in found if row[8]]
        following = None
        if len(matched) > size:
            following = _start(matched[size - 1])
        elif found and found[-1][5] == examined:
            following = _start(found[-1])
        records = [detailed_record_of(row) for row in matched[:size]]
        return Found(records, following, total, capped), snapshot_of(rows[0])


def _start(row: "asyncpg.Record") -> Start:
    key, token_id = row[6], row[7]
    # asyncpg returns infinity as the last microsecond of datetime, without a time zone, and accepts
    # it with one.
    return Start(key if key.tzinfo else key.replace(tzinfo=UTC), token_id)
