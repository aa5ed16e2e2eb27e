"""The filter, the rows that follow, and names, without a service."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import Page, Scope, Token
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
    """An address gives a filter, whatever somebody has written there."""
    assert Filter.read(query) == expected


def test_address_from_a_filter() -> None:
    """A filter's address gives the same filter, and says nothing that need not be said."""
    wanted = Filter("a&b=ü", Scope.READ, Kind.WRITE, 100)
    assert Filter.read(wanted.fields) == wanted
    assert Filter().query == ""
    assert Filter("x").with_kind(Kind.OLD).query == "?q=x&review=old"
    assert Filter("x").more().query == "?q=x&show=100"


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
def test_text_is_found_whatever_its_case_or_form(text: str, name: str, found: bool) -> None:
    """Names and hints are found by any part, in any case, however their letters are composed."""
    assert Filter(text).matches(token(name), []) is found


def test_name_is_the_services_name() -> None:
    """A name is found again as the service compares names, and not by likeness."""
    tokens = (token("x\u00b2"), token("Straße"), token("Köln"))
    inventory = Inventory(tokens, complete=True, now=NOW, use_recorded=False)
    for name, found in (("KO\u0308LN ", tokens[2]), ("STRASSE", tokens[1]), ("x2", None)):
        assert inventory.named(name) == found


def test_rows_after_one_that_is_gone() -> None:
    """The rows after a token are the same, whatever was made and deleted meanwhile."""
    tokens = [token(f"{number:03}") for number in range(99, -1, -1)]
    assert [t.name for t in rows_after(tokens, "tok_050", 2)] == ["049", "048"]
    without = [t for t in tokens if t.name != "050"]
    assert [t.name for t in rows_after(without, "tok_050", 2)] == ["049", "048"]
    assert [t.name for t in rows_after([token("200"), *tokens], "tok_050", 2)] == ["049", "048"]
    assert list(rows_after(tokens, "tok_000", 2)) == []
    assert list(rows_after([], "tok_000", 2)) == []


def test_rows_of_one_millisecond_come_once() -> None:
    """Tokens of one millisecond have ids in another order than the list: none comes twice."""
    tokens = [token(f"{number:03}") for number in range(100)]
    random.Random(1).shuffle(tokens)  # noqa: S311 - for order, not for secrets
    seen = tokens[:10]
    while rows := rows_after(tokens, seen[-1].id, 10):
        seen += rows
    assert seen == tokens


class Endless:
    """A service whose list has no end, or goes round in circles."""

    def __init__(self, *, circles: bool = False) -> None:
        self.calls = 0
        self._circles = circles

    async def list_page(self, _: str, **fields: Any) -> Page:
        self.calls += 1
        page = tuple(token(f"{self.calls} {number}") for number in range(fields["page_size"]))
        return Page(tokens=page, next_page_token="again" if self._circles else str(self.calls))


async def test_an_endless_list_is_cut() -> None:
    """However many tokens there are, a page stops asking, and says that it is not all."""
    service: Any = Endless()
    inventory = await fetch(service, "acme", NOW)
    assert (len(inventory.tokens), inventory.complete) == (listing.TOKENS_MAX, False)
    circles: Any = Endless(circles=True)
    assert (await fetch(circles, "acme", NOW)).complete
    assert circles.calls == 2
