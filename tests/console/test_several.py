"""Two processes of the console behind a load balancer that sends each request to the other one."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.console.balancer import Balancer, balancer
from tests.console.browsing import Browser, texts
from tests.console.conftest import World
from tests.console.processes import Console, run
from tests.console.test_create import SECRET, everything_kept, shown_secret
from tests.console.test_openid import provider, sign_in
from tests.helpers.free_ports import free_port
from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.xdist_group("browser")


@dataclass
class Pair:
    """Two processes with one key, and what is in front of them."""

    front: Balancer
    folder: Path
    arguments: tuple[str, ...]
    processes: dict[int, Console]

    def start(self, port: int) -> None:
        """Start the process that listens on a port."""
        (other,) = (name for name in self.front.ports if name != port)
        self.processes[port] = Console(
            self.folder / str(port),
            *("--listen", f"127.0.0.1:{port}", "--peer", f"127.0.0.1:{other}"),
            *self.arguments,
        )
        run(self.processes[port].url())
        run(eventually(lambda: healthy(port), "the process serves"))

    def restart(self, port: int) -> None:
        """Stop a process, and start it again."""
        assert self.processes[port].end() == 0
        self.start(port)

    def end(self) -> None:
        """Stop both."""
        for process in self.processes.values():
            process.end()

    @property
    def log(self) -> str:
        return "".join(process.log for process in self.processes.values())


def healthy(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://127.0.0.1:{port}/healthz", verify=NO_AUTHORITIES).status_code == 200
        )
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def pair(backend: tuple, scratch: Path) -> Iterator[Pair]:
    """Two processes with sign-in by OpenID."""
    folder = scratch / "several"
    folder.mkdir()
    key = folder / "state.key"
    key.write_bytes(base64.b64encode(secrets.token_bytes(32)) + b"\n")
    key.chmod(0o600)
    with ExitStack() as stack:
        front = stack.enter_context(balancer(free_port(), free_port()))
        issuer = stack.enter_context(provider(front.url))
        arguments = (
            *("--target", backend[0].address, "--public-url", front.url),
            *("--oidc-issuer", issuer, "--oidc-client-id", "page"),
            *("--state-key-file", str(key)),
        )
        running = Pair(front, folder, arguments, {})
        stack.callback(running.end)
        for port in front.ports:
            running.start(port)
        yield running


def test_every_change_works_across_processes(
    browser: Browser, world: World, pair: Pair, script: bool
) -> None:
    """Sign in, create, replace, edit, delete, delete several and sign out: each form and the page
    after it are served by different processes, with JavaScript and without."""
    front = pair.front
    world.account = f"several-{script}"
    for name in ("first", "second", "third"):
        world.create(name)
    browser.reset(front.url, None)
    browser.open()
    sign_in(browser, world.account)
    browser.scripts(on=script)
    browser.open()
    assert browser.text(".who bdi") == world.account

    browser.click("#generate")
    browser.type("#name", "deploy job")
    browser.click("#add")
    secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    if not script:
        browser.driver.refresh()
        assert "already been shown" in browser.text("dialog h2")
        browser.driver.refresh()
        assert "already been shown" in browser.text("dialog h2")
    assert not SECRET.search(str(browser.cdp("Network.getAllCookies")))
    browser.open()
    assert secret not in everything_kept(browser)

    token = world.tokens()["deploy job"]
    browser.click(f"#{token.id} [data-act=replace]")
    browser.click("dialog label:has([value=now])")
    browser.click("#confirm")
    replaced = shown_secret(browser)
    assert world.verdict(replaced) == "VERDICT_VALID"
    assert world.verdict(secret) != "VERDICT_VALID"
    browser.open(f"/edit?id={token.id}")
    browser.type("#description", "nightly")
    browser.click("#save")
    assert "Saved deploy job" in browser.text("#notice")
    assert world.tokens()["deploy job"].description == "nightly"

    browser.open(f"/delete?id={token.id}")
    browser.click("#confirm")
    assert "Deleted deploy job (Read)" in browser.text("#notice")
    browser.driver.refresh()
    browser.find("#rows")
    assert not browser.all("#notice"), "the receipt is shown once"
    assert world.verdict(replaced) == "VERDICT_DELETED"

    for name in ("first", "second"):
        browser.click(f"#{world.tokens()[name].id} .pick")
    browser.click("#delete-picked")
    browser.click("#confirm")
    assert "Deleted 2 tokens" in browser.text("#notice")
    assert texts(browser.all("#rows th bdi")) == ["third"]

    cookies = {c["name"]: c["value"] for c in browser.cdp("Network.getAllCookies")["cookies"]}
    assert [status(port, front, cookies) for port in front.ports] == [200, 200]
    browser.scripts(on=True)
    browser.click(".who button")
    browser.click("[name=logout]")
    browser.until(lambda: "/signed-out" in browser.driver.current_url, "the signed-out page")
    browser.console_errors()
    browser.open()
    assert "/sign-in" not in browser.driver.current_url
    assert browser.all("[name=login]"), "the provider asks who signs in"
    browser.console_errors()
    # Copies of the cookies are worthless, in both processes.
    assert [status(port, front, cookies) for port in front.ports] == [303, 303]
    for port in front.ports:
        requests = front.served[port]
        assert any(request.startswith("POST") for request in requests)
        assert any(request.startswith("GET") for request in requests)
    assert "Traceback" not in pair.log
    assert replaced not in pair.log


def status(port: int, front: Balancer, cookies: dict[str, str]) -> int:
    """Return the status of the list from one process, for a browser with these cookies."""
    host = front.url.removeprefix("http://")
    return httpx.get(
        f"http://127.0.0.1:{port}/", cookies=cookies, headers={"host": host}
    ).status_code


def test_sign_in_and_sign_out_outlive_a_restart(browser: Browser, world: World, pair: Pair) -> None:
    """A process that restarts still knows who is signed in, and which sessions have ended."""
    front = pair.front
    browser.reset(front.url, None)
    browser.open()
    sign_in(browser, "restarted")
    cookies = {c["name"]: c["value"] for c in browser.cdp("Network.getAllCookies")["cookies"]}
    first, second = front.ports
    pair.restart(first)
    assert [status(port, front, cookies) for port in front.ports] == [200, 200]
    browser.open()
    browser.click(".who button")
    browser.click("[name=logout]")
    browser.until(lambda: "/signed-out" in browser.driver.current_url, "the signed-out page")
    browser.console_errors()
    pair.restart(second)
    assert [status(port, front, cookies) for port in front.ports] == [303, 303]
    pair.restart(first)
    assert [status(port, front, cookies) for port in front.ports] == [303, 303]
