"""Runs the console in this process, for requests that no browser would send."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from latchkey_console import settings
from latchkey_console.app import make_app

ORIGIN = "http://127.0.0.1:50080"
PEER = ("127.0.0.1", 40_000)


@asynccontextmanager
async def visitor(
    target: str, *, peer: tuple[str, int] = PEER, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the console with these settings and yield an HTTP client that keeps cookies."""
    app = make_app(settings.make(target=target, **options))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=peer)
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as browser:
        yield browser
    # The lifespan closes the application's client, but this transport does not run it.
    inbox = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> dict[str, str]:
        return inbox.pop(0)

    async def send(_: Any) -> None:
        pass

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)


def fields(page: str) -> dict[str, str]:
    """Return the hidden form fields of a page by name."""
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page)
    return dict(found)


async def form(browser: httpx.AsyncClient, **values: str) -> dict[str, str]:
    """Fetch the form for a new token and fill it in."""
    page = await browser.get("/new")
    assert page.status_code == 200
    return fields(page.text) | {"name": "made", "scope": "read", "expiry": "90"} | values


async def send(
    browser: httpx.AsyncClient, path: str, data: dict[str, str], **headers: str
) -> httpx.Response:
    """Submit a form as a browser on the page would, or with other headers."""
    sent = {"origin": ORIGIN} | {k.replace("_", "-"): v for k, v in headers.items()}
    return await browser.post(path, data=data, headers={k: v for k, v in sent.items() if v})
