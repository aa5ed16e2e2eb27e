"""The filter in addresses, and the calls that fetch a page's rows, counts and findings."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import (
    InternalError,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    Page,
    PermissionDenied,
    Scope,
    Token,
    TokenFilter,
    TokenOrder,
    TokenState,
    Unavailable,
)
from latchkey_console import listing
from latchkey_console.listing import Count, Filter, Sort, fetch, more_rows, named
from latchkey_console.review import Kind

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
AT = "2026-06-01T12:00:00+00:00"


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
        ({"access": "admin", "review": "none", "show": "many", "state": "new"}, Filter()),
        ({"show": "-1"}, Filter()),
        ({"show": "²"}, Filter()),
        ({"show": "0"}, Filter()),
        ({"show": "999999999"}, Filter(rows=listing.ROWS_MAX)),
        ({"show": "9" * 5000}, Filter()),
        ({"q": "x" * 100}, Filter("x" * 64)),
        # The service would reject these searches.
        ({"q": "a\x00b\u2028"}, Filter("ab")),
        ({"q": "\u200b"}, Filter()),
        ({"state": "disabled"}, Filter(state=TokenState.DISABLED)),
        ({"sort": "-expiry"}, Filter(chosen=Sort(TokenOrder.EXPIRY, reverse=True))),
        ({"sort": "sideways"}, Filter()),
        # The usual order need not be in the address.
        ({"sort": "newest"}, Filter()),
        ({"sort": "last-use", "review": "unused"}, Filter(kind=Kind.UNUSED)),
        ({"page": "token", "at": AT}, Filter(start="token", at=NOW)),
        ({"page": "token"}, Filter()),
        ({"at": AT}, Filter()),
        ({"page": "token", "at": "0001-01-01T00:00:00+00:00"}, Filter()),
        ({"page": "token", "at": "2026-06-01T12:00:00"}, Filter()),
        ({"page": "token", "at": "yesterday"}, Filter()),
    ],
)
def test_filter_from_an_address(query: dict[str, str], expected: Filter) -> None:
    """Any query yields a filter; invalid values are ignored."""
    assert Filter.read(query) == expected


def test_address_from_a_filter() -> None:
    """A filter's query yields the same filter and omits defaults."""
    sort = Sort(TokenOrder.LAST_USE, reverse=True)
    for wanted in (
        Filter("a&b=ü", Scope.READ, Kind.WRITE, 100),
        Filter("x", state=TokenState.ACTIVE, chosen=sort, start="t&k", at=NOW),
    ):
        assert Filter.read(wanted.fields) == wanted
    assert Filter().query == ""
    assert Filter("x").with_kind(Kind.OLD).query == "?q=x&review=old"
    assert Filter("x").more().query == "?q=x&show=100"
    assert Filter("x").query_of("tok_1") == "?id=tok_1&q=x"


def test_a_column_sorts_in_both_directions() -> None:
    """The header of a column chooses its order, and then the opposite. Both begin with the first
    row."""
    wanted = Filter("x", rows=200, start="t", at=NOW)
    first = wanted.sorted_by(TokenOrder.EXPIRY)
    assert first == Filter("x", chosen=Sort(TokenOrder.EXPIRY))
    second = first.sorted_by(TokenOrder.EXPIRY)
    assert second == Filter("x", chosen=Sort(TokenOrder.EXPIRY, reverse=True))
    assert second.sorted_by(TokenOrder.EXPIRY) == first
    assert Filter().sorted_by(TokenOrder.NEWEST) == Filter(chosen=Sort(reverse=True))
    assert Filter().sorted_by(TokenOrder.NEWEST).sorted_by(TokenOrder.NEWEST) == Filter()
    # A review shows the most urgent tokens first.
    assert Filter(kind=Kind.UNUSED).sort == Sort(TokenOrder.LAST_USE)
    assert [Sort(order).descending for order in TokenOrder] == [True, False, False]


class Service:
    """Answers with pages of these sizes, in turn, then with empty last pages. Each page but the
    last leads to the next. With `total`, it counts, and finds one token for each review."""

    def __init__(self, *sizes: int, total: int = 0) -> None:
        self.sizes = list(sizes)
        self.total = total
        self.asked: list[tuple[TokenFilter, dict[str, Any]]] = []

    async def list_page(self, _: str, wanted: TokenFilter | None = None, **fields: Any) -> Page:
        self.asked.append((wanted or TokenFilter(), fields))
        size = self.sizes.pop(0) if self.sizes else int(self.total > 0)
        number = len(self.asked)
        return Page(
            tokens=tuple(token(f"{number} {n}", last_used_time=NOW) for n in range(size)),
            next_page_token=str(number) if self.sizes else "",
            total_size=self.total if fields.get("include_total_size") else None,
            total_size_capped=self.total == 10_000,
        )


async def rows(service: Any, wanted: Filter) -> tuple[int, str]:
    """Return how many rows there are, and the page token of those after them."""
    listed = await more_rows(service, "acme", wanted, NOW)
    return len(listed.rows), listed.following


async def test_rows_are_fetched_in_few_calls() -> None:
    """A page asks for exactly the rows that it shows, with at most 500 in a call."""
    service = Service(500, 500, 1)
    assert await rows(service, Filter(rows=1_000)) == (1_000, "2")
    assert [fields["page_size"] for _, fields in service.asked] == [500, 500]
    assert [fields["page_token"] for _, fields in service.asked] == ["", "1"]
    service = Service(50, 1)
    assert await rows(service, Filter(start="here", at=NOW)) == (50, "1")
    assert service.asked[0][1]["page_token"] == "here"


async def test_a_search_ends() -> None:
    """Calls that find too few tokens are limited. The next request continues where they ended."""
    assert await rows(Service(*[0] * 100), Filter("x")) == (0, str(listing.SEARCHES_MAX))
    assert await rows(Service(0, 20, 0, 30, 5), Filter("x")) == (50, "4")
    assert await rows(Service(0, 20), Filter("x")) == (20, "")


class Circular(Service):
    """A service that returns the same page again."""

    async def list_page(self, *args: Any, **fields: Any) -> Page:
        page = await super().list_page(*args, **fields)
        return Page(tokens=page.tokens, next_page_token="same")


async def test_a_repeated_page_ends_the_list() -> None:
    """A service that repeats its pages does not hold up the page."""
    service: Any = Circular(10, 10, 10)
    assert await rows(service, Filter()) == (20, "")


async def test_counts_and_findings_are_those_of_the_service() -> None:
    """The page shows the service's counts, of what matches and of all, and one finding for each
    kind, with its most urgent token. It asks for all of them with the same time."""
    service: Any = Service(3, total=7)
    listed = await fetch(service, "acme", Filter("x", Scope.READ), NOW)
    assert (len(listed.rows), listed.matching, listed.total) == (3, Count(7), Count(7))
    assert [finding.kind for finding in listed.findings] == list(Kind)
    assert {finding.count for finding in listed.findings} == {7}
    (shown, first), (everything, _), *reviews = service.asked
    assert (shown, first["page_size"]) == (TokenFilter(search="x", scope=Scope.READ), 50)
    assert everything == TokenFilter()
    assert [wanted for wanted, _ in reviews] == [kind.selects(NOW) for kind in Kind]
    assert [fields["order"] for _, fields in reviews] == [kind.order for kind in Kind]
    assert str(Count(1_234)) == "1,234"


async def test_a_capped_count_says_so() -> None:
    """Counts of a large account are marked as lower bounds. An account without tokens has no
    review."""
    service: Any = Service(50, total=10_000)
    listed = await fetch(service, "acme", Filter(), NOW)
    assert str(listed.total) == "10,000+"
    assert all(finding.capped for finding in listed.findings)
    empty: Any = Service()
    assert (await fetch(empty, "acme", Filter(), NOW)).findings == []
    assert len(empty.asked) == 1


async def test_a_failed_count_fails_the_page() -> None:
    """An error of any of the calls reaches the page as the library's error."""

    class Failing(Service):
        async def list_page(self, *args: Any, **fields: Any) -> Page:
            if len(self.asked) == 3:
                raise Unavailable("down")
            return await super().list_page(*args, **fields)

    service: Any = Failing(3, total=3)
    with pytest.raises(Unavailable):
        await fetch(service, "acme", Filter(), NOW)


async def test_a_filter_with_a_review_selects_both() -> None:
    """Search and scope narrow a review. The state belongs to the review."""
    wanted = Filter("x", Scope.WRITE, Kind.NEVER_EXPIRES, state=TokenState.DISABLED)
    assert wanted.selects(NOW) == TokenFilter(
        search="x", scope=Scope.WRITE, state=TokenState.ACTIVE, never_expires=True
    )
    assert Filter(state=TokenState.DISABLED).selects(NOW) == TokenFilter(state=TokenState.DISABLED)


@pytest.mark.parametrize(
    ("name", "found"),
    [("KO\u0308LN ", "Köln"), ("STRASSE", "Straße"), ("x2", "x\u00b2"), ("x3", None)],
)
async def test_names_compare_as_in_the_service(name: str, found: str | None) -> None:
    """A name is found by the service's comparison, among all tokens that contain it."""

    class Names:
        async def list_page(self, _: str, wanted: TokenFilter, **__: Any) -> Page:
            assert wanted == TokenFilter(name_contains=name)
            tokens = ("x\u00b2 and more", "x\u00b2", "Straße", "Köln")
            return Page(tokens=tuple(map(token, tokens)), next_page_token="")

    service: Any = Names()
    result = await named(service, "acme", name)
    assert (result.name if result else None) == found


async def test_a_name_that_no_token_can_have() -> None:
    """The service rejects a search for an impossible name. No token has it. Other errors count."""

    class Rejecting:
        def __init__(self, error: LatchkeyError) -> None:
            self.error = error

        async def list_page(self, *_: Any, **__: Any) -> Page:
            raise self.error

    service: Any = Rejecting(InvalidArgument("no"))
    assert await named(service, "acme", "\u200b") is None
    service = Rejecting(Unavailable("no"))
    with pytest.raises(Unavailable):
        await named(service, "acme", "x")
    endless: Any = Service(*[1] * 100)
    assert await named(endless, "acme", "x") is None
    assert len(endless.asked) == listing.SEARCHES_MAX


class Recording:
    """A service whose tokens have these last uses, and that answers GetUsage with `error`."""

    def __init__(self, *used: datetime | None, error: LatchkeyError | None = None) -> None:
        self._used = used
        self._error = error

    async def list_page(self, *_: Any, **__: Any) -> Page:
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
    assert (await fetch(service, "acme", Filter(), NOW)).use_recorded is recorded
