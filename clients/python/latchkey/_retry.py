"""Decides which calls are retried, when, and within what time.

The library does this itself, instead of gRPC's retryPolicy, for three reasons:

- The contract sends the minimum delay as google.rpc.RetryInfo. gRPC reads only
  `grpc-retry-pushback-ms`.
- gRPC starts another attempt even if the delay outlasts the deadline. The caller would wait for
  nothing, and then get "deadline exceeded" instead of the cause.
- A channel that the application made does not have the library's service config.

gRPC's transparent retry stays on. It repeats any method if the transport knows that the server
never saw the call (gRFC A6).

This module is pure, except for `run`, which receives clock, sleep and randomness as arguments.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Final, TypeVar

import grpc

from latchkey.errors import LatchkeyError, ResourceExhausted, Unavailable, invalid

_log = logging.getLogger("latchkey")

T = TypeVar("T")

# Every request to your service waits for a verify. No answer is better than a late one.
VERIFY_TIMEOUT_SECONDS: Final = 1.0
# A thousand verifies cost one look-up, but up to 27 MB of answers (see `_channel`).
BATCH_VERIFY_TIMEOUT_SECONDS: Final = 2.0
# One or two transactions. A database that fails over is back within seconds.
MANAGEMENT_TIMEOUT_SECONDS: Final = 5.0
# A change that narrows a token, such as Delete, may have to outwait the lease of a verifier that
# does not answer (coherence rule 8). That lease lasts 3 s by default and at most 5 s, and the wait
# adds half a second. The default must be far longer, because an unconfirmed change is the worst
# result for a user.
CHANGE_TIMEOUT_SECONDS: Final = 10.0

# gRFC A6's own limit. More attempts add load but rarely succeed.
ATTEMPTS_MAX: Final = 5
# The first retry outlasts a scheduling delay of the server. All four delays add up to at most
# 0.75 s, which leaves part of Verify's second for the last attempt.
BACKOFF_FIRST_SECONDS: Final = 0.05
BACKOFF_FACTOR: Final = 2.0
BACKOFF_MAX_SECONDS: Final = 1.0

# Retry throttling as in gRFC A6. Without it, an outage would multiply the load by five.
BUDGET_TOKENS_MAX: Final = 20.0
BUDGET_TOKENS_PER_SUCCESS: Final = 0.1


# The default deadline of the whole call, including attempts and delays. Every method may be
# retried: repeating it is harmless by the contract, even after an answer was lost. Create and
# Rotate are repeated under one request_id, which the client sets.
TIMEOUTS_SECONDS: Final[Mapping[str, float]] = {
    # A repeated Create or Rotate ends the secret that nobody received, and waits for that.
    **dict.fromkeys(("Create", "Rotate"), CHANGE_TIMEOUT_SECONDS),
    **dict.fromkeys(
        ("Get", "GetLimits", "GetUsage", "Find", "List", "Enable", "ReportSecret"),
        MANAGEMENT_TIMEOUT_SECONDS,
    ),
    **dict.fromkeys(("Delete", "DeleteAll", "Disable", "Update"), CHANGE_TIMEOUT_SECONDS),
    **dict.fromkeys(
        ("Import", "InvalidateAll", "RetireSecrets", "RevokeSecret"), CHANGE_TIMEOUT_SECONDS
    ),
    "Verify": VERIFY_TIMEOUT_SECONDS,
    "BatchVerify": BATCH_VERIFY_TIMEOUT_SECONDS,
    **dict.fromkeys(("GetStatus", "AuditService.List"), MANAGEMENT_TIMEOUT_SECONDS),
}


class Budget:
    """The retry budget. Retries stop while more than half of it is used up (gRFC A6)."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = BUDGET_TOKENS_MAX

    def succeeded(self) -> None:
        """Record a call that was answered."""
        self._tokens = min(BUDGET_TOKENS_MAX, self._tokens + BUDGET_TOKENS_PER_SUCCESS)

    def failed(self) -> bool:
        """Record a failed attempt that may be retried. Return whether the budget allows a retry."""
        self._tokens = max(0.0, self._tokens - 1.0)
        return self._tokens > BUDGET_TOKENS_MAX / 2


def delay_seconds(failures: int, retry_after: timedelta | None, randomness: float) -> float:
    """Return the delay after `failures` (≥ 1) failed attempts. `randomness` is in [0, 1).

    Half of the backoff is jitter, so that clients that failed together do not return together.
    A delay that the server requests is a minimum. Jitter of up to half of it is added.
    """
    ceiling = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * BACKOFF_FACTOR ** (failures - 1))
    least = max(retry_after.total_seconds() if retry_after else 0.0, ceiling / 2)
    return least + min(least, BACKOFF_MAX_SECONDS) / 2 * randomness


def may_retry(error: LatchkeyError) -> bool:
    """Return whether another attempt is useful after this failure. It is always harmless.

    With a call refused because of load, the server sends a delay. Without a delay, waiting does not
    help. For example, the message is too large.
    """
    if isinstance(error, ResourceExhausted):
        return error.retry_after is not None
    # Exclude an exceeded deadline, which applies to the whole call, and a closed client.
    return error.code is grpc.StatusCode.UNAVAILABLE


def checked_timeout(timeout_seconds: float | None) -> float | None:
    """Return `timeout_seconds`. None means the default. Raises InvalidArgument unless positive."""
    if timeout_seconds is not None and not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
        raise invalid("timeout_seconds", "must be positive and finite")
    return timeout_seconds


def _next_delay(
    error: LatchkeyError, failures: int, budget: Budget, randomness: Callable[[], float]
) -> float | None:
    """Return the delay before the next attempt, or None if there must be no other attempt."""
    if not may_retry(error):
        return None
    affordable = budget.failed()
    if failures + 1 >= ATTEMPTS_MAX or not affordable:
        return None
    return delay_seconds(failures + 1, error.retry_after, randomness())


async def run(
    rpc: str,
    attempt: Callable[[float], Awaitable[T]],
    *,
    timeout_seconds: float,
    budget: Budget,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    randomness: Callable[[], float] = random.random,
) -> T:
    """Call `attempt(seconds left)` until it succeeds or `may_retry` rejects another attempt.

    Raises the error of the last attempt that may have reached the service, or else of the last one.
    If the next attempt could only start after the deadline, it raises at once.
    """
    # The error of the last attempt that may have taken effect.
    sent: Unavailable | None = None
    end = monotonic() + timeout_seconds
    left = timeout_seconds
    failures = 0
    while True:
        try:
            answer = await attempt(left)
        except (Unavailable, ResourceExhausted) as error:
            if isinstance(error, Unavailable) and not error.unsent:
                sent = error
            delay = _next_delay(error, failures, budget, randomness)
            failures += 1
            if delay is None or monotonic() + delay >= end:
                if sent is not None:
                    raise sent from None
                raise
            _log.debug("%s: attempt %d failed, retry in %.3f s", rpc, failures, delay)
        else:
            budget.succeeded()
            return answer
        # Sleep outside the handler, or a later error would carry this one as its context.
        await sleep(delay)
        left = max(0.0, end - monotonic())
