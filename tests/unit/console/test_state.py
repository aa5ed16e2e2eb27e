"""State that browsers keep: sealed, for one purpose, and with keys that can change."""

import base64
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from latchkey_console.cookies import VALUE_LENGTH_MAX, CookieRules, SealedCookie, Sessions, fits
from latchkey_console.state import StateKeys, read_keys
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.unit.console.scripted import NOW

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 32
RULES = CookieRules("page", "/", secure=False)


def at(seconds: float = 0.0) -> datetime:
    return NOW + timedelta(seconds=seconds)


def visit(response: Response) -> Request:
    """Return the next request of a browser that received a response."""
    cookies = [value.partition(";")[0] for value in response.headers.getlist("set-cookie")]
    return Request({"type": "http", "headers": [(b"cookie", "; ".join(cookies).encode())]})


def test_sealed_value_reveals_nothing_and_expires() -> None:
    """Only the same keys open a value, for the same purpose, until it is too old."""
    sealed = StateKeys([OLD]).box("one", at).seal({"secret": "hush", "list": [1, None]})
    assert "hush" not in sealed
    assert b"hush" not in base64.urlsafe_b64decode(sealed)
    box = StateKeys([OLD]).box("one", lambda: at(60))
    assert box.open(sealed, 60) == {"secret": "hush", "list": [1, None]}
    assert box.open(sealed, 59) == {}
    assert StateKeys([OLD]).box("another", at).open(sealed, 60) == {}
    assert StateKeys([OTHER]).box("one", at).open(sealed, 60) == {}
    # Without keys, each process has one that no other knows.
    assert StateKeys().box("one", at).open(StateKeys().box("one", at).seal({"a": 1}), 60) == {}


@pytest.mark.parametrize("text", ["", "x", "gAAAAA", "é", "A" * 5_000, "gAAAAABq" + "A" * 100])
def test_forged_value_opens_as_empty(text: str) -> None:
    """A value that nobody sealed opens as an empty one, without an error."""
    assert StateKeys([OLD]).box("one", at).open(text, 60) == {}


@pytest.mark.parametrize(
    ("sealing", "opening", "opens"),
    [
        # A new key is added to all processes before one of them uses it, and removed last.
        ([OLD], [OLD, NEW], True),
        ([OLD, NEW], [NEW, OLD], True),
        ([NEW, OLD], [OLD, NEW], True),
        ([NEW, OLD], [NEW], True),
        ([OLD], [NEW], False),
    ],
)
def test_keys_can_change(sealing: list[bytes], opening: list[bytes], opens: bool) -> None:
    """During a change of keys, each process opens what the others seal, and accepts their forms."""
    from latchkey_console.protection import Seals

    sealed = StateKeys(sealing).box("one", at).seal({"a": 1})
    assert StateKeys(opening).box("one", at).open(sealed, 60) == ({"a": 1} if opens else {})
    here, there = (Seals(StateKeys(keys).signing("forms")) for keys in (sealing, opening))
    assert there.is_csrf(here.csrf("session", "acme"), "session", "acme") is opens
    assert (there.form(here.new_form("session", "acme"), "session", "acme") is not None) is opens


def test_cookie_is_for_one_owner() -> None:
    """A sealed cookie counts for the session and account for which it was written."""
    cookie = SealedCookie(RULES, "-new", StateKeys([OLD]), 120, at)
    response = Response()
    assert cookie.write(response, "session acme", {"a": 1})
    assert cookie.read(visit(response), "session acme") == {"a": 1}
    assert cookie.read(visit(response), "session other") == {}
    other = SealedCookie(RULES, "-new", StateKeys([OLD]), 120, lambda: at(121))
    assert other.read(visit(response), "session acme") == {}
    moved = SealedCookie(RULES, "-used", StateKeys([OLD]), 120, at)
    name, _, value = response.headers["set-cookie"].partition(";")[0].partition("=")
    assert name == "page-new"
    request = Request({"type": "http", "headers": [(b"cookie", f"page-used={value}".encode())]})
    assert moved.read(request, "session acme") == {}


def test_cookie_that_browsers_would_drop_is_not_written() -> None:
    """A value that is too large for a cookie is refused, not lost by the browser."""
    cookie = SealedCookie(RULES, "-proof", StateKeys([OLD]), 120, at)
    response = Response()
    assert not cookie.write(response, "acme", {"token": os.urandom(VALUE_LENGTH_MAX).hex()})
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    ("rules", "attributes"),
    [
        (RULES, "Path=/; HttpOnly; SameSite=lax"),
        (
            CookieRules("page", "/settings/tokens/", secure=True),
            "Path=/settings/tokens/; HttpOnly; SameSite=lax; Secure",
        ),
        (
            CookieRules("page", "/", secure=True, framed=True),
            "Path=/; HttpOnly; SameSite=none; Secure; Partitioned",
        ),
    ],
)
def test_attributes_of_all_cookies(rules: CookieRules, attributes: str) -> None:
    """Cookies stay below the page's path. In foreign frames, and only then, they are SameSite=None,
    and partitioned."""
    response = Response()
    rules.set(response, "-new", "v", 60)
    assert response.headers["set-cookie"] == f"page-new=v; Max-Age=60; {attributes}"

    async def write(request: Request) -> Response:
        request.session["a"] = 1
        return PlainTextResponse("ok")

    app = Sessions(Starlette(routes=[Route("/", write)]), rules, StateKeys().box("s", at), 60)
    cookie = TestClient(app).get("/").headers["set-cookie"].lower()
    for attribute in attributes.lower().split("; "):
        assert f"; {attribute}" in cookie
    assert ("secure" in cookie) is rules.secure


def test_session_that_browsers_would_drop_is_an_error() -> None:
    """A session that is too large for a cookie fails loudly: the visitor could never sign in."""

    async def write(request: Request) -> Response:
        request.session["a"] = os.urandom(VALUE_LENGTH_MAX).hex()
        return PlainTextResponse("ok")

    app = Sessions(Starlette(routes=[Route("/", write)]), RULES, StateKeys().box("s", at), 60)
    with pytest.raises(ValueError, match="too large"):
        TestClient(app).get("/")


def test_key_file(tmp_path: Path) -> None:
    """The file contains one key or two, in either alphabet of base64."""
    path = tmp_path / "state.key"
    keys = (bytes(range(200, 232)), b"\xff" * 32)
    lines = [base64.b64encode(keys[0]), base64.urlsafe_b64encode(keys[1])]
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    path.chmod(0o600)
    assert read_keys(path) == keys
    path.write_bytes(lines[1])
    assert read_keys(path) == keys[1:]


KEY = base64.b64encode(OLD)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"", 0o600, "one key or two"),
        (
            b"\n".join([KEY, base64.b64encode(NEW), base64.b64encode(OTHER)]),
            0o600,
            "one key or two",
        ),
        (b"a" * 5_000, 0o600, "one key or two"),
        (KEY + b"\n" + KEY, 0o600, "the same key twice"),
        (b"hunter2", 0o600, "not 32 bytes in base64"),
        (base64.b64encode(b"short"), 0o600, "openssl rand -base64 32"),
        (KEY, 0o640, "chmod 600"),
        (KEY, 0o604, "chmod 600"),
        (KEY, 0o622, "chmod 600"),
    ],
)
def test_unsafe_key_file_is_refused(tmp_path: Path, content: bytes, mode: int, words: str) -> None:
    """A file that others can read, or without valid keys, is refused with what to do about it."""
    path = tmp_path / "state.key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ValueError, match=words):
        read_keys(path)


def test_error_names_a_missing_key_file(tmp_path: Path) -> None:
    """The error names a file that is missing."""
    with pytest.raises(ValueError, match=r"cannot read .*state.key: No such file"):
        read_keys(tmp_path / "state.key")


def test_owner_of_the_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's file is refused. Root's group may read it, as Kubernetes mounts secrets."""
    path = tmp_path / "state.key"
    path.write_bytes(KEY)
    path.chmod(0o640)
    if os.geteuid() != 0:
        pytest.skip("only root can make files of others")
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    assert read_keys(path) == (OLD,)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 640"):
        read_keys(path)
    os.chown(path, 54_321, 0)
    with pytest.raises(ValueError, match="belongs to another user"):
        read_keys(path)


def test_keys_are_not_printed() -> None:
    """Settings with keys can be logged."""
    from latchkey_console.settings import Settings

    shown = repr(Settings("127.0.0.1", 1, "http://127.0.0.1:1", "t", state_keys=(OLD,)))
    assert "oooo" not in shown


@pytest.mark.parametrize(("length", "fit"), [(36, True), (128, False)])
def test_session_with_many_accounts(length: int, fit: bool) -> None:
    """A hundred accounts with ids like UUIDs fit into a cookie. A sign-in whose accounts do not is
    refused with a page, which this check decides."""
    accounts = [os.urandom(length).hex()[:length] for _ in range(100)]
    session = {"id": "x" * 32, "sign_in": {"account_id": "", "accounts": accounts, "until": 1}}
    assert fits(StateKeys().box("session", at), session) is fit
