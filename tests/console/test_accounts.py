"""Whose tokens a request sees: a fixed account, or the one that a trusted proxy names."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
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


@pytest.mark.parametrize(
    "header", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP"]
)
async def test_fixed_account_refuses_proxies(browser: httpx.AsyncClient, header: str) -> None:
    """With --account, requests through a proxy are refused, because anyone could send them."""
    answer = await browser.get("/", headers={header: "203.0.113.9"})
    assert answer.status_code == 403
    assert "--account-header" in answer.text
    assert "acme" not in answer.text


async def test_account_by_header(address: str, create: Any) -> None:
    """A trusted proxy's header selects the account, which sees only its own tokens."""
    await create(account_id="acme", name="of acme")
    await create(account_id="other", name="of other")
    await create(account_id="jane@example.com", name="of jane")
    async with visitor(address, **PROXY) as browser:
        for account, own, foreign in (
            ("acme", "of acme", "of other"),
            ("other", "of other", "of acme"),
            ("jane@example.com", "of jane", "of acme"),
        ):
            page = (await browser.get("/", headers={"x-forwarded-user": account})).text
            assert own in page
            assert foreign not in page


@pytest.mark.parametrize(
    ("settings", "headers", "person"),
    [
        ({}, {}, "acme"),
        ({}, {"x-forwarded-email": "zoe@example.org"}, "acme"),
        ({"person_header": "X-Forwarded-Email"}, {"x-forwarded-email": "zoë@x"}, "zoë@x"),
        ({"person_header": "X-Forwarded-Email"}, {}, "acme"),
    ],
)
async def test_person_in_the_audit_log(
    address: str, settings: dict[str, Any], headers: dict[str, str], person: str
) -> None:
    """The audit log names the person that the sign-in proxy reports, or else the account."""
    async with visitor(address, **PROXY, **settings) as browser:
        sent = {"x-forwarded-user": "acme"} | headers
        encoded: Any = {name: value.encode("latin-1") for name, value in sent.items()}
        browser.headers.update(encoded)
        assert (await send(browser, "/tokens", await form(browser))).status_code == 303

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = audit_pb_grpc.AuditServiceStub(channel)
        request = audit_pb.AuditServiceListRequest(account_id="acme", method="Create", page_size=1)
        (entry,) = (await stub.List(request, timeout=5)).entries
        assert entry.person == person


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        ([("x-forwarded-user", "")], 401),
        ([("x-forwarded-user", "acme"), ("x-forwarded-user", "acme")], 403),
        ([("x-forwarded-user", "acme"), ("X-Forwarded-User", "evil")], 403),
        ([("x-forwarded-user", "acme,evil")], 403),
        ([("x-forwarded-user", "Jane Doe <jane@example.com>")], 403),
        ([("x-forwarded-user", "a" * 129)], 403),
        ([("x-remote-user", "acme"), ("x_forwarded_user", "acme")], 401),
    ],
)
async def test_ambiguous_header_is_refused(
    address: str, create: Any, headers: list[tuple[str, str]], status: int
) -> None:
    """A missing, repeated or invalid account header shows nothing."""
    await create(account_id="acme", name="of acme")
    async with visitor(address, **PROXY) as browser:
        answer = await browser.get("/", headers=headers)
        assert answer.status_code == status
        assert "of acme" not in answer.text


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("10.1.2.3", True),
        ("127.0.0.1", True),
        ("::ffff:10.1.2.3", True),
        ("127.0.0.2", False),
        ("11.0.0.1", False),
        ("::1", False),
        ("testclient", False),
    ],
)
async def test_header_from_a_trusted_address_only(
    address: str, create: Any, peer: str, trusted: bool
) -> None:
    """Only the connection's own address is trusted, not one that a header claims."""
    await create(account_id="acme", name="of acme")
    async with visitor(address, peer=(peer, 1), **PROXY) as browser:
        headers = {"x-forwarded-user": "acme", "x-forwarded-for": "10.1.2.3"}
        answer = await browser.get("/", headers=headers)
        assert answer.status_code == (200 if trusted else 403)
        assert ("of acme" in answer.text) is trusted


async def test_form_does_not_outlive_a_change_of_account(
    address: str, stub: TokenServiceAsyncStub
) -> None:
    """A form of one account has no effect after the browser changes to another account."""
    async with visitor(address, **PROXY) as browser:
        browser.headers["x-forwarded-user"] = "acme"
        data = await form(browser)
        made = await send(browser, "/tokens", data | {"name": "of acme"})
        data = await form(browser)
        browser.headers["x-forwarded-user"] = "other"
        assert (await send(browser, "/tokens", data)).status_code == 403
        assert await names(stub, "other") == []
        shown = await browser.get(made.headers["location"])
        assert (shown.status_code, SECRET.search(shown.text)) == (404, None)


async def test_probe_needs_no_account_or_host(address: str) -> None:
    """A health probe works under any host name and learns only that the console runs."""
    async with visitor(address, **PROXY) as browser:
        answer = await browser.get("/healthz", headers={"host": "10.0.0.5:8080"})
        assert (answer.status_code, answer.text) == (200, "ok\n")
        assert "set-cookie" not in answer.headers
