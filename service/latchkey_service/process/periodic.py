"""What a worker does by itself: health, summaries of counts, removal of what is old."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta

from latchkey_service.audit.audit_table import AuditTable
from latchkey_service.coherence.verifier_table import VerifierTable
from latchkey_service.errors import Overloaded, StoreUnavailable, Unavailable
from latchkey_service.postgres.circuit_breaker import spread
from latchkey_service.rpc.counters import Counts
from latchkey_service.settings.logs import logger
from latchkey_service.tokens import fleet
from latchkey_service.tokens.token_store import TokenStore

__all__ = [
    "follow_peppers",
    "follow_verifier",
    "log_counts",
    "log_counts_regularly",
    "prune_log",
    "purge",
    "purge_audit",
]

# Health follows Postgres within this and PROBE_TIMEOUT_SECONDS; back up it comes sooner.
PROBE_SECONDS = 0.5
PROBE_SECONDS_WHILE_DOWN = 0.1
PROBE_TIMEOUT_SECONDS = 1.0
SUMMARY_SECONDS = 60.0
PURGE_SECONDS = 3_600.0
# Small enough not to hold locks that anyone would notice.
PURGE_BATCH = 1_000
PRUNE_SECONDS = 60.0
# In leases (coherence rule 11), and at least some minutes, so that a client that was cut off for
# a while need not begin anew.
KEPT_LEASES = 10
KEPT_SECONDS_MIN = 600.0
# Two small tables are read each time. Tokens get lost on a host that lacks a pepper, so a person
# should hear of it soon.
PEPPER_CHECK_SECONDS = 10.0
# Until this process has registered, which it does as soon as the database answers.
PEPPER_CHECK_SECONDS_AT_START = 0.5

Gauges = Callable[[], Mapping[str, int]]
"""What there is of something right now, by name: what goes up and never down is a leak."""


async def follow_verifier(
    check: Callable[[float], Awaitable[None]],
    clock: Callable[[], float],
    set_serving: Callable[[bool], None],
) -> None:
    """Keep health at whether verifies are answered that need a look-up. Ends when cancelled.

    `check` does what such a verify does, on the same connection: another connection may lead to
    another server, and be fine (coherence rule 12). It is passed its deadline, by `clock`.
    """
    log = logger()
    # As it begins, before anybody could know.
    serving = False
    while True:
        try:
            await check(clock() + PROBE_TIMEOUT_SECONDS)
            answers = True
        except Overloaded:
            # Busy, and answering others.
            answers = True
        except Unavailable:
            answers = False
        except Exception:
            log.exception("the database answers strangely")
            answers = False
        if answers != serving:
            set_serving(answers)
            (log.info if answers else log.warning)("health", serving=answers)
            serving = answers
        pause = PROBE_SECONDS if serving else PROBE_SECONDS_WHILE_DOWN
        await asyncio.sleep(spread(pause, random.random()))  # noqa: S311 - a spread


async def follow_peppers(table: VerifierTable, own_id: str) -> None:
    """Warn when live verifiers lack a pepper that others create tokens with. Ends when cancelled.

    Every worker of the fleet warns, the ones that lack the pepper and the ones that have it: a
    person may look at the log of only one host.
    """
    loop, log = asyncio.get_running_loop(), logger()
    reports, registered = fleet.Reports(), False
    while True:
        pause = PEPPER_CHECK_SECONDS if registered else PEPPER_CHECK_SECONDS_AT_START
        await asyncio.sleep(spread(pause, random.random()))  # noqa: S311 - a spread
        try:
            verifiers = (await table.status()).verifiers
        except StoreUnavailable:
            # Health and the lease report it.
            continue
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            log.warning("peppers not compared", error=type(error).__name__)
            continue
        registered = registered or any(verifier.id == own_id for verifier in verifiers)
        news = reports.news(verifiers, loop.time())
        if news.resolved:
            log.info("no host lacks a pepper that others use any more")
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
    """Log the counts once a minute. Ends when cancelled."""
    while True:
        await asyncio.sleep(SUMMARY_SECONDS)
        log_counts(counts, gauges)


def log_counts(counts: Counts, gauges: Gauges) -> None:
    """Log the counts since the last time, if there are any, and beside them the gauges."""
    if summary := counts.take():
        logger().info("counts", pid=os.getpid(), **summary, **gauges())


async def purge(store: TokenStore, retention: timedelta, now: Callable[[], datetime]) -> None:
    """Remove old tombstones once an hour. Ends when cancelled."""

    async def purge_all() -> None:
        total = 0
        while gone := await store.purge_tombstones(now() - retention, PURGE_BATCH):
            total += gone
        if total:
            logger().info("tombstones removed", tokens=total)

    await _repeat(PURGE_SECONDS, purge_all, "tombstones not removed")


async def purge_audit(table: AuditTable, retention: timedelta, now: Callable[[], datetime]) -> None:
    """Remove old audit entries once an hour. Ends when cancelled."""

    async def purge_all() -> None:
        total = 0
        while gone := await table.purge(now() - retention, PURGE_BATCH):
            total += gone
        if total:
            logger().info("audit entries removed", entries=total)

    await _repeat(PURGE_SECONDS, purge_all, "audit entries not removed")


async def prune_log(table: VerifierTable, lease_seconds: float) -> None:
    """Remove invalidations that nobody will ask for once a minute. Ends when cancelled."""
    kept = max(KEPT_SECONDS_MIN, KEPT_LEASES * lease_seconds)

    async def prune() -> None:
        total = 0
        while gone := await table.prune_log(kept, PURGE_BATCH):
            total += gone
        if total:
            logger().info("log pruned", invalidations=total)

    await _repeat(PRUNE_SECONDS, prune, "log not pruned")


async def _repeat(seconds: float, work: Callable[[], Awaitable[None]], complaint: str) -> None:
    """Do background work whose failure must not end the loop that will try it again."""
    while True:
        # At another moment in each worker: they would only get in each other's way.
        await asyncio.sleep(spread(seconds, random.random()))  # noqa: S311 - a spread
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            logger().warning(complaint, error=type(error).__name__)
