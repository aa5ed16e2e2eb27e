"""Collects a worker's metrics when the supervisor asks for them.

Reads plain integers that the other rooms count, so a call costs the same whether anybody asks or
not. Owns the mapping from those integers to the families in `metric_families.py`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.process_collector import ProcessCollector

from latchkey_service.access.authenticator import ActivePolicy
from latchkey_service.audit.audit_log import AuditLog
from latchkey_service.audit.audit_sealer import AuditSealer
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.notify_listener import Notifications, NotifyListener
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.watch_sessions import WatchSessions
from latchkey_service.loop_delay import WATCH
from latchkey_service.postgres.connections import POOL_SIZE_MAX, Connector, Pool
from latchkey_service.process.announcements import Announcements
from latchkey_service.process.metric_families import FAMILIES, Families
from latchkey_service.process.traces import Traces
from latchkey_service.rpc.counters import UNARY, Counts
from latchkey_service.rpc.managed_calls import ManagedCalls
from latchkey_service.settings import logs
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.fleet import Reports
from latchkey_service.tokens.rate_draws import RateDraws
from latchkey_service.tokens.seal import SealGuard
from latchkey_service.tokens.verdict import Verdict
from latchkey_service.tokens.verifier import Verifier
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.tls import Certificates

__all__ = ["WorkerMetrics", "process_metrics"]

# Present from the start: Prometheus' `increase` does not see the first event of a counter that
# begins with it, and alerts depend on these.
_REASONS = ("CREDENTIAL_UNKNOWN", "INTERNAL", "OVERLOADED", "RATE_LIMITED")
_CIRCUIT_STATES = ("closed", "half_open", "open")


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """The parts of a worker that count something. Event loop only."""

    clock: Callable[[], float]
    counts: Counts
    verifier: Verifier
    renewer: LeaseRenewer
    listener: NotifyListener
    ack_waiter: AckWaiter
    watch_sessions: WatchSessions
    lookup: Lookup
    rate_draws: RateDraws
    pool: Pool
    connector: Connector
    primary: Primary
    managed: ManagedCalls
    audit: AuditLog
    sealer: AuditSealer
    guard: ConnectionGuard
    active_policy: ActivePolicy | None
    certificates: Certificates | None
    announcements: Announcements
    traces: Traces
    seals: SealGuard
    pepper_reports: Reports

    def collect(self) -> Families:
        """Return all current values."""
        found = Families()
        self._add_calls(found)
        self._add_coherence(found)
        self._add_database(found)
        self._add_access(found)
        found.add("latchkey_audit_entries", self.audit.written, "written")
        found.add("latchkey_audit_entries", self.audit.lost, "lost")
        found.add("latchkey_audit_entries", self.audit.aggregated, "aggregated")
        found.add("latchkey_audit_waiting", self.audit.waiting)
        found.add("latchkey_audit_newest_batch", self.sealer.head.number)
        found.add("latchkey_audit_regressions", self.sealer.regressions)
        self.announcements.add_metrics(found)
        self.traces.add_metrics(found)
        found.add("latchkey_event_loop_tasks", len(asyncio.all_tasks()))
        found.add("latchkey_event_loop_delay_seconds", WATCH.longest_seconds())
        process_metrics(found)
        return found

    def _add_calls(self, found: Families) -> None:
        for method in self.counts.methods():
            if not method.started:
                continue
            labels = (method.kind, method.service, method.method)
            found.add("grpc_server_started", method.started, *labels)
            for code, number in method.by_code().items():
                found.add("grpc_server_handled", number, *labels, code)
            if method.kind == UNARY:
                found.add_histogram("grpc_server_handling_seconds", method.seconds, *labels)
        for reason, number in (dict.fromkeys(_REASONS, 0) | self.counts.failures).items():
            found.add("latchkey_failures", number, reason)
        for verdict in Verdict:
            found.add("latchkey_verdicts", self.counts.verdicts[verdict], verdict.name)
        read = self.verifier.answered_by_read
        form = self.verifier.answered_by_form + self.counts.oversized
        # Not counted where it happens, which would cost each warm Verify something. A batch may
        # have been answered and not counted yet, hence the maximum.
        cached = max(0, self.counts.verdicts.total() - read - form)
        for source, number in (("cache", cached), ("read", read), ("form", form)):
            found.add("latchkey_answers", number, source)

    def _add_coherence(self, found: Families) -> None:
        now, renewer, state = self.clock(), self.renewer, self.renewer.state
        found.add("latchkey_cache_entries", len(state.cache))
        found.add("latchkey_cache_entries_max", state.cache.entries_max)
        found.add("latchkey_cache_evictions", state.cache.evictions)
        found.add("latchkey_lease_remaining_seconds", max(0.0, state.lease_ends - now))
        found.add("latchkey_lease_renewals", renewer.renewals, "renewed")
        found.add("latchkey_lease_renewals", renewer.failures, "failed")
        found.add("latchkey_registrations", renewer.registrations)
        applied = state.cache.position.revision
        found.add("latchkey_revision", applied)
        found.add("latchkey_acknowledged_revision", state.acknowledged)
        # Infinite before the first read.
        found.add("latchkey_log_age_seconds", now - state.log_read_began)
        states = [each.name.lower() for each in Notifications]
        found.add_states("latchkey_notifications", states, self.listener.state.name.lower())
        for result, histogram in self.ack_waiter.seconds.items():
            found.add_histogram("latchkey_delete_wait_seconds", histogram, result)
        found.add("latchkey_deletes_waiting", len(self.ack_waiter))
        leases = state.client_leases
        found.add("latchkey_watch_streams", len(self.watch_sessions))
        found.add("latchkey_watch_clients_behind", leases.count_behind(applied, now))
        found.add("latchkey_watch_waiting_seconds", state.waiting_for(now)[0])
        found.add("latchkey_watch_clients_outwaited", leases.outwaited)

    def _add_database(self, found: Families) -> None:
        found.add_histogram("latchkey_lookup_batch_digests", self.lookup.batch_sizes)
        found.add_histogram("latchkey_lookup_seconds", self.lookup.seconds)
        found.add("latchkey_lookup_failures", self.lookup.failures)
        found.add("latchkey_lookup_waiting", self.lookup.waiting)
        imported = self.verifier.imported
        for result in ("found", "absent", "remembered", "rejected"):
            found.add("latchkey_imported_lookups", imported.results[result], result)
        found.add("latchkey_imported_lookup_waiting", imported.waiting)
        found.add("latchkey_rate_draws", self.rate_draws.statements)
        used, idle = self.pool.usage()
        found.add("latchkey_pool_connections", used, "used")
        found.add("latchkey_pool_connections", idle, "idle")
        found.add("latchkey_pool_connections_max", POOL_SIZE_MAX)
        found.add_states("latchkey_database_circuit", _CIRCUIT_STATES, self.connector.breaker.state)
        primary = self.primary
        if primary.server is not None:
            address, server = primary.server
            labels = (address, server.identifier or "", server.timeline or "")
            found.add("latchkey_database_info", 1, *labels)
        for problem, is_there in (
            ("standby_missing", primary.standby_missing),
            ("second_primary", primary.other_primaries > 0),
        ):
            found.add("latchkey_database_problem", float(is_there), problem)
        found.add("latchkey_peppers_missing", self.pepper_reports.missing)
        found.add("latchkey_seals_rejected", self.seals.rejected)
        for role, limiter in self.managed.limiters.items():
            found.add("latchkey_slots_used", limiter.used, role)
            found.add("latchkey_slots_queued", limiter.queued, role)

    def _add_access(self, found: Families) -> None:
        found.add("latchkey_connections", self.guard.connections)
        for reason in ("too_many", "address", "idle", "silent", "unread", "refused", "memory"):
            found.add("latchkey_connections_ended", self.guard.ended[reason], reason)
        now = time.time()
        if (policy := self.active_policy) is not None:
            found.add("latchkey_policy_callers", len(policy.policy.callers))
            found.add("latchkey_policy_age_seconds", now - policy.since_unix_seconds)
        if self.certificates is not None and (expiry := self.certificates.expiry_unix_seconds):
            found.add("latchkey_certificate_expiry_seconds", expiry - now)


def process_metrics(found: Families) -> None:
    """Add the metrics that every process of the service has."""
    found.add("latchkey_log_lines_dropped", logs.lines_dropped())
    for metric in ProcessCollector(registry=None).collect():
        if metric.name in FAMILIES:
            for sample in metric.samples:
                found.add(metric.name, sample.value)
