"""Directed failovers: for each gap that rule 12 closes, the sequence of events that exposes it.

The scenarios use a pair of Postgres servers with synchronous replication. One host, the suspect,
may lack a rule. Its URL names one address, which the scenarios move. The other host lists both
servers. A client watches the suspect. Each scenario ends with a healthy pair.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import latchkey

from tests.helpers.replicated_pair import Pair
from tests.helpers.waiting import eventually
from tests.history.changeover import Changeover
from tests.history.checker import Findings, check
from tests.history.cluster import LOOKUP
from tests.history.nodes import NodesCluster, nodes_cluster
from tests.history.records import now
from tests.history.scenarios import OTHER, SUSPECT, WAIT_SECONDS, Stage, Subject

__all__ = ["EVERY", "MISSED", "FailoverScenario", "FailoverStage", "failover_staged", "perform"]

# A host's row must outlive the failover, even on a busy machine. A host without its row starts
# over, even if it lacks a rule.
LEASE_SECONDS = 3.0
RETRY_SECONDS = 0.1
HOSTS = 2
# A scenario was cut short because an answer did not come in time.
ATTEMPTS_MAX = 3

T = TypeVar("T")


class FailoverStage(Stage):
    """Two hosts and a client on a pair of database servers."""

    def __init__(self, made: NodesCluster, pair: Pair) -> None:
        super().__init__(made)
        self.nodes = made
        self.changeover = Changeover(made, pair)

    async def create(self, *, tell: bool = False, account: str = "") -> Subject:
        """Create a token, with retries during a failover, as callers do."""
        return await _persistently(
            lambda: super(FailoverStage, self).create(tell=tell, account=account)
        )

    async def delete(self, through: latchkey.Client, subject: Subject) -> None:
        """Delete, and repeat that until it is confirmed, as callers do during a failover."""
        await _persistently(lambda: super(FailoverStage, self).delete(through, subject))

    async def show_unreplicated_delete(self) -> int:
        """Make both hosts read a Delete that only the primary has; return its revision."""
        victim = await self.create()
        await self.changeover.stall()
        delete = asyncio.create_task(self.delete(self.other, victim))
        try:
            await self.changeover.show_unreplicated("cancelled", readers=HOSTS)
        finally:
            # Sent only once, because the first Delete after the failover must be another one.
            delete.cancel()
            await asyncio.gather(delete, return_exceptions=True)
        return await self.changeover.head()

    async def taken_again(self, number: int) -> None:
        """Wait until the primary has reused this lost revision number."""

        async def taken() -> bool:
            head = await self.changeover.head()
            assert head <= number, "other changes were committed as well"
            return head == number

        await eventually(taken, "the revision is reused", WAIT_SECONDS)

    def findings(self) -> Findings:
        """Check the histories so far."""
        self._recorder.flush()
        return check(self.cluster.histories(), self.changeover.restores)


async def _persistently(do: Callable[[], Awaitable[T]]) -> T:
    """Repeat a change until it is answered."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + WAIT_SECONDS
    while True:
        try:
            return await do()
        except latchkey.Unavailable:
            if loop.time() > give_up:
                raise
            await asyncio.sleep(RETRY_SECONDS)


async def number_is_used_again(stage: FailoverStage) -> None:
    """A revision that only the dead primary had is reused while a host is cut off.

    The host and its client have cached the token that the second use of the number names.
    """
    changeover, database = stage.changeover, stage.nodes.database
    subject = await stage.create(tell=True)
    await stage.remembered(stage.suspect, subject)
    await stage.remembered_by_client(subject)
    number = await stage.show_unreplicated_delete()
    async with asyncio.TaskGroup() as group, database.refusing(stage.nodes.sessions(SUSPECT)):
        await changeover.primary.kill()
        await changeover.promote()
        await changeover.move_address(cut=True)
        group.create_task(stage.delete(stage.other, subject))
        await stage.taken_again(number)
        # The host reconnects before its row lapses, because a lapsed row would also make it start
        # over.
    await stage.verify_on(stage.suspect, subject)
    await stage.client_verifies_on(subject)


async def look_up_stays(stage: FailoverStage) -> None:
    """A host's look-ups stay with the deposed primary, whose unreplicated revision has the number
    that the host has applied on the new one."""
    changeover, nodes = stage.changeover, stage.nodes
    # The session for look-ups is open, and the suspect has not cached the subject.
    await stage.remembered(stage.suspect, await stage.create())
    subject = await stage.create()
    number = await stage.show_unreplicated_delete()
    old = changeover.primary.name
    await changeover.promote()
    await changeover.move_address(cut=False)
    look_ups = nodes.sessions(SUSPECT, old, LOOKUP)
    await nodes.database.cut(lambda c: nodes.sessions(SUSPECT)(c) and not look_ups(c))
    # A host that detects the change closes this session.
    assert any(map(look_ups, nodes.database.connections)), "no look-up stayed behind"
    async with nodes.database.refusing(nodes.sessions(OTHER, old)):
        await stage.delete(stage.other, subject)
        assert await changeover.head() == number, "the revision was not reused"
        await stage.verify_on(stage.suspect, subject)


async def host_returns_to_the_old_primary(stage: FailoverStage) -> None:
    """A host that holds a lease from the new primary is connected to the old one again, which
    lacks a Delete.
    """
    changeover, nodes = stage.changeover, stage.nodes
    subject, another = await stage.create(), await stage.create()
    old = changeover.primary
    # Otherwise the standby would receive the old primary's changes until its promotion.
    await changeover.stall()
    await changeover.promote()
    await changeover.move_address(cut=True)
    async with nodes.database.refusing(nodes.sessions(OTHER, old.name)):
        await stage.delete(stage.other, subject)
        # It answers, so it holds a lease from the new primary.
        await stage.remembered(stage.suspect, another)
        await changeover.move_address(old, cut=True)
        await stage.verify_for(stage.suspect, subject, LEASE_SECONDS)
        await changeover.move_address(cut=True)
        await stage.verify_on(stage.suspect, subject)


async def backup_is_restored(stage: FailoverStage) -> None:
    """A restored base backup reverts the log, and the next Delete reuses a lost revision."""
    changeover, database = stage.changeover, stage.nodes.database
    subject = await stage.create(tell=True)
    taken, backup = now(), stage.cluster.folder / f"backup-{now()}"
    await changeover.primary.back_up(backup)
    await stage.remembered(stage.suspect, subject)
    await stage.remembered_by_client(subject)
    lost = await stage.create()
    await stage.delete(stage.suspect, lost)
    number = await changeover.head()
    async with asyncio.TaskGroup() as group, database.refusing(stage.nodes.sessions(SUSPECT)):
        await changeover.restore(backup, taken, new_timeline=False)
        group.create_task(stage.delete(stage.other, subject))
        await stage.taken_again(number)
    # Before the operator has cleared the caches.
    await stage.verify_on(stage.suspect, subject)
    await stage.client_verifies_on(subject)
    await changeover.settle(stage.other)


async def lost_token_is_forgotten(stage: FailoverStage) -> None:
    """A token that the restored backup lacks is not VALID once the operator has cleared all caches.
    Neither the log nor the timeline shows that the token is missing."""
    changeover = stage.changeover
    taken, backup = now(), stage.cluster.folder / f"backup-{now()}"
    await changeover.primary.back_up(backup)
    subject = await stage.create(tell=True)
    await stage.remembered(stage.suspect, subject)
    await stage.remembered_by_client(subject)
    await changeover.restore(backup, taken, new_timeline=False)
    await changeover.settle(stage.other)
    await stage.delete(stage.other, subject)
    await stage.verify_on(stage.suspect, subject)
    await stage.client_verifies_on(subject)


FailoverScenario = Callable[[FailoverStage], Awaitable[None]]
EVERY: tuple[FailoverScenario, ...] = (
    number_is_used_again,
    look_up_stays,
    host_returns_to_the_old_primary,
    backup_is_restored,
    lost_token_is_forgotten,
)
# For each rule that can be removed, the scenario that ends in a late accept without it. Afterwards
# such a build cannot continue with the other scenarios.
MISSED: dict[str, FailoverScenario] = {
    "12": number_is_used_again,
    "12-look-up": host_returns_to_the_old_primary,
}


@contextlib.asynccontextmanager
async def failover_staged(
    folder: Path, pair: Pair, rule_to_break: str | None
) -> AsyncIterator[FailoverStage]:
    """Yield a stage on a pair, where the client and one of the hosts lack the rule."""
    async with nodes_cluster(
        folder,
        pair.first.url,
        {node.name: ("127.0.0.1", node.port) for node in (pair.first, pair.second)},
        lease_seconds=LEASE_SECONDS,
        seed=1,
        settings={"notify": "off"},
    ) as made:
        made.ways |= {SUSPECT: "address", OTHER: "list"}
        await asyncio.gather(
            made.add_host(SUSPECT, rule_to_break=rule_to_break), made.add_host(OTHER)
        )
        await made.add_client([SUSPECT], rule_to_break=rule_to_break)
        stage = FailoverStage(made, pair)
        try:
            yield stage
        finally:
            await stage.close()


async def perform(stage: FailoverStage, scenario: FailoverScenario) -> Findings:
    """Play a scenario to its end, repair the pair, and return all findings so far.

    If a busy machine cuts the scenario short, it proves nothing and is played again. Raises
    Unavailable if that happens every time.
    """
    for attempt in range(ATTEMPTS_MAX):
        try:
            await scenario(stage)
        except latchkey.Unavailable:
            if attempt == ATTEMPTS_MAX - 1:
                raise
        else:
            return stage.findings()
        finally:
            await stage.changeover.mend()
    raise AssertionError("unreachable")
