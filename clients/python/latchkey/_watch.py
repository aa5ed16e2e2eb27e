"""Keeps a verifier's lease alive over Watch streams, and finds another server when one goes.

It owns connections, tasks and waiting times; what is said on a stream and what follows from it is
decided in `_subscription`. However it fails, verifies go on: under the last grant until that is
over, and then by asking the service about each.
"""

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import grpc
from latchkey_coherence.lease import boottime
from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceStub

from latchkey import _convert
from latchkey._status import from_rpc_error
from latchkey._subscription import Stream, Subscription
from latchkey.access import Metadata
from latchkey.errors import InternalError, LatchkeyError, Unavailable

if TYPE_CHECKING:
    from latchkey_proto.v1 import token_service_pb2 as pb
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

    WatchCall = grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]

_log = logging.getLogger("latchkey")

# A server that stops hands its clients to its neighbours, and a first attempt may still reach the
# one that stops: the leases that are left last for a few of these.
RETRY_FIRST_SECONDS: Final = 0.05
# A service that is back is noticed this soon. A refused connection costs next to nothing.
RETRY_MAX_SECONDS: Final = 5.0
# When the service has no Watch, has it switched off, or refuses it to this caller: that takes a
# new release or setting to change, and should not take a restart of all its clients as well. When
# streams stay silent time after time, the last of them is listened to for so long.
UNSUPPORTED_RETRY_SECONDS: Final = 60.0
SILENCES_MAX: Final = 3
# Of a stream that lasted this long the next failure counts as a first one again.
SETTLED_SECONDS: Final = 10.0
# How long to wait for the server to hear that its grants are needed no more. If it does not, the
# next Delete waits for them to run out.
RELEASE_SECONDS: Final = 0.5

_UNSUPPORTED: Final = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)

# What grpc.aio says, as INTERNAL, of a stream that its server ended while this side was writing.
# The server's own words are lost; the next attempt, which may be luckier, has them.
_OVERTAKEN: Final = "Internal error from Core"

OpenChannel = Callable[[], tuple[grpc.aio.Channel, bool]]
"""Returns a channel for one stream, and whether it is to be closed with it."""


class Watcher:
    """Watches for one verifier, on the event loop of `start`, until `close`."""

    def __init__(
        self,
        open_channel: OpenChannel,
        subscription: Subscription,
        metadata: Callable[[], Metadata] = lambda: (),
    ) -> None:
        self.fallback_reason: str | None = None
        """Why the last attempt to watch came to nothing. None: it did not, or there was none."""
        self.reconnects = 0
        self._open_channel = open_channel
        self._metadata = metadata
        self._subscription = subscription
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._failures = 0
        # Of all streams: the one in use, one that may replace it, and those that take their leave.
        self._connections: set[_Connection] = set()
        self._farewells: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to watch, on the running event loop. Does nothing if it does already."""
        if self._closed or not (self._task is None or self._task.done()):
            return
        self._task = asyncio.create_task(self._run(), name="latchkey watch")

    def forked(self) -> None:
        """Answer no more from memory, for good, if there was a lease that may have been copied.

        Touches neither streams nor tasks, which are the parent's.
        """
        if self._task is not None:
            self._end("The process was forked. Make a verifier in each child.")

    async def close(self) -> None:
        """Answer no more from memory, tell the server so, and end. Takes a bounded time."""
        self._end("The verifier is closed.")
        task = self._task
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            return
        # First, so that no stream is opened any more.
        task.cancel()
        await asyncio.wait([task])
        await asyncio.gather(*(connection.leave() for connection in set(self._connections)))

    async def _run(self) -> None:
        try:
            await self._watch()
        except asyncio.CancelledError:
            # By close(), which says goodbye; or by the end of the event loop, which cancels all.
            self._subscription.release()
            raise
        except LatchkeyError as error:
            self._give_up(str(error))  # the client, whose target this uses, is closed
        except Exception:  # noqa: BLE001 - it is logged, and verifies go on without the memory
            self._give_up("Watching failed by a fault of the library; see the log.")
            _log.exception("watching failed, so each verify asks the service from now on")

    def _end(self, reason: str) -> None:
        self._closed = True
        self._subscription.release()
        self.fallback_reason = reason

    def _give_up(self, reason: str) -> None:
        self._end(reason)
        for connection in set(self._connections):
            connection.task.cancel()

    async def _watch(self) -> None:
        current: _Connection | None = None
        while True:
            found = await self._find(current)
            if current is not None and found is not current:
                self.reconnects += 1
                self._part_from(current)
            current = found
            await current.until(lambda stream: stream.closing)
            if boottime() - current.began >= SETTLED_SECONDS:
                self._failures = 0
            # From a server that stops to another at once: its last grant may have to last.
            if self._failures or not current.stream.closing:
                await self._pause()

    async def _find(self, current: "_Connection | None") -> "_Connection":
        """Return a stream that grants: a new one, or `current` if that was only held up."""
        silences = 0
        while True:
            if current is not None and current.is_fine():
                return current
            candidate = self._connect()
            await candidate.until(lambda stream: stream.granted or stream.closing)
            if candidate.stream.granted:
                self._tell(None)
                return candidate
            if candidate.stream.closing:
                # Its server stops, or another stream has moved the memory meanwhile.
                self._part_from(candidate)
                await self._pause()
                continue
            silences = 0 if candidate.ended else silences + 1
            self._tell(candidate.failure_text())
            if silences >= SILENCES_MAX:
                # Held up on the way, which lasts; or its server has no lease of its own, since its
                # database is away, and grants as soon as it has. To open one after the other is no
                # use in either case, and not to listen would lose the moment.
                patience = _spread(UNSUPPORTED_RETRY_SECONDS)
                if await candidate.until(lambda stream: stream.granted, patience):
                    self._tell(None)
                    return candidate
            candidate.task.cancel()
            if candidate.is_unsupported():
                await asyncio.sleep(_spread(UNSUPPORTED_RETRY_SECONDS))
            else:
                await self._pause()

    def _part_from(self, connection: "_Connection") -> None:
        """Let go of a stream's leases, and end it."""
        farewell = asyncio.create_task(connection.leave(), name="latchkey watch farewell")
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def _pause(self) -> None:
        seconds = min(RETRY_MAX_SECONDS, RETRY_FIRST_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        await asyncio.sleep(_spread(seconds))

    def _connect(self) -> "_Connection":
        channel, owned = self._open_channel()
        stream = self._subscription.open(boottime())
        connection = _Connection(stream, channel, self._metadata(), owns_channel=owned)
        self._connections.add(connection)
        connection.task.add_done_callback(lambda _: self._connections.discard(connection))
        return connection

    def _tell(self, reason: str | None) -> None:
        """Keep `reason`, and log what changes."""
        changed, self.fallback_reason = reason != self.fallback_reason, reason
        if not changed:
            return
        if reason is None:
            _log.info("watching: verifies are answered from memory")
        elif boottime() >= self._subscription.lease.end:
            _log.warning("not watching, so each verify asks the service: %s", reason)


class _Connection:
    """One Watch call, from its first message until it has ended."""

    def __init__(
        self,
        stream: Stream,
        channel: grpc.aio.Channel,
        metadata: Metadata,
        *,
        owns_channel: bool,
    ) -> None:
        self.stream = stream
        self.began = boottime()
        self.ended = False
        self._failure: LatchkeyError | None = None
        self._channel = channel
        self._metadata = metadata
        self._owns_channel = owns_channel
        # The stream may have changed: for who waits for that, and for who sends.
        self._news = asyncio.Event()
        self._work = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name="latchkey watch stream")

    async def until(
        self, reached: Callable[[Stream], bool], patience_seconds: float | None = None
    ) -> bool:
        """Wait until the stream has `reached` a state, has ended, or is late; tell whether it has.

        With `patience_seconds` it counts as late when these are over, and not before.
        """
        give_up = None if patience_seconds is None else boottime() + patience_seconds
        while not (self.ended or reached(self.stream)):
            late_at = self.stream.late_at if give_up is None else give_up
            if late_at is not None and boottime() >= late_at:
                break
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_seconds_to(late_at)):
                    await self._news.wait()
        return reached(self.stream)

    def is_fine(self) -> bool:
        """Tell whether it grants."""
        return not (self.ended or self.stream.closing or self._is_late())

    def is_unsupported(self) -> bool:
        """Tell whether trying again soon is no use."""
        return self._failure is not None and self._failure.code in _UNSUPPORTED

    def failure_text(self) -> str:
        """Return why it was of no use."""
        if self._failure is not None:
            return str(self._failure)
        if self.ended:
            return "Watch failed: the service ended the stream without a grant."
        return "Watch failed: no grant came in time. Something on the way may hold streams up."

    async def leave(self) -> None:
        """Send what is owed, give the server a moment to hear it, and end the call."""
        self._work.set()
        await asyncio.wait([self.task], timeout=RELEASE_SECONDS)
        self.task.cancel()
        await asyncio.wait([self.task])

    def _is_late(self) -> bool:
        return self.stream.late_at is not None and boottime() >= self.stream.late_at

    async def _run(self) -> None:
        try:
            self._failure = await self._exchange()
        finally:
            self.ended = True
            self._news.set()
            if self._owns_channel:
                await self._channel.close()

    async def _exchange(self) -> LatchkeyError | None:
        """Talk until the stream ends; return why, or None if that was in order."""
        call: WatchCall | None = None
        writer: asyncio.Task[None] | None = None
        try:
            stub: TokenServiceAsyncStub = TokenServiceStub(self._channel)
            call = stub.Watch(metadata=(*self._metadata, _where_this_is()))
            writer = asyncio.create_task(self._write(call), name="latchkey watch sender")
            while (message := await call.read()) is not grpc.aio.EOF:
                self.stream.receive(_convert.watch_event_in(message), boottime())
                self._work.set()
                self._news.set()
            return None
        except InternalError as error:
            return error
        except grpc.aio.AioRpcError as error:
            if error.details() == _OVERTAKEN:
                return Unavailable("Watch failed: the service ended the stream.")
            return from_rpc_error("Watch", error)
        except grpc.aio.UsageError:
            return Unavailable("Watch failed: the channel is closed.")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this task: whoever owns the channel has closed it.
            return Unavailable("Watch failed: the channel was closed.")
        finally:
            if call is not None:
                call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait([writer])

    async def _write(self, call: "WatchCall") -> None:
        # The reader learns, and tells, why a stream broke.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                self._work.clear()
                # The clock first: a lease counts from before its request was sent.
                request = self.stream.take(boottime())
                if request is not None:
                    self._news.set()
                    await call.write(_convert.watch_request_out(request))
                    if request.released:
                        await call.done_writing()
                        return
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_seconds_to(self.stream.due())):
                        await self._work.wait()


def _where_this_is() -> tuple[str, str]:
    """Return what lets operators find this process, should a Delete wait for it."""
    host = socket.gethostname().encode("ascii", "replace").decode()
    return "latchkey-client", f"{host[:64]} pid {os.getpid()}"


def _seconds_to(moment: float | None) -> float | None:
    return None if moment is None else max(0.0, moment - boottime())


def _spread(seconds: float) -> float:
    # So that who failed together does not come back together.
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
