"""The names, types, labels and meanings of all metrics. docs/metrics.md repeats the table.

Owns no values: `worker_metrics.py` and `metrics_server.py` add them. A name never changes its
meaning, because people's dashboards and alerts depend on it. Labels have few values: no account, no
token, no caller, and no path that is not in `access/methods.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

from latchkey_service.histogram import Histogram

__all__ = ["FAMILIES", "SUPERVISOR", "Families", "Family"]

Kind = Literal["counter", "gauge", "histogram"]
# The value of the label `worker` for the process that starts the workers.
SUPERVISOR: Final = "supervisor"


class Family(NamedTuple):
    """A metric. `labels` are those besides `worker`, which every metric of a process has."""

    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    of_process: bool = True
    """Whether it has the label `worker`."""


_GRPC: Final = ("grpc_type", "grpc_service", "grpc_method")

FAMILIES: Final[Mapping[str, Family]] = {
    "grpc_server_started": Family("counter", _GRPC, "calls that started"),
    "grpc_server_handled": Family("counter", (*_GRPC, "grpc_code"), "calls that ended"),
    "grpc_server_handling_seconds": Family(
        "histogram", _GRPC, "time from the start of a unary call to its answer"
    ),
    "latchkey_failures": Family("counter", ("reason",), "calls that failed, by reason"),
    "latchkey_verdicts": Family("counter", ("verdict",), "verdicts, by kind"),
    "latchkey_answers": Family(
        "counter",
        ("source",),
        "verdicts by source: cache, read (of the database), form (of the secret)",
    ),
    "latchkey_cache_entries": Family("gauge", (), "cached verdicts"),
    "latchkey_cache_entries_max": Family("gauge", (), "limit of cached verdicts"),
    "latchkey_cache_evictions": Family("counter", (), "cached verdicts that made room for others"),
    "latchkey_lease_remaining_seconds": Family(
        "gauge", (), "how long verifies may be answered without a further renewal"
    ),
    "latchkey_lease_renewals": Family("counter", ("result",), "renewals of the lease"),
    "latchkey_registrations": Family(
        "counter", (), "registrations as a verifier, each with an empty cache"
    ),
    "latchkey_revision": Family("gauge", (), "newest deletion that is applied to the cache"),
    "latchkey_acknowledged_revision": Family(
        "gauge", (), "newest deletion that the worker and its clients have confirmed"
    ),
    "latchkey_log_age_seconds": Family("gauge", (), "time since the log of deletions was read"),
    "latchkey_notifications": Family(
        "gauge",
        ("state",),
        "1 for the state of notifications: unknown (also if worker 0 receives them for this one), "
        "arrive, silent, off",
    ),
    "latchkey_delete_wait_seconds": Family(
        "histogram",
        ("result",),
        "how long Deletes waited for verifiers: acknowledged, outwaited, unconfirmed",
    ),
    "latchkey_deletes_waiting": Family("gauge", (), "Deletes that wait for verifiers now"),
    "latchkey_watch_streams": Family("gauge", (), "clients that watch"),
    "latchkey_watch_clients_behind": Family(
        "gauge", (), "clients with a lease that have not confirmed the newest deletion"
    ),
    "latchkey_watch_waiting_seconds": Family(
        "gauge", (), "how long a deletion has been waiting for clients"
    ),
    "latchkey_watch_clients_outwaited": Family(
        "counter", (), "leases of clients that expired while a deletion waited for them"
    ),
    "latchkey_lookup_batch_digests": Family("histogram", (), "secrets per look-up query"),
    "latchkey_lookup_seconds": Family("histogram", (), "time of look-up queries"),
    "latchkey_lookup_failures": Family("counter", (), "look-up queries that failed"),
    "latchkey_lookup_waiting": Family("gauge", (), "secrets that wait for a look-up query"),
    "latchkey_imported_lookups": Family(
        "counter",
        ("result",),
        "imported secrets that were not cached, by result: found, absent, remembered, rejected",
    ),
    "latchkey_imported_lookup_waiting": Family(
        "gauge", (), "digests of imported secrets that wait for a look-up query"
    ),
    "latchkey_rate_draws": Family(
        "counter", (), "statements that drew calls of tokens with a rate limit"
    ),
    "latchkey_pool_connections": Family(
        "gauge", ("state",), "pooled connections to Postgres: used, idle"
    ),
    "latchkey_pool_connections_max": Family("gauge", (), "limit of pooled connections"),
    "latchkey_database_circuit": Family(
        "gauge", ("state",), "1 for the state of the circuit breaker: closed, half_open, open"
    ),
    "latchkey_database_info": Family(
        "gauge", ("address", "system_identifier", "timeline"), "1 for the primary of the lease"
    ),
    "latchkey_database_problem": Family(
        "gauge", ("problem",), "1 for each problem: standby_missing, second_primary"
    ),
    "latchkey_peppers_missing": Family(
        "gauge", (), "peppers that hosts create tokens with and that other live hosts lack"
    ),
    "latchkey_seals_rejected": Family(
        "counter", (), "secrets and tokens that were refused because their row was changed"
    ),
    "latchkey_slots_used": Family("gauge", ("role",), "calls that hold a slot for the database"),
    "latchkey_slots_queued": Family("gauge", ("role",), "calls that wait for a slot"),
    "latchkey_audit_entries": Family(
        "counter",
        ("result",),
        "audit entries of reads and failures: written, lost, aggregated (counted in another entry)",
    ),
    "latchkey_audit_waiting": Family("gauge", (), "audit entries that wait to be written"),
    "latchkey_audit_newest_batch": Family(
        "gauge", (), "number of the newest sealed batch of audit entries"
    ),
    "latchkey_audit_regressions": Family(
        "counter", (), "times that sealed audit entries were missing or different"
    ),
    "latchkey_tokens_expiring": Family(
        "gauge", ("within",), "tokens of the whole database that expire within 1d, 7d, 30d"
    ),
    "latchkey_webhook_deliveries": Family(
        "counter", ("result",), "attempts to deliver an event: delivered, failed, abandoned"
    ),
    "latchkey_webhook_events": Family("gauge", (), "events that are not delivered, of all workers"),
    "latchkey_webhook_oldest_event_seconds": Family(
        "gauge", (), "age of the oldest event that is not delivered"
    ),
    "latchkey_connections": Family("gauge", (), "clients' connections at the last inspection"),
    "latchkey_connections_ended": Family(
        "counter",
        ("reason",),
        "connections that were ended: too_many, address, idle, silent, unread, refused, memory",
    ),
    "latchkey_policy_callers": Family("gauge", (), "callers in the policy"),
    "latchkey_policy_age_seconds": Family("gauge", (), "time since the policy came into force"),
    "latchkey_certificate_expiry_seconds": Family(
        "gauge", (), "time until the server's certificate expires; negative: expired"
    ),
    "latchkey_trace_spans": Family(
        "counter",
        ("result",),
        "spans of traces: exported, dropped because the queue was full, failed at the collector",
    ),
    "latchkey_trace_calls_limited": Family(
        "counter", (), "calls that were not traced because of LATCHKEY_TRACES_PER_SECOND"
    ),
    "latchkey_event_loop_tasks": Family("gauge", (), "tasks of the event loop"),
    "latchkey_event_loop_delay_seconds": Family(
        "gauge", (), "longest delay of the event loop in the last 15 seconds"
    ),
    "latchkey_log_lines_dropped": Family(
        "counter", (), "log lines that were dropped because nobody read them"
    ),
    "process_cpu_seconds": Family("counter", (), "processor time"),
    "process_resident_memory_bytes": Family("gauge", (), "resident memory"),
    "process_virtual_memory_bytes": Family("gauge", (), "virtual memory"),
    "process_start_time_seconds": Family("gauge", (), "start, in seconds since 1970"),
    "process_open_fds": Family("gauge", (), "open files"),
    "process_max_fds": Family("gauge", (), "limit of open files"),
    "latchkey_build_info": Family("gauge", ("version",), "1 for the version", of_process=False),
    "latchkey_workers": Family("gauge", (), "workers that should run", of_process=False),
    "latchkey_worker_up": Family("gauge", (), "1 if the worker answered this scrape, else 0"),
    "latchkey_worker_restarts": Family(
        "counter", ("reason",), "workers that were restarted, by reason", of_process=False
    ),
}


class Families:
    """Values for metrics, in the order of `FAMILIES`."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add one value of a counter or a gauge."""
        family = FAMILIES[name]
        suffix = "_total" if family.kind == "counter" else ""
        named = dict(zip(family.labels, labels, strict=True))
        self._samples(name).append(Sample(name + suffix, named, value))

    def add_states(self, name: str, states: Sequence[str], current: str) -> None:
        """Add 1 for the current state, and 0 for the others."""
        for state in states:
            self.add(name, float(state == current), state)

    def add_histogram(self, name: str, histogram: Histogram, *labels: str) -> None:
        """Add the buckets of a histogram, each with its exemplar."""
        named = dict(zip(FAMILIES[name].labels, labels, strict=True))
        samples = self._samples(name)
        count = 0
        bounds = (*histogram.bounds, float("inf"))
        for bound, number, found in zip(bounds, histogram.counts, histogram.exemplars, strict=True):
            count += number
            exemplar = found and Exemplar(
                {"request_id": found.request_id}, found.value, found.unix_time
            )
            bucket = {**named, "le": floatToGoString(bound)}  # type: ignore[no-untyped-call]  # has no annotations
            samples.append(Sample(f"{name}_bucket", bucket, count, None, exemplar))
        samples.append(Sample(f"{name}_count", named, count))
        samples.append(Sample(f"{name}_sum", named, histogram.total))

    def add_all(self, values: Any, worker: str) -> None:
        """Add the values of a process, as `to_plain` returned them there."""
        for name, samples in values:
            family = FAMILIES[name]
            found = self._samples(name)
            for sample_name, labels, value, exemplar in samples:
                named = {**labels, "worker": worker} if family.of_process else labels
                example = exemplar and Exemplar(*exemplar)
                found.append(Sample(sample_name, named, value, None, example))

    def to_plain(self) -> list[Any]:
        """Return all values as lists and dictionaries, for a pipe to the supervisor."""
        return [
            (name, [(s.name, s.labels, s.value, s.exemplar) for s in metric.samples])
            for name, metric in self._metrics.items()
        ]

    def metrics(self) -> list[Metric]:
        """Return the metrics that have values."""
        return [self._metrics[name] for name in FAMILIES if name in self._metrics]

    def _samples(self, name: str) -> list[Sample]:
        metric = self._metrics.get(name)
        if metric is None:
            family = FAMILIES[name]
            metric = self._metrics[name] = Metric(name, family.meaning, family.kind)
        return metric.samples
