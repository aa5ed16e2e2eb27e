"""The review of an account's tokens, in a real browser."""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.console.browsing import Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")

DAY = 86_400


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
    world.create("aged", days_old=200, ttl={"seconds": 90 * DAY})
    browser.open()
    assert found(browser) == {
        "expired": 1,
        "expires-soon": 1,
        "never-expires": 1,
        "old": 1,
        "write": 1,
    }
    for kind, name, why in (
        ("never-expires", "forever", "A leaked copy works until someone notices"),
        ("expires-soon", "expires soon", "Expires within 14 days"),
        ("expired", "expired", "Already refused everywhere"),
        ("old", "aged", "over 180 days old"),
        ("write", "writes", "Anyone who holds it can change things"),
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


def test_use_is_reviewed_once_it_is_recorded(browser: Browser, world: World) -> None:
    """The page has a column and findings for use only if the service records use."""
    world.create("busy", days_old=100, ttl={"seconds": 90 * DAY})
    world.create("idle", days_old=150, ttl={"seconds": 90 * DAY})
    world.create("untouched", days_old=20, ttl={"seconds": 90 * DAY})
    world.create("fresh", ttl={"seconds": 90 * DAY})
    browser.open()
    assert found(browser) == {}
    assert "Last Used" not in texts(browser.all("thead th"))
    used = {"busy": timedelta(hours=2, minutes=5), "idle": timedelta(days=120)}

    def record(token: Any) -> None:
        if token.name in used:
            token.last_used_time.FromDatetime(datetime.now(UTC) - used[token.name])

    with world.relay.altering_list(record):
        browser.open()
        assert found(browser) == {"unused": 1, "never-used": 1}
        assert "Last Used" in texts(browser.all("thead th"))
        rows = dict(zip(names(browser), texts(browser.all("#rows tr")), strict=True))
        assert "2 hours ago" in rows["busy"]
        browser.click("[data-review=unused]")
        browser.until(lambda: names(browser) == ["idle"], "the unused one")
        browser.click("[data-review=never-used]")
        browser.until(lambda: names(browser) == ["untouched"], "the one that was never used")


def test_review_is_hidden_without_findings(browser: Browser, world: World) -> None:
    """Without findings, the page has no review section."""
    world.create("fine", ttl={"seconds": 90 * DAY})
    browser.open()
    browser.find("#rows")
    assert not browser.all(".review")
