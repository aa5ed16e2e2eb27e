"""What every call goes through, on both transports: bounds, errors, counts, log.

`Calls.wrap` is put around each handler once, when it is registered, and not around each call:
what an interceptor does per call (details, metadata, a chain of coroutines) would cost a Verify
more than its own work. The effect is an interceptor's.
"""

import asyncio
import inspect
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from latchkey_service.deadlines import budget_seconds
from latchkey_service.errors import (
    FieldViolation,
    InvalidArgument,
    LatchkeyError,
    Overloaded,
    Unavailable,
    status_of,
)
from latchkey_service.lenient import BATCH_VERIFY, VERIFY, lenient_parse
from latchkey_service.log import Counts, logger

__all__ = ["Calls"]

# Management calls at once in a process: at a thousand a second, as many as can be answered in time.
IN_FLIGHT_MAX = 1_000
REQUEST_ID_METADATA = "x-request-id"
REQUEST_ID_LENGTH_MAX = 64
# Counted, and logged only as a sampled share when they succeed.
VERIFIES = frozenset({VERIFY, BATCH_VERIFY})
# Asked all the time by machines: logged only when they fail.
QUIET_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")

Handler = Callable[[Any, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Unparsed:
    """Stands for a request that is not the message it should be. Both transports would answer
    for us, one of them with UNKNOWN, were the parser's exception let through."""


class Calls:
    """Wraps handlers. One for each worker process."""

    def __init__(
        self,
        counts: Counts,
        verify_log_share: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._counts = counts
        self._verify_log_share = verify_log_share
        self._monotonic = monotonic
        self._in_flight = 0
        self._log: structlog.stdlib.BoundLogger = logger()

    def wrap(self, path: str, handler: "grpc.RpcMethodHandler[Any, Any]") -> Any:
        """Return `handler` (as generated code registers it, for `path`) with all this around it."""
        parse = _parser(path, handler.request_deserializer)
        if handler.request_streaming:
            streaming: Any = handler.stream_stream
            wrap = self._stream if inspect.isasyncgenfunction(streaming) else self._duplex
            return grpc.stream_stream_rpc_method_handler(
                wrap(path, streaming), parse, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(path, handler.unary_stream), parse, handler.response_serializer
            )
        behaviour: Any = handler.unary_unary
        if path not in VERIFIES:
            behaviour = self._bounded(behaviour, queued=not path.startswith(QUIET_SERVICES))
        # Verifies answer with encoded messages: most of each comes from memory as it is.
        serialise = None if path in VERIFIES else handler.response_serializer
        return grpc.unary_unary_rpc_method_handler(self._unary(path, behaviour), parse, serialise)

    def _unary(self, path: str, behaviour: Handler) -> Handler:
        method = path.rpartition("/")[2]
        succeeded = (method, "OK")
        counts = self._counts.calls
        quiet = path in VERIFIES or path.startswith(QUIET_SERVICES)
        share = self._verify_log_share if path in VERIFIES else 0.0

        async def call(request: Any, context: Any) -> Any:
            start = self._monotonic()
            try:
                if request.__class__ is _Unparsed:
                    raise _not_a_message()
                response = await behaviour(request, context)
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace ended.
                self._tell(path, context, start, "CANCELLED", "CANCELLED", _request_id(context))
                counts[method, "CANCELLED"] += 1
                raise
            except grpc.aio.AbortError:
                # Of a library's servicer, with a status of its own.
                self._tell(path, context, start, "ABORTED", "ABORTED", _request_id(context))
                counts[method, "ABORTED"] += 1
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                await self._fail(path, context, start, error)
            counts[succeeded] += 1
            if not quiet or (share and random.random() < share):  # noqa: S311 - a sample
                self._tell(path, context, start, "OK", None, _request_id(context))
            return response

        return call

    def _stream(self, path: str, behaviour: Any) -> Any:
        """Return a stream (health's Watch, reflection) that refuses what is not its message.

        Both are async generators. They carry no secret and last as long as their callers like, so
        that they are neither bounded nor logged when they end well.
        """

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            start = self._monotonic()
            try:
                async for response in behaviour(_checked(request), context):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                await self._fail(path, context, start, error)

        return call

    def _duplex(self, path: str, behaviour: Handler) -> Handler:
        """Return a stream (Watch) that reads and writes as it likes, and ends when it returns.

        As in `_stream`. Not an async generator: one that is left at a `yield` is cleaned up some
        time later, and this one holds a place.
        """

        async def call(requests: Any, context: Any) -> None:
            start = self._monotonic()
            try:
                await behaviour(_checked(requests), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                await self._fail(path, context, start, error)

        return call

    def _bounded(self, behaviour: Handler, *, queued: bool) -> Handler:
        """Return `behaviour`, ended with TimeoutError when the caller's deadline nears.

        With `queued` it is one of the calls that wait for the pool, of which there are only so
        many. Verifies do without all this: a timer for each would cost more than the hash and the
        decision together, and `lookup.py`, their one wait, bounds them with a single timer.
        """

        async def bounded(request: Any, context: Any) -> Any:
            if queued and self._in_flight >= IN_FLIGHT_MAX:
                raise Overloaded("Too many calls are waiting for the database; try again shortly.")
            self._in_flight += queued
            try:
                async with asyncio.timeout(budget_seconds(context)):
                    return await behaviour(request, context)
            finally:
                self._in_flight -= queued

        return bounded

    async def _fail(self, path: str, context: Any, start: float, error: Exception) -> None:
        """Answer with the error's status, and log it. Always raises, as abort does."""
        if isinstance(error, TimeoutError):
            error = Unavailable("The answer would come too late; try again shortly.")
        request_id = _request_id(context)
        status = status_of(error, request_id)
        expected = isinstance(error, LatchkeyError)
        self._tell(
            path,
            context,
            start,
            status.code.name,
            status.reason,
            request_id,
            # The cause, for the operator. An error of the domain tells it by its reason, and a
            # caller's mistakes come too often to print where they were found.
            None if expected and error.__cause__ is None else error,
        )
        self._counts.calls[path.rpartition("/")[2], status.code.name] += 1
        await context.abort(status.code, status.message, status.trailing_metadata)

    def _tell(
        self,
        path: str,
        context: Any,
        start: float,
        code: str,
        reason: str | None,
        request_id: str,
        error: Exception | None = None,
    ) -> None:
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": path,
            "code": code,
            "duration_ms": round((self._monotonic() - start) * 1_000, 3),
            "peer": context.peer(),
        }
        if reason is not None:
            fields["reason"] = reason
        if error is not None and not isinstance(error, LatchkeyError):
            fields["exc_info"] = _without_values(error)
        elif error is not None:
            fields["cause"] = type(error.__cause__).__name__
        log = self._log.error if "exc_info" in fields else self._log.info
        log("call", **fields)


def _not_a_message() -> InvalidArgument:
    """Return a new error each time: one that is raised again keeps all its tracebacks alive."""
    return InvalidArgument(
        FieldViolation("", "the request is not a message of this method's type"),
        reason="REQUEST_NOT_PARSED",
    )


def _checked(request: Any) -> Any:
    """Return a stream's request, or its stream of requests, which raises at one that is none."""
    if request.__class__ is _Unparsed:
        raise _not_a_message()
    return _all_checked(request) if isinstance(request, AsyncIterator) else request


async def _all_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _parser(path: str, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return `parse`, made not to raise."""
    if parse is None:
        raise ValueError(f"{path} has no parser")

    def safely(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # noqa: BLE001 - whatever the bytes do to the parser
            return lenient_parse(path, data) or _Unparsed()

    return safely


def _request_id(context: Any) -> str:
    """Return the caller's id for the request if it is a harmless one, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if (
            key == REQUEST_ID_METADATA
            and isinstance(value, str)
            and 0 < len(value) <= REQUEST_ID_LENGTH_MAX
            and value.replace("-", "").isalnum()
            and value.isascii()
        ):
            return value
    return secrets.token_hex(8)


def _without_values(error: Exception) -> Any:
    """Return what is logged of an unforeseen exception: types and places, not its text.

    The text may quote a value (Postgres' DETAIL and Python's KeyError do), and that value may be a
    secret or a digest.
    """
    bare = RuntimeError(f"{type(error).__module__}.{type(error).__qualname__}")
    return (type(bare), bare, error.__traceback__)
