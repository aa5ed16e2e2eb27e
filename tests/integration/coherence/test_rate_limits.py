"""The sum of accepted verifies over two servers and their library clients, against the bound."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import latchkey
import pytest
from latchkey import RateLimit, Scope, Verdict
from latchkey_coherence.rate import SHARE_SECONDS

from tests.contract.client.fake_watch import watching
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from latchkey_service.settings.settings import Settings

HOURLY = RateLimit(30, timedelta(hours=1), 30)
FAST = RateLimit(400, timedelta(seconds=1), 100)
LOAD_SECONDS = 2.0
# Far more than the limit permits in this time.
PAUSE_SECONDS = 0.0005


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """Both transports use the same shares; the contract tests cover both."""
    return make_settings(database_url, pepper_file, "native")


@pytest.fixture
async def addresses(settings: Settings) -> AsyncIterator[list[str]]:
    """Two servers on one database."""
    async with serving(settings) as first, serving(settings) as second:
        yield [first, second]


async def token_with(address: str, limit: RateLimit) -> latchkey.CreatedToken:
    async with latchkey.Client(address) as client:
        return await client.create("acme", "limited", Scope.READ, rate_limit=limit)


async def test_verifiers_together_accept_exactly_the_burst(addresses: list[str]) -> None:
    """Three clients of two servers that verify at the same moments accept as many as one would."""
    created = await token_with(addresses[0], HOURLY)
    async with contextlib.AsyncExitStack() as stack:
        verifiers = [
            await stack.enter_async_context(latchkey.Verifier(address))
            for address in (*addresses, addresses[0])
        ]
        for verifier in verifiers:
            await watching(verifier)
        counted: Counter[Verdict] = Counter()
        for _ in range(4):
            answers = await asyncio.gather(
                # Several verifies of one client in one turn must not share a call.
                *(verifier.verify(created.secret) for verifier in verifiers * 5)
            )
            counted.update(answer.verdict for answer in answers)
        assert counted == {Verdict.VALID: HOURLY.burst, Verdict.RATE_LIMITED: 30}
        refused = verifiers[0].verify_nowait(created.secret)
        assert refused is not None, "a refusal is answered from the cache until its time"
        assert refused.verdict is Verdict.RATE_LIMITED
        assert refused.retry_after is not None
        assert timedelta(0) < refused.retry_after <= timedelta(minutes=2)


async def test_restart_does_not_refill_the_burst(settings: Settings) -> None:
    """The calls that were issued before all servers and clients restarted still count."""
    async with serving(settings) as address:
        created = await token_with(address, HOURLY)
        async with latchkey.Verifier(address) as verifier:
            answers = [await verifier.verify(created.secret) for _ in range(HOURLY.burst)]
    assert all(answer.allowed for answer in answers)
    async with serving(settings) as address, latchkey.Verifier(address) as verifier:
        answer = await verifier.verify(created.secret)
        assert answer.verdict is Verdict.RATE_LIMITED


async def test_sum_stays_within_the_bound_while_verifiers_come_and_go(
    addresses: list[str],
) -> None:
    """Three clients of two servers verify far too fast, and one of them is replaced again and
    again. In each window of w seconds they accept at most burst + rate * (w + 1 s), and in all they
    use most of the limit."""
    created = await token_with(addresses[0], FAST)
    accepted: list[float] = []
    asked = itertools.count()
    began = time.monotonic()

    async def load(verifier: latchkey.Verifier, until: float) -> None:
        while time.monotonic() < until:
            next(asked)
            answer = verifier.verify_nowait(created.secret)
            if answer is None:
                answer = await verifier.verify(created.secret)
            if answer.allowed:
                accepted.append(time.monotonic())
            await asyncio.sleep(PAUSE_SECONDS)

    async def come_and_go() -> None:
        for number in itertools.count():
            now = time.monotonic()
            if now >= began + LOAD_SECONDS:
                return
            async with latchkey.Verifier(addresses[number % 2]) as verifier:
                await load(verifier, min(now + 0.5, began + LOAD_SECONDS))

    async with contextlib.AsyncExitStack() as stack:
        steady = [
            await stack.enter_async_context(latchkey.Verifier(address)) for address in addresses
        ]
        await asyncio.gather(
            come_and_go(), *(load(verifier, began + LOAD_SECONDS) for verifier in steady)
        )
        local = sum(verifier._subscription.uses.total() for verifier in steady)
    rate = FAST.count / FAST.period.total_seconds()
    size = FAST.burst + rate * SHARE_SECONDS
    level, last = size, began
    for moment in accepted:
        # The database's clock may run a thousandth faster.
        level = min(size, level + (moment - last) * rate * 1.001) - 1
        last = moment
        assert level >= 0, "more verifies were accepted in a window than the bound permits"
    assert local, "no verify was answered from a share"
    # On a busy machine the clients may ask for less than the limit permits.
    possible = min(next(asked), FAST.burst + rate * (accepted[-1] - began))
    assert len(accepted) > possible / 2


async def test_one_client_uses_the_whole_limit(addresses: list[str]) -> None:
    """If all load reaches one client, most verifies are answered from its shares, and the others on
    the same servers take nothing away."""
    created = await token_with(addresses[0], FAST)
    async with (
        latchkey.Verifier(addresses[0]) as verifier,
        latchkey.Verifier(addresses[1]) as idle,
    ):
        await watching(verifier)
        await watching(idle)
        before = verifier.stats()

        async def mostly_local() -> bool:
            """Verify at less than the limit for a while."""
            for _ in range(30):
                await verifier.verify(created.secret)
                await asyncio.sleep(0.01)
            stats = verifier.stats()
            return stats.hits - before.hits > stats.misses - before.misses

        await eventually(mostly_local, "most verifies are answered from shares")


async def test_narrower_limit_is_in_force_when_update_returns(addresses: list[str]) -> None:
    """Calls that clients hold under the old limit are not spent after Update has returned."""
    created = await token_with(addresses[0], FAST)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(latchkey.Client(addresses[0]))
        verifiers = [
            await stack.enter_async_context(latchkey.Verifier(address)) for address in addresses
        ]
        for verifier in verifiers:
            await watching(verifier)

        async def has_share() -> bool:
            await verifiers[1].verify(created.secret)
            await asyncio.sleep(0.005)
            return verifiers[1].verify_nowait(created.secret) is not None

        await eventually(has_share, "a client holds a share")
        change = await client.update(
            "acme", created.token.id, rate_limit=RateLimit(1, timedelta(hours=1), 1)
        )
        assert change.receipt is not None
        answers = [
            await verifier.verify(created.secret) for verifier in verifiers for _ in range(3)
        ]
        assert sum(answer.allowed for answer in answers) <= 1
