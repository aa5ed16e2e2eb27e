"""Changes that are repeated after Postgres has made them without a standby."""

import hashlib
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS
from latchkey_service.errors import StoreUnavailable
from latchkey_service.lifetime import UNLIMITED
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.assembly import Management, build_management
from latchkey_service.tokens.bulk import Outcome as BulkOutcome
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.filters import Filter
from latchkey_service.tokens.importing import Outcome, Row
from latchkey_service.tokens.management import NewToken
from latchkey_service.tokens.token_store import TokenStore

from tests.faults.test_replication import cut_short, standby_missing
from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.domain import audit_context

pytestmark = pytest.mark.xdist_group("faults")

PEPPER = Pepper(bytes(32))
CALL = Call(audit_context(), 30.0, 30.0)
SHA256 = hashlib.sha256(b"imported").digest()


class Coherence:
    """Stands in for lease and verifiers: every read is acceptable, and no verifier exists."""

    async def begin(self, _deadline: float) -> None: ...

    async def accept(self, *_: Any) -> None: ...

    def announce(self, _revision: int) -> None: ...

    async def wait(self, *_: Any) -> Any:
        return NO_ACKNOWLEDGEMENTS


class Subject:
    """A token, and the changes of it that can be repeated."""

    def __init__(self, management: Management, token_id: str, secret: str) -> None:
        self._management, self._id, self._secret = management, token_id, secret

    async def disable(self) -> None:
        await self._management.lifecycle.disable("acme", self._id, CALL)

    async def enable(self) -> None:
        await self._management.lifecycle.enable("acme", self._id, CALL)

    async def revoke(self) -> None:
        await self._management.bulk.revoke_secrets([self._secret], CALL)

    async def report(self) -> None:
        assert await self._management.bulk.report_secrets([self._secret], CALL) == [
            BulkOutcome.ENDED_BEFORE
        ]

    async def delete_all(self) -> None:
        await self._management.bulk.delete_all("acme", Filter(), CALL, dry_run=False)

    async def import_(self) -> None:
        row = Row("acme", "imported", 1, None, {}, "", (), (), SHA256, "", None, disabled=False)
        (result,) = await self._management.importer.import_tokens(
            [row], CALL, lambda _: UNLIMITED, validate_only=False
        )
        assert result.outcome in (Outcome.IMPORTED, Outcome.EXISTS)


async def prepared(database_url: str, store: TokenStore) -> tuple[Subject, Pool]:
    """Create a token."""
    await store.register_pepper(PEPPER.id)
    pool = await Pool.open(Connector(database_url))
    coherence: Any = Coherence()
    management = build_management(
        pool, Keyring([PEPPER]), coherence, coherence, "lk", lambda: datetime.now(UTC)
    )
    created = await management.lifecycle.create(NewToken("acme", "a", 1, None, None, {}), CALL)
    return Subject(management, created.record.id, created.secret.reveal()), pool


CHANGES: tuple[Callable[[Subject], Awaitable[None]], ...] = (
    Subject.disable,
    Subject.enable,
    Subject.revoke,
    Subject.delete_all,
    Subject.import_,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_a_repeated_change_waits_for_the_standby(
    postgres: BreakablePostgres,
    database_url: str,
    store: TokenStore,
    change: Callable[[Subject], Awaitable[None]],
) -> None:
    """A change that only a primary without a standby has made is not confirmed, however often it is
    repeated: a failover would undo it. It is confirmed once a standby has it."""
    subject, pool = await prepared(database_url, store)
    if change is Subject.enable:
        await subject.disable()
    async with standby_missing(postgres, database_url):
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await cut_short(database_url, change(subject))
    await change(subject)
    await pool.close()


async def test_a_secret_has_not_ended_without_a_standby(
    postgres: BreakablePostgres, database_url: str, store: TokenStore
) -> None:
    """A report about a leaked secret does not answer that it has ended as long as a failover could
    undo that."""
    subject, pool = await prepared(database_url, store)
    async with standby_missing(postgres, database_url):
        for change in (subject.revoke, subject.report):
            with pytest.raises(StoreUnavailable):
                await cut_short(database_url, change())
    await subject.report()
    await pool.close()


async def test_a_position_of_another_history_is_not_settled(store: TokenStore) -> None:
    """After a failover that has undone a change, the new primary does not confirm it."""
    with pytest.raises(StoreUnavailable):
        await store.settle(Position(10**6, int.from_bytes(os.urandom(8), "big")))
