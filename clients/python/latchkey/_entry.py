"""Builds the cache entry of one secret: all answers that it may need.

This module decides which answers are worth caching. It also derives the answers to questions that
the service was not asked, with the code by which the service decides.
"""

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final

from latchkey_coherence import verdict as rules
from latchkey_coherence.rate import RateLimit, Share
from latchkey_coherence.verdict import Networks, decide_live
from latchkey_coherence.verdict_cache import Entry

from latchkey._shares import core_limit
from latchkey.models import Scope, Verdict, Verification

# Not UNKNOWN and MALFORMED. They name no token, so no invalidation would ever end such an entry.
# Every change that could revive one of these tokens names it in an invalidation.
_FINAL: Final = (Verdict.DELETED, Verdict.DISABLED, Verdict.EXPIRED)
_LIVE: Final[Mapping[rules.Verdict, Verdict]] = MappingProxyType(
    {
        rules.Verdict.VALID: Verdict.VALID,
        rules.Verdict.INSUFFICIENT_SCOPE: Verdict.INSUFFICIENT_SCOPE,
        rules.Verdict.ADDRESS_NOT_ALLOWED: Verdict.ADDRESS_NOT_ALLOWED,
        rules.Verdict.INSUFFICIENT_PERMISSIONS: Verdict.INSUFFICIENT_PERMISSIONS,
    }
)
# Levels, as the contract numbers them. None: no scope is required.
_LEVELS: Final[Mapping[Scope | None, int]] = MappingProxyType(
    {None: 0, Scope.READ: 1, Scope.WRITE: 2}
)


class CacheEntry(Entry):
    """The answers for one secret. Those that are VALID are ready: a verify builds nothing."""

    __slots__ = (
        "deleted",
        "disabled",
        "expires",
        "expires_at",
        "idle",
        "last_use",
        "live",
        "networks",
        "permissions",
        "read",
        "ready_read",
        "ready_write",
        "reported",
        "scope",
        "share",
        "uses",
    )

    def __init__(
        self,
        token_id: str,
        read: Verification,
        expires_at: float | None,
        keep_until: float,
    ) -> None:
        super().__init__(token_id, keep_until)
        self.read = read
        """The answer if READ or no scope is required, and nothing else decides. Every token has at
        least READ."""
        self.ready_read: Verification | None = read
        """The answer that counts as a use if READ or no scope, and no permission, is required.
        None: more than that decides, or the answer is not VALID."""
        self.ready_write: Verification | None = read
        """The same if WRITE is required."""
        self.expires_at = expires_at
        """POSIX seconds from which the service is asked again. None: never.

        Only one clock, the service's, decides whether a token has expired.
        """
        self.uses = 0
        """How often it has answered VALID or, if it is final, anything. Any thread may count."""
        self.last_use = 0.0
        """When it last did. In seconds of `boottime`."""
        self.idle = True
        """Whether `UseLog` has no note of uses that are not reported yet."""
        self.reported = 0
        """How many of `uses` are reported. For UseLog only."""
        self.live = False
        """Whether the answer depends on the question. If not, `read` answers every question."""
        self.deleted = self.disabled = False
        self.expires = float("inf")
        self.scope = 0
        self.networks: Networks | None = None
        self.permissions: frozenset[str] | None = None
        self.share: Share | None = None
        """The calls that this client may accept. None: the token has no rate limit."""

    @property
    def final(self) -> bool:
        """Whether every answer is that the token has ended."""
        return self.read.verdict in _FINAL

    def answer(
        self, scope: Scope | None, client_address: str, permissions: Collection[str]
    ) -> Verification:
        """Return the answer to any question, apart from the rate limit.

        `expires_at` is for the caller to check.
        """
        if not self.live:
            return self.read
        verdict = _LIVE[decide_live(self, _LEVELS[scope], client_address, permissions)]
        return _answer(verdict, self.read)


def cache_entry(
    answer: Verification,
    scope: Scope | None,
    keep_until: float,
    client_address: str = "",
    permissions: Collection[str] = (),
    share_of: Callable[[str, RateLimit], Share] = Share,
) -> CacheEntry | None:
    """Return the entry for the service's `answer` to a question, or None if it is not cacheable.

    The entry is valid until `keep_until`, in seconds of `boottime`. `share_of` returns the share of
    a token under a limit.
    """
    token = answer.token
    if token is None or answer.details_omitted:
        # Without the networks, the verdict would apply to every address.
        return None
    if answer.verdict in _FINAL:
        # Without an expiry: after EXPIRED, this machine's clock must not make it VALID again.
        return CacheEntry(token.id, answer, None, keep_until)
    level = _LEVELS.get(token.scope)
    decided = answer.verdict
    if decided is Verdict.RATE_LIMITED and token.rate_limit is not None:
        # The limit comes last, so everything else permits the token.
        decided = Verdict.VALID
    if decided not in _LIVE.values() or not level:
        return None
    entry = CacheEntry(token.id, answer, _posix(token.expire_time), keep_until)
    entry.live = True
    entry.scope = level
    try:
        entry.networks = Networks(token.allowed_networks) if token.allowed_networks else None
    except ValueError:
        # A notation that this version does not know. Ask the service each time.
        return None
    entry.permissions = frozenset(token.permissions) if token.permissions else None
    if token.rate_limit is not None:
        limit = core_limit(token.rate_limit)
        if limit is None:
            # A limit that this version does not know. Ask the service each time.
            return None
        entry.share = share_of(token.id, limit)
    if entry.answer(scope, client_address, permissions).verdict is not decided:
        # This version and the service disagree about the rules. Ask the service each time.
        return None
    entry.read = entry.answer(Scope.READ, "", ())
    is_ready = entry.networks is None and entry.share is None
    entry.ready_read = entry.read if is_ready else None
    entry.ready_write = entry.read if is_ready and token.scope is Scope.WRITE else None
    return entry


def _answer(verdict: Verdict, like: Verification) -> Verification:
    if verdict is like.verdict:
        return like
    return Verification(verdict=verdict, token=like.token, revision=like.revision, mark=like.mark)


def _posix(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()
