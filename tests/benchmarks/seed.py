"""Databases full of tokens, created by COPY with the service's own keys."""

import math
import os
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.filter_table import Start

__all__ = ["ACCOUNT", "Seeded", "seed"]

ACCOUNT = "bench"
# Rows per COPY: a small part of memory.
CHUNK = 50_000
# How many of the minted secrets are kept for the calls.
SECRETS_MAX = 100_000
NEWEST = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Seeded:
    """A database with `tokens` live tokens of ACCOUNT, a second apart, READ, without expiry.

    `secrets` are pairs of secret and token ID in random order: all of them, or a sample.
    """

    url: str
    tokens: int
    secrets: list[tuple[str, str]]

    def position(self, place: int) -> Start:
        """Return the position of the token at `place` in the list, the newest being at 1."""
        number = self.tokens - place
        return Start(_create_time(number, self.tokens), _id(number))


async def seed(
    postgres_url: str, name: str, tokens: int, keyring: Keyring, secrets_file: Path | None = None
) -> Seeded:
    """Create a database on the cluster and fill it. Takes about 30 s for a million tokens.

    `secrets_file` receives all secrets, one a line, because memory keeps only a sample.
    """
    name = f"bench_{name}"
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    await migrate(url, bundled())
    connection = await asyncpg.connect(url)
    try:
        for pepper in keyring.peppers:
            await connection.execute("INSERT INTO pepper (id) VALUES ($1)", pepper.id)
        secrets: list[tuple[str, str]] = []
        order = random.Random(tokens)  # noqa: S311 - for order, not for secrets
        for start in range(0, tokens, CHUNK):
            numbers = range(start, min(start + CHUNK, tokens))
            filled = await _fill(connection, numbers, tokens, keyring)
            share = min(1.0, SECRETS_MAX / tokens)
            secrets += order.sample(filled, math.ceil(share * len(filled)))
            if secrets_file is not None:
                with secrets_file.open("a", encoding="ascii") as file:
                    file.writelines(f"{secret}\n" for secret, _ in filled)
        # No autovacuum may run while one row is measured and not while another is. Statistics do
        # not change enough during the run to matter.
        for table in ("token", "secret", "head"):
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()
    return Seeded(url, tokens, order.sample(secrets, min(tokens, SECRETS_MAX)))


async def _fill(
    connection: "asyncpg.Connection[asyncpg.Record]", numbers: range, total: int, keyring: Keyring
) -> list[tuple[str, str]]:
    """Add the tokens with these numbers, oldest first; return each one's secret and ID."""
    minted = [keyring.mint("lk", os.urandom) for _ in numbers]
    await connection.copy_records_to_table(
        "token",
        columns=["id", "account_id", "name", "name_key", "scope", "create_time", "hint", "labels"],
        records=(
            (
                _id(number),
                ACCOUNT,
                f"token {number:07}",
                f"token {number:07}",
                1,
                _create_time(number, total),
                mint.hint,
                "{}",
            )
            for number, mint in zip(numbers, minted, strict=True)
        ),
    )
    await connection.copy_records_to_table(
        "secret",
        columns=["digest", "pepper_id", "token_id"],
        records=(
            (mint.digest.value, mint.digest.pepper_id, _id(number))
            for number, mint in zip(numbers, minted, strict=True)
        ),
    )
    return [
        (mint.secret.reveal(), _id(number)) for number, mint in zip(numbers, minted, strict=True)
    ]


def _id(number: int) -> str:
    """Return an ID with the length and order of the service's own."""
    return f"tok_{number:026}"


def _create_time(number: int, total: int) -> datetime:
    # Microseconds as in now(): whole seconds would make shorter answers.
    return NEWEST - timedelta(seconds=total - number, microseconds=number * 7919 % 1_000_000)
