"""The health check of the container image, run as the image runs it."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from latchkey_service.process.healthcheck import target

# The health check's own bound is 2 s; the rest is for starting an interpreter on a busy machine.
HEALTHCHECK_SECONDS = 15.0


async def healthcheck(listen: str) -> tuple[int | None, str]:
    """Run the health check as the image does; return its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "latchkey_service.process.healthcheck",
        # A proxy from the environment must not intercept the call.
        env=os.environ | {"LATCHKEY_LISTEN": listen, "http_proxy": "http://127.0.0.1:9"},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(HEALTHCHECK_SECONDS):
        _, said = await process.communicate()
    return process.returncode, said.decode()


async def test_health_of_a_server_that_serves(address: str) -> None:
    """A serving server is healthy, even when its address is the wildcard."""
    # Health reports SERVING with the first answer of Postgres, shortly after the start.
    async with asyncio.timeout(HEALTHCHECK_SECONDS):
        while (await healthcheck(address))[0] != 0:
            pass
    assert await healthcheck(address.replace("127.0.0.1", "0.0.0.0")) == (0, "")  # noqa: S104


async def test_health_of_no_server(scratch: Path) -> None:
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
        assert (code, said != "") == (1, True)
        for writer in accepted:
            writer.close()


async def test_health_of_wrong_settings() -> None:
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
