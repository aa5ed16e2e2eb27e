"""Serves clients that answer from their caches under this process's lease (rules 6 and 7).

Each stream has a `WatchSession`, which is pure: it tracks the client's messages and decides what to
send next. Nothing is queued for a client. Invalidations are read from the cache's history when they
are sent, so a slow client uses no more memory than a fast one.

Owns the sessions. The leases of clients are kept in `client_leases`. Uses that clients report are
passed on.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from latchkey_coherence.verdict_cache import NOWHERE, Position

from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.share_questions import DrawCalls, ShareQuestions, no_calls
from latchkey_service.coherence.use_reports import UseReports
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.watch_events import (
    Closing,
    Event,
    Grant,
    Invalidation,
    ReportedUse,
    ReportReceived,
    Request,
    Reset,
)
from latchkey_service.errors import Overloaded, Unavailable, WatchRefused, WatchTimedOut

__all__ = [
    "Closing",
    "Event",
    "Grant",
    "Invalidation",
    "Request",
    "Reset",
    "WatchSession",
    "WatchSessions",
]

# Streams to a process. Each costs about 60 kB and, when nothing changes, a message each second.
WATCH_SESSIONS_MAX = 10_000
# In leases. A client requests a grant at least once in each lease. A client that has been silent
# for this long holds no lease, and its stream is ended.
SILENT_LEASES = 3
# A client is asked to move to a new stream at this share of the connection's maximum age, before
# the connection is closed. The share is random, so that not all clients move at once.
MOVE_FROM, MOVE_TO = 0.75, 0.85


class WatchSession:
    """The server's side of one stream. Times are seconds on the process's clock.

    A client is granted a lease only after it has confirmed everything that it was sent. So a client
    that stops confirming delays Deletes only until its current lease ends (rule 6). A healthy
    client confirms within a millisecond.
    """

    def __init__(self, state: VerifierState[Any], client: str = "") -> None:
        self._state = state
        self.lease = ClientLease(client)
        self.last_heard = -math.inf
        """When the client last sent a message."""
        self.released = False
        # The position up to which the client was sent invalidations. None if the client's own
        # position is not known yet; then nothing may be sent.
        self._sent: Position | None = None
        self._confirmed = False
        # The end of the process's lease when `_sent` was last the newest revision. Later revisions
        # were committed after that lease began, so their Deletes wait at least until this time.
        self._covered_until = -math.inf
        # The last revision that the client has confirmed on this stream, in this epoch.
        self._last_confirmed = 0
        # The epoch of the verifier's state in which `_sent` was sent.
        self._epoch = state.epoch
        # The client's claimed position, until it can be checked.
        self._claim: Position | None = None
        self._claimed_at = -math.inf
        # A Reset was sent, and the client has not confirmed it. Messages that the client sent
        # before it received the Reset are about another history.
        self._resetting = False
        # The client claims less than it has confirmed before, so it is sent the later invalidations
        # again.
        self._fell_back = False
        self._wanted = 0
        self.closing = False
        """Whether the client was asked to move. It gets no further grant."""
        self._closing_sent = False
        self.use_reports = UseReports()
        self.share_questions = ShareQuestions()

    @property
    def wants_grant(self) -> bool:
        """Whether the client waits for a grant that it has asked for."""
        return self._wanted > 0

    @property
    def owes_confirmation(self) -> bool:
        """Whether the client must confirm a position before it gets a grant."""
        return self._sent is not None and not self._confirmed

    @property
    def outdated(self) -> bool:
        """Whether the client has to be reset because the cache has started over."""
        return self._sent is not None and self._epoch != self._state.epoch

    @property
    def undecided(self) -> bool:
        """Whether the log has to be read before the client's position can be judged."""
        return self._claim is not None

    def receive(self, request: Request, now: float) -> None:
        """Process a message from the client."""
        self.last_heard = now
        state = self._state
        if request.released:
            self.released = True
            state.client_leases.release(self.lease)
        self._wanted = max(self._wanted, request.number)
        claim = request.applied
        if self._sent is None:
            self._claim, self._claimed_at = claim, now
        elif self._epoch != state.epoch:
            # The client does not know yet that this process has lost its history. It will be reset.
            pass
        elif self._resetting:
            # Any other message was sent before the client received the Reset, and confirms nothing.
            if claim == self._sent:
                self._confirm(claim)
            elif not claim.mark:
                # An old client, which does not know marks. Its first message may not have shown
                # that.
                self._confirmed = False
        elif state.cache.knows(claim):
            # The mark proves that the client is on this history, so its claim can be trusted.
            self._confirm(claim)
        else:
            self._claim, self._claimed_at = claim, now
            self._confirmed = False

    def close(self) -> None:
        """Ask the client to move, and send no more grants."""
        self.closing = True

    def take(self, now: float) -> list[Event]:
        """Return what to send next. The caller sends all of it, in this order, before anything
        else.

        A grant follows every invalidation up to its position, and lasts no longer than the
        process's own lease.
        """
        state = self._state
        events: list[Event] = []
        if report := self.use_reports.confirm(now):
            events.append(ReportReceived(report))
        if shares := self.share_questions.take(now):
            events.append(shares)
        if state.registered:
            self._settle(events)
        if self.closing and not self._closing_sent:
            self._closing_sent = True
            events.append(Closing())
        if self._sent is None or not state.registered:
            return events
        if self._sent == state.cache.position:
            self._covered_until = state.lease_ends
        if self._wanted and self._confirmed and not self.closing and now < state.lease_ends:
            if self.lease.ends <= now:
                # Deletes do not wait for a client without a lease, so Deletes that it does not know
                # of may have returned. It is sent those invalidations before this lease begins.
                self._invalidate(events)
            # The end of our own lease. The client's lease begins before it sent the request, so it
            # cannot last longer.
            #
            # A client with a lease gets the next grant before it is sent new invalidations.
            # Otherwise it would owe a confirmation, and during a flood of Deletes it would never
            # get a grant. But a Delete returns a lease's length after its commit (rule 8), and the
            # stream may break right after the grant. So this lease ends before a Delete
            # whose invalidation the client lacks can return.
            ends = min(state.lease_ends, self._covered_until)
            if ends > now and ends >= self.lease.ends:
                # Recorded before it is sent.
                state.client_leases.grant(self.lease, self._sent.revision, ends)
                events.append(Grant(self._sent, self._wanted, ends - now))
                self._wanted = 0
                # An empty cache owes no confirmation of its first position, so one grant may come
                # before it. A client without marks never confirms, and gets no other grant.
                if self._resetting:
                    self._confirmed = False
        # While a client requests a grant and owes a confirmation, it is sent nothing more.
        # Otherwise it might always owe a confirmation.
        if not self._wanted or self._confirmed or self._fell_back:
            self._fell_back = False
            self._invalidate(events)
        return events

    def _settle(self, events: list[Event]) -> None:
        """Determine the client's position, and reset the client if it is not on this history."""
        state = self._state
        claim = self._claim
        if self._sent is not None and self._epoch != state.epoch:
            self._reset(events)
        elif claim is not None:
            if state.cache.knows(claim):
                if self._sent is None:
                    self._sent, self._epoch = claim, state.epoch
                self._confirm(claim)
            elif not (
                claim.mark
                and claim.revision > state.cache.position.revision
                and state.log_read_began <= self._claimed_at
            ):
                # A client that is ahead may have received an invalidation before this process did,
                # so the process reads its log first.
                first = self._sent is None
                self._reset(events)
                # An empty cache has nothing to drop, so it owes no confirmation.
                self._confirmed = first and claim == NOWHERE

    def _invalidate(self, events: list[Event]) -> None:
        cache = self._state.cache
        if self._sent is None or self._sent == cache.position:
            return
        named = cache.named_since(self._sent)
        if named is None:
            self._reset(events)
            return
        self._sent, self._confirmed = cache.position, False
        self._covered_until = self._state.lease_ends
        events.append(Invalidation(cache.position, named))

    def _reset(self, events: list[Event]) -> None:
        state = self._state
        # Its confirmations no longer count. The end of its lease still does.
        state.client_leases.confirm(self.lease, 0)
        self._sent, self._confirmed = state.cache.position, False
        self._covered_until = state.lease_ends
        self._epoch, self._claim, self._resetting = state.epoch, None, True
        self._last_confirmed, self._fell_back = 0, False
        events.append(Reset(self._sent))

    def _confirm(self, position: Position) -> None:
        """Record that the client has applied all up to `position`, which is on this history."""
        assert self._sent is not None, "nothing is confirmed before it was sent"  # noqa: S101 - for the type checker
        if position.revision < self._last_confirmed:
            # The client fell back because another server has reset it. Its claim confirms nothing
            # until the later invalidations have been sent again, because their Deletes may have
            # returned. This also keeps a client that claims lower and lower positions from delaying
            # every Delete.
            self._fell_back = True
            self._covered_until = -math.inf
            self._sent = position
        elif position.revision > self._sent.revision:
            # The client received more on another stream.
            self._fell_back = False
            self._sent = position
        self._last_confirmed = position.revision
        self._confirmed = position == self._sent and not self._fell_back
        self._claim, self._resetting = None, False
        self._state.client_leases.confirm(self.lease, position.revision)


class WatchSessions:
    """All streams of a process. Belongs to the event loop that it was created on."""

    def __init__(
        self,
        state: VerifierState[Any],
        clock: Callable[[], float],
        on_confirmed: Callable[[], None],
        read_log: Callable[[], None],
        *,
        enabled: bool,
        stream_seconds: float = math.inf,
        on_uses: Callable[[str, Iterable[ReportedUse]], None] = lambda _caller, _uses: None,
        draw_calls: DrawCalls = no_calls,
    ) -> None:
        self._state = state
        self._clock = clock
        # Called when a client has confirmed something or has released its lease.
        self._on_confirmed = on_confirmed
        # Called when a client may be ahead of this process.
        self._read_log = read_log
        # Called with the uses that a client reports, and the name of its caller.
        self._on_uses = on_uses
        self._draw_calls = draw_calls
        self._enabled = enabled
        self._stream_seconds = stream_seconds
        self._streams: set[_Stream] = set()
        self._closing = False
        self.lease_released = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    async def serve(
        self,
        requests: AsyncIterator[Request],
        send: Callable[[Event], Awaitable[None]],
        client: str = "",
        caller: str = "",
    ) -> None:
        """Serve one stream until its client leaves. `client` is a name for people.

        Records the uses that the client reports as those of `caller`.

        Raises WatchRefused if leases are switched off, Overloaded if there are too many streams,
        Unavailable if the server is stopping or the stream is old, and WatchTimedOut if the client
        sends nothing for too long.
        """
        if not self._enabled:
            raise WatchRefused("This server has no cache, so it grants no leases.")
        if self._closing:
            raise Unavailable("The server is stopping; try another one.")
        if len(self._streams) >= WATCH_SESSIONS_MAX:
            raise Overloaded("Too many clients watch this server; try another one.")
        age = self._stream_seconds * random.uniform(MOVE_FROM, MOVE_TO)  # noqa: S311 - jitter
        stream = _Stream(WatchSession(self._state, client), self._clock(), age)
        self._streams.add(stream)
        # Reading runs in a separate task, so that reading and sending do not block each other.
        reader = asyncio.create_task(self._read(requests, stream, caller), name="watch reader")
        reader.add_done_callback(lambda _: stream.changed.set())
        try:
            while not (reader.done() or stream.session.released):
                stream.changed.clear()
                for event in stream.session.take(self._clock()):
                    stream.sending_since = self._clock()
                    await send(event)
                stream.sending_since = math.inf
                await stream.changed.wait()
                if stream.silent:
                    raise WatchTimedOut("The client has been silent for too long.")
                if stream.must_end:
                    raise Unavailable("The stream is old, or the server is stopping; open another.")
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            stream.session.share_questions.close()
            self._streams.discard(stream)
            self.lease_released.set()

    def on_news(self, changed: bool) -> None:  # noqa: FBT001 - called back
        """Send all clients the new invalidations, issue grants that wait for a lease, and ask
        clients of old streams to move.

        A client that moves opens its new stream first, and then releases its lease on the old one.
        So Deletes need not wait for its lease, as they would if its connection were closed.
        """
        now = self._clock()
        lost = now - SILENT_LEASES * self._state.lease_seconds
        for stream in tuple(self._streams):
            if stream.sending_since < lost:
                # The client does not read, so nothing can be sent to it.
                stream.task.cancel()
            elif stream.asked_to_move_at < lost:
                # The client's lease has ended by now.
                stream.must_end = True
                stream.changed.set()
            elif stream.moves_at <= now:
                stream.moves_at, stream.asked_to_move_at = math.inf, now
                stream.session.close()
                stream.changed.set()
            elif (
                stream.session.wants_grant
                and not stream.session.owes_confirmation
                and not stream.session.closing
            ):
                # The silence was ours: the process had no lease to grant from.
                stream.session.last_heard = now
                stream.changed.set()
            elif stream.session.last_heard < lost and not stream.session.closing:
                stream.silent = True
                stream.changed.set()
            elif (
                changed
                or stream.session.undecided
                or stream.session.outdated
                or stream.session.use_reports.unconfirmed
            ):
                stream.changed.set()

    async def drain(self, seconds: float) -> bool:
        """Send the clients to other servers. Return whether no client holds a lease any more.

        Meanwhile the server continues to serve, but sends no more grants. Returns when every
        client has released its lease or the lease has expired, after at most `seconds`.
        """
        self._closing = True
        for stream in self._streams:
            stream.session.close()
            stream.changed.set()
        give_up = self._clock() + seconds
        client_leases = self._state.client_leases
        while client_leases.floor(now := self._clock()) is not None and now < give_up:
            self.lease_released.clear()
            until = min(client_leases.latest_end(now), give_up)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self.lease_released.wait()
        for stream in self._streams:
            stream.must_end = True
            stream.changed.set()
        return client_leases.floor(self._clock()) is None

    async def _read(self, requests: AsyncIterator[Request], stream: "_Stream", caller: str) -> None:
        async for request in requests:
            before = stream.session.lease.confirmed
            now = self._clock()
            # First, because `released` ends the stream.
            if request.report and stream.session.use_reports.accept(
                request.report, request.use_count, now
            ):
                self._on_uses(caller, request.uses)
            questions = stream.session.share_questions
            questions.receive(request, self._draw_calls, stream.changed.set)
            stream.session.receive(request, now)
            if stream.session.released:
                self.lease_released.set()
            if stream.session.lease.confirmed != before or stream.session.released:
                self._on_confirmed()
            # A grant or the next invalidation may have waited for this confirmation.
            stream.changed.set()
            if stream.session.undecided:
                self._read_log()


class _Stream:
    """A session with the task and the flags that serve its stream."""

    def __init__(self, session: WatchSession, now: float, age: float) -> None:
        self.session = session
        self.session.last_heard = now
        self.changed = asyncio.Event()
        self.sending_since = math.inf
        self.moves_at = now + age
        self.asked_to_move_at = math.inf
        self.silent = False
        self.must_end = False
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task
