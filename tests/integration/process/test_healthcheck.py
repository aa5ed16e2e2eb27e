"""The health check of the container image, run as a module, as the image does."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from latchkey_service.process.healthcheck import target

from tests.helpers.fork_server import Forked
from tests.helpers.waiting import WAIT_SECONDS, eventually

HealthCheck = Callable[[str], Awaitable[tuple[int | None, str]]]


@pytest.fixture
def healthcheck(forked: Forked) -> HealthCheck:
    """Run the health check for an address; return its exit code and output."""

    async def run(listen: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *forked("latchkey_service.process.healthcheck"),
            # A proxy from the environment must not intercept the call.
            env=os.environ | {"LATCHKEY_LISTEN": listen, "http_proxy": "http://127.0.0.1:9"},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(WAIT_SECONDS):
            _, said = await process.communicate()
        return process.returncode, said.decode()

    return run


async def test_health_of_a_server_that_serves(address: str, healthcheck: HealthCheck) -> None:
    """A serving server is healthy, even when its address is the wildcard."""

    async def healthy(listen: str) -> bool:
        code, said = await healthcheck(listen)
        # Health reports SERVING with the first answer of Postgres, shortly after the start. On a
        # busy machine, the check may also reach its time limit.
        assert (code, "latchkey: not serving" in said) in ((0, False), (1, True))
        return code == 0

    await eventually(lambda: healthy(address), "it is healthy")
    wildcard = address.replace("127.0.0.1", "0.0.0.0")  # noqa: S104 - not bound
    await eventually(lambda: healthy(wildcard), "it is healthy at the wildcard")


async def test_health_of_no_server(scratch: Path, healthcheck: HealthCheck) -> None:
    """A server that is absent or does not answer is unhealthy."""
    code, said = await healthcheck(f"unix:{scratch}/nobody.sock")
    assert (code, "UNAVAILABLE" in said) == (1, True)
    accepted: list[asyncio.StreamWriter] = []

    async def silence(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        code, said = await healthcheck(f"127.0.0.1:{port}")
        assert (code, "latchkey: not serving" in said) == (1, True)
        for writer in accepted:
            writer.close()


async def test_health_of_wrong_settings(healthcheck: HealthCheck) -> None:
    """A wrong address is reported and unhealthy."""
    code, said = await healthcheck("nonsense")
    assert (code, "LATCHKEY_LISTEN" in said) == (1, True)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("[fe80::1]:1", "[fe80::1]:1"),
        ("unix:/run/latchkey.sock", "unix:/run/latchkey.sock"),
    ],
)
def test_health_address(listen: str, expected: str) -> None:
    """The health check calls a wildcard address on loopback."""
    assert target(listen) == expected


def test_health_of_any_port() -> None:
    """Port 0 cannot be called, and the error says so."""
    with pytest.raises(ValueError, match="port 0"):
        target("127.0.0.1:0")
