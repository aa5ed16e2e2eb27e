"""The ASGI guard with a scripted Latchkey over real gRPC."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc
import httpx
import latchkey
import pytest
from latchkey.guards.asgi import GuardMiddleware
from latchkey_proto.v1 import token_service_pb2 as pb
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from tests.contract.client.conftest import FakeLatchkey

reached: list[str] = []


async def hello(request: Request) -> PlainTextResponse:
    reached.append(request.method)
    return PlainTextResponse(request.scope["latchkey.token"].id)


async def ask(verifier: latchkey.Verifier, method: str, secret: str) -> httpx.Response:
    """Send one request through a guarded application."""
    reached.clear()
    app = Starlette(routes=[Route("/", hello, methods=["GET", "POST"])])
    transport = httpx.ASGITransport(GuardMiddleware(app, verifier))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        return await client.request(method, "/", headers={"authorization": f"Bearer {secret}"})


async def test_a_valid_token_is_accepted(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """Latchkey receives the request's secret, and READ or WRITE depending on the method."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    assert (await ask(verifier, "GET", secret)).text == "t1"
    assert (await ask(verifier, "POST", secret)).text == "t1"
    assert [call.request.required_scope for call in fake.calls] == [pb.SCOPE_READ, pb.SCOPE_WRITE]


@pytest.mark.parametrize(
    ("number", "status"), [(0, 401), (2, 401), (3, 401), (4, 401), (5, 401), (6, 403), (99, 401)]
)
async def test_only_valid_is_accepted(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, number: int, status: int
) -> None:
    """Every other verdict, known or unknown, is refused."""
    fake.on("Verify", fake.verdict(number))
    assert (await ask(verifier, "GET", secret)).status_code == status
    assert reached == []


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", ["status", "internal", "hang", "dead", "silent", "closed"])
async def test_without_latchkey_requests_are_refused(
    fake: FakeLatchkey,
    dead_target: str,
    silent_target: str,
    secret: str,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """If Latchkey is down, hung or failing, the answer is 503 and the application is not called."""
    caplog.set_level(logging.DEBUG)
    answers = {
        "status": fake.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, secret),
        "internal": fake.fails(grpc.StatusCode.INTERNAL, secret),
    }
    fake.on("Verify", answers.get(fault, fake.hangs()))
    target = {"dead": dead_target, "silent": silent_target}.get(fault, fake.target)
    async with latchkey.Verifier(target, timeout_seconds=0.2) as verifier:
        if fault == "closed":
            await verifier.close()
        response = await ask(verifier, "GET", secret)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert reached == []
    assert secret not in caplog.text + response.text + str(response.headers)
