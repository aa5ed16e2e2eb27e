"""`latchkey.sync.Verifier` and its threads."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import latchkey
import pytest
from latchkey import Scope, Verdict, sync
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeWatch, watching
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


@pytest.fixture(autouse=True)
async def quiet_loop() -> Any:
    """Hide errors that gRPC causes on the test's event loop if a thread has another one."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(sync.ignore_idle_poller)
    yield
    loop.set_exception_handler(None)


@pytest.mark.usefixtures("patient_releases")
async def test_threads_share_one_cache(
    watched: FakeLatchkey, watch: FakeWatch, secret: str
) -> None:
    """Threads get the service's answer, then the cached one, and then see the deletion."""
    watched.judge(pb.VERDICT_VALID)
    verifier = sync.Verifier(watched.target, timeout_seconds=WAIT_SECONDS)
    with ThreadPoolExecutor(16) as threads:

        async def verify_in_threads() -> set[Verdict]:
            loop = asyncio.get_running_loop()
            calls = (loop.run_in_executor(threads, verifier.verify, secret) for _ in range(64))
            return {answer.verdict for answer in await asyncio.gather(*calls)}

        assert verifier.verify_nowait(secret) is None
        assert await verify_in_threads() == {Verdict.VALID}
        await watching(verifier)
        await verify_in_threads()
        before = len(watched.calls)
        assert await verify_in_threads() == {Verdict.VALID}
        assert len(watched.calls) == before
        refused = verifier.verify_nowait(secret, Scope.WRITE)
        assert refused is not None
        assert refused.verdict is Verdict.INSUFFICIENT_SCOPE
        assert verifier.stats().entries == 1

        watched.judge(pb.VERDICT_DELETED)
        await watch.streams[0].invalidate(8, "t1")
        await eventually(lambda: watch.streams[0].acknowledged == 8, "an acknowledgement")
        assert await verify_in_threads() == {Verdict.DELETED}
    await asyncio.to_thread(verifier.close)
    await asyncio.to_thread(verifier.close)
    assert watch.streams[0].released
    with pytest.raises(latchkey.Unavailable, match="closed"):
        verifier.verify(secret)
    assert verifier.verify("hunter2").verdict is Verdict.MALFORMED
    assert len(watch.streams) == 1


async def test_waits_are_bounded(fake: FakeLatchkey, secret: str) -> None:
    """A thread waits no longer than its timeout. If the verifier is closed, waiting threads get an
    error at once."""
    fake.on("Verify", fake.hangs())
    verifier = sync.Verifier(fake.target, timeout_seconds=30)
    with pytest.raises(latchkey.DeadlineExceeded):
        await asyncio.to_thread(verifier.verify, secret, timeout_seconds=0.1)
    fake.called.clear()
    waiting = asyncio.create_task(asyncio.to_thread(verifier.verify, secret))
    await fake.called.wait()
    await asyncio.to_thread(verifier.close)
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await waiting
    for bound in (0, float("inf")):
        with pytest.raises(latchkey.InvalidArgument):
            verifier.verify(secret, timeout_seconds=bound)
        with pytest.raises(latchkey.InvalidArgument):
            sync.Verifier(timeout_seconds=bound)


def verifiers_threads(others: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads of verifiers, without `others`, which earlier tests may have left."""
    threads = set(threading.enumerate()) - others
    return [thread for thread in threads if thread.name == "latchkey verifier"]


async def test_an_unreferenced_verifier_ends(watched: FakeLatchkey, secret: str) -> None:
    """When the verifier is garbage-collected, its thread and its stream end."""
    watched.judge(pb.VERDICT_VALID)

    others = set(threading.enumerate())

    def use() -> None:
        assert sync.Verifier(watched.target, timeout_seconds=WAIT_SECONDS).verify(secret).allowed

    await asyncio.to_thread(use)
    await asyncio.to_thread(gc.collect)
    await eventually(lambda: not verifiers_threads(others), "the end of the thread")


@pytest.mark.parametrize(
    ("callback", "error", "reported"),
    [
        ("PollerCompletionQueue._handle_events()", BlockingIOError(), False),
        ("PollerCompletionQueue._handle_events()", RuntimeError("Event loop is closed"), False),
        ("PollerCompletionQueue._handle_events()", RuntimeError("anything else"), True),
        ("something_else()", RuntimeError("Event loop is closed"), True),
    ],
)
async def test_only_harmless_errors_are_hidden(
    monkeypatch: pytest.MonkeyPatch, callback: str, error: Exception, reported: bool
) -> None:
    """Events of gRPC for the event loop of a closed verifier are ignored. Every other error on an
    event loop is reported."""
    errors: list[object] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "default_exception_handler", errors.append)
    loop.call_exception_handler(
        {"message": f"Exception in callback {callback}", "exception": error}
    )
    assert bool(errors) is reported


def test_an_unused_verifier_has_no_thread(dead_target: str) -> None:
    """Creating a verifier starts no thread and no connection. Malformed secrets need neither."""
    others = set(threading.enumerate())
    with sync.Verifier(dead_target) as verifier:
        assert verifier.verify("hunter2").verdict is Verdict.MALFORMED
        assert not verifier.stats().watching
        assert not verifiers_threads(others)


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make the verifiers' threads late: they wait for this event."""
    let_go = threading.Event()
    run = sync._Engine._run

    def run_late(engine: sync._Engine) -> None:
        let_go.wait(WAIT_SECONDS)
        run(engine)

    monkeypatch.setattr(sync._Engine, "_run", run_late)
    yield let_go
    let_go.set()


def fail() -> asyncio.AbstractEventLoop:
    """Fail as the creation of an event loop without file descriptors."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def verify_in_threads(
    verifier: sync.Verifier, secret: str, timeout_seconds: float
) -> list[Any]:
    """Verify in eight threads at once and return the results, exceptions included."""
    calls = (
        asyncio.to_thread(verifier.verify, secret, timeout_seconds=timeout_seconds)
        for _ in range(8)
    )
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_a_late_thread_delays_no_verify_beyond_its_timeout(
    watched: FakeLatchkey,
    watch: FakeWatch,
    secret: str,
    let_go: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A verify with a short timeout fails in time. One with a long timeout is answered when the
    thread runs. All verifies share that thread."""
    watched.judge(pb.VERDICT_VALID)
    monkeypatch.setattr(sync, "MARGIN_SECONDS", 0)
    others = set(threading.enumerate())
    verifier = sync.Verifier(watched.target, timeout_seconds=60)
    patient = asyncio.create_task(asyncio.to_thread(verifier.verify, secret))
    for error in await verify_in_threads(verifier, secret, 0.05):
        assert isinstance(error, latchkey.DeadlineExceeded)
    assert not patient.done()
    let_go.set()
    assert (await patient).allowed
    await watching(verifier)
    assert (len(verifiers_threads(others)), len(watch.streams)) == (1, 1)
    await asyncio.to_thread(verifier.close)


async def test_closing_waits_only_a_bounded_time_for_a_late_thread(
    watch: FakeWatch,
    watched: FakeLatchkey,
    secret: str,
    let_go: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that runs only after the close ends, and so do the verifies that waited for it."""
    monkeypatch.setattr(sync, "CLOSE_SECONDS", 0.05)
    others = set(threading.enumerate())
    verifier = sync.Verifier(watched.target, timeout_seconds=60)
    waiting = asyncio.create_task(asyncio.to_thread(verifier.verify, secret))
    await eventually(lambda: verifiers_threads(others), "the thread")
    await asyncio.to_thread(verifier.close)
    with pytest.raises(latchkey.Unavailable, match="closed"):
        verifier.verify(secret)
    let_go.set()
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await waiting
    await eventually(lambda: not verifiers_threads(others), "the end of the thread")
    assert watch.streams == []


async def test_every_close_waits_for_the_end(
    watched: FakeLatchkey, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second close waits too, such as that of the process after a Ctrl-C during the first one.
    Otherwise the thread would be killed before it has released its lease."""
    watched.judge(pb.VERDICT_VALID)
    verifier = sync.Verifier(watched.target, timeout_seconds=WAIT_SECONDS)
    assert (await asyncio.to_thread(verifier.verify, secret)).allowed
    engine = verifier._engine
    assert engine is not None
    watching = engine._verifier
    assert watching is not None
    closing, go_on = threading.Event(), threading.Event()
    close = watching.close

    async def close_slowly() -> None:
        closing.set()
        await asyncio.to_thread(go_on.wait, WAIT_SECONDS)
        await close()

    monkeypatch.setattr(watching, "close", close_slowly)
    first = threading.Thread(target=engine.stop)
    first.start()
    assert await asyncio.to_thread(closing.wait, WAIT_SECONDS)
    second = threading.Thread(target=engine.stop)
    second.start()
    await asyncio.to_thread(second.join, 0.05)
    assert second.is_alive()
    go_on.set()
    for thread in (first, second):
        await asyncio.to_thread(thread.join, WAIT_SECONDS)
    assert not engine._thread.is_alive()


async def test_without_an_event_loop_verifies_fail_at_once(
    watched: FakeLatchkey, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verify fails with the cause, long before its timeout. After the cause is gone, verifies
    work again."""
    watched.judge(pb.VERDICT_VALID)
    others = set(threading.enumerate())
    verifier = sync.Verifier(watched.target, timeout_seconds=60)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", fail)
        for error in await verify_in_threads(verifier, secret, 60):
            assert type(error) is latchkey.Unavailable
            assert "Too many open files. Try again. If that does not help, allow" in str(error)
            assert isinstance(error.__cause__, OSError)
    assert not verifiers_threads(others)
    for answer in await verify_in_threads(verifier, secret, 60):
        assert answer.allowed
    await asyncio.to_thread(verifier.close)


async def test_without_a_thread_verifies_fail_at_once(
    watched: FakeLatchkey, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that cannot start has the same effect as a missing event loop."""
    watched.judge(pb.VERDICT_VALID)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "latchkey verifier":
            raise RuntimeError("can't start new thread")
        start(thread)

    verifier = sync.Verifier(watched.target, timeout_seconds=60)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for error in await verify_in_threads(verifier, secret, 60):
            assert type(error) is latchkey.Unavailable
            assert "can't start new thread. Try again. If that does not help" in str(error)
    assert (await asyncio.to_thread(verifier.verify, secret)).allowed
    await asyncio.to_thread(verifier.close)
