"""Where a sibling has its row: at the lead of its host, or in Postgres while there is no lead.

Owns the moves between the two. No move empties the cache, resets clients or delays Deletes.

- **Away from the lead**, if it is silent or will stop. The sibling registers a row that
  acknowledges nothing, and keeps cache, position and lease. The renewal that follows checks that
  Postgres' history holds the position. The lease that the lead granted stays on record there, and
  the lead's row represents it, until it has ended, or until the sibling releases it after that
  renewal. From then on, each Delete finds the sibling's row (rule 8).
- **Back**, once everything is acknowledged. The lead first records the end of the sibling's lease.
  Only then does the sibling remove its row. See `HostLead.adopt`.

If the lead says that it has no lease, the sibling stays: Postgres does not answer, and more
connections would not help.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.host_lead import Renewal
from latchkey_service.coherence.host_messages import log_of
from latchkey_service.coherence.lead_client import LeadConnection, LeadGone
from latchkey_service.coherence.log import Log, Registration, Server
from latchkey_service.coherence.rows import PostgresRows, RowId
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.verifier_table import OwnRow, Report
from latchkey_service.errors import StoreUnavailable
from latchkey_service.settings.logs import logger

__all__ = ["HostRows"]

# In leases. A lead that works on a request sends a line four times as often. A sibling renews when
# 0.6 of its lease is left (`lease_renewer.EARLY_LEASES`), so 0.4 is left for a row in Postgres.
SILENT_LEASES = 1 / 6
# In leases: between attempts to move back to the lead.
RETURN_LEASES = 1 / 2
# In leases: how long to correct the row of a lead that was left. The row of a dead lead is gone by
# then.
RECOUNT_LEASES = 2
# In leases: how long to wait for a renewal that acknowledges nothing new.
BUSY_LEASES = 4
# At the start, how long to look for the lead, and between two looks.
START_SECONDS = 2.0
START_PAUSE_SECONDS = 0.02
# Both processes read the same clock, but perhaps on different processors.
CLOCK_MARGIN_SECONDS = 0.001


class HostRows:
    """The row of a sibling. One call at a time."""

    def __init__(
        self,
        path: str,
        identity: dict[str, Any],
        lease_seconds: float,
        postgres: PostgresRows,
        clock: Callable[[], float],
        on_news: Callable[[str], None],
        on_server: Callable[[str, Server], None],
        on_left_postgres: Callable[[], None],
    ) -> None:
        self._path = path
        self._identity = identity
        self._silence_seconds = lease_seconds * SILENT_LEASES
        self._return_seconds = lease_seconds * RETURN_LEASES
        self._recount_seconds = lease_seconds * RECOUNT_LEASES
        self._postgres = postgres
        self._clock = clock
        # Called with the kind of news from the lead, and "gone" if it cannot be reached.
        self._on_news = on_news
        # Called after each renewal at the lead with the host and the server of its row.
        self._on_server = on_server
        # Called when the connection to Postgres is closed because the lead has the row.
        self._on_left_postgres = on_left_postgres
        self._lead: LeadConnection | None = None
        # Whether the sibling is on record at the lead, so that its lease comes from there.
        self._shared = False
        # Whether the row in Postgres is registered.
        self._own = False
        # The former lead's connection, until the sibling's row has been renewed.
        self._left: LeadConnection | None = None
        # The former lead's row, which counts this process, and until when to correct that.
        self._left_row: RowId | None = None
        self._recount_until = -math.inf
        self._row: RowId | None = None
        self._return_at = -math.inf
        self._busy_seconds = lease_seconds * BUSY_LEASES
        # What the row in Postgres acknowledged before.
        self._acknowledged = 0
        # All processes of a host start at the same time, so the lead may not listen yet.
        self._start_until = clock() + START_SECONDS
        self.in_doubt = False
        self.address = ""
        self._log = logger()

    @property
    def row(self) -> RowId | None:
        """The row that represents this process. None while it moves: then nothing is confirmed."""
        return self._row

    @property
    def shared(self) -> bool:
        """Whether the lease comes from the lead."""
        return self._shared

    async def get(self) -> None:
        """Connect where the row is. Raises StoreUnavailable."""
        if self._own:
            await self._postgres.get()

    async def own_row(self) -> OwnRow | None:
        """Return the row in Postgres, or None: the lead looks for dead rows, unless it cannot be
        reached."""
        return await self._postgres.own_row() if self._own else None

    async def register(self, *, acknowledge: bool) -> Registration:
        """Register with an empty cache (rule 2).

        At the lead only if that is where the earlier leases are on record, or if there are none.
        Otherwise, clients may answer under a lease that this lead does not know.
        """
        if not self._own and (self._shared or acknowledge):
            try:
                answer = await (await self._connected()).ask(
                    {"kind": "register", "acknowledge": acknowledge}
                )
            except LeadGone:
                self._lead_is_gone()
            else:
                self._shared = True
                position, acknowledged, server = answer["registration"]
                return Registration(Position(*position), acknowledged, Server(*server))
        registration = await self._postgres.register(acknowledge=acknowledge)
        self._own, self._row = True, self._postgres.row
        return registration

    async def read_log(self, applied: Position) -> Log:
        """Return the log after a position, from a read of Postgres that begins after this call."""
        if self._shared and self._lead is not None:
            try:
                answer = await self._lead.ask({"kind": "log", "applied": applied})
            except LeadGone:
                self._lead_is_gone()
            else:
                return log_of(answer["log"])
        return await self._postgres.read_log(applied)

    def unasked_log(self, applied: Position) -> Log | None:
        """Return the log that the lead has sent, as far as it follows `applied`, once."""
        if not self._shared or self._lead is None:
            return None
        unasked = self._lead.take_unasked()
        return unasked and unasked.following(applied)

    async def renew(self, applied: Position, acknowledged: int, report: Report) -> Renewal:
        """Renew at the lead, or in Postgres if the lead cannot be reached."""
        if self._shared and self._lead is not None:
            request = {"kind": "renew", "applied": applied, "acknowledged": acknowledged}
            request["report"] = {
                "clients": report.clients,
                "clients_confirmed": report.clients_confirmed,
                "clients_outwaited": report.clients_outwaited,
                "waiting_for": report.waiting_for,
            }
            try:
                answer = await self._lead.ask(request)
            except LeadGone:
                self._lead_is_gone()
            else:
                self._row = RowId(*answer["row"]) if answer["renewed"] else None
                self.in_doubt, self.address = answer["in_doubt"], answer["database_host"]
                ends = answer["ends"] - CLOCK_MARGIN_SECONDS
                return Renewal(answer["renewed"], log_of(answer["log"]), ends)
        if not self._own:
            # It acknowledges nothing, so every Delete waits for the renewal below.
            await self._postgres.register(acknowledge=False)
            self._own, self._row = True, self._postgres.row
            self._log.info("the lead of this host cannot be reached: this process has a row now")
        return await self._postgres.renew(applied, acknowledged, report)

    async def renewed(self, state: VerifierState[Any]) -> None:
        """Record a renewal, and move back to the lead when that is possible."""
        if self._shared:
            self._on_server(self.address, state.server)
            return
        self._postgres.prove(state.server)
        self.address = self._postgres.address
        if self._left_row is not None:
            # Again with each renewal for a while: the row may have been locked.
            await self._postgres.recount(self._left_row)
            if self._clock() > self._recount_until:
                self._left_row = None
        if self._left is not None:
            # The row represents this process from now on, on the same history.
            left, self._left = self._left, None
            left.release()
            left.drop()
        now, before = self._clock(), self._acknowledged
        self._acknowledged = state.acknowledged
        if now < self._return_at:
            return
        if state.acknowledged != before and now < self._return_at + self._busy_seconds:
            # A Delete may be about to read this row. Its receipt would count one process fewer.
            return
        self._return_at = now + self._return_seconds
        if state.acknowledged == state.cache.position.revision:
            await self._return(state)

    def failed(self, error: Exception) -> None:
        """Record that a call failed."""
        if self._shared:
            # The lead has no lease. Its connection works, or it would be `LeadGone`.
            self.in_doubt = True
            return
        self._postgres.failed(error)

    async def leave(self, *, remove: bool) -> None:
        """Give up the row, wherever it is."""
        if self._lead is not None:
            if remove:
                self._lead.release()
            self._lead.drop()
        if self._left is not None:
            self._left.drop()
        await self._postgres.leave(remove=remove and self._own)

    async def _connected(self) -> LeadConnection:
        while self._lead is None:
            try:
                self._lead = await LeadConnection.open(
                    self._path, self._identity, self._silence_seconds, self._on_news
                )
            except LeadGone:
                if self._clock() >= self._start_until:
                    raise
                await asyncio.sleep(START_PAUSE_SECONDS)
        self._start_until = -math.inf
        return self._lead

    def _lead_is_gone(self) -> None:
        if self._lead is not None:
            if self._shared:
                if self._left is not None:
                    self._left.drop()
                self._left, self._left_row = self._lead, self._row
                self._recount_until = self._clock() + self._recount_seconds
            else:
                self._lead.drop()
        self._lead, self._shared = None, False
        self._row = self._postgres.row if self._own else None
        self.in_doubt = False
        self._return_at = self._clock() + self._return_seconds
        self._on_news("gone")

    async def _return(self, state: VerifierState[Any]) -> None:
        """Ask the lead to take this process over, and remove the row if it has."""
        try:
            lead = await self._connected()
            answer = await lead.ask(
                {
                    "kind": "adopt",
                    "applied": state.cache.position,
                    "acknowledged": state.acknowledged,
                    "ends": state.lease_ends,
                    "server": state.server,
                }
            )
        except LeadGone:
            self._lead_is_gone()
            return
        except StoreUnavailable:
            # The lead has no lease, but this process has one.
            return
        if not answer["adopted"]:
            return
        # The lead has recorded it: only now may the row be removed.
        self._shared, self._own, self._row = True, False, RowId(*answer["row"])
        self._left_row = None
        await self._postgres.remove()
        self._on_left_postgres()
        self._log.info("the lead of this host has the row again")
