"""The receiver's keys: when they are fetched, and that made-up keys delay no genuine report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from latchkey_console.receiver import keys as public_keys
from latchkey_console.receiver.keys import PublicKeys, Undecided

from tests.helpers.waiting import eventually
from tests.unit.console.test_receiver import (
    KEY,
    OTHER,
    Endpoint,
    Service,
    document,
    scanner,
    send,
    signature,
)

FRESH = {
    "github_public_key_identifier": "fresh",
    "github_public_key_signature": signature(b"[]", OTHER),
}


async def test_made_up_key_does_not_delay_a_fresh_one() -> None:
    """A report whose key the partner has just published is accepted at once, although somebody
    else named a made-up key just before."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    async with scanner(Service(), keys=keys) as http:
        assert (await send(http, [])).status_code == 200
        assert (await send(http, [], github_public_key_identifier="x")).status_code == 401
        endpoint.answer = document(test=KEY, fresh=OTHER)
        assert (await send(http, b"[]", **FRESH)).status_code == 200


async def test_made_up_keys_spend_only_their_budget() -> None:
    """Reports with made-up keys cause five fetches, and then one in two minutes. Meanwhile such a
    report is answered with 503 and when to send it again, and reports with known keys with 200."""
    now, endpoint = [0.0], Endpoint(document(test=KEY))
    keys = endpoint.keys({}, now)
    async with scanner(Service(), keys=keys) as http:
        for number in range(public_keys.UNKNOWN_FETCHES_MAX):
            answer = await send(http, [], github_public_key_identifier=f"x{number}")
            assert answer.status_code == 401
        assert endpoint.fetches == public_keys.UNKNOWN_FETCHES_MAX
        now[0] += 20.0
        for number in range(50):
            answer = await send(http, [], github_public_key_identifier=f"y{number}")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "100")
            assert (await send(http, [])).status_code == 200
        assert endpoint.fetches == public_keys.UNKNOWN_FETCHES_MAX
        endpoint.answer = document(test=KEY, fresh=OTHER)
        now[0] += 100.0
        assert (await send(http, b"[]", **FRESH)).status_code == 200


@asynccontextmanager
async def polling(keys: PublicKeys, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Let `keys` fetch regularly and often."""
    monkeypatch.setattr(public_keys, "POLL_SECONDS", 0.01)
    await keys.start()
    try:
        yield
    finally:
        await keys.close()


async def test_polls_do_not_depend_on_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is accepted soon after it is published, although reports with made-up keys have used
    up all fetches that reports may cause, and a withdrawn key is refused."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    async with scanner(Service(), keys=keys) as http:
        for number in range(public_keys.UNKNOWN_FETCHES_MAX + 1):
            answer = await send(http, [], github_public_key_identifier=f"x{number}")
        assert answer.status_code == 503
        endpoint.answer = document(fresh=OTHER)
        async with polling(keys, monkeypatch):

            async def accepted() -> bool:
                return (await send(http, b"[]", **FRESH)).status_code == 200

            await eventually(accepted, "the fresh key is accepted")
            assert (await send(http, [])).status_code != 200


async def test_polls_survive_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """After fetches that failed, even in an unexpected way, the next poll succeeds."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    fetch: Callable[[str], object] = keys._fetch
    errors: list[Exception] = [RuntimeError("unexpected"), TimeoutError()]

    async def failing(url: str) -> object:
        if errors:
            raise errors.pop()
        return await fetch(url)  # type: ignore[misc]  # a coroutine

    monkeypatch.setattr(keys, "_fetch", failing)
    async with polling(keys, monkeypatch):
        await eventually(keys.has_any, "a poll has succeeded")


async def test_the_same_made_up_key_costs_one_fetch() -> None:
    """A scanner that is set up wrongly and repeats its report spends one fetch in two minutes."""
    now, endpoint = [0.0], Endpoint(document(test=KEY))
    keys = endpoint.keys({}, now)
    for _ in range(20):
        assert await keys.find("x") is None
    assert endpoint.fetches == 1
    now[0] += public_keys.UNKNOWN_FETCH_SECONDS
    endpoint.answer = document(x=OTHER)
    assert await keys.find("x") is not None
    await keys.close()


async def test_a_fetch_that_began_earlier_decides_nothing() -> None:
    """If a report arrives during a fetch, and the fetched document lacks its key, the keys are
    fetched again: the partner may have published the key in the meantime."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    endpoint.open.clear()
    made_up = asyncio.create_task(keys.find("x"))
    await eventually(lambda: endpoint.fetches == 1, "the fetch has begun")
    endpoint.answer = document(fresh=OTHER)
    genuine = asyncio.create_task(keys.find("fresh"))
    await asyncio.sleep(0)
    endpoint.open.set()
    assert await made_up is None
    assert await genuine is not None
    assert endpoint.fetches == 2
    await keys.close()


async def test_known_keys_do_not_wait_for_a_fetch() -> None:
    """While the endpoint hangs and reports with made-up keys wait for it, a known key is found at
    once, and only a bounded number of reports waits."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    assert await keys.find("test") is not None
    endpoint.open.clear()
    waiting = [
        asyncio.create_task(keys.find(f"x{number}")) for number in range(public_keys.WAITING_MAX)
    ]
    await eventually(lambda: endpoint.fetches == 2, "the fetch has begun")
    with pytest.raises(Undecided):
        await keys.find("one more")
    async with asyncio.timeout(public_keys.FETCH_SECONDS / 2):
        assert await keys.find("test") is not None
    assert not any(task.done() for task in waiting)
    await keys.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_client_that_leaves_does_not_end_the_fetch() -> None:
    """If the report that caused a fetch is cancelled, others still get the fetch's keys."""
    endpoint = Endpoint(document(fresh=OTHER))
    keys = endpoint.keys({}, [0.0])
    endpoint.open.clear()
    leaving = asyncio.create_task(keys.find("x"))
    await eventually(lambda: endpoint.fetches == 1, "the fetch has begun")
    staying = asyncio.create_task(keys.find("fresh"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    endpoint.open.set()
    assert await staying is not None
    assert endpoint.fetches == 1
    await keys.close()


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (0, b""),
        (302, b""),
        (500, b""),
        (200, b"no JSON"),
        (200, b" " * 100_000),
        (200, document(only=ed25519.Ed25519PrivateKey.generate())),
    ],
    # The keys are random, and all processes of a run need the same names.
    ids=["no connection", "redirect", "error", "no JSON", "too long", "no key of the type"],
)
async def test_bad_fetch_keeps_the_old_keys(status: int, answer: bytes) -> None:
    """If a fetch fails, the keys that are known stay, a redirect is not followed, and a report with
    an unknown key is not refused for good."""
    endpoint = Endpoint(document(test=KEY))
    keys = endpoint.keys({}, [0.0])
    assert await keys.find("test") is not None
    endpoint.status, endpoint.answer = status, answer
    with pytest.raises(Undecided):
        await keys.find("fresh")
    assert await keys.find("test") is not None
    assert endpoint.fetches == 2
    endpoint.status, endpoint.answer = 200, document(fresh=OTHER)
    assert await keys.find("fresh") is not None
    await keys.close()
