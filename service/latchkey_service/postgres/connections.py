"""Connections to Postgres: their bounds, and what becomes of the driver's errors.

Every wait on Postgres is bounded here, and every error of the driver is translated here, by class
or SQLSTATE: nothing above knows asyncpg. The SQL is in `store.py` and `coherence/table.py`.
"""

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import asyncpg
from latchkey_coherence.lease import boottime

from latchkey_service.errors import (
    NO_ANSWER,
    AlreadyExists,
    NotReplicated,
    StoreConflict,
    StoreUnavailable,
    StoreUnsupported,
)
from latchkey_service.postgres.circuit_breaker import Attempt, CircuitBreaker
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts
from latchkey_service.postgres.sessions import GENERIC_PLAN, SETTINGS, Pooler, driver_options

__all__ = [
    "DURABLE",
    "Connector",
    "Pool",
    "answers",
    "connect",
    "require_durable_commit",
    "retry_on_conflict",
    "translate_errors",
]

# A statement of ours takes about a millisecond. Two seconds without an answer is a database that
# is frozen or gone, and a caller is better told so than kept.
STATEMENT_TIMEOUT_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 1.0
# A connection that nothing was sent on for so long is tried before it is used: a firewall may have
# forgotten it, and a statement would wait for its whole time-out. The trial is one round trip.
IDLE_SECONDS = 5.0
# Far above a round trip, and short enough that the caller still has time for a new connection.
TRIAL_TIMEOUT_SECONDS = 0.5
# Each call at work has one (`calls.CONCURRENCY_LIMITS`), and each receipt that is written
# (`tokens.py`); two
# are for what the process does by itself.
POOL_SIZE_MAX = 16
# Transactions that undid each other are tried again this often, after a wait of up to the first of
# these, which doubles up to the second: half a second in all, in which hundreds get through.
CONFLICT_ATTEMPTS = 14
CONFLICT_DELAY_SECONDS = 0.008
CONFLICT_DELAY_SECONDS_MAX = 0.1

_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})

P = ParamSpec("P")
T = TypeVar("T")

# After these nothing is known of the connection, and it is not used again.
_BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.InvalidSQLStatementNameError,  # 26000: a pooler handed it to another server session
    asyncpg.DuplicatePreparedStatementError,  # 42P05: the same
    OSError,  # TimeoutError included
    asyncio.CancelledError,
)

# For the WHERE clause of a statement that must not be lost: `AND {DURABLE}`. Its transaction's
# commit then waits until its WAL is on disk, and on the synchronous standby where there is one,
# even if database, role or session say otherwise. Within the statement, so that it is one round
# trip and holds where a pooler keeps no settings. As a condition, since Postgres evaluates no
# WITH query that nothing refers to, and writes no row whose condition it has not evaluated.
DURABLE = """CASE WHEN current_setting('synchronous_commit') IN ('on', 'remote_apply') THEN true
     ELSE set_config('synchronous_commit', 'on', true) IS NOT NULL END"""


class _Connection(asyncpg.Connection):
    """A connection whose release to the pool costs no round trip: our statements leave no state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # When it was last known to work, by the clock that goes on while the machine is suspended.
        self.used_at = boottime()

    def get_reset_query(self) -> str:
        return ""

    def touch(self) -> None:
        """Note that it has just been used."""
        self.used_at = boottime()


if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    _Session = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]


class Connector:
    """Makes all of a process's connections to one database; few attempts while it is away.

    `pooler` is what is between the two. Belongs to the event loop that it is used on.
    """

    def __init__(
        self,
        database_url: str,
        monotonic: Callable[[], float] = time.monotonic,
        randomness: Callable[[], float] = random.random,
        *,
        pooler: Pooler = "none",
    ) -> None:
        self._pooler: Pooler = pooler
        self._hosts = Hosts(database_url)
        self._breaker = CircuitBreaker(monotonic, randomness)
        self._failure: BaseException | None = None
        self._attempts: dict[asyncio.Task[Any], Attempt] = {}

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Return a connection of one's own.

        Raises StoreUnavailable: also at once, without an attempt, where the last ones have just
        failed.
        """
        with translate_errors():
            return await self.attempt()

    async def connect_for_lookups(self) -> "asyncpg.Connection[asyncpg.Record]":
        """Return a connection that plans each statement once, for all arguments."""
        with translate_errors():
            return await self.attempt(GENERIC_PLAN)

    async def attempt(
        self, settings: Mapping[str, str] = _NO_SETTINGS
    ) -> "asyncpg.Connection[asyncpg.Record]":
        """Do the same for the pool, which wants the driver's errors. `settings` are added."""
        while (kind := self._breaker.begin()) is None:
            probes = [task for task, kind in self._attempts.items() if kind is Attempt.PROBE]
            if not (self._breaker.half_open and probes):
                raise StoreUnavailable(NO_ANSWER) from self._failure
            # It takes a connect's time-out for each host at most.
            await asyncio.wait(probes)
        # A task of its own: what comes of an attempt has to be known also when its caller leaves,
        # or callers in a hurry would begin one after the other.
        task = asyncio.create_task(
            self._hosts.connect(
                self._settings(settings),
                **self._options(),
            ),
            name="connect",
        )
        self._attempts[task] = kind
        task.add_done_callback(self._settle)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise

    def hosts(self) -> list[str]:
        """Return the hosts of the list, each with its port where the URL has one."""
        return self._hosts.names()

    def host_of(self, connection: "asyncpg.Connection[asyncpg.Record]") -> str:
        """Return the host of the list that a connection was made to."""
        return self._hosts.name_of(connection)

    def prove(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Ask a connection's host first from now on: a commit there was durable."""
        self._hosts.prove(connection)

    def leave(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Ask a connection's host last from now on: no commit there succeeds."""
        self._hosts.leave(connection)

    async def connect_to(self, host: str) -> "asyncpg.Connection[asyncpg.Record]":
        """Return a connection to one host of the list, which has to be a primary.

        It is outside the bound on attempts: the caller makes one at a time. Raises
        StoreUnavailable.
        """
        with translate_errors():
            return await self._hosts.connect_to(host, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "connection_class": _Connection,
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": STATEMENT_TIMEOUT_SECONDS,
            "server_settings": {"application_name": "latchkey"},
            **driver_options(self._pooler),
        }

    def _settings(self, settings: Mapping[str, str]) -> Mapping[str, str]:
        """Return the settings of a session with `settings`."""
        if self._pooler == "transaction":
            # They would reach whichever session comes next, and other programs after it.
            return {}
        timeout = {"statement_timeout": f"{round(STATEMENT_TIMEOUT_SECONDS * 1000)}ms"}
        return {**SETTINGS, **timeout, **settings}

    def _settle(self, task: "asyncio.Task[Any]") -> None:
        kind = self._attempts.pop(task)
        if task.cancelled() or task.exception() is not None:
            self._failure = None if task.cancelled() else task.exception()
            self._breaker.fail(kind)
        else:
            self._failure = None
            self._breaker.succeed(kind)


class Pool:
    """A pool of connections for statements that stand alone or in short transactions."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        # Connections that were last used before are not used any more.
        self._doubted_until = -math.inf

    @classmethod
    async def open(cls, connector: Connector) -> "Pool":
        """Return a new pool. Connects lazily, so that it opens without a database."""

        async def connect(*_: object, **__: object) -> "asyncpg.Connection[asyncpg.Record]":
            return await connector.attempt()

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
        self._doubted_until = boottime()

    @contextlib.asynccontextmanager
    async def session(self) -> "AsyncIterator[_Session]":
        """Lend a connection; translate what goes wrong with it, waiting for one included."""
        with translate_errors():
            session = await self._acquire()
            try:
                yield session
            except _BROKEN:
                # Else the release would wait until a frozen server has cancelled the query,
                # or hand on a connection that is ended but has not been told so yet.
                session.terminate()
                raise
            finally:
                _touch(session)
                await self._pool.release(session)

    async def _acquire(self) -> "PoolConnectionProxy[asyncpg.Record]":
        """Return a connection that answers, a new one if the one whose turn it is does not."""
        for _ in range(POOL_SIZE_MAX):
            session = await self._pool.acquire(timeout=STATEMENT_TIMEOUT_SECONDS)
            try:
                used_at: float = getattr(session, "used_at", math.inf)
                if used_at > self._doubted_until and await answers(session):
                    return session
                # What a firewall did to this connection it may have done to all that are idle.
                # Else each of the next callers would wait for a trial of its own.
                self._doubted_until = max(self._doubted_until, boottime() - IDLE_SECONDS)
            except BaseException:
                session.terminate()
                await self._pool.release(session)
                raise
            session.terminate()
            # The pool lends the place that came back last: this one, with a new connection.
            await self._pool.release(session)
        raise StoreUnavailable(NO_ANSWER)


async def connect(
    database_url: str, pooler: Pooler = "none"
) -> "asyncpg.Connection[asyncpg.Record]":
    """Return a connection of one's own, for once. Raises StoreUnavailable."""
    return await Connector(database_url, pooler=pooler).connect()


async def answers(connection: "_Session") -> bool:
    """Return whether a connection that was made here can be used, and note that it is.

    Asks the server if the connection was idle for long, within a bound. If the answer is no, the
    connection is of no use any more.
    """
    if connection.is_closed():
        return False
    # Not by its class, for which asyncpg takes every connection.
    used_at = getattr(connection, "used_at", None)
    if used_at is not None and boottime() - used_at > IDLE_SECONDS:
        try:
            await connection.execute("SELECT 1", timeout=TRIAL_TIMEOUT_SECONDS)
        except CONNECT_ERRORS:
            return False
    _touch(connection)
    return True


def _touch(connection: "_Session") -> None:
    if (touch := getattr(connection, "touch", None)) is not None:
        touch()


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
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
        # 55P03: lock_timeout. 55000: the database accepts no connections, as while it is replaced;
        # the server is a standby, which has no position in the WAL that it could report.
        asyncpg.ObjectNotInPrerequisiteStateError,
        asyncpg.ReadOnlySQLTransactionError,  # 25006: a standby, or a deposed primary
        asyncpg.InvalidAuthorizationSpecificationError,  # 28xxx: also while roles are restored
        asyncpg.InvalidCatalogNameError,  # 3D000: also while the database is restored
        asyncpg.InvalidSQLStatementNameError,  # 26000: a pooler switched to transaction mode
        asyncpg.DuplicatePreparedStatementError,  # 42P05: the same
        asyncpg.InterfaceError,  # the driver's own word for a connection that is closing
        asyncpg.InternalClientError,  # and for one that ended between two of its messages
        OSError,  # TimeoutError included
    ) as error:
        raise StoreUnavailable(NO_ANSWER) from error


@contextlib.contextmanager
def require_durable_commit(session: "_Session") -> Iterator[None]:
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
        raise NotReplicated("The database has not replicated what was written; try again.")


def retry_on_conflict(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
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
