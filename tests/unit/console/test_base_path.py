"""The page below a path, without its header, and in frames."""

import html
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from latchkey_console.settings import SettingsError, make

from tests.unit.console.scripted import Scripted, console, secret, submit, text, token

BASE = "/settings/tokens"
PUBLIC: dict[str, Any] = {
    "public_url": "https://app.example.com",
    "account": None,
    "account_header": "X-User",
    "trusted_proxies": ("127.0.0.1",),
}


def addresses(page: str) -> list[str]:
    """Return the addresses in a page that lead to the page's own host."""
    found = re.findall(r'(?:href|src|action|formaction|data-rows)="(/[^"]*)"', page)
    return [html.unescape(address) for address in found]


def test_templates_have_no_address_without_the_base_path() -> None:
    """Each address in a template begins with the base path, or with an expression that has it."""
    folder = Path(str(resources.files("latchkey_console") / "templates"))
    for file in folder.rglob("*.html"):
        bare = re.findall(r'(?:href|src|action|formaction)="/[^"]*"', file.read_text("utf-8"))
        assert bare == [], file.name


async def test_every_address_is_below_the_base_path() -> None:
    """Links, forms, files, redirects and cookies of all pages stay below the path."""
    client = Scripted(token(secrets=(secret("aB3x", 1), secret("oldX", 9))))
    async with console(client, base_path=f"{BASE}/") as browser:
        for path in (
            *("/", "/new", "/token?id=tok_1", "/edit?id=tok_1", "/replace?id=tok_1"),
            *("/delete?id=tok_1", "/disable?id=tok_1", "/retire?id=tok_1", "/nowhere", "/?q=none"),
        ):
            answer = await browser.get(BASE + path)
            found = addresses(answer.text)
            assert found
            assert [address for address in found if not address.startswith(f"{BASE}/")] == [], path
            for address in set(found):
                if "/static/" in address:
                    assert (await browser.get(address)).status_code == 200
        shown = (await browser.get(f"{BASE}/new")).text
        done = await submit(
            browser, f"{BASE}/tokens", shown, name="made", scope="read", expiry="90"
        )
        assert "Copy your token now" in text(done)
        assert all(answer.headers["location"].startswith(BASE) for answer in done.history)
        for answer in (*done.history, done):
            for cookie in answer.headers.get_list("set-cookie"):
                assert f"path={BASE}/;" in cookie.lower()
        shown = (await browser.get(f"{BASE}/delete?id=tok_1")).text
        changed = await submit(browser, f"{BASE}/disable", shown)
        assert changed.url.path == f"{BASE}/"
        assert "Disabled made" in text(changed)


async def test_operators_view_is_below_the_base_path() -> None:
    """The links between the pages of the operators' view stay below the path too."""
    options: dict[str, Any] = {
        "account": None,
        "groups_header": "X-Groups",
        "person_header": "X-Person",
        "trusted_proxies": ("127.0.0.1",),
        "operator_groups": ("ops",),
        "base_path": BASE,
    }
    async with console(Scripted(), **options) as browser:
        browser.headers.update({"x-groups": "ops", "x-person": "olga"})
        for path in ("/", "/token", "/nowhere"):
            found = addresses((await browser.get(BASE + path)).text)
            assert found
            assert [address for address in found if not address.startswith(f"{BASE}/")] == [], path
        assert f"{BASE}/servers" in addresses((await browser.get(f"{BASE}/")).text)


async def test_outside_of_the_base_path() -> None:
    """The path without its slash leads to the page. Nothing else is served outside of it, except
    for the probe."""
    async with console(Scripted(), base_path=BASE) as browser:
        bare = await browser.get(f"{BASE}?q=a")
        assert (bare.status_code, bare.headers["location"]) == (308, f"{BASE}/?q=a")
        for path in ("/", "/new", f"{BASE}x/", "/settings", "/settings/tokensx"):
            answer = await browser.get(path)
            assert answer.status_code == 404
            assert "deploy job" not in answer.text
        assert (await browser.get("/healthz")).text == "ok\n"
        assert (await browser.get(f"{BASE}/healthz")).text == "ok\n"
        assert (await browser.get(f"{BASE}/new/")).status_code == 404
        assert (await browser.get(f"{BASE}//evil.example/")).status_code == 404


@pytest.mark.parametrize(
    ("value", "path"),
    [("", ""), ("/", ""), ("/a", "/a"), ("/a/", "/a"), ("/a-b/c_d.e~f", "/a-b/c_d.e~f")],
)
def test_base_path_is_normalised(value: str, path: str) -> None:
    """The console removes a trailing slash."""
    settings = make(account="acme", base_path=value)
    assert settings.embedding.base_path == path
    assert settings.home_url == f"http://127.0.0.1:50080{path}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({"base_path": path}, "--base-path: give a plain path")
            for path in (
                *("a", "//a", "/a//b", "/../a", "/a/./b", "/a?b", "/a#b", "/a%2fb", "/ä", "/a b"),
                *("/" + "a" * 200, '/a"b', "https://x/a", "/a\n"),
            )
        ),
        *(
            ({"frame_ancestors": (origin,)}, f"--frame-ancestor {origin}: give the origin")
            for origin in (
                *("*", "https://*.example.com", "http://app.example.com", "app.example.com"),
                *("https://a.example/path", "https://a.example?x", "https://u@a.example", "'self'"),
            )
        ),
        ({"frame_ancestors": ("https://a.example; script-src *",)}, "--frame-ancestor https://a."),
        ({"peers": ("127.0.0.1:1",)}, "--peer requires --state-key-file"),
    ],
)
def test_unsafe_embedding_is_refused(options: dict[str, Any], words: str) -> None:
    """A path or origin that could mean something else in a header or cookie is refused."""
    with pytest.raises(SettingsError, match=re.escape(words)):
        make(account="acme", **options)


@pytest.mark.parametrize("peer", ["a", "a:0", "a:x", ":1", "a:99999", "http://a:1"])
def test_invalid_peer_is_refused(peer: str, tmp_path: Any) -> None:
    """A peer has a host and a port."""
    key = tmp_path / "state.key"
    key.write_bytes(b"A" * 43 + b"=")
    key.chmod(0o600)
    with pytest.raises(SettingsError, match="give HOST:PORT"):
        make(account="acme", state_key_file=key, peers=(peer,))


async def test_cookies_of_a_public_page_below_a_path() -> None:
    """Below a path, the cookie's prefix is the one that allows a path."""
    headers = {"host": "app.example.com", "x-user": "acme"}
    async with console(Scripted(), **PUBLIC, base_path=BASE) as browser:
        answer = await browser.get(f"{BASE}/", headers=headers)
        cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith("__secure-latchkey-443=")
    assert f"path={BASE}/;" in cookie
    assert "samesite=lax; secure" in cookie


async def test_framing_is_off_by_default_and_for_named_origins_only() -> None:
    """Only the named origins may frame the page. Over TLS, its cookies work in their frames."""
    headers = {"host": "app.example.com", "x-user": "acme"}
    async with console(Scripted(), **PUBLIC) as browser:
        answer = await browser.get("/", headers=headers)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
        assert "samesite=lax" in answer.headers["set-cookie"].lower()
    ancestors = ("https://APP.example.org/", "https://two.example:8443")
    async with console(Scripted(), **PUBLIC, frame_ancestors=ancestors) as browser:
        answer = await browser.get("/", headers=headers)
        policy = answer.headers["content-security-policy"]
        assert policy.endswith("frame-ancestors https://app.example.org https://two.example:8443")
        assert "x-frame-options" not in answer.headers
        assert "samesite=none; secure; partitioned" in answer.headers["set-cookie"].lower()


async def test_header_can_be_left_out() -> None:
    """Without its header, the page shows neither name nor account, but the same list."""
    async with console(Scripted(), header=False) as browser:
        page = (await browser.get("/")).text
    assert "<header" not in page
    assert "<footer" not in page
    assert "deploy job" in page
