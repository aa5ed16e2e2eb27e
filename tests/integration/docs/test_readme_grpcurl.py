"""The README's commands and examples, run exactly as printed, against `make run`.

The tests replace only what they cannot share: the port, and the path of the virtual environment.
"""

import importlib.util
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from latchkey import Client, Scope

from tests.helpers.free_ports import free_port
from tests.helpers.programs import GRPCURL, installed_by_go
from tests.helpers.repository import ROOT

pytestmark = [pytest.mark.slow("installs and runs grpcurl"), pytest.mark.xdist_group("readme")]

README = (ROOT / "README.md").read_text("utf-8")
SETTINGS = (ROOT / "docs/settings.md").read_text("utf-8")
BLOCK = re.compile(r"^<!-- test: ([a-z ]+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:50051"
WELCOME = re.compile(r"Latchkey serves on (\S+) ")
START_SECONDS = 60.0  # Creating a database on a slow disk; usually the start takes two seconds.
STOP_SECONDS = 20.0
COMMAND_SECONDS = 60.0


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
    """The real grpcurl, installed by the README's command if it is missing."""
    return installed_by_go("grpcurl", GRPCURL)


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
    """The example lines that `make run` prints work as printed."""
    # The lines are the same for every service that is configured like this one.
    line, again = re.findall(r"(?<=:\n)((?:  .+\n)+)", service.welcome)
    assert re.match(r"lk_\w{57}\n$", bash(line, service.address))
    assert '"secret": "lk_' in bash(again, service.address, grpcurl.parent)


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


def test_guarded_service_and_its_calls(service: Running, tmp_path: Path) -> None:
    """The guard example runs with the printed command. The printed calls get 401 without a token,
    and the account's name with one."""
    (code,) = blocks("python asgi guard")
    (tmp_path / "guarded.py").write_text(code.replace(ADDRESS, service.address))
    (command,), (calls,) = blocks("guard server"), blocks("guard calls")
    port = free_port()
    command = command.replace(".venv/bin/", f"{sys.prefix}/bin/").replace("8000", str(port))
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not accepts(port):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        said = bash(calls.replace("8000", str(port)), service.address)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
    assert re.findall(r"^HTTP/1.1 (\d+)", said, re.MULTILINE) == ["401", "200"]
    assert said.endswith("hello acme")


def accepts(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


def example(mark: str, service: Running) -> dict[str, Any]:
    """Run an example as a module and return its names."""
    (code,) = blocks(mark)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.replace(ADDRESS, service.address), mark, "exec"), names)  # noqa: S102 - ours
    return names
