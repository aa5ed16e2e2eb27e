"""Replaces how the code under test connects to Postgres.

Servers that tests share run on the same event loop, and may connect at any time. Their connections
stay real.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from latchkey_service.postgres import sessions

__all__ = ["replace_connect"]


async def _unprepared(*_: object) -> None:
    """Leave a new connection as it is."""


def replace_connect(
    patch: pytest.MonkeyPatch,
    is_ours: Callable[[str], bool],
    connect: Callable[..., Awaitable[Any]],
    prepare: Callable[..., Awaitable[None]] = _unprepared,
) -> None:
    """Let `connect` make the connections to the URLs that `is_ours` selects, and `prepare` prepare
    them.
    """
    real_connect, real_prepare = asyncpg.connect, sessions.prepare
    ours: list[object] = []

    async def either_connect(url: str, **options: Any) -> Any:
        if not is_ours(url):
            return await real_connect(url, **options)
        connection = await connect(url, **options)
        ours.append(connection)
        return connection

    async def either_prepare(connection: Any, *rest: Any) -> None:
        is_real = all(connection is not each for each in ours)
        await (real_prepare if is_real else prepare)(connection, *rest)

    patch.setattr(asyncpg, "connect", either_connect)
    patch.setattr(sessions, "prepare", either_prepare)
