"""Metrics of events that need a database to themselves, or another program's doing."""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.audit import audit_sealer
from latchkey_service.postgres.connections import POOL_SIZE_MAX
from latchkey_service.process.server import Server
from latchkey_service.settings.settings import Settings

from tests.helpers.databases import session
from tests.helpers.metrics import read
from tests.helpers.servers import make_settings, serving_as
from tests.helpers.waiting import eventually

PREFIX = "sk_live_"


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """Metrics do not depend on the transport."""
    made = make_settings(database_url, pepper_file, "native")
    return made.model_copy(update={"imported_prefixes": PREFIX, "cache": "off"})


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    async with serving_as(settings) as server:
        yield server


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.TokenServiceStub(channel)


def made_up() -> str:
    return PREFIX + secrets.token_urlsafe(24)


async def verify(stub: Any, secret: str) -> Any:
    return (await stub.Verify(pb.VerifyRequest(secret=secret), timeout=5)).verdict


async def create(stub: Any, **fields: Any) -> Any:
    request = pb.CreateRequest(account_id="acme", name="n", scope=pb.SCOPE_READ, **fields)
    return await stub.Create(request, timeout=5)


async def test_imported_secrets(server: Server, stub: Any) -> None:
    """Look-ups of imported secrets are counted by result."""
    known = made_up()
    row = pb.ImportedToken(
        account_id="acme",
        name="n",
        scope=pb.SCOPE_READ,
        secret_sha256=hashlib.sha256(known.encode()).digest(),
    )
    await stub.Import(pb.ImportRequest(tokens=[row]), timeout=5)
    for secret, result in ((known, "found"), (made_up(), "absent")):
        before = read(server).get("latchkey_imported_lookups_total", result=result)
        await verify(stub, secret)
        now = read(server).get("latchkey_imported_lookups_total", result=result)
        assert now == before + 1


def waiting(server: Server, prefix: str) -> float:
    now = read(server)
    return {
        "lk_": now.get("latchkey_lookup_waiting"),
        PREFIX: now.get("latchkey_imported_lookup_waiting"),
    }[prefix]


@pytest.mark.parametrize("prefix", ["lk_", PREFIX])
async def test_waiting_secrets(server: Server, stub: Any, database_url: str, prefix: str) -> None:
    """Secrets that wait for a look-up query are counted while a query takes long."""
    asked = [made_up(), made_up()] if prefix == PREFIX else [(await create(stub)).secret] * 2
    await verify(stub, asked[0])
    await eventually(lambda: waiting(server, prefix) == 0, "nothing waits yet")
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("LOCK TABLE secret IN ACCESS EXCLUSIVE MODE")
        asking = [asyncio.create_task(verify(stub, asked[0]))]

        def waits() -> bool:
            # Not all at once, because then one query asks for all of them.
            asking.append(asyncio.create_task(verify(stub, asked[1])))
            return waiting(server, prefix) > 0

        await eventually(waits, "secrets wait")
    # Queries that waited too long for the lock have failed.
    for task in asking:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await task
    await eventually(lambda: waiting(server, prefix) == 0, "nothing waits")


async def test_rate_draws(server: Server, stub: Any) -> None:
    """Statements that draw calls of a token with a rate limit are counted."""
    period = duration_pb2.Duration(seconds=60)
    created = await create(stub, rate_limit=pb.RateLimit(count=5, period=period))
    before = read(server).get("latchkey_rate_draws_total")
    await verify(stub, created.secret)
    assert read(server).get("latchkey_rate_draws_total") > before


async def test_limit_of_the_pool(server: Server) -> None:
    """The limit of pooled connections is the number above which a session waits."""
    limit = read(server).get("latchkey_pool_connections_max")
    assert limit == POOL_SIZE_MAX
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(int(limit) - 1):
            await stack.enter_async_context(server.metrics.pool.session())
        used = read(server).get("latchkey_pool_connections", state="used")
        assert limit - 1 <= used <= limit


async def test_changed_rows(server: Server, stub: Any, database_url: str) -> None:
    """A secret whose row somebody has changed is counted each time that it is refused."""

    async def sealed() -> bool:
        return server.metrics.seals.tokens_sealed

    await eventually(sealed, "the proof that all rows are sealed")
    created = await create(stub)
    assert read(server).get("latchkey_seals_rejected_total") == 0
    async with session(database_url) as connection:
        await connection.execute("UPDATE secret SET seal = substr(seal, 1, 31)")
    assert await verify(stub, created.secret) == pb.VERDICT_UNKNOWN
    assert read(server).get("latchkey_seals_rejected_total") >= 1


async def test_removed_audit_entries(
    settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest sealed batch rises with entries. If it is removed, that is counted."""
    monkeypatch.setattr(audit_sealer, "SEAL_SECONDS", 0.1)
    async with (
        serving_as(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await create(pb_grpc.TokenServiceStub(channel))

        def sealed() -> bool:
            return read(server).get("latchkey_audit_newest_batch") >= 1

        await eventually(sealed, "the entry is sealed")
        assert read(server).get("latchkey_audit_regressions_total") == 0
        async with session(database_url) as connection:
            # Only an owner of the tables can do this.
            await connection.execute("ALTER TABLE audit DISABLE TRIGGER USER")
            await connection.execute("ALTER TABLE audit_chain DISABLE TRIGGER USER")
            await connection.execute("DELETE FROM audit; DELETE FROM audit_chain")
        await eventually(
            lambda: read(server).get("latchkey_audit_regressions_total") >= 1, "it is noticed"
        )


async def test_differing_peppers(settings: Settings, database_url: str, tmp_path: Path) -> None:
    """Two hosts with different peppers both count them as missing, until one of them stops."""
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text(f"{'0b' * 32}\n")

    def missing(server: Server) -> float:
        return read(server).get("latchkey_peppers_missing")

    async with serving_as(settings) as first:
        assert missing(first) == 0
        async with serving_as(settings.model_copy(update={"pepper_file": other})) as second:
            await eventually(lambda: missing(first) == 2, "both are missing")
            await eventually(lambda: missing(second) == 2, "both are missing")
        await eventually(lambda: missing(first) == 0, "the other host is gone")
