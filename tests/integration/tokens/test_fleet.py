"""Several hosts on one database: they share their peppers or report that they do not."""

import asyncio
import contextlib
import json
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.errors import StoreConflict
from latchkey_service.secret_format import Pepper
from latchkey_service.tokens import fleet, pepper_enrolment, pepper_file, token_store
from latchkey_service.tokens.pepper_file import PepperFileError
from latchkey_service.tokens.token_store import TokenStore

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.databases import session
from tests.helpers.service_process import Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.status_service_pb2_grpc import StatusServiceAsyncStub
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

OLD, NEW = Pepper(b"o" * 32), Pepper(b"n" * 32)
# Beyond the time-outs of locks and statements in `connections.py`.
ORDINARY_LOCK_SECONDS = 2.5
MISSING = "hosts lack a pepper that others use"

Run = Callable[..., Service]


def write_peppers(path: Path, *used: Pepper) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch(mode=0o600)
    path.write_text("".join(f"{pepper.key.hex()}\n" for pepper in used))
    return path


@pytest.fixture
def run(tmp_path: Path, database_url: str) -> Iterator[Run]:
    """Start hosts on one fresh database, each with a data directory of the same name."""
    started: list[Service] = []

    def run(name: str, **settings: object) -> Service:
        defaults = {"database_url": database_url, "data_dir": tmp_path / name}
        defaults |= {"listen": "127.0.0.1:0"}
        started.append(Service(tmp_path / f"service {len(started)}", **(defaults | settings)))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        yield channel


async def get_status(address: str) -> status_pb.GetStatusResponse:
    async with connected(address) as channel:
        stub: StatusServiceAsyncStub = status_pb_grpc.StatusServiceStub(channel)
        return await stub.GetStatus(status_pb.GetStatusRequest(), timeout=5)


async def registered(address: str) -> status_pb.GetStatusResponse:
    """Return the status once two verifiers are registered."""

    async def both() -> status_pb.GetStatusResponse | None:
        status = await get_status(address)
        return status if len(status.verifiers) == 2 else None

    status: status_pb.GetStatusResponse = await eventually(both, "two verifiers are registered")
    return status


async def verdict_elsewhere(creating: str, verifying: str) -> str:
    """Create a token on one host and return the verdict of another host."""
    async with connected(creating) as one, connected(verifying) as other:
        stub: TokenServiceAsyncStub = pb_grpc.TokenServiceStub(one)
        created = await stub.Create(
            pb.CreateRequest(account_id="acme", name=f"on {creating}", scope=pb.SCOPE_READ),
            timeout=5,
        )
        stub = pb_grpc.TokenServiceStub(other)
        answer = await stub.Verify(
            pb.VerifyRequest(secret=created.secret, required_scope=pb.SCOPE_READ), timeout=5
        )
    return pb.Verdict.Name(answer.verdict)


def warnings(service: Service) -> list[dict[str, Any]]:
    return [line for line in service.log if line["event"] == MISSING]


async def test_a_second_host_generates_no_key(run: Run, tmp_path: Path) -> None:
    """A host without a pepper file fails to start once the database knows a pepper. The message
    names the id, the file and the setting. No file is left behind. With a copy of the first host's
    file, the host starts and verifies the other's tokens."""
    first = await run("a").welcome()
    (pepper,) = pepper_file.load(tmp_path / "a" / "peppers").peppers
    second = run("b")
    assert await second.ended() == 1
    expected = f"there is no pepper file at {tmp_path / 'b' / 'peppers'}, and the database expects"
    assert f"{expected} the peppers {pepper.id}. Copy" in second.err
    assert "LATCHKEY_PEPPER_FILE" in second.err
    assert "Traceback" not in second.err
    assert pepper.key.hex() not in second.err
    assert not (tmp_path / "b").exists()

    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "peppers", tmp_path / "b" / "peppers")
    second_address = await run("b").welcome()
    assert await verdict_elsewhere(first, second_address) == "VERDICT_VALID"
    assert await verdict_elsewhere(second_address, first) == "VERDICT_VALID"
    status = await registered(first)
    assert [list(v.pepper_ids) for v in status.verifiers] == [[pepper.id]] * 2
    assert list(status.warnings) == []


async def test_new_hosts_that_start_at_once(run: Run, tmp_path: Path) -> None:
    """If several new hosts start at once on an empty database, one generates a key. The others fail
    to start and leave no file."""
    names = "abc"
    services = {name: run(name) for name in names}

    def settled() -> bool:
        return all("Ctrl-C" in s.out or s.ended_with() is not None for s in services.values())

    await eventually(settled, "each has started or failed")
    (winner,) = [name for name in names if services[name].ended_with() is None]
    assert (tmp_path / winner / "peppers").exists()
    for name in names.replace(winner, ""):
        assert services[name].ended_with() == 1
        assert "generates a key only for a database that knows none" in services[name].err
        assert not (tmp_path / name / "peppers").exists()


async def test_differing_hosts_are_reported(run: Run, tmp_path: Path, latchkey: Path) -> None:
    """Hosts whose files have nothing in common log one warning each, including the host that was
    there first. `latchkey status` shows the newest pepper of each, the mismatch and the remedy."""
    a = run("a", pepper_file=write_peppers(tmp_path / "one", OLD))
    b = run("b", pepper_file=write_peppers(tmp_path / "two", NEW))
    first, second = await a.welcome(), await b.welcome()
    assert await verdict_elsewhere(first, second) == "VERDICT_UNKNOWN"
    for service in (a, b):

        def both(service: Service = service) -> bool:
            return {line["pepper_id"] for line in warnings(service)} == {OLD.id, NEW.id}

        await eventually(both, "the log warns of both peppers")
        line = warnings(service)[0]
        assert line["level"] == "warning"
        assert line["missing_on"]
        assert "Add the first key of the pepper file on" in line["what_to_do"]
    status = await get_status(first)
    ids = [OLD.id, NEW.id]
    assert sorted(v.pepper_ids[0] for v in status.verifiers) == sorted(ids)
    assert sorted(text.split(" is missing")[0] for text in status.warnings) == sorted(
        f"Pepper {pepper_id}" for pepper_id in ids
    )
    shown, script = await asyncio.gather(cli(latchkey, first), cli(latchkey, first, "--json"))
    for pepper_id in ids:
        # The row of the host, and the warning about it.
        assert sum(pepper_id in row for row in shown.splitlines()) == 2
        assert f"Warning: Pepper {pepper_id} is missing on " in shown
    document = json.loads(script)
    assert document["warnings"] == list(status.warnings)
    assert [v["pepper_ids"] for v in document["verifiers"]] == [
        list(v.pepper_ids) for v in status.verifiers
    ]
    await b.end()
    assert list((await get_status(first)).warnings) == []


async def cli(program: Path, address: str, *options: str) -> str:
    """Return the output of `latchkey status`."""
    process = await asyncio.create_subprocess_exec(
        program,
        *("status", "--target", address, *options),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_SECONDS):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_a_documented_rotation_stays_quiet(run: Run, tmp_path: Path) -> None:
    """A rotation as in docs/settings.md, one host after the other, causes no warning at any step,
    and each host verifies the other's tokens throughout. A rotation in the wrong order causes a
    warning."""
    hosts = {name: run(name, pepper_file=write_peppers(tmp_path / name, OLD)) for name in "ab"}
    addresses = {name: await hosts[name].welcome() for name in "ab"}

    async def restart(name: str, *used: Pepper) -> None:
        await hosts[name].end()
        hosts[name] = run(name, pepper_file=write_peppers(tmp_path / name, *used))
        addresses[name] = await hosts[name].welcome()

    for used in ([OLD, NEW], [NEW, OLD]):
        for name, other in ("ab", "ba"):
            await restart(name, *used)
            status = await registered(addresses[name])
            assert list(status.warnings) == []
            assert await verdict_elsewhere(addresses[name], addresses[other]) == "VERDICT_VALID"
    latest = Pepper(b"l" * 32)
    await restart("a", latest, NEW, OLD)
    await eventually(lambda: warnings(hosts["b"]), "the host that lacks the newest key warns")
    assert {line["pepper_id"] for line in warnings(hosts["b"])} == {latest.id}
    for host in hosts.values():
        assert {line["pepper_id"] for line in warnings(host)} <= {latest.id}


async def enrolled(database_url: str, path: Path, *, shared: bool = True) -> str:
    """Return the id of the newest pepper that a host gets, or the reason why it is rejected."""
    opened = await TokenStore.open(database_url)
    try:
        keyring = await pepper_enrolment.enrol(opened, path, named=False, shared=shared)
    except PepperFileError as error:
        return str(error)
    finally:
        await opened.close()
    return keyring.peppers[0].id


async def known_ids(database_url: str) -> list[str]:
    async with session(database_url) as connection:
        return [row["id"] for row in await connection.fetch("SELECT id FROM pepper")]


@pytest.mark.parametrize("others_have_files", [False, True])
async def test_one_of_many_enrols_a_new_key(
    database_url: str, tmp_path: Path, *, others_have_files: bool
) -> None:
    """However many hosts enrol at once on an empty database, with generated files or without,
    exactly one pepper is registered and exactly one host has it."""
    paths = [tmp_path / f"host {number}" / "peppers" for number in range(8)]
    if others_have_files:
        for number, path in enumerate(paths[::2]):
            write_peppers(path, Pepper(bytes([number]) * 32))
    results = await asyncio.gather(*(enrolled(database_url, path) for path in paths))
    (pepper_id,) = await known_ids(database_url)
    assert results.count(pepper_id) == 1
    assert sum("expects the peppers " + pepper_id in result for result in results) == 7
    kept = [path for path in paths if path.exists()]
    assert kept == sorted({*(paths[::2] if others_have_files else ()), winner(paths, pepper_id)})
    assert not [file for path in paths for file in path.parent.glob(".*")]


def winner(paths: list[Path], pepper_id: str) -> Path:
    (path,) = [p for p in paths if p.exists() and pepper_file.load(p).peppers[0].id == pepper_id]
    return path


async def test_services_that_share_a_data_directory_share_the_key(
    database_url: str, tmp_path: Path
) -> None:
    """Services on one data directory that start at once all use the key that one of them generates.
    The file is private, and no other file is left."""
    path = tmp_path / "data" / "peppers"
    results = await asyncio.gather(*(enrolled(database_url, path) for _ in range(6)))
    assert results == await known_ids(database_url) * 6
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


async def test_a_host_waits_for_others_to_enrol(database_url: str, tmp_path: Path) -> None:
    """A host waits longer for its turn than an ordinary statement may wait for a lock."""
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", token_store._PEPPER_LOCK)
        enrolling = asyncio.create_task(enrolled(database_url, tmp_path / "peppers"))
        finished, _ = await asyncio.wait([enrolling], timeout=ORDINARY_LOCK_SECONDS)
        assert not finished
    pepper_id = await enrolling
    assert await known_ids(database_url) == [pepper_id]


async def test_an_ordinary_restart_does_not_wait(database_url: str, tmp_path: Path) -> None:
    """A host whose peppers are all registered starts while another one is enrolling."""
    pepper_id = await enrolled(database_url, tmp_path / "peppers")
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", token_store._PEPPER_LOCK)
        assert await enrolled(database_url, tmp_path / "peppers") == pepper_id


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_a_lost_race_withdraws_the_file(tmp_path: Path) -> None:
    """If a host's transaction is rolled back and the second attempt finds another host's pepper,
    the host removes the file that it had put in place."""

    class Conflicting(TokenStore):
        def __init__(self) -> None:
            """Needs no database."""

        async def known_peppers(self) -> list[fleet.KnownPepper]:
            return []

        async def enrol_peppers(self, pepper_ids: list[str], check: Callable[..., None]) -> None:
            check([])
            assert path.exists()
            check([])  # Rolled back and repeated: its own file is not an obstacle.
            check([fleet.KnownPepper("theirs", needed=False, read=True)])

    path = tmp_path / "peppers"
    with pytest.raises(PepperFileError, match="expects the peppers theirs"):
        await pepper_enrolment.enrol(Conflicting(), path, named=False, shared=True)
    assert files_in(tmp_path) == []


async def test_a_commit_without_an_answer_keeps_the_file(tmp_path: Path) -> None:
    """If it is unknown whether the commit succeeded, the file is kept: the database may expect that
    key from now on."""

    class Silent(TokenStore):
        def __init__(self) -> None:
            """Needs no database."""

        async def known_peppers(self) -> list[fleet.KnownPepper]:
            return []

        async def enrol_peppers(self, pepper_ids: list[str], check: Callable[..., None]) -> None:
            check([])
            raise StoreConflict("no answer")

    path = tmp_path / "peppers"
    with pytest.raises(StoreConflict):
        await pepper_enrolment.enrol(Silent(), path, named=False, shared=True)
    assert files_in(tmp_path) == [path]
