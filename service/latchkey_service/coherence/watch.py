"""Serves clients that answer from memory under this process's lease (coherence rules 6 and 7).

Each stream has a `Watcher`, which is pure: what its client said, and what it is to be told next.
Nothing is queued for a client: what it has not been told yet is read from the memory's history at
the moment that it takes it, so that a slow one costs no more memory than a fast one.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from latchkey_service.coherence.membership import Membership
from latchkey_service.coherence.subleases import SubLease
from latchkey_service.errors import Overloaded, Unavailable, WatcherSilent, WatchRefused

__all__ = ["Closing", "Event", "Grant", "Invalidation", "Request", "Reset", "Watcher", "Watchers"]

# Streams to a process. Each costs some 60 kB and, when nothing changes, a message each second.
WATCHERS_MAX = 10_000
# In leases: a client asks at least once in each. One that has not been heard of for so long holds
# none, and is dropped.
SILENT_LEASES = 3
# A client is asked to move to a new stream at this share of a connection's age, before the
# connection is ended under it. At different times, so that not all move at once.
MOVE_FROM, MOVE_TO = 0.75, 0.85
# No revision is as low.
BEFORE_ALL = -1


class Request(NamedTuple):
    """What a client says."""

    applied_revision: int
    number: int
    released: bool


class Invalidation(NamedTuple):
    """What was applied since the client was last told."""

    revision: int
    token_ids: list[str]


class Grant(NamedTuple):
    """A sub-lease, in answer to the request of this number."""

    revision: int
    number: int
    lease_seconds: float


class Reset(NamedTuple):
    """The client has to begin anew, at this revision."""

    revision: int


class Closing(NamedTuple):
    """The client has to move to a new stream: the server is about to stop, or this one is old."""


Event = Invalidation | Grant | Reset | Closing


class Watcher:
    """One stream. Times are seconds on the process's clock."""

    def __init__(self, membership: Membership[Any]) -> None:
        self._membership = membership
        self.lease = SubLease()
        self.heard = -math.inf
        """When its client last said something."""
        self.released = False
        # Up to which revision it was told what to drop; None before its first message.
        self._sent: int | None = None
        self._reset = False
        self._wanted = 0
        self.closing = False
        """Whether its client is to move, and is granted nothing any more."""
        self._told_closing = False

    @property
    def wants_grant(self) -> bool:
        """Whether its client has asked for a grant that it has not got yet."""
        return self._wanted > 0

    def hear(self, request: Request, now: float) -> None:
        """Take in what the client says."""
        self.heard = now
        memory, subleases = self._membership.memory, self._membership.subleases
        if request.released:
            self.released = True
            subleases.release(self.lease)
        if self._sent is None:
            # One that is ahead of us is told again what it has applied already, which does no harm.
            self._sent = min(request.applied_revision, memory.applied)
            if request.applied_revision == 0 and memory.applied > 0:
                # Its memory is empty. There is no need to tell it what to drop, but for where to
                # begin: a Reset.
                self._sent = BEFORE_ALL
        if self._reset and request.applied_revision > self._sent:
            # Said before it heard of the Reset, of a history that is no more.
            self._want(request)
            return
        self._reset = False
        # Not more than it was told on this stream: of what another server, or another history of
        # a database that was set back, has called by such a number, this one knows nothing.
        subleases.acknowledge(self.lease, min(request.applied_revision, self._sent))
        self._want(request)

    def _want(self, request: Request) -> None:
        self._wanted = max(self._wanted, request.number)

    def close(self) -> None:
        """Grant no more, and say so."""
        self.closing = True

    def take(self, now: float) -> list[Event]:
        """Return what to send next, in this order, all of it before anything else.

        A grant comes after each invalidation up to its revision, and lasts no longer than the
        process's own lease.
        """
        if self._sent is None:
            return []
        membership = self._membership
        memory = membership.memory
        events: list[Event] = []
        if membership.registered and self._sent != memory.applied:
            behind = None if self._sent > memory.applied else memory.named_since(self._sent)
            if behind is None:
                # What it confirmed before is of no use any more.
                membership.subleases.acknowledge(self.lease, 0)
                self._reset = True
                events.append(Reset(memory.applied))
            else:
                events.append(Invalidation(memory.applied, behind))
            self._sent = memory.applied
        if self.closing:
            if not self._told_closing:
                self._told_closing = True
                events.append(Closing())
        elif self._wanted and now < membership.lease_ends:
            ends = membership.lease_ends
            # Recorded before it is sent, and to the end of our own lease, which the client's,
            # counted from before it asked, cannot outlast.
            membership.subleases.grant(self.lease, self._sent, ends, now)
            events.append(Grant(self._sent, self._wanted, ends - now))
            self._wanted = 0
        return events


class Watchers:
    """All streams of a process. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        membership: Membership[Any],
        clock: Callable[[], float],
        acknowledged: Callable[[], None],
        *,
        enabled: bool,
        stream_seconds: float = math.inf,
    ) -> None:
        self._membership = membership
        self._clock = clock
        # Called when a client has confirmed something, or has let go of its lease.
        self._acknowledged = acknowledged
        self._enabled = enabled
        self._stream_seconds = stream_seconds
        self._streams: set[_Stream] = set()
        self._told = 0
        self._closing = False
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    async def serve(
        self, requests: AsyncIterator[Request], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        """Serve one stream until its client leaves.

        Raises WatchRefused, Overloaded, Unavailable when it is stopping, and WatcherSilent.
        """
        if not self._enabled:
            raise WatchRefused("This server remembers nothing, and grants no leases.")
        if self._closing:
            raise Unavailable("The server is stopping; try another one.")
        if len(self._streams) >= WATCHERS_MAX:
            raise Overloaded("Too many clients watch this server; try another one.")
        age = self._stream_seconds * random.uniform(MOVE_FROM, MOVE_TO)  # noqa: S311 - a spread
        stream = _Stream(Watcher(self._membership), self._clock(), age)
        self._streams.add(stream)
        # Reading has a task of its own: neither may hold up the other.
        reader = asyncio.create_task(self._read(requests, stream), name="watch reader")
        reader.add_done_callback(lambda _: stream.changed.set())
        try:
            while not (reader.done() or stream.watcher.released):
                stream.changed.clear()
                for event in stream.watcher.take(self._clock()):
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

    def on_news(self) -> None:
        """Tell every client what is new, grant what waits for a lease, and have the old ones move.

        One that moves opens its new stream first, and then lets go of its lease on this one: so
        Deletes need not wait for it, as they would had its connection merely been ended.
        """
        applied = self._membership.memory.applied
        news, self._told = applied != self._told, applied
        now = self._clock()
        lost = now - SILENT_LEASES * self._membership.lease_seconds
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
                stream.watcher.close()
                stream.changed.set()
            elif stream.watcher.wants_grant and not stream.watcher.closing:
                # It is we who have been silent, without a lease of our own.
                stream.watcher.heard = now
                stream.changed.set()
            elif stream.watcher.heard < lost and not stream.watcher.closing:
                stream.silent = True
                stream.changed.set()
            elif news:
                stream.changed.set()

    async def drain(self, seconds: float) -> bool:
        """Send the clients to other servers; tell whether none holds a lease any more.

        Until then the server goes on as before, but for granting. Lasts until each client has let
        go, or its lease has run out, at most so long.
        """
        self._closing = True
        for stream in self._streams:
            stream.watcher.close()
            stream.changed.set()
        give_up = self._clock() + seconds
        subleases = self._membership.subleases
        while subleases.floor(now := self._clock()) is not None and now < give_up:
            self._left.clear()
            until = min(subleases.latest_end(now), give_up)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self._left.wait()
        for stream in self._streams:
            stream.left_behind = True
            stream.changed.set()
        return subleases.floor(self._clock()) is None

    async def _read(self, requests: AsyncIterator[Request], stream: "_Stream") -> None:
        async for request in requests:
            before = stream.watcher.lease.acknowledged
            stream.watcher.hear(request, self._clock())
            if stream.watcher.released:
                self._left.set()
            if stream.watcher.lease.acknowledged != before or stream.watcher.released:
                self._acknowledged()
            if request.number or stream.watcher.released:
                stream.changed.set()


class _Stream:
    """A stream's watcher and its way to it."""

    def __init__(self, watcher: Watcher, now: float, age: float) -> None:
        self.watcher = watcher
        self.watcher.heard = now
        self.changed = asyncio.Event()
        self.sending_since = math.inf
        self.moves_at = now + age
        self.asked_to_move_at = math.inf
        self.silent = False
        self.left_behind = False
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task
