"""Finds tokens of all accounts by id or by hint, for operators.

Owns the rules of Find. Contains neither protobuf nor SQL (`find_store.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

from latchkey_coherence.identifiers import TOKEN_ID

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FieldViolation
from latchkey_service.tokens import page_tokens
from latchkey_service.tokens.find_store import END_LENGTH, FindStore
from latchkey_service.tokens.importing import HINT_LENGTH_MAX
from latchkey_service.tokens.usage_table import CallerUsage, UsageTable
from latchkey_service.tokens.validation import check, id_violations, printable
from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["Finding", "Page", "Query"]

PAGE_SIZE_DEFAULT: Final = 50
# With the longest fields, 100 tokens take less than gRPC's limit of 4 MiB.
PAGE_SIZE_MAX: Final = 100
_ELLIPSIS: Final = "…"


@dataclass(frozen=True, slots=True)
class Query:
    """A request to find tokens, not validated."""

    token_id: str = ""
    hint: str = ""
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Tokens, and the token of the next page, which is empty on the last page."""

    records: Sequence[TokenRecord]
    next_page_token: str = ""


class Finding:
    """Finds tokens under this process's lease: trusts only reads from the lease's history."""

    def __init__(self, store: FindStore, reads: LeasedReads) -> None:
        self._store = store
        self._reads = reads

    async def find(self, query: Query, deadline: float) -> Page:
        """Return the token with the id, or a page of those with the hint, newest first.

        Includes deleted tokens. A page may be shorter than requested, or empty, and still not be
        the last one, because only the end of a hint is indexed. `deadline` is in seconds on the
        process's clock. Raises InvalidArgument, Overloaded, Unavailable and StoreUnavailable.
        """
        check(*_violations(query))
        if query.token_id:
            began = await self._reads.begin(deadline)
            found, snapshot = await self._store.by_id(query.token_id)
            await self._reads.accept(snapshot, began, deadline)
            return Page([each.record for each in found])
        end, whole = _parts(query.hint)
        name = f"find {end} {whole}"
        before = ""
        if query.page_token:
            _, before = page_tokens.decode(name, query.page_token, TOKEN_ID)
        size = min(query.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        began = await self._reads.begin(deadline)
        # One more than requested shows whether there is a next page.
        found, snapshot = await self._store.by_hint(end, whole, before, size + 1)
        await self._reads.accept(snapshot, began, deadline)
        records = [each.record for each in found[:size] if each.matches]
        if len(found) <= size:
            return Page(records)
        last = found[size - 1].record
        return Page(records, page_tokens.encode(name, last.create_time, last.id))

    async def usage(
        self, table: UsageTable, token_id: str, today: date, deadline: float
    ) -> list[CallerUsage]:
        """Return who used a token of any account, which may be deleted; nobody if it is unknown."""
        began = await self._reads.begin(deadline)
        callers, snapshot = await table.by_caller(None, token_id, today)
        await self._reads.accept(snapshot, began, deadline)
        return callers or []


def _violations(query: Query) -> list[FieldViolation]:
    violations = []
    if query.page_size < 0:
        violations.append(FieldViolation("page_size", "must not be negative"))
    if not query.token_id and not query.hint:
        violations.append(FieldViolation("hint", "is required unless id is given"))
    elif query.token_id and query.hint:
        violations.append(FieldViolation("id", "cannot be given together with hint"))
    elif query.token_id:
        violations += id_violations(query.token_id)
        if query.page_token:
            violations.append(FieldViolation("page_token", "belongs to another list"))
    elif (
        len(query.hint) > HINT_LENGTH_MAX
        or not printable(query.hint)
        or len(_parts(query.hint)[0]) < END_LENGTH
    ):
        # Never quotes the text, which may be a secret.
        problem = f"must be the last {END_LENGTH} characters of a secret, or its hint"
        violations.append(FieldViolation("hint", problem))
    return violations


def _parts(hint: str) -> tuple[str, str]:
    """Return the end of a hint and the whole hint, in lower case, or "" if the end is all of it."""
    folded = "".join(c.lower() if c.isascii() else c for c in hint.replace("...", _ELLIPSIS))
    end = folded.removeprefix(_ELLIPSIS)
    return (end, "") if len(end) <= END_LENGTH else (end[-END_LENGTH:], folded)
