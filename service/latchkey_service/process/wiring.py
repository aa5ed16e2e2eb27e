"""Builds one worker from its parts, runs it and stops it.

Owns the order of start and stop, but not the behaviour of the parts or the processes
(`supervisor.py`, `worker.py`).
"""

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from latchkey_coherence.lease import boottime
from latchkey_coherence.verdict_cache import VerdictCache

from latchkey_service.access import policy as policies
from latchkey_service.access.authenticator import ActivePolicy
from latchkey_service.access.policy import PolicyError
from latchkey_service.audit.audit_chain import ChainKeys
from latchkey_service.audit.audit_log import AuditLog
from latchkey_service.audit.audit_sealer import AuditSealer
from latchkey_service.audit.audit_table import AuditTable
from latchkey_service.audit.chain_table import ChainTable
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.notify_listener import NotifyListener
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.verifier_table import Identity, VerifierTable
from latchkey_service.coherence.watch_sessions import WatchSessions
from latchkey_service.loop_delay import WATCH
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.process.announcements import Announcements
from latchkey_service.process.host_sharing import HostSharing
from latchkey_service.process.periodic import (
    follow_peppers,
    follow_verifier,
    log_counts,
    log_counts_regularly,
    prune_log,
    purge,
    purge_audit,
    purge_lifecycle,
    purge_rates,
    purge_usage,
    rest,
)
from latchkey_service.process.server import SERVICES, Server, Services
from latchkey_service.process.traces import Traces
from latchkey_service.process.worker_metrics import WorkerMetrics
from latchkey_service.release import release
from latchkey_service.rpc.audit_service import AuditService
from latchkey_service.rpc.call_report import CallReporter
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.handlers import Paths
from latchkey_service.rpc.health_service import Health
from latchkey_service.rpc.lifecycle_service import FullTokenService
from latchkey_service.rpc.maintenance_service import MaintenanceService
from latchkey_service.rpc.managed_calls import ManagedCalls
from latchkey_service.rpc.status_service import StatusService
from latchkey_service.rpc.streams import Streams
from latchkey_service.rpc.verify_calls import VerifyCalls, encode_token
from latchkey_service.secret_format import Keyring
from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.assembly import Management, build_management
from latchkey_service.tokens.batched_lookup import LeasedLookup, Lookup
from latchkey_service.tokens.fleet import Reports
from latchkey_service.tokens.imported import ImportedSecrets
from latchkey_service.tokens.rate_draws import RateDraws
from latchkey_service.tokens.rate_table import RateTable
from latchkey_service.tokens.sealing import seal_rows
from latchkey_service.tokens.token_rates import TokenRates
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.usage_table import UsageTable
from latchkey_service.tokens.usage_writer import UsageWriter
from latchkey_service.tokens.verdict import CachedToken
from latchkey_service.tokens.verifier import Verifier
from latchkey_service.transport.transports import limits_of

__all__ = ["ended", "running"]


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    keyring: Keyring,
    policy_text: Callable[[], str | None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
) -> AsyncIterator[Server]:
    """Run a worker: start the server and its background tasks, and stop them gracefully.

    `policy_text` returns the latest valid text of the policy file, or None without a policy. The
    server reads it again just before it listens, so it starts with the newest policy. Calls
    `on_failure` if a background task fails, because the worker is then incomplete. Raises
    PolicyError, TlsError and WebhookError.
    """
    if settings.database_url is None:
        raise ValueError("a worker needs a database URL")
    text = policy_text()
    if (text is None) != (settings.policy is None):
        # In either case, continuing without a policy could admit everybody.
        raise PolicyError("a worker needs both the setting and the text of the policy, or neither")
    active_policy = None if text is None else ActivePolicy(policies.parse(text))
    keyring = Keyring(keyring.peppers, settings.accepted_prefixes)
    cache, notify, identity = (
        settings.cache == "on",
        settings.notify == "on",
        _identity(settings, keyring),
    )
    traces = Traces(settings, identity.id, time.monotonic)
    connector = Connector(
        settings.database_url.get_secret_value(),
        pooler=settings.pooler,
        connection_class=traces.connection_class,
    )
    verifier_state: VerifierState[CachedToken] = VerifierState(
        VerdictCache(settings.cache_entries if cache else 0),
        ClientLeases(),
        settings.lease_seconds,
    )
    pool = await Pool.open(connector)
    # Reads a file, so before the worker gives up root.
    announcements = Announcements(settings, pool, _now)
    lookup = Lookup(connector.connect_with_generic_plans, boottime, keyring)
    # Connects when the first imported secret is presented.
    imported_lookup = Lookup(connector.connect_with_generic_plans, boottime, keyring)

    def reconnect() -> None:
        """Make the other connections follow the lease to another server."""
        for connections in (pool, lookup, imported_lookup, rates.draws):
            connections.reconnect()

    primary = Primary(connector, reconnect)
    listener = NotifyListener(
        identity.id,
        primary.connect,
        lambda payload: table.notify(payload),  # noqa: PLW0108 - `table` is created below
        lambda: renewer.wake(),  # noqa: PLW0108 - the same
        settings.lease_seconds / 3,
        # LISTEN does not work through a pooler in transaction mode.
        enabled=notify and settings.pooler == "none",
    )
    host = HostSharing(os.environ, identity, primary, listener)
    renewer = LeaseRenewer(verifier_state, identity.id, host.rows(lambda: renewer), boottime)
    rates = TokenRates(
        RateDraws(
            connector.connect_with_generic_plans,
            lambda disconnect: LeasedReads(renewer, verifier_state, boottime, disconnect),
            boottime,
        ),
        boottime,
    )
    limits, usage = limits_of(settings), UsageWriter(UsageTable(pool), identity.id, time.time)
    watch_sessions = WatchSessions(
        verifier_state,
        boottime,
        renewer.wake_to_acknowledge,
        renewer.wake,
        enabled=cache,
        stream_seconds=limits.connection_age or math.inf,
        on_uses=usage.report,
        draw_calls=rates.draw_for_client,
    )
    renewer.attach(
        host.serve(renewer, watch_sessions.on_news, watch_sessions.lease_released.set),
        watch_sessions.__len__,
        lambda: listener.state,
    )

    store, table = TokenStore(pool), VerifierTable(pool)
    ack_waiter = AckWaiter(
        table,
        connector.connect_with_generic_plans,
        renewer.wake,
        boottime,
        lambda: verifier_state.rows_complete_at,
        lambda: renewer.row,
        notify=notify,
    )
    reads = LeasedReads(renewer, verifier_state, boottime, pool.reconnect)
    management = build_management(
        pool,
        keyring,
        ack_waiter,
        reads,
        settings.secret_prefix,
        _now,
        settings.lifetime,
        announcements.outbox,
    )
    verifier = Verifier(
        keyring,
        lookup,
        LeasedReads(renewer, verifier_state, boottime, lookup.reconnect),
        verifier_state,
        encode_token,
        boottime,
        time.time,
        cache_seconds=settings.cache_seconds,
        randomness=random.random,
        guard=management.guard,
        imported=ImportedSecrets(
            keyring,
            LeasedLookup(
                imported_lookup,
                LeasedReads(renewer, verifier_state, boottime, imported_lookup.reconnect),
            ),
            verifier_state,
            boottime,
        ),
        rates=rates,
    )
    counts, audit_table = Counts(), AuditTable(pool)
    audit = AuditLog(audit_table, time.monotonic, _now)
    sealer, reporter = (
        AuditSealer(ChainTable(pool), ChainKeys(keyring), time.monotonic, random.random),
        CallReporter(counts, audit, time.monotonic),
    )
    managed = ManagedCalls(counts, audit, reporter, time.monotonic, boottime)
    paths = Paths(
        VerifyCalls(
            verifier,
            reporter,
            counts,
            usage.pending,
            management.first_use.seen,
            settings.log_verify_share,
            time.monotonic,
            time.time,
        ),
        managed,
        Streams(reporter, time.monotonic),
        traces.calls,
    )
    if active_policy is not None:
        _follow_policy(active_policy, paths, audit)
    services = Services(
        FullTokenService(  # type: ignore[abstract]  # VerifyCalls has the rest
            management, watch_sessions, usage.table, time.time, keyring.imported_prefixes
        ),
        StatusService(table, identity.id, primary.warnings),
        AuditService(audit_table, reads),
        MaintenanceService(management.tokens),
        Health(("", *SERVICES)),
    )
    server = Server(settings, paths, reporter, services, watch_sessions, active_policy, limits)

    server.metrics = WorkerMetrics(
        clock=boottime,
        counts=counts,
        verifier=verifier,
        renewer=renewer,
        listener=listener,
        ack_waiter=ack_waiter,
        watch_sessions=watch_sessions,
        lookup=lookup,
        rate_draws=rates.draws,
        pool=pool,
        connector=connector,
        primary=primary,
        managed=managed,
        audit=audit,
        sealer=sealer,
        guard=server.guard,
        active_policy=active_policy,
        certificates=server.certificates,
        announcements=announcements,
        traces=traces,
        seals=management.guard,
        pepper_reports=Reports(),
    )

    def gauges() -> Mapping[str, int]:
        return {
            "cache.entries": len(verifier_state.cache),
            "watch.streams": len(watch_sessions),
            "uses.pending": len(usage.pending),
            "tasks": len(asyncio.all_tasks()),
            "seals.rejected": management.guard.rejected,
        }

    def begin(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=getattr(work, "__qualname__", None))
        task.add_done_callback(partial(ended, on_failure))
        return task

    # These run until the last answer: until then, Deletes wait for this process.
    renewing, listening = begin(renewer.run()), begin(listener.run())
    await host.start()
    if active_policy is not None and (latest := policy_text()) is not None and latest != text:
        active_policy.replace(policies.parse(latest))
    await server.start()
    # These run until then too, because calls during the stop are audited, and use tokens.
    lasts = [begin(audit.run()), begin(usage.run()), begin(server.guard.run()), begin(WATCH.run())]
    background = [
        follow_verifier(
            verifier.check,
            boottime,
            renewer.in_doubt,
            lambda: lookup.failures,
            server.set_serving,
            host.probe_seconds,
        ),
        log_counts_regularly(counts, gauges),
        *announcements.background(),
        rest([lookup.rest, imported_lookup.rest, rates.draws.rest, ack_waiter.rest]),
        *host.upkeep(
            lambda: [
                follow_peppers(table, identity.id, server.metrics.pepper_reports),
                primary.run(),
                prune_log(table, settings.lease_seconds),
                sealer.run(),
                purge_audit(sealer, timedelta(days=settings.audit_retention_days), _now),
                purge_usage(usage.table, _now),
                purge_rates(RateTable(pool)),
                seal_rows(management.guard, management.upkeep_store),
                *_purges(settings, management),
                *announcements.upkeep(),
            ]
        ),
    ]
    tasks = [begin(work) for work in background]
    try:
        yield server
    finally:
        await _end(*tasks)
        # `drained` covers the siblings too, because their leases are on record.
        host.close_to_siblings()
        drained = await server.stop(settings.grace_seconds, drain_seconds=settings.drain_seconds)
        # Only after the last answer: Deletes must wait for this process as long as it answers.
        await _end(renewing, listening, *lasts)
        await asyncio.gather(audit.close(), usage.close(), renewer.stop(remove=drained))
        await asyncio.gather(
            host.stop(),
            ack_waiter.close(),
            management.first_use.close(),
            primary.close(),
            lookup.close(),
            announcements.close(),
            traces.close(),
            imported_lookup.close(),
            rates.draws.close(),
            store.close(),
        )
        log_counts(counts, gauges)


def ended(on_failure: Callable[[], None], task: "asyncio.Task[None]") -> None:
    """If the finished `task` failed, log that and call `on_failure`."""
    if not task.cancelled() and (error := task.exception()) is not None:
        # Only the type: the text may contain anything.
        logger().critical(
            "a background task of the worker failed",
            task=task.get_name(),
            error=type(error).__name__,
        )
        on_failure()


def _purges(settings: Settings, management: Management) -> list[Coroutine[Any, Any, None]]:
    """Return what removes tokens that ended long ago."""
    store, retention = management.upkeep_store, timedelta(days=settings.tombstone_retention_days)
    expired = timedelta(days=settings.expired_retention_days)
    return [purge(store, retention, _now), purge_lifecycle(store, expired, retention, _now)]


async def _end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _identity(settings: Settings, keyring: Keyring) -> Identity:
    return Identity(
        # Never reuses an id: clients of a process that died may still hold leases, and the row of
        # that process represents them.
        id="ver_" + secrets.token_hex(10),
        host=socket.gethostname(),
        process_id=os.getpid(),
        version=release(),
        lease_seconds=settings.lease_seconds,
        pepper_ids=tuple(pepper.id for pepper in keyring.peppers),
    )


def _follow_policy(active_policy: ActivePolicy, paths: Paths, audit: AuditLog) -> None:
    """Record the policy, and each one that replaces it, and end streams that it does not allow."""

    def record() -> None:
        audit.policy_in_force(active_policy.policy.digest, f"{socket.gethostname()}:{os.getpid()}")

    record()
    active_policy.on_change(record)
    active_policy.on_change(paths.recheck)


def _now() -> datetime:
    return datetime.now(UTC)
