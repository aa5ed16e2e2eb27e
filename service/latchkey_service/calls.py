"""What every call goes through, on all listeners: who calls, how much, errors, log, audit.

`Calls.wrap` is put around each handler once, when it is registered, and not around each call:
what an interceptor does per call (details, metadata, a chain of coroutines) would cost a Verify
more than its own work. The effect is an interceptor's.
"""

import asyncio
import contextlib
import inspect
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from latchkey_service.access.gate import Door, check_account, within_accounts
from latchkey_service.access.methods import MANAGER, OPERATOR, REFLECTION, Rule, rule_of
from latchkey_service.access.policy import ANYONE, Caller
from latchkey_service.admission import Places
from latchkey_service.audit import AuditLog, Origin, call_origin
from latchkey_service.deadlines import budget_seconds
from latchkey_service.errors import LatchkeyError, Overloaded, RateLimited, StatusParts
from latchkey_service.lenient import BATCH_MAX, BATCH_VERIFY, VERIFY
from latchkey_service.log import Counts
from latchkey_service.outcomes import Outcomes, request_id_of
from latchkey_service.parsing import Unparsed, checked, not_a_message, parser

__all__ = ["Calls"]

# Calls at work with the database at once in a process, by role, and calls there in all: those that
# wait, and Deletes that wait to be confirmed. Each at work has a connection of the pool.
PLACES = {MANAGER: (8, 1_000), OPERATOR: (2, 100)}
# Counted, and logged only as a sampled share when they succeed.
VERIFIES = frozenset({VERIFY, BATCH_VERIFY})
# Asked all the time by machines: logged only when they fail.
QUIET_SERVICES = ("/grpc.health.v1.Health/", REFLECTION)

Handler = Callable[[Any, Any], Awaitable[Any]]


class Calls:
    """Wraps handlers. One for each worker process."""

    def __init__(
        self,
        counts: Counts,
        audit: AuditLog,
        outcomes: Outcomes,
        verify_log_share: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._counts = counts
        self._audit = audit
        self._verify_log_share = verify_log_share
        self._monotonic = monotonic
        self._outcomes = outcomes
        self.refuse = outcomes.refuse
        """For calls that are refused before they have begun."""
        self._places = {role: Places(*size, monotonic) for role, size in PLACES.items()}
        self._streams: set[_Stream] = set()
        self._streams_of: Counter[str] = Counter()

    def wrap(self, path: str, handler: "grpc.RpcMethodHandler[Any, Any]", door: Door | None) -> Any:
        """Return `handler` (as generated code registers it, for `path`) with all this around it.

        `door` is the way in of the listener that it is for, None where nobody asks who calls.
        Raises LookupError for a method that nobody has said who may call.
        """
        rule = rule_of(path)
        if rule.role is None:
            door = None
        parse = parser(path, handler.request_deserializer)
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
        places = None
        if path not in VERIFIES:
            places = self._places.get(rule.role or "")
            behaviour = _bounded(behaviour, places)
        # Verifies answer with encoded messages: most of each comes from memory as it is.
        serialise = None if path in VERIFIES else handler.response_serializer
        return grpc.unary_unary_rpc_method_handler(
            self._unary(path, behaviour, door, rule, places), parse, serialise
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

    def _unary(
        self, path: str, behaviour: Handler, door: Door | None, rule: Rule, places: Places | None
    ) -> Handler:
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
                if places is not None:
                    places.check()
                if caller.rates is not None:
                    self._charge(path, rule, caller, request)
                if request.__class__ is Unparsed:
                    raise not_a_message()
                if audited:
                    origin = _origin_of(path, context, request)(caller.name)
                    call_origin.set(origin)
                if caller.accounts is not None:
                    check_account(path, caller, request)
                    response = within_accounts(path, caller, await behaviour(request, context))
                else:
                    response = await behaviour(request, context)
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace ended.
                self._outcomes.end(path, context, start, "CANCELLED", caller, origin)
                raise
            except grpc.aio.AbortError:
                # Of a library's servicer, with a status of its own.
                self._outcomes.end(path, context, start, "ABORTED", caller, None)
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                make = _origin_of(path, context, request) if audited else None
                status, delay_seconds = self._outcomes.fail(
                    path, context, start, error, caller, origin, make
                )
                if delay_seconds:
                    # It may be large, and is of no more use.
                    request = None
                    await asyncio.sleep(delay_seconds)
                await _abort(context, status)
            counts[succeeded] += 1
            if origin is not None:
                if not origin.recorded:
                    self._audit.note(origin, "OK", "")
                self._outcomes.tell(
                    path, context, start, "OK", None, origin.request_id, origin=origin
                )
            elif not quiet or (share and random.random() < share):  # noqa: S311 - a sample
                self._outcomes.tell(path, context, start, "OK", None, request_id_of(context))
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
                async for response in behaviour(checked(request), context):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, _ = self._outcomes.fail(path, context, start, error)
                await _abort(context, status)

        return call

    def _duplex(self, path: str, behaviour: Handler, door: Door | None) -> Handler:
        """Return a stream (Watch) that reads and writes as it likes, and ends when it returns.

        As in `_stream`. Not an async generator: one that is left at a `yield` is cleaned up some
        time later, and this one holds a place.
        """

        async def call(requests: Any, context: Any) -> None:
            start = self._monotonic()
            caller = ANYONE
            try:
                if door is not None:
                    caller = door.admit(path, context)
                    check_account(path, caller, None)
                    self._charge(path, rule_of(path), caller, None)
                call_origin.set(_origin_of(path, context, None)(caller.name))
                if door is None:
                    await behaviour(checked(requests), context)
                    return
                with self._admitted(_Stream(door, path, context), caller):
                    await behaviour(self._paced(path, caller, checked(requests)), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, delay_seconds = self._outcomes.fail(path, context, start, error, caller)
                await asyncio.sleep(delay_seconds)
                await _abort(context, status)

        return call

    async def _paced(
        self, path: str, caller: Caller, requests: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """Yield a stream's messages no faster than the caller's rate.

        A caller that sends more is heard later, and so flow control slows it down. Its stream goes
        on: a Delete may be waiting for what it confirms.
        """
        rule = rule_of(path)
        async for request in requests:
            while caller.rates is not None and rule.role is not None:
                wait = caller.rates.charge(rule.role, 1, self._monotonic())
                if not wait:
                    break
                await asyncio.sleep(wait)
            yield request

    def _charge(self, path: str, rule: Rule, caller: Caller, request: Any) -> None:
        """Count a call, or each question of a batch, against the caller's limit, if it has one."""
        if caller.rates is None or rule.role is None:
            return
        count = 1
        if path == BATCH_VERIFY and request.__class__ is not Unparsed:
            # No more than are answered: a larger batch is refused, and is no reason to refuse
            # others. An empty one takes its time too.
            count = max(1, min(len(request.requests), BATCH_MAX))
        wait = caller.rates.charge(rule.role, count, self._monotonic())
        if wait:
            raise RateLimited("The policy lets this caller ask less in a second.", wait)

    @contextlib.contextmanager
    def _admitted(self, stream: "_Stream", caller: Caller) -> Iterator[None]:
        """Have a stream ended when a change of the policy takes its caller's right to it.

        Raises Overloaded where the caller has as many as it may.
        """
        if self._streams_of[caller.name] >= caller.watches_max:
            raise Overloaded("The policy lets this caller have fewer streams.", "WATCHES_LIMITED")
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
            # Names come and go with policies.
            if not self._streams_of[caller.name]:
                del self._streams_of[caller.name]


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


async def _abort(context: Any, status: StatusParts) -> None:
    """Answer with a status. Always raises, as abort does."""
    await context.abort(status.code, status.message, status.trailing_metadata)


def _bounded(behaviour: Handler, places: Places | None) -> Handler:
    """Return `behaviour`, ended with TimeoutError when the caller's deadline nears.

    With `places` it works in one of them. Verifies do without all this: a timer for each would cost
    more than the hash and the decision together, and `lookup.py`, their one wait, bounds them with
    a single timer.
    """

    async def bounded(request: Any, context: Any) -> Any:
        seconds = budget_seconds(context)
        async with asyncio.timeout(seconds):
            if places is None:
                return await behaviour(request, context)
            async with places.place(seconds):
                return await behaviour(request, context)

    return bounded


def _origin_of(path: str, context: Any, request: Any) -> Callable[[str], Origin]:
    """Return what makes a call's origin of its caller's name."""

    def make(name: str) -> Origin:
        return Origin.of(
            name,
            path,
            context.peer(),
            request_id_of(context),
            getattr(request, "account_id", ""),
            getattr(request, "id", ""),
        )

    return make
