"""Fetches an account's tokens, filters them and selects the rows to show.

The service lists tokens in pages and cannot filter. This module fetches all tokens for every
request, because the review and the filter must cover all of them; a thousand tokens take two
calls. It caches nothing, so a deleted token disappears from the next page wherever it was deleted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from latchkey import Client, LatchkeyError, NotFound, Scope, Token
from latchkey_coherence.names import name_key

from latchkey_console import review
from latchkey_console.text import folded

__all__ = ["Filter", "Inventory", "fetch", "rows_after"]

# The service's maximum, for the fewest round trips.
PAGE_SIZE: Final = 500
# 20 calls, about 0.1 s. For a larger account, the page says that it shows only the newest.
TOKENS_MAX: Final = 10_000
ROWS_STEP: Final = 50
# One call takes milliseconds. With up to 20 calls, the default of 5 s for each would be too long.
CALL_SECONDS: Final = 3.0
QUERY_LENGTH_MAX: Final = 64

_SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_KINDS: Final = {kind.value: kind for kind in review.Kind}


@dataclass(frozen=True, slots=True)
class Filter:
    """The part of the list to show. It is part of the URL, so it survives a reload."""

    text: str = ""
    scope: Scope | None = None
    kind: review.Kind | None = None
    rows: int = ROWS_STEP

    @classmethod
    def read(cls, query: Mapping[str, str]) -> "Filter":
        """Parse the filter from a URL's query. Ignores invalid values."""
        rows = query.get("show", "")
        return cls(
            text=query.get("q", "").strip()[:QUERY_LENGTH_MAX],
            scope=_SCOPES.get(query.get("access", "")),
            kind=_KINDS.get(query.get("review", "")),
            rows=(
                min(max(int(rows), ROWS_STEP), TOKENS_MAX)
                if rows.isascii() and rows.isdigit() and len(rows) < 10
                else ROWS_STEP
            ),
        )

    @property
    def narrows(self) -> bool:
        """Whether the filter may leave tokens out."""
        return bool(self.text or self.scope or self.kind)

    @property
    def fields(self) -> dict[str, str]:
        """The query parameters, without those that have their default.

        The names differ from those of `TokenForm`, because forms carry both.
        """
        fields = {
            "q": self.text,
            "access": self.scope.value if self.scope else "",
            "review": self.kind.value if self.kind else "",
            "show": str(self.rows) if self.rows != ROWS_STEP else "",
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
        """Return the filter for another kind of finding, from the first row."""
        return replace(self, kind=kind, rows=ROWS_STEP)

    def more(self) -> "Filter":
        """Return the filter with one more step of rows."""
        return replace(self, rows=self.rows + ROWS_STEP)

    def matches(self, token: Token, kinds: Sequence[review.Kind]) -> bool:
        """Return whether the filter includes a token that has these kinds of findings."""
        if self.scope is not None and token.scope is not self.scope:
            return False
        if self.kind is not None and self.kind not in kinds:
            return False
        # Also search the hints: someone who found a secret looks for its last characters.
        wanted = folded(self.text)
        hints = (token.hint, *(secret.hint for secret in token.secrets))
        return any(wanted in folded(text) for text in (token.name, *hints))


@dataclass(frozen=True, slots=True)
class Inventory:
    """An account's tokens, newest first; not `complete` if there are more than TOKENS_MAX."""

    tokens: tuple[Token, ...]
    complete: bool
    now: datetime
    use_recorded: bool

    def findings(self) -> list[review.Finding]:
        """Return the review's findings about all tokens."""
        return review.review(self.tokens, self.now, use_recorded=self.use_recorded)

    def kinds(self, token: Token) -> list[review.Kind]:
        """Return the kinds of findings about one token."""
        return review.findings_of(token, self.now, use_recorded=self.use_recorded)

    def matching(self, wanted: Filter) -> list[Token]:
        """Return the tokens that match a filter, newest first."""
        if not wanted.narrows:
            return list(self.tokens)
        return [token for token in self.tokens if wanted.matches(token, self.kinds(token))]

    def named(self, name: str) -> Token | None:
        """Return the token with this name, comparing names as the service does, or None."""
        wanted = name_key(name)
        return next((token for token in self.tokens if name_key(token.name) == wanted), None)


async def fetch(client: Client, account_id: str, now: datetime) -> Inventory:
    """Return all of the account's tokens. Raises LatchkeyError."""
    tokens: list[Token] = []
    position = ""
    while True:
        page = await client.list_page(
            account_id, page_size=PAGE_SIZE, page_token=position, timeout_seconds=CALL_SECONDS
        )
        tokens += page.tokens
        # A repeated position would loop forever. An empty page need not be the last one.
        if page.next_page_token in ("", position):
            break
        position = page.next_page_token
        if len(tokens) >= TOKENS_MAX:
            return await _inventory(client, tokens[:TOKENS_MAX], complete=False, now=now)
    return await _inventory(client, tokens, complete=True, now=now)


def rows_after(tokens: Sequence[Token], token_id: str, count: int) -> Sequence[Token]:
    """Return the next `count` tokens after the one with this id, which may itself be deleted.

    An id, unlike an index, stays correct when tokens are created or deleted in the meantime.
    """
    for place, token in enumerate(tokens):
        if token.id == token_id:
            return tokens[place + 1 : place + 1 + count]
    # Ids sort by creation time, except within one millisecond. There the script drops the rows that
    # it already has.
    older = [token for token in tokens if token.id < token_id]
    return older[:count]


async def _inventory(
    client: Client, tokens: list[Token], *, complete: bool, now: datetime
) -> Inventory:
    recorded = await _is_use_recorded(client, tokens)
    return Inventory(tuple(tokens), complete, now, recorded)


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
