"""How callers of a service, started as users start it, share what management calls can use."""

import asyncio
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.service_process import service
from tests.helpers.waiting import eventually

CODE = grpc.StatusCode
# More than may wait for long, so the queue is full all the time.
FLOOD = 80
CALLS = 11


def presented(name: str) -> Any:
    return (("authorization", f"Bearer {credential(name)}"),)


async def test_one_caller_does_not_crowd_out_another(
    folder: Path, database_url: str, transport: str
) -> None:
    """While a caller that is limited to an account creates tokens as fast as it can, no call of
    another manager is refused, and its Deletes do not wait behind the Creates."""
    header = "[callers.acmes-manager]\n"
    # Otherwise its default rate would end the flood.
    text = policy_text().replace(header, f"{header}rates = {{ manager = 100000 }}\n")
    policy = folder / "policy.toml"
    policy.write_text(text)
    with service(
        folder / "service",
        listen="127.0.0.1:0",
        database_url=database_url,
        data_dir=folder / "data",
        log_format="json",
        transport=transport,
        policy=policy,
    ) as running:
        address = await running.welcome()
        async with (
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as second,
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as third,
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as own,
        ):
            await eventually(partial(is_serving, own), "it serves")
            stubs = [pb_grpc.TokenServiceStub(each) for each in (channel, second, third)]
            stub = pb_grpc.TokenServiceStub(own)
            numbers = itertools.count()

            def create(by: str, account: str, through: Any) -> Any:
                name = f"token {next(numbers)}"
                request = pb.CreateRequest(account_id=account, name=name, scope=pb.SCOPE_READ)
                return outcome(through.Create(request, metadata=presented(by), timeout=10))

            stop = asyncio.Event()

            async def keep_creating(through: Any) -> None:
                # A cancelled call may end with a status, so cancelling this task would not end it.
                while not stop.is_set():
                    found = await create("acmes-manager", "acme", through)
                    # As a client that retries soon.
                    await asyncio.sleep(0 if found.ok else 0.02)

            flood = [asyncio.create_task(keep_creating(stubs[n % 3])) for n in range(FLOOD)]
            try:
                await asyncio.sleep(0.5)
                created, creating, deleting = [], [], []
                for _ in range(CALLS):
                    found = await create("manager", "globex", stub)
                    assert found.ok, found
                    creating.append(found.seconds)
                    created.append(found.response.token.id)
                for one in created:
                    request = pb.DeleteRequest(account_id="globex", id=one, no_wait=True)
                    call = stub.Delete(request, metadata=presented("manager"), timeout=10)
                    found = await outcome(call)
                    assert found.ok, found
                    deleting.append(found.seconds)
            finally:
                stop.set()
                await asyncio.gather(*flood)
            # Both take turns with the flood; neither waits for all of it.
            assert sorted(creating)[CALLS // 2] < 2.0, creating
            assert sorted(deleting)[CALLS // 2] < 2.0, deleting
