"""A sibling has its row at the lead of its host, or in Postgres while there is no lead."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from latchkey_coherence.lease import server_lease_end
from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.host_lead import UNASKED_MAX
from latchkey_service.errors import StoreUnavailable

from tests.helpers.positions import at
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.unit.coherence.host_scene import CLIENTS, Host
from tests.unit.coherence.scene import LEASE_SECONDS


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    await host.server.start()
    async with asyncio.timeout(WAIT_SECONDS):
        yield host
    host.reader_gone.set()
    await host.rows.leave(remove=True)
    await host.server.stop()


async def test_a_sibling_shares_the_lease_of_the_lead(host: Host) -> None:
    """A sibling's lease ends before the lead's, however late it renews, and needs no query."""
    await host.register()
    host.lead.now += 1.0
    assert await host.renew()
    assert host.lead.state.lease_ends - 0.01 < host.state.lease_ends < host.lead.state.lease_ends
    assert host.rows.row == ("ver_lead", 1)
    assert host.postgres.calls == []


async def test_the_age_of_the_log_is_that_of_the_lead(host: Host) -> None:
    """A sibling's log is as old as the lead's. A client that is ahead of both is reset only after
    the lead has read the log again.
    """
    await host.register()
    host.lead.apply((at(6), "t"))
    began = host.lead.state.log_read_began
    host.lead.now += 0.5
    await host.renew()
    assert host.state.log_read_began == began < host.lead.now


async def test_the_lead_acknowledges_with_its_siblings(host: Host) -> None:
    """The lead's row acknowledges no revision that a sibling with a lease has not confirmed."""
    await host.register()
    await host.renew()
    host.lead.apply((at(6), "t"))
    assert host.acknowledgeable() == 5
    await host.renew()
    assert host.state.cache.position == at(6)
    assert host.acknowledgeable() == 5, "what was sent is not confirmed yet"
    await host.renew()
    assert host.acknowledgeable() == 6
    assert host.renewer.woken


async def test_only_the_last_confirmation_wakes_the_lead(host: Host) -> None:
    """While a client of the lead is behind, a sibling's confirmation does not allow any
    acknowledgement, so the lead does not look.
    """
    await host.register()
    await host.renew()
    leases, client = host.lead.state.client_leases, ClientLease()
    leases.grant(client, 5, host.lead.state.lease_ends)
    host.lead.apply((at(6), "t"))
    assert host.acknowledgeable() == 5
    await host.renew()
    woken = host.renewer.woken
    await host.renew()
    assert host.renewer.woken == woken
    leases.confirm(client, 6)
    assert host.acknowledgeable() == 6


async def test_the_lead_outwaits_a_sibling(host: Host) -> None:
    """A sibling that stops holds up the row until its lease has ended, and counts as outwaited."""
    await host.register()
    await host.renew()
    host.lead.apply((at(6), "t"))
    assert host.acknowledgeable() == 5
    host.lead.now = host.lead.state.lease_ends
    assert host.acknowledgeable() == 6
    assert host.lead.state.client_leases.processes_outwaited == 1
    assert host.lead.state.client_leases.outwaited == 0


async def test_a_sibling_reads_the_log_through_the_lead(host: Host) -> None:
    """A sibling that is level with the lead makes the lead read Postgres' log."""
    await host.register()
    await host.renew()
    host.renewer.news = [(at(6), "t")]
    log = await host.rows.read_log(at(5))
    assert host.renewer.reads == 1
    assert [change.token_ids for change in log.changes] == [("t",)]


async def test_a_question_for_the_log_is_answered_after_a_read(host: Host) -> None:
    """The lead reads Postgres' log even if it knows something new for the sibling: the sibling may
    have seen a later revision, and would take it for another history's.
    """
    await host.register()
    await host.renew()
    host.lead.apply((at(6), "t"))
    host.renewer.news = [(at(7), "u")]
    log = await host.rows.read_log(at(5))
    assert [change.position for change in log.changes] == [at(6), at(7)]


@pytest.mark.parametrize("position", [at(9), Position(5, 77)])
async def test_an_unknown_position_is_not_renewed(host: Host, position: Position) -> None:
    """A sibling on another history gets no lease, and what it confirms does not count."""
    await host.register()
    await host.renew()
    host.state.cache.reset(position)
    host.state.recent.restart(position)
    assert not await host.renew()
    assert host.acknowledgeable() == 0
    assert host.rows.row is None


async def test_a_lead_that_has_registered_again_knows_no_sibling(host: Host) -> None:
    """When the lead has lost its row, its siblings start over too, even at a known position:
    otherwise a sibling would confirm deletions while others may lack their rows.
    """
    await host.register()
    await host.renew()
    host.incarnation += 1
    assert not await host.renew()
    assert not host.state.registered
    assert host.state.rows_complete_at == math.inf


async def test_a_lead_without_a_lease_does_not_move_siblings(host: Host) -> None:
    """While Postgres does not answer the lead, its siblings take no rows."""
    await host.register()
    await host.renew()
    host.lead.now = host.lead.state.lease_ends
    with pytest.raises(StoreUnavailable):
        await host.renew()
    assert host.postgres.calls == []


async def test_a_sibling_survives_the_death_of_the_lead(host: Host) -> None:
    """Without its lead, a sibling gets a row that acknowledges nothing, keeps cache and lease, and
    renews at once. It then looks for dead rows, such as that of the lead.
    """
    await host.register()
    await host.renew()
    assert await host.rows.own_row() is None
    epoch, ends = host.state.epoch, host.state.lease_ends
    await host.lead_dies()
    host.lead.now += 0.5
    assert await host.renew()
    assert host.postgres.calls == [("register", False), ("renew", 5)]
    assert host.state.epoch == epoch
    assert host.state.lease_ends == server_lease_end(host.lead.now, LEASE_SECONDS) > ends
    assert host.rows.row == ("ver_sibling", 1)
    assert await host.rows.own_row() is not None


async def test_a_sibling_that_left_corrects_the_row_of_its_lead(host: Host) -> None:
    """Once a sibling has its own row, the row of its former lead counts it no longer. The sibling
    repeats that for a while, because the row may have been locked."""
    await host.register()
    await host.renew()
    await host.lead_dies()
    assert await host.renew()
    assert host.postgres.recounted == [("ver_lead", 1)]
    for _ in range(3):
        host.lead.now += LEASE_SECONDS
        assert await host.renew()
    assert host.postgres.recounted == 4 * [("ver_lead", 1)]
    assert await host.renew()
    assert len(host.postgres.recounted) == 4


async def test_a_silent_lead_is_left(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lead that is stopped costs its siblings a part of a lease, and no verify."""
    await host.register()
    await host.renew()

    async def hang(*_: object) -> dict[str, Any]:
        await host.reader_gone.wait()
        raise ConnectionResetError

    monkeypatch.setattr(host.server, "_respond", hang)
    host.rows._lead._silence_seconds = 0.05  # type: ignore[union-attr]
    assert await host.renew()
    assert host.postgres.calls == [("register", False), ("renew", 5)]


async def test_a_lead_that_stops_waits_for_its_siblings(host: Host) -> None:
    """A lead that stops refuses renewals. Its row stays until each sibling has a row, which was
    renewed, and has released its lease.
    """
    await host.register()
    await host.renew()
    host.server.close_to_siblings()
    await eventually(lambda: "closing" in host.news, "the sibling has heard")
    assert host.acknowledgeable() == 5
    leases = host.lead.state.client_leases
    assert leases.floor(host.lead.now) == 5
    assert await host.renew()
    assert host.postgres.calls == [("register", False), ("renew", 5)]
    await eventually(lambda: leases.floor(host.lead.now) is None, "the lease is released")


async def test_a_sibling_returns_to_the_lead(host: Host) -> None:
    """A sibling goes back without starting over. The lead has the end of its lease on record before
    its row is removed.
    """
    await host.register()
    await host.renew()
    await host.lead_dies()
    await host.renew()
    epoch = host.state.epoch
    host.server = host.new_server()
    await host.server.start()
    host.lead.now += LEASE_SECONDS
    host.lead.renew()
    assert await host.renew()
    assert host.postgres.calls[-1] == ("remove", host.state.lease_ends)
    assert host.rows.row == ("ver_lead", 1)
    assert host.state.epoch == epoch
    assert host.news[-1] == "left Postgres"
    assert await host.renew()
    assert host.rows.shared


async def test_a_sibling_that_is_behind_does_not_return(host: Host) -> None:
    """A row stays while the lead has applied more than the sibling has confirmed: the lead's row
    may have acknowledged that, so nothing else would make its Delete wait for the sibling.
    """
    await host.register()
    await host.renew()
    await host.lead_dies()
    await host.renew()
    host.server = host.new_server()
    await host.server.start()
    host.lead.now += LEASE_SECONDS
    host.lead.renew()
    host.lead.apply((at(6), "t"))
    await host.rows._return(host.state)
    assert not host.rows.shared
    assert ("remove", host.state.lease_ends) not in host.postgres.calls
    host.lead.now += LEASE_SECONDS / 2
    host.lead.renew()
    await host.renew()
    assert not host.rows.shared, "applied, and not yet acknowledged"
    host.lead.now += LEASE_SECONDS / 2
    await host.renew()
    assert not host.rows.shared, "a Delete may still read the row"
    await host.renew()
    assert host.rows.shared


async def test_a_sibling_need_not_ask_for_the_log(host: Host) -> None:
    """The lead sends new entries at once. Those that follow the sibling's position can be applied,
    once, and confirmed with the next renewal.
    """
    await host.register()
    await host.renew()
    host.lead.apply((at(6), "t"))
    host.server.on_news(True)
    await eventually(lambda: "unasked log" in host.news, "the sibling has heard")
    log = host.rows.unasked_log(host.state.cache.position)
    assert log is not None
    assert [change.position for change in log.changes] == [at(6)]
    assert host.rows.unasked_log(host.state.cache.position) is None
    assert host.renewer.reads == 0
    host.state.apply(log, host.lead.now)
    assert host.acknowledgeable() == 5, "applied, and not yet confirmed"
    await host.renew()
    assert host.acknowledgeable() == 6


async def test_siblings_hear_of_a_lease_that_is_much_longer(host: Host) -> None:
    """A lead that renews in order to acknowledge does not make its siblings renew. Its regular
    renewals do, and so does a change of its doubt about Postgres.
    """
    await host.register()
    host.server.on_news(False)
    await eventually(lambda: host.news == ["lease"], "the first lease")
    for step, heard in ((LEASE_SECONDS / 5, 1), (LEASE_SECONDS / 5, 2), (LEASE_SECONDS / 5, 2)):
        host.lead.now += step
        host.lead.renew()
        host.server.on_news(False)
        await host.renew()
        assert host.news == ["lease"] * heard
    host.renewer.doubts = True
    host.server.on_news(False)
    await eventually(lambda: host.news == ["lease"] * 3, "the doubt")


async def test_a_long_log_is_not_sent_unasked(host: Host) -> None:
    """The lead sends a log at most as long as `UNASKED_MAX`; a sibling asks for a longer one."""
    await host.register()
    await host.renew()
    host.lead.apply(*((at(6 + number), "t") for number in range(UNASKED_MAX)))
    host.server.on_news(True)
    await eventually(lambda: "log" in host.news, "the sibling has heard")
    assert host.rows.unasked_log(host.state.cache.position) is None
    log = await host.rows.read_log(host.state.cache.position)
    assert len(log.changes) == UNASKED_MAX


async def test_a_log_from_a_lead_that_was_left_is_not_applied(host: Host) -> None:
    """Once a sibling has left the lead, its lease follows Postgres, so logs of the lead end."""
    await host.register()
    await host.renew()
    host.lead.apply((at(6), "t"))
    host.server.on_news(True)
    await eventually(lambda: "unasked log" in host.news, "the sibling has heard")
    host.rows._lead_is_gone()
    assert host.rows.unasked_log(host.state.cache.position) is None


async def test_what_the_row_reports(host: Host) -> None:
    """The lead's row counts its siblings and their clients, and names each process."""
    await host.register()
    await host.renew(CLIENTS)
    assert host.lead.state.client_leases.count_processes(host.lead.now) == 1
    assert host.lead.state.client_leases.count_confirmed(0, host.lead.now) == 0
    assert host.server.counts() == (2, 1)
    (report,) = host.server.reports()
    assert (report.id, report.process_id, report.clients) == ("ver_sibling", 7, 3)
    assert report.acknowledged_revision == 5
