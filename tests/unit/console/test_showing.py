"""New secrets: each is displayed once, by any process, to the session that asked for it."""

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import latchkey
import pytest

from tests.unit.console.scripted import (
    NOW,
    ORIGIN,
    Scripted,
    console,
    dialog,
    secret,
    several,
    submit,
    text,
    token,
)

SECRET = re.compile("lk" + r"_new\d?\b")
TYPED = {"name": "made", "scope": "read", "expiry": "90"}


@pytest.fixture
def shared(tmp_path: Path) -> dict[str, Any]:
    """The setting that several processes share."""
    path = tmp_path / "state.key"
    path.write_bytes(b"A" * 43 + b"=\n")
    path.chmod(0o600)
    return {"state_key_file": path}


async def post(browser: httpx.AsyncClient, path: str, shown: str, **typed: str) -> httpx.Response:
    """Submit a form, and return the redirect without following it."""
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', shown))
    return await browser.post(path, data=hidden | typed, headers={"origin": ORIGIN})


def clock(moment: list[datetime]) -> Callable[[], datetime]:
    return lambda: moment[0]


async def test_secret_is_displayed_once_by_another_process(shared: dict[str, Any]) -> None:
    """The process that made the secret does not display it, and no cookie contains it as text."""
    async with several(Scripted(), **shared) as browser:
        made = await post(browser, "/tokens", await dialog(browser, "/new"), **TYPED)
        place = made.headers["location"]
        assert not SECRET.search(str(made.headers) + str(dict(browser.cookies)))
        shown = await browser.get(place)
        assert len(SECRET.findall(shown.text)) == 1
        (deleted,) = (name for name in made.cookies if "-new-" in name)
        assert f"{deleted}=;" in shown.headers["set-cookie"]
        for _ in range(2):
            again = await browser.get(place)
            assert "already been shown" in again.text
            assert not SECRET.search(again.text)


async def test_copied_cookie_is_worthless(shared: dict[str, Any]) -> None:
    """A process displays a cookie once. A copy is worthless for other sessions and accounts, and
    after two minutes everywhere."""
    moment = [NOW]
    proxy: dict[str, Any] = {
        "account": None,
        "account_header": "X-User",
        "trusted_proxies": ("127.0.0.1",),
    }
    async with console(Scripted(), now=clock(moment), **shared, **proxy) as browser:
        browser.headers["x-user"] = "acme"
        made = await post(browser, "/tokens", await dialog(browser, "/new"), **TYPED)
        place, copied = made.headers["location"], dict(browser.cookies)
        browser.headers["x-user"] = "other"
        assert (await browser.get(place)).status_code == 404
        browser.headers["x-user"] = "acme"
        async with console(Scripted(), now=clock(moment), **shared, **proxy) as thief:
            thief.headers["x-user"] = "acme"
            await thief.get("/")
            thief.cookies.update({name: v for name, v in copied.items() if "-new-" in name})
            assert (await thief.get(place)).status_code == 404
        assert SECRET.search((await browser.get(place)).text)
        # Fernet ignores characters that base64 does not have.
        altered = {name: f"{value[:9]}.{value[9:]}" for name, value in copied.items()}
        for copy in (copied, copied | {name: altered[name] for name in copied if "-new-" in name}):
            browser.cookies.clear()
            browser.cookies.update(copy)
            assert not SECRET.search((await browser.get(place)).text)
    moment[0] += timedelta(seconds=121)
    async with console(Scripted(), now=clock(moment), **shared, **proxy) as late:
        late.headers["x-user"] = "acme"
        late.cookies.update(copied)
        answer = await late.get(place)
        assert "already been shown" in answer.text
        assert not SECRET.search(answer.text)


async def test_secret_is_displayed_while_latchkey_fails() -> None:
    """If Latchkey fails right after a creation, the secret is displayed nevertheless."""
    client = Scripted()
    async with console(client) as browser:
        made = await post(browser, "/tokens", await dialog(browser, "/new"), **TYPED)
        client.errors["get"] = [latchkey.Unavailable("away")]
        shown = text(await browser.get(made.headers["location"]))
    assert SECRET.search(shown)
    assert "expires 30 Aug 2026" in shown


async def test_secret_that_a_copy_replaced_is_not_displayed() -> None:
    """If another copy of the form made a secret in place of this one, it would not work."""
    client = Scripted()
    async with console(client) as browser:
        made = await post(browser, "/tokens", await dialog(browser, "/new"), **TYPED)
        client.token = token(hint="lk_…else", secrets=(secret("else", 0),))
        shown = await browser.get(made.headers["location"])
    assert not SECRET.search(shown.text)
    assert "Replace the secret" in shown.text


@pytest.mark.parametrize("path", ["/tokens", "/replace"])
async def test_used_form_does_not_end_a_secret_in_use(path: str, shared: dict[str, Any]) -> None:
    """A form that is sent again from the history asks Latchkey for nothing, in any process: its
    secret may be in use. With other choices, the form is shown again."""
    client = Scripted()
    typed = TYPED if path == "/tokens" else {"ends": "day", "expiry": "keep"}
    form = "/new" if path == "/tokens" else "/replace?id=tok_1"
    async with several(client, **shared) as browser:
        shown = await dialog(browser, form)
        place = (await post(browser, path, shown, **typed)).headers["location"]
        assert SECRET.search((await browser.get(place)).text)
        calls = len(client.called("create") + client.called("rotate"))
        for _ in range(2):
            again = await post(browser, path, shown, **typed)
            assert again.headers["location"] == place
        changed = await post(browser, path, shown, **typed | {"expiry": "30"})
        assert changed.status_code == 409
        assert "This form has already" in text(changed)
        assert len(client.called("create") + client.called("rotate")) == calls == 1


async def test_tabs_do_not_take_each_others_secrets(shared: dict[str, Any]) -> None:
    """If two tabs create tokens before either shows its secret, each shows its own."""
    client = Scripted()
    async with several(client, **shared) as browser:
        forms = [await dialog(browser, "/new") for _ in range(2)]
        made = [
            await post(browser, "/tokens", form, **TYPED | {"name": f"made {number}"})
            for number, form in enumerate(forms, 1)
        ]
        tokens = {}
        for call in (1, 2):
            tokens[call] = secret(f"new{call}", 0)
        for number, answer in enumerate(made, 1):
            client.token = token(hint=tokens[number].hint, secrets=(tokens[number],))
            shown = await browser.get(answer.headers["location"])
            assert SECRET.findall(shown.text) == ["lk" + f"_new{number}"]
            assert f"made {number}" in shown.text


async def test_tab_with_another_account_forgets_no_used_form(shared: dict[str, Any]) -> None:
    """A form that is sent again ends no secret in use, even if the visitor has meanwhile created a
    token of another account in another tab."""
    client = Scripted()
    proxy: dict[str, Any] = {
        "account": None,
        "accounts_header": "X-Accounts",
        "person_header": "X-Person",
        "trusted_proxies": ("127.0.0.1",),
    }
    async with console(client, **shared, **proxy) as browser:
        browser.headers.update({"x-accounts": "acme,globex", "x-person": "olga"})
        shown, places = {}, {}
        for account in ("acme", "globex"):
            shown[account] = await dialog(browser, f"/new?account={account}")
            made = await post(browser, "/tokens", shown[account], **TYPED)
            places[account] = made.headers["location"]
            assert SECRET.search((await browser.get(places[account])).text)
        for account, place in places.items():
            again = await post(browser, "/tokens", shown[account], **TYPED)
            assert again.headers["location"] == place
            assert "already been shown" in (await browser.get(place)).text
    assert len(client.called("create")) == 2


async def test_copies_of_a_form_are_one_request(shared: dict[str, Any]) -> None:
    """Two processes that get the same form at once send the same request id."""
    client = Scripted()
    async with several(client, **shared) as browser:
        shown = await dialog(browser, "/new")
        cookies = dict(browser.cookies)
        for _ in range(2):
            assert (await post(browser, "/tokens", shown, **TYPED)).status_code == 303
            # As if the second copy had been sent before the first answer.
            browser.cookies.clear()
            browser.cookies.update(cookies)
    first, second = client.called("create")
    assert first["request_id"] == second["request_id"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (
            latchkey.AlreadyExists("reused", reason="REQUEST_ID_REUSED"),
            409,
            "This form has already created a token.",
        ),
        (latchkey.NotFound("deleted"), 409, "has been deleted"),
        (latchkey.AlreadyExists("taken"), 409, "already have a token with this name"),
    ],
)
async def test_refused_repetition(error: latchkey.LatchkeyError, status: int, words: str) -> None:
    """If Latchkey knows the form's request, the page shows its result."""
    async with console(Scripted(errors={"create": [error]})) as browser:
        answer = await submit(browser, "/tokens", await dialog(browser, "/new"), **TYPED)
    assert answer.status_code == status
    assert words in text(answer)
    assert 'value="made"' in answer.text


async def test_notice_crosses_processes_once(shared: dict[str, Any]) -> None:
    """The receipt of a change appears on the next list, whichever process shows it, and once."""
    async with several(Scripted(), **shared) as browser:
        shown = await dialog(browser, "/disable?id=tok_1")
        assert (await post(browser, "/disable", shown)).status_code == 303
        assert "Disabled deploy job" in text(await browser.get("/"))
        for _ in range(2):
            assert "Disabled deploy job" not in text(await browser.get("/"))


async def test_without_a_key_file_a_process_trusts_only_itself() -> None:
    """Without the setting, another process accepts neither forms nor cookies."""
    client = Scripted()
    async with several(client) as browser:
        shown = await dialog(browser, "/disable?id=tok_1")
        assert (await post(browser, "/disable", shown)).status_code == 403
    assert client.called("disable") == []
