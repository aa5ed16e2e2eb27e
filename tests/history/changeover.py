"""The steps of a failover on a pair of database servers, and of the return to a healthy pair.

No step waits for the service: a step ends when the database servers have completed it.
"""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Literal

import latchkey

from tests.helpers.postgres_node import Node
from tests.helpers.replicated_pair import Pair
from tests.helpers.waiting import eventually
from tests.history.checker import Restore
from tests.history.nodes import NodesCluster
from tests.history.records import now

__all__ = ["Changeover", "Visible"]

# Ways to make commits visible on the primary without a standby's confirmation.
Visible = Literal["cancelled", "crashed"]
# Time for hosts to find the restored server and wait out earlier leases.
SETTLE_SECONDS_MAX = 60.0
# Counts the renewals that wait for the standby on a session that began after a given time. Such a
# session has read, or is reading, the changes that were visible then.
_READERS = """
SELECT count(*) FROM pg_stat_activity
 WHERE wait_event = 'SyncRep' AND query LIKE '%verifier%' AND backend_start > $1
"""
# Only renewals, because each cancelled Delete lets the next one take a revision.
_CANCEL_OLDER = """
SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity
 WHERE wait_event = 'SyncRep' AND query LIKE '%verifier%' AND backend_start <= $1
"""


# A host accepts Deletes for the rest of its lease after replication has stopped.
UNREPLICATED_SECONDS = 5.0
# The statement of a Delete, for a token that does not exist.
_UNREPLICATED_DELETE = """
WITH next AS (
    UPDATE head SET revision = revision + 1, mark = DEFAULT RETURNING revision, mark)
INSERT INTO invalidation (revision, mark, token_id)
SELECT revision, mark, 'tok_unreplicated' FROM next
"""


class Changeover:
    """Tracks which server is the primary, and keeps the cluster's address and URL in step."""

    def __init__(self, made: NodesCluster, pair: Pair) -> None:
        self.pair = pair
        self.primary, self.other = pair.first, pair.second
        """`other` is the standby, or after a failover the deposed primary."""
        self.restores: list[Restore] = []
        self._cluster = made
        self._is_healthy = True

    async def head(self, node: Node | None = None) -> int:
        """Return the newest revision on the primary, or on another server."""
        revision: int = await (node or self.primary).fetchval("SELECT revision FROM head")
        return revision

    async def stall(self) -> None:
        """Stop replication. Stop replication: from now on, commits wait for the standby and
        never return.
        """
        self._is_healthy = False
        await self.pair.replication.stall()

    async def show_unreplicated(self, how: Visible, readers: int = 0) -> None:
        """Make commits that wait for the standby visible on the primary only.

        At least one of them takes a revision. With `readers`, return once that many hosts have read
        it on the primary.
        """
        before = await self.head()
        waiting = await eventually(self.primary.waiting_commits, "a commit waits for the standby")
        assert waiting
        if how == "crashed":
            await self.primary.crash_waiting_commit()
        with contextlib.suppress(AssertionError):
            await eventually(
                lambda: self._visible_after(before),
                "an unreplicated change is visible",
                UNREPLICATED_SECONDS,
            )
        if await self.head() == before:
            # All hosts lost their leases before any of their Deletes took a revision.
            await self.primary.execute(_UNREPLICATED_DELETE)
        visible_since = await self.primary.fetchval("SELECT clock_timestamp()")

        async def read() -> bool:
            # Hosts whose renewal fails reconnect and read the new changes.
            await self.primary.fetchval(_CANCEL_OLDER, visible_since)
            count: int = await self.primary.fetchval(_READERS, visible_since)
            return count >= readers

        if readers:
            await eventually(read, "the hosts have read the unreplicated change")
            everybody = await self.primary.fetchval("SELECT clock_timestamp()")
            await self.primary.fetchval(_CANCEL_OLDER, everybody)

    async def _visible_after(self, before: int) -> bool:
        await self.primary.cancel_waiting_commits()
        return await self.head() > before

    async def promote(self) -> None:
        """Promote the standby, whatever the state of the primary."""
        self._is_healthy = False
        await self.other.promote()
        self.primary, self.other = self.other, self.primary
        self._cluster.database_url = self.primary.url

    async def move_address(self, node: Node | None = None, *, cut: bool) -> None:
        """Move the address to the primary, or to another server. With `cut`, end the hosts'
        sessions through that address with other servers.
        """
        self._cluster.address = (node or self.primary).name
        if cut:
            hosts = [name for name, way in self._cluster.ways.items() if way == "address"]
            here = self._cluster.sessions(node=self._cluster.address)
            await self._cluster.database.cut(lambda c: c.tag in hosts and not here(c))

    async def restore(self, backup: Path, taken: int, *, new_timeline: bool) -> None:
        """Replace the database by a base backup that began at `taken`. Afterwards the pair has no
        standby. `settle` does the steps that docs/backup.md requires after a restore."""
        self._is_healthy = False
        began = now()
        for node in (self.other, self.primary):
            if node.running:
                await node.kill()
        await self.primary.restore(backup, new_timeline=new_timeline)
        shutil.rmtree(backup)
        # Not settled yet.
        self.restores.append(Restore(taken, began, sys.maxsize))

    async def settle(self, host: latchkey.Client) -> None:
        """Clear all caches, as docs/backup.md requires after a restore."""

        async def emptied() -> bool:
            with contextlib.suppress(latchkey.Unavailable):
                await host.invalidate_all()
                return True
            return False

        await eventually(emptied, "all memories are emptied", SETTLE_SECONDS_MAX)
        self.restores[-1] = self.restores[-1]._replace(settled=now())

    async def mend(self) -> None:
        """Make the pair healthy: stop a deposed primary and make it follow the new one."""
        if self._is_healthy:
            return
        await self.pair.replication.resume()
        if not self.primary.running:
            await self.primary.start()
        standby = self.other.running and await self.other.fetchval("SELECT pg_is_in_recovery()")
        if standby:
            await self.pair.streams(self.primary, synchronous=True)
        else:
            if self.other.running:
                await self.other.kill()
            await self.pair.rejoin(self.other, self.primary, synchronous=True)
        await self.move_address(cut=True)
        self._is_healthy = True
