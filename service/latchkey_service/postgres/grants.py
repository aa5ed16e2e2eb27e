"""The rights of the service's role, if another role owns the tables (docs/postgres.md).

The service's role reads and writes rows, and changes no table, trigger or function. It can only add
audit entries. Retention removes old ones through a function that runs with the owner's rights.
"""

from typing import TYPE_CHECKING, Final

from latchkey_service.postgres.preflight import DatabaseError

if TYPE_CHECKING:
    import asyncpg

__all__ = ["FUNCTION", "grant", "rights_on", "statements"]

_ALL: Final = "SELECT, INSERT, UPDATE, DELETE"
# Tables on which the role needs fewer rights.
_RIGHTS: Final = {
    "audit": "SELECT, INSERT",
    "audit_chain": "SELECT, INSERT",
    "audit_start": "SELECT",
    # A trigger with the owner's rights inserts.
    "audit_unsealed": "SELECT, DELETE",
    "schema_migration": "SELECT",
}
FUNCTION: Final = "audit_prune(timestamptz, bigint, text, bytea)"


def rights_on(table: str) -> list[str]:
    """Return the rights that the service needs on a table."""
    return _RIGHTS.get(table, _ALL).split(", ")


async def grant(connection: "asyncpg.Connection[asyncpg.Record]", role: str) -> None:
    """Give `role` the service's rights, and revoke all its others on these tables.

    Raises DatabaseError if the role does not exist, or could change the tables anyway.
    """
    found = await statements(connection, role)
    async with connection.transaction():
        for statement in found:
            await connection.execute(statement)


async def statements(connection: "asyncpg.Connection[asyncpg.Record]", role: str) -> list[str]:
    """Return the statements of `grant`, for the tables that exist now.

    Raises DatabaseError if the role does not exist, or could change the tables anyway.
    """
    row = await connection.fetchrow(
        """
        SELECT quote_ident(r.rolname) AS role, quote_ident(current_schema()) AS schema,
               r.rolsuper OR pg_has_role(r.oid, current_user::regrole, 'MEMBER') AS owner
          FROM pg_catalog.pg_roles r WHERE r.rolname = $1
        """,
        role,
    )
    if row is None:
        raise DatabaseError(f"there is no role {role!r}; create it first")
    if row["owner"]:
        raise DatabaseError(
            f"the role {role!r} is a superuser, or owns the tables or is a member of their owner, "
            "so it can change them anyway; use another role for the service"
        )
    name, schema = row["role"], row["schema"]
    tables = await connection.fetch(
        "SELECT tablename, quote_ident(tablename) FROM pg_catalog.pg_tables"
        " WHERE schemaname = current_schema() AND tableowner = current_user ORDER BY tablename"
    )
    found = [
        f"GRANT USAGE ON SCHEMA {schema} TO {name}",
        f"REVOKE CREATE ON SCHEMA {schema} FROM {name}",
    ]
    for table, quoted in tables:
        found += [
            f"REVOKE ALL ON {schema}.{quoted} FROM {name}",
            f"GRANT {_RIGHTS.get(table, _ALL)} ON {schema}.{quoted} TO {name}",
        ]
    exists = "SELECT to_regprocedure($1) IS NOT NULL"
    if await connection.fetchval(exists, f"{schema}.{FUNCTION}"):
        found.append(f"GRANT EXECUTE ON FUNCTION {schema}.{FUNCTION} TO {name}")
    return found
