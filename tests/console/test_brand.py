"""The page under the name of somebody else's product."""

from typing import Any

import pytest

from tests.console.asgi import form, send, visitor

BRAND: dict[str, Any] = {
    "product_name": "Acme & Sons",
    "api_example_url": "https://api.acme.example:8443/v2",
    "support_url": "https://acme.example/help",
}


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


async def test_the_page_has_the_product_s_name(address: str) -> None:
    """Header, title, examples and the link to support are those of the product. The name Latchkey
    does not appear, neither on the list nor with a new secret nor in an error."""
    async with visitor(address, account="acme", **BRAND) as browser:
        page = (await browser.get("/")).text
        assert "<title>API Tokens · Acme &amp; Sons</title>" in page
        assert 'href="https://acme.example/help"' in page
        answer = await send(browser, "/tokens", await form(browser))
        created = await browser.get(answer.headers["location"])
        assert "https://api.acme.example:8443/v2" in created.text
        assert "api.acme.example:8443 package.Service/Method" in created.text
        missing = (await browser.get("/nowhere")).text
        for text in (page, created.text, missing):
            assert "Latchkey" not in text
            assert "api.example.com" not in text


async def test_without_settings_it_is_latchkey_s_page(address: str) -> None:
    """By default the page shows Latchkey's name and icon, and no link to support."""
    async with visitor(address, account="acme") as browser:
        page = (await browser.get("/")).text
        assert "<title>API Tokens · Latchkey</title>" in page
        assert "Get help" not in page
