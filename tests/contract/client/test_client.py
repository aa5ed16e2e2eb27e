"""The Client over real gRPC: the requests that it sends and the values that it returns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.rpc import error_details_pb2
from latchkey import Scope, Secret, Verdict
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import mark_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.contract.client.conftest import FakeLatchkey

CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


async def test_create_returns_token_and_redacted_secret(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """Create sends its arguments and returns plain values. The secret cannot be printed."""
    fake.on(
        "Create", fake.says(pb.CreateResponse(token=fake.token(labels={"a": "b"}), secret=secret))
    )
    created = await client.create(
        "acme", "ci", Scope.READ, ttl=timedelta(days=1, microseconds=5), labels={"a": "b"}
    )
    assert created.secret == Secret(secret)
    assert created.secret.reveal() == secret
    assert secret not in repr(created)
    assert created.token == latchkey.Token(
        id="t1",
        account_id="acme",
        name="ci",
        scope=Scope.READ,
        create_time=CREATED,
        hint="lk_…DM4R",
        labels={"a": "b"},
    )
    hash(created.token)
    (call,) = fake.calls
    assert call.request == pb.CreateRequest(
        account_id="acme",
        name="ci",
        scope=pb.SCOPE_READ,
        ttl=call.request.ttl,
        labels={"a": "b"},
        request_id=call.request.request_id,
    )
    assert call.request.ttl.ToTimedelta() == timedelta(days=1, microseconds=5)
    assert call.metadata["user-agent"].startswith(f"latchkey-python/{latchkey.__version__}")


async def test_times_are_converted_to_utc(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """An expire_time in any time zone arrives as the same moment, and returns in UTC."""
    moment = datetime(2030, 6, 1, 12, 0, 0, 250, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    token = fake.token()
    token.expire_time.FromDatetime(moment)
    token.last_used_time.FromDatetime(moment)
    fake.on("Create", fake.says(pb.CreateResponse(token=token)))
    created = await client.create("acme", "ci", Scope.WRITE, expire_time=moment)
    assert fake.calls[0].request.expire_time.ToDatetime(tzinfo=UTC) == moment
    assert created.token.expire_time == moment
    assert created.token.expire_time.tzinfo is UTC
    assert created.token.last_used_time == moment


@pytest.mark.parametrize(
    "arguments",
    [
        {"ttl": timedelta(1), "expire_time": CREATED},
        {"expire_time": CREATED.replace(tzinfo=None)},
        {"expire_time": datetime.min.replace(tzinfo=timezone(timedelta(hours=9)))},
        {"ttl": timedelta.max},
        {"name": "\ud800"},
        {"labels": {"a": "\udcff"}},
        {"scope": Scope.UNSPECIFIED},
        {"timeout_seconds": 0},
    ],
)
async def test_unrepresentable_values_are_an_invalid_argument(
    client: latchkey.Client, fake: FakeLatchkey, arguments: dict[str, Any]
) -> None:
    """Values that no request can carry raise the same error as values that the service rejects."""
    values: dict[str, Any] = {"account_id": "acme", "name": "ci", "scope": Scope.READ, **arguments}
    fake.on("Create", fake.fails(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(latchkey.InvalidArgument):
        await client.create(**values)


@pytest.mark.parametrize("scope", [None, "read", 1])
async def test_create_requires_a_scope(client: latchkey.Client, scope: Any) -> None:
    """Anything that is not a Scope is rejected."""
    with pytest.raises(TypeError):
        await client.create("acme", "ci", scope)


async def test_get(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Get requests one token of one account."""
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token("t9"))))
    assert (await client.get("acme", "t9")).id == "t9"
    assert fake.calls[0].request == pb.GetRequest(account_id="acme", id="t9")


async def test_list_reads_all_pages(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """The iterator yields every token in order and requests each page once."""
    fake.on(
        "List",
        fake.says(pb.ListResponse(tokens=[fake.token("3"), fake.token("2")], next_page_token="p2")),
        fake.says(pb.ListResponse(next_page_token="p3")),
        fake.says(pb.ListResponse(tokens=[fake.token("1")])),
    )
    assert [token.id async for token in client.list("acme", page_size=2)] == ["3", "2", "1"]
    assert [call.request.page_token for call in fake.calls] == ["", "p2", "p3"]
    assert {call.request.page_size for call in fake.calls} == {2}


async def test_list_stops_at_a_repeated_page(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A service that returns the same page again does not block its caller for ever."""
    fake.on("List", fake.says(pb.ListResponse(tokens=[fake.token()], next_page_token="same")))
    with pytest.raises(latchkey.InternalError):
        _ = [token async for token in client.list("acme")]
    assert fake.count("List") == 2


async def test_list_page(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A page is returned with the token for the next one."""
    fake.on("List", fake.says(pb.ListResponse(tokens=[fake.token()], next_page_token="n")))
    page = await client.list_page("acme", page_size=1, page_token="p")
    assert ([token.id for token in page.tokens], page.next_page_token) == (["t1"], "n")
    with pytest.raises(latchkey.InvalidArgument):
        await client.list_page("acme", page_size=2**40)


async def test_list_with_a_filter(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Filter, order and count are sent with each page, and the count is returned if requested."""
    answers = [
        pb.ListResponse(next_page_token="p2", filter_applied=True),
        pb.ListResponse(
            tokens=[fake.token("1")], filter_applied=True, total_size=7, total_size_capped=True
        ),
    ]
    fake.on("List", *map(fake.says, answers))
    wanted = latchkey.TokenFilter(search="x")
    order = latchkey.TokenOrder.LAST_USE
    found = [token.id async for token in client.list("acme", wanted, order=order, reverse=True)]
    assert found == ["1"]
    expected = pb.ListRequest(
        account_id="acme",
        filter=pb.TokenFilter(search="x"),
        order=pb.TOKEN_ORDER_LAST_USE,
        reverse=True,
    )
    first, second = (call.request for call in fake.calls)
    assert first == expected
    expected.page_token = "p2"
    assert second == expected
    fake.on("List", fake.says(answers[1]))
    page = await client.list_page("acme", include_total_size=True)
    assert (page.total_size, page.total_size_capped) == (7, True)
    assert fake.calls[-1].request == pb.ListRequest(account_id="acme", include_total_size=True)
    fake.on("List", fake.says(pb.ListResponse()))
    assert (await client.list_page("acme")).total_size is None


@pytest.mark.parametrize(
    "asked",
    [
        {"wanted": latchkey.TokenFilter(can_write=False)},
        {"order": latchkey.TokenOrder.EXPIRY},
        {"reverse": True},
        {"include_total_size": True},
    ],
)
async def test_a_filter_is_never_ignored(
    client: latchkey.Client, fake: FakeLatchkey, asked: dict[str, Any]
) -> None:
    """A server of an earlier release ignores filters. The client reports that instead of returning
    tokens that were not asked for."""
    fake.on("List", fake.says(pb.ListResponse(tokens=[fake.token()])))
    assert (await client.list_page("acme")).tokens
    with pytest.raises(latchkey.FailedPrecondition, match="cannot filter") as refused:
        await client.list_page("acme", **asked)
    assert refused.value.reason == "FILTER_NOT_APPLIED"


async def test_delete_returns_the_receipt(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Every field of the receipt is converted."""
    receipt = pb.Receipt(
        revision=2**40,
        verifiers_acknowledged=3,
        verifiers_outwaited=1,
        mark=2**64 - 1,
        clients_acknowledged=5,
        clients_outwaited=2,
    )
    receipt.commit_time.FromDatetime(CREATED)
    receipt.effective_time.FromDatetime(CREATED + timedelta(seconds=1))
    fake.on("Delete", fake.says(pb.DeleteResponse(receipt=receipt)))
    assert await client.delete("acme", "t1") == latchkey.Receipt(
        commit_time=CREATED,
        effective_time=CREATED + timedelta(seconds=1),
        revision=2**40,
        verifiers_acknowledged=3,
        verifiers_outwaited=1,
        mark=2**64 - 1,
        clients_acknowledged=5,
        clients_outwaited=2,
    )
    assert fake.calls[0].request == pb.DeleteRequest(account_id="acme", id="t1")


async def test_delete_without_waiting(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """An unconfirmed deletion has no effective_time."""
    receipt = pb.Receipt(revision=5)
    receipt.commit_time.FromDatetime(CREATED)
    fake.on("Delete", fake.says(pb.DeleteResponse(receipt=receipt)))
    answer = await client.delete("acme", "t1", no_wait=True)
    assert (answer.commit_time, answer.effective_time, answer.revision) == (CREATED, None, 5)
    assert fake.calls[0].request == pb.DeleteRequest(account_id="acme", id="t1", no_wait=True)


async def test_delete_retries_for_its_receipt(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """If the service could not confirm in time and the deadline allows it, Delete is retried."""
    receipt = pb.Receipt(revision=5)
    receipt.effective_time.FromDatetime(CREATED)
    reason = error_details_pb2.ErrorInfo(reason="DELETION_NOT_CONFIRMED", domain="latchkey")
    fake.on(
        "Delete",
        fake.fails(grpc.StatusCode.UNAVAILABLE, "not confirmed", reason),
        fake.says(pb.DeleteResponse(receipt=receipt)),
    )
    assert (await client.delete("acme", "t1")).effective_time == CREATED
    assert fake.count("Delete") == 2


async def test_status(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Every field of the status is converted. Values of a newer server become UNSPECIFIED."""
    message = status_pb.GetStatusResponse(head_revision=9, head_mark=2**63, schema_version=15)
    verifier = message.verifiers.add(
        id="v1",
        host="web-1",
        process_id=77,
        version="1.2",
        acknowledged_revision=8,
        lag=1,
        clients=3,
        notifications=status_pb.NOTIFICATIONS_SILENT,
        answering=True,
        waiting_for=["ci at ipv4:10.0.0.1:5"],
        pepper_ids=["new", "old"],
        database_host="db1:5432",
        system_identifier="7713595303237486605",
        timeline="00000002",
    )
    message.warnings.append("Repair it.")
    verifier.start_time.FromDatetime(CREATED)
    verifier.lease_duration.FromTimedelta(timedelta(seconds=3))
    verifier.lease_remaining.FromTimedelta(timedelta(seconds=2.5))
    message.verifiers.add(id="v2", notifications=99)
    fake.on("GetStatus", fake.says(message))
    status = await client.status()
    assert (status.head_revision, status.head_mark) == (9, 2**63)
    assert status.warnings == ("Repair it.",)
    assert status.schema_version == 15
    assert status.verifiers[0] == latchkey.VerifierStatus(
        id="v1",
        host="web-1",
        process_id=77,
        version="1.2",
        start_time=CREATED,
        acknowledged_revision=8,
        lag=1,
        lease_duration=timedelta(seconds=3),
        lease_remaining=timedelta(seconds=2.5),
        clients=3,
        notifications=latchkey.Notifications.SILENT,
        answering=True,
        waiting_for=("ci at ipv4:10.0.0.1:5",),
        pepper_ids=("new", "old"),
        database_host="db1:5432",
        system_identifier="7713595303237486605",
        timeline="00000002",
    )
    assert status.verifiers[1].pepper_ids == ()
    assert status.verifiers[1].notifications is latchkey.Notifications.UNSPECIFIED
    message.verifiers[1].lease_duration.seconds = 2**62
    with pytest.raises(latchkey.InternalError):
        await client.status()


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.UNSPECIFIED])
@pytest.mark.parametrize("wrap", [str, Secret])
async def test_verify_translates_every_verdict(
    client: latchkey.Client, fake: FakeLatchkey, secret: str, verdict: Verdict, wrap: Any
) -> None:
    """Each verdict is converted, and only VALID is allowed."""
    fake.on("Verify", fake.verdict(pb.Verdict.Value(f"VERDICT_{verdict.name}")))
    answer = await client.verify(wrap(secret), Scope.READ)
    assert answer.verdict is verdict
    assert answer.allowed is (verdict is Verdict.VALID)
    assert (answer.revision, answer.mark) == (7, mark_of(7))
    assert fake.calls[0].request == pb.VerifyRequest(
        secret=secret, required_scope=pb.SCOPE_READ, spends_shares=True
    )


@pytest.mark.parametrize("number", [0, 99, -1])
async def test_unknown_numbers_allow_nothing(
    client: latchkey.Client, fake: FakeLatchkey, secret: str, number: int
) -> None:
    """An unknown verdict or scope becomes UNSPECIFIED, which is not allowed."""
    fake.on("Verify", fake.verdict(number))
    answer = await client.verify(secret)
    assert (answer.verdict, answer.allowed) == (Verdict.UNSPECIFIED, False)
    assert fake.calls[0].request.required_scope == pb.SCOPE_UNSPECIFIED
    token = fake.token()
    token.scope = number  # type: ignore[assignment]  # a newer server may send any number
    fake.on("Get", fake.says(pb.GetResponse(token=token)))
    assert (await client.get("acme", "t1")).scope is Scope.UNSPECIFIED


async def test_valid_without_a_token_is_an_internal_error(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """An answer that breaks the contract raises."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID, token=False))
    with pytest.raises(latchkey.InternalError):
        await client.verify(secret)


async def test_unspecified_scope_is_rejected(client: latchkey.Client, secret: str) -> None:
    """A scope that this library does not know never becomes "no scope required"."""
    with pytest.raises(latchkey.InvalidArgument):
        await client.verify(secret, Scope.UNSPECIFIED)


async def test_verify_takes_any_text(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Text that UTF-8 cannot encode is MALFORMED and raises nothing."""
    fake.on("Verify", fake.verdict(pb.VERDICT_MALFORMED, token=False))
    for text in ("", "\ud800", "\x00", "🗝" * 1000):
        assert (await client.verify(text)).verdict is Verdict.MALFORMED
    assert [call.request.secret for call in fake.calls][:2] == ["", ""]
    with pytest.raises(TypeError) as caught:
        await client.verify(b"hunter2")  # type: ignore[arg-type]  # tests a wrong type
    assert "hunter2" not in str(caught.value)


async def test_batch_verify_keeps_the_order(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """Answers are returned in the order of the questions."""
    fake.on(
        "BatchVerify",
        fake.says(
            pb.BatchVerifyResponse(
                responses=[
                    pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN),
                    pb.VerifyResponse(verdict=pb.VERDICT_VALID, token=fake.token()),
                ]
            )
        ),
    )
    answers = await client.batch_verify([("\ud800", None), (Secret(secret), Scope.WRITE)])
    assert [answer.verdict for answer in answers] == [Verdict.UNKNOWN, Verdict.VALID]
    assert list(fake.calls[0].request.requests) == [
        pb.VerifyRequest(spends_shares=True),
        pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_WRITE, spends_shares=True),
    ]
    with pytest.raises(latchkey.InternalError):
        await client.batch_verify([(secret, None)])


async def test_the_largest_batch_fits(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """1,000 answers with the largest labels that the contract allows are received."""
    labels = {f"{n:063}".replace("0", "🗝"): "🗝" * 255 for n in range(1, 17)}
    answer = pb.VerifyResponse(verdict=pb.VERDICT_VALID, token=fake.token(labels=labels))
    fake.on("BatchVerify", fake.says(pb.BatchVerifyResponse(responses=[answer] * 1000)))
    answers = await client.batch_verify([("x", None)] * 1000, timeout_seconds=30)
    assert len(answers) == 1000
    assert answers[999].token is not None
    assert answers[999].token.labels == labels


async def test_impossible_times_are_an_internal_error(
    client: latchkey.Client, fake: FakeLatchkey
) -> None:
    """A timestamp out of range raises an error that blames the service."""
    token = fake.token()
    token.create_time.seconds = 2**62
    fake.on("Get", fake.says(pb.GetResponse(token=token)))
    with pytest.raises(latchkey.InternalError):
        await client.get("acme", "t1")


async def test_unix_sockets_and_supplied_channels(fake: FakeLatchkey, tmp_path: Path) -> None:
    """A unix: target works. A channel that was passed in is used and stays open."""
    await fake.stop()
    await fake.start(f"unix:{tmp_path}/s")
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token())))
    async with latchkey.Client(fake.target) as client:
        assert (await client.get("acme", "t1")).id == "t1"
    async with grpc.aio.insecure_channel(fake.target) as channel:
        for _ in range(2):
            async with latchkey.Client(channel=channel) as client:
                assert (await client.get("acme", "t1")).id == "t1"


def test_clients_can_be_created_before_the_loop_runs() -> None:
    """A client or verifier can be created at module level, without an event loop."""
    latchkey.Client("127.0.0.1:1")
    latchkey.Verifier("127.0.0.1:1")


async def test_channel_options_can_be_replaced(fake: FakeLatchkey) -> None:
    """An option that is passed in replaces the library's."""
    fake.on("Get", fake.says(pb.GetResponse(token=fake.token())))
    options = [("grpc.primary_user_agent", "mine/1")]
    async with latchkey.Client(fake.target, options=options) as client:
        await client.get("acme", "t1")
    assert fake.calls[0].metadata["user-agent"].startswith("mine/1")
