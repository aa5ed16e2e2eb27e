"""Draws of calls: which share a statement, how calls are divided, and which are not accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from latchkey_coherence.rate import RateLimit, Share
from latchkey_service.coherence.watch_events import WantedCalls
from latchkey_service.errors import CacheStartedOver, Overloaded, StoreUnavailable, Unavailable
from latchkey_service.tokens import rate_draws
from latchkey_service.tokens.rate_draws import RateDraws
from latchkey_service.tokens.rate_table import Issued, Want
from latchkey_service.tokens.token_rates import DENIED_SECONDS_MIN, TokenRates

from tests.helpers.waiting import eventually

LIMIT = RateLimit(1_000, 1, 1_000)
DEADLINE = 1e9


class Database:
    """Replaces the connection and the statement. Issues up to `calls` of each token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.calls: dict[str, int] = {}
        self.limit: RateLimit | None = LIMIT
        self.live = True
        self.statements: list[list[Want]] = []
        self.seconds = 0.0
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.lease_ends = 1e9
        self.gate = asyncio.Event()
        self.gate.set()
        self.dropped = 0
        monkeypatch.setattr(rate_draws, "draw_all", self.draw_all)
        monkeypatch.setattr(rate_draws, "DedicatedConnection", lambda _connect: self)
        self.current = None

    # As a DedicatedConnection.

    async def get(self) -> Any:
        return None

    def drop(self) -> None:
        self.dropped += 1

    # As LeasedReads.

    async def begin(self, _deadline: float) -> None:
        return None

    async def accept(self, _snapshot: Any, _began: Any, _deadline: float) -> None:
        if self.refusal is not None:
            raise self.refusal

    def require_lease(self) -> None:
        if self.now >= self.lease_ends:
            raise StoreUnavailable("no lease")

    async def draw_all(
        self, _connection: Any, wants: Sequence[Want]
    ) -> tuple[dict[str, Issued], Any]:
        await self.gate.wait()
        self.statements.append(list(wants))
        self.now += self.seconds
        if self.failure is not None:
            raise self.failure
        issued = {}
        for token_id, needed, ahead in wants:
            calls = min(needed + ahead, self.calls.get(token_id, 0))
            issued[token_id] = Issued(token_id, self.live, self.limit, calls, 0.25)
        return issued, None

    def draws(self) -> RateDraws:
        connect: Callable[[], Any] = lambda: None  # noqa: E731 - never called
        return RateDraws(connect, lambda _disconnect: self, lambda: self.now)  # type: ignore[arg-type, return-value]  # a stand-in


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    return Database(monkeypatch)


async def test_draws_that_wait_share_a_statement(database: Database) -> None:
    """Draws that arrive during a statement share the next one. Needed calls come first, in the
    order of arrival, and then those ahead of demand."""
    draws = database.draws()
    database.calls = {"t1": 5, "t2": 1}
    database.gate.clear()
    first = asyncio.ensure_future(draws.draw([Want("t1", 1, 0)], DEADLINE))

    async def begun() -> bool:
        return bool(draws._under_way)

    await eventually(begun, "the first draw is under way")
    others = [
        asyncio.ensure_future(draws.draw(wants, DEADLINE))
        for wants in ([Want("t1", 2, 9), Want("t2", 1, 0)], [Want("t1", 2, 0), Want("t2", 1, 0)])
    ]
    await asyncio.sleep(0)
    database.gate.set()
    assert [one.calls for one in await first] == [1]
    second, third = await asyncio.gather(*others)
    assert database.statements == [[Want("t1", 1, 0)], [Want("t1", 4, 9), Want("t2", 2, 0)]]
    assert [(one.calls, one.ahead) for one in second] == [(2, 1), (1, 0)]
    assert [(one.calls, one.ahead) for one in third] == [(2, 0), (0, 0)]
    assert {one.ends for one in (*second, *third)} == {100.999}
    await draws.close()


async def test_calls_end_a_second_after_the_statement_was_sent(database: Database) -> None:
    """A statement that takes a second issues calls that nobody may spend."""
    draws = database.draws()
    database.calls, database.seconds = {"t1": 5}, 1.0
    with pytest.raises(Unavailable):
        await draws.draw([Want("t1", 1, 0)], DEADLINE)
    database.seconds = 0.6
    (drawn,) = await draws.draw([Want("t1", 1, 1)], DEADLINE)
    assert drawn.ends == pytest.approx(101.0 + 0.999)
    await draws.close()


@pytest.mark.parametrize("refusal", [StoreUnavailable("elsewhere"), CacheStartedOver("restored")])
async def test_draw_of_another_history_does_not_count(
    database: Database, refusal: Exception
) -> None:
    """A deposed primary's bucket issues nothing that counts, and its connection is closed."""
    draws = database.draws()
    database.calls, database.refusal = {"t1": 5}, refusal
    with pytest.raises(type(refusal)):
        await draws.draw([Want("t1", 1, 0)], DEADLINE)
    assert database.dropped == 1
    await draws.close()


async def test_draw_that_outlasts_the_lease_does_not_count(database: Database) -> None:
    """A deposed primary's bucket issues nothing after the lease, not even to draws that began
    before.

    Otherwise a failover would add the calls of another second to the bound.
    """
    draws = database.draws()
    database.calls, database.seconds, database.lease_ends = {"t1": 5}, 0.5, database.now + 0.5
    with pytest.raises(StoreUnavailable):
        await draws.draw([Want("t1", 1, 4)], DEADLINE)
    database.lease_ends = database.now + 0.6
    assert (await draws.draw([Want("t1", 1, 4)], DEADLINE))[0].calls == 1
    await draws.close()


async def test_failed_statement_fails_its_callers_only(database: Database) -> None:
    """The next draw uses a new connection."""
    draws = database.draws()
    database.calls, database.failure = {"t1": 1}, StoreUnavailable("down")
    with pytest.raises(StoreUnavailable):
        await draws.draw([Want("t1", 1, 0)], DEADLINE)
    database.failure = AttributeError("the connection was terminated")
    with pytest.raises(StoreUnavailable):
        await draws.draw([Want("t1", 1, 0)], DEADLINE)
    database.failure = None
    assert (await draws.draw([Want("t1", 1, 0)], DEADLINE))[0].calls == 1
    await draws.close()


async def test_removed_limit_and_deleted_token(database: Database) -> None:
    """Without a limit, all that is needed is accepted, and nothing is kept. A deleted token gets
    nothing."""
    draws = database.draws()
    database.limit = None
    (drawn,) = await draws.draw([Want("t1", 3, 5)], DEADLINE)
    assert (drawn.calls, drawn.ahead) == (3, 0)
    database.live = False
    (drawn,) = await draws.draw([Want("t1", 3, 5)], DEADLINE)
    assert (drawn.calls, drawn.ahead) == (0, 0)
    await draws.close()


async def test_waits_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller waits until its deadline, the queue has a limit, and a stop fails who waits."""
    monkeypatch.setattr(rate_draws, "WAITING_MAX", 2)
    draws = database.draws()
    database.gate.clear()
    under_way = asyncio.ensure_future(draws.draw([Want("t1", 1, 0)], DEADLINE))

    async def begun() -> bool:
        return bool(draws._under_way)

    await eventually(begun, "the first draw is under way")
    with pytest.raises(Unavailable):
        await draws.draw([Want("t1", 1, 0)], database.now)
    waiting = asyncio.ensure_future(draws.draw([Want("t2", 1, 0)], DEADLINE))
    await asyncio.sleep(0)
    for want in (Want("t3", 1, 0), Want("t3", 0, 1)):
        with pytest.raises(Overloaded):
            await draws.draw([want], DEADLINE)
    await draws.close()
    for stopped in (under_way, waiting):
        with pytest.raises(StoreUnavailable):
            await stopped
    with pytest.raises(StoreUnavailable):
        await draws.draw([Want("t1", 1, 0)], DEADLINE)


async def test_clients_leave_room_for_verifies(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of clients fill half of the queue at most, so verifies can still draw."""
    monkeypatch.setattr(rate_draws, "WAITING_MAX", 4)
    draws = database.draws()
    database.calls = {"t1": 9}
    wants = [Want("t1", 0, 1), Want("t2", 0, 1)]
    for_client = asyncio.ensure_future(draws.draw(wants, DEADLINE))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await draws.draw([Want("t3", 0, 1)], DEADLINE)
    assert (await draws.draw([Want("t1", 1, 0)], DEADLINE))[0].calls == 1
    await for_client
    await draws.close()


async def test_calls_of_a_paused_process_are_not_accepted(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was paused after a draw does not accept calls that have ended."""
    rates = TokenRates(database.draws(), lambda: database.now)
    share = rates.share_of("t1", LIMIT)
    assert share is not None
    database.calls = {"t1": 9}
    draw = rates.draws.draw

    async def paused(wants: Sequence[Want], deadline: float) -> Any:
        drawn = await draw(wants, deadline)
        database.now += 1.0
        return drawn

    monkeypatch.setattr(rates.draws, "draw", paused)
    (seconds,) = await rates.admit([share], DEADLINE)
    assert seconds > 0
    await rates.draws.close()


async def test_empty_bucket_is_not_asked_again_at_once(database: Database) -> None:
    """After a refusal, the process refuses by itself until the bucket has a call again."""
    rates = TokenRates(database.draws(), lambda: database.now)
    share = rates.share_of("t1", LIMIT)
    assert share is not None
    database.calls = {"t1": 2}
    assert await rates.admit([share] * 3, DEADLINE) == [0.0, 0.0, pytest.approx(0.25)]
    assert await rates.admit([share], DEADLINE) == [pytest.approx(0.25)]
    assert len(database.statements) == 1
    database.now += 0.25
    assert await rates.admit([share], DEADLINE) == [0.0]
    await rates.draws.close()


async def test_shortest_refusal(database: Database) -> None:
    """A refusal always says when to retry, even if the bucket has filled during the draw."""
    rates = TokenRates(database.draws(), lambda: database.now)
    share = Share("t1", LIMIT._replace(burst=1))
    database.seconds = 0.9
    (seconds,) = await rates.admit([share], DEADLINE)
    assert seconds >= DENIED_SECONDS_MIN
    await rates.draws.close()


async def test_calls_ahead_of_demand_are_kept(database: Database) -> None:
    """What a process has used lately, it draws ahead, and spends without a statement."""
    rates = TokenRates(database.draws(), lambda: database.now)
    share = rates.share_of("t1", LIMIT)
    assert share is not None
    database.calls = {"t1": 1_000}
    for _ in range(3):
        assert await rates.admit([share] * 10, DEADLINE) == [0.0] * 10
        database.now += 0.1
    # None ahead at first, then those of the first ten, which the third ten spend.
    assert [(want.needed, want.ahead) for (want,) in database.statements] == [(10, 0), (10, 10)]
    await rates.draws.close()


async def test_clients_draw_ahead_only(database: Database) -> None:
    """A client gets calls of each token that has some, once each, with its limit."""
    rates = TokenRates(database.draws(), lambda: database.now)
    database.calls = {"t1": 3}
    wanted = [
        WantedCalls("t1", 5),
        WantedCalls("t1", 9),
        WantedCalls("t2", 1),
        WantedCalls("t3", 0),
    ]
    issued = await rates.draw_for_client(wanted)
    assert issued.calls == [("t1", 3, LIMIT)]
    assert issued.ends == pytest.approx(100.999)
    assert database.statements == [[Want("t1", 0, 5), Want("t2", 0, 1)]]
    assert not (await rates.draw_for_client([])).calls

    async def idle() -> bool:
        return rates.draws._worker is None

    await eventually(idle, "the worker ends when nobody waits")
    await rates.draws.close()
