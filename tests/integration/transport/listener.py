"""A listener of each kind that serves only a test service, with the limits that a test sets."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
import psutil
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.transports import (
    Limits,
    make_transport,
)

from tests.helpers.callers import ca_pem, server_identity
from tests.helpers.calls import CHANNEL_OPTIONS, outcome
from tests.helpers.raw_http2 import Connection, connected
from tests.helpers.waiting import WAIT_SECONDS

__all__ = [
    "ECHO",
    "GRPCIO",
    "LARGE",
    "LARGE_BYTES",
    "LISTENERS",
    "STREAM",
    "TCP",
    "WAIT",
    "Listener",
    "Serve",
    "call",
    "serving",
]

ECHO, LARGE, WAIT, STREAM = "/test.Test/Echo", "/test.Test/Large", "/test.Test/Wait", "/test.Test/S"
LARGE_BYTES = 1_000_000
LISTENERS = ("native", "native unix", "grpcio", "grpcio unix", "grpcio tls")
GRPCIO = tuple(name for name in LISTENERS if name.startswith("grpcio"))
# The TCP listeners, for which the kernel reports more.
TCP = tuple(name for name in LISTENERS if not name.endswith("unix"))


@dataclass
class Listener:
    """A listener that serves only a test service."""

    name: str
    address: str
    release: asyncio.Event = field(default_factory=asyncio.Event)
    peers: set[str] = field(default_factory=set)
    running: int = 0
    guard: ConnectionGuard | None = None

    def raw(self, **more: Any) -> contextlib.AbstractAsyncContextManager[Connection]:
        """Connect with the raw client, which sends exactly what the test says."""
        return connected(self.address, tls=self._tls(), **more)

    def channel(self, **options: Any) -> grpc.aio.Channel:
        """Connect with gRPC's own client."""
        given = [*CHANNEL_OPTIONS, *((f"grpc.{name}", value) for name, value in options.items())]
        if self.name.endswith("tls"):
            credentials = grpc.ssl_channel_credentials(ca_pem())
            return grpc.aio.secure_channel(self.address, credentials, options=given)
        return grpc.aio.insecure_channel(self.address, options=given)

    def _tls(self) -> ssl.SSLContext | None:
        if not self.name.endswith("tls"):
            return None
        context = ssl.create_default_context(cadata=ca_pem().decode())
        context.set_alpn_protocols(["h2"])
        return context

    def moved(self) -> int:
        """Return how many connections the calls have used."""
        return len(self.peers)

    def connections(self) -> int:
        """Return how many connections the server has open. It runs in this process."""
        unix = self.address.startswith("unix:")
        here = self.address.removeprefix("unix:") if unix else self.address.rpartition(":")[2]
        count = 0
        for found in psutil.Process().net_connections("unix" if unix else "tcp"):
            name: Any = found.laddr
            count += (name if unix else str(name.port)) == here
        # The listening socket has the same name.
        return count - 1

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.peers.add(context.peer())
        return request

    async def large(self, request: bytes, context: Any) -> bytes:
        return bytes(LARGE_BYTES)

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.running += 1
        try:
            await self.release.wait()
        finally:
            self.running -= 1
        return request

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        await self.wait(request, context)


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Listener]]


def nobody_is_refused(
    path: str,
    seconds: float | None,
    error: Exception | None = None,
    peer: str = "",
) -> NoReturn:
    raise AssertionError(f"{path} was refused")


def serving(tmp_path: Path) -> Serve:
    """Return a function that runs one of LISTENERS, with these limits."""

    @contextlib.asynccontextmanager
    async def serve(name: str, **limits: Any) -> AsyncIterator[Listener]:
        make, _, kind = name.partition(" ")
        own_limits = Limits(**limits)
        server = make_transport(
            "native" if make == "native" else "grpcio", own_limits, nobody_is_refused
        )
        listener = Listener(name, f"unix:{tmp_path}/socket")
        methods: dict[str, Any] = {
            "Echo": grpc.unary_unary_rpc_method_handler(listener.echo),
            "Large": grpc.unary_unary_rpc_method_handler(listener.large),
            "Wait": grpc.unary_unary_rpc_method_handler(listener.wait),
            "S": grpc.unary_stream_rpc_method_handler(listener.stream),
        }
        if make == "native":
            server.add_registered_method_handlers("test.Test", methods)
        else:
            handlers = grpc.method_handlers_generic_handler("test.Test", methods)
            server.add_generic_rpc_handlers((handlers,))
        if kind == "unix":
            server.add_insecure_port(listener.address)
        elif kind == "tls":
            identity = server_identity()
            pair = (identity.key, identity.certificate)
            credentials = grpc.ssl_server_credentials([pair])
            listener.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        else:
            listener.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        listener.guard = ConnectionGuard([listener.address], own_limits)
        guarding = asyncio.create_task(listener.guard.run())
        await server.start()
        try:
            yield listener
        finally:
            listener.release.set()
            guarding.cancel()
            await asyncio.gather(guarding, return_exceptions=True)
            await server.stop(None)

    return serve


async def call(channel: grpc.aio.Channel, path: str, request: bytes = b"", **more: Any) -> Any:
    """Call, wait, and return the outcome."""
    method: Any = channel.unary_unary(path)
    return await outcome(method(request, timeout=WAIT_SECONDS, **more))
