"""Hosts, clients, and the proxies between them and the database: the parts of a run."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit, urlunsplit

from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.token_store import TokenStore

from tests.helpers.child_processes import Child
from tests.helpers.imported_keys import IMPORTED_PREFIX
from tests.history.broken import VARIABLE
from tests.history.processes import Host, LoneHost, SupervisedHost
from tests.history.proxy import Proxy
from tests.history.records import Record, read

__all__ = ["LISTEN", "LOOKUP", "RENEWAL", "WATCH", "Client", "Cluster", "cluster"]

LISTEN, RENEWAL, LOOKUP, WATCH = "listen", "renewal", "lookup", "watch"
# The text in a worker's connection to Postgres that identifies its purpose; the pool's connections
# have no label.
_DATABASE_LABELS = {
    b"LISTEN ": LISTEN,
    b"INSERT INTO verifier": RENEWAL,
    b"LEFT JOIN invalidation": RENEWAL,
    b"force_generic_plan": LOOKUP,
}
# gRPC writes the path of a method literally, without Huffman coding (RFC 7541 §5.2 allows either).
_CLIENT_LABELS = {b"TokenService/Watch": WATCH}


@dataclass
class Client:
    """A client process across its restarts."""

    number: int
    hosts: tuple[str, ...]
    """Names of the hosts that it knows. It watches one of them and verifies through any."""
    target: str
    verifiers: int
    children: list[Child]

    @property
    def name(self) -> str:
        return f"client-{self.number:02}"

    @property
    def child(self) -> Child:
        return self.children[-1]


class Cluster:
    """Hosts, clients and proxies. Created by `cluster`, which also ends them."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        lease_seconds: float,
        settings: Mapping[str, str],
        seed: int,
    ) -> None:
        self.folder = folder
        self.lease_seconds = lease_seconds
        self.database_url = database_url
        self.seed = seed
        self.tokens = folder / "tokens"
        self.records = folder / "records"
        self.records.mkdir()
        randomness = random.Random(seed)  # noqa: S311 - repeatable
        self.database = Proxy(_DATABASE_LABELS, randomness)
        self.network = Proxy(_CLIENT_LABELS, randomness)
        self.hosts: dict[str, Host] = {}
        self.clients: list[Client] = []
        self.others: list[Child] = []
        self._pepper_file = folder / "peppers"
        self._settings = {
            "lease_seconds": str(lease_seconds),
            "imported_prefixes": IMPORTED_PREFIX,
            **settings,
        }

    async def prepare(self) -> None:
        """Prepare the database, as the supervisor would."""
        await migrate(self.database_url, bundled())
        keyring = pepper_file.load_or_create(self._pepper_file, create=True)
        self._peppers = pepper_file.render(keyring)
        store = await TokenStore.open(self.database_url)
        for pepper in keyring.peppers:
            await store.register_pepper(pepper.id)
        await store.close()

    async def add_host(
        self,
        name: str,
        *,
        workers: int | None = None,
        rule_to_break: str | None = None,
    ) -> None:
        """Start a host and wait until it serves: a single worker, or a supervisor with
        `workers`."""
        settings = {
            **self._settings,
            "database_url": await self._way_to_database(name),
            "pepper_file": str(self._pepper_file),
        }
        host: Host
        if workers is None:
            environment = {} if rule_to_break is None else {VARIABLE: rule_to_break}
            host = LoneHost(name, self.folder, settings, self._peppers, environment)
        else:
            host = SupervisedHost(name, self.folder, settings, workers)
        # Registered before it is up, so that it is cleaned up even if the start fails.
        self.hosts[name] = host
        await host.start()

    async def add_client(
        self, hosts: Iterable[str], *, verifiers: int = 1, rule_to_break: str | None = None
    ) -> Client:
        """Start a client that knows these hosts, through its own proxy ports."""
        number, hosts = len(self.clients), tuple(hosts)
        client = Client(number, hosts, "", verifiers, [])
        ports = []
        for name in hosts:
            address, _, port = self.hosts[name].address.rpartition(":")
            ports.append(await self.network.listen((address, int(port)), client.name))
        # gRPC's notation for a list of addresses: calls rotate over them, and a stream stays on
        # one.
        client.target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self.clients.append(client)
        self.start_client(client, rule_to_break)
        return client

    def start_client(self, client: Client, rule_to_break: str | None = None) -> None:
        """Start a client's process, or restart it after it was killed."""
        name = f"{client.name}.{len(client.children)}"
        options = {
            "target": client.target,
            "tokens": str(self.tokens),
            "records": str(self.records / name),
            "seed": self.seed * 1_000 + client.number,
            "verifiers": client.verifiers,
        }
        environment = {} if rule_to_break is None else {VARIABLE: rule_to_break}
        argv = ["tests.history.client", json.dumps(options)]
        client.children.append(Child(self.folder, name, argv, environment))

    def start_deleters(self, deleters: int, connections: Mapping[str, int]) -> Child:
        """Start the process that creates and deletes, with this number of `connections` to each
        host."""
        options = {
            "addresses": [
                self.hosts[name].address
                for name, count in connections.items()
                for _ in range(count)
            ],
            "tokens": str(self.tokens),
            "records": str(self.records / "deleters"),
            "seed": self.seed,
            "deleters": deleters,
        }
        argv = ["tests.history.deleter", json.dumps(options)]
        self.others.append(Child(self.folder, "deleters", argv, {}))
        return self.others[-1]

    async def stop_clients(self) -> None:
        """Shut down all clients at the same time."""
        running = [client.child for client in self.clients if client.child.alive]
        for child in running:
            child.ask_to_end()
        await asyncio.gather(*(child.ended() for child in running))

    def histories(self) -> dict[str, Callable[[], Iterable[Record]]]:
        """Return the records of all processes so far, by name."""

        def reader(path: Path) -> Callable[[], Iterable[Record]]:
            return lambda: read(path)

        return {path.name: reader(path) for path in sorted(self.records.iterdir())}

    def children(self) -> Sequence[Child]:
        """Return all processes that were ever started."""
        return [
            *self.others,
            *(child for client in self.clients for child in client.children),
            *(child for host in self.hosts.values() for child in host.children),
        ]

    def troubles(self) -> list[str]:
        """Return the processes that ended unexpectedly or in an unexpected way."""
        return [trouble for child in self.children() if (trouble := child.trouble())]

    async def close(self) -> None:
        """End all processes, with a clean shutdown if possible."""
        for child in self.children():
            with contextlib.suppress(Exception):
                child.handle.resume()
        await self.database.close()
        await self.network.close()
        for child in self.others:
            child.clean_up()
        for client in self.clients:
            for child in client.children:
                child.clean_up()
        for host in self.hosts.values():
            host.clean_up()

    async def _way_to_database(self, tag: str) -> str:
        """Return a URL that leads to the database through the proxy, over TCP."""
        parts = urlsplit(self.database_url)
        query = parse_qs(parts.query)
        socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        port = await self.database.listen(socket, tag)
        account, _, _ = parts.netloc.rpartition("@")
        # Unencrypted, so that the proxy can read the connection's purpose.
        return urlunsplit(
            parts._replace(netloc=f"{account}@127.0.0.1:{port}", query="sslmode=disable")
        )


@contextlib.asynccontextmanager
async def cluster(
    folder: Path,
    database_url: str,
    *,
    lease_seconds: float,
    seed: int,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Cluster]:
    """Yield an empty cluster on a database, and end everything that was added to it."""
    made = Cluster(folder, database_url, lease_seconds, settings or {}, seed)
    try:
        await made.prepare()
        yield made
    finally:
        await made.close()
