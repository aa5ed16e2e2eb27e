"""People with several accounts: each request is about the account that it names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.console.asgi import fields, send, visitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

PROXY: dict[str, Any] = {
    "accounts_header": "X-Accounts",
    "person_header": "X-Person",
    "trusted_proxies": ("127.0.0.1",),
}
LINK = re.compile(r'(?:href| action)="(/[^"#]*)')


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


@pytest.fixture
async def browser(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a console behind a proxy, as zoe, who has the accounts acme and org/2."""
    async with visitor(address, **PROXY) as found:
        found.headers.update({"x-accounts": "acme, org/2", "x-person": "zoe"})
        yield found


async def names(stub: TokenServiceAsyncStub, account: str) -> list[str]:
    """Return the names of the account's tokens."""
    answer = await stub.List(pb.ListRequest(account_id=account), timeout=5)
    return [token.name for token in answer.tokens]


async def form(browser: httpx.AsyncClient, account: str) -> dict[str, str]:
    """Fetch the form for a new token of an account."""
    page = await browser.get("/new", params={"account": account})
    assert page.status_code == 200
    # The last form of the page is the dialog's.
    return fields(page.text[page.text.index("<dialog") :]) | {
        "name": f"of {account}",
        "scope": "read",
        "expiry": "90",
    }


async def test_tabs_with_two_accounts(
    browser: httpx.AsyncClient, address: str, stub: TokenServiceAsyncStub
) -> None:
    """Forms of two accounts that are open at the same time each act on their own account, and the
    audit log names the person."""
    one, other = await form(browser, "acme"), await form(browser, "org/2")
    for data in (one, other):
        made = await send(browser, "/tokens", data)
        assert made.status_code == 303
        shown = await browser.get(made.headers["location"])
        assert "Copy your token now" in shown.text
    assert await names(stub, "acme") == ["of acme"]
    assert await names(stub, "org/2") == ["of org/2"]
    async with grpc.aio.insecure_channel(address) as channel:
        audit: Any = audit_pb_grpc.AuditServiceStub(channel)
        request = audit_pb.AuditServiceListRequest(account_id="org/2", method="Create")
        (entry,) = (await audit.List(request, timeout=5)).entries
        assert entry.person == "zoe"


@pytest.mark.parametrize(
    ("change", "status", "title"),
    [
        ({"account": "org/2"}, 403, "expired or belongs to another session"),
        ({"account": "globex"}, 403, "This is not your account"),
        ({"account": ""}, 400, "Choose an account first"),
    ],
)
async def test_a_form_with_another_account_is_refused(
    browser: httpx.AsyncClient,
    stub: TokenServiceAsyncStub,
    change: dict[str, str],
    status: int,
    title: str,
) -> None:
    """A form acts only on the account for which it was made."""
    data = await form(browser, "acme")
    answer = await send(browser, "/tokens", data | change)
    assert answer.status_code == status
    assert title in answer.text
    assert "Nothing was" in answer.text
    for account in ("acme", "org/2", "globex"):
        assert await names(stub, account) == []


async def test_a_lost_account_ends_access(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub
) -> None:
    """When the proxy no longer names an account, its pages and its open forms are refused, and a
    link leads to the accounts that are left."""
    data = await form(browser, "acme")
    browser.headers["x-accounts"] = "org/2"
    for answer in (
        await send(browser, "/tokens", data),
        await browser.get("/", params={"account": "acme"}),
    ):
        assert answer.status_code == 403
        assert "This is not your account" in answer.text
        assert 'href="/accounts"' in answer.text
    assert await names(stub, "acme") == []
    # The only one that is left needs no choice, but URLs name it all the same.
    page = await browser.get("/")
    assert page.status_code == 200
    assert 'href="/new?account=org%2F2"' in page.text
    assert 'id="switch"' not in page.text


async def test_every_link_and_form_names_the_account(
    browser: httpx.AsyncClient, create: Any
) -> None:
    """Each link and form of the list and of its dialogs names the account, so that no click leads
    out of it."""
    created = await create(account_id="acme", name="mine")
    token_id = created.token.id
    for path in (
        *("/?q=mine", "/?q=nothing", "/?review=expires-soon"),
        *(f"/{page}?id={token_id}" for page in ("token", "edit", "replace", "delete", "disable")),
    ):
        joined = f"{path}&account=acme"
        page = (await browser.get(joined)).text
        for link in LINK.findall(page):
            if link.startswith(("/static/", "/seal.svg")):
                continue
            # Forms name it in a field.
            if "?" not in link:
                at = page.index(f' action="{link}"')
                form_text = page[at : page.index("</form>", at)]
                assert 'name="account" value="acme"' in form_text, (path, link)
            else:
                assert "account=acme" in link, (path, link)


async def test_the_page_to_choose(browser: httpx.AsyncClient) -> None:
    """Without an account in the URL, the visitor chooses among the accounts. With many, the page
    searches."""
    for path in ("/", "/new", "/token?id=x"):
        answer = await browser.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/accounts")
    page = (await browser.get("/accounts", params={"account": "org/2"})).text
    assert 'href="/?account=acme"' in page
    assert 'href="/?account=org%2F2" aria-current="true"' in page
    assert 'id="find"' not in page
    part = await browser.get("/rows", headers={"x-latchkey-part": "1"})
    assert part.status_code == 400
    browser.headers["x-accounts"] = ",".join(f"account-{number}" for number in range(20))
    page = (await browser.get("/accounts", params={"find": "ACCOUNT-7"})).text
    assert re.findall(r'href="/\?account=([^"]*)"', page) == ["account-7"]
    assert "No account matches" in (await browser.get("/accounts", params={"find": "x"})).text


@pytest.mark.parametrize(
    ("headers", "status", "title"),
    [
        ([("x-person", "zoe")], 401, "You are not signed in"),
        ([("x-accounts", "acme")], 401, "You are not signed in"),
        ([("x-accounts", "acme"), ("x-person", "a"), ("x-person", "b")], 401, "not signed in"),
        ([("x-accounts", ""), ("x-person", "zoe")], 403, "You do not have an account"),
        (
            [("x-accounts", "acme"), ("x-accounts", "evil"), ("x-person", "zoe")],
            403,
            "Invalid account ID",
        ),
        ([("x-accounts", "acme, Big Corp"), ("x-person", "zoe")], 403, "Invalid account ID"),
        (
            [("x-accounts", ",".join(f"a{n}" for n in range(101))), ("x-person", "zoe")],
            403,
            "too many accounts",
        ),
    ],
)
async def test_ambiguous_headers_are_refused(
    address: str, headers: list[tuple[str, str]], status: int, title: str
) -> None:
    """A list or a person that is missing, repeated or invalid shows nothing."""
    async with visitor(address, **PROXY) as browser:
        for path in ("/", "/?account=acme", "/accounts"):
            answer = await browser.get(path, headers=headers)
            assert answer.status_code == status, path
            assert title in answer.text


async def test_without_several_accounts_there_is_no_page(address: str) -> None:
    """A console with one account for each visitor has no page to choose, and ignores the
    parameter."""
    async with visitor(address, account="acme") as browser:
        assert (await browser.get("/accounts")).status_code == 404
        page = await browser.get("/", params={"account": "globex"})
        assert page.status_code == 200
        assert "account=" not in page.text
