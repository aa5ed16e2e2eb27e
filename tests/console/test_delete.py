"""Deleting a token in a real browser: the question, the receipt, and what others did meanwhile."""

import re

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")


def row(token_id: str) -> str:
    """Return the selector of a token's Delete button."""
    return f"#{token_id} button"


def test_delete_asks_revokes_and_shows_the_receipt(
    browser: Browser, world: World, script: bool
) -> None:
    """The question names token and scope; then the token is dead, and its receipt is shown."""
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
    assert not browser.all("#notice"), "the receipt is told once"


def test_keeping_it_deletes_nothing(browser: Browser, world: World, script: bool) -> None:
    """Saying no leaves everything as it was, and the focus where it was."""
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
def test_deleted_elsewhere_meanwhile(
    browser: Browser, world: World, script: bool, when: str
) -> None:
    """A token that somebody else has deleted is told so, and its row goes."""
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
    assert ("not there any more" if when == "before the question" else "deleted already") in notice
    assert texts(browser.all("#rows th bdi")) == ["stays"]


def test_deletion_keeps_filter_and_rows(browser: Browser, world: World, script: bool) -> None:
    """After a deletion the list is narrowed as before."""
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
    """With the last token gone the page says how to make one, and still shows the receipt."""
    token = world.create("last").token
    browser.open()
    browser.click(row(token.id))
    browser.click("#confirm")
    assert "Deleted last" in browser.text("#notice")
    assert "No tokens yet" in browser.text("main")


def test_deletion_far_down_keeps_the_place(browser: Browser, world: World) -> None:
    """Far down a long list a deletion scrolls nowhere: the receipt comes into sight, the focus goes
    to the next row, and all the rows that were there are there."""
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
