"""Protection from other sites and people: headers, hosts, origins, seals and identity."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
import latchkey
import pytest
from latchkey_console import protection
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.console.asgi import form, send, visitor

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

SECRET = re.compile(r"lk_[0-9A-Za-z]{57}")
PROXY: dict[str, Any] = {
    "account_header": "X-Forwarded-User",
    "trusted_proxies": ("10.0.0.0/8", "127.0.0.1"),
}


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


@pytest.fixture
async def browser(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a console with a fixed account."""
    async with visitor(address, account="acme") as found:
        yield found


async def names(stub: TokenServiceAsyncStub, account: str = "acme") -> list[str]:
    """Return the names of the account's tokens."""
    answer = await stub.List(pb.ListRequest(account_id=account), timeout=5)
    return [token.name for token in answer.tokens]


async def test_headers_of_every_answer(browser: httpx.AsyncClient) -> None:
    """Every answer has a strict policy and forbids storing, framing and content sniffing."""
    for method, path in (
        ("GET", "/"),
        ("GET", "/new"),
        ("GET", "/rows"),
        ("GET", "/created/none"),
        ("GET", "/no-such-page"),
        ("POST", "/"),
        ("POST", "/tokens"),
        ("GET", "/healthz"),
        ("GET", "/seal.svg"),
    ):
        answer = await browser.request(method, path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "form-action 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store", path
        assert "server" not in answer.headers


async def test_no_inline_script_or_style(browser: httpx.AsyncClient) -> None:
    """No page needs what its policy forbids, and pages load only their own resources."""
    for path in ("/", "/new", "/no-such-page"):
        page = (await browser.get(path)).text
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
        assert set(re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)) == {""}
        assert not re.search(r'(?:src|href|action)="(?!/|#)', page)


async def test_static_files_are_kept_by_version(browser: httpx.AsyncClient) -> None:
    """Static files may be cached forever, because their URLs change with their content."""
    page = (await browser.get("/")).text
    for path in set(re.findall(r'"(/static/[^"]+)"', page)):
        answer = await browser.get(path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        other = re.sub(r"/static/\w+/", "/static/000000000000/", path)
        # A page of another release, whose file this process does not have.
        newer = await browser.get(other)
        assert (newer.content, newer.headers["cache-control"]) == (answer.content, "no-store")
    assert (await browser.get("/static/x/..%2Fapp.py")).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost:50080.evil.example", ""]
)
async def test_unknown_hosts_are_refused(browser: httpx.AsyncClient, host: str) -> None:
    """A request under an unknown host name reveals nothing (DNS rebinding)."""
    answer = await browser.get("/", headers={"host": host})
    assert answer.status_code == 421
    assert "acme" not in answer.text


async def test_loopback_hosts_are_served(browser: httpx.AsyncClient) -> None:
    """All names of loopback work, in any case."""
    for host in ("127.0.0.1:50080", "localhost:50080", "LOCALHOST:50080", "[::1]:50080"):
        assert (await browser.get("/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:50081"},
        {"origin": "https://127.0.0.1:50080"},
        {"origin": ""},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none"},
    ],
)
async def test_foreign_forms_have_no_effect(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub, headers: dict[str, str]
) -> None:
    """A form sent by another site creates nothing, even with valid seals."""
    data = await form(browser)
    answer = await send(browser, "/tokens", data, **headers)
    assert answer.status_code == 403
    assert "nothing was changed" in answer.text
    assert await names(stub) == []
    assert (await send(browser, "/tokens", data)).status_code == 303
    assert await names(stub) == ["made"]


@pytest.mark.parametrize("broken", ["csrf", "form"])
@pytest.mark.parametrize("by", ["leaving it out", "another", "another session's"])
async def test_forms_require_valid_seals(
    browser: httpx.AsyncClient,
    stub: TokenServiceAsyncStub,
    address: str,
    broken: str,
    by: str,
) -> None:
    """Without the session's seals, a form has no effect and is shown again with its input."""
    data = await form(browser, name="typed <b>")
    if by == "leaving it out":
        del data[broken]
    elif by == "another":
        data[broken] = "A" * len(data[broken])
    else:
        good = data[broken]
        browser.cookies.clear()
        data = await form(browser, name="typed <b>") | {broken: good}
    answer = await send(browser, "/tokens", data)
    assert answer.status_code == 403
    assert "Nothing was created" in answer.text
    assert 'value="typed &lt;b&gt;"' in answer.text
    assert await names(stub) == []
    again = await form(browser)
    assert (await send(browser, "/tokens", again)).status_code == 303


async def test_deletion_requires_the_seal(browser: httpx.AsyncClient, create: Any) -> None:
    """A deletion requires the session's seal and a POST."""
    token = (await create(name="kept")).token
    page = await browser.get("/delete", params={"id": token.id})
    assert "Delete token" in page.text
    answer = await send(browser, "/delete", {"id": token.id, "csrf": "x"})
    assert (answer.status_code, "Nothing was changed" in answer.text) == (403, True)
    assert "kept" in (await browser.get("/")).text
    csrf = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert csrf is not None
    answer = await send(browser, "/delete", {"id": token.id, "csrf": csrf[1]})
    assert answer.status_code == 303
    assert "kept" not in (await browser.get("/rows")).text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"name=a&name=b", "application/x-www-form-urlencoded"),
        (b"name=%ff", "application/x-www-form-urlencoded"),
        (b"name=\xff", "application/x-www-form-urlencoded"),
        (b"x" * 200_000, "application/x-www-form-urlencoded"),
        (b"&".join(b"a%d=1" % n for n in range(100)), "application/x-www-form-urlencoded"),
        (b'{"name": "a"}', "application/json"),
        (b"name=a", "text/plain"),
        (b"", ""),
    ],
)
async def test_invalid_bodies_are_refused(
    browser: httpx.AsyncClient, body: bytes, kind: str
) -> None:
    """Bodies that none of our forms would send are refused with an explanation."""
    headers = {"origin": "http://127.0.0.1:50080", "content-type": kind}
    answer = await browser.post("/tokens", content=body, headers=headers)
    assert answer.status_code == 400
    assert "Nothing was changed" in answer.text


async def test_stalled_body_is_dropped(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends its form too slowly is dropped."""
    monkeypatch.setattr(protection, "BODY_SECONDS", 0.05)

    async def drops() -> AsyncIterator[bytes]:
        yield b"name="
        await asyncio.Event().wait()

    headers = {
        "origin": "http://127.0.0.1:50080",
        "content-type": "application/x-www-form-urlencoded",
    }
    async with asyncio.timeout(20):
        answer = await browser.post("/tokens", content=drops(), headers=headers)
    assert answer.status_code == 400


async def test_secret_is_given_once_and_to_its_session(
    browser: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A secret is shown once, by GET, to the session that created it, and is never logged."""
    caplog.set_level("DEBUG")
    answer = await send(browser, "/tokens", await form(browser))
    place = answer.headers["location"]
    assert not SECRET.search(str(answer.headers))
    cookies = dict(browser.cookies)
    browser.cookies.clear()
    other = await browser.get(place)
    assert (other.status_code, SECRET.search(other.text)) == (404, None)
    browser.cookies.clear()
    browser.cookies.update(cookies)
    # HEAD and prefetch do not use up the display.
    assert (await browser.head(place)).status_code == 204
    assert (await browser.get(place, headers={"sec-purpose": "prefetch"})).status_code == 204
    first = await browser.get(place)
    secret = SECRET.findall(first.text)
    assert len(secret) == 1
    assert first.headers["cache-control"] == "no-store"
    second = await browser.get(place)
    assert (second.status_code, SECRET.search(second.text)) == (200, None)
    assert "already been shown" in second.text
    assert secret[0] not in caplog.text


async def test_concurrent_submissions_create_one_token(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub
) -> None:
    """Twenty concurrent copies of a form create one token and redirect to the same place."""
    data = await form(browser)
    answers = await asyncio.gather(*(send(browser, "/tokens", data) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert await names(stub) == ["made"]


async def test_disconnect_does_not_stop_a_creation(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A creation completes after its browser disconnects, and a resubmission finds it."""
    begun, real = asyncio.Event(), latchkey.Client.create

    async def create(*arguments: Any, **options: Any) -> Any:
        begun.set()
        return await real(*arguments, **options)

    monkeypatch.setattr(latchkey.Client, "create", create)
    data = await form(browser)
    request = asyncio.create_task(send(browser, "/tokens", data))
    async with asyncio.timeout(5):
        await begun.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    answer = await send(browser, "/tokens", data)
    assert answer.status_code == 303
    assert SECRET.search((await browser.get(answer.headers["location"])).text)
    assert await names(stub) == ["made"]


async def test_session_cookie(address: str) -> None:
    """The session cookie is signed, HttpOnly and SameSite, and over https also Secure."""
    async with visitor(address, account="acme") as browser:
        cookie = (await browser.get("/new")).headers["set-cookie"].lower()
        assert cookie.startswith("latchkey-console-50080=")
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert "secure" not in cookie
        # A forged cookie starts a new session, in which the old form is invalid.
        data = await form(browser)
        browser.cookies.clear()
        browser.cookies.set("latchkey-console-50080", "e30=.forged.forged")
        assert (await send(browser, "/tokens", data)).status_code == 403
    public: dict[str, Any] = {"public_url": "https://tokens.example.com", **PROXY}
    async with visitor(address, **public) as browser:
        headers = {"host": "tokens.example.com", "x-forwarded-user": "acme"}
        cookie = (await browser.get("/new", headers=headers)).headers["set-cookie"].lower()
        assert cookie.startswith("__host-latchkey-443=")
        assert "; secure" in cookie
        assert "path=/;" in cookie
        assert "domain" not in cookie


async def test_internal_error_reveals_no_details(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An internal error shows a page with all headers and a number that is also in the log."""

    async def broken(*_: Any) -> None:
        raise RuntimeError("private details")

    monkeypatch.setattr("latchkey_console.listing.fetch", broken)
    answer = await browser.get("/")
    assert answer.status_code == 500
    assert "private details" not in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    number = re.search(r"Request ([0-9a-f]{8})", answer.text)
    assert number is not None
    assert number[1] in caplog.text


async def test_unconfirmed_receipt_is_shown_as_unconfirmed(
    browser: httpx.AsyncClient, create: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an effective time, the page shows the deletion as unconfirmed and can retry it."""
    token = (await create(name="doomed")).token
    receipt: Any = dataclasses.replace(
        latchkey.Receipt(
            commit_time=datetime.now(UTC),
            effective_time=datetime.now(UTC),
            revision=7,
            verifiers_acknowledged=1,
            verifiers_outwaited=0,
        ),
        effective_time=None,  # type: ignore[arg-type, unused-ignore]  # allowed by later versions
    )
    real = latchkey.Client.delete

    async def unconfirmed(*arguments: Any, **options: Any) -> Any:
        await real(*arguments, **options)
        return receipt

    page = await browser.get("/delete", params={"id": token.id})
    csrf = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert csrf is not None
    data = {"id": token.id, "csrf": csrf[1]}
    with monkeypatch.context() as patch:
        patch.setattr(latchkey.Client, "delete", unconfirmed)
        for name in ("<bdi>doomed</bdi>", "the token"):
            assert (await send(browser, "/delete", data)).status_code == 303
            said = (await browser.get("/")).text
            assert f"Deleted {name}, not yet confirmed everywhere" in said
            assert "stopped working everywhere" not in said
    assert (await send(browser, "/delete", data)).status_code == 303
    assert "It stopped working everywhere" in (await browser.get("/")).text


async def test_form_can_be_resubmitted_after_an_internal_error(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an internal error during a creation, the same form can be submitted again."""

    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError

    data = await form(browser)
    with monkeypatch.context() as patch:
        patch.setattr(latchkey.Client, "create", broken)
        assert (await send(browser, "/tokens", data)).status_code == 500
    assert (await send(browser, "/tokens", data)).status_code == 303
    assert await names(stub) == ["made"]
