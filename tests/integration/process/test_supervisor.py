"""`python -m latchkey_service` as a process: it starts, recovers from crashes, and stops
completely."""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.process import supervisor
from latchkey_service.settings.settings import Settings

from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.free_ports import free_port
from tests.helpers.held_workers import Hold
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.scratch import SCRATCH
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

# A restart of Postgres with recovery, or of a worker, on a busy machine.
BACK_SECONDS = 10.0
# Between two Verifies of one client. Without a pause, the clients would take a core from the
# workers.
PAUSE_SECONDS = 0.005

Run = Callable[..., Service]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that Postgres' own account can enter."""
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def data_dir(folder: Path) -> Path:
    """A data directory with a cluster, whose database is empty."""
    copy_cluster(folder / "data")
    return folder / "data"


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """Start services, on any free port by default; the fixture stops them."""
    started: list[Service] = []

    def run(*python: str, **settings: object) -> Service:
        settings = {"listen": "127.0.0.1:0", "grace_seconds": 1} | settings
        started.append(Service(folder / f"service {len(started)}", python or None, **settings))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


@contextlib.asynccontextmanager
async def client(address: str) -> "AsyncIterator[TokenServiceAsyncStub]":
    """A stub, available once health is SERVING."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await eventually(lambda: is_serving(channel), "health is up", BACK_SECONDS)
        yield pb_grpc.TokenServiceStub(channel)


def create_request(name: str = "first") -> pb.CreateRequest:
    return pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)


async def verdict(address: str, secret: str) -> Any:
    """Verify over a new connection."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        request = pb.VerifyRequest(secret=secret)
        return (await pb_grpc.TokenServiceStub(channel).Verify(request, timeout=2)).verdict


async def is_valid(address: str, secret: str) -> bool:
    return bool(await verdict(address, secret) == pb.VERDICT_VALID)


@pytest.mark.parametrize(
    ("transport", "number"), [("native", signal.SIGINT), ("grpcio", signal.SIGTERM)]
)
async def test_from_nothing_to_service_and_back(
    run: Run, folder: Path, transport: str, number: signal.Signals
) -> None:
    """In an empty directory the service creates a database, migrates it, prints its address and an
    example call, and serves. On Ctrl-C or SIGTERM it ends with all its processes and exit code 0.
    The next start finds the data."""
    service = run(*PYTHON, data_dir=folder / "new", transport=transport)
    address = await service.welcome()
    await service.prints(f"    {address} latchkey.v1.TokenService/Create\n")
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    assert len(service.family()) > 3
    assert await service.end(number) == 0
    assert service.alive() == []
    assert "Traceback" not in service.err
    again = run(data_dir=folder / "new", transport=transport)
    address = await again.welcome()
    await eventually(lambda: is_valid(address, created.secret), "the token exists", BACK_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stop_during_the_start(run: Run, folder: Path, number: signal.Signals) -> None:
    """If it is stopped while it creates its database, it ends at once and leaves nothing
    running."""
    service = run(*PYTHON, data_dir=folder / "new")
    await eventually(lambda: len(service.family()) > 1, "initdb is at work")
    assert await service.end(number) in (0, 130)
    assert "Traceback" not in service.err
    await eventually(lambda: not service.alive(), "nothing is left")


async def test_repeated_ctrl_c(run: Run, data_dir: Path) -> None:
    """Repeated Ctrl-C does not break the clean shutdown: there is no traceback, and no process
    is left.
    """
    service = run(*PYTHON, data_dir=data_dir)
    await service.welcome()
    os.kill(service.pid, signal.SIGINT)

    async def pressed_until_it_ended() -> bool:
        with contextlib.suppress(ProcessLookupError):
            if service.ended_with() is None:
                os.kill(service.pid, signal.SIGINT)
        return service.ended_with() is not None

    await eventually(pressed_until_it_ended, "the end")
    assert "Traceback" not in service.err
    assert service.ended_with() in (0, 130)
    await eventually(lambda: not service.alive(), "nothing is left")


async def test_kill_9_of_the_supervisor(run: Run, data_dir: Path) -> None:
    """Its workers and its Postgres end by themselves. The next start, at once and on the same
    address, works and has the data."""
    address = f"127.0.0.1:{free_port()}"
    service = run(*PYTHON, data_dir=data_dir, workers=2, listen=address)
    assert await service.welcome() == address
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    assert await service.end(signal.SIGKILL) == -signal.SIGKILL
    again = run(data_dir=data_dir, listen=address)
    assert await again.welcome() == address
    # The next start may be faster than the end of the old workers.
    await eventually(lambda: not service.alive(), "the old processes have ended", BACK_SECONDS)
    await eventually(lambda: is_valid(address, created.secret), "the token exists", BACK_SECONDS)


async def test_kill_9_of_a_worker(
    run: Run, database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker keeps answering, and a new worker replaces the dead one. No temporary file
    of any worker is left."""
    temporary = folder / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    hold = Hold(folder, monkeypatch)
    service = run(database_url=database_url, data_dir=folder / "data", workers=2)
    address = await service.welcome()
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    dead, alive = service.worker_pids
    # No other process can answer meanwhile.
    hold.on()
    os.kill(dead, signal.SIGKILL)
    # Connections that the kernel gave to the dead worker are lost; the next attempt succeeds.
    await eventually(lambda: is_valid(address, created.secret), "an answer")
    hold.off(await hold.one(service))
    await eventually(lambda: len(service.worker_pids) == 3, "a new worker", BACK_SECONDS)
    hold.on()
    os.kill(alive, signal.SIGKILL)
    await eventually(lambda: is_valid(address, created.secret), "the new one answers")
    hold.off(await hold.one(service))
    assert dead not in service.worker_pids[2:]
    assert list(temporary.iterdir())
    await service.end()
    assert list(temporary.iterdir()) == []


async def test_kill_9_of_a_worker_on_a_unix_socket(
    run: Run, database_url: str, folder: Path, transport: str
) -> None:
    """The file left behind does not keep a new worker from taking over a UNIX socket."""
    path = folder / "socket"
    service = run(
        database_url=database_url,
        data_dir=folder / "data",
        listen=f"unix:{path}",
        transport=transport,
    )
    address = await service.welcome()
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    os.kill(service.worker_pids[0], signal.SIGKILL)
    await eventually(lambda: len(service.worker_pids) == 2, "a new worker", BACK_SECONDS)
    await eventually(lambda: is_valid(address, created.secret), "an answer", BACK_SECONDS)


async def test_kill_9_of_postgres(run: Run, data_dir: Path) -> None:
    """The embedded Postgres is restarted, and the service continues with its data and the same
    workers."""
    service = run(data_dir=data_dir)
    address = await service.welcome()
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    service.postmaster().kill()
    await eventually(
        lambda: any(line["event"] == "embedded Postgres restarted" for line in service.log),
        "Postgres is back",
        BACK_SECONDS,
    )
    await eventually(lambda: is_valid(address, created.secret), "an answer", BACK_SECONDS)
    async with client(address) as stub:
        await stub.Create(create_request("second"), timeout=5)
    assert len(service.worker_pids) == 1
    assert await service.end() == 0
    assert service.alive() == []


async def test_a_second_run_on_the_data_directory(run: Run, data_dir: Path) -> None:
    """It is rejected with the directory, the process that uses it and the setting, and does not
    disturb the first run."""
    first = run(data_dir=data_dir)
    address = await first.welcome()
    second = run(data_dir=data_dir)
    assert await second.ended() == 1
    for said in (str(data_dir), str(first.pid), "LATCHKEY_DATA_DIR", "cannot start"):
        assert said in second.err
    assert "Traceback" not in second.err
    async with client(address) as stub:
        await stub.Create(create_request(), timeout=5)


async def test_a_second_run_on_the_address(run: Run, database_url: str, folder: Path) -> None:
    """It is rejected with the address and the setting, and receives no calls of the first run."""
    first = run(database_url=database_url, data_dir=folder / "a")
    address = await first.welcome()
    second = run(database_url=database_url, data_dir=folder / "a", listen=address)
    assert await second.ended() == 1
    for said in (address, "LATCHKEY_LISTEN", "in use"):
        assert said in second.err
    assert "Traceback" not in second.err


async def test_the_address_is_held_before_a_worker_uses_it(
    run: Run, database_url: str, folder: Path
) -> None:
    """Of two runs that start at once on one address, one serves and the other is rejected."""
    address = f"127.0.0.1:{free_port()}"
    both = [run(database_url=database_url, data_dir=folder / "a", listen=address) for _ in range(2)]
    codes: list[int | None] = []

    def settled() -> bool:
        codes[:] = [service.ended_with() for service in both]
        welcomed = ["Latchkey serves" in service.out for service in both]
        return all(w or c is not None for w, c in zip(welcomed, codes, strict=True))

    await eventually(settled, "both served or ended")
    assert sorted(codes, key=str) == [1, None], [service.err for service in both]


async def test_unix_socket(run: Run, database_url: str, folder: Path, transport: str) -> None:
    """It serves on a UNIX socket. A stale socket file does not prevent the start; a socket in use
    does. A file that is not a socket is not removed."""
    settings: dict[str, object] = {
        "database_url": database_url,
        "data_dir": folder / "data",
        "listen": f"unix:{folder / 'socket'}",
        "transport": transport,
    }
    first = run(**settings)
    address = await first.welcome()
    async with client(address) as stub:
        await stub.Create(create_request(), timeout=5)
    refused = run(**settings)
    assert await refused.ended() == 1
    assert "another process is listening" in refused.err
    assert await first.end(signal.SIGKILL) == -signal.SIGKILL
    await eventually(lambda: not first.alive(), "its worker is gone")
    again = run(**settings)
    async with client(await again.welcome()) as stub:
        await stub.Create(create_request("second"), timeout=5)
    assert await again.end() == 0
    assert not (folder / "socket").exists()
    (folder / "socket").write_text("not a socket")
    refused = run(**settings)
    assert await refused.ended() == 1
    assert "not a socket" in refused.err
    assert (folder / "socket").exists()


async def test_a_given_database_is_used(run: Run, database_url: str, folder: Path) -> None:
    """With LATCHKEY_DATABASE_URL the service uses that database and neither creates nor starts an
    embedded one. Port 0 becomes one port for all workers."""
    service = run(
        database_url=database_url,
        data_dir=folder / "data",
        workers=2,
        # Without this, only root may inspect their sockets.
        core_dumps="on",
    )
    address = await service.welcome()
    await service.prints("your Postgres")
    assert not address.endswith(":0")
    for pid in service.worker_pids:
        listening = psutil.Process(pid).net_connections("tcp")
        assert any(f"127.0.0.1:{c.laddr.port}" == address for c in listening), pid
    async with client(address) as stub:
        await stub.Create(create_request(), timeout=5)
    assert [path.name for path in (folder / "data").iterdir()] == ["peppers"]
    assert not any(p.cmdline()[0].endswith("postgres") for p in service.family())


def replaced(service: Service, known: set[int]) -> bool:
    return not known.issuperset(service.worker_pids)


async def test_a_restarted_worker_costs_no_call(run: Run, database_url: str, folder: Path) -> None:
    """While one of two workers is stopped gracefully and replaced under load, a client that retries
    UNAVAILABLE sees no failed call."""
    service = run(database_url=database_url, data_dir=folder / "data", workers=2, grace_seconds=5)
    address = await service.welcome()
    async with client(address) as stub:
        created = await stub.Create(create_request(), timeout=5)
    stop = asyncio.Event()
    answers = 0

    async def load() -> None:
        nonlocal answers
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            question = pb.VerifyRequest(secret=created.secret)
            while not stop.is_set():
                for attempt in range(4):
                    end = await outcome(stub.Verify(question, timeout=2))
                    if end.ok:
                        break
                    assert end.code is grpc.StatusCode.UNAVAILABLE, (attempt, end)
                    await asyncio.sleep(0.05 * 2**attempt)
                assert end.ok, end
                assert end.response.verdict == pb.VERDICT_VALID
                answers += 1
                await asyncio.sleep(PAUSE_SECONDS)

    clients = [asyncio.create_task(load()) for _ in range(8)]
    await eventually(lambda: answers > 100, "load")
    # One after another, so that one worker is always available.
    for pid in list(service.worker_pids):
        others = set(service.worker_pids)
        os.kill(pid, signal.SIGTERM)
        await eventually(partial(replaced, service, others), "a new worker")
    stop.set()
    await asyncio.gather(*clients)


async def test_a_worker_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a worker temporarily cannot be restarted, the others continue and the supervisor retries.
    During the first start the same failure ends the service."""
    settings = Settings(_env_file=None)
    keeper = supervisor._Supervisor(settings, "postgresql://h", "127.0.0.1:0", None, None, None)
    refused = 0

    async def spawn(_: str | None, _number: int) -> asyncio.subprocess.Process:
        nonlocal refused
        refused += 1
        if refused < 3:
            raise BlockingIOError(errno.EAGAIN, "no process")
        if refused < 4:
            raise RuntimeError("can't start new thread")
        keeper._stop.set()
        return await asyncio.create_subprocess_exec(
            "sleep", "60", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    monkeypatch.setattr(keeper, "_spawn", spawn)
    ready = asyncio.Event()
    with pytest.raises(supervisor.StartError, match="no process"):
        await keeper._keep(0, ready)
    ready.set()
    await keeper._keep(0, ready)
    assert refused == 4


async def test_a_worker_that_stops_reading_policies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs is killed before the policies that it has not read fill the memory; it
    would enforce an outdated policy. A worker that is merely behind is not killed."""
    monkeypatch.setattr(supervisor, "BACKLOG_MAX_BYTES", 1_000_000)
    settings = Settings(policy=folder / "policy.toml")
    keeper = supervisor._Supervisor(settings, "postgresql://h", "127.0.0.1:0", None, None, "")
    process = await asyncio.create_subprocess_exec("sleep", "60", stdin=subprocess.PIPE)
    keeper._processes.add(process)
    try:
        keeper._send_policy("#" * 900_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.05)
        keeper._send_policy("#" * 900_000)
        assert await asyncio.wait_for(process.wait(), WAIT_SECONDS) == -signal.SIGKILL
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
