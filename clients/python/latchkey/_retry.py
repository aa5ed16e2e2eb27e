"""Which calls are tried again, when, and within what time.

Done here and not by gRPC's own retryPolicy, for three reasons. The contract gives the minimal
delay as google.rpc.RetryInfo, and gRPC heeds only `grpc-retry-pushback-ms`. gRPC starts the next
attempt even when the delay outlasts the deadline, so the caller waits for nothing and then learns
"deadline exceeded" in place of the cause. And a policy in the service config is not there when a
channel is passed in. What gRPC does by itself stays on: a transparent retry, of any method, when
the transport knows that the server never saw the call (gRFC A6).

Pure but for `run`, which gets clock, sleep and randomness passed in.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import grpc

from latchkey.errors import LatchkeyError, ResourceExhausted, Unavailable, invalid

_log = logging.getLogger("latchkey")

T = TypeVar("T")

# A verify stands in the way of every request that is served: better no answer than a late one.
VERIFY_TIMEOUT_SECONDS: Final = 1.0
# A thousand verifies cost one look-up, but up to 21 MB of answer (`_channel`).
BATCH_VERIFY_TIMEOUT_SECONDS: Final = 2.0
# One or two transactions; a database that fails over is back within seconds.
MANAGEMENT_TIMEOUT_SECONDS: Final = 5.0
# Delete may have to wait out the lease of a verifier that does not answer (coherence rule 8), which
# is 3 s long by default and 5 s at most, and half a second more. The default must be longer than
# that, by far: an unconfirmed deletion is what nobody wants to read.
DELETE_TIMEOUT_SECONDS: Final = 10.0

# gRFC A6's own limit; more attempts than that are load, not luck.
ATTEMPTS_MAX: Final = 5
# The first retry after about a server's scheduling hiccup; all four delays sum up to at most
# 0.75 s, which leaves the last attempt some of Verify's second.
BACKOFF_FIRST_SECONDS: Final = 0.05
BACKOFF_FACTOR: Final = 2.0
BACKOFF_MAX_SECONDS: Final = 1.0

# Retry throttling as in gRFC A6: an outage must not be met with five times the load.
BUDGET_TOKENS_MAX: Final = 20.0
BUDGET_TOKENS_PER_SUCCESS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Policy:
    """How a method is called."""

    timeout_seconds: float
    """Default deadline of the whole call, attempts and delays included."""
    retry: bool
    """Whether the contract makes a repeated call harmless when nobody knows what became of it."""


POLICIES: Final[Mapping[str, Policy]] = {
    # Not idempotent: when the answer is lost, a second attempt finds the name taken, or makes a
    # second token whose twin's secret nobody knows.
    "Create": Policy(MANAGEMENT_TIMEOUT_SECONDS, retry=False),
    "Get": Policy(MANAGEMENT_TIMEOUT_SECONDS, retry=True),
    "List": Policy(MANAGEMENT_TIMEOUT_SECONDS, retry=True),
    # A repeated deletion answers with the first one's receipt.
    "Delete": Policy(DELETE_TIMEOUT_SECONDS, retry=True),
    "Verify": Policy(VERIFY_TIMEOUT_SECONDS, retry=True),
    "BatchVerify": Policy(BATCH_VERIFY_TIMEOUT_SECONDS, retry=True),
    "InvalidateAll": Policy(DELETE_TIMEOUT_SECONDS, retry=True),
    "GetStatus": Policy(MANAGEMENT_TIMEOUT_SECONDS, retry=True),
    "AuditService.List": Policy(MANAGEMENT_TIMEOUT_SECONDS, retry=True),
}


class Budget:
    """How much retrying is left. Retries stop while more than half of it is used up (gRFC A6)."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = BUDGET_TOKENS_MAX

    def succeeded(self) -> None:
        """Count a call that was answered."""
        self._tokens = min(BUDGET_TOKENS_MAX, self._tokens + BUDGET_TOKENS_PER_SUCCESS)

    def failed(self) -> bool:
        """Count an attempt that is worth another one. Return whether another one is affordable."""
        self._tokens = max(0.0, self._tokens - 1.0)
        return self._tokens > BUDGET_TOKENS_MAX / 2


def delay_seconds(failures: int, retry_after: timedelta | None, randomness: float) -> float:
    """Return how long to wait after `failures` (≥ 1) attempts failed. `randomness` is in [0, 1).

    Half of the backoff is jitter, so that clients that failed together do not return together.
    A delay that the server asks for is a minimum, and jitter of up to half of it comes on top.
    """
    ceiling = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * BACKOFF_FACTOR ** (failures - 1))
    least = max(retry_after.total_seconds() if retry_after else 0.0, ceiling / 2)
    return least + min(least, BACKOFF_MAX_SECONDS) / 2 * randomness


def may_retry(rpc: str, error: LatchkeyError) -> bool:
    """Tell whether the contract makes another attempt harmless, and worth it, after this failure.

    What is refused for load was not begun, so that any method may be tried again. The server says
    when. Without that it is something else that time does not mend, such as a message's size.
    """
    if isinstance(error, ResourceExhausted):
        return error.retry_after is not None
    # Not so a deadline, which is the call's own and has passed, or a client that is closed.
    return error.code is grpc.StatusCode.UNAVAILABLE and POLICIES[rpc].retry


def checked_timeout(timeout_seconds: float | None) -> float | None:
    """Return `timeout_seconds`; None is "the default". Raises InvalidArgument: every wait ends."""
    if timeout_seconds is not None and not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
        raise invalid("timeout_seconds", "has to be more than 0 and not endless")
    return timeout_seconds


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
    """Call `attempt(seconds left)` until it answers, or trying again is not allowed or no use.

    Raises what the last attempt raised: at once, not at the deadline, when the next attempt could
    only start after it. What is tried again `may_retry` says: any other failure is an answer.
    """
    end = monotonic() + timeout_seconds
    left = timeout_seconds
    failures = 0
    while True:
        try:
            answer = await attempt(left)
        except (Unavailable, ResourceExhausted) as error:
            if not may_retry(rpc, error):
                raise
            failures += 1
            affordable = budget.failed()
            if failures >= ATTEMPTS_MAX or not affordable:
                raise
            delay = delay_seconds(failures, error.retry_after, randomness())
            if monotonic() + delay >= end:
                raise
            _log.debug("%s: attempt %d failed, next one in %.3f s", rpc, failures, delay)
        else:
            budget.succeeded()
            return answer
        # Outside the handler, so that a later failure does not drag this one along as its context.
        await sleep(delay)
        left = max(0.0, end - monotonic())
