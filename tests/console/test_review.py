"""The review of an account's tokens, in a real browser."""

import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.console.browsing import POLL_SECONDS, Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")

DAY = 86_400
# The documented bound is 15 seconds. The rest is for a busy machine.
USE_SECONDS = 30.0


def found(browser: Browser) -> dict[str, int]:
    """Return the number of tokens per kind of finding."""
    return {
        str(a.get_attribute("data-review")): int(a.find_element("tag name", "b").text)
        for a in browser.all("[data-review]")
    }


def names(browser: Browser) -> list[str]:
    return texts(browser.all("#rows th bdi"))


def is_shown(browser: Browser, wanted: list[str]) -> bool:
    return names(browser) == wanted


def test_each_finding_is_counted_explained_and_filtered(
    browser: Browser, world: World, script: bool
) -> None:
    """Each finding shows its count, its reason and its own filter."""
    world.create("fine", ttl={"seconds": 90 * DAY})
    world.create("forever")
    world.create("expires soon", ttl={"seconds": 3 * DAY})
    world.create("expired", expires_days=-1)
    world.create("writes", scope=pb.SCOPE_WRITE, ttl={"seconds": 90 * DAY})
    aged = world.create("aged", days_old=200, ttl={"seconds": 90 * DAY})
    world.used(aged, "shop", 1, timedelta(days=1))
    browser.open()
    assert found(browser) == {
        "expired": 1,
        "expires-soon": 1,
        "never-expires": 1,
        "old": 1,
        "write": 1,
    }
    for kind, name, why in (
        (
            "never-expires",
            "forever",
            "If a copy leaks, it works until someone notices. Set an expiry.",
        ),
        ("expires-soon", "expires soon", "Expires within 14 days"),
        ("expired", "expired", "Refused everywhere"),
        ("old", "aged", "over 180 days old"),
        ("write", "writes", "Whoever has the secret can change data"),
    ):
        assert why in browser.text(f"[data-review={kind}]")
        browser.click(f"[data-review={kind}]")
        browser.until(partial(is_shown, browser, [name]), name)
        assert f"review={kind}" in browser.driver.current_url
        assert browser.find(f"[data-review={kind}]").get_attribute("aria-current") == "true"
        if script:
            browser.focused(f"[data-review={kind}]")
        # A second click removes the filter.
        browser.click(f"[data-review={kind}]")
        browser.until(lambda: len(names(browser)) == 6, "all of them")
    if script:
        browser.driver.back()
        browser.until(lambda: names(browser) == ["writes"], "the filter after Back")


def test_use_is_reviewed(browser: Browser, world: World, script: bool) -> None:
    """The list shows the last use with its caller, and the review finds tokens without use."""
    fields: dict[str, Any] = {"ttl": {"seconds": 90 * DAY}}
    busy = world.create("busy", days_old=100, **fields)
    idle = world.create("idle", days_old=150, **fields)
    world.create("untouched", days_old=20, **fields)
    world.create("fresh", **fields)
    # Nobody has used any token, and the service says that it records use.
    browser.open()
    assert found(browser) == {"never-used": 3}
    world.used(busy, "shop", 1_200, timedelta(minutes=3))
    world.used(busy, "batch", 7, timedelta(days=2))
    world.used(idle, "shop", 1, timedelta(days=120))
    browser.open()
    assert found(browser) == {"unused": 1, "never-used": 1}
    assert "Last Used" in texts(browser.all("thead th"))
    rows = dict(zip(names(browser), texts(browser.all("#rows tr")), strict=True))
    assert "3 minutes ago by shop" in rows["busy"]
    assert "120 days ago by shop" in rows["idle"]
    if script:
        browser.screen("used")
    browser.click("[data-review=unused]")
    browser.until(lambda: names(browser) == ["idle"], "the unused one")
    browser.click("[data-review=never-used]")
    browser.until(lambda: names(browser) == ["untouched"], "the one that was never used")
    browser.click("#unreview")
    browser.until(lambda: len(names(browser)) == 4, "all of them")
    browser.click(f"#{busy.token.id} [data-act=token]")
    details = browser.text("dialog .usage")
    assert "shop 1,200" in details
    assert "batch 7" in details
    if script:
        browser.screen("details-used")
    browser.click("#delete")
    question = browser.text("dialog:has(#confirm)")
    assert "Last used 3 minutes ago by shop: it will be refused from now on." in question
    if script:
        browser.screen("delete-used")


def test_a_use_arrives(browser: Browser, world: World) -> None:
    """A verify appears as the token's last use once the server has written it."""
    created = world.create("real", ttl={"seconds": 90 * DAY})
    assert world.verdict(created.secret) == "VERDICT_VALID"
    give_up = time.monotonic() + USE_SECONDS
    while not world.tokens()["real"].HasField("last_used_time"):
        assert time.monotonic() < give_up, "the use was not recorded"
        time.sleep(POLL_SECONDS)
    browser.open()
    assert "just now" in texts(browser.all("#rows td"))[3]


def test_review_is_hidden_without_findings(browser: Browser, world: World) -> None:
    """Without findings, the page has no review section."""
    world.create("fine", ttl={"seconds": 90 * DAY})
    browser.open()
    browser.find("#rows")
    assert not browser.all(".review")
