"""Accessibility: keyboard only, screen readers, phones and dark mode."""

import re
from datetime import timedelta

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")

DAY = 86_400


def fill(world: World) -> None:
    """Fill an account so that every kind of finding occurs."""
    for name, days_old, days_left, scope, used in (
        ("monthly invoices", 240, 30, pb.SCOPE_READ, 0.4),
        ("legacy importer", 410, None, pb.SCOPE_WRITE, 131),
        ("load test", 90, -2, pb.SCOPE_READ, 30),
        ("status page", 61, 300, pb.SCOPE_READ, 0.002),
        ("mobile app gateway", 33, 57, pb.SCOPE_READ, 0.001),
        ("warehouse sync", 21, 9, pb.SCOPE_WRITE, 0.01),
        ("data science notebook", 12, 78, pb.SCOPE_READ, None),
        ("nightly export", 5, 85, pb.SCOPE_READ, 0.7),
        ("deploy pipeline", 0.1, 90, pb.SCOPE_WRITE, 0.09),
    ):
        created = world.create(name, scope=scope, days_old=days_old, expires_days=days_left)
        if used is not None:
            world.used(created, "shop", 40, timedelta(days=used))


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_full_journey_by_keyboard_alone(browser: Browser, world: World, width: int) -> None:
    """A user can create, copy, find and delete a token without a mouse, at both widths."""
    browser.look(width)
    world.create("existing")
    browser.open()
    browser.tab_to("#generate")
    browser.press(Keys.ENTER)
    browser.focused("#name")
    browser.press(*"keyed")
    browser.press(Keys.TAB)
    assert browser.has_focus("[name=scope][value=read]")
    browser.press(Keys.ARROW_DOWN, Keys.TAB)
    assert browser.has_focus("[name=expiry][value='90']")
    browser.press(Keys.ARROW_LEFT)
    # Tab never moves the focus out of the dialog.
    for key in [Keys.TAB] * 12:
        browser.press(key)
        assert browser.js(
            "return document.activeElement === document.body ||"
            " document.querySelector('dialog').contains(document.activeElement)"
        )
    browser.send("#name", Keys.ENTER)
    browser.focused("[data-copy]")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.find("[data-copy]").text != "Copy", "the feedback")
    browser.tab_to("#stored")
    browser.press(Keys.ENTER)
    browser.gone("dialog")
    browser.focused("#generate")
    token = world.tokens()["keyed"]
    assert token.scope == pb.SCOPE_WRITE
    # The list has been replaced in the meantime.
    browser.find(f"#{token.id}")
    browser.tab_to(f"#{token.id} [data-act=delete]")
    browser.press(Keys.ENTER)
    browser.focused("dialog [data-close]")
    browser.driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    browser.focused("#confirm")
    browser.press(Keys.ENTER)
    browser.find("#notice")
    assert texts(browser.all("#rows th bdi")) == ["existing"]
    browser.focused("#rows [data-act=delete]")


def test_axe_finds_nothing_serious(browser: Browser, world: World, axe: str) -> None:
    """Axe finds nothing serious in any normal state, in both schemes and widths."""
    browser.open()
    browser.find("#generate")
    browser.accessible(axe, "the empty state")
    fill(world)
    browser.open()
    browser.find("#rows")
    browser.accessible(axe, "the list")
    browser.open("/?q=nothing+like+it")
    browser.accessible(axe, "nothing found")
    browser.open("/?review=write")
    browser.accessible(axe, "a finding")
    browser.open("/new")
    browser.find("dialog")
    browser.accessible(axe, "the form")
    browser.type("#name", "axed")
    browser.click("#add")
    browser.find("#secret")
    browser.accessible(axe, "the secret")
    browser.click("#stored")
    browser.gone("dialog")
    browser.click("#rows [data-act=delete]")
    browser.find("#confirm")
    browser.accessible(axe, "the question")
    browser.click("#confirm")
    browser.find("#notice")
    browser.accessible(axe, "the receipt")
    browser.scripts(on=False)
    browser.open("/new")
    browser.scripts(on=True)
    browser.accessible(axe, "the form without a script")


@pytest.mark.answers(404, 409, 422, 503)
def test_axe_finds_nothing_serious_in_error_states(
    browser: Browser, world: World, axe: str
) -> None:
    """Axe finds nothing serious for invalid input, lost answers, outages and unknown pages."""
    from tests.console.test_bad_days import UNAVAILABLE

    browser.open("/new")
    browser.click("#add")
    browser.find("#error-name")
    browser.accessible(axe, "mistakes")
    with world.relay.failing("Create", code=UNAVAILABLE, reaches=True):
        browser.type("#name", "lost")
        browser.click("#add")
        browser.find("#again")
    browser.accessible(axe, "a lost answer")
    with world.relay.failing("List", code=UNAVAILABLE):
        browser.open()
        browser.find("#trouble")
    browser.accessible(axe, "an unreachable service")
    browser.open("/nowhere")
    browser.accessible(axe, "no such page")
    browser.screen("no-such-page")


def test_dialogs_are_modal_and_changes_are_announced(browser: Browser, world: World) -> None:
    """Dialogs are modal and named, fields have labels, and screen readers announce changes."""
    fill(world)
    browser.open()
    browser.click("#generate")
    dialog = browser.find("dialog")
    assert browser.js("return arguments[0].matches(':modal')", dialog)
    assert dialog.accessible_name == "Generate New API"
    assert browser.find("#name").accessible_name == "API Name"
    assert dialog.aria_role == "dialog"
    browser.press(Keys.ESCAPE)
    browser.gone("dialog")
    buttons = [button.accessible_name for button in browser.all("#rows button")]
    assert buttons[:2] == ["Replace the secret of deploy pipeline", "Delete deploy pipeline"]
    assert len(set(buttons)) == len(buttons)
    browser.type("#q", "importer")
    live = "return document.getElementById('live').textContent"
    browser.until(lambda: browser.js(live) == "1 token of 9 in all", "what is announced")


def test_page_behind_a_dialog_is_inert_without_a_script(browser: Browser, world: World) -> None:
    """Even without JavaScript, a dialog traps the focus: the page behind it is inert."""
    fill(world)
    browser.scripts(on=False)
    browser.open("/new")
    browser.focused("#name")
    for _ in range(16):
        browser.press(Keys.TAB)
        assert browser.js(
            "return !document.getElementById('main').contains(document.activeElement)"
        )


def test_drawer_respects_reduced_motion(browser: Browser, world: World) -> None:
    """The drawer slides in from the right unless the user prefers reduced motion."""
    world.create("existing")
    animation = "return getComputedStyle(document.querySelector('dialog')).animationName"
    for still, name in ((True, "none"), (False, "slide")):
        browser.look(DESK, still=still)
        browser.open("/new")
        assert browser.js(animation) == name


def test_readme_screenshots_of_the_list(browser: Browser, world: World) -> None:
    """The page shows what the README's screenshots show; with --screens, they are saved."""
    browser.reset(world.url, "acme")
    world.account = "acme"
    fill(world)
    browser.open()
    browser.find("#rows")
    browser.screen("list")
    browser.click("[data-review=write]")
    browser.until(lambda: len(browser.all("#rows tr")) == 3, "those that write")
    browser.screen("review")
    assert re.search(r"review=write", browser.driver.current_url)
