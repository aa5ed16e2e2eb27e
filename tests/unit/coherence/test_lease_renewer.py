"""The lease renewer acknowledges by itself, or renews: with rows that answer at once."""

import math
from typing import Any

import pytest
from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.host_lead import Renewal
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.log import Log, Registration
from latchkey_service.coherence.rows import RowId
from latchkey_service.coherence.verifier_reports import Report

from tests.helpers.positions import at
from tests.unit.coherence.scene import LEASE_SECONDS, Scene, log


class Rows:
    """The row of a process, and a log that a test extends."""

    address = ""
    in_doubt = False

    def __init__(self) -> None:
        self.in_postgres = True
        self.exists = True
        self.row = RowId("ver_a", 1)
        self.news: list[tuple[Position, str]] = []
        self.calls: list[tuple[str, int]] = []

    async def get(self) -> None: ...

    async def own_row(self) -> None:
        return None

    async def register(self, *, acknowledge: bool) -> Registration:
        raise AssertionError("the process is registered")

    async def read_log(self, applied: Position) -> Log:
        self.calls.append(("log", applied.revision))
        return self._log(applied)

    async def renew(self, applied: Position, acknowledged: int, _report: Report) -> Renewal:
        self.calls.append(("renew", acknowledged))
        return Renewal(self.exists, self._log(applied), math.inf)

    async def acknowledge(self, _applied: Position, acknowledged: int, _report: Report) -> bool:
        self.calls.append(("acknowledge", acknowledged))
        return self.exists

    async def renewed(self, state: Any) -> None: ...

    def failed(self, error: Exception) -> None:
        raise error

    async def leave(self, *, remove: bool) -> None: ...

    def _log(self, applied: Position) -> Log:
        new = [change for change in self.news if change[0].revision > applied.revision]
        return log(new[-1][0] if new else applied, *new)


class Renewing:
    """A renewer with a lease, whose next renewal is due in a third of it."""

    def __init__(self) -> None:
        self.scene, self.rows = Scene(at(5)), Rows()
        self.renewer = LeaseRenewer(self.scene.state, "ver_a", self.rows, lambda: self.scene.now)

    async def begin(self) -> None:
        await self.renewer._renew_once()
        self.rows.calls.clear()

    async def hear_of(self, position: Position, token_id: str) -> None:
        """Do what a notification of a deletion makes the renewer do."""
        self.rows.news.append((position, token_id))
        self.renewer.wake()
        await self.renewer._renew_once()


@pytest.fixture
async def renewing() -> Renewing:
    made = Renewing()
    await made.begin()
    return made


async def test_an_acknowledgement_extends_no_lease(renewing: Renewing) -> None:
    """Before a renewal is due, a deletion is acknowledged by itself. That neither extends the lease
    nor delays the renewal, because its commit may be undone, and it does not read the log."""
    state = renewing.scene.state
    ends, renewals = state.lease_ends, renewing.renewer.renewals
    for number in range(6, 9):
        renewing.scene.now += LEASE_SECONDS / 12
        await renewing.hear_of(at(number), f"tok_{number}")
        assert renewing.rows.calls[-2:] == [("log", number - 1), ("acknowledge", number)]
        assert state.acknowledged == number
    assert (state.lease_ends, renewing.renewer.renewals) == (ends, renewals)
    renewing.scene.now += LEASE_SECONDS / 12
    await renewing.renewer._renew_once()
    assert renewing.rows.calls[-1] == ("renew", 8)
    assert state.lease_ends > ends


async def test_a_due_renewal_acknowledges_too(renewing: Renewing) -> None:
    """If a renewal is due, no other statement acknowledges."""
    renewing.scene.now += LEASE_SECONDS / 3
    await renewing.hear_of(at(6), "tok_6")
    assert renewing.rows.calls == [("log", 5), ("renew", 6)]
    assert renewing.scene.state.acknowledged == 6


async def test_a_refused_acknowledgement_leads_to_a_renewal(renewing: Renewing) -> None:
    """If the row does not exist, or another history answers, nothing counts as acknowledged. The
    renewal that follows at once finds out, and the process loses its lease."""
    renewing.rows.exists = False
    await renewing.hear_of(at(6), "tok_6")
    assert renewing.scene.state.acknowledged == 5
    assert renewing.renewer.has_lease()
    await renewing.renewer._renew_once()
    assert [call for call, _ in renewing.rows.calls] == ["log", "acknowledge", "renew"]
    assert not renewing.renewer.has_lease()
    assert not renewing.scene.state.registered


async def test_a_sibling_renews_at_its_lead(renewing: Renewing) -> None:
    """A process whose row is its lead's confirms with a renewal there, which costs no commit."""
    renewing.rows.in_postgres = False
    await renewing.hear_of(at(6), "tok_6")
    assert renewing.rows.calls == [("log", 5), ("renew", 6)]
    assert renewing.scene.state.acknowledged == 6
