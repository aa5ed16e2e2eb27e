"""What is told of a call that has ended: its status, its count, its line in the log, its entry.

Of many calls that end alike only some are written down, and refusals are paced: there may be
thousands in a second.
"""

import random
from collections.abc import Callable
from typing import Any

import structlog

from latchkey_service.access.policy import ANYONE, Caller
from latchkey_service.admission import Pacer
from latchkey_service.audit import AuditLog, Origin
from latchkey_service.deadlines import budget_seconds
from latchkey_service.errors import (
    TOO_LATE,
    Denied,
    LatchkeyError,
    Overloaded,
    RateLimited,
    StatusParts,
    Unavailable,
    code_of,
    reason_of,
    status_of,
)
from latchkey_service.log import Counts, logger

__all__ = ["Outcomes", "request_id_of"]

REQUEST_ID_METADATA = "x-request-id"
REQUEST_ID_LENGTH_MAX = 64
# Who asks more than it may is told this late at most, and so cannot ask again at once.
LIMITED_SECONDS_MAX = 0.25


class Outcomes:
    """Tells of them. One for each worker process."""

    def __init__(self, counts: Counts, audit: AuditLog, monotonic: Callable[[], float]) -> None:
        self._counts = counts
        self._audit = audit
        self._monotonic = monotonic
        self._pacer = Pacer()
        self._log: structlog.stdlib.BoundLogger = logger()

    def fail(
        self,
        path: str,
        context: Any,
        start: float,
        error: Exception,
        caller: Caller = ANYONE,
        origin: Origin | None = None,
        make_origin: Callable[[str], Origin] | None = None,
    ) -> tuple[StatusParts, float]:
        """Count, log and audit a call that failed; return its status, and after how many seconds
        it is to have that.

        An audited call is written down with its `origin`, or with what `make_origin` makes of the
        caller's name where it has none yet.
        """
        if isinstance(error, TimeoutError):
            error = Unavailable(TOO_LATE)
        name = error.caller if isinstance(error, Denied) else caller.name
        code, reason = code_of(error), reason_of(error)
        expected = isinstance(error, LatchkeyError)
        written: Origin | None = None
        # Of many failures of one kind only some are written down and logged: there may be thousands
        # in a second.
        told = True
        if origin is not None and origin.recorded:
            # Its entry was written with its change, which stands.
            written = origin
        elif make_origin is not None:
            told = self._audit.writes(name, path, code.name, reason)
            if told or not expected:
                written = origin or make_origin(name)
            if told and written is not None:
                told = self._audit.note(written, code.name, reason)
        elif expected:
            told = self._audit.tells(name, path, reason)
        request_id = request_id_of(context) if written is None else written.request_id
        if told or not expected:
            self.tell(
                path,
                context,
                start,
                code.name,
                reason,
                request_id,
                # The cause, for the operator. An error of the domain tells it by its reason, and a
                # caller's mistakes come too often to print where they were found.
                None if expected and error.__cause__ is None else error,
                written,
            )
        self._counts.calls[path.rpartition("/")[2], code.name] += 1
        status = status_of(error, request_id, random.random())  # noqa: S311 - to spread retries
        return status, self._delay_seconds(error, context)

    def _delay_seconds(self, error: Exception, context: Any) -> float:
        if isinstance(error, RateLimited):
            # Each caller's by itself: it holds up nobody else's.
            return min(error.retry_seconds, LIMITED_SECONDS_MAX, budget_seconds(context) / 2)
        if isinstance(error, Overloaded):
            return self._pacer.delay_seconds(self._monotonic(), budget_seconds(context))
        return 0.0

    def end(
        self,
        path: str,
        context: Any,
        start: float,
        reason: str,
        caller: Caller,
        origin: Origin | None,
    ) -> None:
        """Count, log and audit a call that ended without an answer of ours: CANCELLED, ABORTED."""
        self._counts.calls[path.rpartition("/")[2], reason] += 1
        if origin is None:
            told, request_id = self._audit.tells(caller.name, path, reason), request_id_of(context)
        else:
            request_id = origin.request_id
            told = origin.recorded or self._audit.note(origin, reason, reason)
        if told:
            self.tell(path, context, start, reason, reason, request_id, origin=origin)

    def tell(
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
        """Log a call that has ended."""
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

    def refuse(self, path: str, seconds: float | None) -> tuple[StatusParts, float]:
        """Count a call that is refused before it has begun, and before it is known who calls.

        As `fail`. `seconds`: how long its caller waits; None: for ever.
        """
        error = Overloaded("Too many calls are waiting to be begun; try again shortly.")
        self._counts.calls[path.rpartition("/")[2], code_of(error).name] += 1
        request_id = _random_id()
        if self._audit.tells("", path, error.reason):
            self._log.info(
                "call",
                request_id=request_id,
                method=path,
                code=code_of(error).name,
                reason=error.reason,
            )
        delay_seconds = self._pacer.delay_seconds(self._monotonic(), seconds)
        status = status_of(error, request_id, random.random())  # noqa: S311 - to spread retries
        return status, delay_seconds


def request_id_of(context: Any) -> str:
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
    return _random_id()


def _random_id() -> str:
    # To find a call by, and no secret: it need not cost a system call.
    return f"{random.getrandbits(64):016x}"


def _without_values(error: Exception) -> Any:
    """Return what is logged of an unforeseen exception: types and places, not its text.

    The text may quote a value (Postgres' DETAIL and Python's KeyError do), and that value may be a
    secret or a digest.
    """
    bare = RuntimeError(f"{type(error).__module__}.{type(error).__qualname__}")
    return (type(bare), bare, error.__traceback__)
