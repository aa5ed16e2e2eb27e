"""Reads facts about a server and the rights of a role, for `latchkey doctor`. Changes nothing."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from latchkey_service.postgres.grants import FUNCTION, rights_on

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Rights", "Server", "clock_of", "rights_of", "server_of"]


@dataclass(frozen=True, slots=True)
class Server:
    """A primary, and what is known about the session on it."""

    version: str
    timeline: str
    role: str
    database: str
    connections: int
    connections_max: int
    standbys_missing: bool
    """Whether commits wait for a standby, and none is connected."""


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights of the session's role."""

    missing: tuple[str, ...]
    """Each as RIGHT ON TABLE."""
    superuser: bool
    owner: bool
    """Whether the role may change the tables."""


async def server_of(connection: "Connection") -> Server:
    """Return facts about the primary that `connection` leads to."""
    row = await connection.fetchrow(
        """
        SELECT current_setting('server_version') AS version,
               substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) AS timeline,
               current_user AS role, current_database() AS database,
               (SELECT count(*) FROM pg_catalog.pg_stat_activity
                 WHERE backend_type = 'client backend') AS connections,
               current_setting('max_connections')::int AS connections_max,
               current_setting('synchronous_standby_names') <> ''
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_replication) AS standbys_missing
        """
    )
    assert row is not None, "a SELECT without FROM has one row"  # noqa: S101 - for the type checker
    return Server(**dict(row))


async def clock_of(connection: "Connection") -> datetime:
    """Return the time of the database server."""
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return now


async def rights_of(connection: "Connection") -> Rights:
    """Return the rights on the tables that belong to the owner of the schema."""
    row = await connection.fetchrow(
        """
        SELECT r.rolsuper AS superuser,
               pg_has_role(current_user, c.relowner, 'MEMBER') AS owner, c.relowner AS owner_id
          FROM pg_catalog.pg_class c, pg_catalog.pg_roles r
         WHERE c.oid = to_regclass('schema_migration') AND r.rolname = current_user
        """
    )
    if row is None:
        return Rights((), superuser=False, owner=False)
    tables = await connection.fetch(
        "SELECT oid, relname FROM pg_catalog.pg_class WHERE relkind = 'r' AND relowner = $1"
        " AND relnamespace = current_schema()::regnamespace ORDER BY relname",
        row["owner_id"],
    )
    needed = [(table["oid"], right) for table in tables for right in rights_on(table["relname"])]
    lacking = await connection.fetch(
        "SELECT oid::regclass::text AS name, what FROM unnest($1::oid[], $2::text[]) n(oid, what)"
        " WHERE NOT has_table_privilege(oid, what)",
        [oid for oid, _ in needed],
        [right for _, right in needed],
    )
    missing = [f"{each['what']} ON {each['name']}" for each in lacking]
    may_prune = await connection.fetchval(
        "SELECT has_function_privilege(to_regprocedure($1), 'EXECUTE')", FUNCTION
    )
    # NULL if there is no such function, which then is a missing migration.
    if may_prune is False:
        missing.append(f"EXECUTE ON FUNCTION {FUNCTION}")
    return Rights(tuple(missing), superuser=row["superuser"], owner=row["owner"])
