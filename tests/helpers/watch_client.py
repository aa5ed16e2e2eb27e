"""A client of Watch that sends only the messages that a test requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["WatchClient", "watching"]

Metadata = tuple[tuple[str, str], ...]

# The metadata in which a client library names its host and process.
CLIENT: Metadata = (("latchkey-client", "web-1 pid 77"),)

# Between two grants that a test only holds: a fraction of the servers' lease of three seconds.
HOLD_SECONDS = 0.3


class WatchClient:
    """One stream. `events` contains the received events in order, whether or not the test waited
    for them."""

    def __init__(self, stub: Any, metadata: Metadata = ()) -> None:
        self.call = stub.Watch(metadata=metadata)
        self.number = 0
        self.applied = NOWHERE

    async def say(self, applied: Position | None = None, **fields: Any) -> None:
        """Send a request; by default with the position that was applied so far."""
        position = self.applied if applied is None else applied
        await self.call.write(
            pb.WatchRequest(applied_revision=position.revision, mark=position.mark, **fields)
        )

    async def ask(self) -> None:
        """Request a grant."""
        self.number += 1
        await self.say(number=self.number)

    async def hear(self) -> Any:
        """Return the next event, and apply it as a client does, but do not confirm it."""
        async with asyncio.timeout(WAIT_SECONDS):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "the server has ended the stream"
        kind = response.WhichOneof("event")
        event = getattr(response, kind)
        if kind in ("invalidation", "reset"):
            self.applied = Position(event.revision, event.mark)
        return event

    async def granted(self) -> pb.Grant:
        """Request a grant, confirm the events before it, and return it."""
        await self.ask()
        while not isinstance(event := await self.hear(), pb.Grant):
            await self.say()
        assert event.number == self.number
        assert Position(event.revision, event.mark) == self.applied
        return event

    async def hold(self) -> None:
        """Renew the grant until the server sends anything else, which is not confirmed."""
        while True:
            await self.ask()
            if not isinstance(await self.hear(), pb.Grant):
                return
            await asyncio.sleep(HOLD_SECONDS)

    async def refusal(self) -> grpc.StatusCode:
        """Return the status with which the server ends the stream."""
        async with asyncio.timeout(WAIT_SECONDS):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code()


@contextlib.asynccontextmanager
async def watching(address: str) -> AsyncIterator[WatchClient]:
    """Watch a server over a new connection. Releases the lease at the end, if it still can."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        client = WatchClient(pb_grpc.TokenServiceStub(channel), CLIENT)
        yield client
        if client.call.cancelled():
            return
        # The server may end the stream at any moment: at once, if the test has already released the
        # lease.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await client.say(released=True)
            await client.call.done_writing()
        await client.refusal()
