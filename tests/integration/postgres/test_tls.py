"""Postgres over TLS, with a server that requires it.

The embedded server has no TLS. So this uses the Postgres of the operating system, where there is
one.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import trustme
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.embedded_host import OsAccount, choose_account, spawn
from latchkey_service.postgres.migrate import MigrationError, bundled, migrate
from latchkey_service.settings.settings import Settings

from tests.helpers.calls import is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.postgres_node import new_folder
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually

PASSWORD = "only for this test"
START_SECONDS_MAX = 60.0
# Of the checks in the server's log: it refuses plaintext.
HBA = "hostssl all all all scram-sha-256\n"


@dataclass
class Server:
    """A Postgres that accepts connections over TLS only."""

    port: int
    folder: Path
    ca: Path
    """The CA of its certificate, which is for `localhost`."""

    def url(self, host: str = "localhost", user: str = "postgres", **parameters: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://{user}@{host}:{self.port}/postgres?{query}"

    def passfile(self) -> Path:
        """Write the password to a file as libpq reads it."""
        path = self.folder / "pgpass"
        path.touch(0o600)
        path.write_text(f"localhost:{self.port}:*:postgres:{PASSWORD}\n")
        return path


def _programs() -> Path:
    """Return the folder with the programs of the newest Postgres of the operating system."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("not installed here: a Postgres with TLS, such as Debian's package postgresql")
    return max(found, key=lambda path: int(path.parts[-3])).parent


@pytest.fixture(scope="module")
async def server(scratch: Path) -> AsyncIterator[Server]:
    programs = _programs()
    folder = new_folder(scratch, "tls-")
    data = folder / "data"
    account = choose_account(data)
    data.mkdir(0o700)
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    ca = folder / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    password = folder / "password"
    password.write_text(PASSWORD)
    _give(account, data, password)
    with (folder / "log").open("ab") as log:
        initdb = [
            *(f"{programs}/initdb", f"--pgdata={data}", "--username=postgres", "--no-sync"),
            *(f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"),
        ]
        made = spawn(initdb, account, log, signal.SIGKILL, {})
        await eventually(lambda: made.poll() is not None, "initdb has ended", START_SECONDS_MAX)
        assert made.returncode == 0, (folder / "log").read_text()
        (data / "pg_hba.conf").write_text(HBA)
        certificate.cert_chain_pems[0].write_to_path(data / "server.crt")
        certificate.private_key_pem.write_to_path(data / "server.key")
        (data / "server.key").chmod(0o600)
        _give(account, data / "server.crt", data / "server.key")
        port = free_port()
        postmaster = [
            *(f"{programs}/postgres", "-D", str(data), "-p", str(port), "-c", "ssl=on"),
            *("-c", "listen_addresses=localhost", "-c", "unix_socket_directories="),
            *("-c", "fsync=off"),
        ]
        process = spawn(postmaster, account, log, signal.SIGINT, {})
    running = Server(port, folder, ca)
    try:
        await eventually(lambda: _answers(running, process), "it answers", START_SECONDS_MAX)
        yield running
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(START_SECONDS_MAX)
        shutil.rmtree(folder, ignore_errors=True)


def _give(account: OsAccount, *paths: Path) -> None:
    for path in paths:
        os.chown(path, account.uid, account.gid)


async def _answers(server: Server, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, (server.folder / "log").read_text()
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        connection = await asyncpg.connect(
            server.url(sslmode="require"), password=PASSWORD, timeout=5
        )
        await connection.close()
        return True
    return False


async def test_the_service_works_over_verified_tls(
    server: Server, pepper_file: Path, tmp_path: Path
) -> None:
    """With `sslmode=verify-full`, a CA, and the password in a file, a service migrates and serves,
    and each of its connections is encrypted."""
    url = server.url(sslmode="verify-full", sslrootcert=server.ca, passfile=server.passfile())
    await migrate(url, bundled())
    settings = Settings(
        database_url=url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "unused",
        listen="127.0.0.1:0",
        grace_seconds=0.2,
    )
    assert PASSWORD not in url
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        await eventually(lambda: is_serving(channel), "health is up")
        stub = pb_grpc.TokenServiceStub(channel)
        created = await stub.Create(
            pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ), timeout=10
        )
        answer = await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=10)
        assert answer.verdict == pb.VERDICT_VALID
        connection = await asyncpg.connect(url, timeout=5)
        rows: Any = await connection.fetch(
            "SELECT s.ssl, s.version FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)"
            " WHERE a.application_name = 'latchkey'"
        )
        await connection.close()
        assert len(rows) >= 3
        assert {tuple(row) for row in rows} == {(True, "TLSv1.3")}


async def test_connections_that_nobody_verified_are_refused(server: Server) -> None:
    """A service does not start if the certificate is for another name or from another CA, or if the
    connection is not encrypted. The message says what to do."""
    other = server.folder / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    passfile = server.passfile()
    passfile.write_text(passfile.read_text().replace("localhost", "*"))
    verified: dict[str, Any] = {"sslmode": "verify-full", "passfile": passfile}
    for url, words in (
        (server.url(**verified, sslrootcert=other), "sslrootcert must contain its CA"),
        (
            server.url("127.0.0.1", **verified, sslrootcert=server.ca),
            "certificate must contain the name",
        ),
        (server.url(sslmode="disable", passfile=passfile), "no encryption"),
    ):
        with pytest.raises(MigrationError) as refusal:
            await migrate(url, bundled())
        assert words in str(refusal.value)
