"""The uses of a token on two servers and in a client library, on one database."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import latchkey
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.contract.client.fake_watch import watching
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

# Documented: with healthy servers, a use is visible within this time.
BOUND_SECONDS = 15.0
ROUNDS = 5


async def test_uses_of_all_verifiers_add_up_within_the_bound(
    database_url: str, pepper_file: Path
) -> None:
    """With the real intervals, a use on either server or from the cache of a client is visible on
    both servers within 15 seconds. Counts of all three add up."""
    settings = make_settings(database_url, pepper_file, "native")
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(settings)) for _ in range(2)]
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            )
            for address in addresses
        ]
        a, b = (pb_grpc.TokenServiceStub(channel) for channel in channels)
        created = await a.Create(
            pb.CreateRequest(account_id="acme", name="ci", scope=pb.SCOPE_READ), timeout=5
        )
        verifier = await stack.enter_async_context(
            latchkey.Verifier(addresses[1], timeout_seconds=5)
        )
        await watching(verifier)
        uses = 0
        while verifier.verify_nowait(created.secret) is None:
            uses += (await verifier.verify(created.secret)).allowed
        uses += 1
        for _ in range(ROUNDS):
            for stub in (a, b):
                await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
            last = datetime.now(UTC)
            assert verifier.verify_nowait(created.secret) is not None
            uses += 3

        async def visible() -> bool:
            for stub in (a, b):
                request = pb.GetUsageRequest(account_id="acme", id=created.token.id)
                callers = (await stub.GetUsage(request, timeout=5)).callers
                assert len(callers) == 1
                caller = callers[0]
                get = pb.GetRequest(account_id="acme", id=created.token.id)
                token = (await stub.Get(get, timeout=5)).token
                assert sum(day.count for day in caller.days) == uses
                assert token.last_used_time == caller.last_used_time
                # The last use was the client's. It reports an age, so a report that is late on a
                # busy machine makes the use seem later.
                difference = token.last_used_time.ToDatetime(UTC) - last
                assert -0.05 < difference.total_seconds() < BOUND_SECONDS
            return True

        await eventually(visible, "all uses on both servers", BOUND_SECONDS)
