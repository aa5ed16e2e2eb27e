"""Wiring of one worker: store, servicers, listeners with their doors, graceful stop."""

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import metadata
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from latchkey_coherence.lease import boottime
from latchkey_coherence.memory import Memory
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import maintenance_service_pb2_grpc as maintenance_pb_grpc
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.access import policy as policies
from latchkey_service.access.authenticator import ActivePolicy, Authenticator
from latchkey_service.access.policy import PolicyError
from latchkey_service.audit.audit_log import AuditLog
from latchkey_service.audit.audit_table import AuditTable
from latchkey_service.coherence.ack_waiter import Confirmer
from latchkey_service.coherence.client_leases import SubLeases
from latchkey_service.coherence.lease_renewer import Heart
from latchkey_service.coherence.notify_listener import Listener
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_state import Membership
from latchkey_service.coherence.verifier_table import Identity, VerifierTable
from latchkey_service.coherence.watch_sessions import Watchers
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.process.periodic import (
    follow_peppers,
    follow_verifier,
    log_counts,
    log_counts_regularly,
    prune_log,
    purge,
    purge_audit,
)
from latchkey_service.rpc.audit_service import AuditService
from latchkey_service.rpc.call_report import CallReporter
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.health_service import Health
from latchkey_service.rpc.interceptor import Calls
from latchkey_service.rpc.maintenance_service import MaintenanceService
from latchkey_service.rpc.status_service import StatusService
from latchkey_service.rpc.token_service import TokenService, encode_token
from latchkey_service.secret_format import Keyring
from latchkey_service.settings import exposure
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.management import Tokens
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import CachedToken
from latchkey_service.tokens.verifier import Verifier
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.tls import Certificates
from latchkey_service.transport.transports import Limits, limits_of, make_transport, metadata_of

__all__ = ["Server", "ended", "running"]

SERVICES = (
    pb.DESCRIPTOR.services_by_name["TokenService"].full_name,
    status_pb.DESCRIPTOR.services_by_name["StatusService"].full_name,
    audit_pb.DESCRIPTOR.services_by_name["AuditService"].full_name,
    maintenance_pb.DESCRIPTOR.services_by_name["MaintenanceService"].full_name,
)
# Health says NOT_SERVING this long before calls are refused, so that balancers see it first.
DRAIN_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Services:
    """What is served, the same on every listener."""

    tokens: TokenService
    status: StatusService
    audit: AuditService
    maintenance: MaintenanceService
    health: Health


class Server:
    """Listeners with our services on them. `address` is where the plaintext one listens,
    `tls_address` the one with TLS, None for none."""

    def __init__(
        self,
        settings: Settings,
        calls: Calls,
        services: Services,
        watchers: Watchers,
        active_policy: ActivePolicy | None,
        limits: Limits,
    ) -> None:
        self._watchers = watchers
        self._health = services.health
        self._active_policy = active_policy
        # A thread of its own. Those of the event loop are for whoever comes, as host names are that
        # are looked up, and a right that was taken away is not to wait for these.
        self._parsing = ThreadPoolExecutor(1, "policy")
        plaintext = make_transport(exposure.transport_of(settings), limits, calls.rejected)
        self._servers = [plaintext]
        authenticator = None
        if active_policy is not None:
            authenticator = Authenticator(
                active_policy, proxy=settings.trusted_proxy, metadata_of=metadata_of
            )
        reflected = exposure.reflects(settings, settings.listen)
        _register(services, _Registrar(plaintext, calls, authenticator), reflected=reflected)
        self.address = _with_port(settings.listen, plaintext.add_insecure_port(settings.listen))
        self.tls_address: str | None = None
        if settings.tls_listen is not None:
            # grpcio, whatever the other one is: `native` has no TLS.
            encrypted = make_transport("grpcio", limits, calls.rejected)
            self._servers.append(encrypted)
            authenticator = (
                None if active_policy is None else Authenticator(active_policy, tls=True)
            )
            reflected = exposure.reflects(settings, settings.tls_listen)
            _register(services, _Registrar(encrypted, calls, authenticator), reflected=reflected)
            assert settings.tls_certificate is not None, "exposure.py has seen to it"  # noqa: S101 - for the type checker
            assert settings.tls_key is not None, "exposure.py has seen to it"  # noqa: S101 - for the type checker
            certificates = Certificates(
                settings.tls_certificate, settings.tls_key, settings.tls_client_ca
            )
            port = encrypted.add_secure_port(settings.tls_listen, certificates.credentials())
            self.tls_address = _with_port(settings.tls_listen, port)

        addresses = [address for address in (self.address, self.tls_address) if address is not None]
        self.guard = ConnectionGuard(addresses, limits)

    async def start(self) -> None:
        """Serve, with health at NOT_SERVING until told otherwise."""
        for server in self._servers:
            await server.start()

    def set_serving(self, serving: bool) -> None:
        """Say on the health service whether calls are likely to succeed."""
        self._health.set_serving(serving=serving)

    async def take_policy(self, text: str) -> None:
        """Put another policy in force. Raises PolicyError, and then nothing has changed."""
        if self._active_policy is None:
            raise PolicyError("one has come to a worker that was started without")
        loop = asyncio.get_running_loop()
        policy = await loop.run_in_executor(self._parsing, policies.parse, text)
        self._active_policy.replace(policy)
        logger().info("policy in force", callers=len(policy.callers))

    async def stop(self, grace_seconds: float) -> bool:
        """Say so, hand clients over, let calls in flight finish, then end those that have not.

        Returns whether no client holds a lease of ours any more.
        """
        self._health.stop()
        end = boottime() + grace_seconds
        # Calls are served as ever meanwhile: a client that moves loses none.
        _, drained = await asyncio.gather(
            asyncio.sleep(DRAIN_SECONDS), self._watchers.drain(grace_seconds)
        )
        # Else they would take up the whole grace.
        self._health.end_watches()
        left = max(0.0, end - boottime())
        await asyncio.gather(*(server.stop(left) for server in self._servers))
        return drained


def _register(services: Services, registrar: Any, *, reflected: bool) -> None:
    pb_grpc.add_TokenServiceServicer_to_server(services.tokens, registrar)
    status_pb_grpc.add_StatusServiceServicer_to_server(services.status, registrar)
    audit_pb_grpc.add_AuditServiceServicer_to_server(services.audit, registrar)
    maintenance_pb_grpc.add_MaintenanceServiceServicer_to_server(services.maintenance, registrar)
    health_pb2_grpc.add_HealthServicer_to_server(services.health, registrar)
    if reflected:
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # Not by enable_server_reflection: it looks at the server's class to choose its servicer.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]  # has no stubs
            reflection.aio.ReflectionServicer(service_names=names), registrar
        )


def _with_port(listen: str, port: int) -> str:
    """Return an address with the port that it became."""
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    keyring: Keyring,
    policy_text: Callable[[], str | None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
) -> AsyncIterator[Server]:
    """Run a worker: a server that is up, with its background work, stopped in good order.

    `policy_text` returns what the policy file said when it was last found right, None without one;
    what it returns in the end is in force when the server begins to listen.
    `on_failure` is called if a part of the background work ends by an error, which none should:
    the worker is not whole then. Raises PolicyError, TlsError.
    """
    if settings.database_url is None:
        raise ValueError("a worker needs a database URL")
    text = policy_text()
    if (text is None) != (settings.policy is None):
        # Whichever of the two is right: to go on without a policy would let everybody in.
        raise PolicyError("a worker needs both or neither, the setting and what the file says")
    active_policy = None if text is None else ActivePolicy(policies.parse(text))
    connector = Connector(settings.database_url.get_secret_value(), pooler=settings.pooler)
    cache, notify = settings.cache == "on", settings.notify == "on"
    identity = _identity(settings, keyring)
    membership: Membership[CachedToken] = Membership(
        Memory(settings.cache_entries if cache else 0),
        SubLeases(),
        settings.lease_seconds,
    )
    pool = await Pool.open(connector)
    lookup = Lookup(connector.connect_for_lookups, boottime)

    def reconnect() -> None:
        """Let the other connections follow the lease to another server."""
        pool.reconnect()
        lookup.reconnect()

    primary = Primary(connector, reconnect)
    heart = Heart(membership, identity, primary, boottime)
    limits = limits_of(settings)
    watchers = Watchers(
        membership,
        boottime,
        heart.wake_to_acknowledge,
        heart.wake,
        enabled=cache,
        stream_seconds=limits.connection_age or math.inf,
    )
    listener = Listener(
        identity.id,
        connector.connect,
        lambda payload: table.notify(payload),
        heart.wake,
        settings.lease_seconds / 3,
        # Nothing listens through a pooler that shares connections by transaction.
        enabled=notify and settings.pooler == "none",
    )
    heart.attach(watchers.on_news, watchers.__len__, lambda: listener.state)

    store = TokenStore(pool)
    table = VerifierTable(pool)
    confirmer = Confirmer(
        table,
        connector.connect,
        heart.wake,
        boottime,
        lambda: membership.settles_at,
        notify=notify,
    )
    verifier = Verifier(
        keyring,
        lookup,
        LeasedReads(heart, membership, boottime, lookup.reconnect),
        membership,
        encode_token,
        boottime,
        time.time,
        cache_seconds=settings.cache_seconds,
        randomness=random.random,
    )
    tokens = Tokens(
        store,
        keyring,
        confirmer,
        LeasedReads(heart, membership, boottime, pool.reconnect),
        settings.secret_prefix,
        _now,
        os.urandom,
    )
    counts = Counts()
    audit_table = AuditTable(pool)
    audit = AuditLog(audit_table, time.monotonic, _now)
    reporter = CallReporter(counts, audit, time.monotonic)
    calls = Calls(counts, audit, reporter, settings.log_verify_share, time.monotonic)
    if active_policy is not None:
        active_policy.on_change(calls.recheck)
    services = Services(
        TokenService(tokens, verifier, watchers, counts, boottime),
        StatusService(table, identity.id, primary.warnings),
        AuditService(audit_table),
        MaintenanceService(tokens, boottime),
        Health(("", *SERVICES)),
    )
    server = Server(settings, calls, services, watchers, active_policy, limits)

    def gauges() -> Mapping[str, int]:
        return {
            "memory.entries": len(membership.memory),
            "watch.streams": len(watchers),
            "tasks": len(asyncio.all_tasks()),
        }

    def begin(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=getattr(work, "__qualname__", None))
        task.add_done_callback(partial(ended, on_failure))
        return task

    # They go on until the last answer: until then Deletes wait for this process.
    beating, listening = begin(heart.run()), begin(listener.run())
    if active_policy is not None and (latest := policy_text()) is not None and latest != text:
        active_policy.replace(policies.parse(latest))
    await server.start()
    retention = timedelta(days=settings.tombstone_retention_days)
    audit_retention = timedelta(days=settings.audit_retention_days)
    # They too: who calls meanwhile is written down.
    lasts = [beating, listening, begin(audit.run()), begin(server.guard.run())]
    background = [
        follow_verifier(verifier.check, boottime, server.set_serving),
        log_counts_regularly(counts, gauges),
        follow_peppers(table, identity.id),
        primary.run(),
        purge(store, retention, _now),
        prune_log(table, settings.lease_seconds),
        purge_audit(audit_table, audit_retention, _now),
    ]
    tasks = [begin(work) for work in background]
    try:
        yield server
    finally:
        await _end(*tasks)
        drained = await server.stop(settings.grace_seconds)
        # After the last answer, and not before: the row stands for what may still be answered.
        await _end(*lasts)
        await audit.close()
        await asyncio.gather(
            heart.stop(remove=drained),
            confirmer.close(),
            primary.close(),
            lookup.close(),
            store.close(),
        )
        log_counts(counts, gauges)


def ended(on_failure: Callable[[], None], task: "asyncio.Task[None]") -> None:
    """Log it and call `on_failure`, if a task that has ended did so by an error."""
    if not task.cancelled() and (error := task.exception()) is not None:
        # Its type alone: its text may hold anything.
        logger().critical(
            "a part of the worker failed", part=task.get_name(), error=type(error).__name__
        )
        on_failure()


async def _end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _identity(settings: Settings, keyring: Keyring) -> Identity:
    return Identity(
        # Never an id that was there before: clients of a process that died may still hold leases
        # that its row stands for.
        id="ver_" + secrets.token_hex(10),
        host=socket.gethostname(),
        process_id=os.getpid(),
        version=metadata.version("latchkey"),
        lease_seconds=settings.lease_seconds,
        pepper_ids=tuple(pepper.id for pepper in keyring.peppers),
    )


class _Registrar:
    """Stands in for a server while servicers register, and wraps each handler (`calls.py`).

    The wrapped handlers go to the transport both ways: by name, which `native` serves itself (but
    hands streams of requests registered so to grpcio's no-op), and by a look-up of the path, which
    is all that grpcio's asyncio server reads and what `native` leaves to its grpcio part.
    """

    def __init__(
        self, server: grpc.aio.Server, calls: Calls, authenticator: Authenticator | None
    ) -> None:
        self._server = server
        self._calls = calls
        self._authenticator = authenticator

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code registers the same handlers by name right after."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Wrap and register the handlers of a service by method name."""
        wrapped = {
            name: self._calls.wrap(f"/{service}/{name}", handler, self._authenticator)
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


def _now() -> datetime:
    return datetime.now(UTC)
