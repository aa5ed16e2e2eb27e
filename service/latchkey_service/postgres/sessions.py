"""Prepares a new connection to Postgres: its bounds, TCP keepalive, and that it reaches a primary.

Bounds are set by a statement after connecting and not by start-up parameters, which PgBouncer
refuses or drops.
"""

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import asyncpg

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["GENERIC_PLAN", "SETTINGS", "Pooler", "driver_options", "prepare"]

Pooler = Literal["none", "transaction"]
"""What is between this process and Postgres. `none` covers session pooling: it looks the same."""

# A row lock is held for one commit. After this something is stuck, and the caller may retry.
_LOCK_TIMEOUT: Final = "1500ms"
# The second bound on a statement, on the server: work whose caller has left must end too. It is
# `connections.STATEMENT_TIMEOUT_SECONDS`, which a session has in place of this.
_STATEMENT_TIMEOUT: Final = "2s"
_IDLE_IN_TRANSACTION_TIMEOUT: Final = "10s"
# Postgres notices by this that a connection was closed, also while its statement waits for a lock.
# Otherwise callers with short deadlines would pile up connections behind one row.
_CLIENT_CHECK_INTERVAL: Final = "250ms"

SETTINGS: Final[dict[str, str]] = {
    "lock_timeout": _LOCK_TIMEOUT,
    "statement_timeout": _STATEMENT_TIMEOUT,
    "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_TIMEOUT,
    "client_connection_check_interval": _CLIENT_CHECK_INTERVAL,
    "jit": "off",
}
"""The settings of every session, where sessions keep settings."""

GENERIC_PLAN: Final[Mapping[str, str]] = {"plan_cache_mode": "force_generic_plan"}
"""For a session that runs one statement over and over, whose plan is the same for all arguments."""

# A dead peer is noticed within 60 + 4 x 15 = 120 s. Firewalls and load balancers forget idle
# connections after 4 minutes or more as a rule, so that a probe each minute keeps them.
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 15
KEEPALIVE_PROBES: Final = 4
# The same bound for data that the peer never acknowledges. Linux applies it to keepalive as well.
USER_TIMEOUT_MS: Final = 120_000

# By name: which of them exist depends on the system. macOS calls the first one TCP_KEEPALIVE.
_TCP_OPTIONS: Final = (
    ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPALIVE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
    ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
)


def driver_options(pooler: Pooler) -> dict[str, Any]:
    """Return asyncpg's options that depend on the pooler.

    In transaction mode a statement that was prepared is on a server connection which the next
    transaction need not get.
    """
    return {"statement_cache_size": 0} if pooler == "transaction" else {}


async def prepare(
    connection: "Connection",
    settings: Mapping[str, str],
    timeout: float,  # noqa: ASYNC109 - the driver's
) -> None:
    """Set keepalive and `settings` on a new connection, in one statement.

    Raises TargetServerAttributeNotMatched if the server is a standby, which may be behind: it would
    answer VALID for a token that is deleted. asyncpg's own check believes what PgBouncer reports,
    which is what some server said when PgBouncer first connected.
    """
    keep_alive(connection)
    calls = "".join(f", set_config('{name}', '{value}', false)" for name, value in settings.items())
    standby = await connection.fetchval(
        f"SELECT pg_catalog.pg_is_in_recovery(){calls}",  # nosec B608 - constants only
        timeout=timeout,
    )
    if standby:
        raise asyncpg.TargetServerAttributeNotMatched("the server is a standby")


def keep_alive(connection: "Connection") -> None:
    """Turn TCP keepalive on. Does nothing on a UNIX socket."""
    # asyncpg has no public way to its transport, nor options for keepalive.
    transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS:
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
