"""The lease renewer applies the logs that the lead of its host sends without a question, and lists
siblings in its row now and then."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.host_lead import Renewal
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.log import Log, Registration, Server
from latchkey_service.coherence.rows import RowId
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.verifier_table import Report, SiblingReport

from tests.helpers.positions import at
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.unit.coherence.scene import LEASE_SECONDS, PRIMARY, log

OTHER = Server("7000", "00000002")


class Rows:
    """A row at a lead, with the calls in order. Logs that are read reach position 9."""

    row = RowId("ver_lead", 1)
    in_doubt = False
    address = "db"

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.unasked: Log | None = None
        self.server = PRIMARY
        # The end of the lease that the lead shares.
        self.ends = math.inf
        # When the lead read the log.
        self.read_began = 99.0
        # Whether reads of the log may end.
        self.may_read = asyncio.Event()
        self.may_read.set()

    async def get(self) -> None: ...

    async def own_row(self) -> None: ...

    async def register(self, *, acknowledge: bool) -> Registration:
        return Registration(at(5), 5 if acknowledge else 0, PRIMARY)

    async def read_log(self, applied: Position) -> Log:
        self.calls.append("read")
        await self.may_read.wait()
        return log(at(9), (at(9), "t"))

    def unasked_log(self, _applied: Position) -> Log | None:
        unasked, self.unasked = self.unasked, None
        return unasked

    async def renew(self, applied: Position, acknowledged: int, report: Report) -> Renewal:
        self.calls.append(acknowledged)
        self.report = report
        read = Log(True, self.server, applied, (), read_began=self.read_began)
        return Renewal(True, read, self.ends)

    async def renewed(self, _state: object) -> None: ...

    def failed(self, error: Exception) -> None:
        raise error

    async def leave(self, *, remove: bool) -> None: ...


class Sibling:
    """A renewer with a lease, whose next renewal is far away."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.state: VerifierState[Any] = VerifierState(
            VerdictCache(10), ClientLeases(), LEASE_SECONDS
        )
        self.now = 100.0
        self.renewer = LeaseRenewer(self.state, "ver_sibling", self.rows, lambda: self.now)

    def send(self, sent: Log) -> None:
        """Send a log as the lead does."""
        self.rows.unasked = sent
        self.renewer.wake_to_apply()


@pytest.fixture
async def sibling() -> AsyncIterator[Sibling]:
    sibling = Sibling()
    task = asyncio.create_task(sibling.renewer.run())
    await eventually(sibling.renewer.has_lease, "the sibling has a lease")
    await eventually(lambda: sibling.renewer._busy_since == math.inf, "the renewer rests")
    sibling.rows.calls.clear()
    async with asyncio.timeout(WAIT_SECONDS):
        yield sibling
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_log_that_was_sent_is_confirmed_without_a_question(sibling: Sibling) -> None:
    """It is applied, and the next renewal confirms it. The log is not read."""
    sibling.send(log(at(6), (at(6), "t")))
    await eventually(lambda: 6 in sibling.rows.calls, "the revision is confirmed")
    assert sibling.rows.calls == [6]
    assert sibling.state.cache.position == at(6)


async def test_a_wake_up_reads_the_log_although_one_was_sent(sibling: Sibling) -> None:
    """The read begins after the wake-up. The log that was sent may be older."""
    sibling.renewer.wake()
    sibling.send(log(at(6), (at(6), "t")))
    assert await sibling.renewer.read_log_to(9, 200.0)
    assert "read" in sibling.rows.calls
    assert sibling.state.cache.position == at(9)


async def test_a_renewal_at_the_lead_is_not_a_read(sibling: Sibling) -> None:
    """A wake-up during a read of the log causes another read, although a renewal comes between:
    the lead answers that from its memory.
    """
    rows, renewer = sibling.rows, sibling.renewer
    rows.may_read.clear()
    renewer.wake()
    await eventually(lambda: rows.calls, "the first read")
    renewer.renew_now()
    renewer.wake()
    rows.may_read.set()
    await eventually(lambda: rows.calls.count("read") == 2, "the second read")
    assert rows.calls[1] != "read"


async def test_a_revision_is_missing_only_after_a_later_read(sibling: Sibling) -> None:
    """A read that began before the question does not prove that a revision does not exist."""
    rows, renewer = sibling.rows, sibling.renewer
    rows.may_read.clear()
    renewer.wake()
    await eventually(lambda: rows.calls, "the first read")
    sibling.now += 0.1
    asked = asyncio.create_task(renewer.read_log_to(10, 200.0))
    await asyncio.sleep(0)
    rows.may_read.set()
    assert not await asked
    assert rows.calls.count("read") == 2
    assert sibling.state.log_read_began == sibling.now


async def test_a_log_of_another_server_only_causes_a_renewal(sibling: Sibling) -> None:
    """Only a renewal may move the lease to another server (rule 3)."""
    sibling.rows.server = OTHER
    sibling.send(log(at(6), (at(6), "t"), server=OTHER))
    await eventually(lambda: sibling.state.server == OTHER, "the renewal has moved the lease")
    assert sibling.rows.calls[0] == 5
    assert sibling.state.cache.position == at(5)


@pytest.mark.parametrize(
    ("left", "next_after"), [(3.0, 1.0), (2.5, 0.7), (1.9, 0.25), (0.1, 0.25), (math.inf, 1.0)]
)
async def test_a_lease_that_began_earlier_is_renewed_earlier(
    sibling: Sibling, left: float, next_after: float
) -> None:
    """At the next renewal, 0.6 of the lease is left, whatever the lead has used of it already. A
    lead that does not renew is not asked continually.
    """
    sibling.rows.ends = sibling.now + left
    sibling.renewer.renew_now()
    await eventually(lambda: sibling.rows.calls, "the lease is renewed")
    assert sibling.renewer._next_renewal - sibling.now == pytest.approx(next_after)


async def test_the_row_lists_the_siblings_now_and_then(sibling: Sibling) -> None:
    """Regular renewals list the siblings. Those in between, of which each Delete causes one, leave
    the list out, but not the counts on which receipts depend. However many there are, the list is
    as recent as if there were none."""
    rows, renewer = sibling.rows, sibling.renewer
    listed = [SiblingReport("ver_other", 7, 0.0, 3, 2, 1, [], 5, 0.0)]
    renewer.attach_siblings(lambda: listed, lambda: (2, 1))

    async def acknowledged(revision: int) -> Report:
        sibling.send(log(at(revision), (at(revision), "t")))
        await eventually(lambda: revision in rows.calls, "the revision is confirmed")
        return rows.report

    report = await acknowledged(6)
    assert report.siblings is None
    assert (report.clients_confirmed, report.clients_outwaited) == (2, 1)
    sibling.now += LEASE_SECONDS / 4
    assert (await acknowledged(7)).siblings is None
    sibling.now += LEASE_SECONDS / 4
    assert (await acknowledged(8)).siblings == listed
    assert (await acknowledged(9)).siblings is None
    # A sibling has connected.
    rows.calls.clear()
    renewer.renew_now()
    await eventually(lambda: bool(rows.calls), "the row is renewed")
    assert rows.report.siblings == listed
