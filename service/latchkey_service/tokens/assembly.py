"""Builds the objects that manage tokens in one worker, for `process/wiring.py`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from latchkey_coherence.lease import boottime

from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.lifetime import UNLIMITED, Lifetime
from latchkey_service.postgres.connections import Pool
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.bulk import Bulk
from latchkey_service.tokens.bulk_store import BulkStore
from latchkey_service.tokens.confirmation import Confirmations
from latchkey_service.tokens.event_table import NO_EVENTS, Outbox
from latchkey_service.tokens.find_store import FindStore
from latchkey_service.tokens.finding import Finding
from latchkey_service.tokens.first_use import FirstUse
from latchkey_service.tokens.import_store import ImportStore
from latchkey_service.tokens.importing import Importer
from latchkey_service.tokens.lifecycle import Lifecycle
from latchkey_service.tokens.lifecycle_store import LifecycleStore
from latchkey_service.tokens.list_store import ListStore
from latchkey_service.tokens.listing import Listing
from latchkey_service.tokens.management import Tokens
from latchkey_service.tokens.seal import SealGuard
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.upkeep_store import UpkeepStore

__all__ = ["Management", "build_management"]


@dataclass(frozen=True, slots=True)
class Management:
    """The objects that manage tokens in one worker."""

    tokens: Tokens
    lifecycle: Lifecycle
    bulk: Bulk
    listing: Listing
    finding: Finding
    importer: Importer
    guard: SealGuard
    first_use: FirstUse
    upkeep_store: UpkeepStore


def build_management(
    pool: Pool,
    keyring: Keyring,
    ack_waiter: AckWaiter,
    reads: LeasedReads,
    secret_prefix: str,
    now: Callable[[], datetime],
    lifetime: Lifetime = UNLIMITED,
    outbox: Outbox = NO_EVENTS,
) -> Management:
    """Return the management of tokens on `pool`."""
    guard = SealGuard(keyring, boottime)
    token_store = TokenStore(pool, outbox)
    confirmations = Confirmations(ack_waiter, now, token_store.settle)
    tokens = Tokens(token_store, keyring, ack_waiter, reads, secret_prefix, now, os.urandom)
    store = LifecycleStore(pool, outbox)
    lifecycle = Lifecycle(
        store,
        tokens,
        keyring,
        guard,
        confirmations,
        reads,
        secret_prefix,
        now,
        os.urandom,
        lifetime,
    )
    bulk = Bulk(
        BulkStore(pool, outbox), store, keyring, confirmations, reads, now, tokens.confirming
    )
    importer = Importer(
        ImportStore(pool), store, keyring, guard, confirmations, reads, now, os.urandom, lifetime
    )
    listing = Listing(ListStore(pool), reads, now)
    finding = Finding(FindStore(pool), reads)
    first_use = FirstUse(lifecycle.retire_older, boottime)
    return Management(
        tokens, lifecycle, bulk, listing, finding, importer, guard, first_use, UpkeepStore(pool)
    )
