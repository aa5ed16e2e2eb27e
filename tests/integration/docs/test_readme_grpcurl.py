"""The README's commands and examples, run exactly as printed, against `make run`.

The tests replace only what they cannot share: the port, and the path of the virtual environment.
"""

import asyncio
import fcntl
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from latchkey import Client, Scope

from tests.helpers.repository import ROOT

pytestmark = pytest.mark.xdist_group("readme")

README = (ROOT / "README.md").read_text("utf-8")
SETTINGS = (ROOT / "docs/settings.md").read_text("utf-8")
BLOCK = re.compile(r"^<!-- test: ([a-z ]+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:50051"
GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
WELCOME = re.compile(r"Latchkey serves on (\S+) ")
START_SECONDS = 60.0  # Creating a database on a slow disk; usually the start takes two seconds.
STOP_SECONDS = 20.0
COMMAND_SECONDS = 60.0
INSTALL_SECONDS = 300.0


def blocks(mark: str) -> list[str]:
    """Return the blocks with this mark, in order, of the README and docs/settings.md."""
    found = [text for name, text in BLOCK.findall(README + SETTINGS) if name == mark]
    assert found, f"there is no block marked {mark!r}"
    return found


@dataclass(frozen=True)
class Running:
    """A service that `make run` started. `welcome` is the line that it printed."""

    address: str
    welcome: str


@pytest.fixture(scope="module")
def service(scratch: Path) -> Iterator[Running]:
    """A service started by the README's own command, on a free port, with a separate data
    directory."""
    (command,) = blocks("make run")
    stamp = f"{sys.prefix}/.run"
    # The tests run with the installed packages: make must not reinstall them meanwhile.
    command = command.replace("make ", f"make -o '{stamp}' VENV='{sys.prefix}' ")
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=ROOT,
        env=clean_environment()
        | {"LATCHKEY_LISTEN": "127.0.0.1:0", "LATCHKEY_DATA_DIR": str(scratch / "readme")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        welcome = ""
        while "Create\n" not in welcome:
            line = lines.get(timeout=START_SECONDS)
            assert line, f"make run ended early, with: {welcome!r}"
            welcome += line
        match = WELCOME.search(welcome)
        assert match is not None, welcome
        yield Running(match[1], welcome)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            with_it_all_gone(process.pid)
        reader.join(STOP_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def with_it_all_gone(group: int) -> None:
    """Kill the remaining processes of a group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def clean_environment() -> dict[str, str]:
    """Return the environment without the variables that an outer make passes to an inner one."""
    return {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


@pytest.fixture(scope="session")
def grpcurl() -> Path:
    """The real grpcurl: an installed one, otherwise one installed by the README's command."""
    go = shutil.which("go")
    places = [Path.home() / "go/bin/grpcurl", ROOT / ".tools/bin/grpcurl"]
    if go is not None:
        gopath = subprocess.run(
            [go, "env", "GOPATH"], capture_output=True, text=True, check=False, timeout=30
        ).stdout.strip()
        if gopath:
            places.insert(0, Path(gopath) / "bin/grpcurl")
    if (on_path := shutil.which("grpcurl")) is not None:
        return Path(on_path)
    for place in places:
        if os.access(place, os.X_OK):
            return place
    if go is None:
        pytest.skip("neither grpcurl nor a Go toolchain is installed")
    target = ROOT / ".tools/bin"
    target.mkdir(parents=True, exist_ok=True)
    # One of several test processes installs it, and the others wait.
    with (target.parent / "grpcurl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "grpcurl").exists():
            (command,) = blocks("grpcurl install")
            done = subprocess.run(
                ["bash", "-c", command],
                env=os.environ | {"GOBIN": str(target)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=INSTALL_SECONDS,
            )
            if done.returncode != 0:
                pytest.skip(f"grpcurl could not be installed: {done.stderr.strip()[-300:]}")
    return target / "grpcurl"


def bash(script: str, address: str, path: Path | None = None) -> str:
    """Run lines as a user would paste them; each must succeed. Return the output."""
    script = script.replace(ADDRESS, address).replace(".venv/bin/", f"{sys.prefix}/bin/")
    environment = os.environ | {"LATCHKEY_TARGET": address}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_grpcurl_lines(service: Running, grpcurl: Path) -> None:
    """The grpcurl lines, pasted one after another, do what the README says."""
    parts = blocks("grpcurl")
    output = bash("\n".join([*parts, 'echo "id=$ID"']), service.address, grpcurl.parent)
    verdicts = re.findall(r'"verdict": "(\w+)"', output)
    assert verdicts == ["VERDICT_VALID", "VERDICT_DELETED"]
    assert "latchkey.v1.TokenService\n" in output
    assert "rpc BatchVerify" in output
    assert '"name": "deploy"' in output
    assert '"receipt"' in output
    assert re.search(r"^id=tok_\w+$", output, re.MULTILINE)
    assert not re.search(r"lk_\w{57}", output), "the secret is shown to nobody"


def test_no_line_puts_a_secret_on_a_command_line() -> None:
    """Every line of the README passes secrets on standard input."""
    text = "\n".join(block for _, block in BLOCK.findall(README)).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "$SECRET" in line]
    assert len(commands) >= 4
    for command in commands:
        assert "$SECRET" not in command.partition("<<<")[0], command


def test_welcome_line(service: Running, grpcurl: Path) -> None:
    """The example line that `make run` prints works as printed."""
    line = service.welcome.partition("Try it:\n")[2]
    assert '"secret": "lk_' in bash(line, service.address, grpcurl.parent)


def test_grpcurl_install_line() -> None:
    """The README installs the grpcurl version that these tests use."""
    assert blocks("grpcurl install") == [f"go install {GRPCURL}\n"]


@pytest.mark.skipif(
    importlib.util.find_spec("latchkey_cli.main") is None, reason="there is no command line yet"
)
def test_command_line(service: Running) -> None:
    """The command-line example finds a new token valid, deletes it, and finds it deleted."""
    output = bash("\n".join(blocks("cli")), service.address)
    assert re.findall(r"\b(VALID|DELETED|exit code \d+)\b", output) == [
        "VALID",
        "DELETED",
        "exit code 5",
    ]


def test_config(service: Running) -> None:
    """The command that prints the settings prints them."""
    (block,) = blocks("config")
    assert "LATCHKEY_LISTEN" in bash(block, service.address)


def test_python_client(service: Running, tmp_path: Path) -> None:
    """The client example prints what its comments say."""
    (code,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(code.replace(ADDRESS, service.address))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.+)", code), done.stderr


async def test_python_asgi_guard(service: Running) -> None:
    """The ASGI example accepts a valid token and rejects requests without one."""
    app = example("python asgi guard", service)["app"]
    async with (
        Client(service.address) as client,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as browser,
    ):
        created = await client.create("acme", "asgi example", Scope.READ)
        bearer = {"Authorization": f"Bearer {created.secret.reveal()}"}
        assert (await browser.get("/hello")).status_code == 401
        answer = await browser.get("/hello", headers=bearer)
        assert (answer.status_code, answer.text) == (200, "hello acme")
        assert (await browser.post("/hello", headers=bearer)).status_code == 403


async def test_python_grpc_guard(service: Running) -> None:
    """The gRPC example accepts a valid token, rejects calls without one, and requires WRITE where
    it says so."""
    server = example("python grpc guard", service)["make_server"]()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with (
            Client(service.address) as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            created = await client.create("acme", "grpc example", Scope.READ)
            bearer = (("authorization", f"Bearer {created.secret.reveal()}"),)
            public = "/grpc.health.v1.Health/Check"
            assert await status(channel, public, ()) is grpc.StatusCode.OK
            assert await status(channel, "/x.Y/Z", ()) is grpc.StatusCode.UNAUTHENTICATED
            assert await status(channel, "/x.Y/Z", bearer) is grpc.StatusCode.UNIMPLEMENTED
            writes = "/shop.v1.Orders/Create"
            assert await status(channel, writes, bearer) is grpc.StatusCode.PERMISSION_DENIED
    finally:
        await server.stop(None)


async def status(
    channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...]
) -> grpc.StatusCode:
    """Call a method with an empty message and return the status."""
    call: Any = channel.unary_unary(
        method,
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=10)
    async with asyncio.timeout(10):
        code: grpc.StatusCode = await call.code()
    return code


def example(mark: str, service: Running) -> dict[str, Any]:
    """Run an example as a module and return its names."""
    (code,) = blocks(mark)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.replace(ADDRESS, service.address), mark, "exec"), names)  # noqa: S102 - ours
    return names
