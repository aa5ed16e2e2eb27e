"""The history of a real database: its head and its log, advanced as a Delete does it."""

from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.snapshot import mark_in
from latchkey_service.coherence.verifier_state import Log
from latchkey_service.coherence.verifier_table import Report

from tests.helpers.databases import session

__all__ = ["NO_CLIENTS", "advance", "head_of", "named"]

NO_CLIENTS = Report(0, 0, 0, [], 0, "", [])
"""The value that a process without clients writes into its row."""


async def advance(database_url: str, *token_ids: str) -> Position:
    """Take the next revision as a Delete does, name these tokens, and return the position."""
    async with session(database_url) as connection, connection.transaction():
        row = await connection.fetchrow(
            "UPDATE head SET revision = revision + 1, mark = DEFAULT RETURNING revision, mark"
        )
        assert row is not None
        for token_id in token_ids:
            await connection.execute(
                "INSERT INTO invalidation (revision, mark, token_id) VALUES ($1, $2, $3)",
                row["revision"],
                row["mark"],
                token_id,
            )
    return Position(row["revision"], mark_in(row["mark"]))


async def head_of(database_url: str) -> Position:
    """Return the newest position."""
    async with session(database_url) as connection:
        row = await connection.fetchrow("SELECT revision, mark FROM head")
        assert row is not None
        return Position(row["revision"], mark_in(row["mark"]))


def named(log: Log) -> list[str]:
    """Return the tokens that a log names, in log order."""
    return [token_id for change in log.changes for token_id in change.token_ids]
