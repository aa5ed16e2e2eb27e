"""The client library's cache with the real service, over both transports."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import latchkey
import psutil
import pytest
from latchkey import Scope, Verdict, _subscription, sync

from tests.contract.client.fake_watch import watching
from tests.helpers.service_process import service
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 10


async def test_after_a_delete_no_verifier_accepts_the_token(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Async and sync verifiers that have cached a token refuse it once Delete has returned."""
    # On a busy machine a grant may be late. That must not make a verifier change its server.
    monkeypatch.setattr(_subscription, "NEXT_GRANT_SECONDS_MIN", WAIT_SECONDS)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(latchkey.Client(address))
        verifiers: list[Any] = [
            await stack.enter_async_context(latchkey.Verifier(address, timeout_seconds=5))
            for _ in range(3)
        ]
        threaded = sync.Verifier(address, timeout_seconds=5)
        stack.push_async_callback(asyncio.to_thread, threaded.close)
        asyncio.get_running_loop().set_exception_handler(sync.ignore_idle_poller)
        stack.callback(asyncio.get_running_loop().set_exception_handler, None)
        await asyncio.to_thread(threaded.verify, (await _token(client, "first")).secret)
        verifiers.append(threaded)
        for verifier in verifiers:
            await watching(verifier)
        for number in range(ROUNDS):
            created = await _token(client, f"token {number}")
            # Any concurrent change, even one by another test, may keep an answer from being cached.
            cached = partial(_all_cached, verifiers, created.secret)
            for answer in await eventually(cached, "all caches to have the token"):
                assert answer.allowed
            receipt = await client.delete("acme", created.token.id)
            for verifier in verifiers:
                answer = verifier.verify_nowait(created.secret)
                assert answer is None or not answer.allowed
            assert (receipt.verifiers_outwaited, receipt.clients_outwaited) == (0, 0)
            assert receipt.clients_acknowledged == len(verifiers)
            assert receipt.mark
            answer = await verifiers[0].verify(created.secret)
            assert answer.verdict is Verdict.DELETED
        # The answer about a dead token may be cached.
        cached = partial(_all_cached, verifiers, created.secret)
        for answer in await eventually(cached, "all caches to know the deletion"):
            assert answer.verdict is Verdict.DELETED
        assert all(verifier.stats().reconnects == 0 for verifier in verifiers)


async def test_no_wait_is_confirmed_later(address: str) -> None:
    """An unconfirmed deletion gets its effective_time when a later Delete waits for it."""
    async with latchkey.Client(address) as client:
        created = await _token(client, "bulk")
        early = await client.delete("acme", created.token.id, no_wait=True)
        assert early.effective_time is None
        confirmed = await client.delete("acme", created.token.id)
        assert confirmed.effective_time is not None
        assert (confirmed.commit_time, confirmed.revision) == (early.commit_time, early.revision)
        status = await client.status()
        assert status.head_revision >= confirmed.revision
        assert [verifier.process_id for verifier in status.verifiers] == [os.getpid()]


async def _all_cached(
    verifiers: list[Any], secret: latchkey.Secret
) -> list[latchkey.Verification] | None:
    """Verify with each verifier, the last of which is threaded, and return the cached answers."""
    *others, threaded = verifiers
    await asyncio.gather(*(verifier.verify(secret) for verifier in others))
    await asyncio.to_thread(threaded.verify, secret)
    answers = [verifier.verify_nowait(secret, Scope.READ) for verifier in verifiers]
    known = [answer for answer in answers if answer is not None]
    return known if len(known) == len(verifiers) else None


async def _token(client: latchkey.Client, name: str) -> latchkey.CreatedToken:
    return await client.create("acme", name, Scope.READ)


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_clean_stop_of_a_worker_costs_no_verify(
    tmp_path: Path, database_url: str, pepper_file: Path, transport: str
) -> None:
    """Clients of a stopping worker move to its neighbour. No verify fails, and none is stale."""
    settings = {"database_url": database_url, "pepper_file": pepper_file, "workers": 2}
    async with AsyncExitStack() as stack:
        running = stack.enter_context(
            service(tmp_path / "run", listen="127.0.0.1:0", transport=transport, **settings)
        )
        address = await running.welcome()
        client = await stack.enter_async_context(latchkey.Client(address))
        kept = await _token(client, "kept")
        verifiers = [
            await stack.enter_async_context(latchkey.Verifier(address, timeout_seconds=5))
            for _ in range(8)
        ]
        for verifier in verifiers:
            await watching(verifier)
            await verifier.verify(kept.secret)

        async def clients_by_process() -> dict[int, int]:
            status = await client.status()
            return {verifier.process_id: verifier.clients for verifier in status.verifiers}

        before = await eventually(
            lambda: _if_all_attached(clients_by_process, len(verifiers)), "all clients attached"
        )
        stopping = max(before, key=lambda pid: before[pid])
        process = psutil.Process(stopping)
        os.kill(stopping, signal.SIGTERM)
        created = await _token(client, "deleted meanwhile")
        while _runs(process):
            for verifier in verifiers:
                assert (await verifier.verify(kept.secret)).allowed
            await asyncio.sleep(0.002)
        await eventually(
            lambda: sum(verifier.stats().reconnects for verifier in verifiers) >= before[stopping],
            "its clients to move",
        )
        await asyncio.gather(*(verifier.verify(created.secret) for verifier in verifiers))
        receipt = await client.delete("acme", created.token.id)
        assert receipt.verifiers_outwaited == 0
        for verifier in verifiers:
            assert not (await verifier.verify(created.secret)).allowed
        for verifier in verifiers:
            await watching(verifier)
            assert (await verifier.verify(kept.secret)).allowed


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def _if_all_attached(clients_by_process: Any, number: int) -> dict[int, int] | None:
    found: dict[int, int] = await clients_by_process()
    return found if sum(found.values()) == number else None
