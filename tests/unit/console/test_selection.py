"""Deleting several tokens, and the review that a visitor is done with, without a browser."""

from dataclasses import replace
from datetime import timedelta

import latchkey
import pytest
from latchkey import TokenFilter
from latchkey_console.cookies import CookieRules
from latchkey_console.review import Kind
from latchkey_console.reviewed import REVIEWED_DAYS, Reviewed
from starlette.requests import Request
from starlette.responses import Response

from tests.unit.console.scripted import NOW, Scripted, console, submit, text

RULES = CookieRules("latchkey-console-1", "/", secure=False)
COOKIE = "latchkey-console-1-reviewed"


def visit(response: Response) -> Request:
    """Return the next request of a browser that received a response."""
    cookie = response.headers.get("set-cookie", "").partition(";")[0]
    return Request({"type": "http", "headers": [(b"cookie", cookie.encode())]})


def test_reviewed_kinds_are_kept_for_a_while() -> None:
    """The cookie keeps each kind with its count for thirty days, for one account."""
    reviewed = Reviewed(RULES)
    response = Response()
    reviewed.add(visit(response), response, "acme", NOW, "old", "3")
    assert reviewed.read(visit(response), "acme", NOW) == {Kind.OLD: 3}
    second = Response()
    later = NOW + timedelta(days=10)
    reviewed.add(visit(response), second, "acme", later, "write", "10000")
    request = visit(second)
    assert reviewed.read(request, "acme", later) == {Kind.OLD: 3, Kind.WRITE: 10_000}
    end = NOW + timedelta(days=REVIEWED_DAYS)
    assert reviewed.read(request, "acme", end) == {Kind.WRITE: 10_000}
    assert reviewed.read(request, "acme", end + timedelta(days=10)) == {}
    assert reviewed.read(request, "other", later) == {}
    cleared = Response()
    reviewed.clear(cleared)
    assert reviewed.read(visit(cleared), "acme", later) == {}
    assert "secure" not in second.headers["set-cookie"].lower()
    Reviewed(replace(RULES, secure=True)).add(request, cleared, "acme", NOW, "old", "1")
    assert "secure" in cleared.headers.getlist("set-cookie")[-1].lower()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "_",
        "acme_old.1.99999",
        "OWNER_old",
        "OWNER_old.x.9",
        "OWNER_none.1.99999",
        "OWNER_old.1.",
        "OWNER_old.\u0661.99999",
        "x" * 5_000,
    ],
)
def test_any_cookie_is_harmless(value: str) -> None:
    """A cookie that the page did not write is ignored without an error."""
    reviewed = Reviewed(RULES)
    response = Response()
    reviewed.add(visit(response), response, "acme", NOW, "old", "1")
    owner = response.headers["set-cookie"].partition("=")[2].partition("_")[0]
    cookie = f"{COOKIE}={value.replace('OWNER', owner)}".encode()
    request = Request({"type": "http", "headers": [(b"cookie", cookie)]})
    assert reviewed.read(request, "acme", NOW) == {}


@pytest.mark.parametrize(("kind", "count"), [("none", "1"), ("old", "-1"), ("old", "1" * 10)])
def test_invalid_reviews_are_ignored(kind: str, count: str) -> None:
    """A form with invalid values writes no cookie."""
    response = Response()
    reviewed = Reviewed(RULES)
    reviewed.add(visit(response), response, "acme", NOW, kind, count)
    assert "set-cookie" not in response.headers


async def test_selected_tokens_are_deleted_by_id() -> None:
    """The deletion names exactly the ids that the question named, in one call."""
    client = Scripted()
    async with console(client) as browser:
        page = (await browser.get("/")).text
        asked = await submit(browser, "/selected", _form(page), ids="tok_1")
        assert "Delete 1 token?" in text(asked)
        done = await submit(browser, "/delete-selected", asked.text)
        assert "Deleted 1 token It stopped working everywhere" in text(done)
    assert client.called("delete_all") == [{"wanted": TokenFilter(ids=("tok_1",))}]


async def test_a_selection_that_is_gone() -> None:
    """If all selected tokens were deleted meanwhile, the page says so and deletes nothing."""
    client = Scripted()
    async with console(client) as browser:
        page = (await browser.get("/")).text
        answer = await submit(browser, "/selected", _form(page), ids="tok_2")
        assert "no longer exists" in text(answer)
        for ids, words in (("", "No token is selected"), (" ", "No token is selected")):
            answer = await submit(browser, "/selected", _form(page), ids=ids)
            assert words in text(answer)
        many = " ".join(f"tok_{number}" for number in range(501))
        answer = await submit(browser, "/delete-selected", _form(page), ids=many)
        assert "Too many tokens are selected" in text(answer)
        assert answer.status_code == 422
    assert client.called("delete_all") == []


@pytest.mark.parametrize("path", ["/selected", "/delete-selected", "/reviewed"])
async def test_foreign_forms_change_nothing(path: str) -> None:
    """A form without this session's seal is refused."""
    client = Scripted()
    async with console(client) as browser:
        await browser.get("/")
        answer = await submit(browser, path, "", ids="tok_1", kind="old", csrf="made-up")
        assert answer.status_code == 403
        assert "This page has expired" in text(answer)
        assert COOKIE not in "".join(browser.cookies)
    assert client.called("delete_all") == []


async def test_refused_and_lost_deletions() -> None:
    """A refusal changed nothing. After a lost answer, the form deletes the same tokens again."""
    errors: dict[str, list[latchkey.LatchkeyError]] = {
        "delete_all": [latchkey.PermissionDenied("no"), latchkey.Unavailable("no answer")]
    }
    client = Scripted(errors=errors)
    async with console(client) as browser:
        page = (await browser.get("/")).text
        asked = (await submit(browser, "/selected", _form(page), ids="tok_1")).text
        assert "Nothing was changed" in text(await submit(browser, "/delete-selected", asked))
        doubt = await submit(browser, "/delete-selected", asked)
        assert "Not confirmed yet" in text(doubt)
        again = await submit(browser, "/delete-selected", doubt.text)
        assert "Deleted 1 token" in text(again)
    assert client.called("delete_all") == [{"wanted": TokenFilter(ids=("tok_1",))}] * 3


async def test_the_form_of_the_list_keeps_the_seal_out_of_addresses() -> None:
    """The list's form, which leads to dialogs by GET, sends the seal only with the button that
    posts it."""
    async with console(Scripted()) as browser:
        page = (await browser.get("/")).text
    form = page[page.index('<form id="list"') :].partition("</form>")[0]
    assert 'type="hidden" name="csrf"' not in form
    assert form.count('name="csrf"') == 1


def _form(page: str) -> str:
    """Return the seal as a hidden field, as the button of the list's form sends it."""
    seal = page.partition('name="csrf" value="')[2].partition('"')[0]
    return f'<input type="hidden" name="csrf" value="{seal}">'
