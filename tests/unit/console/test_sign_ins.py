"""Sign-ins that a sealed cookie carries: where they count, and what ends them."""

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from latchkey_console import settings
from latchkey_console.app import console_of
from latchkey_console.cookies import CookieRules, fits
from latchkey_console.ended import Ended, Peers
from latchkey_console.identity import NotSignedIn, Refused
from latchkey_console.openid import OpenId
from latchkey_console.state import StateKeys, read_keys
from starlette.requests import Request
from starlette.responses import Response

from tests.unit.console.scripted import NOW, Scripted, console

ISSUER = "https://id.example.com"
OPENID: dict[str, Any] = {"account": None, "oidc_issuer": ISSUER, "oidc_client_id": "page"}
OPERATORS: dict[str, Any] = OPENID | {"operator_groups": ("ops",)}
UNTIL = int(NOW.timestamp()) + 3_600


def session(**sign_in: Any) -> dict[str, Any]:
    values = {"account_id": "", "accounts": None, "person": "olga", "until": UNTIL}
    return {"id": "session", "sign_in": values | sign_in}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key that several consoles share."""
    path = tmp_path / "state.key"
    path.write_bytes(b"A" * 43 + b"=\n")
    path.chmod(0o600)
    return path


def cookie(key_file: Path, options: dict[str, Any]) -> str:
    """Return the cookie of a sign-in with the account acme at a console."""
    console_id = console_of(settings.make(**options))
    box = StateKeys(read_keys(key_file), console_id).box("session", lambda: NOW)
    return box.seal({"session": json.dumps(session(account_id="acme"))})


@pytest.mark.parametrize(
    ("options", "signed_in"),
    [
        (OPENID, True),
        (OPENID | {"product_name": "Acme"}, True),
        (OPERATORS, False),
        (OPENID | {"oidc_issuer": "https://other.example.com"}, False),
        (OPENID | {"oidc_client_id": "other"}, False),
        (OPENID | {"oidc_claim": "org"}, False),
        (OPENID | {"oidc_accounts_claim": "accounts"}, False),
        (OPENID | {"base_path": "/other"}, False),
    ],
)
async def test_sign_in_counts_at_one_console(
    key_file: Path, options: dict[str, Any], *, signed_in: bool
) -> None:
    """A cookie of the API Tokens page opens no other console that has the same key: neither the
    operators' view, nor one with another provider, claim or address."""
    copied = cookie(key_file, OPENID)
    async with console(Scripted(), **options, state_key_file=key_file) as browser:
        headers = {"cookie": f"latchkey-console-50080={copied}"}
        answer = await browser.get(f"{options.get('base_path', '')}/", headers=headers)
    assert answer.status_code == (200 if signed_in else 303)
    assert ("deploy job" in answer.text) is signed_in


class Provider:
    """The provider, which answers with these claims."""

    def __init__(self, claims: dict[str, Any]) -> None:
        self._claims = claims

    async def load_server_metadata(self) -> dict[str, Any]:
        return {"issuer": ISSUER}

    async def authorize_redirect(self, request: Request, _: str) -> Response:
        request.session["_state"] = secrets.token_urlsafe(450)
        return Response()

    async def authorize_access_token(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"userinfo": self._claims}


def signing(options: dict[str, Any]) -> tuple[OpenId, Ended]:
    """Return the sign-in of a console, and the sessions that it knows to have ended."""
    made, keys, ended = settings.make(**options), StateKeys(), Ended(lambda: NOW)
    assert made.openid is not None
    rules = CookieRules("page", "/", secure=False)
    peers = Peers(ended, (), keys, "", lambda: NOW)
    found = OpenId(made.openid, made.home_url, rules, keys, ended, peers, lambda: NOW)
    return found, ended


def visit(values: dict[str, Any]) -> Request:
    """Return the provider's answer in a browser with this session."""
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/signed-in", "headers": []}
    return Request(scope | {"query_string": b"code=code&state=state", "session": values})


@pytest.mark.parametrize(
    ("options", "claims"),
    [
        (OPENID | {"oidc_accounts_claim": "accounts"}, {"accounts": []}),
        (OPENID | {"oidc_claim": "org"}, {"org": None}),
        (OPERATORS, {"groups": ["staff"]}),
    ],
)
async def test_refused_sign_in_ends_the_earlier_one(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], claims: dict[str, Any]
) -> None:
    """If a new sign-in shows that the visitor has lost the account or the group, the sign-in that
    the browser had before ends, and so does every copy of it."""
    provider = Provider({"sub": "olga", **claims})
    monkeypatch.setattr("latchkey_console.openid.OAuth.register", lambda *_, **__: provider)
    signing_in, ended = signing(options)
    request = visit(session(account_id="acme"))
    assert signing_in.viewer(request).account_id == "acme"
    with pytest.raises(Refused):
        await signing_in.finish(request)
    assert "session" in ended
    with pytest.raises(NotSignedIn):
        signing_in.viewer(request)


async def test_next_sign_in_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody whose accounts nearly fill the cookie can begin another sign-in, which replaces the
    earlier one."""
    monkeypatch.setattr("latchkey_console.openid.OAuth.register", lambda *_, **__: Provider({}))
    signing_in, _ = signing(OPENID | {"oidc_accounts_claim": "accounts"})
    names = [secrets.token_urlsafe(24) for _ in range(95)]
    request = visit(session(accounts=names))
    box = StateKeys().box("session", lambda: NOW)
    assert fits(box, request.session)
    assert signing_in.viewer(request).accounts == tuple(names)
    await signing_in.begin(request)
    assert fits(box, request.session)
    assert "_state" in request.session
    with pytest.raises(NotSignedIn):
        signing_in.viewer(request)


def test_ended_sign_in_takes_no_room() -> None:
    """A sign-in that has ended leaves the session."""
    signing_in, ended = signing(OPENID)
    request = visit(session(account_id="acme"))
    ended.add("session", UNTIL)
    with pytest.raises(NotSignedIn):
        signing_in.viewer(request)
    assert request.session == {"id": "session"}
