"""Signing in and out with a provider, on the whole console: what each failure shows."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx2
import pytest
from authlib.common.errors import AuthlibBaseError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tests.unit.console.scripted import ORIGIN, Scripted, console, text

ISSUER = "https://id.example.com"
SIGN_OUT_URL = f"{ISSUER}/sign-out?hint=x"
ANSWER = "/signed-in?code=code&state=state"


@dataclass
class Provider:
    """A provider. `errors` are raised by its steps, until they are removed."""

    claims: dict[str, Any] = field(default_factory=lambda: {"sub": "olga", "account": "acme"})
    metadata: dict[str, Any] = field(
        default_factory=lambda: {"issuer": ISSUER, "end_session_endpoint": f"{ISSUER}/sign-out"}
    )
    errors: dict[str, Exception] = field(default_factory=dict)
    sign_out_url: str = SIGN_OUT_URL

    async def load_server_metadata(self) -> dict[str, Any]:
        self._step("metadata")
        return self.metadata

    async def authorize_redirect(self, request: Request, back: str) -> Response:
        self._step("begin")
        request.session["_state"] = "x" * 600
        return RedirectResponse(f"{ISSUER}/authorize?back={back}")

    async def authorize_access_token(self, request: Request, **_: Any) -> dict[str, Any]:
        request.session.pop("_state", None)
        self._step("finish")
        return {"userinfo": self.claims, "id_token": "proof"}

    async def create_logout_url(self, **hints: Any) -> dict[str, Any]:
        assert hints["id_token_hint"] == "proof"
        self._step("sign-out")
        return {"url": self.sign_out_url}

    def _step(self, name: str) -> None:
        if name in self.errors:
            raise self.errors[name]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    made = Provider()
    monkeypatch.setattr("latchkey_console.openid.OAuth.register", lambda *_, **__: made)
    return made


@pytest.fixture
async def browser(provider: Provider) -> AsyncIterator[httpx.AsyncClient]:
    """A browser that is not signed in."""
    options: dict[str, Any] = {"account": None, "oidc_issuer": ISSUER, "oidc_client_id": "page"}
    async with console(Scripted(), **options, oidc_claim="account") as found:
        yield found


async def sign_in(browser: httpx.AsyncClient, wanted: str = "/") -> httpx.Response:
    """Ask for a page, follow the way to the provider and back, and return the answer there."""
    asked = await browser.get(wanted)
    assert (asked.status_code, asked.headers["location"]) == (303, "/sign-in")
    away = await browser.get("/sign-in")
    assert away.headers["location"].startswith(f"{ISSUER}/authorize?back=")
    return await browser.get(ANSWER)


async def csrf(browser: httpx.AsyncClient) -> str:
    """Return the mark of the page's form to sign out."""
    page = await browser.get("/")
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]


async def post(browser: httpx.AsyncClient, path: str, **fields: str) -> httpx.Response:
    return await browser.post(path, data=fields, headers={"origin": ORIGIN})


async def test_sign_in_leads_to_the_page_that_was_asked_for(browser: httpx.AsyncClient) -> None:
    """After the sign-in, the visitor gets the page that they first asked for, with its filter."""
    answer = await sign_in(browser, "/?q=deploy")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=deploy")
    assert "deploy job" in text(await browser.get("/"))


@pytest.mark.parametrize(
    ("step", "error", "status"),
    [
        ("metadata", httpx2.ConnectError("no route"), 503),
        ("begin", httpx2.ReadTimeout("late"), 503),
        ("begin", AuthlibBaseError("odd"), 503),
    ],
)
async def test_sign_in_without_a_provider(
    provider: Provider, browser: httpx.AsyncClient, step: str, error: Exception, status: int
) -> None:
    """If the provider does not answer, the page says so, and signs nobody in."""
    provider.errors[step] = error
    answer = await browser.get("/sign-in")
    assert answer.status_code == status
    assert "Sign-in is not available" in text(answer)


@pytest.mark.parametrize(
    ("step", "error", "status", "title"),
    [
        ("finish", httpx2.ConnectError("gone"), 503, "Sign-in is not available"),
        ("finish", AuthlibBaseError("mismatching_state"), 400, "Sign-in failed"),
        ("finish", KeyError("id_token"), 400, "Sign-in failed"),
    ],
)
async def test_sign_in_that_the_provider_does_not_confirm(
    provider: Provider,
    browser: httpx.AsyncClient,
    step: str,
    error: Exception,
    status: int,
    title: str,
) -> None:
    """A code that the provider does not confirm signs nobody in."""
    provider.errors[step] = error
    answer = await sign_in(browser)
    assert answer.status_code == status
    assert title in text(answer)
    assert (await browser.get("/")).status_code == 303


@pytest.mark.parametrize(
    "query", ["", "state=state", f"{ANSWER.partition('?')[2]}&iss=https://other.example.com"]
)
async def test_answer_of_somebody_else(browser: httpx.AsyncClient, query: str) -> None:
    """An answer without a code, or of another provider, signs nobody in."""
    answer = await browser.get(f"/signed-in?{query}")
    assert answer.status_code == 400
    assert (await browser.get("/")).status_code == 303


@pytest.mark.parametrize("change", ["issuer", "userinfo"])
async def test_provider_that_is_not_the_one_asked(
    provider: Provider, browser: httpx.AsyncClient, change: str
) -> None:
    """Metadata of another issuer, and an answer without an identity, sign nobody in."""
    await browser.get("/sign-in")
    if change == "issuer":
        provider.metadata["issuer"] = "https://other.example.com"
    else:
        provider.claims = {}
    answer = await browser.get(ANSWER)
    assert answer.status_code == 400
    assert (await browser.get("/")).status_code == 303


async def test_sign_out_ends_the_session_here_and_there(browser: httpx.AsyncClient) -> None:
    """Signing out ends the session at once, and leads on to the provider."""
    await sign_in(browser)
    answer = await post(browser, "/sign-out", csrf=await csrf(browser), account="acme")
    assert answer.headers["refresh"] == f"0; url={SIGN_OUT_URL}"
    assert (await browser.get("/")).status_code == 303
    assert "You are signed out" in text(await browser.get("/signed-out"))


async def test_sign_out_by_another_site(browser: httpx.AsyncClient) -> None:
    """A form without the page's mark signs nobody out."""
    await sign_in(browser)
    answer = await post(browser, "/sign-out", csrf="made up", account="acme")
    assert answer.status_code == 403
    assert "You are still signed in" in text(answer)
    assert (await browser.get("/")).status_code == 200


@pytest.mark.parametrize("case", ["unreachable", "without sign-out", "not a page"])
async def test_sign_out_without_the_provider(
    provider: Provider, browser: httpx.AsyncClient, case: str
) -> None:
    """If the provider cannot sign people out, the sign-out here is complete all the same."""
    await sign_in(browser)
    mark = await csrf(browser)
    if case == "unreachable":
        provider.errors["sign-out"] = httpx2.ConnectError("gone")
    elif case == "without sign-out":
        del provider.metadata["end_session_endpoint"]
    else:
        provider.sign_out_url = "javascript:alert(1)"
    answer = await post(browser, "/sign-out", csrf=mark, account="acme")
    assert (answer.status_code, answer.headers["location"]) == (303, "/signed-out")
    assert (await browser.get("/")).status_code == 303


async def test_sign_out_of_nobody(browser: httpx.AsyncClient) -> None:
    """Signing out without a session leads to the same page as after a sign-out."""
    answer = await post(browser, "/sign-out", csrf="")
    assert (answer.status_code, answer.headers["location"]) == (303, "/signed-out")


@pytest.mark.parametrize(("length", "kept"), [(600, True), (3_000, False)])
async def test_typed_form_waits_for_the_sign_in(
    browser: httpx.AsyncClient, length: int, kept: bool
) -> None:
    """A form that was submitted after the session had ended is kept until the sign-in. If it is
    too long for a cookie, the page says that it is lost."""
    labels = "\n".join(f"k{number}=v" for number in range(length // 5))
    fields = {"name": "nightly report", "labels": labels, "csrf": "", "account": "acme"}
    answer = await post(browser, "/tokens", **fields)
    assert answer.status_code == 401
    assert ("too long to be kept" in text(answer)) is not kept
    await browser.get("/sign-in")
    back = await browser.get(ANSWER)
    assert back.headers["location"] == "/new?account=acme"
    assert ("nightly report" in (await browser.get("/new?account=acme")).text) is kept
