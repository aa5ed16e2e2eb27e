"""`latchkey.sync.Client` and its thread."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from latchkey import Scope, sync
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey

CLIENT_THREAD = "latchkey client"


@pytest.fixture(autouse=True)
async def quiet_loop() -> Any:
    """Hide errors that gRPC causes on the test's event loop if a thread has another one."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(sync.ignore_idle_poller)
    yield
    loop.set_exception_handler(None)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == CLIENT_THREAD]


async def test_methods_block_and_return_values(fake: FakeLatchkey, secret: str) -> None:
    """Calls from many threads return what the async client returns, retries included."""
    fake.on(
        "Create",
        fake.fails(grpc.StatusCode.UNAVAILABLE),
        fake.says(pb.CreateResponse(token=fake.token(), secret=secret)),
    )
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token("t9"))))
    fake.on(
        "List",
        fake.says(
            pb.ListResponse(
                tokens=[fake.token("3"), fake.token("2")],
                next_page_token="p2",
                filter_applied=True,
            )
        ),
        fake.says(pb.ListResponse(tokens=[fake.token("1")], filter_applied=True)),
    )

    def work() -> list[str]:
        with sync.Client(fake.target, timeout_seconds=WAIT_SECONDS) as client:
            created = client.create("acme", "ci", Scope.READ)
            assert created.secret.reveal() == secret
            with ThreadPoolExecutor(4) as threads:
                got = threads.map(lambda _: client.get("acme", "t9").id, range(16))
                assert set(got) == {"t9"}
            wanted, order = latchkey.TokenFilter(search="x"), latchkey.TokenOrder.EXPIRY
            listed = client.list("acme", wanted, order=order, reverse=True, page_size=2)
            return [token.id for token in listed]

    assert await asyncio.to_thread(work) == ["3", "2", "1"]
    first, second = [call.request for call in fake.calls if call.rpc == "Create"]
    assert first == second
    for call in fake.calls[-2:]:
        assert (call.request.filter.search, call.request.reverse) == ("x", True)
        assert call.request.order == pb.TOKEN_ORDER_EXPIRY
    assert running() == []


async def test_errors_are_those_of_the_async_client(fake: FakeLatchkey) -> None:
    """A refusal raises at once, a silent service ends with the deadline, and a closed client says
    so."""
    fake.on("Get", fake.fails(grpc.StatusCode.NOT_FOUND))
    fake.on("List", fake.says(pb.ListResponse(tokens=[fake.token()], next_page_token="same")))
    fake.on("Delete", fake.hangs())
    client = sync.Client(fake.target)

    def work() -> None:
        with pytest.raises(latchkey.NotFound):
            client.get("acme", "t1")
        with pytest.raises(latchkey.DeadlineExceeded):
            client.delete("acme", "t1", timeout_seconds=0.1)
        with pytest.raises(latchkey.InternalError):
            list(client.list("acme"))
        with pytest.raises(latchkey.InvalidArgument):
            client.get("acme", "t1", timeout_seconds=-1)
        with pytest.raises(latchkey.InvalidArgument):
            client.update("acme", "t1")
        client.close()
        client.close()
        with pytest.raises(latchkey.Unavailable, match="client is closed"):
            client.get("acme", "t1")

    await asyncio.to_thread(work)
    assert running() == []


async def test_closing_ends_calls_under_way(fake: FakeLatchkey) -> None:
    """A thread that waits for an answer gets an error when another one closes the client."""
    fake.on("Get", fake.hangs())
    client = sync.Client(fake.target)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.get, "acme", "t1", timeout_seconds=60)
        await fake.called.wait()
        await asyncio.to_thread(client.close)
        with pytest.raises(latchkey.Unavailable, match="closed"):
            await asyncio.to_thread(waiting.result, WAIT_SECONDS)


async def test_a_thread_that_cannot_start_is_unavailable(
    fake: FakeLatchkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a thread, the call fails with advice, and a later one may succeed."""
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token())))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> None:
        with sync.Client(fake.target, timeout_seconds=WAIT_SECONDS) as client:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", refuse)
                with pytest.raises(latchkey.Unavailable, match="client's thread cannot start"):
                    client.get("acme", "t1")
            assert client.get("acme", "t1").id == "t1"

    await asyncio.to_thread(work)


async def test_a_forgotten_client_ends_its_thread(fake: FakeLatchkey) -> None:
    """A client that nobody refers to leaves no thread behind."""
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token())))

    def work() -> None:
        sync.Client(fake.target, timeout_seconds=WAIT_SECONDS).get("acme", "t1")

    await asyncio.to_thread(work)

    async def gone() -> bool:
        await asyncio.to_thread(gc.collect)
        return running() == []

    await eventually(gone, "the thread to end")
