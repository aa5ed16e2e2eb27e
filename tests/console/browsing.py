"""A real browser, and what the tests ask of it."""

import json
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

from tests.console import tools

T = TypeVar("T")
SCREENS = tools.ROOT / "build/screens"
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.02
PHONE, DESK = 360, 1440
HEIGHTS = {PHONE: 740, DESK: 900}
_FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    # Whatever a page asks for, nothing leaves this machine.
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """Chromium on one page of the tests', with one tab. Elements are given by CSS selectors."""

    def __init__(self, found: tools.Browser, profile: Path) -> None:
        options = ChromeOptions()
        options.binary_location = found.binary
        for flag in (*_FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options, Service(found.driver))
        self.driver.set_page_load_timeout(30)
        self.driver.set_script_timeout(30)
        self.url = ""
        self._scripted = True

    def reset(self, url: str, account: str | None) -> None:
        """Begin a test: nothing of the one before, at the page's address, as this account."""
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
        """Call a method of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(method, parameters)

    def scripts(self, *, on: bool) -> None:
        """Let pages run scripts, or not."""
        self.cdp("Emulation.setScriptExecutionDisabled", value=not on)
        self._scripted = on

    def look(self, width: int, *, dark: bool = False, still: bool = True) -> None:
        """Take on a width and a colour scheme."""
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
        """Return what matches, waiting for it to be there and shown."""

        def look() -> WebElement | None:
            element = self.driver.find_element(By.CSS_SELECTOR, selector)
            return element if element.is_displayed() else None

        return self.until(look, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Return all that match now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def gone(self, selector: str) -> None:
        """Wait until nothing matches."""
        self.until(lambda: not self.all(selector), f"no {selector}")

    def text(self, selector: str) -> str:
        """Return the text of what matches, waiting for it."""
        return " ".join(self.until(lambda: self.find(selector).text, selector).split())

    def click(self, selector: str) -> None:
        """Click what matches, waiting for it; and, without scripts, for the page it leads to."""
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
        # The driver may go on with the page that is left until it hears of the new one.
        for page in left:
            self.until(partial(_is_gone, page), f"the page that {selector} leads to")

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as by pasting: the driver cannot type what has no key."""
        self.find(selector).clear()
        if text.isascii():
            self.find(selector).send_keys(text)
        else:
            self.find(selector).click()
            self.cdp("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is then, also if the page changes meanwhile."""
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def tab_to(self, selector: str, *, most: int = 40) -> None:
        """Press Tab until what matches has the focus: it can be reached by keyboard."""
        for _ in range(most):
            self.press(Keys.TAB)
            if self.has_focus(selector):
                return
        raise AssertionError(f"{selector} is not reached by {most} tabs")

    def has_focus(self, selector: str) -> bool:
        """Tell whether what has the focus matches."""
        return bool(self.js("return document.activeElement.matches(arguments[0])", selector))

    def focused(self, selector: str) -> None:
        """Wait until what matches has the focus."""
        self.until(lambda: self.has_focus(selector), f"the focus on {selector}")

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script of the test's own, which no policy of the page's keeps out."""
        return self.driver.execute_script(script, *arguments)

    def until(self, check: Callable[[], T | None], what: str) -> T:
        """Try until it answers with something true, and return that."""
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
        """Write what is seen to build/screens: both schemes, phone and desk."""
        SCREENS.mkdir(parents=True, exist_ok=True)
        for width in (PHONE, DESK):
            for dark in (False, True):
                self.look(width, dark=dark)
                path = SCREENS / f"{name}-{width}-{'dark' if dark else 'light'}.png"
                assert self.driver.save_screenshot(str(path))
        self.look(DESK)

    def console_errors(self) -> list[str]:
        """Return what the browser complained of since the last time."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def accessible(self, axe: str, what: str) -> None:
        """Let axe look at the page, at both widths and in both schemes: nothing serious."""
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
            # Nothing is wider than the window.
            assert self.js("return document.documentElement.scrollWidth <= innerWidth"), what
        self.look(DESK)

    def close(self) -> None:
        self.driver.quit()


@contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser, installing it where that can be done."""
    found = tools.browser()
    with tempfile.TemporaryDirectory(prefix="latchkey-browser-") as profile:
        running = Browser(found, Path(profile))
        try:
            yield running
        finally:
            running.close()


def _is_gone(element: WebElement) -> bool:
    """Tell whether an element's page is no longer shown."""
    try:
        element.is_enabled()
    except StaleElementReferenceException:
        return True
    return False


def texts(elements: Sequence[WebElement]) -> list[str]:
    """Return the elements' texts, each on one line."""
    return [" ".join(element.text.split()) for element in elements]
