"""Delivers events about tokens to the operator's URL, signed as Standard Webhooks defines.

Each worker claims events that are due, sends them, and removes those that the receiver accepted. So
each event is delivered at least once, in any order. Owns attempts, back-off and the format of the
messages. It does not own the SQL (`tokens/event_store.py`) or which change writes which event
(`tokens/event_table.py`).
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import httpx2
from standardwebhooks import Webhook

from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.event_store import Backlog, Event, EventStore

__all__ = ["CONCURRENCY", "EVENTS_MAX", "Deliverer", "body_of", "delay_seconds"]

# Requests of a worker at the same time. Each takes about 2 ms of the event loop, and calls wait for
# that. With 20 at once, the 95th percentile of Deletes was five times as high.
CONCURRENCY: Final = 4
EVENTS_MAX: Final = 20
"""Events of one claim."""
# For a whole request. A receiver should store the event, answer, and act on it later.
REQUEST_SECONDS: Final = 10.0
# Longer than all requests of a claim take. If the worker dies, others deliver its events after this
# time.
CLAIM_SECONDS: Final = 90.0
POLL_SECONDS: Final = 1.0
# An event is tried again after 5, 10, 20 ... seconds, and then every hour, each time minus up to
# half of that. So events that failed together do not return together.
BACKOFF_FIRST_SECONDS: Final = 5.0
BACKOFF_MAX_SECONDS: Final = 3_600.0
BACKLOG_SECONDS: Final = 30.0


def body_of(event: Event) -> str:
    """Return the message of an event: JSON in the shape that Standard Webhooks recommends."""
    data = {
        "account_id": event.account_id,
        "token_id": event.token_id,
        "name": event.name,
        "expire_time": None if event.expire_time is None else _text_of(event.expire_time),
        "caller": event.caller,
    }
    message = {"type": f"token.{event.type}", "timestamp": _text_of(event.time), "data": data}
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


def delay_seconds(attempts: int, randomness: float) -> float:
    """Return the delay after `attempts` (≥ 1) failed attempts. `randomness` is in [0, 1)."""
    ceiling = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(attempts - 1, 20))
    return ceiling * (1 - randomness / 2)


class Deliverer:
    """Delivers events. One instance per worker. Event loop only."""

    def __init__(
        self,
        store: EventStore,
        url: str,
        secrets: Sequence[str],
        retry_days: int,
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._store = store
        self._url = url
        self._signers = [Webhook(secret) for secret in secrets]
        self._retry_days = retry_days
        # No redirects: the operator has chosen who receives events.
        self._client = client or httpx2.AsyncClient(
            timeout=REQUEST_SECONDS,
            limits=httpx2.Limits(max_connections=CONCURRENCY),
            follow_redirects=False,
        )
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self.delivered = 0
        self.failed = 0
        """Attempts that failed."""
        self.abandoned = 0
        self.backlog: Backlog | None = None
        """As of the last count."""

    async def run(self) -> None:
        """Deliver events until cancelled."""
        while True:
            try:
                go_on = await self.deliver_once()
            except StoreUnavailable:
                # Health and the lease report this.
                go_on = False
            except Exception as error:  # noqa: BLE001 - logged and repeated
                logger().warning("delivery of events failed", error=type(error).__name__)
                go_on = False
            if not go_on:
                await asyncio.sleep(jittered(POLL_SECONDS, random.random()))  # noqa: S311 - jitter

    async def follow_backlog(self) -> None:
        """Count the events that are not delivered, for the metrics, until cancelled."""
        while True:
            try:
                self.backlog = await self._store.backlog()
            except Exception as error:  # noqa: BLE001 - logged and repeated
                logger().warning("count of events failed", error=type(error).__name__)
            await asyncio.sleep(jittered(BACKLOG_SECONDS, random.random()))  # noqa: S311 - jitter

    async def deliver_once(self) -> bool:
        """Deliver the events that are due, up to EVENTS_MAX.

        Returns whether to go on at once: there may be more, and the receiver accepts some.
        """
        events = await self._store.claim(EVENTS_MAX, CLAIM_SECONDS)
        if not events:
            return False
        problems = await asyncio.gather(*map(self._send, events))
        done = [e.id for e, problem in zip(events, problems, strict=True) if problem is None]
        if done:
            await self._store.remove(done)
            self.delivered += len(done)
        failed = [e for e, problem in zip(events, problems, strict=True) if problem is not None]
        if failed:
            await self._postpone(failed, Counter(p for p in problems if p is not None))
        return bool(done) and len(events) == EVENTS_MAX

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _postpone(self, failed: Sequence[Event], problems: "Counter[str]") -> None:
        self.failed += len(failed)
        # The URL may contain a token of the receiver.
        logger().warning("events not delivered", events=len(failed), problems=dict(problems))
        chances = [(e.id, delay_seconds(e.attempts, random.random())) for e in failed]  # noqa: S311 - jitter
        for _, event_type, token_id in await self._store.postpone(chances, self._retry_days):
            self.abandoned += 1
            logger().error(
                "event abandoned", type=event_type, token_id=token_id, retry_days=self._retry_days
            )

    async def _send(self, event: Event) -> str | None:
        """Send an event; return None if the receiver accepted it, and otherwise the problem."""
        try:
            body, message_id, now = body_of(event), f"msg_{event.message_id.hex}", datetime.now(UTC)
            headers = {
                "content-type": "application/json",
                "user-agent": "latchkey",
                "webhook-id": message_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": " ".join(s.sign(message_id, now, body) for s in self._signers),
            }
            async with (
                self._slots,
                asyncio.timeout(REQUEST_SECONDS),
                # Does not read the body of the answer, which may be of any size.
                self._client.stream("POST", self._url, content=body.encode(), headers=headers) as a,
            ):
                return None if a.is_success else f"status {a.status_code}"
        except Exception as error:  # noqa: BLE001 - one event must not stop the others
            return type(error).__name__


def _text_of(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
