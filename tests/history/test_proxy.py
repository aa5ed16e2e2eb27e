"""The proxy applies faults to the selected connections and no others."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import pytest

from tests.helpers.waiting import eventually
from tests.history.proxy import Action, Direction, Fault, Proxy


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[tuple[Proxy, int]]:
    """A proxy to an echo server, and the port that leads there."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    proxy = Proxy({b"I am special": "special"}, random.Random(1))  # noqa: S311 - repeatable
    try:
        port = await proxy.listen(("127.0.0.1", server.sockets[0].getsockname()[1]), "way")
        yield proxy, port
    finally:
        await proxy.close()
        server.close()
        await server.wait_closed()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes, within: float = 10.0
) -> bytes:
    """Send bytes and return the answer. Raises TimeoutError."""
    writer.write(text)
    async with asyncio.timeout(within):
        return await reader.readexactly(len(text))


async def test_other_connections_pass() -> None:
    """A fault of some connections leaves the others alone; the data that they send tells them
    apart."""
    async with echo() as (proxy, port):
        plain, special = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        assert await ask(*special, b"... I am special, ...") == b"... I am special, ..."
        assert await ask(*plain, b"I am not") == b"I am not"
        assert {(c.tag, c.label) for c in proxy.connections} == {
            ("way", None),
            ("way", "special"),
        }
        fault = Fault(lambda c: c.label == "special", "hold")
        async with proxy.fault(fault):
            assert await ask(*plain, b"still here") == b"still here"
            special[1].write(b"kept back")
            await eventually(lambda: fault.befallen, "something is kept back")
        assert await special[0].readexactly(9) == b"kept back"
        for _, writer in (plain, special):
            writer.close()


@pytest.mark.parametrize("direction", [Direction.UP, Direction.DOWN, Direction.BOTH])
async def test_swallow(direction: Direction) -> None:
    """Swallowed bytes never arrive, and the connection ends with the fault."""
    async with echo() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(reader, writer, b"hello") == b"hello"
        fault = Fault(lambda _: True, "swallow", direction)
        async with proxy.fault(fault):
            writer.write(b"anybody?")
            await eventually(lambda: fault.befallen, "it is swallowed")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("action", ["delay", "hold"])
async def test_late(action: Action) -> None:
    """Delayed bytes arrive complete and in order, when their time has come or the fault is over."""
    async with echo() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        fault = Fault(lambda _: True, action, Direction.DOWN, (30.0, 30.0))
        async with proxy.fault(fault):
            writer.write(b"one ")
            await eventually(lambda: fault.befallen, "it is late")
            writer.write(b"two")
        assert await reader.readexactly(7) == b"one two"
        short = Fault(lambda _: True, "delay", Direction.DOWN, (0.05, 0.05))
        async with proxy.fault(short):
            began = time.monotonic()
            assert await ask(reader, writer, b"three") == b"three"
            assert time.monotonic() - began >= 0.05
        writer.close()


async def test_address_moves() -> None:
    """New connections follow an address that moves; open ones stay where they are until cut."""
    async with echo() as (proxy, port), echo() as (other, other_port):
        place = ("127.0.0.1", port)
        moving = await proxy.listen(lambda: place, "moving")
        before = await asyncio.open_connection("127.0.0.1", moving)
        assert await ask(*before, b"hello") == b"hello"
        place = ("127.0.0.1", other_port)
        after = await asyncio.open_connection("127.0.0.1", moving)
        assert await ask(*after, b"hello") == b"hello"
        assert await ask(*before, b"still here") == b"still here"
        assert len(other.connections) == 1
        old = ("127.0.0.1", port)
        assert await proxy.cut(lambda c: c.place == old and c.tag == "moving") == 1
        with contextlib.suppress(ConnectionError):
            assert await before[0].read() == b""
        assert await ask(*after, b"not cut") == b"not cut"
        for _, writer in (before, after):
            writer.close()


async def test_refusing() -> None:
    """Connections are cut, and new ones rejected, until the block ends."""
    async with echo() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(reader, writer, b"hello") == b"hello"
        async with proxy.refusing(lambda c: c.tag == "way"):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(reader, writer, b"hello") == b"hello"
        writer.close()
