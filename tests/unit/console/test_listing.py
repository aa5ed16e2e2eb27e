"""The filter, further rows, and name comparison, without a service."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import (
    InternalError,
    LatchkeyError,
    NotFound,
    Page,
    PermissionDenied,
    Scope,
    Token,
    TokenSecret,
)
from latchkey_console import listing
from latchkey_console.listing import Filter, Inventory, fetch, rows_after
from latchkey_console.review import Kind

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def token(name: str, **fields: Any) -> Token:
    values: dict[str, Any] = {
        "id": f"tok_{name}",
        "account_id": "acme",
        "name": name,
        "scope": Scope.READ,
        "create_time": NOW,
        "expire_time": NOW + timedelta(days=90),
        "hint": "lk_…aB3x",
    }
    return Token(**values | fields)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, Filter()),
        ({"q": "  x  ", "access": "write"}, Filter("x", Scope.WRITE)),
        ({"review": "old", "show": "150"}, Filter(kind=Kind.OLD, rows=150)),
        ({"access": "admin", "review": "none", "show": "many"}, Filter()),
        ({"show": "-1"}, Filter()),
        ({"show": "²"}, Filter()),
        ({"show": "0"}, Filter()),
        ({"show": "999999999"}, Filter(rows=listing.TOKENS_MAX)),
        ({"show": "9" * 5000}, Filter()),
        ({"q": "x" * 100}, Filter("x" * 64)),
    ],
)
def test_filter_from_an_address(query: dict[str, str], expected: Filter) -> None:
    """Any query yields a filter; invalid values are ignored."""
    assert Filter.read(query) == expected


def test_address_from_a_filter() -> None:
    """A filter's query yields the same filter and omits defaults."""
    wanted = Filter("a&b=ü", Scope.READ, Kind.WRITE, 100)
    assert Filter.read(wanted.fields) == wanted
    assert Filter().query == ""
    assert Filter("x").with_kind(Kind.OLD).query == "?q=x&review=old"
    assert Filter("x").more().query == "?q=x&show=100"
    assert Filter("x").query_of("tok_1") == "?id=tok_1&q=x"


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("köln", "Deploy KÖLN", True),
        ("ko\u0308ln", "Köln", True),
        ("strasse", "Straße", True),
        ("ab3X", "any name", True),
        ("deploy x", "deploy", False),
        ("<", "<script>", True),
    ],
)
def test_search_ignores_case_and_composition(text: str, name: str, found: bool) -> None:
    """A search matches any part of a name or hint, in any case and Unicode composition."""
    assert Filter(text).matches(token(name), []) is found


def test_search_finds_older_secrets() -> None:
    """The last characters of a replaced secret that still works find its token."""
    older = TokenSecret(hint="lk_…oldX", create_time=NOW)
    newer = TokenSecret(hint="lk_…aB3x", create_time=NOW)
    assert Filter("OLDx").matches(token("any", secrets=(newer, older)), [])
    assert not Filter("OLDx").matches(token("any", secrets=(newer,)), [])


def test_names_compare_as_in_the_service() -> None:
    """A name is found by the service's comparison, not by the looser search."""
    tokens = (token("x\u00b2"), token("Straße"), token("Köln"))
    inventory = Inventory(tokens, complete=True, now=NOW, use_recorded=False)
    for name, found in (
        ("KO\u0308LN ", tokens[2]),
        ("STRASSE", tokens[1]),
        ("x2", tokens[0]),
        ("x3", None),
    ):
        assert inventory.named(name) == found


def test_rows_after_a_deleted_token() -> None:
    """The rows after a token do not depend on tokens created or deleted in the meantime."""
    tokens = [token(f"{number:03}") for number in range(99, -1, -1)]
    assert [t.name for t in rows_after(tokens, "tok_050", 2)] == ["049", "048"]
    without = [t for t in tokens if t.name != "050"]
    assert [t.name for t in rows_after(without, "tok_050", 2)] == ["049", "048"]
    assert [t.name for t in rows_after([token("200"), *tokens], "tok_050", 2)] == ["049", "048"]
    assert list(rows_after(tokens, "tok_000", 2)) == []
    assert list(rows_after([], "tok_000", 2)) == []


def test_rows_of_one_millisecond_appear_once() -> None:
    """Within one millisecond, ids and list differ in order, but no token appears twice."""
    tokens = [token(f"{number:03}") for number in range(100)]
    random.Random(1).shuffle(tokens)  # noqa: S311 - shuffles rows, makes no secrets
    seen = tokens[:10]
    while rows := rows_after(tokens, seen[-1].id, 10):
        seen += rows
    assert seen == tokens


class Endless:
    """A service whose list never ends or repeats its pages."""

    def __init__(self, *, circles: bool = False) -> None:
        self.calls = 0
        self._circles = circles

    async def get_usage(self, *_: Any, **__: Any) -> tuple[()]:
        return ()

    async def list_page(self, _: str, **fields: Any) -> Page:
        self.calls += 1
        page = tuple(token(f"{self.calls} {number}") for number in range(fields["page_size"]))
        return Page(tokens=page, next_page_token="again" if self._circles else str(self.calls))


async def test_endless_list_is_cut_off() -> None:
    """The console stops fetching at a limit and marks the list as incomplete."""
    service: Any = Endless()
    inventory = await fetch(service, "acme", NOW)
    assert (len(inventory.tokens), inventory.complete) == (listing.TOKENS_MAX, False)
    circles: Any = Endless(circles=True)
    assert (await fetch(circles, "acme", NOW)).complete
    assert circles.calls == 2


class Recording:
    """A service whose tokens have these last uses, and that answers GetUsage with `error`."""

    def __init__(self, *used: datetime | None, error: LatchkeyError | None = None) -> None:
        self._used = used
        self._error = error

    async def list_page(self, _: str, **__: Any) -> Page:
        tokens = tuple(token(str(n), last_used_time=used) for n, used in enumerate(self._used))
        return Page(tokens=tokens, next_page_token="")

    async def get_usage(self, account_id: str, token_id: str, **_: Any) -> tuple[()]:
        assert (account_id, token_id) == ("acme", "tok_0")
        if self._error is not None:
            raise self._error
        return ()


@pytest.mark.parametrize(
    ("service", "recorded"),
    [
        (Recording(), False),
        (Recording(None, NOW, error=InternalError("not asked")), True),
        (Recording(None, None), True),
        (Recording(None, error=NotFound("deleted meanwhile")), True),
        (Recording(None, error=InternalError("an older server")), False),
        (Recording(None, error=PermissionDenied("not this caller")), False),
    ],
)
async def test_use_counts_as_recorded_only_if_latchkey_says_so(
    service: Any, recorded: bool
) -> None:
    """If no token was used, GetUsage shows whether Latchkey records use. In doubt, it does not."""
    assert (await fetch(service, "acme", NOW)).use_recorded is recorded
