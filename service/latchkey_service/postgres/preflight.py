"""Checks a database when the service starts: the pooler's mode and the durability settings.

Owns detection and advice; it changes no setting. A pooler that shares server connections by
transaction loses LISTEN, settings and prepared statements without an error. So it is recognised by
its behaviour, not by what it reports.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import asyncpg

from latchkey_service.postgres.circuit_breaker import ATTEMPTS_MAX
from latchkey_service.postgres.sessions import SETTINGS
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = [
    "PoolerError",
    "check_pooler",
    "needs_transactions",
    "warn_of_lost_writes",
    "warn_of_unbounded_role",
]

# In each round the pooler chooses a server connection three times. To go unnoticed, a pooler in
# transaction mode would have to choose like one in session mode every time.
ROUNDS: Final = 5
# An answer takes one round trip. A pooler without a free server connection waits for minutes.
ANSWER_TIMEOUT_SECONDS: Final = 5.0

_BY_TRANSACTION: Final = (
    "the database is behind a pooler that shares connections by transaction; set "
    "LATCHKEY_POOLER=transaction, or switch the pooler to session mode (PgBouncer: "
    "pool_mode = session)"
)
_BY_STATEMENT: Final = (
    "the database is behind a pooler that allows no transactions; switch it to session or "
    "transaction mode (PgBouncer: pool_mode)"
)
_EXHAUSTED: Final = (
    "the database is behind a pooler that had no server connection for a second client; raise the "
    "size of its pool (PgBouncer: default_pool_size): in session mode each worker needs up to "
    f"{ATTEMPTS_MAX} connections"
)
_UNSAFE: Final = {
    "fsync": "fsync is off: a crash of the database's machine can undo "
    "confirmed deletions, or destroy the database",
    "full_page_writes": "full_page_writes is off: a crash of the database's machine can destroy "
    "the database or undo confirmed deletions",
}


class PoolerError(Exception):
    """The service cannot work through this pooler. The message says what to do."""


async def check_pooler(
    connection: "Connection", connect: Callable[[], "Awaitable[Connection]"]
) -> None:
    """Raise PoolerError if `connection` does not have a server session to itself.

    Alternates between this connection and a second one. If each connection has its own session,
    the first always reaches the same server process and the second never reaches that one. This
    works with a pool of any size: a pool of one gives both the same process at once.
    """
    process = await _server_process(connection)
    # Postgres reports its process id to a new connection. A pooler reports a made-up number.
    if process == connection.get_server_pid():
        return
    try:
        other = await connect()
    except TimeoutError as error:
        raise PoolerError(_EXHAUSTED) from error
    try:
        for _ in range(ROUNDS):
            await other.execute("BEGIN", timeout=ANSWER_TIMEOUT_SECONDS)
            # During the second one's transaction, the first one cannot get the same process.
            if await _server_process(other) == process:
                raise PoolerError(_BY_TRANSACTION)
            if await _server_process(connection) != process:
                raise PoolerError(_BY_TRANSACTION)
            await other.execute("ROLLBACK", timeout=ANSWER_TIMEOUT_SECONDS)
            if await _server_process(connection) != process:
                raise PoolerError(_BY_TRANSACTION)
    finally:
        other.terminate()


@contextlib.contextmanager
def needs_transactions() -> Iterator[None]:
    """Raise PoolerError if the pooler closes a connection because it began a transaction."""
    try:
        yield
    except asyncpg.PostgresConnectionError as error:
        # PgBouncer's words; its SQLSTATE only says that the connection was lost.
        if "statement pooling" in str(error):
            raise PoolerError(_BY_STATEMENT) from error
        raise


async def warn_of_unbounded_role(connection: "Connection") -> None:
    """Log which time-outs the role lacks. Behind transaction pooling, no session can set them."""
    rows = await connection.fetch(
        """
        SELECT name FROM pg_catalog.pg_settings
         WHERE name = ANY($1::text[]) AND setting = CASE name WHEN 'jit' THEN 'on' ELSE '0' END
        """,
        list(SETTINGS),
    )
    if not rows:
        return
    role = await connection.fetchval("SELECT quote_ident(current_user)")
    missing = [row["name"] for row in rows]
    logger().warning(
        "the database role lacks settings that the pooler does not let the service set",
        settings=missing,
        run="; ".join(f"ALTER ROLE {role} SET {name} = '{SETTINGS[name]}'" for name in missing),
    )


async def warn_of_lost_writes(connection: "Connection") -> None:
    """Log settings with which Postgres may lose committed transactions in a crash."""
    rows = await connection.fetch(
        "SELECT name FROM pg_catalog.pg_settings WHERE name = ANY($1::text[]) AND setting = 'off'",
        list(_UNSAFE),
    )
    for row in rows:
        logger().warning(_UNSAFE[row["name"]])


async def _server_process(connection: "Connection") -> int:
    process: int = await connection.fetchval(
        "SELECT pg_backend_pid()", timeout=ANSWER_TIMEOUT_SECONDS
    )
    return process
