"""Keeps a verifier's lease alive over Watch streams, and moves to another server if one fails.

This module handles connections, tasks and waiting times. `_subscription` handles the protocol.
Verifies continue through every failure: from the cache until the last grant ends, and then by
asking the service each time.
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

# A stopping server sends its clients to its neighbours, but a first attempt may reach it again. The
# remaining lease lasts for a few attempts.
RETRY_FIRST_SECONDS: Final = 0.05
# Maximum delay until a service that is back is detected. A refused connection costs almost nothing.
RETRY_MAX_SECONDS: Final = 5.0
# Used if the service does not have Watch, has switched it off, or denies it to this caller. Such a
# refusal lasts until a new release or setting, after which clients should not need a restart. The
# last of several silent streams is kept for this long, too.
UNSUPPORTED_RETRY_SECONDS: Final = 60.0
SILENCES_MAX: Final = 3
# After a stream that lasted this long, the retry delay starts from its minimum again.
SETTLED_SECONDS: Final = 10.0
# How long to wait until the server has read the release. If it has not, the next Delete waits for
# the grants to end.
RELEASE_SECONDS: Final = 0.5

_UNSUPPORTED: Final = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)

# grpc.aio's INTERNAL error for a stream that the server ended while the client was writing. The
# server's own message is lost, but the next attempt may receive it.
_OVERTAKEN: Final = "Internal error from Core"

OpenChannel = Callable[[], tuple[grpc.aio.Channel, bool]]
"""Returns a channel for one stream, and whether to close it after that stream."""


class Watcher:
    """Watches for one verifier, on the event loop of `start`, until `close`."""

    def __init__(
        self,
        open_channel: OpenChannel,
        subscription: Subscription,
        metadata: Callable[[], Metadata] = lambda: (),
    ) -> None:
        self.fallback_reason: str | None = None
        """Why the last attempt to watch failed. None: it succeeded, or there was none."""
        self.reconnects = 0
        self._open_channel = open_channel
        self._metadata = metadata
        self._subscription = subscription
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._failures = 0
        # All open streams: the one in use, its possible successor, and those that are leaving.
        self._connections: set[_Connection] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start watching on the running event loop. Does nothing if already watching."""
        if self._closed or not (self._task is None or self._task.done()):
            return
        self._task = asyncio.create_task(self._run(), name="latchkey watch")

    def wake(self) -> None:
        """Look whether a stream has a message to send, such as a question for calls.

        Event loop only.
        """
        for connection in self._connections:
            connection.wake()

    def forked(self) -> None:
        """Permanently stop giving cached answers, because a fork may have copied a lease.

        Does not touch streams and tasks, which belong to the parent.
        """
        if self._task is not None:
            self._end("The process was forked. Create a verifier in each child process.")

    async def close(self) -> None:
        """Stop giving cached answers, release the grants, and stop. Takes a bounded time."""
        self._end("The verifier is closed.")
        task = self._task
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            return
        # Cancel this task first, so that it opens no further stream.
        task.cancel()
        await asyncio.wait([task])
        await asyncio.gather(*(connection.leave() for connection in set(self._connections)))

    async def _run(self) -> None:
        try:
            await self._watch()
        except asyncio.CancelledError:
            # Cancelled by close(), which releases the grants, or by the end of the event loop.
            self._subscription.release()
            raise
        except LatchkeyError as error:
            self._give_up(str(error))  # the client is closed
        except Exception:  # noqa: BLE001 - logged, and verifies continue without the cache
            self._give_up("Watching failed because of a library bug. See the log.")
            _log.exception("watch failed; from now on each verify asks the service")

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
                self._release(current)
            current = found
            await current.until(lambda stream: stream.closing)
            if boottime() - current.began >= SETTLED_SECONDS:
                self._failures = 0
            # Move from a stopping server without a pause, because only its last grant is left.
            if self._failures or not current.stream.closing:
                await self._pause()

    async def _find(self, current: "_Connection | None") -> "_Connection":
        """Return a stream that grants: a new one, or `current` if it has recovered."""
        silences = 0
        while True:
            if current is not None and current.is_usable():
                return current
            candidate = self._connect()
            await candidate.until(lambda stream: stream.granted or stream.closing)
            if candidate.stream.granted:
                self._report(None)
                return candidate
            if candidate.stream.closing:
                # Its server is stopping, or another stream has moved the cache meanwhile.
                self._release(candidate)
                await self._pause()
                continue
            silences = 0 if candidate.ended else silences + 1
            self._report(candidate.failure_text())
            if silences >= SILENCES_MAX:
                # Either a proxy buffers the streams, or the server has no lease because its
                # database is unreachable, and sends a grant once it has one. Opening more streams
                # helps in neither case, but listening catches the first grant.
                patience = _spread(UNSUPPORTED_RETRY_SECONDS)
                if await candidate.until(lambda stream: stream.granted, patience):
                    self._report(None)
                    return candidate
            candidate.task.cancel()
            if candidate.is_unsupported():
                await asyncio.sleep(_spread(UNSUPPORTED_RETRY_SECONDS))
            else:
                await self._pause()

    def _release(self, connection: "_Connection") -> None:
        """Release the leases of a stream and end it."""
        leaving = asyncio.create_task(connection.leave(), name="latchkey watch release")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

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

    def _report(self, reason: str | None) -> None:
        """Store `reason`, and log it if it has changed."""
        changed, self.fallback_reason = reason != self.fallback_reason, reason
        if not changed:
            return
        if reason is None:
            _log.info("watching; verifies are answered from the cache")
        elif boottime() >= self._subscription.lease.end:
            _log.warning("not watching; each verify asks the service: %s", reason)


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
        # Both signal that the stream may have changed: the first to `until`, the second to
        # `_write`.
        self._changed = asyncio.Event()
        self._wake_writer = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name="latchkey watch stream")

    async def until(
        self, reached: Callable[[Stream], bool], patience_seconds: float | None = None
    ) -> bool:
        """Wait for a state that `reached` accepts. Return False if the stream ends or is late.

        `patience_seconds` replaces the stream's own limit for being late.
        """
        give_up = None if patience_seconds is None else boottime() + patience_seconds
        while not (self.ended or reached(self.stream)):
            late_at = self.stream.late_at if give_up is None else give_up
            if late_at is not None and boottime() >= late_at:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_seconds_to(late_at)):
                    await self._changed.wait()
        return reached(self.stream)

    def wake(self) -> None:
        """Look whether the stream has a message to send."""
        self._wake_writer.set()

    def is_usable(self) -> bool:
        """Return whether the stream is open and not late."""
        return not (self.ended or self.stream.closing or self._is_late())

    def is_unsupported(self) -> bool:
        """Return whether a prompt retry would be useless."""
        return self._failure is not None and self._failure.code in _UNSUPPORTED

    def failure_text(self) -> str:
        """Return why the stream did not grant."""
        if self._failure is not None:
            return str(self._failure)
        if self.ended:
            return "Watch failed: the service ended the stream without a grant."
        return "Watch failed: no grant arrived in time. A proxy may be buffering streams."

    async def leave(self) -> None:
        """Send the release, give the server a moment to read it, and end the call."""
        self._wake_writer.set()
        await asyncio.wait([self.task], timeout=RELEASE_SECONDS)
        self.task.cancel()
        await asyncio.wait([self.task])

    def _is_late(self) -> bool:
        return self.stream.late_at is not None and boottime() >= self.stream.late_at

    async def _run(self) -> None:
        try:
            self._failure = await self._exchange()
            self.stream.ended(cleanly=self._failure is None, now=boottime())
        finally:
            self.stream.ended(cleanly=False, now=boottime())
            self.ended = True
            self._changed.set()
            if self._owns_channel:
                await self._channel.close()

    async def _exchange(self) -> LatchkeyError | None:
        """Exchange messages until the stream ends. Return the error, or None for a normal end."""
        call: WatchCall | None = None
        writer: asyncio.Task[None] | None = None
        try:
            stub: TokenServiceAsyncStub = TokenServiceStub(self._channel)
            call = stub.Watch(metadata=(*self._metadata, _client_metadata()))
            writer = asyncio.create_task(self._write(call), name="latchkey watch sender")
            while (message := await call.read()) is not grpc.aio.EOF:
                self.stream.receive(_convert.watch_event_in(message), boottime())
                self._wake_writer.set()
                self._changed.set()
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
            # Nobody cancelled this task: the owner of the channel has closed it.
            return Unavailable("Watch failed: the channel was closed.")
        finally:
            if call is not None:
                call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait([writer])

    async def _write(self, call: "WatchCall") -> None:
        # The reader also gets the error of a broken stream, and returns it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                self._wake_writer.clear()
                # Read the clock first: a lease counts from before its request was sent.
                request = self.stream.take(boottime())
                if request is not None:
                    self._changed.set()
                    await call.write(_convert.watch_request_out(request))
                    if request.released:
                        await call.done_writing()
                        return
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_seconds_to(self.stream.due())):
                        await self._wake_writer.wait()


def _client_metadata() -> tuple[str, str]:
    """Return the metadata that helps operators find this process if a Delete waits for it."""
    host = socket.gethostname().encode("ascii", "replace").decode()
    return "latchkey-client", f"{host[:64]} pid {os.getpid()}"


def _seconds_to(moment: float | None) -> float | None:
    return None if moment is None else max(0.0, moment - boottime())


def _spread(seconds: float) -> float:
    # Clients that failed together must not reconnect together.
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
