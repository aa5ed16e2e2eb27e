"""Sorting, selecting and reviewing many tokens, in a real browser."""

import re
from functools import partial

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World

pytestmark = pytest.mark.xdist_group("browser")


def names(browser: Browser) -> list[str]:
    """Return the names in the table from top to bottom."""
    return texts(browser.all("#rows th bdi"))


def pick(browser: Browser, *tokens: pb.Token) -> None:
    for token in tokens:
        browser.click(f"#{token.id} .pick")


def tab_back_to(browser: Browser, selector: str) -> None:
    """Press Shift and Tab until the matching element has the focus."""
    for _ in range(40):
        actions = ActionChains(browser.driver, duration=0)
        actions.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        if browser.has_focus(selector):
            return
    raise AssertionError(f"{selector} is not reached backwards")


def sorting(browser: Browser) -> dict[str, str | None]:
    """Return the aria-sort of each column that can be sorted."""
    return {
        header.text: header.get_attribute("aria-sort")
        for header in browser.all("thead th:has(.sort)")
    }


def is_sorted(browser: Browser, column: str, direction: str) -> bool:
    return sorting(browser)[column] == direction


def is_shown(browser: Browser, expected: list[str]) -> bool:
    return names(browser) == expected


def test_sort_by_column(browser: Browser, world: World, script: bool) -> None:
    """Each header sorts in both directions and states its order, which the address keeps."""
    world.create("forever", days_old=3)
    world.create("late", days_old=2, ttl={"seconds": 90 * 86_400})
    world.create("soon", days_old=1, ttl={"seconds": 60 * 86_400})
    browser.open()
    assert names(browser) == ["soon", "late", "forever"]
    assert sorting(browser) == {"Created At": "descending", "Expires": None, "Last Used": None}
    for order, expected, direction in (
        ("expiry", ["soon", "late", "forever"], "ascending"),
        ("expiry", ["forever", "late", "soon"], "descending"),
        ("newest", ["soon", "late", "forever"], "descending"),
        ("newest", ["forever", "late", "soon"], "ascending"),
    ):
        browser.click(f"#sort-{order}")
        column = {"expiry": "Expires", "newest": "Created At"}[order]
        browser.until(partial(is_sorted, browser, column, direction), f"{column} {direction}")
        assert names(browser) == expected
        if script:
            browser.focused(f"#sort-{order}")
    browser.driver.refresh()
    assert names(browser) == ["forever", "late", "soon"]


def test_sort_by_keyboard_and_on_a_phone(browser: Browser, world: World) -> None:
    """The headers are reached by Tab. On a phone, where the table has no headers, a list of orders
    sorts, and the rows that a keyboard reaches are visible."""
    world.create("forever")
    world.create("soon", ttl={"seconds": 60 * 86_400})
    browser.open()
    browser.click("#q")
    browser.tab_to("#sort-expiry")
    browser.press(Keys.ENTER)
    browser.until(lambda: sorting(browser)["Expires"] == "ascending", "the earliest expiry first")
    browser.focused("#sort-expiry")
    browser.press(Keys.ENTER)
    browser.until(lambda: names(browser) == ["forever", "soon"], "the latest expiry first")
    browser.focused("#sort-expiry")
    browser.look(PHONE)
    browser.open()
    browser.select("#sort", "-expiry")
    browser.until(lambda: "sort=-expiry" in browser.driver.current_url, "the order in the address")
    # The page shows the newest first until the list arrives, which is the opposite order.
    browser.until(lambda: names(browser) == ["forever", "soon"], "the latest expiry first")
    browser.click("#q")
    browser.tab_to("#sort-newest")
    assert browser.js("return document.activeElement.getBoundingClientRect().height > 10")
    browser.picture("sort-phone-focus")


def test_rows_of_another_order_continue(browser: Browser, world: World, script: bool) -> None:
    """Further rows of a sorted list continue in its order, and a reload shows them all."""
    for number in range(60):
        world.create(f"job {number:02}", ttl={"seconds": (number + 30) * 86_400})
    browser.open("/?sort=-expiry")
    expected = [f"job {number:02}" for number in reversed(range(60))]
    assert names(browser) == expected[:50]
    browser.click("#more")
    browser.until(lambda: len(names(browser)) == 60, "all rows")
    assert names(browser) == expected
    assert browser.text("#count") == ("60 of 60 tokens" if script else "60 tokens")
    browser.driver.refresh()
    assert names(browser) == expected


def test_filter_by_state(browser: Browser, world: World, script: bool) -> None:
    """The list shows tokens in one state, among all tokens of the account."""
    off = world.create("off").token
    world.stub.Disable(pb.DisableRequest(account_id=world.account, id=off.id), timeout=10)
    world.create("over", expires_days=-1)
    for number in range(55):
        world.create(f"filler {number}")
    for state, expected in (("disabled", ["off"]), ("expired", ["over"])):
        browser.open()
        browser.select("#state", state)
        if not script:
            browser.click("#filter button")
        browser.until(partial(is_shown, browser, expected), state)
        assert browser.text("#count") == "1 token of 57 in all"
        assert f"state={state}" in browser.driver.current_url


def test_delete_selected(browser: Browser, world: World, axe: str, script: bool) -> None:
    """Several tokens are deleted at once: one question with their names, one receipt. The others
    and those deleted meanwhile do not matter."""
    made = [world.create(name, scope=pb.SCOPE_WRITE) for name in ("a <b>", "keep", "b", "gone")]
    browser.open("/?access=write")
    if script:
        assert not browser.find("#list").find_element(By.ID, "picked").is_displayed()
    pick(browser, *(made[n].token for n in (0, 2, 3)))
    boxes = browser.all("#rows .pick")
    assert [box.accessible_name for box in boxes] == [
        "Select gone",
        "Select b",
        "Select keep",
        "Select a <b>",
    ]
    if script:
        assert browser.text("#picked-count") == "3 selected"
        assert browser.js("return document.getElementById('pick-all').indeterminate")
        browser.accessible(axe, "a selection")
        browser.screen("selected")
    browser.click("#delete-picked")
    assert browser.text("dialog h2") == "Delete 3 tokens?"
    assert texts(browser.all("dialog li bdi")) == ["gone", "b", "a <b>"]
    if script:
        browser.focused("dialog [data-close]")
        browser.accessible(axe, "the question")
        browser.screen("selected-question")
    world.delete(made[3].token.id)
    browser.click("#confirm")
    notice = browser.text("#notice")
    assert "Deleted 2 tokens One was deleted elsewhere before." in notice
    assert re.search(r"They stopped working everywhere [\d,]+ ms after you confirmed", notice)
    assert "Receipt: revision" in notice
    assert names(browser) == ["keep"]
    assert "access=write" in browser.driver.current_url or script
    for created, verdict in zip(made, ("DELETED", "VALID", "DELETED", "DELETED"), strict=True):
        assert world.verdict(created.secret) == f"VERDICT_{verdict}"
    if script:
        browser.screen("selected-deleted")


def test_selection_by_keyboard(browser: Browser, world: World) -> None:
    """By keyboard alone: select rows and all rows, clear, keep the tokens, and delete them. Screen
    readers announce the number."""
    made = [world.create(f"token {number}") for number in range(4)]
    browser.open()
    browser.click("#q")
    browser.tab_to("#pick-all")
    browser.press(Keys.SPACE)
    assert browser.text("#picked-count") == "4 selected"
    browser.tab_to(f"#{made[3].token.id} .pick")
    browser.press(Keys.SPACE)
    assert browser.text("#picked-count") == "3 selected"
    assert browser.js("return document.getElementById('live').textContent") == "3 selected"
    tab_back_to(browser, "#unpick")
    browser.press(Keys.ENTER)
    browser.focused("#pick-all")
    assert not browser.find("#list").find_element(By.ID, "picked").is_displayed()
    browser.tab_to(f"#{made[1].token.id} .pick")
    browser.press(Keys.SPACE)
    tab_back_to(browser, "#delete-picked")
    browser.press(Keys.ENTER)
    assert browser.text("dialog h2") == "Delete 1 token?"
    browser.press(Keys.ESCAPE)
    browser.gone("dialog")
    browser.focused("#delete-picked")
    assert browser.text("#picked-count") == "1 selected", "the selection stays"
    browser.press(Keys.ENTER)
    browser.tab_to("#confirm")
    browser.press(Keys.ENTER)
    assert "Deleted 1 token" in browser.text("#notice")
    assert names(browser) == ["token 3", "token 2", "token 0"]


@pytest.mark.answers(422)
def test_nothing_selected(browser: Browser, world: World) -> None:
    """Without the script, the button also works with nothing selected, and says so."""
    created = world.create("kept")
    browser.scripts(on=False)
    browser.open()
    browser.click("#delete-picked")
    assert "No token is selected" in browser.text("main")
    assert world.verdict(created.secret) == "VERDICT_VALID"


@pytest.mark.answers(503)
def test_an_unconfirmed_deletion_can_be_repeated(browser: Browser, world: World) -> None:
    """If the answer is lost, the page says that it does not know, and the same tokens can be
    deleted again."""
    made = [world.create(f"token {number}") for number in range(2)]
    browser.open()
    pick(browser, made[0].token, made[1].token)
    browser.click("#delete-picked")
    browser.find("#confirm")
    with world.relay.failing("DeleteAll", code=grpc.StatusCode.UNAVAILABLE):
        browser.click("#confirm")
        assert "Not confirmed yet" in browser.text("dialog:has(#unsure-title)")
    browser.click("dialog .primary")
    assert re.search(r"Deleted [02] tokens", browser.text("#notice"))
    assert {world.verdict(created.secret) for created in made} == {"VERDICT_DELETED"}


def test_a_review_can_be_marked_as_done(browser: Browser, world: World, script: bool) -> None:
    """A finding that was reviewed is hidden until further tokens have it or until it is shown
    again. Another account sees all of its own."""
    fine = {"seconds": 60 * 86_400}
    world.create("one", ttl=fine, scope=pb.SCOPE_WRITE)
    world.create("two")
    browser.open("/?q=o")

    def kinds() -> set[str | None]:
        return {card.get_attribute("data-review") for card in browser.all("[data-review]")}

    assert kinds() == {"write", "never-expires"}
    browser.click("#done-write")
    browser.until(lambda: kinds() == {"never-expires"}, "the other finding alone")
    assert "Reviewed: Can write (1)." in browser.text("#reviewed")
    assert "q=o" in browser.driver.current_url
    if script:
        browser.screen("reviewed")
    browser.click("#done-never-expires")
    browser.until(lambda: kinds() == set(), "no finding")
    world.create("three", ttl=fine, scope=pb.SCOPE_WRITE)
    browser.open()
    assert kinds() == {"write"}
    assert "Reviewed: No expiry (1)." in browser.text("#reviewed")
    browser.click("#unreviewed")
    browser.until(lambda: kinds() == {"write", "never-expires"}, "all findings")
    assert not browser.all("#reviewed")


def test_large_accounts_are_searched_in_steps(browser: Browser, world: World, script: bool) -> None:
    """In an account with more tokens than one request examines, counts are marked as lower bounds,
    and a search continues on request."""
    world.create("needle", days_old=30)
    world.sql(
        """
        INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
        SELECT 'tok_' || lpad($2 || n, 26, '0'), $1, 'hay ' || n, 'hay ' || n, 1,
               now() - n * interval '1 second', 'lk_…none'
          FROM generate_series(1, 50100) n
        """,
        world.account,
        re.sub(r"\D", "", world.account),
    )
    try:
        browser.open()
        assert browser.text("#count") == "50 of 10,000+ tokens"
        assert browser.text("[data-review=never-expires] b") == "10,000+"
        browser.open("/?q=needle")
        assert "No tokens match so far" in browser.text(".none")
        assert browser.text("#count") == "None so far, of 10,000+ tokens"
        assert browser.text("#more") == "Continue searching"
        if script:
            browser.screen("search-continues")
        browser.click("#more")
        browser.until(lambda: names(browser) == ["needle"], "the token at the end")
        assert not browser.all("#more")
        assert "This page continues a long list" in browser.text("main")
        browser.click("#first")
        browser.until(lambda: "No tokens match so far" in browser.text(".none"), "its beginning")
    finally:
        world.sql("DELETE FROM token WHERE account_id = $1", world.account)


def test_forced_colours(browser: Browser, world: World, axe: str) -> None:
    """With the system's colours, order and selection stay visible without colour alone."""
    created = world.create("one")
    world.create("two")
    browser.open("/?sort=expiry")
    pick(browser, created.token)
    for width in (DESK, PHONE):
        browser.look(width)
        browser.cdp(
            "Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}]
        )
        browser.picture(f"selected-forced-{width}")
        outline = browser.js(
            "return getComputedStyle(document.querySelector('tr:has(:checked)')).outlineStyle"
        )
        assert outline == "solid"
        arrow = browser.js(
            "return getComputedStyle(document.querySelector('[aria-sort] .sort'),"
            " '::after').content"
        )
        assert "↑" in arrow
