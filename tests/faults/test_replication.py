"""Commits that Postgres reports as done although no standby has received them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS, Acknowledgements
from latchkey_service.coherence.verifier_table import Identity, OwnRow
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import Connector
from latchkey_service.secret_format import Digest
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import Scope, TokenRecord

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.database_history import NO_CLIENTS
from tests.helpers.databases import session
from tests.helpers.domain import audit_context
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.xdist_group("faults")


@contextlib.asynccontextmanager
async def standby_missing(postgres: BreakablePostgres, url: str) -> AsyncIterator[None]:
    """Make commits wait for a missing standby."""
    postgres.configure("synchronous_standby_names = 'nobody'")
    try:
        # The processes of Postgres read the setting one by one.
        async with session(url) as connection:

            async def waits() -> bool:
                write = asyncio.ensure_future(
                    connection.execute("UPDATE head SET revision = revision")
                )
                await asyncio.wait([write], timeout=0.2)
                if write.done():
                    return False
                await cut_short(url, write)
                return True

            await eventually(waits, "commits wait")
        yield
    finally:
        postgres.configure("")


async def cut_short(url: str, work: Awaitable[Any]) -> Any:
    """Cancel the wait for the standby that `work` is in, and return the result of `work`."""
    task = asyncio.ensure_future(work)

    async def cancelled() -> bool:
        async with session(url) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT bool_or(pg_cancel_backend(pid)) FROM pg_stat_activity"
                    " WHERE wait_event = 'SyncRep' AND datname = current_database()"
                )
            )

    await eventually(cancelled, "the commit waits for the standby")
    return await task


async def test_a_renewal_that_no_standby_has_extends_no_lease(
    postgres: BreakablePostgres, database_url: str
) -> None:
    """A failover may undo such a renewal, so it extends no lease."""
    connection = await Connector(database_url).connect()
    row = OwnRow(connection, Identity("ver_a", "x", 1, "0", 3.0))
    position = (await row.register(1, acknowledge=True)).position
    async with standby_missing(postgres, database_url):
        with pytest.raises(StoreUnavailable):
            await cut_short(database_url, row.renew(1, position, 0, NO_CLIENTS))
    renewed, log = await row.renew(1, position, 0, NO_CLIENTS)
    assert (renewed, log.known) == (True, True)
    connection.terminate()


async def test_a_deletion_that_no_standby_has_is_not_confirmed(
    postgres: BreakablePostgres, database_url: str, store: TokenStore
) -> None:
    """The caller gets a retryable error on every attempt until a standby has the deletion."""
    await store.register_pepper("p")
    record = TokenRecord(
        "tok_1", "acme", "a", Scope.READ, (await now(database_url)), None, "lk_…abcd"
    )
    await store.insert_token(record, "a", Digest(bytes(32), "p"), audit_context())
    async with standby_missing(postgres, database_url):
        with pytest.raises(StoreUnavailable):
            await cut_short(
                database_url, store.delete_token("acme", "tok_1", audit_context("Delete"))
            )
        unconfirmed, _ = await store.get_deletion("acme", "tok_1")
        assert unconfirmed is not None
        position = unconfirmed.position
        with pytest.raises(StoreUnavailable):
            await cut_short(
                database_url, store.confirm_deletion("tok_1", position, Acknowledgements(1, 0))
            )
    deletion = await store.confirm_deletion("tok_1", position, NO_ACKNOWLEDGEMENTS)
    assert deletion.effective_time is not None
    assert deletion.verifiers_acknowledged == 1


async def now(url: str) -> Any:
    async with session(url) as connection:
        return await connection.fetchval("SELECT now()")
