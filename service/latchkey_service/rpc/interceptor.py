"""The pipeline of every call on all listeners: authorization, limits, errors, log, audit.

`Calls.wrap` wraps each handler once, at registration. It acts like an interceptor. A real one would
cost more per Verify (call details, metadata, a chain of coroutines) than the Verify itself.
"""

import asyncio
import contextlib
import inspect
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from latchkey_service.access.authenticator import Authenticator, check_account, restrict_to_accounts
from latchkey_service.access.methods import (
    MANAGER,
    OPERATOR,
    REFLECTION,
    REVOKER,
    Rule,
    rule_of,
)
from latchkey_service.access.policy import ANONYMOUS, Caller
from latchkey_service.audit.audit_log import AuditContext, AuditLog, call_audit_context
from latchkey_service.errors import LatchkeyError, Overloaded, RateLimited, StatusParts
from latchkey_service.rpc.admission import ConcurrencyLimiter
from latchkey_service.rpc.call_report import CallReporter, request_id_of
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.deadlines import budget_seconds
from latchkey_service.rpc.lenient_parsing import BATCH_MAX, BATCH_VERIFY, VERIFY
from latchkey_service.rpc.request_parsing import (
    InvalidRequest,
    parser,
    request_not_parsed,
    require_parsed,
)

__all__ = ["Calls"]

# By role and process: calls that use the database at once, and calls in total. The total includes
# queued calls and Deletes that wait for confirmations. Each slot has a connection in the pool.
CONCURRENCY_LIMITS = {MANAGER: (8, 1_000), OPERATOR: (2, 100), REVOKER: (2, 100)}
# Counted; successful calls are logged only as a sample.
VERIFIES = frozenset({VERIFY, BATCH_VERIFY})
# Machines poll these services: only failures are logged.
QUIET_SERVICES = ("/grpc.health.v1.Health/", REFLECTION)

Handler = Callable[[Any, Any], Awaitable[Any]]


class Calls:
    """Wraps handlers. One instance per worker process."""

    def __init__(
        self,
        counts: Counts,
        audit: AuditLog,
        reporter: CallReporter,
        verify_log_share: float,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._counts = counts
        self._audit = audit
        self._verify_log_share = verify_log_share
        self._monotonic = monotonic
        self._reporter = reporter
        self.rejected = reporter.rejected
        """Handles calls that are rejected before they start."""
        self._limiters = {
            role: ConcurrencyLimiter(*size, monotonic) for role, size in CONCURRENCY_LIMITS.items()
        }
        self._streams: set[_Stream] = set()
        self._streams_of: Counter[str] = Counter()

    def wrap(
        self,
        path: str,
        handler: "grpc.RpcMethodHandler[Any, Any]",
        authenticator: Authenticator | None,
    ) -> Any:
        """Wrap `handler` (as generated code registers it for `path`) in the pipeline.

        `authenticator` authorizes the calls of the listener; None if there is no policy. Raises
        LookupError for a method without a rule.
        """
        rule = rule_of(path)
        if rule.role is None:
            authenticator = None
        parse = parser(path, handler.request_deserializer)
        if handler.request_streaming:
            streaming: Any = handler.stream_stream
            wrap = self._stream if inspect.isasyncgenfunction(streaming) else self._duplex
            return grpc.stream_stream_rpc_method_handler(
                wrap(path, streaming, authenticator), parse, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(path, handler.unary_stream, authenticator),
                parse,
                handler.response_serializer,
            )
        behaviour: Any = handler.unary_unary
        limiter = None
        if path not in VERIFIES:
            limiter = self._limiters.get(rule.role or "")
            behaviour = _bounded(behaviour, limiter)
        # Verify handlers return encoded messages: most bytes come from memory unchanged.
        serialise = None if path in VERIFIES else handler.response_serializer
        return grpc.unary_unary_rpc_method_handler(
            self._unary(path, behaviour, authenticator, rule, limiter), parse, serialise
        )

    def recheck(self) -> None:
        """End the streams that the new policy no longer allows."""
        for stream in tuple(self._streams):
            if stream.denied is not None:
                # Already ending.
                continue
            try:
                caller = stream.authenticator.authorize(stream.path, stream.context)
                check_account(stream.path, caller, None)
            except LatchkeyError as error:
                stream.denied = error
                stream.task.cancel()

    def _unary(
        self,
        path: str,
        behaviour: Handler,
        authenticator: Authenticator | None,
        rule: Rule,
        limiter: ConcurrencyLimiter | None,
    ) -> Handler:
        method = path.rpartition("/")[2]
        succeeded = (method, "OK")
        counts = self._counts.calls
        quiet = path in VERIFIES or path.startswith(QUIET_SERVICES)
        share = self._verify_log_share if path in VERIFIES else 0.0
        authorize = None if authenticator is None else authenticator.authorize
        audited = rule.audited

        async def call(request: Any, context: Any) -> Any:
            start = self._monotonic()
            audit_context: AuditContext | None = None
            caller = ANONYMOUS
            try:
                if authorize is not None:
                    caller = authorize(path, context)
                if limiter is not None:
                    limiter.check()
                if caller.rates is not None:
                    self._charge(path, rule, caller, request)
                if request.__class__ is InvalidRequest:
                    raise request_not_parsed()
                if audited:
                    audit_context = _audit_context_of(path, context, request)(caller.name)
                    call_audit_context.set(audit_context)
                if caller.accounts is not None:
                    check_account(path, caller, request)
                    response = restrict_to_accounts(path, caller, await behaviour(request, context))
                else:
                    response = await behaviour(request, context)
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace period ended.
                self._reporter.ended(path, context, start, "CANCELLED", caller, audit_context)
                raise
            except grpc.aio.AbortError:
                # A library's servicer chose the status.
                self._reporter.ended(path, context, start, "ABORTED", caller, None)
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                make = _audit_context_of(path, context, request) if audited else None
                status, delay_seconds = self._reporter.failed(
                    path, context, start, error, caller, audit_context, make
                )
                if delay_seconds:
                    # The request may be large and is no longer needed.
                    request = None
                    await asyncio.sleep(delay_seconds)
                await _abort(context, status)
            counts[succeeded] += 1
            if audit_context is not None:
                if not audit_context.recorded:
                    self._audit.record(audit_context, "OK", "")
                self._reporter.log(
                    path,
                    context,
                    start,
                    "OK",
                    None,
                    audit_context.request_id,
                    audit_context=audit_context,
                )
            elif not quiet or (share and random.random() < share):  # noqa: S311 - a sample
                self._reporter.log(path, context, start, "OK", None, request_id_of(context))
            return response

        return call

    def _stream(self, path: str, behaviour: Any, authenticator: Authenticator | None) -> Any:
        """Wrap a stream (health's Watch, reflection) and reject malformed messages.

        Both are async generators. They carry no secrets and last as long as their callers like, so
        they are not limited, and logged only when they fail.
        """
        if authenticator is not None:
            raise ValueError(f"{path}: a stream that needs authorization must use `_duplex`")

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            start = self._monotonic()
            try:
                async for response in behaviour(require_parsed(request), context):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, _ = self._reporter.failed(path, context, start, error)
                await _abort(context, status)

        return call

    def _duplex(
        self, path: str, behaviour: Handler, authenticator: Authenticator | None
    ) -> Handler:
        """Wrap a stream (Watch) that reads and writes freely and ends when it returns.

        Like `_stream`, but not an async generator: an abandoned generator is cleaned up some time
        later, and this stream counts against a limit.
        """

        async def call(requests: Any, context: Any) -> None:
            start = self._monotonic()
            caller = ANONYMOUS
            try:
                if authenticator is not None:
                    caller = authenticator.authorize(path, context)
                    check_account(path, caller, None)
                    self._charge(path, rule_of(path), caller, None)
                call_audit_context.set(_audit_context_of(path, context, None)(caller.name))
                if authenticator is None:
                    await behaviour(require_parsed(requests), context)
                    return
                with self._tracked(_Stream(authenticator, path, context), caller):
                    await behaviour(self._paced(path, caller, require_parsed(requests)), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, delay_seconds = self._reporter.failed(path, context, start, error, caller)
                await asyncio.sleep(delay_seconds)
                await _abort(context, status)

        return call

    async def _paced(
        self, path: str, caller: Caller, requests: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """Yield a stream's messages no faster than the caller's rate.

        Messages above the rate are read later, so flow control slows the client down. The stream
        stays open: a Delete may be waiting for its confirmations.
        """
        rule = rule_of(path)
        async for request in requests:
            while caller.rates is not None and rule.role is not None:
                wait = caller.rates.charge(rule.role, 1, self._monotonic())
                if not wait:
                    break
                await self._sleep(wait)
            yield request

    def _charge(self, path: str, rule: Rule, caller: Caller, request: Any) -> None:
        """Charge a call, or each question of a batch, to the caller's rate limit, if any."""
        if caller.rates is None or rule.role is None:
            return
        count = 1
        if path == BATCH_VERIFY and request.__class__ is not InvalidRequest:
            # Charge at most the largest batch that is answered. A larger one is rejected, and must
            # not use up the rate of others. An empty batch costs time too.
            count = max(1, min(len(request.requests), BATCH_MAX))
        wait = caller.rates.charge(rule.role, count, self._monotonic())
        if wait:
            raise RateLimited("The caller has exceeded its rate limit.", wait)

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

    def __init__(self, authenticator: Authenticator, path: str, context: Any) -> None:
        self.authenticator = authenticator
        self.path = path
        self.context = context
        self.denied: LatchkeyError | None = None
        task = asyncio.current_task()
        assert task is not None, "a stream is served in a task"  # noqa: S101 - for the type checker
        self.task = task


async def _abort(context: Any, status: StatusParts) -> None:
    """End the call with a status. Always raises, as abort does."""
    await context.abort(status.code, status.message, status.trailing_metadata)


def _bounded(behaviour: Handler, limiter: ConcurrencyLimiter | None) -> Handler:
    """Return `behaviour` with a timeout shortly before the caller's deadline (TimeoutError).

    With `limiter`, the call must acquire a slot. Verifies skip both: a timer for each would cost
    more than its hash and decision together. They wait only in `batched_lookup.py`, which bounds
    them with a single timer.
    """

    async def bounded(request: Any, context: Any) -> Any:
        seconds = budget_seconds(context)
        async with asyncio.timeout(seconds):
            if limiter is None:
                return await behaviour(request, context)
            async with limiter.slot(seconds):
                return await behaviour(request, context)

    return bounded


def _audit_context_of(path: str, context: Any, request: Any) -> Callable[[str], AuditContext]:
    """Return a function that builds a call's audit context from the caller's name."""

    def make(name: str) -> AuditContext:
        return AuditContext.of(
            name,
            path,
            context.peer(),
            request_id_of(context),
            getattr(request, "account_id", ""),
            getattr(request, "id", ""),
        )

    return make
