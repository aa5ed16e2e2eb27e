"""Decides which calls are recorded as traces, and records them.

`CallTracing.wrap` wraps the handlers of unary methods, so that the span covers everything that a
call does. Without traces, the handlers stay as they are. Streams and health checks are not
recorded.

The caller decides: `traceparent` says whether it records its part. So a caller could make a worker
record every call, and recording costs several times as much as a warm Verify. Therefore, a worker
has a limit per second. Calls without a known caller are not recorded, and do not use up the limit.
"""

import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from latchkey_service import tracing
from latchkey_service.access.authenticator import Authenticator
from latchkey_service.access.methods import BATCH_VERIFY, VERIFY
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.call_report import Metadata
from latchkey_service.rpc.managed_calls import HEALTH
from latchkey_service.tokens.verdict import Verdict

__all__ = ["CallTracing", "Handler", "StartCall"]

Handler = Callable[[bytes, CallContext], Awaitable[bytes]]
# Begins the span of a call, with its name, its parent and its attributes.
StartCall = Callable[[str, tracing.Parent | None, tracing.Attributes], tracing.Span]

# The statuses that the semantic conventions count as errors of a server. The others are answers.
_ERRORS: Final = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
# In an encoded VerifyResponse, the verdict comes first (`verify_calls.py`).
_VERDICT_TAG: Final = b"\x08"


class CallTracing:
    """Wraps handlers. One instance per worker process. Event loop only.

    `verify_share` and `managed_share` are the shares of calls to record if their callers have no
    trace. At most `per_second` calls are recorded per second, after a burst of the same number.
    """

    def __init__(
        self,
        start: StartCall,
        verify_share: float,
        managed_share: float,
        per_second: float,
        monotonic: Callable[[], float],
        randomness: Callable[[], float] = random.random,
    ) -> None:
        self._start = start
        self._verify_share = verify_share
        self._managed_share = managed_share
        self._per_second = per_second
        self._monotonic = monotonic
        self._randomness = randomness
        self._left = per_second
        self._counted_at = monotonic()
        self.limited = 0
        """Calls that were not recorded because of the limit."""

    def wrap(
        self,
        path: str,
        handler: Handler,
        metadata_of: Callable[[Any], Metadata],
        authenticator: Authenticator | None = None,
    ) -> Handler:
        """Return the handler to register in place of `handler`.

        `authenticator` identifies the callers; None if there is no policy.
        """
        if path.startswith(HEALTH):
            return handler
        verifies = path in (VERIFY, BATCH_VERIFY)
        share = self._verify_share if verifies else self._managed_share
        name = path.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        verdict = path == VERIFY

        async def call(data: bytes, context: CallContext) -> bytes:
            parent = tracing.parent_in(metadata_of(context))
            if parent is None:
                if not share or self._randomness() >= share:
                    return await handler(data, context)
            elif not parent.sampled:
                return await handler(data, context)
            # Before the limit: an anonymous call may wait long for its refusal.
            if not _is_known(authenticator, context) or not self._may_record():
                return await handler(data, context)
            span = self._start(name, parent, attributes)
            try:
                with tracing.within(span):
                    answer = await handler(data, context)
                if verdict and not span.code:
                    span.set(_verdict(answer))
                _end(span, span.code or "OK")
                return answer
            except BaseException:
                # Usually CANCELLED. Handlers turn errors into statuses, so others are their bugs.
                _end(span, span.code or "UNKNOWN")
                raise

        return call

    def _may_record(self) -> bool:
        now = self._monotonic()
        more = (now - self._counted_at) * self._per_second
        self._left = min(self._per_second, self._left + more)
        self._counted_at = now
        if self._left < 1:
            self.limited += 1
            return False
        self._left -= 1
        return True


def _is_known(authenticator: Authenticator | None, context: CallContext) -> bool:
    """Return whether a call has a known caller. Without a policy, every caller counts as known."""
    if authenticator is None:
        return True
    try:
        authenticator.identify(context)
    except Exception:  # noqa: BLE001 - the handler refuses the call, and reports why
        return False
    return True


def _end(span: tracing.Span, code: str) -> None:
    span.set({"rpc.response.status_code": code})
    span.end(code if code in _ERRORS else "")


def _verdict(answer: bytes) -> tracing.Attributes:
    """Return the verdict in an encoded VerifyResponse."""
    return {"latchkey.verdict": Verdict(answer[1]).name} if answer[:1] == _VERDICT_TAG else {}
