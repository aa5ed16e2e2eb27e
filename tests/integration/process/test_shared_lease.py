"""The workers of a host share one row, one lease and one log, as processes."""

import asyncio
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.errors import NO_ANSWER

from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.databases import session
from tests.helpers.scratch import SCRATCH
from tests.helpers.service_process import Service
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

_numbers = itertools.count(1)
WORKERS = 3
LEFT = "the lead of this host cannot be reached: this process has a row now"
# A restart of a worker on a busy machine, and a dead row.
BACK_SECONDS = 20.0
# Verifies that the end of one connection may cost: one in progress, and one that is refused.
LOST_MAX = 2
# Between two Verifies. A lost lease shows for seconds. Without a pause, the test would take a core
# from the workers.
PAUSE_SECONDS = 0.005


@pytest.fixture
def service(database_url: str) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="latchkey-test-", dir=SCRATCH) as folder:
        # Postgres' own account enters it.
        Path(folder).chmod(0o755)
        service = Service(
            Path(folder) / "service",
            database_url=database_url,
            data_dir=Path(folder) / "data",
            listen="127.0.0.1:0",
            workers=WORKERS,
            host_lease="shared",
            grace_seconds=1,
        )
        yield service
        service.clean_up()


@contextlib.asynccontextmanager
async def channel_to(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel to a service that is up."""
    address = await service.welcome()
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await eventually(lambda: is_serving(channel), "health is up", BACK_SECONDS)
        yield channel


async def rows(database_url: str) -> list[Any]:
    """Return who has a row, and how many processes it represents."""
    async with session(database_url) as connection:
        return list(await connection.fetch("SELECT process_id, processes FROM verifier"))


async def shared(service: Service, database_url: str) -> bool:
    """Return whether the row of the newest lead represents all workers."""
    return [tuple(row) for row in await rows(database_url)] == [(lead_of(service), WORKERS)]


def lead_of(service: Service) -> int:
    ready = [line for line in service.log if line["event"] == "worker ready"]
    return int([line["pid"] for line in ready if line["worker"] == 0][-1])


async def create(stub: "TokenServiceAsyncStub") -> pb.CreateResponse:
    name = f"token {next(_numbers)}"
    request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
    return await stub.Create(request, timeout=5)


async def delete(stub: "TokenServiceAsyncStub") -> pb.Receipt:
    token_id = (await create(stub)).token.id
    request = pb.DeleteRequest(account_id="acme", id=token_id)
    return (await stub.Delete(request, timeout=10)).receipt


async def deleted(stub: "TokenServiceAsyncStub") -> pb.Receipt | None:
    """Return a receipt, or None if the connection led to a worker that has died."""
    try:
        return await delete(stub)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.UNAVAILABLE:
            raise
        return None


async def test_one_row_represents_all_workers(service: Service, database_url: str) -> None:
    """The host has one row. Receipts count all of its processes, and the status names each."""
    async with channel_to(service) as channel:
        await eventually(lambda: shared(service, database_url), "one row", BACK_SECONDS)
        receipt = await delete(pb_grpc.TokenServiceStub(channel))
        assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (WORKERS, 0)
        status = await status_grpc.StatusServiceStub(channel).GetStatus(
            status_pb.GetStatusRequest(), timeout=5
        )
        assert {v.process_id for v in status.verifiers} == set(service.worker_pids)
        assert sum(v.answering for v in status.verifiers) == 1
    assert await service.end() == 0
    assert await rows(database_url) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_lead_ends(service: Service, database_url: str, number: signal.Signals) -> None:
    """While there is no lead, the other workers verify without a gap and confirm Deletes. When it
    is back, the host has one row again.
    """
    async with channel_to(service) as channel:
        await eventually(lambda: shared(service, database_url), "one row", BACK_SECONDS)
        stub = pb_grpc.TokenServiceStub(channel)
        created = await create(stub)
        before = lead_of(service)
        os.kill(before, number)
        ended, lost = time.monotonic() + 4.0, 0
        while time.monotonic() < ended:
            await asyncio.sleep(PAUSE_SECONDS)
            request = pb.VerifyRequest(secret=created.secret)
            try:
                answer = await stub.Verify(request, timeout=5, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                # The connection may lead to the lead. A worker without a lease has no excuse.
                if NO_ANSWER in str(error.details()):
                    raise
                lost += 1
                continue
            assert answer.verdict == pb.VERDICT_VALID
        assert lost <= LOST_MAX
        assert (await delete(stub)).verifiers_acknowledged >= 1
        await eventually(lambda: lead_of(service) != before, "another lead", BACK_SECONDS)
        await eventually(lambda: shared(service, database_url), "one row again", BACK_SECONDS)
        assert (await delete(stub)).verifiers_acknowledged == WORKERS
    # No worker has lost its history, which would have emptied its cache.
    events = [line["event"] for line in service.log]
    assert "the database follows another history: starting over" not in events
    assert events.count("registered") == 0


async def test_a_receipt_counts_a_process_once(service: Service, database_url: str) -> None:
    """While the row of a dead lead is still there, a Delete outwaits one process at most: the
    others have their own rows."""

    def left() -> bool:
        events = [line["event"] for line in service.log]
        return events.count(LEFT) == WORKERS - 1

    async with channel_to(service) as channel:
        await eventually(lambda: shared(service, database_url), "one row", BACK_SECONDS)
        stub = pb_grpc.TokenServiceStub(channel)
        os.kill(lead_of(service), signal.SIGKILL)
        await eventually(left, "the other workers have rows")
        receipt = await eventually(lambda: deleted(stub), "a worker answers")
        assert receipt.verifiers_outwaited <= 1
        assert receipt.verifiers_acknowledged >= WORKERS - 1
