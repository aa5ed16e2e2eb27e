"""The WSGI examples under gunicorn, with the command in their first lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.free_ports import free_port
from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from tests.helpers.servers import Create

pytestmark = pytest.mark.slow("runs gunicorn")

# Enough workers for requests to reach processes that were forked from one that has not verified.
WORKERS = 2
# gunicorn waits up to 30 s for requests in progress, and here there are none.
STOP_SECONDS = 20.0


@pytest.fixture
def transport() -> str:
    """One transport is enough here."""
    return "native"


@pytest.mark.parametrize("name", ["flask_service", "django_service"])
async def test_under_gunicorn(name: str, address: str, create: Create, stub: Any) -> None:
    """Each process of gunicorn lets a valid token in, and refuses it once Delete has answered."""
    docstring = (ROOT / f"examples/{name}.py").read_text("utf-8").split('"""')[1]
    match = re.search(r"^In production: (gunicorn .+)$", docstring, re.MULTILINE)
    assert match is not None
    program, *arguments = shlex.split(match[1])
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(f"{sys.prefix}/bin/{program}", f"--bind=127.0.0.1:{port}", f"--workers={WORKERS}"),
        *arguments,
        cwd=ROOT,
        env=os.environ | {"LATCHKEY_TARGET": address},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        process_group=0,
    )
    created = await create(scope=pb.SCOPE_READ)
    bearer = {"authorization": f"Bearer {created.secret}"}

    async def status(headers: dict[str, str] | None = None) -> int:
        # A connection for each request, so that all workers get some.
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", verify=NO_AUTHORITIES
        ) as client:
            answer = await client.get("/orders", headers=headers, timeout=WAIT_SECONDS)
            return answer.status_code

    async def answers() -> bool:
        assert process.returncode is None
        with contextlib.suppress(httpx.TransportError):
            return await status() == 401
        return False

    try:
        await eventually(answers, "gunicorn answers")
        for _ in range(4 * WORKERS):
            assert await status(bearer) == 200
        request = pb.DeleteRequest(account_id=created.token.account_id, id=created.token.id)
        await stub.Delete(request, timeout=WAIT_SECONDS)
        for _ in range(4 * WORKERS):
            assert await status(bearer) == 401
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
