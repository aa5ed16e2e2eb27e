"""`Verifier`: "may this secret do this?", asked on every request that a service handles.

It owns what can be told without the service: that something is no secret at all, and what the
memory holds while there is a lease on it. The lease is kept alive by `_watch`; what it cannot tell
is asked through `_batch`.
"""

import asyncio
import random
import time
from hashlib import sha256
from types import TracebackType
from typing import Final, Self

from latchkey_coherence.lease import boottime
from latchkey_coherence.memory import Memory, Position

from latchkey import _convert, _fork
from latchkey._batch import Batcher
from latchkey._entry import Remembered, remembered
from latchkey._retry import VERIFY_TIMEOUT_SECONDS, checked_timeout
from latchkey._shape import is_well_formed
from latchkey._subscription import Subscription
from latchkey._watch import Watcher
from latchkey.client import Client
from latchkey.errors import invalid, late
from latchkey.models import Scope, Verdict, Verification, VerifierStats
from latchkey.secret import Secret

# About 130 MB when all of them are in use, which few services see.
MEMORY_ENTRIES: Final = 100_000
# Whatever goes wrong in a way that the protocol does not cover ends by itself after this.
MEMORY_SECONDS: Final = 300.0

_MALFORMED: Final = Verification(verdict=Verdict.MALFORMED)
# By identity: in 3.11 an Enum's hash and equality are Python code.
_READ: Final = Scope.READ
_WRITE: Final = Scope.WRITE
_wall_clock = time.time


class Verifier:
    """Verifies secrets with the service behind `client`, a Client or a target as Client takes it.

    It remembers the answers for the `memory_entries` secrets used last and gives them again in
    microseconds, for as long as the service grants it a lease; a deletion drops its token from
    the memory before Delete returns. 0 switches that off. It asks again about each of them after
    `memory_seconds` at most. `timeout_seconds` bounds each verify.

    It begins to watch for deletions with the first verify, or with `async with`, on a connection
    of its own to where the client connects. A Client that was made with a `channel` lends it for
    that: then watching cannot move on to another server process when one stops. A Client that is
    passed in stays open on close().
    """

    def __init__(
        self,
        client: Client | str = "127.0.0.1:50051",
        *,
        timeout_seconds: float = VERIFY_TIMEOUT_SECONDS,
        memory_entries: int = MEMORY_ENTRIES,
        memory_seconds: float = MEMORY_SECONDS,
    ) -> None:
        checked_timeout(timeout_seconds)
        if not memory_seconds > 0:
            raise invalid("memory_seconds", "must be positive")
        if memory_entries < 0:
            raise invalid("memory_entries", "has to be 0 or more")
        self._owns_client = isinstance(client, str)
        self._client = Client(client) if isinstance(client, str) else client
        self._timeout_seconds = timeout_seconds
        self._memory: Memory[Remembered] = Memory(memory_entries)
        self._subscription = Subscription(self._memory, random.random)
        self._watcher = Watcher(
            self._client.open_channel, self._subscription, self._client.metadata
        )
        self._batcher = Batcher(self._client)
        self._remembers = memory_entries > 0
        self._memory_seconds = memory_seconds
        self._hits = 0
        self._misses = 0
        # What verify_nowait needs, without a way to go.
        self._lease = self._subscription.lease
        self._find = self._memory.entries.get
        _fork.watch(self)

    def verify_nowait(
        self, secret: str | Secret, scope: Scope | None = None
    ) -> Verification | None:
        """Answer at once, from memory or because `secret` is none; None: the service has to say.

        As good an answer as `verify` gives. Never blocks and waits for nothing; may be called
        from any thread. Raises InvalidArgument or TypeError for a `scope` that is none.
        """
        # Safe beside a thread that applies an invalidation and then extends the lease, by the
        # order of these three. The lease's end comes first: if it is that of a grant which came
        # after the invalidation, then the entry, looked for later, is gone; if it is an older
        # grant's, then that was still good when the clock was read, after this call began, and no
        # Delete that the entry should have heeded had returned before (coherence rules 5 and 6).
        lease_end = self._lease.end
        if type(secret) is not str:
            secret = _convert.secret_out(secret)
        try:
            entry = self._find(sha256(secret.encode()).digest())
        except UnicodeEncodeError:  # what UTF-8 cannot carry is nobody's secret
            entry, secret = None, ""
        if entry is not None and (now := boottime()) < lease_end and now < entry.keep_until:
            if scope is None or scope is _READ:
                answer = entry.read
            elif scope is _WRITE:
                answer = entry.write
            else:
                _convert.scope_out(scope, "scope")
                return None
            if entry.expires_at is None or _wall_clock() < entry.expires_at:
                entry.used = True
                self._hits += 1
                return answer
            return None
        _convert.scope_out(scope, "scope")  # a wrong question is wrong for every secret
        return None if is_well_formed(secret) else _MALFORMED

    async def verify(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` may do what needs `scope`; None needs none.

        From memory if it can, else the service is asked, once for all verifies that begin in the
        same turn of the event loop. `timeout_seconds` can only shorten the verifier's own bound.
        Never fails because of what was presented. Raises an error of `latchkey.errors`, mostly
        Unavailable, when there is no safe answer: then the holder is not allowed.

        What is returned may be given to others as well: do not change it.
        """
        answer = self.verify_nowait(secret, scope)
        if answer is not None:
            return answer
        text = _convert.secret_out(secret)
        timeout = self._timeout_seconds
        if timeout_seconds is not None:
            timeout = min(timeout, timeout_seconds)
        checked_timeout(timeout)
        if self._remembers:
            self._watcher.start()
        self._misses += 1
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        answer = await self._batcher.ask(text, scope, end)
        if answer is None:
            left = end - loop.time()
            if left <= 0:
                raise late("Verify")
            answer = await self._client.verify(text, scope, timeout_seconds=left)
        self._remember(text, scope, answer)
        return answer

    def _remember(self, secret: str, scope: Scope | None, answer: Verification) -> None:
        now = boottime()
        if now >= self._lease.end:
            return  # nobody promises to tell what changes
        # Half of the time to all of it, so that answers that came together, as after a start, are
        # not asked for again together.
        keep_until = now + self._memory_seconds * random.uniform(0.5, 1.0)  # noqa: S311 - a spread
        entry = remembered(answer, scope, keep_until)
        if entry is not None:
            position = Position(answer.revision, answer.mark)
            self._memory.admit(sha256(secret.encode()).digest(), entry, position)

    def stats(self) -> VerifierStats:
        """Return how it is doing: whether it answers from memory, why not, and how much."""
        left = max(0.0, self._lease.end - boottime())
        watcher, subscription = self._watcher, self._subscription
        reason: str | None = None
        if not self._remembers:
            reason = "The memory is switched off (memory_entries=0)."
        elif left == 0.0:
            reason = watcher.fallback_reason
        return VerifierStats(
            watching=left > 0.0,
            fallback_reason=reason,
            lease_remaining_seconds=left,
            applied_revision=self._memory.position.revision,
            entries=len(self._memory),
            hits=self._hits,
            misses=self._misses,
            batches=self._batcher.batches,
            invalidations=subscription.invalidations,
            resets=subscription.resets,
            reconnects=watcher.reconnects,
        )

    async def close(self) -> None:
        """Stop to watch, and close the connection if it is the verifier's own. Safe to repeat.

        The service is told that nothing is answered from memory any more, for half a second at
        most: Deletes then need not wait for it.
        """
        await self._watcher.close()
        if self._owns_client:
            await self._client.close()

    def forked(self) -> None:
        """Answer no more from memory: this process is a child that only has a copy of it.

        For the library's own use. The parent acknowledges deletions for its own memory alone.
        """
        self._watcher.forked()

    async def __aenter__(self) -> Self:
        if self._remembers:
            self._watcher.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
