"""Workers that hang or grow are replaced by their supervisor."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.process import worker_watch
from latchkey_service.process.worker_watch import MIB, SILENCE_SECONDS_MAX

from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.service_process import Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is checked only on Linux")

# A worker runs this before the service's own code. The signal blocks the event loop of a worker,
# which then fills its memory.
SITE = f"""
import signal, sys, time
def hang(*_):
    filled = []
    while True:
        if len(filled) < 400:
            filled.append(b"x" * {MIB})
        time.sleep(0.001)
if sys.orig_argv[-1] == "worker":
    signal.signal(signal.SIGUSR1, hang)
"""

Run = Callable[..., Service]


@pytest.fixture
def run(tmp_path: Path, database_url: str, pepper_file: Path) -> Iterator[Run]:
    started: list[Service] = []

    def run(**settings: object) -> Service:
        given: dict[str, object] = {
            "listen": "127.0.0.1:0",
            "database_url": database_url,
            "pepper_file": pepper_file,
            "data_dir": tmp_path / "data",
            "log_format": "json",
        }
        started.append(Service(tmp_path / "service", **(given | settings)))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


def lines(service: Service, event: str) -> list[dict[str, Any]]:
    return [line for line in service.log if line["event"] == event]


async def serves(address: str) -> None:
    """Wait until health is up, and verify."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await eventually(lambda: is_serving(channel), "it serves")
        answer = await pb_grpc.TokenServiceStub(channel).Verify(pb.VerifyRequest(secret="x"))
        assert answer.verdict == pb.VERDICT_MALFORMED


async def test_a_worker_that_hangs(run: Run) -> None:
    """A worker that hangs is replaced, and the other one continues."""
    service = run(workers=2)
    address = await service.welcome()
    first, second = service.worker_pids
    os.kill(first, signal.SIGSTOP)
    within = SILENCE_SECONDS_MAX * 2 + WAIT_SECONDS
    (killed,) = await eventually(
        lambda: lines(service, "worker killed: unresponsive"), "it is killed", within
    )
    assert killed["pid"] == first
    (ended,) = await eventually(lambda: lines(service, "worker exited"), "it ended")
    assert (ended["reason"], ended["exit_code"]) == ("unresponsive", -signal.SIGKILL)
    assert ended["restarts_for_this_reason"] == 1
    await eventually(lambda: len(service.worker_pids) == 3, "another one is up")
    assert psutil.pid_exists(second)
    await serves(address)
    assert await service.end() == 0


async def test_a_worker_that_fills_its_memory_while_it_hangs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that uses too much memory is replaced although its event loop is blocked, long
    before it counts as hanging."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    service = run(memory_mib=300)
    address = await service.welcome()
    (first,) = service.worker_pids
    os.kill(first, signal.SIGUSR1)
    (killed,) = await eventually(
        lambda: lines(service, "worker killed: too much memory"), "it is killed"
    )
    assert killed["pid"] == first
    assert 300 <= killed["mib"] < 400
    (ended,) = await eventually(lambda: lines(service, "worker exited"), "it ended")
    assert ended["reason"] == worker_watch.Reason.MEMORY
    await eventually(lambda: len(service.worker_pids) == 2, "another one is up")
    await serves(address)
