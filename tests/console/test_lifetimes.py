"""The page in a real browser where the service limits how long tokens live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.console import browsing
from tests.console.browsing import Browser
from tests.console.processes import console, run
from tests.helpers.service_process import service

pytestmark = pytest.mark.xdist_group("browser")

ACCOUNT = "limited"
SECONDS_MAX = 45 * 86_400


@pytest.fixture(scope="module")
def limited(page_database: str, pepper_file: Path, scratch: Path) -> Iterator[tuple[str, Any]]:
    """URL of a console, and a stub, of a service that allows 45 days."""
    with (
        service(
            scratch / "limited-service",
            database_url=page_database,
            pepper_file=pepper_file,
            data_dir=scratch / "limited-data",
            listen="127.0.0.1:0",
            log_format="json",
            max_ttl="45d",
        ) as running,
        grpc.insecure_channel(address := run(running.welcome())) as channel,
        console(
            scratch / "limited-page",
            *("--account-header", "X-Forwarded-User", "--trusted-proxy", "127.0.0.1"),
            *("--target", address),
        ) as (_, url),
    ):
        yield url, pb_grpc.TokenServiceStub(channel)


@pytest.fixture
def browser(one_browser: browsing.Browser, limited: tuple[str, Any]) -> Iterator[Browser]:
    """The browser on that console."""
    one_browser.reset(limited[0], ACCOUNT)
    yield one_browser
    assert one_browser.console_errors() == []


def offered(browser: Browser) -> list[str]:
    return [str(radio.get_attribute("value")) for radio in browser.all("[name=expiry]")]


def test_page_offers_only_what_is_allowed(
    browser: Browser, limited: tuple[str, Any], axe: str
) -> None:
    """The forms offer no longer lifetime than the limit, nor tokens that never expire. The choice
    that is the limit works, by keyboard too, and the forms are accessible."""
    stub = limited[1]
    browser.open()
    browser.click("#generate")
    browser.focused("#name")
    assert offered(browser) == ["30", f"{SECONDS_MAX}s", "date"]
    assert "at most 45 days here" in browser.text("#hint-expiry")
    assert browser.js("return document.querySelector('#date').max") != ""
    browser.accessible(axe, "the form with a limit")
    browser.screen("new-limited")
    browser.type("#name", "by keyboard")
    browser.tab_to("[name=expiry]")
    assert browser.js("return document.activeElement.value") == f"{SECONDS_MAX}s"
    browser.tab_to("#add")
    browser.press("\ue007")
    browser.text("#secret")
    request = pb.ListRequest(account_id=ACCOUNT)
    (token,) = stub.List(request, timeout=10).tokens
    assert token.expire_time.seconds - token.create_time.seconds == SECONDS_MAX

    browser.open(f"/edit?id={token.id}")
    browser.find("#edit-title")
    assert offered(browser) == ["keep", "30", f"{SECONDS_MAX}s", "date"]
    browser.accessible(axe, "the edit form with a limit")
    browser.open(f"/replace?id={token.id}")
    browser.find("#replace-title")
    assert offered(browser) == ["keep", "30", f"{SECONDS_MAX}s"]
    browser.accessible(axe, "the replace form with a limit")
    browser.screen("replace-limited")
