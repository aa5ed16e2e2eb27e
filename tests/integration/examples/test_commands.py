"""The commands of examples/README.md and of the first lines of each example, run as printed.

The tests replace only the ports and the address of Latchkey.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.documented import marked, paste
from tests.helpers.free_ports import free_port
from tests.helpers.programs import missing
from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.helpers.servers import Create

EXAMPLES = ROOT / "examples"
# Of the HTTP services, and of the gRPC service.
PORT, GRPC_PORT = "8000", "8080"
# Django's server starts Python twice, on a busy machine.
START_SECONDS = 60.0


@pytest.fixture
def transport() -> str:
    """One transport is enough here."""
    return "native"


def documented(name: str) -> tuple[list[str], list[str]]:
    """Return the commands in an example's first lines: those that serve, and the calls."""
    text = ast.get_docstring(ast.parse((EXAMPLES / name).read_text("utf-8"))) or ""
    commands = re.findall(r"^(?: {4}|In production: )(.+)$", text, re.MULTILINE)
    calls = [command for command in commands if command.startswith("curl ")]
    return [command for command in commands if command not in calls], calls


@contextlib.asynccontextmanager
async def served(command: str, address: str) -> AsyncIterator[str]:
    """Run a server. Yield its port."""
    port = str(free_port())
    if PORT in command or GRPC_PORT in command:
        command = command.replace(PORT, port).replace(GRPC_PORT, port)
    elif command.startswith("gunicorn "):
        command = f"{command} --bind 127.0.0.1:{port}"
    else:
        assert command.startswith("uvicorn ")
        command = f"{command} --port {port}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", f"exec {command}"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
        env={
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "LATCHKEY_TARGET": address,
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        process_group=0,
    )

    def accepts() -> bool:
        assert process.returncode is None, command
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
            return True
        return False

    try:
        await eventually(accepts, f"{command} listens", START_SECONDS)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["asgi", "fastapi", "flask", "django"])
async def test_http_services(name: str, address: str, tmp_path: Path, latchkey: Path) -> None:
    """Each printed server answers the printed call, made with a token from the printed command."""
    if shutil.which("curl") is None:
        missing("not installed here: curl")
    (create,) = marked("examples/README.md", "example token")
    servers, (call,) = documented(f"{name}_service.py")
    assert len(servers) == (2 if name in {"flask", "django"} else 1)
    create = create.replace(".venv/bin/latchkey", str(latchkey)) + 'echo "$SECRET"'
    assert ".venv" not in create
    secret = (await paste(create, tmp_path, LATCHKEY_TARGET=address)).strip()
    for server in servers:
        async with served(server, address) as port:
            script = f"SECRET={secret}\n{call.replace(PORT, port)}"
            said = await paste(script, tmp_path)
        assert said.startswith("HTTP/1.1 200 OK"), server
        assert "orders of acme" in said, server


async def test_grpc_service(address: str, create: Create) -> None:
    """The printed gRPC server answers a call with a token, and refuses one without."""
    created = await create(scope=pb.SCOPE_READ)
    bearer = (("authorization", f"Bearer {created.secret}"),)
    (server,), calls = documented("grpc_service.py")
    assert not calls
    async with (
        served(server, address) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        answer = await stub.Check(request, metadata=bearer, timeout=WAIT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(request, timeout=WAIT_SECONDS)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
