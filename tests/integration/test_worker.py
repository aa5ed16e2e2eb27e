"""A worker whose background work fails does not go on half."""

import asyncio
from pathlib import Path

import pytest
from latchkey_service import peppers, server
from latchkey_service.config import Settings
from latchkey_service.server import running
from latchkey_service.store import Store

from tests.conftest import make_settings
from tests.support import WAIT_SECONDS

PARTS = ("follow_store", "prune_log", "purge", "purge_audit", "summarise")


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_that_fails_is_noticed(
    part: str,
    database_url: str,
    store: Store,
    pepper_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever part ends by an error, whoever runs the worker is told, and can end it."""
    failed = asyncio.Event()

    async def fail(*_: object) -> None:
        raise LookupError(part)

    monkeypatch.setattr(server, part, fail)
    settings: Settings = make_settings(database_url, pepper_file, "native")
    keyring = peppers.load_or_create(pepper_file, create=False)
    async with running(settings, keyring, on_failure=failed.set):
        await asyncio.wait_for(failed.wait(), WAIT_SECONDS)


async def test_no_part_ends_by_itself(database_url: str, store: Store, pepper_file: Path) -> None:
    """A worker that is whole, and is stopped, reports nothing."""
    failed = asyncio.Event()
    settings = make_settings(database_url, pepper_file, "native")
    keyring = peppers.load_or_create(pepper_file, create=False)
    async with running(settings, keyring, on_failure=failed.set):
        await asyncio.sleep(0)
    assert not failed.is_set()
