"""A cluster whose database has several servers, one of which is the primary."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from tests.history.cluster import Cluster
from tests.history.proxy import Connection, Place, Upstream

__all__ = ["WAYS", "NodesCluster", "Way", "nodes_cluster"]

# How a host's URL finds the primary: it lists all servers, in either order, or has one address that
# the test moves.
Way = Literal["list", "reversed", "address"]
WAYS: tuple[Way, ...] = ("list", "reversed", "address")


class NodesCluster(Cluster):
    """Hosts that reach each server of their database through the proxy, over TCP."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        nodes: Mapping[str, Place],
        lease_seconds: float,
        settings: Mapping[str, str],
        seed: int,
    ) -> None:
        super().__init__(folder, database_url, lease_seconds, settings, seed)
        self.nodes = dict(nodes)
        self.address = next(iter(nodes))
        """The server to which the movable address leads. New connections go there."""
        self.ways: dict[str, Way] = {}
        """Each host's kind of URL; set it before the host is added. Default: a list."""

    def sessions(
        self, host: str | None = None, node: str | None = None, label: str | None = None
    ) -> Callable[[Connection], bool]:
        """Return a predicate for a host's sessions with a server, for one purpose or any."""

        def matches(connection: Connection) -> bool:
            return (
                host in (None, connection.tag)
                and (node is None or connection.place == self.nodes[node])
                and label in (None, connection.label)
            )

        return matches

    async def _way_to_database(self, tag: str) -> str:
        way = self.ways.get(tag, "list")
        upstreams: list[Upstream] = list(self.nodes.values())
        if way == "address":
            upstreams = [lambda: self.nodes[self.address]]
        ports = [await self.database.listen(upstream, tag) for upstream in upstreams]
        if way == "reversed":
            ports.reverse()
        parts = urlsplit(self.database_url)
        account, _, _ = parts.netloc.rpartition("@")
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        # Unencrypted, because the proxy reads the purpose of a session.
        return urlunsplit(parts._replace(netloc=f"{account}@{hosts}", query="sslmode=disable"))


@contextlib.asynccontextmanager
async def nodes_cluster(
    folder: Path,
    database_url: str,
    nodes: Mapping[str, Place],
    *,
    lease_seconds: float,
    seed: int,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[NodesCluster]:
    """Yield an empty cluster on a database, and end everything that was added to it.

    `database_url` leads to the current primary, `nodes` to each server by name.
    """
    made = NodesCluster(folder, database_url, nodes, lease_seconds, settings or {}, seed)
    try:
        await made.prepare()
        yield made
    finally:
        await asyncio.shield(made.close())
