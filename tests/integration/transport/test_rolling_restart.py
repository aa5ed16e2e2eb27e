"""A rolling restart of three servers behind HAProxy, with the documented settings.

By hand for longer: ROLLS_IN_TEST=5.
"""

import asyncio
import contextlib
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import latchkey
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.programs import INSTALLS, installed_by_apt
from tests.helpers.repository import ROOT
from tests.helpers.service_process import Service
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = [pytest.mark.slow("runs three hosts behind HAProxy"), INSTALLS]

SBIN = "/usr/sbin"
CONFIGURATION = (ROOT / "docs" / "haproxy.cfg").read_text()
HOSTS = "abc"
CALLERS = 6
# Between the calls of a caller: a few hundred verifies per second in all, beside other tests.
PAUSE_SECONDS = 0.01
# As docs/haproxy.cfg says.
DRAIN_SECONDS = 3
CALL_SECONDS = 10.0
END_SECONDS = 10.0
ROLLS = int(os.environ.get("ROLLS_IN_TEST", "1"))


def haproxy() -> str:
    """Return the path of HAProxy; install it where possible."""

    def found() -> str | None:
        return shutil.which("haproxy") or shutil.which("haproxy", path=SBIN)

    installed_by_apt(lambda: found() is not None, ("haproxy",))
    return found() or ""


@contextlib.asynccontextmanager
async def balanced(folder: Path, ports: dict[str, int]) -> AsyncIterator[str]:
    """Run HAProxy in front of the ports with the documented configuration; yield its address."""
    port, text = free_port(), CONFIGURATION
    changes = {"bind :50051": f"bind 127.0.0.1:{port}"}
    for number, (name, own) in enumerate(ports.items(), 1):
        changes[f"server {name} 10.0.0.{number}:50051"] = f"server {name} 127.0.0.1:{own}"
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "haproxy.cfg").write_text(text)
    with (folder / "haproxy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            haproxy(), "-db", "-f", "haproxy.cfg", cwd=folder, stdout=log, stderr=log
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        async with asyncio.timeout(END_SECONDS):
            await process.wait()


class Load:
    """Callers that verify one after another until stopped."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, verify: Callable[[], Any]) -> None:
        self._tasks.append(asyncio.create_task(self._call(name, verify)))

    async def _call(self, name: str, verify: Callable[[], Any]) -> None:
        while not self._over:
            try:
                end = "valid" if await verify() else "refused"
            except (grpc.aio.AioRpcError, latchkey.LatchkeyError) as error:
                end = f"{type(error).__name__}: {error}"
            self.ends[f"{name}: {end}"] += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def stop(self) -> None:
        self._over = True
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*self._tasks)


async def test_a_rolling_restart_behind_haproxy_loses_no_call(
    database_url: str, pepper_file: Path, tmp_path: Path
) -> None:
    """While each of three servers in turn stops and starts again, every verify of plain stubs with
    the documented service config, and of the client library, is answered with VALID."""
    ports = {name: free_port() for name in HOSTS}

    def started(name: str, number: int) -> Service:
        return Service(
            tmp_path / f"{name}{number}",
            database_url=database_url,
            pepper_file=pepper_file,
            listen=f"127.0.0.1:{ports[name]}",
            drain_seconds=DRAIN_SECONDS,
            log_format="json",
        )

    services: dict[str, Service] = {}

    def clean_up() -> None:
        for service in services.values():
            service.clean_up()

    config = (ROOT / "docs" / "service-config-balancer.json").read_text()
    options = (("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1))
    load = Load()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(clean_up)
        for name in HOSTS:
            services[name] = started(name, 0)
        for service in services.values():
            await service.welcome()
        target = await stack.enter_async_context(balanced(tmp_path, ports))
        probe = await stack.enter_async_context(grpc.aio.insecure_channel(target))
        await eventually(lambda: is_serving(probe), "HAProxy has found a server")
        created = await pb_grpc.TokenServiceStub(probe).Create(
            pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ), timeout=CALL_SECONDS
        )
        question = pb.VerifyRequest(secret=created.secret)

        def plain(stub: Any) -> Callable[[], Any]:
            async def verify() -> bool:
                answer = await stub.Verify(question, timeout=CALL_SECONDS)
                return bool(answer.verdict == pb.VERDICT_VALID)

            return verify

        for _ in range(CALLERS):
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(target, options=options)
            )
            load.start("stub", plain(pb_grpc.TokenServiceStub(channel)))
        client = await stack.enter_async_context(latchkey.Client(target))

        async def by_library() -> bool:
            return bool(await client.verify(created.secret))

        load.start("library", by_library)
        for number in range(1, ROLLS + 1):
            for name in HOSTS:
                assert await services[name].end() == 0
                services[name] = started(name, number)
                await services[name].welcome()
                before = load.ends.total()
                await eventually(lambda: load.ends.total() > before + 50, "calls go on")  # noqa: B023
        await load.stop()
    print(load.ends)  # noqa: T201 - pytest shows it with a failure
    assert set(load.ends) == {"stub: valid", "library: valid"}
    assert load.ends["stub: valid"] > 100 * ROLLS
