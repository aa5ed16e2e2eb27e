"""Connections to Postgres: their bounds, and what becomes of the driver's errors.

Every wait on Postgres is bounded here, and every error of the driver is translated here, by class
or SQLSTATE: nothing above knows asyncpg. The SQL is in `store.py` and `coherence/table.py`.
"""

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import asyncpg

from latchkey_service.errors import (
    NO_ANSWER,
    AlreadyExists,
    StoreConflict,
    StoreUnavailable,
    StoreUnsupported,
)
from latchkey_service.hosts import Hosts
from latchkey_service.reconnection import Attempt, Reconnection

__all__ = ["Connector", "Pool", "connect", "durably", "retrying", "translated"]

# A statement of ours takes about a millisecond. Two seconds without an answer is a database that
# is frozen or gone, and a caller is better told so than kept.
STATEMENT_TIMEOUT_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 1.0
# A row lock is held for one commit; past this something is stuck and the caller may retry.
LOCK_TIMEOUT = "1500ms"
CLIENT_CHECK_INTERVAL = "250ms"
# Each call at work has one (`calls.PLACES`), and each receipt that is written (`tokens.py`); two
# are for what the process does by itself.
POOL_SIZE_MAX = 16
# Transactions that undid each other are tried again this often, after a wait of up to the first of
# these, which doubles up to the second: half a second in all, in which hundreds get through.
CONFLICT_ATTEMPTS = 14
CONFLICT_DELAY_SECONDS = 0.008
CONFLICT_DELAY_SECONDS_MAX = 0.1

P = ParamSpec("P")
T = TypeVar("T")

# After these nothing is known of the connection, and it is not used again.
_BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError included
    asyncio.CancelledError,
)


class _Connection(asyncpg.Connection):
    """A connection whose release to the pool costs no round trip: our statements leave no state."""

    def get_reset_query(self) -> str:
        return ""


if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    _Session = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]


class Connector:
    """Makes all of a process's connections to one database; few attempts while it is away.

    Belongs to the event loop that it is used on.
    """

    def __init__(
        self,
        database_url: str,
        monotonic: Callable[[], float] = time.monotonic,
        randomness: Callable[[], float] = random.random,
    ) -> None:
        self._hosts = Hosts(database_url)
        self._reconnection = Reconnection(monotonic, randomness)
        self._failure: BaseException | None = None
        self._attempts: dict[asyncio.Task[Any], Attempt] = {}

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Return a connection of one's own.

        Raises StoreUnavailable: also at once, without an attempt, where the last ones have just
        failed.
        """
        with translated():
            return await self.attempt(asyncpg.Connection)

    async def attempt(
        self, connection_class: "type[asyncpg.Connection[asyncpg.Record]]"
    ) -> "asyncpg.Connection[asyncpg.Record]":
        """Do the same for the pool, which wants its own class and the driver's errors."""
        while (kind := self._reconnection.begin()) is None:
            probes = [task for task, kind in self._attempts.items() if kind is Attempt.PROBE]
            if not (self._reconnection.in_doubt and probes):
                raise StoreUnavailable(NO_ANSWER) from self._failure
            # It takes a connect's time-out for each host at most.
            await asyncio.wait(probes)
        # A task of its own: what comes of an attempt has to be known also when its caller leaves,
        # or callers in a hurry would begin one after the other.
        task = asyncio.create_task(
            self._hosts.connect(connection_class=connection_class, **_options()), name="connect"
        )
        self._attempts[task] = kind
        task.add_done_callback(self._settle)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise

    def _settle(self, task: "asyncio.Task[Any]") -> None:
        kind = self._attempts.pop(task)
        if task.cancelled() or task.exception() is not None:
            self._failure = None if task.cancelled() else task.exception()
            self._reconnection.fail(kind)
        else:
            self._failure = None
            self._reconnection.succeed(kind)


class Pool:
    """A pool of connections for statements that stand alone or in short transactions."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._expiry: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, connector: Connector) -> "Pool":
        """Return a new pool. Connects lazily, so that it opens without a database."""

        async def connect(*_: object, **__: object) -> "asyncpg.Connection[asyncpg.Record]":
            return await connector.attempt(_Connection)

        return cls(
            await asyncpg.create_pool(
                connect=connect,
                min_size=0,
                max_size=POOL_SIZE_MAX,
                connection_class=_Connection,
            )
        )

    async def close(self) -> None:
        """Give up all connections, waiting a bounded time for those in use."""
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    def reconnect(self) -> None:
        """Replace the connections, each when it is used next: they may lead to the wrong server."""
        # It waits for nothing. A task all the same, which has to be held on to.
        self._expiry = asyncio.create_task(self._pool.expire_connections())

    @contextlib.asynccontextmanager
    async def session(self) -> "AsyncIterator[_Session]":
        """Lend a connection; translate what goes wrong with it, waiting for one included."""
        with translated():
            async with self._pool.acquire(timeout=STATEMENT_TIMEOUT_SECONDS) as session:
                try:
                    yield session
                except _BROKEN:
                    # Else the release would wait until a frozen server has cancelled the query,
                    # or hand on a connection that is ended but has not been told so yet.
                    session.terminate()
                    raise


async def connect(database_url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """Return a connection of one's own, for once. Raises StoreUnavailable."""
    return await Connector(database_url).connect()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into the domain's. Its messages stay in `__cause__`, for the log."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "token_live_name":
            raise
        raise AlreadyExists("The account has a live token of this name.") from error
    except asyncpg.FeatureNotSupportedError as error:  # 0A000
        raise StoreUnsupported("The database does not support this.") from error
    except asyncpg.TransactionRollbackError as error:  # 40xxx: serialisation, deadlock
        raise StoreConflict("The database is busy with others; try again shortly.") from error
    except (
        asyncpg.PostgresConnectionError,  # 08xxx: broken off
        asyncpg.OperatorInterventionError,  # 57xxx: shutting down, starting up, cancelled
        asyncpg.InsufficientResourcesError,  # 53xxx: too many connections, disk full
        asyncpg.LockNotAvailableError,  # 55P03: lock_timeout
        asyncpg.ReadOnlySQLTransactionError,  # 25006: a standby, or a deposed primary
        asyncpg.InvalidAuthorizationSpecificationError,  # 28xxx: also while roles are restored
        asyncpg.InvalidCatalogNameError,  # 3D000: also while the database is restored
        asyncpg.InterfaceError,  # the driver's own word for a connection that is closing
        asyncpg.InternalClientError,  # and for one that ended between two of its messages
        OSError,  # TimeoutError included
    ) as error:
        raise StoreUnavailable(NO_ANSWER) from error


@contextlib.contextmanager
def durably(session: "_Session") -> Iterator[None]:
    """Raise StoreUnavailable if what was committed within may be undone by a failover.

    Postgres reports a commit as done, with a warning, when its wait for the synchronous standby is
    cancelled. A deletion, or a renewal of a lease, that only a deposed primary has is none.
    """
    warnings: list[str] = []

    def listen(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.severity_en == "WARNING":
            warnings.append(message.sqlstate)

    session.add_log_listener(listen)
    try:
        yield
    finally:
        session.remove_log_listener(listen)
    if warnings:
        raise StoreUnavailable("The database has not replicated what was written; try again.")


def retrying(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Run a transaction again when it and another one undid each other (SQLSTATE 40xxx).

    Under READ COMMITTED that hardly happens. Under SERIALIZABLE, which some engines that speak
    Postgres' protocol do not do without, it is the usual way for one of two to lose. Nothing of
    the transaction stands then, so that to repeat it is safe.
    """

    @functools.wraps(method)
    async def again(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(CONFLICT_ATTEMPTS - 1):
            try:
                return await method(*args, **kwargs)
            except StoreConflict:
                # Jitter, or those that met will meet again.
                longest = min(CONFLICT_DELAY_SECONDS * 2**attempt, CONFLICT_DELAY_SECONDS_MAX)
                await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - a spread
        return await method(*args, **kwargs)

    return again


def _discard(task: "asyncio.Task[Any]") -> None:
    """Give up a connection that nobody waits for any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def _options() -> dict[str, Any]:
    """Return the connection settings that all connections share."""
    return {
        "timeout": CONNECT_TIMEOUT_SECONDS,
        "command_timeout": STATEMENT_TIMEOUT_SECONDS,
        "server_settings": {
            "application_name": "latchkey",
            "lock_timeout": LOCK_TIMEOUT,
            # A second bound, on the server: work that nobody waits for any more must end too.
            "statement_timeout": f"{int(STATEMENT_TIMEOUT_SECONDS * 1000)}ms",
            "idle_in_transaction_session_timeout": "10s",
            # A connection that was given up ends by this also while it waits for a lock. Else
            # callers with short deadlines would pile up connections behind one row.
            "client_connection_check_interval": CLIENT_CHECK_INTERVAL,
            "jit": "off",
        },
    }
