"""The failovers of a run: drawn from a seed and performed one after another, each to its end.

An episode begins and ends with a healthy pair. Between episodes, there is a time without faults, so
that all processes cache tokens again and Deletes take their usual time.
"""

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Literal

import latchkey

from tests.helpers.replicated_pair import Pair
from tests.helpers.waiting import eventually
from tests.history.changeover import Changeover, Visible
from tests.history.faults import Happened
from tests.history.nodes import NodesCluster
from tests.history.outages import Window
from tests.history.records import now

__all__ = ["EPISODES", "Episode", "Failovers", "deck"]

# Approximate length of an episode on two cores. No episode begins that could not end in time.
EPISODE_SECONDS = 8.0
CALM_SECONDS = (1.0, 2.0)
# How long replication is stalled before the failover, so that commits wait for it.
STALL_SECONDS = (0.1, 0.5)
# How long a deposed primary runs beside the new one.
BESIDE_SECONDS = (1.0, 2.5)
# If a host is disconnected for longer, it loses its row and starts over anyway.
HELD_SECONDS_MAX = 2.0
# The time for changes between a base backup and its restore.
BACKUP_AGE_SECONDS = (0.5, 2.0)
# Time for a Delete that waits for the dead process's lease, and for the first renewal on the new
# primary.
RECOVERY_LEASES = 2.5

End = Literal["killed", "stopped", "left running"]


@dataclass(frozen=True)
class Episode:
    """The faults before, during and after a promotion."""

    name: str
    end: End
    """The fate of the old primary at the promotion."""
    visible: Visible | None = None
    """Replication stops first, and commits become visible on the old primary alone."""
    cut: bool = True
    """Sessions through the address end when it moves."""
    returns: bool = False
    """The old primary is started again beside the new one, without fencing."""
    crashes: bool = False
    """The new primary is killed and started while the old one runs."""


EPISODES = (
    Episode("primary stopped", "stopped"),
    Episode("primary killed", "killed"),
    Episode("commits cancelled, primary killed", "killed", "cancelled"),
    Episode("waiting backend killed, primary killed", "killed", "crashed"),
    Episode("commits cancelled, primary left, sessions stay", "left running", "cancelled", False),
    Episode("backend killed, primary left, sessions stay", "left running", "crashed", False),
    Episode("primary left running, sessions cut", "left running"),
    Episode("commits cancelled, old primary returns", "killed", "cancelled", returns=True),
    Episode("old primary left, new one restarts", "left running", None, False, crashes=True),
    Episode("old primary returns, new one restarts", "killed", returns=True, crashes=True),
)
RESTORE, RESTORE_BY_COPY = "backup restored, new timeline", "backup restored, same timeline"


def deck(seed: int) -> Iterator[Episode | str]:
    """Yield episodes endlessly, each one once before any repeats."""
    randomness = random.Random(seed)  # noqa: S311 - repeatable
    while True:
        shuffled: list[Episode | str] = [*EPISODES, RESTORE, RESTORE_BY_COPY]
        randomness.shuffle(shuffled)
        yield from shuffled


class Failovers:
    """Performs failovers on a pair that a cluster works on."""

    def __init__(self, made: NodesCluster, pair: Pair) -> None:
        self.happened: list[Happened] = []
        self.changeover = Changeover(made, pair)
        self._cluster = made
        self._random = random.Random(made.seed)  # noqa: S311 - repeatable

    @property
    def windows(self) -> list[Window]:
        """Return each episode with the time window of its effects, which ends when the next episode
        begins."""
        recovery = int(RECOVERY_LEASES * self._cluster.lease_seconds * 1e9)
        following = [each.began for each in self.happened[1:]]
        return [
            Window(each.kind, each.began, min(each.ended + recovery, next_began))
            for each, next_began in zip(self.happened, [*following, sys.maxsize], strict=True)
        ]

    async def run(self, seconds: float, least: int) -> None:
        """Perform failovers one after another for this long, and until at least `least` are
        done, which takes longer on a slow machine.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        for episode in deck(self._cluster.seed):
            await self._for_a_while(CALM_SECONDS)
            if loop.time() + EPISODE_SECONDS > ends and len(self.happened) >= least:
                return
            began = now()
            try:
                if isinstance(episode, Episode):
                    await self._fail_over(episode)
                else:
                    await self._restore(new_timeline=episode == RESTORE)
            finally:
                await self.changeover.mend()
            name = episode.name if isinstance(episode, Episode) else episode
            self.happened.append(Happened(name, began, now()))

    async def _fail_over(self, episode: Episode) -> None:
        changeover = self.changeover
        number = 0
        if episode.visible is not None:
            await changeover.stall()
            # One worker may be starting, or waiting for another event.
            workers = sum(host.workers for host in self._cluster.hosts.values())
            await changeover.show_unreplicated(episode.visible, readers=workers - 1)
            await self._for_a_while(STALL_SECONDS)
            number = await changeover.head()
        old = changeover.primary
        async with self._one_host_held_off(until=number):
            if episode.end == "killed":
                await old.kill()
            elif episode.end == "stopped":
                await old.stop()
            await changeover.promote()
            await changeover.move_address(cut=episode.cut)
        if episode.returns:
            await self._for_a_while(BESIDE_SECONDS)
            await old.start()
        if episode.returns or episode.end == "left running":
            await self._for_a_while(BESIDE_SECONDS)
        if episode.crashes:
            await changeover.primary.kill()
            await self._for_a_while(STALL_SECONDS)
            await changeover.primary.start()
            await self._for_a_while(BESIDE_SECONDS)

    async def _restore(self, *, new_timeline: bool) -> None:
        changeover = self.changeover
        taken = now()
        backup = self._cluster.folder / f"backup-{taken}"
        await changeover.primary.back_up(backup)
        await self._for_a_while(BACKUP_AGE_SECONDS)
        number = await changeover.head()
        async with self._one_host_held_off(until=number):
            await changeover.restore(backup, taken, new_timeline=new_timeline)
        host = latchkey.Client(self._random.choice(list(self._cluster.hosts.values())).address)
        try:
            await changeover.settle(host)
        finally:
            await host.close()

    @contextlib.asynccontextmanager
    async def _one_host_held_off(self, until: int) -> AsyncIterator[None]:
        """Disconnect one host from the database during the block, and until the new primary has
        reused a revision that only the old one had. The number alone suggests that the host has
        missed nothing."""
        if not until:
            yield
            return
        host = self._random.choice(list(self._cluster.hosts))
        async with self._cluster.database.refusing(self._cluster.sessions(host)):
            yield
            # Deletes soon take revisions again, unless all hosts find the new primary late.
            with contextlib.suppress(AssertionError):
                await eventually(lambda: self._reached(until), "the number", HELD_SECONDS_MAX)

    async def _reached(self, number: int) -> bool:
        return await self.changeover.head() >= number

    async def _for_a_while(self, seconds: tuple[float, float]) -> None:
        await asyncio.sleep(self._random.uniform(*seconds))
