"""What the page says and keeps when Latchkey is away, slow, busy, or loses an answer."""

import threading

import grpc
import pytest

from tests.console.browsing import Browser, texts
from tests.console.conftest import World
from tests.console.test_create import add, shown_secret

pytestmark = pytest.mark.xdist_group("browser")

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ALL = ("List", "Get", "Create", "Delete")


def said_in_heading(browser: Browser, words: str) -> None:
    """Wait for a dialog whose heading has these words."""
    browser.until(lambda: words in browser.text("dialog h2"), words)


@pytest.mark.answers(403, 502, 503, 504)
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (UNAVAILABLE, "cannot be reached"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "did not answer in time"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Latchkey is busy"),
        (grpc.StatusCode.PERMISSION_DENIED, "not open to you"),
        (grpc.StatusCode.UNAUTHENTICATED, "does not know this page"),
        (grpc.StatusCode.INTERNAL, "had a fault"),
    ],
)
def test_list_says_what_happened(
    browser: Browser, world: World, code: grpc.StatusCode, words: str
) -> None:
    """Whatever keeps the list away is told in words, with a way to try again that works."""
    world.create("there")
    with world.relay.failing("List", code=code):
        browser.open("/?q=the")
        said = browser.text("#trouble")
        assert words in said
        assert "nothing was changed" in said
        if code is UNAVAILABLE:
            browser.screen("unreachable")
    browser.click("#trouble a")
    browser.until(lambda: texts(browser.all("#rows th bdi")) == ["there"], "the list")


@pytest.mark.answers(503)
def test_unreachable_when_more_is_wanted(browser: Browser, world: World) -> None:
    """Latchkey away as more rows are asked for: it is named, the rows stay, and again works."""
    for number in range(60):
        world.create(f"token {number}")
    browser.open()
    with world.relay.failing("List", code=UNAVAILABLE):
        browser.click("#more")
        assert "Latchkey cannot be reached" in browser.text("#message")
        assert browser.has_focus("#message")
    assert len(browser.all("#rows tr")) == 50
    browser.click("#more")
    browser.until(lambda: len(browser.all("#rows tr")) == 60, "all rows")
    browser.gone("#message")
    assert browser.text("#count") == "60 of 60 tokens"


@pytest.mark.answers(503)
def test_unreachable_when_adding_keeps_what_was_typed(
    browser: Browser, world: World, script: bool
) -> None:
    """Latchkey away: nothing was created, what was typed is there, the same button works."""
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
def test_busy_when_adding(browser: Browser, world: World) -> None:
    """RESOURCE_EXHAUSTED from Create itself is a no, told as one."""
    browser.open("/new")
    with world.relay.failing("Create", code=grpc.StatusCode.RESOURCE_EXHAUSTED):
        add(browser, "busy")
        assert "Latchkey is busy, so nothing was created" in browser.text("#error-form")
    assert world.tokens() == {}


@pytest.mark.answers(503)
def test_lost_answer_is_found_and_explained(browser: Browser, world: World, script: bool) -> None:
    """A Create whose answer is lost is found by name; the way out replaces it by one that works."""
    world.create("existing")
    browser.open("/new")
    with world.relay.failing("Create", code=UNAVAILABLE, reaches=True, times=1):
        add(browser, "lost")
        said_in_heading(browser, "The token is there, its secret is lost")
    said = browser.text("dialog")
    assert "delete it, and create it again" in said
    orphan = world.tokens()["lost"]
    assert orphan.hint in said
    if script:
        browser.screen("lost")
    browser.click("[name=replace]")
    secret = shown_secret(browser)
    assert world.verdict(secret) == "VERDICT_VALID"
    tokens = world.tokens()
    assert sorted(tokens) == ["existing", "lost"]
    assert tokens["lost"].id != orphan.id


@pytest.mark.answers(503)
def test_lost_answer_that_nothing_came_of(browser: Browser, world: World, script: bool) -> None:
    """When no token of the name is there, the page says so, and trying again makes one."""
    browser.open("/new")
    with world.relay.failing("Create", code=UNAVAILABLE, times=1):
        add(browser, "never arrived")
        said_in_heading(browser, "The token was not created")
    browser.click("dialog .primary")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"
    assert [*world.tokens()] == ["never arrived"]


@pytest.mark.answers(503)
def test_lost_answer_and_nobody_to_ask(browser: Browser, world: World, script: bool) -> None:
    """While it cannot be known, the page says that; trying again looks first, and finds it."""
    browser.open("/new")
    with (
        world.relay.failing("Create", code=UNAVAILABLE, reaches=True, times=1),
        # The look before is answered; the one after is not.
        world.relay.failing("List", code=UNAVAILABLE, spares=1),
    ):
        add(browser, "who knows")
        said_in_heading(browser, "not known whether")
        assert "Trying again is safe" in browser.text("dialog")
        if script:
            browser.screen("not-known")
    browser.click("dialog .primary")
    said_in_heading(browser, "its secret is lost")
    assert [*world.tokens()] == ["who knows"]
    browser.click("[name=replace]")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"
    assert [*world.tokens()] == ["who knows"]


@pytest.mark.answers(503)
def test_dialogs_without_the_list_behind(browser: Browser, world: World) -> None:
    """Without a script too, form, question and secret are there when the list is not."""
    token = world.create("there").token
    browser.scripts(on=False)
    with world.relay.failing("List", code=UNAVAILABLE):
        browser.open(f"/delete?id={token.id}")
        assert "Delete there?" in browser.text("dialog")
        assert "cannot be reached" in browser.text("#trouble")
        browser.open("/new")
        assert "cannot be reached" in browser.text("#trouble")
    # The look before is answered, the list behind the secret is not.
    with world.relay.failing("List", code=UNAVAILABLE, spares=1):
        add(browser, "shown all the same")
        secret = shown_secret(browser)
        assert "cannot be reached" in browser.text("#trouble")
    assert world.verdict(secret) == "VERDICT_VALID"


@pytest.mark.answers(503)
def test_deletion_that_is_not_confirmed(
    browser: Browser, world: World, script: bool, axe: str
) -> None:
    """A Delete without an answer is told as not confirmed; asking again gets the receipt."""
    created = world.create("doomed")
    world.create("stays")
    browser.open()
    browser.click(f"#{created.token.id} button")
    browser.find("#confirm")
    with world.relay.failing("Delete", code=UNAVAILABLE, reaches=True):
        browser.click("#confirm")
        browser.until(lambda: "not confirmed" in browser.text("dialog"), "what is not known")
        if script:
            browser.screen("unconfirmed")
            browser.accessible(axe, "a deletion that is not confirmed")
    browser.click("dialog .danger")
    assert "deleted already" in browser.text("#notice")
    assert world.verdict(created.secret) == "VERDICT_DELETED"


@pytest.mark.answers(503)
def test_unreachable_when_deleting_changes_nothing(
    browser: Browser, world: World, script: bool
) -> None:
    """Latchkey away before anything is asked of it: said so, and nothing is deleted."""
    created = world.create("survives")
    browser.open()
    browser.click(f"#{created.token.id} button")
    browser.find("#confirm")
    with world.relay.failing(*ALL, code=UNAVAILABLE):
        browser.click("#confirm")
        said = browser.text("#message" if script else "main")
        assert "Nothing was changed" in said
    assert world.verdict(created.secret) == "VERDICT_VALID"


def test_slow_latchkey_is_waited_for(browser: Browser, world: World) -> None:
    """A slow answer is an answer: the form says that it is at work, and takes no second click."""
    browser.open("/new")
    come = threading.Event()
    with world.relay.failing("Create", release=come, times=1):
        add(browser, "slow")
        assert browser.find("dialog form").get_attribute("aria-busy") == "true"
        browser.click("#add")
        come.set()
        shown_secret(browser)
    assert [*world.tokens()] == ["slow"]


def test_page_server_gone(browser: Browser, world: World) -> None:
    """When the page's own server does not answer, what was typed stays, and the page says so."""
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
