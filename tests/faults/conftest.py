"""The fixtures of the other tests, on a Postgres that a test may break."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.postgres_node import Template, make_template


@pytest.fixture(scope="session")
def postgres(scratch: Path) -> Iterator[BreakablePostgres]:
    """A Postgres for these tests alone. A test that breaks it also restores it."""
    copy_cluster(scratch / "breakable")
    postgres = BreakablePostgres(scratch / "breakable")
    postgres.start()
    yield postgres
    postgres.close()


@pytest.fixture(scope="session")
def postgres_url(postgres: BreakablePostgres) -> str:
    """Its URL, the same after each restart."""
    return postgres.start()


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
