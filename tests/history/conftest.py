"""A Postgres for these tests alone, which the run may restart and kill."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.breakable_postgres import BreakablePostgres


@pytest.fixture(scope="session")
def postgres(scratch: Path) -> Iterator[BreakablePostgres]:
    """A Postgres that keeps its URL across restarts."""
    postgres = BreakablePostgres(scratch / "history")
    postgres.start()
    yield postgres
    postgres.close()


@pytest.fixture(scope="session")
def postgres_url(postgres: BreakablePostgres) -> str:
    """Its URL."""
    return postgres.start()
