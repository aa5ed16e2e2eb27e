"""`latchkey.sync.Verifier` in processes that fork, or end without closing it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeWatch
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


PROGRAM = """
import os, sys, time
import latchkey
from latchkey import _watch, sync
# A busy server may take this long to receive a release.
_watch.RELEASE_SECONDS = sync.CLOSE_SECONDS = 20
target, secret = sys.argv[1:]

def warm(verifier):
    end = time.monotonic() + 20
    while verifier.verify_nowait(secret) is None:
        verifier.verify(secret, timeout_seconds=10)
        assert time.monotonic() < end, verifier.stats()
        time.sleep(0.01)

def in_child(act):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            act()
            sys.stdout.flush()
        except BaseException as error:
            print("child:", repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)

verifier = sync.Verifier(target, timeout_seconds=10)
"""


@pytest.fixture
async def run(watched: FakeLatchkey, secret: str) -> Any:
    """Run a program with a verifier and return its output. It must end quietly."""
    watched.judge(pb.VERDICT_VALID)

    async def run(program: str) -> list[str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", PROGRAM + program, watched.target, secret),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Ignore what gRPC's core prints about forks.
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )
        try:
            async with asyncio.timeout(30):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert (process.returncode, err.decode()) == (0, "")
        return out.decode().splitlines()

    return run


async def test_the_process_ends_without_close(run: Any, watch: FakeWatch) -> None:
    """A program that never closes its verifier ends quietly, at once. No Delete waits for it."""
    assert await run("warm(verifier); print(verifier.stats().watching)") == ["True"]
    await eventually(lambda: watch.streams[0].released, "the release")


async def test_fork_before_the_first_verify(run: Any) -> None:
    """As with gunicorn, each worker has its own thread, stream and cache."""
    program = """
def work():
    warm(verifier)
    print(verifier.verify(secret).verdict, verifier.stats().watching)

in_child(work)
in_child(work)
work()
"""
    assert await run(program) == ["Verdict.VALID True"] * 3


async def test_without_open_files(run: Any) -> None:
    """The error names the limit on open files. With fewer open files the process and its
    children can verify, since gRPC was not used before."""
    program = """
import gc, resource
# CPython complains when it collects the incomplete event loop.
sys.unraisablehook = lambda _: None
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
try:
    verifier.verify(secret)
except latchkey.Unavailable as error:
    print(error)
for each in held:
    os.close(each)

def work():
    warm(verifier)
    gc.collect()
    sys.unraisablehook = sys.__unraisablehook__
    print(verifier.verify(secret).verdict)

in_child(work)
work()
"""
    failure, *answers = await run(program)
    assert "Too many open files. Try again" in failure
    assert answers == ["Verdict.VALID"] * 2


async def test_a_child_never_answers_from_its_parents_cache(run: Any) -> None:
    """A child of a process that has verified gets errors from every verifier. The parent
    continues."""
    program = """
warm(verifier)

def work():
    assert verifier.verify_nowait(secret) is None
    assert not verifier.stats().watching
    print(verifier.verify("hunter2").verdict)
    for each in (verifier, sync.Verifier(target)):
        try:
            print(each.verify(secret))
        except latchkey.Unavailable as error:
            print(error.code.name, error)

in_child(work)
assert verifier.verify_nowait(secret).allowed
verifier.close()
verifier = sync.Verifier(target)
in_child(work)
warm(sync.Verifier(target, timeout_seconds=10))
print("warm")
"""
    refusal = "FAILED_PRECONDITION The process was forked after gRPC was first used, and its child "
    lines = await run(program)
    for child in (lines[:3], lines[3:6]):
        assert child[0] == "Verdict.MALFORMED"
        assert [line.startswith(refusal) for line in child[1:]] == [True, True]
    assert lines[6:] == ["warm"]


async def test_a_child_never_answers_from_an_async_verifiers_cache(run: Any) -> None:
    """The copy of an async verifier's cache gives no answers."""
    program = """
import asyncio

async def main():
    async with latchkey.Verifier(target, timeout_seconds=10) as verifier:
        while verifier.verify_nowait(secret) is None:
            await verifier.verify(secret)
            await asyncio.sleep(0.01)

        def work():
            print(verifier.verify_nowait(secret), verifier.stats().fallback_reason)

        in_child(work)
        print(verifier.verify_nowait(secret).verdict)

asyncio.run(main())
"""
    child, parent = await run(program)
    assert child.startswith("None The process was forked")
    assert parent == "Verdict.VALID"


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "asyncio.current_task().cancel()"])
async def test_an_event_loop_that_ends_without_close(run: Any, ending: str) -> None:
    """An async verifier that is not closed ends quietly with its event loop."""
    program = f"""
import asyncio, contextlib

async def main():
    global verifier
    verifier = latchkey.Verifier(target, timeout_seconds=10)
    while verifier.verify_nowait(secret) is None:
        await verifier.verify(secret)
        await asyncio.sleep(0.01)
    print("warm")
    {ending}
    await asyncio.sleep(0)

with contextlib.suppress(asyncio.CancelledError):
    try:
        asyncio.run(main())
    finally:
        print(verifier.verify_nowait(secret))
"""
    assert await run(program) == ["warm", "None"]
