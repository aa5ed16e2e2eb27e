"""The limits of connections and messages, on both transports and every kind of listener.

Each test lowers the limit that it checks. `tests/helpers/raw_http2.py` is the
misbehaving client; gRPC's own client must work within the limits.
"""

import asyncio
import contextlib
import os
import socket
import struct

import grpc
import pytest
from latchkey import _channel
from latchkey_service.transport import transports
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.transports import (
    METADATA_BYTES_MAX,
    STREAMS_MAX,
    Limits,
)

from tests.helpers import raw_http2 as http2
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.integration.transport.listener import (
    ECHO,
    GRPCIO,
    LARGE,
    LISTENERS,
    STREAM,
    TCP,
    WAIT,
    Serve,
    call,
)

# --- Streams


@pytest.mark.parametrize("name", LISTENERS)
async def test_concurrent_streams(serve: Serve, name: str) -> None:
    """A connection has a maximum of concurrent calls, announces it at the start, and rejects more.
    A gRPC client holds back further calls and loses none."""
    async with serve(name) as listener:
        async with listener.raw() as raw:
            await raw.open()
            assert raw.settings[http2.MAX_CONCURRENT_STREAMS] == STREAMS_MAX
            for _ in range(STREAMS_MAX):
                last = raw.call(WAIT, b"")
            await eventually(lambda: listener.running == STREAMS_MAX, "all of them run")
            refused = await raw.until(http2.RST_STREAM, raw.call(WAIT, b""))
            assert struct.unpack(">I", refused.payload)[0] == http2.REFUSED_STREAM
            listener.release.set()
            await raw.until(http2.DATA, last)
        async with listener.channel() as channel:
            listener.release.clear()
            calls = [asyncio.create_task(call(channel, WAIT)) for _ in range(3 * STREAMS_MAX)]
            await eventually(lambda: listener.running == STREAMS_MAX, "as many as may, run")
            listener.release.set()
            assert {found.code for found in await asyncio.gather(*calls)} == {grpc.StatusCode.OK}


# --- Metadata and messages


@pytest.mark.parametrize("name", LISTENERS)
async def test_metadata(serve: Serve, name: str) -> None:
    """Metadata near the limit is accepted every time. Larger metadata is rejected every time, and
    the connection stays open."""
    small, large = METADATA_BYTES_MAX - 1_000, METADATA_BYTES_MAX + 1_000
    async with serve(name) as listener, listener.channel() as channel:
        for _ in range(20):
            assert (await call(channel, ECHO, metadata=(("x", "a" * small),))).ok
            found = await call(channel, ECHO, metadata=(("x", "a" * large),))
            assert not found.ok
        assert len(listener.peers) == 1


@pytest.mark.parametrize("name", LISTENERS)
async def test_message(serve: Serve, name: str) -> None:
    """A message of the maximum size is accepted, and one more byte is RESOURCE_EXHAUSTED."""
    unlimited = {"max_receive_message_length": -1}
    async with serve(name) as listener, listener.channel(**unlimited) as channel:
        largest = bytes(transports.MESSAGE_BYTES_MAX)
        assert (await call(channel, ECHO, largest)).ok
        found = await call(channel, ECHO, largest + b"x")
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await call(channel, ECHO)).ok


@pytest.mark.parametrize("name", GRPCIO)
async def test_compressed_message(serve: Serve, name: str) -> None:
    """`grpcio` rejects a compressed message, whatever its size."""
    async with serve(name) as listener, listener.channel() as channel:
        found = await call(channel, ECHO, bytes(10_000), compression=grpc.Compression.Gzip)
        assert found.code is grpc.StatusCode.UNIMPLEMENTED


# --- Connections


@pytest.mark.parametrize("name", LISTENERS)
async def test_connections(serve: Serve, name: str) -> None:
    """Above a listener's maximum, the oldest connections stay and the others are closed. When one
    of the oldest closes, there is room for another."""
    async with serve(name, connections_max=4) as listener, contextlib.AsyncExitStack() as stack:
        first = [await stack.enter_async_context(listener.raw()) for _ in range(4)]
        for raw in first:
            await raw.open()
        await eventually(lambda: listener.connections() == 4, "all of them are there")
        # The guard knows the order because it has seen the earlier connections before. On its own
        # schedule it would look too late.
        assert listener.guard is not None
        await asyncio.to_thread(listener.guard.inspect)
        for _ in range(8):
            # With TLS, a failed handshake.
            with contextlib.suppress(OSError):
                more = await stack.enter_async_context(listener.raw())
                await more.closed()
        await eventually(lambda: listener.connections() == 4, "as many as may be")
        async with listener.channel() as channel:

            async def is_refused() -> bool:
                # `native` accepts the connection and answers briefly.
                return (await call(channel, ECHO)).code is grpc.StatusCode.UNAVAILABLE

            await eventually(is_refused, "a gRPC client is refused")
        for raw in first:
            await raw.until(http2.DATA, raw.call(ECHO, b"as ever"))
        first[0].abort()
        await eventually(lambda: listener.connections() == 3, "one is gone")
        async with listener.channel() as channel:
            assert (await call(channel, ECHO, wait_for_ready=True)).ok


async def test_the_guard_affects_no_other_socket(serve: Serve) -> None:
    """While connections open, close and are cut, the guard never cuts another socket of the
    process, although the kernel reuses the numbers of closed sockets at once."""
    stop = False

    def others() -> int:
        """Open and close sockets as a database pool does, and check that they are intact."""
        rounds = 0
        while not stop or rounds < 100:
            rounds += 1
            pairs = [socket.socketpair() for _ in range(5)]
            for one, two in pairs:
                one.sendall(b"x")
                assert two.recv(1) == b"x"
            for pair in pairs:
                for end in pair:
                    end.close()
        return rounds

    async with serve("native", connections_max=2) as listener:
        guard = ConnectionGuard([listener.address], Limits(connections_max=2))

        def inspect() -> None:
            while not stop:
                guard.inspect()

        threads = [asyncio.create_task(asyncio.to_thread(work)) for work in (others, inspect)]
        cut = 0
        for _ in range(60):
            async with contextlib.AsyncExitStack() as stack:
                raws = [await stack.enter_async_context(listener.raw()) for _ in range(6)]
                # Any of them may stay: connections that are first seen at the same time have no
                # order.
                left = {asyncio.create_task(raw.closed()) for raw in raws}
                while len(left) > 2:
                    done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    for closed in done:
                        closed.result()
                        cut += 1
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
        stop = True
        await asyncio.gather(*threads)
        assert cut


# --- Handshakes


@pytest.mark.parametrize("name", TCP)
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2"])
async def test_unfinished_handshake(serve: Serve, name: str, said: bytes) -> None:
    """A client that connects and does not continue is disconnected; a client in the middle of a
    call is not."""
    async with serve(name, handshake=0.6) as listener, listener.raw() as good:
        await good.open()
        going_on = good.call(WAIT, b"")
        host, _, port = listener.address.rpartition(":")
        with socket.create_connection((host, int(port))) as bad:
            bad.setblocking(False)
            bad.sendall(said)
            async with asyncio.timeout(WAIT_SECONDS):
                with contextlib.suppress(ConnectionResetError):
                    # The settings frame may arrive before the end.
                    while await asyncio.get_running_loop().sock_recv(bad, 1 << 16):
                        pass
        listener.release.set()
        await good.until(http2.DATA, going_on)


# --- Pings


@pytest.mark.parametrize("name", GRPCIO)
async def test_ping_flood(serve: Serve, name: str) -> None:
    """A client that pings continuously gets GOAWAY (too_many_pings) and is disconnected."""
    async with serve(name) as listener, listener.raw() as raw:
        await raw.open()
        goaway = None
        while goaway is None:
            raw.send(http2.PING, 0, 0, b"12345678")
            async for got in raw.frames():
                if got.kind == http2.GOAWAY:
                    goaway = got
                elif got.kind != http2.PING:
                    continue
                break
        await raw.closed()
        assert struct.unpack(">I", goaway.payload[4:8])[0] == http2.ENHANCE_YOUR_CALM
        assert goaway.payload[8:] == b"too_many_pings"


async def test_ping_flood_native(serve: Serve) -> None:
    """`native` answers pings without a limit. A client that sends pings and reads no answer blocks
    itself: the server stops reading its pings, and later disconnects it."""
    async with (
        serve("native", keepalive=0.4, keepalive_timeout=0.4) as listener,
        listener.raw(receive_buffer=4_096) as raw,
        listener.raw() as other,
    ):
        await raw.open()
        await other.open()
        flood = http2.Frame(http2.PING, 0, 0, b"12345678").encoded() * 1_000
        with contextlib.suppress(OSError):
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    raw.write(flood)
                    await raw.drain()
        await other.until(http2.DATA, other.call(ECHO, b"as ever"))


def test_our_own_pings() -> None:
    """Our client library pings less often than our servers and gRPC's tolerate."""
    assert _channel.KEEPALIVE_TIME_MS > transports.PING_SECONDS_MIN * 1_000
    assert _channel.KEEPALIVE_TIME_MS > 300_000


# --- Resets


@pytest.mark.parametrize("name", LISTENERS)
async def test_rapid_resets(serve: Serve, name: str) -> None:
    """A client that repeatedly opens calls and cancels them at once (CVE-2023-44487) has no more of
    them running than any other client, and others are served meanwhile."""
    async with serve(name) as listener, listener.raw() as raw, listener.raw() as other:
        await raw.open()
        await other.open()
        most = 0
        for _ in range(50):
            for _ in range(100):
                stream = raw.call(WAIT, b"")
                raw.send(http2.RST_STREAM, 0, stream, struct.pack(">I", http2.CANCEL))
            with contextlib.suppress(OSError):
                # At some point `native` sends GOAWAY.
                await raw.drain()
            await other.until(http2.DATA, other.call(ECHO, b"as ever"))
            most = max(most, listener.running)
        assert most <= STREAMS_MAX
        await eventually(lambda: listener.running == 0, "all of them are ended")


# --- Clients that do not read


@pytest.mark.parametrize("name", LISTENERS)
async def test_unanswered_pings(serve: Serve, name: str) -> None:
    """A client that answers no ping is disconnected, with or without calls."""
    async with serve(name, keepalive=0.4, keepalive_timeout=0.4) as listener:
        for calls in (0, 5):
            async with listener.raw() as raw:
                await raw.open()
                for _ in range(calls):
                    raw.call(WAIT, b"")
                await raw.closed(answer_pings=False)
        await eventually(lambda: listener.running == 0, "its calls are ended")


@pytest.mark.parametrize("name", ["native", "grpcio", "grpcio tls"])
async def test_unread_answers(serve: Serve, name: str) -> None:
    """A client that lets answers pile up in the kernel is disconnected, even if it keeps
    sending."""
    async with (
        serve(name, keepalive=0.5, keepalive_timeout=0.5) as listener,
        listener.raw(receive_buffer=4_096) as raw,
    ):
        await raw.open({http2.INITIAL_WINDOW_SIZE: http2.WINDOW_MAX})
        raw.grant(0, http2.WINDOW_MAX - http2.WINDOW_DEFAULT)
        for _ in range(50):
            raw.call(LARGE, b"")

        def is_gone() -> bool:
            # A frame of an ignored type (RFC 9113 §5.5).
            raw.send(0xBB, 0, 0, b"still here")
            return listener.connections() == 0

        await eventually(is_gone, "the connection is ended")


@pytest.mark.parametrize("name", GRPCIO)
async def test_no_window(serve: Serve, name: str) -> None:
    """A client that answers pings, but keeps its flow-control window closed, is disconnected when
    its connection reaches the maximum age."""
    limits = {"connection_age": 0.5, "age_grace": 0.5, "keepalive": 0.2, "keepalive_timeout": 5.0}
    async with serve(name, **limits) as listener, listener.raw() as raw:
        await raw.open({http2.INITIAL_WINDOW_SIZE: 0})
        for _ in range(STREAMS_MAX):
            raw.call(LARGE, b"")
        got = await raw.closed()
        assert any(one.kind == http2.PING for one in got)
        assert not any(one.kind == http2.DATA and one.payload for one in got)


# --- Age


@pytest.mark.parametrize("name", ["grpcio", "grpcio tls"])
async def test_age(serve: Serve, name: str) -> None:
    """A client under load moves from connection to connection and loses no call."""
    async with (
        serve(name, connection_age=0.1, age_grace=WAIT_SECONDS) as listener,
        listener.channel() as channel,
    ):

        async def load() -> None:
            while listener.moved() < 4:
                found = await call(channel, ECHO, b"x" * 100)
                assert found.ok, found

        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*(load() for _ in range(8)))


@pytest.mark.parametrize("name", GRPCIO)
async def test_age_grace(serve: Serve, name: str) -> None:
    """A call in progress when its connection reaches the maximum age continues; an endless stream
    ends after the grace period."""
    async with (
        serve(name, connection_age=0.3, age_grace=WAIT_SECONDS) as listener,
        listener.raw() as raw,
    ):
        await raw.open()
        raw.call(STREAM, b"x")
        await raw.until(http2.GOAWAY)
        short = raw.call(ECHO, b"sent before it knew")
        await raw.until(http2.DATA, short)
        await eventually(lambda: listener.running == 1, "the stream goes on")
    async with serve(name, connection_age=0.3, age_grace=0.5) as listener:
        async with listener.raw() as raw:
            await raw.open()
            raw.call(STREAM, b"x")
            got = await raw.closed()
            assert any(one.kind == http2.GOAWAY for one in got)
        await eventually(lambda: listener.running == 0, "the stream is ended")


@pytest.mark.parametrize("name", ["native", "grpcio"])
async def test_no_age(serve: Serve, name: str) -> None:
    """0 disables the maximum age, and `native` never closes a connection for its age."""
    age = 0.0 if name == "grpcio" else 0.1
    async with serve(name, connection_age=age, age_grace=0.1) as listener, listener.raw() as raw:
        await raw.open()
        await asyncio.sleep(0.5)
        await raw.until(http2.DATA, raw.call(ECHO, b"as ever"))
        assert os.getpid()
