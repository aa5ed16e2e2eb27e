"""Wakes the lease renewer when a Delete notifies the verifiers (rule 10).

Owns the listening connection and the check that notifications arrive. A notification is only a
hint: without it, a Delete takes up to a third of a lease longer, and nothing else changes.
"""

import asyncio
import enum
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import asyncpg

from latchkey_service.coherence.verifier_table import CHANNEL
from latchkey_service.errors import StoreUnavailable, StoreUnsupported
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.postgres.connections import translate_errors
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Notifications", "NotifyListener"]

RETRY_SECONDS = 1.0
# Minimum time limit of a probe. With a shorter one, a busy machine would look like a broken
# connection.
PROBE_TIMEOUT_SECONDS_MIN = 0.25


class Notifications(enum.IntEnum):
    """Whether notifications arrive, numbered as in the contract."""

    UNKNOWN = 0
    ARRIVE = 1
    SILENT = 2
    OFF = 3


class NotifyListener:
    """Listens on a dedicated connection and calls `wake`. `state` says whether notifications
    arrive.

    A connection may be dead without an error, and a pooler may accept LISTEN but never deliver the
    notifications. So the listener regularly sends a probe to itself with `notify`, and detects a
    failure within `interval_seconds`. It sends the probe over another connection: a server session
    behind a pooler delivers its own notifications to the client that it serves at that moment.
    """

    def __init__(
        self,
        name: str,
        connect: "Callable[[], Awaitable[Connection]]",
        notify: Callable[[str], Awaitable[None]],
        wake: Callable[[], None],
        interval_seconds: float,
        *,
        enabled: bool,
    ) -> None:
        self.state = Notifications.UNKNOWN if enabled else Notifications.OFF
        self._enabled = enabled
        self._connect = connect
        self._notify = notify
        self._wake = wake
        # The pause before a probe takes the first half of the interval. The probe must arrive in
        # the second half.
        self._pause_seconds = interval_seconds / 2
        self._timeout_seconds = max(interval_seconds / 2, PROBE_TIMEOUT_SECONDS_MIN)
        # Contains this process's name, to distinguish its probes from those of others.
        self._probes = (f"probe {name} {number}" for number in itertools.count())
        self._expected = ""
        self._arrived = asyncio.Event()
        self._log = logger()

    async def run(self) -> None:
        """Listen until cancelled, or until the engine turns out not to support notifications."""
        while self._enabled:
            try:
                await self._listen()
            except StoreUnsupported:
                self._becomes(Notifications.OFF)
                return
            except StoreUnavailable:
                self._becomes(Notifications.SILENT)
            except Exception as error:  # noqa: BLE001 - logged, and tried again
                self._log.warning("listening failed", error=type(error).__name__)
                self._becomes(Notifications.SILENT)
            await asyncio.sleep(jittered(RETRY_SECONDS, random.random()))  # noqa: S311 - jitter

    async def _listen(self) -> None:
        """Listen and send probes until the connection fails or a probe does not arrive."""
        connection = await self._connect()
        try:
            with translate_errors():
                await connection.add_listener(CHANNEL, self._receive)
            # Earlier notifications were missed.
            self._wake()
            while not connection.is_closed() and await self._arrives():
                self._becomes(Notifications.ARRIVE)
                await asyncio.sleep(self._pause_seconds)
            self._becomes(Notifications.SILENT)
        finally:
            connection.terminate()

    async def _arrives(self) -> bool:
        self._arrived.clear()
        self._expected = next(self._probes)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._notify(self._expected)
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    def _receive(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if payload == self._expected:
            self._arrived.set()
        elif isinstance(payload, str) and not payload.startswith("probe "):
            self._wake()

    def _becomes(self, state: Notifications) -> None:
        if state != self.state:
            self.state = state
            log = self._log.info if state is Notifications.ARRIVE else self._log.warning
            log("notifications changed", state=state.name)
