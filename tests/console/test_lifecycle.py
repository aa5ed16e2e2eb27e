"""Replacing, editing and disabling a token in a real browser."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World
from tests.console.test_create import shown_secret

pytestmark = pytest.mark.xdist_group("browser")

DAY = 86_400
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def act(created: Any, name: str) -> str:
    """Return the CSS selector of an action in a token's row."""
    return f"#{created.token.id} [data-act={name}]"


def press(browser: Browser, selector: str) -> None:
    """Reach an element by Tab and press Enter."""
    browser.find(selector)
    browser.tab_to(selector)
    browser.press(Keys.ENTER)


def choose(browser: Browser, name: str, value: str) -> None:
    """Choose an option, whose input may be invisible."""
    browser.click(f"dialog label:has([name={name}][value='{value}'])")


def replaced(browser: Browser, created: Any, ends: str) -> str:
    """Replace a token's secret and return the new one."""
    browser.click(act(created, "replace"))
    choose(browser, "ends", ends)
    browser.click("#confirm")
    return shown_secret(browser)


def test_replace_with_overlap(browser: Browser, world: World, script: bool) -> None:
    """Both secrets work until the old one ends. The row shows both, and the old one can be ended
    early."""
    created = world.create("deploy job", ttl={"seconds": 90 * DAY})
    browser.open()
    browser.click(act(created, "replace"))
    drawer = browser.text("dialog.drawer")
    assert "Replace the secret of deploy job" in drawer
    assert created.token.hint in drawer
    for words in ("In 1 day", "In 1 hour", "In 7 days", "first used", "At once"):
        assert words in drawer
    browser.focused("[name=ends][value=day]")
    if script:
        browser.screen("replace")
    choose(browser, "ends", "hour")
    browser.click("#confirm")
    secret = shown_secret(browser)
    said = browser.text("dialog")
    assert "Copy the new secret now" in said
    assert re.search(rf"The old secret {re.escape(created.token.hint)} ends .*in 60 minutes", said)
    assert world.verdict(secret) == "VERDICT_VALID"
    assert world.verdict(created.secret) == "VERDICT_VALID"
    if script:
        browser.screen("replaced")
        browser.js("document.getElementById('secret').dataset.copied = ''")
    browser.click("#stored")
    browser.gone("dialog")
    # The list is loaded after the dialog has closed.
    browser.find(act(created, "retire"))
    row = browser.text(f"#{created.token.id}")
    assert created.token.hint in row
    assert world.tokens()["deploy job"].hint in row
    if script:
        browser.focused(act(created, "replace"))
        browser.screen("two-secrets")
    browser.click(act(created, "retire"))
    assert "End the old secret of deploy job now?" in browser.text("dialog")
    if script:
        browser.screen("retire")
    browser.focused("dialog [data-close]")
    browser.click("#confirm")
    assert "They stopped working everywhere" in browser.text("#notice")
    assert world.verdict(created.secret) == "VERDICT_EXPIRED"
    assert world.verdict(secret) == "VERDICT_VALID"
    assert not browser.all(act(created, "retire"))
    assert created.token.hint not in browser.text(f"#{created.token.id}")


def test_replace_at_once(browser: Browser, world: World, script: bool) -> None:
    """The old secret is dead everywhere before the new one is shown, with a receipt."""
    created = world.create("leaked")
    browser.open()
    secret = replaced(browser, created, "now")
    assert world.verdict(created.secret) == "VERDICT_EXPIRED"
    assert world.verdict(secret) == "VERDICT_VALID"
    said = browser.text("dialog")
    assert "The old secret has been refused everywhere since" in said
    assert "Receipt: revision" in said
    assert not browser.all("#rows .older")


def test_replace_until_first_use(browser: Browser, world: World) -> None:
    """The old secret works until the new one is first used."""
    created = world.create("cron job")
    browser.open()
    secret = replaced(browser, created, "use")
    assert "ends when the new one is first used" in browser.text("dialog")
    assert world.verdict(created.secret) == "VERDICT_VALID"
    assert world.verdict(secret) == "VERDICT_VALID"
    browser.until(lambda: world.verdict(created.secret) == "VERDICT_EXPIRED", "the old one's end")


def test_replaced_secret_is_shown_once(browser: Browser, world: World, script: bool) -> None:
    """A reload shows the new secret no more, and says how to get another."""
    created = world.create("once")
    browser.open()
    secret = replaced(browser, created, "day")
    browser.driver.refresh()
    browser.find("main")
    assert secret not in browser.driver.page_source
    if not script:
        assert "already been shown" in browser.text("dialog h2")
        browser.click("dialog .actions a")
        assert "Replace the secret of once" in browser.text("dialog h2")
    assert secret not in world.process.log


def test_review_cards_mend(browser: Browser, world: World, script: bool) -> None:
    """A card leads to the remedy for the most urgent of its tokens."""
    world.create("late", ttl={"seconds": 9 * DAY})
    world.create("forever")
    first = world.create("soon", ttl={"seconds": 2 * DAY})
    browser.open()
    # A replacement would keep the expiry.
    assert browser.text("#remedy-never-expires") == "Edit forever"
    assert browser.text("#remedy-expires-soon") == "Replace soon"
    browser.click("#remedy-expires-soon")
    assert "Replace the secret of soon" in browser.text("dialog h2")
    # A new secret alone would not help, so the later expiry is preselected.
    assert browser.all("[name=expiry][value='90']")[0].is_selected()
    browser.click("#confirm")
    shown_secret(browser)
    expires = world.tokens()["soon"].expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=89, hours=23) < expires <= timedelta(days=90)
    assert world.verdict(first.secret) == "VERDICT_VALID"


@pytest.mark.answers(503)
def test_lost_answer_of_a_replace(browser: Browser, world: World, script: bool) -> None:
    """If the answer is lost, the form says so. Sent again, it replaces the lost secret."""
    created = world.create("lost")
    browser.open()
    browser.click(act(created, "replace"))
    # The client library tries four times at most.
    with world.relay.failing("Rotate", code=UNAVAILABLE, reaches=True):
        browser.click("#confirm")
        assert "may have been replaced" in browser.text("#error-form")
    browser.click("#confirm")
    secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    assert world.verdict(created.secret) == "VERDICT_VALID"
    assert len(world.tokens()["lost"].secrets) == 2


def test_edit(browser: Browser, world: World, script: bool) -> None:
    """Every field of a token changes; a lower scope has a receipt. Labels that nobody touched stay
    as they are."""
    created = world.create("old name", scope=pb.SCOPE_WRITE, labels={"a=b": " kept "})
    browser.open()
    browser.click(act(created, "token"))
    browser.click("#edit")
    browser.focused("#name")
    if script:
        browser.screen("edit")
    browser.type("#name", "new name")
    choose(browser, "scope", "read")
    choose(browser, "expiry", "30")
    browser.type("#description", "Runs every night.")
    browser.type("#networks", "192.0.2.0/24\n2001:db8::/32")
    browser.type("#permissions", "orders:read\nstock:*")
    browser.type("#rate", "100/minute, burst 20")
    browser.send("#labels", Keys.END, "\nteam = payments")
    browser.click("#save")
    notice = browser.text("#notice")
    assert "Saved new name" in notice
    assert re.search(r"in effect everywhere [\d,]+ ms after you confirmed", notice), notice
    token = world.tokens()["new name"]
    assert token.scope == pb.SCOPE_READ
    assert token.description == "Runs every night."
    assert list(token.allowed_networks) == ["192.0.2.0/24", "2001:db8::/32"]
    assert list(token.permissions) == ["orders:read", "stock:*"]
    assert dict(token.labels) == {"a=b": " kept ", "team": "payments"}
    limit = token.rate_limit
    assert (limit.count, limit.period.seconds, limit.burst) == (100, 60, 20)
    expires = token.expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < expires <= timedelta(days=30)
    assert world.verdict(created.secret) == "VERDICT_ADDRESS_NOT_ALLOWED"
    if script:
        browser.focused(act(created, "token"))
    browser.click(act(created, "token"))
    details = browser.text("dialog")
    limit_text = "100/minute, burst 20"
    shown = ("Runs every night.", "192.0.2.0/24", "2001:db8::/32", "stock:*", "team payments")
    for words in (*shown, limit_text, token.id):
        assert words in details


@pytest.mark.answers(409, 422, 503)
def test_edit_shows_errors_at_their_field(browser: Browser, world: World, script: bool) -> None:
    """Each error appears at its field, and the form keeps its input."""
    world.create("taken")
    created = world.create("mine")
    browser.open(f"/edit?id={created.token.id}")
    browser.type("#name", "TAKEN")
    browser.type("#networks", "10.1.2.3/8")
    browser.type("#permissions", "Orders:Read")
    browser.type("#labels", "team")
    browser.click("#save")
    assert "Did you mean 10.0.0.0/8?" in browser.text("#error-networks")
    assert "Did you mean orders:read?" in browser.text("#error-permissions")
    assert "“team” is not a label" in browser.text("#error-labels")
    if script:
        browser.screen("edit-mistakes")
    browser.type("#networks", "10.0.0.0/8")
    browser.type("#permissions", "orders:read")
    browser.type("#labels", "team=payments")
    browser.click("#save")
    assert "already have a token with this name" in browser.text("#error-name")
    browser.type("#name", "still mine")
    with world.relay.failing("Update", code=grpc.StatusCode.RESOURCE_EXHAUSTED):
        browser.click("#save")
        assert "The service is busy, so nothing was saved" in browser.text("#error-form")
    assert browser.find("#name").get_attribute("value") == "still mine"
    browser.click("#save")
    assert "Saved still mine" in browser.text("#notice")
    assert list(world.tokens()["still mine"].allowed_networks) == ["10.0.0.0/8"]


def test_edit_keeps_what_others_changed(browser: Browser, world: World) -> None:
    """A save changes only the visitor's fields, not those that somebody else changed meanwhile."""
    created = world.create("shared", scope=pb.SCOPE_WRITE)
    browser.open(f"/edit?id={created.token.id}")
    browser.type("#description", "mine")
    request = pb.UpdateRequest(
        account_id=world.account,
        id=created.token.id,
        token=pb.Token(scope=pb.SCOPE_READ),
        update_mask=FieldMask(paths=["scope"]),
    )
    world.stub.Update(request, timeout=10)
    browser.click("#save")
    browser.find("#notice")
    token = world.tokens()["shared"]
    assert (token.scope, token.description) == (pb.SCOPE_READ, "mine")


def test_disable_and_enable(browser: Browser, world: World, script: bool) -> None:
    """A disabled token is refused everywhere until it is enabled, and the list shows it."""
    created = world.create("paused", ttl={"seconds": 90 * DAY})
    browser.open()
    browser.click(act(created, "token"))
    browser.click("#disable")
    assert "Disable paused?" in browser.text("dialog:has(#confirm)")
    browser.focused("dialog [data-close]")
    if script:
        browser.screen("disable")
    browser.click("#confirm")
    assert "Disabled paused" in browser.text("#notice")
    assert world.verdict(created.secret) == "VERDICT_DISABLED"
    assert "Disabled" in browser.text(f"#{created.token.id}")
    browser.click(act(created, "token"))
    assert "Disabled since" in browser.text("dialog")
    if script:
        browser.screen("details-disabled")
    browser.click("#enable")
    browser.until(lambda: "Enabled paused" in browser.text("#notice"), "the second notice")
    browser.until(lambda: world.verdict(created.secret) == "VERDICT_VALID", "the token's return")
    assert "Disabled" not in browser.text(f"#{created.token.id}")


@pytest.mark.answers(503)
def test_unconfirmed_disable_can_be_repeated(browser: Browser, world: World, script: bool) -> None:
    """If the answer is lost, the page offers to repeat the change, which is safe."""
    created = world.create("uncertain")
    browser.open(f"/disable?id={created.token.id}")
    with world.relay.failing("Disable", code=UNAVAILABLE, reaches=True):
        browser.click("#confirm")
        browser.until(lambda: "Not confirmed yet" in browser.text("dialog h2"), "the doubt")
    browser.click("dialog .primary")
    assert "Disabled uncertain" in browser.text("#notice")
    assert world.verdict(created.secret) == "VERDICT_DISABLED"


@pytest.mark.parametrize("path", ["token", "replace", "edit", "disable", "retire"])
def test_token_deleted_elsewhere(browser: Browser, world: World, script: bool, path: str) -> None:
    """If the token was deleted elsewhere, the page says so and shows the list."""
    created = world.create("gone")
    world.create("stays")
    world.delete(created.token.id)
    browser.open(f"/{path}?id={created.token.id}")
    assert "no longer exists" in browser.text("#notice")
    assert texts(browser.all("#rows th bdi")) == ["stays"]


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_lifecycle_by_keyboard_alone(browser: Browser, world: World, width: int) -> None:
    """A user can replace, edit, disable and enable a token without a mouse, at both widths."""
    created = world.create("keyed", ttl={"seconds": 90 * DAY})
    browser.look(width)
    browser.open()
    press(browser, act(created, "replace"))
    browser.focused("[name=ends][value=day]")
    browser.press(Keys.ARROW_DOWN)
    press(browser, "#confirm")
    browser.focused("[data-copy]")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.find("[data-copy]").text != "Copy", "the feedback")
    press(browser, "#stored")
    browser.gone("dialog")
    browser.focused(act(created, "replace"))
    assert len(world.tokens()["keyed"].secrets) == 2
    browser.js("document.querySelector(arguments[0]).focus()", act(created, "token"))
    press(browser, act(created, "retire"))
    browser.focused("dialog [data-close]")
    press(browser, "#confirm")
    browser.find("#notice")
    assert len(world.tokens()["keyed"].secrets) == 1
    for way, dialog, button in (("token", "#edit", "#save"), ("token", "#disable", "#confirm")):
        browser.js("document.querySelector(arguments[0]).focus()", "#generate")
        press(browser, act(created, way))
        browser.focused("#token-title")
        press(browser, dialog)
        browser.find(button)
        if button == "#save":
            browser.focused("#name")
            browser.press(Keys.END, *" again")
        browser.js("document.querySelector('dialog .close, dialog [data-close]').focus()")
        press(browser, button)
        browser.gone("dialog")
        browser.focused(act(created, "token"))
    token = world.tokens()["keyed again"]
    assert token.HasField("disable_time")
    browser.press(Keys.ENTER)
    press(browser, "#enable")
    browser.gone("dialog")
    assert not world.tokens()["keyed again"].HasField("disable_time")
    browser.press(Keys.ENTER)
    browser.find("#token-title")
    browser.press(Keys.ESCAPE)
    browser.gone("dialog")
    browser.focused(act(created, "token"))


def test_dialogs_are_accessible(browser: Browser, world: World, axe: str) -> None:
    """Axe finds nothing wrong with the list or a dialog, at both widths and in both schemes."""
    created = world.create(
        "full",
        labels={"team": "payments"},
        permissions=["orders:read", "stock:*"],
        description="Line one\nline two",
        allowed_networks=["192.0.2.0/24"],
    )
    browser.open()
    replaced(browser, created, "week")
    browser.js("document.getElementById('secret').dataset.copied = ''")
    browser.accessible(axe, "the new secret")
    browser.click("#stored")
    browser.gone("dialog")
    browser.accessible(axe, "two secrets")
    for page in ("token", "replace", "edit", "disable", "retire"):
        browser.open(f"/{page}?id={created.token.id}")
        browser.find("dialog h2")
        if page == "token":
            details = browser.text("dialog")
            for words in ("team payments", "orders:read", "stock:*", "Line one line two"):
                assert words in details
            browser.screen("details")
        browser.accessible(axe, page)


def test_forced_colours_keep_what_colours_say(browser: Browser, world: World) -> None:
    """In high contrast, the chosen card, choices and pills have outlines, and dialogs an edge."""
    created = world.create("contrast", scope=pb.SCOPE_WRITE, ttl={"seconds": 9 * DAY})
    features = [{"name": "forced-colors", "value": "active"}]
    browser.cdp("Emulation.setEmulatedMedia", features=features)
    style = (
        "const s = getComputedStyle(document.querySelector(arguments[0])); return s[arguments[1]]"
    )
    try:
        browser.open("/?review=write")
        assert browser.js(style, ".card[aria-current]", "outlineStyle") == "solid"
        assert browser.js(style, "#rows .pill", "borderTopStyle") == "solid"
        browser.click(act(created, "replace"))
        browser.find("dialog")
        assert browser.js(style, "dialog", "borderTopStyle") == "solid"
        assert browser.js(style, ".choice:has(:checked)", "outlineStyle") == "solid"
        assert browser.js(style, ".chips :checked + span", "outlineStyle") == "solid"
        browser.picture("forced-colours")
    finally:
        browser.look(DESK)
