"""Creating a token in a real browser: the drawer, its errors, and the single secret display."""

import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")

SECRET = re.compile(r"lk_[0-9A-Za-z]{57}")


def add(browser: Browser, name: str) -> None:
    """Enter a name and press Add New API."""
    browser.type("#name", name)
    browser.click("#add")


def shown_secret(browser: Browser) -> str:
    """Wait for the secret and return it."""
    secret = browser.text("#secret")
    assert SECRET.fullmatch(secret), secret
    return secret


def everything_kept(browser: Browser) -> str:
    """Return everything that the browser retains: page, URL, storage and cookies."""
    return str(
        browser.js(
            "return JSON.stringify([document.documentElement.outerHTML, location.href,"
            " document.cookie, {...localStorage}, {...sessionStorage}, history.state])"
        )
    ) + str(browser.cdp("Network.getAllCookies"))


def test_drawer_defaults_to_the_safe_choices(browser: Browser, world: World, script: bool) -> None:
    """The form asks for name, scope and expiry, preselects Read, and explains least privilege."""
    world.create("existing")
    browser.open()
    browser.click("#generate")
    drawer = browser.text("dialog.drawer")
    assert "Generate New API" in drawer
    assert "API Name" in drawer
    assert "Least privilege" in drawer
    radios = [
        (r.get_attribute("value"), r.is_selected()) for r in browser.all("[name=scope][type=radio]")
    ]
    assert radios == [("read", True), ("write", False)]
    expiries = [r.get_attribute("value") for r in browser.all("[name=expiry]")]
    assert expiries == ["30", "90", "365", "never", "date"]
    browser.focused("#name")
    if script:
        # The drawer is fully visible at the right edge.
        box = browser.find("dialog.drawer").rect
        assert box["x"] + box["width"] == 1440
        assert browser.driver.current_url == f"{browser.url}/"
        browser.screen("new")


def test_secret_is_shown_once(browser: Browser, world: World, script: bool) -> None:
    """The secret works, is shown with usage examples, and can never be shown again."""
    world.create("existing")
    # A filter with a scope accompanies the form, which has a field for a scope as well.
    browser.open("/?access=read")
    browser.open()
    browser.open("/?access=read")
    browser.click("#generate")
    add(browser, "deploy job")
    secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    said = browser.text("dialog")
    assert "will not be shown again" in said
    assert "curl -H @-" in said
    assert "grpcurl -expand-headers" in said
    assert secret not in browser.driver.current_url
    if script:
        browser.until(
            lambda: "deploy job" in browser.text("#rows"), "the updated list behind the dialog"
        )
    address = browser.driver.current_url
    # Reload, back, forward, and the same URL again.
    browser.driver.refresh()
    browser.find("main")
    assert secret not in everything_kept(browser)
    browser.driver.back()
    browser.find("main")
    assert secret not in everything_kept(browser)
    browser.driver.forward()
    browser.find("main")
    assert secret not in everything_kept(browser)
    browser.driver.get(address)
    browser.find("main")
    assert secret not in everything_kept(browser)
    if not script:
        assert "already been shown" in browser.text("dialog h2")
    assert secret not in world.process.log
    assert [*world.tokens()] == ["deploy job", "existing"]


def test_navigating_back_does_not_show_the_secret_again(
    browser: Browser, world: World, script: bool
) -> None:
    """A user who leaves the page with the secret and returns no longer sees the secret."""
    browser.open("/new")
    add(browser, "left alone")
    secret = shown_secret(browser)
    browser.driver.get("about:blank")
    browser.driver.back()
    browser.find("main")
    assert secret not in everything_kept(browser)
    browser.driver.get(f"{browser.url}/?q=left")
    browser.driver.back()
    browser.find("main")
    assert secret not in everything_kept(browser)


def test_late_list_keeps_the_focus(browser: Browser, world: World) -> None:
    """If the list arrives after the user closed the dialog and moved on by keyboard, the focus
    stays where it was."""
    old = world.create("existing").token.id
    browser.open()
    for where in ("#generate", "#access", f"#{old} [data-act=delete]"):
        browser.click("#generate")
        come = threading.Event()
        with world.relay.failing("List", release=come, spares=1):
            add(browser, f"seen from {where}")
            shown_secret(browser)
            browser.click("[data-copy]")
            browser.click("#stored")
            browser.focused("#generate")
            browser.js("document.querySelector(arguments[0]).focus()", where)
            come.set()
        browser.find(f"#{world.tokens()[f'seen from {where}'].id}")
        assert browser.has_focus(where)


def test_copying_and_closing(browser: Browser, world: World) -> None:
    """Copy writes the secret to the clipboard and confirms it. Only the close button closes."""
    browser.cdp(
        "Browser.setPermission",
        permission={"name": "clipboard-write"},
        setting="granted",
        origin=browser.url,
    )
    browser.cdp(
        "Browser.setPermission",
        permission={"name": "clipboard-read"},
        setting="granted",
        origin=browser.url,
    )
    world.create("existing")
    browser.open()
    browser.click("#generate")
    add(browser, "copied")
    secret = shown_secret(browser)
    browser.screen("created")
    browser.press(Keys.ESCAPE, Keys.ESCAPE, Keys.ESCAPE)
    # A click outside the dialog.
    browser.js(
        "document.querySelector('dialog')"
        ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    assert shown_secret(browser) == secret
    # When the list behind the dialog is replaced, the page announces its length.
    browser.until(lambda: len(browser.all("#rows tr")) == 2, "the new token is in the list")
    browser.focused("[data-copy]")
    browser.press(Keys.ENTER)
    # The second text replaces the first after a moment.
    browser.until(
        lambda: browser.find("[data-copy]").text in {"Copied", "Copy again"}, "the feedback"
    )
    assert browser.js("return document.querySelector('dialog .live').textContent") == "Copied"
    read = browser.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    )
    assert read == secret
    browser.click("#stored")
    browser.gone("dialog")
    assert secret not in everything_kept(browser)
    browser.focused("#generate")
    browser.until(lambda: "copied" in browser.text("#rows"), "the new token is in the list")


@pytest.mark.answers(409, 422)
def test_errors_appear_at_their_field(browser: Browser, world: World, script: bool) -> None:
    """Each error appears at its field, and the form keeps its input."""
    world.create("Taken")
    browser.open("/new")
    browser.click("dialog [value=write]")
    browser.click("label:has([value=date])")
    browser.click("#add")
    assert "Enter a name" in browser.text("#error-name")
    assert "Choose a date" in browser.text("#error-expiry")
    browser.focused("#name")
    assert browser.find("dialog [value=write]").is_selected()
    if script:
        browser.screen("mistakes")
    browser.type("#name", "  tAKEN ")
    browser.click("label:has([value='30'])")
    browser.click("#add")
    browser.until(
        lambda: "already have a token with this name" in browser.text("#error-name"), "the error"
    )
    assert not browser.all("#error-expiry")
    assert browser.find("#name").get_attribute("value") == "  tAKEN "
    assert browser.find("dialog [value=write]").is_selected()
    long = "\U0001f511" * 65
    browser.type("#name", long)
    browser.click("#add")
    browser.until(lambda: "65 characters" in browser.text("#error-name"), "the error")
    assert browser.find("#name").get_attribute("value") == long
    browser.type("#name", "valid name")
    browser.click("#add")
    shown_secret(browser)
    token = world.tokens()["valid name"]
    assert token.scope == pb.SCOPE_WRITE
    expires = token.expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < expires <= timedelta(days=30)


@pytest.mark.answers(422)
def test_secret_as_name_is_rejected(browser: Browser, world: World) -> None:
    """Errors that only the service detects also appear at their field, such as a secret as name."""
    secret = world.create("existing").secret
    browser.open("/new")
    add(browser, secret)
    assert "must not contain a secret" in browser.text("#error-name")


def test_expiry_date_uses_the_viewers_time_zone(
    browser: Browser, world: World, script: bool
) -> None:
    """A token lasts until the date ends: in the viewer's zone, or in UTC without JavaScript."""
    browser.open("/new")
    browser.click("label:has([value=date])")
    browser.js("document.getElementById('date').value = '2031-07-01'")
    add(browser, "dated")
    shown_secret(browser)
    expires = world.tokens()["dated"].expire_time.ToDatetime(UTC)
    summer_time = timedelta(hours=2) if script else timedelta()
    assert expires == datetime(2031, 7, 1, 23, 59, 59, tzinfo=UTC) - summer_time


def test_double_click_creates_one_token(browser: Browser, world: World, script: bool) -> None:
    """A double click creates one token and shows its secret."""
    browser.open("/new")
    browser.type("#name", "once")
    world.relay.calls.clear()
    with world.relay.failing("Create", seconds=0.3, times=1):
        # Like a browser: the second click comes before the first answer.
        browser.js("const add = document.getElementById('add'); add.click(); add.click()")
        secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    assert world.relay.calls.count("Create") == 1
    assert [*world.tokens()] == ["once"]


@pytest.mark.answers(409)
def test_resubmitted_form_creates_no_second_token(browser: Browser, world: World) -> None:
    """A form resubmitted from the history creates nothing and shows no secret. If it was changed,
    the page names the earlier token and shows the form again."""
    browser.scripts(on=False)
    browser.open("/new")
    mark = browser.all("[name=form]")[0].get_attribute("value")
    add(browser, "first")
    secret = shown_secret(browser)

    def send_again(name: str) -> None:
        browser.open("/new")
        browser.js("document.querySelector('[name=form]').value = arguments[0]", mark)
        add(browser, name)

    send_again("first")
    assert "already been shown" in browser.text("dialog h2")
    assert secret not in everything_kept(browser)
    send_again("second")
    assert "already created the token “first”" in browser.text("#error-form")
    assert browser.find("#name").get_attribute("value") == "second"
    assert [*world.tokens()] == ["first"]
    browser.click("#add")
    shown_secret(browser)
    assert sorted(world.tokens()) == ["first", "second"]


@pytest.mark.answers(422)
def test_more_options(browser: Browser, world: World, script: bool, axe: str) -> None:
    """A new token is restricted from its beginning: description, networks, permissions and labels
    are below "More options", which stay open after a mistake. All of it works by keyboard."""
    browser.open("/new")
    browser.type("#name", "restricted")
    assert not browser.find(".more").get_property("open")
    browser.tab_to(".more summary")
    browser.press(Keys.ENTER)
    browser.type("#description", "Reads orders.")
    browser.type("#networks", "10.1.2.3/8")
    browser.type("#permissions", "orders:read")
    browser.type("#labels", "team=payments")
    if script:
        # The drawer that was closed and opened again shows what was typed.
        browser.press(Keys.ESCAPE)
        browser.gone("dialog")
        browser.click("#generate")
        assert browser.find("#labels").get_attribute("value") == "team=payments"
    browser.click("#add")
    assert "Did you mean 10.0.0.0/8?" in browser.text("#error-networks")
    if script:
        browser.focused("#networks")
        browser.accessible(axe, "the form with more options")
        browser.screen("new-more")
    browser.type("#networks", "10.0.0.0/8")
    browser.click("#add")
    assert world.verdict(shown_secret(browser)) == "VERDICT_ADDRESS_NOT_ALLOWED"
    token = world.tokens()["restricted"]
    assert token.description == "Reads orders."
    assert list(token.allowed_networks) == ["10.0.0.0/8"]
    assert list(token.permissions) == ["orders:read"]
    assert dict(token.labels) == {"team": "payments"}


def test_closed_drawer_keeps_the_input(browser: Browser, world: World) -> None:
    """Escape closes the drawer and restores the focus. Reopened, the drawer has the input."""
    world.create("existing")
    browser.open()
    browser.click("#generate")
    browser.type("#name", "half typed")
    browser.press(Keys.ESCAPE)
    browser.gone("dialog")
    browser.focused("#generate")
    browser.press(Keys.ENTER)
    assert browser.find("#name").get_attribute("value") == "half typed"
    browser.click("dialog .button:not(.close)")
    browser.gone("dialog")
    browser.click("#generate")
    assert browser.find("#name").get_attribute("value") == ""
