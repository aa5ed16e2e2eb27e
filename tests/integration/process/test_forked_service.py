"""A service that tests fork behaves like one that starts Python."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.forked_service import ForkedProcess
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="services are forked on Linux only")

# The system distributes connections among the workers, so that each gets some.
CONNECTIONS = 16


@pytest.fixture(params=[None, PYTHON], ids=["forked", "started"])
def running(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, pepper_file: Path
) -> Iterator[Service]:
    service = Service(
        tmp_path / "service",
        request.param,
        listen="127.0.0.1:0",
        workers=2,
        database_url=database_url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "data",
        core_dumps="on",
        grace_seconds=1,
        log_format="json",
    )
    assert isinstance(service._process, ForkedProcess) == (request.param is None)
    yield service
    service.clean_up()


def sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open."""
    links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {link for link in links if link.startswith("socket:")}


async def test_forked_service_has_the_processes_of_a_started_one(
    running: Service, tmp_path: Path
) -> None:
    """The supervisor leads a process group in its folder, and each worker is a child of it in a
    separate session that shares no socket with it. A signal ends a worker, and another one takes
    its place. SIGTERM ends all, with exit code 0."""
    await running.welcome()
    supervisor = psutil.Process(running.pid)
    assert os.getpgid(running.pid) == running.pid
    assert supervisor.cwd() == str(tmp_path / "service")
    assert running.ended_with() is None
    pids = running.worker_pids
    assert {child.pid for child in supervisor.children()} == set(pids)
    for pid in pids:
        assert os.getsid(pid) == pid
        # Among them are the supervisor's ends of the workers' standard inputs.
        assert sockets(pid).isdisjoint(sockets(running.pid))
    os.kill(pids[0], signal.SIGKILL)
    await eventually(lambda: len(running.worker_pids) == 3, "a new worker")
    (line,) = [line for line in running.log if line["event"] == "worker exited"]
    assert line["exit_code"] == -signal.SIGKILL
    assert await running.end() == 0
    assert running.alive() == []
    assert "Traceback" not in running.err


async def test_killed_supervisor_leaves_no_workers(running: Service) -> None:
    """The exit code of a killed supervisor is the signal, and its workers end by themselves."""
    await running.welcome()
    assert await running.end(signal.SIGKILL) == -signal.SIGKILL
    await eventually(lambda: not running.alive(), "its workers have ended")


async def test_workers_do_not_give_the_same_ids(running: Service) -> None:
    """Each call has another request id, whichever worker answers it."""
    address = await running.welcome()
    ids = []
    for _ in range(CONNECTIONS):
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call = pb_grpc.TokenServiceStub(channel).List(
                pb.ListRequest(account_id="acme"), timeout=WAIT_SECONDS
            )
            await call
            ids += [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
    assert len(ids) == CONNECTIONS
    assert len(set(ids)) == len(ids)
