"""The page's usage examples for a new token work as printed."""

from __future__ import annotations

import asyncio
import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
import uvicorn
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from latchkey import Scope, Verifier
from latchkey.guards import current_token_or_none
from latchkey.guards.asgi import GuardMiddleware
from latchkey.guards.grpc import GuardInterceptor
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.console.asgi import form, send, visitor
from tests.integration.docs.test_readme_grpcurl import grpcurl  # noqa: F401 - a fixture

pytestmark = pytest.mark.xdist_group("readme")

COMMAND_SECONDS = 30.0


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


async def lines(address: str) -> tuple[str, dict[str, str]]:
    """Create a token on the page. Return its secret and the example lines by name."""
    async with visitor(address, account="acme") as browser:
        made = await send(browser, "/tokens", await form(browser))
        page = (await browser.get(made.headers["location"])).text
    secret = re.search(r'<code id="secret"[^>]*>(.+?)</code>', page)
    assert secret is not None
    found = re.findall(r'<code id="use-(\w+)">(.+?)</code>', page, re.DOTALL)
    return secret[1], {name: html.unescape(text) for name, text in found}


async def bash(script: str, typed: str, *paths: Path) -> str:
    """Run a script in bash with `typed` as its standard input. Return its output."""
    path = os.pathsep.join([*map(str, paths), os.environ["PATH"]])

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            input=typed,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )

    done = await asyncio.to_thread(run)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(address: str) -> None:
    """After the `read` line, the curl line passes the guard of an HTTP service."""

    async def hello(_: Request) -> PlainTextResponse:
        token = current_token_or_none()
        return PlainTextResponse(f"hello {token.account_id if token else 'nobody'}\n")

    secret, use = await lines(address)
    async with Verifier(address, timeout_seconds=20) as verifier:
        app = GuardMiddleware(Starlette(routes=[Route("/", hello)]), verifier)
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan="off")
        )
        # uvicorn's signal handling works only in the main thread and is not needed here.
        serving = asyncio.create_task(server._serve())
        try:
            while not server.started:
                assert not serving.done()
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            line = use["curl"].replace("https://api.example.com/", f"http://127.0.0.1:{port}/")
            said = await bash(f"{use['read']}\n{line} --silent", f"{secret}\n")
            assert said == "hello acme\n"
        finally:
            server.should_exit = True
            await serving


async def test_grpcurl(address: str, grpcurl: Path) -> None:  # noqa: F811 - the fixture
    """The grpcurl line passes the guard of a gRPC service without the secret in an argument."""
    secret, use = await lines(address)
    reflected = "ServerReflection/ServerReflectionInfo"
    public = {f"/grpc.reflection.{version}.{reflected}" for version in ("v1", "v1alpha")}
    async with Verifier(address, timeout_seconds=20) as verifier:
        server = grpc.aio.server(
            interceptors=[GuardInterceptor(verifier, Scope.READ, public=public)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        reflection.enable_server_reflection(
            ["grpc.health.v1.Health", reflection.SERVICE_NAME], server
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            line = (
                use["grpcurl"]
                .replace("api.example.com:443", f"-plaintext 127.0.0.1:{port}")
                .replace("package.Service/Method", "grpc.health.v1.Health/Check")
            )
            script = f"{use['read']}\n{line}"
            assert secret not in script
            assert "SERVING" in await bash(script, f"{secret}\n", grpcurl.parent)
        finally:
            await server.stop(None)
