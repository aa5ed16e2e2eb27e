"""Ending many tokens at once, with the database replaced: how many receipts are written at once."""

import asyncio
from datetime import UTC, datetime
from typing import Any

from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS
from latchkey_service.tokens.bulk import Bulk
from latchkey_service.tokens.bulk_store import Scan
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.filters import Filter
from latchkey_service.tokens.lifecycle_store import Changed
from latchkey_service.tokens.management import CONFIRMING_MAX
from latchkey_service.tokens.receipt_table import Deletion

from tests.helpers.domain import audit_context

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POSITION = Position(7, 8)


class Store:
    """Deletes one token for each call, and counts the receipts that it writes at the same time."""

    def __init__(self) -> None:
        self.writing = self.most = 0

    async def scan(self, *_: Any) -> tuple[Scan, None]:
        return Scan(1, ["t1"], None), None

    async def delete_matching(self, *_: Any) -> tuple[Changed, list[str]]:
        return Changed(POSITION, NOW, None), ["t1"]

    async def confirm_deletions(self, *_: Any) -> Deletion:
        self.writing += 1
        self.most = max(self.most, self.writing)
        for _turn in range(5):
            await asyncio.sleep(0)
        self.writing -= 1
        return Deletion(POSITION, NOW, NOW, 1, 0, 0, 0)


class Parts:
    """Stands in for the lease and the wait, which these tests do not need."""

    async def begin(self, _deadline: float) -> None:
        return None

    async def accept(self, *_: Any) -> None:
        """Believe every read."""

    async def wait(self, *_: Any) -> Any:
        return NO_ACKNOWLEDGEMENTS


async def test_receipts_of_delete_all_share_the_limit_of_delete() -> None:
    """When a hung verifier is outwaited, many calls want to write receipts at once. They use no
    more connections than are set aside for that, together with those of Delete."""
    store, confirming = Store(), asyncio.Semaphore(CONFIRMING_MAX)
    parts: Any = Parts()
    bulk = Bulk(store, parts, parts, parts, parts, lambda: NOW, confirming)  # type: ignore[arg-type]  # a stand-in
    # A Delete writes its receipt meanwhile.
    await confirming.acquire()
    call = Call(audit_context(), 10.0, 10.0)
    await asyncio.gather(
        *(bulk.delete_all("acme", Filter(), call, dry_run=False) for _ in range(3 * CONFIRMING_MAX))
    )
    assert store.most == CONFIRMING_MAX - 1
