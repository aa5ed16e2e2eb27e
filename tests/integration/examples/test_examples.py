"""The services in `examples/`, in their real frameworks, with a real Latchkey."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from django.test.utils import override_settings
from grpc_health.v1 import health_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS
from tests.unit.client.guarded import from_asgi, from_wsgi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.helpers.servers import Create

EXAMPLES = ROOT / "examples"
HTTP: dict[str, Callable[[Any], httpx.AsyncClient]] = {
    "asgi_service": from_asgi,
    "fastapi_service": from_asgi,
    "flask_service": from_wsgi,
    "django_service": from_wsgi,
}
DEMO_SECONDS = 90.0


@pytest.fixture
def transport() -> str:
    """One transport is enough here."""
    return "native"


def loaded(name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run an example as a module, with Latchkey at `address`."""
    monkeypatch.setenv("LATCHKEY_TARGET", address)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@contextlib.asynccontextmanager
async def client_of(
    name: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    async with contextlib.AsyncExitStack() as stack:
        module = loaded(name, address, monkeypatch)
        if name == "django_service":
            from latchkey.sync import Verifier

            # Other tests have configured Django in this process, with other settings.
            verifier = stack.enter_context(Verifier(address, timeout_seconds=WAIT_SECONDS))
            setting = {"VERIFIER": verifier, "PUBLIC": {"/healthz"}, "REALM": "shop"}
            middleware = ["latchkey.guards.django.GuardMiddleware"]
            urls = tuple(module.urlpatterns)
            stack.enter_context(
                override_settings(LATCHKEY=setting, MIDDLEWARE=middleware, ROOT_URLCONF=urls)
            )
            module.app = module.get_wsgi_application()
        elif HTTP[name] is from_wsgi:
            stack.callback(module.verifier.close)
        else:
            stack.push_async_callback(module.verifier.close)
        yield await stack.enter_async_context(HTTP[name](module.app))


@pytest.mark.parametrize("name", HTTP)
async def test_http_services(
    name: str, address: str, create: Create, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each service answers its account, refuses too small a scope, and refuses the token at once
    when Delete has answered."""
    created = await create(scope=pb.SCOPE_READ)
    bearer = {"authorization": f"Bearer {created.secret}"}
    async with client_of(name, address, monkeypatch) as client:
        assert (await client.get("/healthz")).status_code == 200
        refused = await client.get("/orders")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Bearer realm="shop"'
        answer = await client.get("/orders", headers=bearer)
        assert answer.status_code == 200, answer.text
        assert f"orders of {created.token.account_id}" in answer.text
        writes = "/refunds" if name == "django_service" else "/orders"
        assert (await client.post(writes, headers=bearer)).status_code == 403
        await stub.Delete(
            pb.DeleteRequest(account_id=created.token.account_id, id=created.token.id)
        )
        assert (await client.get("/orders", headers=bearer)).status_code == 401


async def test_grpc_service_with_threads(
    address: str, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service with threads runs as its first lines say, and lets in only valid tokens."""
    created = await create(scope=pb.SCOPE_READ)
    bearer = (("authorization", f"Bearer {created.secret}"),)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / "grpc_service.py"), "0", "--threads"),
        env=os.environ | {"LATCHKEY_TARGET": address},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            port = int((await process.stdout.readline()).split()[1])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            request = health_pb2.HealthCheckRequest()
            answer = await check(request, metadata=bearer, timeout=WAIT_SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await check(request, timeout=WAIT_SECONDS)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        process.terminate()
        await process.communicate()


async def test_demo(address: str) -> None:
    """`make demo` shows that no service lets a token in after Delete has answered, and that the
    receipt counts the server and both services."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(EXAMPLES / "demo.py")),
        env=os.environ | {"LATCHKEY_TARGET": address},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEMO_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    said = output.decode()
    assert process.returncode == 0, said
    assert "dead everywhere when Delete answered" in said
    confirmed = re.search(r"(\d+) server and (\d+) clients confirmed", said)
    assert confirmed is not None, said
    assert int(confirmed[1]) + int(confirmed[2]) >= 3
    assert len(re.findall(r"0 of [1-9]\d* calls let in after", said)) == 2


def test_every_example_says_how_to_run_it() -> None:
    """The first lines of each example name its command, and the README lists it."""
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        docstring = path.read_text().split('"""')[1]
        assert "\n\n    " in docstring, path
        assert path.name in listed or path.name == "demo.py"
