"""Servers in this process that several tests use, one after another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg

from tests.helpers.servers import fresh_database, make_settings, serving
from tests.helpers.stacks import task_stacks
from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["SharedServers", "share_servers"]

# Each server gives its clients a second, and then waits for Postgres.
CLOSE_SECONDS_MAX = WAIT_SECONDS + 10.0

SharedServers = Callable[..., Awaitable[tuple[str, "asyncpg.Connection[asyncpg.Record]"]]]


@contextlib.asynccontextmanager
async def share_servers(postgres_url: str, pepper_file: Path) -> AsyncIterator[SharedServers]:
    """Yield a function that returns the address of a server and a connection to its database.

    It starts a server for each transport, lease length and prefixes of imported secrets, when they
    are first asked for. All servers run until the end.
    """
    started: dict[
        tuple[str, float, str | None], tuple[str, asyncpg.Connection[asyncpg.Record]]
    ] = {}
    stacks: list[contextlib.AsyncExitStack] = []

    async def shared(
        transport: str, lease_seconds: float = 3.0, imported_prefixes: str | None = None
    ) -> tuple[str, "asyncpg.Connection[asyncpg.Record]"]:
        key = (transport, lease_seconds, imported_prefixes)
        if key not in started:
            url = await fresh_database(postgres_url)
            stacks.append(contextlib.AsyncExitStack())
            connection = await asyncpg.connect(url)
            stacks[-1].push_async_callback(connection.close)
            settings = make_settings(url, pepper_file, transport)
            settings = settings.model_copy(
                update={
                    "lease_seconds": lease_seconds,
                    "imported_prefixes": imported_prefixes,
                }
            )
            address = await stacks[-1].enter_async_context(serving(settings))
            started[key] = (address, connection)
        return started[key]

    yield shared
    # At once, because each may wait for its clients.
    ends = asyncio.gather(*(stack.aclose() for stack in stacks))
    done, _ = await asyncio.wait({ends}, timeout=CLOSE_SECONDS_MAX)
    assert done, f"the shared servers do not end; all tasks:\n{task_stacks()}"
    await ends
