"""The table of tokens in a real browser: content, order, filter and paging."""

import re

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")


def names(browser: Browser) -> list[str]:
    """Return the names in the table from top to bottom."""
    return texts(browser.all("#rows th bdi"))


def test_table_shows_every_token_newest_first(browser: Browser, world: World, script: bool) -> None:
    """Each token has one row with name, hint, scope, times and a Delete button, newest first."""
    world.create("deploy job")
    newest = world.create("backup", scope=pb.SCOPE_WRITE, ttl={"seconds": 30 * 86_400}).token
    browser.open()
    header = texts(browser.all("thead th"))
    assert header[:4] == ["Name", "Access Scope", "Created At", "Expires"]
    assert names(browser) == ["backup", "deploy job"]
    first, second = texts(browser.all("#rows tr"))
    assert newest.hint in first
    assert "Write" in first
    assert "just now" in first
    assert "in 30 days" in first
    assert "Read" in second
    assert "Never" in second
    assert [b.accessible_name for b in browser.all("#rows tr:first-child .acts button")] == [
        "Replace the secret of backup",
        "Delete backup",
    ]
    assert browser.text("#count") == "2 tokens"


def test_empty_state_says_what_tokens_are_for(browser: Browser, world: World, script: bool) -> None:
    """For an account without tokens, the page explains tokens and how to create one."""
    browser.open()
    said = browser.text("main")
    assert "No tokens yet" in said
    assert "A token lets a program" in said
    assert "Name your first token" in said
    browser.click("#generate")
    assert browser.find("#name")
    if script:
        browser.click("dialog [data-close]")
        browser.screen("empty")


def test_more_rows_keep_the_scroll_position(browser: Browser, world: World, script: bool) -> None:
    """More rows appear below the existing ones, survive a reload, and never repeat."""
    for number in range(120):
        world.create(f"token {number:03}")
    browser.open()
    assert browser.text("#count") == "50 of 120 tokens"
    browser.find("#more")
    before = browser.js("return scrollY")
    browser.js("document.getElementById('more').scrollIntoView()")
    scrolled = browser.js("return scrollY")
    assert scrolled > before
    # A token created in the meantime does not shift the rows that follow.
    world.create("made meanwhile")
    browser.click("#more")
    browser.until(lambda: len(browser.all("#rows tr")) >= 100, "a hundred rows")
    shown = names(browser)
    assert len(set(shown)) == len(shown)
    assert "token 069" in shown
    # The former last row is still visible.
    top = browser.js("return document.querySelectorAll('#rows tr')[49].getBoundingClientRect().top")
    assert -100 <= top <= 900
    if script:
        assert browser.has_focus("#rows tr:nth-child(51) th")
        assert "100 of 120 tokens" in browser.js(
            "return document.getElementById('live').textContent"
        )
    browser.driver.refresh()
    assert len(browser.all("#rows tr")) == 100
    # By keyboard, because a click would miss while the browser restores the scroll position.
    browser.send("#more", Keys.ENTER)

    browser.until(lambda: len(browser.all("#rows tr")) == 121, "all rows")
    assert names(browser)[0] == "made meanwhile"
    assert names(browser)[-1] == "token 000"
    assert not browser.all("#more")


def test_filter_by_name_and_scope(browser: Browser, world: World, script: bool) -> None:
    """The filter finds names in any case, hints and scopes, among all tokens."""
    world.create("Deploy Köln")
    found = world.create("other", scope=pb.SCOPE_WRITE).token
    for number in range(60):
        world.create(f"filler {number}")
    browser.open()

    def narrow(text: str, scope: str = "") -> None:
        browser.type("#q", text)
        # In one script, because the list may be replaced between two.
        browser.js(
            "const access = document.getElementById('access'); access.value = arguments[0];"
            "if (arguments[1]) access.dispatchEvent(new Event('input', {bubbles: true}))",
            scope,
            script,
        )
        if not script:
            browser.click("#filter button")

    narrow("köln".upper())
    browser.until(lambda: names(browser) == ["Deploy Köln"], "the token with that name")
    assert browser.text("#count") == "1 token of 62 in all"
    assert "q=K" in browser.driver.current_url
    if script:
        assert browser.has_focus("#q"), "the field keeps the focus while typing"
    narrow(found.hint[-4:])
    browser.until(lambda: names(browser) == ["other"], "the token with that hint")
    narrow("", "write")
    browser.until(lambda: names(browser) == ["other"], "the token that can write")
    browser.driver.refresh()
    assert names(browser) == ["other"], "the URL holds the filter"
    narrow("no such name")
    assert "No tokens match" in browser.text(".none")
    browser.click(".none .button")
    browser.until(lambda: len(names(browser)) == 50, "all again")


def test_out_of_order_answers_show_the_latest_filter(browser: Browser, world: World) -> None:
    """If the user types on during a slow answer, the list shows only the latest filter."""
    world.create("alpha")
    world.create("beta")
    browser.open()
    world.relay.calls.clear()
    with world.relay.failing("List", seconds=0.8, times=1):
        browser.type("#q", "alp")
        browser.until(lambda: world.relay.calls == ["List"], "the slow question")
        browser.send("#q", Keys.BACKSPACE, Keys.BACKSPACE, Keys.BACKSPACE, *"bet")
        browser.until(lambda: names(browser) == ["beta"], "the answer to the later question")
        slow = browser.driver.execute_async_script("setTimeout(arguments[0], 900, true)")
        assert slow
    assert names(browser) == ["beta"]
    assert browser.find("#q").get_attribute("value") == "bet"
    assert browser.find("main").get_attribute("aria-busy") is None


def test_more_rows_of_a_filtered_list(browser: Browser, world: World) -> None:
    """The count stays correct when more rows of a filtered list arrive."""
    for number in range(60):
        world.create(f"job {number}")
    world.create("other")
    browser.open("/?q=job")
    assert browser.text("#count") == "50 of 60 tokens of 61 in all"
    browser.click("#more")
    browser.until(lambda: len(names(browser)) == 60, "all that match")
    assert browser.text("#count") == "60 of 60 tokens of 61 in all"
    assert "q=job" in browser.driver.current_url
    assert not browser.all("#more")


def test_unusual_names_are_harmless(browser: Browser, world: World) -> None:
    """Markup, emoji and right-to-left names are plain text and do not break the layout."""
    strange = [
        "<script>document.title='broken'</script>",
        "\U0001f511" * 64,
        "مفتاح النشر",
        "\u202egnp.exe",
        "&lt;b&gt; \"quoted\" 'too'",
        "W" * 64,
        "👩‍👩‍👧‍👦 family",
    ]
    for name in strange:
        world.create(name)
    browser.open()
    shown = names(browser)
    assert shown == [
        strange[6],
        strange[5],
        strange[4],
        "‹U+202E›gnp.exe",
        strange[2],
        strange[1],
        strange[0],
    ]
    assert browser.driver.title == "API Tokens · Latchkey"
    for width in (PHONE, DESK):
        browser.look(width)
        assert browser.js("return document.documentElement.scrollWidth <= innerWidth")
        # The right-to-left name reverses nothing else.
        lefts = browser.js(
            "return [...document.querySelectorAll('#rows .pill')]"
            ".map((pill) => Math.round(pill.getBoundingClientRect().left))"
        )
        assert len(set(lefts)) == 1
    browser.screen("strange-names")
    # The dialog's heading contains the name, too.
    browser.click("#rows tr:last-child [data-act=delete]")
    assert strange[0] in browser.text("dialog h2")
    browser.screen("strange-delete")


def test_times_are_in_the_viewers_zone(browser: Browser, world: World) -> None:
    """A time shows date and time in the viewer's zone. Hovering adds the seconds and the zone."""
    token = world.create("late").token
    world.sql("UPDATE token SET create_time = '2026-01-31 23:30:05+00' WHERE id = $1", token.id)
    browser.open()
    created = browser.find("#rows time")
    assert " ".join(created.text.split()) == "Feb 1, 2026, 12:30 AM"
    assert re.search(r"February 1, 2026.*12:30:05.*GMT\+1", created.get_attribute("title") or "")
    browser.scripts(on=False)
    browser.open()
    created = browser.find("#rows time")
    assert (created.text, created.get_attribute("title")) == (
        "31 Jan 2026, 23:30 UTC",
        "31 Jan 2026, 23:30:05 UTC",
    )
