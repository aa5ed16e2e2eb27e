"""What people look for on the page: where a button is, how prominent it is, what a receipt says."""

import re

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.console.browsing import DESK, PHONE, Browser, texts
from tests.console.conftest import World
from tests.console.test_create import add, shown_secret

pytestmark = pytest.mark.xdist_group("browser")

MOMENT = r"[A-Z][a-z]+ [0-9]{1,2}, [0-9]{4} at [0-9]{1,2}:[0-9]{2}:[0-9]{2} [AP]M GMT\+[12]"
COLOURS = (
    "const s = getComputedStyle(document.querySelector(arguments[0]));"
    " return [s.backgroundColor, s.borderTopColor, s.color]"
)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_dialog_with_secret_has_no_close_button(browser: Browser, world: World, width: int) -> None:
    """The dialog with a secret has its picture before the title. The corner where other dialogs
    have their Close button is empty, because this one needs a deliberate answer."""
    world.create("existing")
    browser.look(width)
    browser.open()
    browser.click("#generate")
    corner = (
        "const box = document.querySelector('dialog').getBoundingClientRect();"
        "const found = document.elementFromPoint(box.right - 36, box.top + 36);"
        "return found.closest('a, button, img, svg')?.outerHTML ?? ''"
    )
    browser.focused("#name")
    assert "Close" in browser.js(corner)
    add(browser, "pictured")
    shown_secret(browser)
    assert browser.js(corner) == ""
    assert browser.js(
        "const [picture, title] = document.querySelector('dialog .title').children;"
        "return picture.matches('img[alt=\"\"]') && title.matches('h2')"
        " && picture.getBoundingClientRect().right < title.getBoundingClientRect().left"
    )
    browser.click("[data-copy]")


def test_delete_buttons_are_quiet_until_pointed_at(browser: Browser, world: World) -> None:
    """In the list and in the details, Delete has no more weight than its neighbour. It turns red
    under the pointer and with the focus. Only the final confirmation has a red button."""
    token = world.create("existing").token
    browser.open()

    def is_quiet(delete: str, neighbour: str) -> None:
        browser.find(delete)
        quiet = browser.js(COLOURS, delete)
        assert quiet == browser.js(COLOURS, neighbour)
        ActionChains(browser.driver).move_to_element(browser.find(delete)).perform()
        browser.until(lambda: browser.js(COLOURS, delete) != quiet, "the colours under the pointer")

    is_quiet(f"#{token.id} [data-act=delete]", f"#{token.id} [data-act=replace]")
    browser.click(f"#{token.id} .name")
    is_quiet("dialog #delete", "dialog .close")
    browser.send("dialog #delete", Keys.ENTER)
    browser.find("#confirm")
    loud = browser.js(COLOURS, "#confirm")
    assert loud[0] == browser.js(
        "const probe = document.createElement('i'); probe.style.color = 'var(--red)';"
        "document.body.append(probe); const colour = getComputedStyle(probe).color;"
        "probe.remove(); return colour"
    )


def test_list_says_what_to_do_about_a_lost_secret(
    browser: Browser, world: World, script: bool
) -> None:
    """The list says what to do about a lost secret, in the words of the button that does it."""
    token = world.create("existing").token
    browser.open()
    said = browser.text(".lost-secret")
    assert said.startswith("Lost a secret? Nobody can show it again.")
    named = browser.text(".lost-secret strong")
    assert browser.text(f"#{token.id} [data-act=replace]").startswith(named)
    browser.click(f"#{token.id} [data-act=replace]")
    browser.click("#confirm")
    assert world.verdict(shown_secret(browser)) == "VERDICT_VALID"


def test_receipts_have_date_and_time(browser: Browser, world: World, script: bool) -> None:
    """The receipt of each change that takes something away has its date and time, with the zone,
    in the page's text: a touch or a keyboard does not reach a tooltip."""
    tokens = {name: world.create(name).token for name in ("a", "b", "c", "d")}
    moment = MOMENT if script else r"[0-9]{1,2} [A-Z][a-z]{2} [0-9]{4}, [0-9:]{8} UTC"

    def receipt() -> None:
        assert re.search(
            rf"Receipt: revision [0-9]+, committed {moment}( ×)?$", browser.text("#notice")
        )

    browser.open(f"/disable?id={tokens['a'].id}")
    browser.click("#confirm")
    receipt()
    browser.open(f"/delete?id={tokens['a'].id}")
    browser.click("#confirm")
    receipt()
    for name in ("b", "c"):
        browser.click(f"#{tokens[name].id} .pick")
    browser.click("#delete-picked")
    browser.click("#confirm")
    receipt()
    # Asked once more, Latchkey returns the same receipt, and the page says when that was.
    browser.open(f"/delete?id={tokens['d'].id}")
    world.delete(tokens["d"].id)
    browser.click("#confirm")
    assert re.search(rf"stopped working everywhere {moment}\.", browser.text("#notice"))
    assert texts(browser.all("#rows th bdi")) == []


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_details_have_labels_and_an_id_to_copy(browser: Browser, world: World, width: int) -> None:
    """The details show the token's labels, and copy its id, by keyboard too."""
    for right in ("clipboard-read", "clipboard-write"):
        browser.cdp(
            "Browser.setPermission",
            permission={"name": right},
            setting="granted",
            origin=browser.url,
        )
    token = world.create("labelled", labels={"team": "payments", "env": "prod"}).token
    browser.look(width)
    browser.open()
    browser.click(f"#{token.id} .name")
    details = browser.text("dialog dl")
    assert "env prod" in details
    assert "team payments" in details
    assert browser.text("#token-id") == token.id
    browser.tab_to("[data-copy=token-id]")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.text("[data-copy=token-id]") == "Copied", "the feedback")
    copied = browser.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    )
    assert copied == token.id
