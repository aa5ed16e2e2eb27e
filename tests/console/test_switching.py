"""People with several accounts in a real browser, signed in at a real OpenID provider."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World
from tests.console.processes import console
from tests.console.test_openid import provider, sign_in
from tests.helpers.free_ports import free_port

pytestmark = pytest.mark.xdist_group("browser")

_numbers = itertools.count(1)
_CUT = "const e = document.querySelector(arguments[0]); return e.scrollWidth > e.clientWidth + 1"


@pytest.fixture(scope="module", params=["accounts", "orgs"])
def url(request: pytest.FixtureRequest, backend: tuple, scratch: Path) -> Iterator[str]:
    """A console whose accounts come from a claim: a list of texts, or of objects."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with provider(address) as issuer:
        key = ("--oidc-accounts-key", "id") if request.param == "orgs" else ()
        arguments = (
            *("--listen", f"127.0.0.1:{port}", "--target", backend[0].address),
            *("--oidc-issuer", issuer, "--oidc-client-id", "page"),
            *("--oidc-accounts-claim", request.param, *key),
        )
        with console(scratch / f"page-{request.param}", *arguments):
            yield address


@pytest.fixture
def accounts(world: World) -> tuple[str, str]:
    """Two accounts with a token each."""
    number = next(_numbers)
    both = (f"red-{number}", f"blue-{number}")
    for account in both:
        world.account = account
        world.create(f"of {account}")
    return both


def test_switching(
    browser: Browser, url: str, accounts: tuple[str, str], script: bool, axe: str
) -> None:
    """After the sign-in, people choose an account and switch between them, by keyboard as well.
    The list, its forms and a new token belong to the chosen one, with scripts and without."""
    red, blue = accounts
    browser.scripts(on=True)
    browser.reset(url, None)
    browser.open()
    sign_in(browser, f"zoe+{red}+{blue}")
    browser.scripts(on=script)
    browser.open()
    assert browser.text("h1") == "Choose an account"
    assert texts(browser.all(".accounts bdi")) == [red, blue]
    if script:
        browser.accessible(axe, "the choice of an account")
        browser.screen("accounts")
    browser.tab_to(f".accounts [href$='{red}']")
    browser.press(Keys.ENTER)
    assert browser.text("#rows th bdi") == f"of {red}"
    assert browser.text(".who bdi") == red
    if script:
        for width in (PHONE, DESK):
            browser.look(width)
            browser.find("#switch")
            # Long enough to read, on a phone too.
            assert not browser.js(_CUT, ".who bdi")
        browser.accessible(axe, "the list with a switcher")
        browser.screen("switcher")
    # Filtering stays in the account.
    browser.type("#q", "nothing")
    browser.press(Keys.ENTER)
    browser.find(".none")
    browser.click("#clear")
    assert browser.text("#rows th bdi") == f"of {red}"
    browser.click("#generate")
    browser.type("#name", "second")
    browser.click("#add")
    browser.find("#secret")
    browser.click("#stored")
    browser.find("#rows tr:nth-child(2)")
    browser.click("[data-act=delete]")
    browser.click("#confirm")
    assert "Deleted second" in browser.text("#notice")
    # A reload after a change stays in the account.
    browser.driver.refresh()
    assert browser.text("#rows th bdi") == f"of {red}"

    browser.click("#switch")
    assert browser.text(".accounts [aria-current] bdi") == red
    browser.click(f".accounts [href$='{blue}']")
    assert browser.text("#rows th bdi") == f"of {blue}"
    browser.click(".brand")
    assert browser.text(".who bdi") == blue


def test_two_tabs(browser: Browser, url: str, world: World, accounts: tuple[str, str]) -> None:
    """Of two tabs with two accounts, each deletes a token of its own account, in turn."""
    red, blue = accounts
    browser.reset(url, None)
    browser.open(f"/?account={red}")
    sign_in(browser, f"zoe+{red}+{blue}")
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    try:
        browser.open(f"/?account={blue}")
        browser.click("[data-act=delete]")
        assert f"of {blue}" in browser.text("#delete-title")
        second = browser.driver.current_window_handle
        browser.driver.switch_to.window(first)
        browser.click("[data-act=delete]")
        browser.click("#confirm")
        assert f"Deleted of {red}" in browser.text("#notice")
        browser.driver.switch_to.window(second)
        browser.click("#confirm")
        assert f"Deleted of {blue}" in browser.text("#notice")
    finally:
        for handle in browser.driver.window_handles:
            if handle != first:
                browser.driver.switch_to.window(handle)
                browser.driver.close()
        browser.driver.switch_to.window(first)
    for account in accounts:
        world.account = account
        assert world.tokens() == {}


@pytest.mark.answers(403)
def test_the_next_sign_in_decides(browser: Browser, url: str, accounts: tuple[str, str]) -> None:
    """After a sign-in with fewer accounts, the others are refused. A sign-in with none is refused,
    and ends the one before."""
    red, blue = accounts
    browser.reset(url, None)
    browser.open(f"/?account={red}")
    sign_in(browser, f"yan+{red}+{blue}")
    assert browser.text("#rows th bdi") == f"of {red}"
    for name, refused in ((f"yan+{blue}", "not your account"), ("yan", "do not have an account")):
        browser.click(".who form button") if browser.all(".who form button") else None
        browser.click("[name=logout]")
        browser.find("#main")
        browser.console_errors()
        browser.open(f"/?account={red}")
        sign_in(browser, name)
        assert refused in browser.text("main")
        browser.screen(f"refused-{len(name.split('+'))}")
        if name != "yan":
            browser.click("main .button")
            browser.click(f".accounts [href$='{blue}']")
            assert browser.text("#rows th bdi") == f"of {blue}"
    browser.open(f"/?account={blue}")
    assert not browser.all("#rows")
