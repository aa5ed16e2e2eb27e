"""Tokens with a leaked secret, and rate limits, in a real browser, by keyboard too."""

from typing import Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import Browser
from tests.console.conftest import World
from tests.console.test_create import shown_secret

pytestmark = pytest.mark.xdist_group("browser")

DAY = 86_400


def report(world: World, created: Any) -> None:
    request = pb.ReportSecretRequest(secrets=[created.secret])
    (result,) = world.stub.ReportSecret(request, timeout=10).results
    assert result.outcome == pb.SECRET_OUTCOME_REPORTED


def card(browser: Browser) -> str:
    return browser.text("li:has([data-review=leaked])")


def test_leaked_token_is_replaced(browser: Browser, world: World, script: bool) -> None:
    """The first card says that a token leaked, and leads to its replacement, which suggests ending
    the old secret at once. Afterwards, nothing says that it leaked.
    """
    created = world.create("deploy job", ttl={"seconds": 90 * DAY})
    world.create("other", ttl={"seconds": 90 * DAY})
    browser.open()
    assert not browser.all("[data-review]")
    report(world, created)
    browser.open()
    assert [a.get_attribute("data-review") for a in browser.all("[data-review]")] == ["leaked"]
    assert "1 Leaked A secret was found where others can read it." in card(browser)
    assert "Leaked" in browser.text(f"#{created.token.id}")
    browser.click(f"#{created.token.id} [data-act=token]")
    assert "was reported as leaked" in browser.text("#leak")
    assert "It still works." in browser.text("#leak")
    browser.click("dialog #replace")
    assert "Replace the secret of deploy job" in browser.text("#replace-title")
    assert "Leaked" in browser.text("dialog .note")
    assert browser.all("[name=ends][value=now]")[0].is_selected()
    browser.click("#confirm")
    shown_secret(browser)
    assert world.verdict(created.secret) == "VERDICT_EXPIRED"
    if script:
        browser.js("document.getElementById('secret').dataset.copied = ''")
    browser.click("#stored")
    browser.gone("dialog")
    browser.gone("[data-review]")
    assert "Leaked" not in browser.text(f"#{created.token.id}")


def test_leaked_card_by_keyboard(browser: Browser, world: World, axe: str) -> None:
    """The card's actions and "Done" work by keyboard, at both widths, and are accessible."""
    created = world.create("deploy job", ttl={"seconds": 90 * DAY})
    kept = world.create("report", ttl={"seconds": 90 * DAY})
    for leaked in (created, kept):
        report(world, leaked)
    browser.open()
    browser.find("[data-review=leaked]")
    browser.accessible(axe, "the card")
    browser.screen("leaked")
    browser.open(f"/token?id={created.token.id}")
    browser.find("#leak")
    browser.accessible(axe, "the details of a leaked token")
    browser.screen("leaked-details")
    browser.open(f"/replace?id={created.token.id}")
    browser.find("#replace-title")
    browser.accessible(axe, "the form that replaces a leaked secret")
    browser.screen("leaked-replace")
    browser.open()
    browser.find("#remedy-leaked-delete")
    browser.tab_to("#remedy-leaked-delete")
    browser.press(Keys.ENTER)
    assert "Delete report?" in browser.text("dialog h2")
    browser.tab_to("#confirm")
    browser.press(Keys.ENTER)
    assert "Deleted report" in browser.text("#notice")
    assert world.verdict(kept.secret) == "VERDICT_DELETED"
    browser.tab_to("#done-leaked")
    browser.press(Keys.ENTER)
    browser.gone("[data-review]")
    assert "Leaked (1)" in browser.text("#reviewed")
    # One more makes it a card again.
    report(world, world.create("third", ttl={"seconds": 90 * DAY}))
    browser.open()
    assert "2 Leaked" in card(browser)


@pytest.mark.answers(422)
def test_rate_limit_of_a_new_token(browser: Browser, world: World, script: bool, axe: str) -> None:
    """A new token gets the typed limit, and a mistake is explained beside the field. The details
    and the edit form show the limit."""
    browser.open()
    browser.click("#generate")
    browser.type("#name", "limited")
    browser.type("#rate", "100/day")
    browser.click("#add")
    assert "Write it as “100/minute”" in browser.text("#error-rate")
    assert browser.find("#rate").get_attribute("aria-invalid") == "true"
    if script:
        browser.focused("#rate")
        # The bar with the buttons does not cover the field.
        browser.look(360)
        browser.js(
            "document.querySelector('#rate').blur(); document.querySelector('#rate').focus()"
        )
        assert browser.js(
            "const bar = document.querySelector('dialog .actions').getBoundingClientRect();"
            "const field = document.querySelector('#error-rate').getBoundingClientRect();"
            "return field.bottom <= bar.top"
        )
        browser.accessible(axe, "the form with a mistake")
        browser.screen("new-rate")
    browser.type("#rate", "100/minute, burst 20")
    browser.send("#rate", Keys.ENTER)
    shown_secret(browser)
    limit = world.tokens()["limited"].rate_limit
    assert (limit.count, limit.period.seconds, limit.burst) == (100, 60, 20)
    token_id = world.tokens()["limited"].id
    if script:
        browser.js("document.getElementById('secret').dataset.copied = ''")
    browser.open(f"/token?id={token_id}")
    assert "Rate limit 100/minute, burst 20" in " ".join(browser.text("dialog dl").split())
    browser.open(f"/edit?id={token_id}")
    assert browser.find("#rate").get_attribute("value") == "100/minute, burst 20"
