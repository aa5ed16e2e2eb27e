"""What a worker does about events: which it records, their delivery, and counts of expiries.

Builds these parts from the settings. Without a webhook it records and delivers nothing, and does
not load the HTTP library.
"""

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Any

from latchkey_service.postgres.connections import Pool
from latchkey_service.process.metric_families import Families
from latchkey_service.process.periodic import announce_expiring, count_expiring
from latchkey_service.settings.settings import Settings
from latchkey_service.settings.webhook import event_types
from latchkey_service.settings.webhook_secrets import read_secrets
from latchkey_service.tokens.event_store import EventStore
from latchkey_service.tokens.event_table import EXPIRING, NO_EVENTS, Outbox

if TYPE_CHECKING:
    from latchkey_service.process.webhook import Deliverer

__all__ = ["Announcements"]


class Announcements:
    """The parts of one worker. Raises WebhookError if the file with the secrets is unusable."""

    def __init__(self, settings: Settings, pool: Pool, now: Callable[[], datetime]) -> None:
        self.outbox = NO_EVENTS
        self._store = EventStore(pool)
        self._days = [int(text) for text in settings.webhook_expiring_days.split(",")]
        self._now = now
        self._counts = settings.metrics_listen is not None
        self._expiring: dict[int, int] = {}
        self._deliverer: Deliverer | None = None
        if settings.webhook_url is not None and settings.webhook_secret_file is not None:
            self.outbox = Outbox(event_types(settings.webhook_events))
            from latchkey_service.process import webhook  # noqa: PLC0415 - loads the HTTP library

            self._deliverer = webhook.Deliverer(
                self._store,
                settings.webhook_url.get_secret_value(),
                read_secrets(settings.webhook_secret_file),
                settings.webhook_retry_days,
            )

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """Return what runs until the worker stops."""
        return [] if self._deliverer is None else [self._deliverer.run()]

    def upkeep(self) -> list[Coroutine[Any, Any, None]]:
        """Return what one worker of a host does: what it finds is the same in all of them."""
        works = []
        if self._counts:
            works.append(count_expiring(self._store, self._expiring, self._now))
        if self._deliverer is not None:
            works.append(self._deliverer.follow_backlog())
            if EXPIRING in self.outbox.wanted:
                works.append(announce_expiring(self._store, self.outbox, self._days, self._now))
        return works

    def add_metrics(self, found: Families) -> None:
        """Add the metrics of events and expiries."""
        for days, number in self._expiring.items():
            found.add("latchkey_tokens_expiring", number, f"{days}d")
        if (deliverer := self._deliverer) is None:
            return
        found.add("latchkey_webhook_deliveries", deliverer.delivered, "delivered")
        found.add("latchkey_webhook_deliveries", deliverer.failed, "failed")
        found.add("latchkey_webhook_deliveries", deliverer.abandoned, "abandoned")
        if deliverer.backlog is not None:
            found.add("latchkey_webhook_events", deliverer.backlog.events)
            found.add("latchkey_webhook_oldest_event_seconds", deliverer.backlog.oldest_seconds)

    async def close(self) -> None:
        """Close the connections to the receiver."""
        if self._deliverer is not None:
            await self._deliverer.close()
