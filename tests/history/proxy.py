"""A TCP proxy on loopback that holds up, delays or swallows what passes, one connection or many.

A connection is known by the `tag` of the listener that it came by and by a `label`, which is found
in what its client says: what a worker's connection to Postgres is for, and which of a client's
carries Watch. Neither end is told of a fault: to both the other one is merely silent.

A listener may lead to one of several places, as an address does that moves between servers.
Connections that are open stay where they are until they are cut.
"""

import asyncio
import contextlib
import enum
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal

__all__ = ["Action", "Connection", "Direction", "Fault", "Place", "Proxy", "Upstream"]

CHUNK_BYTES = 1 << 16
CONNECT_SECONDS_MAX = 2.0

# HOST:PORT's parts, or the path of a UNIX socket.
Place = tuple[str, int] | str
# A place, or a function that returns the place for a new connection; OSError refuses it.
Upstream = Place | Callable[[], Place]
Action = Literal["hold", "swallow", "delay"]


class Direction(enum.Flag):
    """Which way bytes go."""

    UP = 1
    """From the client to the server."""
    DOWN = 2
    BOTH = 3


class Connection:
    """One connection through the proxy."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.place: Place | None = None
        """Where it leads."""
        self.label: str | None = None
        self.swallowed = Direction(0)
        """Ways on which bytes are missing. It can never be of use again."""
        self.task = asyncio.current_task()
        self._tail = b""

    def sniff(self, data: bytes, labels: Mapping[bytes, str]) -> None:
        """Find out what it is for."""
        if self.label is None:
            text = self._tail + data
            self.label = next((label for mark, label in labels.items() if mark in text), None)
            # A mark may come in two pieces.
            self._tail = text[-64:]


class Fault:
    """What befalls connections until it is over.

    `hold` keeps bytes back and delivers them when it is over, as a network does that recovers;
    `swallow` drops them for good, and the connection is cut when it is over; `delay` delivers each
    piece late, by up to `seconds_max`.
    """

    def __init__(
        self,
        matches: Callable[[Connection], bool],
        action: Action,
        direction: Direction = Direction.BOTH,
        seconds: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.matches = matches
        self.action = action
        self.direction = direction
        self.seconds = seconds
        self.over = asyncio.Event()
        self.befallen = 0
        """How many pieces, so far."""


class Proxy:
    """Listens on any number of ports, each for one upstream, until `close`."""

    def __init__(self, labels: Mapping[bytes, str], randomness: random.Random) -> None:
        self.connections: set[Connection] = set()
        self._labels = labels
        self._randomness = randomness
        self._faults: list[Fault] = []
        self._refusals: list[Callable[[Connection], bool]] = []
        self._servers: list[asyncio.Server] = []

    async def listen(self, upstream: Upstream, tag: str) -> int:
        """Return a new port that leads to `upstream`."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(upstream, Connection(tag), reader, writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    @contextlib.asynccontextmanager
    async def fault(self, fault: Fault) -> AsyncIterator[None]:
        """Have it befall connections, new ones too, during the block."""
        self._faults.append(fault)
        try:
            yield
        finally:
            self._faults.remove(fault)
            fault.over.set()
            for connection in tuple(self.connections):
                if connection.swallowed and connection.task is not None:
                    connection.task.cancel()

    async def cut(self, matches: Callable[[Connection], bool] = lambda _: True) -> int:
        """Cut connections, as a router that restarts does; return how many."""
        tasks = [c.task for c in self.connections if c.task is not None and matches(c)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    @contextlib.asynccontextmanager
    async def refusing(self, matches: Callable[[Connection], bool]) -> AsyncIterator[None]:
        """Cut connections and refuse new ones during the block. New ones have no label yet."""
        self._refusals.append(matches)
        await self.cut(matches)
        try:
            yield
        finally:
            self._refusals.remove(matches)

    async def close(self) -> None:
        """Stop listening, and cut all connections."""
        for server in self._servers:
            server.close()
        await self.cut()

    async def _serve(
        self,
        upstream: Upstream,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.connections.add(connection)
        writers = [writer]
        # Cut, whatever the reason: for its ends it is one more broken connection.
        with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
            try:
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    place = connection.place = upstream() if callable(upstream) else upstream
                    if any(matches(connection) for matches in self._refusals):
                        raise ConnectionRefusedError
                    if isinstance(place, str):
                        there, back = await asyncio.open_unix_connection(place)
                    else:
                        there, back = await asyncio.open_connection(*place)
                writers.append(back)
                up = asyncio.create_task(self._pump(connection, Direction.UP, reader, back))
                down = asyncio.create_task(self._pump(connection, Direction.DOWN, there, writer))
                try:
                    await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    up.cancel()
                    down.cancel()
                    await asyncio.gather(up, down, return_exceptions=True)
            finally:
                self.connections.discard(connection)
                for each in writers:
                    each.transport.abort()

    async def _pump(
        self,
        connection: Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Carry bytes one way until they end."""
        ended = False
        while not ended:
            data = await reader.read(CHUNK_BYTES)
            ended = not data
            if direction is Direction.UP:
                connection.sniff(data, self._labels)
            for fault in tuple(self._faults):
                if direction in fault.direction and fault.matches(connection):
                    await self._befall(connection, direction, fault)
            if not connection.swallowed & direction:
                writer.write(data)
                await writer.drain()

    async def _befall(self, connection: Connection, direction: Direction, fault: Fault) -> None:
        fault.befallen += 1
        # An end is kept back like any byte: a dead network does not tell of it either.
        if fault.action == "swallow":
            connection.swallowed |= direction
            # Read on: to its sender all is well.
        elif fault.action == "hold":
            await fault.over.wait()
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._randomness.uniform(*fault.seconds)):
                    await fault.over.wait()
