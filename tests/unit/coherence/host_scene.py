"""A host as unit tests see it: a lead that listens, and a sibling, with the clock passed in."""

import asyncio
import math
from pathlib import Path
from typing import Any

from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.host_lead import HostLead, Renewal
from latchkey_service.coherence.host_rows import HostRows
from latchkey_service.coherence.lead_server import LeadServer
from latchkey_service.coherence.log import Log, Registration
from latchkey_service.coherence.rows import RowId
from latchkey_service.coherence.verifier_reports import Report
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import StoreUnavailable

from tests.helpers.positions import at
from tests.helpers.waiting import eventually
from tests.unit.coherence.scene import LEASE_SECONDS, PRIMARY, Scene

__all__ = ["CLIENTS", "REPORT", "Host"]

REPORT = Report(0, 0, 0, [], 0)
CLIENTS = Report(3, 2, 1, ["a client"], 0)


class Renewer:
    """The lead's renewer, as far as its server uses it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.state = scene.state
        self.woken = self.reads = 0
        self.doubts = False
        self.news: list[tuple[Position, str]] = []

    def in_doubt(self) -> bool:
        return self.doubts

    def renew_now(self) -> None: ...

    def wake_to_acknowledge(self) -> None:
        self.woken += 1

    async def wait_for_lease(self, _deadline: float) -> None:
        raise StoreUnavailable("away")

    async def read_log_to(self, revision: int, _deadline: float) -> bool:
        self.reads += 1
        news, self.news = self.news, []
        self.scene.apply(*news)
        return self.state.cache.position.revision >= revision


class Postgres:
    """The sibling's row in Postgres, with the calls in order."""

    address = "db"
    in_doubt = False

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.calls: list[object] = []
        self.recounted: list[RowId] = []
        self.row = RowId("ver_sibling", 0)

    async def get(self) -> None: ...

    async def own_row(self) -> RowId:
        return self.row

    async def register(self, *, acknowledge: bool) -> Registration:
        self.calls.append(("register", acknowledge))
        self.row = RowId("ver_sibling", self.row.incarnation + 1)
        position = self.scene.state.cache.position
        return Registration(position, position.revision if acknowledge else 0, PRIMARY)

    async def read_log(self, applied: Position) -> Log:
        changes = self.scene.state.recent.after(applied)
        return Log(changes is not None, PRIMARY, self.scene.state.cache.position, changes or ())

    async def renew(self, applied: Position, acknowledged: int, _report: Report) -> Renewal:
        self.calls.append(("renew", acknowledged))
        log = await self.read_log(applied)
        return Renewal(log.known, log, math.inf)

    def prove(self, _server: object) -> None: ...

    async def recount(self, lead: RowId) -> None:
        self.recounted.append(lead)

    def failed(self, error: Exception) -> None:
        self.calls.append(error)

    async def remove(self) -> None:
        # What the lead has recorded when the row is removed.
        self.calls.append(("remove", self.scene.state.client_leases.latest_end(-math.inf)))

    async def leave(self, *, remove: bool) -> None:
        self.calls.append(("leave", remove))


class Host:
    """A lead that listens, and a sibling. Both read the scene's clock."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "lead")
        self.lead = Scene(at(5))
        self.incarnation = 1
        self.renewer = Renewer(self.lead)
        self.rules = HostLead(self.lead.state, lambda: self.incarnation)
        self.server = self.new_server()
        self.postgres = Postgres(self.lead)
        self.news: list[str] = []
        self.reader_gone = asyncio.Event()
        self.state: VerifierState[Any] = VerifierState(
            VerdictCache(10), ClientLeases(), LEASE_SECONDS
        )
        self.rows = HostRows(
            self.path,
            {"id": "ver_sibling", "process_id": 7, "start_time": 0.0},
            LEASE_SECONDS,
            self.postgres,  # type: ignore[arg-type]
            lambda: self.lead.now,
            self.news.append,
            lambda _host, _server: None,
            lambda: self.news.append("left Postgres"),
        )

    def new_server(self) -> LeadServer:
        return LeadServer(
            self.path,
            self.rules,
            self.renewer,  # type: ignore[arg-type]
            lambda: self.lead.now,
            "ver_lead",
            lambda: "db",
            lambda: None,
        )

    async def register(self, *, acknowledge: bool = True) -> None:
        self.state.register(*await self.rows.register(acknowledge=acknowledge), self.lead.now)

    async def renew(self, report: Report = REPORT) -> bool:
        """Renew as the lease renewer does. Return whether the lease was renewed."""
        began, state = self.lead.now, self.state
        acknowledged = state.acknowledgeable(began)
        renewed, log, ends = await self.rows.renew(state.cache.position, acknowledged, report)
        state.apply(log, began)
        if renewed:
            state.renew(began, acknowledged, ends)
            await self.rows.renewed(state)
        return renewed

    def acknowledgeable(self) -> int:
        return self.lead.state.acknowledgeable(self.lead.now)

    async def lead_dies(self) -> None:
        """Close the lead's socket and its connections."""
        await self.server.stop()
        await eventually(lambda: "gone" in self.news, "the sibling has noticed")
