"""Wakes the lease renewer when a Delete notifies the verifiers (rule 10).

Owns LISTEN on the lease renewer's connection, and the check that notifications arrive. A
notification is only a hint: without it, a Delete takes up to a third of a lease longer, and nothing
else changes.
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

# Between probes. A probe wakes every listener of the database, so probes of all processes cost the
# square of their number. A connection that is dead is noticed without one, because the lease is
# renewed on it. A probe notices a pooler that keeps the notifications to itself.
PROBE_SECONDS = 30.0
# Between probes after one that did not arrive.
RETRY_SECONDS = 2.0
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
    """Listens on the connections that `connect` returns, and calls `wake`. `state` says whether
    notifications arrive.

    A pooler may accept LISTEN but never deliver the notifications. So the listener sends a probe to
    itself with `notify` after each connect, and then at intervals. It sends the probe over another
    connection: a server session behind a pooler delivers its own notifications to the client that
    it serves at that moment.
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
        self._connect = connect
        self._notify = notify
        self._wake = wake
        self._timeout_seconds = max(interval_seconds / 2, PROBE_TIMEOUT_SECONDS_MIN)
        # Contains this process's name, to distinguish its probes from those of others.
        self._probes = (f"probe {name} {number}" for number in itertools.count())
        self._expected = ""
        self._arrived = asyncio.Event()
        # Set by a new connection, which has not been tested.
        self._connected = asyncio.Event()
        self._log = logger()

    async def connect(self) -> "Connection":
        """Return a new connection that listens, for the lease renewer. Raises StoreUnavailable.

        The caller reads the log after it has connected, so a notification that it missed before has
        no effect.
        """
        connection = await self._connect()
        if self.state is Notifications.OFF:
            return connection
        if self.state is Notifications.ARRIVE:
            # They arrived on the earlier connection.
            self._becomes(Notifications.UNKNOWN)
        try:
            with translate_errors():
                await connection.add_listener(CHANNEL, self._receive)
        except StoreUnsupported:
            self._becomes(Notifications.OFF)
        except BaseException:
            connection.terminate()
            raise
        else:
            self._connected.set()
        return connection

    def disconnected(self) -> None:
        """Record that the connection is closed, because another process listens for this one."""
        if self.state is not Notifications.OFF:
            self._becomes(Notifications.UNKNOWN)

    async def run(self) -> None:
        """Test each new connection, and later at intervals, until cancelled."""
        while self.state is not Notifications.OFF:
            pause = PROBE_SECONDS if self.state is Notifications.ARRIVE else RETRY_SECONDS
            try:
                async with asyncio.timeout(jittered(pause, random.random())):  # noqa: S311 - jitter
                    await self._connected.wait()
            except TimeoutError:
                if self.state is Notifications.UNKNOWN:
                    # Not connected yet, or not again.
                    continue
            self._connected.clear()
            try:
                arrived = await self._arrives()
            except StoreUnsupported:
                self._becomes(Notifications.OFF)
                return
            except StoreUnavailable:
                arrived = False
            except Exception as error:  # noqa: BLE001 - logged, and tried again
                self._log.warning("listening failed", error=type(error).__name__)
                arrived = False
            self._becomes(Notifications.ARRIVE if arrived else Notifications.SILENT)

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
            log = self._log.warning
            if state in (Notifications.ARRIVE, Notifications.UNKNOWN):
                log = self._log.info
            log("notifications changed", state=state.name)
