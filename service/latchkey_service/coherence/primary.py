"""Tracks which server is the primary, and the warnings about servers.

It owns the diagnosis of a failing server, too. Opening and choosing connections belongs to
`postgres.connections`.

The primary is the host on which the lease is renewed, because a renewal counts only if it is
durable, and a deposed primary cannot make one durable. If renewals fail on a host, the next host in
the list is tried (rule 12).
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import asyncpg

from latchkey_service.coherence.verifier_state import Server
from latchkey_service.errors import NotReplicated, StoreUnavailable
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.postgres.connections import Connector
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Primary"]

# Interval between checks whether other hosts claim to be the primary. A person has to act on the
# result, so a shorter interval would not help.
OTHERS_SECONDS = 10.0
# Time limit for each checked host, and for a diagnosis: as long as a connection may take, and as
# long again for an answer.
ASK_SECONDS = 2.0

# The errors of a statement that Postgres did not answer in time, whichever side's limit ended it.
_HANGS = (TimeoutError, asyncpg.QueryCanceledError, asyncpg.PostgresConnectionError, OSError)

STANDBY_MISSING = "Reads answer, commits hang: the synchronous standby is missing."
# Commits of the same role that wait for a standby. Commits of other roles are not visible.
_COMMITS_WAIT = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE wait_event = 'SyncRep' AND datname = current_database())
"""


class Primary:
    """Opens connections for the lease renewer, and tracks the primary by the renewer's successes
    and failures.

    Use it on one event loop only.
    """

    def __init__(self, connector: Connector, on_change: Callable[[], None]) -> None:
        self._connector = connector
        # Called when the lease moves to another server, so that all other connections follow.
        self._on_change = on_change
        self._log = logger()
        self._server: tuple[str, Server] | None = None
        self._standby_missing = False
        # The host of the last renewal, if that failed.
        self._failed_on: str | None = None
        self._others: tuple[str, ...] = ()
        self._diagnosis: asyncio.Task[None] | None = None

    async def connect(self) -> "Connection":
        """Return a connection for the lease renewer. Raises StoreUnavailable."""
        return await self._connector.connect_with_generic_plans()

    @property
    def server(self) -> tuple[str, Server] | None:
        """The host that the lease was last renewed on, and its server; None before the first."""
        return self._server

    @property
    def standby_missing(self) -> bool:
        """Whether commits hang because the synchronous standby is missing."""
        return self._standby_missing

    @property
    def other_primaries(self) -> int:
        """How many other hosts of the list say that they are the primary."""
        return sum(host != self.host for host in self._others)

    @property
    def host(self) -> str:
        """The host that the lease was last renewed on, or empty before the first renewal."""
        return "" if self._server is None else self._server[0]

    def host_of(self, connection: "Connection") -> str:
        """Return the host of the list that a connection was made to."""
        return self._connector.host_of(connection)

    def warnings(self) -> list[str]:
        """Return one sentence for each fault that an operator should repair."""
        found = [STANDBY_MISSING] if self._standby_missing else []
        found += [
            f"Another host of the list also says that it is the primary: {host}. The lease is "
            f"renewed on {self.host}. Stop the one that was deposed, or make it a standby."
            for host in self._others
            # The lease may have moved to that host since the check.
            if host != self.host
        ]
        return found

    def renewed(self, connection: "Connection", server: Server) -> None:
        """Record that the lease was renewed on `connection`, which reached `server`."""
        self._connector.prove(connection)
        self._failed_on = None
        if self._standby_missing:
            self._standby_missing = False
            self._log.info("commits are replicated again")
        self._moved((self._connector.host_of(connection), server))

    def shared(self, host: str, server: Server) -> None:
        """Record that the lead of this host has renewed the lease there."""
        self._connector.prove(host)
        self._failed_on = None
        self._moved((host, server))

    def _moved(self, found: tuple[str, Server]) -> None:
        if found == self._server:
            return
        changed, self._server = self._server is not None, found
        self._log.info(
            "database server",
            address=found[0],
            system_identifier=found[1].identifier,
            timeline=found[1].timeline,
        )
        if changed:
            self._on_change()

    def failed(self, connection: "Connection | None", error: Exception) -> None:
        """Record that the lease could not be renewed on `connection`, or that connecting failed
        (None).
        """
        if connection is None:
            return
        host = self._connector.host_of(connection)
        again, self._failed_on = self._failed_on == host, host
        # If the commit is not durable, or there is no answer, the server may be a deposed primary.
        # Other failures, such as a lock that is held too long, are usually transient. Moving to
        # another host loses the lease if that host is deposed, so for other failures, the process
        # moves only after the second one.
        hangs = isinstance(error, NotReplicated) or isinstance(error.__cause__, _HANGS)
        if again or hangs:
            self._connector.leave(connection)
        if isinstance(error, NotReplicated):
            self._standby_is_missing()
        elif self._diagnosis is None and isinstance(error, StoreUnavailable):
            self._diagnosis = asyncio.create_task(self._diagnose(host), name="diagnose database")

    async def run(self) -> None:
        """Check the other hosts of the list at intervals. Ends when cancelled."""
        while True:
            await asyncio.sleep(jittered(OTHERS_SECONDS, random.random()))  # noqa: S311 - jitter
            await self.look_at_others()

    async def look_at_others(self) -> None:
        """Ask each other host of the list whether it is a primary, and log any change."""
        if not self.host:
            return
        asked = [host for host in self._connector.hosts() if host != self.host]
        others = tuple([host for host in asked if await self._says_primary(host)])
        if others != self._others:
            self._others = others
            if others:
                self._log.warning(
                    "another host of the list also says that it is the primary",
                    hosts=others,
                    lease_on=self.host,
                )
            else:
                self._log.info("no other host of the list says that it is the primary")

    async def close(self) -> None:
        """Cancel the diagnosis in progress, if any."""
        if self._diagnosis is not None:
            self._diagnosis.cancel()
            await asyncio.gather(self._diagnosis, return_exceptions=True)

    async def _says_primary(self, host: str) -> bool:
        """Return whether a host accepts writes; False if it does not answer in time."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                # The connector refuses a standby.
                (await self._connector.connect_to(host)).terminate()
        except (StoreUnavailable, TimeoutError):
            return False
        except Exception as error:  # noqa: BLE001 - it rejects this role, or is not for Latchkey
            self._log.warning("host check failed", host=host, error=type(error).__name__)
            return False
        return True

    async def _diagnose(self, host: str) -> None:
        """Find out whether commits hang on a host that answers reads."""
        try:
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(ASK_SECONDS):
                    connection = await self._connector.connect_to(host)
                    try:
                        waiting = await connection.fetchval(_COMMITS_WAIT, timeout=ASK_SECONDS)
                    finally:
                        connection.terminate()
                    # The lease may have left this host in the meantime. Commits that hang here then
                    # say nothing about the lease's current host.
                    if waiting and self.host in ("", host):
                        self._standby_is_missing()
        except Exception as error:  # noqa: BLE001 - a failed diagnosis is inconclusive
            self._log.warning("database diagnosis failed", error=type(error).__name__)
        finally:
            self._diagnosis = None

    def _standby_is_missing(self) -> None:
        if not self._standby_missing:
            self._standby_missing = True
            self._log.error(STANDBY_MISSING)
