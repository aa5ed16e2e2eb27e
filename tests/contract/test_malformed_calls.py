"""Calls that no gRPC library sends, on the level of HTTP/2."""

import asyncio
from collections.abc import Mapping

import hpack
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers import raw_http2 as http2
from tests.helpers.waiting import WAIT_SECONDS

TOKENS = "/latchkey.v1.TokenService/"
REQUESTS = {
    "Verify": pb.VerifyRequest(secret="x"),
    "List": pb.ListRequest(account_id="acme"),
}


async def is_answered(
    address: str,
    method: str,
    *headers: tuple[str, str],
    changed: Mapping[bytes, bytes] | None = None,
) -> bool:
    """Make a call with more headers, or changed ones, and return whether the answer has a
    message.
    """
    async with asyncio.timeout(WAIT_SECONDS), http2.connected(address) as connection:
        await connection.open()
        block = http2.headers(TOKENS + method, *headers)
        if changed:
            fields = [
                (bytes(name), changed.get(bytes(name), bytes(value)))
                for name, value in hpack.Decoder().decode(block, raw=True)
            ]
            block = hpack.Encoder().encode(fields, huffman=False)
        stream = connection.begin(block)
        data = http2.message(REQUESTS[method].SerializeToString())
        connection.send(http2.DATA, http2.END_STREAM, stream, data)
        async for frame in connection.frames():
            if frame.stream == stream and frame.kind == http2.DATA:
                return True
            ended = frame.kind == http2.HEADERS and frame.flags & http2.END_STREAM
            if frame.stream == stream and (ended or frame.kind == http2.RST_STREAM):
                return False
    raise AssertionError("the connection was closed")


@pytest.mark.parametrize("method", REQUESTS)
async def test_malformed_deadlines_are_refused(address: str, method: str) -> None:
    """A call with a malformed deadline is refused, rather than served without one."""
    assert await is_answered(address, method)
    assert await is_answered(address, method, ("grpc-timeout", "5S"))
    for value in ("abc", "-1S", "5", "S", "5s", ""):
        assert not await is_answered(address, method, ("grpc-timeout", value)), value


@pytest.mark.parametrize(
    ("changed", "transports"),
    [
        ({b":method": b"GET"}, {"native"}),
        ({b":path": f"{TOKENS}Verify?x=1".encode()}, {"native"}),
        ({b"content-type": b"text/plain"}, {"native", "grpcio"}),
        ({b"content-type": b"application/json"}, {"native", "grpcio"}),
    ],
)
async def test_unusual_calls(
    address: str, transport: str, changed: dict[bytes, bytes], transports: set[str]
) -> None:
    """Which transport serves a call with an unusual HTTP method, query or content type."""
    assert await is_answered(address, "Verify", changed=changed) == (transport in transports)
