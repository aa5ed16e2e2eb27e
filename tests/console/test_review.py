"""What the page points out about the tokens, in a real browser."""

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
    """Return what is pointed out and how many tokens it is about."""
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
    """Each finding has its count over all tokens, a sentence why, and a filter of its own."""
    world.create("fine", ttl={"seconds": 90 * DAY})
    world.create("forever")
    world.create("ends soon", ttl={"seconds": 3 * DAY})
    world.create("ended", expires_days=-1)
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
        ("never-expires", "forever", "A copy that leaks works until someone notices"),
        ("expires-soon", "ends soon", "Stops working within 14 days"),
        ("expired", "ended", "Refused everywhere already"),
        ("old", "aged", "more than 180 days ago"),
        ("write", "writes", "Whoever holds one can change things"),
    ):
        assert why in browser.text(f"[data-review={kind}]")
        browser.click(f"[data-review={kind}]")
        browser.until(partial(is_shown, browser, [name]), name)
        assert why in browser.text(".why")
        assert f"review={kind}" in browser.driver.current_url
        assert browser.find(f"[data-review={kind}]").get_attribute("aria-current") == "true"
        if script:
            browser.focused(f"[data-review={kind}]")
        # Once more takes the filter away.
        browser.click(f"[data-review={kind}]")
        browser.until(lambda: len(names(browser)) == 6, "all of them")
    if script:
        browser.driver.back()
        browser.until(lambda: names(browser) == ["writes"], "the way back has the filter")


def test_use_is_reviewed_once_it_is_recorded(browser: Browser, world: World) -> None:
    """A service that records use gets columns and findings for it; one that does not, neither."""
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


def test_nothing_to_point_out(browser: Browser, world: World) -> None:
    """Where all is well there is no review in the way."""
    world.create("fine", ttl={"seconds": 90 * DAY})
    browser.open()
    browser.find("#rows")
    assert not browser.all(".review")
