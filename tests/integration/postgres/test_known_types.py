"""The service's connections send Postgres no needless queries."""

from typing import Any

import pytest
from latchkey_service.postgres.connections import Connector
from latchkey_service.postgres.sessions import Pooler

POOLERS: tuple[Pooler, ...] = ("none", "transaction")
STATEMENT = "SELECT $1::bigint[] AS numbers, $2::bytea[] AS digests"
VALUES: tuple[Any, ...] = ([-1, 2**40, None], [b"", b"\x00"])


@pytest.mark.parametrize("pooler", POOLERS)
async def test_built_in_types_are_asked_about_once(template_url: str, pooler: Pooler) -> None:
    """Once one connection has sent a value of a built-in type, the others send such values without
    a query about the type, and receive them as they were."""
    connector = Connector(template_url, pooler=pooler)
    for number in range(2):
        connection = await connector.connect()
        sent: list[str] = []
        with connection.query_logger(lambda query, sent=sent: sent.append(query.query)):
            for _ in range(2):
                row = await connection.fetchrow(STATEMENT, *VALUES)
                assert row is not None
                assert tuple(row) == VALUES
        if number == 1:
            assert set(sent) == {STATEMENT}
        connection.terminate()


async def test_own_types_are_asked_about(database_url: str) -> None:
    """A database's own type may have changed since another connection asked about it."""
    connector = Connector(database_url)
    for change, value, expected in (
        ("CREATE TYPE pair AS (a integer)", "(1)", (1,)),
        ("ALTER TYPE pair ADD ATTRIBUTE b integer", "(1,)", (1, None)),
    ):
        connection = await connector.connect()
        await connection.execute(change)
        found = await connection.fetchval(f"SELECT '{value}'::pair")
        assert tuple(found) == expected
        connection.terminate()
