"""Reports a finished call: gRPC status, counters, log line, audit entry.

Thousands of calls may fail alike in a second. So only some of them are logged and audited, and
rejections are paced.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeGuard

import grpc
import structlog
from latchkey_coherence.identifiers import ACCOUNT_ID, TOKEN_ID

from latchkey_service import tracing
from latchkey_service.access.methods import METHODS, OPEN
from latchkey_service.access.policy import ANONYMOUS, Caller
from latchkey_service.audit.audit_log import AuditContext, AuditLog
from latchkey_service.audit.audit_table import NO_DETAILS, Details
from latchkey_service.errors import (
    REQUEST_ID_METADATA,
    TOO_LATE,
    Denied,
    LatchkeyError,
    Overloaded,
    RateLimited,
    StatusParts,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
    code_of,
    reason_of,
    status_of,
)
from latchkey_service.rpc.admission import RejectionPacer
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.counters import UNARY, Counts
from latchkey_service.rpc.refused_calls import RefusedCalls
from latchkey_service.secret_format import CREDENTIAL_LENGTH, contains_secret
from latchkey_service.settings.logs import logger

__all__ = [
    "NEW_IDS",
    "CallReporter",
    "Metadata",
    "checked_id",
    "describe_call",
    "end_with",
    "given_id",
    "level_of",
    "new_ids",
    "request_id_of",
]

REQUEST_ID_LENGTH_MAX = 64
_PEER_LENGTH_MAX: Final = 200
Metadata = Iterable[tuple[str, str | bytes]] | None
# Delay of an answer to a caller above its rate limit, which keeps it from retrying at once.
LIMITED_SECONDS_MAX = 0.25


class CallReporter:
    """Reports finished calls. One instance per worker process."""

    def __init__(self, counts: Counts, audit: AuditLog, monotonic: Callable[[], float]) -> None:
        self._counts = counts
        self._audit = audit
        self._monotonic = monotonic
        self._pacer = RejectionPacer()
        self.refused = RefusedCalls(monotonic)
        self._log: structlog.stdlib.BoundLogger = logger()

    def failed(
        self,
        path: str,
        context: CallContext,
        start: float,
        error: Exception,
        caller: Caller = ANONYMOUS,
        entry: Callable[[str], AuditContext] | None = None,
        change: AuditContext | None = None,
        *,
        delayed: bool = False,
    ) -> tuple[StatusParts, float]:
        """Count, log and audit a failed call. Return its status and the delay before sending it.

        The delay is 0 if the call was `delayed` before.

        `entry` describes an audited call for its entry; its argument is the caller's name. `change`
        describes a committed change, whose audit entry was written in the same transaction.
        """
        if isinstance(error, TimeoutError):
            error = Unavailable(TOO_LATE)
        name = error.caller if isinstance(error, Denied) else caller.name
        code, reason = code_of(error), reason_of(error)
        expected = isinstance(error, LatchkeyError)
        written = change
        # Thousands of calls may fail alike in a second; only some are logged and audited.
        logged = True
        if change is not None:
            pass
        elif entry is not None:
            logged = self._audit.should_record(name, path, code.name, reason)
            if logged or not expected:
                written = entry(name)
            if logged and written is not None:
                logged = self._audit.record(written, code.name, reason)
        elif expected:
            logged = self._audit.should_log(name, path, reason)
        request_id = (
            request_id_of(context.invocation_metadata()) if written is None else written.request_id
        )
        if logged or not expected:
            self.log(
                path,
                context,
                start,
                code.name,
                reason,
                request_id,
                # The cause is for the operator. For our own errors, the reason is enough, and
                # callers' mistakes are too frequent to log with a traceback.
                None if expected and error.__cause__ is None else error,
                written,
            )
        self._count(path, code.name, reason, self._monotonic() - start, request_id)
        status = status_of(error, request_id, random.random())  # noqa: S311 - to spread retries
        return status, 0.0 if delayed else self._delay_seconds(error, context)

    async def delay(self, context: CallContext, status: StatusParts, seconds: float) -> None:
        """Wait before a failed call is answered. `failed` has returned the status and the time."""
        if status.code is grpc.StatusCode.UNAUTHENTICATED:
            # Anyone can make any number of these calls.
            await self.refused.hold(context.peer(), seconds)
        else:
            await asyncio.sleep(seconds)

    def started(self, path: str) -> None:
        """Count a call that starts. Each must be reported again when it ends."""
        self._counts.method(path).started += 1

    def ended_stream(self, path: str, code: str) -> None:
        """Count a stream that ended without an error, or was cancelled."""
        counts = self._counts.method(path)
        if code == "OK":
            counts.ok += 1
        else:
            counts.codes[code] += 1

    def _count(self, path: str, code: str, reason: str, seconds: float, request_id: str) -> None:
        """Count a call that failed, and add its status to its trace."""
        tracing.failed(code, reason, request_id)
        counts = self._counts.method(path)
        counts.codes[code] += 1
        self._counts.failures[reason] += 1
        if counts.kind == UNARY:
            counts.seconds.observe(seconds, request_id)

    def _delay_seconds(self, error: Exception, context: CallContext) -> float:
        if isinstance(error, RateLimited):
            # Each delay belongs to one caller and holds up no other. It leaves the caller time to
            # receive the answer.
            remaining = context.time_remaining()
            longest = LIMITED_SECONDS_MAX if remaining is None else remaining / 2
            return min(error.retry_seconds, LIMITED_SECONDS_MAX, longest)
        if isinstance(error, Overloaded):
            return self._pacer.delay_seconds(self._monotonic(), context.time_remaining())
        if isinstance(error, Unauthenticated):
            return self.refused.delay_seconds()
        return 0.0

    def succeeded(
        self, path: str, context: CallContext, start: float, audit_context: AuditContext
    ) -> None:
        """Log an audited call that succeeded."""
        request_id = audit_context.request_id
        self.log(path, context, start, "OK", None, request_id, audit_context=audit_context)

    def cancelled(
        self,
        path: str,
        context: CallContext,
        start: float,
        caller: Caller,
        entry: AuditContext | None = None,
        change: AuditContext | None = None,
    ) -> None:
        """Count, log and audit a call that was cancelled. `entry` and `change` as for `failed`."""
        reason = "CANCELLED"
        written = change or entry
        if written is None:
            request_id = request_id_of(context.invocation_metadata())
            logged = self._audit.should_log(caller.name, path, reason)
        else:
            request_id = written.request_id
            logged = change is not None or self._audit.record(written, reason, reason)
        self._count(path, reason, reason, self._monotonic() - start, request_id)
        if logged:
            self.log(path, context, start, reason, reason, request_id, audit_context=written)

    def log(
        self,
        path: str,
        context: CallContext,
        start: float,
        code: str,
        reason: str | None,
        request_id: str,
        error: Exception | None = None,
        audit_context: AuditContext | None = None,
    ) -> None:
        """Log a finished call."""
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": path,
            "code": code,
            "duration_ms": round((self._monotonic() - start) * 1_000, 3),
            "peer": context.peer(),
        }
        if reason is not None:
            fields["reason"] = reason
        if audit_context is not None:
            fields |= _fields_of(audit_context)
        elif trace_id := tracing.trace_id_of(context.invocation_metadata()):
            fields["trace_id"] = trace_id
        if error is not None and not isinstance(error, LatchkeyError):
            fields["exc_info"] = _without_values(error)
        elif error is not None:
            fields["cause"] = type(error.__cause__).__name__
        level = logging.ERROR if "exc_info" in fields else level_of(code, reason)
        self._log.log(level, "call", **fields)

    def rejected(
        self,
        path: str,
        seconds: float | None,
        error: Exception | None = None,
        peer: str = "",
    ) -> tuple[StatusParts, float]:
        """Count a call that is rejected before it starts.

        Returns what `failed` returns. `seconds` is how long the caller waits; None means no limit.
        Without an `error`, the call is rejected because too many others wait. An error that is not
        ours means that the call could not be handled. `peer` is the address of the caller.
        """
        if error is None:
            error = Overloaded("Too many calls are waiting to start; try again shortly.")
        counts = self._counts.method(path)
        counts.started += 1
        code, reason = code_of(error).name, reason_of(error)
        counts.codes[code] += 1
        self._counts.failures[reason] += 1
        request_id = next(NEW_IDS)
        if METHODS.get(path, OPEN).audited and not isinstance(error, Overloaded):
            entry = describe_call("", path, peer, request_id, details=Details(call_id=request_id))
            logged = self._audit.record(entry, code, reason)
        else:
            logged = self._audit.should_log("", path, reason)
        if logged:
            fields: dict[str, Any] = {"reason": reason, "peer": peer}
            if not isinstance(error, LatchkeyError):
                fields["exc_info"] = _without_values(error)
            level = level_of(code, reason)
            self._log.log(level, "call", request_id=request_id, method=path, code=code, **fields)
        if isinstance(error, Unauthenticated):
            delay_seconds = self.refused.delay_seconds()
        else:
            delay_seconds = self._pacer.delay_seconds(self._monotonic(), seconds)
        status = status_of(error, request_id, random.random())  # noqa: S311 - to spread retries
        return status, delay_seconds


def level_of(code: str, reason: str | None) -> int:
    """Return the level of the log line of a call that ended with this status.

    An alert on errors must fire when the service fails its callers, and callers must not be able to
    cause it. So refusals and short deadlines are warnings, and callers' mistakes ordinary.
    """
    if code in ("INTERNAL", "UNKNOWN") or reason == StoreUnavailable.reason:
        return logging.ERROR
    if code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED"):
        return logging.WARNING
    return logging.INFO


def end_with(context: CallContext, status: StatusParts) -> bytes:
    """Set the status of a refused call, and return what its handler returns.

    Not `abort`: grpcio keeps the exception that it raises until a full garbage collection. The
    exception's traceback contains every frame of the call, and a frame may hold a large request.
    """
    context.set_code(status.code)
    context.set_details(status.message)
    context.set_trailing_metadata(status.trailing_metadata)
    return b""


def new_ids() -> Iterator[str]:
    """Return the ids of a process's calls, which are for correlation and not secret.

    A random number for the process, and a counter: a random number for each call would take three
    times as long, and each Verify has an id.
    """
    return map(f"{random.getrandbits(48):012x}-".__add__, map(str, itertools.count(1)))


NEW_IDS: Final = new_ids()


def request_id_of(metadata: Metadata) -> str:
    """Return the caller's request id if `metadata` has a well-formed one, else a new id."""
    return given_id(metadata) or next(NEW_IDS)


def given_id(metadata: Metadata) -> str:
    """Return the caller's request id if `metadata` has a well-formed one, else ""."""
    given = dict(metadata or ()).get(REQUEST_ID_METADATA)
    return given if _is_id(given) else ""


def checked_id(given: str | bytes) -> str:
    """Return the caller's request id if it is well-formed, else a new id."""
    return given if _is_id(given) else next(NEW_IDS)


def _is_id(given: str | bytes | None) -> TypeGuard[str]:
    return (
        isinstance(given, str)
        and 0 < len(given) <= REQUEST_ID_LENGTH_MAX
        and given.replace("-", "").isalnum()
        and given.isascii()
    )


def describe_call(
    caller: str,
    path: str,
    peer: str,
    request_id: str,
    account_id: str = "",
    token_id: str = "",
    details: Details = NO_DETAILS,
) -> AuditContext:
    """Describe a call for its audit entry, without ids that do not have the expected form."""
    if not ACCOUNT_ID.fullmatch(account_id) or (
        # A credential is shorter than the secret of any token.
        len(account_id) >= CREDENTIAL_LENGTH and contains_secret(account_id)
    ):
        account_id = ""
    if not TOKEN_ID.fullmatch(token_id):
        token_id = ""
    peer = peer[:_PEER_LENGTH_MAX]
    return AuditContext(caller, path, peer, request_id, account_id, token_id, details)


def _fields_of(audit_context: AuditContext) -> dict[str, str]:
    """Return the log fields that the call's audit entry also contains, without empty ones."""
    fields = {
        "caller": audit_context.caller,
        "account_id": audit_context.account_id,
        "token_id": audit_context.token_id,
        **audit_context.details._asdict(),
    }
    return {name: value for name, value in fields.items() if value}


def _without_values(error: Exception) -> Any:
    """Return what to log of an unforeseen exception: its type and traceback, not its text.

    The text may quote a value (Postgres' DETAIL and Python's KeyError do), and that value may be a
    secret or a digest.
    """
    bare = RuntimeError(f"{type(error).__module__}.{type(error).__qualname__}")
    return (type(bare), bare, error.__traceback__)
