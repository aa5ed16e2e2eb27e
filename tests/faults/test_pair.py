"""The Postgres pair of the failover tests behaves as its steps say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.helpers.postgres_node import Node, Template
from tests.helpers.replicated_pair import Pair, pair
from tests.helpers.waiting import eventually


@pytest.fixture
async def nodes(scratch: Path, pair_template: Template) -> AsyncIterator[Pair]:
    async with pair(scratch, pair_template) as made:
        yield made


async def seen(node: Node) -> set[int]:
    """Return the committed numbers that a node shows."""
    return set(await node.fetchval("SELECT array_agg(number) FROM seen") or [])


@contextlib.asynccontextmanager
async def insert(url: str, number: int) -> AsyncIterator["asyncio.Future[str]"]:
    """Begin an insertion that waits for the standby, as the service's role."""
    connection = await asyncpg.connect(url)
    try:
        yield asyncio.ensure_future(connection.execute("INSERT INTO seen VALUES ($1)", number))
    finally:
        connection.terminate()


async def test_a_commit_that_the_standby_lacks_becomes_visible_on_the_old_primary_alone(
    nodes: Pair,
) -> None:
    """Stall, cancel, crash, promotion, an unfenced old primary, and its return as a standby."""
    first, second = nodes.first, nodes.second
    await first.execute("CREATE TABLE seen (number int); GRANT ALL ON seen TO latchkey")
    async with insert(nodes.address_url, 1) as done:
        await done
    await nodes.caught_up(first, second)
    assert await seen(second) == {1}
    await nodes.replication.stall()
    async with insert(nodes.address_url, 2) as done:
        assert await eventually(first.waiting_commits, "the commit waits for the standby")
        assert await seen(first) == {1}
        await first.cancel_waiting_commits()
        await done
        assert await seen(first) == {1, 2}
    async with insert(nodes.address_url, 3) as done:
        await first.crash_waiting_commit()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await done
    assert await seen(first) == {1, 2, 3}
    await first.kill()
    await second.promote()
    assert await seen(second) == {1}
    await nodes.address.switch(second, cut=True)
    async with insert(nodes.address_url, 4) as done:
        await done
    await first.start()
    assert await seen(first) == {1, 2, 3}
    await first.stop()
    await nodes.replication.resume()
    await nodes.rejoin(first, second, synchronous=True)
    async with insert(nodes.address_url, 5) as done:
        await done
    await nodes.caught_up(second, first)
    assert await seen(first) == {1, 4, 5}
    await nodes.set_synchronous(second, synchronous=False)
    await nodes.replication.stall()
    async with insert(nodes.address_url, 6) as done:
        await done
    assert await seen(second) == {1, 4, 5, 6}
    assert await seen(first) == {1, 4, 5}


@pytest.mark.parametrize("new_timeline", [True, False])
async def test_a_restored_backup_is_an_earlier_history_on_the_same_address(
    nodes: Pair, new_timeline: bool
) -> None:
    """With a new timeline or without; established sessions survive a switch that cuts none."""
    first, second = nodes.first, nodes.second
    await second.stop("immediate")
    first.configure()
    await first.execute("CREATE TABLE seen (number int); INSERT INTO seen VALUES (1)")
    await first.back_up(backup := first.data.with_name("backup"))
    await first.execute("INSERT INTO seen VALUES (2)")
    timeline = "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)::int"
    assert await first.fetchval(timeline) == 1
    await first.restore(backup, new_timeline=new_timeline)
    assert await seen(first) == {1}
    assert await first.fetchval(timeline) == (2 if new_timeline else 1)


async def test_a_switch_that_cuts_no_session_leaves_it_with_the_old_primary(nodes: Pair) -> None:
    """New connections reach the new target; old ones stay until they are cut."""
    query = "SELECT current_setting('cluster_name')"
    old = await asyncpg.connect(nodes.address_url)
    await nodes.address.switch(nodes.second, cut=False)
    new = await asyncpg.connect(nodes.address_url)
    assert await old.fetchval(query) == "first"
    assert await new.fetchval(query) == "second"
    await nodes.address.switch(None, cut=True)
    for connection in (old, new):
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval(query)
        connection.terminate()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await asyncpg.connect(nodes.address_url)
