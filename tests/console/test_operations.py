"""The operators' view: who may enter, and which pages it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from latchkey_console import settings as console_settings
from latchkey_console.app import make_app
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.console.asgi import visitor
from tests.helpers.callers import credential, policy_text
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub
    from latchkey_service.settings.settings import Settings

PROXY: dict[str, Any] = {
    "groups_header": "X-Groups",
    "person_header": "X-Person",
    "trusted_proxies": ("127.0.0.1",),
    "operator_groups": ("ops", "site reliability"),
}


@pytest.fixture
def transport() -> str:
    """The console cannot tell the transports apart, so one is enough here."""
    return "native"


@pytest.fixture
async def browser(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the operators' view behind a proxy, as olga, an operator."""
    async with visitor(address, **PROXY) as found:
        found.headers.update({"x-groups": "staff, ops", "x-person": "olga"})
        yield found


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-groups", "ops"), ("x-person", "olga")], 200),
        ([("x-groups", "staff,site reliability"), ("x-person", "olga")], 200),
        ([("x-groups", "staff"), ("x-person", "olga")], 403),
        ([("x-groups", ""), ("x-person", "olga")], 403),
        ([("x-groups", "Ops"), ("x-person", "olga")], 403),
        ([("x-groups", "no ops, ops-readers"), ("x-person", "olga")], 403),
        ([("x-groups", "staff"), ("x-groups", "ops"), ("x-person", "olga")], 403),
        ([("x-person", "olga")], 401),
        ([("x-groups", "ops")], 401),
        ([("x-groups", "ops"), ("x-person", "a"), ("x-person", "b")], 401),
    ],
)
async def test_only_operators_enter(
    address: str, create: Any, headers: list[tuple[str, str]], status: int
) -> None:
    """Each page requires one of the groups and a person's name. Without them it shows nothing."""
    created = await create(account_id="acme", name="of acme")
    async with visitor(address, **PROXY) as browser:
        for path in ("/", f"/token?id={created.token.id}", "/audit", "/servers"):
            answer = await browser.get(path, headers=headers)
            assert answer.status_code == status, path
            if status != 200:
                assert "acme" not in answer.text


async def test_the_view_cannot_change_anything(browser: httpx.AsyncClient) -> None:
    """The view has none of the pages that act on tokens, and no form of its pages posts."""
    for path in ("/new", "/tokens", "/delete", "/edit", "/disable", "/selected", "/accounts"):
        assert (await browser.get(path)).status_code == 404
        posted = await browser.post(path, headers={"origin": "http://127.0.0.1:50080"})
        assert posted.status_code == 404
    for path in ("/", "/audit", "/servers"):
        page = await browser.get(path)
        assert page.status_code == 200
        assert 'method="post"' not in page.text


async def test_search(
    browser: httpx.AsyncClient, stub: TokenServiceAsyncStub, create: Any, address: str
) -> None:
    """The end of a secret finds tokens of any account, and a token's id leads to its page, which
    shows its state, its secrets, its uses and the calls about it. The audit log names the operator.
    """
    created = await create(account_id="globex", name="nightly <export>")
    token = created.token
    await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
    named: dict[str, Any] = {"account_id": "globex", "id": token.id}
    rotated = await stub.Rotate(pb.RotateRequest(**named, grace=Duration(seconds=3600)), timeout=8)
    page = (await browser.get("/", params={"q": token.hint[-4:]})).text
    assert f"/token?id={token.id}" in page
    assert "globex" in page
    assert "nightly &lt;export&gt;" in page
    assert "Active" in page
    led = await browser.get("/", params={"q": f" {token.id} "})
    assert led.headers["location"] == f"/token?id={token.id}"

    async def shown() -> str | None:
        text = (await browser.get(f"/token?id={token.id}")).text
        return text if "1 use" in text else None

    page = await eventually(shown, "the use on the token's page")
    for text in (rotated.token.hint, token.hint, "Rotate", "Create", "/audit?account=globex"):
        assert text in page, text
    await stub.Delete(pb.DeleteRequest(**named), timeout=8)
    assert "None of its secrets works" in (await browser.get(f"/token?id={token.id}")).text
    assert "Deleted" in (await browser.get("/", params={"q": token.hint})).text
    async with grpc.aio.insecure_channel(address) as channel:
        audit: Any = audit_pb_grpc.AuditServiceStub(channel)

        async def audited() -> set[str]:
            request = audit_pb.AuditServiceListRequest(method="Find", token_id=token.id)
            answer = await audit.List(request, timeout=5)
            return {entry.person for entry in answer.entries}

        assert await eventually(audited, "entries") == {"olga"}
    assert "for <bdi>olga</bdi>" in (await browser.get(f"/audit?token={token.id}")).text


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/?q=zzz", 422, "neither a token ID nor the end of a secret"),
        ("/?q=tok_01m8n3jb62", 422, "neither a token ID nor the end of a secret"),
        ("/?q=~~~~", 200, "No token matches"),
        ("/?q=abcd&page=damaged", 422, "neither a token ID"),
        ("/token?id=tok_" + "0" * 26, 404, "No token has this ID"),
        ("/token?id=x", 404, "No token has this ID"),
        ("/token", 404, "No token has this ID"),
        ("/audit?method=Nothing", 422, "The filter is not valid"),
        ("/audit?page=damaged", 422, "The filter is not valid"),
        ("/audit?account=nobody-has-this", 200, "No entries match"),
        ("/audit?outcome=unheard-of", 200, "Audit log"),
    ],
)
async def test_nothing_found(browser: httpx.AsyncClient, path: str, status: int, text: str) -> None:
    """A search without results says so, and so does one that the service cannot understand."""
    answer = await browser.get(path)
    assert answer.status_code == status
    assert text in answer.text


async def test_a_pasted_secret_is_not_repeated(browser: httpx.AsyncClient, create: Any) -> None:
    """A secret in the search field is neither sent to the service nor shown on the page."""
    created = await create()
    answer = await browser.get("/", params={"q": created.secret})
    assert answer.status_code == 422
    assert created.secret[3:40] not in answer.text


async def test_audit_log_in_pages(
    browser: httpx.AsyncClient, create: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit log can be filtered, and its next page of older entries has the same filter."""
    monkeypatch.setattr("latchkey_console.operations.ROWS", 2)
    created = [await create(account_id="paged") for _ in range(3)]
    page = (await browser.get("/audit?account=paged&method=Create")).text
    older = page[page.index('id="older" href="') :].split('"')[3].replace("&amp;", "&")
    assert "account=paged" in older
    assert [token.token.id in page for token in created] == [False, True, True]
    page = (await browser.get(older)).text
    assert [token.token.id in page for token in created] == [True, False, False]
    assert 'href="/audit?account=paged&amp;method=Create" id="newest"' in page


async def test_servers(browser: httpx.AsyncClient) -> None:
    """The page lists each server process with its lease, its position and its lag."""
    page = (await browser.get("/servers")).text
    assert "Head revision" in page
    assert "answered this page" in page
    assert "up to date" in page


async def test_the_role_operator_is_enough_and_required(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a policy, the view works with the role operator alone. With another role, each page
    says what is missing."""
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(), "utf-8")
    for role, status in (("operator", 200), ("manager", 403)):
        monkeypatch.setenv("LATCHKEY_CREDENTIAL", credential(role))
        async with (
            serving(settings.model_copy(update={"policy": path})) as address,
            visitor(address, **PROXY) as browser,
        ):
            browser.headers.update({"x-groups": "ops", "x-person": "olga"})
            for page in ("/?q=abcd", "/audit", "/servers"):
                answer = await browser.get(page)
                assert answer.status_code == status, (role, page)
                assert ("the role “operator”" in answer.text) is (status == 403)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"account": "acme"}, "--account does not say who is an operator"),
        (
            {"account_header": "X-A", "trusted_proxies": ("127.0.0.1",)},
            "--account-header does not say who is an operator",
        ),
        ({"groups_header": "X-G", "trusted_proxies": ("127.0.0.1",)}, "--person-header"),
        ({"groups_header": "X-G", "operator_groups": ()}, "requires --operator-group"),
        ({"oidc": True, "oidc_accounts_claim": "orgs"}, "no account"),
        ({"oidc": True, "oidc_claim": "tenant"}, "no account"),
        ({"oidc": True, "oidc_groups_claim": ""}, "give a name"),
        ({"oidc": True, "operator_groups": ("a,b",)}, "without commas"),
        ({"oidc": True, "operator_groups": ("",)}, "give the name of a group"),
        ({"oidc": True, "operator_groups": (" ops",)}, "give the name of a group"),
    ],
)
def test_settings_that_let_others_in_are_refused(options: dict[str, Any], message: str) -> None:
    """Without a way to tell operators from others, the view does not start."""
    values = {"operator_groups": ("ops",)} | options
    if values.pop("oidc", False):
        values |= {"oidc_issuer": "https://id.example.com", "oidc_client_id": "page"}
    with pytest.raises(console_settings.SettingsError, match=message):
        make_app(console_settings.make(**values))
