"""Which of PgBouncer's errors are permanent."""

import asyncpg
import pytest
from latchkey_service.postgres.hosts import is_permanent


@pytest.mark.parametrize(
    ("message", "lasts"),
    [
        ("unsupported startup parameter: lock_timeout", True),
        ("unsupported startup parameter in options: jit", True),
        ("no such database: nothing", True),
        ("no such user", True),
        ("SASL authentication failed", True),
        ("server login failed: FATAL password authentication failed for user", True),
        ("SSL required", True),
        ("invalid length of startup packet", True),
        ("pgbouncer cannot connect to server", False),
        ("server login has been failing, try again later (server_login_retry)", False),
        ("server login failed: FATAL the database system is starting up", False),
        ("no more connections allowed (max_client_conn)", False),
        ("client connections exceeded (max_db_client_connections)", False),
        ("query_wait_timeout", False),
        ("client_login_timeout (server down)", False),
        ("pooler is shutting down", False),
        ('database "latchkey" is disabled', False),
    ],
)
def test_which_protocol_errors_are_permanent(message: str, lasts: bool) -> None:
    """PgBouncer reports transient and permanent errors with the same SQLSTATE."""
    assert is_permanent(asyncpg.ProtocolViolationError(message)) is lasts
