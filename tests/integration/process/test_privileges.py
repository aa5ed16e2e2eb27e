"""Processes of the service write no core dumps, and workers do not stay root."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.embedded_host import OsAccount, choose_account, why_unreadable

from tests.helpers.callers import ca_pem, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import WatchClient

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give root up")

# Makes a Python below a closed directory, such as /root, readable for others, in a mount namespace
# that only the service sees: closed directory, child with Python, program.
OPEN_FOLDER = """
set -e
held=$(mktemp -d)
mount --bind "$1/$2" "$held"
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir "$1/$2"
mount --move "$held" "$1/$2"
shift 2
exec "$@"
"""


def in_reach() -> tuple[str, ...]:
    """Return a prefix under which an unprivileged account can run this Python."""
    python = Path(os.__file__)
    if why_unreadable([python], choose_account(Path("/nonexistent"))) is None:
        return ()
    closed = next(p for p in reversed(python.parents) if not p.stat().st_mode & 0o001)
    child = python.relative_to(closed).parts[0]
    prefix = ("unshare", "-m", "sh", "-c", OPEN_FOLDER, "sh", str(closed), child)
    if shutil.which("unshare") and subprocess.run([*prefix, "true"], check=False).returncode == 0:
        return prefix
    return pytest.skip("no other account can run this Python")


class Reached(Service):
    """The service with a Python that other accounts can run."""


def start(kind: type[Service], folder: Path, **settings: object) -> Service:
    given: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "grace_seconds": 1,
        "log_format": "json",
        "data_dir": folder / "data",
    }
    return kind(folder / "service", PYTHON, **(given | settings))


@pytest.fixture
def started(scratch: Path, request: pytest.FixtureRequest) -> Iterator[list[Service]]:
    services: list[Service] = []
    yield services
    for service in services:
        service.clean_up()


@pytest.fixture
def folder(scratch: Path, request: pytest.FixtureRequest) -> Path:
    """A folder that every account can enter."""
    path = scratch / f"privileges-{abs(hash(request.node.name))}"
    path.mkdir()
    return path


def status(pid: int, field: str) -> set[str]:
    """Return a field of /proc/PID/status, for each thread."""
    found = set()
    for file in Path(f"/proc/{pid}/task").glob("*/status"):
        (line,) = [x for x in file.read_text().splitlines() if x.startswith(f"{field}:")]
        found.add(line.partition(":")[2].strip())
    return found


def may_look(pid: int) -> bool:
    """Return whether a process of the same user without other rights can read the memory."""
    uid = psutil.Process(pid).uids().real
    program = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"
    # As another user, because root may read all memory. Rights are judged by the target's user.
    account = {"user": uid, "group": uid, "extra_groups": []} if os.geteuid() == 0 and uid else {}
    done = subprocess.run(
        [shutil.which("python3", path="/usr/bin") or sys.executable, "-c", program, str(pid)],
        check=False,
        capture_output=True,
        **account,  # type: ignore[call-overload]  # arguments for root alone
    )
    return done.returncode == 0


async def test_no_core_dumps(
    started: list[Service], folder: Path, database_url: str, pepper_file: Path
) -> None:
    """Supervisor and workers write no core dumps."""
    service = start(Service, folder, database_url=database_url, pepper_file=pepper_file)
    started.append(service)
    await service.welcome()
    for pid in (service.pid, *service.worker_pids):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        # Root may look into everything.
        assert may_look(pid) == (os.geteuid() == 0)


@needs_root
@pytest.mark.parametrize(("embedded", "transport"), [(True, "native"), (False, "grpcio")])
async def test_workers_give_up_root(
    started: list[Service],
    folder: Path,
    database_url: str,
    embedded: bool,
    transport: str,
) -> None:
    """If started as root, each thread of a worker runs as an ordinary user without rights, and
    processes of that user cannot read its memory. It serves all the same: calls, Watch, new
    connections to Postgres, TLS with a key that only root can read. A worker that is restarted
    shares the port.
    """
    files = write_server_files(folder)
    del files["tls_client_ca"]
    if embedded:
        copy_cluster(folder / "data")
    else:
        files["database_url"] = database_url  # type: ignore[assignment]  # not a file
    Reached.prefix = in_reach()
    port = free_port()
    service = start(
        Reached, folder, workers=2, transport=transport, tls_listen=f"localhost:{port}", **files
    )
    started.append(service)
    address = await service.welcome()
    cluster = folder / "data" / "postgres"
    account = choose_account(cluster if embedded else Path("/nonexistent"))
    assert status(service.pid, "Uid") == {"0\t0\t0\t0"}
    for pid in service.worker_pids:
        assert_is(account, pid)
        assert not may_look(pid)
    os.kill(service.worker_pids[0], signal.SIGKILL)
    await eventually(lambda: len(service.worker_pids) == 3, "another worker")
    assert_is(account, service.worker_pids[-1])
    credentials = grpc.ssl_channel_credentials(ca_pem())
    for _ in range(6):
        channels = (
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS),
            grpc.aio.secure_channel(f"localhost:{port}", credentials, options=CHANNEL_OPTIONS),
        )
        for channel in channels:
            async with channel:
                await eventually(partial(is_serving, channel), "it serves")
                stub = pb_grpc.TokenServiceStub(channel)
                watcher = WatchClient(stub)
                await watcher.granted()
                found = await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
                assert not found.tokens
                await watcher.say(released=True)
    warned = [x["what_to_do"] for x in service.log if "cannot reload" in x["event"]]
    assert [str(files["tls_key"]) in text for text in warned] == [True]
    assert await service.end() == 0
    assert "Traceback" not in service.err


def assert_is(account: OsAccount, pid: int) -> None:
    assert status(pid, "Uid") == {"\t".join([str(account.uid)] * 4)}
    assert status(pid, "Gid") == {"\t".join([str(account.gid)] * 4)}
    for kind in ("CapPrm", "CapEff", "CapAmb"):
        assert {int(value, 16) for value in status(pid, kind)} == {0}


@needs_root
async def test_workers_stay_root_if_they_have_to(
    started: list[Service], folder: Path, database_url: str
) -> None:
    """If no other account can read the programs, or the settings say so, workers stay root. A
    warning says why."""
    settings: dict[str, object] = {"database_url": database_url}
    if why_unreadable([Path(os.__file__)], choose_account(Path("/nonexistent"))) is None:
        settings["drop_root"] = "off"
    service = start(Service, folder, **settings)
    started.append(service)
    await service.welcome()
    assert status(service.worker_pids[0], "Uid") == {"0\t0\t0\t0"}
    warned = [line["reason"] for line in service.log if line["event"] == "workers run as root"]
    assert len(warned) == ("drop_root" not in settings)
