"""A gRPC service with every kind of handler, behind a guard, and calls of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import status_pb2
from latchkey.guards import current_token_or_none

if TYPE_CHECKING:
    from latchkey.guards.grpc import GuardInterceptor

__all__ = ["KINDS", "Demo", "ask", "detail", "refused", "service"]

KINDS = ("uu", "us", "su", "ss", "sync_uu", "sync_us", "sync_su", "sync_ss", "us_write", "ss_write")


def who(request: object = b"") -> bytes:
    token = current_token_or_none()
    return f"{token.id if token else 'nobody'}:{request!r}".encode()


class Demo:
    """A service with every kind of handler that grpc.aio supports. Each answers with who()."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.parsed = 0

    def parse(self, raw: bytes) -> str:
        self.parsed += 1
        return raw.decode()

    def handlers(self) -> dict[str, Any]:
        reached = self.reached

        async def uu(request: str, _context: Any) -> bytes:
            reached.append("uu")
            return who(request)

        async def us(request: str, _context: Any) -> AsyncIterator[bytes]:
            reached.append("us")
            yield who(request)
            yield who(request)

        async def su(requests: AsyncIterator[str], _context: Any) -> bytes:
            reached.append("su")
            return who("".join([r async for r in requests]))

        async def ss(requests: AsyncIterator[str], _context: Any) -> AsyncIterator[bytes]:
            reached.append("ss")
            async for request in requests:
                yield who(request)

        def sync_uu(request: str, _context: Any) -> bytes:
            reached.append("sync_uu")
            return who(request)

        def sync_us(request: str, _context: Any) -> Iterator[bytes]:
            reached.append("sync_us")
            yield who(request)
            yield who(request)

        def sync_su(requests: Iterator[str], _context: Any) -> bytes:
            reached.append("sync_su")
            return who("".join(requests))

        def sync_ss(requests: Iterator[str], _context: Any) -> Iterator[bytes]:
            reached.append("sync_ss")
            for request in requests:
                yield who(request)

        async def us_write(request: str, context: Any) -> None:
            reached.append("us_write")
            await context.write(who(request))

        async def ss_write(_requests: object, context: Any) -> None:
            reached.append("ss_write")
            while (request := await context.read()) is not grpc.aio.EOF:
                await context.write(who(request))

        makers: dict[str, Callable[..., Any]] = {
            "uu": grpc.unary_unary_rpc_method_handler,
            "us": grpc.unary_stream_rpc_method_handler,
            "su": grpc.stream_unary_rpc_method_handler,
            "ss": grpc.stream_stream_rpc_method_handler,
        }
        behaviours = (uu, us, su, ss, sync_uu, sync_us, sync_su, sync_ss, us_write, ss_write)
        return {
            name: makers[name.removeprefix("sync_")[:2]](behaviour, self.parse)
            for name, behaviour in zip(KINDS, behaviours, strict=True)
        }


@asynccontextmanager
async def service(demo: Demo, guard: GuardInterceptor) -> AsyncIterator[grpc.aio.Channel]:
    threads = ThreadPoolExecutor(1)
    server = grpc.aio.server(threads, interceptors=[guard], options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("demo.Demo", demo.handlers())]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
        # Not on the event loop, which a thread may need to finish its call.
        await asyncio.to_thread(threads.shutdown)


async def ask(
    channel: grpc.aio.Channel,
    kind: str,
    *authorization: str,
    send: bool = True,
    forwarded_for: Sequence[str] = (),
    timeout: float | None = 10.0,  # noqa: ASYNC109 - gRPC's own timeout, sent to the server
) -> list[bytes]:
    """Call a method of Demo with these authorization values and return its answers.

    Without `send`, request streams stay silent. gRPC's Python client reports INTERNAL if a server
    refuses a stream while the client is writing.
    """
    options: Any = {
        "metadata": (
            *(("authorization", value) for value in authorization),
            *(("x-forwarded-for", value) for value in forwarded_for),
        ),
        "timeout": timeout,
    }
    untyped: Any = channel  # the stubs have no type for raw bytes
    method, short = f"/demo.Demo/{kind}", kind.removeprefix("sync_")[:2]
    requests = iter([b"hi"]) if send else None
    if short == "uu":
        return [await untyped.unary_unary(method)(b"hi", **options)]
    if short == "su":
        return [await untyped.stream_unary(method)(requests, **options)]
    if short == "us":
        return [answer async for answer in untyped.unary_stream(method)(b"hi", **options)]
    call = untyped.stream_stream(method)(requests, **options)
    if not send:
        return [await call.read()]
    return [answer async for answer in call]


async def refused(
    channel: grpc.aio.Channel, kind: str, *authorization: str, **options: Any
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel, kind, *authorization, send=False, **options)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """Return the first rich detail of `kind`."""
    trailing: dict[str, Any] = dict(tuple(error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None
