"""The quickstarts in docs/quickstart, with every file and command exactly as printed.

The tests replace only what they cannot share: the ports, and the address of Latchkey.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from latchkey_service.settings.settings import Settings

from tests.helpers.free_ports import free_port
from tests.helpers.programs import (
    INSTALLS,
    TOOLS,
    alone,
    found,
    installed_by_apt,
    missing,
    run,
)
from tests.helpers.repository import ROOT
from tests.helpers.servers import fresh_database, serving_as
from tests.helpers.waiting import eventually
from tests.unit.client.guarded import from_asgi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.slow("runs real frameworks and other languages")

FOLDER = ROOT / "docs/quickstart"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))
BLOCK = re.compile(r"^<!-- test: ([^\n]+) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LATCHKEY = "127.0.0.1:50051"
# Some commands of half a second each, on a busy machine.
COMMAND_SECONDS = 90.0
# Compiles gRPC, if Go's cache is empty.
BUILD_SECONDS = 400.0
STOP_SECONDS = 10.0


@pytest.fixture
def transport() -> str:
    """A client cannot distinguish the transports, so one is enough here."""
    return "native"


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the mark and the text of each block of a page."""
    text = (FOLDER / f"{page}.md").read_text("utf-8")
    return [(mark, code) for mark, _, code in BLOCK.findall(text)]


class Clone:
    """A folder that looks like a clone after `make run`, and the programs that a page starts."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self._address = address
        self._ports: dict[str, str] = {}
        self.path: list[str] = [f"{sys.prefix}/bin"]
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "proto").symlink_to(ROOT / "proto")

    def replaced(self, text: str) -> str:
        """Return a text with the ports and the address of this test."""
        text = text.replace(LATCHKEY, self._address)
        for port, ours in self._ports.items():
            text = re.sub(rf"\b{port}\b", ours, text)
        return text

    def prepare(self, page: str) -> None:
        """Choose the ports of a page and write its files."""
        for mark, _ in blocks(page):
            if mark.startswith("serve "):
                self._ports[mark.removeprefix("serve ")] = str(free_port())
        for mark, code in blocks(page):
            if mark.startswith("file "):
                path = self.folder / mark.removeprefix("file ")
                path.parent.mkdir(exist_ok=True)
                path.write_text(self.replaced(code))

    async def bash(self, script: str) -> asyncio.subprocess.Process:
        """Start lines as a reader would paste them."""
        return await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", self.replaced(script)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.folder,
            env=os.environ
            | {
                "PATH": os.pathsep.join([*self.path, os.environ["PATH"]]),
                "LATCHKEY_TARGET": self._address,
            },
            process_group=0,
        )

    async def output(self, script: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run lines; each must succeed. Return what they print."""
        process = await self.bash(script)
        try:
            async with asyncio.timeout(seconds):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.communicate()
        assert process.returncode == 0, said.decode()
        return said.decode()

    @contextlib.asynccontextmanager
    async def serving(self, page: str) -> AsyncIterator[None]:
        """Run the servers of a page."""
        async with contextlib.AsyncExitStack() as stack:
            for mark, code in blocks(page):
                if mark.startswith("serve "):
                    port = int(self._ports[mark.removeprefix("serve ")])
                    await stack.enter_async_context(self._server(code, port))
            yield

    @contextlib.asynccontextmanager
    async def serving_one(self, page: str, port: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run the server that a page starts on this port."""
        (code,) = [code for mark, code in blocks(page) if mark == f"serve {port}"]
        async with self._server(code, int(self._ports[port])) as process:
            yield process

    @contextlib.asynccontextmanager
    async def _server(self, code: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await self.bash(f"exec {code}")
        said: list[bytes] = []

        async def read() -> None:
            assert process.stdout is not None
            # So that a full pipe cannot stop the server.
            while line := await process.stdout.readline():
                said.append(line)

        reader = asyncio.create_task(read())

        def accepts() -> bool:
            assert process.returncode is None, b"".join(said).decode()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        try:
            await eventually(accepts, f"a server accepts connections on port {port}")
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await reader


def commands(page: str) -> str:
    """Return the commands of a page that a reader pastes one after another."""
    return "\n".join(code for mark, code in blocks(page) if mark == "run")


@pytest.fixture
def clone(tmp_path: Path, address: str) -> Clone:
    return Clone(tmp_path, address)


async def test_python(clone: Clone) -> None:
    """The script prints what the page says."""
    clone.prepare("python")
    said = await clone.output(commands("python"))
    assert said.splitlines() == ["before: VALID", "dead everywhere: True", "after: DELETED"]


async def test_python_over_tls(
    clone: Clone, tmp_path: Path, postgres_url: str, template_url: str, pepper_file: Path
) -> None:
    """The script with `Access` reaches a service that uses the certificates of `latchkey dev-ca`,
    under the policy entry that it prints."""
    said = await clone.output(".venv/bin/latchkey dev-ca --caller me")
    entry = said[said.index("  [callers") : said.index("\nA caller")]
    (tmp_path / "policy.toml").write_text(entry)
    folder = tmp_path / "dev-ca"
    settings = Settings(
        database_url=await fresh_database(postgres_url),
        pepper_file=pepper_file,
        data_dir=tmp_path / "unused",
        listen="127.0.0.1:0",
        grace_seconds=0.2,
        policy=tmp_path / "policy.toml",
        tls_listen="127.0.0.1:0",
        tls_certificate=folder / "server.pem",
        tls_key=folder / "server.key",
        tls_client_ca=folder / "ca.pem",
    )
    clone.prepare("python")
    async with serving_as(settings) as server:
        assert server.tls_address is not None
        script = tmp_path / "secure.py"
        port = server.tls_address.rpartition(":")[2]
        script.write_text(script.read_text().replace("localhost:50052", f"localhost:{port}"))
        assert await clone.output(".venv/bin/python secure.py") == "MALFORMED\n"


@pytest.mark.parametrize(
    ("page", "body"), [("fastapi", '"orders of acme"'), ("flask", "orders of acme\n")]
)
async def test_http_frameworks(page: str, body: str, clone: Clone) -> None:
    """The service answers 401, 200 and 403, as the page says, under the printed server."""
    clone.prepare(page)
    async with clone.serving(page):
        said = await clone.output(commands(page))
    assert re.findall(r"^HTTP/1.1 (\d+)", said, re.MULTILINE) == ["401", "200", "403"]
    assert body in said


async def test_cors(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser's preflight is answered without a token, and a refusal names the origin."""
    clone.prepare("fastapi")
    monkeypatch.syspath_prepend(clone.folder)
    for name in ("cors", "orders"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import orders  # type: ignore[import-not-found]

    exec((clone.folder / "cors.py").read_text(), {})  # noqa: S102 - our own page
    origin = {"origin": "https://app.example.com"}
    asked = {
        "access-control-request-method": "GET",
        "access-control-request-headers": "authorization",
    }
    client: httpx.AsyncClient
    async with from_asgi(orders.app) as client:
        preflight = await client.options("/orders", headers=origin | asked)
        refused = await client.get("/orders", headers=origin)
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin["origin"]


async def test_grpc(clone: Clone) -> None:
    """The guarded server refuses a call without a token and answers one with it."""
    clone.prepare("grpc")
    async with clone.serving("grpc"):
        said = await clone.output(commands("grpc"))
    assert "UNAUTHENTICATED\nstatus: SERVING\n" in said


async def test_envoy(clone: Clone) -> None:
    """Envoy refuses requests as the page says, and a client cannot claim another account."""
    program = Path(sys.prefix) / "bin/envoy"
    if not program.exists():
        missing("Envoy has no wheel for this system")
    clone.prepare("envoy")
    async with clone.serving("envoy"):
        said = await clone.output(commands("envoy"))
    assert re.findall(r"^HTTP/1.1 (\d+)", said, re.MULTILINE) == ["401", "200", "403"]
    assert "orders of acme\n" in said
    assert "www-authenticate: Bearer" in said


@INSTALLS
async def test_nginx(clone: Clone) -> None:
    """The proxy refuses requests as the page says. A client cannot claim another account, and
    without a decision nobody gets in."""
    installed_by_apt(lambda: found("nginx") is not None, ["nginx-light"])
    clone.prepare("nginx")
    async with contextlib.AsyncExitStack() as stack:
        deciding = await stack.enter_async_context(clone.serving_one("nginx", "9000"))
        for port in ("8000", "8080"):
            await stack.enter_async_context(clone.serving_one("nginx", port))
        said = await clone.output(commands("nginx"))
        assert re.findall(r"^HTTP/1.1 (\d+)", said, re.MULTILINE) == ["401", "200", "403"]
        assert "orders of acme\n" in said
        assert len(re.findall(r"^(?i:www-authenticate): Bearer", said, re.MULTILINE)) == 2
        deciding.terminate()
        await deciding.wait()
        said = await clone.output("curl -si http://127.0.0.1:8080/orders")
        assert said.startswith("HTTP/1.1 503")


@INSTALLS
async def test_node(clone: Clone) -> None:
    """The script allows a valid secret only."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("neither node nor npm is here")
    (install,) = [code for mark, code in blocks("node") if mark == "npm"]
    wanted = dict(re.findall(r"(@grpc/[a-z-]+)@([\d.]+)", install))
    assert len(wanted) == 2
    kept = TOOLS / "quickstart-npm"

    def version(name: str) -> str | None:
        path = kept / "node_modules" / name / "package.json"
        return json.loads(path.read_text())["version"] if path.exists() else None

    with alone("quickstart-npm"):
        if {name: version(name) for name in wanted} != wanted:
            kept.mkdir(exist_ok=True)
            command = [*install.split(), "--no-audit", "--no-fund", "--prefix", str(kept)]
            code, output = run(command, BUILD_SECONDS, dict(os.environ))
            if code != 0:
                pytest.skip(f"npm cannot install the packages of the page: {output[-300:]}")
    (clone.folder / "node_modules").symlink_to(kept / "node_modules")
    clone.prepare("node")
    said = await clone.output(commands("node"))
    assert said.splitlines()[-2:] == ["yes VERDICT_VALID", "no VERDICT_MALFORMED"]


@INSTALLS
async def test_go(clone: Clone) -> None:
    """The generated client allows a valid secret only."""
    if shutil.which("go") is None:
        pytest.skip("no Go toolchain is here")
    (install,) = [code for mark, code in blocks("go") if mark == "go install"]
    plugins = TOOLS / "bin"
    plugins.mkdir(parents=True, exist_ok=True)
    with alone("quickstart-go"):
        for package in re.findall(r"^go install (\S+)$", install, re.MULTILINE):
            name = package.rpartition("/")[2].partition("@")[0]
            if not (plugins / name).exists():
                environment = os.environ | {"GOBIN": str(plugins)}
                code, output = run(("go", "install", package), BUILD_SECONDS, environment)
                if code != 0:
                    pytest.skip(f"{name} could not be installed: {output[-300:]}")
    # The same compiler as that of Debian, from the development tools.
    compiler = clone.folder / "bin/protoc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nexec {sys.executable} -m grpc_tools.protoc "$@"\n')
    compiler.chmod(0o755)
    clone.path = [str(compiler.parent), str(plugins), *clone.path]
    clone.prepare("go")
    # After the files, so that `go mod init` finds an empty module, as a reader's does.
    said = await clone.output(commands("go"), BUILD_SECONDS)
    assert said.splitlines()[-2:] == ["true VERDICT_VALID", "false VERDICT_MALFORMED"]


async def test_script_beside_a_clone(clone: Clone) -> None:
    """A script in the folder that contains the clone imports the library, and not the clone, which
    has the same name."""
    (clone.folder / "latchkey/clients").mkdir(parents=True)
    (clone.folder / "script.py").write_text("import latchkey; print(latchkey.Client.__name__)\n")
    assert await clone.output(".venv/bin/python script.py") == "Client\n"


def test_installed_packages() -> None:
    """The packages that the pages install are those with which these tests run."""
    named = set()
    for page in PAGES:
        for mark, code in blocks(page):
            if mark == "install":
                match = re.fullmatch(r"\.venv/bin/pip install (.+)\n", code)
                assert match is not None
                named |= set(match[1].split())
    assert named == {"fastapi", "flask", "gunicorn", "uvicorn"}
    for name in named:
        assert importlib.metadata.version(name)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run(page: str) -> None:
    """Each block of a page is marked, and this module has a test of the page."""
    text = (FOLDER / f"{page}.md").read_text("utf-8")
    marks = [mark for mark, _ in blocks(page)]
    assert len(re.findall(r"^```\w+$", text, re.MULTILINE)) == len(marks) > 1
    known = re.compile(r"run|install|npm|go install|serve \d+|file [\w./]+")
    assert all(known.fullmatch(mark) for mark in marks), marks
    assert f'"{page}"' in Path(__file__).read_text("utf-8")
