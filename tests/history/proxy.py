"""A TCP proxy on loopback that holds, delays or swallows traffic, on one connection or many.

A connection has the `tag` of its listener and a `label`, which the proxy finds in the client's
data: the purpose of a worker's connection to Postgres, or whether a client's connection carries
Watch. Neither end can detect a fault: to each, the other end is merely silent.

A listener may lead to one of several servers, like an address that moves. Open connections stay
with their server until they are cut.
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

# HOST and PORT, or the path of a UNIX socket.
Place = tuple[str, int] | str
# An address, or a function that returns the address for a new connection; an OSError rejects the
# connection.
Upstream = Place | Callable[[], Place]
Action = Literal["hold", "swallow", "delay"]


class Direction(enum.Flag):
    """The direction of the bytes."""

    UP = 1
    """From the client to the server."""
    DOWN = 2
    BOTH = 3


class Connection:
    """One connection through the proxy."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.place: Place | None = None
        """Its upstream."""
        self.label: str | None = None
        self.swallowed = Direction(0)
        """Directions in which bytes are missing, which makes the connection unusable."""
        self.task = asyncio.current_task()
        self._tail = b""

    def sniff(self, data: bytes, labels: Mapping[bytes, str]) -> None:
        """Find out the purpose of the connection."""
        if self.label is None:
            text = self._tail + data
            self.label = next((label for mark, label in labels.items() if mark in text), None)
            # A mark may arrive in two pieces.
            self._tail = text[-64:]


class Fault:
    """A fault that affects connections until it ends.

    `hold` delays bytes until the fault ends, like a network that recovers. `swallow` drops them,
    and cuts the connection when the fault ends. `delay` delivers each piece late, by up to
    `seconds_max`.
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
        """Number of pieces affected so far."""


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
        """Apply the fault to connections, new ones included, during the block."""
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
        """Cut connections, as a restarting router does; return how many."""
        tasks = [c.task for c in self.connections if c.task is not None and matches(c)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    @contextlib.asynccontextmanager
    async def refusing(self, matches: Callable[[Connection], bool]) -> AsyncIterator[None]:
        """Cut connections and reject new ones during the block. New connections have no label
        yet.
        """
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
        # Always cut: to its two ends, this is one more broken connection.
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
        # The end of the stream is delayed like any byte, because a dead network does not report it
        # either.
        if fault.action == "swallow":
            connection.swallowed |= direction
            # Keep reading, so that the sender does not detect the fault.
        elif fault.action == "hold":
            await fault.over.wait()
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._randomness.uniform(*fault.seconds)):
                    await fault.over.wait()
