"""Shared by all tests: a real Postgres, a fresh database for each test, and servers on it."""

from __future__ import annotations

import gc
import itertools
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import hypothesis
import pytest
import structlog
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres import connections, sessions
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import pepper_file as pepper_files
from latchkey_service.tokens.token_store import TokenStore

from tests.helpers.databases import drop_database
from tests.helpers.fork_server import Forked, commands
from tests.helpers.forked_service import forks_services
from tests.helpers.made_cluster import copy_cluster, keep_cluster
from tests.helpers.programs import INSTALLS
from tests.helpers.scratch import SCRATCH
from tests.helpers.servers import (
    TEMPLATE,
    TRANSPORTS,
    Create,
    clone_template,
    execute,
    make_settings,
    serving,
    with_database,
)
from tests.helpers.shared_compilation import import_in_turn
from tests.helpers.shared_fork_servers import run_fork_servers, shared_folder
from tests.helpers.shared_servers import SharedServers, share_servers
from tests.helpers.stacks import task_stacks
from tests.helpers.waiting import WAIT_SECONDS

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

# Variables from the developer's shell must not reach the tests.
for name in [name for name in os.environ if name.startswith("LATCHKEY_")]:
    del os.environ[name]

# The tests start hundreds of Python processes. Each would compile all modules of the service again,
# and each worker of pytest-xdist all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell that starts the tests in the background makes them ignore SIGINT, and every program that a
# test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# hypothesis' own settings for CI, which apply everywhere here: a busy machine is not a bug. Each
# run draws other examples. HYPOTHESIS_PROFILE=thorough draws as many as a search for a bug needs.
for profile, examples in (("quick", 40), ("thorough", 2_000)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# How long the service waits for its database. Tests and fixtures in this process wait longer by
# default: where time-outs are not the subject, a machine that stalls for a second is not an outage.
TIMEOUTS = ("CONNECT_TIMEOUT_SECONDS", "STATEMENT_TIMEOUT_SECONDS")
OWN_TIMEOUTS = {name: getattr(connections, name) for name in TIMEOUTS}
for name in TIMEOUTS:
    setattr(connections, name, WAIT_SECONDS)
# Postgres' own bound on the wait for a lock: on a busy machine, each of the changes ahead may take
# a tenth of a second to commit.
OWN_LOCK_TIMEOUT = sessions.SETTINGS["lock_timeout"]
sessions.SETTINGS["lock_timeout"] = f"{WAIT_SECONDS:.0f}s"

TESTS = Path(__file__).parent
FAULTS = TESTS / "faults"
# What starts first: groups, which one worker runs, and folders, those that take longest before the
# others. A worker must not have a long one left when the others have finished.
GROUPS_FIRST = (
    "computing",
    "faults",
    "browser",
    "recovery",
    "history",
    "failover",
    "soak",
    "life",
    "watch",
)
FIRST = (*GROUPS_FIRST, "fuzz", "integration")
# These often wait for a server, so modules that only compute come between theirs. The last ones
# only compute, because a long one must not be left at the end.
WAITING = {"contract", "console"}
WAITING_PART = 0.85
# These only compute. One worker runs them at the beginning, while the tests of the others mostly
# wait and leave a core idle. At the end, all tests compute.
COMPUTING = {"model", "simulation"}
# A browser takes more processor time than all unit tests. What the page sends and answers is tested
# without one too.
SLOW = {"one_browser": "drives a browser"}
# Fixtures that install a program where it is missing.
INSTALLING = {"axe", "grpcurl", "one_browser", "pgbouncer", "signed"}
# One list: `capture_logs` changes it, and servers that tests share keep it.
LOG_PROCESSORS: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.format_exc_info,
    structlog.processors.TimeStamper(),
    structlog.processors.JSONRenderer(),
]
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screens", action="store_true", help="save screenshots of the console to build/screens"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork servers, and make room for a cluster of Postgres to copy. The workers of
    pytest-xdist share those of the process that starts the workers: importing all modules takes
    seconds, and so does making a cluster."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.add_cleanup(keep_cluster())
        config.add_cleanup(run_fork_servers())


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    import_in_turn(session.config.args)


# Before pytest-xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _folder(item) in COMPUTING and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group("computing"))
    items.sort(key=_turn)
    items[:] = _mixed(items)
    for item in items:
        names = item.fixturenames if isinstance(item, pytest.Function) else ()
        if not INSTALLING.isdisjoint(names):
            item.add_marker(INSTALLS)
        for name, reason in SLOW.items():
            if name in names:
                item.add_marker(pytest.mark.slow(reason))


def _folder(item: pytest.Item) -> str:
    """Return the folder in `tests` of a test."""
    return item.nodeid.split("/", 2)[1]


def _turn(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group")
    name = group.args[0] if group else _folder(item)
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _mixed(items: list[pytest.Item]) -> list[pytest.Item]:
    """Interleave the modules in `WAITING` with the other modules that are not in `FIRST`."""
    first = [item for item in items if _turn(item) < len(FIRST)]
    others = items[len(first) :]
    waiting = [item for item in others if _folder(item) in WAITING]
    computing = [item for item in others if _folder(item) not in WAITING]
    placed: list[tuple[float, list[pytest.Item]]] = []
    for part, length in ((waiting, WAITING_PART), (computing, 1.0)):
        begun = 0
        for _, module in itertools.groupby(part, lambda item: item.path):
            tests = list(module)
            placed.append((length * begun / len(part), tests))
            begun += len(tests)
    placed.sort(key=lambda place: place[0])
    return first + [item for _, tests in placed for item in tests]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector away from modules and tests, which stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the stacks of all tasks to the report of a test that exceeded its time limit."""
    report = yield
    # pytest-timeout prints the stacks of threads, and does not raise a particular exception.
    if call.excinfo is not None and "from pytest-timeout" in str(call.excinfo.value):
        report.sections.append(("tasks when the time was up", task_stacks()))
    return report


@pytest.fixture
def own_lock_timeout() -> Iterator[None]:
    """The service's own limit of waits for locks, for tests that hold locks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sessions.SETTINGS, "lock_timeout", OWN_LOCK_TIMEOUT)
        yield


@pytest.fixture
def own_timeouts(own_lock_timeout: None) -> Iterator[None]:
    """The service's own time-outs for its database, for tests of its behaviour at that limit."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in OWN_TIMEOUTS.items():
            patch.setattr(connections, name, seconds)
        yield


@pytest.fixture(autouse=True)
def timeouts(request: pytest.FixtureRequest) -> None:
    """Tests that break the database use the service's real time-outs."""
    if FAULTS in request.path.parents:
        request.getfixturevalue("own_timeouts")


@pytest.fixture(autouse=True)
def plain_log() -> None:
    """Log lines of JSON. structlog's own format takes three times as long for a line, and 10 ms for
    an exception."""
    # A test may have configured something else.
    structlog.reset_defaults()
    structlog.configure(processors=LOG_PROCESSORS)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder that Postgres' own account can enter; pytest's is closed to it if root runs the
    tests."""
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def forked() -> Forked:
    """Commands that run a Python module in a process that has imported it already."""
    return commands(shared_folder() / "tools")


@pytest.fixture(scope="session", autouse=True)
def forked_services() -> Iterator[None]:
    """Services and consoles start as forks of a process that has imported them."""
    with forks_services(shared_folder()):
        yield


@pytest.fixture(scope="session")
def latchkey(scratch: Path, forked: Forked) -> Path:
    """A program for shells that runs the command line tool as `forked` does."""
    path = scratch / "latchkey"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(forked("latchkey_cli"))} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def postgres_url(scratch: Path) -> Iterator[str]:
    """URL of a Postgres that belongs to this test process."""
    copy_cluster(scratch / "data")
    postgres = EmbeddedPostgres(scratch / "data")
    url = postgres.start()
    yield url
    postgres.stop()


@pytest.fixture(scope="session")
async def template_url(postgres_url: str) -> str:
    """A migrated database from which fresh ones are cloned: faster than migrating each."""
    url = with_database(postgres_url, TEMPLATE)
    # The first connection to a database writes a cache of its catalog, which the clones then have
    # too. It takes as long as a connection.
    await execute(url, "SELECT")
    return url


@pytest.fixture
async def database_url(postgres_url: str, template_url: str) -> AsyncIterator[str]:
    """A fresh, migrated database."""
    name = f"test_{next(_numbers)}"
    yield await clone_template(postgres_url, name)
    await drop_database(postgres_url, name)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[TokenStore]:
    """A store on a fresh database."""
    store = await TokenStore.open(database_url)
    yield store
    await store.close()


@pytest.fixture(scope="session")
def pepper_file(scratch: Path) -> Path:
    """A file with one pepper."""
    path = scratch / "peppers"
    pepper_files.load_or_create(path, create=True)
    return path


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@pytest.fixture
def settings(database_url: str, pepper_file: Path, transport: str) -> Settings:
    """Settings of a server on a fresh database; see `own_address`."""
    return make_settings(database_url, pepper_file, transport)


@pytest.fixture
async def own_address(settings: Settings) -> AsyncIterator[str]:
    """Address of a dedicated server with `settings`, which a test may override."""
    async with serving(settings) as address:
        yield address


@pytest.fixture(scope="session")
async def shared_servers(
    postgres_url: str, template_url: str, pepper_file: Path
) -> AsyncIterator[SharedServers]:
    """Servers that all tests share."""
    async with share_servers(postgres_url, pepper_file) as shared:
        yield shared


@pytest.fixture(scope="module")
async def module_servers(
    postgres_url: str, template_url: str, pepper_file: Path
) -> AsyncIterator[SharedServers]:
    """Servers that the tests of one file share, for settings that no other file needs. They end
    with it, because each takes processor time."""
    async with share_servers(postgres_url, pepper_file) as shared:
        yield shared


@pytest.fixture
async def address(shared_servers: Any, transport: str) -> str:
    """Address of a running server that holds no tokens. The server is shared and emptied before
    each test.

    A server and a database for each test would take most of the suite's time.
    """
    address, connection = await shared_servers(transport)
    # Not the log: the server may still have to read its end.
    await connection.execute("DELETE FROM deletion; DELETE FROM secret; DELETE FROM token")
    return str(address)


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the running server, not shared between tests."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> TokenServiceAsyncStub:
    """A stub of TokenService on the running server."""
    return pb_grpc.TokenServiceStub(channel)


@pytest.fixture
def create(stub: TokenServiceAsyncStub) -> Create:
    """Create a token through the running server, with defaults for the fields that do not matter to
    a test."""

    async def create(**fields: Any) -> pb.CreateResponse:
        request: dict[str, Any] = {
            "account_id": "acme",
            "name": f"token {next(_numbers)}",
            "scope": pb.SCOPE_READ,
        } | fields
        return await stub.Create(pb.CreateRequest(**request), timeout=5)

    return create
