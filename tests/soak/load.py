"""The load on the service: operations of every kind, at fixed rates."""

import asyncio
import collections
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from tests.helpers.token_feed import Board
from tests.soak.client_processes import ClientProcesses
from tests.soak.connections import Connections, Place, WrongAnswer
from tests.soak.operations import Act, Operations

__all__ = ["Load", "Tally", "loading"]

# Every operation ends within this time, or it is an error.
ACT_SECONDS_MAX = 40.0
# Concurrent operations of one kind. Operations beyond that are skipped and counted.
UNDER_WAY_MAX = 100


@dataclass
class Tally:
    """The outcomes of operations, by kind, and the unexpected ones."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)
    unexpected: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)


class Load:
    """Starts operations on schedule. Created by `loading`, which also ends everything that they
    started."""

    def __init__(self, place: Place, scale: float) -> None:
        self.tally = Tally()
        self._place = place
        self._scale = scale
        self._random = random.Random()  # noqa: S311 - a spread
        self._connections = Connections(place, self._random)
        self._board = Board(place.folder / "board")
        self._operations = Operations(place, self._connections, self._board, self._random)
        self._clients = ClientProcesses(place, self._random)
        self._underway: set[asyncio.Task[None]] = set()

    @property
    def kinds(self) -> dict[str, tuple[float, Act]]:
        """The rate of each kind, per second on average. Together they cause 700 calls a second, a
        third of two cores: so the service is neither idle nor overloaded."""
        return self._operations.rates | {"client process": (0.1, self._clients.replace_one)}

    async def prepare(self) -> None:
        """Create the permanent tokens."""
        self._connections.open()
        await self._operations.create_live()
        (self._place.folder / "live").write_text("\n".join(self._operations.live))

    async def run(self) -> None:
        """Start operations of each kind at its rate, at random moments. Ends when cancelled."""
        async with asyncio.TaskGroup() as group:
            for kind, (rate, act) in self.kinds.items():
                group.create_task(self._keep_at(kind, rate * self._scale, act))

    async def ask_anyone(self) -> None:
        """Make a call to a random worker."""
        await self._operations.ask_anyone()

    async def wait(self) -> None:
        """Wait for operations in progress, and end the client processes in order."""
        if self._underway:
            # Each has its own bound.
            await asyncio.wait(set(self._underway))
        await self._clients.end()
        for line, count in self._clients.wrong.items():
            self.tally.wrong[f"client process: {line}"] += count
        for line, count in self._clients.unexpected.items():
            self.tally.unexpected[f"client process: {line}"] += count
        self.tally.refused = self._connections.refused

    async def close(self) -> None:
        """Close the channels."""
        await self._connections.close()
        self._board.close()

    def clean_up(self) -> None:
        self._clients.clean_up()

    async def _keep_at(self, kind: str, rate: float, act: Act) -> None:
        running = 0

        async def once() -> None:
            nonlocal running
            running += 1
            try:
                async with asyncio.timeout(ACT_SECONDS_MAX):
                    await act()
                self.tally.done[kind] += 1
            except WrongAnswer as error:
                self.tally.wrong[f"{kind}: {error}"] += 1
            except grpc.aio.AioRpcError as error:
                self.tally.unexpected[f"{kind}: {error.code().name}: {error.details()}"] += 1
            except Exception as error:  # noqa: BLE001 - every exception is a finding
                self.tally.unexpected[f"{kind}: {type(error).__name__}: {error}"] += 1
            finally:
                running -= 1

        # The first operation of each kind starts soon, even if the kind is rare.
        pause = self._random.uniform(0.0, 1.0)
        while True:
            await asyncio.sleep(pause)
            pause = self._random.expovariate(rate)
            if running >= UNDER_WAY_MAX:
                self.tally.left_out[kind] += 1
                continue
            task = asyncio.create_task(once(), name=f"soak {kind}")
            self._underway.add(task)
            task.add_done_callback(self._underway.discard)


@contextlib.asynccontextmanager
async def loading(place: Place, scale: float = 1.0) -> AsyncIterator[Load]:
    """Yield a prepared load, and end everything that it starts."""
    load = Load(place, scale)
    try:
        await load.prepare()
        yield load
    finally:
        load.clean_up()
