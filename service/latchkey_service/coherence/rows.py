"""Where a process has its row, for the lease renewer: in Postgres.

`host_rows` contains the alternative for the siblings of a host.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.host_lead import Renewal
from latchkey_service.coherence.log import Log, Registration, Server
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.verifier_table import Identity, OwnRow, Report
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import DedicatedConnection

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["PostgresRows", "RowId", "Rows"]

# A stop does not wait for a database that hangs: the row expires by itself.
REMOVE_SECONDS = 1.0


class RowId(NamedTuple):
    """Names one registration of a row."""

    id: str
    incarnation: int


class Rows(Protocol):
    """What the lease renewer asks. One call at a time."""

    @property
    def row(self) -> RowId | None:
        """The row that represents this process now."""

    @property
    def in_doubt(self) -> bool:
        """Whether the process that renews that row doubts that Postgres works."""

    @property
    def address(self) -> str:
        """The host of the list that is in use, or empty."""

    async def get(self) -> None:
        """Connect. Raises StoreUnavailable."""

    async def own_row(self) -> OwnRow | None:
        """Return the row in Postgres, to look for dead rows, or None if another process does."""

    async def register(self, *, acknowledge: bool) -> Registration:
        """Register with an empty cache (rule 2)."""

    async def read_log(self, applied: Position) -> Log:
        """Return the log after a position."""

    def unasked_log(self, applied: Position) -> Log | None:
        """Return the log after a position if one was sent without a question. Once for each."""

    async def renew(self, applied: Position, acknowledged: int, report: Report) -> Renewal:
        """Renew the lease, acknowledge, and return the log after a position (rule 3)."""

    async def renewed(self, state: VerifierState[Any]) -> None:
        """Record that the lease was renewed, and that `state` contains the result."""

    def failed(self, error: Exception) -> None:
        """Record that a call failed. The state of its connection is unknown."""

    async def leave(self, *, remove: bool) -> None:
        """Give up the row. With `remove`, no client holds a lease, so Deletes need not wait."""


class PostgresRows:
    """A row in Postgres."""

    in_doubt = False

    def __init__(
        self,
        identity: Identity,
        primary: Primary,
        connect: "Callable[[], Awaitable[Connection]]",
    ) -> None:
        self._identity = identity
        self._primary = primary
        self._connection = DedicatedConnection(connect)
        self._incarnation = 0

    @property
    def row(self) -> RowId:
        """The row of this process."""
        return RowId(self._identity.id, self._incarnation)

    @property
    def address(self) -> str:
        """The host of the connection."""
        connection = self._connection.current
        return "" if connection is None else self._primary.host_of(connection)

    async def get(self) -> None:
        """Connect. Raises StoreUnavailable."""
        await self._connection.get()

    async def own_row(self) -> OwnRow:
        """Return the row."""
        return OwnRow(await self._connection.get(), self._identity)

    async def register(self, *, acknowledge: bool) -> Registration:
        """Commit the row."""
        self._incarnation += 1
        row = await self.own_row()
        return await row.register(self._incarnation, acknowledge=acknowledge)

    async def read_log(self, applied: Position) -> Log:
        """Read the log from Postgres."""
        return await (await self.own_row()).read_log(applied)

    def unasked_log(self, applied: Position) -> None:
        """Return None: Postgres sends no log."""

    async def renew(self, applied: Position, acknowledged: int, report: Report) -> Renewal:
        """Renew the row, with the host that the statement is sent to."""
        row = await self.own_row()
        report = report._replace(database_host=self.address, warnings=self._primary.warnings())
        renewed, log = await row.renew(self._incarnation, applied, acknowledged, report)
        # Infinite: the lease of a row is as long as its own clock says.
        return Renewal(renewed, log, float("inf"))

    async def renewed(self, state: VerifierState[Any]) -> None:
        """Record the primary."""
        self.prove(state.server)

    def prove(self, server: Server) -> None:
        """Record that a renewal succeeded on the connection."""
        if self._connection.current is not None:
            self._primary.renewed(self._connection.current, server)

    async def recount(self, lead: RowId) -> None:
        """Let the row of a lead no longer count processes that have their own rows. A failure only
        makes receipts count them twice.
        """
        with contextlib.suppress(StoreUnavailable):
            await (await self.own_row()).recount(*lead)

    def failed(self, error: Exception) -> None:
        """Drop the connection, and perhaps leave its host."""
        self._primary.failed(self._connection.current, error)
        self._connection.drop()

    def drop(self) -> None:
        """Close the connection."""
        self._connection.drop()

    async def leave(self, *, remove: bool) -> None:
        """Remove the row. Without `remove`, Deletes wait until its lease has expired."""
        # The task may have been cancelled in the middle of a statement, which leaves its connection
        # unusable.
        self._connection.drop()
        if remove and self._incarnation:
            await self.remove()

    async def remove(self) -> None:
        """Remove the row, within a bound, and close the connection. Never raises."""
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(REMOVE_SECONDS):
                await (await self.own_row()).remove(self._incarnation)
        self._connection.drop()
