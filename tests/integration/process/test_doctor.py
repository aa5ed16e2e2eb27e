"""`latchkey doctor` on set-ups that are broken in one way each. It finds that, says what to do, and
reports nothing else as a failure."""

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import Migration, bundled, migrate
from latchkey_service.process import doctor_database
from latchkey_service.process.doctor import examine
from latchkey_service.process.finding import Finding
from latchkey_service.settings.loading import load
from latchkey_service.tokens import pepper_file as pepper_files

from tests.helpers.calls import is_serving
from tests.helpers.databases import drop_database, session
from tests.helpers.fork_server import Forked
from tests.helpers.free_ports import free_port
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.programs import INSTALLS
from tests.helpers.servers import serving, with_database
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

COMMAND_SECONDS_MAX = 60.0
_names = itertools.count(1)
POLICY = '[callers.me]\nroles = ["verifier"]\nsecret_sha256 = ["{}"]\n'

Setup = Callable[..., None]


@pytest.fixture
def setup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str, pepper_file: Path
) -> Setup:
    """Set the environment of a host on which only the service is missing. Call it to change it."""
    monkeypatch.chdir(tmp_path)

    def change(**settings: object) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"LATCHKEY_{name.upper()}", str(value))

    change(
        database_url=database_url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "data",
        listen=f"127.0.0.1:{free_port()}",
    )
    return change


def failures(found: list[Finding]) -> list[str]:
    """Return the names of the checks that failed, each once."""
    return list(dict.fromkeys(f.check for f in found if f.state == "failure"))


async def only(check: str, *words: str, **arguments: Any) -> None:
    """Check that one check fails, with these words in its text and its advice."""
    found = await examine(**arguments)
    assert failures(found) == [check], found
    text = "\n".join(f"{f.text}\n{f.what_to_do}" for f in found if f.state == "failure")
    assert all(word in text for word in words), text


async def warns(check: str, *words: str, **arguments: Any) -> None:
    """Check that nothing fails, and that one check warns with these words."""
    found = await examine(**arguments)
    assert failures(found) == [], found
    text = "\n".join(
        f"{f.text}\n{f.what_to_do}" for f in found if f.state == "warning" and f.check == check
    )
    assert all(word in text for word in words), "\n".join(map(str, found))


async def test_a_service_that_works(setup: Setup, tmp_path: Path) -> None:
    """On a host whose service runs, no check fails, and each reports what it saw. A file without
    the pepper of a live token is a failure."""
    async with serving(load()) as address, grpc.aio.insecure_channel(address) as channel:
        await eventually(lambda: is_serving(channel), "health is up")
        request = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        await pb_grpc.TokenServiceStub(channel).Create(request, timeout=30)
        found = await examine()
        assert failures(found) == []
        states = {f.check: f.state for f in found}
        assert states["listener"] == "ok"
        assert states["migrations"] == "ok"
        assert states["clock"] == "ok"
        text = "\n".join(f.text for f in found)
        assert "reports SERVING" in text
        assert "is the primary: Postgres" in text
        assert f"schema {bundled()[-1].version:04}" in text
        assert "this host has the peppers that live tokens need" in text
    other = tmp_path / "other"
    pepper_files.load_or_create(other, create=True)
    setup(pepper_file=other)
    await only("peppers", "live tokens need peppers that", "LATCHKEY_PEPPER_FILE")


async def test_settings_that_are_invalid(setup: Setup) -> None:
    """Each wrong setting is a failure, and nothing else is checked."""
    setup(workers="many", lease_seconds=1_000_000)
    found = await examine()
    assert [f.text.partition(":")[0] for f in found if f.state == "failure"] == [
        "LATCHKEY_WORKERS",
        "LATCHKEY_LEASE_SECONDS",
    ]
    assert found[-1].state == "skipped"


async def test_a_wrong_password(setup: Setup, database_url: str) -> None:
    """The password is refused, and appears nowhere."""
    before, _, after = database_url.partition("@")
    setup(database_url=f"{before.rpartition(':')[0]}:hunter2@{after}")
    await only("database", "password", "pg_hba.conf")
    assert "hunter2" not in str(await examine())


async def test_a_database_that_does_not_exist(setup: Setup, database_url: str) -> None:
    """The command that creates it is named."""
    setup(database_url=with_database(database_url, "nowhere"))
    await only("database", "nowhere", "createdb --encoding=UTF8")


async def test_a_database_that_does_not_answer(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts connections and never answers costs a bounded time."""
    monkeypatch.setattr(doctor_database, "CONNECT_SECONDS", 0.3)
    closed = asyncio.Event()

    async def mute(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await closed.wait()
        writer.close()

    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        setup(database_url=f"postgresql://u:p@127.0.0.1:{port}/d?sslmode=disable")
        await only("database", "did not answer within 0.3 s")
        closed.set()


async def test_an_old_postgres(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server below the oldest supported version is named, with that version."""
    monkeypatch.setattr(doctor_database, "SERVER_VERSION_MIN", 99)
    await only("database", "99 or later is required", "pg_upgrade")


@contextlib.asynccontextmanager
async def database(postgres_url: str, options: str = "") -> AsyncIterator[str]:
    """Make an empty database."""
    name = f"doctor_{next(_names)}"
    async with session(postgres_url) as connection:
        await connection.execute(f"CREATE DATABASE {name} {options}")
    yield with_database(postgres_url, name)
    await drop_database(postgres_url, name)


async def test_another_encoding(setup: Setup, postgres_url: str) -> None:
    """A database that cannot store every name is named."""
    options = "ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
    async with database(postgres_url, options) as url:
        setup(database_url=url)
        await only("database", "has the encoding SQL_ASCII", "createdb --encoding=UTF8")


async def test_missing_migrations(setup: Setup, postgres_url: str) -> None:
    """An empty database is a warning if the service migrates it, and a failure otherwise."""
    async with database(postgres_url) as url:
        setup(database_url=url)
        await warns("migrations", "lacks", "applies them when it starts")
        setup(migrate="off")
        await only("migrations", "lacks", "latchkey migrate")


async def test_a_newer_schema(setup: Setup, postgres_url: str) -> None:
    """A schema that needs a newer release is a failure."""
    async with database(postgres_url) as url:
        await migrate(url, [*bundled(), Migration(9_999, "next", "SELECT 1")])
        setup(database_url=url)
        await only("migrations", "has migration 9999", "or a newer one")


async def test_too_few_connections(setup: Setup) -> None:
    """A number of workers that the database cannot serve is a failure."""
    setup(workers=200)
    await only("connections", "200 workers may hold 201 when idle", "LATCHKEY_WORKERS")
    setup(workers=100, host_lease="each")
    await only("connections", "100 workers may hold 300 when idle", "LATCHKEY_WORKERS")


@INSTALLS
async def test_a_pooler_in_transaction_mode(setup: Setup, scratch: Path, database_url: str) -> None:
    """A pooler that shares connections is recognised, and the setting for it is named. The checks
    leave no settings on the connections of the pooler."""
    pooler = PgBouncer(scratch / f"doctor-{next(_names)}", database_url, pool_mode="transaction")
    try:
        await pooler.start()
        setup(database_url=pooler.url())
        await only("pooler", "shares connections by transaction", "LATCHKEY_POOLER=transaction")
        setup(pooler="transaction")
        await warns("pooler", "the role lacks", "ALTER ROLE latchkey SET")
    finally:
        pooler.stop()


@INSTALLS
@pytest.mark.parametrize("setting", ["none", "transaction"])
async def test_a_pooler_in_statement_mode(
    setup: Setup, scratch: Path, database_url: str, setting: str
) -> None:
    """A pooler that allows no transactions is a failure, whatever the setting."""
    pooler = PgBouncer(scratch / f"doctor-{next(_names)}", database_url, pool_mode="statement")
    try:
        await pooler.start()
        setup(database_url=pooler.url(), pooler=setting)
        found = [f for f in await examine() if f.state == "failure"]
        assert "pooler" in {f.check for f in found}
        assert any("allows no transactions" in f.text for f in found), found
    finally:
        pooler.stop()


@pytest.mark.parametrize(("seconds", "state"), [(120, "failure"), (-5, "warning"), (0, "ok")])
async def test_a_clock_that_is_off(setup: Setup, seconds: int, state: str) -> None:
    """A clock that differs from the database's is reported, with its direction."""
    found = await examine(clock=lambda: datetime.now(UTC) + timedelta(seconds=seconds))
    (clock,) = (f for f in found if f.check == "clock")
    assert clock.state == state
    if seconds:
        assert ("ahead of" if seconds > 0 else "behind") in clock.text
        assert "NTP" in clock.what_to_do


async def test_a_broken_policy(setup: Setup, tmp_path: Path) -> None:
    """A policy that cannot be used is named with its fault."""
    path = tmp_path / "policy.toml"
    path.write_text('[callers.me]\nroles = ["king"]\n')
    path.chmod(0o640)
    setup(policy=path)
    await only("policy", str(path), "king")
    path.chmod(0o666)
    await only("policy", "other users can change", "chmod 640")


async def test_a_missing_pepper_file(setup: Setup, tmp_path: Path) -> None:
    """A pepper file that the setting names and that does not exist is a failure."""
    setup(pepper_file=tmp_path / "nowhere")
    await only("peppers", "there is no pepper file", "another host")


async def test_peppers_that_others_can_read(setup: Setup, tmp_path: Path) -> None:
    """A pepper file with a wrong mode is a failure, with the command that repairs it."""
    path = tmp_path / "peppers"
    pepper_files.load_or_create(path, create=True)
    path.chmod(0o644)
    setup(pepper_file=path)
    await only("peppers", "other users can read", "chmod 600")


def issue(folder: Path, *names: str, **options: Any) -> tuple[Path, Path, Path]:
    """Write a certificate for `names`; return the files of certificate, key and CA."""
    authority = trustme.CA()
    made = authority.issue_cert(*names, **options)
    certificate, key, ca = folder / "server.pem", folder / "server.key", folder / "ca.pem"
    certificate.write_bytes(made.cert_chain_pems[0].bytes())
    key.write_bytes(made.private_key_pem.bytes())
    key.chmod(0o600)
    ca.write_bytes(authority.cert_pem.bytes())
    return certificate, key, ca


def use(setup: Setup, certificate: Path, key: Path) -> None:
    setup(
        tls_listen=f"127.0.0.1:{free_port()}",
        tls_certificate=certificate,
        tls_key=key,
    )


async def test_the_name_in_the_certificate(setup: Setup, tmp_path: Path) -> None:
    """A certificate for another name than the clients' is a failure, even for the address of the
    listener."""
    certificate, key, ca = issue(tmp_path, "tokens.example")
    use(setup, certificate, key)
    await only("certificate", "127.0.0.1", "the name that clients use")
    found = await examine("tokens.example", ca)
    assert failures(found) == []
    assert any("is valid for tokens.example" in f.text for f in found)
    await only("certificate", "Hostname mismatch", host="other.example")


async def test_the_chain_of_the_certificate(setup: Setup, tmp_path: Path) -> None:
    """A certificate from another CA than the clients' is a failure, and so is a chain in the wrong
    order."""
    certificate, key, ca = issue(tmp_path, "127.0.0.1")
    use(setup, certificate, key)
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    await only("certificate", "unable to get local issuer certificate", ca=other)
    certificate.write_bytes(certificate.read_bytes() + other.read_bytes())
    await only("certificate", "not issued by the one that follows", "intermediate certificates")
    certificate.write_bytes(ca.read_bytes())
    await only("certificate", "LATCHKEY_TLS_KEY", "is not the key")


@pytest.mark.parametrize(
    ("days", "words"),
    [(-1, ("expired on", "replace the file")), (3, ("expires on", "replace the file"))],
)
async def test_the_end_of_the_certificate(
    setup: Setup, tmp_path: Path, days: int, words: tuple[str, ...]
) -> None:
    """A certificate that has expired is a failure, and one that soon does is a warning."""
    now = datetime.now(UTC)
    certificate, key, _ = issue(
        tmp_path,
        "127.0.0.1",
        not_before=now - timedelta(days=30),
        not_after=now + timedelta(days=days),
    )
    use(setup, certificate, key)
    await (only if days < 0 else warns)("certificate", *words)


async def test_the_end_of_the_ca_of_clients(setup: Setup, tmp_path: Path) -> None:
    """A CA of client certificates that has expired is a failure."""
    certificate, key, ca = issue(tmp_path, "127.0.0.1")
    use(setup, certificate, key)
    setup(tls_client_ca=ca)
    later = datetime.now(UTC) + timedelta(days=365 * 1_000)
    found = await examine(clock=lambda: later)
    assert "client CA" in failures(found)
    assert "client CA" not in failures(await examine())


async def test_another_program_on_the_port(setup: Setup) -> None:
    """A program that does not answer as Latchkey does is a failure."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        setup(listen=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await only("listener", "does not answer as Latchkey does", "LATCHKEY_LISTEN")


async def test_an_address_of_another_machine(setup: Setup) -> None:
    """An address on which this host cannot listen is a failure."""
    # TEST-NET-1: no machine has it.
    setup(listen="192.0.2.1:50051", insecure_listen="anonymous")
    await only("listener", "cannot listen on 192.0.2.1:50051", "LATCHKEY_LISTEN")


async def test_a_service_that_is_down(setup: Setup) -> None:
    """A host whose service is down is checked all the same, and the command that starts it is
    named."""
    await warns("listener", "nobody listens on", "latchkey serve")


async def test_an_embedded_database(
    monkeypatch: pytest.MonkeyPatch, scratch: Path, tmp_path: Path
) -> None:
    """Doctor starts no embedded database, and checks the one that runs."""
    monkeypatch.chdir(tmp_path)
    folder = scratch / f"doctor-{next(_names)}"
    monkeypatch.setenv("LATCHKEY_DATA_DIR", str(folder))
    monkeypatch.setenv("LATCHKEY_LISTEN", f"127.0.0.1:{free_port()}")
    await warns("listener", "nobody listens on")
    assert not folder.exists()
    copy_cluster(folder)
    postgres = EmbeddedPostgres(folder)
    url = postgres.start()
    try:
        await migrate(url, bundled())
        found = await examine()
    finally:
        postgres.stop()
    assert failures(found) == []
    assert any("is the primary" in f.text for f in found)
    found = await examine()
    assert failures(found) == []
    assert any("does not run: the service starts it" in f.text for f in found)


async def test_command_prints_the_checks(setup: Setup, tmp_path: Path, forked: Forked) -> None:
    """The command prints JSON or text, and its exit code says whether a check failed."""
    setup(pepper_file=tmp_path / "nowhere")

    async def doctor(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *forked("latchkey_service", "doctor", *arguments),
            cwd=tmp_path,
            env=dict(os.environ),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(COMMAND_SECONDS_MAX):
            output, _ = await process.communicate()
        return process.returncode, output.decode()

    code, output = await doctor("--json")
    document = json.loads(output)
    assert code == 1
    assert document["healthy"] is False
    assert document["schema"] == bundled()[-1].version
    failed = [f for f in document["findings"] if f["state"] == "failure"]
    assert [f["check"] for f in failed] == ["peppers"]
    code, output = await doctor()
    assert code == 1
    assert "FAILURE  peppers" in output
    assert "-> point LATCHKEY_PEPPER_FILE to a copy" in output
    assert output.splitlines()[-1].startswith("1 failures, ")
