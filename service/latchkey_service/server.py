"""Wiring of one worker: store, servicers, health, reflection, graceful stop, either transport."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.calls import Calls
from latchkey_service.config import Settings
from latchkey_service.errors import StoreUnavailable
from latchkey_service.health import Health
from latchkey_service.log import Counts, logger
from latchkey_service.lookup import Lookup
from latchkey_service.rpc import TokenService
from latchkey_service.secrets import Keyring
from latchkey_service.store import Store, connect
from latchkey_service.tokens import Tokens
from latchkey_service.verifier import Verifier

__all__ = ["Server", "make_transport", "running"]

SERVICE = pb.DESCRIPTOR.services_by_name["TokenService"].full_name
# The contract has fields answered in words up to 4 MiB, the usual limit; the rest of such a
# message must fit in beside them, or the transport would refuse it without our details.
MESSAGE_BYTES_MAX = 5 * 1024 * 1024
# Health says NOT_SERVING this long before calls are refused, so that balancers see it first.
DRAIN_SECONDS = 0.1
# Health follows Postgres within this and PROBE_TIMEOUT_SECONDS.
PROBE_SECONDS = 0.5
PROBE_TIMEOUT_SECONDS = 1.0
SUMMARY_SECONDS = 60.0
PURGE_SECONDS = 3_600.0
# Small enough not to hold locks that anyone would notice.
PURGE_BATCH = 1_000
# How long a caller's connection may be silent before it is checked, and how often callers may
# ping us: half of what our client library does.
OPTIONS: Mapping[str, int] = {
    "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.min_ping_interval_without_data_ms": 5_000,
    # No compression: a megabyte of it may stand for a gigabyte. (`native` has no such option yet.)
    "grpc.compression_enabled_algorithms_bitset": 1,
    # Several workers share the address. The supervisor has made sure that nobody else has it.
    "grpc.so_reuseport": 1,
}


class Server:
    """A transport with our services on it. `address` is where it listens."""

    def __init__(self, settings: Settings, calls: Calls, service: TokenService) -> None:
        self._server = make_transport(settings.transport)
        self._health = Health(("", SERVICE))
        registrar: Any = _Registrar(self._server, calls)
        pb_grpc.add_TokenServiceServicer_to_server(service, registrar)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registrar)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # Not by enable_server_reflection: it looks at the server's class to choose its servicer.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]  # has no stubs
            reflection.aio.ReflectionServicer(service_names=names), registrar
        )
        self.address = settings.listen
        port = self._server.add_insecure_port(settings.listen)
        if not settings.listen.startswith("unix:"):
            self.address = f"{settings.listen.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Serve, with health at NOT_SERVING until told otherwise."""
        await self._server.start()

    def set_serving(self, *, serving: bool) -> None:
        """Say on the health service whether calls are likely to succeed."""
        self._health.set_serving(serving=serving)

    async def stop(self, grace_seconds: float) -> None:
        """Say so, let calls in flight finish, then end those that have not."""
        self._health.stop()
        await asyncio.sleep(DRAIN_SECONDS)
        # Else they would take up the whole grace.
        self._health.end_watches()
        await self._server.stop(grace_seconds)


@contextlib.asynccontextmanager
async def running(settings: Settings, keyring: Keyring) -> AsyncIterator[Server]:
    """Run a worker: a server that is up, with its background work, stopped in good order."""
    if settings.database_url is None:
        raise ValueError("a worker needs a database URL")
    database_url = settings.database_url.get_secret_value()
    counts = Counts()
    store = await Store.open(database_url)
    lookup = Lookup(lambda: connect(database_url), time.monotonic)
    verifier = Verifier(keyring, lookup, _now)
    tokens = Tokens(store, keyring, settings.secret_prefix, _now, os.urandom)
    calls = Calls(counts, settings.log_verify_share, time.monotonic)
    server = Server(settings, calls, TokenService(tokens, verifier, counts, time.monotonic))
    await server.start()
    retention = timedelta(days=settings.tombstone_retention_days)
    background = [
        asyncio.create_task(_follow_store(server, store), name="follow store"),
        asyncio.create_task(_summarise(counts), name="summarise"),
        asyncio.create_task(_purge(store, retention), name="purge"),
    ]
    try:
        yield server
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await server.stop(settings.grace_seconds)
        await lookup.close()
        await store.close()
        _summary(counts)


class _Registrar:
    """Stands in for a server while servicers register, and wraps each handler (`calls.py`).

    The wrapped handlers go to the transport both ways: by name, which `native` serves itself (but
    hands streams of requests registered so to grpcio's no-op), and by a look-up of the path, which
    is all that grpcio's asyncio server reads and what `native` leaves to its grpcio part.
    """

    def __init__(self, server: grpc.aio.Server, calls: Calls) -> None:
        self._server = server
        self._calls = calls

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code registers the same handlers by name right after."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Wrap and register the handlers of a service by method name."""
        wrapped = {
            name: self._calls.wrap(f"/{service}/{name}", handler)
            for name, handler in handlers.items()
        }
        by_path = {f"/{service}/{name}": handler for name, handler in wrapped.items()}
        unary = {n: handler for n, handler in wrapped.items() if not handler.request_streaming}
        self._server.add_generic_rpc_handlers((_ByPath(by_path),))
        self._server.add_registered_method_handlers(service, unary)


class _ByPath(grpc.GenericRpcHandler):
    """Finds handlers by exact path. Not by service, which `native` would take for registered."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of the call's method, or None."""
        return self._handlers.get(handler_call_details.method)


def make_transport(name: str) -> grpc.aio.Server:
    """Return a server of the chosen make: the one seam between the two."""
    options = list(OPTIONS.items())
    if name == "native":
        # Here and not above, so that the other one needs nothing of it. And not as `from ... import
        # aio`, which sends the package's lazy attributes (0.5.0) into an endless recursion.
        import pygrpc_native.aio

        # One thread for HTTP/2, not two: they share this process's core with Python, and switching
        # between them took a fifth of it. More workers, not more threads, use more cores.
        return pygrpc_native.aio.Server(options=options, io_threads=1)
    return grpc.aio.server(options=options)


async def _follow_store(server: Server, store: Store) -> None:
    """Keep health at what Postgres is. Ends when cancelled."""
    log = logger()
    serving: bool | None = None
    while True:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                await store.ping()
            answers = True
        except (StoreUnavailable, TimeoutError):
            answers = False
        except Exception:
            log.exception("the database answers strangely")
            answers = False
        if answers != serving:
            server.set_serving(serving=answers)
            (log.info if answers else log.warning)("health", serving=answers)
            serving = answers
        await asyncio.sleep(PROBE_SECONDS)


async def _summarise(counts: Counts) -> None:
    """Log the counts once a minute. Ends when cancelled."""
    while True:
        await asyncio.sleep(SUMMARY_SECONDS)
        _summary(counts)


def _summary(counts: Counts) -> None:
    if summary := counts.take():
        logger().info("counts", **summary)


async def _purge(store: Store, retention: timedelta) -> None:
    """Remove old tombstones once an hour. Ends when cancelled."""
    while True:
        # At another moment in each worker: they would only get in each other's way.
        await asyncio.sleep(PURGE_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - a spread
        await _attempt(lambda: _purge_all(store, _now() - retention), "tombstones not removed")


async def _purge_all(store: Store, before: datetime) -> None:
    total = 0
    while gone := await store.purge_tombstones(before, PURGE_BATCH):
        total += gone
    if total:
        logger().info("tombstones removed", tokens=total)


async def _attempt(work: Callable[[], Awaitable[None]], complaint: str) -> None:
    """Do background work whose failure must not end the loop that will try it again."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001 - logged, and tried again
        logger().warning(complaint, error=type(error).__name__)


def _now() -> datetime:
    return datetime.now(UTC)
