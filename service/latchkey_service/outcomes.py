"""What is told of a call that has ended: its status, its count, its line in the log, its entry.

Of many calls that end alike only some are written down, and refusals are paced: there may be
thousands in a second.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import structlog

from latchkey_service.access.policy import ANYONE, Caller
from latchkey_service.admission import Pacer
from latchkey_service.audit import AuditLog, Origin
from latchkey_service.errors import (
    TOO_LATE,
    Denied,
    LatchkeyError,
    Overloaded,
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


class Outcomes:
    """Tells of them. One for each worker process."""

    def __init__(self, counts: Counts, audit: AuditLog, monotonic: Callable[[], float]) -> None:
        self._counts = counts
        self._audit = audit
        self._monotonic = monotonic
        self._pacer = Pacer()
        self._log: structlog.stdlib.BoundLogger = logger()

    async def fail(
        self,
        path: str,
        context: Any,
        start: float,
        error: Exception,
        caller: Caller = ANYONE,
        origin: Callable[[str], Origin] | None = None,
    ) -> None:
        """Answer with the error's status, log and audit it. Always raises, as abort does.

        `origin` makes, of the caller's name, what an audited call is written down with.
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
        if origin is not None:
            told = self._audit.writes(name, path, code.name, reason)
            if told or not expected:
                written = origin(name)
                told = self._audit.note(written, code.name, reason)
        elif isinstance(error, Denied | Overloaded | Unavailable):
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
        if isinstance(error, Overloaded):
            delay = self._pacer.delay_seconds(self._monotonic())
            if delay:
                await asyncio.sleep(delay)
        status = status_of(error, request_id, random.random())  # noqa: S311 - to spread retries
        await context.abort(status.code, status.message, status.trailing_metadata)

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
            told, request_id = self._audit.note(origin, reason, reason), origin.request_id
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

    def refuse(self, path: str) -> tuple[StatusParts, float]:
        """Count a call that is refused before it has begun; return its status, and after how many
        seconds it is to have that."""
        error = Overloaded("Too many calls are waiting to be begun; try again shortly.")
        self._counts.calls[path.rpartition("/")[2], code_of(error).name] += 1
        request_id = _random_id()
        if self._audit.tells("", path, error.reason):
            self._log.info("call", request_id=request_id, method=path, reason=error.reason)
        delay_seconds = self._pacer.delay_seconds(self._monotonic())
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
