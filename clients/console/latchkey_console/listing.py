"""Asks the service for the part of the list that a page shows, its counts and its review.

The service filters, orders and counts. This module caches nothing, so a deleted token disappears
from the next page wherever it was deleted.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from latchkey import (
    Client,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    Page,
    Scope,
    Token,
    TokenFilter,
    TokenOrder,
    TokenState,
)
from latchkey_coherence.names import name_key

from latchkey_console import review
from latchkey_console.text import searchable

__all__ = ["ROWS_MAX", "Count", "Filter", "Listed", "Sort", "fetch", "more_rows", "named"]

# The service's maximum, for the fewest round trips.
PAGE_SIZE: Final = 500
# What a page shows at most when it is loaded. The rows after them are on a further page.
ROWS_MAX: Final = 1_000
ROWS_STEP: Final = 50
# One call takes milliseconds. With several calls, the default of 5 s for each would be too long.
CALL_SECONDS: Final = 3.0
# Calls for one request of a browser that find too few tokens. Each examines 10,000 tokens.
SEARCHES_MAX: Final = 5
# Counts for the review that run at once, a part of what a server does at once.
COUNTS_AT_ONCE: Final = 3
QUERY_LENGTH_MAX: Final = 64
# A page token of the service is shorter.
PAGE_TOKEN_LENGTH_MAX: Final = 300

_SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_STATES: Final = {state.value: state for state in TokenState}
_ORDERS: Final = {order.value: order for order in TokenOrder}
_KINDS: Final = {kind.value: kind for kind in review.Kind}


@dataclass(frozen=True, slots=True)
class Sort:
    """An order of the list."""

    order: TokenOrder = TokenOrder.NEWEST
    reverse: bool = False

    @property
    def name(self) -> str:
        """Its name in URLs."""
        return f"-{self.order.value}" if self.reverse else self.order.value

    @property
    def descending(self) -> bool:
        """Whether the latest time comes first."""
        return (self.order is TokenOrder.NEWEST) != self.reverse


@dataclass(frozen=True, slots=True)
class Filter:
    """The part of the list to show. It is part of the URL, so it survives a reload."""

    text: str = ""
    scope: Scope | None = None
    kind: review.Kind | None = None
    rows: int = ROWS_STEP
    state: TokenState | None = None
    chosen: Sort | None = None
    """The order that the visitor chose. None: the usual one."""
    start: str = ""
    """The page token of the first row. Empty: the list begins at its beginning."""
    account: str = ""
    """The account, if the visitor has several. Every URL and every form names it."""
    at: datetime | None = None
    """The time from which the review counts its days, if `start` belongs to an earlier one."""

    @classmethod
    def read(cls, query: Mapping[str, str]) -> "Filter":
        """Parse the filter from a URL's query. Ignores invalid values."""
        rows = query.get("show", "")
        kind, chosen = _KINDS.get(query.get("review", "")), _sort(query.get("sort", ""))
        start, at = query.get("page", "")[:PAGE_TOKEN_LENGTH_MAX], _time(query.get("at", ""))
        return cls(
            text=searchable(query.get("q", "").strip()[:QUERY_LENGTH_MAX]).strip(),
            scope=_SCOPES.get(query.get("access", "")),
            kind=kind,
            state=_STATES.get(query.get("state", "")),
            chosen=None if chosen == _usual(kind) else chosen,
            start=start if at else "",
            at=at if start else None,
            rows=(
                min(max(int(rows), ROWS_STEP), ROWS_MAX)
                if rows.isascii() and rows.isdigit() and len(rows) < 10
                else ROWS_STEP
            ),
        )

    @property
    def narrows(self) -> bool:
        """Whether the filter may leave tokens out."""
        return bool(self.text or self.scope or self.kind or self.state)

    @property
    def sort(self) -> Sort:
        """The order to show, which for a kind of finding begins with the most urgent tokens."""
        return self.chosen or _usual(self.kind)

    @property
    def usual_sort(self) -> str:
        """The name of the order that the list has unless the visitor chooses another one."""
        return _usual(self.kind).name

    @property
    def fields(self) -> dict[str, str]:
        """The query parameters, without those that have their default.

        The names differ from those of `TokenForm`, because forms carry both.
        """
        fields = {
            "account": self.account,
            "q": self.text,
            "access": self.scope.value if self.scope else "",
            "state": self.state.value if self.state else "",
            "review": self.kind.value if self.kind else "",
            "sort": self.chosen.name if self.chosen else "",
            "show": str(self.rows) if self.rows != ROWS_STEP else "",
            "page": self.start,
            "at": self.at.isoformat() if self.at else "",
        }
        return {name: value for name, value in fields.items() if value}

    @property
    def query(self) -> str:
        """The query string including its question mark, or an empty string."""
        return f"?{urlencode(self.fields)}" if self.fields else ""

    def query_of(self, token_id: str) -> str:
        """Return the query string of a page about one token."""
        return f"?{urlencode({'id': token_id, **self.fields})}"

    def with_kind(self, kind: review.Kind | None) -> "Filter":
        """Return the filter for another kind of finding, in its order and from the first row.

        Kinds of findings are about tokens in a certain state.
        """
        return replace(self.first_rows(), kind=kind, state=None, chosen=None)

    def sorted_by(self, order: TokenOrder) -> "Filter":
        """Return the filter that lists in another order, or the opposite of this order."""
        reverse = self.sort.order is order and not self.sort.reverse
        chosen = Sort(order, reverse)
        return replace(self.first_rows(), chosen=None if chosen == _usual(self.kind) else chosen)

    def first_rows(self) -> "Filter":
        """Return the filter at the beginning of the list."""
        return replace(self, rows=ROWS_STEP, start="", at=None)

    def more(self) -> "Filter":
        """Return the filter with one more step of rows."""
        return replace(self, rows=self.rows + ROWS_STEP)

    def after(self, start: str, at: datetime) -> "Filter":
        """Return the filter for the rows from a page token on."""
        return replace(self, rows=ROWS_STEP, start=start, at=at)

    def selects(self, now: datetime) -> TokenFilter:
        """Return what the service selects."""
        selected = TokenFilter() if self.kind is None else self.kind.selects(now)
        selected = replace(selected, search=self.text)
        if self.scope is not None:
            selected = replace(selected, scope=self.scope)
        if self.state is not None and self.kind is None:
            selected = replace(selected, state=self.state)
        return selected


@dataclass(frozen=True, slots=True)
class Count:
    """A number of tokens, or a lower bound of it."""

    number: int
    capped: bool = False

    def __str__(self) -> str:
        return f"{self.number:,}{'+' if self.capped else ''}"


@dataclass(frozen=True, slots=True)
class Listed:
    """What a page shows."""

    rows: Sequence[Token]
    following: str
    """The page token of the next rows, or empty on the last page."""
    now: datetime
    use_recorded: bool
    matching: Count = Count(0)
    total: Count = Count(0)
    findings: Sequence[review.Finding] = ()

    def kinds(self, token: Token) -> list[review.Kind]:
        """Return the kinds of findings about one token."""
        return review.findings_of(token, self.now, use_recorded=self.use_recorded)


async def fetch(client: Client, account_id: str, wanted: Filter, now: datetime) -> Listed:
    """Return the rows, counts and findings of a page. Raises LatchkeyError."""
    at = wanted.at or now
    rows, following, first = await _rows(client, account_id, wanted, at, count=True)
    matching = _count(first)
    total, some = matching, rows
    if wanted.narrows:
        everything = await client.list_page(
            account_id, page_size=1, include_total_size=True, timeout_seconds=CALL_SECONDS
        )
        total, some = _count(everything), [*rows, *everything.tokens]
    recorded = await _is_use_recorded(client, some)
    findings: list[review.Finding] = []
    if total.number:
        findings = await _findings(client, account_id, now, use_recorded=recorded)
    return Listed(rows, following, now, recorded, matching, total, findings)


async def more_rows(client: Client, account_id: str, wanted: Filter, now: datetime) -> Listed:
    """Return the rows from the filter's start on. Raises LatchkeyError."""
    rows, following, _ = await _rows(client, account_id, wanted, wanted.at or now, count=False)
    return Listed(rows, following, now, await _is_use_recorded(client, rows))


async def named(client: Client, account_id: str, name: str) -> Token | None:
    """Return the token with this name, comparing names as the service does, or None.

    In an account with tens of thousands of tokens, it looks among the newest. Raises LatchkeyError.
    """
    key, position = name_key(name), ""
    for _ in range(SEARCHES_MAX):
        try:
            page = await client.list_page(
                account_id,
                TokenFilter(name_contains=name),
                page_size=PAGE_SIZE,
                page_token=position,
                timeout_seconds=CALL_SECONDS,
            )
        except InvalidArgument:
            return None  # no token can have this name
        for token in page.tokens:
            if name_key(token.name) == key:
                return token
        if page.next_page_token in ("", position):
            break
        position = page.next_page_token
    return None


async def _rows(
    client: Client, account_id: str, wanted: Filter, at: datetime, *, count: bool
) -> tuple[list[Token], str, Page]:
    """Return rows, the page token of those after them, and the first page with its counts."""
    tokens: list[Token] = []
    position, first, searches = wanted.start, None, 0
    while True:
        page = await client.list_page(
            account_id,
            wanted.selects(at),
            order=wanted.sort.order,
            reverse=wanted.sort.reverse,
            include_total_size=count and first is None,
            page_size=min(wanted.rows - len(tokens), PAGE_SIZE),
            page_token=position,
            timeout_seconds=CALL_SECONDS,
        )
        first = first or page
        tokens += page.tokens
        # A repeated position would loop forever.
        following = "" if page.next_page_token == position else page.next_page_token
        position = following
        # A page that is not full need not be the last one.
        searches += len(page.tokens) < PAGE_SIZE
        if not following or len(tokens) >= wanted.rows or searches >= SEARCHES_MAX:
            return tokens, following, first


async def _findings(
    client: Client, account_id: str, now: datetime, *, use_recorded: bool
) -> list[review.Finding]:
    """Return the findings about all tokens, most urgent first, omitting kinds without findings."""
    at_once = asyncio.Semaphore(COUNTS_AT_ONCE)

    async def count(kind: review.Kind) -> review.Finding | None:
        async with at_once:
            try:
                page = await client.list_page(
                    account_id,
                    kind.selects(now),
                    order=kind.order,
                    include_total_size=True,
                    page_size=1,
                    timeout_seconds=CALL_SECONDS,
                )
            except InvalidArgument:
                # A server of an earlier release does not know the filter of each kind.
                return None
        found = _count(page)
        if not page.tokens:
            return None
        return review.Finding(kind, max(found.number, 1), page.tokens[0], capped=found.capped)

    kinds = [kind for kind in review.Kind if use_recorded or kind is not review.Kind.NEVER_USED]
    counted = await asyncio.gather(*map(count, kinds))
    return [finding for finding in counted if finding is not None]


async def _is_use_recorded(client: Client, tokens: Sequence[Token]) -> bool:
    """Return whether Latchkey records use, so that a token without a last use was never used.

    An older server does not, and a policy may forbid the question. In doubt, the page does not
    suggest to delete a token because it was never used.
    """
    if not tokens or any(token.last_used_time is not None for token in tokens):
        return bool(tokens)
    try:
        await client.get_usage(tokens[0].account_id, tokens[0].id, timeout_seconds=CALL_SECONDS)
    except NotFound:
        return True  # deleted meanwhile
    except LatchkeyError:
        return False
    return True


def _count(page: Page) -> Count:
    return Count(page.total_size or 0, page.total_size_capped)


def _usual(kind: review.Kind | None) -> Sort:
    return Sort(kind.order if kind else TokenOrder.NEWEST)


def _sort(text: str) -> Sort | None:
    order = _ORDERS.get(text.removeprefix("-"))
    return None if order is None else Sort(order, text.startswith("-"))


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    # The review subtracts days, which would fail in the year 1.
    return time if time.tzinfo is not None and 2000 <= time.year < 9000 else None
