"""Peers with a link-local IPv6 address, whose names have a zone."""

import asyncio
import shutil
import subprocess
import sys
from typing import Any

import grpc
import pytest
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.transports import Limits

from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS

# The loopback interface of a network namespace of this test gets such an address.
ADDRESS = "fe80::1"
NAMESPACE = (
    "unshare",
    "--net",
    "--map-root-user",
    "sh",
    "-c",
    f'ip link set lo up && ip -6 address add {ADDRESS}/64 dev lo nodad && exec "$@"',
    "sh",
)


def test_the_guard_finds_a_link_local_peer() -> None:
    """The guard ends the connection of a peer whose name has a zone, as gRPC reports it."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs unshare and ip")
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not allow network namespaces")
    command = [*NAMESPACE, sys.executable, "-m", __name__]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 0, done.stderr


async def main() -> None:
    """Serve a link-local client, and end its connection."""
    peers: list[str] = []

    async def serve(_: bytes, context: Any) -> bytes:
        peers.append(context.peer())
        return b""

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x", {"y": handler}),))
    port = server.add_insecure_port("[::]:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"[{ADDRESS}%lo]:{port}") as channel:
        call: Any = channel.unary_unary("/x/y")
        await call(b"", timeout=WAIT_SECONDS)
        guard = ConnectionGuard([f"[::]:{port}"], Limits())
        (peer,) = peers
        assert "%25" in peer, peer
        assert guard.end(peer)
        guard.inspect()
        assert guard.ended == {"refused": 1}, (peer, guard.ended)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
