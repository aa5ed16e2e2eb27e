"""Deleting a token in a real browser: confirmation, receipt, and concurrent deletions."""

import re

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")


def row(token_id: str) -> str:
    """Return the CSS selector of a token's Delete button."""
    return f"#{token_id} [data-act=delete]"


def test_delete_asks_revokes_and_shows_the_receipt(
    browser: Browser, world: World, script: bool
) -> None:
    """The question names token and scope. After a yes, the token is dead and a receipt appears."""
    kept = world.create("kept").token
    doomed = world.create("leaked", scope=pb.SCOPE_WRITE)
    browser.open()
    browser.click(row(doomed.token.id))
    question = browser.text("dialog")
    assert "Delete leaked?" in question
    assert "Write" in question
    assert doomed.token.hint in question
    if script:
        browser.screen("delete")
    assert world.verdict(doomed.secret) == "VERDICT_VALID"
    browser.focused("dialog [data-close]")
    browser.click("#confirm")
    notice = browser.text("#notice")
    assert "Deleted leaked (Write)" in notice
    assert re.search(r"stopped working everywhere [\d,]+ ms after you confirmed", notice), notice
    assert world.verdict(doomed.secret) == "VERDICT_DELETED"
    assert texts(browser.all("#rows th bdi")) == ["kept"]
    if script:
        browser.focused(row(kept.id))
        assert "Deleted leaked" in browser.js("return document.getElementById('live').textContent")
        browser.screen("deleted")
        browser.click("[data-dismiss]")
        browser.gone("#notice")
    browser.driver.refresh()
    browser.find(row(kept.id))
    assert not browser.all("#notice"), "the receipt is shown once"


def test_declining_deletes_nothing(browser: Browser, world: World, script: bool) -> None:
    """Declining changes nothing and restores the focus."""
    created = world.create("kept")
    browser.open()
    browser.click(row(created.token.id))
    browser.click("dialog [data-close]")
    browser.gone("dialog")
    if script:
        browser.focused(row(created.token.id))
        browser.press(Keys.ENTER)
        browser.find("dialog")
        browser.press(Keys.ESCAPE)
        browser.gone("dialog")
        browser.focused(row(created.token.id))
    assert world.verdict(created.secret) == "VERDICT_VALID"


@pytest.mark.parametrize("when", ["before the question", "before the answer"])
def test_token_deleted_elsewhere(browser: Browser, world: World, script: bool, when: str) -> None:
    """If a token was deleted elsewhere, the page says so and removes its row."""
    token = world.create("gone soon").token
    world.create("stays")
    browser.open()
    browser.find(row(token.id))
    if when == "before the question":
        world.delete(token.id)
        browser.click(row(token.id))
    else:
        browser.click(row(token.id))
        browser.find("#confirm")
        world.delete(token.id)
        browser.click("#confirm")
    notice = browser.text("#notice")
    assert ("no longer exists" if when == "before the question" else "already deleted") in notice
    assert texts(browser.all("#rows th bdi")) == ["stays"]


def test_deletion_keeps_filter_and_rows(browser: Browser, world: World, script: bool) -> None:
    """After a deletion, the list keeps its filter."""
    token = world.create("report one").token
    world.create("report two")
    world.create("other")
    browser.open("/?q=report")
    browser.click(row(token.id))
    browser.click("#confirm")
    browser.find("#notice")
    assert texts(browser.all("#rows th bdi")) == ["report two"]
    assert browser.find("#q").get_attribute("value") == "report"


def test_last_token_deleted_leaves_the_empty_state(browser: Browser, world: World) -> None:
    """After the last deletion, the page shows the empty state together with the receipt."""
    token = world.create("last").token
    browser.open()
    browser.click(row(token.id))
    browser.click("#confirm")
    assert "Deleted last" in browser.text("#notice")
    assert "No tokens yet" in browser.text("main")


def test_deletion_in_a_long_list_keeps_the_scroll_position(browser: Browser, world: World) -> None:
    """A deletion far down a long list does not scroll. The receipt is visible, the focus moves to
    the next row, and all other rows remain."""
    for number in range(110):
        world.create(f"token {number:03}")
    browser.open()
    browser.click("#more")
    browser.until(lambda: len(browser.all("#rows tr")) == 100, "a hundred rows")
    victim = world.tokens()["token 030"]
    browser.js("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", victim.id)
    before = browser.js("return scrollY")
    browser.click(row(victim.id))
    browser.click("#confirm")
    assert "Deleted token 030" in browser.text("#notice")
    assert len(browser.all("#rows tr")) == 100
    assert abs(browser.js("return scrollY") - before) < 150
    top = browser.js("return document.getElementById('notice').getBoundingClientRect().top")
    assert 0 <= top < 300
    browser.focused(row(world.tokens()["token 029"].id))
