"""The operators' view in a real browser, signed in at a real OpenID provider."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser
from tests.console.conftest import World
from tests.console.processes import console
from tests.console.test_openid import provider, sign_in
from tests.helpers.free_ports import free_port

pytestmark = pytest.mark.xdist_group("browser")

GROUP = "latchkey operators"


@pytest.fixture(scope="module")
def url(backend: tuple, scratch: Path) -> Iterator[str]:
    """The operators' view, for people in a group that the provider's claim names."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with provider(address) as issuer:
        arguments = (
            *("--listen", f"127.0.0.1:{port}", "--target", backend[0].address),
            *("--oidc-issuer", issuer, "--oidc-client-id", "page"),
            *("--operator-group", GROUP),
        )
        with console(scratch / "page-operators", *arguments):
            yield address


def test_an_operator_finds_a_token(
    browser: Browser, url: str, world: World, script: bool, axe: str
) -> None:
    """An operator finds a token by the end of a secret, reads its page, the audit log and the
    servers, by keyboard, with scripts and without, at any width, and signs out."""
    created = world.create("nightly export", description="For the finance team.")
    world.used(created, "orders", 42, timedelta(hours=3))
    browser.scripts(on=True)
    browser.reset(url, None)
    browser.open("/audit")
    sign_in(browser, "op-olga")
    assert browser.driver.current_url == f"{url}/audit"
    browser.scripts(on=script)
    browser.open()
    assert browser.text(".who bdi") == "op-olga"
    browser.focused("#q")
    browser.press(*created.token.hint[-4:], Keys.ENTER)
    row = f"#rows [href='/token?id={created.token.id}']"
    assert browser.text(row) == "nightly export"
    if script:
        browser.accessible(axe, "the search")
        browser.screen("operators-search")
    browser.tab_to(row)
    browser.press(Keys.ENTER)
    assert "orders 42 uses" in browser.text("#usage")
    assert created.token.hint in browser.text("#secrets")
    assert world.account in browser.text(".head")
    if script:
        browser.accessible(axe, "a token's page")
        browser.screen("operators-token")
    browser.click("#all-entries")
    assert "Create" in browser.text("table")
    browser.select("#outcome", "denied")
    browser.click("#show")
    assert "No entries match" in browser.text(".none")
    browser.open("/audit")
    if script:
        browser.accessible(axe, "the audit log")
        browser.screen("operators-audit")
    browser.tab_to(".tabs [href='/servers']")
    browser.press(Keys.ENTER)
    assert "Every process is up to date" in browser.text("#position")
    if script:
        browser.accessible(axe, "the servers")
        browser.screen("operators-servers")
    browser.open("/?q=" + created.token.id)
    assert browser.text("h1") == "nightly export"
    browser.click(".who form button")
    browser.click("[name=logout]")
    assert "You are signed out" in browser.text("main")
    browser.console_errors()


def test_a_whole_secret_is_not_sent(browser: Browser, url: str, world: World) -> None:
    """The browser does not submit a whole secret, even if someone pastes one into the search."""
    created = world.create("pasted")
    browser.reset(url, None)
    browser.open()
    sign_in(browser, "op-olga")
    browser.open()
    browser.type("#q", created.secret)
    browser.click("#find")
    assert browser.driver.current_url == f"{url}/"


@pytest.mark.answers(403)
def test_others_are_refused(browser: Browser, url: str, world: World, axe: str) -> None:
    """A person outside of the group is refused at the sign-in."""
    browser.reset(url, None)
    browser.open()
    sign_in(browser, "mallory")
    assert "You are not an operator" in browser.text("main")
    browser.accessible(axe, "the refusal")
    browser.screen("operators-refused")
    browser.open("/audit")
    assert not browser.all("table")


def test_forced_colours(browser: Browser, url: str, world: World) -> None:
    """With forced colours, the current page and the states stay recognisable."""
    world.create("seen")
    browser.reset(url, None)
    browser.open("/servers")
    sign_in(browser, "op-olga")
    browser.cdp(
        "Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}]
    )
    width = "return getComputedStyle(document.querySelector(arguments[0])).borderBottomWidth"
    assert browser.js(width, ".tabs [aria-current]") == "2px"
    styles = "return getComputedStyle(document.querySelector(arguments[0])).borderBottomColor"
    current = browser.js(styles, ".tabs [aria-current]")
    assert current != browser.js(styles, ".tabs a:not([aria-current])")
    browser.picture("operators-servers-forced")
