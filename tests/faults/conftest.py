"""The fixtures of the other tests, on a Postgres that a test may break."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from latchkey_service.postgres.migrate import bundled, migrate

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.databases import session
from tests.helpers.postgres_node import Template, make_template
from tests.helpers.servers import TEMPLATE, with_database


@pytest.fixture(scope="session")
def postgres(scratch: Path) -> Iterator[BreakablePostgres]:
    """A Postgres for these tests alone. A test that breaks it also restores it."""
    postgres = BreakablePostgres(scratch / "breakable")
    postgres.start()
    yield postgres
    postgres.close()


@pytest.fixture(scope="session")
def postgres_url(postgres: BreakablePostgres) -> str:
    """Its URL, the same after each restart."""
    return postgres.start()


@pytest.fixture(scope="session")
async def template_url(postgres_url: str) -> str:
    """A migrated database on that Postgres, from which each test's database is cloned."""
    async with session(postgres_url) as connection:
        await connection.execute(f"CREATE DATABASE {TEMPLATE}")
    url = with_database(postgres_url, TEMPLATE)
    await migrate(url, bundled())
    return url


@pytest.fixture(scope="session")
async def pair_template(scratch: Path) -> Template:
    """The data directory from which the nodes of a pair are copied."""
    folder = scratch / "pair-template"
    folder.mkdir()
    folder.chmod(0o755)
    return await make_template(folder)


@pytest.fixture
def address(own_address: str) -> str:
    """Address of a dedicated server, because tests count and cut its connections."""
    return own_address


@pytest.fixture(autouse=True)
def plain_log() -> Iterator[None]:
    """Log as in production: the pretty format is slow enough to miss deadlines."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    yield
    structlog.reset_defaults()
