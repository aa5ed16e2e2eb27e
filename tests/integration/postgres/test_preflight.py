"""Databases in which Latchkey cannot work are named at once, with what to do."""

import asyncio
import contextlib
import itertools
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from latchkey_service.postgres import migrate as migrate_module
from latchkey_service.postgres.migrate import MigrationError, bundled, migrate
from latchkey_service.postgres.preflight import ONE_WORKER, Workers
from structlog.testing import capture_logs

from tests.helpers.databases import drop_database, session
from tests.helpers.servers import with_database

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

_names = itertools.count(1)
# Far below the time that the service waits for a database that may come up.
AT_ONCE_SECONDS = migrate_module.START_TIMEOUT_SECONDS / 2


@contextlib.asynccontextmanager
async def database(postgres_url: str, options: str = "") -> AsyncIterator[str]:
    name = f"preflight_{next(_names)}"
    async with session(postgres_url) as connection:
        await connection.execute(f"CREATE DATABASE {name} {options}")
    yield with_database(postgres_url, name)
    await drop_database(postgres_url, name)


async def refusal(url: str, workers: Workers = ONE_WORKER) -> str:
    """Return why the service does not start on a database."""
    began = time.monotonic()
    with pytest.raises(MigrationError) as caught:
        await migrate(url, bundled(), workers=workers)
    assert time.monotonic() - began < AT_ONCE_SECONDS
    return str(caught.value)


async def test_other_encodings(postgres_url: str) -> None:
    """A database that cannot store every name is refused, with the command for a better one."""
    options = "ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
    async with database(postgres_url, options) as url:
        message = await refusal(url)
    assert "has the encoding SQL_ASCII" in message
    assert "createdb --encoding=UTF8 --template=template0" in message


async def test_a_role_that_may_only_read(postgres_url: str) -> None:
    """A role without write access is named, with the statement that grants it."""
    async with database(postgres_url) as url:
        async with session(url) as connection:
            name = await connection.fetchval("SELECT current_database()")
            await connection.execute(
                f"ALTER DATABASE {name} SET default_transaction_read_only = on"
            )
        message = await refusal(url)
    assert "default_transaction_read_only" in message
    assert "ALTER ROLE latchkey" in message


async def test_a_role_that_may_not_create_tables(postgres_url: str) -> None:
    """A role that may not create tables is named, with the statement that grants it."""
    async with database(postgres_url) as url:
        message = await refusal(f"{url}&search_path=pg_catalog")
        assert 'GRANT CREATE ON SCHEMA "pg_catalog" TO latchkey' in message
        assert "no schema of the role's search_path" in await refusal(f"{url}&search_path=nowhere")


async def test_too_few_connections(postgres_url: str) -> None:
    """A number of workers that cannot work with the connections of Postgres is refused, and one
    that may run out of them is logged."""
    async with database(postgres_url) as url:
        message = await refusal(url, Workers(100))
        assert "allows 197 connections" in message
        assert "raise max_connections, or lower LATCHKEY_WORKERS" in message
        with capture_logs() as lines:
            await migrate(url, bundled(), workers=Workers(20))
        assert [x["log_level"] for x in lines if "few connections" in x["event"]] == ["warning"]
        with capture_logs() as lines:
            await migrate(url, bundled(), workers=Workers(4))
        assert not [line for line in lines if "few connections" in line["event"]]


async def test_workers_that_share_a_lease_need_few_connections(postgres_url: str) -> None:
    """Workers that share a lease may start although Postgres allows fewer than three connections
    for each, down to what they hold while worker 0 is away."""
    async with database(postgres_url) as url:
        with capture_logs() as lines:
            await migrate(url, bundled(), workers=Workers(196, share_lease=True))
        said = [x["what_to_do"] for x in lines if "few connections" in x["event"]]
        assert "196 workers may hold 197 when idle" in said[0]
        message = await refusal(url, Workers(197, share_lease=True))
        assert "197 workers may hold 198 when idle" in message


@contextlib.asynccontextmanager
async def tls_server(answer: bytes, context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server that answers a request for TLS with `answer`. Yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(8)
            writer.write(answer)
            if answer == b"S":
                await writer.start_tls(context)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "query", "said"),
    [
        (b"S", "sslmode=verify-full&sslrootcert={ca}", "must contain the name"),
        (b"S", "sslrootcert=system", "must contain its CA"),
        (b"N", "sslmode=require", "Turn on TLS in Postgres"),
        (b"S", "sslmode=verify-full&sslrootcert=/nowhere.pem", "/nowhere.pem: No such file"),
    ],
    ids=["name", "authority", "no-tls", "file"],
)
async def test_tls_that_cannot_work(tmp_path: Path, answer: bytes, query: str, said: str) -> None:
    """A certificate for another name or of an unknown CA, a server without TLS, and a missing file
    are reported at once, because waiting does not change them."""
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("db.example.org").configure_cert(context)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with tls_server(answer, context) as port:
        parameters = query.format(ca=tmp_path / "ca.pem")
        assert said in await refusal(f"postgresql://u:p@127.0.0.1:{port}/db?{parameters}")
