"""A deleted token stays dead when Postgres loses commits: a backup is restored, or commits were not
durable.

The service runs as its users run it, even while the database is replaced.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import latchkey
import pytest

from tests.faults.host import (
    client_refuses,
    client_remembers,
    head,
    host,
    two_hosts,
)
from tests.helpers.postgres_node import Node, Template, lone_node
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow("restores backups under a running service")

# Short enough to wait for.
CACHE_SECONDS = 3.0
# Archive recovery begins a new timeline. A plain copy of the files continues the old one.
NEW_TIMELINE = pytest.mark.parametrize("new_timeline", [True, False])


@pytest.fixture
async def node(scratch: Path, pair_template: Template) -> AsyncIterator[Node]:
    """A Postgres without a standby."""
    async with lone_node(scratch, pair_template) as made:
        yield made


@NEW_TIMELINE
async def test_a_revision_that_a_restore_took_back_confirms_no_later_deletion(
    node: Node, tmp_path: Path, pepper_file: Path, new_timeline: bool
) -> None:
    """The restored backup lacks the last deletion, and the service keeps running. That deletion is
    lost. The next one gets its number and must count in full: a host that applied the lost one, and
    a client library that watches this host, refuse the token once its Delete has returned."""
    async with (
        two_hosts(node, tmp_path, pepper_file) as hosts,
        latchkey.Verifier(hosts.other.address, timeout_seconds=5) as verifier,
    ):
        doomed, lost = await hosts.deleter.create(), await hosts.deleter.create()
        await node.back_up(backup := tmp_path / "backup")
        await client_remembers(verifier, doomed.secret)
        receipt = await hosts.deleter.delete(lost.token)
        assert receipt.revision == 1
        await hosts.part()
        await node.restore(backup, new_timeline=new_timeline)
        assert await head(node) == 0
        await hosts.delete_before_the_other_returns(node, doomed.token)
        await client_refuses(verifier, doomed.secret)
        await hosts.other.refuses(doomed.secret)
        await hosts.deleter.refuses(doomed.secret)


async def test_a_token_newer_than_the_backup_is_dead_once_a_delete_reports_not_found(
    node: Node, tmp_path: Path, pepper_file: Path
) -> None:
    """The log does not mention a token that was created after the backup. The restored database is
    on a new timeline. Once a Delete of the token returns NOT_FOUND, the host does not answer VALID,
    and a client library stops within a lease."""
    async with (
        host(tmp_path, "host", node.url, pepper_file) as running,
        latchkey.Verifier(running.address, timeout_seconds=5) as verifier,
    ):
        kept = await running.create()
        await node.back_up(backup := tmp_path / "backup")
        ghost = await running.create()
        await client_remembers(verifier, ghost.secret)
        await running.answers(ghost.secret, "VALID")
        await node.restore(backup, new_timeline=True)
        await eventually(lambda: running.delete_finds_nothing(ghost.token), "Delete is answered")
        await running.refuses(ghost.secret, "UNKNOWN")
        await client_refuses(verifier, ghost.secret, latchkey.Verdict.UNKNOWN, at_once=False)
        await running.answers(kept.secret, "VALID")


async def test_a_token_newer_than_the_backup_expires_from_caches_in_bounded_time(
    node: Node, tmp_path: Path, pepper_file: Path
) -> None:
    """A token is created after the backup. Neither the log nor the timeline of the restored
    database shows the restore, so hosts and client libraries cannot know about it. They still drop
    the token: a host after LATCHKEY_CACHE_SECONDS, a client library after its own bound on top of
    that."""
    async with (
        host(tmp_path, "host", node.url, pepper_file, cache_seconds=CACHE_SECONDS) as running,
        latchkey.Verifier(
            running.address, timeout_seconds=5, cache_seconds=CACHE_SECONDS
        ) as verifier,
    ):
        kept = await running.create()
        await node.back_up(backup := tmp_path / "backup")
        ghost = await running.create()
        await client_remembers(verifier, ghost.secret)
        await running.answers(ghost.secret, "VALID")
        remembered = time.monotonic()
        await node.restore(backup, new_timeline=False)
        await running.answers(kept.secret, "VALID")
        # The client library may have received a verdict that its host had cached for a while.
        for seconds in (CACHE_SECONDS, 2 * CACHE_SECONDS):
            await asyncio.sleep(max(0.0, remembered + seconds - time.monotonic()))
            await running.refuses(ghost.secret, "UNKNOWN")
        await client_refuses(verifier, ghost.secret, latchkey.Verdict.UNKNOWN)
        await running.answers(kept.secret, "VALID")


async def test_a_receipt_outlasts_a_crash_although_the_role_commits_asynchronously(
    node: Node, tmp_path: Path, pepper_file: Path
) -> None:
    """The role has synchronous_commit off, so that a commit becomes durable some time after it
    returns. A Delete returns a receipt, Postgres is killed at once, and crash recovery restores
    what was durable. The token must stay deleted."""
    await node.execute("ALTER ROLE latchkey SET synchronous_commit = off")
    # Only a commit that waits for WAL makes it durable.
    node.configure(fsync="on", bgwriter_lru_maxpages="0")
    async with host(tmp_path, "host", node.url, pepper_file) as running:
        doomed, kept = await running.create(), await running.create()
        await running.answers(doomed.secret, "VALID")
        await node.flush()
        for process in node.processes("walwriter"):
            process.suspend()
        await running.delete(doomed.token)
        await node.kill()
        await node.start()
        await running.refuses(doomed.secret)
        await running.answers(kept.secret, "VALID")
