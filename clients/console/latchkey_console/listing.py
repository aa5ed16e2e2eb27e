"""An account's tokens as the page shows them: all fetched, filtered, and cut into what is shown.

The service lists by page and knows no filter. All tokens are fetched for each page, because what
the review counts and the filter finds has to be true of all of them: a thousand take two calls.
Nothing is kept, so that a token that is deleted anywhere is gone from the next page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from latchkey import Client, Scope, Token

from latchkey_console import review
from latchkey_console.text import folded, name_key

__all__ = ["Filter", "Inventory", "fetch", "rows_after"]

# The service's own maximum: the fewest round trips.
PAGE_SIZE: Final = 500
# 20 calls, some 0.1 s. An account with more is told that it sees the newest of them.
TOKENS_MAX: Final = 10_000
ROWS_STEP: Final = 50
# One call takes milliseconds; with all tokens to fetch, none may take its default of 5 s.
CALL_SECONDS: Final = 3.0
QUERY_LENGTH_MAX: Final = 64

_SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_KINDS: Final = {kind.value: kind for kind in review.Kind}


@dataclass(frozen=True, slots=True)
class Filter:
    """What of the list is looked at: it stands in the address, so a reload keeps it."""

    text: str = ""
    scope: Scope | None = None
    kind: review.Kind | None = None
    rows: int = ROWS_STEP

    @classmethod
    def read(cls, query: Mapping[str, str]) -> "Filter":
        """Return what an address asks for. What makes no sense there asks for nothing."""
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
        """Whether it leaves tokens out."""
        return bool(self.text or self.scope or self.kind)

    @property
    def fields(self) -> dict[str, str]:
        """What stands in the address: nothing that is as it is by default.

        The names are none of `TokenForm`'s: forms carry both.
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
        """The same as a query, with its question mark, or nothing."""
        return f"?{urlencode(self.fields)}" if self.fields else ""

    def with_kind(self, kind: review.Kind | None) -> "Filter":
        """Return the same filter, from its start, for another kind of finding."""
        return replace(self, kind=kind, rows=ROWS_STEP)

    def more(self) -> "Filter":
        """Return the same filter with one step more of rows."""
        return replace(self, rows=self.rows + ROWS_STEP)

    def matches(self, token: Token, kinds: Sequence[review.Kind]) -> bool:
        """Tell whether a token is looked at; `kinds` is what there is to point out about it."""
        if self.scope is not None and token.scope is not self.scope:
            return False
        if self.kind is not None and self.kind not in kinds:
            return False
        # The hint too: who has found a secret somewhere looks for its last characters.
        wanted = folded(self.text)
        return not wanted or wanted in folded(token.name) or wanted in folded(token.hint)


@dataclass(frozen=True, slots=True)
class Inventory:
    """All of an account's tokens, newest first; `complete` unless there are too many."""

    tokens: tuple[Token, ...]
    complete: bool
    now: datetime
    use_recorded: bool

    def findings(self) -> list[review.Finding]:
        """Return what there is to point out, of all tokens."""
        return review.review(self.tokens, self.now, use_recorded=self.use_recorded)

    def kinds(self, token: Token) -> list[review.Kind]:
        """Return what there is to point out about one token."""
        return review.findings_of(token, self.now, use_recorded=self.use_recorded)

    def matching(self, wanted: Filter) -> list[Token]:
        """Return the tokens that a filter leaves, newest first."""
        if not wanted.narrows:
            return list(self.tokens)
        return [token for token in self.tokens if wanted.matches(token, self.kinds(token))]

    def named(self, name: str) -> Token | None:
        """Return the token that has this name, in the way that the service compares names."""
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
        # The same position again would never end; a page can be empty and not the last.
        if page.next_page_token in ("", position):
            break
        position = page.next_page_token
        if len(tokens) >= TOKENS_MAX:
            return _inventory(tokens[:TOKENS_MAX], complete=False, now=now)
    return _inventory(tokens, complete=True, now=now)


def rows_after(tokens: Sequence[Token], token_id: str, count: int) -> Sequence[Token]:
    """Return the `count` tokens that come after the one of this id, which may be gone itself.

    By id and not by number: tokens that were made or deleted meanwhile move no row.
    """
    for place, token in enumerate(tokens):
        if token.id == token_id:
            return tokens[place + 1 : place + 1 + count]
    # Ids are ordered by creation, but for those of one millisecond, of which the script leaves out
    # what it has. The newest come first.
    older = [token for token in tokens if token.id < token_id]
    return older[:count]


def _inventory(tokens: list[Token], *, complete: bool, now: datetime) -> Inventory:
    return Inventory(tuple(tokens), complete, now, review.is_use_recorded(tokens))
