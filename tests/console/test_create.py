"""Making a token in a real browser: the drawer, its mistakes, and the one display of the secret."""

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
    """Fill in a name and press Add New API."""
    browser.type("#name", name)
    browser.click("#add")


def shown_secret(browser: Browser) -> str:
    """Return the secret that is shown, waiting for it."""
    secret = browser.text("#secret")
    assert SECRET.fullmatch(secret), secret
    return secret


def everything_kept(browser: Browser) -> str:
    """Return all that the browser could be asked for later: page, address, storage, cookies."""
    return str(
        browser.js(
            "return JSON.stringify([document.documentElement.outerHTML, location.href,"
            " document.cookie, {...localStorage}, {...sessionStorage}, history.state])"
        )
    ) + str(browser.cdp("Network.getAllCookies"))


def test_drawer_has_the_safe_choices_first(browser: Browser, world: World, script: bool) -> None:
    """The form asks for name, scope (Read first, and chosen) and expiry, and says why."""
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
        # It comes from the right edge, whole.
        box = browser.find("dialog.drawer").rect
        assert box["x"] + box["width"] == 1440
        assert browser.driver.current_url == f"{browser.url}/"
        browser.screen("new")


def test_secret_is_shown_once(browser: Browser, world: World, script: bool) -> None:
    """The new token's secret works, is shown with how to use it, and by no way a second time."""
    world.create("existing")
    # The list that is looked at goes along, and its filter has a scope too.
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
        browser.until(lambda: "deploy job" in browser.text("#rows"), "the list behind it anew")
    address = browser.driver.current_url
    # Reload, back, forward, the same address again, and another tab's look at it.
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
        assert "shown already" in browser.text("dialog h2")
    assert secret not in world.process.log
    assert [*world.tokens()] == ["deploy job", "existing"]


def test_back_from_elsewhere_does_not_bring_the_secret_back(
    browser: Browser, world: World, script: bool
) -> None:
    """Who leaves the page with the secret on it and comes back, finds it gone."""
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


def test_a_list_that_comes_late_leaves_the_focus(browser: Browser, world: World) -> None:
    """Who has closed the dialog, and gone on by keyboard, before the list behind it is there anew,
    is where he was when it comes."""
    old = world.create("existing").token.id
    browser.open()
    for where in ("#generate", "#access", f"#{old} button"):
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
    """Copy puts the secret on the clipboard and says so; only the deliberate button closes."""
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
    # Beside the dialog.
    browser.js(
        "document.querySelector('dialog')"
        ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    assert shown_secret(browser) == secret
    browser.focused("[data-copy]")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.find("[data-copy]").text == "Copied", "the feedback")
    assert browser.js("return document.querySelector('dialog .live').textContent") == "Copied"
    read = browser.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    )
    assert read == secret
    browser.click("#stored")
    browser.gone("dialog")
    assert secret not in everything_kept(browser)
    browser.focused("#generate")
    assert "copied" in browser.text("#rows")


@pytest.mark.answers(409, 422)
def test_mistakes_stand_at_their_field(browser: Browser, world: World, script: bool) -> None:
    """Each mistake is told in words at its field, all else stays as it was typed."""
    world.create("Taken")
    browser.open("/new")
    browser.click("dialog [value=write]")
    browser.click("label:has([value=date])")
    browser.click("#add")
    assert "Give the token a name" in browser.text("#error-name")
    assert "Choose a date" in browser.text("#error-expiry")
    browser.focused("#name")
    assert browser.find("dialog [value=write]").is_selected()
    if script:
        browser.screen("mistakes")
    browser.type("#name", "  tAKEN ")
    browser.click("label:has([value='30'])")
    browser.click("#add")
    browser.until(lambda: "of this name already" in browser.text("#error-name"), "the mistake")
    assert not browser.all("#error-expiry")
    assert browser.find("#name").get_attribute("value") == "  tAKEN "
    assert browser.find("dialog [value=write]").is_selected()
    long = "\U0001f511" * 65
    browser.type("#name", long)
    browser.click("#add")
    browser.until(lambda: "65 characters" in browser.text("#error-name"), "the mistake")
    assert browser.find("#name").get_attribute("value") == long
    browser.type("#name", "in order")
    browser.click("#add")
    shown_secret(browser)
    token = world.tokens()["in order"]
    assert token.scope == pb.SCOPE_WRITE
    expires = token.expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < expires <= timedelta(days=30)


@pytest.mark.answers(422)
def test_a_secret_is_no_name(browser: Browser, world: World) -> None:
    """What the service alone refuses is told at its field too: here a secret as a name."""
    secret = world.create("existing").secret
    browser.open("/new")
    add(browser, secret)
    assert "must not contain a secret" in browser.text("#error-name")


def test_expiry_on_a_date_begins_in_the_viewers_zone(
    browser: Browser, world: World, script: bool
) -> None:
    """A token with a date ends when that day begins: for the viewer, or in UTC without a script."""
    browser.open("/new")
    browser.click("label:has([value=date])")
    browser.js("document.getElementById('date').value = '2031-07-01'")
    add(browser, "dated")
    shown_secret(browser)
    expires = world.tokens()["dated"].expire_time.ToDatetime(UTC)
    summer_time = timedelta(hours=2) if script else timedelta()
    assert expires == datetime(2031, 7, 1, tzinfo=UTC) - summer_time


def test_double_click_makes_one_token(browser: Browser, world: World, script: bool) -> None:
    """Clicks that come faster than the answer make one token, and its secret is shown."""
    browser.open("/new")
    browser.type("#name", "once")
    world.relay.calls.clear()
    with world.relay.failing("Create", seconds=0.3, times=1):
        # As a browser sends them: the second before the first is answered.
        browser.js("const add = document.getElementById('add'); add.click(); add.click()")
        secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    assert world.relay.calls.count("Create") == 1
    assert [*world.tokens()] == ["once"]


@pytest.mark.answers(409)
def test_form_sent_again_makes_no_second_token(browser: Browser, world: World) -> None:
    """A form that comes again, from the history, makes nothing and shows no secret; changed, it
    says what it made and asks anew."""
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
    assert "shown already" in browser.text("dialog h2")
    assert secret not in everything_kept(browser)
    send_again("second")
    assert "has made the token “first”" in browser.text("#error-form")
    assert browser.find("#name").get_attribute("value") == "second"
    assert [*world.tokens()] == ["first"]
    browser.click("#add")
    shown_secret(browser)
    assert sorted(world.tokens()) == ["first", "second"]


def test_what_is_typed_outlives_a_closed_drawer(browser: Browser, world: World) -> None:
    """Escape closes the drawer and gives the focus back; opened again, it has what was typed."""
    world.create("existing")
    browser.open()
    browser.click("#generate")
    browser.type("#name", "half typed")
    browser.press(Keys.ESCAPE)
    browser.gone("dialog")
    browser.focused("#generate")
    browser.press(Keys.ENTER)
    assert browser.find("#name").get_attribute("value") == "half typed"
    browser.find("dialog .button:not(.close)").click()
    browser.gone("dialog")
    browser.click("#generate")
    assert browser.find("#name").get_attribute("value") == ""
