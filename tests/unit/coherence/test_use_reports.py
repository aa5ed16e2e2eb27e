"""Which reports of uses a server accepts on a stream, and when it confirms them."""

import asyncio
from collections.abc import Sequence

from latchkey_service.coherence.use_reports import (
    BURST,
    DEBT_MAX,
    USES_IN_REPORT_MAX,
    USES_PER_SECOND,
    UseReports,
)
from latchkey_service.coherence.watch_events import ReportedUse, ReportReceived, Request

from tests.helpers.positions import at
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.unit.coherence.scene import Scene

USE = ReportedUse("t1", "lk_…abcd", 1, 2.0, 1.0)


def test_each_number_is_accepted_once() -> None:
    """A report that is repeated on its stream is not recorded again."""
    reports = UseReports()
    assert reports.accept(1, 10, 100.0)
    assert not reports.accept(1, 10, 100.0)
    assert reports.accept(3, 10, 100.0)
    assert not reports.accept(2, 10, 100.0)
    assert not reports.accept(-4, 10, 100.0)
    assert (reports.confirm(100.0), reports.confirm(100.0)) == (3, 0)


def test_a_fast_client_waits_for_its_confirmation() -> None:
    """A client that reports more than its rate is confirmed later, in proportion."""
    reports, number = UseReports(), 0
    for number in range(1, BURST // USES_IN_REPORT_MAX + 1):
        assert reports.accept(number, USES_IN_REPORT_MAX, 100.0)
        assert reports.confirm(100.0) == number
    assert reports.accept(number + 1, USES_IN_REPORT_MAX, 100.0)
    assert reports.confirm(100.0) == 0
    assert reports.unconfirmed
    seconds = USES_IN_REPORT_MAX / USES_PER_SECOND
    assert reports.confirm(100.0 + 0.9 * seconds) == 0
    assert reports.confirm(100.0 + 1.1 * seconds) == number + 1


def test_a_client_that_does_not_wait_is_ignored() -> None:
    """Endless reports are not recorded, and a stopping client can send a burst at once."""
    reports = UseReports()
    accepted = sum(
        reports.accept(number, USES_IN_REPORT_MAX, 100.0) * USES_IN_REPORT_MAX
        for number in range(1, 1_000)
    )
    assert BURST <= accepted <= DEBT_MAX
    # Empty ones, too.
    reports = UseReports()
    assert sum(reports.accept(number, 0, 100.0) for number in range(1, 3 * BURST)) <= DEBT_MAX


async def test_reports_are_recorded_for_the_caller_and_confirmed() -> None:
    """Uses reach the recorder with the stream's caller, including those right before `released`."""
    scene = Scene(at(5))
    recorded: list[tuple[str, Sequence[ReportedUse]]] = []
    scene.sessions = scene.make_sessions(
        on_uses=lambda caller, uses: recorded.append((caller, uses))
    )
    serving = asyncio.create_task(
        scene.sessions.serve(scene.requests(), scene.send, "a client", "shop")
    )
    async with asyncio.timeout(WAIT_SECONDS):
        await scene.said.put(Request(at(5), 0, released=False, report=1, uses=[USE]))
        assert await scene.sent.get() == ReportReceived(1)
        await scene.said.put(Request(at(5), 0, released=False, report=2, uses=[USE]))
        await scene.said.put(Request(at(5), 0, released=True))
        await serving
    assert recorded == [("shop", [USE]), ("shop", [USE])]


async def test_a_late_confirmation_follows_a_renewal() -> None:
    """A confirmation that was held back is sent once the debt is paid, without further messages."""
    scene = Scene(at(5))
    serving = scene.serve()
    async with asyncio.timeout(WAIT_SECONDS):
        count = BURST // USES_IN_REPORT_MAX + 1
        for number in range(1, count + 1):
            uses = [USE] * USES_IN_REPORT_MAX
            await scene.said.put(Request(at(5), 0, released=False, report=number, uses=uses))
        await eventually(scene.said.empty, "all reports to be read")
        scene.now += 1.0
        scene.sessions.on_news(changed=False)
        while await scene.sent.get() != ReportReceived(count):
            pass
    serving.cancel()
    await asyncio.wait([serving])
