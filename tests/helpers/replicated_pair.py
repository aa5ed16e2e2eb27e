"""A Postgres primary with a streaming standby, for tests of failover and restore.

`Link` is a TCP address whose target a test changes. `Pair` combines two nodes with a link for
replication and a link that clients may use, such as a virtual IP.
"""

import asyncio
import contextlib
import random
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from tests.helpers.postgres_node import (
    HOST,
    POSTGRES_SECONDS_MAX,
    STANDBY,
    Node,
    Template,
    new_folder,
)
from tests.helpers.waiting import eventually
from tests.history.proxy import Fault, Proxy

__all__ = ["Link", "Pair", "pair"]


class Link:
    """A TCP address on loopback that leads to one node at a time, or to none."""

    def __init__(self, target: Node | None) -> None:
        self.target = target
        self.port = 0
        self._proxy = Proxy({}, random.Random(0))  # noqa: S311 - delays only, of which it has none
        self._stall = contextlib.AsyncExitStack()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{HOST}:{self.port}"

    async def open(self) -> None:
        self.port = await self._proxy.listen(self._place, "link")

    def _place(self) -> tuple[str, int]:
        if self.target is None:
            raise ConnectionRefusedError
        return HOST, self.target.port

    async def switch(self, target: Node | None, *, cut: bool) -> None:
        """Lead new connections to `target`; with `cut`, end the established ones."""
        self.target = target
        if cut:
            await self._proxy.cut()

    async def stall(self) -> None:
        """Stop carrying bytes in either direction, on old and new connections, without ending
        any.
        """
        await self._stall.enter_async_context(self._proxy.fault(Fault(lambda _: True, "swallow")))

    async def resume(self) -> None:
        """End the connections that lack bytes, and carry bytes again. Bytes sent meanwhile are
        lost."""
        await self._stall.aclose()

    async def close(self) -> None:
        await self.resume()
        await self._proxy.close()


class Pair:
    """Two nodes: initially `first` is the primary and `second` its standby. Created by `pair`."""

    def __init__(self, folder: Path, template: Template) -> None:
        self._folder: Final = new_folder(folder, "pair-")
        self.first: Final = Node("first", template, self._folder)
        self.second: Final = Node("second", template, self._folder)
        self.replication: Final = Link(self.first)
        """The standby's connection to its primary."""
        self.address: Final = Link(self.first)
        """One address in front of both, such as a virtual IP or a TCP proxy."""
        self._links: Final = [self.replication, self.address]

    @property
    def url(self) -> str:
        """Return a URL that names both nodes, `first` initially."""
        return self.first.url_at(self.first.address, self.second.address)

    @property
    def address_url(self) -> str:
        """Return a URL that names only `address`."""
        return self.first.url_at(self.address.address)

    async def start(self, *, synchronous: bool) -> None:
        """Start both and wait until the standby streams."""
        for link in self._links:
            await link.open()
        await self.first.make()
        await self.second.make()
        if synchronous:
            self.first.configure(synchronous_standby_names=STANDBY)
        self.second.follow(self.replication.port)
        await self.first.start()
        await self.second.start()
        await self.streams(self.first, synchronous=synchronous)

    async def streams(self, primary: Node, *, synchronous: bool) -> None:
        """Wait until the standby streams from `primary`, in this mode."""

        async def streaming() -> bool:
            state = await primary.fetchval(
                "SELECT state || ' ' || sync_state FROM pg_stat_replication"
                " WHERE application_name = $1",
                STANDBY,
            )
            return bool(state == ("streaming sync" if synchronous else "streaming async"))

        await eventually(streaming, "the standby streams", POSTGRES_SECONDS_MAX)

    async def caught_up(self, primary: Node, standby: Node) -> None:
        """Wait until the standby has replayed everything that `primary` has committed so far."""
        end = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")

        async def replayed() -> bool:
            query = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
            return bool(await standby.fetchval(query, end))

        await eventually(replayed, f"{standby.name} has caught up")

    async def rejoin(self, node: Node, primary: Node, *, synchronous: bool) -> None:
        """Make a stopped node a standby of `primary`, from a new base backup."""
        target = self._folder / f"rejoin-{secrets.token_hex(4)}"
        await primary.back_up(target)
        await node.move_from(target)
        await self.replication.switch(primary, cut=True)
        node.follow(self.replication.port)
        await node.start()
        primary.configure(**({"synchronous_standby_names": STANDBY} if synchronous else {}))
        await self.streams(primary, synchronous=synchronous)

    async def close(self) -> None:
        """End both nodes, in whatever state they are, and remove the folder, but not their logs."""
        for node in (self.second, self.first):
            if node.running:
                await node.kill()
        for link in self._links:
            await link.close()
        for node in (self.first, self.second):
            with contextlib.suppress(OSError):
                node.log_path.rename(self._folder.with_name(f"{self._folder.name}-{node.name}.log"))
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def pair(
    folder: Path, template: Template, *, synchronous: bool = True
) -> AsyncIterator[Pair]:
    """Run a pair below `folder`, which the account that Postgres runs as must be able to enter."""
    made = Pair(folder, template)
    try:
        await made.start(synchronous=synchronous)
        yield made
    finally:
        await made.close()
