"""`Verifier`: answers whether a secret is valid, for every request that a service handles.

It answers from its cache while it holds a lease, and detects malformed secrets without a call.
`_watch` keeps the lease alive. `_batch` asks the service about everything else.
"""

import asyncio
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, Self

import grpc
from latchkey_coherence.lease import boottime
from latchkey_coherence.verdict_cache import Position, VerdictCache

from latchkey import _convert, _fork, _tracing
from latchkey._batch import Batcher
from latchkey._entry import CacheEntry, cache_entry
from latchkey._key import secret_hash
from latchkey._retry import VERIFY_TIMEOUT_SECONDS, checked_timeout
from latchkey._shape import may_be_secret
from latchkey._subscription import Subscription
from latchkey._watch import Watcher
from latchkey.access import Access
from latchkey.client import Client
from latchkey.errors import AccessError, invalid, late
from latchkey.models import Scope, Verdict, Verification, VerifierStats
from latchkey.secret import Secret

# About 140 MB if all entries are in use, which is rare.
CACHE_ENTRIES: Final = 100_000
# Bounds the effect of any fault that the protocol does not cover.
CACHE_SECONDS: Final = 300.0

_MALFORMED: Final = Verification(verdict=Verdict.MALFORMED)
# Compared by identity: in Python 3.11, hash and equality of an Enum run Python code.
_READ: Final = Scope.READ
_WRITE: Final = Scope.WRITE
_wall_clock = time.time


class Verifier:
    """Verifies secrets with the service behind `client`, which is a Client or a target for one.

    For a target, `access`, `credentials` and `options` are those of Client.

    It caches the answers for the `cache_entries` most recently used secrets. A cached answer takes
    microseconds. The cache is used while the service grants a lease. A deleted token is evicted
    before its Delete returns. An answer is cached for at most `cache_seconds`. `cache_entries=0`
    switches the cache off. `timeout_seconds` bounds each verify. While it watches, it reports how
    often and when it answered from its cache, so that the service knows when each token was used.

    The first verify, or `async with`, starts watching for deletions. The watch uses a separate
    connection to the client's target. A Client with its own `channel` shares that channel, and then
    the watch cannot move to another server process when one stops. close() does not close a Client
    that was passed in.
    """

    def __init__(
        self,
        client: Client | str = "127.0.0.1:50051",
        *,
        timeout_seconds: float = VERIFY_TIMEOUT_SECONDS,
        cache_entries: int = CACHE_ENTRIES,
        cache_seconds: float = CACHE_SECONDS,
        access: Access | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        checked_timeout(timeout_seconds)
        if not cache_seconds > 0:
            raise invalid("cache_seconds", "must be positive")
        if cache_entries < 0:
            raise invalid("cache_entries", "must be 0 or more")
        self._owns_client = isinstance(client, str)
        if isinstance(client, str):
            client = Client(client, access=access, credentials=credentials, options=options)
        elif access is not None or credentials is not None or options:
            raise AccessError(
                "access, credentials and options belong to the Client that is passed in"
            )
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._cache: VerdictCache[CacheEntry] = VerdictCache(cache_entries)
        self._subscription = Subscription(self._cache, random.random)
        self._watcher = Watcher(
            self._client.open_channel, self._subscription, self._client.metadata
        )
        self._batcher = Batcher(self._client)
        self._caches = cache_entries > 0
        self._cache_seconds = cache_seconds
        # Cached answers that are not VALID, except those of final entries. Entries count the rest.
        self._denied_hits = 0
        self._misses = 0
        # Direct references for verify_nowait, to save attribute look-ups.
        self._lease = self._subscription.lease
        # A subscript takes less time than `get`. The cache never replaces this dict.
        self._entries = self._cache.entries
        self._begin_use = self._subscription.uses.begin
        _fork.watch(self)

    def verify_nowait(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        # Not keyword-only: Python would take the defaults from a dict, at 2 % of the whole call.
        client_address: str = "",
        permissions: Collection[str] = (),
    ) -> Verification | None:
        """Answer at once if the answer is cached or `secret` is malformed. Otherwise return None.

        The guarantee is that of `verify`. This method never blocks, and any thread may call
        it. Raises InvalidArgument or TypeError if `scope` is not a valid scope.
        """
        # Another thread may meanwhile apply an invalidation and then extend the lease. The order of
        # the next three reads makes that safe: lease end, entry, clock. If the lease end belongs to
        # a grant after the invalidation, the entry is already evicted when it is read. If it
        # belongs to an earlier grant, the clock shows that this grant was still in force after this
        # call began. No Delete that invalidates the entry had then returned (coherence rules 5 and
        # 6).
        lease_end = self._lease.end
        if type(secret) is not str:
            secret = _convert.secret_out(secret)
        try:
            entry = self._entries[secret_hash(secret.encode()).digest()]
        except KeyError:
            return self._uncached_answer(secret, scope)
        except UnicodeEncodeError:  # not a secret, since UTF-8 cannot encode it
            return self._uncached_answer("", scope)
        # Not min(), whose call costs as much as a tenth of the rest.
        if (now := boottime()) < (
            lease_end if lease_end < entry.keep_until else entry.keep_until  # noqa: FURB136
        ):
            if scope is None or scope is _READ:
                answer = entry.ready_read
            elif scope is _WRITE:
                answer = entry.ready_write
            else:
                _convert.scope_out(scope, "scope")
                return None
            if answer is None or permissions:
                answer = entry.answer(scope, client_address, permissions)
                return self._other_answer(entry, answer, secret, now)
            if entry.expires_at is None or _wall_clock() < entry.expires_at:
                entry.used = True
                # Counted before `idle` is read: see UseLog.begin. CPython does not switch threads
                # inside this addition. If the entry is not final, the answer is VALID.
                entry.uses += 1
                entry.last_use = now
                if entry.idle:
                    self._begin_use(entry, secret, now)
                return answer
            return None
        return self._uncached_answer(secret, scope)

    def _uncached_answer(self, secret: str, scope: Scope | None) -> Verification | None:
        """Return MALFORMED, or None if the service may know the secret. Checks `scope`."""
        _convert.scope_out(scope, "scope")  # a wrong scope is an error for every secret
        # An old server sends no prefixes, and accepts no imported secrets.
        known = may_be_secret(secret, self._subscription.imported_prefixes)
        return None if known else _MALFORMED

    def _other_answer(
        self, entry: CacheEntry, answer: Verification, secret: str, now: float
    ) -> Verification | None:
        """Return a cached answer that may not be VALID, unless the token may have expired.

        Separate, so that the common path need not look at the verdict to count a use. Also returns
        None if the token has a rate limit and the service may have a call left for it.
        """
        if entry.expires_at is not None and _wall_clock() >= entry.expires_at:
            return None
        entry.used = True
        share = entry.share
        if share is not None and answer.verdict is Verdict.VALID:
            if share.spend(now):
                self._subscription.shares.note(share)
            elif seconds := share.denied_seconds(now):
                answer = replace(
                    answer, verdict=Verdict.RATE_LIMITED, retry_after=timedelta(seconds=seconds)
                )
            else:
                return None
        if answer.verdict is Verdict.VALID:
            entry.uses += 1
            entry.last_use = now
            if entry.idle:
                self._begin_use(entry, secret, now)
        else:
            self._denied_hits += 1
        return answer

    async def verify(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` is valid for `scope`. None requires no scope.

        `client_address` is the IP address of the holder's client. Tokens that are limited to
        networks need it. The token has to have all `permissions`, of the form `resource:action`.

        Answers from the cache if possible. Otherwise it asks the service, in one call for all
        verifies that start in the same turn of the event loop. `timeout_seconds` can only shorten
        the verifier's own bound. Malformed input never raises; it is MALFORMED. Raises an error of
        `latchkey.errors`, usually Unavailable, if there is no safe answer: then reject the holder.

        Several callers may get the same object, so do not change it.
        """
        if isinstance(permissions, str):
            raise invalid("permissions", "must be a collection of texts, not one text")
        answer = self.verify_nowait(
            secret, scope, client_address=client_address, permissions=permissions
        )
        if answer is not None:
            if _tracing.active:
                _tracing.note(answer)
            return answer
        required = tuple(permissions)
        text = _convert.secret_out(secret)
        timeout = self._timeout_seconds
        if timeout_seconds is not None:
            timeout = min(timeout, timeout_seconds)
        checked_timeout(timeout)
        if self._caches:
            self._watcher.start()
        self._misses += 1
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        # A verify that spends a call of a rate limit cannot share the answer of another one.
        known = self._entries.get(secret_hash(text.encode()).digest())
        alone = known is not None and known.share is not None
        answer = await self._batcher.ask((text, scope, client_address, required), end, alone=alone)
        if answer is None:
            left = end - loop.time()
            if left <= 0:
                raise late("Verify")
            answer = await self._client.verify(
                text,
                scope,
                client_address=client_address,
                required_permissions=required,
                timeout_seconds=left,
            )
        self._store(text, scope, answer, client_address, required)
        return answer

    def _store(
        self,
        secret: str,
        scope: Scope | None,
        answer: Verification,
        client_address: str = "",
        permissions: Collection[str] = (),
    ) -> None:
        now = boottime()
        if now >= self._lease.end:
            return  # without a lease, the service does not report changes
        # Spread over half of the time, so that answers that came together, for example after a
        # start, do not expire together.
        keep_until = now + self._cache_seconds * random.uniform(0.5, 1.0)  # noqa: S311 - a spread
        shares = self._subscription.shares
        entry = cache_entry(answer, scope, keep_until, client_address, permissions, shares.of)
        if entry is None:
            return
        position = Position(answer.revision, answer.mark)
        self._cache.store(secret_hash(secret.encode()).digest(), entry, position)
        if (share := entry.share) is None:
            return
        if answer.retry_after is not None:
            share.deny(now + answer.retry_after.total_seconds())
        elif answer.verdict is Verdict.VALID:
            share.count(1)
            shares.note(share)
            self._watcher.wake()

    def stats(self) -> VerifierStats:
        """Return the verifier's state: whether it answers from its cache, why not, and counters."""
        left = max(0.0, self._lease.end - boottime())
        watcher, subscription = self._watcher, self._subscription
        reason: str | None = None
        if not self._caches:
            reason = "The cache is off (cache_entries=0)."
        elif left == 0.0:
            reason = watcher.fallback_reason
        return VerifierStats(
            watching=left > 0.0,
            fallback_reason=reason,
            lease_remaining_seconds=left,
            applied_revision=self._cache.position.revision,
            entries=len(self._cache),
            hits=self._denied_hits + subscription.uses.total(),
            misses=self._misses,
            batches=self._batcher.batches,
            invalidations=subscription.invalidations,
            resets=subscription.resets,
            reconnects=watcher.reconnects,
        )

    async def close(self) -> None:
        """Stop watching, and close the connection if the verifier created it. Safe to repeat.

        Reports the uses that the service does not know yet, and releases the grants, so that
        Deletes need not wait for this verifier. That takes at most half a second.
        """
        await self._watcher.close()
        if self._owns_client:
            await self._client.close()

    def forked(self) -> None:
        """Stop giving cached answers, because this process is a forked child.

        The parent acknowledges deletions only for its own cache, not for this copy. For the
        library's own use.
        """
        self._watcher.forked()

    async def __aenter__(self) -> Self:
        if self._caches:
            self._watcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
