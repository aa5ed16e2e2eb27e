"""The page inside a product: below a path behind a proxy, framed, with a theme and a logo."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.balancer import balancer
from tests.console.browsing import DESK, HEIGHTS, PHONE, Browser, texts
from tests.console.conftest import World
from tests.console.processes import console
from tests.console.test_create import shown_secret
from tests.helpers.free_ports import free_port
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.xdist_group("browser")

BASE = "/settings/tokens"
LOGO = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 60 24">'
    b'<rect width="60" height="24" rx="4" fill="#0b6e4f"/></svg>'
)
THEME = re.search(
    r"<!-- test: console theme -->\n```css\n(.+?)```",
    (ROOT / "docs/console.md").read_text("utf-8"),
    re.DOTALL,
)
BACKGROUND = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"


@dataclass
class Product:
    """A product with the page in it."""

    url: str
    """The page below its path, behind a proxy."""
    plain: str
    """The same page with its header, at the root of another address."""
    parent: str
    """A page that may frame `plain`."""
    stranger: str
    """A page that may not."""


class _Parent(BaseHTTPRequestHandler):
    framed = ""

    def do_GET(self) -> None:
        page = (
            '<!doctype html><html lang="en"><title>Settings</title><h1>Settings</h1>'
            f'<iframe src="{self.framed}" title="API tokens" allow="clipboard-write" '
            'width="1200" height="700"></iframe></html>'
        )
        found = self.path == "/"
        self.send_response_only(200 if found else 204)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page.encode() if found else b"")


@contextmanager
def parent(framed: str, port: int) -> Iterator[str]:
    """Serve a page that frames another one."""
    handler = type("Parent", (_Parent,), {"framed": framed})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def product(backend: tuple, scratch: Path) -> Iterator[Product]:
    """Both consoles, the proxy, and the pages that frame."""
    folder = scratch / "product"
    folder.mkdir()
    (folder / "logo.svg").write_bytes(LOGO)
    assert THEME is not None
    (folder / "theme.css").write_text(THEME[1])
    inner, outer, allowed, other = (free_port() for _ in range(4))
    common = (
        *("--target", backend[0].address, "--product-name", "Acme"),
        *("--account-header", "X-Forwarded-User", "--trusted-proxy", "127.0.0.1"),
        *("--theme-css", str(folder / "theme.css"), "--logo", str(folder / "logo.svg")),
    )
    with ExitStack() as stack:
        front = stack.enter_context(balancer(inner))
        below = ("--base-path", f"{BASE}/", "--no-header", "--public-url", front.url)
        _, url = stack.enter_context(
            console(folder / "inner", *common, *below, "--listen", f"127.0.0.1:{inner}")
        )
        assert url == front.url + BASE
        _, plain = stack.enter_context(
            console(
                folder / "outer",
                *(*common, "--listen", f"127.0.0.1:{outer}"),
                *("--frame-ancestor", f"http://127.0.0.1:{allowed}"),
            )
        )
        yield Product(
            url,
            plain,
            stack.enter_context(parent(plain, allowed)),
            stack.enter_context(parent(plain, other)),
        )


def test_everything_works_below_a_path(
    browser: Browser, world: World, product: Product, script: bool
) -> None:
    """List, filter, dialogs, creation, deletion and history work below the path, behind a proxy
    that keeps it. No request leaves the path."""
    for number in range(55):
        world.create(f"token {number}")
    browser.reset(product.url, world.account)
    browser.scripts(on=script)
    browser.open("")
    browser.find("#rows")
    assert browser.driver.current_url == f"{product.url}/"
    browser.click("#more")
    browser.until(lambda: len(browser.all("#rows tr")) == 55, "all rows")
    browser.open()
    browser.click("#generate")
    browser.type("#name", "embedded")
    browser.click("#add")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"
    if script:
        browser.click("[data-copy]")
    browser.click("#stored")
    browser.gone("dialog")
    browser.click("#sort-expiry")
    browser.until(lambda: "sort=expiry" in browser.driver.current_url, "the order")
    browser.driver.back()
    # The address changes before the list does.
    browser.find("[aria-sort] #sort-newest")
    assert "sort" not in browser.driver.current_url
    browser.type("#q", "embedded")
    if not script:
        browser.click("#filter button")
    browser.until(lambda: texts(browser.all("#rows th bdi")) == ["embedded"], "what was searched")
    token = world.tokens()["embedded"]
    browser.click(f"#{token.id} [data-act=delete]")
    browser.click("#confirm")
    assert "Deleted embedded" in browser.text("#notice")
    assert browser.driver.current_url.startswith(f"{product.url}/")
    paths = {cookie["path"] for cookie in browser.cdp("Network.getAllCookies")["cookies"]}
    assert paths == {f"{BASE}/"}


def test_page_has_the_products_looks(
    browser: Browser, world: World, product: Product, axe: str
) -> None:
    """The theme's colours apply in both schemes and the logo is in the header. Each state remains
    accessible at both widths."""
    world.create("existing", scope=pb.SCOPE_WRITE)
    browser.reset(product.plain, world.account)
    browser.open()
    browser.find("#rows")
    assert browser.js(BACKGROUND, "#generate") == "rgb(11, 110, 79)"
    assert browser.js(
        "const logo = document.querySelector('.brand img');"
        " return logo.complete && logo.naturalWidth > 0 && logo.height === 24"
    )
    assert browser.text(".brand") == "Acme"
    browser.look(DESK, dark=True)
    assert browser.js(BACKGROUND, "#generate") == "rgb(111, 211, 177)"
    browser.accessible(axe, "the list with a theme")
    browser.screen("theme-list")
    browser.click("#generate")
    browser.find("#add")
    browser.accessible(axe, "the form with a theme")
    browser.screen("theme-new")


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_page_without_header_by_keyboard(
    browser: Browser, world: World, product: Product, width: int, axe: str
) -> None:
    """Without its header, the page begins with the list, and everything is reached by keyboard."""
    world.create("existing")
    browser.reset(product.url, world.account)
    browser.look(width)
    browser.open("/")
    browser.find("#rows")
    assert not browser.all("header")
    browser.tab_to("#generate")
    browser.press(Keys.ENTER)
    browser.focused("#name")
    browser.press(*"keyed", Keys.ENTER)
    browser.focused("[data-copy]")
    browser.press(Keys.ENTER)
    browser.tab_to("#stored")
    browser.press(Keys.ENTER)
    browser.gone("dialog")
    browser.focused("#generate")
    assert sorted(world.tokens()) == ["existing", "keyed"]
    if width == PHONE:
        browser.accessible(axe, "the page without its header")
        browser.screen("no-header")


def test_theme_does_not_reach_forced_colours(
    browser: Browser, world: World, product: Product
) -> None:
    """Where the system sets the colours, the theme does not, and buttons keep their borders."""
    world.create("existing")
    browser.reset(product.plain, world.account)
    for width in (DESK, PHONE):
        browser.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=HEIGHTS[width],
            deviceScaleFactor=1,
            mobile=width == PHONE,
        )
        features = [{"name": "forced-colors", "value": "active"}]
        browser.cdp("Emulation.setEmulatedMedia", features=features)
        browser.open()
        browser.find("#generate")
        assert browser.js(BACKGROUND, "#generate") != "rgb(11, 110, 79)"
        border = "return getComputedStyle(document.getElementById('generate')).borderTopStyle"
        assert browser.js(border) == "solid"
        browser.picture(f"theme-forced-{width}")


def test_named_origin_frames_the_page(browser: Browser, world: World, product: Product) -> None:
    """In the frame of a named origin, a person can create, copy and delete a token."""
    world.create("existing")
    browser.reset(product.parent, world.account)
    browser.open()
    browser.driver.switch_to.frame(browser.find("iframe"))
    try:
        browser.click("#generate")
        browser.focused("#name")
        browser.type("#name", "framed")
        browser.click("#add")
        secret = shown_secret(browser)
        assert world.verdict(secret) == "VERDICT_VALID"
        browser.click("[data-copy]")
        browser.until(lambda: browser.find("[data-copy]").text != "Copy", "the feedback")
        browser.click("#stored")
        browser.gone("dialog")
        browser.click("#rows [data-act=delete]")
        browser.click("#confirm")
        browser.find("#notice")
    finally:
        browser.driver.switch_to.default_content()
    browser.picture("framed")
    # The attribute, which the script does not need, has no effect in frames.
    complaints = browser.console_errors()
    assert [said for said in complaints if "Blocked autofocusing" not in said] == []
    assert world.verdict(secret) == "VERDICT_DELETED"


def test_nobody_else_frames_the_page(browser: Browser, world: World, product: Product) -> None:
    """The browser refuses to show the page in the frame of any other origin."""
    world.create("existing")
    browser.reset(product.stranger, world.account)
    browser.open()
    frame = browser.find("iframe")
    complaints: list[str] = []

    def refused() -> bool:
        complaints.extend(browser.console_errors())
        return any("frame-ancestors" in complaint for complaint in complaints)

    browser.until(refused, "the browser's refusal")
    browser.driver.switch_to.frame(frame)
    try:
        assert not browser.all("#rows")
    finally:
        browser.driver.switch_to.default_content()
