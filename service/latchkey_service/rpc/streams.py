"""The path of streams: Watch, health's Watch and reflection.

Messages of a stream are parsed one by one, each after its size was checked, and none before the
caller is authorized. A stream whose messages would cost the event loop too much time is ended. A
policy change ends the streams that it no longer allows.
"""

import asyncio
import contextlib
import contextvars
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

import grpc

from latchkey_service.access.authenticator import Authenticator, check_account
from latchkey_service.access.methods import Rule, rule_of
from latchkey_service.access.origin import source_of
from latchkey_service.access.policy import ANONYMOUS, Caller
from latchkey_service.errors import Overloaded
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.call_report import CallReporter, end_with
from latchkey_service.rpc.managed_calls import parsed

__all__ = ["Streams", "current_caller"]

# The caller of the current stream.
current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller")

Parse = Callable[[bytes], Any]

# Bytes that a client may send at once on a Watch, and those that it may add per second. A message
# costs time before it is known whether its report of uses is accepted: 100 kB take about 2 ms. That
# is more than needed by a client that reports as fast as it may (`use_reports.py`): 200,000 uses at
# once and 25,000 per second, of up to 131 bytes each.
STREAM_BYTES_BURST: Final = 32 * 1024 * 1024
STREAM_BYTES_PER_SECOND: Final = 4 * 1024 * 1024
# What a message costs in addition, so that empty ones are limited too: to about 16,000 a second.
MESSAGE_BYTES: Final = 256
# Streams that need no identity, in a worker and from one address. Each takes about 20 kB. A prober
# needs one.
OPEN_STREAMS_MAX: Final = 1_000
OPEN_STREAMS_PER_ADDRESS_MAX: Final = 100


class Streams:
    """Wraps handlers. One instance per worker process."""

    def __init__(
        self,
        reporter: CallReporter,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._reporter = reporter
        self._monotonic = monotonic
        self._sleep = sleep
        self._streams: set[_Stream] = set()
        self._streams_of: Counter[str] = Counter()
        # Streams that need no identity, by address.
        self._open_streams: Counter[str] = Counter()

    def open_stream(self, path: str, behaviour: Any, parse: Parse, *, proxied: bool = False) -> Any:
        """Wrap a stream that everyone may open (health's Watch, reflection).

        Both are async generators. They carry no secrets, may last for any time, and are logged only
        if they fail. Their number is limited. `proxied` says that they come through the trusted
        proxy.
        """
        rule = rule_of(path)
        if rule.role is not None:
            raise ValueError(f"{path}: a stream that needs authorization must use `duplex`")

        async def call(data: Any, context: CallContext) -> AsyncIterator[Any]:
            start = self._monotonic()
            self._reporter.started(path)
            code = "CANCELLED"
            try:
                source = source_of(context.peer(), context.invocation_metadata(), proxied=proxied)
                with self._counted(source):
                    if isinstance(data, bytes):
                        request = parsed(rule, parse, data)
                    else:
                        request = _each_parsed(rule, parse, data)
                    # The stream may last long, and its request may be large.
                    del data
                    async for response in behaviour(request, context):
                        yield response
                code = "OK"
            except grpc.aio.AbortError:
                # The servicers abort streams only when the server stops.
                code = "UNAVAILABLE"
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                code = ""
                status, delay_seconds = self._reporter.failed(path, context, start, error)
                await self._sleep(delay_seconds)
                end_with(context, status)
            finally:
                # A client that leaves closes this generator. Its stream is reported, too.
                if code:
                    self._reporter.ended_stream(path, code)

        return call

    def duplex(
        self,
        path: str,
        behaviour: Callable[[Any, Any], Awaitable[None]],
        parse: Parse,
        authenticator: Authenticator | None,
    ) -> Any:
        """Wrap a stream (Watch) that reads and writes freely and ends when it returns.

        Like `open_stream`, but not an async generator: an abandoned generator is cleaned up some
        time later, and this stream counts against a limit.
        """
        rule = rule_of(path)

        async def call(messages: AsyncIterator[bytes], context: CallContext) -> None:
            start = self._monotonic()
            self._reporter.started(path)
            code = "CANCELLED"
            caller = ANONYMOUS
            try:
                if authenticator is not None:
                    caller = authenticator.authorize(path, context)
                    check_account(path, caller, None)
                    if caller.rates is not None and rule.role is not None:
                        caller.rates.spend(rule.role, 1, start)
                current_caller.set(caller)
                messages = self._limited(messages)
                if authenticator is None:
                    await behaviour(_each_parsed(rule, parse, messages), context)
                else:
                    with self._tracked(_Stream(authenticator, path, context), caller):
                        paced = self._paced(rule, caller, messages)
                        await behaviour(_each_parsed(rule, parse, paced), context)
                code = "OK"
            except grpc.aio.AbortError:
                # The servicers abort streams only when the server stops.
                code = "UNAVAILABLE"
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                code = ""
                status, delay_seconds = self._reporter.failed(path, context, start, error, caller)
            else:
                return
            finally:
                if code:
                    self._reporter.ended_stream(path, code)
            if delay_seconds:
                await self._reporter.delay(context, status, delay_seconds)
            end_with(context, status)

        return call

    def recheck(self) -> None:
        """End the streams that the new policy no longer allows."""
        for stream in tuple(self._streams):
            if stream.denied is not None:
                # Already ending.
                continue
            try:
                caller = stream.authenticator.authorize(stream.path, stream.context)
                check_account(stream.path, caller, None)
            except Exception as error:  # noqa: BLE001 - the others must be checked too
                # If we cannot tell whether the stream is still allowed, it ends.
                stream.denied = error
                stream.task.cancel()

    async def _limited(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield a stream's messages. Raises Overloaded if the client sends too many bytes."""
        debt, counted_at = 0.0, self._monotonic()
        async for data in messages:
            now = self._monotonic()
            debt = max(0.0, debt - (now - counted_at) * STREAM_BYTES_PER_SECOND)
            counted_at = now
            debt += len(data) + MESSAGE_BYTES
            if debt > STREAM_BYTES_BURST:
                raise Overloaded("The client sends more on this stream than any client needs.")
            yield data

    async def _paced(
        self, rule: Rule, caller: Caller, messages: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """Yield a stream's messages no faster than the caller's rate.

        Messages above the rate are read later, so flow control slows the client down. The stream
        stays open: a Delete may be waiting for its confirmations.
        """
        async for data in messages:
            while caller.rates is not None and rule.role is not None:
                wait = caller.rates.charge(rule.role, 1, self._monotonic())
                if not wait:
                    break
                await self._sleep(wait)
            yield data

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """Count a stream that needs no identity. Raises Overloaded if there are too many.

        `address`: streams with the same one share a limit; "" has none.
        """
        from_address = self._open_streams[address] if address else 0
        if (
            self._open_streams.total() >= OPEN_STREAMS_MAX
            or from_address >= OPEN_STREAMS_PER_ADDRESS_MAX
        ):
            raise Overloaded("Too many streams without an identity are open.", "WATCHES_LIMITED")
        self._open_streams[address] += 1
        try:
            yield
        finally:
            self._open_streams[address] -= 1
            if not self._open_streams[address]:
                del self._open_streams[address]

    @contextlib.contextmanager
    def _tracked(self, stream: "_Stream", caller: Caller) -> Iterator[None]:
        """Track a stream, so that it ends when a policy change revokes the caller's right to it.

        Raises Overloaded if the caller has as many streams as it may.
        """
        if self._streams_of[caller.name] >= caller.watches_max:
            raise Overloaded("The caller has reached its limit of streams.", "WATCHES_LIMITED")
        self._streams_of[caller.name] += 1
        self._streams.add(stream)
        try:
            yield
        except asyncio.CancelledError:
            if stream.denied is None:
                raise
            stream.task.uncancel()
            raise stream.denied from None
        finally:
            self._streams.discard(stream)
            self._streams_of[caller.name] -= 1
            # Policies add and remove names.
            if not self._streams_of[caller.name]:
                del self._streams_of[caller.name]


class _Stream:
    """An authorized stream and the task that serves it."""

    def __init__(self, authenticator: Authenticator, path: str, context: CallContext) -> None:
        self.authenticator = authenticator
        self.path = path
        self.context = context
        self.denied: Exception | None = None
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task


async def _each_parsed(
    rule: Rule, parse: Parse, messages: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for data in messages:
        yield parsed(rule, parse, data)
