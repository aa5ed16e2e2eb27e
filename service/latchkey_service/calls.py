"""What every call goes through, on all listeners: who calls, bounds, errors, counts, log, audit.

`Calls.wrap` is put around each handler once, when it is registered, and not around each call:
what an interceptor does per call (details, metadata, a chain of coroutines) would cost a Verify
more than its own work. The effect is an interceptor's.
"""

import asyncio
import contextlib
import inspect
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from latchkey_service.access.gate import Door, check_account, within_accounts
from latchkey_service.access.methods import REFLECTION, Rule, rule_of
from latchkey_service.access.policy import ANYONE, Caller
from latchkey_service.audit import AuditLog, Origin, call_origin
from latchkey_service.deadlines import budget_seconds
from latchkey_service.errors import (
    Denied,
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
QUIET_SERVICES = ("/grpc.health.v1.Health/", REFLECTION)

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
        audit: AuditLog,
        verify_log_share: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._counts = counts
        self._audit = audit
        self._verify_log_share = verify_log_share
        self._monotonic = monotonic
        self._in_flight = 0
        self._streams: set[_Stream] = set()
        self._log: structlog.stdlib.BoundLogger = logger()

    def wrap(self, path: str, handler: "grpc.RpcMethodHandler[Any, Any]", door: Door | None) -> Any:
        """Return `handler` (as generated code registers it, for `path`) with all this around it.

        `door` is the way in of the listener that it is for, None where nobody asks who calls.
        Raises LookupError for a method that nobody has said who may call.
        """
        rule = rule_of(path)
        if rule.role is None:
            door = None
        parse = _parser(path, handler.request_deserializer)
        if handler.request_streaming:
            streaming: Any = handler.stream_stream
            wrap = self._stream if inspect.isasyncgenfunction(streaming) else self._duplex
            return grpc.stream_stream_rpc_method_handler(
                wrap(path, streaming, door), parse, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(path, handler.unary_stream, door), parse, handler.response_serializer
            )
        behaviour: Any = handler.unary_unary
        if path not in VERIFIES:
            behaviour = self._bounded(behaviour, queued=not path.startswith(QUIET_SERVICES))
        # Verifies answer with encoded messages: most of each comes from memory as it is.
        serialise = None if path in VERIFIES else handler.response_serializer
        return grpc.unary_unary_rpc_method_handler(
            self._unary(path, behaviour, door, rule), parse, serialise
        )

    def recheck(self) -> None:
        """End the streams whose callers may not have them any more."""
        for stream in tuple(self._streams):
            if stream.denied is not None:
                # It is ending.
                continue
            try:
                caller = stream.door.admit(stream.path, stream.context)
                check_account(stream.path, caller, None)
            except LatchkeyError as error:
                stream.denied = error
                stream.task.cancel()

    def _unary(self, path: str, behaviour: Handler, door: Door | None, rule: Rule) -> Handler:
        method = path.rpartition("/")[2]
        succeeded = (method, "OK")
        counts = self._counts.calls
        quiet = path in VERIFIES or path.startswith(QUIET_SERVICES)
        share = self._verify_log_share if path in VERIFIES else 0.0
        admit = None if door is None else door.admit
        audited = rule.audited

        async def call(request: Any, context: Any) -> Any:
            start = self._monotonic()
            origin: Origin | None = None
            caller = ANYONE
            try:
                if admit is not None:
                    caller = admit(path, context)
                if request.__class__ is _Unparsed:
                    raise _not_a_message()
                if audited:
                    origin = _origin(path, context, caller.name, request)
                    call_origin.set(origin)
                if caller.accounts is not None:
                    check_account(path, caller, request)
                    response = within_accounts(path, caller, await behaviour(request, context))
                else:
                    response = await behaviour(request, context)
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace ended.
                self._tell(path, context, start, "CANCELLED", "CANCELLED", _request_id(context))
                counts[method, "CANCELLED"] += 1
                if origin is not None:
                    self._audit.note(origin, "CANCELLED", "CANCELLED")
                raise
            except grpc.aio.AbortError:
                # Of a library's servicer, with a status of its own.
                self._tell(path, context, start, "ABORTED", "ABORTED", _request_id(context))
                counts[method, "ABORTED"] += 1
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                if audited and origin is None:
                    origin = _origin(path, context, _caller_of(error, caller), request)
                await self._fail(path, context, start, error, origin)
            counts[succeeded] += 1
            if origin is not None:
                if not origin.recorded:
                    self._audit.note(origin, "OK", "")
                self._tell(path, context, start, "OK", None, origin.request_id, origin=origin)
            elif not quiet or (share and random.random() < share):  # noqa: S311 - a sample
                self._tell(path, context, start, "OK", None, _request_id(context))
            return response

        return call

    def _stream(self, path: str, behaviour: Any, door: Door | None) -> Any:
        """Return a stream (health's Watch, reflection) that refuses what is not its message.

        Both are async generators. They carry no secret and last as long as their callers like, so
        that they are neither bounded nor logged when they end well.
        """
        if door is not None:
            raise ValueError(f"{path}: a stream with rules writes to its context, as in `_duplex`")

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

    def _duplex(self, path: str, behaviour: Handler, door: Door | None) -> Handler:
        """Return a stream (Watch) that reads and writes as it likes, and ends when it returns.

        As in `_stream`. Not an async generator: one that is left at a `yield` is cleaned up some
        time later, and this one holds a place.
        """

        async def call(requests: Any, context: Any) -> None:
            start = self._monotonic()
            try:
                if door is None:
                    await behaviour(_checked(requests), context)
                    return
                caller = door.admit(path, context)
                check_account(path, caller, None)
                with self._admitted(_Stream(door, path, context)):
                    await behaviour(_checked(requests), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                await self._fail(path, context, start, error)

        return call

    @contextlib.contextmanager
    def _admitted(self, stream: "_Stream") -> Iterator[None]:
        """Have a stream ended when a change of the policy takes its caller's right to it."""
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

    async def _fail(
        self,
        path: str,
        context: Any,
        start: float,
        error: Exception,
        origin: Origin | None = None,
    ) -> None:
        """Answer with the error's status, log and audit it. Always raises, as abort does."""
        if isinstance(error, TimeoutError):
            error = Unavailable("The answer would come too late; try again shortly.")
        request_id = _request_id(context) if origin is None else origin.request_id
        status = status_of(error, request_id)
        expected = isinstance(error, LatchkeyError)
        told = True
        if origin is not None:
            # Of many failures of one kind only some are written down, and those are logged.
            told = self._audit.note(origin, status.code.name, status.reason)
        elif isinstance(error, Denied):
            told = self._audit.tells(error.caller, path, status.reason)
        if told or not expected:
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
                origin,
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
        origin: Origin | None = None,
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
        if origin is not None:
            fields |= origin.fields()
        if error is not None and not isinstance(error, LatchkeyError):
            fields["exc_info"] = _without_values(error)
        elif error is not None:
            fields["cause"] = type(error.__cause__).__name__
        log = self._log.error if "exc_info" in fields else self._log.info
        log("call", **fields)


class _Stream:
    """A stream that was admitted, and the task that serves it."""

    def __init__(self, door: Door, path: str, context: Any) -> None:
        self.door = door
        self.path = path
        self.context = context
        self.denied: LatchkeyError | None = None
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task


def _origin(path: str, context: Any, caller: str, request: Any) -> Origin:
    return Origin.of(
        caller,
        path,
        context.peer(),
        _request_id(context),
        getattr(request, "account_id", ""),
        getattr(request, "id", ""),
    )


def _caller_of(error: Exception, caller: Caller) -> str:
    """Return the name of who called, as far as that came out before the error."""
    return error.caller if isinstance(error, Denied) else caller.name


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
