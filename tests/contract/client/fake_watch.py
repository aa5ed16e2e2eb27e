"""A scripted server end of Watch: it grants, or does not, and sends what the test wants."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.waiting import eventually

MARK_FACTOR = 0x9E37_79B9_7F4A_7C15


def mark_of(revision: int) -> int:
    """Return the mark of a revision of the scripted history, which is never 0."""
    return (revision + 1) * MARK_FACTOR % 2**64 or 1


@dataclass
class FakeStream:
    """One Watch stream as seen by the server."""

    context: Any
    peer: str
    requests: list[pb.WatchRequest] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The status with which the test ends the stream."""
    gone: bool = False
    """Whether the stream has ended, by the client or by the test."""
    status: grpc.StatusCode = grpc.StatusCode.OK
    silent: bool = False
    """Whether to withhold further grants."""

    @property
    def acknowledged(self) -> int:
        return self.requests[-1].applied_revision if self.requests else -1

    @property
    def released(self) -> bool:
        return any(request.released for request in self.requests)

    @property
    def asked(self) -> int:
        return max((request.number for request in self.requests), default=0)

    # Tests may pass a `mark` that differs from the scripted history's.

    async def grant(
        self, number: int, revision: int, seconds: float, mark: int | None = None
    ) -> None:
        message = pb.WatchResponse()
        message.grant.revision = revision
        message.grant.mark = mark_of(revision) if mark is None else mark
        message.grant.number = number
        message.grant.lease_duration.FromNanoseconds(round(seconds * 1e9))
        await self.context.write(message)

    async def invalidate(self, revision: int, *token_ids: str, mark: int | None = None) -> None:
        mark = mark_of(revision) if mark is None else mark
        invalidation = pb.Invalidation(revision=revision, token_ids=token_ids, mark=mark)
        await self.context.write(pb.WatchResponse(invalidation=invalidation))

    async def reset(self, revision: int, mark: int | None = None) -> None:
        mark = mark_of(revision) if mark is None else mark
        await self.context.write(pb.WatchResponse(reset=pb.Reset(revision=revision, mark=mark)))

    async def closing(self) -> None:
        await self.context.write(pb.WatchResponse(closing=pb.Closing()))

    def end(self, status: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self.status = status
        self.ended.set()


@dataclass
class FakeWatch:
    """Stores the streams, oldest first, and answers requests for grants."""

    revision: int = 7
    lease_seconds: float = 30.0
    granting: bool = True
    refuse: grpc.StatusCode | None = None
    """A status with which new streams end at once."""
    streams: list[FakeStream] = field(default_factory=list)

    async def serve(self, _requests: Any, context: Any) -> None:
        stream = FakeStream(context, context.peer())
        self.streams.append(stream)
        if self.refuse is not None:
            stream.gone = True
            await context.abort(self.refuse, "refused by the script")
        reading = asyncio.create_task(self._read(stream))
        ending = asyncio.create_task(stream.ended.wait())
        try:
            await asyncio.wait([reading, ending], return_when=asyncio.FIRST_COMPLETED)
            if stream.status is not grpc.StatusCode.OK:
                await context.abort(stream.status, "ended by the script")
        finally:
            stream.gone = True
            for task in (reading, ending):
                task.cancel()
            await asyncio.wait([reading, ending])

    async def _read(self, stream: FakeStream) -> None:
        while (request := await stream.context.read()) is not grpc.aio.EOF:
            stream.requests.append(request)
            if len(stream.requests) == 1 and not request.applied_revision:
                # As in the service: an empty cache starts at the server's position.
                await stream.reset(self.revision)
            if request.number and self.granting and not stream.silent:
                await stream.grant(request.number, self.revision, self.lease_seconds)

    def let_go(self) -> None:
        for stream in self.streams:
            stream.end()

    async def opened(self, number: int) -> FakeStream:
        """Wait for the stream with this number, counted from 1, and return it."""
        await eventually(lambda: len(self.streams) >= number, f"{number} streams")
        return self.streams[number - 1]


async def watching(verifier: Any) -> None:
    """Wait until the verifier holds a lease."""
    await eventually(lambda: verifier.stats().watching, "a lease")
