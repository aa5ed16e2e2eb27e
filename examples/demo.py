"""Shows the promise: when Delete answers, the token is dead in every service.

    make demo

Starts Latchkey with a new database, unless LATCHKEY_TARGET names a running one, and two services in
separate processes: `shop` (HTTP) and `billing` (gRPC). Each verifies from memory. The demo calls
both continually, deletes the token, and prints when each refused it.
"""

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import uvicorn
from grpc_health.v1 import health_pb2
from latchkey import Client, Receipt, Scope, Secret

# Enough to create a database on a slow disk. A typical start takes two seconds.
START_SECONDS = 90.0
STOP_SECONDS = 20.0
# How long both services are called before the Delete, and after it.
BEFORE_SECONDS = 1.0
AFTER_SECONDS = 0.5
# How long the first calls may take, which also open connections.
WARM_SECONDS = 10.0
# A call to every service about every millisecond, which leaves the processor to the services.
PAUSE_SECONDS = 0.001
HERE = Path(__file__).parent


@dataclass
class Log:
    """When each call to a service began and ended (`time.perf_counter`), and whether it was let
    in."""

    name: str
    calls: list[tuple[float, float, bool]] = field(default_factory=list)
    warm: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a call was let in."""


async def shop(address: str, secret: Secret) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Yield the call of the HTTP service, on one connection."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = (
        f"GET /orders HTTP/1.1\r\nHost: {address}\r\n"
        f"Authorization: Bearer {secret.reveal()}\r\n\r\n"
    ).encode()

    async def call() -> bool:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)
        return " 200 " in head.partition("\r\n")[0]

    try:
        yield call
    finally:
        writer.close()


async def billing(address: str, secret: Secret) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Yield the call of the gRPC service, on one connection."""
    bearer = (("authorization", f"Bearer {secret.reveal()}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

        async def call() -> bool:
            try:
                await check(health_pb2.HealthCheckRequest(), metadata=bearer)
            except grpc.aio.AioRpcError:
                return False
            return True

        yield call


async def keep_calling(log: Log, call: Callable[[], Awaitable[bool]]) -> None:
    """Call a service until cancelled, and note each answer."""
    while True:
        start = time.perf_counter()
        allowed = await call()
        log.calls.append((start, time.perf_counter(), allowed))
        if allowed:
            log.warm.set()
        await asyncio.sleep(PAUSE_SECONDS)


async def demonstrate(target: str, addresses: dict[str, str]) -> int:
    """Create a token, use it everywhere, delete it, and report. Return the exit code."""
    async with Client(target) as client:
        created = await client.create("acme", f"demo {os.getpid()}", Scope.READ)
        say(f"Created token {created.token.id}. Both services are called with it continually.")
        logs = [Log("shop"), Log("billing")]
        async with contextlib.AsyncExitStack() as stack:
            tasks = []
            for log, connect in zip(logs, (shop, billing), strict=True):
                opened = contextlib.asynccontextmanager(connect)
                call = await stack.enter_async_context(opened(addresses[log.name], created.secret))
                tasks.append(asyncio.create_task(keep_calling(log, call)))
            async with asyncio.timeout(WARM_SECONDS):
                await asyncio.gather(*(log.warm.wait() for log in logs))
            await asyncio.sleep(BEFORE_SECONDS)
            asked = time.perf_counter()
            receipt = await client.delete("acme", created.token.id)
            answered = time.perf_counter()
            await asyncio.sleep(AFTER_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return report(logs, receipt, asked, answered)


def report(logs: list[Log], receipt: Receipt, asked: float, answered: float) -> int:
    """Print what happened. Return 1 if a service accepted the token too late, otherwise 0."""
    say(
        f"\nDelete answered after {1000 * (answered - asked):.1f} ms. Its receipt: "
        f"{receipt.verifiers_acknowledged} server and {receipt.clients_acknowledged} clients "
        f"confirmed that they dropped the token; {receipt.verifiers_outwaited} servers and "
        f"{receipt.clients_outwaited} clients had to be waited out.\n"
    )
    late = 0
    for log in logs:
        before = [end - start for start, end, _ in log.calls if end < asked]
        refused = min((end for start, end, allowed in log.calls if start > asked and not allowed))
        after = [allowed for start, _, allowed in log.calls if start > answered]
        late += sum(after)
        say(
            f"{log.name:8} {len(before)} calls let in before, {1000 * min(before):.1f} ms at best\n"
            f"{'':8} first refusal {1000 * (refused - asked):.1f} ms after Delete was called\n"
            f"{'':8} {sum(after)} of {len(after)} calls let in after Delete had answered"
        )
    say(
        "\nThe token was dead everywhere when Delete answered."
        if not late
        else f"\n{late} calls were let in too late. Please report this."
    )
    return 1 if late else 0


@contextlib.contextmanager
def started(command: list[str], found: str, **environment: str) -> Iterator[str]:
    """Run a process, yield the address that it prints, and stop it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
        # Ctrl-C must reach only this process, which stops the others in order.
        start_new_session=True,
        text=True,
    )
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        lines = iter(process.stdout.readline, "") if process.stdout is not None else iter(())
        match = next((m for m in (re.search(found, line) for line in lines) if m), None)
        watchdog.cancel()
        if match is None:
            raise SystemExit(f"this did not start; run it alone to see why: {shlex.join(command)}")
        yield match[1]
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def serve_shop() -> None:
    """Run the HTTP service on a free port, and print its address."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"port {self.servers[0].sockets[0].getsockname()[1]}")

    Server(uvicorn.Config("asgi_service:app", port=0, log_level="warning")).run()


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main() -> int:
    """Run everything. Return the exit code."""
    if sys.argv[1:] == ["shop"]:
        serve_shop()
        return 0
    target = os.environ.get("LATCHKEY_TARGET")
    say("Starting Latchkey and two services ..." if target is None else "Starting two services ...")
    try:
        with contextlib.ExitStack() as stack:
            if target is None:
                target = stack.enter_context(latchkey())
            commands = {
                "shop": [sys.executable, str(HERE / "demo.py"), "shop"],
                "billing": [sys.executable, str(HERE / "grpc_service.py"), "0"],
            }
            addresses = {
                name: "127.0.0.1:"
                + stack.enter_context(started(command, r"port (\d+)", LATCHKEY_TARGET=target))
                for name, command in commands.items()
            }
            return asyncio.run(demonstrate(target, addresses))
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def latchkey() -> Iterator[str]:
    """Run Latchkey with a database that is deleted afterwards, and yield its address."""
    # Below /tmp, since Postgres' own account must be able to enter it if root runs this.
    folder = Path(tempfile.mkdtemp(prefix="latchkey-demo-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with started(
            [sys.executable, "-P", "-m", "latchkey_service"],
            r"Latchkey serves on (\S+) ",
            LATCHKEY_LISTEN="127.0.0.1:0",
            LATCHKEY_DATA_DIR=str(folder / "data"),
        ) as target:
            yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
