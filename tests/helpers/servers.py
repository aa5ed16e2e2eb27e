"""Servers in this process, each on a database that is cloned from a migrated template."""

import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.policy_file import read_text
from latchkey_service.process.server import Server
from latchkey_service.process.wiring import running
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import pepper_file as pepper_files
from latchkey_service.tokens.token_store import TokenStore
from pydantic import SecretStr

__all__ = [
    "TEMPLATE",
    "TRANSPORTS",
    "Create",
    "clone_template",
    "execute",
    "fresh_database",
    "make_settings",
    "serving",
    "serving_as",
    "with_database",
]

TRANSPORTS = ("native", "grpcio")
TEMPLATE = "latchkey_template"

Create = Callable[..., Awaitable[pb.CreateResponse]]

_numbers = itertools.count(1)


def make_settings(database_url: str, pepper_file: Path, transport: str) -> Settings:
    """Settings of a server in this process, on any free port."""
    return _settings(pepper_file, transport).model_copy(
        update={"database_url": SecretStr(database_url)}
    )


@functools.cache
def _settings(pepper_file: Path, transport: str) -> Settings:
    """Settings without a database. They are read once, because that takes 2 ms."""
    return Settings(
        pepper_file=pepper_file,
        data_dir=pepper_file.parent / "unused",
        listen="127.0.0.1:0",
        transport=transport,
        grace_seconds=1.0,
    )


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """Run a server in this process and yield its address."""
    async with serving_as(settings) as server:
        yield server.address


@contextlib.asynccontextmanager
async def serving_as(settings: Settings) -> AsyncIterator[Server]:
    """Run a server in this process, in place of a supervisor and its worker."""
    assert settings.database_url is not None
    store = await TokenStore.open(settings.database_url.get_secret_value())
    keyring = pepper_files.load_or_create(settings.pepper_path, create=False)
    for pepper in keyring.peppers:
        await store.register_pepper(pepper.id)
    await store.close()
    policy = None if settings.policy is None else read_text(settings.policy)
    async with running(settings, keyring, lambda: policy) as server:
        yield server


def with_database(url: str, name: str) -> str:
    """Return `url` with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def fresh_database(postgres_url: str) -> str:
    """Clone the migrated template under an unused name and return its URL."""
    name = f"own_{next(_numbers)}"
    return await clone_template(postgres_url, name)


async def clone_template(postgres_url: str, name: str) -> str:
    """Clone the migrated template and return the URL of the new database."""
    # Creating and dropping a copy of the files takes half the processor time of a copy that is
    # logged, which is the default.
    await execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    return with_database(postgres_url, name)


async def execute(url: str, statement: str) -> None:
    """Run one statement on a separate connection."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
