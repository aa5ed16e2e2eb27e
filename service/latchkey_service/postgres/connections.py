"""Connections to Postgres: pooling, time-outs and the translation of driver errors.

Bounds every wait for Postgres and translates every driver error by class or SQLSTATE, so other
rooms need not know asyncpg's exceptions. Does not own SQL: see `tokens/token_store.py`.
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
    StoreLocked,
    StoreUnavailable,
    StoreUnsupported,
)
from latchkey_service.loop_delay import reason_for
from latchkey_service.postgres.circuit_breaker import Attempt, CircuitBreaker
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts
from latchkey_service.postgres.known_types import KnownTypesConnection
from latchkey_service.postgres.sessions import GENERIC_PLAN, SETTINGS, Pooler, driver_options

__all__ = [
    "DURABLE",
    "Connector",
    "DedicatedConnection",
    "PlainConnection",
    "Pool",
    "require_durable_commit",
    "retry_on_conflict",
    "translate_errors",
]

# Statements take about a millisecond. After two seconds, an error helps more than a longer wait.
STATEMENT_TIMEOUT_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 1.0
# A connection that was idle for longer is tested before use: if a firewall has dropped it, a
# statement would wait for its whole time-out. The test costs one round trip.
IDLE_SECONDS = 5.0
# Far above a round trip, and short enough to leave the caller time for a new connection.
TRIAL_TIMEOUT_SECONDS = 0.5
# One connection for each call in progress (`managed_calls.CONCURRENCY_LIMITS`), one for each
# receipt being written (`management.CONFIRMING_MAX`), and two for background work.
POOL_SIZE_MAX = 19
# Connections that were idle for this long are closed: other hosts may need them.
REST_SECONDS = 30.0
# Attempts at a transaction that conflicts with others. The pauses are random, with a bound that
# doubles up to the maximum: half a second in total, enough for hundreds of transactions.
CONFLICT_ATTEMPTS = 14
CONFLICT_DELAY_SECONDS = 0.008
CONFLICT_DELAY_SECONDS_MAX = 0.1

_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})

P = ParamSpec("P")
T = TypeVar("T")

# After one of these errors the state of the connection is unknown, so it is not used again.
_BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.InvalidSQLStatementNameError,  # 26000: a pooler switched server sessions
    asyncpg.DuplicatePreparedStatementError,  # 42P05: the same
    OSError,  # TimeoutError included
    asyncio.CancelledError,
    NotReplicated,  # its server may be a deposed primary
)

# For the WHERE clause of a statement whose effect must not be lost: `AND {DURABLE}`. It makes the
# commit wait until the WAL is on disk, and on the synchronous standby if there is one, whatever
# database, role or session have configured. It is part of the statement because that costs no
# second round trip and also works behind a pooler that keeps no settings. It is a condition because
# Postgres skips a WITH query that nothing refers to, but writes no row before it has evaluated the
# row's condition.
DURABLE = """CASE WHEN current_setting('synchronous_commit') IN ('on', 'remote_apply') THEN true
     ELSE set_config('synchronous_commit', 'on', true) IS NOT NULL END"""


class PlainConnection(KnownTypesConnection):
    """A connection that returns to the pool without a round trip: our statements leave no state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Time of its last use, on a clock that also runs while the machine is suspended.
        self.used_at = boottime()
        self.generation = 0  # of the pool, when the attempt to connect began

    def get_reset_query(self) -> str:
        """Return no statement."""
        return ""

    def touch(self) -> None:
        """Record that the connection was just used."""
        self.used_at = boottime()


if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record]
    _Session = Connection | PoolConnectionProxy[asyncpg.Record]


class Connector:
    """Makes all connections of a process to one database, with few attempts while it is down.

    Use it on one event loop only.
    """

    def __init__(
        self,
        database_url: str,
        monotonic: Callable[[], float] = time.monotonic,
        randomness: Callable[[], float] = random.random,
        *,
        pooler: Pooler = "none",
        connection_class: type[PlainConnection] = PlainConnection,
    ) -> None:
        self._pooler: Pooler = pooler
        self._connection_class = connection_class
        self._hosts = Hosts(database_url)
        self.breaker = CircuitBreaker(monotonic, randomness)
        self._failure: BaseException | None = None
        self._attempts: dict[asyncio.Task[Any], Attempt] = {}

    async def connect(self) -> "Connection":
        """Return a new connection, which the caller closes.

        Raises StoreUnavailable, without an attempt if the latest attempts have just failed.
        """
        with translate_errors():
            return await self.attempt()

    async def connect_with_generic_plans(self) -> "Connection":
        """Return a new connection that plans each statement once, for all arguments."""
        with translate_errors():
            return await self.attempt(GENERIC_PLAN)

    async def attempt(self, settings: Mapping[str, str] = _NO_SETTINGS) -> "Connection":
        """Do the same, but raise the driver's errors, as the pool expects. Adds `settings`."""
        while (kind := self.breaker.begin()) is None:
            probes = [task for task, kind in self._attempts.items() if kind is Attempt.PROBE]
            if not (self.breaker.half_open and probes):
                raise StoreUnavailable(NO_ANSWER) from self._failure
            await asyncio.wait(probes)  # at most one connect time-out per host
        # A separate task, because the circuit breaker needs the result even if the caller leaves.
        # Otherwise impatient callers would start one attempt after another.
        connecting = self._hosts.connect(self._settings(settings), **self._options())
        task = asyncio.create_task(connecting, name="connect")
        self._attempts[task] = kind
        task.add_done_callback(self._settle)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise

    def hosts(self) -> list[str]:
        """Return the hosts of the URL, each with its port if the URL names one."""
        return self._hosts.names()

    def host_of(self, connection: "Connection") -> str:
        """Return the host of the URL that a connection leads to."""
        return self._hosts.name_of(connection)

    def prove(self, host: "Connection | str") -> None:
        """Try a host, or that of a connection, first from now on: a commit there was durable."""
        self._hosts.prove(host)

    def leave(self, connection: "Connection") -> None:
        """Try the host of `connection` last from now on: commits there fail."""
        self._hosts.leave(connection)

    async def connect_to(self, host: str) -> "Connection":
        """Return a new connection to one host of the URL, which must be a primary.

        The bound on attempts does not cover it: the caller makes one at a time. Raises
        StoreUnavailable.
        """
        with translate_errors():
            return await self._hosts.connect_to(host, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "connection_class": self._connection_class,
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": STATEMENT_TIMEOUT_SECONDS,
            "server_settings": {"application_name": "latchkey"},
            **driver_options(self._pooler),
        }

    def _settings(self, settings: Mapping[str, str]) -> Mapping[str, str]:
        """Return all settings of a new session, `settings` included."""
        if self._pooler == "transaction":
            # They would leak into other sessions, and into other programs.
            return {}
        timeout = {"statement_timeout": f"{round(STATEMENT_TIMEOUT_SECONDS * 1000)}ms"}
        return {**SETTINGS, **timeout, **settings}

    def _settle(self, task: "asyncio.Task[Any]") -> None:
        kind = self._attempts.pop(task)
        if task.cancelled() or task.exception() is not None:
            self._failure = None if task.cancelled() else task.exception()
            self.breaker.fail(kind)
        else:
            self._failure = None
            self.breaker.succeed(kind)


class Pool:
    """A pool of connections for single statements and short transactions."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._pool: asyncpg.Pool
        # Rises when existing connections may lead to the wrong server.
        self._generation = 0
        # The pool replaces connections that were last used before this time.
        self._doubted_until = -math.inf

    @classmethod
    async def open(cls, connector: Connector) -> "Pool":
        """Return a new pool. It connects lazily, so it opens without a database."""
        pool = cls(connector)
        pool._pool = await asyncpg.create_pool(
            connect=pool._connect,
            min_size=0,
            max_size=POOL_SIZE_MAX,
            max_inactive_connection_lifetime=REST_SECONDS,
            connection_class=PlainConnection,
        )
        return pool

    async def _connect(self, *_: object, **__: object) -> "Connection":
        generation = self._generation
        connection = await self._connector.attempt()
        # Not isinstance: for asyncpg, every connection is an instance of this class.
        if hasattr(connection, "generation"):
            connection.generation = generation
        return connection

    def usage(self) -> tuple[int, int]:
        """Return how many connections are in use, and how many are open and idle."""
        idle = self._pool.get_idle_size()
        return self._pool.get_size() - idle, idle

    async def close(self) -> None:
        """Close all connections, after a bounded wait for those in use."""
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    def reconnect(self) -> None:
        """Replace each connection at its next use, because it may lead to the wrong server.

        This includes connections in use and those being made. asyncpg's `expire_connections` does
        not suit: with it, releasing a connection could wait for a frozen server.
        """
        self._generation += 1

    @contextlib.asynccontextmanager
    async def session(self) -> "AsyncIterator[_Session]":
        """Lend a connection. Translates the errors of its use and of the wait for one."""
        with translate_errors():
            session = await self._acquire()
            try:
                yield session
            except _BROKEN:
                # Otherwise the release would wait for a frozen server, or pool a dead connection.
                session.terminate()
                raise
            finally:
                _touch(session)
                await self._pool.release(session)

    async def _acquire(self) -> "PoolConnectionProxy[asyncpg.Record]":
        """Return a connection that answers. Replaces pooled ones that do not."""
        for _ in range(POOL_SIZE_MAX):
            session = await self._pool.acquire(timeout=STATEMENT_TIMEOUT_SECONDS)
            try:
                if self._is_trusted(session) and await answers(session):
                    return session
                # A firewall may have dropped every idle one. Testing each would delay callers.
                self._doubted_until = max(self._doubted_until, boottime() - IDLE_SECONDS)
            except BaseException:
                session.terminate()
                await self._pool.release(session)
                raise
            session.terminate()
            # The pool lends the slot that was returned last: this one, with a new connection.
            await self._pool.release(session)
        raise StoreUnavailable(NO_ANSWER)

    def _is_trusted(self, session: "PoolConnectionProxy[asyncpg.Record]") -> bool:
        """Return whether the pool may use a connection, as far as is known without a test."""
        generation: int = getattr(session, "generation", self._generation)
        used_at: float = getattr(session, "used_at", math.inf)
        return generation == self._generation and used_at > self._doubted_until


class DedicatedConnection:
    """A connection outside the pool, made at its first use and again after a failure."""

    def __init__(self, connect: "Callable[[], Awaitable[Connection]]") -> None:
        self._connect = connect
        self.current: Connection | None = None  # without a test

    async def get(self) -> "Connection":
        """Return a connection that answers. Raises StoreUnavailable."""
        if (kept := self.current) is not None:
            if await answers(kept):
                return kept
            self.drop()
        self.current = connection = await self._connect()
        return connection

    def rest(self, now: float) -> None:
        """Close the connection if it was idle for long. `now` is a reading of `boottime`."""
        if now - getattr(self.current, "used_at", now) > REST_SECONDS:
            self.drop()

    def drop(self) -> None:
        """Close the connection at once: its server may be frozen, or its state unknown."""
        connection, self.current = self.current, None
        if connection is not None:
            connection.terminate()


async def answers(connection: "_Session") -> bool:
    """Return whether a connection of this module still works, and record its use.

    Asks the server, within a bound, if the connection was idle for long. If this returns False, the
    caller must discard the connection.
    """
    if connection.is_closed():
        return False
    now = boottime()
    if now - getattr(connection, "used_at", now) > IDLE_SECONDS:
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
    """Turn driver errors into those of `errors.py`. `__cause__` keeps the message for the log."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "token_live_name":
            raise
        raise AlreadyExists("The account already has a live token with this name.") from error
    except asyncpg.FeatureNotSupportedError as error:  # 0A000
        raise StoreUnsupported("The database engine does not support this operation.") from error
    except asyncpg.TransactionRollbackError as error:  # 40xxx: serialisation, deadlock
        raise StoreConflict(
            "The transaction kept conflicting with others; try again shortly."
        ) from error
    except asyncpg.LockNotAvailableError as error:  # 55P03: lock_timeout
        raise StoreLocked from error
    except (
        asyncpg.PostgresConnectionError,  # 08xxx: connection lost
        asyncpg.OperatorInterventionError,  # 57xxx: shutting down, starting up, cancelled
        asyncpg.InsufficientResourcesError,  # 53xxx: too many connections, disk full
        # 55000: the database accepts no connections, for example while it is being replaced, or the
        # server is a standby, which cannot report a position in the WAL.
        asyncpg.ObjectNotInPrerequisiteStateError,
        asyncpg.ReadOnlySQLTransactionError,  # 25006: a standby, or a deposed primary
        asyncpg.InvalidAuthorizationSpecificationError,  # 28xxx: also while roles are restored
        asyncpg.InvalidCatalogNameError,  # 3D000: also while the database is restored
        asyncpg.InvalidSQLStatementNameError,  # 26000: a pooler switched to transaction mode
        asyncpg.DuplicatePreparedStatementError,  # 42P05: the same
        asyncpg.InterfaceError,  # raised by the driver for a connection that is closing
        asyncpg.InternalClientError,  # the same, if it ended between two messages
        OSError,  # TimeoutError included
    ) as error:
        raise StoreUnavailable(reason_for(error)) from error


@contextlib.contextmanager
def require_durable_commit(session: "_Session") -> Iterator[None]:
    """Raise NotReplicated if a failover may undo a commit made inside the block.

    When the wait for the synchronous standby is cancelled, Postgres reports the commit as done,
    with a warning. A deletion or a lease renewal that only a deposed primary has is not valid.
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
        raise NotReplicated("The database did not replicate the change; try again.")


def retry_on_conflict(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Repeat a transaction that was rolled back because of a conflict (SQLSTATE 40xxx).

    Conflicts are common under SERIALIZABLE, the only level of some engines that speak Postgres'
    protocol. The rollback undid the whole transaction, so repeating it is safe.
    """

    @functools.wraps(method)
    async def attempt_repeatedly(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(CONFLICT_ATTEMPTS - 1):
            try:
                return await method(*args, **kwargs)
            except StoreConflict:
                # Random, so that the same transactions do not collide again.
                longest = min(CONFLICT_DELAY_SECONDS * 2**attempt, CONFLICT_DELAY_SECONDS_MAX)
                await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - jitter
        return await method(*args, **kwargs)

    return attempt_repeatedly


def _discard(task: "asyncio.Task[Any]") -> None:
    """Close a connection whose caller has left."""
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()
