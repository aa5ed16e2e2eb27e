"""Drives a real browser for the tests."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from selenium.common.exceptions import (
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from tests.console import tools
from tests.helpers.repository import ROOT

T = TypeVar("T")
SCREENS = ROOT / "build/screens"
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.04
PHONE, DESK = 360, 1440
HEIGHTS = {PHONE: 740, DESK: 900}
_FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    # Pages cannot send requests to other machines.
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# The driver's own check takes ten times as long, because it sends a large script each time.
_VISIBLE = """
const found = document.querySelector(arguments[0]);
const visible = found?.checkVisibility({visibilityProperty: true, opacityProperty: true});
return visible ? found : null;
"""


class Browser:
    """Chromium with one tab. The methods take CSS selectors."""

    def __init__(self, found: tools.Browser, profile: Path, *, saves_screens: bool = False) -> None:
        options = ChromeOptions()
        options.binary_location = found.binary
        for flag in _FLAGS:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # The driver keeps the browser's profile in its folder for temporary files.
        environment = os.environ | {"TMPDIR": str(profile)}
        self.driver = Chrome(options, Service(found.driver, env=environment))
        self.driver.set_page_load_timeout(30)
        self.driver.set_script_timeout(30)
        self.url = ""
        self._scripted = True
        self._saves_screens = saves_screens

    def reset(self, url: str, account: str | None) -> None:
        """Start a test: clear all earlier state, then set the page's URL and the account."""
        self.driver.get("about:blank")
        self.scripts(on=True)
        self.cdp("Network.enable")
        self.cdp("Network.clearBrowserCookies")
        headers = {"X-Forwarded-User": account} if account else {}
        self.cdp("Network.setExtraHTTPHeaders", headers=headers)
        self.cdp("Emulation.setTimezoneOverride", timezoneId="Europe/Zurich")
        self.look(DESK)
        self.console_errors()
        self.url = url

    def cdp(self, method: str, **parameters: Any) -> Any:
        """Call a DevTools protocol method."""
        return self.driver.execute_cdp_cmd(method, parameters)

    def scripts(self, *, on: bool) -> None:
        """Enable or disable JavaScript."""
        self.cdp("Emulation.setScriptExecutionDisabled", value=not on)
        self._scripted = on

    def look(self, width: int, *, dark: bool = False, still: bool = True) -> None:
        """Set the window's width and colour scheme."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=HEIGHTS[width],
            deviceScaleFactor=1,
            mobile=width == PHONE,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def open(self, path: str = "/") -> None:
        """Go to a path of the page."""
        self.driver.get(self.url + path)

    def find(self, selector: str) -> WebElement:
        """Return the matching element, once it exists and is visible."""

        def look() -> WebElement | None:
            element: WebElement | None = self.js(_VISIBLE, selector)
            return element

        return self.until(look, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Return all elements that match now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def gone(self, selector: str) -> None:
        """Wait until nothing matches."""
        self.until(lambda: not self.all(selector), f"no {selector}")

    def text(self, selector: str) -> str:
        """Return the matching element's text, once it exists."""
        return " ".join(self.until(lambda: self.find(selector).text, selector).split())

    def click(self, selector: str) -> None:
        """Click the matching element once it exists. Without scripts, wait for the next page."""
        left: list[WebElement] = []

        def click() -> bool:
            element = self.find(selector)
            leads = not self._scripted and self.js(
                "return arguments[0].closest('a[href], button, [type=submit]') !== null", element
            )
            left[:] = self.all("html") if leads else []
            element.click()
            return True

        self.until(click, f"a click on {selector}")
        # The driver may still address the old page until it detects the new one.
        for page in left:
            self.until(partial(_is_gone, page), f"the page that {selector} leads to")

    def type(self, selector: str, text: str) -> None:
        """Paste a text into a field: the driver cannot type characters that have no key."""

        def clear() -> bool:
            self.find(selector).clear()
            return True

        self.until(clear, f"an empty {selector}")
        if text.isascii():
            self.send(selector, text)
        else:
            self.click(selector)
            self.cdp("Input.insertText", text=text)

    def send(self, selector: str, *keys: str) -> None:
        """Send keys to the matching element, once it exists."""

        # The page may replace the element between the two steps. Then no key has arrived yet.
        def send() -> bool:
            self.find(selector).send_keys(*keys)
            return True

        self.until(send, f"keys sent to {selector}")

    def select(self, selector: str, value: str) -> None:
        """Select the option with this value, once the matching list exists."""

        def select() -> bool:
            Select(self.find(selector)).select_by_value(value)
            return True

        self.until(select, f"{value} selected in {selector}")

    def press(self, *keys: str) -> None:
        """Press keys at the current focus, even if the page changes between keys."""
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def tab_to(self, selector: str, *, most: int = 40) -> None:
        """Press Tab until the matching element has the focus. Fails after `most` presses."""
        for _ in range(most):
            self.press(Keys.TAB)
            if self.has_focus(selector):
                return
        raise AssertionError(f"{selector} is not reached by {most} tabs")

    def has_focus(self, selector: str) -> bool:
        """Return whether the focused element matches."""
        return bool(self.js("return document.activeElement.matches(arguments[0])", selector))

    def focused(self, selector: str) -> None:
        """Wait until the matching element has the focus."""
        self.until(lambda: self.has_focus(selector), f"the focus on {selector}")

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script of the test, which the page's content policy does not block."""
        return self.driver.execute_script(script, *arguments)

    def until(self, check: Callable[[], T | None], what: str) -> T:
        """Call `check` until its result is true, and return the result."""
        give_up = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                if found := check():
                    return found
                last: object = "not so"
            except (
                NoSuchElementException,
                StaleElementReferenceException,
                JavascriptException,
                WebDriverException,
            ) as error:
                last = str(error).partition("\n")[0]
            assert time.monotonic() < give_up, f"not in time: {what} ({last})"
            time.sleep(POLL_SECONDS)

    def screen(self, name: str) -> None:
        """Save screenshots to build/screens, in both colour schemes and both widths, if the run
        asks for them."""
        if not self._saves_screens:
            return
        for width in (PHONE, DESK):
            for dark in (False, True):
                self.look(width, dark=dark)
                self.picture(f"{name}-{width}-{'dark' if dark else 'light'}")
        self.look(DESK)

    def picture(self, name: str) -> None:
        """Save one screenshot to build/screens, as the window is, if the run asks for them."""
        if not self._saves_screens:
            return
        SCREENS.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(SCREENS / f"{name}.png"))

    def console_errors(self) -> list[str]:
        """Return the browser's error messages since the last call."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def accessible(self, axe: str, what: str) -> None:
        """Assert that axe finds nothing serious on the page, at both widths and in both schemes."""
        for width, dark in ((DESK, False), (DESK, True), (PHONE, False)):
            self.look(width, dark=dark)
            if not self.js("return 'axe' in window"):
                self.js(axe)
            found = self.driver.execute_async_script(
                "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']})"
                ".then((r) => done(JSON.stringify(r.violations)))"
            )
            wrong = [
                (violation["id"], violation["impact"], [n["html"] for n in violation["nodes"]])
                for violation in json.loads(found)
                if violation["impact"] in ("serious", "critical", "moderate")
            ]
            assert wrong == [], f"{what} at {width}{' dark' if dark else ''}: {wrong}"
            # Nothing may be wider than the window: a phone would show the whole page smaller.
            assert self.js("return document.documentElement.scrollWidth") <= width, what
        self.look(DESK)

    def close(self) -> None:
        self.driver.quit()


@contextmanager
def browser(*, saves_screens: bool = False) -> Iterator[Browser]:
    """Run a browser, and install it first if possible."""
    found = tools.browser()
    with tempfile.TemporaryDirectory(prefix="latchkey-browser-") as profile:
        running = Browser(found, Path(profile), saves_screens=saves_screens)
        try:
            yield running
        finally:
            running.close()


def _is_gone(element: WebElement) -> bool:
    """Return whether the browser has left the element's page."""
    try:
        element.is_enabled()
    except StaleElementReferenceException:
        return True
    return False


def texts(elements: Sequence[WebElement]) -> list[str]:
    """Return the texts of the elements, each on one line."""
    return [" ".join(element.text.split()) for element in elements]
