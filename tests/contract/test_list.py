"""List with filters, orders and counts, as any client sees it, over each transport."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.tokens import listing, usage_writer

from tests.contract.known_tokens import (
    DAY,
    EXPIRY,
    FILTERS,
    LAST_USE,
    NEWEST,
    NOW,
    WRITE,
    known_tokens,
    matches,
    ordered,
)
from tests.contract.test_changes import timestamp
from tests.helpers.rich_status import refusal
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

    from tests.helpers.servers import Create


@pytest.fixture
async def connection(shared_servers: Any, transport: str, address: str) -> Any:
    """A connection to the server's database."""
    _ = address  # emptied first
    return (await shared_servers(transport))[1]


async def pages(
    stub: TokenServiceAsyncStub, **request: Any
) -> tuple[list[str], list[pb.ListResponse]]:
    """Return the ids of all pages, and the pages."""
    ids: list[str] = []
    answers: list[pb.ListResponse] = []
    page_token = ""
    for _ in range(1_000):  # far more than any test needs
        answer = await stub.List(
            pb.ListRequest(account_id="acme", page_token=page_token, **request), timeout=5
        )
        ids += [token.id for token in answer.tokens]
        answers.append(answer)
        page_token = answer.next_page_token
        if not page_token:
            return ids, answers
    raise AssertionError("the list does not end")


@pytest.fixture
def examined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of tokens that one call reads, in two steps."""
    monkeypatch.setattr(listing, "EXAMINED_MAX", request.param[0])
    monkeypatch.setattr(listing, "EXAMINED_FIRST", request.param[1])
    return int(request.param[0])


# The usual number, and one that all lists exceed. What List reads does not depend on the transport.
@pytest.mark.parametrize(
    ("transport", "examined"),
    [("native", (10_000, 1_000)), ("grpcio", (7, 3))],
    ids=["native-whole", "grpcio-in parts"],
    indirect=True,
)
async def test_filters_and_orders(
    stub: TokenServiceAsyncStub, create: Create, connection: Any, examined: int
) -> None:
    """For each filter and each order, the pages contain each token that matches once, in order,
    whatever their size and however many tokens one call reads. The count is exact or capped."""
    tokens = await known_tokens(create, connection, 30)
    await create(account_id="other", name="api of another account")
    gone = await create(name="api that was deleted")
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=gone.token.id))
    sizes = itertools.cycle([0, 5])
    for selected in FILTERS:
        matching = [token for token in tokens if matches(token, selected)]
        assert matching
        for order, reverse in itertools.product((NEWEST, EXPIRY, LAST_USE), (False, True)):
            ids, answers = await pages(
                stub,
                filter=pb.TokenFilter(**selected),
                order=order,
                reverse=reverse,
                page_size=next(sizes),
                include_total_size=True,
            )
            assert ids == ordered(matching, order, reverse=reverse), (selected, order, reverse)
            for answer in answers:
                assert answer.filter_applied
                if not answer.total_size_capped:
                    assert answer.total_size == len(matching), selected
                else:
                    assert answer.total_size <= min(len(matching), examined)
            if examined > len(tokens):
                assert not answers[0].total_size_capped


async def test_a_call_reads_a_bounded_number_of_tokens(
    stub: TokenServiceAsyncStub, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the tokens that one call reads do not match, the page is empty but not the last one, and
    the count is marked as a lower bound. At the exact limit it is not."""
    monkeypatch.setattr(listing, "EXAMINED_MAX", 4)
    wanted = await create(name="wanted")
    for _ in range(3):
        await create()
    query: dict[str, Any] = {
        "filter": pb.TokenFilter(name_contains="wanted"),
        "include_total_size": True,
    }
    first = await stub.List(pb.ListRequest(account_id="acme", **query))
    assert [token.id for token in first.tokens] == [wanted.token.id]
    assert (first.total_size, first.total_size_capped) == (1, False)
    for _ in range(2):
        await create()
    first = await stub.List(pb.ListRequest(account_id="acme", **query))
    assert not first.tokens
    assert first.next_page_token
    assert (first.total_size, first.total_size_capped) == (0, True)
    ids, _ = await pages(stub, **query)
    assert ids == [wanted.token.id]
    everything = await stub.List(pb.ListRequest(account_id="acme", include_total_size=True))
    assert (everything.total_size, everything.total_size_capped) == (4, True)
    assert len(everything.tokens) == 4


async def test_a_natural_order_skips_what_does_not_match(
    stub: TokenServiceAsyncStub,
    create: Create,
    connection: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filters on expiry and on use find their tokens in one call, in their own order, however many
    other tokens there are, and their counts are exact."""
    tokens = await known_tokens(create, connection, 30)
    monkeypatch.setattr(listing, "EXAMINED_MAX", 24)
    natural: list[tuple[Any, dict[str, Any]]] = [
        (EXPIRY, {"expires_before": timestamp(NOW + DAY)}),
        (EXPIRY, {"never_expires": True}),
        (EXPIRY, {"state": pb.TOKEN_STATE_EXPIRED}),
        (LAST_USE, {"never_used": True}),
        (LAST_USE, {"unused_since": timestamp(NOW - 5 * DAY)}),
        (LAST_USE, {"unused_since": timestamp(NOW - 2 * DAY), "never_used": False}),
    ]
    for order, selected in natural:
        matching = [token for token in tokens if matches(token, selected)]
        for reverse in (False, True):
            answer = await stub.List(
                pb.ListRequest(
                    account_id="acme",
                    filter=pb.TokenFilter(**selected),
                    order=order,
                    reverse=reverse,
                    include_total_size=True,
                )
            )
            assert [token.id for token in answer.tokens] == ordered(
                matching, order, reverse=reverse
            )
            assert (answer.total_size, answer.total_size_capped) == (len(matching), False)
            assert answer.next_page_token == ""


async def test_ids(
    stub: TokenServiceAsyncStub, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """List and DeleteAll find tokens by id in each order, wherever they are, and never those of
    another account."""
    tokens = [(await create()).token.id for _ in range(8)]
    other = (await create(account_id="other")).token.id
    monkeypatch.setattr(listing, "EXAMINED_MAX", 3)
    chosen = [tokens[0], tokens[7]]
    for order in (NEWEST, EXPIRY, LAST_USE):
        selected = pb.TokenFilter(ids=[*chosen, other, "tok_never", chosen[0]])
        ids, answers = await pages(stub, filter=selected, order=order, include_total_size=True)
        assert sorted(ids) == chosen
        assert answers[0].total_size == 2
    answer = await stub.DeleteAll(
        pb.DeleteAllRequest(account_id="acme", filter=pb.TokenFilter(ids=[*chosen, other]))
    )
    assert answer.count == 2
    ids, _ = await pages(stub)
    assert ids == tokens[6:0:-1]
    assert len((await stub.List(pb.ListRequest(account_id="other"))).tokens) == 1


async def test_search_by_the_last_characters_of_a_secret(
    stub: TokenServiceAsyncStub, create: Create
) -> None:
    """A search finds a token by the hint of each secret that works, and by no other secret."""
    created = await create(name="first")
    await create(name="second")
    other = created.token.hint[-4:]
    rotated = await stub.Rotate(
        pb.RotateRequest(account_id="acme", id=created.token.id, retire_on_first_use=True)
    )

    async def found(text: str) -> list[str]:
        ids, _ = await pages(stub, filter=pb.TokenFilter(search=text))
        return ids

    assert await found(other.swapcase()) == [created.token.id]
    assert await found(rotated.token.hint[-4:]) == [created.token.id]
    assert await found(rotated.token.hint) == [created.token.id]
    assert await found("FIRST") == [created.token.id]
    await stub.RetireSecrets(pb.RetireSecretsRequest(account_id="acme", id=created.token.id))
    assert await found(other) == []
    assert await found(rotated.token.hint[-4:]) == [created.token.id]


async def test_a_use_moves_a_token(
    stub: TokenServiceAsyncStub, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verify moves its token behind the tokens that were never used, and deletions take tokens
    out of the list by last use."""
    monkeypatch.setattr(usage_writer, "WRITE_SECONDS", 0.05)
    tokens = [await create() for _ in range(3)]
    await stub.Verify(pb.VerifyRequest(secret=tokens[0].secret))
    expected = [tokens[1].token.id, tokens[2].token.id, tokens[0].token.id]

    async def moved() -> bool:
        used = pb.TokenFilter(never_used=False)
        assert (await pages(stub, filter=used))[0] == expected[2:]
        return (await pages(stub, order=LAST_USE))[0] == expected

    await eventually(moved, "the use in the order")
    for token in tokens[:2]:
        await stub.Delete(pb.DeleteRequest(account_id="acme", id=token.token.id))
    assert (await pages(stub, order=LAST_USE))[0] == [tokens[2].token.id]


async def test_page_tokens_belong_to_their_list(
    stub: TokenServiceAsyncStub, create: Create
) -> None:
    """A page token of another filter, order or direction is refused."""
    for _ in range(3):
        await create(scope=WRITE, labels={"team": "a"})
    lists: list[dict[str, Any]] = [
        {},
        {"reverse": True},
        {"order": EXPIRY},
        {"order": LAST_USE},
        {"filter": pb.TokenFilter(scope=WRITE)},
        {"filter": pb.TokenFilter(can_write=True)},
        {"filter": pb.TokenFilter(never_used=True)},
        {"filter": pb.TokenFilter(label={"team": "a"})},
        {"filter": pb.TokenFilter(name_contains="token")},
        {"filter": pb.TokenFilter(search="token")},
        {"filter": pb.TokenFilter(unused_since=timestamp(NOW + DAY))},
        {"filter": pb.TokenFilter(unused_since=timestamp(NOW + 2 * DAY))},
    ]

    def request(number: int, page_token: str = "") -> pb.ListRequest:
        return pb.ListRequest(
            account_id="acme", page_size=1, page_token=page_token, **lists[number]
        )

    tokens = [(await stub.List(request(n))).next_page_token for n in range(len(lists))]
    for mine, theirs in itertools.product(range(len(lists)), repeat=2):
        if mine == theirs:
            assert len((await stub.List(request(mine, tokens[theirs]))).tokens) == 1
        else:
            error = await refusal(stub.List(request(mine, tokens[theirs])))
            assert (error.code, error.fields) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                ["page_token"],
            )
    # The same lists, written in another way.
    assert await stub.List(pb.ListRequest(account_id="acme", page_token=tokens[0], order=NEWEST))
    same = pb.TokenFilter(name_contains="TOKEN")
    assert await stub.List(pb.ListRequest(account_id="acme", page_token=tokens[8], filter=same))


@pytest.mark.parametrize(
    ("request_fields", "wrong"),
    [
        ({"order": 9}, ["order"]),
        ({"page_size": -1}, ["page_size"]),
        ({"filter": {"scope": 9}}, ["filter.scope"]),
        ({"filter": {"name_contains": " "}}, ["filter.name_contains"]),
        ({"filter": {"search": "x" * 65}}, ["filter.search"]),
        ({"filter": {"search": "\u200b"}}, ["filter.search"]),
        ({"filter": {"ids": ["tok_1"] * 1_001}}, ["filter.ids"]),
        ({"filter": {"ids": ["tok_1", ""]}}, ["filter.ids"]),
        ({"filter": {"ids": ["a\x00"]}}, ["filter.ids"]),
        (
            {"filter": {"secret_created_before": {"seconds": 2**40}}},
            ["filter.secret_created_before"],
        ),
    ],
)
async def test_bad_lists(
    stub: TokenServiceAsyncStub, request_fields: dict[str, Any], wrong: list[str]
) -> None:
    """An invalid order or filter is refused by name."""
    error = await refusal(stub.List(pb.ListRequest(account_id="acme", **request_fields)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, wrong)


async def test_an_unknown_condition_lists_nothing(channel: grpc.aio.Channel) -> None:
    """A condition of a newer client is refused, because without it more tokens would match."""
    number = pb.ListRequest.DESCRIPTOR.fields_by_name["filter"].number
    # filter { 100: "x" }
    raw = pb.ListRequest(account_id="acme").SerializeToString()
    raw += bytes([number << 3 | 2, 4, 0xA2, 0x06, 1, ord("x")])
    call: Any = channel.unary_unary(
        "/latchkey.v1.TokenService/List",
        request_serializer=lambda data: data,
        response_deserializer=pb.ListResponse.FromString,
    )
    error = await refusal(call(raw, timeout=5))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["filter"])


async def test_the_largest_filter(stub: TokenServiceAsyncStub) -> None:
    """The largest valid filter fits into a request, for List and for DeleteAll."""
    selected = pb.TokenFilter(
        ids=[f"tok_{number:026}" for number in range(1_000)],
        name_contains="\U0001f511" * 64,
        search="\U0001f511" * 64,
        label={f"{number:02}" + "\U0001f511" * 61: "\U0001f511" * 255 for number in range(16)},
    )
    assert not (await stub.List(pb.ListRequest(account_id="acme", filter=selected))).tokens
    request = pb.DeleteAllRequest(account_id="acme", filter=selected)
    assert (await stub.DeleteAll(request)).count == 0


async def test_a_leaked_secret_counts_until_it_is_gone(stub: Any, create: Create) -> None:
    """The filter finds a token while a reported secret is one that owners see: the newest one, or
    an older one that still works."""

    async def found() -> list[str]:
        request = pb.ListRequest(account_id="acme", filter=pb.TokenFilter(leaked=True))
        return [token.name for token in (await stub.List(request, timeout=5)).tokens]

    created = await create(name="leaky")
    await create(name="other")
    assert await found() == []
    report = pb.ReportSecretRequest(secrets=[created.secret])
    await stub.ReportSecret(report, timeout=5)
    assert await found() == ["leaky"]
    named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
    await stub.Rotate(pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=60)), timeout=9)
    assert await found() == ["leaky"]
    await stub.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9)
    assert await found() == []
    # The newest one that has ended counts: the token's program has no secret that works.
    rotated = await stub.Rotate(pb.RotateRequest(**named), timeout=9)
    await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[rotated.secret]), timeout=9)
    assert await found() == ["leaky"]
