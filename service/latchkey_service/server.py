"""Wiring of one worker: store, servicers, health, reflection, graceful stop, either transport."""

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from latchkey_coherence.lease import boottime
from latchkey_coherence.memory import Memory
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.background import (
    follow_store,
    prune_log,
    purge,
    summarise,
    tell_summary,
)
from latchkey_service.calls import Calls
from latchkey_service.coherence.confirmer import Confirmer
from latchkey_service.coherence.heart import Heart
from latchkey_service.coherence.membership import Membership
from latchkey_service.coherence.notifications import Listener
from latchkey_service.coherence.subleases import SubLeases
from latchkey_service.coherence.table import Identity, VerifierTable
from latchkey_service.coherence.watch import Watchers
from latchkey_service.config import Settings
from latchkey_service.database import Pool, connect
from latchkey_service.health import Health
from latchkey_service.log import Counts
from latchkey_service.lookup import Lookup
from latchkey_service.rpc import TokenService, encode_token
from latchkey_service.rpc_status import StatusService
from latchkey_service.secrets import Keyring
from latchkey_service.store import Store
from latchkey_service.tokens import Tokens
from latchkey_service.verdict import Record
from latchkey_service.verifier import Verifier

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Server", "make_transport", "running"]

SERVICES = (
    pb.DESCRIPTOR.services_by_name["TokenService"].full_name,
    status_pb.DESCRIPTOR.services_by_name["StatusService"].full_name,
)
# The contract has fields answered in words up to 4 MiB, the usual limit; the rest of such a
# message must fit in beside them, or the transport would refuse it without our details.
MESSAGE_BYTES_MAX = 5 * 1024 * 1024
# Health says NOT_SERVING this long before calls are refused, so that balancers see it first.
DRAIN_SECONDS = 0.1
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

    def __init__(
        self,
        settings: Settings,
        calls: Calls,
        tokens: TokenService,
        status: StatusService,
        watchers: Watchers,
    ) -> None:
        self._watchers = watchers
        self._server = make_transport(settings.transport)
        self._health = Health(("", *SERVICES))
        registrar: Any = _Registrar(self._server, calls)
        pb_grpc.add_TokenServiceServicer_to_server(tokens, registrar)
        status_pb_grpc.add_StatusServiceServicer_to_server(status, registrar)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registrar)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
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

    def set_serving(self, serving: bool) -> None:
        """Say on the health service whether calls are likely to succeed."""
        self._health.set_serving(serving=serving)

    async def stop(self, grace_seconds: float) -> bool:
        """Say so, hand clients over, let calls in flight finish, then end those that have not.

        Returns whether no client holds a lease of ours any more.
        """
        self._health.stop()
        # Calls are served as ever meanwhile: a client that moves loses none.
        _, drained = await asyncio.gather(
            asyncio.sleep(DRAIN_SECONDS), self._watchers.drain(grace_seconds)
        )
        # Else they would take up the whole grace.
        self._health.end_watches()
        await self._server.stop(grace_seconds)
        return drained


@contextlib.asynccontextmanager
async def running(settings: Settings, keyring: Keyring) -> AsyncIterator[Server]:
    """Run a worker: a server that is up, with its background work, stopped in good order."""
    if settings.database_url is None:
        raise ValueError("a worker needs a database URL")
    database_url = settings.database_url.get_secret_value()

    async def own_connection() -> "asyncpg.Connection[asyncpg.Record]":
        return await connect(database_url)

    cache, notify = settings.cache == "on", settings.notify == "on"
    identity = _identity(settings)
    membership: Membership[Record] = Membership(
        Memory(settings.cache_entries if cache else 0),
        SubLeases(),
        settings.lease_seconds,
    )
    heart = Heart(membership, identity, own_connection, boottime)
    watchers = Watchers(membership, boottime, heart.acknowledged, enabled=cache)
    listener = Listener(identity.id, own_connection, heart.wake, enabled=notify)
    heart.attach(watchers.on_news, watchers.__len__, lambda: listener.state)

    pool = await Pool.open(database_url)
    store = Store(pool, database_url)
    table = VerifierTable(pool)
    confirmer = Confirmer(table, heart.wake, boottime, notify=notify)
    lookup = Lookup(own_connection, boottime)
    verifier = Verifier(keyring, lookup, heart, membership, encode_token, boottime, time.time)
    tokens = Tokens(store, keyring, confirmer, settings.secret_prefix, _now, os.urandom)
    counts = Counts()
    server = Server(
        settings,
        Calls(counts, settings.log_verify_share, time.monotonic),
        TokenService(tokens, verifier, watchers, counts, boottime),
        StatusService(table, identity.id),
        watchers,
    )
    beating = asyncio.create_task(heart.run(), name="heart")
    await server.start()
    retention = timedelta(days=settings.tombstone_retention_days)
    background = (
        listener.run(),
        follow_store(store, heart.has_lease, server.set_serving),
        summarise(counts),
        purge(store, retention, _now),
        prune_log(table, settings.lease_seconds),
    )
    tasks = [asyncio.create_task(work) for work in background]
    try:
        yield server
    finally:
        await _end(*tasks)
        drained = await server.stop(settings.grace_seconds)
        # After the last answer, and not before: the row stands for what may still be answered.
        await _end(beating)
        await asyncio.gather(
            heart.stop(remove=drained), confirmer.close(), lookup.close(), store.close()
        )
        tell_summary(counts)


async def _end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _identity(settings: Settings) -> Identity:
    return Identity(
        # Never an id that was there before: clients of a process that died may still hold leases
        # that its row stands for.
        id="ver_" + secrets.token_hex(10),
        host=socket.gethostname(),
        process_id=os.getpid(),
        version=metadata.version("latchkey"),
        lease_seconds=settings.lease_seconds,
    )


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


def _now() -> datetime:
    return datetime.now(UTC)
