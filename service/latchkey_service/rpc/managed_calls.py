"""The path of managed calls: every unary method except Verify and BatchVerify.

`ManagedCalls.handler` wraps the method of a servicer. It authorizes the caller, checks the size of
the request, parses it, checks the account, waits for a slot (`admission.py`), runs the servicer
under a deadline, and reports the call (`call_report.py`): status, counters, log line, audit entry.

No part of the request is read before the caller is authorized. A rejected call ends with a
status, not with an exception: grpcio keeps the exception of `abort`, and with it every frame of the
call, until a full garbage collection.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol

import grpc

from latchkey_service import tracing
from latchkey_service.access import origin
from latchkey_service.access.authenticator import Authenticator, check_account
from latchkey_service.access.methods import (
    IMPORTER,
    MANAGER,
    OPERATOR,
    REMOVALS,
    REVOKER,
    TWO_SIDED,
    Rule,
    rule_of,
)
from latchkey_service.access.policy import ANONYMOUS, Caller
from latchkey_service.audit.audit_log import AuditContext, AuditLog
from latchkey_service.audit.audit_table import Details
from latchkey_service.errors import (
    REQUEST_ID_METADATA,
    LatchkeyError,
    RequestNotParsed,
    RequestTooLarge,
    TooManyFields,
    Unavailable,
    code_of,
    reason_of,
)
from latchkey_service.loop_delay import WATCH
from latchkey_service.rpc.admission import Answers, ConcurrencyLimiter, Slot
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.call_report import (
    NEW_IDS,
    CallReporter,
    Metadata,
    describe_call,
    end_with,
    given_id,
)
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.field_count import has_more_fields
from latchkey_service.rpc.removals import may_narrow
from latchkey_service.tracing import TRACEPARENT

__all__ = ["ManagedCall", "ManagedCalls", "current_call", "parsed"]

# By role and process: calls that use the database at once, and calls in total. The total includes
# queued calls and Deletes that wait for confirmations. Each slot has a connection in the pool.
CONCURRENCY_LIMITS: Mapping[str, tuple[int, int]] = {
    MANAGER: (8, 1_000),
    OPERATOR: (2, 100),
    REVOKER: (2, 100),
    # An import sends one batch after another.
    IMPORTER: (1, 100),
}
# Limit for callers with a longer deadline, or none: longer than any healthy call takes.
CALL_SECONDS_MAX = 10.0
# Reserve before the caller's deadline, so that it receives our reason and not its own timeout. When
# Postgres hangs, hundreds of calls reach theirs at once; answering takes tens of milliseconds. It
# is at most a tenth of the time, or short deadlines would leave no time for the work.
ANSWER_SECONDS: Final = 0.1
# Share of that time for which a Delete may wait for confirmations, so that its caller learns that
# the deletion is committed, rather than only that time ran out.
CONFIRMATION_SHARE: Final = 0.9
# How long the message of a refused call may take to arrive, for the call's audit entry.
REFUSED_MESSAGE_SECONDS: Final = 1.0
# Machines poll this service: only failures are logged.
HEALTH: Final = "/grpc.health.v1.Health/"

Handler = Callable[[bytes, CallContext], Awaitable[bytes]]


class _Response(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's name


class ManagedCall:
    """A call in progress. Its servicer finds it in `current_call`.

    `deadline` and `confirm_by` are seconds on the process's clock: when the call gives up, and when
    it gives up waiting for confirmations.
    """

    __slots__ = ("_slot", "audit_context", "caller", "change", "confirm_by", "deadline")

    def __init__(
        self,
        audit_context: AuditContext,
        now: float,
        seconds: float,
        slot: Slot | None,
        caller: Caller = ANONYMOUS,
    ) -> None:
        self.audit_context = audit_context
        self.caller = caller
        self.deadline = now + seconds
        self.confirm_by = now + seconds * CONFIRMATION_SHARE
        self.change: AuditContext | None = None
        """Describes the change that the call has committed, and its audit entry with it."""
        self._slot = slot

    def committed(self, token_id: str = "") -> None:
        """Record that the change is committed, with its audit entry. `token_id`: of a new token."""
        self.change = (
            replace(self.audit_context, token_id=token_id) if token_id else self.audit_context
        )

    def release_slot(self) -> None:
        """Release the call's slot, if it has one, because the call now waits for others."""
        if self._slot is not None:
            self._slot.release()


current_call: contextvars.ContextVar[ManagedCall] = contextvars.ContextVar("current_call")


class ManagedCalls:
    """Wraps handlers. One instance per worker process.

    `monotonic` measures durations; `clock` is the clock of deadlines.
    """

    def __init__(
        self,
        counts: Counts,
        audit: AuditLog,
        reporter: CallReporter,
        monotonic: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._counts = counts
        self._audit = audit
        self._reporter = reporter
        self._monotonic = monotonic
        self._clock = clock
        answers = Answers()
        self.limiters = {
            role: ConcurrencyLimiter(*size, monotonic, WATCH.clock, answers)
            for role, size in CONCURRENCY_LIMITS.items()
        }

    def handler(
        self,
        path: str,
        behaviour: Callable[[Any, Any], Awaitable[_Response]],
        parse: Callable[[bytes], Any],
        authenticator: Authenticator | None,
    ) -> Handler:
        """Return the handler of a method for a listener.

        `behaviour` is the servicer's method, and `parse` decodes its request. `authenticator`
        authorizes the calls of the listener; None if there is no policy.
        """
        rule = rule_of(path)
        limiter = self.limiters.get(rule.role or "")
        counts = self._counts.method(path)
        quiet = path.startswith(HEALTH)
        admit = self._admission(path, rule, parse)
        authorize = None if authenticator is None else authenticator.authorize

        async def call(data: bytes, context: CallContext) -> bytes:
            start = self._monotonic()
            counts.started += 1
            caller = ANONYMOUS
            current: ManagedCall | None = None
            describe = partial(_audit_context, path, context, authenticator)
            try:
                if authorize is not None:
                    caller = authorize(path, context)
                request, removal = admit(data, caller, start)
                if caller.accounts is not None:
                    check_account(path, caller, request)
                seconds = _budget_seconds(context)
                slot = None
                if limiter is not None:
                    slot = limiter.slot(seconds, caller.name, removal=removal)
                audit_context = describe(request, caller.name, caller)
                current = ManagedCall(audit_context, self._clock(), seconds, slot, caller)
                current_call.set(current)
                async with asyncio.timeout(seconds):
                    if slot is None:
                        response = await behaviour(request, context)
                    else:
                        async with slot:
                            response = await behaviour(request, context)
                answer = response.SerializeToString()
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace period ended.
                change = None if current is None else current.change
                entry = current.audit_context if rule.audited and current is not None else None
                self._reporter.cancelled(path, context, start, caller, entry, change)
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, delay_seconds = self._reporter.failed(
                    path,
                    context,
                    start,
                    error,
                    caller,
                    partial(_refused_context, rule, parse, data, caller, describe)
                    if rule.audited
                    else None,
                    None if current is None else current.change,
                )
            else:
                counts.ok += 1
                counts.seconds.observe(self._monotonic() - start, audit_context.request_id)
                if rule.audited:
                    if current.change is None:
                        self._audit.record(audit_context, "OK", "")
                    self._reporter.succeeded(path, context, start, current.change or audit_context)
                elif not quiet:
                    request_id = audit_context.request_id
                    self._reporter.log(path, context, start, "OK", None, request_id)
                context.set_trailing_metadata(((REQUEST_ID_METADATA, audit_context.request_id),))
                return answer
            if delay_seconds:
                await self._reporter.delay(context, status, delay_seconds)
            return end_with(context, status)

        return call

    def _admission(
        self, path: str, rule: Rule, parse: Callable[[bytes], Any]
    ) -> Callable[[bytes, Caller, float], tuple[Any, bool]]:
        """Return a function that admits a call of a caller at a time, or raises.

        It returns the request, and whether it only takes rights away.
        """
        limiter, role = self.limiters.get(rule.role or ""), rule.role
        removes, two_sided = path in REMOVALS, path in TWO_SIDED

        def admit(data: bytes, caller: Caller, now: float) -> tuple[Any, bool]:
            # Only the requests of two methods show what they do. They are small.
            request = parsed(rule, parse, data) if two_sided else None
            removal = removes if request is None else may_narrow(path, request)
            if limiter is not None:
                limiter.check(caller.name, removal=removal)
            if caller.rates is not None and role is not None:
                caller.rates.spend(role, 1, now, removal=removal)
            return (parsed(rule, parse, data) if request is None else request), removal

        return admit

    def unknown(self) -> Any:
        """Return a handler that refuses calls of unknown methods, without reading their messages.

        They are neither counted nor logged, because anyone can call any number of them.
        """

        async def refuse(_messages: Any, context: CallContext) -> None:
            await self._reporter.refused.wait(context.peer())
            context.set_code(grpc.StatusCode.UNIMPLEMENTED)
            context.set_details("Method not found!")

        return grpc.stream_stream_rpc_method_handler(refuse)

    def oversized(self) -> Any:
        """Return a handler that ends the connection of calls with excessive metadata.

        It reads nothing of the call, not even the metadata: grpcio copies them each time. The calls
        are neither counted nor logged.
        """
        refused = self._reporter.refused

        async def refuse(_messages: Any, context: CallContext) -> None:
            peer = context.peer()
            if not refused.end_connection(peer):
                await refused.wait(peer)
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details("The metadata are too large.")

        return grpc.stream_stream_rpc_method_handler(refuse)

    def refuser(
        self, path: str, parse: Callable[[bytes], Any], authenticator: Authenticator
    ) -> Any:
        """Return a handler for the calls of a unary method that no known caller makes.

        It refuses them without reading their messages, except those of the few calls that get an
        audit entry, which names the account.
        """
        rule = rule_of(path)
        counts = self._counts.method(path)

        async def refuse(messages: AsyncIterator[bytes], context: CallContext) -> None:
            start = self._monotonic()
            counts.started += 1
            # First, so that a flood that arrives at once takes little time from other calls.
            await self._reporter.refused.wait(context.peer())
            try:
                caller = authenticator.authorize(path, context).name
                # The policy has changed since.
                error: LatchkeyError = Unavailable("The policy has just changed; try again.")
            except LatchkeyError as denied:
                caller, error = getattr(denied, "caller", ""), denied
            entry = None
            if rule.audited:
                code = code_of(error).name
                audited = self._audit.would_record(caller, path, code, reason_of(error))
                data = await _first(messages) if audited else b""
                describe = partial(_audit_context, path, context, authenticator)
                entry = partial(_refused_context, rule, parse, data, ANONYMOUS, describe)
            status, _ = self._reporter.failed(
                path, context, start, error, entry=entry, delayed=True
            )
            end_with(context, status)

        return grpc.stream_stream_rpc_method_handler(refuse)


async def _first(messages: AsyncIterator[bytes]) -> bytes:
    """Return the first message of a stream, or b"" if it does not come soon."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REFUSED_MESSAGE_SECONDS):
            async for data in messages:
                return data
    return b""


def _budget_seconds(context: CallContext) -> float:
    """Return the seconds available for computing the answer."""
    remaining = context.time_remaining()
    if remaining is None:
        return CALL_SECONDS_MAX
    return min(CALL_SECONDS_MAX, remaining - min(ANSWER_SECONDS, remaining / 10))


def parsed(rule: Rule, parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Return a request, or a message of a stream.

    Raises RequestTooLarge, TooManyFields and RequestNotParsed.
    """
    if len(data) > rule.bytes_max:
        raise RequestTooLarge(rule.bytes_max)
    if rule.fields_max and has_more_fields(data, rule.fields_in, rule.fields_max):
        raise TooManyFields(rule.fields_max)
    try:
        return parse(data)
    except Exception:  # noqa: BLE001 - the bytes may raise anything in the parser
        raise RequestNotParsed from None


def _audit_context(
    path: str,
    context: CallContext,
    authenticator: Authenticator | None,
    request: Any,
    name: str,
    caller: Caller,
) -> AuditContext:
    metadata = context.invocation_metadata()
    headers = dict(metadata or ())
    proxied = authenticator is not None and authenticator.trusts_proxy
    # Without a policy, every caller is trusted alike.
    reports_people = authenticator is None or caller.reports_people
    call_id = next(NEW_IDS)
    return describe_call(
        name,
        path,
        context.peer(),
        given_id(metadata) or call_id,
        getattr(request, "account_id", ""),
        getattr(request, "id", "") or getattr(request, "token_id", ""),
        Details(
            origin.person(metadata) if reports_people and origin.PERSON in headers else "",
            origin.client_address(metadata) if proxied else "",
            call_id,
            _trace_id(metadata),
        ),
    )


def _trace_id(metadata: Metadata) -> str:
    if tracing.of_task() is None and all(key != TRACEPARENT for key, _ in metadata or ()):
        # Most callers have no trace.
        return ""
    return tracing.trace_id_of(metadata)


def _refused_context(
    rule: Rule,
    parse: Callable[[bytes], Any],
    data: bytes,
    caller: Caller,
    describe: Callable[[Any, str, Caller], AuditContext],
    name: str,
) -> AuditContext:
    """Return the context of a refused call, for its audit entry.

    Only a few refused calls a minute get an entry, so only those are parsed before their caller is
    authorized.
    """
    try:
        request = parsed(rule, parse, data)
    except (RequestNotParsed, RequestTooLarge, TooManyFields):
        request = None
    return describe(request, name, caller)
