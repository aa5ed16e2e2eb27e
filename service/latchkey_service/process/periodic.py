"""The background tasks of a worker: health checks, warnings, log summaries and clean-up.

Owns when these tasks run. It owns neither their SQL nor the lease (`coherence/lease_renewer.py`).
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta

from latchkey_service.audit.audit_sealer import AuditSealer
from latchkey_service.coherence.verifier_table import VerifierTable
from latchkey_service.errors import Overloaded, StoreUnavailable, Unavailable
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.rpc.counters import Counts
from latchkey_service.settings.logs import logger
from latchkey_service.tokens import fleet
from latchkey_service.tokens.event_store import EventStore
from latchkey_service.tokens.event_table import Outbox
from latchkey_service.tokens.lifecycle import REQUEST_AGE_MAX
from latchkey_service.tokens.rate_table import RateTable
from latchkey_service.tokens.upkeep_store import UpkeepStore
from latchkey_service.tokens.usage_table import UsageTable

__all__ = [
    "announce_expiring",
    "count_expiring",
    "follow_peppers",
    "follow_verifier",
    "log_counts",
    "log_counts_regularly",
    "prune_log",
    "purge",
    "purge_audit",
    "purge_lifecycle",
    "purge_usage",
    "rest",
]

# The check for health is a query. While renewals and look-ups succeed, it is rare. If one has
# failed, or a renewal is slow, the check follows within LOOK_SECONDS.
PROBE_SECONDS = 5.0
# The same for workers that share a lease. Each check opens a connection if the worker is idle, and
# all workers of a host check at the same time.
PROBE_SECONDS_SHARED = 600.0
LOOK_SECONDS = 0.5
PROBE_SECONDS_WHILE_DOWN = 0.1
PROBE_TIMEOUT_SECONDS = 1.0
SUMMARY_SECONDS = 60.0
PURGE_SECONDS = 3_600.0
# The first time after a start. Only worker 0 of a host that shares a lease does these works, so a
# worker 0 that is replaced more often than they are due would never do them.
FIRST_SECONDS = 300.0
# Small enough that nobody notices the locks.
PURGE_BATCH = 1_000
PRUNE_SECONDS = 60.0
# How often to look for idle connections.
REST_SECONDS = 5.0
# Thresholds are days, so minutes do not matter.
EXPIRING_SECONDS = 300.0
EXPIRING_CHECK_SECONDS = 60.0
# For the metrics.
EXPIRING_DAYS = (1, 7, 30)
# The log keeps invalidations for this many leases (coherence rule 11), and for some minutes at
# least, so that a client need not start over after a short interruption.
KEPT_LEASES = 10
KEPT_SECONDS_MIN = 600.0
# Each check reads two small tables. A host that lacks a pepper rejects valid tokens, so the warning
# should come soon. Every process checks, so with many processes each does so less often: this many
# rows take a check's time.
PEPPER_CHECK_SECONDS = 10.0
PEPPER_CHECK_ROWS = 20
# Used until this process has registered, which it does as soon as the database answers.
PEPPER_CHECK_SECONDS_AT_START = 0.5

Gauges = Callable[[], Mapping[str, int]]
"""Current sizes by name. A size that only ever rises is a leak."""


async def follow_verifier(
    check: Callable[[float], Awaitable[None]],
    clock: Callable[[], float],
    in_doubt: Callable[[], bool],
    failures: Callable[[], int],
    set_serving: Callable[[bool], None],
    probe_seconds: float = PROBE_SECONDS,
) -> None:
    """Report on health whether verifies that need a look-up succeed. Runs until cancelled.

    `check` does the same as such a verify, on the same connection: another connection may lead to
    another server and work (coherence rule 12). Its argument is its deadline, by `clock`.
    `in_doubt` says whether renewals fail or are slow, and `failures` how many look-ups have failed.
    """
    log = logger()
    # Health starts at NOT_SERVING, before the first check.
    serving = False
    while True:
        try:
            await check(clock() + PROBE_TIMEOUT_SECONDS)
            answers = True
        except Overloaded:
            # Overloaded, but answering other calls.
            answers = True
        except Unavailable:
            answers = False
        except Exception:
            log.exception("unexpected error in the health check")
            answers = False
        if answers != serving:
            set_serving(answers)
            (log.info if answers else log.warning)("health", serving=answers)
            serving = answers
        if not serving:
            await asyncio.sleep(
                jittered(PROBE_SECONDS_WHILE_DOWN, random.random())  # noqa: S311 - jitter
            )
            continue
        failed, until = failures(), clock() + probe_seconds
        while True:
            # At least once: otherwise a check that succeeds while renewals fail would repeat
            # without a pause.
            await asyncio.sleep(jittered(LOOK_SECONDS, random.random()))  # noqa: S311 - jitter
            if clock() >= until or in_doubt() or failures() != failed:
                break


async def rest(rests: Sequence[Callable[[], None]]) -> None:
    """Call `rests` regularly, which close connections that were idle for long. Runs until
    cancelled.
    """
    while True:
        await asyncio.sleep(REST_SECONDS)
        for close_if_idle in rests:
            try:
                close_if_idle()
            except Exception as error:  # noqa: BLE001 - the others must be closed too
                logger().warning("idle connection not closed", error=type(error).__name__)


async def follow_peppers(table: VerifierTable, own_id: str, reports: fleet.Reports) -> None:
    """Warn if live verifiers lack a pepper that others create tokens with. Runs until cancelled.

    Every host warns, both those that lack the pepper and those that have it, because a person may
    read the log of only one host.
    """
    loop, log = asyncio.get_running_loop(), logger()
    registered, rows = False, 0
    while True:
        pause = PEPPER_CHECK_SECONDS * max(1.0, rows / PEPPER_CHECK_ROWS)
        if not registered:
            pause = PEPPER_CHECK_SECONDS_AT_START
        await asyncio.sleep(jittered(pause, random.random()))  # noqa: S311 - jitter
        try:
            verifiers = (await table.status()).verifiers
        except StoreUnavailable:
            # Health and the lease report this.
            continue
        except Exception as error:  # noqa: BLE001 - logged and repeated
            log.warning("comparison of peppers failed", error=type(error).__name__)
            continue
        rows = len(verifiers)
        registered = registered or any(verifier.id == own_id for verifier in verifiers)
        news = reports.news(verifiers, loop.time())
        if news.resolved:
            log.info("every host has the peppers of the others again")
        for mismatch in news.found:
            minting, lacking = mismatch.hosts
            log.warning(
                "hosts lack a pepper that others use",
                pepper_id=mismatch.pepper_id,
                used_on=minting,
                missing_on=lacking,
                what_to_do=mismatch.warning(),
            )


async def log_counts_regularly(counts: Counts, gauges: Gauges) -> None:
    """Log the counts once a minute. Runs until cancelled."""
    while True:
        await asyncio.sleep(SUMMARY_SECONDS)
        try:
            log_counts(counts, gauges)
        except Exception as error:  # noqa: BLE001 - a summary must not end the worker
            logger().warning("summary failed", error=type(error).__name__)


def log_counts(counts: Counts, gauges: Gauges) -> None:
    """Log the counts since the previous call, if any, together with the gauges."""
    if summary := counts.take():
        logger().info("counts", pid=os.getpid(), **summary, **gauges())


async def purge(store: UpkeepStore, retention: timedelta, now: Callable[[], datetime]) -> None:
    """Remove old tombstones once an hour. Runs until cancelled."""

    async def purge_all() -> None:
        total = 0
        while gone := await store.purge_tombstones(now() - retention, PURGE_BATCH):
            total += gone
        if total:
            logger().info("tombstones removed", tokens=total)

    await _repeat(PURGE_SECONDS, purge_all, "removal of tombstones failed")


async def purge_lifecycle(
    store: UpkeepStore,
    expired_retention: timedelta,
    retention: timedelta,
    now: Callable[[], datetime],
) -> None:
    """Remove what ended long ago once an hour: expired tokens, secrets, ids of requests."""

    async def purge_all() -> None:
        total = 0
        while gone := await store.purge_ended(
            now() - expired_retention, now() - retention, PURGE_BATCH
        ):
            total += gone
        while await store.purge_requests(now() - REQUEST_AGE_MAX, PURGE_BATCH):
            pass
        if total:
            logger().info("expired tokens and ended secrets removed", rows=total)

    await _repeat(PURGE_SECONDS, purge_all, "removal of expired tokens failed")


async def purge_audit(
    sealer: AuditSealer, retention: timedelta, now: Callable[[], datetime]
) -> None:
    """Remove old audit entries once an hour. Runs until cancelled."""

    async def purge_all() -> None:
        total = 0
        while gone := await sealer.purge(now() - retention, PURGE_BATCH):
            total += gone
        if total:
            logger().info("audit entries removed", entries=total)

    await _repeat(PURGE_SECONDS, purge_all, "removal of audit entries failed")


async def purge_usage(table: UsageTable, now: Callable[[], datetime]) -> None:
    """Remove old daily counts of uses once an hour. Runs until cancelled."""

    async def purge_all() -> None:
        total = 0
        while gone := await table.purge(now().date(), PURGE_BATCH):
            total += gone
        if total:
            logger().info("daily counts of uses removed", days=total)

    await _repeat(PURGE_SECONDS, purge_all, "removal of daily counts of uses failed")


async def announce_expiring(
    store: EventStore, outbox: Outbox, days: Sequence[int], now: Callable[[], datetime]
) -> None:
    """Write events for tokens that expire soon, every few minutes. Runs until cancelled.

    One worker of the fleet does it at a time.
    """

    async def announce() -> None:
        if not await store.take_turn("announce_expiring", EXPIRING_SECONDS):
            return
        moment, cursor = now(), None
        while True:
            cursor = await store.announce_expiring(outbox, days, moment, cursor, PURGE_BATCH)
            if cursor is None:
                break
        # An expiry that has passed is not announced any more.
        while await store.purge_notices(moment, PURGE_BATCH):
            pass

    await _repeat(EXPIRING_CHECK_SECONDS, announce, "announcement of expiries failed")


async def count_expiring(
    store: EventStore, found: dict[int, int], now: Callable[[], datetime]
) -> None:
    """Keep in `found` how many tokens expire within some days. Runs until cancelled."""

    async def count() -> None:
        found.update(await store.count_expiring(EXPIRING_DAYS, now()))

    await _repeat(EXPIRING_SECONDS, count, "count of expiring tokens failed", at_once=True)


async def purge_rates(table: RateTable) -> None:
    """Remove the rows of full buckets once an hour. Runs until cancelled."""

    async def purge_all() -> None:
        while await table.purge(PURGE_BATCH):
            pass

    await _repeat(PURGE_SECONDS, purge_all, "removal of full rate limits failed")


async def prune_log(table: VerifierTable, lease_seconds: float) -> None:
    """Once a minute, remove invalidations that no verifier needs. Runs until cancelled."""
    kept = max(KEPT_SECONDS_MIN, KEPT_LEASES * lease_seconds)

    async def prune() -> None:
        total = 0
        while gone := await table.prune_log(kept, PURGE_BATCH):
            total += gone
        if total:
            logger().info("invalidation log pruned", invalidations=total)

    await _repeat(PRUNE_SECONDS, prune, "pruning of the invalidation log failed")


async def _repeat(
    seconds: float, work: Callable[[], Awaitable[None]], event: str, *, at_once: bool = False
) -> None:
    """Repeat `work` forever, about every `seconds`. Logs failures as `event` and continues.

    The first time is after that pause too, or after FIRST_SECONDS if that is shorter, or `at_once`.
    """
    pause = 0.0 if at_once else min(seconds, FIRST_SECONDS)
    while True:
        # At a different time in each worker, so that they do not block each other.
        await asyncio.sleep(jittered(pause, random.random()))  # noqa: S311 - jitter
        pause = seconds
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - logged and repeated
            logger().warning(event, error=type(error).__name__)
