"""Combines the Watch streams of one cache into a lease. Pure; the clock is passed in.

This module is the client's part of coherence rules 6, 7 and 12:

- Apply a change, then acknowledge it, then extend the lease.
- Count a lease from before its request was sent.
- Use the grants of one stream at a time.
- Start over if the server follows another history.

It does no I/O. `_watch` connects it to the service. All times are seconds of
`latchkey_coherence.lease.boottime`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from latchkey_coherence.lease import client_lease_end
from latchkey_coherence.verdict_cache import NOWHERE, Position, VerdictCache

from latchkey._entry import CacheEntry
from latchkey._shares import ShareLog, ShareQuestion, SharesReceived
from latchkey._uses import UseLog, UseReport

# The share of the lease that is left when the next grant is requested. It is random, so that a
# thousand clients of one server do not send their requests at the same moments. A smaller share
# would save messages, but leave too little time to find another stream if this one has fallen
# silent.
ASK_SHARE_MIN: Final = 0.35
ASK_SHARE_MAX: Final = 0.5
# The minimum time between requests, for a server that grants very short leases.
ASK_GAP_SECONDS: Final = 0.1
# How long a new stream may take until its first grant. That includes the connection and a server
# that has to renew its own lease. A proxy that buffers streams never delivers the grant.
FIRST_GRANT_SECONDS: Final = 2.0
# A requested grant is late when only this share of the remaining lease is left. That share is
# reserved for finding another stream.
LATE_SHARE: Final = 0.5
# The minimum time to wait for a further grant, even if the lease is about to end.
NEXT_GRANT_SECONDS_MIN: Final = 0.2
# Longer than any real grant. Bounds the damage that a faulty server can do.
LEASE_SECONDS_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """A message from the client: its applied position, and perhaps a request for a grant."""

    applied: Position
    number: int = 0
    """The number of the requested grant. 0: no grant requested."""
    released: bool = False
    report: UseReport | None = None
    """Uses of cached answers. A request with a report asks for nothing and releases nothing."""
    shares: ShareQuestion | None = None
    """A question for calls. A request with one asks for no grant and releases nothing."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """Names tokens to evict."""

    position: Position
    token_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """Permits cached answers for `seconds`, counted from the request with that number."""

    position: Position
    number: int
    seconds: float
    imported_prefixes: tuple[str, ...] = ()
    """The prefixes of the imported secrets that the server accepts. An empty one accepts any."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Empties the cache and ends the lease."""

    position: Position


@dataclass(frozen=True, slots=True)
class Closing:
    """Ends the stream's grants: the server is about to stop, or wants the client to move."""


@dataclass(frozen=True, slots=True)
class UsesReceived:
    """Confirms the reports of uses up to this number."""

    number: int


Event = Invalidation | Grant | Reset | Closing | UsesReceived | SharesReceived


class Lease:
    """The time until which cached answers may be given."""

    # A separate small object, because every verify reads it.
    __slots__ = ("__weakref__", "end")

    def __init__(self) -> None:
        self.end = -math.inf

    def drop(self) -> None:
        """Stop giving cached answers until the next grant."""
        self.end = -math.inf


class Subscription:
    """A cache, its lease, and the one stream whose grants count."""

    def __init__(self, cache: VerdictCache[CacheEntry], randomness: Callable[[], float]) -> None:
        self.cache = cache
        self.lease = Lease()
        self.uses = UseLog(self._draw)
        self.shares = ShareLog()
        self.invalidations = 0
        self.resets = 0
        self._randomness = randomness
        self.imported_prefixes: tuple[str, ...] | None = None
        """As the last grant that counted stated them. None: none has yet."""
        self._granting: Stream | None = None
        # Increases when the cache starts over or all grants are released. The state that the
        # servers of other streams have of the cache is then wrong.
        self._epoch = 0

    def open(self, now: float) -> "Stream":
        """Return a new stream. Its first request is due."""
        return Stream(self, now)

    def release(self) -> None:
        """Drop the lease, and have every stream that requested a grant release it."""
        self.lease.drop()
        # A stream may have requested its first grant. That grant must not revive the lease.
        self._epoch += 1
        if self._granting is not None:
            self._granting.hand_on()
            self._granting = None

    # The other methods are for Stream only.

    def apply(self, position: Position, token_ids: Iterable[str]) -> bool:
        """Evict `token_ids` and advance to `position`.

        Returns False if the cache knows that revision by another mark. The server then follows
        another history, and the cache has to start over.
        """
        if not self.cache.agrees(position):
            return False
        self.cache.apply(position, token_ids)
        return True

    def start_over(self, position: Position) -> None:
        """Empty the cache and begin at `position`, without a lease (coherence rule 12).

        A lease only permits answers from the history that it was granted for, and this may be
        another history. The grants of the other streams therefore no longer count.
        """
        self._epoch += 1
        self.lease.drop()
        self.cache.reset(position)

    def extend(self, stream: "Stream", end: float) -> None:
        """Use `stream`'s grant until `end`, and no other stream's."""
        if self._granting is not stream:
            if self._granting is not None:
                self._granting.retire()
            self._granting = stream
        # The later of two streams' ends would be wrong: the server of the old stream stops waiting
        # for us.
        self.lease.end = end

    def granted_by(self, stream: "Stream") -> bool:
        """Return whether the current lease, if any, comes from `stream`."""
        return self._granting is stream

    @property
    def epoch(self) -> int:
        """Return the current epoch. Grants of streams from an earlier epoch do not count."""
        return self._epoch

    def ask_share(self) -> float:
        """Return the share of a lease that is left when the next one is requested."""
        return ASK_SHARE_MIN + (ASK_SHARE_MAX - ASK_SHARE_MIN) * self._draw()

    def _draw(self) -> float:
        return self._randomness()


class Stream:
    """One Watch stream from its client's point of view.

    The driver has three duties. It sends what `take` returns, without delay, once `due` has passed.
    It passes each received message to `receive`, in order. It opens another stream after `closing`
    or `late_at`.
    """

    def __init__(self, subscription: Subscription, now: float) -> None:
        self.granted = False
        """Whether the stream has ever extended the lease."""
        self.closing = False
        """Whether the stream has to be replaced, for example because its server is stopping."""
        self.late_at: float | None = now + FIRST_GRANT_SECONDS
        """When to give up waiting for the requested grant."""
        self._subscription = subscription
        self._epoch = subscription.epoch
        self._number = 0
        self._asked_at: float | None = None  # when the open request was made
        self._ask_at: float | None = now
        self._end = -math.inf
        # The cache's position when this stream opened or last moved it. The server sends the
        # changes after that position.
        self._left_at = NOWHERE
        self._owes_ack = False
        self._owes_release = False
        self._retired = False
        # Reports that were sent on this stream, by the number of the last one.
        self._reported = 0
        # The number of the last question for calls that was sent on this stream.
        self._asked_shares = 0
        # Whether the stream reports the remaining uses before its release, and since when.
        self._hands_on = False
        self._handing_since: float | None = None

    def due(self) -> float | None:
        """Return when `take` has a message to send, or None if it has none until a message
        arrives.
        """
        self._notice_other_history()
        if self._owes_ack or self._owes_release:
            return -math.inf
        due = [self._ask_at]
        if self._may_report():
            due += [self._subscription.uses.due(), self._subscription.shares.due()]
        return min((at for at in due if at is not None), default=None)

    def take(self, now: float) -> Request | None:
        """Return the request to send, or None. `now` must have been read just before."""
        self._notice_other_history()
        applied = self._subscription.cache.position
        if self._retired:
            return self._take_last(applied, now)
        asks = self._ask_at is not None and now >= self._ask_at
        if not asks and not self._owes_ack:
            return self._take_other(applied, now)
        self._owes_ack = False
        if not asks:
            return Request(applied)
        if not self._number:
            self._left_at = applied
        self._number += 1
        self._asked_at, self._ask_at = now, None
        if self.granted:
            patience = (self._end - now) * (1 - LATE_SHARE)
            self.late_at = now + max(patience, NEXT_GRANT_SECONDS_MIN)
        return Request(applied, number=self._number)

    def receive(self, event: Event | None, now: float) -> None:
        """Handle a message from the server. None stands for a message of an unknown type."""
        self._notice_other_history()
        subscription = self._subscription
        if isinstance(event, SharesReceived):
            if not self._retired:
                subscription.shares.receive(event)
            return
        if isinstance(event, UsesReceived):
            if self._reported:
                subscription.uses.confirm(min(event.number, self._reported), now)
            return
        if self._retired:
            return  # another stream has taken over
        match event:
            case Invalidation():
                self._receive_invalidation(event, now)
            case Grant():
                self._receive_grant(event, now)
            case Reset():
                self._reset(event.position, now)
                subscription.resets += 1
                self._owes_ack = True
            case Closing():
                self.closing = True
                self._asked_at = self._ask_at = self.late_at = None
            case None:
                # From a newer server. Emptying the cache is safe, whatever the message means.
                subscription.cache.reset(subscription.cache.position)
                subscription.resets += 1

    def ended(self, *, cleanly: bool, now: float) -> None:
        """Handle the end of the stream. `cleanly`: the server has read everything.

        A server that ends a stream with OK has read `released`, which is the last message.
        """
        if self._reported:
            if cleanly and self._retired and not self._owes_release:
                self._subscription.uses.confirm(self._reported, now)
            else:
                self._subscription.uses.lose()
            self._reported = 0
        self._subscription.shares.lose(self._asked_shares)

    def hand_on(self) -> None:
        """Retire the stream, and report the remaining uses before the release."""
        self._hands_on = True
        self.retire()

    def retire(self) -> None:
        """Ignore further grants of this stream, and release them at its server."""
        if self._retired:
            return
        self._retired = True
        # Also release a grant that is still in transit.
        self._owes_release = self._number > 0
        self._owes_ack = False
        self._asked_at = self._ask_at = self.late_at = None
        self._subscription.shares.lose(self._asked_shares)

    def _may_report(self) -> bool:
        """Return whether the stream may report uses: its server is the one that grants."""
        return self._subscription.granted_by(self) and not self._retired

    def _take_other(self, applied: Position, now: float) -> Request | None:
        """Return a report of uses or a question for calls, or None if neither is due."""
        if not self._may_report():
            return None
        if report := self._subscription.uses.take(now):
            return self._reports(applied, report)
        question = self._subscription.shares.take(now)
        if question is None:
            return None
        self._asked_shares = question.number
        return Request(applied, shares=question)

    def _reports(self, applied: Position, report: UseReport | None) -> Request | None:
        if report is None:
            return None
        self._reported = report.number
        return Request(applied, report=report)

    def _take_last(self, applied: Position, now: float) -> Request | None:
        """Return the next request of a retired stream: at most the remaining uses and a release."""
        if not self._owes_release:
            return None
        if self._hands_on:
            if self._handing_since is None:
                self._handing_since = now
            report = self._subscription.uses.take_last(now, self._handing_since)
            if report is not None:
                return self._reports(applied, report)
        self._owes_release = False
        return Request(applied, released=True)

    def _receive_invalidation(self, event: Invalidation, now: float) -> None:
        """Apply an invalidation, unless its server may follow another history than the cache.

        Two streams can be open to servers on different histories. Each server names the changes
        since this stream last moved the cache. If the other stream has moved the cache since then,
        this server may not know of that change. Its position must then not become the cache's,
        because answers read at that position would be accepted (coherence rule 12).
        """
        subscription, cache = self._subscription, self._subscription.cache
        position = event.position
        subscription.invalidations += 1
        apart = cache.position != self._left_at and not cache.knows(position)
        if apart and position.revision > cache.position.revision:
            # Evicting is safe, whichever history names the tokens.
            cache.apply(cache.position, event.token_ids)
            if subscription.granted_by(self):
                self._reset(position, now)
            else:
                self._leave()
                return
        elif not subscription.apply(position, event.token_ids):
            self._reset(NOWHERE, now)
        elif cache.position == position or cache.knows(position):
            # Servers without marks have no known position.
            self._left_at = position
        self._owes_ack = True

    def _reset(self, position: Position, now: float) -> None:
        """Empty the cache and set it to `position`. Earlier grants of this stream no longer count.

        An open request stays open. The server answers it after the Reset, for the new history.
        """
        self._subscription.start_over(position)
        self._left_at = position
        self._epoch = self._subscription.epoch
        self._end = -math.inf
        if self._asked_at is None and not self.closing:
            self._ask_at = now

    def _notice_other_history(self) -> None:
        """Leave the stream if another one has reset the cache, or after `release`.

        This stream's server assumes the cache's old position, so it might not name all tokens to
        evict. A new stream reports the current position.
        """
        if self._epoch != self._subscription.epoch and not self._retired:
            self._leave()

    def _leave(self) -> None:
        """Retire the stream, and have its driver open another one."""
        self.retire()
        self.closing = True

    def _receive_grant(self, grant: Grant, now: float) -> None:
        if self._asked_at is None or grant.number != self._number:
            return  # answers no open request
        if not self._subscription.cache.knows(grant.position):
            return  # a different history, or an unknown position
        asked_at, self._asked_at = self._asked_at, None
        self._subscription.imported_prefixes = grant.imported_prefixes
        end = client_lease_end(asked_at, min(grant.seconds, LEASE_SECONDS_MAX))
        if end > now:
            # The lease never shrinks: the server honours each grant until it ends.
            self._end = max(self._end, end)
            self._subscription.extend(self, self._end)
            self.granted = True
            self.late_at = None
        length = max(end - asked_at, 0.0)
        self._ask_at = max(end - length * self._subscription.ask_share(), now + ASK_GAP_SECONDS)
