"""Rate limits of tokens as any client sees them, over each transport."""

import asyncio
from collections import Counter

import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import watching

HOUR = duration_pb2.Duration(seconds=3_600)
SECOND = duration_pb2.Duration(seconds=1)


def limit(count, period=HOUR, burst=0):
    return pb.RateLimit(count=count, period=period, burst=burst)


def question(secret, **fields):
    return pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ, **fields)


def name(response):
    return pb.Verdict.Name(response.verdict).removeprefix("VERDICT_")


async def verdict(stub, secret, **fields):
    return name(await stub.Verify(question(secret, **fields), timeout=5))


def update(token, rate_limit=None, **fields):
    return pb.UpdateRequest(
        account_id="acme",
        id=token.id,
        token=pb.Token(rate_limit=rate_limit),
        update_mask=field_mask_pb2.FieldMask(paths=["rate_limit"]),
        **fields,
    )


async def test_token_is_refused_once_its_limit_is_used_up(stub, create):
    """As many verifies as the burst are VALID. The next one is RATE_LIMITED, with a time."""
    created = await create(rate_limit=limit(60, burst=3))
    answers = [await stub.Verify(question(created.secret), timeout=5) for _ in range(5)]
    assert [name(answer) for answer in answers] == ["VALID"] * 3 + ["RATE_LIMITED"] * 2
    assert not any(answer.HasField("retry_after") for answer in answers[:3])
    for answer in answers[3:]:
        assert 50 < answer.retry_after.seconds <= 60
        assert answer.token.id == created.token.id
        assert answer.token.rate_limit == limit(60, burst=3)


async def test_absent_burst_is_the_count(stub, create):
    """A limit without a burst permits a whole period's verifies at once."""
    created = await create(rate_limit=limit(2))
    assert created.token.rate_limit == limit(2, burst=2)
    assert [await verdict(stub, created.secret) for _ in range(3)] == [
        "VALID",
        "VALID",
        "RATE_LIMITED",
    ]
    shown = await stub.Get(pb.GetRequest(account_id="acme", id=created.token.id), timeout=5)
    assert shown.token.rate_limit == limit(2, burst=2)


async def test_limit_fills_again(stub, create):
    """Once `retry_after` has passed, the token is VALID again."""
    created = await create(rate_limit=limit(10, SECOND, burst=1))
    assert await verdict(stub, created.secret) == "VALID"

    async def valid() -> bool:
        answer = await stub.Verify(question(created.secret), timeout=5)
        assert answer.retry_after.ToSeconds() <= 1
        return name(answer) == "VALID"

    await eventually(valid, "the limit fills again")


async def test_batch_spends_a_call_for_each_item(stub, create):
    """Each item of a BatchVerify counts, even for the same token, cached or not."""
    created = await create(rate_limit=limit(1, burst=5))
    other = await create(rate_limit=limit(1, burst=1))
    free = await create()
    batch = pb.BatchVerifyRequest(
        requests=[question(created.secret)] * 3 + [question(other.secret), question(free.secret)]
    )
    verdicts = []
    for _ in range(2):
        answer = await stub.BatchVerify(batch, timeout=5)
        verdicts.append([name(response) for response in answer.responses])
    assert verdicts[0] == ["VALID"] * 5
    assert Counter(verdicts[1][:3]) == {"VALID": 2, "RATE_LIMITED": 1}
    assert verdicts[1][3:] == ["RATE_LIMITED", "VALID"]


async def test_simultaneous_verifies_never_exceed_the_burst(stub, create):
    """Of many verifies that arrive at once, exactly as many as the burst are VALID."""
    created = await create(rate_limit=limit(1, burst=20))
    verdicts = await asyncio.gather(*(verdict(stub, created.secret) for _ in range(60)))
    assert Counter(verdicts) == {"VALID": 20, "RATE_LIMITED": 40}


async def test_only_what_would_be_valid_spends_a_call(stub, create):
    """A verify that is refused for another reason gets that verdict and spends nothing."""
    created = await create(
        rate_limit=limit(1, burst=1), allowed_networks=["10.0.0.0/8"], scope=pb.SCOPE_READ
    )
    secret, inside = created.secret, "10.0.0.1"
    for spent in (False, True):
        assert await verdict(stub, secret, client_address="192.0.2.1") == "ADDRESS_NOT_ALLOWED"
        wrong = pb.VerifyRequest(
            secret=secret, required_scope=pb.SCOPE_WRITE, client_address=inside
        )
        assert name(await stub.Verify(wrong, timeout=5)) == "INSUFFICIENT_SCOPE"
        asked = {"client_address": inside, "required_permissions": ["a:b"]}
        assert await verdict(stub, secret, **asked) == "INSUFFICIENT_PERMISSIONS"
        expected = "RATE_LIMITED" if spent else "VALID"
        assert await verdict(stub, secret, client_address=inside) == expected


async def test_secrets_of_a_token_share_its_limit(stub, create):
    """After a Rotate with a grace, both secrets spend the calls of one limit."""
    created = await create(rate_limit=limit(1, burst=2))
    rotated = await stub.Rotate(
        pb.RotateRequest(
            account_id="acme", id=created.token.id, grace=duration_pb2.Duration(seconds=600)
        ),
        timeout=10,
    )
    assert await verdict(stub, created.secret) == "VALID"
    assert await verdict(stub, rotated.secret) == "VALID"
    assert await verdict(stub, created.secret) == "RATE_LIMITED"
    assert await verdict(stub, rotated.secret) == "RATE_LIMITED"


async def test_update_sets_changes_and_removes_a_limit(stub, create):
    """A tighter limit has a receipt. A wider one has none, and no limit permits everything."""
    created = await create()
    assert await verdict(stub, created.secret) == "VALID"
    tighter = await stub.Update(update(created.token, limit(1, burst=1)), timeout=10)
    assert tighter.receipt.HasField("effective_time")
    assert tighter.token.rate_limit == limit(1, burst=1)
    assert await verdict(stub, created.secret) == "VALID"
    assert await verdict(stub, created.secret) == "RATE_LIMITED"
    wider = await stub.Update(update(created.token, limit(1, SECOND, burst=1_000)), timeout=10)
    assert not wider.HasField("receipt")
    same = await stub.Update(update(created.token, limit(1, SECOND, burst=1_000)), timeout=10)
    assert same.receipt.HasField("effective_time")
    gone = await stub.Update(update(created.token), timeout=10)
    assert not gone.HasField("receipt")
    assert not gone.token.HasField("rate_limit")

    async def valid() -> bool:
        return await verdict(stub, created.secret) == "VALID"

    await eventually(valid, "the token is not limited")
    assert {await verdict(stub, created.secret) for _ in range(20)} == {"VALID"}


async def test_answer_is_not_cacheable_for_a_client_that_knows_no_limits(stub, create):
    """Without `spends_shares`, an answer about a limited token has no position to cache it at."""
    created = await create(rate_limit=limit(1, burst=10))
    for scope in (pb.SCOPE_READ, pb.SCOPE_WRITE):
        old = pb.VerifyRequest(secret=created.secret, required_scope=scope)
        new = pb.VerifyRequest(secret=created.secret, required_scope=scope, spends_shares=True)
        answer = await stub.Verify(old, timeout=5)
        assert (answer.revision, answer.mark) == (0, 0)
        assert (await stub.Verify(new, timeout=5)).mark
        answers = await stub.BatchVerify(pb.BatchVerifyRequest(requests=[old, new]), timeout=5)
        assert [bool(response.mark) for response in answers.responses] == [False, True]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (limit(0), "rate_limit.count"),
        (limit(1_000_001), "rate_limit.count"),
        (limit(-1), "rate_limit.count"),
        (limit(1, duration_pb2.Duration(seconds=2)), "rate_limit.period"),
        (limit(1, duration_pb2.Duration(seconds=1, nanos=1_000)), "rate_limit.period"),
        (pb.RateLimit(count=1), "rate_limit.period"),
        (limit(1, burst=-1), "rate_limit.burst"),
        (limit(1, burst=1_000_001), "rate_limit.burst"),
        (limit(1, duration_pb2.Duration(seconds=1, nanos=-1)), "rate_limit.period"),
    ],
)
async def test_bad_limits_are_refused(stub, create, bad, field):
    """Create and Update refuse counts, periods and bursts out of range, and name the field."""
    found = await refusal(create(rate_limit=bad))
    assert field in found.fields
    created = await create()
    found = await refusal(stub.Update(update(created.token, bad), timeout=10))
    assert field in {name.removeprefix("token.") for name in found.fields}


async def shares_of(client, number, **wanted):
    """Ask for calls over Watch, and return the answer."""
    asked = [pb.WantedCalls(token_id=token_id, calls=calls) for token_id, calls in wanted.items()]
    await client.say(rate_shares_request=pb.RateSharesRequest(number=number, wanted=asked))
    while not isinstance(event := await client.hear(), pb.RateShares):
        await client.say()
    assert event.number == number
    return event


async def test_watch_gives_shares(address, stub, create):
    """A client gets at most half of the calls that are left, and at most half a second's, with the
    limit and the time for which they count. They are calls of the same limit as those of Verify."""
    fast = await create(rate_limit=limit(1_000, SECOND, burst=8))
    slow = await create(rate_limit=limit(100, HOUR, burst=8))
    free = await create()
    async with watching(address) as client:
        await client.granted()
        answer = await shares_of(
            client, 1, **{token.token.id: 1_000 for token in (fast, slow, free)}, tok_unknown=5
        )
        assert [(share.token_id, share.rate_limit) for share in answer.shares] == [
            (fast.token.id, limit(1_000, SECOND, burst=8))
        ]
        assert answer.shares[0].calls == 4
        assert 0 < answer.share_duration.ToSeconds() + answer.share_duration.nanos < 10**9
        # The same number again, and a number that is not higher, get no answer.
        asked = pb.RateSharesRequest(
            number=1, wanted=[pb.WantedCalls(token_id=fast.token.id, calls=1)]
        )
        await client.say(rate_shares_request=asked)
        assert (await shares_of(client, 2)).shares == []


async def test_shares_and_verifies_use_up_one_limit(address, stub, create):
    """What clients got over Watch is missing for verifies on the server."""
    # The fastest limit whose calls cannot come back within the test.
    created = await create(rate_limit=limit(8_000, HOUR, burst=10))
    async with watching(address) as client:
        await client.granted()
        answer = await shares_of(client, 1, **{created.token.id: 5})
    given = sum(share.calls for share in answer.shares)
    assert given == 1, "as many as half a second permits"
    verdicts = [await verdict(stub, created.secret) for _ in range(14)]
    assert verdicts.count("VALID") in (9, 10)
