"""Lists the tokens of an account: pages, filters, orders and counts.

Owns the rules of List. Contains neither protobuf nor SQL (`list_store.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from latchkey_coherence.identifiers import TOKEN_ID

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FieldViolation
from latchkey_service.tokens import page_tokens
from latchkey_service.tokens.answer_size import fitting
from latchkey_service.tokens.filter_table import Start
from latchkey_service.tokens.filters import Filter, Order, described, filter_violations, folded
from latchkey_service.tokens.list_store import ListStore
from latchkey_service.tokens.validation import account_violations, check
from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["Listing", "Page", "Query", "list_name"]

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 500
# Tokens that one call reads for its page, and as many for its count: about 20 ms for the slowest
# filter. A larger limit would finish more lists in one call, and a smaller one would count fewer
# tokens exactly.
EXAMINED_MAX = 10_000
# Tokens that it reads at first. For so few, Postgres walks along the index until the page is full.
# For many, it may read and sort all of them before it returns the first one.
EXAMINED_FIRST = 1_000


@dataclass(frozen=True, slots=True)
class Query:
    """A request to list tokens, not validated."""

    account_id: str
    page_size: int = 0
    page_token: str = ""
    filter: Filter = field(default_factory=Filter)
    order: int = 0
    """Numbered as in the contract. 0 means NEWEST."""
    reverse: bool = False
    count: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Tokens, and the token of the next page, which is empty on the last page."""

    records: Sequence[TokenRecord]
    next_page_token: str
    total_size: int
    total_size_capped: bool


class Listing:
    """Lists tokens under this process's lease: trusts only reads from the lease's history."""

    def __init__(self, store: ListStore, reads: LeasedReads, now: Callable[[], datetime]) -> None:
        self._store = store
        self._reads = reads
        self._now = now

    async def list(self, query: Query, deadline: float) -> Page:
        """Return a page of live tokens (AIP-158).

        It may be shorter than requested, or empty, and still not be the last one. `deadline` is in
        seconds on the process's clock. Raises InvalidArgument, Overloaded, Unavailable and
        StoreUnavailable.
        """
        violations = account_violations(query.account_id)
        if query.page_size < 0:
            violations.append(FieldViolation("page_size", "must not be negative"))
        if query.order not in range(len(Order) + 1):
            violations.append(FieldViolation("order", "must be an order"))
        check(*violations, *filter_violations(query.filter))
        order, selected = Order(query.order or Order.NEWEST), folded(query.filter)
        name = list_name(query.account_id, selected, order, reverse=query.reverse)
        start = None
        if query.page_token:
            start = Start(*page_tokens.decode(name, query.page_token, TOKEN_ID))
        size = min(query.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        now = self._now()
        records: list[TokenRecord] = []
        total, capped = 0, False
        left = EXAMINED_MAX
        while True:
            examined = min(EXAMINED_FIRST, left) if left == EXAMINED_MAX else left
            began = await self._reads.begin(deadline)
            found, snapshot = await self._store.list_tokens(
                query.account_id,
                selected,
                order,
                reverse=query.reverse,
                now=now,
                start=start,
                size=size - len(records),
                examined=examined,
                counted=EXAMINED_MAX if query.count and left == EXAMINED_MAX else 0,
            )
            await self._reads.accept(snapshot, began, deadline)
            if found.total is not None:
                total, capped = found.total, found.capped
            records += found.records
            start, left = found.next, left - examined
            if start is None or not left or len(records) == size:
                break
        if (fits := fitting(records)) < len(records):
            # Reads the shorter page again, because only the store knows where the next one begins.
            # A page is rarely this large.
            return await self.list(replace(query, page_size=fits), deadline)
        following = "" if start is None else page_tokens.encode(name, start.key, start.id)
        return Page(records, following, total, capped)


def list_name(account_id: str, selected: Filter, order: Order, *, reverse: bool) -> str:
    """Return the name of a list, to which its page tokens are bound. `selected` is folded."""
    given = described(selected)
    if not given and order is Order.NEWEST and not reverse:
        return account_id
    return f"{account_id} {order.name} {'reverse ' if reverse else ''}{given}"
