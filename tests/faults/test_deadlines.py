"""Calls that wait for Postgres: their deadlines, what they leave behind, and a graceful stop."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import MANAGER
from latchkey_service.postgres.connections import POOL_SIZE_MAX
from latchkey_service.process.wiring import running
from latchkey_service.rpc.managed_calls import CONCURRENCY_LIMITS
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.token_store import TokenStore

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.calls import CHANNEL_OPTIONS, Outcome, is_serving, outcome
from tests.helpers.databases import backends, session
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub
    from latchkey_service.settings.settings import Settings

    from tests.helpers.servers import Create

pytestmark = [
    pytest.mark.xdist_group("faults"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# Measurement error on a busy machine.
SLACK_SECONDS = 0.6
DRAIN_SECONDS = 0.3


@contextlib.asynccontextmanager
async def locked(database_url: str, token_id: str) -> AsyncIterator[None]:
    """Hold the lock of a token's row, so that its deletion waits."""
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM token WHERE id = $1 FOR UPDATE", token_id)
        yield


async def waiting(database_url: str, count: int = 1) -> bool:
    """Return whether that many statements of the service wait for a lock."""
    rows = await backends(database_url)
    return sum(row["wait_event_type"] == "Lock" for row in rows) >= count


async def left_nothing(database_url: str) -> bool:
    """Return whether every connection of the service is idle and outside a transaction."""
    return all(row["state"] == "idle" for row in await backends(database_url))


def delete(
    stub: "TokenServiceAsyncStub", token: pb.Token, timeout: float | None
) -> "asyncio.Task[Outcome]":
    request = pb.DeleteRequest(account_id=token.account_id, id=token.id)
    call: Awaitable[Any] = stub.Delete(request, timeout=timeout)
    return asyncio.create_task(outcome(call))


@pytest.mark.parametrize("deadline", [0.5, 1.0, None])
async def test_a_delete_that_waits_for_a_lock_ends_in_time(
    deadline: float | None, database_url: str, stub: "TokenServiceAsyncStub", create: "Create"
) -> None:
    """A Delete that waits for a lock is UNAVAILABLE by its deadline or at the lock time-out,
    deletes nothing, and leaves no transaction behind. A retry deletes."""
    token = (await create()).token
    async with locked(database_url, token.id):
        end = await delete(stub, token, deadline)
        assert end.code is UNAVAILABLE
        assert end.retry_info
        assert end.seconds < (deadline or 2.0) + SLACK_SECONDS
        await eventually(lambda: left_nothing(database_url), "no statement goes on", 2.0)
        assert (await stub.Get(pb.GetRequest(account_id="acme", id=token.id))).token == token
    assert (await delete(stub, token, 5)).ok


async def test_a_cancelled_delete_ends_its_transaction(
    database_url: str, stub: "TokenServiceAsyncStub", create: "Create"
) -> None:
    """A Delete that its caller cancels ends on the server too, without effect."""
    token = (await create()).token
    async with locked(database_url, token.id):
        call = stub.Delete(pb.DeleteRequest(account_id="acme", id=token.id))
        task = asyncio.create_task(outcome(call))
        await eventually(lambda: waiting(database_url), "the delete waits")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: left_nothing(database_url), "no statement goes on", 1.0)
    assert (await stub.Get(pb.GetRequest(account_id="acme", id=token.id))).token == token


async def test_impatient_callers_pile_up_no_connections(
    database_url: str, stub: "TokenServiceAsyncStub", create: "Create"
) -> None:
    """Deletes with short deadlines that repeatedly wait for one row do not exceed the bound on
    connections to Postgres."""
    token = (await create()).token
    most = 0
    async with locked(database_url, token.id):
        for _ in range(8):
            deletes = [delete(stub, token, 0.1) for _ in range(POOL_SIZE_MAX)]
            assert not any(end.ok for end in await asyncio.gather(*deletes))
            most = max(most, len(await backends(database_url)))
    # Includes abandoned statements that have not detected that yet, which takes up to 250 ms.
    assert most <= POOL_SIZE_MAX * 5


async def test_a_freeze_in_a_transaction_is_reported_in_time(
    postgres: BreakablePostgres,
    database_url: str,
    stub: "TokenServiceAsyncStub",
    create: "Create",
) -> None:
    """A Delete whose Postgres freezes in the middle is UNAVAILABLE by its deadline, because no
    caller waits for the ROLLBACK."""
    tokens = [(await create()).token for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        for token in tokens:
            await stack.enter_async_context(locked(database_url, token.id))
        deletes = [delete(stub, tokens[0], 1.0), delete(stub, tokens[1], None)]
        await eventually(lambda: waiting(database_url, 2), "the deletes wait")
        async with postgres.broken_by("frozen"):
            for end, bound in zip(await asyncio.gather(*deletes), (1.0, 2.0), strict=True):
                assert end.code is UNAVAILABLE
                assert end.retry_info
                assert end.seconds < bound + SLACK_SECONDS
        await eventually(lambda: left_nothing(database_url), "no statement goes on", 3.0)


async def test_deletes_of_one_locked_token_do_not_take_the_service_down(
    database_url: str,
    channel: grpc.aio.Channel,
    stub: "TokenServiceAsyncStub",
    create: "Create",
) -> None:
    """While more deletes wait for one row than the server admits, verifies and operator calls are
    answered, health stays SERVING, and all deletes end within their bound."""
    status = status_pb_grpc.StatusServiceStub(channel)
    created = await create()
    await eventually(lambda: is_serving(channel), "health is up")
    async with locked(database_url, created.token.id):
        places, _ = CONCURRENCY_LIMITS[MANAGER]
        deletes = [delete(stub, created.token, None) for _ in range(places * 3)]
        await eventually(lambda: waiting(database_url, places), "the deletes wait")
        while not all(task.done() for task in deletes):
            answer = await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=1)
            assert answer.verdict == pb.VERDICT_VALID
            assert await status.GetStatus(status_pb.GetStatusRequest(), timeout=1)
            assert await is_serving(channel)
            await asyncio.sleep(0.02)
        # On a busy machine, calls give up before Postgres ends their statements. A statement that
        # still waits would delete the token once the lock is free, as UNAVAILABLE allows.
        await eventually(lambda: left_nothing(database_url), "no statement goes on")
    for end in await asyncio.gather(*deletes):
        # While admitted, or in the queue.
        assert end.code in {UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert end.retry_info
        assert end.seconds < 5.0
    assert (await stub.Get(pb.GetRequest(account_id="acme", id=created.token.id), timeout=2)).token


class Worker:
    """A server that the test stops itself."""

    def __init__(self, settings: "Settings") -> None:
        keyring = pepper_file.load_or_create(settings.pepper_path, create=False)
        self._running = running(settings, keyring)
        self.address = ""
        self.stopped: asyncio.Task[float] | None = None

    async def start(self) -> None:
        self.address = (await self._running.__aenter__()).address

    def stop(self) -> "asyncio.Task[float]":
        """Begin to stop; the task returns how many seconds the stop took."""

        async def stop() -> float:
            start = time.monotonic()
            await self._running.__aexit__(None, None, None)
            return time.monotonic() - start

        if self.stopped is None:
            self.stopped = asyncio.create_task(stop())
        return self.stopped


@pytest.fixture
async def worker(
    settings: "Settings", database_url: str
) -> AsyncIterator[Callable[[float], Awaitable[Worker]]]:
    """Start a server with a grace period of so many seconds; it is stopped when the test ends, if
    not before."""
    store = await TokenStore.open(database_url)
    for pepper in pepper_file.load_or_create(settings.pepper_path, create=False).peppers:
        await store.register_pepper(pepper.id)
    await store.close()
    started: list[Worker] = []

    async def start(grace_seconds: float) -> Worker:
        stopping = {"drain_seconds": DRAIN_SECONDS, "grace_seconds": grace_seconds}
        worker = Worker(settings.model_copy(update=stopping))
        started.append(worker)
        await worker.start()
        return worker

    yield start
    for worker in started:
        await worker.stop()


async def test_a_stop_lets_calls_in_flight_finish(
    worker: Callable[[float], Awaitable[Worker]], database_url: str
) -> None:
    """Health reports NOT_SERVING while calls are still accepted. Then new calls other than
    verifies are UNAVAILABLE, and the Delete in flight completes and is answered."""
    it = await worker(5.0)
    async with grpc.aio.insecure_channel(it.address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        create = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        created = await stub.Create(create)
        await eventually(lambda: is_serving(channel), "health is up")
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        serving = health_pb2.HealthCheckResponse
        assert (await anext(statuses)).status == serving.SERVING
        question = pb.VerifyRequest(secret=created.secret)
        async with locked(database_url, created.token.id):
            deleted = delete(stub, created.token, None)
            await eventually(lambda: waiting(database_url), "the delete waits")
            stopped = it.stop()
            assert (await anext(statuses)).status == serving.NOT_SERVING
            # Not drained yet.
            assert (await stub.Verify(question, timeout=2)).verdict == pb.VERDICT_VALID

            async def refused() -> bool:
                async with grpc.aio.insecure_channel(it.address, options=CHANNEL_OPTIONS) as other:
                    listing = pb.ListRequest(account_id="acme")
                    end = await outcome(pb_grpc.TokenServiceStub(other).List(listing, timeout=2))
                    assert end.ok or end.code is UNAVAILABLE, end
                    return not end.ok

            await eventually(refused, "new calls are refused", 3.0)
            assert not deleted.done()
            assert not stopped.done()
        end = await deleted
        assert end.ok
        assert end.response.receipt.revision > 0
        assert await stopped < 5.0
        watch.cancel()


async def test_a_stop_ends_within_its_grace(
    worker: Callable[[float], Awaitable[Worker]], database_url: str
) -> None:
    """A call that does not finish within the grace period is ended with a retryable status and
    leaves nothing behind."""
    it = await worker(0.4)
    async with grpc.aio.insecure_channel(it.address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        create = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        token = (await stub.Create(create)).token
        async with locked(database_url, token.id):
            deleted = delete(stub, token, None)
            await eventually(lambda: waiting(database_url), "the delete waits")
            assert await it.stop() < DRAIN_SECONDS + 0.4 + SLACK_SECONDS
            end = await deleted
            assert end.code is UNAVAILABLE, end

            async def gone() -> bool:
                return not await backends(database_url)

            await eventually(gone, "no connection is left", 1.0)


async def test_a_stop_does_not_wait_for_a_frozen_postgres(
    worker: Callable[[float], Awaitable[Worker]],
    postgres: BreakablePostgres,
    settings: "Settings",
) -> None:
    """While Postgres is frozen and calls wait for it, a server still stops in bounded time."""
    it = await worker(0.4)
    async with grpc.aio.insecure_channel(it.address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        create = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        created = await stub.Create(create)
        keyring = pepper_file.load_or_create(settings.pepper_path, create=False)
        # Only the database can tell that this secret is unknown.
        question = pb.VerifyRequest(secret=keyring.mint("lk", os.urandom).secret.reveal())
        await stub.Verify(question)
        async with postgres.broken_by("frozen"):
            calls: list[Awaitable[Any]] = [
                stub.Verify(question),
                stub.List(pb.ListRequest(account_id="acme")),
                stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id)),
            ]
            ends = [asyncio.create_task(outcome(call)) for call in calls]
            await asyncio.sleep(0.1)
            # The drain, the grace period, and the time that closing the pool may take.
            assert await it.stop() < DRAIN_SECONDS + 0.4 + 2.0 + SLACK_SECONDS
            for end in await asyncio.gather(*ends):
                assert end.code is UNAVAILABLE, end
