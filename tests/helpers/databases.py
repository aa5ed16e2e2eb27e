"""Sessions of a test on the service's database."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from tests.helpers.waiting import WAIT_SECONDS, eventually

__all__ = ["backends", "drop_database", "session"]


@contextlib.asynccontextmanager
async def session(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Open a connection for the test, under an application name other than the service's."""
    connection = await asyncpg.connect(
        url, timeout=WAIT_SECONDS, server_settings={"application_name": "test"}
    )
    try:
        yield connection
    finally:
        connection.terminate()


async def drop_database(url: str, name: str) -> None:
    """Drop a database through a connection to another one, even if clients are connected to it."""

    async def drop() -> bool:
        async with session(url) as connection:
            try:
                await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
            except asyncpg.InsufficientPrivilegeError:
                # Only a superuser may end autovacuum, which ends by itself.
                return False
        return True

    await eventually(drop, f"{name} is dropped")


async def backends(url: str) -> list[Any]:
    """Return the activity of the service's connections to this database."""
    async with session(url) as connection:
        return list(
            await connection.fetch(
                "SELECT pid, state, wait_event_type FROM pg_stat_activity"
                " WHERE application_name = 'latchkey' AND datname = current_database()"
            )
        )
