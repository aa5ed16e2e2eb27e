"""A client whose answers a test scripts, and the console on it."""

import asyncio
import html
import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import httpx
import latchkey
from latchkey_console import settings
from latchkey_console.app import make_app

ORIGIN = "http://127.0.0.1:50080"
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
EVERY = latchkey.TokenFilter()
RECEIPT = latchkey.Receipt(
    commit_time=NOW,
    effective_time=NOW + timedelta(milliseconds=20),
    revision=7,
    verifiers_acknowledged=2,
    verifiers_outwaited=0,
)


def token(**fields: Any) -> latchkey.Token:
    """A token without findings, except for the fields that a test changes."""
    values: dict[str, Any] = {
        "id": "tok_1",
        "account_id": "acme",
        "name": "deploy job",
        "scope": latchkey.Scope.READ,
        "create_time": NOW - timedelta(days=1),
        "expire_time": NOW + timedelta(days=90),
        "hint": "lk_…aB3x",
        "secrets": (secret("aB3x", 1),),
    }
    return latchkey.Token(**values | fields)


def secret(last: str, days: float, **fields: Any) -> latchkey.TokenSecret:
    """A secret that is so many days old."""
    return latchkey.TokenSecret(
        hint=f"lk_…{last}", create_time=NOW - timedelta(days=days), **fields
    )


@dataclass
class Scripted:
    """Has one token. `errors` are raised by the next calls of a method, in turn.

    If `lists` is set, each list waits for the next of these events.
    """

    token: latchkey.Token = field(default_factory=token)
    usage: tuple[latchkey.CallerUsage, ...] = ()
    errors: dict[str, list[latchkey.LatchkeyError]] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    lists: list[asyncio.Event] = field(default_factory=list)
    limits: latchkey.Limits = field(default_factory=latchkey.Limits)
    entries: tuple[latchkey.AuditEntry, ...] = ()

    async def list_page(
        self, account_id: str, wanted: latchkey.TokenFilter = EVERY, **_: Any
    ) -> latchkey.Page:
        self._call("list_page", wanted=wanted)
        if self.lists:
            await self.lists.pop(0).wait()
        # The token has no finding.
        found = (self.token,) if wanted in (EVERY, latchkey.TokenFilter(ids=("tok_1",))) else ()
        return latchkey.Page(tokens=found, next_page_token="", total_size=len(found))

    async def delete_all(self, account_id: str, wanted: latchkey.TokenFilter) -> latchkey.Deletions:
        self._call("delete_all", wanted=wanted)
        return latchkey.Deletions(count=1, receipt=RECEIPT)

    async def get(self, account_id: str, token_id: str) -> latchkey.Token:
        self._call("get")
        return self.token

    async def create(
        self, account_id: str, name: str, scope: latchkey.Scope, **fields: Any
    ) -> latchkey.CreatedToken:
        self._call("create", name=name, **fields)
        new = secret(f"new{len(self.called('create'))}", 0)
        self.token = replace(self.token, name=name, scope=scope, hint=new.hint, secrets=(new,))
        return latchkey.CreatedToken(
            token=self.token, secret=latchkey.Secret(f"lk{'_'}{new.hint[-4:]}"), receipt=None
        )

    async def get_usage(
        self, account_id: str, token_id: str, **_: Any
    ) -> tuple[latchkey.CallerUsage, ...]:
        self._call("get_usage")
        return self.usage

    async def audit_page(self, wanted: latchkey.AuditFilter, **_: Any) -> latchkey.AuditPage:
        self._call("audit_page", wanted=wanted)
        return latchkey.AuditPage(self.entries, "")

    async def get_limits(self, account_id: str, **_: Any) -> latchkey.Limits:
        self._call("get_limits")
        return self.limits

    async def update(self, account_id: str, token_id: str, **fields: Any) -> latchkey.Change:
        self._call("update", **fields)
        self.token = replace(self.token, **fields)
        return latchkey.Change(token=self.token, receipt=None)

    async def disable(self, account_id: str, token_id: str) -> latchkey.Change:
        self._call("disable")
        self.token = replace(self.token, disable_time=NOW)
        return latchkey.Change(token=self.token, receipt=RECEIPT)

    async def enable(self, account_id: str, token_id: str) -> latchkey.Change:
        self._call("enable")
        self.token = replace(self.token, disable_time=None)
        return latchkey.Change(token=self.token, receipt=None)

    async def rotate(self, account_id: str, token_id: str, **fields: Any) -> latchkey.RotatedToken:
        self._call("rotate", **fields)
        new = secret(f"new{len(self.token.secrets)}", 0)
        self.token = replace(self.token, hint=new.hint, secrets=(new, *self.token.secrets))
        return latchkey.RotatedToken(
            token=self.token, secret=latchkey.Secret("lk" + "_new"), receipt=RECEIPT
        )

    async def retire_secrets(self, account_id: str, token_id: str) -> latchkey.Change:
        self._call("retire_secrets")
        self.token = replace(self.token, secrets=self.token.secrets[:1])
        return latchkey.Change(token=self.token, receipt=RECEIPT)

    async def close(self) -> None:
        pass

    def called(self, method: str) -> list[dict[str, Any]]:
        """Return the arguments of the calls of a method."""
        return [fields for called, fields in self.calls if called == method]

    def _call(self, method: str, **fields: Any) -> None:
        self.calls.append((method, fields))
        if errors := self.errors.get(method):
            raise errors.pop(0)


@asynccontextmanager
async def console(
    client: Scripted,
    monotonic: Callable[[], float] = lambda: 0.0,
    now: Callable[[], datetime] = lambda: NOW,
    **options: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the console for the account acme at NOW, and yield an HTTP client that keeps cookies.

    `options` are further settings.
    """
    transport = _process(client, monotonic, now, options)
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as browser:
        yield browser


@asynccontextmanager
async def several(
    client: Scripted, now: Callable[[], datetime] = lambda: NOW, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Run two processes of the console. Requests alternate between them."""
    processes = _Alternating([_process(client, lambda: 0.0, now, options) for _ in range(2)])
    async with httpx.AsyncClient(transport=processes, base_url=ORIGIN) as browser:
        yield browser


class _Alternating(httpx.AsyncBaseTransport):
    def __init__(self, transports: list[httpx.ASGITransport]) -> None:
        self._turns = itertools.cycle(transports)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._turns).handle_async_request(request)


def _process(
    client: Scripted,
    monotonic: Callable[[], float],
    now: Callable[[], datetime],
    options: dict[str, Any],
) -> httpx.ASGITransport:
    app = make_app(
        settings.make(**{"target": "127.0.0.1:1", "account": "acme"} | options),
        client=cast("latchkey.Client", client),
        now=now,
        monotonic=monotonic,
    )
    return httpx.ASGITransport(app, raise_app_exceptions=True, client=("127.0.0.1", 40_000))


def text(page: httpx.Response | str) -> str:
    """Return what a reader sees of a page."""
    source = page if isinstance(page, str) else page.text
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())


async def dialog(browser: httpx.AsyncClient, path: str) -> str:
    """Return a dialog as the page's script receives it, without the list."""
    answer = await browser.get(path, headers={"x-latchkey-part": "1"})
    assert answer.status_code == 200, answer.text
    return answer.text


async def submit(browser: httpx.AsyncClient, path: str, shown: str, **typed: str) -> httpx.Response:
    """Submit a dialog's form with its hidden fields, and follow its redirect."""
    hidden = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', shown)
    fields = {name: html.unescape(value) for name, value in hidden}
    headers = {"origin": ORIGIN, "x-latchkey-part": "1"}
    return await browser.post(path, data=fields | typed, headers=headers, follow_redirects=True)
