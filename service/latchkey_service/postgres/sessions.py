"""Prepares a new connection to Postgres: sets time-outs and keepalive, and rejects standbys.

Owns the settings of a session. It does not choose the host or retry (`hosts.py`, `connections.py`).
A statement sets the time-outs after connecting, because PgBouncer refuses or drops start-up
parameters.
"""

import ipaddress
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import asyncpg

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["GENERIC_PLAN", "SETTINGS", "Pooler", "driver_options", "prepare", "protection"]

Pooler = Literal["none", "transaction"]
"""The pooler in front of Postgres. `none` includes session pooling, which looks the same."""

# Transactions hold a row lock for one commit. A longer wait means that something is stuck, and the
# caller may retry.
_LOCK_TIMEOUT: Final = "1500ms"
# The server's own bound on a statement, so that work ends even if its caller has left. Sessions get
# `connections.STATEMENT_TIMEOUT_SECONDS` instead; this value is for roles behind a pooler.
_STATEMENT_TIMEOUT: Final = "2s"
_IDLE_IN_TRANSACTION_TIMEOUT: Final = "10s"
# Lets Postgres notice a closed connection even while its statement waits for a lock. Without it,
# callers with short deadlines would pile up connections behind one row.
_CLIENT_CHECK_INTERVAL: Final = "250ms"

SETTINGS: Final[dict[str, str]] = {
    "lock_timeout": _LOCK_TIMEOUT,
    "statement_timeout": _STATEMENT_TIMEOUT,
    "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_TIMEOUT,
    "client_connection_check_interval": _CLIENT_CHECK_INTERVAL,
    "jit": "off",
}
"""Settings of every session, unless a pooler shares sessions between clients."""

GENERIC_PLAN: Final[Mapping[str, str]] = {"plan_cache_mode": "force_generic_plan"}
"""For a session that repeats one statement whose plan is the same for all arguments."""

# Detects a dead peer within 60 + 4 x 15 = 120 s. Firewalls and load balancers usually forget idle
# connections after 4 minutes or more, so one probe a minute keeps the connection alive.
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 15
KEEPALIVE_PROBES: Final = 4
# The same bound for data that the peer never acknowledges. Linux also applies it to keepalive.
USER_TIMEOUT_MS: Final = 120_000

# By name, because the set depends on the system. macOS calls the first one TCP_KEEPALIVE.
_TCP_OPTIONS: Final = (
    ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPALIVE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
    ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
)


def driver_options(pooler: Pooler) -> dict[str, Any]:
    """Return asyncpg's options that depend on the pooler.

    In transaction mode, a prepared statement stays on one server connection, and the next
    transaction may get another.
    """
    return {"statement_cache_size": 0} if pooler == "transaction" else {}


async def prepare(
    connection: "Connection",
    settings: Mapping[str, str],
    timeout: float,  # noqa: ASYNC109 - passed to the driver
) -> None:
    """Set keepalive and `settings` on a new connection, in one statement.

    Raises TargetServerAttributeNotMatched if the server is a standby. A standby may lag and would
    answer VALID for a deleted token. asyncpg's own check trusts PgBouncer, which repeats what some
    server reported when PgBouncer first connected.
    """
    keep_alive(connection)
    calls = "".join(f", set_config('{name}', '{value}', false)" for name, value in settings.items())
    standby = await connection.fetchval(
        f"SELECT pg_catalog.pg_is_in_recovery(){calls}",
        timeout=timeout,
    )
    if standby:
        raise asyncpg.TargetServerAttributeNotMatched("the server is a standby")


def protection(connection: "Connection") -> tuple[str | None, bool]:
    """Return the TLS version of a connection, or None, and whether it stays on this machine."""
    transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001 - as below
    encrypted = transport.get_extra_info("ssl_object")
    peer = transport.get_extra_info("peername")
    # The peer of a UNIX socket is a path.
    local = not isinstance(peer, tuple) or ipaddress.ip_address(peer[0]).is_loopback
    return (None if encrypted is None else encrypted.version()), local


def keep_alive(connection: "Connection") -> None:
    """Turn TCP keepalive on. Does nothing on a UNIX socket."""
    # asyncpg has no public access to its transport and no options for keepalive.
    transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS:
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
