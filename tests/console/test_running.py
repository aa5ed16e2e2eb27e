"""The console as a command: startup, refused settings, shutdown, and `make console`."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import httpx
import pytest
import uvicorn
from latchkey_cli import console as command
from latchkey_console import extra
from latchkey_console import running as page

from tests.checks.distributions import distributions
from tests.console.processes import Console, console, run
from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS, eventually

BLOCK = re.compile(r"^<!-- test: ([a-z ]+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text("utf-8")
SETTINGS = (ROOT / "docs/settings.md").read_text("utf-8")
START_SECONDS = 90.0


def readme(mark: str) -> str:
    """Return the README's code block with this mark, with continued lines joined."""
    (text,) = (text for name, text in BLOCK.findall(README) if name == mark)
    return str(text).replace("\\\n", " ")


def run_tool(
    latchkey: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `latchkey` until it exits."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    return subprocess.run(
        [latchkey, *arguments],
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--account acme --listen 0.0.0.0:0", "loopback only"),
        ("--oidc-issuer https://x --oidc-client-id a --oidc-client-secret-file /no", "cannot read"),
        (
            "--account-header X --trusted-proxy ::1 --public-url https://x --listen a..b:80",
            "cannot listen on",
        ),
    ],
)
def test_unsafe_settings_are_refused(latchkey: Path, arguments: str, words: str) -> None:
    """Unsafe or incomplete settings exit with code 2 and one helpful line."""
    done = run_tool(latchkey, "console", *arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("latchkey: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_settings_from_the_environment(latchkey: Path) -> None:
    """Every option is also an environment variable with the same rules."""
    done = run_tool(
        latchkey, "console", LATCHKEY_CONSOLE_ACCOUNT="acme", LATCHKEY_CONSOLE_LISTEN="192.0.2.1:80"
    )
    assert done.returncode == 2
    assert "loopback only" in done.stderr


def test_needed_libraries_match_the_extra() -> None:
    """The command checks for exactly the libraries that the extra installs."""
    (cli,) = (member for member in distributions(ROOT) if member.name == "latchkey-cli")
    names = {re.split("[<>=]", text)[0] for text in cli.extras["console"]}
    assert names == set(extra.LIBRARIES)


def test_taken_address_is_reported(latchkey: Path) -> None:
    """An address that is already in use is reported and not shared."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_tool(latchkey, "console", "--account", "acme", "--listen", address)
    assert done.returncode == 2
    assert f"cannot listen on {address}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_it_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    """A signal stops it gracefully: exit code 0, its URL in the output, no traceback."""
    running = Console(tmp_path / "page", "--account", "acme", "--target", "127.0.0.1:1")
    try:
        url = run(running.url())
        assert httpx.get(f"{url}/healthz").text == "ok\n"
    finally:
        code = running.end(number)
    assert code == 0
    assert "Traceback" not in running.log
    assert "everyone uses account acme" in running.log


def test_nohup_ignores_a_closed_terminal() -> None:
    """A closed terminal stops it, except under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in page.stopping_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert page.stopping_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_past_the_deadline_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated signals only request the shutdown until its deadline has passed."""
    now = 1_000.0
    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: now))
    server = page._Server(uvicorn.Config(lambda: None))
    for _ in range(3):
        server.handle_exit(signal.SIGINT, None)
        now += page.GRACE_SECONDS / 3
    assert server.should_exit
    now += page.MARGIN_SECONDS + 0.1
    with pytest.raises(KeyboardInterrupt):
        server.handle_exit(signal.SIGINT, None)


# A signal may arrive in a destructor or callback, where Python discards exceptions.
STARTED_AND_STOPPED = """
import contextlib, os, signal, sys, uvicorn
from latchkey_cli.main import main

serve = uvicorn.Server.serve

async def stopped_before(server, sockets):
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    await serve(server, sockets)

uvicorn.Server.serve = stopped_before
sys.exit(main())
"""


def test_signal_during_startup_stops_it() -> None:
    """A signal that arrives before uvicorn handles signals still stops the console."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", STARTED_AND_STOPPED, "console"),
            *("--listen", "127.0.0.1:0", "--account", "acme", "--target", "127.0.0.1:1"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("API Tokens: ")


@contextlib.contextmanager
def asking(url: str, latchkey: socket.socket) -> Iterator[Future[httpx.Response]]:
    """Request the list. Yield once the console waits for a Latchkey that does not answer."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.get, url, timeout=WAIT_SECONDS)
        latchkey.settimeout(WAIT_SECONDS)
        with latchkey.accept()[0]:
            yield asked


def test_second_signal_changes_nothing(tmp_path: Path) -> None:
    """A second Ctrl-C changes nothing: requests in progress are answered without errors."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        running = Console(tmp_path / "page", "--account", "acme", "--target", target)
        try:
            url = run(running.url())
            with asking(url, silent) as asked:
                for _ in range(2):
                    running.send(signal.SIGINT)
                    run(eventually(lambda: refuses(url), "the console accepts no new connections"))
                # Now Latchkey is gone, so the console can answer.
                silent.close()
            assert "The service cannot be reached" in asked.result().text
            assert running.wait() == 0
        finally:
            running.end()
    assert "ERROR" not in running.log


def refuses(url: str) -> bool:
    """Return whether nobody listens at `url` any longer."""
    parts = httpx.URL(url)
    try:
        socket.create_connection((parts.host, parts.port or 80), WAIT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    return False


IMPATIENT = """
import sys
from latchkey_console import running
from latchkey_cli.main import main

running.GRACE_SECONDS = 1
sys.exit(main())
"""


def test_requests_cut_off_at_shutdown_are_logged_in_one_line(tmp_path: Path) -> None:
    """The shutdown does not wait forever for a request, and it logs this without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        start = (sys.executable, "-c", IMPATIENT)
        running = Console(tmp_path / "page", "--account", "acme", "--target", target, start=start)
        try:
            with asking(run(running.url()), silent) as asked:
                running.send(signal.SIGINT)
                assert asked.result().status_code == 500
            assert running.wait() == 0
        finally:
            running.end()
    assert "Cancel 1 running task" in running.log
    assert "Traceback" not in running.log


def test_logs_contain_no_queries_or_names(tmp_path: Path) -> None:
    """Search terms never appear in the log, even when Latchkey is down."""
    with console(tmp_path / "page", "--account", "acme", "--target", "127.0.0.1:1") as (page, url):
        answer = httpx.get(f"{url}/?q=hush")
        assert answer.status_code == 503
        assert "hush" not in page.log
        assert "list failed: UNAVAILABLE" in page.log


def test_readme_commands(tmp_path: Path) -> None:
    """The console starts with each of the README's commands."""
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "client-secret").write_text("a client secret\n")
    commands = readme("console").strip().split("\n")
    assert len(commands) == 2
    for line in commands:
        name, *arguments = line.split()
        assert (name, arguments[0]) == (".venv/bin/latchkey", "console")
        running = Console(folder, *arguments[1:])
        try:
            assert run(running.url()) == "https://tokens.example.com"
        finally:
            assert running.end() == 0


def test_documented_options(latchkey: Path) -> None:
    """docs/settings.md lists every option, in any order, with its variable and default."""
    from latchkey_console import settings

    cells = re.findall(r"^\| `--([a-z-]+)` \| `(LATCHKEY_\w+)` \| (.+?) \|", SETTINGS, re.MULTILINE)
    rows = {option: (variable, default) for option, variable, default in cells}
    shown = run_tool(latchkey, "console", "--help", COLUMNS="200").stdout
    assert {f"--{option}" for option in rows} == set(re.findall(r"(--[a-z-]+)", shown)) - {"--help"}
    variables = {
        name.replace("_", "-"): hint.__metadata__[0].envvar
        for name, hint in get_type_hints(command.console, include_extras=True).items()
        if name != "return"
    }
    assert {option: variable for option, (variable, _) in rows.items()} == variables
    defaults = (settings.CLAIM, settings.LISTEN, settings.TARGET)
    assert tuple(rows[o][1] for o in ("oidc-claim", "listen", "target")) == tuple(
        f"`{value}`" for value in defaults
    )


def test_variable_accepts_several_proxies(latchkey: Path) -> None:
    """The variable accepts several proxy addresses, separated by spaces."""
    done = run_tool(
        latchkey,
        "console",
        LATCHKEY_CONSOLE_ACCOUNT_HEADER="X-User",
        LATCHKEY_CONSOLE_TRUSTED_PROXY="127.0.0.1 10.1.0.0/16 third",
        LATCHKEY_CONSOLE_PUBLIC_URL="https://tokens.example.com",
    )
    assert done.returncode == 2
    assert "--trusted-proxy third: " in done.stderr


def test_make_console_reports_a_failed_service() -> None:
    """If the service does not start, the printed command is complete and usable."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "latchkey_console.together", "team-7"],
        env=clean | {"LATCHKEY_LISTEN": "nowhere"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == 1
    assert done.stderr.endswith(": .venv/bin/latchkey console --account team-7\n")


async def test_make_console_uses_a_running_service(address: str) -> None:
    """Beside a service that is already running, `make console` starts only the console."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "latchkey_console.together", "team-7"),
        env=clean | {"LATCHKEY_LISTEN": address, "LATCHKEY_CONSOLE_LISTEN": "127.0.0.1:0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            first = (await process.stderr.readline()).decode()
            said = ""
            while not (match := re.search(r"API Tokens: (\S+) ", said)):
                line = (await process.stdout.readline()).decode()
                assert line, said
                said += line
            async with httpx.AsyncClient() as browser:
                page = await browser.get(match[1])
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert first == f"Latchkey already serves on {address}. The console uses it.\n"
    assert "No tokens yet" in page.text
    assert ">team-7<" in page.text


@pytest.mark.xdist_group("readme")
def test_make_console(scratch: Path) -> None:
    """`make console` starts service and console, prints the URL, and stops both."""
    command = readme("make console").split()
    # An outer make exports its variables, and its ARGS would become the account.
    outer = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    stamp = f"{sys.prefix}/.run"
    with (scratch / "make-console").open("w+") as output:
        process = subprocess.Popen(
            # Use the installation that runs these tests.
            [command[0], "-o", stamp, f"VENV={sys.prefix}", *command[1:]],
            cwd=ROOT,
            env=environment
            | {
                "LATCHKEY_LISTEN": "127.0.0.1:0",
                "LATCHKEY_CONSOLE_LISTEN": "127.0.0.1:0",
                "LATCHKEY_DATA_DIR": str(scratch / "together"),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            give_up = time.monotonic() + START_SECONDS
            said = ""
            while not (match := re.search(r"API Tokens: (\S+) ", said)):
                assert process.poll() is None, said
                assert time.monotonic() < give_up, said
                time.sleep(0.05)
                output.seek(0)
                said = output.read()
            page = httpx.get(match[1])
            assert page.status_code == 200
            assert "No tokens yet" in page.text
            assert ">acme<" in page.text
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait(2 * WAIT_SECONDS)
    with pytest.raises(httpx.ConnectError):
        httpx.get(match[1])
    # The database has stopped too, so its folder can be removed.
    assert not list((scratch / "together").rglob("postmaster.pid"))
    assert shutil.which("make")
