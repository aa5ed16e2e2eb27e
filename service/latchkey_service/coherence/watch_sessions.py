"""Serves clients that answer from memory under this process's lease (coherence rules 6 and 7).

Each stream has a `WatchSession`, which is pure: what its client said, and what it is to be told next.
Nothing is queued for a client: what it has not been told yet is read from the memory's history at
the moment that it takes it, so that a slow one costs no more memory than a fast one.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from latchkey_coherence.memory import NOWHERE, Position

from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import Overloaded, Unavailable, WatcherSilent, WatchRefused

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

# Streams to a process. Each costs some 60 kB and, when nothing changes, a message each second.
WATCH_SESSIONS_MAX = 10_000
# In leases: a client asks at least once in each. One that has not been heard of for so long holds
# none, and is dropped.
SILENT_LEASES = 3
# A client is asked to move to a new stream at this share of a connection's age, before the
# connection is ended under it. At different times, so that not all move at once.
MOVE_FROM, MOVE_TO = 0.75, 0.85


class Request(NamedTuple):
    """What a client says."""

    applied: Position
    number: int
    released: bool


class Invalidation(NamedTuple):
    """What was applied since the client was last sent something."""

    position: Position
    token_ids: list[str]


class Grant(NamedTuple):
    """A sub-lease, in answer to the request of this number."""

    position: Position
    number: int
    lease_seconds: float


class Reset(NamedTuple):
    """The client has to start over, at this position."""

    position: Position


class Closing(NamedTuple):
    """The client has to move to a new stream: the server is about to stop, or this one is old."""


Event = Invalidation | Grant | Reset | Closing


class WatchSession:
    """One stream. Times are seconds on the process's clock.

    A client is granted a lease only after it has confirmed exactly what it was sent. So a client
    that stops confirming delays Deletes until the lease ends that it holds by then, and never again
    (rule 6). A healthy client confirms within a millisecond.
    """

    def __init__(self, state: VerifierState[Any], client: str = "") -> None:
        self._state = state
        self.lease = ClientLease(client)
        self.heard = -math.inf
        """When its client last said something."""
        self.released = False
        # The position up to which the client was sent what to drop. None: nothing was settled yet
        # about where the client stands, and so nothing may be sent.
        self._sent: Position | None = None
        self._confirmed = False
        # The end of the process's lease at a moment when nothing was newer than `_sent`. Whatever
        # is newer was committed after that lease began, and so a Delete of it waits that long.
        self._covered_until = -math.inf
        # The last revision that the client has confirmed on this stream, in this epoch.
        self._heard = 0
        # The epoch of the state in which `_sent` was sent.
        self._epoch = state.epoch
        # What the client says to have applied, as long as it is not known what to make of it.
        self._claim: Position | None = None
        self._claimed_at = -math.inf
        # A Reset was sent, and the client has not confirmed it. What it said before it heard of the
        # Reset is about another history.
        self._resetting = False
        # The client claims less than it has confirmed before: it is sent again what it has missed.
        self._fell_back = False
        self._wanted = 0
        self.closing = False
        """Whether its client is to move, and is granted nothing any more."""
        self._told_closing = False

    @property
    def wants_grant(self) -> bool:
        """Whether its client has asked for a grant that it has not got yet."""
        return self._wanted > 0

    @property
    def owes(self) -> bool:
        """Whether its client has to confirm something before it is granted anything."""
        return self._sent is not None and not self._confirmed

    @property
    def outdated(self) -> bool:
        """Whether its client has to be reset: the memory has started over."""
        return self._sent is not None and self._epoch != self._state.epoch

    @property
    def undecided(self) -> bool:
        """Whether the log has to be read before it is known where its client stands."""
        return self._claim is not None

    def receive(self, request: Request, now: float) -> None:
        """Take in what the client says."""
        self.heard = now
        state = self._state
        if request.released:
            self.released = True
            state.client_leases.release(self.lease)
        self._wanted = max(self._wanted, request.number)
        claim = request.applied
        if self._sent is None:
            self._claim, self._claimed_at = claim, now
        elif self._epoch != state.epoch:
            # It does not know yet that this process has lost its history: it will be reset.
            pass
        elif self._resetting:
            # Whatever else it says, it said before it heard of the Reset, and confirms nothing.
            if claim == self._sent:
                self._confirm(claim)
            elif not claim.mark:
                # An old client, which knows no marks. Its first message may not have shown that.
                self._confirmed = False
        elif state.memory.knows(claim):
            # The mark proves that the client is on this history, so its word may be taken.
            self._confirm(claim)
        else:
            self._claim, self._claimed_at = claim, now
            self._confirmed = False

    def close(self) -> None:
        """Grant no more, and say so."""
        self.closing = True

    def take(self, now: float) -> list[Event]:
        """Return what to send next, in this order, all of it before anything else.

        A grant comes after each invalidation up to its position, and lasts no longer than the
        process's own lease.
        """
        state = self._state
        events: list[Event] = []
        if state.registered:
            self._settle(events)
        if self.closing and not self._told_closing:
            self._told_closing = True
            events.append(Closing())
        if self._sent is None or not state.registered:
            return events
        if self._sent == state.memory.position:
            self._covered_until = state.lease_ends
        if self._wanted and self._confirmed and not self.closing and now < state.lease_ends:
            if self.lease.ends <= now:
                # Without a lease the client holds up nobody, and so Deletes may have returned that
                # it has not heard of. It hears of them before this lease begins.
                self._invalidate(events)
            # Our own lease's end, which the client's, counted from before it asked, cannot outlast.
            #
            # A client with a lease is granted the next one before it is sent what is new: it would
            # owe for that, and in a flood of Deletes would never be granted anything. But a Delete
            # is waited out a lease's length after its commit (rule 8), and the stream may break
            # right after the grant. So this one ends before any Delete of what is new can return.
            ends = min(state.lease_ends, self._covered_until)
            if ends > now and ends >= self.lease.ends:
                # Recorded before it is sent.
                state.client_leases.grant(self.lease, self._sent.revision, ends)
                events.append(Grant(self._sent, self._wanted, ends - now))
                self._wanted = 0
                # An empty memory owes no confirmation of its first position, and so one grant may
                # come before it. A client without marks never confirms, and gets no other one.
                if self._resetting:
                    self._confirmed = False
        # A client that wants a grant and owes a confirmation is sent no more until it has
        # confirmed: otherwise there might never be a moment at which it owes nothing.
        if not self._wanted or self._confirmed or self._fell_back:
            self._fell_back = False
            self._invalidate(events)
        return events

    def _settle(self, events: list[Event]) -> None:
        """Find out where the client stands; reset it where that is not on this history."""
        state = self._state
        claim = self._claim
        if self._sent is not None and self._epoch != state.epoch:
            self._reset(events)
        elif claim is not None:
            if state.memory.knows(claim):
                if self._sent is None:
                    self._sent, self._epoch = claim, state.epoch
                self._confirm(claim)
            elif not (
                claim.mark
                and claim.revision > state.memory.position.revision
                and state.log_read_began <= self._claimed_at
            ):
                # A client that is ahead may have heard of news before this process: that reads
                # its log first.
                first = self._sent is None
                self._reset(events)
                # An empty memory has nothing to drop, and so owes no confirmation.
                self._confirmed = first and claim == NOWHERE

    def _invalidate(self, events: list[Event]) -> None:
        memory = self._state.memory
        if self._sent is None or self._sent == memory.position:
            return
        named = memory.named_since(self._sent)
        if named is None:
            self._reset(events)
            return
        self._sent, self._confirmed = memory.position, False
        self._covered_until = self._state.lease_ends
        events.append(Invalidation(memory.position, named))

    def _reset(self, events: list[Event]) -> None:
        state = self._state
        # What it has confirmed is of no use any more. How long its lease runs still counts.
        state.client_leases.confirm(self.lease, 0)
        self._sent, self._confirmed = state.memory.position, False
        self._covered_until = state.lease_ends
        self._epoch, self._claim, self._resetting = state.epoch, None, True
        self._heard, self._fell_back = 0, False
        events.append(Reset(self._sent))

    def _confirm(self, position: Position) -> None:
        """Note that the client has applied all up to `position`, which is on this history."""
        assert self._sent is not None, "nothing is confirmed before it was sent"  # noqa: S101 - for the type checker
        if position.revision < self._heard:
            # It fell back, since another server has reset it. It has confirmed nothing until it is
            # sent again what it has missed, however often it says so: a Delete of that may have
            # returned. And a client that claims less and less would hold up every Delete.
            self._fell_back = True
            self._covered_until = -math.inf
            self._sent = position
        elif position.revision > self._sent.revision:
            # It heard of more on another stream.
            self._fell_back = False
            self._sent = position
        self._heard = position.revision
        self._confirmed = position == self._sent and not self._fell_back
        self._claim, self._resetting = None, False
        self._state.client_leases.confirm(self.lease, position.revision)


class WatchSessions:
    """All streams of a process. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        state: VerifierState[Any],
        clock: Callable[[], float],
        acknowledged: Callable[[], None],
        read_log: Callable[[], None],
        *,
        enabled: bool,
        stream_seconds: float = math.inf,
    ) -> None:
        self._state = state
        self._clock = clock
        # Called when a client has confirmed something, or has let go of its lease.
        self._acknowledged = acknowledged
        # Called when a client may be ahead of this process.
        self._read_log = read_log
        self._enabled = enabled
        self._stream_seconds = stream_seconds
        self._streams: set[_Stream] = set()
        self._closing = False
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    async def serve(
        self,
        requests: AsyncIterator[Request],
        send: Callable[[Event], Awaitable[None]],
        client: str = "",
    ) -> None:
        """Serve one stream until its client leaves. `client` names it, for people.

        Raises WatchRefused, Overloaded, Unavailable when it is stopping, and WatcherSilent.
        """
        if not self._enabled:
            raise WatchRefused("This server remembers nothing, and grants no leases.")
        if self._closing:
            raise Unavailable("The server is stopping; try another one.")
        if len(self._streams) >= WATCH_SESSIONS_MAX:
            raise Overloaded("Too many clients watch this server; try another one.")
        age = self._stream_seconds * random.uniform(MOVE_FROM, MOVE_TO)  # noqa: S311 - a spread
        stream = _Stream(WatchSession(self._state, client), self._clock(), age)
        self._streams.add(stream)
        # Reading has a task of its own: neither may hold up the other.
        reader = asyncio.create_task(self._read(requests, stream), name="watch reader")
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
                    raise WatcherSilent("Nothing was heard of this client for long.")
                if stream.left_behind:
                    raise Unavailable("The stream is old, or the server is stopping; open another.")
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            self._streams.discard(stream)
            self._left.set()

    def on_news(self, changed: bool) -> None:
        """Tell every client what is new, grant what waits for a lease, and have the old ones move.

        One that moves opens its new stream first, and then lets go of its lease on this one: so
        Deletes need not wait for it, as they would had its connection merely been ended.
        """
        now = self._clock()
        lost = now - SILENT_LEASES * self._state.lease_seconds
        for stream in tuple(self._streams):
            if stream.sending_since < lost:
                # It reads nothing: there is nothing to tell it any more.
                stream.task.cancel()
            elif stream.asked_to_move_at < lost:
                # It holds no lease any more.
                stream.left_behind = True
                stream.changed.set()
            elif stream.moves_at <= now:
                stream.moves_at, stream.asked_to_move_at = math.inf, now
                stream.session.close()
                stream.changed.set()
            elif (
                stream.session.wants_grant
                and not stream.session.owes
                and not stream.session.closing
            ):
                # It is we who have been silent, without a lease of our own.
                stream.session.heard = now
                stream.changed.set()
            elif stream.session.heard < lost and not stream.session.closing:
                stream.silent = True
                stream.changed.set()
            elif changed or stream.session.undecided or stream.session.outdated:
                stream.changed.set()

    async def drain(self, seconds: float) -> bool:
        """Send the clients to other servers; tell whether none holds a lease any more.

        Until then the server goes on as before, but for granting. Lasts until each client has let
        go, or its lease has run out, at most so long.
        """
        self._closing = True
        for stream in self._streams:
            stream.session.close()
            stream.changed.set()
        give_up = self._clock() + seconds
        client_leases = self._state.client_leases
        while client_leases.floor(now := self._clock()) is not None and now < give_up:
            self._left.clear()
            until = min(client_leases.latest_end(now), give_up)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self._left.wait()
        for stream in self._streams:
            stream.left_behind = True
            stream.changed.set()
        return client_leases.floor(self._clock()) is None

    async def _read(self, requests: AsyncIterator[Request], stream: "_Stream") -> None:
        async for request in requests:
            before = stream.session.lease.confirmed
            stream.session.receive(request, self._clock())
            if stream.session.released:
                self._left.set()
            if stream.session.lease.confirmed != before or stream.session.released:
                self._acknowledged()
            # A confirmation may be what a grant or the next invalidation waits for.
            stream.changed.set()
            if stream.session.undecided:
                self._read_log()


class _Stream:
    """A stream's session and its way to it."""

    def __init__(self, session: WatchSession, now: float, age: float) -> None:
        self.session = session
        self.session.heard = now
        self.changed = asyncio.Event()
        self.sending_since = math.inf
        self.moves_at = now + age
        self.asked_to_move_at = math.inf
        self.silent = False
        self.left_behind = False
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task
