"""Outages: the page's messages and preserved input when Latchkey is down, slow or busy."""

import threading

import grpc
import pytest
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser, texts
from tests.console.conftest import World
from tests.console.test_create import add, shown_secret

pytestmark = pytest.mark.xdist_group("browser")

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ALL = ("List", "Get", "Create", "Delete")


def said_in_heading(browser: Browser, words: str) -> None:
    """Wait for a dialog whose heading contains `words`."""
    browser.until(lambda: words in browser.text("dialog h2"), words)


@pytest.mark.answers(403, 502, 503, 504)
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (UNAVAILABLE, "cannot be reached"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "did not answer in time"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "The service is busy"),
        (grpc.StatusCode.PERMISSION_DENIED, "cannot access this account"),
        (grpc.StatusCode.UNAUTHENTICATED, "could not authenticate"),
        (grpc.StatusCode.INTERNAL, "failed unexpectedly"),
    ],
)
def test_list_explains_each_error(
    browser: Browser, world: World, code: grpc.StatusCode, words: str
) -> None:
    """If the list fails to load, the page explains why, and its retry button works."""
    world.create("there")
    with world.relay.failing("List", code=code):
        browser.open("/?q=the")
        said = browser.text("#trouble")
        assert words in said
        assert "Nothing was changed" in said
        if code is UNAVAILABLE:
            browser.screen("unreachable")
    browser.click("#trouble a")
    browser.until(lambda: texts(browser.all("#rows th bdi")) == ["there"], "the list")


@pytest.mark.answers(503)
def test_unreachable_while_loading_more_rows(browser: Browser, world: World) -> None:
    """If loading more rows fails, the button says so, keeps the focus, and retries."""
    for number in range(60):
        world.create(f"token {number}")
    browser.open()
    with world.relay.failing("List", code=UNAVAILABLE):
        browser.click("#more")
        assert browser.text("#more-failed") == "The service cannot be reached."
        assert browser.text("#more") == "Try again"
        browser.focused("#more")
        browser.screen("unreachable-more")
    assert len(browser.all("#rows tr")) == 50
    browser.send("#more", Keys.ENTER)
    browser.until(lambda: len(browser.all("#rows tr")) == 60, "all rows")
    browser.gone("#more-failed")
    assert browser.text("#count") == "60 of 60 tokens"


@pytest.mark.answers(503)
def test_unreachable_while_creating_keeps_the_input(
    browser: Browser, world: World, script: bool
) -> None:
    """If creation fails, the form keeps its input, and the same button works later."""
    browser.open("/new")
    browser.click("dialog [value=write]")
    browser.click("label:has([value='365'])")
    with world.relay.failing(*ALL, code=UNAVAILABLE):
        add(browser, "Köln <b>")
        said = browser.text("#error-form")
        assert "cannot be reached, so nothing was created" in said
        if script:
            browser.screen("unreachable-adding")
    assert browser.find("#name").get_attribute("value") == "Köln <b>"
    assert browser.find("dialog [value=write]").is_selected()
    assert browser.all("[value='365']")[0].is_selected()
    assert world.tokens() == {}
    browser.click("#add")
    shown_secret(browser)
    assert [*world.tokens()] == ["Köln <b>"]


@pytest.mark.answers(503)
def test_busy_while_creating(browser: Browser, world: World) -> None:
    """RESOURCE_EXHAUSTED from Create is reported as a definite refusal."""
    browser.open("/new")
    with world.relay.failing("Create", code=grpc.StatusCode.RESOURCE_EXHAUSTED):
        add(browser, "busy")
        assert "The service is busy, so nothing was created" in browser.text("#error-form")
    assert world.tokens() == {}


@pytest.mark.answers(503)
def test_lost_token_gets_another_secret(browser: Browser, world: World, script: bool) -> None:
    """A token whose Create answer was lost is found by name, and gets a secret that works."""
    world.create("existing")
    browser.open("/new")
    with world.relay.failing("Create", code=UNAVAILABLE, reaches=True):
        add(browser, "lost")
        said_in_heading(browser, "The token exists, but its secret is lost")
    said = browser.text("dialog")
    assert "get another secret for it" in said
    orphan = world.tokens()["lost"]
    assert orphan.hint in said
    if script:
        browser.screen("lost")
    browser.click("#again")
    secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    tokens = world.tokens()
    assert sorted(tokens) == ["existing", "lost"]
    assert tokens["lost"].id == orphan.id


@pytest.mark.answers(503)
def test_lost_answer_without_a_token(browser: Browser, world: World, script: bool) -> None:
    """If no token with the name exists, the page says so, and a retry creates one."""
    browser.open("/new")
    with world.relay.failing("Create", code=UNAVAILABLE):
        add(browser, "never arrived")
        said_in_heading(browser, "The token was not created")
    browser.click("dialog .primary")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"
    assert [*world.tokens()] == ["never arrived"]


@pytest.mark.answers(503)
def test_lost_answer_while_the_outcome_is_unknown(
    browser: Browser, world: World, script: bool
) -> None:
    """While the outcome is unknown, the page says so; a retry makes no second token."""
    browser.open("/new")
    with (
        world.relay.failing("Create", code=UNAVAILABLE, reaches=True),
        # The first List is answered; the List after Create is not.
        world.relay.failing("List", code=UNAVAILABLE, spares=1),
    ):
        add(browser, "who knows")
        said_in_heading(browser, "may or may not exist")
        assert "It is safe to try again" in browser.text("dialog")
        if script:
            browser.screen("not-known")
    orphan = world.tokens()["who knows"]
    browser.click("dialog .primary")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"
    assert {name: token.id for name, token in world.tokens().items()} == {"who knows": orphan.id}


@pytest.mark.answers(503)
def test_dialogs_work_without_the_list(browser: Browser, world: World) -> None:
    """Dialogs work without JavaScript even while the list is unavailable."""
    token = world.create("there").token
    browser.scripts(on=False)
    with world.relay.failing("List", code=UNAVAILABLE):
        browser.open(f"/delete?id={token.id}")
        assert "Delete there?" in browser.text("dialog")
        assert "cannot be reached" in browser.text("#trouble")
        browser.open("/new")
        assert "cannot be reached" in browser.text("#trouble")
    # The List before Create is answered; the List behind the secret is not.
    with world.relay.failing("List", code=UNAVAILABLE, spares=1):
        add(browser, "shown all the same")
        secret = shown_secret(browser)
        assert "cannot be reached" in browser.text("#trouble")
    assert world.verdict(secret) == "VERDICT_VALID"


@pytest.mark.answers(503)
def test_unconfirmed_deletion(browser: Browser, world: World, script: bool, axe: str) -> None:
    """A Delete without an answer is shown as unconfirmed; a retry gets the receipt."""
    created = world.create("doomed")
    world.create("stays")
    browser.open()
    browser.click(f"#{created.token.id} [data-act=delete]")
    browser.find("#confirm")
    with world.relay.failing("Delete", code=UNAVAILABLE, reaches=True):
        browser.click("#confirm")
        browser.until(lambda: "not confirmed" in browser.text("dialog"), "the unconfirmed deletion")
        if script:
            browser.screen("unconfirmed")
            browser.accessible(axe, "an unconfirmed deletion")
    browser.click("dialog .danger")
    assert "already deleted" in browser.text("#notice")
    assert world.verdict(created.secret) == "VERDICT_DELETED"


@pytest.mark.answers(503)
def test_unreachable_while_deleting_changes_nothing(
    browser: Browser, world: World, script: bool
) -> None:
    """If Latchkey is unreachable before the Delete, the page says so and deletes nothing."""
    created = world.create("survives")
    browser.open()
    browser.click(f"#{created.token.id} [data-act=delete]")
    browser.find("#confirm")
    with world.relay.failing(*ALL, code=UNAVAILABLE):
        browser.click("#confirm")
        said = browser.text("#message" if script else "main")
        assert "Nothing was changed" in said
    assert world.verdict(created.secret) == "VERDICT_VALID"


def test_slow_answer_is_awaited(browser: Browser, world: World) -> None:
    """While an answer is slow, the form shows that it is busy and ignores a second click."""
    browser.open("/new")
    come = threading.Event()
    with world.relay.failing("Create", release=come, times=1):
        add(browser, "slow")
        assert browser.find("dialog form").get_attribute("aria-busy") == "true"
        browser.click("#add")
        come.set()
        shown_secret(browser)
    assert [*world.tokens()] == ["slow"]


def test_unreachable_console_keeps_the_input(browser: Browser, world: World) -> None:
    """If the console itself does not answer, the page says so and keeps the input."""
    browser.open("/new")
    browser.type("#name", "still here")
    browser.cdp(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    try:
        browser.click("#add")
        assert "did not answer" in browser.text("dialog #message")
        assert browser.find("#name").get_attribute("value") == "still here"
    finally:
        browser.cdp(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
    browser.click("#add")
    shown_secret(browser)
    assert [e for e in browser.console_errors() if "ERR_INTERNET_DISCONNECTED" not in e] == []
